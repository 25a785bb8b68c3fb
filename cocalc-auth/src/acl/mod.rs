//! What is allowed now: the cache that the ordered stream feeds.
//!
//! [`AclCache`] is a pure state machine. Frames, keepalive replies and the boot
//! time go in; what must be saved, which connections must be closed and whether
//! the stream must be asked for again come out. It decides nothing it does not
//! know: a gap, a restored database and an ended lease fail closed.

mod connections;
mod lease;

use std::{cmp::Reverse, collections::BTreeMap, sync::Arc, time::Duration};

use cocalc_ids::{AccountId, Action, Epoch, KeyId, ProjectId, ProxyId, Role, Scope};

pub use self::{
    connections::ConnectionId,
    lease::{Lease, Standing, Tier},
};
use crate::{
    session::SessionHash,
    store::{Position, Save, Saved, entry_name},
    stream::{AccountState, Entry, Frame, ProjectAcl, PublicRing, SshAuthorities, SshKey},
    token::{LoginTag, Verifier},
};

/// A question: may this account, by this proof, do this to that project?
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Ask {
    /// Who.
    pub account: AccountId,
    /// To which project.
    pub project: ProjectId,
    /// What.
    pub action: Action,
    /// The owner's epoch that the proof is for; `None` for what outlives moves.
    pub epoch: Option<Epoch>,
    /// The account's session epoch of the proof; `None` for keys.
    pub session_epoch: Option<u64>,
    /// The account's log-in of the proof; `None` for keys, and for what is
    /// older than such notes.
    pub login: Option<LoginTag>,
    /// The lowest ACL version that may decide.
    pub acl: u64,
    /// By which proof.
    pub proof: Proof,
}

/// By which proof somebody asks.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Proof {
    /// A connect token.
    Token,
    /// A browser session.
    Session(SessionHash),
    /// An SSH key, which must still be listed.
    Key(KeyId),
    /// The same, as a proxy attests, which must still be let.
    AttestedKey(KeyId, ProxyId),
    /// An SSH certificate.
    Certificate {
        /// The key that signed it, `algorithm base64`.
        authority: String,
        /// The proxy that attests that its key is held, which must still be
        /// let; `None` if it was proved here.
        proxy: Option<ProxyId>,
    },
    /// An SSH key in the project's own list. Its account is the project's
    /// owner, who answers for that list; it has a collaborator's rights.
    InsideKey {
        /// As of a certificate.
        proxy: Option<ProxyId>,
    },
}

impl Proof {
    /// The proxy whose word it is.
    pub fn proxy(&self) -> Option<ProxyId> {
        match self {
            Self::AttestedKey(_, proxy) => Some(*proxy),
            Self::Certificate { proxy, .. } | Self::InsideKey { proxy } => *proxy,
            Self::Token | Self::Session(_) | Self::Key(_) => None,
        }
    }

    /// Whether a token, or the session that it opened, is the proof.
    fn is_of_token(&self) -> bool {
        matches!(self, Self::Token | Self::Session(_))
    }
}

/// The answer, and from how fresh knowledge.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Verdict {
    /// Allowed, or why not.
    pub outcome: Result<(), Refusal>,
    /// How long ago the knowledge was known to be current; `None` if never.
    pub staleness: Option<Duration>,
    /// Whether the master is being waited for.
    pub tier: Tier,
}

/// Why something is not allowed.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// Nothing is known of the project or the account; the master may know.
    #[error("the project or account is not known here")]
    Unknown,
    /// What is known is older than the proof requires; the master knows more.
    #[error("what is known is older than the credential requires")]
    TooOld,
    /// This host does not hold the project.
    #[error("this host holds no grant for the project")]
    NotHeld,
    /// The proof is for another owner's epoch.
    #[error("the credential is for another epoch of the project")]
    OtherEpoch,
    /// The lease and grace have ended, or the action needs a lease.
    #[error("the master is out of reach")]
    Stale,
    /// Not a member of the project.
    #[error("not a member of the project")]
    NotAMember,
    /// A member whose role does not allow this.
    #[error("the role does not permit this")]
    Role,
    /// The account is banned.
    #[error("the account is banned")]
    Banned,
    /// The account has signed out since: everywhere, or of this log-in.
    #[error("the account has signed out")]
    SignedOut,
    /// The SSH key is not listed any more.
    #[error("the key was removed")]
    KeyRemoved,
    /// The proxy may not attest for the project, or does not any more.
    #[error("this proxy may not attest for the project")]
    ProxyWithdrawn,
    /// A signing key was withdrawn, and with it what its tokens opened.
    #[error("a signing key was withdrawn")]
    KeyWithdrawn,
    /// The project's own list of keys does not count, or not any more.
    #[error("the project's own list of keys does not count")]
    InsideKeys,
    /// The session was ended.
    #[error("the session was ended")]
    SessionEnded,
    /// The project has left this host.
    #[error("the project has left this host")]
    Left,
}

