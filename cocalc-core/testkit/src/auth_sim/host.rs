//! A host: a machine with its clocks and its disk, and the daemon's driver of
//! `cocalc-auth-live` as a state machine, around the real cache.

use std::{
    collections::{BTreeMap, VecDeque},
    rc::Rc,
    time::Duration,
};

use cocalc_auth::{
    acl::{AclCache, Ask, ConnectionId, Refusal, Standing, Tier, Verdict},
    store::{AclStore, EndSessions, MemoryStore, Position, Save},
    stream::{Entry, Frame},
};
use cocalc_ids::{Epoch, ProjectId, Timestamp};

use super::{
    Broken, Check,
    check::{Facts, Living},
    world::{Answer, Event, Ms, Request, Sim, project_id},
};

// As in `cocalc-auth-live`.
const BATCH: usize = 256;
const RETRY_MIN: Ms = 100;
const RETRY_MAX: Ms = 5_000;
const FETCH_LIMIT: Ms = 1_000;
/// How long a project that could not be had is not asked for again.
pub(super) const NEGATIVE_FOR: Duration = Duration::from_secs(5);
const NEGATIVE_MAX: usize = 4096;
const RUNNING_MAX: usize = 256;
const ROUND_TRIP_MAX: Duration = Duration::from_secs(5);
const SKEW_MAX_MS: i64 = 30_000;

/// A machine.
#[derive(Debug)]
pub(super) struct Host {
    booted_at: Ms,
    boots: u64,
    /// How much too fast its clock runs, in millionths.
    drift_ppm: i64,
    /// How far its wall clock is off.
    pub(super) wall_off: i64,
    pub(super) daemon: Option<Daemon>,
    pub(super) disk: Disk,
    /// A copy of the disk, made earlier.
    pub(super) backup: Option<Disk>,
    /// The highest position of this boot, on a tmpfs.
    mark: Option<Position>,
    /// The grants that it durably holds.
    pub(super) held: BTreeMap<u32, Epoch>,
    /// The highest position that it ever told the master it had applied.
    pub(super) acknowledged: Option<Position>,
    /// Whether it had a lease since it booted.
    pub(super) leased_in_boot: bool,
}

/// What outlives a reboot.
#[derive(Debug, Default)]
pub(super) struct Disk {
    pub(super) store: MemoryStore,
    pub(super) kept: Option<Kept>,
}

/// What is kept beside the stream's entries.
#[derive(Clone, Debug)]
pub(super) struct Kept {
    standing: Standing,
    /// Master time at a boot time.
    estimate: Option<(Timestamp, Duration)>,
}

/// A life of the daemon.
#[derive(Debug)]
pub(super) struct Daemon {
    pub(super) process: u64,
    pub(super) cache: AclCache,
    saved: Option<Position>,
    /// Up to here all is applied, on disk, and gone what it ended.
    in_force: Option<Position>,
    phase: Phase,
    subscription: u64,
    wait: Ms,
    syncing: bool,
    resync: bool,
    connected: bool,
    pub(super) inbox: VecDeque<Rc<Frame>>,
    saving: Option<Saving>,
    /// The session ends as soon as what is being saved is.
    ending: bool,
    progress: Option<Position>,
    told: Option<Position>,
    acknowledging: bool,
    requests: BTreeMap<u64, Request>,
    beat: u64,
    asked: Option<Asked>,
    behind_at: Option<Option<Position>>,
    estimate: Option<(Timestamp, Duration)>,
    connections: BTreeMap<ConnectionId, Facts>,
    /// Told to close, and not gone yet.
    closing: BTreeMap<ConnectionId, Facts>,
    /// Not told, because that is broken.
    forgotten: Vec<Facts>,
    pub(super) fetches: BTreeMap<u32, u64>,
    pub(super) negative: BTreeMap<u32, Duration>,
    waiters: BTreeMap<u64, Waiter>,
    expire_round: u64,
    expire_at: Option<Ms>,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Phase {
    Away,
    Registering,
    Following,
}

#[derive(Debug)]
struct Saving {
    save: Option<Save>,
    end_sessions: bool,
    need_sync: bool,
}

/// A keepalive that is not answered yet.
#[derive(Clone, Copy, Debug)]
struct Asked {
    sent: Duration,
    position: Option<Position>,
}

/// Somebody who waits for a fetch.
#[derive(Clone, Debug)]
struct Waiter {
    project: u32,
    visit: Visit,
    fetched: bool,
}

/// Somebody who wants something.
#[derive(Clone, Debug)]
pub(super) struct Visit {
    pub(super) ask: Ask,
    pub(super) facts: Facts,
    /// Whether a connection is to live on.
    pub(super) stays: bool,
    /// Whether it must succeed, whatever it takes.
    pub(super) must: bool,
}

impl Host {
    pub(super) fn boot(&self, now: Ms) -> Duration {
        let micros = (now - self.booted_at) as i64 * 1000;
        Duration::from_micros((micros + micros / 1000 * self.drift_ppm / 1000) as u64)
    }

