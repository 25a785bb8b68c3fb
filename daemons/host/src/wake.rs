//! Starts a stopped project because somebody who may use it asks for it.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use cocalc_core::{
    bus::{Bus, Payload},
    connector::Peer,
    control::{PeerReply, PeerRequest, api_subject},
    grant::Ledger,
    ids::ProjectId,
    runner::{Runner, State},
    wake::{Awake, Wake},
};

use crate::lifecycle::Lifecycle;

/// How long the master may take to accept the start.
const MASTER_LIMIT: Duration = Duration::from_secs(2);
/// How long a start may take before it is tried anew.
const START_LIMIT: Duration = Duration::from_secs(60);
/// How long the reason of a failed start is shown before the next try.
const FAILURE_SHOWN: Duration = Duration::from_secs(5);

/// Wakes projects of this host.
#[derive(Debug)]
pub(crate) struct HostWake {
    pub(crate) peer: Peer,
    pub(crate) bus: Arc<dyn Bus>,
    pub(crate) ledger: Ledger,
    pub(crate) runner: Arc<dyn Runner>,
    pub(crate) lifecycle: Lifecycle,
    pub(crate) starts: Arc<Starts>,
}

/// The starts under way, and those that failed a moment ago.
#[derive(Debug, Default)]
pub(crate) struct Starts(Mutex<BTreeMap<ProjectId, Start>>);

#[derive(Clone, Debug)]
struct Start {
    begun: Instant,
    failed: Option<(Instant, String)>,
}

impl Starts {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<ProjectId, Start>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Joins the start that is under way or has just failed, or begins one.
    fn begin(&self, project: ProjectId) -> Option<Awake> {
        let mut starts = self.lock();
        let now = Instant::now();
        starts.retain(|_, start| match &start.failed {
            Some((at, _)) => now.duration_since(*at) < FAILURE_SHOWN,
            None => now.duration_since(start.begun) < START_LIMIT,
        });
        if let Some(start) = starts.get(&project) {
            return Some(match &start.failed {
                Some((_, reason)) => Awake::Failed { reason: reason.clone() },
                None => Awake::Starting { phase: "starting".to_owned() },
            });
        }
        starts.insert(project, Start { begun: now, failed: None });
        None
    }

    fn end(&self, project: ProjectId, outcome: Result<(), String>) {
        let mut starts = self.lock();
        match (outcome, starts.get_mut(&project)) {
            (Err(reason), Some(start)) => start.failed = Some((Instant::now(), reason)),
            (Ok(()), _) => drop(starts.remove(&project)),
            _ => {}
        }
    }
}

#[async_trait]
impl Wake for HostWake {
    async fn wake(&self, project: ProjectId) -> Awake {
        match self.runner.status(project).await {
            Ok(status) if status.state == State::Running => return Awake::Running,
            Ok(status) => {
                if let Some(reason) = self.lifecycle.deaths().wait(&status) {
                    return Awake::Failed { reason };
                }
            }
            Err(error) => return Awake::Failed { reason: cocalc_core::chain(&error) },
        }
        let Some(epoch) = self.ledger.entry(project).and_then(|entry| entry.may_run()) else {
            return Awake::Failed { reason: "it may not run on this host now".to_owned() };
        };
        if let Some(joined) = self.starts.begin(project) {
            return joined;
        }
        let (peer, bus) = (self.peer, Arc::clone(&self.bus));
        let (lifecycle, starts, runner) =
            (self.lifecycle.clone(), Arc::clone(&self.starts), Arc::clone(&self.runner));
        tokio::spawn(async move {
            // The master knows of moves that this host has not heard of yet,
            // so it is asked first. Without it the grant decides.
            lifecycle.forget_failure(project);
            let outcome = match ask(&*bus, peer, PeerRequest::Wake { project, epoch }).await {
                Some(PeerReply::Done) => wait_running(&*runner, &lifecycle, project).await,
                Some(PeerReply::Error { message }) => Err(message),
                Some(_) => Err("the master's answer makes no sense".to_owned()),
                None => lifecycle.start_held(project).await.map(drop).map_err(|e| e.message),
            };
            if let Err(reason) = &outcome {
                tracing::info!(%project, reason, "could not be woken");
            }
            starts.end(project, outcome);
        });
        Awake::Starting { phase: "starting".to_owned() }
    }
}

/// Waits until the master's start has had its effect here.
async fn wait_running(runner: &dyn Runner, lifecycle: &Lifecycle, project: ProjectId) -> Result<(), String> {
    let deadline = tokio::time::Instant::now() + START_LIMIT;
    while tokio::time::Instant::now() < deadline {
        match runner.status(project).await {
            Ok(status) if status.state == State::Running => return Ok(()),
            Ok(_) => match lifecycle.start_failure(project) {
                Some(reason) => return Err(reason),
                None => tokio::time::sleep(Duration::from_millis(50)).await,
            },
            Err(error) => return Err(cocalc_core::chain(&error)),
        }
    }
    Err("it did not start in time".to_owned())
}

/// Asks the master; `None` if it does not answer.
async fn ask(bus: &dyn Bus, peer: Peer, request: PeerRequest) -> Option<PeerReply> {
    let payload = Payload::json(&request).ok()?;
    let message = bus.request(&api_subject(peer), payload, MASTER_LIMIT).await.ok()?;
    message.payload.parse().ok()
}
