//! The SSH server: accepting, limiting, and ending connections.

use std::{
    collections::HashMap,
    fmt,
    net::IpAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use cocalc_core::{auth::Denial, stream::BoxStream};
use russh::{
    Disconnect, MethodSet, SshId,
    keys::Certificate,
    server::{Config, run_stream},
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    Gate, HostCertificateError, HostKeys, Login, Names, Passage, Witness,
    algorithms::preferred,
    brief::Briefs,
    connection::{Admitted, Connection, METHODS, Surroundings},
    input::{Budget, WINDOW_BYTES},
    line::{Grip, Line},
    penalties::{Offence, Penalties},
};

/// How long every refused login takes, so that its time tells nothing.
const REFUSAL_TIME: Duration = Duration::from_millis(500);
/// How many connections of barred addresses are held, to slow them down; more
/// are closed at once.
const TARPIT_MAX: usize = 256;
/// How long.
const TARPIT_TIME: Duration = Duration::from_secs(10);
/// What is said when a project, or at a proxy its host, is there no more.
const LEFT: &str = "the project or its host has gone from here: connect again";
/// How long a client may take to hear that it is over.
const FAREWELL_MAX: Duration = Duration::from_secs(1);

/// Serves SSH to users: shells, commands, sftp and port forwarding in the
/// project that their user name says, for whom a [`Gate`] lets in.
#[derive(Clone)]
pub struct SshIngress {
    inner: Arc<Inner>,
}

struct Inner {
    surroundings: Surroundings,
    /// Of connections that begin now; the certificates change.
    config: Mutex<Arc<Config>>,
    keys: HostKeys,
    keepalive: Duration,
    limits: Limits,
    counts: Mutex<Counts>,
    penalties: Mutex<Penalties>,
    tarpit: Semaphore,
}

#[derive(Clone, Debug)]
struct Limits {
    login_grace: Duration,
    connections_max: usize,
    connections_per_address_max: usize,
    logins_max: usize,
    /// `None`: a quarter of `logins_max`.
    logins_per_address_max: Option<usize>,
    channels_max: usize,
    input_bytes_max: usize,
    drain: Duration,
}

/// How a server ends: it is leaving, and then it is over.
#[derive(Clone, Debug, Default)]
struct End {
    leaving: CancellationToken,
    over: CancellationToken,
}

/// Connections now; and of these, those that have not logged in.
#[derive(Debug, Default)]
struct Counts {
    connections: usize,
    logins: usize,
    addresses: HashMap<IpAddr, Share>,
}

/// What one address has of them.
#[derive(Clone, Copy, Debug, Default)]
struct Share {
    connections: usize,
    logins: usize,
}

impl fmt::Debug for SshIngress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SshIngress").field("gate", &self.inner.surroundings.gate).finish_non_exhaustive()
    }
}

/// Configures an [`SshIngress`].
#[derive(Debug)]
pub struct SshIngressBuilder {
    gate: Arc<dyn Gate>,
    keys: HostKeys,
    limits: Limits,
    keepalive: Duration,
    passage: Option<Arc<dyn Passage>>,
    witness: Option<Arc<dyn Witness>>,
    names: Option<Arc<dyn Names>>,
}

impl SshIngress {
    /// Begins an ingress that lets in whom `gate` lets in, and that proves
    /// itself with `keys`.
    pub fn builder(gate: Arc<dyn Gate>, keys: HostKeys) -> SshIngressBuilder {
        SshIngressBuilder {
            gate,
            keys,
            limits: Limits {
                login_grace: Duration::from_secs(60),
                connections_max: 10_000,
                connections_per_address_max: 256,
                logins_max: 200,
                logins_per_address_max: None,
                channels_max: 128,
                input_bytes_max: 256 * 1024 * 1024,
                drain: Duration::ZERO,
            },
            keepalive: Duration::from_secs(30),
            passage: None,
            witness: None,
            names: None,
        }
    }

