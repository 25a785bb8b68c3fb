//! A host and a proxy on real sockets, with an auth that reads claims and
//! apps that do whatever their path says.

use std::{
    any::Any,
    collections::{BTreeSet, HashMap, HashSet},
    ffi::OsStr,
    net::{IpAddr, SocketAddr},
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use cocalc_core::{
    activity::Meters,
    auth::{Admission, Auth, Context, Credential, Decision, Denial, Principal, Secret, Tier, Via},
    clock::Timestamp,
    connector::{self, Connector, Service},
    ids::{AccountId, Action, Epoch, HostId, ProjectId, Scope, SnapshotName},
    router::{self, HostAddress, Reach, Route, Router},
    runner::{self, Capabilities, ExecRequest, Process, ProjectSpec, Runner, State, Stats, Status},
    storage,
    stream::BoxStream,
    wake::{Awake, Wake},
};
use cocalc_http::{
    Body, BusEndpoint, Client, Copying, Endpoints, Former, FormerState, HostIngress, Limits, Opening,
    ProjectFiles, ProxyIngress, Served, Tls, TokenHost, TokenPrecheck,
};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{broadcast, watch},
    time::timeout,
};
use tokio_util::task::AbortOnDropHandle;

pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// Believes tokens that are signed `good`.
#[derive(Debug)]
pub(crate) struct FakeAuth {
    sessions: Mutex<HashMap<String, Principal>>,
    used: Mutex<HashSet<String>>,
    revoked: watch::Sender<Option<Denial>>,
    /// Nobody may change files.
    pub(crate) viewers: AtomicBool,
    pub(crate) tier: Mutex<Tier>,
    /// The host that every token is for, as the proxy's check says.
    pub(crate) only_host: Mutex<Option<TokenHost>>,
}

pub(crate) fn token(project: ProjectId, claims: serde_json::Value) -> String {
    let mut all = json!({ "prj": project.to_string(), "aud": "project-host:x", "jti": AccountId::random() });
    for (name, value) in claims.as_object().unwrap() {
        all[name] = value.clone();
    }
    format!(
        "{}.{}.good",
        URL_SAFE_NO_PAD.encode(r#"{"alg":"EdDSA","typ":"cocalc-connect+jwt","kid":"k"}"#),
        URL_SAFE_NO_PAD.encode(all.to_string())
    )
}

fn check(token: &str, project: ProjectId) -> Result<Principal, Denial> {
    let bad = |why: &str| Denial::BadCredential(why.to_owned());
    let mut parts = token.split('.');
    let (_, claims, signature) = (parts.next(), parts.next(), parts.next());
    if signature != Some("good") {
        return Err(bad("signature"));
    }
    let claims = URL_SAFE_NO_PAD.decode(claims.unwrap()).map_err(|_| bad("claims"))?;
    let claims: serde_json::Value = serde_json::from_slice(&claims).map_err(|_| bad("claims"))?;
    if claims["prj"] != project.to_string() {
        return Err(bad("project"));
    }
    if claims["expired"] == true {
        return Err(Denial::TokenExpired);
    }
    Ok(Principal {
        account: AccountId::random(),
        project,
        scopes: BTreeSet::from(Scope::ALL),
        epoch: None,
        session_epoch: None,
        acl: 0,
        via: Via::Token { jti: claims["jti"].to_string(), once: claims["once"] == true },
        embed_origin: claims["emb"].as_str().map(str::to_owned),
        expires: None,
        restrictions: Default::default(),
        source: None,
    })
}

impl FakeAuth {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            sessions: Mutex::default(),
            used: Mutex::default(),
            revoked: watch::Sender::new(None),
            viewers: AtomicBool::new(false),
            tier: Mutex::new(Tier::Fresh),
            only_host: Mutex::default(),
        })
    }

    pub(crate) fn revoke(&self) {
        self.revoked.send_replace(Some(Denial::Forbidden("removed".to_owned())));
    }

    /// The right is there again, for who comes from now on.
    pub(crate) fn restore(&self) {
        self.revoked.send_replace(None);
    }

    pub(crate) fn admitted(&self) -> usize {
        self.revoked.receiver_count()
    }
}

