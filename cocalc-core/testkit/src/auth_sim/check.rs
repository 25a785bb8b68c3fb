//! What is true, and whether what hosts do agrees with it.

use std::collections::{BTreeMap, BTreeSet};

use cocalc_auth::{
    acl::{Ask, ConnectionId, Refusal},
    store::Position,
};
use cocalc_ids::{Action, Scope};

use super::{
    Check,
    world::{Event, Ms, Sim},
};

/// Clocks run too fast or too slow by no more than this, in millionths.
pub(super) const DRIFT_PPM: u64 = 500;
/// What time alone has ended is closed within a second, and gone within another.
const CLOSED_WITHIN: Ms = 2_100;
/// The limits of the original; the bounds that are checked.
const NEGATIVE_MAX: usize = 4096;
const FETCHES_MAX: usize = 256;
const INBOX_MAX: usize = 8192;

/// One condition of being allowed something. Each begins and ends at a commit.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) enum Right {
    /// An account is a member of a project.
    Member(u32, u32),
    /// An account is not banned.
    Welcome(u32),
    /// An account has not signed out since this login. Logins are told apart
    /// also where a restored database counts session epochs anew.
    Login(u32, u64),
    /// This log-in of an account, one of several, has not ended.
    LogIn(u32, u64),
    /// An account lists this SSH key.
    Key(u32, u64),
    /// A signing key is not withdrawn.
    Signer(u64),
    /// A project is where it is; no condition, but hosts are told.
    Owned(u32),
}

/// Since when a condition holds, or does not.
#[derive(Clone, Debug)]
pub(super) struct Since {
    pub(super) holds: bool,
    pub(super) at: Ms,
    /// Whether it was otherwise before.
    again: bool,
    /// The stream epoch at that time: whoever has the whole state of a later
    /// one knows.
    life: u64,
    /// Whoever has acknowledged this place knows.
    places: BTreeMap<usize, Position>,
    /// Where a receipt says that it is in force.
    in_force: BTreeSet<usize>,
}

/// What is true.
#[derive(Debug, Default)]
pub(super) struct Truth {
    pub(super) rights: BTreeMap<Right, Since>,
    /// Every grace that a project had, and when another took its place.
    pub(super) graces: Vec<Vec<(Ms, Option<Ms>)>>,
}

/// What somebody shows, as it is in truth.
#[derive(Clone, Copy, Debug)]
pub(super) struct Facts {
    pub(super) account: u32,
    pub(super) project: u32,
    pub(super) login: Option<u64>,
    /// The log-in under which it was opened.
    pub(super) under: Option<u64>,
    pub(super) key: Option<u64>,
    pub(super) signer: Option<u64>,
    pub(super) administer: bool,
}

impl Facts {
    pub(super) fn rights(&self) -> impl Iterator<Item = Right> + use<> {
        let account = self.account;
        [
            Some(Right::Member(self.project, account)),
            Some(Right::Welcome(account)),
            self.login.map(|login| Right::Login(account, login)),
            self.under.map(|under| Right::LogIn(account, under)),
            self.key.map(|key| Right::Key(account, key)),
            self.signer.map(Right::Signer),
        ]
        .into_iter()
        .flatten()
    }
}

impl Truth {
    /// A condition begins or ends to hold.
    pub(super) fn set(&mut self, right: Right, holds: bool, now: Ms, life: u64) {
        let before = self.rights.get(&right).map(|since| since.holds);
        if before == Some(holds) || (before.is_none() && !holds) {
            return;
        }
        let again = before.is_some();
        let since = Since { holds, at: now, again, life, places: BTreeMap::new(), in_force: BTreeSet::new() };
        self.rights.insert(right, since);
    }

    /// A project has another owner.
    pub(super) fn moved(&mut self, project: u32, now: Ms, life: u64) {
        self.rights.remove(&Right::Owned(project));
        self.set(Right::Owned(project), true, now, life);
    }

    pub(super) fn holds(&self, right: Right) -> bool {
        self.rights.get(&right).is_some_and(|since| since.holds)
    }

    /// When it ended, if it does not hold.
    pub(super) fn ended(&self, right: Right) -> Option<Ms> {
        self.rights.get(&right).filter(|since| !since.holds).map(|since| since.at)
    }

    pub(super) fn all_hold(&self, facts: &Facts) -> bool {
        facts.rights().all(|right| self.holds(right))
    }

    /// By this place of its stream the host knows.
    pub(super) fn placed(&mut self, right: Right, host: usize, place: Position) {
        if let Some(since) = self.rights.get_mut(&right) {
            since.places.entry(host).or_insert(place);
        }
    }

