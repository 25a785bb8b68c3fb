//! The parts of a proxy, put together.

use std::{
    fs::File,
    sync::{Arc, OnceLock},
    time::Duration,
};

use cocalc_auth::{audit::Event, identity::Identity};
use cocalc_auth_live::{AuditLog, AuditReport, DriverConfig, Knowledge, ProxyCheck, StreamDriver};
use cocalc_core::{
    BoxError,
    auth::{Denial, Secret},
    bus::{Bus, Payload},
    clock::{Clock, SystemClock},
    connector::{Connector, Peer},
    control::{PeerReply, PeerRequest, api_subject},
    ids::{HostId, ProjectId, ProxyId, SessionId},
    memory::router::{Lookup, TableRouter},
    router::{HostAddress, Route, Router},
};
use cocalc_daemon::{
    certificate::Certificate,
    ending::{Drain, Ending},
    join::{self, Joining, Kind, Membership},
    probe::Metrics,
    start::{Error, all_taken, listen, make_dir},
};
use cocalc_http::{Limits, ProxyIngress, Served, Tls, TokenHost, TokenPrecheck};
use cocalc_sqlite::HostAcl;
use cocalc_ssh::{HostKeys, RemoteGate, SshIngress};
use cocalc_transfer::DirectConnector;
use tokio::{net::TcpListener, task::JoinSet};

use crate::{
    config::Config, endpoints::ProxyEndpoints, names::MasterNames, pinned::Pinned, registrar::Registrar,
};

/// How long the master may take to say where a project is.
const LOOKUP_LIMIT: Duration = Duration::from_secs(2);
/// How long a host may take to accept a connection: more than one needs that is
/// being started again, whose socket waits.
const HOST_LIMIT: Duration = Duration::from_secs(15);
/// How long the master may take, at the end, to hear where the audit log ends.
const REPORT_LIMIT: Duration = Duration::from_secs(2);

/// A running proxy. Dropping it closes what it carries.
#[derive(Debug)]
pub struct Proxy {
    id: ProxyId,
    ending: Ending,
    drain: Drain,
    tls: Option<Tls>,
    serving: JoinSet<()>,
    driver: StreamDriver,
    _background: JoinSet<()>,
    _lock: File,
}

