//! Daemons that are started again while they are used: with sockets that their
//! supervisor holds nobody is refused, and no request or command fails; and how
//! each of them ends.
//!
//! Storage is plain directories and projects are plain processes: what is shown
//! is the daemons, and their sockets need no containers.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod world;

use std::{
    io::{Read, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use serde_json::json;
use world::{LIMIT, Way, World, free_port, run_line, until, waits_for, way};

/// The app of the project: answers, and to `/wait` slowly: half of it at once, the
/// rest when the file exists that it was started with.
const APP: &str = r#"
import http.server, os, sys, time

class App(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        slow = self.path.endswith("/wait")
        self.send_response(200)
        self.send_header("Content-Length", "10")
        self.end_headers()
        self.wfile.write(b"first")
        self.wfile.flush()
        while slow and not os.path.exists(sys.argv[3]):
            time.sleep(0.02)
        self.wfile.write(b"-last")

    def log_message(self, *_):
        pass

class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 256

server = Server(("127.0.0.1", int(sys.argv[1])), App)
with open(sys.argv[2], "w") as file:
    file.write(str(os.getpid()))
server.serve_forever()
"#;

/// A project whose app runs.
struct Stage {
    world: World,
    direct: Way,
    pid: String,
    go: PathBuf,
}

impl Stage {
    fn new(mut world: World, settings: &str) -> Self {
        world.add_host("alpha", settings);
        world.add_proxy_with("proxy-1", settings);
        world.connected(1, 1);
        let begun = world.ok("POST", "/projects", json!({ "name": "p", "host": "alpha" }));
        world.settle(&begun);
        let project = begun["project"]["id"].as_str().unwrap().to_owned();
        world.settle(&world.ok("POST", &format!("/projects/{project}/start"), json!({})));
        let direct = way(&world.api(), &project, free_port());
        let path = |name: &str| world.dir.path().join(name);
        std::fs::write(path("app.py"), APP).unwrap();
        let line = format!(
            "setsid -f python3 {} {} {} {} </dev/null >{} 2>&1; {}",
            path("app.py").display(),
            direct.port,
            path("app.pid").display(),
            path("go").display(),
            path("app.out").display(),
            waits_for(&path("app.pid")),
        );
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(run_line(&direct, line));
        let pid = std::fs::read_to_string(path("app.pid")).unwrap();
        let go = path("go");
        Self { world, direct, pid, go }
    }

    fn port(&self, name: &str, key: &'static str) -> u16 {
        self.world.ports[&(name.to_owned(), key)]
    }

    /// A request for the app, over a daemon's port.
    fn app(&self, name: &str, path: &str) -> Request {
        let Way { project, port, token, .. } = &self.direct;
        Request {
            port: self.port(name, "listen"),
            path: format!("/{project}/port/{port}{path}"),
            token: token.clone(),
        }
    }

    fn ready(&self, name: &str) -> Request {
        Request { port: self.port(name, "listen"), path: "/readyz".to_owned(), token: String::new() }
    }

    /// OpenSSH's client, with a key that the account has registered.
    fn ssh(&self, name: &str) -> Ssh {
        let key = self.world.dir.path().join("id");
        if !key.exists() {
            let made =
                Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key).status();
            assert!(made.unwrap().success());
            let line = std::fs::read_to_string(key.with_extension("pub")).unwrap();
            self.world.ok("POST", "/ssh-keys", json!({ "key": line.trim() }));
        }
        Ssh { port: self.port(name, "ssh_listen"), project: self.direct.project.clone(), key }
    }
}

#[derive(Clone)]
struct Request {
    port: u16,
    path: String,
    token: String,
}

impl Request {
    /// Sends it over a connection of its own.
    fn send(&self) -> std::io::Result<TcpStream> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port))?;
        stream.set_read_timeout(Some(LIMIT))?;
        let Self { port, path, token } = self;
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {token}\r\nConnection: close\r\n\r\n"
        )?;
        Ok(stream)
    }

    /// Sends it, and reads the head of the answer and its first half.
    fn begin(&self) -> TcpStream {
        loop {
            let mut stream = self.send().unwrap();
            let (mut text, mut bytes) = (String::new(), [0; 4096]);
            loop {
                let count = stream.read(&mut bytes).unwrap();
                text.push_str(&String::from_utf8_lossy(&bytes[..count]));
                match text.ends_with("first") {
                    true => return stream,
                    false if is_busy(&text) => break,
                    false => assert!(count > 0, "{text}"),
                }
            }
        }
    }

    /// Sends it, and reads the whole answer.
    fn answer(&self) -> std::io::Result<String> {
        let mut text = String::new();
        self.send()?.read_to_string(&mut text)?;
        Ok(text)
    }
}

