//! Watches who uses the projects that run here, warns, and has idle ones stopped.
//!
//! The master stops them: it knows of moves and other exclusive work that this
//! host has not heard of. Without the master nothing is stopped for being idle.
//! What stopped projects cost here is nothing, and what idle ones cost is one
//! look at their control group in a sample.

mod jobs;
mod saved;
mod totals;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use cocalc_core::{
    activity::{Circumstances, IdleLimits, IdlePolicy, IdleReport, Meters, Record, Source, Verdict, Warning},
    bus::{Bus, Payload},
    clock::Clock,
    connector::Peer,
    control::{PeerReply, PeerRequest, api_subject},
    grant::{Entry, Ledger},
    ids::{Epoch, ProjectId, Timestamp},
    router::Reach,
    runner::{Runner, State, Stats},
    storage::Storage,
};

use self::totals::{Totals, Used};

/// How often verdicts are looked at, at most.
const TICK: Duration = Duration::from_secs(5);
/// How often a record is saved.
const SAVE_EVERY: Duration = Duration::from_secs(60);
/// How long the master may take to accept a stop.
const MASTER_LIMIT: Duration = Duration::from_secs(5);
/// How long a stop that was asked for is waited for before it is asked again.
const STOP_LIMIT: Duration = Duration::from_secs(60);
/// How long measuring a project may take.
const MEASURE_LIMIT: Duration = Duration::from_secs(5);

/// What keeps a project from being stopped whose use cannot be measured.
const UNSEEN: &str = "the time in which what it does cannot be measured";

/// What an idle watch is built from.
pub(crate) struct Parts {
    pub(crate) policy: IdlePolicy,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) meters: Meters,
    pub(crate) ledger: Ledger,
    pub(crate) runner: Arc<dyn Runner>,
    pub(crate) storage: Arc<dyn Storage>,
    /// What is done with a project that a stop must not come into, for instance
    /// `a backup`. Must not block.
    pub(crate) occupied: Box<dyn Fn(ProjectId) -> Option<&'static str> + Send + Sync>,
    /// Where records outlive the daemon.
    pub(crate) directory: PathBuf,
}

/// The use of the projects that run here. Clones share it.
#[derive(Clone)]
pub struct Idle(Arc<Inner>);

struct Inner {
    parts: Parts,
    watched: Mutex<BTreeMap<ProjectId, Watched>>,
    used: Mutex<Used>,
}

impl std::fmt::Debug for Idle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Idle").field("policy", &self.0.parts.policy).finish_non_exhaustive()
    }
}

/// One run of a project.
#[derive(Debug)]
struct Watched {
    record: Record,
    started: Option<Timestamp>,
    limits: IdleLimits,
    sample: Option<(Duration, Stats)>,
    /// How many of its processes were killed for memory, and when that was seen.
    oom: Option<(u64, Duration)>,
    saved: Duration,
    asked: Option<Duration>,
    /// Why it will have been stopped, once the master has agreed.
    reason: Option<String>,
    /// Whether its use could not be measured the last time.
    unseen: bool,
}

impl Idle {
    pub(crate) fn new(parts: Parts) -> Self {
        Self(Arc::new(Inner { parts, watched: Mutex::default(), used: Mutex::default() }))
    }

    fn watched(&self) -> MutexGuard<'_, BTreeMap<ProjectId, Watched>> {
        self.0.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What all projects together use, as of the last looks at them.
    pub(crate) fn totals(&self) -> Totals {
        let used = *self.0.used.lock().unwrap_or_else(PoisonError::into_inner);
        let watched = self.watched();
        let samples = || watched.values().filter_map(|one| one.sample.as_ref().map(|(_, stats)| stats));
        Totals {
            running: u64::try_from(watched.len()).unwrap_or(u64::MAX),
            memory_bytes: samples().map(|stats| stats.memory_bytes).sum(),
            pids: samples().map(|stats| stats.pids).sum(),
            used,
        }
    }