    fn boot_id(&self) -> String {
        format!("boot {}", self.boots)
    }

    pub(super) fn subscription(&self) -> u64 {
        self.daemon.as_ref().map_or(0, |daemon| daemon.subscription)
    }

    pub(super) fn is_connected(&self) -> bool {
        self.daemon.as_ref().is_some_and(|daemon| daemon.connected)
    }

    /// Connections that are open, though some were told to close.
    pub(super) fn living(&self) -> impl Iterator<Item = Facts> + '_ {
        self.daemon.iter().flat_map(|daemon| {
            daemon.connections.values().chain(daemon.closing.values()).chain(&daemon.forgotten).copied()
        })
    }

    /// The machine goes down, and with it what is not on disk.
    pub(super) fn reboot(&mut self, now: Ms) {
        self.daemon = None;
        self.mark = None;
        self.booted_at = now;
        self.boots += 1;
        self.leased_in_boot = false;
    }

    /// Master time as the daemon estimates it, and whether its wall clock is too
    /// far off for any token.
    pub(super) fn time(&self, now: Ms, true_time: Timestamp) -> Option<(Timestamp, bool)> {
        let wall = Timestamp::from_millis(true_time.millis() + self.wall_off);
        let daemon = self.daemon.as_ref()?;
        let master = match daemon.estimate {
            Some((master, at)) => master.plus(self.boot(now).saturating_sub(at)),
            None => wall,
        };
        Some((master, (master.millis() - wall.millis()).abs() > SKEW_MAX_MS))
    }
}

impl Daemon {
    /// How many connections ought to be in the index.
    pub(super) fn registered(&self) -> usize {
        self.connections.len()
    }
}

impl Sim {
    pub(super) fn new_host(&mut self, n: usize) -> Host {
        let drift_ppm = self.below(2 * super::check::DRIFT_PPM) as i64 - super::check::DRIFT_PPM as i64;
        Host {
            booted_at: 0,
            boots: n as u64 * 1000,
            drift_ppm,
            wall_off: 0,
            daemon: None,
            disk: Disk::default(),
            backup: None,
            mark: None,
            held: BTreeMap::new(),
            acknowledged: None,
            leased_in_boot: false,
        }
    }

    fn daemon(&mut self, host: usize, process: u64) -> Option<&mut Daemon> {
        self.hosts[host].daemon.as_mut().filter(|daemon| daemon.process == process)
    }