#[async_trait]
impl Auth for FakeAuth {
    async fn verify(&self, credential: &Credential, context: &Context) -> Result<Principal, Denial> {
        match credential {
            Credential::Token(token) => check(token.expose(), context.project),
            Credential::Session(value) => {
                let sessions = self.sessions.lock().unwrap();
                let session = sessions.get(value.expose()).filter(|s| s.project == context.project);
                session.cloned().ok_or_else(|| Denial::BadCredential("session".to_owned()))
            }
            _ => Err(Denial::BadCredential("kind".to_owned())),
        }
    }

    async fn authorize(&self, _: &Principal, _: ProjectId, action: Action) -> Decision {
        let mut outcome = self.revoked.borrow().clone().map_or(Ok(()), Err);
        if matches!(action, Action::Write | Action::Use(Scope::Ws)) && self.viewers.load(Ordering::Relaxed) {
            outcome = Err(Denial::Forbidden("a viewer".to_owned()));
        }
        Decision { outcome, staleness: Duration::ZERO, tier: *self.tier.lock().unwrap() }
    }

    async fn admit(&self, _: &Principal, _: ProjectId, _: Action) -> Result<Admission, Denial> {
        if let Some(denial) = &*self.revoked.borrow() {
            return Err(denial.clone());
        }
        Ok(Admission::new(self.revoked.subscribe(), ()))
    }

    async fn open_session(&self, principal: &Principal, _: ProjectId) -> Result<Secret, Denial> {
        if let Via::Token { jti, once: true } = &principal.via
            && !self.used.lock().unwrap().insert(jti.clone())
        {
            return Err(Denial::Used);
        }
        let value = format!("session-{}", AccountId::random());
        let mut session = principal.clone();
        session.via = Via::Session { hash: "h".to_owned(), login: String::new() };
        self.sessions.lock().unwrap().insert(value.clone(), session);
        Ok(Secret::new(value))
    }

    async fn close_session(&self, session: &Secret) -> Result<(), Denial> {
        self.sessions.lock().unwrap().remove(session.expose());
        Ok(())
    }
}

impl TokenPrecheck for FakeAuth {
    fn verify(&self, token: &Secret, project: ProjectId) -> Result<Option<TokenHost>, Denial> {
        check(token.expose(), project)?;
        Ok(*self.only_host.lock().unwrap())
    }
}

/// Knows what it was told.
#[derive(Debug)]
pub(crate) struct Table {
    routes: Mutex<HashMap<ProjectId, Route>>,
    changes: broadcast::Sender<Route>,
}

impl Table {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self { routes: Mutex::default(), changes: broadcast::Sender::new(16) })
    }

    pub(crate) fn set(&self, project: ProjectId, host: HostId, epoch: u64, how: Reach) {
        let route = Route { project, host, epoch: Epoch::new(epoch).unwrap(), how };
        self.routes.lock().unwrap().insert(project, route.clone());
        let _ = self.changes.send(route);
    }

    pub(crate) fn waiting(&self) -> usize {
        // The ingress itself listens, too.
        self.changes.receiver_count().saturating_sub(1)
    }
}

#[async_trait]
impl Router for Table {
    async fn route(&self, project: ProjectId) -> Result<Route, router::Error> {
        let route = self.routes.lock().unwrap().get(&project).cloned();
        route.ok_or(router::Error::NotFound { project })
    }

    fn changes(&self) -> broadcast::Receiver<Route> {
        self.changes.subscribe()
    }
}

/// Connects to the ports of this machine.
#[derive(Debug, Default)]
pub(crate) struct Ports {
    pub(crate) running: Mutex<bool>,
    /// What runs processes, for the tests that have some.
    pub(crate) shells: Mutex<Option<Arc<dyn Runner>>>,
}