    /// Offers these host certificates (OpenSSH text) to connections that begin
    /// from now on, instead of those of before. Clients that know their
    /// authority then need not know the host's key; to others nothing changes.
    ///
    /// # Errors
    ///
    /// One of them cannot be read, or is not of this server's key. Nothing is
    /// changed then.
    pub fn offer_certificates(&self, certificates: &[String]) -> Result<(), HostCertificateError> {
        let certificates =
            certificates.iter().map(|text| self.inner.keys.certificate(text)).collect::<Result<_, _>>()?;
        let config = config(&self.inner.keys, self.inner.keepalive, certificates);
        *self.inner.config.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(config);
        Ok(())
    }

    /// Accepts connections from `listener` until `shutdown` resolves, then
    /// ends those that are open, after [`drain`](SshIngressBuilder::drain) at the
    /// latest, and returns when they are gone.
    ///
    /// It goes on when accepting fails, for instance because no file
    /// descriptor is left.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes every connection.
    pub async fn serve(&self, listener: TcpListener, shutdown: impl Future<Output = ()> + Send) {
        let mut connections = JoinSet::new();
        let end = End::default();
        let _guard = end.over.clone().drop_guard();
        tokio::pin!(shutdown);
        loop {
            let accepted = tokio::select! {
                () = &mut shutdown => break,
                Some(_) = connections.join_next() => continue,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, peer)) => {
                    if self.inner.bars(Some(peer.ip())) {
                        let (inner, end) = (self.inner.clone(), end.clone());
                        connections.spawn(async move { inner.hold(Box::pin(stream), &end.leaving).await });
                        continue;
                    }
                    let Some(place) = Place::take(&self.inner, Some(peer.ip())) else {
                        tracing::debug!(%peer, "an SSH connection too many");
                        continue;
                    };
                    prepare(&stream);
                    let run = self.inner.clone().connection(Box::pin(stream), place, end.clone());
                    connections.spawn(run);
                }
                Err(error) => {
                    tracing::warn!(%error, "an SSH connection was not accepted");
                    // Out of descriptors or memory: what is open may end.
                    tokio::select! {
                        () = &mut shutdown => break,
                        () = sleep(Duration::from_millis(100)) => {}
                    }
                }
            }
        }
        drop(listener);
        end.leaving.cancel();
        let ended = async { while connections.join_next().await.is_some() {} };
        if timeout(self.inner.limits.drain, ended).await.is_ok() {
            return;
        }
        end.over.cancel();
        while connections.join_next().await.is_some() {}
    }

    /// Serves one connection that arrived some other way, for instance
    /// through a tunnel, until it ends. `source` is the user's own address; an
    /// address that many users share would limit them together, `None` does
    /// not.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes the connection.
    pub async fn serve_stream(&self, stream: BoxStream, source: Option<IpAddr>) {
        if self.inner.bars(source) {
            self.inner.hold(stream, &CancellationToken::new()).await;
        } else if let Some(place) = Place::take(&self.inner, source) {
            self.inner.clone().connection(stream, place, End::default()).await;
        }
    }
}

impl SshIngressBuilder {
    /// Ends connections that have not logged in after this long. Default: one
    /// minute.
    pub fn login_grace(mut self, limit: Duration) -> Self {
        self.limits.login_grace = limit;
        self
    }

    /// Refuses more connections than this. Default: 10,000.
    pub fn connections_max(mut self, limit: usize) -> Self {
        self.limits.connections_max = limit;
        self
    }

    /// Refuses more connections than this from one address (IPv6: one /64
    /// network). Default: 256.
    pub fn connections_per_address_max(mut self, limit: usize) -> Self {
        self.limits.connections_per_address_max = limit;
        self
    }

    /// How many connections may be logging in at a time. From a third of it
    /// on, new ones are refused at random, ever more of them (as OpenSSH's
    /// `MaxStartups` does), so that nobody can keep all others out for sure.
    /// Default: 200.
    pub fn logins_max(mut self, limit: usize) -> Self {
        self.limits.logins_max = limit;
        self
    }

    /// Refuses a connection when this many of its address (IPv6: one /64
    /// network) are logging in, so that idle ones from one place leave room
    /// for everybody else. Raise it where many users come from one address.
    /// Default: a quarter of [`logins_max`](Self::logins_max), at least one:
    /// below the third from which chance begins to refuse others.
    pub fn logins_per_address_max(mut self, limit: usize) -> Self {
        self.limits.logins_per_address_max = Some(limit);
        self
    }