impl Refusal {
    /// Whether asking the master for the project may change the answer.
    pub fn may_fetch(self) -> bool {
        matches!(self, Self::Unknown | Self::TooOld)
    }
}

/// What a frame led to.
#[derive(Debug, Default, PartialEq)]
pub struct Applied {
    /// Whether the frame was new and in its place.
    pub accepted: bool,
    /// What must be saved before the frame is acknowledged.
    pub save: Option<Save>,
    /// The connections that must be closed at once.
    pub close: Vec<(ConnectionId, Refusal)>,
    /// Whether all browser sessions must be ended.
    pub end_sessions: bool,
    /// Whether the stream must be asked for anew.
    pub need_sync: bool,
}

/// How the stream stands.
#[derive(Debug)]
enum View {
    /// Frames come in order.
    Live,
    /// Frames were missed; only the next one, or a `Reset`, is of use.
    Gap,
    /// Between `Reset` and `Live`: what was named so far.
    Syncing(BTreeMap<String, Entry>),
}

/// What is allowed now.
#[derive(Debug)]
pub struct AclCache {
    view: View,
    position: Option<Position>,
    /// Whether a whole state was ever applied.
    complete: bool,
    /// Whether something here is older than what was seen before: only a whole
    /// new state helps.
    rolled_back: bool,
    projects: BTreeMap<ProjectId, ProjectAcl>,
    accounts: BTreeMap<AccountId, AccountState>,
    proxies: BTreeMap<ProxyId, String>,
    ring: PublicRing,
    verifier: Arc<Verifier>,
    ssh: SshAuthorities,
    lease: Lease,
    connections: connections::Connections,
}

impl AclCache {
    /// A cache that knows nothing and allows nothing.
    pub fn new(grace: Duration) -> Self {
        Self {
            view: View::Gap,
            position: None,
            complete: false,
            rolled_back: false,
            projects: BTreeMap::new(),
            accounts: BTreeMap::new(),
            proxies: BTreeMap::new(),
            ring: PublicRing::default(),
            verifier: Arc::default(),
            ssh: SshAuthorities::default(),
            lease: Lease::new(grace),
            connections: connections::Connections::default(),
        }
    }

    /// Continues from what was saved. `mark` is the highest position that was
    /// ever applied, kept apart from the store: a store below it was restored
    /// from a backup, and may not decide until the master has sent everything.
    /// The lease is that of `standing`, if this is still the same boot.
    pub fn restore(
        saved: &Saved,
        standing: Option<&Standing>,
        mark: Option<Position>,
        boot_id: &str,
        grace: Duration,
    ) -> Self {
        let mut cache = Self::new(grace);
        for entry in &saved.entries {
            cache.put(entry, true);
        }
        cache.position = saved.position;
        cache.complete = saved.position.is_some();
        cache.rolled_back = mark.max(standing.and_then(|standing| standing.position)) > saved.position;
        if let Some(standing) = standing {
            cache.lease = Lease::restore(standing, boot_id);
        }
        cache
    }

    /// Begins to ask for the stream, after a connect or a gap, and returns
    /// after which position; `None` asks for the whole state.
    pub fn begin_sync(&mut self) -> Option<Position> {
        if matches!(self.view, View::Syncing(_)) || self.rolled_back {
            // Half a state cannot be continued: what it did not name yet would
            // be kept for ever.
            self.position = None;
        }
        self.view = View::Gap;
        self.position
    }

    /// Forgets the position: what was applied could not be saved, and must come
    /// again.
    pub fn lose_position(&mut self) {
        self.position = None;
        self.view = View::Gap;
    }

    /// Where the stream stands; `None` while it must be asked for as a whole.
    pub fn position(&self) -> Option<Position> {
        self.position
    }

    /// Whether every frame up to [`position`](Self::position) was applied and
    /// the state is whole.
    pub fn is_live(&self) -> bool {
        matches!(self.view, View::Live)
    }