    /// What a project must not be cut off from.
    fn occupation(&self, entry: Option<&Entry>, project: ProjectId) -> Option<&'static str> {
        if let Some(what) = (self.0.parts.occupied)(project) {
            return Some(what);
        }
        let moving = |entry: &Entry| entry.frozen.is_some() || entry.reserved.is_some();
        let parked =
            || self.0.parts.ledger.route(project).is_some_and(|route| matches!(route.how, Reach::Parked));
        if entry.is_some_and(moving) || parked() {
            return Some("a move");
        }
        self.watched().get(&project).is_some_and(|one| one.unseen).then_some(UNSEEN)
    }

    /// Who uses a project, and until when it runs.
    pub(crate) async fn report(&self, project: ProjectId) -> cocalc_core::runner::Result<IdleReport> {
        let parts = &self.0.parts;
        let status = parts.runner.status(project).await?;
        let entry = parts.ledger.entry(project);
        let busy = self.occupation(entry.as_ref(), project).map(str::to_owned);
        let (now, wall) = (parts.clock.boot(), parts.clock.wall());
        let settings = entry.as_ref().map(|entry| entry.config.idle).unwrap_or_default();
        let limits = IdleLimits::new(&parts.policy, &settings);
        let running = status.state == State::Running;
        let mut report = IdleReport {
            project,
            running,
            started: status.started,
            timeout_ms: limits.timeout.map(millis),
            work: Vec::new(),
            presence: None,
            keep_ms: settings.keep_until.map(|until| millis(until.since(wall))).filter(|left| *left > 0),
            jobs: Vec::new(),
            busy,
            stops_in_ms: None,
            warned: false,
            reason: status.reason,
            oom_kills: None,
        };
        let mut watched = self.watched();
        if let Some(one) = watched.get_mut(&project).filter(|_| running) {
            self.drain(project, one, settings.keep_until);
            let ago = |at: Duration| millis(now.saturating_sub(at));
            report.work = one.record.work().iter().map(|(source, at)| (*source, ago(*at))).collect();
            report.presence = one.record.last_presence().map(|(source, at)| (source, ago(at)));
            report.jobs = one
                .record
                .jobs(now)
                .map(|(name, until)| (name.to_owned(), millis(until.saturating_sub(now))))
                .collect();
            let circumstances = Circumstances { limits, busy: report.busy.as_deref() };
            let stops = match one.record.verdict(&circumstances, now) {
                Verdict::Never => None,
                Verdict::Runs { until } | Verdict::Warn { until } => Some(until),
                Verdict::Waits { .. } | Verdict::Stop { .. } => Some(now),
            };
            report.stops_in_ms = stops.map(|at| millis(at.saturating_sub(now)));
            report.warned = one.record.is_warned();
            report.oom_kills = one.oom.map(|(count, at)| (count, ago(at)));
        } else if running {
            // Not looked at since it was started.
            report.stops_in_ms = report.timeout_ms;
        }
        Ok(report)
    }

    /// Why a project that was just stopped was stopped from here, if it was.
    pub(crate) fn stopped(&self, project: ProjectId) -> Option<String> {
        self.watched().get_mut(&project)?.reason.take()
    }

    /// Takes over what the ingresses noted.
    fn drain(&self, project: ProjectId, one: &mut Watched, keep_until: Option<Timestamp>) {
        let parts = &self.0.parts;
        let noted = parts.meters.take(project);
        for (source, at) in noted.work {
            one.record.worked(source, at);
        }
        for (source, at) in noted.presence {
            one.record.present(source, at);
        }
        let (now, wall) = (parts.clock.boot(), parts.clock.wall());
        one.record.keep(keep_until.map(|until| now + until.since(wall)));
    }

    /// Watches until the future is dropped.
    pub(crate) async fn run(self, peer: Peer, bus: Arc<dyn Bus>) {
        let tick = TICK.min(Duration::from_secs(self.0.parts.policy.sample_secs.into()));
        loop {
            self.round(peer, &bus).await;
            tokio::time::sleep(tick).await;
        }
    }

    async fn round(&self, peer: Peer, bus: &Arc<dyn Bus>) {
        let parts = &self.0.parts;
        let all = match parts.runner.list().await {
            Ok(all) => all,
            Err(error) => {
                tracing::warn!(error = %cocalc_core::chain(&error), "cannot tell what runs");
                return;
            }
        };
        let unknown: BTreeSet<ProjectId> =
            all.iter().filter(|one| one.state == State::Unknown).map(|one| one.project).collect();
        let running: BTreeMap<ProjectId, Option<Timestamp>> = all
            .into_iter()
            .filter(|status| status.state == State::Running)
            .map(|status| (status.project, status.started))
            .collect();
        self.settle(&running, &unknown).await;
        for project in running.into_keys() {
            let Some(entry) = parts.ledger.entry(project) else { continue };
            self.sample(project, &entry).await;
            if let Some(epoch) = self.decide(project, &entry) {
                self.ask(peer, bus, project, epoch).await;
            }
            self.save(project).await;
        }
    }

    /// Begins to watch what runs, and forgets what does not, as far as that is known.
    async fn settle(&self, running: &BTreeMap<ProjectId, Option<Timestamp>>, unknown: &BTreeSet<ProjectId>) {
        let parts = &self.0.parts;
        let is_gone = |project: &&ProjectId| !running.contains_key(project) && !unknown.contains(project);
        let gone: Vec<ProjectId> = self.watched().keys().filter(is_gone).copied().collect();
        for project in gone {
            // The reason is taken by whoever stops it, which may be going on.
            if self.watched().get(&project).is_some_and(|one| one.reason.is_none()) {
                self.watched().remove(&project);
                parts.meters.warn(project, None);
                parts.meters.forget(project);
                saved::forget(&parts.directory, project).await;
            }
        }
        for (project, started) in running {
            if self.watched().get(project).is_some_and(|one| one.started == *started) {
                continue;
            }
            let (now, wall) = (parts.clock.boot(), parts.clock.wall());
            let found = saved::load(&parts.directory, *project, *started, now).await;
            let record = found.unwrap_or_else(|| {
                let mut record = Record::default();
                record.started(now.saturating_sub(started.map_or(Duration::ZERO, |at| wall.since(at))));
                record
            });
            let limits = IdleLimits::new(&parts.policy, &Default::default());
            let one = Watched {
                record,
                started: *started,
                limits,
                sample: None,
                oom: None,
                saved: now.saturating_sub(SAVE_EVERY),
                asked: None,
                reason: None,
                unseen: false,
            };
            self.watched().insert(*project, one);
            parts.meters.warn(*project, None);
        }
    }

    /// Looks at what its processes use, and what they declare, when it is time.
    async fn sample(&self, project: ProjectId, entry: &Entry) {
        let parts = &self.0.parts;
        let now = parts.clock.boot();
        let every = Duration::from_secs(parts.policy.sample_secs.into());
        let before = match self.watched().get(&project) {
            Some(one) if one.sample.is_none_or(|(at, _)| now.saturating_sub(at) >= every) => one.sample,
            _ => return,
        };
        let measured = tokio::time::timeout(MEASURE_LIMIT, parts.runner.stats(project)).await;
        let Ok(Ok(stats)) = measured else {
            // What cannot be seen is not for that idle.
            if let Some(one) = self.watched().get_mut(&project) {
                one.unseen = true;
            }
            return;
        };
        let jobs = if IdleLimits::new(&parts.policy, &entry.config.idle).timeout.is_some() {
            jobs::declared(&*parts.storage, project, parts.clock.wall()).await
        } else {
            Some(BTreeMap::new())
        };
        let mut watched = self.watched();
        let Some(one) = watched.get_mut(&project) else { return };
        one.sample = Some((now, stats));
        one.unseen = false;
        if let Some(jobs) = jobs {
            one.record.declare(jobs.into_iter().map(|(name, left)| (name, now + left)).collect());
        }
        let known = one.oom.map_or(0, |(count, _)| count);
        if stats.oom_kills > known {
            tracing::info!(%project, kills = stats.oom_kills, "processes were killed because its memory was used up");
            one.oom = Some((stats.oom_kills, now));
        }
        let Some((since, then)) = before else { return };
        self.0.used.lock().unwrap_or_else(PoisonError::into_inner).add(&then, &stats);
        let millis = u64::try_from(now.saturating_sub(since).as_millis()).unwrap_or(u64::MAX).max(1);
        // Microseconds in a millisecond are thousandths of a core.
        let cpu = stats.cpu_micros.saturating_sub(then.cpu_micros) / millis;
        if cpu >= u64::from(parts.policy.cpu_floor_millis.max(1)) {
            one.record.worked(Source::Cpu, now);
        }
        let moved = |stats: &Stats| stats.received_bytes.saturating_add(stats.sent_bytes);
        let network = moved(&stats).saturating_sub(moved(&then)).saturating_mul(1000) / millis;
        if network >= u64::from(parts.policy.network_floor_bytes.max(1)) {
            one.record.worked(Source::Network, now);
        }
    }

    /// Warns, takes warnings back, and says whether to ask for a stop.
    fn decide(&self, project: ProjectId, entry: &Entry) -> Option<Epoch> {
        let parts = &self.0.parts;
        let epoch = entry.may_run()?;
        let busy = self.occupation(Some(entry), project);
        let now = parts.clock.boot();
        let mut watched = self.watched();
        let one = watched.get_mut(&project)?;
        one.limits = IdleLimits::new(&parts.policy, &entry.config.idle);
        self.drain(project, one, entry.config.idle.keep_until);
        let verdict = one.record.verdict(&Circumstances { limits: one.limits, busy }, now);
        match verdict {
            Verdict::Never | Verdict::Runs { .. } => parts.meters.warn(project, None),
            Verdict::Warn { until } => {
                parts.meters.warn(project, Some(warning(project, until, now, &one.limits)));
            }
            Verdict::Waits { .. } => {}
            Verdict::Stop { idle } => {
                if one.asked.is_some_and(|asked| now.saturating_sub(asked) < STOP_LIMIT) {
                    return None;
                }
                one.asked = Some(now);
                one.reason = Some(reason(&one.record, idle, now, parts.clock.wall(), &one.limits));
                return Some(epoch);
            }
        }
        one.reason = None;
        one.asked = None;
        None
    }

    async fn ask(&self, peer: Peer, bus: &Arc<dyn Bus>, project: ProjectId, epoch: Epoch) {
        let request = PeerRequest::Idle { project, epoch };
        let Ok(payload) = Payload::json(&request) else { return };
        let answer = bus.request(&api_subject(peer), payload, MASTER_LIMIT).await;
        match answer.map(|message| message.payload.parse::<PeerReply>()) {
            Ok(Ok(PeerReply::Done)) => tracing::info!(%project, "idle, and being stopped"),
            Ok(Ok(PeerReply::Error { message })) => {
                tracing::info!(%project, reason = message, "idle, but the master does not stop it now");
                self.withdraw(project);
            }
            Ok(_) => self.withdraw(project),
            // It may have been heard: the reason stays, for the stop that may come.
            Err(error) => {
                tracing::info!(%project, error = %cocalc_core::chain(&error), "idle, but the master does not answer");
            }
        }
    }

    fn withdraw(&self, project: ProjectId) {
        if let Some(one) = self.watched().get_mut(&project) {
            one.reason = None;
        }
    }

    async fn save(&self, project: ProjectId) {
        let parts = &self.0.parts;
        let now = parts.clock.boot();
        let saved = match self.watched().get_mut(&project) {
            Some(one) if now.saturating_sub(one.saved) >= SAVE_EVERY => {
                one.saved = now;
                (one.started, one.record.save(now))
            }
            _ => return,
        };
        if let Err(error) = saved::save(&parts.directory, project, saved.0, saved.1, now).await {
            tracing::warn!(%project, %error, "its use could not be recorded");
        }
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// What is told to who sits before a terminal.
fn warning(project: ProjectId, at: Duration, now: Duration, limits: &IdleLimits) -> Warning {
    let left = words(at.saturating_sub(now).max(Duration::from_secs(1)));
    let idle = words(limits.timeout.unwrap_or_default());
    let text = format!(
        "this project has been idle and will be stopped in {left} (idle time: {idle}). Press a key to go on, \
         or: cocalc project keep {project} --for 2h"
    );
    Warning { at, text }
}

/// Why it was stopped, for its owner.
fn reason(record: &Record, idle: Duration, now: Duration, wall: Timestamp, limits: &IdleLimits) -> String {
    let limit = words(limits.timeout.unwrap_or_default());
    let last = match record.last_work() {
        Some((Source::Start, _)) | None => "it was not used since its start".to_owned(),
        Some((source, at)) => {
            let at = Timestamp::from_millis(
                wall.millis()
                    .saturating_sub(i64::try_from(now.saturating_sub(at).as_millis()).unwrap_or(i64::MAX)),
            );
            format!("it was last used at {} by {}", time(at), source.words())
        }
    };
    format!(
        "stopped at {} after {} without use (idle time: {limit}): {last}; its users were warned",
        time(wall),
        words(idle)
    )
}

fn time(at: Timestamp) -> String {
    cocalc_core::activity::time(at)
}

/// A duration in its largest unit that leaves nothing much out.
fn words(duration: Duration) -> String {
    match duration.as_secs() {
        secs @ 0..120 => format!("{secs} s"),
        secs @ 120..7200 => format!("{} min", secs.div_ceil(60)),
        secs => format!("{:.1} h", secs as f64 / 3600.0),
    }
}

#[cfg(test)]
mod tests;
