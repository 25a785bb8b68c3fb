//! The parts of a host, put together.

use std::{
    collections::BTreeSet, fs::File, os::unix::fs::DirBuilderExt as _, path::Path, sync::Arc, time::Duration,
};

use async_trait::async_trait;
use cocalc_auth::identity::Identity;
use cocalc_auth_live::{
    AuditLog, AuditReport, DriverConfig, Knowledge, LimitedAuth, StreamDriver, TokenAuth,
};
use cocalc_auth_sealed::Opener;
use cocalc_core::{
    activity::{Metered, Meters, Source},
    admission::{Gate, Urgency, WaveSettings},
    auth::Auth,
    bus::Bus,
    clock::SystemClock,
    connector::{Connector, Peer, Service},
    control::{CommandError, ErrorCode, ProjectConfig},
    grant::Ledger,
    ids::{HostId, ProjectId, SessionId},
    memory::router::LocalRouter,
    moves::host::MoveHost,
    router::{HostAddress, Router},
    runner::{Runner, State},
    snapshots::{Keeper, KeeperSettings},
    wake::Wake,
};
use cocalc_daemon::{
    certificate::Certificate,
    ending::{Drain, Ending},
    join::{self, Joining, Kind, Membership},
    probe::Metrics,
    start::{Error, all_taken, listen, make_dir},
};
use cocalc_http::{HostIngress, Served, Tls};
use cocalc_sqlite::{HostAcl, HostLedger};
use cocalc_ssh::{Gate as SshGate, HostKeys, LocalGate, SshIngress, SshPeers};
use cocalc_transfer::{DirectConnector, Incoming, PeerHandler, PeerListener, PeerTransfer, SnapshotReceiver};
use tokio::{net::TcpListener, task::JoinSet};

use crate::{
    apps::Apps,
    backends::Backends,
    backups::{self, FromMaster},
    config::Config,
    drill::Drill,
    endpoints::HostEndpoints,
    files::VolumeFiles,
    idle::{self, Idle},
    images::{self, Images},
    inbox,
    inside_keys::VolumeKeys,
    lifecycle::Inside,
    lifecycle::Lifecycle,
    names::LedgerNames,
    orphans,
    peers::Peers,
    ran::Ran,
    registrar::Registrar,
    secrets::Secrets,
    visits::Visits,
    wake::{HostWake, Starts},
    watch, wave,
};

/// What is kept free on the volume beside a project that arrives.
const RESERVE_BYTES: u64 = 256 << 20;
/// How long the master is waited for before what ran is brought up again.
const MASTER_FIRST: Duration = Duration::from_secs(60);
/// How long what users do over SSH through proxies goes on at the end.
const BRIEF: Duration = Duration::from_secs(2);
/// How long the master may take, at the end, to hear where the audit log ends.
const REPORT_LIMIT: Duration = Duration::from_secs(2);

/// A running host. Dropping it ends its daemon's work at once; projects run on.
#[derive(Debug)]
pub struct Host {
    id: HostId,
    address: HostAddress,
    ending: Ending,
    drain: Drain,
    tls: Option<Tls>,
    serving: JoinSet<()>,
    driver: StreamDriver,
    _background: JoinSet<()>,
    _lock: File,
}

impl Host {
    /// Joins the federation if it has not yet, and starts to serve.
    ///
    /// # Errors
    ///
    /// As [`Error`] says. Nothing listens then.
    pub async fn start(config: Config) -> Result<Self, Error> {
        let foundation = Foundation::lay(&config).await?;
        let backends = Backends::open(&config, foundation.id).await?;
        Self::start_with(config, backends, foundation).await
    }

    /// As [`start`](Self::start), with storage and runner of the caller's own.
    ///
    /// # Errors
    ///
    /// As [`start`](Self::start).
    pub async fn start_on(config: Config, backends: impl FnOnce(HostId) -> Backends) -> Result<Self, Error> {
        let foundation = Foundation::lay(&config).await?;
        let backends = backends(foundation.id);
        Self::start_with(config, backends, foundation).await
    }