    /// Refuses more channels than this at a time in one connection. Default:
    /// 128.
    pub fn channels_max(mut self, limit: usize) -> Self {
        self.limits.channels_max = limit;
        self
    }

    /// What all connections together keep, in bytes, of what their users have
    /// sent and their processes have not read yet. When it is used up, the project
    /// that keeps most gives up the channel whose process reads least, and above
    /// three quarters of it one that has not read for three seconds. What is being
    /// written to channels that are being closed does not count. Default: 256 MiB.
    pub fn input_bytes_max(mut self, limit: usize) -> Self {
        self.limits.input_bytes_max = limit;
        self
    }

    /// Lets connections go on for so long after the shutdown in which somebody
    /// logs in or a command without a terminal runs, which end by themselves;
    /// others end after a second. Default: not at all.
    pub fn drain(mut self, limit: Duration) -> Self {
        self.limits.drain = limit;
        self
    }

    /// Asks a silent client after this long whether it is alive; after four
    /// without an answer its connection ends. Default: 30 seconds.
    pub fn keepalive(mut self, interval: Duration) -> Self {
        self.keepalive = interval;
        self
    }

    /// Lets whoever logs in as `jump`, which needs no proof, on to the SSH
    /// servers of projects' hosts (`ssh -J jump@here ID@ID`) through `passage`.
    /// Default: nobody.
    pub fn passage(mut self, passage: Arc<dyn Passage>) -> Self {
        self.passage = Some(passage);
        self
    }

    /// Tells `witness` about users who were let in. Default: nobody is told.
    pub fn witness(mut self, witness: Arc<dyn Witness>) -> Self {
        self.witness = Some(witness);
        self
    }

    /// Takes other names of projects than their ids, too. Default: ids only.
    pub fn names(mut self, names: Arc<dyn Names>) -> Self {
        self.names = Some(names);
        self
    }

    /// Makes the ingress.
    pub fn build(self) -> SshIngress {
        let config = config(&self.keys, self.keepalive, Vec::new());
        SshIngress {
            inner: Arc::new(Inner {
                surroundings: Surroundings {
                    gate: self.gate,
                    channels_max: self.limits.channels_max,
                    budget: Budget::new(self.limits.input_bytes_max),
                    passage: self.passage,
                    witness: self.witness,
                    names: self.names,
                },
                config: Mutex::new(Arc::new(config)),
                keys: self.keys,
                keepalive: self.keepalive,
                limits: self.limits,
                counts: Mutex::default(),
                penalties: Mutex::default(),
                tarpit: Semaphore::new(TARPIT_MAX),
            }),
        }
    }
}

fn config(keys: &HostKeys, keepalive: Duration, certificates: Vec<Certificate>) -> Config {
    Config {
        server_id: SshId::Standard("SSH-2.0-CoCalc".into()),
        methods: MethodSet::from(&METHODS[..]),
        auth_rejection_time: REFUSAL_TIME,
        // Every client begins with this one, which tells nothing.
        auth_rejection_time_initial: Some(Duration::ZERO),
        keys: keys.keys.clone(),
        certificates,
        window_size: WINDOW_BYTES,
        maximum_packet_size: 32 * 1024,
        // Output waits in the processes, not here: a full queue in front
        // of a slow client is what a keystroke's echo waits behind.
        event_buffer_size: 8,
        channel_buffer_size: 1,
        preferred: preferred(),
        max_auth_attempts: 10,
        inactivity_timeout: Some(Duration::from_secs(600)),
        keepalive_interval: Some(keepalive),
        keepalive_max: 3,
        nodelay: true,
        ..Config::default()
    }
}

fn prepare(stream: &TcpStream) {
    // Without it the connection works, only slower.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "cannot turn Nagle's algorithm off");
    }
}