    /// Applies one frame. Frames that came before are harmless.
    pub fn apply(&mut self, frame: &Frame) -> Applied {
        let at = Position { stream: frame.stream, seq: frame.seq };
        let mut applied = Applied::default();
        if let Some(position) = self.position {
            if at <= position {
                return applied;
            }
            let next = at.stream == position.stream && at.seq - position.seq == 1;
            if !next && frame.entry != Entry::Reset {
                applied.need_sync = !matches!(self.view, View::Gap);
                self.begin_sync();
                return applied;
            }
        } else if frame.entry != Entry::Reset {
            applied.need_sync = !matches!(self.view, View::Gap);
            self.view = View::Gap;
            return applied;
        }
        applied.accepted = true;
        self.position = Some(at);
        match &frame.entry {
            Entry::Reset => self.view = View::Syncing(BTreeMap::new()),
            Entry::Live => self.finish_sync(at, &mut applied),
            entry => self.apply_entry(entry, at, &mut applied),
        }
        if self.is_live() {
            self.lease.reached(at);
        }
        applied
    }

    fn apply_entry(&mut self, entry: &Entry, at: Position, applied: &mut Applied) {
        let syncing = matches!(self.view, View::Syncing(_));
        let withdrawn = match entry {
            Entry::KeyRing(ring) => ring.withdrawn.iter().any(|kid| !self.ring.withdrawn.contains(kid)),
            _ => false,
        };
        let kept = self.put(entry, syncing);
        match entry {
            Entry::Project(acl) => self.recheck_project(acl.project, applied),
            Entry::ProjectGone { project } => self.recheck_project(*project, applied),
            Entry::Account(account) => {
                let ids = self.connections.of_account(account.account);
                self.recheck(ids, applied);
            }
            Entry::SshAuthorities(_) => {
                let ids = self.connections.which(|ask| matches!(ask.proof, Proof::Certificate { .. }));
                self.recheck(ids, applied);
            }
            Entry::Proxy { proxy, .. } => {
                let ids = self.connections.of_proxy(*proxy);
                self.recheck(ids, applied);
            }
            Entry::KeyRing(_) if withdrawn && kept => {
                applied.end_sessions = true;
                applied.close.extend(
                    self.connections
                        .take_if(|ask| ask.proof.is_of_token())
                        .into_iter()
                        .map(|id| (id, Refusal::KeyWithdrawn)),
                );
            }
            _ => {}
        }
        let Some(name) = entry_name(entry) else { return };
        let gone = matches!(entry, Entry::ProjectGone { .. } | Entry::Proxy { identity: None, .. });
        match &mut self.view {
            View::Syncing(named) if gone => {
                named.remove(&name);
            }
            View::Syncing(named) => {
                named.insert(name, entry.clone());
            }
            View::Live | View::Gap => {
                self.view = View::Live;
                let value = (!gone).then(|| entry.clone());
                let entries = if kept { BTreeMap::from([(name, value)]) } else { BTreeMap::new() };
                applied.save = Some(Save { clear: false, entries, position: Some(at) });
            }
        }
    }

    /// The state is whole: what it did not name is forgotten.
    fn finish_sync(&mut self, at: Position, applied: &mut Applied) {
        let View::Syncing(named) = std::mem::replace(&mut self.view, View::Live) else {
            applied.save = Some(Save { position: Some(at), ..Save::default() });
            return;
        };
        let is_named = |entry: &Entry| entry_name(entry).is_some_and(|name| named.contains_key(&name));
        let gone: Vec<ProjectId> = self
            .projects
            .keys()
            .filter(|project| !is_named(&Entry::ProjectGone { project: **project }))
            .copied()
            .collect();
        for project in gone {
            self.projects.remove(&project);
            self.recheck_project(project, applied);
        }
        let gone: Vec<ProxyId> = self
            .proxies
            .keys()
            .filter(|proxy| !is_named(&Entry::Proxy { proxy: **proxy, identity: None }))
            .copied()
            .collect();
        for proxy in gone {
            self.proxies.remove(&proxy);
            let ids = self.connections.of_proxy(proxy);
            self.recheck(ids, applied);
        }
        let accounts = std::mem::take(&mut self.accounts);
        for (id, account) in accounts {
            let entry = Entry::Account(account);
            if is_named(&entry)
                && let Entry::Account(account) = entry
            {
                self.accounts.insert(id, account);
            } else {
                let ids = self.connections.of_account(id);
                self.recheck(ids, applied);
            }
        }
        if !named.contains_key("ring") {
            self.ring = PublicRing::default();
            self.verifier = Arc::default();
        }
        if !named.contains_key("ssh-authorities") {
            self.ssh = SshAuthorities::default();
        }
        self.complete = true;
        self.rolled_back = false;
        let entries = named.into_iter().map(|(name, entry)| (name, Some(entry))).collect();
        applied.save = Some(Save { clear: true, entries, position: Some(at) });
    }