    pub(super) fn settled(&mut self, right: Right, host: usize) {
        if let Some(since) = self.rights.get_mut(&right) {
            since.in_force.insert(host);
        }
    }

    pub(super) fn set_grace(&mut self, project: u32, grace: Ms, now: Ms) {
        let graces = &mut self.graces[project as usize];
        if graces.last().map(|(last, _)| *last) == Some(grace) {
            return;
        }
        if let Some((_, until)) = graces.last_mut() {
            *until = Some(now);
        }
        graces.push((grace, None));
    }

    /// Until when a host may go on with what ended at `ended`.
    pub(super) fn deadline(&self, facts: &Facts, ended: Ms, lease: Ms) -> Ms {
        let drifted = |time: Ms| time + time * DRIFT_PPM * 2 / 1_000_000 + 2;
        if facts.administer {
            return ended + drifted(lease);
        }
        let graces = self.graces[facts.project as usize].iter();
        // A host that has not heard of the end may not have heard of a shorter
        // grace either, but then it had no lease after that.
        let until = graces.map(|(grace, until)| until.unwrap_or(Ms::MAX).min(ended) + drifted(lease + grace));
        until.max().unwrap_or(ended)
    }
}

impl Since {
    fn known(&self, host: usize, acknowledged: Option<Position>) -> bool {
        let Some(acknowledged) = acknowledged else { return false };
        acknowledged.stream > self.life || self.places.get(&host).is_some_and(|place| acknowledged >= *place)
    }
}

impl Sim {
    /// The host allows this, or lets it live on.
    pub(super) fn check_allowed(&mut self, host: usize, facts: &Facts, lives: bool) {
        let slack = if lives { CLOSED_WITHIN } else { 0 };
        let lease = self.timing.lease;
        let acknowledged = self.hosts[host].acknowledged;
        for right in facts.rights() {
            let broken = match self.truth.rights.get(&right) {
                None => Some((Check::BeforeGrant, 0)),
                Some(since) if since.holds => None,
                Some(since) if since.known(host, acknowledged) => {
                    Some((Check::AfterAcknowledgement, since.at))
                }
                Some(since) if since.in_force.contains(&host) => Some((Check::Receipt, since.at)),
                Some(since) => {
                    let until = self.truth.deadline(facts, since.at, lease) + slack;
                    let late = Some((Check::LeaseAndGrace, since.at)).filter(|_| self.now > until);
                    if facts.administer { late.map(|(_, at)| (Check::Administration, at)) } else { late }
                }
            };
            if let Some((check, at)) = broken {
                let (now, how) = (self.now, if lives { "lives on" } else { "is allowed" });
                self.violate(check, || {
                    format!("host {host}: {facts:?} {how} at {now} ms, but {right:?} ended at {at} ms")
                });
                return;
            }
        }
        if !self.hosts[host].leased_in_boot {
            self.violate(Check::Reboot, || format!("host {host}: {facts:?} after a reboot, without a lease"));
        }
    }

    /// The host refuses this, and it was not for want of a lease.
    pub(super) fn check_refused(&mut self, host: usize, facts: &Facts, refusal: Refusal) {
        let acknowledged = self.hosts[host].acknowledged;
        let rights = &self.truth.rights;
        let known = |right| {
            // Hosts are not told of log-ins that begin.
            let begun = |since: &Since| matches!(right, Right::LogIn(..)) && !since.again;
            let told = |since: &Since| begun(since) || since.known(host, acknowledged);
            rights.get(&right).is_some_and(|since| since.holds && told(since))
        };
        let about_rights = matches!(
            refusal,
            Refusal::NotAMember
                | Refusal::Banned
                | Refusal::SignedOut
                | Refusal::KeyRemoved
                | Refusal::Unknown
        );
        let arrived = Right::Owned(facts.project);
        let here = !rights.contains_key(&arrived) || known(arrived);
        if about_rights && here && facts.rights().all(known) {
            self.violate(Check::LostGrant, || {
                format!("host {host} refuses {facts:?} ({refusal}), which it has acknowledged")
            });
        }
    }

    /// What lives at a host, when it says that it has applied everything, or
    /// when a receipt or time says so.
    pub(super) fn check_living(&mut self, host: usize) {
        let living: Vec<Facts> = self.hosts[host].living().collect();
        for facts in living {
            self.check_allowed(host, &facts, true);
        }
    }

    /// Asks a host what it would say to somebody who has these rights no more.
    pub(super) fn probe(&mut self, host: usize, facts: &Facts) {
        let Some((ask, held)) = self.ask_of(host, facts) else { return };
        if let Some(verdict) = self.decide(host, &ask, held) {
            match verdict.outcome {
                Ok(()) => self.check_allowed(host, facts, false),
                Err(refusal) => self.check_refused(host, facts, refusal),
            }
        }
        self.check_living(host);
    }