    async fn start_with(config: Config, backends: Backends, foundation: Foundation) -> Result<Self, Error> {
        let Foundation { id, issuer, identity, address, listeners, certificate, lock } = foundation;
        let tls = certificate.as_ref().map(Certificate::tls);
        let data = &config.data_dir;
        let open = |part| Error::open(part);

        let store = HostLedger::open(&data.join("ledger.db")).map_err(|e| open("ledger")(e.into()))?;
        let ledger = Ledger::open(id, Arc::new(store)).await.map_err(|e| open("ledger")(e.into()))?;
        let transfer = PeerTransfer::new(&identity).map_err(|e| open("peer channel")(e.into()))?;
        transfer.throttle().set(config.transfer_bytes_per_sec);
        let sending = watch::Streams::default();
        let hear = sending.clone();
        let moves = MoveHost::builder(
            ledger.clone(),
            Arc::clone(&backends.storage),
            Arc::clone(&backends.runner),
            Arc::new(transfer),
        )
        .admission(admission(backends.clone()))
        .on_progress(move |stream| hear.hear(stream))
        .build();
        let here = backends.clone();
        let keeper = Keeper::new(
            ledger.clone(),
            Arc::clone(&backends.storage),
            Arc::clone(&backends.runner),
            Arc::new(SystemClock),
            KeeperSettings { policy: config.snapshots, round_max: config.snapshot_visits_per_sec.into() },
        );
        let opener = Opener::of(&identity);
        let sealing_key = opener.announce(&identity);
        let peer = Peer::Host(id);
        let connect =
            || cocalc_daemon::bus::connect(&config.master_url, &issuer, peer, Arc::clone(&identity));
        let bus: Arc<dyn Bus> = Arc::new(connect().map_err(open("bus"))?);
        let news = backups::News::default();
        let from_master = FromMaster { host: id, bus: Arc::clone(&bus), ledger: ledger.clone(), opener };
        let backups = backups::open(
            &config,
            ledger.clone(),
            Arc::clone(&backends.storage),
            keeper.clone(),
            Arc::new(from_master),
            Drill::open(id, Arc::clone(&backends.storage), Arc::clone(&backends.free_bytes)).await,
            &news,
            Arc::clone(&backends.free_bytes),
        )
        .await?;
        let lifecycle = Lifecycle::new(
            ledger.clone(),
            Arc::clone(&backends.storage),
            Arc::clone(&backends.runner),
            moves.clone(),
            keeper.clone(),
            Arc::new(move |digest| here.image(digest)),
        )
        .keep_receipts(&config.data_dir.join("receipts"))
        .map_err(|error| Error::open("receipts of commands")(error.into()))?
        .with_backups(backups.clone());
        let meters = Meters::new(Arc::new(SystemClock));
        let backing_up = backups.clone();
        let idle = Idle::new(idle::Parts {
            policy: config.idle,
            clock: Arc::new(SystemClock),
            meters: meters.clone(),
            ledger: ledger.clone(),
            runner: Arc::clone(&backends.runner),
            storage: Arc::clone(&backends.storage),
            occupied: Box::new(move |project| backing_up.as_ref()?.occupies(project)),
            directory: make_dir(&data.join("activity"))?,
        });
        let secrets = Secrets::new(
            id,
            Opener::of(&identity),
            Arc::clone(&bus),
            ledger.clone(),
            Arc::clone(&backends.runner),
        );
        let ran = Ran::open(&make_dir(&data.join("ran"))?)
            .map_err(|error| open("notes of what ran")(error.into()))?;
        if let Some(startup) = &backends.startup {
            startup.before(Arc::new(secrets.clone()));
            startup.note(ran.clone());
        }
        // What was started before there were notes.
        for status in backends.runner.list().await.unwrap_or_default() {
            if let (State::Running, Some(epoch)) = (status.state, status.epoch) {
                ran.note(status.project, epoch).await;
            }
        }
        let apps = backends.services.clone().map(|services| {
            let (runner, storage) = (Arc::clone(&backends.runner), Arc::clone(&backends.storage));
            Apps::new(Arc::new(SystemClock), runner, services, storage)
        });
        let inside = Inside { apps: apps.clone(), secrets: Some(secrets) };
        let lifecycle = lifecycle.idle(idle.clone()).inside(inside).ran(ran);
        // Before anybody can ask for anything: what a crash cut off is ended.
        moves.recover().await;

        let acl = HostAcl::open(data).map_err(|e| open("access cache")(e.into()))?;
        let audit =
            AuditLog::open(&make_dir(&data.join("audit"))?).map_err(|e| open("audit log")(e.into()))?;
        let knowledge = Knowledge::open(Arc::new(acl), Arc::new(SystemClock), mark(id))
            .map_err(|e| open("access cache")(e.into()))?;
        let grants = ledger.clone();
        let held = move |project: ProjectId| grants.entry(project).and_then(|entry| entry.may_run());
        let inside = VolumeKeys { storage: Arc::clone(&backends.storage) };
        let decides = TokenAuth::new(Arc::clone(&knowledge), id, Arc::new(held), Some(audit.clone()))
            .inside_keys(Arc::new(inside));
        let auth: Arc<dyn Auth> =
            Arc::new(LimitedAuth::new(Arc::new(decides), Arc::new(SystemClock), config.limits.auth()));

        let keepalive: Arc<dyn Bus> = Arc::new(connect().map_err(open("bus"))?);

        let router: Arc<dyn Router> = Arc::new(LocalRouter::new(ledger.clone()));
        let wake: Arc<dyn Wake> = Arc::new(HostWake {
            peer,
            bus: Arc::clone(&bus),
            ledger: ledger.clone(),
            runner: Arc::clone(&backends.runner),
            lifecycle: lifecycle.clone(),
            starts: Arc::new(Starts::default()),
        });
        let mut ssh_keys = HostKeys::load_or_create(&data.join("ssh_host_ed25519_key"))
            .map_err(|e| open("SSH host key")(e.into()))?;
        for kind in &config.ssh_more_host_keys {
            ssh_keys = ssh_keys
                .and_load_or_create(&data.join(kind.file_name()), *kind)
                .map_err(|e| open("SSH host key")(e.into()))?;
        }

        let peers = Arc::new(Peers::default());
        let registrar = Registrar {
            name: config.name.clone(),
            session: SessionId::random(),
            address: address.clone(),
            ssh_host_keys: ssh_keys.public(),
            sealing_key,
            backups: backups.clone(),
            backends: backends.clone(),
            lifecycle: lifecycle.clone(),
            moves: moves.clone(),
            peers: Arc::clone(&peers),
        };
        let session = registrar.session;
        let driver = StreamDriver::start(
            Arc::clone(&knowledge),
            DriverConfig {
                peer,
                session,
                bus: Arc::clone(&bus),
                keepalive,
                handler: Arc::new(registrar),
                audit: Some(AuditReport { log: audit.clone(), identity: Arc::clone(&identity) }),
            },
        );

        let mut served = Served::new();
        if !config.domain.is_empty() {
            served = served.domain(&config.domain).map_err(|e| open("domain")(e.into()))?;
        }
        let visits = Visits::new(audit.clone());
        let ending = Ending::default();
        let endpoints = HostEndpoints {
            ending: ending.clone(),
            visits: Arc::clone(&visits),
            backends: backends.clone(),
            knowledge: Arc::clone(&knowledge),
            connected: driver.connected(),
            keeper: keeper.clone(),
            backups: backups.clone(),
            metrics: Metrics::default(),
            lifecycle: lifecycle.clone(),
            audit: audit.clone(),
        };
        let files = VolumeFiles { storage: Arc::clone(&backends.storage), ledger: ledger.clone() };
        let mut http =
            HostIngress::builder(id, Arc::clone(&auth), Arc::clone(&router), Arc::clone(&backends.runner))
                .wake(Arc::clone(&wake))
                .meters(meters.clone())
                .endpoints(Arc::new(endpoints))
                .files(Arc::new(files))
                .served(served)
                .https(address.url.starts_with("https://"))
                .tls(tls.clone())
                .limits(cocalc_http::Limits {
                    drain: config.drain.limit(),
                    ..config.http.limits(config.limits.http())
                });
        if let Some(terminals) = config.terminals.limits() {
            http = http.terminals(terminals);
        }
        let http = http.build();
        let metered: Arc<dyn Runner> =
            Arc::new(Metered::new(Arc::clone(&backends.runner), meters, Source::Ssh));
        let gate: Arc<dyn SshGate> = Arc::new(LocalGate::new(auth, router, Arc::new(metered)).wake(wake));
        let starts = lifecycle.gate().clone();
        let at_most = |limit: u32| usize::try_from(limit).unwrap_or(usize::MAX);
        let ssh = SshIngress::builder(Arc::clone(&gate), ssh_keys)
            .connections_max(at_most(config.limits.ssh_connections))
            .connections_per_address_max(at_most(config.limits.ssh_connections_per_source))
            .drain(config.drain.limit())
            .witness(Arc::clone(&visits) as _)
            .names(Arc::new(LedgerNames(ledger.clone())))
            .build();
        let (offers, known) = (ssh.clone(), Arc::clone(&knowledge));
        let certified = cocalc_daemon::certify::keep_certified(
            peer,
            Arc::clone(&bus),
            move || known.with(|cache| cache.ssh_authorities().version),
            move |certificates| offers.offer_certificates(certificates),
        );
        let services = PeerServices {
            ending: ending.clone(),
            http: http.clone(),
            ssh: SshPeers::new(gate).ingress(ssh.clone()).witness(visits),
            moves: SnapshotReceiver::new(Arc::new(moves.clone())),
            images: backends.images.clone(),
            peers: Arc::clone(&peers),
        };
        let book = Arc::clone(&peers);
        let dialer = DirectConnector::new(&identity, Arc::new(move |host| book.address(host)))
            .map_err(|e| open("peer channel")(e.into()))?;
        let dialer: Arc<dyn Connector> = Arc::new(dialer);
        let peer_listener = PeerListener::builder(&identity, peers, Arc::new(services))
            .drain(config.drain.limit())
            // Each carries what one user's connection to a proxy does.
            .connections_max(at_most(config.limits.connections))
            .build()
            .map_err(|e| open("peer channel")(e.into()))?;

        let mut background = JoinSet::new();
        background.spawn(certified);
        if let Some(certificate) = certificate {
            background.spawn(async move { certificate.keep().await });
        }
        background.spawn(inbox::serve(Arc::clone(&bus), id, lifecycle.clone()));
        background.spawn(async move {
            match apps {
                Some(apps) => apps.run().await,
                None => std::future::pending().await,
            }
        });
        background.spawn(idle.run(peer, Arc::clone(&bus)));
        let world = images::World { ledger: ledger.clone(), peers: dialer };
        background.spawn(inbox::serve_images(Arc::clone(&bus), id, backends.images.clone(), world));
        background.spawn(images::announce(peer, Arc::clone(&bus), backends.images.clone(), ledger.clone()));
        background.spawn(images::keep(
            backends.images.clone(),
            ledger.clone(),
            Arc::clone(&backends.free_bytes),
        ));
        background.spawn(watch::space(peer, Arc::clone(&bus), backends.clone()));
        background.spawn(watch::streams(peer, Arc::clone(&bus), sending));
        background
            .spawn(watch::undo(moves.clone(), Duration::from_secs(config.undo_hours.saturating_mul(3600))));
        background.spawn(watch::states(
            peer,
            Arc::clone(&bus),
            ledger.clone(),
            Arc::clone(&backends.runner),
            lifecycle.clone(),
        ));
        let again = lifecycle;
        background.spawn(watch::departures(ledger.clone(), knowledge));
        background.spawn(orphans::keep(ledger.clone(), moves.clone(), Arc::clone(&backends.runner)));
        background.spawn(keeper.run());
        background.spawn(news.tell(id, Arc::clone(&bus)));
        if let Some(backups) = backups {
            background.spawn(backups.run());
        }
        background.spawn(come_back(ledger, moves, starts, again, driver.connected()));

        let mut serving = JoinSet::new();
        let (stop, users) = (ending.stopped(), http.clone());
        serving.spawn(async move { users.serve(listeners.http, stop).await });
        let stop = ending.stopped();
        serving.spawn(async move { ssh.serve(listeners.ssh, stop).await });
        let stop = ending.stopped();
        serving.spawn(async move { peer_listener.serve(listeners.peer, stop).await });
        let stop = ending.stopped();
        // What came over proxies, whose connections the listener of peers ends.
        serving.spawn(async move {
            stop.await;
            http.ask_to_end();
        });
        tracing::info!(%id, name = %config.name, url = address.url, "host started");
        Ok(Self {
            id,
            address,
            ending,
            drain: config.drain,
            tls,
            serving,
            driver,
            _background: background,
            _lock: lock,
        })
    }