    /// Takes over what an entry says; `false` if something newer is known,
    /// which in an ordered stream only a whole new state may undo.
    fn put(&mut self, entry: &Entry, replace: bool) -> bool {
        match entry {
            Entry::Project(acl) => {
                let old = self.projects.get(&acl.project);
                if !replace && old.is_some_and(|old| old.version > acl.version) {
                    return false;
                }
                self.projects.insert(acl.project, acl.clone());
            }
            Entry::ProjectGone { project } => {
                self.projects.remove(project);
            }
            Entry::Account(account) => {
                let old = self.accounts.get(&account.account);
                if !replace && old.is_some_and(|old| old.session_epoch > account.session_epoch) {
                    return false;
                }
                self.accounts.insert(account.account, account.clone());
            }
            Entry::KeyRing(ring) => {
                if !replace && self.ring.version > ring.version {
                    return false;
                }
                self.verifier = Arc::new(Verifier::new(ring));
                self.ring = ring.clone();
            }
            Entry::SshAuthorities(ssh) => {
                if !replace && self.ssh.version > ssh.version {
                    return false;
                }
                self.ssh = ssh.clone();
            }
            Entry::Proxy { proxy, identity: Some(key) } => {
                self.proxies.insert(*proxy, key.clone());
            }
            Entry::Proxy { proxy, identity: None } => {
                self.proxies.remove(proxy);
            }
            Entry::Reset | Entry::Live | Entry::Host { .. } | Entry::Route { .. } => {}
        }
        true
    }

    fn recheck_project(&mut self, project: ProjectId, applied: &mut Applied) {
        let ids = self.connections.of_project(project);
        self.recheck(ids, applied);
    }

    fn recheck(&mut self, ids: Vec<ConnectionId>, applied: &mut Applied) {
        for id in ids {
            let Some(ask) = self.connections.ask(id) else { continue };
            let reason = match self.rights(ask) {
                Ok(()) => continue,
                Err(Refusal::Unknown) if !self.projects.contains_key(&ask.project) => Refusal::Left,
                Err(reason) => reason,
            };
            self.connections.remove(id);
            applied.close.push((id, reason));
        }
    }

    /// Decides, for a host that holds the grant of epoch `held`, at boot time
    /// `now`.
    pub fn decide(&self, ask: &Ask, held: Option<Epoch>, now: Duration) -> Verdict {
        let tier = self.tier_of(ask.project, now);
        let outcome = match held {
            None => Err(Refusal::NotHeld),
            Some(held) if ask.epoch.is_some_and(|epoch| epoch != held) => Err(Refusal::OtherEpoch),
            Some(_) if tier == Tier::Expired => Err(Refusal::Stale),
            Some(_) if tier == Tier::Grace && ask.action == Action::Administer => Err(Refusal::Stale),
            Some(_) => self.rights(ask),
        };
        Verdict { outcome, staleness: self.lease.staleness(now), tier }
    }

    /// What the cached state says, without leases and grants.
    fn rights(&self, ask: &Ask) -> Result<(), Refusal> {
        let acl = self.projects.get(&ask.project).ok_or(Refusal::Unknown)?;
        if acl.version < ask.acl {
            return Err(Refusal::TooOld);
        }
        let member = acl.members.iter().find(|(account, _)| *account == ask.account);
        let (_, mut role) = *member.ok_or(Refusal::NotAMember)?;
        let account = self.accounts.get(&ask.account).ok_or(Refusal::Unknown)?;
        if account.banned {
            return Err(Refusal::Banned);
        }
        match ask.session_epoch {
            Some(epoch) if epoch < account.session_epoch => return Err(Refusal::SignedOut),
            Some(epoch) if epoch > account.session_epoch => return Err(Refusal::TooOld),
            _ => {}
        }
        if ask.login.is_some_and(|login| account.ended_logins.contains(&login)) {
            return Err(Refusal::SignedOut);
        }
        if let Some(proxy) = ask.proof.proxy()
            && self.attesting_proxy(ask.project, proxy).is_none()
        {
            return Err(Refusal::ProxyWithdrawn);
        }
        if let Proof::Key(id) | Proof::AttestedKey(id, _) = ask.proof {
            let listed = acl.keys.iter().chain(&account.keys);
            if !listed.into_iter().any(|key| key.id == id && key.account == ask.account) {
                return Err(Refusal::KeyRemoved);
            }
        }
        match &ask.proof {
            Proof::Certificate { authority, .. } if self.ssh.withdrawn.contains(authority) => {
                return Err(Refusal::KeyWithdrawn);
            }
            Proof::InsideKey { .. } if !acl.authorized_keys || role != Role::Owner => {
                return Err(Refusal::InsideKeys);
            }
            Proof::InsideKey { .. } => role = Role::Collaborator,
            _ => {}
        }
        if role.permits_in(&acl.viewable_ports, ask.action) { Ok(()) } else { Err(Refusal::Role) }
    }

