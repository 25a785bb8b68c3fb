//! One user's connection: authentication, and the channels it has.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    hash::{Hash as _, Hasher as _},
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use cocalc_core::{
    auth::{Credential, Secret},
    ids::{Ports, ProjectAlias, ProjectId, Restrictions},
    runner::{Command, ExecRequest, Pty, WindowSize},
};
use russh::{
    ChannelId, ChannelOpenFailure, ChannelWriteHalf, MethodKind, MethodSet, Sig,
    keys::{Algorithm, Certificate},
    server::{Auth, ChannelOpenHandle, Handler, Msg, PublicKeyOffer, Response, Session, VerifiedPublicKey},
};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinSet,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use crate::{
    Attempt, Gate, Login, Names, Passage, Refusal, Witness,
    brief::Briefs,
    channel::{self, Ends, Outward, Target, Wishes, signal_name},
    drive::Control,
    environment,
    host_keys::key_text,
    ingress::network,
    input::{Budget, CONNECTION_BYTES_MAX, Credit, Holder, InputSender, input},
    line::Grip,
    project_of_user,
    reverse::{Arrival, Arrivals, Kind, Listener, Reverse},
    witness::Meter,
};

/// The longest credential that is looked at; connect tokens are shorter.
const CREDENTIAL_BYTES_MAX: usize = 4096;
/// The longest certificate, as text.
const CERTIFICATE_BYTES_MAX: usize = 8 * 1024;
/// The longest command line.
const COMMAND_BYTES_MAX: usize = 64 * 1024;
/// The library keeps a few kilobytes of every channel that the server closed
/// for as long as the connection lives. A client that has used so many opens
/// another connection.
const CHANNELS_EVER_MAX: usize = 10_000;
/// What one connection may have listen inside the project.
const LISTENERS_MAX: usize = 32;
/// How long a client waits until something listens: nothing else happens in
/// its connection meanwhile.
const LISTEN_MAX: std::time::Duration = std::time::Duration::from_secs(60);
/// The longest path of a socket: what the kernel takes.
const SOCKET_BYTES_MAX: usize = 107;
/// How long it may take to find what a name means.
const NAME_MAX: std::time::Duration = std::time::Duration::from_secs(5);
/// How long a gate may think.
const LOGIN_MAX: std::time::Duration = std::time::Duration::from_secs(60);

/// What all connections of a server share.
#[derive(Clone)]
pub(crate) struct Surroundings {
    pub(crate) gate: Arc<dyn Gate>,
    pub(crate) channels_max: usize,
    pub(crate) budget: Arc<Budget>,
    pub(crate) passage: Option<Arc<dyn Passage>>,
    pub(crate) witness: Option<Arc<dyn Witness>>,
    pub(crate) names: Option<Arc<dyn Names>>,
}

/// Somebody who has logged in.
pub(crate) struct Admitted {
    pub(crate) login: Arc<Login>,
    pub(crate) meter: Option<Arc<Meter>>,
}

/// Who wants a way on, and no project.
const JUMP: &str = "jump";
/// The smallest RSA key, in bits.
const RSA_BITS_MIN: u32 = 2048;

/// The protocol library's handler of one connection. It never waits for a
/// process or a port: whatever can wait is done in a task per channel.
pub(crate) struct Connection {
    gate: Arc<dyn Gate>,
    source: Option<IpAddr>,
    grip: Grip,
    /// Ends everything of this connection.
    over: CancellationToken,
    channels_max: usize,
    budget: Arc<Budget>,
    /// Where `jump` leads.
    passage: Option<Arc<dyn Passage>>,
    witness: Option<Arc<dyn Witness>>,
    names: Option<Arc<dyn Names>>,
    meter: Option<Arc<Meter>>,
    /// Whether a credential was refused.
    refused: Arc<AtomicBool>,
    briefs: Briefs,
    refusal: Option<Refusal>,
    login: Option<Arc<Login>>,
    announce: Option<oneshot::Sender<Admitted>>,
    channels: HashMap<ChannelId, State>,
    channels_ever: usize,
    tasks: JoinSet<ChannelId>,
    credit: Credit,
    granted: Option<u32>,
    arrivals: Arc<Arrivals>,
    /// By the address or path and the port that the client named.
    listeners: BTreeMap<(String, u32), Listener>,
}

