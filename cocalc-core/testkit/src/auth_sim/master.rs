//! The master: a database, the streams of one process, and receipts.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    rc::Rc,
    time::Duration,
};

use cocalc_auth::{
    identity::Identity,
    receipt::{Holding, Settled},
    store::Position,
    stream::{AccountState, Entry, Frame, ProjectAcl, PublicRing, RingKey, SshKey},
};
use cocalc_ids::{Epoch, Role};

use super::{
    Broken,
    check::{Facts, Right},
    world::{Answer, Event, Ms, Request, Sim, account_id, key_id, login_tag, project_id},
};

/// How many sent frames are kept. The original keeps 1024; with fewer, whole
/// states are sent more often.
const KEPT_FRAMES: usize = 48;
const RECEIPTS_MAX: usize = 10_000;
/// How many log-ins an account has at a time.
const LOG_INS: usize = 3;
/// How many ended log-ins of an account are told; beyond, all of them end. The
/// original tells of more.
const ENDED_MAX: usize = 8;

/// What was committed.
#[derive(Clone, Debug)]
pub(super) struct Db {
    /// The epoch of the last streams.
    life: u64,
    pub(super) accounts: Vec<Account>,
    pub(super) projects: Vec<Project>,
    ring: Ring,
    receipts: BTreeMap<u64, Receipt>,
}

#[derive(Clone, Debug)]
pub(super) struct Account {
    pub(super) session_epoch: u64,
    /// Which login, in truth, that is.
    pub(super) login: u64,
    /// Those under which tokens are minted.
    pub(super) log_ins: Vec<u64>,
    /// Those that have ended, since all of them did last.
    pub(super) ended: Vec<u64>,
    pub(super) banned: bool,
    pub(super) key: Option<u64>,
}

#[derive(Clone, Debug)]
pub(super) struct Project {
    pub(super) owner: usize,
    pub(super) epoch: Epoch,
    pub(super) version: u64,
    /// The first is the owner.
    pub(super) members: Vec<u32>,
    grace: Option<Ms>,
    /// A longer grace that the host may still know.
    grace_known: Option<Ms>,
}

#[derive(Clone, Debug, Default)]
struct Ring {
    version: u64,
    /// Next, current, previous.
    keys: Vec<u64>,
    withdrawn: Vec<u64>,
}

#[derive(Clone, Debug)]
struct Receipt {
    right: Right,
    /// Since when, in truth, the right does not hold.
    ended: Option<Ms>,
    holders: BTreeMap<usize, (Ms, Option<Settled>)>,
    grace: Option<(u32, u64)>,
}

/// The master.
#[derive(Debug)]
pub(super) struct Master {
    pub(super) db: Db,
    /// Which session epoch each login had.
    pub(super) logins: BTreeMap<u64, u64>,
    /// Which was the account's login when a log-in ended.
    ended_under: BTreeMap<u64, u64>,
    pub(super) process: Option<Process>,
    /// The projects of each host; never lost with a database.
    pub(super) owned: Vec<BTreeSet<u32>>,
    /// What the standby has, if it is to take over.
    standby: Option<Db>,
    signing: BTreeMap<u64, Rc<Signing>>,
}

/// A signing key.
#[derive(Debug)]
pub(super) struct Signing {
    pub(super) kid: String,
    pub(super) identity: Identity,
    public: RingKey,
}

#[derive(Debug)]
pub(super) struct Process {
    epoch: u64,
    began: Ms,
    streams: Vec<Stream>,
    peers: Vec<Option<(u64, Ms)>>,
    open: BTreeMap<u64, Holding<usize>>,
    by_peer: BTreeMap<usize, BTreeSet<u64>>,
    tending: Option<Ms>,
}

#[derive(Clone, Debug, Default)]
struct Stream {
    seq: u64,
    kept: VecDeque<Rc<Frame>>,
    live: bool,
    applied: u64,
}

/// A change that was committed, and is to be told.
#[derive(Clone, Debug)]
pub(super) enum News {
    /// A project changed; the right that ended, if one did.
    Project(u32, Vec<Right>, Option<u64>),
    /// An account changed.
    Account(u32, Vec<Right>),
    /// The keys changed.
    Ring(Vec<Right>),
    /// A project has another owner.
    Owner(u32, usize),
}