impl Proxy {
    /// Joins the federation if it has not yet, and starts to serve.
    ///
    /// # Errors
    ///
    /// As [`Error`] says. Nothing listens then.
    pub async fn start(config: Config) -> Result<Self, Error> {
        let data = make_dir(&config.data_dir)?;
        let open = |part| Error::open(part);
        let file = |error: std::io::Error| Error::File { path: data.clone(), source: error.into() };
        let lock = cocalc_daemon::files::lock_directory(&data).map_err(file)?;
        let identity = Arc::new(join::identity(&data, config.join_token_file.as_deref())?);
        let (cert, key) = (config.tls_cert.as_deref(), config.tls_key.as_deref());
        let certificate = Certificate::open(cert, key, &config.acme, &data).await;
        let certificate = certificate.map_err(Error::open("certificate"))?;
        let tls = certificate.as_ref().map(Certificate::tls);
        let http_listener = listen("listen", config.listen).await?;
        let ssh_listener = listen("ssh_listen", config.ssh_listen).await?;
        all_taken()?;
        let at = |listener: &TcpListener| listener.local_addr().map(|address| address.to_string());
        let address = HostAddress {
            url: match &config.public_url {
                Some(url) => url.trim_end_matches('/').to_owned(),
                None => {
                    let scheme = if config.has_certificate() { "https" } else { "http" };
                    format!("{scheme}://{}", at(&http_listener).map_err(file)?)
                }
            },
            domain: config.domain.clone(),
            ssh: config.public_ssh.clone().map_or_else(|| at(&ssh_listener), Ok).map_err(file)?,
            peer: String::new(),
            identity: identity.public_key().to_string(),
        };
        let Membership { id, issuer } = join(&config, &address, &identity).await?;

        let peer = Peer::Proxy(id);
        let connect =
            || cocalc_daemon::bus::connect(&config.master_url, &issuer, peer, Arc::clone(&identity));
        let bus: Arc<dyn Bus> = Arc::new(connect().map_err(open("bus"))?);
        let keepalive: Arc<dyn Bus> = Arc::new(connect().map_err(open("bus"))?);

        let acl = HostAcl::open(&data).map_err(|e| open("cache")(e.into()))?;
        let knowledge = Knowledge::open(Arc::new(acl), Arc::new(SystemClock), None)
            .map_err(|e| open("cache")(e.into()))?;
        let audit =
            AuditLog::open(&make_dir(&data.join("audit"))?).map_err(|e| open("audit log")(e.into()))?;
        let table = TableRouter::new(lookup(Arc::clone(&bus), peer));
        let mut ssh_keys = HostKeys::load_or_create(&data.join("ssh_host_ed25519_key"))
            .map_err(|e| open("SSH host key")(e.into()))?;
        for kind in &config.ssh_more_host_keys {
            ssh_keys = ssh_keys
                .and_load_or_create(&data.join(kind.file_name()), *kind)
                .map_err(|e| open("SSH host key")(e.into()))?;
        }
        let registrar = Registrar {
            name: config.name.clone(),
            session: SessionId::random(),
            address: address.clone(),
            ssh_host_keys: ssh_keys.public(),
            table: table.clone(),
        };
        let session = registrar.session;
        let handler = Arc::new(registrar);
        let driver = StreamDriver::start(
            Arc::clone(&knowledge),
            DriverConfig {
                peer,
                session,
                bus: Arc::clone(&bus),
                keepalive,
                handler,
                audit: Some(AuditReport { log: audit.clone(), identity: Arc::clone(&identity) }),
            },
        );

        let router: Arc<dyn Router> = Arc::new(table.clone());
        let (hosts, decoys, strangers) = (table.clone(), table.clone(), table.clone());
        let book = move |host: HostId| hosts.host(host);
        let direct =
            DirectConnector::new(&identity, Arc::new(book)).map_err(|e| open("peer channel")(e.into()))?;
        let connector: Arc<dyn Connector> = Arc::new(Pinned { connector: Arc::new(direct), table });
        let mut served = Served::new();
        if !config.domain.is_empty() {
            served = served.domain(&config.domain).map_err(|e| open("domain")(e.into()))?;
        }
        let built = Arc::new(OnceLock::new());
        let ending = Ending::default();
        let endpoints = ProxyEndpoints {
            ending: ending.clone(),
            knowledge: Arc::clone(&knowledge),
            connected: driver.connected(),
            metrics: Metrics::default(),
            ingress: Arc::clone(&built),
            audit: audit.clone(),
        };
        let precheck = Arc::new(Precheck { check: ProxyCheck::new(Arc::clone(&knowledge)), audit });
        let mut limits = Limits { drain: config.drain.limit(), ..config.http.limits(config.limits.http()) };
        limits.connect_timeout = limits.connect_timeout.max(HOST_LIMIT);
        let http = ProxyIngress::builder(Arc::clone(&router), Arc::clone(&connector), precheck)
            .served(served)
            .https(address.url.starts_with("https://"))
            .tls(tls.clone())
            .endpoints(Arc::new(endpoints))
            .decoy(move |project| decoys.decoy(project))
            .limits(limits)
            .build();
        // It was made a line above and is set once.
        let _ = built.set(http.clone());
        let gate =
            Arc::new(RemoteGate::new(router, connector).decoy(move |project| strangers.decoy(project)));
        let names = MasterNames::new(Arc::clone(&bus), peer);
        let at_most = |limit: u32| usize::try_from(limit).unwrap_or(usize::MAX);
        let ssh = SshIngress::builder(Arc::clone(&gate) as _, ssh_keys)
            .passage(gate)
            .connections_max(at_most(config.limits.ssh_connections))
            .connections_per_address_max(at_most(config.limits.ssh_connections_per_source))
            .names(Arc::new(names))
            .drain(config.drain.limit())
            .build();
        let (offers, known) = (ssh.clone(), Arc::clone(&knowledge));
        let certified = cocalc_daemon::certify::keep_certified(
            peer,
            bus,
            move || known.with(|cache| cache.ssh_authorities().version),
            move |certificates| offers.offer_certificates(certificates),
        );

        let mut background = JoinSet::new();
        background.spawn(certified);
        if let Some(certificate) = certificate {
            background.spawn(async move { certificate.keep().await });
        }
        let mut serving = JoinSet::new();
        let stop = ending.stopped();
        serving.spawn(async move { http.serve(http_listener, stop).await });
        let stop = ending.stopped();
        serving.spawn(async move { ssh.serve(ssh_listener, stop).await });
        tracing::info!(%id, name = %config.name, url = address.url, "proxy started");
        Ok(Self {
            id,
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
    pub fn id(&self) -> ProxyId {
        self.id
    }

    /// The certificate of its listener, if it has one: it can be told to look at
    /// the files at once.
    pub fn tls(&self) -> Option<Tls> {
        self.tls.clone()
    }

    /// Serves until `shutdown` resolves; then says so at `/readyz`, refuses what
    /// is new, lets what is open end as the configuration's `[drain]` says, and
    /// closes the rest.
    pub async fn run_until(mut self, shutdown: impl Future<Output = ()>) {
        shutdown.await;
        let served = async { while self.serving.join_next().await.is_some() {} };
        self.ending.run(self.drain, served).await;
        if tokio::time::timeout(REPORT_LIMIT, self.driver.report_audit()).await.is_err() {
            tracing::info!("the master was not told the end of the audit log");
        }
    }
}

/// The tokens that a proxy need not carry further.
#[derive(Debug)]
struct Precheck {
    check: ProxyCheck,
    audit: AuditLog,
}

impl TokenPrecheck for Precheck {
    fn verify(&self, token: &Secret, project: ProjectId) -> Result<Option<TokenHost>, Denial> {
        let checked = self.check.token(token.expose(), project);
        let claims = checked.inspect_err(|denial| {
            let mut event = Event::new("deny", denial.to_string(), SystemClock.wall());
            event.project = Some(project);
            self.audit.record(event);
        })?;
        Ok(Some(TokenHost { host: claims.aud.0, epoch: claims.epoch }))
    }
}

/// Asks the master where a project is.
fn lookup(bus: Arc<dyn Bus>, peer: Peer) -> Lookup {
    Arc::new(move |project| {
        let bus = Arc::clone(&bus);
        Box::pin(async move { ask(&*bus, peer, project).await })
    })
}

async fn ask(bus: &dyn Bus, peer: Peer, project: ProjectId) -> Result<Option<Route>, BoxError> {
    let payload = Payload::json(&PeerRequest::Route { project })?;
    let answer = bus.request(&api_subject(peer), payload, LOOKUP_LIMIT).await?;
    match answer.payload.parse()? {
        PeerReply::Route { route } => Ok(route),
        PeerReply::Error { message } => Err(message.into()),
        _ => Err("the master's answer makes no sense".into()),
    }
}

async fn join(
    config: &Config,
    address: &HostAddress,
    identity: &Arc<Identity>,
) -> Result<Membership<ProxyId>, Error> {
    let (config, address, identity) = (config.clone(), address.clone(), Arc::clone(identity));
    let joined = tokio::task::spawn_blocking(move || {
        let joining = Joining {
            kind: Kind::Proxy,
            name: &config.name,
            master_url: &config.master_url,
            join_token_file: config.join_token_file.as_deref(),
            data_dir: &config.data_dir,
            address: &address,
        };
        join::load_or_join(&joining, &identity)
    });
    Ok(joined.await.map_err(|error| Error::open("membership")(error.into()))??)
}