#[async_trait]
impl Runner for Ports {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            backend: "ports".to_owned(),
            isolation: false,
            limits: false,
            weaknesses: vec![],
            unenforced: vec![],
        }
    }

    async fn prepare(&self, _: &ProjectSpec) -> runner::Result<()> {
        Ok(())
    }

    async fn start(&self, spec: &ProjectSpec) -> runner::Result<Status> {
        self.status(spec.project).await
    }

    async fn stop(&self, project: ProjectId, _: Duration) -> runner::Result<Status> {
        self.status(project).await
    }

    async fn remove(&self, _: ProjectId) -> runner::Result<()> {
        Ok(())
    }

    async fn status(&self, project: ProjectId) -> runner::Result<Status> {
        let state = if *self.running.lock().unwrap() { State::Running } else { State::Stopped };
        Ok(Status { project, epoch: None, state, started: None, reason: None })
    }

    async fn list(&self) -> runner::Result<Vec<Status>> {
        Ok(vec![])
    }

    async fn exec(&self, project: ProjectId, request: ExecRequest) -> runner::Result<Process> {
        let shells = self.shells.lock().unwrap().clone();
        match shells {
            Some(shells) => shells.exec(project, request).await,
            None => Err(runner::Error::NotRunning { project }),
        }
    }

    async fn dial(&self, project: ProjectId, port: u16) -> runner::Result<BoxStream> {
        if !*self.running.lock().unwrap() {
            return Err(runner::Error::NotRunning { project });
        }
        match TcpStream::connect(("127.0.0.1", port)).await {
            Ok(stream) => {
                // As the real runners do.
                let _ = stream.set_nodelay(true);
                Ok(Box::pin(stream))
            }
            Err(_) => Err(runner::Error::Refused { project, port }),
        }
    }

    async fn stats(&self, _: ProjectId) -> runner::Result<Stats> {
        Ok(Stats::default())
    }

    async fn set_limits(&self, project: ProjectId, _: &runner::Limits) -> runner::Result<runner::Applied> {
        Err(runner::Error::NotRunning { project })
    }

    async fn logs(&self, _: ProjectId, _: usize) -> runner::Result<String> {
        Ok("startup: <b>no such file</b>\n".to_owned())
    }
}

/// Starts the project at the second call.
#[derive(Debug)]
pub(crate) struct SlowWake {
    pub(crate) ports: Arc<Ports>,
    pub(crate) calls: Mutex<u32>,
}

#[async_trait]
impl Wake for SlowWake {
    async fn wake(&self, _: ProjectId) -> Awake {
        let mut calls = self.calls.lock().unwrap();
        *calls += 1;
        if *calls == 1 {
            return Awake::Starting { phase: "mounting <home>".to_owned() };
        }
        *self.ports.running.lock().unwrap() = true;
        Awake::Running
    }
}

/// Streams to hosts inside this process.
#[derive(Debug, Default)]
pub(crate) struct Pipes(pub(crate) Mutex<HashMap<HostId, HostIngress>>);

#[async_trait]
impl Connector for Pipes {
    async fn open(
        &self,
        host: HostId,
        service: Service,
        _: Option<IpAddr>,
        _: Duration,
    ) -> Result<BoxStream, connector::Error> {
        assert_eq!(service, Service::Http);
        let ingress = self.0.lock().unwrap().get(&host).cloned().ok_or(connector::Error::Unknown { host })?;
        let (near, far) = tokio::io::duplex(64 * 1024);
        tokio::spawn(async move { ingress.serve_connection(far, None, true).await });
        Ok(Box::pin(near))
    }
}

/// A bus that sends every byte back.
#[derive(Debug)]
struct Parrot;

#[async_trait]
impl BusEndpoint for Parrot {
    async fn serve(&self, mut stream: BoxStream, opening: Opening) {
        assert!(!format!("{:?}", opening.headers).contains("Bearer"), "{:?}", opening.headers);
        let mut buffer = [0; 1024];
        while let Ok(read @ 1..) = stream.read(&mut buffer).await {
            stream.write_all(&buffer[..read]).await.unwrap();
            stream.flush().await.unwrap();
        }
    }
}

#[derive(Debug)]
struct Health;

#[async_trait]
impl Endpoints for Health {
    async fn answer(
        &self,
        path: &str,
        _: http::Request<Body>,
        client: Client,
    ) -> Option<http::Response<Body>> {
        assert!(client.address.is_some());
        (path == "/healthz").then(|| http::Response::new(Body::from("alive")))
    }
}

/// The files of the only project.
#[derive(Debug)]
pub(crate) struct Home {
    pub(crate) dir: tempfile::TempDir,
    /// Whether they may be changed.
    pub(crate) thawed: AtomicBool,
    pub(crate) turn: Arc<tokio::sync::Mutex<()>>,
    /// Former states, each a directory of this name.
    pub(crate) states: tempfile::TempDir,
    /// How many are held now.
    pub(crate) held: Arc<()>,
}