impl Master {
    pub(super) fn new(hosts: usize) -> Self {
        Self {
            db: Db {
                life: 0,
                accounts: Vec::new(),
                projects: Vec::new(),
                ring: Ring::default(),
                receipts: BTreeMap::new(),
            },
            logins: BTreeMap::new(),
            ended_under: BTreeMap::new(),
            process: None,
            owned: vec![BTreeSet::new(); hosts],
            standby: None,
            signing: BTreeMap::new(),
        }
    }

    pub(super) fn life(&self) -> u64 {
        self.process.as_ref().map_or(self.db.life, |process| process.epoch)
    }

    /// Whether this login is the account's present one.
    pub(super) fn current_key(&self) -> Option<Rc<Signing>> {
        self.db.ring.keys.get(1).and_then(|key| self.signing.get(key)).cloned()
    }

    pub(super) fn current_key_number(&self) -> Option<u64> {
        self.db.ring.keys.get(1).copied()
    }

    pub(super) fn too_much(&self) -> Option<String> {
        let process = self.process.as_ref()?;
        if process.streams.iter().any(|stream| stream.kept.len() > KEPT_FRAMES) {
            return Some("the master keeps too many frames".to_owned());
        }
        if process.open.len() > RECEIPTS_MAX {
            return Some("too many receipts are open".to_owned());
        }
        let of_peers: usize = process.by_peer.values().map(BTreeSet::len).sum();
        let of_open: usize = process.open.values().map(|open| open.holders().count()).sum();
        (of_peers != of_open).then(|| "receipts are remembered for peers that have none open".to_owned())
    }

    fn public_ring(&self) -> PublicRing {
        let ring = &self.db.ring;
        PublicRing {
            version: ring.version,
            keys: ring.keys.iter().map(|key| self.signing[key].public.clone()).collect(),
            withdrawn: ring.withdrawn.iter().map(|key| self.signing[key].kid.clone()).collect(),
        }
    }

    fn acl(&self, project: u32) -> ProjectAcl {
        let row = &self.db.projects[project as usize];
        let role = |n: usize| if n == 0 { Role::Owner } else { Role::Collaborator };
        ProjectAcl {
            project: project_id(project),
            version: row.version,
            epoch: row.epoch,
            members: row.members.iter().enumerate().map(|(n, who)| (account_id(*who), role(n))).collect(),
            keys: Vec::new(),
            grace_ms: row.grace,
            proxy_ssh: false,
            authorized_keys: false,
            viewable_ports: Vec::new(),
        }
    }

    fn account_state(&self, account: u32) -> AccountState {
        let row = &self.db.accounts[account as usize];
        let key = |n: u64| SshKey {
            id: key_id(n),
            account: account_id(account),
            key: format!("key {n}"),
            options: String::new(),
        };
        AccountState {
            account: account_id(account),
            session_epoch: row.session_epoch,
            ended_logins: row.ended.iter().map(|ended| login_tag(*ended)).collect(),
            banned: row.banned,
            keys: row.key.map(key).into_iter().collect(),
        }
    }

    fn project_entries(&self, host: usize, project: u32) -> Vec<Entry> {
        if self.db.projects[project as usize].owner != host {
            return vec![Entry::ProjectGone { project: project_id(project) }];
        }
        let mut members = self.db.projects[project as usize].members.clone();
        members.sort_unstable();
        let accounts = members.into_iter().map(|account| Entry::Account(self.account_state(account)));
        accounts.chain([Entry::Project(self.acl(project))]).collect()
    }

    fn host_state(&self, host: usize) -> Vec<Entry> {
        let owned = &self.owned[host];
        let accounts: BTreeSet<u32> = owned
            .iter()
            .flat_map(|project| self.db.projects[*project as usize].members.iter().copied())
            .collect();
        let accounts = accounts.into_iter().map(|account| Entry::Account(self.account_state(account)));
        let projects = owned.iter().map(|project| Entry::Project(self.acl(*project)));
        [Entry::KeyRing(self.public_ring())].into_iter().chain(accounts).chain(projects).collect()
    }

    pub(super) fn hosts_of_account(&self, account: u32) -> Vec<usize> {
        let of = self.db.projects.iter().filter(|project| project.members.contains(&account));
        of.map(|project| project.owner).collect::<BTreeSet<_>>().into_iter().collect()
    }

