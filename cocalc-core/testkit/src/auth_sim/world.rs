//! Time, chance, the network, and the heap of what happens next.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, VecDeque},
    rc::Rc,
    time::Duration,
};

use cocalc_auth::{acl::ConnectionId, store::Position, stream::Frame, token::LoginTag};
use cocalc_ids::{AccountId, HostId, KeyId, ProjectId, Timestamp};

use super::{
    Broken, Check, Report, Scenario, Violation, check::Truth, host::Host, load::Load, master::Master,
};

/// True time, in milliseconds since the world began.
pub(super) type Ms = u64;

/// When the world began, in seconds.
const BEGAN: i64 = 1_800_000_000;
/// How many lines of the log are kept.
const LOG_LINES: usize = 150;
const LINE_CHARS: usize = 220;
/// More events than this under way are more than a queue may hold.
const EVENTS_PER_HOST_MAX: usize = 4096;
/// How long everything has to come to rest in the end.
pub(super) const QUIET: Ms = 150_000;

/// What happens.
#[derive(Debug)]
pub(super) enum Event {
    // To a host. `process` names the life of the daemon that it is for.
    Boot {
        host: usize,
    },
    Connect {
        host: usize,
        process: u64,
    },
    Frame {
        host: usize,
        subscription: u64,
        frame: Rc<Frame>,
    },
    Unsubscribed {
        host: usize,
        subscription: u64,
    },
    Answer {
        host: usize,
        process: u64,
        id: u64,
        answer: Answer,
    },
    AnswerTimeout {
        host: usize,
        process: u64,
        id: u64,
    },
    Pump {
        host: usize,
        process: u64,
    },
    Saved {
        host: usize,
        process: u64,
    },
    KeepaliveDue {
        host: usize,
        process: u64,
        beat: u64,
    },
    KeepaliveAnswer {
        host: usize,
        process: u64,
        beat: u64,
        lease_ms: u64,
        position: Position,
        now: Timestamp,
    },
    Gone {
        host: usize,
        process: u64,
        connection: ConnectionId,
    },
    Hangup {
        host: usize,
        process: u64,
        connection: ConnectionId,
    },
    Expire {
        host: usize,
        process: u64,
        round: u64,
    },
    FetchLimit {
        host: usize,
        process: u64,
        waiter: u64,
    },
    // To the master. `life` names the process.
    MasterStart,
    Request {
        host: usize,
        process: u64,
        id: u64,
        request: Request,
    },
    Keepalive {
        host: usize,
        process: u64,
        beat: u64,
        position: Option<Position>,
    },
    Announce {
        life: u64,
        news: super::master::News,
    },
    Tend {
        life: u64,
    },
    // To nobody.
    Visit,
    Change,
    Fault,
    Heal {
        host: usize,
        cut: u64,
    },
    Standby {
        restart: Ms,
    },
    Granted {
        project: u32,
        host: usize,
    },
    Probe {
        facts: super::check::Facts,
        host: usize,
    },
    Inspect,
    Quiet,
    Drill {
        step: u8,
        project: u32,
        account: u32,
    },
    End,
}

/// What a host asks the master.
#[derive(Clone, Copy, Debug)]
pub(super) enum Request {
    Register,
    Sync(Option<Position>),
    Acknowledge(Position),
    Fetch(u32),
}

/// What it is answered.
#[derive(Clone, Copy, Debug)]
pub(super) enum Answer {
    Registered(Timestamp),
    Done,
}

/// The way between a host and the master: one connection for the stream and
/// requests, one for keepalives.
#[derive(Debug, Default)]
pub(super) struct Link {
    /// Which cut this is; a later one is not healed by an earlier's end.
    pub(super) cut: u64,
    /// Nothing comes through since.
    pub(super) bus: Option<Ms>,
    /// No keepalive does.
    pub(super) keepalive: bool,
    /// Frames are lost, everything else comes through.
    pub(super) deaf: bool,
    /// When the last frame arrives: those of a connection keep their order.
    last: Ms,
}

#[derive(Debug)]
struct Due {
    at: Ms,
    order: u64,
    event: Event,
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.order) == (other.at, other.order)
    }
}
impl Eq for Due {}
impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Due {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

/// The master's timing.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timing {
    pub(super) keepalive: Ms,
    pub(super) lease: Ms,
    pub(super) grace: Ms,
}

