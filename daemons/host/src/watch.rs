//! Notices what happens by itself: projects that end, and grants that leave.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use cocalc_auth_live::Knowledge;
use cocalc_core::{
    bus::{Bus, Payload},
    connector::Peer,
    control::{PeerRequest, ProjectReport, api_subject},
    grant::Ledger,
    ids::{MoveId, ProjectId, Timestamp},
    moves::host::{MoveHost, Sending},
    router::Reach,
    runner::{Runner, State, Status},
};
use tokio::sync::broadcast::error::RecvError;

use crate::{backends::Backends, lifecycle::Lifecycle};

/// How often the runner is asked what runs.
const INTERVAL: Duration = Duration::from_secs(2);
/// What has ended by itself so long ago is not brought back by a reboot. While the
/// machine goes down its projects end, too.
const REST: Duration = Duration::from_secs(600);
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
    // Of which run, too: one that was started and died between two looks is news.
    let mut told: BTreeMap<ProjectId, (State, Option<Timestamp>)> = BTreeMap::new();
    let mut resting: BTreeMap<ProjectId, (Instant, Option<Timestamp>)> = BTreeMap::new();
    loop {
        tokio::time::sleep(INTERVAL).await;
        let running = match runner.list().await {
            Ok(running) => running,
            Err(error) => {
                tracing::warn!(error = %cocalc_core::chain(&error), "cannot tell what runs");
                continue;
            }
        };
        let here: BTreeSet<ProjectId> = running.iter().map(|status| status.project).collect();
        told.retain(|project, _| here.contains(project));
        resting.retain(|project, _| here.contains(project));
        // What has become known, also of projects that the runner has nothing of.
        let unknown: Vec<ProjectId> = lifecycle.unknown().iter().copied().collect();
        for project in unknown {
            let Ok(report) = lifecycle.report(project, vec![]).await else { continue };
            let held = ledger.entry(project).is_some_and(|entry| entry.may_run().is_some());
            if !held || tell(&*bus, peer, PeerRequest::Changed(report)).await {
                lifecycle.unknown().remove(&project);
            }
        }
        for status in running {
            if status.state == State::Unknown {
                told.remove(&status.project);
                tell_unknown(&*bus, peer, &ledger, &lifecycle, status).await;
                continue;
            }
            // Passing states are reported by whoever brings them about.
            let settled = matches!(status.state, State::Running | State::Stopped);
            lifecycle.deaths().seen(&status);
            if status.state == State::Stopped {
                let (since, run) =
                    resting.entry(status.project).or_insert_with(|| (Instant::now(), status.started));
                if *run != status.started {
                    (*since, *run) = (Instant::now(), status.started);
                }
                if since.elapsed() >= REST {
                    lifecycle.let_rest(status.project).await;
                    // Not again for as long.
                    *since = Instant::now();
                }
            } else {
                resting.remove(&status.project);
            }
            let now = (status.state, status.started);
            if !settled || told.get(&status.project) == Some(&now) {
                continue;
            }
            let held = ledger.entry(status.project).is_some_and(|entry| entry.may_run().is_some());
            let Ok(report) = lifecycle.report(status.project, vec![]).await else { continue };
            if !held || tell(&*bus, peer, PeerRequest::Changed(report)).await {
                told.insert(status.project, now);
            }
        }
    }
}

/// Tells the master once that it is not known what a project does.
async fn tell_unknown(bus: &dyn Bus, peer: Peer, ledger: &Ledger, lifecycle: &Lifecycle, status: Status) {
    let project = status.project;
    let Some(epoch) = ledger.entry(project).and_then(|entry| entry.may_run()) else { return };
    if lifecycle.unknown().contains(&project) {
        return;
    }
    let report = ProjectReport { project, epoch: Some(epoch), status, phases: Vec::new() };
    // Before: it may be known again by the time the master answers.
    lifecycle.unknown().insert(project);
    if !tell(bus, peer, PeerRequest::Changed(report)).await {
        lifecycle.unknown().remove(&project);
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

/// How often the master is told how far a stream is.
const STREAM_INTERVAL: Duration = Duration::from_secs(1);

/// The streams of moves that leave this host. Clones share them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Streams(Arc<Mutex<BTreeMap<MoveId, Stream>>>);

#[derive(Debug)]
struct Stream {
    now: Sending,
    /// Where it was when the master was told last, and when that was.
    told: (u64, Instant),
}

impl Streams {
    /// Notes how far a stream is.
    pub(crate) fn hear(&self, sending: &Sending) {
        let mut streams = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let begun = || Stream { now: sending.clone(), told: (0, Instant::now()) };
        let stream = streams.entry(sending.move_id).or_insert_with(begun);
        if stream.now.name != sending.name || stream.now.bytes > sending.bytes {
            *stream = begun();
        }
        stream.now = sending.clone();
    }

    /// What there is to tell since the last time; those of which there was
    /// nothing are forgotten.
    fn news(&self) -> Vec<PeerRequest> {
        let mut streams = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        streams.retain(|_, stream| stream.now.bytes > stream.told.0);
        let news = streams.values_mut().map(|stream| {
            let (before, since) = stream.told;
            let millis = since.elapsed().as_millis().max(1);
            let rate = u128::from(stream.now.bytes - before) * 1000 / millis;
            stream.told = (stream.now.bytes, Instant::now());
            PeerRequest::Sending {
                move_id: stream.now.move_id,
                name: stream.now.name.clone(),
                bytes: stream.now.bytes,
                estimated_bytes: stream.now.estimated_bytes,
                bytes_per_sec: u64::try_from(rate).unwrap_or(u64::MAX),
            }
        });
        news.collect()
    }
}

/// Tells the master how far streams are, until the future is dropped.
pub(crate) async fn streams(peer: Peer, bus: Arc<dyn Bus>, streams: Streams) {
    loop {
        tokio::time::sleep(STREAM_INTERVAL).await;
        for news in streams.news() {
            // Who does not hear it hears the next.
            tell(&*bus, peer, news).await;
        }
    }
}

/// How often it is looked for undo that is old enough to go.
const UNDO_INTERVAL: Duration = Duration::from_secs(600);

/// Deletes what moves have left here as undo when it is old enough, until the
/// future is dropped.
pub(crate) async fn undo(moves: MoveHost, age: Duration) {
    loop {
        moves.expire_undo(age).await;
        tokio::time::sleep(UNDO_INTERVAL.min(age.max(Duration::from_secs(1)))).await;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_master_hears_how_far_a_stream_is_and_only_when_it_goes_on() {
        let streams = Streams::default();
        let project = ProjectId::random();
        let move_id = MoveId::random();
        let at = |name: &str, bytes| Sending {
            project,
            move_id,
            name: name.parse().unwrap(),
            bytes,
            estimated_bytes: 1000,
        };
        let told = |news: Vec<PeerRequest>| -> Vec<(String, u64)> {
            let told = news.into_iter().map(|news| match news {
                PeerRequest::Sending { name, bytes, estimated_bytes: 1000, .. } => (name.to_string(), bytes),
                other => panic!("{other:?}"),
            });
            told.collect()
        };
        assert!(streams.news().is_empty());
        streams.hear(&at("one", 10));
        streams.hear(&at("one", 500));
        assert_eq!(told(streams.news()), [("one".to_owned(), 500)]);
        streams.hear(&at("one", 900));
        streams.hear(&at("two", 20));
        assert_eq!(told(streams.news()), [("two".to_owned(), 20)], "the next stream begins anew");
        assert!(streams.news().is_empty(), "nothing new");
        assert!(streams.0.lock().unwrap().is_empty(), "and it is forgotten");
    }
}