enum State {
    /// Opened, and told about its session to be.
    Waiting {
        write: ChannelWriteHalf<Msg>,
        env: BTreeMap<String, String>,
        pty: Option<Pty>,
        agent: bool,
        x11: Option<Kind>,
    },
    /// Something runs in it.
    Running {
        input: Option<InputSender>,
        controls: mpsc::Sender<Control>,
        ends: Ends,
        pty: bool,
        /// Whether a process runs in it, which ends with it.
        process: bool,
    },
}

/// The project that a name means: an id in one of its forms, or another name.
async fn named(names: Option<&Arc<dyn Names>>, name: &str) -> Option<ProjectId> {
    if let Some(project) = project_of_user(name) {
        return Some(project);
    }
    let (names, alias) = (names?, name.parse::<ProjectAlias>().ok()?);
    timeout(NAME_MAX, names.project(&alias)).await.ok().flatten()
}

/// An id that no project has, always the same for one name.
fn nobodys(name: &str) -> ProjectId {
    let hash = |salt: u8| {
        let mut hasher = std::hash::DefaultHasher::new();
        (salt, name).hash(&mut hasher);
        hasher.finish().to_be_bytes()
    };
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&hash(0));
    bytes[8..].copy_from_slice(&hash(1));
    ProjectId::from_random_bytes(bytes)
}

impl Connection {
    /// A handler that sends the login to the returned receiver.
    pub(crate) fn new(
        surroundings: Surroundings,
        source: Option<IpAddr>,
        grip: Grip,
        over: CancellationToken,
        refused: Arc<AtomicBool>,
        briefs: Briefs,
    ) -> (Self, oneshot::Receiver<Admitted>) {
        let Surroundings { gate, channels_max, budget, passage, witness, names } = surroundings;
        let (announce, announced) = oneshot::channel();
        let connection = Self {
            gate,
            source,
            grip,
            over,
            channels_max,
            budget,
            passage,
            witness,
            names,
            meter: None,
            refused,
            briefs,
            refusal: None,
            login: None,
            announce: Some(announce),
            channels: HashMap::new(),
            channels_ever: 0,
            tasks: JoinSet::new(),
            credit: Credit::default(),
            granted: None,
            arrivals: Arc::default(),
            listeners: BTreeMap::new(),
        };
        (connection, announced)
    }

    /// Decides on this one attempt: its user name and its credential together.
    async fn attempt(&mut self, user: &str, credential: Credential) -> Auth {
        // A name that means nothing is asked for like one that does: it costs as
        // much, and is refused in the same words.
        let project = self.project(user).await.unwrap_or_else(|| nobodys(user));
        let refusal = match self.ask_gate(project, credential).await {
            Ok(login) => {
                self.admit(login);
                return Auth::Accept;
            }
            Err(refusal) => refusal,
        };
        self.refusal = Some(refusal);
        self.refused.store(true, Ordering::Release);
        reject(&METHODS)
    }

    /// The project that a user name means.
    async fn project(&self, user: &str) -> Option<ProjectId> {
        named(self.names.as_ref(), user).await
    }

    fn admit(&mut self, login: Login) {
        let login = Arc::new(login);
        if let Login::Open(access) = &*login {
            self.meter = Some(Meter::begin(self.witness.take(), access, self.source));
        }
        self.login = Some(login.clone());
        if let Some(announce) = self.announce.take() {
            let _ = announce.send(Admitted { login, meter: self.meter.clone() });
        }
    }

    async fn ask_gate(&self, project: ProjectId, credential: Credential) -> Result<Login, Refusal> {
        let attempt = Attempt { project, credential, source: self.source };
        match timeout(LOGIN_MAX, self.gate.login(attempt)).await {
            Ok(decided) => decided,
            Err(_) => {
                tracing::warn!(%project, "an SSH login was not decided in time");
                Err(Refusal::access_denied())
            }
        }
    }

    async fn attempt_token(&mut self, user: &str, token: &str) -> Auth {
        let token = token.trim();
        if token.len() > CREDENTIAL_BYTES_MAX {
            self.refusal = Some(Refusal::access_denied());
            return reject(&METHODS);
        }
        self.attempt(user, Credential::Token(Secret::new(token))).await
    }

