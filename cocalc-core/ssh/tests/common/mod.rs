//! A server whose projects are shells on this machine, and the rights of two
//! invented people.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "each test binary uses a part, and fails by it"
)]

use std::{
    collections::BTreeSet,
    fmt, io,
    net::IpAddr,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{Output, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use cocalc_core::{
    auth::{Admission, Auth, Context, Credential, Decision, Denial, Principal, Secret, Tier, Via},
    connector::{self, Connector, Service},
    ids::{AccountId, Action, Epoch, HostId, KeyId, ProjectId, ProxyId, Restrictions, Scope},
    router::{self, HostAddress, Reach, Route, Router},
    runner::{Command, Error, ExecRequest, Exit, Process, ProcessHandle, WindowSize},
    stream::BoxStream,
    wake::Awake,
};
use cocalc_ssh::{HostKeys, LocalGate, RemoteGate, Sessions, SshIngress, SshIngressBuilder, SshPeers};
use rustix::{
    process::{Pid, Signal, kill_process},
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{Winsize, tcsetwinsize},
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{broadcast, watch},
};

/// The only connect token that is good.
pub const TOKEN: &str = "good-token";
/// A connect token whose time is over.
pub const EXPIRED: &str = "expired-token";

/// Knows one key and one token, for one project.
#[derive(Debug)]
pub struct Rights {
    pub project: ProjectId,
    pub key: String,
    /// More keys of the same person.
    pub more: Mutex<Vec<String>>,
    pub trusted_proxy: Option<ProxyId>,
    /// The only certificate that is good, and what it permits.
    pub certificate: Mutex<Option<(String, Restrictions)>>,
    /// Whether the host still has the project, and so knows its keys.
    pub held: AtomicBool,
    revoked: watch::Sender<Option<Denial>>,
    pub admitted: Arc<AtomicUsize>,
    /// How many credentials were looked at.
    pub asked: AtomicUsize,
}

impl Rights {
    pub fn revoke(&self) {
        self.revoked.send_replace(Some(Denial::Forbidden("removed".into())));
    }
}

impl Rights {
    fn knows(&self, key: &str) -> bool {
        key == self.key || self.more.lock().unwrap().iter().any(|known| known == key)
    }

    fn certified(&self, text: &str, proxy: Option<ProxyId>) -> Option<Via> {
        let known = self.certificate.lock().unwrap();
        known.as_ref().filter(|(known, _)| known == text)?;
        Some(Via::SshCertificate {
            serial: 1,
            key_id: "test".into(),
            authority: String::new(),
            fingerprint: String::new(),
            proxy,
        })
    }
}

struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[async_trait]
impl Auth for Rights {
    async fn verify(&self, credential: &Credential, context: &Context) -> Result<Principal, Denial> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let bad = || Denial::BadCredential("unknown".into());
        let is_key = matches!(credential, Credential::SshKey(_) | Credential::AttestedSshKey { .. });
        if is_key && !self.held.load(Ordering::SeqCst) {
            return Err(Denial::NotHere("given away".into()));
        }
        let via = match credential {
            Credential::SshKey(key) if self.knows(key) => Via::SshKey { key: KeyId::random(), proxy: None },
            Credential::AttestedSshKey { key, proxy }
                if self.knows(key) && self.trusted_proxy.map(|p| p.to_string()).as_ref() == Some(proxy) =>
            {
                Via::SshKey { key: KeyId::random(), proxy: self.trusted_proxy }
            }
            Credential::SshCertificate(text) => self.certified(text, None).ok_or_else(bad)?,
            Credential::AttestedSshCertificate { certificate, proxy }
                if self.trusted_proxy.map(|p| p.to_string()).as_ref() == Some(proxy) =>
            {
                self.certified(certificate, self.trusted_proxy).ok_or_else(bad)?
            }
            Credential::Token(token) if token.expose() == TOKEN => {
                Via::Token { jti: "1".into(), once: false }
            }
            Credential::Token(token) if token.expose() == EXPIRED => return Err(Denial::TokenExpired),
            _ => return Err(bad()),
        };
        Ok(Principal {
            account: AccountId::random(),
            project: context.project,
            scopes: BTreeSet::from([Scope::Ssh]),
            epoch: None,
            session_epoch: None,
            acl: 0,
            via,
            embed_origin: None,
            expires: None,
            restrictions: match credential {
                Credential::SshCertificate(_) | Credential::AttestedSshCertificate { .. } => {
                    self.certificate.lock().unwrap().clone().map(|(_, permits)| permits).unwrap_or_default()
                }
                _ => Restrictions::default(),
            },
            source: context.source,
        })
    }

    async fn authorize(&self, _: &Principal, project: ProjectId, _: Action) -> Decision {
        let outcome =
            if project == self.project { Ok(()) } else { Err(Denial::Forbidden("another project".into())) };
        Decision { outcome, staleness: Duration::ZERO, tier: Tier::Fresh }
    }

    async fn admit(
        &self,
        principal: &Principal,
        project: ProjectId,
        action: Action,
    ) -> Result<Admission, Denial> {
        self.authorize(principal, project, action).await.outcome?;
        self.admitted.fetch_add(1, Ordering::SeqCst);
        Ok(Admission::new(self.revoked.subscribe(), Counted(self.admitted.clone())))
    }

    async fn open_session(&self, _: &Principal, _: ProjectId) -> Result<Secret, Denial> {
        Err(Denial::Unauthenticated)
    }

    async fn close_session(&self, _: &Secret) -> Result<(), Denial> {
        Ok(())
    }
}

/// Sends everybody to one place.
#[derive(Debug)]
pub struct OneRoute {
    pub route: Mutex<Option<Route>>,
    changes: broadcast::Sender<Route>,
}

impl OneRoute {
    pub fn new(project: ProjectId, host: HostId, how: Reach) -> Arc<Self> {
        let route = Route { project, host, epoch: Epoch::FIRST, how };
        Arc::new(Self { route: Mutex::new(Some(route)), changes: broadcast::channel(4).0 })
    }
}

#[async_trait]
impl Router for OneRoute {
    async fn route(&self, project: ProjectId) -> Result<Route, router::Error> {
        match &*self.route.lock().unwrap() {
            Some(route) if route.project == project => Ok(route.clone()),
            _ => Err(router::Error::NotFound { project }),
        }
    }

    fn changes(&self) -> broadcast::Receiver<Route> {
        self.changes.subscribe()
    }
}

/// Runs shells here, in `home`.
#[derive(Debug)]
pub struct Shells {
    pub home: PathBuf,
    /// How often `wake` says that the project is still starting.
    pub starting: AtomicUsize,
    /// The helper that projects have.
    pub helper: PathBuf,
    /// Whether there is no sftp server but the helper's.
    pub bare: AtomicBool,
}

impl Shells {
    fn new(directory: &Path) -> Arc<Self> {
        let helper = directory.join("helper");
        cocalc_testkit::executable::write(&helper, cocalc_podman::HELPER);
        Arc::new(Self {
            home: directory.join("home"),
            starting: AtomicUsize::new(0),
            helper,
            bare: AtomicBool::new(false),
        })
    }

    fn tool(&self, args: Vec<String>) -> Vec<String> {
        std::iter::once(self.helper.display().to_string()).chain(args).collect()
    }
}

#[async_trait]
impl Sessions for Shells {
    async fn wake(&self, _: ProjectId) -> Awake {
        match self.starting.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)) {
            Ok(_) => Awake::Starting { phase: "mounting".into() },
            Err(_) => Awake::Running,
        }
    }

    async fn exec(&self, project: ProjectId, request: ExecRequest) -> Result<Process, Error> {
        let failed = |error: io::Error| Error::Backend {
            backend: "shells",
            operation: "exec",
            project,
            source: error.into(),
        };
        let argv: Vec<String> = match request.command {
            Command::Shell => vec!["/bin/bash".into(), "--norc".into(), "-i".into()],
            Command::Line(line) => vec!["bash".into(), "-c".into(), line],
            Command::Argv(argv) => argv,
            Command::Sftp if self.bare.load(Ordering::SeqCst) => {
                self.tool(vec!["tool".into(), "sftp".into()])
            }
            Command::Sftp => vec!["/usr/lib/openssh/sftp-server".into()],
            Command::Tool(tool) => self.tool(tool.args()),
            _ => return Err(Error::Invalid { project, reason: "unknown".into() }),
        };
        let mut command = tokio::process::Command::new("setsid");
        // With -c the program gets its standard input as controlling terminal.
        if request.pty.is_some() {
            command.arg("-c");
        }
        command
            .args(argv)
            .current_dir(&self.home)
            .env("HOME", &self.home)
            .envs(request.env)
            .kill_on_drop(true);
        let Some(pty) = request.pty else {
            let mut child = command
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .map_err(failed)?;
            return Ok(Process {
                stdin: Box::pin(child.stdin.take().unwrap()),
                stdout: Box::pin(child.stdout.take().unwrap()),
                stderr: Some(Box::pin(child.stderr.take().unwrap())),
                handle: Box::new(Child { project, child, exit: None, terminal: None }),
            });
        };
        let master =
            openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).map_err(io::Error::from);
        let master = master.map_err(failed)?;
        let open = || -> io::Result<std::fs::File> {
            grantpt(&master)?;
            unlockpt(&master)?;
            tcsetwinsize(&master, winsize(pty.size))?;
            let name = ptsname(&master, Vec::new())?;
            std::fs::File::options().read(true).write(true).open(name.to_str().map_err(io::Error::other)?)
        };
        let slave = open().map_err(failed)?;
        let child = command
            .env("TERM", &pty.term)
            .stdin(slave.try_clone().map_err(failed)?)
            .stdout(slave.try_clone().map_err(failed)?)
            .stderr(slave)
            .spawn()
            .map_err(failed)?;
        drop(command);
        let reader = std::fs::File::from(master.try_clone().map_err(failed)?);
        let writer = std::fs::File::from(master.try_clone().map_err(failed)?);
        Ok(Process {
            stdin: Box::pin(tokio::fs::File::from_std(writer)),
            stdout: Box::pin(tokio::fs::File::from_std(reader)),
            stderr: None,
            handle: Box::new(Child { project, child, exit: None, terminal: Some(master) }),
        })
    }

    async fn dial(&self, project: ProjectId, port: u16) -> Result<BoxStream, Error> {
        match TcpStream::connect(("127.0.0.1", port)).await {
            Ok(stream) => Ok(Box::pin(stream)),
            Err(_) => Err(Error::Refused { project, port }),
        }
    }
}

