//! What all parts of a running master share.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use cocalc_auth::stream::Entry;
use cocalc_auth_live::AuditLog;
use cocalc_conat::Broker;
use cocalc_core::{
    bus::{self, Bus},
    clock::Clock,
    connector::Peer,
    control::{self, HostCommand, HostReply, Settings},
    moves::NoAnswer,
    router::HostAddress,
};
use cocalc_daemon::ending::Ending;
use cocalc_ids::{HostId, ProjectId, SessionId, Timestamp};
use cocalc_sqlite::master::{self as store, Store};
use futures_util::{StreamExt, stream::FuturesUnordered};

use crate::{
    accounts::Accounts,
    backups::Backups,
    bus::gate::bus_name,
    bus::peers::Peers,
    bus::streams::{About, Streams, Target},
    images::Images,
    limits::Limits,
    oidc::Oidc,
    operations::Operations,
    placement::Candidate,
    receipts::Receipts,
    secrets::SecretsKey,
    signing::Signing,
    ssh_ca::SshCa,
    turns::Turns,
};

/// A running master's state.
pub(crate) struct Shared {
    /// Where it is on the way to its end.
    pub(crate) ending: Ending,
    pub(crate) store: Arc<Store>,
    pub(crate) issuer: String,
    pub(crate) settings: Settings,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) signing: Signing,
    pub(crate) ssh_ca: SshCa,
    pub(crate) bus: Arc<dyn Bus>,
    pub(crate) peers: Arc<Peers>,
    pub(crate) streams: Streams,
    pub(crate) operations: Operations,
    pub(crate) receipts: Receipts,
    pub(crate) broker: Broker,
    pub(crate) limits: Limits,
    /// What owners of new projects may ask for at most.
    pub(crate) limits_max: cocalc_core::runner::Limits,
    /// Who changed what.
    pub(crate) audit: AuditLog,
    /// Accounts that somebody else keeps.
    pub(crate) accounts: Option<Arc<dyn Accounts>>,
    /// OpenID providers, and who is logging in with them.
    pub(crate) oidc: Oidc,
    /// Which host has which image, and work on them.
    pub(crate) images: Images,
    /// Backups, if there are any.
    pub(crate) backups: Option<Backups>,
    /// What wraps the secrets of projects.
    pub(crate) secrets: SecretsKey,
    /// Projects whose host has not heard of how they are run now.
    pub(crate) untold: Mutex<BTreeSet<ProjectId>>,
    /// Who changes how a project is run, and tells its host, one after the
    /// other: what is said last is what is stored.
    pub(crate) turns: Turns,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("issuer", &self.issuer).finish_non_exhaustive()
    }
}

/// Runs a store call where it may block.
pub(crate) async fn on_store<T: Send + 'static>(
    store: &Arc<Store>,
    call: impl FnOnce(&Store) -> store::Result<T> + Send + 'static,
) -> store::Result<T> {
    let store = store.clone();
    match tokio::task::spawn_blocking(move || call(&store)).await {
        Ok(result) => result,
        Err(error) => Err(store::Error::Store(cocalc_sqlite::Error::Failed {
            operation: "finish a call",
            source: error.into(),
        })),
    }
}

/// How long a host may take to note how a project is run.
const CONFIGURE_LIMIT: Duration = Duration::from_secs(5);
/// How long somebody waits who is to tell a host, while others do.
const TURN_LIMIT: Duration = Duration::from_secs(30);
/// How often a host that is back is told of something, until it answers.
const UNTOLD_TRIES: u32 = 10;
/// How long a host that was withdrawn may take to hear of it.
const LAST_WORDS_LIMIT: Duration = Duration::from_secs(2);
/// How long a host that refused a command may take over another copy of it.
const REPEATED_LIMIT: Duration = Duration::from_secs(30);

/// Why there is no answer of a host.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Unanswered {
    /// It did not get the command.
    NotSent,
    /// It may have got it, and have done it, or do it yet.
    Lost,
}

impl Shared {
    pub(crate) fn now(&self) -> Timestamp {
        self.clock.wall()
    }