    fn longest_grace(&self, host: usize, news: &News, default: Ms, of_members: bool) -> Ms {
        let projects = self.owned[host].iter().filter(|project| match news {
            News::Project(of, ..) => *project == of,
            News::Account(account, _) if of_members => {
                self.db.projects[**project as usize].members.contains(account)
            }
            News::Account(..) | News::Ring(_) | News::Owner(..) => true,
        });
        let graces = projects.map(|project| {
            let row = &self.db.projects[*project as usize];
            row.grace.unwrap_or(default).max(row.grace_known.unwrap_or(0))
        });
        graces.max().unwrap_or(default)
    }
}

impl Sim {
    /// Makes accounts, projects, keys and hosts.
    pub(super) fn populate(&mut self) {
        let hosts = self.scenario.hosts;
        for n in 0..hosts {
            let host = self.new_host(n);
            self.hosts.push(host);
        }
        for n in 0..(hosts as u64 * 2) {
            let login = self.name();
            let key = (n % 2 == 0).then(|| self.name());
            let log_ins = (0..LOG_INS).map(|_| self.name()).collect();
            self.master.logins.insert(login, 0);
            self.master.db.accounts.push(Account {
                session_epoch: 0,
                login,
                log_ins,
                ended: Vec::new(),
                banned: false,
                key,
            });
        }
        let accounts = self.master.db.accounts.len();
        for project in 0..(hosts * 2) as u32 {
            let owner = project as usize % hosts;
            let mut members = BTreeSet::new();
            for _ in 0..1 + self.below(4) {
                members.insert(self.pick(accounts) as u32);
            }
            let grace = match self.below(6) {
                0 => Some(0),
                1 => Some(5_000),
                2 => Some(120_000),
                _ => None,
            };
            self.master.owned[owner].insert(project);
            self.hosts[owner].held.insert(project, Epoch::FIRST);
            self.truth.graces.push(vec![(grace.unwrap_or(self.timing.grace), None)]);
            self.master.db.projects.push(Project {
                owner,
                epoch: Epoch::FIRST,
                version: 1,
                members: members.into_iter().collect(),
                grace,
                grace_known: None,
            });
        }
        for _ in 0..3 {
            let key = self.new_signing_key();
            self.master.db.ring.keys.push(key);
        }
        self.master.db.ring.version = 1;
        self.retell();
    }

    fn new_signing_key(&mut self) -> u64 {
        let number = self.name();
        let mut seed = [7; 32];
        seed[..8].copy_from_slice(&number.to_be_bytes());
        let identity = Identity::from_seed(&seed);
        let kid = format!("k{number}");
        let key = identity.public_key().to_string();
        let public = RingKey { kid: kid.clone(), key, alg: "EdDSA".to_owned() };
        self.master.signing.insert(number, Rc::new(Signing { kid, identity, public }));
        number
    }

    /// Makes the truth what the database says, after it was made or replaced.
    fn retell(&mut self) {
        let (now, life) = (self.now, self.master.life());
        let db = &self.master.db;
        let mut hold: BTreeSet<Right> = BTreeSet::new();
        for (n, project) in (0..).zip(&db.projects) {
            hold.extend(project.members.iter().map(|account| Right::Member(n, *account)));
        }
        for (n, account) in (0..).zip(&db.accounts) {
            hold.insert(Right::Login(n, account.login));
            hold.extend(account.log_ins.iter().map(|log_in| Right::LogIn(n, *log_in)));
            hold.extend(account.key.map(|key| Right::Key(n, key)));
            hold.extend((!account.banned).then_some(Right::Welcome(n)));
        }
        // Of a log-in of which the database knows nothing it knows no end.
        let unended = self.truth.rights.keys().filter(|right| match right {
            Right::LogIn(account, log_in) => {
                db.accounts.get(*account as usize).is_none_or(|row| !row.ended.contains(log_in))
            }
            _ => false,
        });
        hold.extend(unended.copied());
        // What is not withdrawn is good, or has run out by itself.
        let withdrawn = &db.ring.withdrawn;
        hold.extend(
            self.master.signing.keys().filter(|key| !withdrawn.contains(key)).map(|key| Right::Signer(*key)),
        );
        let ended: Vec<Right> =
            self.truth.rights.keys().filter(|right| !hold.contains(right)).copied().collect();
        let ended = ended.into_iter().filter(|right| !matches!(right, Right::Owned(_)));
        for right in hold {
            self.truth.set(right, true, now, life);
        }
        for right in ended {
            self.truth.set(right, false, now, life);
        }
        for project in 0..self.master.db.projects.len() as u32 {
            let grace = self.master.db.projects[project as usize].grace.unwrap_or(self.timing.grace);
            self.truth.set_grace(project, grace, now);
        }
    }