fn winsize(size: WindowSize) -> Winsize {
    Winsize { ws_row: size.rows, ws_col: size.cols, ws_xpixel: 0, ws_ypixel: 0 }
}

#[derive(Debug)]
struct Child {
    project: ProjectId,
    child: tokio::process::Child,
    exit: Option<Exit>,
    terminal: Option<OwnedFd>,
}

#[async_trait]
impl ProcessHandle for Child {
    async fn resize(&self, size: WindowSize) -> Result<(), Error> {
        if let Some(terminal) = &self.terminal {
            tcsetwinsize(terminal, winsize(size)).unwrap();
        }
        Ok(())
    }

    async fn signal(&self, signal: &str) -> Result<(), Error> {
        let signal = match signal {
            "TERM" => Signal::TERM,
            "INT" => Signal::INT,
            "KILL" => Signal::KILL,
            other => panic!("unexpected signal {other}"),
        };
        if let Some(pid) = self.child.id().and_then(|id| Pid::from_raw(id as i32)) {
            let _ = kill_process(pid, signal);
        }
        Ok(())
    }

    async fn wait(&mut self) -> Result<Exit, Error> {
        if self.exit.is_none() {
            use std::os::unix::process::ExitStatusExt;
            let status = self.child.wait().await.unwrap();
            self.exit = Some(match status.code() {
                Some(code) => Exit::Code(code as u8),
                None => Exit::Signal(
                    match status.signal() {
                        Some(1) => "HUP",
                        Some(2) => "INT",
                        Some(3) => "QUIT",
                        Some(6) => "ABRT",
                        Some(9) => "KILL",
                        Some(10) => "USR1",
                        Some(11) => "SEGV",
                        Some(13) => "PIPE",
                        Some(14) => "ALRM",
                        Some(15) => "TERM",
                        other => panic!("killed by {other:?} in {}", self.project),
                    }
                    .into(),
                ),
            });
        }
        Ok(self.exit.clone().unwrap())
    }
}