#[async_trait]
impl ProjectFiles for Home {
    async fn root(&self, _: ProjectId) -> std::io::Result<Option<OwnedFd>> {
        Ok(Some(std::fs::File::open(self.dir.path())?.into()))
    }

    async fn turn(&self, _: ProjectId) -> Option<Box<dyn Any + Send>> {
        let turn = self.turn.clone().lock_owned().await;
        self.thawed.load(Ordering::Relaxed).then(|| Box::new(turn) as _)
    }

    async fn states(&self, _: ProjectId) -> std::io::Result<Vec<FormerState>> {
        let names = std::fs::read_dir(self.states.path())?.map(|entry| entry.unwrap().file_name());
        let mut names: Vec<_> = names.map(|name| name.into_string().unwrap()).collect();
        names.sort();
        let state = |name: String| FormerState {
            automatic: name.starts_with("auto"),
            name: name.parse().unwrap(),
            taken: Timestamp::from_secs(1_700_000_000),
        };
        Ok(names.into_iter().map(state).collect())
    }

    async fn state(&self, _: ProjectId, name: &SnapshotName) -> std::io::Result<Option<Former>> {
        match std::fs::File::open(self.states.path().join(name.as_str())) {
            Ok(root) => Ok(Some(Former { root: root.into(), held: Box::new(self.held.clone()) })),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn copy(&self, _: ProjectId, what: Copying) -> Result<(), storage::Error> {
        assert!(self.turn.try_lock().is_err(), "not in the project's turn");
        let place = |path: &[u8]| PathBuf::from(OsStr::from_bytes(path));
        let from = match &what.from {
            Some(name) => self.states.path().join(name.as_str()),
            None => self.dir.path().to_owned(),
        };
        let to = self.dir.path().join(place(&what.to));
        if what.replace {
            // As storage does with a snapshot.
            copy_all(self.dir.path(), &self.states.path().join("before"));
            let _ = std::fs::remove_dir_all(&to);
        }
        copy_all(&from.join(place(&what.path)), &to);
        Ok(())
    }
}

fn copy_all(from: &std::path::Path, to: &std::path::Path) {
    let done = std::process::Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap();
    assert!(done.success(), "cp -a {from:?} {to:?}");
}

/// One host, one proxy, one project with an app and a WebSocket app.
pub(crate) struct World {
    pub(crate) project: ProjectId,
    pub(crate) host: HostId,
    pub(crate) host_address: SocketAddr,
    pub(crate) proxy_address: SocketAddr,
    pub(crate) auth: Arc<FakeAuth>,
    pub(crate) table: Arc<Table>,
    pub(crate) proxy_table: Arc<Table>,
    pub(crate) ports: Arc<Ports>,
    pub(crate) wake: Arc<SlowWake>,
    pub(crate) pipes: Arc<Pipes>,
    pub(crate) ingress: HostIngress,
    pub(crate) home: Arc<Home>,
    pub(crate) meters: Meters,
    pub(crate) app: App,
    pub(crate) echo: u16,
    stop: tokio_util::sync::CancellationToken,
    tasks: Vec<AbortOnDropHandle<()>>,
}

pub(crate) fn quick() -> Limits {
    Limits {
        head_timeout: Duration::from_millis(1500),
        response_timeout: Duration::from_millis(1500),
        body_idle: Duration::from_millis(1500),
        parked_wait: Duration::from_secs(5),
        parked: 2,
        drain: Duration::from_millis(500),
        ..Limits::default()
    }
}

impl World {
    pub(crate) async fn new() -> Self {
        Self::with(quick()).await
    }

    pub(crate) async fn with(limits: Limits) -> Self {
        Self::over(limits, None).await
    }

    /// Over HTTPS, where there is a certificate.
    pub(crate) async fn over(limits: Limits, tls: Option<Tls>) -> Self {
        let (project, host) = (ProjectId::random(), HostId::random());
        let (auth, table, proxy_table) = (FakeAuth::new(), Table::new(), Table::new());
        let ports = Arc::new(Ports { running: Mutex::new(true), shells: Mutex::default() });
        let wake = Arc::new(SlowWake { ports: ports.clone(), calls: Mutex::new(0) });
        table.set(project, host, 1, Reach::Local);
        proxy_table.set(project, host, 1, Reach::Remote(HostAddress::default()));
        let (host_listener, host_address) = listen().await;
        let (proxy_listener, proxy_address) = listen().await;
        let domain = |name: &str, address: SocketAddr| format!("{name}.localhost:{}", address.port());
        let home = Arc::new(Home {
            dir: tempfile::tempdir().unwrap(),
            thawed: AtomicBool::new(true),
            turn: Arc::default(),
            states: tempfile::tempdir().unwrap(),
            held: Arc::default(),
        });
        let meters = Meters::new(Arc::new(cocalc_core::clock::SystemClock));
        let ingress = HostIngress::builder(host, auth.clone(), table.clone(), ports.clone())
            .served(Served::new().domain(&domain("alpha", host_address)).unwrap())
            .wake(wake.clone())
            .bus(Arc::new(Parrot))
            .files(home.clone())
            .terminals(cocalc_http::TerminalLimits::default())
            .meters(meters.clone())
            .endpoints(Arc::new(Health))
            .tls(tls.clone())
            .limits(limits.clone())
            .build();
        let pipes = Arc::new(Pipes::default());
        pipes.0.lock().unwrap().insert(host, ingress.clone());
        let proxy = ProxyIngress::builder(proxy_table.clone(), pipes.clone(), auth.clone())
            .served(
                Served::new()
                    .domain(&domain("proxy", proxy_address))
                    .unwrap()
                    .base_path("/some/base")
                    .unwrap(),
            )
            .tls(tls)
            .limits(limits)
            .build();
        let stop = tokio_util::sync::CancellationToken::new();
        let (serving, stopped) = (ingress.clone(), stop.clone());
        let app = App::start().await;
        let (echo, echo_task) = echo_app().await;
        let tasks = vec![
            own(async move { serving.serve(host_listener, stopped.cancelled_owned()).await }),
            own(async move { proxy.serve(proxy_listener, std::future::pending()).await }),
            echo_task,
        ];
        Self {
            project,
            host,
            host_address,
            proxy_address,
            auth,
            table,
            proxy_table,
            ports,
            wake,
            pipes,
            ingress,
            home,
            meters,
            app,
            echo,
            stop,
            tasks,
        }
    }

    /// Both ways in: the address, and what precedes `/<project_id>`.
    pub(crate) fn ways(&self) -> [(SocketAddr, &'static str, &'static str); 2] {
        [(self.host_address, "", "alpha"), (self.proxy_address, "/some/base", "proxy")]
    }

    pub(crate) fn token(&self) -> String {
        token(self.project, json!({}))
    }

    /// The path of the app that does not see its prefix.
    pub(crate) fn mount(&self) -> String {
        format!("/{}/proxy/{}", self.project, self.app.port)
    }

    /// Stops the host's listener and waits until it has drained.
    pub(crate) async fn shut_down(&mut self) {
        self.stop.cancel();
        timeout(DEADLINE, self.tasks.remove(0)).await.unwrap().unwrap();
    }
}

pub(crate) async fn listen() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

pub(crate) fn own(task: impl Future<Output = ()> + Send + 'static) -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::spawn(task))
}

/// An app on a raw socket.
pub(crate) struct App {
    pub(crate) port: u16,
    /// The heads of all requests.
    pub(crate) seen: Arc<Mutex<Vec<String>>>,
    pub(crate) connections: Arc<AtomicUsize>,
    /// How many of them have ended.
    pub(crate) ended: Arc<AtomicUsize>,
    _task: AbortOnDropHandle<()>,
}

impl App {
    async fn start() -> Self {
        let (listener, address) = listen().await;
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = seen.clone();
        let accepted = Arc::new(AtomicUsize::new(0));
        let count = accepted.clone();
        let ended = Arc::new(AtomicUsize::new(0));
        let over = ended.clone();
        let task = own(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (log, over) = (log.clone(), over.clone());
                count.fetch_add(1, Ordering::Relaxed);
                connections.spawn(async move {
                    let _ = answer(stream, &log).await;
                    over.fetch_add(1, Ordering::Relaxed);
                });
            }
        });
        Self { port: address.port(), seen, connections: accepted, ended, _task: task }
    }

