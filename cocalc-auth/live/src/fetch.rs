//! Asking the master for one project, once for all who wait for it.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use cocalc_core::{
    bus::{Bus, Payload},
    connector::Peer,
    control::{PeerReply, PeerRequest, api_subject},
    ids::ProjectId,
};
use tokio::{sync::watch, time::Instant};

use crate::Knowledge;

/// How long a fetch may take before the answer is no.
const FETCH_LIMIT: Duration = Duration::from_secs(1);
/// How long a project that could not be had is not asked for again.
const NEGATIVE_FOR: Duration = Duration::from_secs(5);
const NEGATIVE_MAX: usize = 4096;
const RUNNING_MAX: usize = 256;

#[derive(Default)]
pub(crate) struct Fetches(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    master: Option<(Arc<dyn Bus>, Peer)>,
    running: BTreeMap<ProjectId, watch::Receiver<bool>>,
    negative: BTreeMap<ProjectId, Duration>,
}

impl fmt::Debug for Fetches {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fetches").finish_non_exhaustive()
    }
}

impl Knowledge {
    pub(crate) fn fetch_from(&self, bus: Arc<dyn Bus>, peer: Peer) {
        self.fetches.lock().master = Some((bus, peer));
    }

    /// Asks the master for `project`, and waits until `settled` holds of what is
    /// known, at most a second; whether it does. Cancel safe: others who wait
    /// for the same project go on.
    pub(crate) async fn fetch(self: &Arc<Self>, project: ProjectId, settled: impl Fn() -> bool) -> bool {
        let deadline = Instant::now() + FETCH_LIMIT;
        let mut applied = self.applied.subscribe();
        let Some(mut done) = self.join_fetch(project) else { return false };
        let _ = tokio::time::timeout_at(deadline, done.wait_for(|done| *done)).await;
        // The answer may overtake the frame that it announces.
        loop {
            applied.mark_unchanged();
            if settled() {
                return true;
            }
            match tokio::time::timeout_at(deadline, applied.changed()).await {
                Ok(Ok(())) => {}
                _ => break,
            }
        }
        let now = self.clock.boot();
        let mut fetches = self.fetches.lock();
        if fetches.negative.len() >= NEGATIVE_MAX {
            fetches.negative.retain(|_, until| *until > now);
        }
        if fetches.negative.len() < NEGATIVE_MAX {
            fetches.negative.insert(project, now + NEGATIVE_FOR);
        }
        false
    }

    fn join_fetch(self: &Arc<Self>, project: ProjectId) -> Option<watch::Receiver<bool>> {
        let now = self.clock.boot();
        let mut fetches = self.fetches.lock();
        if fetches.negative.get(&project).is_some_and(|until| *until > now) {
            return None;
        }
        fetches.negative.remove(&project);
        if let Some(running) = fetches.running.get(&project) {
            return Some(running.clone());
        }
        let (bus, peer) = fetches.master.clone()?;
        if fetches.running.len() >= RUNNING_MAX {
            return None;
        }
        let (sender, receiver) = watch::channel(false);
        fetches.running.insert(project, receiver.clone());
        let this = self.clone();
        // It ends by itself within the limit, and serves all who joined it.
        tokio::spawn(async move {
            let request = Payload::json(&PeerRequest::FetchProject { project });
            if let Ok(request) = request {
                match bus.request(&api_subject(peer), request, FETCH_LIMIT).await {
                    Ok(reply) => {
                        if let Ok(PeerReply::Error { message }) = reply.payload.parse() {
                            tracing::debug!(%project, message, "the master does not give the project");
                        }
                    }
                    Err(error) => tracing::debug!(%project, %error, "cannot fetch the project"),
                }
            }
            this.fetches.lock().running.remove(&project);
            sender.send_replace(true);
        });
        Some(receiver)
    }
}

impl Fetches {
    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