    /// Its id in the federation.
    pub fn id(&self) -> HostId {
        self.id
    }

    /// Where it listens.
    pub fn address(&self) -> &HostAddress {
        &self.address
    }

    /// The certificate of its listener, if it has one: it can be told to look at
    /// the files at once.
    pub fn tls(&self) -> Option<Tls> {
        self.tls.clone()
    }

    /// Serves until `shutdown` resolves; then says so at `/readyz`, refuses what
    /// is new, lets what is open end as the configuration's `[drain]` says, and
    /// closes the rest. Projects run on.
    pub async fn run_until(mut self, shutdown: impl Future<Output = ()>) {
        shutdown.await;
        let served = async { while self.serving.join_next().await.is_some() {} };
        self.ending.run(self.drain, served).await;
        if tokio::time::timeout(REPORT_LIMIT, self.driver.report_audit()).await.is_err() {
            tracing::info!("the master was not told the end of the audit log");
        }
    }
}

/// What comes before the backends: directory, key, listeners, membership.
struct Foundation {
    id: HostId,
    issuer: String,
    identity: Arc<Identity>,
    address: HostAddress,
    listeners: Listeners,
    certificate: Option<Certificate>,
    lock: File,
}

struct Listeners {
    http: TcpListener,
    ssh: TcpListener,
    peer: TcpListener,
}