    pub(super) fn start_daemon(&mut self, host: usize) {
        if self.hosts[host].daemon.is_some() {
            return;
        }
        let process = self.name();
        let grace = Duration::from_millis(self.timing.grace);
        let (unnoticed, kept_lease) = (self.is(Broken::RestoreUnnoticed), self.is(Broken::LeaseOverReboot));
        let machine = &mut self.hosts[host];
        let boot_id = machine.boot_id();
        let Ok(saved) = machine.disk.store.load() else { return };
        let mut standing = machine.disk.kept.as_ref().map(|kept| kept.standing.clone());
        let mut mark = machine.mark;
        if let Some(standing) = &mut standing {
            if kept_lease {
                standing.boot_id.clone_from(&boot_id);
            }
            if unnoticed {
                standing.position = None;
            }
        }
        if unnoticed {
            mark = None;
        }
        let cache = AclCache::restore(&saved, standing.as_ref(), mark, &boot_id, grace);
        let estimate = machine
            .disk
            .kept
            .as_ref()
            .filter(|kept| kept.standing.boot_id == boot_id)
            .and_then(|kept| kept.estimate);
        machine.daemon = Some(Daemon {
            process,
            cache,
            saved: saved.position,
            in_force: saved.position,
            phase: Phase::Away,
            subscription: 0,
            wait: RETRY_MIN,
            syncing: false,
            resync: false,
            connected: false,
            inbox: VecDeque::new(),
            saving: None,
            ending: false,
            progress: None,
            told: None,
            acknowledging: false,
            requests: BTreeMap::new(),
            beat: 0,
            asked: None,
            behind_at: None,
            estimate,
            connections: BTreeMap::new(),
            closing: BTreeMap::new(),
            forgotten: Vec::new(),
            fetches: BTreeMap::new(),
            negative: BTreeMap::new(),
            waiters: BTreeMap::new(),
            expire_round: 0,
            expire_at: None,
        });
        self.connect(host, process);
    }

    /// Ends the daemon's process, and with it its connections.
    pub(super) fn kill_daemon(&mut self, host: usize) {
        self.hosts[host].daemon = None;
    }

    // A session with the master.

    pub(super) fn connect(&mut self, host: usize, process: u64) {
        let there = self.links[host].bus.is_none() && self.master.process.is_some();
        let subscription = self.name();
        let Some(daemon) = self.daemon(host, process) else { return };
        if daemon.phase != Phase::Away {
            return;
        }
        if !there {
            return self.try_again(host);
        }
        daemon.phase = Phase::Registering;
        daemon.subscription = subscription;
        self.request(host, Request::Register);
    }

    fn try_again(&mut self, host: usize) {
        let Some(daemon) = &mut self.hosts[host].daemon else { return };
        let (wait, process) = (daemon.wait, daemon.process);
        daemon.wait = (wait * 2).min(RETRY_MAX);
        self.after(wait, Event::Connect { host, process });
    }

    /// The session with the master is over.
    fn end_session(&mut self, host: usize) {
        let Some(daemon) = &mut self.hosts[host].daemon else { return };
        if daemon.saving.is_some() {
            daemon.ending = true;
            return;
        }
        if daemon.phase == Phase::Away {
            return;
        }
        daemon.phase = Phase::Away;
        daemon.subscription = 0;
        daemon.connected = false;
        daemon.syncing = false;
        daemon.ending = false;
        daemon.inbox.clear();
        daemon.requests.retain(|_, request| matches!(request, Request::Acknowledge(_) | Request::Fetch(_)));
        self.try_again(host);
    }

    pub(super) fn unsubscribed(&mut self, host: usize, subscription: u64) {
        if subscription != 0 && self.hosts[host].subscription() == subscription {
            self.end_session(host);
        }
    }

    fn request(&mut self, host: usize, request: Request) {
        let id = self.name();
        let Some(daemon) = &mut self.hosts[host].daemon else { return };
        daemon.requests.insert(id, request);
        let process = daemon.process;
        self.send_request(host, process, id, request);
    }

    pub(super) fn answered(&mut self, host: usize, process: u64, id: u64, answer: Option<Answer>) {
        let (boot, grace) = (self.hosts[host].boot(self.now), self.timing.grace);
        let Some(daemon) = self.daemon(host, process) else { return };
        let Some(request) = daemon.requests.remove(&id) else { return };
        match (request, answer) {
            (Request::Register, Some(Answer::Registered(now))) => {
                daemon.phase = Phase::Following;
                daemon.cache.set_grace(Duration::from_millis(grace));
                daemon.estimate = Some((now, boot));
                daemon.asked = None;
                daemon.beat += 1;
                let beat = daemon.beat;
                self.after(0, Event::KeepaliveDue { host, process, beat });
                self.ask_for_stream(host);
            }
            (Request::Register | Request::Sync(_), None) => self.end_session(host),
            (Request::Register, Some(_)) => {}
            (Request::Sync(_), Some(_)) => {
                daemon.syncing = false;
                if std::mem::take(&mut daemon.resync) {
                    self.ask_for_stream(host);
                }
            }
            (Request::Acknowledge(_), _) => {
                daemon.acknowledging = false;
                self.acknowledge_applied(host);
            }
            (Request::Fetch(project), _) => self.fetched(host, project),
        }
    }