/// Reaches the [`SshPeers`] of hosts in this process, as one proxy.
pub struct InMemory {
    pub hosts: Vec<(HostId, Arc<SshPeers>)>,
    pub proxy: ProxyId,
}

impl fmt::Debug for InMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InMemory").field("proxy", &self.proxy).finish_non_exhaustive()
    }
}

#[async_trait]
impl Connector for InMemory {
    async fn open(
        &self,
        host: HostId,
        service: Service,
        _: Option<IpAddr>,
        _: Duration,
    ) -> Result<BoxStream, connector::Error> {
        assert_eq!(service, Service::Ssh);
        let Some((_, peers)) = self.hosts.iter().find(|(id, _)| *id == host) else {
            return Err(connector::Error::Unknown { host });
        };
        let (ours, theirs) = tokio::io::duplex(64 * 1024);
        let (peers, proxy) = (peers.clone(), self.proxy);
        tokio::spawn(async move {
            let _ = peers.serve(Box::pin(theirs), proxy).await;
        });
        Ok(Box::pin(ours))
    }
}

/// A host, and a proxy before it.
pub struct World {
    pub directory: tempfile::TempDir,
    pub project: ProjectId,
    /// Another host, which would have the project too.
    pub beta: HostId,
    pub rights: Arc<Rights>,
    pub router: Arc<OneRoute>,
    pub shells: Arc<Shells>,
    pub host_keys: Vec<String>,
    /// The host's, and the proxy's.
    pub ingresses: Vec<SshIngress>,
    pub direct: u16,
    pub proxied: u16,
    /// The host's.
    pub gate: Arc<dyn cocalc_ssh::Gate>,
    _servers: tokio::task::JoinSet<()>,
}