struct Ssh {
    port: u16,
    project: String,
    key: PathBuf,
}

impl Ssh {
    fn run(&self, line: &str) -> Result<String, String> {
        let mut ssh = Command::new("ssh");
        ssh.args(["-F", "/dev/null", "-p", &self.port.to_string(), "-l", &self.project, "-i"]).arg(&self.key);
        for option in [
            "UserKnownHostsFile=/dev/null",
            "StrictHostKeyChecking=no",
            "IdentitiesOnly=yes",
            "IdentityAgent=none",
            "BatchMode=yes",
            "LogLevel=ERROR",
        ] {
            ssh.args(["-o", option]);
        }
        let output = ssh.args(["127.0.0.1", line]).stdin(Stdio::null()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        match output.status.success() {
            true => Ok(said),
            false => Err(format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr))),
        }
    }
}

/// Does something again and again, and notes what went wrong.
struct Poller {
    name: &'static str,
    done: Arc<AtomicUsize>,
    failed: Arc<Mutex<Vec<String>>>,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Poller {
    fn new(name: &'static str, act: impl Fn() -> Result<(), String> + Send + 'static) -> Self {
        let (done, failed) = (Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(Vec::new())));
        let over = Arc::new(AtomicBool::new(false));
        let (count, wrong, end) = (done.clone(), failed.clone(), over.clone());
        let thread = std::thread::spawn(move || {
            while !end.load(Ordering::SeqCst) {
                let began = Instant::now();
                match act() {
                    Ok(()) => drop(count.fetch_add(1, Ordering::SeqCst)),
                    Err(error) => wrong.lock().unwrap().push(format!("after {:?}: {error}", began.elapsed())),
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        Self { name, done, failed, over, thread: Some(thread) }
    }

    /// Waits for three more that went well from now on.
    fn goes_on(&self) {
        let from = self.done.load(Ordering::SeqCst);
        until(self.name, || {
            let failed = self.failed.lock().unwrap();
            assert!(failed.is_empty(), "{}: {failed:#?}", self.name);
            (self.done.load(Ordering::SeqCst) >= from + 3).then_some(())
        });
    }
}

impl Drop for Poller {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The process runner looks through /proc for each connection to an app, which
/// may take longer than the host waits on a busy machine.
fn is_busy(answer: &str) -> bool {
    answer.contains("cocalc-code: app_timeout\r\n")
}

fn http(request: Request) -> impl Fn() -> Result<(), String> + Send {
    move || loop {
        let text = request.answer().map_err(|error| error.to_string())?;
        match text.starts_with("HTTP/1.1 200 ") {
            true => return Ok(()),
            false if is_busy(&text) => {}
            false => return Err(text),
        }
    }
}

fn ssh(ssh: Ssh) -> impl Fn() -> Result<(), String> + Send {
    move || match ssh.run("echo in")?.as_str() {
        "in\n" => Ok(()),
        other => Err(format!("said {other:?}")),
    }
}

fn alive(pid: &str) -> bool {
    Path::new("/proc").join(pid).exists()
}

#[test]
fn nobody_notices_that_daemons_are_started_again() {
    let mut stage = Stage::new(World::holding_sockets("keepalive_ms = 500\n"), "");
    let account = Request {
        port: stage.port("master", "listen"),
        path: "/api/v1/account".to_owned(),
        token: stage.world.admin.clone(),
    };
    let pollers = [
        Poller::new("requests to the host", http(stage.app("alpha", "/"))),
        Poller::new("requests through the proxy", http(stage.app("proxy-1", "/"))),
        Poller::new("calls of the master", http(account)),
        Poller::new("commands at the host", ssh(stage.ssh("alpha"))),
        Poller::new("commands through the proxy", ssh(stage.ssh("proxy-1"))),
    ];
    let all_go_on = || pollers.iter().for_each(Poller::goes_on);
    all_go_on();
    for name in ["alpha", "proxy-1", "master"] {
        // What is under way when the daemon is asked to end ends first.
        let slow = (name != "master").then(|| stage.app(name, "/wait").begin());
        stage.world.signal(name, "TERM");
        std::fs::write(&stage.go, "").unwrap();
        if let Some(mut stream) = slow {
            let mut rest = String::new();
            stream.read_to_string(&mut rest).unwrap();
            assert_eq!(rest, "-last", "through {name}");
        }
        stage.world.ended_well(name);
        // Nobody serves now, and whoever comes waits.
        std::fs::remove_file(&stage.go).unwrap();
        let early = stage.ready(name).send().unwrap();
        stage.world.start(name);
        let mut text = String::new();
        { early }.read_to_string(&mut text).unwrap();
        assert!(text.starts_with("HTTP/1.1 "), "{name}: {text}");
        all_go_on();
    }
    assert!(alive(&stage.pid), "the project's processes ran on");
}

#[test]
fn daemons_say_that_they_end_and_finish_what_is_open() {
    let drain = "[drain]\ndelay_secs = 5\nlimit_secs = 60\n";
    let mut stage = Stage::new(World::new(drain), drain);
    let names = ["alpha", "proxy-1", "master"];
    for name in names {
        until(name, || stage.ready(name).answer().ok().filter(|text| text.starts_with("HTTP/1.1 200 ")));
        stage.world.signal(name, "TERM");
    }
    for name in names {
        // For load balancers, which then ask elsewhere.
        until(name, || {
            stage
                .ready(name)
                .answer()
                .ok()
                .filter(|text| text.starts_with("HTTP/1.1 503 ") && text.contains("shutting down"))
        });
    }
    // Until then nobody is turned away.
    let mut open = Vec::new();
    for name in ["alpha", "proxy-1"] {
        let stream = stage.app(name, "/wait").begin();
        open.push((name, stream));
    }
    for name in names {
        // Only what is new.
        until(name, || stage.ready(name).send().is_err().then_some(()));
    }
    std::fs::write(&stage.go, "").unwrap();
    for (name, mut stream) in open {
        let mut rest = String::new();
        stream.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "-last", "{name}");
    }
    // Long before the limit: nothing was open any more.
    for name in names {
        stage.world.ended_well(name);
    }
    assert!(alive(&stage.pid), "the project's processes run on");
}

#[test]
fn what_does_not_end_is_closed_and_foreign_sockets_are_refused() {
    let drain = "[drain]\nlimit_secs = 1\n";
    let mut stage = Stage::new(World::holding_sockets(drain), drain);
    let streams = ["alpha", "proxy-1"].map(|name| stage.app(name, "/wait").begin());
    for name in ["proxy-1", "alpha"] {
        stage.world.stop(name);
    }
    for mut stream in streams {
        let mut rest = Vec::new();
        // Cut off, or reset.
        let _ = stream.read_to_end(&mut rest);
        assert!(!rest.ends_with(b"-last"));
    }
    // A socket on which nothing would ever be served is a mistake of the unit.
    stage.world.mislead("alpha", "listne");
    stage.world.start("alpha");
    let status = stage.world.exit_status("alpha");
    assert!(!status.success(), "{status}");
    let log = stage.world.log();
    assert!(log.contains("listne") && log.contains("handed over"), "{log}");
}
