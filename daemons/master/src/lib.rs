//! The CoCalc master daemon, embeddable.
//!
//! A master knows accounts, who may do what, and which host owns which
//! project; it signs the tokens with which users connect directly to hosts. It
//! carries none of their bytes, and what runs keeps running without it.
//!
//! It is one process over one SQLite file, with the control plane's bus inside:
//! hosts and proxies connect to `/conat/`, programs and people to `/api/v1`,
//! whose OpenAPI document is at `/api/v1/openapi.json`. It speaks HTTP/1.1, over
//! TLS if it is given a certificate, and otherwise for whoever stands before it.
//!
//! ```
//! use cocalc_master::{Config, Master};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # tokio::runtime::Runtime::new()?.block_on(async {
//! let dir = tempfile::tempdir()?;
//! let master = Master::start(Config::new("127.0.0.1:0".parse()?, dir.path())).await?;
//! println!("{} with the token in {}", master.url(), dir.path().join("admin-token").display());
//! master.stop().await;
//! # Ok(())
//! # })
//! # }
//! ```

pub mod accounts;
mod admin;
mod api;
mod backups;
mod bus;
mod config;
mod images;
mod limits;
mod oidc;
mod operations;
pub mod placement;
mod receipts;
mod secret;
mod secrets;
mod server;
mod shared;
mod signing;
mod ssh_ca;
mod turns;

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use cocalc_auth_live::AuditLog;
use cocalc_conat::{Broker, BrokerConfig};
use cocalc_core::{
    BoxError,
    clock::{Clock, SystemClock},
};
use cocalc_daemon::{
    certificate::Certificate,
    ending::{Drain, Ending},
    start,
};
use cocalc_http::Tls;
use cocalc_sqlite::master::Store;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use self::{
    accounts::Accounts,
    backups::Backups,
    bus::{gate, peers::Peers, streams::Streams},
    limits::Limits,
    oidc::Oidc,
    operations::Operations,
    receipts::Receipts,
    secrets::SecretsKey,
    shared::Shared,
    signing::Signing,
    ssh_ca::SshCa,
};
pub use self::{
    backups::{BackupsConfig, Layout},
    config::Config,
    oidc::OidcConfig,
};

/// How long a connection to the bus may take to sign in.
const SIGN_IN_LIMIT: Duration = Duration::from_secs(10);

/// Why a master did not start, or stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The configuration makes no sense.
    #[error("invalid configuration: {0}")]
    Config(String),
    /// The data directory cannot be used.
    #[error("cannot use the data directory {}", path.display())]
    DataDir {
        /// Which.
        path: PathBuf,
        /// Why.
        source: BoxError,
    },
    /// It cannot listen there.
    #[error("cannot listen on {address}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// Its supervisor handed over a socket that it does not serve, or one that
    /// cannot be used.
    #[error(transparent)]
    Start(#[from] start::Error),
    /// The database failed.
    #[error("the database failed at the start")]
    Store {
        /// Why.
        source: BoxError,
    },
}

/// A running master. Dropping it ends everything at once; [`stop`](Self::stop)
/// lets requests end.
#[derive(Debug)]
pub struct Master {
    shared: Arc<Shared>,
    address: SocketAddr,
    closing: CancellationToken,
    drain: Drain,
    tls: Option<Tls>,
    server: tokio::task::JoinHandle<()>,
    tasks: JoinSet<()>,
    broker: Broker,
    _lock: std::fs::File,
}

impl Master {
    /// Starts a master: opens its data, goes on with operations that an
    /// earlier process began, and listens.
    ///
    /// # Errors
    ///
    /// See [`Error`]. Nothing is left running.
    pub async fn start(config: Config) -> Result<Self, Error> {
        Self::start_with(config, None).await
    }