    /// As whom an SSH key (`algorithm base64`) acts in a project.
    ///
    /// Lists are not proof that their account has the key, so several may name
    /// it. One counts only if its account may use SSH here: nobody shuts out the
    /// key's holder by listing it too. Of those that count, the project's own
    /// list comes first, then the highest role, then the lowest account.
    ///
    /// # Errors
    ///
    /// [`Refusal::Unknown`] if the project is not known here.
    pub fn find_key(&self, project: ProjectId, key: &str) -> Result<Option<(AccountId, KeyId)>, Refusal> {
        let found = self.find_keys(project, key)?;
        Ok(found.first().map(|listed| (listed.account, listed.id)))
    }

    /// Every entry of a list that counts for an SSH key, the first of which is
    /// that of [`find_key`](Self::find_key): with their options they may admit
    /// in different ways.
    ///
    /// # Errors
    ///
    /// As [`find_key`](Self::find_key).
    pub fn find_keys(&self, project: ProjectId, key: &str) -> Result<Vec<SshKey>, Refusal> {
        let acl = self.projects.get(&project).ok_or(Refusal::Unknown)?;
        let of_project = acl.keys.iter().map(|listed| (true, listed));
        let of_members = acl
            .members
            .iter()
            .filter_map(|(account, _)| self.accounts.get(account))
            // A list names its own account only, whatever its entries say.
            .flat_map(|account| account.keys.iter().filter(|key| key.account == account.account))
            .map(|listed| (false, listed));
        let mut found: Vec<_> = of_project
            .chain(of_members)
            .filter(|(_, listed)| listed.key == key)
            .filter_map(|(own, listed)| {
                let role = self.ssh_role(acl, listed.account)?;
                Some((Reverse((own, role)), (listed.account, listed.id), listed))
            })
            .collect();
        found.sort_by_key(|(rank, id, _)| (*rank, *id));
        Ok(found.into_iter().map(|(_, _, listed)| listed.clone()).collect())
    }

    /// The role of a member who may use SSH, as far as is known.
    fn ssh_role(&self, acl: &ProjectAcl, account: AccountId) -> Option<Role> {
        // The decision waits for what is not known of an account.
        if self.accounts.get(&account).is_some_and(|account| account.banned) {
            return None;
        }
        let (_, role) = acl.members.iter().find(|(member, _)| *member == account)?;
        role.permits(Action::Use(Scope::Ssh)).then_some(*role)
    }

    /// The identity key of an enrolled proxy, if `project` lets proxies attest
    /// SSH keys.
    pub fn attesting_proxy(&self, project: ProjectId, proxy: ProxyId) -> Option<&str> {
        let allowed = self.projects.get(&project)?.proxy_ssh;
        self.proxies.get(&proxy).filter(|_| allowed).map(String::as_str)
    }

    /// Verifies connect tokens with the keys of the stream.
    pub fn verifier(&self) -> &Arc<Verifier> {
        &self.verifier
    }

    /// The keys that sign SSH certificates.
    pub fn ssh_authorities(&self) -> &SshAuthorities {
        &self.ssh
    }

    /// As whom the keys in the project's own list act: its owner. `None` if that
    /// list does not count.
    pub fn inside_keys(&self, project: ProjectId) -> Option<AccountId> {
        let acl = self.projects.get(&project).filter(|acl| acl.authorized_keys)?;
        let owner = acl.members.iter().filter(|(_, role)| *role == Role::Owner).min();
        owner.map(|(account, _)| *account)
    }

    /// The project's ACL as it is known.
    pub fn project(&self, project: ProjectId) -> Option<&ProjectAcl> {
        self.projects.get(&project)
    }