impl Foundation {
    async fn lay(config: &Config) -> Result<Self, Error> {
        let data = make_dir(&config.data_dir)?;
        let file = |error: std::io::Error| Error::File { path: data.clone(), source: error.into() };
        let lock = cocalc_daemon::files::lock_directory(&data).map_err(file)?;
        let identity = join::identity(&data, config.join_token_file.as_deref())?;
        let (cert, key) = (config.tls_cert.as_deref(), config.tls_key.as_deref());
        let certificate = Certificate::open(cert, key, &config.acme, &data).await;
        let certificate = certificate.map_err(Error::open("certificate"))?;
        let listeners = Listeners {
            http: listen("listen", config.listen).await?,
            ssh: listen("ssh_listen", config.ssh_listen).await?,
            peer: listen("peer_listen", config.peer_listen).await?,
        };
        all_taken()?;
        let at = |listener: &TcpListener| listener.local_addr().map(|address| address.to_string());
        let address = HostAddress {
            url: match &config.public_url {
                Some(url) => url.trim_end_matches('/').to_owned(),
                None => {
                    let scheme = if config.has_certificate() { "https" } else { "http" };
                    format!("{scheme}://{}", at(&listeners.http).map_err(file)?)
                }
            },
            domain: config.domain.clone(),
            ssh: config.public_ssh.clone().map_or_else(|| at(&listeners.ssh), Ok).map_err(file)?,
            peer: config.public_peer.clone().map_or_else(|| at(&listeners.peer), Ok).map_err(file)?,
            identity: identity.public_key().to_string(),
        };
        let identity = Arc::new(identity);
        let membership: Membership<HostId> = {
            let (config, address, identity) = (config.clone(), address.clone(), Arc::clone(&identity));
            let joined = tokio::task::spawn_blocking(move || {
                let joining = Joining {
                    kind: Kind::Host,
                    name: &config.name,
                    master_url: &config.master_url,
                    join_token_file: config.join_token_file.as_deref(),
                    data_dir: &config.data_dir,
                    address: &address,
                };
                join::load_or_join(&joining, &identity)
            });
            joined.await.map_err(|error| Error::open("membership")(error.into()))??
        };
        Ok(Self {
            id: membership.id,
            issuer: membership.issuer,
            identity,
            address,
            listeners,
            certificate,
            lock,
        })
    }
}