    /// As [`start`](Self::start), with accounts that somebody else keeps beside
    /// the master's own.
    ///
    /// # Errors
    ///
    /// See [`Error`]. Nothing is left running.
    pub async fn start_with(config: Config, accounts: Option<Arc<dyn Accounts>>) -> Result<Self, Error> {
        config.validate().map_err(Error::Config)?;
        let directory = config.data_dir.clone();
        let unusable = |source: BoxError| Error::DataDir { path: directory.clone(), source };
        let database = |source: BoxError| Error::Store { source };
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let now = clock.wall();

        admin::make_directory(&config.data_dir).map_err(|error| unusable(error.into()))?;
        let lock =
            cocalc_daemon::files::lock_directory(&config.data_dir).map_err(|error| unusable(error.into()))?;
        let store =
            Store::open(&config.data_dir.join("master.db")).map_err(|error| unusable(error.into()))?;
        let store = Arc::new(store);
        let signing = Signing::open(config.data_dir.join("signing-keys"), config.token_algorithm, now)
            .map_err(unusable)?;
        let ssh_ca = SshCa::open(config.data_dir.join("ssh-ca-keys"), now).map_err(unusable)?;
        let secrets = SecretsKey::open(&config.data_dir.join("project-secrets-key")).map_err(unusable)?;
        admin::ensure(&store, &config.data_dir.join("admin-token"), now).map_err(unusable)?;
        let folder = config.data_dir.join("audit");
        admin::make_directory(&folder).map_err(|error| unusable(error.into()))?;
        let audit = AuditLog::open(&folder).map_err(|error| unusable(error.into()))?;
        let stream = store.next_stream(now).map_err(|error| database(error.into()))?;
        store.forget_unanswered().map_err(|error| database(error.into()))?;

        let (cert, key) = (config.tls_cert.as_deref(), config.tls_key.as_deref());
        let certificate = Certificate::open(cert, key, &config.acme, &config.data_dir).await;
        let certificate = certificate.map_err(start::Error::open("certificate"))?;
        let tls = certificate.as_ref().map(|certificate| certificate.tls().only_http1());
        let listener = start::listen("listen", config.listen).await?;
        start::all_taken()?;
        let listen = |source| Error::Listen { address: config.listen, source };
        let address = listener.local_addr().map_err(listen)?;
        let scheme = if tls.is_some() { "https" } else { "http" };
        let issuer = config.public_url.clone().unwrap_or_else(|| format!("{scheme}://{address}"));

        let backups = match config.backups.clone() {
            Some(own) => {
                let opened = Backups::open(own, &config.data_dir, store.clone(), clock.clone());
                Some(opened.map_err(unusable)?)
            }
            None => None,
        };
        let oidc = Oidc::new(&config.oidc, &issuer).map_err(Error::Config)?;
        let fenced = store.fenced_hosts().map_err(|error| database(error.into()))?;
        let gate = gate::Gate::new(issuer.clone(), store.clone(), clock.clone());
        // Hosts and proxies sign in at once; others have no business here.
        let limits = BrokerConfig { connect_limit: SIGN_IN_LIMIT, ..BrokerConfig::default() };
        let broker = Broker::start(limits, Arc::new(gate));
        let bus = broker.local_bus(gate::master());
        let shared = Arc::new(Shared {
            streams: Streams::new(stream, config.grace_ms, bus.clone(), store.clone()),
            peers: Arc::new(Peers::new(clock.boot(), fenced)),
            operations: Operations::new(),
            receipts: Receipts::default(),
            broker: broker.clone(),
            limits: Limits::new(config.trusted_proxies.clone()),
            limits_max: config.limits_max.clone(),
            audit,
            accounts,
            oidc,
            images: images::Images::default(),
            backups,
            secrets,
            untold: std::sync::Mutex::default(),
            turns: turns::Turns::default(),
            settings: config.settings(),
            ending: Ending::default(),
            store,
            issuer,
            clock,
            signing,
            ssh_ca,
            bus,
        });

        let closing = CancellationToken::new();
        let open = shared.db(|store| store.open_receipts()).await.map_err(|error| database(error.into()))?;
        shared.receipts.resume(open, stream, &shared.peers);
        let mut tasks = JoinSet::new();
        tasks.spawn(receipts::tend(shared.clone()));
        tasks.spawn(bus::serve::serve(shared.clone()));
        tasks.spawn(bus::announce::tend_keys(shared.clone()));
        tasks.spawn(backups::keep_tending(shared.clone()));
        shared.resume().await.map_err(|error| database(error.into()))?;
        let router = server::router(api::router(shared.clone()), broker.clone(), closing.clone());
        if let Some(certificate) = certificate {
            tasks.spawn(async move { certificate.keep().await });
        }
        let server = tokio::spawn(server::serve(
            listener,
            tls.clone(),
            router,
            config.connections_per_address_max,
            closing.clone(),
        ));
        tracing::info!(%address, issuer = shared.issuer, "the master listens");
        Ok(Self { shared, address, closing, drain: config.drain, tls, server, tasks, broker, _lock: lock })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The certificate of its listener, if it has one: it can be told to look at
    /// the files at once.
    pub fn tls(&self) -> Option<Tls> {
        self.tls.clone()
    }

    /// Its URL: the issuer of its tokens.
    pub fn url(&self) -> &str {
        &self.shared.issuer
    }

    /// How many hosts, proxies and others are connected to the bus.
    pub fn connections(&self) -> usize {
        self.broker.connections()
    }

    /// Runs until `shutdown` resolves, then [stops](Self::stop).
    pub async fn run_until(self, shutdown: impl Future<Output = ()>) {
        shutdown.await;
        self.stop().await;
    }

    /// Says so at `/readyz`, takes no more connections, lets requests end for as
    /// long as `[drain]` says, and leaves operations to the next process. Hosts
    /// go on by themselves.
    pub async fn stop(mut self) {
        let ending = self.shared.ending.clone();
        let (shared, closing, server) = (&self.shared, &self.closing, &mut self.server);
        let served = async {
            ending.stopped().await;
            closing.cancel();
            shared.operations.stop().await;
            let _ = server.await;
        };
        ending.run(self.drain, served).await;
        self.tasks.shutdown().await;
        let audit = self.shared.audit.clone();
        if !matches!(tokio::task::spawn_blocking(move || audit.flush()).await, Ok(true)) {
            tracing::error!("the end of the audit log may not be on disk");
        }
    }
}

impl Drop for Master {
    fn drop(&mut self) {
        self.closing.cancel();
        self.server.abort();
        self.shared.operations.abandon();
    }
}