    /// Whether whoever logged in may have a terminal. News of a move need none.
    fn permits_pty(&self) -> bool {
        match self.login.as_deref() {
            Some(Login::Open(access)) => access.restrictions.pty,
            _ => true,
        }
    }

    /// Whether whoever logged in may have something that needs `permitted`.
    fn permits(&self, permitted: impl FnOnce(&Restrictions) -> bool) -> bool {
        match self.login.as_deref() {
            Some(Login::Open(access)) => permitted(&access.restrictions),
            _ => false,
        }
    }

    fn reverse(&self, session: &Session) -> Option<Reverse> {
        Some(Reverse {
            login: self.login.clone()?,
            handle: session.handle(),
            arrivals: self.arrivals.clone(),
            over: self.over.clone(),
            meter: self.meter.clone(),
        })
    }

    /// Listens inside the project for as long as the connection lasts, and
    /// returns where. The client waits for the answer before it goes on.
    async fn listen(&mut self, kind: Kind, session: &mut Session) -> Result<String, String> {
        if self.listeners.len() >= LISTENERS_MAX {
            return Err(format!("one connection may listen on {LISTENERS_MAX} places"));
        }
        let reverse = self.reverse(session).ok_or("nobody has logged in")?;
        let name = match &kind {
            Kind::Tcp { address, .. } => address.clone(),
            Kind::Unix(path) => path.clone(),
            _ => return Err("not for the whole connection".into()),
        };
        let listening = reverse.listen(kind.clone());
        let listener =
            timeout(LISTEN_MAX, listening).await.map_err(|_| "the project does not answer".to_owned())??;
        let place = listener.place.clone();
        let port = if matches!(kind, Kind::Tcp { .. }) { place.parse().unwrap_or(0) } else { 0 };
        self.listeners.insert((name, port), listener);
        Ok(place)
    }

    /// Starts what a channel to `target` needs.
    fn connect(
        &mut self,
        channel: russh::Channel<Msg>,
        target: Target,
        login: Arc<Login>,
        reply: ChannelOpenHandle,
        session: &Session,
    ) {
        let id = channel.id();
        let (_, write) = channel.split();
        let ends = Ends::default();
        let (sender, receiver) = input(&self.budget, self.holder(&login), &ends.overflow, self.grip.wake());
        let (controls, _) = mpsc::channel(1);
        let outward = Outward { write, handle: session.handle(), meter: self.meter.clone() };
        let run = channel::forward(outward, reply, login, target, receiver, ends.clone());
        let state = State::Running { input: Some(sender), controls, ends, pty: false, process: false };
        self.channels.insert(id, state);
        self.spawn(id, run);
    }

    /// Forgets channels whose tasks have ended.
    fn reap(&mut self) {
        for id in self.arrivals.ended() {
            self.channels.remove(&id);
        }
        while let Some(ended) = self.tasks.try_join_next() {
            match ended {
                Ok(id) => drop(self.channels.remove(&id)),
                Err(error) if error.is_panic() => tracing::error!(%error, "a channel's task panicked"),
                Err(_) => {}
            }
        }
    }

    /// Whether one more channel may be opened.
    fn has_room(&mut self) -> bool {
        self.reap();
        if self.channels.len() >= self.channels_max || self.channels_ever >= CHANNELS_EVER_MAX {
            return false;
        }
        self.channels_ever += 1;
        true
    }

    /// Starts what a session was opened for; `false` if it cannot be.
    fn start(&mut self, id: ChannelId, command: Command, session: &Session) -> bool {
        let Some(login) = self.login.clone() else { return false };
        let Some(reverse) = self.reverse(session) else { return false };
        let (write, env, pty, agent, x11) = match self.channels.remove(&id) {
            Some(State::Waiting { write, env, pty, agent, x11 }) => (write, env, pty, agent, x11),
            Some(running) => {
                self.channels.insert(id, running);
                return false;
            }
            None => return false,
        };
        // The subsystem is a protocol: a terminal would mangle it.
        let pty = if command == Command::Sftp { None } else { pty };
        let request = ExecRequest { command, env, pty, user: None };
        let has_pty = request.pty.is_some();
        let ends = Ends::default();
        let (sender, receiver) = input(&self.budget, self.holder(&login), &ends.overflow, self.grip.wake());
        let (controls, steered) = mpsc::channel(16);
        let outward = Outward { write, handle: session.handle(), meter: self.meter.clone() };
        let agent = agent.then_some(("SSH_AUTH_SOCK", Kind::Agent, "your agent"));
        let x11 = x11.map(|kind| ("DISPLAY", kind, "your X display"));
        let wishes = Wishes { reverse, kinds: agent.into_iter().chain(x11).collect() };
        let run = channel::session(outward, login, request, wishes, receiver, steered, ends.overflow.clone());
        let brief = (!has_pty).then(|| self.briefs.enter());
        let run = async move {
            run.await;
            drop(brief);
        };
        let state = State::Running { input: Some(sender), controls, ends, pty: has_pty, process: true };
        self.channels.insert(id, state);
        self.spawn(id, run);
        true
    }