impl Inner {
    #[tracing::instrument(name = "ssh.connection", skip_all, fields(source = ?place.source))]
    async fn connection(self: Arc<Self>, stream: BoxStream, mut place: Place, end: End) {
        let grip = Grip::default();
        let over = CancellationToken::new();
        // However this future ends, nothing of the connection is left.
        let _cut = CutOnDrop(grip.clone());
        let _over = over.clone().drop_guard();
        let briefs = Briefs::default();
        let mut conduct = Conduct::new(&self, place.source);
        let (handler, announced) = Connection::new(
            self.surroundings.clone(),
            place.source,
            grip.clone(),
            over.clone(),
            conduct.refused.clone(),
            briefs.clone(),
        );
        let line = Line::new(stream, grip.clone());
        let config = self.config.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let grace = sleep(self.limits.login_grace);
        tokio::pin!(grace);
        let started = tokio::select! {
            started = run_stream(config, line, handler) => started,
            () = &mut grace => return conduct.was(Offence::Idle),
            () = end.over.cancelled() => return conduct.excuse(),
        };
        let mut session = match started {
            Ok(session) => session,
            Err(error) => {
                tracing::debug!(%error, "an SSH connection did not begin");
                return;
            }
        };
        let handle = session.handle();
        let login = tokio::select! {
            login = announced => login.ok(),
            _ = &mut session => return,
            () = &mut grace => {
                tracing::debug!("an SSH client did not log in in time");
                conduct.was(Offence::Idle);
                None
            }
            () = end.over.cancelled() => {
                conduct.excuse();
                None
            }
        };
        let reason = match login {
            None => "goodbye".to_owned(),
            Some(Admitted { login, meter }) => {
                place.logged_in();
                // To ask for a way on proves nothing.
                match &*login {
                    Login::Passage(_) => conduct.excuse(),
                    _ => conduct.forgive(),
                }
                let telling = async {
                    match meter {
                        Some(meter) => meter.keep_telling().await,
                        None => std::future::pending().await,
                    }
                };
                let revoked = async {
                    match &*login {
                        Login::Open(access) => access.admission.revoked().await,
                        // They have nothing that could be revoked.
                        Login::Moved(_) | Login::Passage(_) => std::future::pending().await,
                    }
                };
                tokio::select! {
                    ended = &mut session => {
                        tracing::debug!(?ended, "an SSH connection ended");
                        return;
                    }
                    () = telling => return,
                    reason = revoked => {
                        tracing::info!(%reason, "an SSH connection was ended");
                        match reason {
                            Denial::NotHere(_) => LEFT.to_owned(),
                            _ => "your access has ended".to_owned(),
                        }
                    }
                    () = end.over.cancelled() => "the server is shutting down".to_owned(),
                    () = async {
                        end.leaving.cancelled().await;
                        briefs.quiet().await;
                    } => "the server is shutting down".to_owned(),
                }
            }
        };
        // First what the user runs ends, then they are told.
        over.cancel();
        let farewell = async {
            let _ = handle.disconnect(Disconnect::ByApplication, reason, String::new()).await;
            let _ = (&mut session).await;
        };
        let gone = timeout(FAREWELL_MAX, farewell).await.is_ok();
        grip.cut();
        // The cut line makes the library's task end, if it has not; a session
        // that has ended must not be awaited again.
        if !gone {
            let _ = timeout(FAREWELL_MAX, &mut session).await;
        }
    }
}

impl Inner {
    fn bars(&self, source: Option<IpAddr>) -> bool {
        let penalties = self.penalties.lock().unwrap_or_else(PoisonError::into_inner);
        source.is_some_and(|source| penalties.bars(network(source), Instant::now()))
    }

    /// Holds a connection that is not wanted, so that who makes it waits.
    async fn hold(&self, stream: BoxStream, shutdown: &CancellationToken) {
        let Ok(_place) = self.tarpit.try_acquire() else { return };
        let _ = timeout(TARPIT_TIME, shutdown.cancelled()).await;
        drop(stream);
    }
}

/// How a connection behaves until somebody has logged in. Its end is noted.
struct Conduct {
    inner: Arc<Inner>,
    /// `None` when there is nothing to note.
    address: Option<IpAddr>,
    offence: Offence,
    refused: Arc<AtomicBool>,
}

impl Conduct {
    fn new(inner: &Arc<Inner>, source: Option<IpAddr>) -> Self {
        // An administrator's own machine, or a tunnel of many users.
        let address = source.filter(|source| !source.to_canonical().is_loopback()).map(network);
        Self { inner: inner.clone(), address, offence: Offence::Left, refused: Arc::default() }
    }