    pub(crate) fn has_seen(&self, what: &str) -> bool {
        self.seen.lock().unwrap().iter().any(|head| head.contains(what))
    }
}

/// An app that does with each connection, counted from 0, what `handle` says.
pub(crate) async fn scripted<F>(
    handle: impl Fn(TcpStream, usize) -> F + Send + 'static,
) -> (u16, AbortOnDropHandle<()>)
where
    F: Future<Output = std::io::Result<()>> + Send + 'static,
{
    let (listener, address) = listen().await;
    let task = own(async move {
        let mut connections = tokio::task::JoinSet::new();
        let mut index = 0;
        while let Ok((stream, _)) = listener.accept().await {
            connections.spawn(handle(stream, index));
            index += 1;
        }
    });
    (address.port(), task)
}

/// What comes until it ends with `end`.
pub(crate) async fn until(
    stream: &mut (impl tokio::io::AsyncRead + Unpin),
    end: &str,
) -> std::io::Result<String> {
    let mut bytes = Vec::new();
    while !bytes.ends_with(end.as_bytes()) {
        bytes.push(stream.read_u8().await?);
    }
    Ok(text(bytes))
}

/// The same from outside, where it is certain to come.
pub(crate) async fn heard(stream: &mut TcpStream, end: &str) -> String {
    match timeout(DEADLINE, until(stream, end)).await {
        Ok(heard) => heard.unwrap(),
        Err(_) => panic!("{end:?} never came"),
    }
}