/// The world.
pub(super) struct Sim {
    pub(super) now: Ms,
    pub(super) scenario: Scenario,
    pub(super) timing: Timing,
    pub(super) hosts: Vec<Host>,
    pub(super) links: Vec<Link>,
    pub(super) master: Master,
    pub(super) truth: Truth,
    pub(super) load: Load,
    pub(super) report: Report,
    /// Whether faults happen.
    pub(super) faulty: bool,
    random: u64,
    heap: BinaryHeap<Reverse<Due>>,
    order: u64,
    names: u64,
    verbose: bool,
    log: VecDeque<String>,
    violation: Option<(Check, String)>,
}

impl Sim {
    pub(super) fn new(seed: u64, scenario: &Scenario, verbose: bool) -> Self {
        let mut random = seed ^ 0x5eed_0000_a117_0000;
        let timing = scenario.timing.unwrap_or_else(|| {
            [(1_000, 3_000), (5_000, 30_000), (5_000, 30_000), (10_000, 30_000)]
                [(split_mix(&mut random) % 4) as usize]
        });
        let grace = [5_000, 60_000, 900_000, 900_000][(split_mix(&mut random) % 4) as usize];
        let timing = Timing { keepalive: timing.0, lease: timing.1, grace };
        let mut sim = Self {
            now: 0,
            scenario: *scenario,
            timing,
            hosts: Vec::new(),
            links: (0..scenario.hosts).map(|_| Link::default()).collect(),
            master: Master::new(scenario.hosts),
            truth: Truth::default(),
            load: Load::default(),
            report: Report {
                trace: seed,
                events: 0,
                allowed: 0,
                refused: 0,
                closed: 0,
                receipts: (0, 0),
                in_grace: 0,
                snapshots: 0,
            },
            faulty: true,
            random,
            heap: BinaryHeap::new(),
            order: 0,
            names: 0,
            verbose,
            log: VecDeque::new(),
            violation: None,
        };
        sim.populate();
        sim
    }

    /// Runs to the end, or to the first broken promise.
    pub(super) fn run(mut self) -> Result<Report, Box<Violation>> {
        let end = self.scenario.minutes * 60_000;
        self.at(0, Event::MasterStart);
        for host in 0..self.hosts.len() {
            let wait = self.below(2000);
            self.after(wait, Event::Boot { host });
        }
        for event in [Event::Visit, Event::Change, Event::Fault, Event::Inspect] {
            self.after(20_000, event);
        }
        self.at(end, Event::Quiet);
        while let Some(Reverse(due)) = self.heap.pop() {
            self.now = due.at;
            self.report.events += 1;
            if matches!(due.event, Event::End) {
                self.at_the_end();
                break;
            }
            self.happen(due.event);
            if self.violation.is_some() {
                break;
            }
        }
        match self.violation {
            None => Ok(self.report),
            Some((check, what)) => Err(Box::new(Violation { check, what, log: self.log.into() })),
        }
    }

    fn happen(&mut self, event: Event) {
        self.trace(&event);
        match event {
            Event::Boot { host } => self.start_daemon(host),
            Event::Connect { host, process } => self.connect(host, process),
            Event::Frame { host, subscription, frame } => self.frame_arrives(host, subscription, frame),
            Event::Unsubscribed { host, subscription } => self.unsubscribed(host, subscription),
            Event::Answer { host, process, id, answer } => self.answered(host, process, id, Some(answer)),
            Event::AnswerTimeout { host, process, id } => self.answered(host, process, id, None),
            Event::Pump { host, process } => self.pump(host, process),
            Event::Saved { host, process } => self.saved(host, process),
            Event::KeepaliveDue { host, process, beat } => self.keepalive_due(host, process, beat),
            Event::KeepaliveAnswer { host, process, beat, lease_ms, position, now } => {
                self.keepalive_answered(host, process, beat, lease_ms, position, now);
            }
            Event::Gone { host, process, connection } => self.gone(host, process, connection),
            Event::Hangup { host, process, connection } => self.hangup(host, process, connection),
            Event::Expire { host, process, round } => self.expire(host, process, round),
            Event::FetchLimit { host, process, waiter } => self.fetch_limit(host, process, waiter),
            Event::MasterStart => self.master_starts(),
            Event::Request { host, process, id, request } => self.requested(host, process, id, request),
            Event::Keepalive { host, process, beat, position } => {
                self.renew(host, process, beat, position);
            }
            Event::Announce { life, news } => self.announce(life, news),
            Event::Tend { life } => self.tend(life),
            Event::Visit => self.visit(),
            Event::Change => self.change(),
            Event::Fault => self.fault(),
            Event::Heal { host, cut } => self.heal(host, cut),
            Event::Standby { restart } => self.standby(restart),
            Event::Granted { project, host } => self.granted(project, host),
            Event::Probe { facts, host } => self.probe(host, &facts),
            Event::Inspect => self.inspect(),
            Event::Quiet => self.quiet(),
            Event::Drill { step, project, account } => self.drill(step, project, account),
            Event::End => {}
        }
    }