    fn ask_for_stream(&mut self, host: usize) {
        let Some(daemon) = &mut self.hosts[host].daemon else { return };
        let position = daemon.cache.begin_sync();
        daemon.syncing = true;
        self.request(host, Request::Sync(position));
    }

    // The stream.

    pub(super) fn frame_arrives(&mut self, host: usize, subscription: u64, frame: Rc<Frame>) {
        let hasty = self.is(Broken::AcknowledgedBeforeApplied);
        let slow = hasty || self.is(Broken::OutOfOrder);
        let at = Position { stream: frame.stream, seq: frame.seq };
        let Some(daemon) = &mut self.hosts[host].daemon else { return };
        if daemon.subscription != subscription {
            return;
        }
        let process = daemon.process;
        daemon.inbox.push_back(frame);
        if hasty && daemon.cache.is_live() {
            self.say(host, at);
            self.request(host, Request::Acknowledge(at));
        }
        if slow {
            let wait = self.below(1500);
            self.after(wait, Event::Pump { host, process });
        } else {
            self.pump(host, process);
        }
    }

    pub(super) fn pump(&mut self, host: usize, process: u64) {
        let (ignores, reorders, no_grace) =
            (self.is(Broken::GapIgnored), self.is(Broken::OutOfOrder), self.is(Broken::GraceIgnored));
        let Some(mut daemon) = self.hosts[host].daemon.take() else { return };
        if daemon.process != process
            || daemon.phase != Phase::Following
            || daemon.saving.is_some()
            || daemon.inbox.is_empty()
        {
            self.hosts[host].daemon = Some(daemon);
            return;
        }
        let many = daemon.inbox.len().min(BATCH);
        let mut frames: Vec<Rc<Frame>> = daemon.inbox.drain(..many).collect();
        if reorders {
            reverse(&mut frames);
        }
        let mut save: Option<Save> = None;
        let (mut need_sync, mut end_sessions) = (false, false);
        let mut close = Vec::new();
        for frame in &frames {
            if ignores && daemon.cache.is_live() {
                step_over(&mut daemon.cache, frame);
            }
            let applied = match &frame.entry {
                Entry::Project(acl) if no_grace => {
                    let acl = cocalc_auth::stream::ProjectAcl { grace_ms: None, ..acl.clone() };
                    daemon.cache.apply(&Frame { entry: Entry::Project(acl), ..**frame })
                }
                _ => daemon.cache.apply(frame),
            };
            close.extend(applied.close);
            need_sync |= applied.need_sync;
            end_sessions |= applied.end_sessions;
            if let Some(next) = applied.save {
                match &mut save {
                    Some(save) => save.merge(next),
                    None => save = Some(next),
                }
            }
        }
        let nothing = save.is_none() && !end_sessions;
        daemon.saving = Some(Saving { save, end_sessions, need_sync });
        self.hosts[host].daemon = Some(daemon);
        self.close(host, close);
        self.look_again(host);
        self.plan_expiry(host);
        if nothing {
            return self.kept(host);
        }
        if self.is(Broken::AcknowledgedBeforeSaved) {
            let at = self.hosts[host].daemon.as_ref().and_then(|daemon| daemon.cache.position());
            if let Some(at) = at.filter(|_| self.hosts[host].is_connected()) {
                self.say(host, at);
                self.request(host, Request::Acknowledge(at));
            }
        }
        let wait = match self.below(100) {
            0 if self.faulty => 100 + self.below(1_000),
            _ => 1 + self.below(12),
        };
        self.after(wait, Event::Saved { host, process });
    }