impl World {
    pub async fn new() -> Self {
        Self::with(|builder| builder).await
    }

    /// With an ingress built to measure.
    pub async fn with(configure: impl Fn(SshIngressBuilder) -> SshIngressBuilder) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let key = keygen(&directory.path().join("id"));
        keygen(&directory.path().join("stranger"));
        std::fs::create_dir(directory.path().join("home")).unwrap();
        let project = ProjectId::random();
        let (host, proxy) = (HostId::random(), ProxyId::random());
        let rights = || {
            Arc::new(Rights {
                project,
                key: key.clone(),
                more: Mutex::default(),
                trusted_proxy: Some(proxy),
                certificate: Mutex::default(),
                held: AtomicBool::new(true),
                revoked: watch::Sender::new(None),
                admitted: Arc::default(),
                asked: AtomicUsize::new(0),
            })
        };
        let (rights, beta_rights) = (rights(), rights());
        let beta = HostId::random();
        let shells = Shells::new(directory.path());
        let keys = HostKeys::load_or_create(&directory.path().join("host_key")).unwrap();
        let host_keys = keys.public();
        let router = OneRoute::new(project, host, Reach::Local);
        let gate = Arc::new(LocalGate::new(rights.clone(), router.clone(), Arc::new(Shared(shells.clone()))));
        let inner = SshIngress::builder(gate.clone(), keys.clone()).build();
        let peers = Arc::new(SshPeers::new(gate.clone()).ingress(inner));
        let beta_router = OneRoute::new(project, beta, Reach::Local);
        let beta_gate = LocalGate::new(beta_rights, beta_router, Arc::new(Shared(shells.clone())));
        let beta_peers = Arc::new(SshPeers::new(Arc::new(beta_gate)));
        let hosts = vec![(host, peers), (beta, beta_peers)];
        let away = OneRoute::new(project, host, Reach::Remote(HostAddress::default()));
        let remote = RemoteGate::new(away, Arc::new(InMemory { hosts, proxy }));
        let remote = Arc::new(remote.decoy(move |_| Some(host)));
        let passage: Arc<dyn cocalc_ssh::Passage> = remote.clone();
        let mut servers = tokio::task::JoinSet::new();
        let (mut ports, mut ingresses) = (Vec::new(), Vec::new());
        let mut known = String::new();
        let gate: Arc<dyn cocalc_ssh::Gate> = gate;
        for gate in [gate.clone(), remote] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let port = listener.local_addr().unwrap().port();
            known += &format!("[127.0.0.1]:{port} {}\n", host_keys[0]);
            let builder = SshIngress::builder(gate, keys.clone()).passage(passage.clone());
            let ingress = configure(builder).build();
            ingresses.push(ingress.clone());
            servers.spawn(async move { ingress.serve(listener, std::future::pending()).await });
            ports.push(port);
        }
        std::fs::write(directory.path().join("known_hosts"), known).unwrap();
        Self {
            directory,
            project,
            beta,
            rights,
            router,
            shells,
            host_keys,
            ingresses,
            direct: ports[0],
            proxied: ports[1],
            gate,
            _servers: servers,
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The options that every OpenSSH program gets.
    pub fn options(&self, key: &str) -> Vec<String> {
        let file = |name: &str| self.path(name).display().to_string();
        let mut options = vec!["-F".to_owned(), "/dev/null".to_owned(), "-i".to_owned(), file(key)];
        for option in [
            format!("UserKnownHostsFile={}", file("known_hosts")),
            "StrictHostKeyChecking=yes".into(),
            "IdentitiesOnly=yes".into(),
            "IdentityAgent=none".into(),
            "ConnectTimeout=20".into(),
        ] {
            options.extend(["-o".to_owned(), option]);
        }
        options
    }

    /// `ssh` with a key and without questions.
    pub fn ssh(&self, port: u16, arguments: &[&str]) -> tokio::process::Command {
        let mut command = tokio::process::Command::new("ssh");
        command
            .args(self.options("id"))
            .args(["-o", "BatchMode=yes", "-p", &port.to_string(), "-l", &self.project.to_string()])
            .args(arguments)
            .kill_on_drop(true);
        command
    }

    /// Runs a command by `ssh`, with `input`.
    pub async fn run(&self, port: u16, line: &str, input: &[u8]) -> Output {
        finish(self.ssh(port, &["127.0.0.1", line]), input).await
    }
}