    /// The account's session epoch as it is known.
    pub fn session_epoch(&self, account: AccountId) -> Option<u64> {
        self.accounts.get(&account).map(|account| account.session_epoch)
    }

    /// Decides, and registers a connection that lives on.
    ///
    /// # Errors
    ///
    /// The verdict that denied it.
    pub fn admit(
        &mut self,
        ask: &Ask,
        held: Option<Epoch>,
        now: Duration,
    ) -> (Verdict, Option<ConnectionId>) {
        let verdict = self.decide(ask, held, now);
        let id = verdict.outcome.is_ok().then(|| self.connections.insert(ask.clone()));
        (verdict, id)
    }

    /// Forgets a connection that ended by itself.
    pub fn disconnected(&mut self, id: ConnectionId) {
        self.connections.remove(id);
    }

    /// How many connections are registered.
    pub fn connections(&self) -> usize {
        self.connections.len()
    }

    /// Ends the connections of a browser session.
    pub fn end_session(&mut self, session: SessionHash) -> Vec<(ConnectionId, Refusal)> {
        let ids = self.connections.take_if(|ask| ask.proof == Proof::Session(session));
        ids.into_iter().map(|id| (id, Refusal::SessionEnded)).collect()
    }

    /// Ends the connections of a project that this host let go of.
    pub fn end_project(&mut self, project: ProjectId) -> Vec<(ConnectionId, Refusal)> {
        let ids = self.connections.of_project(project);
        ids.into_iter()
            .map(|id| {
                self.connections.remove(id);
                (id, Refusal::Left)
            })
            .collect()
    }

    /// A request for a lease was sent at `sent` (boot time), when the stream
    /// stood at `position_sent`, and the master granted `lease` when its stream
    /// stood at `position`. Returns whether the stream must be asked for: the
    /// master's is elsewhere.
    ///
    /// The lease counts only once everything up to the master's position was
    /// applied: a keepalive that gets through while the stream does not must
    /// not make old knowledge look fresh.
    pub fn renewed(
        &mut self,
        sent: Duration,
        lease: Duration,
        position_sent: Option<Position>,
        position: Position,
    ) -> bool {
        if position_sent.is_some_and(|ours| position < ours) {
            // The master is younger than what it told us before: it was
            // restored, or something pretends to be it.
            self.rolled_back = true;
            self.position = None;
            self.view = View::Gap;
            return true;
        }
        if matches!(self.view, View::Gap) && self.complete && self.position == Some(position) {
            // Nothing was missed: there is nothing after what was applied.
            self.view = View::Live;
        }
        let current = self.is_live() && self.position >= Some(position);
        self.lease.granted(sent, lease, position, current);
        !current
    }

    /// The time that rights go on after a lease, where the project says nothing.
    pub fn set_grace(&mut self, grace: Duration) {
        self.lease.set_grace(grace);
    }

    /// The lease, to be saved with the store.
    pub fn lease(&self) -> &Lease {
        &self.lease
    }

    /// How well is known what is allowed, where the project says nothing.
    pub fn tier(&self, now: Duration) -> Tier {
        self.tier_with(None, now)
    }

    /// How well is known what is allowed in a project.
    pub fn tier_of(&self, project: ProjectId, now: Duration) -> Tier {
        let grace_ms = self.projects.get(&project).and_then(|acl| acl.grace_ms);
        self.tier_with(grace_ms.map(Duration::from_millis), now)
    }

    fn tier_with(&self, grace: Option<Duration>, now: Duration) -> Tier {
        if self.rolled_back || !self.complete { Tier::Expired } else { self.lease.tier(grace, now) }
    }

    /// Ends the connections of projects whose grace is over.
    pub fn expire(&mut self, now: Duration) -> Vec<(ConnectionId, Refusal)> {
        let mut close = Vec::new();
        for project in self.connections.projects() {
            if self.tier_of(project, now) == Tier::Expired {
                for id in self.connections.of_project(project) {
                    self.connections.remove(id);
                    close.push((id, Refusal::Stale));
                }
            }
        }
        close
    }

    /// When a tier changes next, if nothing is heard of the master (boot time).
    pub fn next_change(&self, now: Duration) -> Option<Duration> {
        let of_projects = self.connections.projects().into_iter().map(|project| {
            self.projects.get(&project).and_then(|acl| acl.grace_ms).map(Duration::from_millis)
        });
        of_projects.chain([None]).filter_map(|grace| self.lease.next_change(grace, now)).min()
    }
}

#[cfg(test)]
mod tests;