    pub(super) fn saved(&mut self, host: usize, process: u64) {
        let keeps = self.is(Broken::SessionsOutliveKey);
        let machine = &mut self.hosts[host];
        let Some(daemon) = machine.daemon.as_mut().filter(|daemon| daemon.process == process) else { return };
        let Some(saving) = &daemon.saving else { return };
        if saving.end_sessions && !keeps {
            let _ = machine.disk.store.end_sessions(&EndSessions::All);
        }
        if let Some(save) = &saving.save {
            let _ = machine.disk.store.save(save);
            if save.position.is_some() {
                machine.mark = save.position;
                daemon.saved = save.position;
            }
        }
        self.kept(host);
    }

    /// What was applied is on disk.
    fn kept(&mut self, host: usize) {
        let Some(daemon) = &mut self.hosts[host].daemon else { return };
        let process = daemon.process;
        let Some(saving) = daemon.saving.take() else { return };
        if daemon.cache.is_live() {
            daemon.wait = RETRY_MIN;
            daemon.connected = true;
            daemon.progress = daemon.cache.position();
        }
        if daemon.ending {
            return self.end_session(host);
        }
        if saving.need_sync {
            daemon.connected = false;
            self.ask_for_stream(host);
        }
        self.acknowledge_applied(host);
        self.pump(host, process);
    }

    /// Acknowledges what was applied, when what it closed is gone.
    fn acknowledge_applied(&mut self, host: usize) {
        let Some(daemon) = &mut self.hosts[host].daemon else { return };
        if daemon.acknowledging || !daemon.closing.is_empty() || daemon.progress == daemon.told {
            return;
        }
        let Some(at) = daemon.progress else { return };
        daemon.told = Some(at);
        daemon.in_force = daemon.in_force.max(Some(at));
        daemon.acknowledging = true;
        self.say(host, at);
        self.request(host, Request::Acknowledge(at));
    }

    /// The host says that it has applied everything up to a place.
    fn say(&mut self, host: usize, at: Position) {
        let machine = &mut self.hosts[host];
        if machine.acknowledged >= Some(at) {
            return;
        }
        machine.acknowledged = Some(at);
        self.check_living(host);
    }

    fn close(&mut self, host: usize, close: Vec<(ConnectionId, Refusal)>) {
        let kept = self.is(Broken::ConnectionsKept);
        for (connection, refusal) in close {
            let Some(daemon) = &mut self.hosts[host].daemon else { return };
            let Some(facts) = daemon.connections.remove(&connection) else { continue };
            let process = daemon.process;
            if kept {
                daemon.forgotten.push(facts);
                continue;
            }
            daemon.closing.insert(connection, facts);
            self.report.closed += 1;
            self.note(|| format!("host {host} closes {facts:?}: {refusal}"));
            let wait = if self.unlucky(50) { self.below(900) } else { 1 + self.below(40) };
            self.after(wait, Event::Gone { host, process, connection });
        }
    }

    pub(super) fn gone(&mut self, host: usize, process: u64, connection: ConnectionId) {
        let Some(daemon) = self.daemon(host, process) else { return };
        daemon.closing.remove(&connection);
        daemon.cache.disconnected(connection);
        self.acknowledge_applied(host);
    }

    /// A connection ends by itself.
    pub(super) fn hangup(&mut self, host: usize, process: u64, connection: ConnectionId) {
        let leaks = self.is(Broken::ConnectionsLeaked);
        let Some(daemon) = self.daemon(host, process) else { return };
        if daemon.connections.remove(&connection).is_some() && !leaks {
            daemon.cache.disconnected(connection);
        }
    }

    /// The host lets go of a project.
    pub(super) fn let_go(&mut self, host: usize, project: u32) {
        let Some(daemon) = &mut self.hosts[host].daemon else { return };
        let close = daemon.cache.end_project(project_id(project));
        self.close(host, close);
        let _ = self.hosts[host].disk.store.end_sessions(&EndSessions::Project(project_id(project)));
    }

    pub(super) fn granted(&mut self, project: u32, host: usize) {
        let row = &self.master.db.projects[project as usize];
        // The grant is durable; a command that does not arrive comes again.
        if row.owner == host {
            let epoch = row.epoch;
            self.hosts[host].held.insert(project, epoch);
        }
    }

    // The lease.