    pub(super) fn master_starts(&mut self) {
        if self.master.process.is_some() {
            return;
        }
        if let Some(standby) = self.master.standby.take() {
            self.note(|| "the standby takes over, without the last commits".to_owned());
            let lost = std::mem::replace(&mut self.master.db, standby);
            let default = self.timing.grace;
            for (project, lost) in self.master.db.projects.iter_mut().zip(lost.projects) {
                (project.owner, project.epoch) = (lost.owner, lost.epoch);
                // What nobody can know: that a host has heard of a longer grace
                // in the commits that are lost.
                let known = lost.grace.unwrap_or(default).max(lost.grace_known.unwrap_or(0));
                project.grace_known = Some(project.grace_known.unwrap_or(0).max(known));
            }
            self.retell();
        }
        let floor = u64::try_from(self.master_now().secs()).unwrap_or(0);
        let epoch = floor.max(self.master.db.life + 1);
        self.master.db.life = epoch;
        let hosts = self.hosts.len();
        let mut process = Process {
            epoch,
            began: self.now,
            streams: vec![Stream::default(); hosts],
            peers: vec![None; hosts],
            open: BTreeMap::new(),
            by_peer: BTreeMap::new(),
            tending: None,
        };
        for (id, receipt) in &self.master.db.receipts {
            let mut holding = Holding::default();
            for (host, (hold, settled)) in &receipt.holders {
                holding.add(*host, (epoch, 1), Duration::from_millis(*hold), millis(self.now));
                process.by_peer.entry(*host).or_default().insert(*id);
                if let Some(settled) = settled {
                    holding.settled_before(*host, *settled);
                }
            }
            process.open.insert(*id, holding);
        }
        self.master.process = Some(process);
        self.note(|| format!("the master starts, with streams of epoch {epoch}"));
        self.look_after_receipts();
    }

    /// The master's process ends; a new one starts after `wait`.
    pub(super) fn master_stops(&mut self, wait: Ms) {
        if self.master.process.take().is_none() {
            return;
        }
        self.note(|| "the master stops".to_owned());
        for host in 0..self.hosts.len() {
            let subscription = self.hosts[host].subscription();
            let delay = self.below(2_000);
            self.after(delay, Event::Unsubscribed { host, subscription });
        }
        self.after(wait, Event::MasterStart);
    }

    /// What the standby has from now on; it takes over at `restart`.
    pub(super) fn standby(&mut self, restart: Ms) {
        if !self.faulty {
            return;
        }
        if self.now < restart {
            if self.master.standby.is_none() {
                self.master.standby = Some(self.master.db.clone());
                self.at(restart, Event::Standby { restart });
            }
            return;
        }
        if self.master.process.is_some() {
            let wait = 2_000 + self.below(20_000);
            self.master_stops(wait);
        }
    }

    pub(super) fn forget_standby(&mut self) {
        self.master.standby = None;
    }

    /// A commit was made: it is told a moment later.
    pub(super) fn committed(&mut self, news: News) {
        let Some(process) = &self.master.process else { return };
        let life = process.epoch;
        let wait = 1 + self.below(15);
        self.after(wait, Event::Announce { life, news });
    }