    /// Plans to look when the lease and grace of what has just ended are over,
    /// and now and then before.
    pub(super) fn plan_probes(&mut self, host: usize, facts: &Facts) {
        let until = self.truth.deadline(facts, self.now, self.timing.lease);
        let wait = until - self.now;
        for wait in [self.below(3_000), self.below(wait + 1), wait + 1, wait + 500, wait + CLOSED_WITHIN + 1]
        {
            self.after(wait, Event::Probe { facts: *facts, host });
        }
    }

    /// Looks whether everything stays in its bounds.
    pub(super) fn inspect(&mut self) {
        self.after(60_000, Event::Inspect);
        let mut wrong = self.master.too_much();
        let (heap, most) = self.under_way();
        if heap > most {
            wrong = Some(format!("{heap} events are under way"));
        }
        for (n, host) in self.hosts.iter().enumerate() {
            let boot = host.boot(self.now);
            let Some(daemon) = &host.daemon else { continue };
            let registered = daemon.cache.connections();
            if registered != daemon.registered() {
                wrong = Some(format!("host {n} has {registered} connections in its index"));
            }
            if daemon.negative.len() > NEGATIVE_MAX || daemon.fetches.len() > FETCHES_MAX {
                wrong = Some(format!("host {n} remembers too much of fetches"));
            }
            if daemon.negative.values().any(|until| *until > boot + super::host::NEGATIVE_FOR) {
                wrong = Some(format!("host {n} remembers for too long what it could not have"));
            }
            if daemon.inbox.len() > INBOX_MAX {
                wrong = Some(format!("host {n} has {} frames waiting", daemon.inbox.len()));
            }
        }
        if let Some(wrong) = wrong {
            self.violate(Check::Memory, || wrong);
        }
    }

    /// Everything works again, and has for a while: everybody is where they may
    /// be, and nobody else is.
    pub(super) fn at_the_end(&mut self) {
        for project in 0..self.master.db.projects.len() {
            let (owner, members) = {
                let row = &self.master.db.projects[project];
                (row.owner, row.members.clone())
            };
            let project = project as u32;
            let strangers = [0, 1, 2].map(|_| self.below(self.master.db.accounts.len() as u64) as u32);
            let all = members.into_iter().chain(strangers);
            let all = all.flat_map(|account| {
                let row = &self.master.db.accounts[account as usize];
                let under = row.log_ins.iter().chain(&row.ended).map(|one| Some(*one)).chain([None]);
                let facts = under.map(|under| Facts {
                    account,
                    project,
                    login: Some(row.login),
                    under,
                    key: row.key,
                    signer: None,
                    administer: false,
                });
                facts.collect::<Vec<_>>()
            });
            for facts in all.collect::<Vec<_>>() {
                let allowed = self
                    .ask_of(owner, &facts)
                    .and_then(|(ask, held)| self.decide(owner, &ask, held).map(|verdict| verdict.outcome));
                match (allowed, self.truth.all_hold(&facts)) {
                    (Some(Ok(())), true) => {}
                    (Some(Ok(())), false) => self.check_allowed(owner, &facts, false),
                    (outcome, true) => self.violate(Check::LostGrant, || {
                        format!("at the end host {owner} refuses {facts:?}: {outcome:?}")
                    }),
                    (_, false) => {}
                }
            }
        }
        for host in 0..self.hosts.len() {
            self.check_living(host);
        }
        self.inspect();
    }

    /// The question that belongs to the facts, of somebody whose proof is good
    /// in itself.
    pub(super) fn ask_of(&self, host: usize, facts: &Facts) -> Option<(Ask, Option<cocalc_ids::Epoch>)> {
        use super::world::{account_id, key_id, project_id};
        let row = &self.master.db.accounts[facts.account as usize];
        let proof = match facts.key {
            Some(key) => cocalc_auth::acl::Proof::Key(key_id(key)),
            None => cocalc_auth::acl::Proof::Token,
        };
        let sep = match facts.login {
            Some(login) => Some(*self.master.logins.get(&login)?),
            None => None,
        };
        let _ = row;
        let ask = Ask {
            account: account_id(facts.account),
            project: project_id(facts.project),
            action: if facts.administer { Action::Administer } else { Action::Use(Scope::Ssh) },
            epoch: None,
            session_epoch: sep,
            login: facts.under.map(super::world::login_tag),
            acl: 0,
            proof,
        };
        Some((ask, self.hosts[host].held.get(&facts.project).copied()))
    }
}

/// A connection that was let in.
#[derive(Clone, Debug)]
pub(super) struct Living {
    pub(super) id: ConnectionId,
    pub(super) facts: Facts,
}