/// Where the position of the stream is noted apart from the store: only as
/// root there is a place that a reboot empties.
fn mark(id: HostId) -> Option<std::path::PathBuf> {
    let dir = Path::new("/run/cocalc");
    // The runner's mounts are in it, too, and projects must get through to them.
    std::fs::DirBuilder::new().recursive(true).mode(0o711).create(dir).ok()?;
    Some(dir.join(format!("{id}.position")))
}

/// Starts what was granted to be started when a crash came in between, and what
/// ran when the machine went down: one first, and then a few at a time.
async fn come_back(
    ledger: Ledger,
    moves: MoveHost,
    gate: Gate,
    lifecycle: Lifecycle,
    mut connected: tokio::sync::watch::Receiver<bool>,
) {
    let entries = ledger.entries();
    let pending: BTreeSet<ProjectId> =
        entries.iter().filter(|entry| entry.start_pending).map(|entry| entry.project).collect();
    let cut_off = entries.iter().filter(|entry| lifecycle.is_cut_off(entry)).map(|entry| entry.project);
    let all: Vec<ProjectId> =
        pending.iter().copied().chain(cut_off.filter(|project| !pending.contains(project))).collect();
    if all.len() > pending.len() {
        // Who was taken for dead while the machine was down may own nothing more.
        // Without the master the grants decide, as they do for what runs.
        let heard = connected.wait_for(|connected| *connected);
        let _ = tokio::time::timeout(MASTER_FIRST, heard).await;
        tracing::info!(count = all.len(), "bringing up what ran before the reboot");
    }
    let start = |project| {
        let (moves, gate, lifecycle) = (moves.clone(), gate.clone(), lifecycle.clone());
        let pending = pending.contains(&project);
        async move {
            let started = if pending {
                // Without a place it is started all the same: it was granted to be.
                let _turn = gate.enter(Urgency::Background).await;
                moves.start_if_pending(project).await
            } else {
                lifecycle.start_cut_off(project).await
            };
            match started {
                Ok(report) => report.status.state == State::Running,
                Err(error) => {
                    tracing::warn!(%project, error = %error.message, "cannot start");
                    false
                }
            }
        }
    };
    wave::run(all, WaveSettings::default(), start).await;
}