    fn was(&mut self, offence: Offence) {
        self.offence = offence;
    }

    fn excuse(&mut self) {
        self.address = None;
    }

    fn forgive(&mut self) {
        if let Some(address) = self.address.take() {
            self.inner.penalties.lock().unwrap_or_else(PoisonError::into_inner).forgive(address);
        }
    }
}

impl Drop for Conduct {
    fn drop(&mut self) {
        let Some(address) = self.address else { return };
        let offence = if self.refused.load(Ordering::Acquire) { Offence::Refused } else { self.offence };
        let mut penalties = self.inner.penalties.lock().unwrap_or_else(PoisonError::into_inner);
        penalties.note(address, offence, Instant::now());
    }
}

struct CutOnDrop(Grip);

impl Drop for CutOnDrop {
    fn drop(&mut self) {
        self.0.cut();
    }
}

/// A connection in the counts.
struct Place {
    inner: Arc<Inner>,
    source: Option<IpAddr>,
    logging_in: bool,
}

impl Place {
    fn take(inner: &Arc<Inner>, source: Option<IpAddr>) -> Option<Self> {
        let limits = &inner.limits;
        let mut counts = inner.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let network = source.map(network);
        let same = network.and_then(|address| counts.addresses.get(&address)).copied().unwrap_or_default();
        let logins_of_one = limits.logins_per_address_max.unwrap_or((limits.logins_max / 4).max(1));
        if counts.connections >= limits.connections_max
            || same.connections >= limits.connections_per_address_max
            || same.logins >= logins_of_one
            || refuses(counts.logins, limits.logins_max, random_percent())
        {
            return None;
        }
        counts.connections += 1;
        counts.logins += 1;
        if let Some(address) = network {
            let share = counts.addresses.entry(address).or_default();
            share.connections += 1;
            share.logins += 1;
        }
        Some(Self { inner: inner.clone(), source, logging_in: true })
    }

    fn logged_in(&mut self) {
        if std::mem::take(&mut self.logging_in) {
            let mut counts = self.inner.counts.lock().unwrap_or_else(PoisonError::into_inner);
            counts.logins -= 1;
            if let Some(share) = self.source.and_then(|source| counts.addresses.get_mut(&network(source))) {
                share.logins -= 1;
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.logged_in();
        let mut counts = self.inner.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts.connections -= 1;
        if let Some(address) = self.source.map(network)
            && let Some(share) = counts.addresses.get_mut(&address)
        {
            share.connections -= 1;
            if share.connections == 0 {
                counts.addresses.remove(&address);
            }
        }
    }
}

/// What one party controls: an address, or an IPv6 network of a site.
pub(crate) fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6((v6.to_bits() & !u128::from(u64::MAX)).into()),
        v4 => v4,
    }
}

/// Whether one more login is refused while `logins` are under way.
fn refuses(logins: usize, max: usize, percent: usize) -> bool {
    let begin = max / 3;
    if logins < begin {
        return false;
    }
    if logins >= max {
        return true;
    }
    let share = 30 + 70 * (logins - begin) / (max - begin);
    percent < share
}

fn random_percent() -> usize {
    let mut byte = [0];
    // Without randomness it refuses like a fixed limit.
    match getrandom::fill(&mut byte) {
        Ok(()) => usize::from(byte[0]) * 100 / 256,
        Err(_) => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logins_are_refused_ever_more_often() {
        assert!(!refuses(0, 100, 0));
        assert!(!refuses(32, 100, 0));
        assert!(refuses(33, 100, 29) && !refuses(33, 100, 30));
        assert!(refuses(99, 100, 90));
        assert!(refuses(100, 100, 99));
        assert!(refuses(0, 0, 99));
    }

    #[test]
    fn a_site_counts_as_one() {
        let a = network("2001:db8::1".parse().unwrap());
        assert_eq!(a, network("2001:db8::ffff:2".parse().unwrap()));
        assert_ne!(a, network("2001:db8:0:1::1".parse().unwrap()));
        assert_eq!(network("::ffff:10.0.0.1".parse().unwrap()), network("10.0.0.1".parse().unwrap()));
    }
}