/// `Sessions` of a shared backend.
#[derive(Debug)]
struct Shared(Arc<Shells>);

#[async_trait]
impl Sessions for Shared {
    async fn wake(&self, project: ProjectId) -> Awake {
        self.0.wake(project).await
    }

    async fn exec(&self, project: ProjectId, request: ExecRequest) -> Result<Process, Error> {
        self.0.exec(project, request).await
    }

    async fn dial(&self, project: ProjectId, port: u16) -> Result<BoxStream, Error> {
        self.0.dial(project, port).await
    }
}

/// Feeds a program and waits for its end, for at most two minutes.
pub async fn finish(mut command: tokio::process::Command, input: &[u8]) -> Output {
    use tokio::io::AsyncWriteExt;
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let run = async {
        let feed = async {
            let _ = stdin.write_all(input).await;
            drop(stdin);
        };
        tokio::join!(feed, child.wait_with_output()).1.unwrap()
    };
    within(120, run).await
}

pub async fn within<T>(secs: u64, work: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(secs), work).await.expect("it did not end in time")
}

/// Waits until `condition` holds, for at most 20 seconds.
pub async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    for _ in 0..2000 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("never happened: {what}");
}

/// Makes a key pair and returns the public one as `algorithm base64`.
pub fn keygen(path: &Path) -> String {
    let made = std::process::Command::new("ssh-keygen")
        .args(["-q", "-t", "ed25519", "-N", "", "-C", "test", "-f"])
        .arg(path)
        .status()
        .expect("ssh-keygen of the package openssh-client is needed");
    assert!(made.success());
    let public = std::fs::read_to_string(path.with_extension("pub")).unwrap();
    public.split_whitespace().take(2).collect::<Vec<_>>().join(" ")
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A program of the virtual environment with the clients.
pub fn client(name: &str) -> tokio::process::Command {
    let place = std::env::var_os("COCALC_SSH_CLIENTS")
        .map_or_else(|| PathBuf::from("/var/cache/cocalc/ssh-clients"), PathBuf::from);
    let program = place.join("bin").join(name);
    assert!(program.exists(), "{} is missing: run .ci/setup.sh test", program.display());
    let mut command = tokio::process::Command::new(program);
    command.kill_on_drop(true);
    command
}