    pub(super) fn announce(&mut self, life: u64, news: News) {
        if self.master.process.as_ref().is_none_or(|process| process.epoch != life) {
            return;
        }
        let (targets, rights, grace) = match &news {
            News::Project(project, rights, grace) => (
                vec![self.master.db.projects[*project as usize].owner],
                rights.clone(),
                grace.map(|v| (*project, v)),
            ),
            News::Account(account, rights) => (self.master.hosts_of_account(*account), rights.clone(), None),
            News::Ring(rights) => ((0..self.hosts.len()).collect(), rights.clone(), None),
            News::Owner(project, former) => {
                let owner = self.master.db.projects[*project as usize].owner;
                let all: BTreeSet<usize> = [owner, *former].into();
                (all.into_iter().collect(), vec![Right::Owned(*project)], None)
            }
        };
        let mut holders = BTreeMap::new();
        for host in targets {
            let entries = match &news {
                News::Project(project, ..) | News::Owner(project, _) => {
                    self.master.project_entries(host, *project)
                }
                News::Account(account, _) => {
                    let mut state = self.master.account_state(*account);
                    if self.is(Broken::EndedLogInsForgotten) && state.ended_logins.len() > 1 {
                        state.ended_logins.drain(..state.ended_logins.len() - 1);
                    }
                    vec![Entry::Account(state)]
                }
                News::Ring(_) => vec![Entry::KeyRing(self.master.public_ring())],
            };
            let of_members = self.is(Broken::ReceiptForMembersOnly);
            let grace = self.master.longest_grace(host, &news, self.timing.grace, of_members);
            let Some(place) = self.tell(host, entries) else { return };
            for right in &rights {
                self.truth.placed(*right, host, place);
            }
            let grace = if self.is(Broken::ReceiptWithoutGrace) { 0 } else { grace };
            holders.insert(host, (place, self.timing.lease + grace));
        }
        for right in rights {
            let ended = !self.truth.holds(right);
            if ended {
                self.issue(right, &holders, grace);
            }
        }
        if let News::Project(_, rights, Some(_)) = &news
            && rights.is_empty()
            && let Some((project, _)) = grace
        {
            // A changed grace has a receipt, too, and nothing that ended.
            let owner = self.master.db.projects[project as usize].members[0];
            self.issue(Right::Member(project, owner), &holders, grace);
        }
    }

    fn issue(&mut self, right: Right, holders: &BTreeMap<usize, (Position, Ms)>, grace: Option<(u32, u64)>) {
        let id = self.name();
        let ended = self.truth.ended(right);
        let Some(process) = &mut self.master.process else { return };
        if process.open.len() >= RECEIPTS_MAX {
            return;
        }
        let mut holding = Holding::default();
        let mut stored = BTreeMap::new();
        for (host, (place, hold)) in holders {
            let heard = process.peers[*host].map_or(process.began, |(_, heard)| heard);
            holding.add(*host, (place.stream, place.seq), millis(*hold), millis(heard));
            process.by_peer.entry(*host).or_default().insert(id);
            stored.insert(*host, (*hold, None));
        }
        process.open.insert(id, holding);
        let epoch = process.epoch;
        self.master.db.receipts.insert(id, Receipt { right, ended, holders: stored, grace });
        for host in holders.keys() {
            let applied = self.master.process.as_ref().map_or(0, |process| process.streams[*host].applied);
            self.acknowledged(*host, (epoch, applied));
        }
        self.completed(&[id]);
        self.look_after_receipts();
    }

    /// Appends to a host's stream; where that leaves it.
    fn tell(&mut self, host: usize, entries: Vec<Entry>) -> Option<Position> {
        for entry in entries {
            self.append(host, entry);
        }
        let process = self.master.process.as_ref()?;
        Some(Position { stream: process.epoch, seq: process.streams[host].seq })
    }

    fn append(&mut self, host: usize, entry: Entry) {
        let Some(process) = &mut self.master.process else { return };
        let stream = &mut process.streams[host];
        stream.seq += 1;
        let frame = Rc::new(Frame { stream: process.epoch, seq: stream.seq, entry });
        stream.kept.push_back(frame.clone());
        if stream.kept.len() > KEPT_FRAMES {
            stream.kept.pop_front();
        }
        self.publish(host, &frame);
    }

    fn publish(&mut self, host: usize, frame: &Rc<Frame>) {
        let subscribed = self.subscribed(host);
        let Some(process) = &mut self.master.process else { return };
        let stream = &mut process.streams[host];
        if !stream.live {
            return;
        }
        if subscribed {
            self.send_frame(host, frame);
        } else {
            stream.live = false;
        }
    }

    fn sync(&mut self, host: usize, position: Option<Position>) {
        let repeat = !self.is(Broken::GapNotRepeated);
        let Some(process) = &mut self.master.process else { return };
        let epoch = process.epoch;
        let stream = &mut process.streams[host];
        let known = position.filter(|at| at.stream == epoch && at.seq <= stream.seq);
        if let Some(at) = known
            && stream.kept.front().map_or(stream.seq == at.seq, |first| first.seq <= at.seq + 1)
        {
            stream.live = true;
            let missed: Vec<Rc<Frame>> =
                stream.kept.iter().filter(|frame| frame.seq > at.seq && repeat).cloned().collect();
            for frame in missed {
                self.publish(host, &frame);
            }
            return;
        }
        stream.live = true;
        stream.kept.clear();
        self.report.snapshots += 1;
        let state = self.master.host_state(host);
        self.append(host, Entry::Reset);
        for entry in state {
            self.append(host, entry);
        }
        self.append(host, Entry::Live);
    }

