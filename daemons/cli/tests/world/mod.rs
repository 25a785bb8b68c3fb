//! A master, hosts and proxies as processes of their own, on plain directories
//! and plain processes: what is shown is the control plane and who gets in, and
//! that needs neither root nor containers.

#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "each test binary uses its part, and a failed start fails the test"
)]

use std::{
    collections::BTreeMap,
    io::Read,
    net::{SocketAddr, TcpListener as Probe},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use cocalc_core::{
    auth::Secret,
    runner::{Command as Run, ExecRequest},
};
use cocalc_ssh::client::{Client, HostKeyCheck, Identity};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;

/// Every wait has an end; none is what is measured.
pub(crate) const LIMIT: Duration = Duration::from_secs(90);

/// Files in PEM of daemons that speak HTTPS.
pub(crate) struct Https {
    pub(crate) cert: PathBuf,
    pub(crate) key: PathBuf,
    pub(crate) trusted: PathBuf,
}

/// Daemons, which end with the value.
pub(crate) struct World {
    pub(crate) dir: tempfile::TempDir,
    children: Vec<(String, Child)>,
    /// The listening sockets that the daemons are given at each start, as
    /// systemd gives them; empty if they listen themselves.
    held: BTreeMap<String, Vec<(&'static str, Probe)>>,
    hold: bool,
    /// The certificate that all daemons show and trust, if they speak HTTPS.
    https: Option<Https>,
    /// Whom the daemons that are started from now on trust; `None`: the system's.
    pub(crate) trusted: Option<PathBuf>,
    /// Where each daemon listens, by the keys of its configuration.
    pub(crate) ports: BTreeMap<(String, &'static str), u16>,
    pub(crate) url: String,
    pub(crate) admin: String,
    /// Where each host serves HTTP, in the order in which they were added.
    pub(crate) hosts: Vec<SocketAddr>,
}

pub(crate) fn program(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_cocalc")).with_file_name(name);
    assert!(path.exists(), "{} is missing: run `cargo build --workspace --bins` first", path.display());
    path
}

/// A port that is free now.
pub(crate) fn free_port() -> u16 {
    Probe::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

impl World {
    /// Starts a master; `settings` are lines of its configuration.
    pub(crate) fn new(settings: &str) -> Self {
        Self::begin(false, None, None, settings)
    }

    /// The same, where all daemons speak HTTPS, and trust only what is in
    /// [`Https::trusted`].
    pub(crate) fn over_https(https: Https, settings: &str) -> Self {
        Self::begin(false, Some(https), None, settings)
    }

    /// The same, where the master alone speaks HTTPS, at `port` and under the name
    /// `localhost`, with a certificate that `settings` say how to get; daemons
    /// trust what is in `trusted`.
    pub(crate) fn certified(port: u16, trusted: PathBuf, settings: &str) -> Self {
        Self::begin(false, None, Some((port, trusted)), settings)
    }

    /// The same, where this process holds the sockets on which daemons listen,
    /// and hands them over at each start.
    pub(crate) fn holding_sockets(settings: &str) -> Self {
        Self::begin(true, None, None, settings)
    }

    fn begin(hold: bool, https: Option<Https>, certified: Option<(u16, PathBuf)>, settings: &str) -> Self {
        let dir = tempfile::Builder::new().prefix("cocalc-world-").tempdir().unwrap();
        let mut world = Self {
            url: String::new(),
            dir,
            held: BTreeMap::new(),
            hold,
            trusted: https.as_ref().map(|https| https.trusted.clone()),
            https,
            ports: BTreeMap::new(),
            children: Vec::new(),
            admin: String::new(),
            hosts: Vec::new(),
        };
        let port = match certified {
            Some((port, trusted)) => {
                world.trusted = Some(trusted);
                world.url = format!("https://localhost:{port}");
                world.ports.insert(("master".to_owned(), "listen"), port);
                port
            }
            None => {
                let port = world.port("master", "listen");
                let scheme = if world.https.is_some() { "https" } else { "http" };
                world.url = format!("{scheme}://127.0.0.1:{port}");
                port
            }
        };
        let data = world.dir.path().join("master");
        let text = format!("listen = '127.0.0.1:{port}'\ndata_dir = '{}'\n{settings}", data.display());
        world.configure("master", &text);
        world.start("master");
        let token = data.join("admin-token");
        until("the administrator's token", || std::fs::read_to_string(&token).ok().filter(|t| t.len() > 40));
        world.admin = std::fs::read_to_string(&token).unwrap().trim().to_owned();
        until("the master", || world.call("GET", "/account", Value::Null).ok());
        world
    }

    /// A port for a daemon's key: one that is free, or that of a socket held for it.
    fn port(&mut self, name: &str, key: &'static str) -> u16 {
        let port = if self.hold {
            let socket = Probe::bind("127.0.0.1:0").unwrap();
            let port = socket.local_addr().unwrap().port();
            self.held.entry(name.to_owned()).or_default().push((key, socket));
            port
        } else {
            free_port()
        };
        self.ports.insert((name.to_owned(), key), port);
        port
    }

    fn join_token(&self, kind: &str, name: &str) -> PathBuf {
        let token = self.ok("POST", "/join-tokens", json!({ "kind": kind }));
        let path = self.dir.path().join(format!("{name}.token"));
        std::fs::write(&path, token["token"].as_str().unwrap()).unwrap();
        path
    }

    /// Starts a host; `settings` are more lines of its configuration.
    pub(crate) fn add_host(&mut self, name: &str, settings: &str) {
        let http = self.port(name, "listen");
        self.add_host_at(name, http, settings);
    }

    /// The same, which serves HTTP at this port.
    pub(crate) fn add_host_at(&mut self, name: &str, http: u16, settings: &str) {
        let path = self.join_token("host", name);
        let (ssh, peer) = (self.port(name, "ssh_listen"), self.port(name, "peer_listen"));
        let (url, dir) = (&self.url, self.dir.path().join(name));
        let text = format!(
            "name = '{name}'\nmaster_url = '{url}'\njoin_token_file = '{}'\ndata_dir = '{}'\n\
             listen = '127.0.0.1:{http}'\nssh_listen = '127.0.0.1:{ssh}'\npeer_listen = '127.0.0.1:{peer}'\n\
             storage = 'directory'\nvolume = '{}'\nrunner = 'process'\n{settings}",
            path.display(),
            dir.join("data").display(),
            dir.join("volume").display(),
        );
        std::fs::create_dir_all(dir.join("volume")).unwrap();
        self.configure(name, &text);
        self.start(name);
        self.hosts.push(([127, 0, 0, 1], http).into());
    }

    /// Starts a proxy, whose name begins with `proxy`.
    pub(crate) fn add_proxy(&mut self, name: &str) {
        self.add_proxy_with(name, "");
    }

    /// The same, with more lines of its configuration.
    pub(crate) fn add_proxy_with(&mut self, name: &str, settings: &str) {
        let path = self.join_token("proxy", name);
        let (http, ssh) = (self.port(name, "listen"), self.port(name, "ssh_listen"));
        let text = format!(
            "name = '{name}'\nmaster_url = '{}'\njoin_token_file = '{}'\ndata_dir = '{}'\n\
             listen = '127.0.0.1:{http}'\nssh_listen = '127.0.0.1:{ssh}'\n{settings}",
            self.url,
            path.display(),
            self.data_dir(name).display(),
        );
        self.configure(name, &text);
        self.start(name);
    }

    /// Where a host or proxy keeps its own state.
    pub(crate) fn data_dir(&self, name: &str) -> PathBuf {
        self.dir.path().join(name).join("data")
    }

    /// Waits until so many hosts, and so many proxies, are connected.
    pub(crate) fn connected(&self, hosts: usize, proxies: usize) {
        for (path, kind, count) in [("/hosts", "hosts", hosts), ("/proxies", "proxies", proxies)] {
            until(kind, || {
                let answer = self.ok("GET", path, Value::Null);
                let all = answer[kind].as_array()?;
                (all.len() == count && all.iter().all(|one| one["state"] == "connected")).then_some(())
            });
        }
    }

    pub(crate) fn configure(&self, name: &str, text: &str) {
        // Keys of the daemon itself, before those of any table.
        let text = match &self.https {
            None => text.to_owned(),
            Some(Https { cert, key, .. }) => {
                format!("tls_cert = '{}'\ntls_key = '{}'\n{text}", cert.display(), key.display())
            }
        };
        std::fs::write(self.dir.path().join(format!("{name}.toml")), text).unwrap();
    }

    pub(crate) fn start(&mut self, name: &str) {
        let binary = match name {
            "master" => "cocalc-master",
            name if name.starts_with("proxy") => "cocalc-proxy",
            _ => "cocalc-host",
        };
        let log = self.dir.path().join(format!("{name}.log"));
        let mut command = match self.held.get(name) {
            Some(sockets) => handing_over(sockets, &program(binary), &log),
            None => {
                let log = std::fs::File::options().create(true).append(true).open(log).unwrap();
                let mut command = Command::new(program(binary));
                command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
                command
            }
        };
        command.arg("--config").arg(self.dir.path().join(format!("{name}.toml"))).env("COCALC_LOG", "warn");
        if let Some(trusted) = &self.trusted {
            command.env("SSL_CERT_FILE", trusted).env_remove("SSL_CERT_DIR");
        }
        self.children.push((name.to_owned(), command.spawn().unwrap()));
    }

    /// As `kill -9` does.
    pub(crate) fn kill(&mut self, name: &str) {
        let at = self.children.iter().position(|(other, _)| other == name).unwrap();
        let (_, mut child) = self.children.remove(at);
        child.kill().unwrap();
        child.wait().unwrap();
    }

    pub(crate) fn api(&self) -> Api {
        Api { url: self.url.clone(), token: self.admin.clone() }
    }

    pub(crate) fn call(&self, method: &str, path: &str, body: Value) -> Result<Value, String> {
        self.api().call(method, path, body)
    }

    pub(crate) fn ok(&self, method: &str, path: &str, body: Value) -> Value {
        self.call(method, path, body)
            .unwrap_or_else(|error| panic!("{method} {path}: {error}\n{}", self.log()))
    }

    pub(crate) fn settle(&self, begun: &Value) {
        let id = begun["operation_id"].as_str().unwrap();
        until("an operation", || {
            let path = format!("/operations/{id}/wait?timeout_secs=10");
            let seen = self.ok("GET", &path, Value::Null);
            assert!(seen["state"] == "running" || seen["state"] == "done", "{seen}\n{}", self.log());
            (seen["state"] == "done").then_some(())
        });
    }

    pub(crate) fn log(&self) -> String {
        let mut text = String::new();
        for entry in std::fs::read_dir(self.dir.path()).unwrap().flatten() {
            if entry.path().extension().is_some_and(|end| end == "log") {
                let log = std::fs::read_to_string(entry.path()).unwrap_or_default();
                let lines: Vec<&str> = log.lines().collect();
                text.push_str(&format!("\n-- {}\n", entry.path().display()));
                text.push_str(&lines[lines.len().saturating_sub(20)..].join("\n"));
            }
        }
        text
    }

    /// Sends a daemon a signal, for instance `HUP`.
    pub(crate) fn signal(&self, name: &str, signal: &str) {
        let (_, child) = self.children.iter().find(|(other, _)| other == name).unwrap();
        let pid = child.id().to_string();
        assert!(Command::new("kill").args([&format!("-{signal}"), &pid]).status().unwrap().success());
    }

    /// Asks a daemon to end, as the system does, and waits until it has.
    pub(crate) fn stop(&mut self, name: &str) {
        self.signal(name, "TERM");
        self.ended_well(name);
    }

    /// From now on one of a daemon's sockets has another name, and is of another
    /// address than any key.
    pub(crate) fn mislead(&mut self, name: &str, key: &'static str) {
        let socket = Probe::bind("127.0.0.1:0").unwrap();
        self.held.get_mut(name).unwrap()[0] = (key, socket);
    }

    /// Waits until a daemon has ended.
    pub(crate) fn exit_status(&mut self, name: &str) -> ExitStatus {
        let at = self.children.iter().position(|(other, _)| other == name).unwrap();
        let (_, mut child) = self.children.remove(at);
        until(&format!("the end of {name}"), || child.try_wait().unwrap())
    }

    /// Waits until a daemon has ended, and well.
    pub(crate) fn ended_well(&mut self, name: &str) {
        let status = self.exit_status(name);
        assert!(status.success(), "{name} ended with {status}\n{}", self.log());
    }

    /// One number of a host's metrics.
    pub(crate) fn metric(&self, host: usize, name: &str) -> u64 {
        let url = format!("http://{}/metrics", self.hosts[host]);
        let text = ureq::get(&url).call().unwrap().body_mut().read_to_string().unwrap();
        let line = text.lines().find(|line| line.split(' ').next() == Some(name));
        let line = line.unwrap_or_else(|| panic!("no {name} in\n{text}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }
}

/// A command that starts `program` with sockets as systemd hands them over: at
/// descriptors from 3 on, with the process's own id. They come to the shell as
/// its standard streams, so there may be three.
fn handing_over(sockets: &[(&str, Probe)], program: &Path, log: &Path) -> Command {
    let names: Vec<&str> = sockets.iter().map(|(key, _)| *key).collect();
    let mut streams =
        sockets.iter().map(|(_, socket)| Stdio::from(OwnedFd::from(socket.try_clone().unwrap())));
    let mut stream = || streams.next().unwrap_or_else(Stdio::null);
    let script = format!(
        "exec 3<&0 {} {} 0</dev/null 1>/dev/null 2>>\"$LOG\"; \
         export LISTEN_PID=$$ LISTEN_FDS={} LISTEN_FDNAMES={}; exec \"$0\" \"$@\"",
        if sockets.len() > 1 { "4<&1" } else { "" },
        if sockets.len() > 2 { "5<&2" } else { "" },
        sockets.len(),
        names.join(":"),
    );
    assert!(sockets.len() <= 3, "more sockets than standard streams");
    let mut shell = Command::new("bash");
    shell.arg("-c").arg(script).arg(program).env("LOG", log);
    shell.stdin(stream()).stdout(stream()).stderr(stream());
    shell
}

impl Drop for World {
    fn drop(&mut self) {
        for (_, child) in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
        // Projects outlive their hosts' daemons, as they should.
        let deadline = Instant::now() + LIMIT;
        while !end_all(self.dir.path()) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
        }
        // What hosts note where a reboot empties it, as `cocalc down` does.
        for entry in std::fs::read_dir(self.dir.path()).into_iter().flatten().flatten() {
            let membership = std::fs::read(entry.path().join("data/membership.json")).unwrap_or_default();
            let membership: Value = serde_json::from_slice(&membership).unwrap_or_default();
            if let Some(id) = membership["id"].as_str() {
                let _ = std::fs::remove_file(format!("/run/cocalc/{id}.position"));
            }
        }
    }
}

/// Kills what runs from, for or in a directory; whether there was nothing.
fn end_all(dir: &Path) -> bool {
    let mut none = true;
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let inside = std::fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd.starts_with(dir));
        if pid != std::process::id()
            && (inside || String::from_utf8_lossy(&line).contains(dir.to_str().unwrap()))
        {
            none = false;
            let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
        }
    }
    none
}

/// The master's API as one account.
#[derive(Clone)]
pub(crate) struct Api {
    pub(crate) url: String,
    pub(crate) token: String,
}

impl Api {
    pub(crate) fn call(&self, method: &str, path: &str, body: Value) -> Result<Value, String> {
        let text = if body.is_null() { String::new() } else { body.to_string() };
        let request = ureq::http::Request::builder()
            .method(method)
            .uri(format!("{}/api/v1{path}", self.url))
            .header("authorization", format!("Bearer {}", self.token))
            .body(text)
            .unwrap();
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .allow_non_standard_methods(true)
            .timeout_global(Some(LIMIT));
        // Who the master is, its users look at; this is how the test is set up.
        let tls = ureq::tls::TlsConfig::builder().disable_verification(true);
        let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
        let config = config.tls_config(tls.unversioned_rustls_crypto_provider(provider).build());
        let agent = ureq::Agent::from(config.build());
        let mut response = agent.run(request).map_err(|error| error.to_string())?;
        let mut text = String::new();
        response.body_mut().as_reader().read_to_string(&mut text).map_err(|error| error.to_string())?;
        match response.status().is_success() {
            true => Ok(serde_json::from_str(&text).unwrap_or(Value::Null)),
            false => Err(format!("{}: {text}", response.status())),
        }
    }
}

pub(crate) fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(value) = look() {
            return value;
        }
        assert!(Instant::now() < deadline, "not within {LIMIT:?}: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Where an account's project is, and what opens it.
#[derive(Clone)]
pub(crate) struct Way {
    pub(crate) project: String,
    pub(crate) http: SocketAddr,
    pub(crate) ssh: String,
    pub(crate) token: String,
    pub(crate) port: u16,
}

/// A fresh token of an account, and where to show it.
pub(crate) fn way(own: &Api, project: &str, port: u16) -> Way {
    let path = format!("/projects/{project}/connect");
    let answer = own.call("POST", &path, json!({ "ttl_secs": 300 })).unwrap();
    let url = answer["direct"]["path_url"].as_str().unwrap();
    let http = url.strip_prefix("http://").unwrap().split('/').next().unwrap().parse().unwrap();
    let (_, ssh) = answer["direct"]["ssh"].as_str().unwrap().split_once('@').unwrap();
    let token = answer["token"].as_str().unwrap().to_owned();
    Way { project: project.to_owned(), http, ssh: ssh.to_owned(), token, port }
}

/// The same once the project runs, and its host listens there: the master may not have
/// heard yet that it died, and has other ports now.
pub(crate) fn way_in(own: &Api, project: &str) -> Way {
    until("a way in", || {
        let state = own.call("GET", &format!("/projects/{project}"), Value::Null).ok()?;
        let way = (state["state"] == "running").then(|| way(own, project, 1))?;
        std::net::TcpStream::connect(&way.ssh).ok()?;
        Some(way)
    })
}

/// Runs a command line to its end, which must be a good one.
pub(crate) async fn run_line(way: &Way, line: String) {
    let identity = Identity::Token(Secret::new(way.token.clone()));
    let project = way.project.parse().unwrap();
    let client = Client::connect(&way.ssh, project, &identity, HostKeyCheck::Any).await.unwrap();
    let request = ExecRequest { command: Run::Line(line), ..ExecRequest::default() };
    let mut process = client.exec(&request).await.unwrap();
    let (mut said, mut errors) = (String::new(), String::new());
    process.stdout.read_to_string(&mut said).await.unwrap();
    if let Some(stderr) = &mut process.stderr {
        stderr.read_to_string(&mut errors).await.unwrap();
    }
    let exit = tokio::time::timeout(LIMIT, process.handle.wait()).await.unwrap().unwrap();
    assert_eq!(exit, cocalc_core::runner::Exit::Code(0), "{said}{errors}");
}

/// What runs in projects that have an app.
const APP: &str = include_str!("app.py");

/// Starts an app in a project, at `way`'s port, as a user would: by SSH. The heads
/// of requests come to be in `heads`.
pub(crate) async fn start_app(world: &World, way: &Way, heads: Option<&Path>) {
    let dir = world.dir.path();
    let (program, pid) = (dir.join("app.py"), dir.join(format!("app-{}.pid", way.port)));
    std::fs::write(&program, APP).unwrap();
    let log = pid.with_extension("log");
    let line = format!(
        "setsid -f python3 {} {} {} {} </dev/null >{} 2>&1; {}",
        program.display(),
        way.port,
        pid.display(),
        heads.map(Path::display).map(|heads| heads.to_string()).unwrap_or_default(),
        log.display(),
        waits_for(&pid),
    );
    run_line(way, line).await;
    let said = std::fs::read_to_string(&log).unwrap_or_default();
    assert!(said.is_empty(), "an app failed: {said}");
}

/// A shell's words that wait for a file: what is left in the background before
/// it has a session of its own ends with the session that started it.
pub(crate) fn waits_for(path: &Path) -> String {
    format!("until test -s {}; do sleep 0.05; done", path.display())
}
