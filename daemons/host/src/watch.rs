//! Notices what happens by itself: projects that end, and grants that leave.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use cocalc_auth_live::Knowledge;
use cocalc_core::{
    bus::{Bus, Payload},
    connector::Peer,
    control::{PeerRequest, api_subject},
    grant::Ledger,
    ids::ProjectId,
    router::Reach,
    runner::{Runner, State},
};
use tokio::sync::broadcast::error::RecvError;

use crate::{backends::Backends, lifecycle::Lifecycle};

/// How often the runner is asked what runs.
const INTERVAL: Duration = Duration::from_secs(2);
/// How long the master may take to hear of a change.
const TELL_LIMIT: Duration = Duration::from_secs(5);

/// Tells the master when a project changes its state by itself, until the
/// future is dropped.
pub(crate) async fn states(
    peer: Peer,
    bus: Arc<dyn Bus>,
    ledger: Ledger,
    runner: Arc<dyn Runner>,
    lifecycle: Lifecycle,
) {
    let mut told: BTreeMap<ProjectId, State> = BTreeMap::new();
    loop {
        tokio::time::sleep(INTERVAL).await;
        let running = match runner.list().await {
            Ok(running) => running,
            Err(error) => {
                tracing::warn!(error = %cocalc_core::chain(&error), "cannot tell what runs");
                continue;
            }
        };
        told.retain(|project, _| running.iter().any(|status| status.project == *project));
        for status in running {
            // Passing states are reported by whoever brings them about.
            let settled = matches!(status.state, State::Running | State::Stopped);
            if !settled || told.get(&status.project) == Some(&status.state) {
                continue;
            }
            let held = ledger.entry(status.project).is_some_and(|entry| entry.may_run().is_some());
            let Ok(report) = lifecycle.report(status.project, vec![]).await else { continue };
            if !held || tell(&*bus, peer, PeerRequest::Changed(report)).await {
                told.insert(status.project, status.state);
            }
        }
    }
}

/// How often free space is looked at, and by how much it must have changed to
/// be told.
const SPACE_INTERVAL: Duration = Duration::from_secs(5);
const SPACE_STEP: u64 = 64 << 20;

/// Tells the master how much space is free, until the future is dropped: it
/// places projects by that.
pub(crate) async fn space(peer: Peer, bus: Arc<dyn Bus>, backends: Backends) {
    let mut told: Option<u64> = None;
    loop {
        tokio::time::sleep(SPACE_INTERVAL).await;
        let free_bytes = (backends.free_bytes)();
        if told.is_some_and(|told| told.abs_diff(free_bytes) < SPACE_STEP) {
            continue;
        }
        if tell(&*bus, peer, PeerRequest::Space { free_bytes }).await {
            told = Some(free_bytes);
        }
    }
}

async fn tell(bus: &dyn Bus, peer: Peer, request: PeerRequest) -> bool {
    let Ok(payload) = Payload::json(&request) else { return false };
    bus.request(&api_subject(peer), payload, TELL_LIMIT).await.is_ok()
}

/// Closes the connections of a project as soon as it is another host's, until
/// the future is dropped.
pub(crate) async fn departures(ledger: Ledger, knowledge: Arc<Knowledge>) {
    let mut routes = ledger.routes();
    loop {
        match routes.recv().await {
            Ok(route) => {
                if matches!(route.how, Reach::Remote(_)) {
                    knowledge.close_project(route.project);
                }
            }
            Err(RecvError::Lagged(_)) => {
                for entry in ledger.entries() {
                    if entry.may_run().is_none() {
                        knowledge.close_project(entry.project);
                    }
                }
            }
            Err(RecvError::Closed) => return,
        }
    }
}