    pub(super) fn requested(&mut self, host: usize, process: u64, id: u64, request: Request) {
        let now = self.now;
        let Some(master) = &mut self.master.process else { return };
        match request {
            Request::Register => {
                master.peers[host] = Some((process, now));
                self.heard(host);
                let now = self.master_now();
                return self.send_answer(host, process, id, Answer::Registered(now));
            }
            Request::Sync(position) => self.sync(host, position),
            Request::Acknowledge(position) => self.acknowledge(host, position),
            Request::Fetch(project) => {
                let entries = self.master.project_entries(host, project);
                self.tell(host, entries);
            }
        }
        self.send_answer(host, process, id, Answer::Done);
    }

    pub(super) fn renew(&mut self, host: usize, process: u64, beat: u64, position: Option<Position>) {
        let (now, lease) = (self.now, self.timing.lease);
        let Some(master) = &mut self.master.process else { return };
        let known = match &mut master.peers[host] {
            Some((session, heard)) if *session == process => {
                *heard = now;
                true
            }
            _ => false,
        };
        if known {
            self.heard(host);
            if let Some(position) = position {
                self.acknowledge(host, position);
            }
        }
        let Some(master) = &self.master.process else { return };
        let position = Position { stream: master.epoch, seq: master.streams[host].seq };
        self.send_lease(host, process, beat, if known { lease } else { 0 }, position);
    }

    fn heard(&mut self, host: usize) {
        let now = millis(self.now);
        let Some(process) = &mut self.master.process else { return };
        let Process { open, by_peer, .. } = process;
        for id in by_peer.get(&host).into_iter().flatten() {
            if let Some(holding) = open.get_mut(id) {
                holding.heard(host, now);
            }
        }
    }

    fn acknowledge(&mut self, host: usize, position: Position) {
        let Some(process) = &mut self.master.process else { return };
        let stream = &mut process.streams[host];
        if position.stream == process.epoch && position.seq <= stream.seq && position.seq > stream.applied {
            stream.applied = position.seq;
            self.acknowledged(host, (position.stream, position.seq));
        } else if self.is(Broken::OlderAcknowledgementCounts) {
            self.acknowledged(host, (position.stream, position.seq));
        }
    }

    fn acknowledged(&mut self, host: usize, place: (u64, u64)) {
        let any = self.is(Broken::OlderAcknowledgementCounts);
        let Some(process) = &mut self.master.process else { return };
        let place = if any { (process.epoch, u64::MAX) } else { place };
        let Process { open, by_peer, .. } = process;
        let mut news = Vec::new();
        for id in by_peer.get(&host).into_iter().flatten() {
            if open.get_mut(id).is_some_and(|holding| holding.acknowledged(host, place)) {
                news.push((*id, host, Settled::Acknowledged));
            }
        }
        self.settle(news);
    }

    fn settle(&mut self, news: Vec<(u64, usize, Settled)>) {
        let mut ids = Vec::new();
        for (id, host, settled) in news {
            ids.push(id);
            let Some(receipt) = self.master.db.receipts.get_mut(&id) else { continue };
            let (right, ended) = (receipt.right, receipt.ended);
            if let Some(holder) = receipt.holders.get_mut(&host) {
                holder.1 = Some(settled);
            }
            self.note(|| format!("receipt {id}: {right:?} at host {host}: {settled:?}"));
            // It may have been given again since, and taken again.
            if ended.is_none() || self.truth.ended(right) != ended {
                continue;
            }
            self.truth.settled(right, host);
            for facts in self.facts_of(right, host) {
                self.probe(host, &facts);
            }
            self.check_living(host);
        }
        self.completed(&ids);
    }

    fn completed(&mut self, ids: &[u64]) {
        let Some(process) = &mut self.master.process else { return };
        for id in ids {
            if !process.open.get(id).is_some_and(Holding::is_complete) {
                continue;
            }
            process.open.remove(id);
            let Some(receipt) = self.master.db.receipts.remove(id) else { continue };
            for host in receipt.holders.keys() {
                if let Some(of) = process.by_peer.get_mut(host) {
                    of.remove(id);
                    if of.is_empty() {
                        process.by_peer.remove(host);
                    }
                }
            }
            let expired = receipt.holders.values().any(|(_, settled)| *settled == Some(Settled::Expired));
            if expired {
                self.report.receipts.1 += 1;
            } else {
                self.report.receipts.0 += 1;
            }
            if let Some((project, version)) = receipt.grace {
                let row = &mut self.master.db.projects[project as usize];
                if row.version == version {
                    row.grace_known = None;
                }
            }
        }
    }