    pub(super) fn keepalive_due(&mut self, host: usize, process: u64, beat: u64) {
        let every = self.timing.keepalive;
        let hasty = self.is(Broken::KeepaliveAcknowledges);
        let boot = self.hosts[host].boot(self.now);
        let Some(daemon) = self.daemon(host, process) else { return };
        if daemon.beat != beat {
            return;
        }
        daemon.beat += 1;
        let beat = daemon.beat;
        if daemon.asked.take().is_some() {
            // No answer came in time.
            self.after((every / 4).max(RETRY_MIN), Event::KeepaliveDue { host, process, beat });
            return;
        }
        let position = daemon.cache.is_live().then(|| daemon.cache.position()).flatten();
        daemon.asked = Some(Asked { sent: boot, position });
        if daemon.closing.is_empty() {
            daemon.in_force = daemon.saved;
        }
        let in_force = if hasty {
            position
        } else {
            daemon.in_force.filter(|at| position.is_some_and(|position| *at <= position))
        };
        if let Some(at) = in_force {
            self.say(host, at);
        }
        self.send_keepalive(host, process, beat, in_force);
        self.after(every, Event::KeepaliveDue { host, process, beat });
    }

    pub(super) fn keepalive_answered(
        &mut self,
        host: usize,
        process: u64,
        beat: u64,
        lease_ms: u64,
        position: Position,
        now: Timestamp,
    ) {
        let (from_answer, too_soon) = (self.is(Broken::LeaseFromAnswer), self.is(Broken::LeaseBeforeFrames));
        let unnoticed = self.is(Broken::RestoreUnnoticed);
        let boot = self.hosts[host].boot(self.now);
        let boot_id = self.hosts[host].boot_id();
        let Some(daemon) = self.daemon(host, process) else { return };
        if daemon.beat != beat {
            return;
        }
        let Some(asked) = daemon.asked.take() else { return };
        if lease_ms == 0 {
            // The master does not know this session.
            daemon.beat += 1;
            let (beat, following) = (daemon.beat, daemon.phase == Phase::Following);
            self.after(RETRY_MIN, Event::KeepaliveDue { host, process, beat });
            if following {
                self.end_session(host);
            }
            return;
        }
        let sent = if from_answer { boot } else { asked.sent };
        let position = match daemon.cache.position() {
            Some(ours) if too_soon && daemon.cache.is_live() => ours,
            _ => position,
        };
        let behind = daemon.cache.renewed(
            sent,
            Duration::from_millis(lease_ms),
            asked.position.filter(|_| !unnoticed),
            position,
        );
        if boot.saturating_sub(asked.sent) <= ROUND_TRIP_MAX {
            daemon.estimate = Some((now.plus(boot.saturating_sub(asked.sent) / 2), boot));
        }
        if daemon.phase == Phase::Following {
            daemon.connected = daemon.cache.is_live();
        }
        let now_at = daemon.cache.position();
        let resync = behind && daemon.behind_at == Some(now_at);
        daemon.behind_at = behind.then_some(now_at);
        let kept = Kept {
            standing: daemon.cache.lease().standing(&boot_id, daemon.saved),
            estimate: daemon.estimate,
        };
        if resync {
            if daemon.phase == Phase::Following && !daemon.syncing && daemon.saving.is_none() {
                self.ask_for_stream(host);
            } else {
                daemon.resync = true;
            }
        }
        let machine = &mut self.hosts[host];
        machine.disk.kept = Some(kept);
        machine.leased_in_boot = true;
        self.plan_expiry(host);
    }

    /// Plans to close what time alone ends: within a second of it, as the
    /// original looks each second.
    fn plan_expiry(&mut self, host: usize) {
        let now = self.now;
        let machine = &self.hosts[host];
        let boot = machine.boot(now);
        let Some(daemon) = &machine.daemon else { return };
        if daemon.connections.is_empty() {
            return;
        }
        let wait = match daemon.cache.tier(boot) {
            Tier::Fresh => daemon
                .cache
                .next_change(boot)
                .map_or(RETRY_MAX, |next| next.saturating_sub(boot).as_millis() as Ms + 1),
            // A grace may have become shorter meanwhile.
            _ => 0,
        };
        let at = now + wait;
        if daemon.expire_at.is_some_and(|planned| planned > now && planned <= at + 1000) && wait > 0 {
            return;
        }
        if wait == 0 && daemon.expire_at.is_some_and(|planned| planned > now && planned <= now + 1000) {
            return;
        }
        let at = at + if wait == 0 { 990 } else { self.below(999) };
        let Some(daemon) = &mut self.hosts[host].daemon else { return };
        daemon.expire_round += 1;
        daemon.expire_at = Some(at);
        let (round, process) = (daemon.expire_round, daemon.process);
        self.at(at, Event::Expire { host, process, round });
    }