async fn head(stream: &mut TcpStream) -> std::io::Result<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}

async fn answer(mut stream: TcpStream, log: &Mutex<Vec<String>>) -> std::io::Result<()> {
    loop {
        let head = head(&mut stream).await?;
        log.lock().unwrap().push(head.clone());
        let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
        let mut say = async |text: &str| stream.write_all(text.as_bytes()).await;
        match path.split('?').next().unwrap_or_default() {
            "/sse" => {
                say("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
                    .await?;
                loop {
                    say("9\r\ndata: 1\n\n\r\n").await?;
                    tokio::time::sleep(Duration::from_millis(30)).await;
                }
            }
            "/big" => {
                say("HTTP/1.1 200 OK\r\nContent-Length: 8388608\r\n\r\n").await?;
                for _ in 0..128 {
                    stream.write_all(&[b'x'; 65536]).await?;
                }
            }
            "/upload" => {
                let read = body(&mut stream, &head).await?;
                let text = read.to_string();
                let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{text}", text.len());
                stream.write_all(answer.as_bytes()).await?;
            }
            "/silent" => std::future::pending().await,
            "/once" => {
                // Says nothing of it, and closes the connection afterwards.
                say("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nonce").await?;
                return Ok(());
            }
            "/closes" => return Ok(()),
            "/cut" => return say("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n0123456789").await,
            "/garbage" => return say("SSH-2.0-garbage\r\n\r\n\r\n").await,
            "/hugehead" => {
                let huge = "x".repeat(1024 * 1024);
                say(&format!("HTTP/1.1 200 OK\r\nX-Huge: {huge}\r\nContent-Length: 0\r\n\r\n")).await?;
            }
            "/split" => {
                return say(
                    "HTTP/1.1 200 OK\r\nX-A: b\rSet-Cookie: cocalc-session-x=y\r\nContent-Length: 0\r\n\r\n",
                )
                .await;
            }
            "/both" => {
                say("HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n")
                    .await?;
            }
            "/fake101" => {
                say("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\nraw")
                    .await?;
            }
            "/moved" => {
                say("HTTP/1.1 421 No\r\ncocalc-code: project_moved\r\ncocalc-host: x\r\nContent-Length: 0\r\n\r\n")
                    .await?;
            }
            "/cookies" => {
                say("HTTP/1.1 200 OK\r\nSet-Cookie: a=b; Domain=localhost; Path=/\r\n\
                     Set-Cookie: __Host-cocalc-session-x=y; Secure; Path=/\r\nConnection: X-Hop\r\nX-Hop: 1\r\n\
                     Content-Type: text/html\r\nContent-Length: 0\r\n\r\n")
                .await?;
            }
            "/early" => {
                // Answers without reading the body.
                return say("HTTP/1.1 413 Too Large\r\nContent-Length: 5\r\nConnection: close\r\n\r\nearly")
                    .await;
            }
            _ => {
                body(&mut stream, &head).await?;
                let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{head}", head.len());
                stream.write_all(answer.as_bytes()).await?;
            }
        }
    }
}

/// Reads a body, and returns how many bytes it had.
async fn body(stream: &mut TcpStream, head: &str) -> std::io::Result<usize> {
    let head = head.to_ascii_lowercase();
    if let Some((_, rest)) = head.split_once("content-length: ") {
        let length: usize = rest.split("\r\n").next().unwrap().trim().parse().unwrap();
        let mut left = length;
        let mut buffer = vec![0; 65536];
        while left > 0 {
            let wanted = left.min(buffer.len());
            left -= stream.read_exact(&mut buffer[..wanted]).await?;
        }
        return Ok(length);
    }
    if !head.contains("transfer-encoding: chunked") {
        return Ok(0);
    }
    let mut total = 0;
    loop {
        let mut line = Vec::new();
        while !line.ends_with(b"\r\n") {
            line.push(stream.read_u8().await?);
        }
        let size = usize::from_str_radix(String::from_utf8_lossy(&line).trim(), 16).unwrap();
        let mut chunk = vec![0; size + 2];
        stream.read_exact(&mut chunk).await?;
        total += size;
        if size == 0 {
            return Ok(total);
        }
    }
}

/// A WebSocket app that sends everything back.
async fn echo_app() -> (u16, AbortOnDropHandle<()>) {
    use futures_util::{SinkExt, StreamExt};

    let (listener, address) = listen().await;
    let task = own(async move {
        let mut connections = tokio::task::JoinSet::new();
        while let Ok((stream, _)) = listener.accept().await {
            connections.spawn(async move {
                let Ok(mut socket) = tokio_tungstenite::accept_async(stream).await else { return };
                while let Some(Ok(message)) = socket.next().await {
                    if message.is_close() || socket.send(message).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    (address.port(), task)
}

/// What came back over a raw connection until it was closed.
pub(crate) async fn raw(address: SocketAddr, request: impl AsRef<[u8]>) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).await.unwrap();
    // The far side may close before it has read everything.
    let _ = stream.write_all(request.as_ref()).await;
    let mut answer = Vec::new();
    let mut buffer = vec![0; 65536];
    loop {
        match timeout(DEADLINE, stream.read(&mut buffer)).await.expect("the connection was not closed") {
            Ok(0) | Err(_) => return answer,
            Ok(read) => answer.extend_from_slice(&buffer[..read]),
        }
    }
}

pub(crate) fn text(bytes: Vec<u8>) -> String {
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The status and code of each response in a connection's bytes.
pub(crate) fn outcomes(answer: &[u8]) -> Vec<(u16, String)> {
    let answer = String::from_utf8_lossy(answer).replace("HTTP/1.0 ", "HTTP/1.1 ");
    answer
        .split("HTTP/1.1 ")
        .skip(1)
        .map(|response| {
            let head = response.split("\r\n\r\n").next().unwrap_or_default();
            let code = head.lines().find_map(|line| line.strip_prefix("cocalc-code: "));
            (head[..3].parse().unwrap(), code.unwrap_or_default().to_owned())
        })
        .collect()
}

/// Runs curl and returns what it printed.
pub(crate) async fn curl(arguments: &[&str]) -> String {
    let run = tokio::process::Command::new("curl")
        .args(["--silent", "--show-error", "--max-time", "10", "--noproxy", "*"])
        .args(arguments)
        .kill_on_drop(true)
        .output();
    let output = timeout(DEADLINE * 2, run).await.unwrap().expect("curl is needed");
    assert!(output.status.success(), "curl {arguments:?}: {output:?}");
    text(output.stdout)
}

/// Waits until `condition` holds.
pub(crate) async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let until = tokio::time::Instant::now() + DEADLINE;
    while !condition() {
        assert!(tokio::time::Instant::now() < until, "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