    fn look_after_receipts(&mut self) {
        let Some(process) = &mut self.master.process else { return };
        let next = process.open.values().filter_map(Holding::next).min();
        let Some(next) = next.map(|next| next.as_millis() as Ms) else { return };
        let (life, at) = (process.epoch, next.max(self.now));
        if process.tending.is_none_or(|planned| at < planned || planned < self.now) {
            process.tending = Some(at);
            self.at(at, Event::Tend { life });
        }
    }

    pub(super) fn tend(&mut self, life: u64) {
        let now = self.now;
        let Some(process) = &mut self.master.process else { return };
        if process.epoch != life || process.tending.is_none_or(|planned| planned > now) {
            return;
        }
        process.tending = None;
        let mut news = Vec::new();
        for (id, holding) in &mut process.open {
            news.extend(holding.expire(millis(now)).into_iter().map(|host| (*id, host, Settled::Expired)));
        }
        self.settle(news);
        self.look_after_receipts();
    }

    /// Who had what has ended, at a host.
    pub(super) fn facts_of(&self, right: Right, host: usize) -> Vec<Facts> {
        let plain = |account: u32, project: u32| Facts {
            account,
            project,
            login: None,
            under: None,
            key: None,
            signer: None,
            administer: false,
        };
        let account = match right {
            Right::Member(project, account) => return vec![plain(account, project)],
            Right::Signer(_) | Right::Owned(_) => return Vec::new(),
            Right::Welcome(account)
            | Right::Login(account, _)
            | Right::LogIn(account, _)
            | Right::Key(account, _) => account,
        };
        let of = self.master.owned[host]
            .iter()
            .filter(|project| self.master.db.projects[**project as usize].members.contains(&account));
        of.map(|project| Facts {
            login: match right {
                Right::Login(_, login) => Some(login),
                // What a token says that was minted under it, at the latest.
                Right::LogIn(_, log_in) => self.master.ended_under.get(&log_in).copied(),
                _ => None,
            },
            under: if let Right::LogIn(_, log_in) = right { Some(log_in) } else { None },
            key: if let Right::Key(_, key) = right { Some(key) } else { None },
            ..plain(account, *project)
        })
        .collect()
    }

    // What can be committed. Each returns what is to be told.

    pub(super) fn add_member(&mut self, project: u32, account: u32) -> Option<News> {
        let life = self.master.process.as_ref()?.epoch;
        let row = &mut self.master.db.projects[project as usize];
        if row.members.contains(&account) {
            return None;
        }
        row.members.push(account);
        row.version += 1;
        let right = Right::Member(project, account);
        self.truth.set(right, true, self.now, life);
        Some(News::Project(project, vec![right], None))
    }

    pub(super) fn remove_member(&mut self, project: u32, account: u32) -> Option<News> {
        let life = self.master.process.as_ref()?.epoch;
        let row = &mut self.master.db.projects[project as usize];
        // The owner stays.
        if !row.members.iter().skip(1).any(|member| *member == account) {
            return None;
        }
        row.members.retain(|member| *member != account);
        row.version += 1;
        let right = Right::Member(project, account);
        self.truth.set(right, false, self.now, life);
        Some(News::Project(project, vec![right], None))
    }

    pub(super) fn sign_out(&mut self, account: u32, ban: Option<bool>) -> Option<News> {
        let life = self.master.process.as_ref()?.epoch;
        let login = self.name();
        // Never below the time in seconds, so that what a lost database had
        // given away is not given again.
        let counted = self.is(Broken::SessionEpochCounted);
        let floor = if counted { 0 } else { u64::try_from(self.master_now().secs()).unwrap_or(0) };
        let row = &mut self.master.db.accounts[account as usize];
        if ban.is_some_and(|ban| ban == row.banned) {
            return None;
        }
        let mut rights = Vec::new();
        if ban != Some(false) {
            row.ended.clear();
            row.session_epoch = floor.max(row.session_epoch + 1);
            rights.push(Right::Login(account, row.login));
            self.truth.set(Right::Login(account, row.login), false, self.now, life);
            row.login = login;
            self.master.logins.insert(login, row.session_epoch);
            rights.push(Right::Login(account, login));
            self.truth.set(Right::Login(account, login), true, self.now, life);
        }
        if let Some(ban) = ban {
            row.banned = ban;
            rights.push(Right::Welcome(account));
            self.truth.set(Right::Welcome(account), !ban, self.now, life);
        }
        Some(News::Account(account, rights))
    }