    pub(super) fn expire(&mut self, host: usize, process: u64, round: u64) {
        let boot = self.hosts[host].boot(self.now);
        let Some(daemon) = self.daemon(host, process) else { return };
        if daemon.expire_round != round {
            return;
        }
        daemon.expire_at = None;
        let close = daemon.cache.expire(boot);
        self.close(host, close);
        self.plan_expiry(host);
    }

    // Decisions.

    /// What the host says now, without asking anybody.
    pub(super) fn decide(&self, host: usize, ask: &Ask, held: Option<Epoch>) -> Option<Verdict> {
        let machine = &self.hosts[host];
        let boot = machine.boot(self.now);
        machine.daemon.as_ref().map(|daemon| daemon.cache.decide(&self.as_driven(ask), held, boot))
    }

    fn as_driven(&self, ask: &Ask) -> Ask {
        let mut ask = ask.clone();
        if self.is(Broken::SessionEpochIgnored) {
            ask.session_epoch = None;
        }
        if self.is(Broken::LogInIgnored) {
            ask.login = None;
        }
        ask
    }

    /// Somebody comes; a fetch may be needed before the answer.
    pub(super) fn come(&mut self, host: usize, visit: Visit) {
        let project = visit.facts.project;
        let held = self.hosts[host].held.get(&project).copied();
        let Some(verdict) = self.decide(host, &visit.ask, held) else { return };
        if !verdict.outcome.is_err_and(Refusal::may_fetch) {
            return self.answer(host, &visit);
        }
        self.wait_for(host, project, visit);
    }

    fn wait_for(&mut self, host: usize, project: u32, visit: Visit) {
        let name = self.name();
        let boot = self.hosts[host].boot(self.now);
        let Some(daemon) = &mut self.hosts[host].daemon else { return };
        let process = daemon.process;
        if daemon.negative.get(&project).is_some_and(|until| *until > boot) {
            return self.answer(host, &visit);
        }
        daemon.negative.remove(&project);
        let running = daemon.fetches.contains_key(&project);
        if !running && daemon.fetches.len() >= RUNNING_MAX {
            return self.answer(host, &visit);
        }
        daemon.waiters.insert(name, Waiter { project, visit, fetched: false });
        if !running {
            daemon.fetches.insert(project, name);
            self.request(host, Request::Fetch(project));
        }
        self.after(FETCH_LIMIT, Event::FetchLimit { host, process, waiter: name });
    }

    fn fetched(&mut self, host: usize, project: u32) {
        let Some(daemon) = &mut self.hosts[host].daemon else { return };
        if daemon.fetches.remove(&project).is_none() {
            return;
        }
        for waiter in daemon.waiters.values_mut().filter(|waiter| waiter.project == project) {
            waiter.fetched = true;
        }
        self.look_again(host);
    }

    /// Something was applied: who waits may have an answer now.
    fn look_again(&mut self, host: usize) {
        let Some(daemon) = &self.hosts[host].daemon else { return };
        if daemon.waiters.is_empty() {
            return;
        }
        let waiting: Vec<u64> =
            daemon.waiters.iter().filter(|(_, waiter)| waiter.fetched).map(|(name, _)| *name).collect();
        for name in waiting {
            let Some(daemon) = &self.hosts[host].daemon else { return };
            let Some(waiter) = daemon.waiters.get(&name).cloned() else { continue };
            let held = self.hosts[host].held.get(&waiter.project).copied();
            let verdict = self.decide(host, &waiter.visit.ask, held);
            if verdict.is_some_and(|verdict| !verdict.outcome.is_err_and(Refusal::may_fetch)) {
                if let Some(daemon) = &mut self.hosts[host].daemon {
                    daemon.waiters.remove(&name);
                }
                self.answer(host, &waiter.visit);
            }
        }
    }