    fn spawn(&mut self, id: ChannelId, run: impl Future<Output = ()> + Send + 'static) {
        let over = self.over.clone();
        self.tasks.spawn(async move {
            // A revoked user's processes end at once, without a word.
            let _ = over.run_until_cancelled_owned(run).await;
            id
        });
    }

    fn control(&self, id: ChannelId, control: Control) -> bool {
        // A full queue belongs to a runner that hangs; the user's next resize
        // or signal may get through.
        matches!(self.channels.get(&id), Some(State::Running { controls, .. }) if controls.try_send(control).is_ok())
    }

    /// With whose queues those of this connection count.
    fn holder(&self, login: &Login) -> Holder {
        match login {
            Login::Passage(_) => Holder::Passage(self.source.map(network)),
            Login::Open(access) => Holder::Project(access.project),
            Login::Moved(moved) => Holder::Project(moved.project),
        }
    }

    fn queued(&self, id: u32) -> usize {
        self.channels.iter().find(|(key, _)| key.number() == id).map_or(0, |(_, state)| state.queued())
    }

    /// Takes what a client sent on a channel.
    fn receive(&mut self, id: ChannelId, data: &[u8], left: u32) {
        let granted = self.granted.take();
        let Some(State::Running { input: Some(input), .. }) = self.channels.get(&id) else {
            return;
        };
        let fits = input.push(data);
        if let Some(meter) = &self.meter {
            meter.inward(data.len());
        }
        let queued = input.queued();
        self.credit.note(id.number(), queued);
        self.credit.came(id.number(), left, Instant::now());
        if !fits {
            self.give_up(id);
        } else if self.channels.values().map(State::queued).sum::<usize>() > CONNECTION_BYTES_MAX
            && let Some(least) = self.reads_least()
        {
            self.give_up(least);
        }
        if let Some(rest) = granted.and_then(|granted| self.credit.rest(id.number(), granted)) {
            self.grip.rest(rest);
        }
    }

    /// The channel that can be given up before all others.
    fn reads_least(&self) -> Option<ChannelId> {
        let now = Instant::now();
        let channels = self.channels.iter().filter_map(|(id, state)| match state {
            State::Running { input: Some(input), .. } => Some((input.order(now)?, *id)),
            _ => None,
        });
        channels.min_by_key(|(order, _)| *order).map(|(_, id)| id)
    }

    /// Closes a channel that does not read its input.
    fn give_up(&mut self, id: ChannelId) {
        if let Some(State::Running { input, ends, .. }) = self.channels.get_mut(&id) {
            let queued = input.as_ref().map_or(0, InputSender::queued);
            tracing::info!(
                channel = id.number(),
                queued,
                "a channel that does not read its input was closed"
            );
            ends.overflow.cancel();
            *input = None;
        }
        self.credit.forget(id.number());
    }
}

impl State {
    fn queued(&self) -> usize {
        match self {
            Self::Running { input: Some(input), .. } => input.queued(),
            _ => 0,
        }
    }
}

/// What may be tried, in the order in which clients try it.
pub(crate) const METHODS: [MethodKind; 3] =
    [MethodKind::PublicKey, MethodKind::KeyboardInteractive, MethodKind::Password];

fn reject(methods: &[MethodKind]) -> Auth {
    Auth::Reject { proceed_with_methods: Some(MethodSet::from(methods)), partial_success: false }
}

/// A size that a terminal can have; clients without one say 0.
fn window_size(cols: u32, rows: u32) -> WindowSize {
    let clamp = |value: u32, default| match u16::try_from(value) {
        Ok(0) => default,
        Ok(value) => value,
        Err(_) => u16::MAX,
    };
    WindowSize { cols: clamp(cols, 80), rows: clamp(rows, 24) }
}