    /// One log-in of an account ends; another begins.
    pub(super) fn end_log_in(&mut self, account: u32) -> Option<News> {
        let life = self.master.process.as_ref()?.epoch;
        let (which, fresh) = (self.pick(LOG_INS), self.name());
        let row = &mut self.master.db.accounts[account as usize];
        let log_in = std::mem::replace(row.log_ins.get_mut(which)?, fresh);
        row.ended.push(log_in);
        self.master.ended_under.insert(log_in, row.login);
        let full = row.ended.len() > ENDED_MAX;
        self.truth.set(Right::LogIn(account, log_in), false, self.now, life);
        self.truth.set(Right::LogIn(account, fresh), true, self.now, life);
        let mut rights = vec![Right::LogIn(account, log_in)];
        if full && let Some(News::Account(_, more)) = self.sign_out(account, None) {
            rights.extend(more);
        }
        if self.is(Broken::OneLogInEndsAll) {
            let row = &mut self.master.db.accounts[account as usize];
            row.session_epoch += 1;
        }
        Some(News::Account(account, rights))
    }

    pub(super) fn change_key(&mut self, account: u32) -> Option<News> {
        let life = self.master.process.as_ref()?.epoch;
        let fresh = self.name();
        let row = &mut self.master.db.accounts[account as usize];
        let (key, holds) = match row.key.take() {
            Some(key) => (key, false),
            None => (*row.key.insert(fresh), true),
        };
        self.truth.set(Right::Key(account, key), holds, self.now, life);
        Some(News::Account(account, vec![Right::Key(account, key)]))
    }

    pub(super) fn change_grace(&mut self, project: u32, grace: Option<Ms>) -> Option<News> {
        self.master.process.as_ref()?;
        let default = self.timing.grace;
        let row = &mut self.master.db.projects[project as usize];
        if row.grace == grace {
            return None;
        }
        row.grace_known = Some(row.grace_known.unwrap_or(0).max(row.grace.unwrap_or(default)));
        row.grace = grace;
        row.version += 1;
        let version = row.version;
        self.truth.set_grace(project, grace.unwrap_or(default), self.now);
        Some(News::Project(project, Vec::new(), Some(version)))
    }

    pub(super) fn rotate(&mut self, withdraw: bool) -> Option<News> {
        let life = self.master.process.as_ref()?.epoch;
        let fresh = self.new_signing_key();
        self.truth.set(Right::Signer(fresh), true, self.now, life);
        let ring = &mut self.master.db.ring;
        ring.version += 1;
        ring.keys.insert(0, fresh);
        let mut rights = vec![Right::Signer(fresh)];
        if withdraw {
            // The one that has signed so far.
            let key = ring.keys.remove(2);
            ring.withdrawn.push(key);
            if ring.withdrawn.len() > 16 {
                ring.withdrawn.remove(0);
            }
            self.truth.set(Right::Signer(key), false, self.now, life);
            rights.push(Right::Signer(key));
        } else {
            ring.keys.truncate(4);
        }
        Some(News::Ring(rights))
    }

    /// A project changes hands, while both hosts are there.
    pub(super) fn move_project(&mut self, project: u32, to: usize) -> Option<News> {
        let life = self.master.process.as_ref()?.epoch;
        let row = &mut self.master.db.projects[project as usize];
        let from = row.owner;
        let there = |host: usize| self.hosts[host].is_connected() && self.links[host].bus.is_none();
        if from == to || !there(from) || !there(to) || !self.hosts[from].held.contains_key(&project) {
            return None;
        }
        self.hosts[from].held.remove(&project);
        self.let_go(from, project);
        let row = &mut self.master.db.projects[project as usize];
        row.owner = to;
        row.epoch = row.epoch.next();
        self.master.owned[from].remove(&project);
        self.master.owned[to].insert(project);
        self.truth.moved(project, self.now, life);
        let wait = 5 + self.below(200);
        self.after(wait, Event::Granted { project, host: to });
        Some(News::Owner(project, from))
    }
}

fn millis(time: Ms) -> Duration {
    Duration::from_millis(time)
}