    /// Runs a store call where it may block.
    pub(crate) async fn db<T: Send + 'static>(
        &self,
        call: impl FnOnce(&Store) -> store::Result<T> + Send + 'static,
    ) -> store::Result<T> {
        on_store(&self.store, call).await
    }

    /// Ends the bus connections of a peer; whether it may come again is the
    /// gate's to say.
    pub(crate) async fn disconnect(&self, peer: Peer) {
        self.broker.revoke(&bus_name(peer)).await;
    }

    /// A peer was withdrawn: it hears nothing but that, and not for long.
    ///
    /// A host that means well lets go of its projects at once, and what is open
    /// there ends; one that does not keeps what it knows until its lease and
    /// grace are over.
    pub(crate) async fn dismiss(self: &Arc<Self>, peer: Peer) -> store::Result<Target> {
        self.peers.withdraw(peer);
        let last_words = move |store: &Store| match peer {
            Peer::Host(host) => {
                let gone = |project: store::Project| Entry::ProjectGone { project: project.id };
                Ok(store.projects_of_host(host)?.into_iter().map(gone).collect())
            }
            Peer::Proxy(_) => Ok(Vec::new()),
        };
        let target = self.streams.send(peer, About::default(), last_words).await?;
        let task = self.clone();
        tokio::spawn(async move {
            let heard = async {
                while task.streams.applied(peer).1 < target.seq {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            };
            if matches!(peer, Peer::Host(_)) {
                let _ = tokio::time::timeout(LAST_WORDS_LIMIT, heard).await;
            }
            // Unless it was let in again meanwhile, with another key.
            if task.peers.is_withdrawn(peer) {
                task.disconnect(peer).await;
            }
        });
        Ok(target)
    }

    /// Tells a project's host how it is run now. A host that is away, or just
    /// coming back, hears of it when it registers, or with the next start.
    ///
    /// What is told is what is stored when its turn has come, so that of two
    /// changes the host does not keep the earlier one.
    pub(crate) async fn configure_at_host(&self, id: ProjectId) {
        let told = match self.turns.of(id, TURN_LIMIT).await {
            Some(_turn) => self.say_how_it_runs(id).await,
            None => false,
        };
        self.note_told(id, told);
    }

    /// The same for whoever has the project's turn. Whether the host has heard.
    pub(crate) async fn say_how_it_runs(&self, id: ProjectId) -> bool {
        let project = match self.db(move |store| store.project(id)).await {
            Ok(project) => project,
            // There is nobody to be told.
            Err(store::Error::NotFound { .. }) => return true,
            Err(error) => {
                tracing::error!(project = %id, error = %cocalc_core::chain(&error), "cannot read how a project is run");
                return false;
            }
        };
        let command = HostCommand::Configure { project: id, epoch: project.epoch, config: project.config };
        match self.command(project.host, &command, CONFIGURE_LIMIT).await {
            Ok(HostReply::Error(error)) => {
                tracing::warn!(project = %id, error = %error.message, "the host does not take what was changed");
                true
            }
            Ok(_) => true,
            Err(_) => {
                tracing::info!(project = %id, "the host hears of what was changed when it is back");
                false
            }
        }
    }

    /// Remembers whether a project's host knows how it is run now.
    pub(crate) fn note_told(&self, id: ProjectId, told: bool) {
        if told {
            self.untold().remove(&id);
        } else {
            self.untold().insert(id);
        }
    }

    fn untold(&self) -> MutexGuard<'_, BTreeSet<ProjectId>> {
        self.untold.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells a host that has just registered what it has missed.
    pub(crate) fn tell_untold(self: &Arc<Self>, host: HostId) {
        let untold = self.untold().clone();
        if untold.is_empty() {
            return;
        }
        let task = self.clone();
        tokio::spawn(async move {
            for id in untold {
                // It may register before it hears commands.
                for _ in 0..UNTOLD_TRIES {
                    match task.db(move |store| store.project(id)).await {
                        Ok(project) if project.host == host => task.configure_at_host(id).await,
                        Ok(_) => break,
                        Err(_) => drop(task.untold().remove(&id)),
                    }
                    if !task.untold().contains(&id) {
                        break;
                    }
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
        });
    }

    pub(crate) fn lease(&self) -> Duration {
        Duration::from_millis(self.settings.lease_ms)
    }

    /// Whether a peer was heard of within its lease.
    pub(crate) fn alive(&self, peer: Peer) -> bool {
        self.peers.alive(peer, self.clock.boot(), self.lease())
    }

    /// Waits for a peer that has not come back since this process began, until
    /// `limit` after that. It is there or not then.
    pub(crate) async fn returned(&self, peer: Peer, limit: Duration) {
        let mut registrations = self.peers.registrations();
        while self.peers.session(peer).is_none() {
            let until = self.peers.heard(peer).saturating_add(limit);
            let rest = until.saturating_sub(self.clock.boot());
            match tokio::time::timeout(rest, registrations.changed()).await {
                Ok(Ok(())) => {}
                _ => return,
            }
        }
    }

    /// Sends a command to a host, and waits for its answer. A host that is not
    /// connected, or that goes away meanwhile, is not waited for.
    pub(crate) async fn command(
        &self,
        host: HostId,
        command: &HostCommand,
        limit: Duration,
    ) -> Result<HostReply, NoAnswer> {
        let peer = Peer::Host(host);
        let session = self.peers.session(peer).filter(|_| self.alive(peer)).ok_or(NoAnswer)?;
        self.ask_host(host, session, command, limit, None).await.map_err(|_| NoAnswer)
    }

    /// The same with a host's process of this `session`. What is not answered
    /// is sent again after `again`, and then each time after twice as long: the
    /// command or its answer may have been lost with a connection. The answer
    /// to any of them will do.
    pub(crate) async fn ask_host(
        &self,
        host: HostId,
        session: SessionId,
        command: &HostCommand,
        limit: Duration,
        again: Option<Duration>,
    ) -> Result<HostReply, Unanswered> {
        let peer = Peer::Host(host);
        let payload = cocalc_core::bus::Payload::json(command).map_err(|_| Unanswered::NotSent)?;
        let subject = control::inbox_subject(host);
        let mut requests = FuturesUnordered::new();
        requests.push(self.bus.request(&subject, payload.clone(), limit));
        // How many of them may have reached it.
        let mut sent = 1_usize;
        let unanswered = |sent| if sent == 0 { Unanswered::NotSent } else { Unanswered::Lost };
        // A daemon that died sends no goodbye: its lease tells.
        let mut tick = tokio::time::interval(Duration::from_millis(250));
        let mut pause = again.unwrap_or(limit);
        let repeat = tokio::time::sleep(pause);
        tokio::pin!(repeat);
        let mut refused = None;
        loop {
            let answer = tokio::select! {
                Some(answer) = requests.next() => answer,
                () = &mut repeat, if again.is_some() => {
                    if let Some(refused) = refused {
                        return Ok(refused);
                    }
                    requests.push(self.bus.request(&subject, payload.clone(), limit));
                    sent += 1;
                    pause *= 2;
                    repeat.as_mut().reset(tokio::time::Instant::now() + pause);
                    continue;
                }
                _ = tick.tick() => {
                    if self.peers.session(peer) != Some(session) || !self.alive(peer) {
                        return Err(unanswered(sent));
                    }
                    continue;
                }
            };
            match answer {
                Ok(message) => match message.payload.parse() {
                    // It may be about to do another of them. Those that were
                    // lost are not waited for.
                    Ok(refusal @ HostReply::Error(_)) if !requests.is_empty() => {
                        refused = Some(refusal);
                        repeat.as_mut().reset(tokio::time::Instant::now() + REPEATED_LIMIT);
                        continue;
                    }
                    Ok(reply) => return Ok(reply),
                    Err(error) => {
                        tracing::warn!(%host, %error, "a host's answer is not readable");
                        return Err(Unanswered::Lost);
                    }
                },
                Err(error) => {
                    tracing::debug!(%host, project = %command.project(),
                        error = %cocalc_core::chain(&error), "no answer");
                    if matches!(error, bus::Error::NoInterest { .. }) {
                        sent -= 1;
                    }
                }
            }
            if requests.is_empty() {
                return refused.ok_or_else(|| unanswered(sent));
            }
        }
    }

    /// What is known of each host when a project is placed.
    pub(crate) async fn candidates(&self) -> store::Result<Vec<Candidate>> {
        let (hosts, counts) = self.db(|store| Ok((store.hosts()?, store.project_counts()?))).await?;
        let counts: BTreeMap<_, _> = counts.into_iter().collect();
        let candidate = |host: store::Host| {
            let can = host.capabilities?;
            Some(Candidate {
                host: host.id,
                alive: self.alive(Peer::Host(host.id)),
                cordoned: host.cordoned,
                isolation: can.runner.isolation,
                images: can.images,
                free_bytes: can.free_bytes,
                projects: counts.get(&host.id).copied().unwrap_or(0),
            })
        };
        Ok(hosts.into_iter().filter_map(candidate).collect())
    }

    /// Where each host listens.
    pub(crate) async fn addresses(&self) -> store::Result<BTreeMap<HostId, HostAddress>> {
        self.db(|store| Ok(store.hosts()?.into_iter().map(|host| (host.id, host.address)).collect())).await
    }
}