/// The modes that the library knows; in the place of others it has an end.
fn known(modes: &[(russh::Pty, u32)]) -> Vec<(u8, u32)> {
    let modes = modes.iter().filter(|(code, _)| *code != russh::Pty::TTY_OP_END);
    modes.map(|(code, value)| (*code as u8, *value)).take(Pty::MODES_MAX).collect()
}

/// The longest name of a host.
const HOST_BYTES_MAX: usize = 255;

/// Whether a name can be one of a host.
fn is_host(host: &str) -> bool {
    (1..=HOST_BYTES_MAX).contains(&host.len())
        && host.bytes().all(|b| b.is_ascii_alphanumeric() || b".-_:%".contains(&b))
}

/// Whether a path can be one of a socket.
fn is_socket(path: &str) -> bool {
    path.len() <= SOCKET_BYTES_MAX && path.starts_with('/') && !path.contains(['\0', '\n'])
}

/// Whether a name means the project itself.
fn is_loopback(host: &str) -> bool {
    host.eq_ignore_ascii_case("localhost")
        || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

impl Handler for Connection {
    type Error = russh::Error;

    async fn auth_none(&mut self, user: &str) -> Result<Auth, Self::Error> {
        match self.passage.take() {
            Some(passage) if user == JUMP => {
                self.admit(Login::Passage(passage));
                Ok(Auth::Accept)
            }
            passage => {
                self.passage = passage;
                Ok(reject(&METHODS))
            }
        }
    }

    async fn auth_publickey_offered(
        &mut self,
        _user: &str,
        offer: PublicKeyOffer<'_>,
    ) -> Result<Auth, Self::Error> {
        // No decision on a key that is only claimed, and nothing is kept of
        // it; only SHA-1 is refused right away.
        if matches!(offer.algorithm, Algorithm::Rsa { hash: None }) {
            return Ok(reject(&METHODS));
        }
        Ok(Auth::Accept)
    }

    async fn auth_publickey(&mut self, user: &str, key: VerifiedPublicKey<'_>) -> Result<Auth, Self::Error> {
        let sha1 = matches!(key.algorithm, Algorithm::Rsa { hash: None });
        if key.public_key.key_data().rsa().is_some_and(|key| key.key_size() < RSA_BITS_MIN) {
            self.refusal = Some(Refusal {
                code: "access_denied".into(),
                message: format!("RSA keys of less than {RSA_BITS_MIN} bits are not accepted."),
                elsewhere: None,
            });
            return Ok(reject(&METHODS));
        }
        match key_text(key.public_key) {
            Some(text) if !sha1 && text.len() <= CREDENTIAL_BYTES_MAX => {
                Ok(self.attempt(user, Credential::SshKey(text)).await)
            }
            _ => Ok(reject(&METHODS)),
        }
    }

    async fn auth_openssh_certificate(
        &mut self,
        user: &str,
        certificate: &Certificate,
    ) -> Result<Auth, Self::Error> {
        // The library has checked that the key in it is held, and that the
        // certificate's signature fits the key that it names itself.
        match certificate.to_openssh() {
            Ok(text) if text.len() <= CERTIFICATE_BYTES_MAX => {
                let text = text.trim_end().to_owned();
                Ok(self.attempt(user, Credential::SshCertificate(text)).await)
            }
            _ => Ok(reject(&METHODS)),
        }
    }

    async fn auth_password(&mut self, user: &str, password: &str) -> Result<Auth, Self::Error> {
        Ok(self.attempt_token(user, password).await)
    }

    async fn auth_keyboard_interactive<'a>(
        &'a mut self,
        user: &str,
        _submethods: &str,
        response: Option<Response<'a>>,
    ) -> Result<Auth, Self::Error> {
        let answer = response.map(|mut answers| {
            answers.next().and_then(|bytes| String::from_utf8(bytes.to_vec()).ok()).unwrap_or_default()
        });
        match answer {
            // The only place where the protocol lets a server say why.
            None => {
                let reason = self.refusal.take().map_or_else(String::new, |refusal| refusal.message);
                Ok(Auth::Partial {
                    name: Cow::Borrowed(""),
                    instructions: Cow::Owned(reason),
                    prompts: Cow::Borrowed(&[(Cow::Borrowed("Connect token (empty to give up): "), false)]),
                })
            }
            Some(token) if token.trim().is_empty() => Ok(reject(&[MethodKind::PublicKey])),
            Some(token) => Ok(self.attempt_token(user, &token).await),
        }
    }

    async fn channel_open_session(
        &mut self,
        channel: russh::Channel<Msg>,
        reply: ChannelOpenHandle,
        _session: &mut Session,
    ) -> Result<(), Self::Error> {
        if self.login.is_none() || !self.has_room() {
            reply.reject(ChannelOpenFailure::ResourceShortage).await;
            return Ok(());
        }
        let id = channel.id();
        // Without the read half the library passes data to `data` below, and
        // never waits for a reader.
        let (_, write) = channel.split();
        let state = State::Waiting { write, env: BTreeMap::new(), pty: None, agent: false, x11: None };
        self.channels.insert(id, state);
        reply.accept().await;
        Ok(())
    }

    async fn channel_open_direct_tcpip(
        &mut self,
        channel: russh::Channel<Msg>,
        host_to_connect: &str,
        port_to_connect: u32,
        _originator_address: &str,
        _originator_port: u32,
        reply: ChannelOpenHandle,
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        let port = u16::try_from(port_to_connect).ok().filter(|port| *port != 0);
        let (Some(login), Some(port)) = (self.login.clone(), port) else {
            reply.reject(ChannelOpenFailure::AdministrativelyProhibited).await;
            return Ok(());
        };
        let target = if let Login::Passage(_) = &*login {
            // A name that no project has, but one could, leads to somebody who
            // refuses it, like one that means something: nobody has proved
            // anything here.
            let name = host_to_connect;
            let project = match self.project(name).await {
                None if name.parse::<ProjectAlias>().is_ok() => Some(nobodys(name)),
                project => project,
            };
            let Some(project) = project else {
                reply.reject(ChannelOpenFailure::AdministrativelyProhibited).await;
                return Ok(());
            };
            Target::Project(project, self.source)
        } else if is_loopback(host_to_connect) {
            Target::Port(port)
        } else if is_host(host_to_connect) && self.permits(|permits| permits.ports == Ports::All) {
            Target::Beyond { host: host_to_connect.to_owned(), port }
        } else {
            reply.reject(ChannelOpenFailure::AdministrativelyProhibited).await;
            return Ok(());
        };
        if self.has_room() {
            self.connect(channel, target, login, reply, session);
        } else {
            reply.reject(ChannelOpenFailure::ResourceShortage).await;
        }
        Ok(())
    }

    async fn channel_open_direct_streamlocal(
        &mut self,
        channel: russh::Channel<Msg>,
        socket_path: &str,
        reply: ChannelOpenHandle,
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        let permitted = is_socket(socket_path) && self.permits(|permits| permits.ports == Ports::All);
        let (Some(login), true) = (self.login.clone(), permitted) else {
            reply.reject(ChannelOpenFailure::AdministrativelyProhibited).await;
            return Ok(());
        };
        if self.has_room() {
            self.connect(channel, Target::Socket(socket_path.to_owned()), login, reply, session);
        } else {
            reply.reject(ChannelOpenFailure::ResourceShortage).await;
        }
        Ok(())
    }

    async fn channel_open_confirmation(
        &mut self,
        id: ChannelId,
        _max_packet_size: u32,
        _window_size: u32,
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        let Some(login) = self.login.clone().filter(|_| self.has_room()) else { return session.close(id) };
        let ends = Ends::default();
        let (sender, input) = input(&self.budget, self.holder(&login), &ends.overflow, self.grip.wake());
        let (controls, _) = mpsc::channel(1);
        let state =
            State::Running { input: Some(sender), controls, ends: ends.clone(), pty: false, process: false };
        self.channels.insert(id, state);
        self.arrivals.put(id, Arrival { input, ends });
        Ok(())
    }

    async fn tcpip_forward(
        &mut self,
        address: &str,
        port: &mut u32,
        session: &mut Session,
    ) -> Result<bool, Self::Error> {
        let wanted = u16::try_from(*port).unwrap_or(0);
        let permitted = self.permits(|permits| match wanted {
            0 => permits.listen == Ports::All,
            port => permits.listen.contain(port),
        });
        if !permitted || address.len() > HOST_BYTES_MAX || u32::from(wanted) != *port {
            refuse(session, "this key or certificate does not permit to listen on that port")?;
            return Ok(false);
        }
        let kind = Kind::Tcp { address: address.to_owned(), port: *port };
        match self.listen(kind, session).await {
            Ok(place) => {
                *port = place.parse().unwrap_or(*port);
                Ok(true)
            }
            Err(reason) => {
                refuse(session, &format!("cannot listen on port {port} of the project: {reason}"))?;
                Ok(false)
            }
        }
    }

    async fn cancel_tcpip_forward(
        &mut self,
        address: &str,
        port: u32,
        _session: &mut Session,
    ) -> Result<bool, Self::Error> {
        Ok(self.listeners.remove(&(address.to_owned(), port)).is_some())
    }

    async fn streamlocal_forward(
        &mut self,
        socket_path: &str,
        session: &mut Session,
    ) -> Result<bool, Self::Error> {
        if !is_socket(socket_path) || !self.permits(|permits| permits.listen == Ports::All) {
            refuse(session, "this key or certificate does not permit to listen on a socket")?;
            return Ok(false);
        }
        match self.listen(Kind::Unix(socket_path.to_owned()), session).await {
            Ok(_) => Ok(true),
            Err(reason) => {
                refuse(session, &format!("cannot listen at {socket_path} in the project: {reason}"))?;
                Ok(false)
            }
        }
    }

    async fn cancel_streamlocal_forward(
        &mut self,
        socket_path: &str,
        _session: &mut Session,
    ) -> Result<bool, Self::Error> {
        Ok(self.listeners.remove(&(socket_path.to_owned(), 0)).is_some())
    }

    async fn channel_close(&mut self, channel: ChannelId, _session: &mut Session) -> Result<(), Self::Error> {
        match self.channels.remove(&channel) {
            // Its task ends, and with it the process.
            Some(State::Running { ends, process: true, .. }) => ends.overflow.cancel(),
            // What was sent before still arrives.
            Some(State::Running { ends, .. }) => ends.closed.cancel(),
            _ => {}
        }
        self.credit.forget(channel.number());
        self.arrivals.forget(channel);
        self.reap();
        Ok(())
    }

    async fn channel_eof(&mut self, channel: ChannelId, _session: &mut Session) -> Result<(), Self::Error> {
        if let Some(State::Running { input, .. }) = self.channels.get_mut(&channel) {
            *input = None;
        }
        Ok(())
    }

    async fn data(
        &mut self,
        channel: ChannelId,
        data: &[u8],
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        self.receive(channel, data, session.window_size(&channel));
        Ok(())
    }

    fn adjust_window(&mut self, channel: ChannelId, current: u32) -> u32 {
        for stalled in self.credit.stalled() {
            let queued = self.queued(stalled);
            self.credit.note(stalled, queued);
        }
        self.granted = Some(current);
        self.credit.next(channel.number(), current, Instant::now())
    }

    async fn pty_request(
        &mut self,
        channel: ChannelId,
        term: &str,
        col_width: u32,
        row_height: u32,
        _pix_width: u32,
        _pix_height: u32,
        modes: &[(russh::Pty, u32)],
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        if !self.permits_pty() {
            return session.channel_failure(channel);
        }
        let named = term.len() <= 64 && term.bytes().all(|b| b.is_ascii_graphic());
        match self.channels.get_mut(&channel) {
            Some(State::Waiting { pty, .. }) if named => {
                let term = if term.is_empty() { "dumb" } else { term };
                let size = window_size(col_width, row_height);
                *pty = Some(Pty { modes: known(modes), ..Pty::new(term, size) });
                session.channel_success(channel)
            }
            _ => session.channel_failure(channel),
        }
    }

    async fn env_request(
        &mut self,
        channel: ChannelId,
        variable_name: &str,
        variable_value: &str,
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        let taken = match self.channels.get_mut(&channel) {
            Some(State::Waiting { env, .. }) => environment::set(env, variable_name, variable_value),
            _ => false,
        };
        reply(taken, channel, session)
    }

    async fn shell_request(&mut self, channel: ChannelId, session: &mut Session) -> Result<(), Self::Error> {
        let started = self.start(channel, Command::Shell, session);
        reply(started, channel, session)
    }

    async fn exec_request(
        &mut self,
        channel: ChannelId,
        data: &[u8],
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        let started = match std::str::from_utf8(data) {
            Ok(line) if line.len() <= COMMAND_BYTES_MAX && !line.contains('\0') => {
                self.start(channel, Command::Line(line.to_owned()), session)
            }
            _ => false,
        };
        reply(started, channel, session)
    }

    async fn subsystem_request(
        &mut self,
        channel: ChannelId,
        name: &str,
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        let started = name == "sftp" && self.start(channel, Command::Sftp, session);
        reply(started, channel, session)
    }

    async fn window_change_request(
        &mut self,
        channel: ChannelId,
        col_width: u32,
        row_height: u32,
        _pix_width: u32,
        _pix_height: u32,
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        let size = window_size(col_width, row_height);
        let has_pty = match self.channels.get_mut(&channel) {
            Some(State::Waiting { pty: Some(pty), .. }) => {
                pty.size = size;
                true
            }
            Some(State::Running { pty: true, .. }) => self.control(channel, Control::Resize(size)),
            _ => false,
        };
        reply(has_pty, channel, session)
    }

    async fn signal(
        &mut self,
        channel: ChannelId,
        signal: Sig,
        _session: &mut Session,
    ) -> Result<(), Self::Error> {
        if let Some(name) = signal_name(&signal) {
            self.control(channel, Control::Signal(name.to_owned()));
        }
        Ok(())
    }

    async fn x11_request(
        &mut self,
        channel: ChannelId,
        _single_connection: bool,
        x11_auth_protocol: &str,
        x11_auth_cookie: &str,
        x11_screen_number: u32,
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        let word = |text: &str| {
            (1..=256).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        };
        let permitted =
            word(x11_auth_protocol) && word(x11_auth_cookie) && self.permits(|permits| permits.x11);
        let taken = match self.channels.get_mut(&channel) {
            Some(State::Waiting { x11, .. }) if permitted => {
                *x11 = Some(Kind::X11 {
                    protocol: x11_auth_protocol.to_owned(),
                    cookie: x11_auth_cookie.to_owned(),
                    screen: x11_screen_number,
                });
                true
            }
            _ => false,
        };
        reply(taken, channel, session)
    }

    async fn agent_request(
        &mut self,
        channel: ChannelId,
        _session: &mut Session,
    ) -> Result<bool, Self::Error> {
        let permitted = self.permits(|permits| permits.agent);
        match self.channels.get_mut(&channel) {
            Some(State::Waiting { agent, .. }) if permitted => {
                *agent = true;
                Ok(true)
            }
            _ => Ok(false),
        }
    }
}