    pub(super) fn fetch_limit(&mut self, host: usize, process: u64, waiter: u64) {
        let for_ever = self.is(Broken::NegativeForever);
        let boot = self.hosts[host].boot(self.now);
        let Some(daemon) = self.daemon(host, process) else { return };
        let Some(found) = daemon.waiters.remove(&waiter) else { return };
        if daemon.fetches.get(&found.project) == Some(&waiter) {
            daemon.fetches.remove(&found.project);
        }
        if daemon.negative.len() >= NEGATIVE_MAX {
            daemon.negative.retain(|_, until| *until > boot);
        }
        if daemon.negative.len() < NEGATIVE_MAX {
            let until = if for_ever { Duration::MAX } else { boot + NEGATIVE_FOR };
            daemon.negative.insert(found.project, until);
        }
        self.answer(host, &found.visit);
    }

    /// The answer, after all waits.
    fn answer(&mut self, host: usize, visit: &Visit) {
        let project = visit.facts.project;
        let now = self.now;
        let ask = self.as_driven(&visit.ask);
        let machine = &mut self.hosts[host];
        let (boot, held) = (machine.boot(now), machine.held.get(&project).copied());
        let Some(daemon) = &mut machine.daemon else { return };
        let (verdict, admitted) = if visit.stays {
            daemon.cache.admit(&ask, held, boot)
        } else {
            (daemon.cache.decide(&ask, held, boot), None)
        };
        let process = daemon.process;
        match verdict.outcome {
            Ok(()) => {
                self.report.allowed += 1;
                self.report.in_grace += u64::from(verdict.tier == Tier::Grace);
                self.check_allowed(host, &visit.facts, false);
                if visit.facts.administer && verdict.tier != Tier::Fresh {
                    self.violate(Check::Administration, || format!("host {host} in {:?}", verdict.tier));
                }
            }
            Err(refusal) => {
                self.report.refused += 1;
                self.check_refused(host, &visit.facts, refusal);
                if visit.must {
                    self.violate(Check::LostGrant, || {
                        format!("host {host} refuses {:?} ({refusal}), though everything works", visit.facts)
                    });
                }
            }
        }
        if let Some(connection) = admitted {
            let living = Living { id: connection, facts: visit.facts };
            if let Some(daemon) = &mut self.hosts[host].daemon {
                daemon.connections.insert(living.id, living.facts);
            }
            let wait = self.around(600_000);
            self.after(wait, Event::Hangup { host, process, connection });
            self.plan_expiry(host);
        }
    }

    /// Finds an SSH key as the original does; `None` if a fetch is needed first.
    pub(super) fn find_key(&self, host: usize, project: ProjectId, key: u64) -> Option<bool> {
        let daemon = self.hosts[host].daemon.as_ref()?;
        daemon.cache.find_key(project, &format!("key {key}")).ok().map(|found| found.is_some())
    }
}

/// Exchanges what frames say that come together.
fn reverse(frames: &mut [Rc<Frame>]) {
    let dated = |frame: &Rc<Frame>| !matches!(frame.entry, Entry::Reset | Entry::Live);
    let mut from = 0;
    while from < frames.len() {
        let run = frames[from..].iter().take_while(|frame| dated(frame)).count();
        let entries: Vec<Entry> = frames[from..from + run].iter().rev().map(|f| f.entry.clone()).collect();
        for (frame, entry) in frames[from..from + run].iter_mut().zip(entries) {
            *frame = Rc::new(Frame { entry, ..**frame });
        }
        from += run + 1;
    }
}

/// Makes the cache believe that it has had everything before `frame`.
fn step_over(cache: &mut AclCache, frame: &Frame) {
    while let Some(at) = cache.position()
        && at.stream == frame.stream
        && at.seq + 1 < frame.seq
    {
        cache.apply(&Frame { stream: at.stream, seq: at.seq + 1, entry: Entry::Live });
    }
}