/// Whether a project of this configuration and size can come here.
fn admission(backends: Backends) -> impl Fn(&ProjectConfig, u64) -> Result<(), CommandError> {
    move |config, bytes| {
        if let Some(digest) = config.image
            && backends.image(digest).is_none()
        {
            let message = format!("image {digest} is not on this host; import it there first");
            return Err(CommandError { code: ErrorCode::NotFound, message });
        }
        let free = (backends.free_bytes)();
        let needed = bytes.saturating_add(bytes / 4).saturating_add(RESERVE_BYTES);
        if free < needed {
            let message = format!("{needed} bytes are needed for it, and {free} are free on this host");
            return Err(CommandError { code: ErrorCode::NoSpace, message });
        }
        Ok(())
    }
}

/// What this host offers to other hosts and to proxies.
struct PeerServices {
    ending: Ending,
    http: HostIngress,
    ssh: SshPeers,
    moves: SnapshotReceiver,
    images: Images,
    peers: Arc<Peers>,
}

#[async_trait]
impl PeerHandler for PeerServices {
    async fn handle(&self, incoming: Incoming) {
        let peer = incoming.peer;
        tokio::select! {
            () = self.serve(incoming) => {}
            () = self.peers.gone(peer) => {
                tracing::info!(?peer, "its key is good no more; closed its connection");
            }
        }
    }
}

impl PeerServices {
    async fn serve(&self, incoming: Incoming) {
        let outcome = match (incoming.service, incoming.peer) {
            (Service::Http, Peer::Proxy(_)) => {
                self.http.serve_connection(incoming.stream, incoming.source, true).await;
                Ok(())
            }
            (Service::Ssh, Peer::Proxy(proxy)) => tokio::select! {
                ended = self.ssh.serve(incoming.stream, proxy) => ended,
                // A command that ends soon does; what it is, the proxy knows.
                () = async {
                    self.ending.stopped().await;
                    tokio::time::sleep(BRIEF).await;
                } => Ok(()),
            },
            // These begin where they were when they are asked again.
            (Service::Transfer, Peer::Host(_)) => tokio::select! {
                ended = self.moves.serve(incoming) => ended,
                () = self.ending.stopped() => Ok(()),
            },
            (Service::Images, peer @ Peer::Host(_)) => tokio::select! {
                ended = self.images.serve(peer, incoming.stream) => ended,
                () = self.ending.stopped() => Ok(()),
            },
            (service, peer) => {
                tracing::warn!(?service, ?peer, "a peer asked for what is not for it");
                Ok(())
            }
        };
        if let Err(error) = outcome {
            tracing::info!(%error, "a peer's stream broke off");
        }
    }
}