/// Tells the client why, in the only way that the protocol has for this.
fn refuse(session: &mut Session, why: &str) -> Result<(), russh::Error> {
    session.debug(true, &format!("cocalc: {why}"), "")
}

fn reply(done: bool, channel: ChannelId, session: &mut Session) -> Result<(), russh::Error> {
    if done { session.channel_success(channel) } else { session.channel_failure(channel) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_project_itself_is_dialed() {
        for inside in ["localhost", "LOCALHOST", "127.0.0.1", "127.1.2.3", "::1"] {
            assert!(is_loopback(inside), "{inside}");
        }
        for outside in ["", "0.0.0.0", "10.0.0.1", "169.254.169.254", "localhost.example.com", "::", "127.1"]
        {
            assert!(!is_loopback(outside), "{outside}");
        }
    }

    #[test]
    fn modes_are_passed_on_by_their_numbers() {
        use russh::Pty as Code;
        let sent =
            [(Code::VINTR, 7), (Code::TTY_OP_END, 0), (Code::ECHO, 0), (Code::TTY_OP_OSPEED, u32::MAX)];
        assert_eq!(known(&sent), [(1, 7), (53, 0), (129, u32::MAX)]);
        assert_eq!(known(&[(Code::ECHO, 1); 500]).len(), Pty::MODES_MAX);
    }

    #[test]
    fn a_terminal_has_a_possible_size() {
        assert_eq!(window_size(0, 0), WindowSize { cols: 80, rows: 24 });
        assert_eq!(window_size(132, 50), WindowSize { cols: 132, rows: 50 });
        assert_eq!(window_size(u32::MAX, 1), WindowSize { cols: u16::MAX, rows: 1 });
    }
}