    fn trace(&mut self, event: &Event) {
        let what = match event {
            Event::Frame { host, frame, .. } => [1, *host as u64, frame.seq],
            Event::Answer { host, id, .. } => [2, *host as u64, *id],
            Event::KeepaliveAnswer { host, beat, position, .. } => {
                [3, *host as u64, beat ^ (position.seq << 20)]
            }
            Event::Keepalive { host, beat, .. } => [4, *host as u64, *beat],
            Event::Request { host, id, .. } => [5, *host as u64, *id],
            Event::Saved { host, process } => [6, *host as u64, *process],
            Event::Gone { host, process, .. } => [7, *host as u64, *process],
            Event::Probe { host, .. } => [8, *host as u64, 0],
            _ => [9, self.random, self.report.allowed],
        };
        let mut hash = self.report.trace ^ self.now;
        for word in what {
            hash = (hash ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
        }
        self.report.trace = hash;
        let dull = matches!(
            event,
            Event::KeepaliveDue { .. }
                | Event::Visit
                | Event::Change
                | Event::Inspect
                | Event::Fault
                | Event::AnswerTimeout { .. }
                | Event::Pump { .. }
        );
        if self.verbose && !dull {
            self.note(|| format!("{event:?}").chars().take(LINE_CHARS).collect());
        }
    }

    /// Writes a line of the log, if there is to be one.
    pub(super) fn note(&mut self, line: impl FnOnce() -> String) {
        if self.verbose {
            if self.log.len() >= LOG_LINES {
                self.log.pop_front();
            }
            self.log.push_back(format!("{:>9} ms {}", self.now, line()));
        }
    }

    /// A promise is broken.
    pub(super) fn violate(&mut self, check: Check, what: impl FnOnce() -> String) {
        if self.violation.is_none() {
            self.violation = Some((check, what()));
        }
    }

    pub(super) fn is(&self, broken: Broken) -> bool {
        self.scenario.broken == Some(broken)
    }

    pub(super) fn at(&mut self, at: Ms, event: Event) {
        self.order += 1;
        self.heap.push(Reverse(Due { at, order: self.order, event }));
    }

    pub(super) fn after(&mut self, wait: Ms, event: Event) {
        self.at(self.now + wait, event);
    }

    /// How much is under way, against what may be.
    pub(super) fn under_way(&self) -> (usize, usize) {
        (self.heap.len(), EVENTS_PER_HOST_MAX.saturating_mul(self.hosts.len()))
    }

    /// A name that nothing else has.
    pub(super) fn name(&mut self) -> u64 {
        self.names += 1;
        self.names
    }

    /// A number below `below`.
    pub(super) fn below(&mut self, below: u64) -> u64 {
        split_mix(&mut self.random) % below.max(1)
    }

    pub(super) fn pick(&mut self, of: usize) -> usize {
        self.below(of as u64) as usize
    }

    /// Whether something happens that has `chance` in a thousand, if faults do.
    pub(super) fn unlucky(&mut self, chance: u64) -> bool {
        self.below(1000) < chance && self.faulty
    }

    /// A wait around `mean`.
    pub(super) fn around(&mut self, mean: Ms) -> Ms {
        mean / 4 + self.below(mean * 3 / 2 + 1)
    }

    /// Master time. The master's clock is the world's.
    pub(super) fn master_now(&self) -> Timestamp {
        Timestamp::from_secs(BEGAN).plus(Duration::from_millis(self.now))
    }

    fn delay(&mut self) -> Ms {
        match self.below(1000) {
            // Slower than what follows it: so messages overtake each other.
            0..=20 if self.faulty => 50 + self.below(3000),
            0..=150 => 10 + self.below(80),
            _ => 1 + self.below(15),
        }
    }

    /// Whether the host's subscription is there, as far as the broker can tell.
    pub(super) fn subscribed(&self, host: usize) -> bool {
        // A dead connection is noticed after a while.
        self.links[host].bus.is_none_or(|since| self.now < since + 10_000)
            && self.hosts[host].subscription() != 0
    }

    pub(super) fn send_frame(&mut self, host: usize, frame: &Rc<Frame>) {
        let subscription = self.hosts[host].subscription();
        let lost = self.links[host].bus.is_some() || self.links[host].deaf;
        if lost || subscription == 0 || self.unlucky(10) {
            return;
        }
        for _ in 0..1 + u64::from(self.unlucky(20)) {
            let mut at = self.now + self.delay();
            if !self.unlucky(10) {
                at = at.max(self.links[host].last);
                self.links[host].last = at;
            }
            self.at(at, Event::Frame { host, subscription, frame: frame.clone() });
        }
    }

    pub(super) fn send_request(&mut self, host: usize, process: u64, id: u64, request: Request) {
        self.after(10_000, Event::AnswerTimeout { host, process, id });
        if self.links[host].bus.is_some() || self.unlucky(5) {
            return;
        }
        for _ in 0..1 + u64::from(self.unlucky(10)) {
            let delay = self.delay();
            self.after(delay, Event::Request { host, process, id, request });
        }
    }

    pub(super) fn send_answer(&mut self, host: usize, process: u64, id: u64, answer: Answer) {
        if self.links[host].bus.is_some() || self.unlucky(5) {
            return;
        }
        let delay = self.delay();
        self.after(delay, Event::Answer { host, process, id, answer });
    }

    pub(super) fn send_keepalive(
        &mut self,
        host: usize,
        process: u64,
        beat: u64,
        position: Option<Position>,
    ) {
        if self.links[host].keepalive || self.unlucky(10) {
            return;
        }
        for _ in 0..1 + u64::from(self.unlucky(5)) {
            let delay = self.delay();
            self.after(delay, Event::Keepalive { host, process, beat, position });
        }
    }

    pub(super) fn send_lease(
        &mut self,
        host: usize,
        process: u64,
        beat: u64,
        lease_ms: u64,
        position: Position,
    ) {
        if self.links[host].keepalive || self.unlucky(10) {
            return;
        }
        let mut delay = self.delay();
        // The worst moment: an answer is long under way, and when it comes,
        // everything else is cut off.
        if lease_ms > 0 && self.unlucky(2) && self.links[host].bus.is_none() {
            delay = self.timing.keepalive * 3 / 4 + self.below(self.timing.keepalive / 5);
            self.pounce(host, delay);
        }
        let now = self.master_now();
        self.after(delay, Event::KeepaliveAnswer { host, process, beat, lease_ms, position, now });
    }
}

fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn bytes(kind: u8, n: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[0] = kind;
    bytes[8..].copy_from_slice(&n.to_be_bytes());
    bytes
}

pub(super) fn host_id(n: usize) -> HostId {
    HostId::from_bytes(bytes(1, n as u64))
}

pub(super) fn project_id(n: u32) -> ProjectId {
    ProjectId::from_bytes(bytes(2, n.into()))
}

pub(super) fn account_id(n: u32) -> AccountId {
    AccountId::from_bytes(bytes(3, n.into()))
}

pub(super) fn key_id(n: u64) -> KeyId {
    KeyId::from_bytes(bytes(4, n))
}

pub(super) fn login_tag(n: u64) -> LoginTag {
    LoginTag::of(key_id(n))
}

pub(super) fn session_bytes(n: u64) -> [u8; 32] {
    let mut all = [0; 32];
    all[..16].copy_from_slice(&bytes(5, n));
    all
}
