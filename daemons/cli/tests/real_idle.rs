//! Idle projects on real daemons: the five commonest complaints about such
//! systems, with times of seconds. Each is about a project that is stopped
//! although somebody works in it, or runs although nobody does.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod world;

use std::{
    io::{Read, Write},
    net::TcpStream,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use cocalc_core::{
    auth::Secret,
    runner::{Command as Run, ExecRequest, Pty, WindowSize},
};
use cocalc_ssh::client::{Client, HostKeyCheck, Identity};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use world::{LIMIT, Way, World, free_port, run_line, until, way};

const TIMEOUT: Duration = Duration::from_secs(8);
const POLICY: &str = "[idle]\ntimeout_secs = 8\npresence_secs = 24\nwarning_secs = 4\nsample_secs = 1\n";

/// Switches to WebSocket and is silent from then on; reads everything else, and
/// answers once the request has ended.
const APP: &str = r#"
import base64, hashlib, socket, sys, threading
listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind(("127.0.0.1", int(sys.argv[1])))
listener.listen(64)
def serve(connection):
    head = b""
    while b"\r\n\r\n" not in head:
        got = connection.recv(65536)
        if not got: return
        head += got
    lower = head.lower()
    if b"upgrade: websocket" in lower:
        key = [l.split(b":", 1)[1].strip() for l in head.split(b"\r\n") if l.lower().startswith(b"sec-websocket-key:")][0]
        accept = base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
        connection.sendall(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: " + accept + b"\r\n\r\n")
        while connection.recv(65536): pass
        return
    body = head.split(b"\r\n\r\n", 1)[1]
    while b"transfer-encoding: chunked" in lower and b"\r\n0\r\n\r\n" not in body:
        got = connection.recv(65536)
        if not got: return
        body = (body + got)[-64:]
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
    connection.close()
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"#;

struct Project {
    id: String,
    way: Way,
}

impl World {
    fn project(&self, name: &str) -> Project {
        let begun = self.ok("POST", "/projects", json!({ "name": name }));
        self.settle(&begun);
        let id = begun["project"]["id"].as_str().unwrap().to_owned();
        let home = self.dir.path().join("alpha/volume/projects").join(&id).join("live/tree/home");
        let port = free_port();
        // Apps come with each start.
        std::fs::create_dir_all(home.join(".cocalc")).unwrap();
        std::fs::write(home.join("app.py"), APP).unwrap();
        let startup = home.join(".cocalc/startup");
        std::fs::write(&startup, format!("#!/bin/sh\nexec python3 ~/app.py {port}\n")).unwrap();
        assert!(Command::new("chmod").arg("755").arg(&startup).status().unwrap().success());
        self.settle(&self.ok("POST", &format!("/projects/{id}/start"), json!({})));
        let way = way(&self.api(), &id, port);
        until("its app", || get(&way, &[]).contains("200 OK").then_some(()));
        Project { id, way }
    }

    fn why(&self, project: &Project) -> Value {
        self.ok("GET", &format!("/projects/{}/why", project.id), Value::Null)
    }

    fn runs(&self, project: &Project) -> bool {
        self.why(project)["state"] == "running"
    }

    fn stopped(&self, project: &Project) -> bool {
        self.why(project)["state"] == "stopped"
    }
}

fn head(way: &Way, method: &str, fields: &[&str]) -> String {
    let Way { project, http, token, port, .. } = way;
    let fields: String = fields.iter().map(|field| format!("{field}\r\n")).collect();
    format!(
        "{method} /{project}/proxy/{port}/ HTTP/1.1\r\nHost: {http}\r\nAuthorization: Bearer {token}\r\n{fields}\r\n"
    )
}

fn connect(way: &Way) -> TcpStream {
    let stream = TcpStream::connect(way.http).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream
}

/// The whole answer to a GET.
fn get(way: &Way, fields: &[&str]) -> String {
    let mut stream = connect(way);
    let fields = [&["Connection: close"], fields].concat();
    stream.write_all(head(way, "GET", &fields).as_bytes()).unwrap();
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer);
    answer
}

/// What a page asks by itself while nobody touches it.
const POLL: [&str; 2] = ["Sec-Fetch-Dest: empty", "Sec-Fetch-Mode: cors"];

/// A terminal in which somebody types a line now and then, until told to stop;
/// what it has shown is returned at the end of the session.
fn types(way: &Way, typing: Arc<AtomicBool>) -> std::thread::JoinHandle<String> {
    let way = way.clone();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let identity = Identity::Token(Secret::new(way.token.clone()));
            let project = way.project.parse().unwrap();
            let client = Client::connect(&way.ssh, project, &identity, HostKeyCheck::Any).await.unwrap();
            let pty = Pty::new("xterm", WindowSize { cols: 200, rows: 24 });
            let request =
                ExecRequest { command: Run::Line("cat".into()), pty: Some(pty), ..ExecRequest::default() };
            let mut process = client.exec(&request).await.unwrap();
            let type_on = async {
                while typing.load(Ordering::Relaxed) {
                    process.stdin.write_all(b"x\r").await.unwrap();
                    tokio::time::sleep(Duration::from_millis(300)).await;
                }
                std::future::pending::<()>().await;
            };
            let mut shown = Vec::new();
            tokio::select! {
                () = type_on => {}
                _ = process.stdout.read_to_end(&mut shown) => {}
            }
            String::from_utf8_lossy(&shown).into_owned()
        })
    })
}

/// Uploads a byte now and then, until told to stop.
fn uploads(way: &Way, sending: Arc<AtomicBool>) -> std::thread::JoinHandle<String> {
    let way = way.clone();
    std::thread::spawn(move || {
        let mut stream = connect(&way);
        let fields = ["Transfer-Encoding: chunked", "Connection: close"];
        stream.write_all(head(&way, "PUT", &fields).as_bytes()).unwrap();
        while sending.load(Ordering::Relaxed) {
            stream.write_all(b"1\r\nx\r\n").unwrap();
            std::thread::sleep(Duration::from_millis(300));
        }
        stream.write_all(b"0\r\n\r\n").unwrap();
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        answer
    })
}

#[test]
fn the_five_commonest_complaints() {
    let mut world = World::new("");
    world.add_host("alpha", POLICY);
    world.connected(1, 0);
    let working = Arc::new(AtomicBool::new(true));
    let runtime = tokio::runtime::Runtime::new().unwrap();

    // 5. A visible tab: it polls, and has a WebSocket that only lives.
    let tab = world.project("tab");
    // 1. Work in an SSH session.
    let ssh = world.project("ssh");
    let terminal = types(&ssh.way, Arc::clone(&working));
    // 2. A running kernel: a process that computes, and a socket to it.
    let kernel = world.project("kernel");
    let mut socket = connect(&kernel.way);
    let upgrade = [
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    ];
    socket.write_all(head(&kernel.way, "GET", &upgrade).as_bytes()).unwrap();
    let mut answer = [0; 12];
    socket.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 101");
    let compute = "setsid sh -c 'while test ! -e ~/computed; do :; done' >/dev/null 2>&1 </dev/null &";
    runtime.block_on(run_line(&kernel.way, compute.to_owned()));
    // 3. A long upload.
    let upload = world.project("upload");
    let uploading = uploads(&upload.way, Arc::clone(&working));
    // 4. A background job, which says so.
    let job = world.project("job");
    runtime.block_on(run_line(&job.way, "mkdir -p ~/.cocalc/jobs && touch ~/.cocalc/jobs/render".to_owned()));
    // And one that nobody uses.
    let unused = world.project("unused");
    let silent = types(&unused.way, Arc::new(AtomicBool::new(false)));

    let begun = Instant::now();
    let poll = |project: &Project| get(&project.way, &POLL);
    until("the stop of the unused one", || {
        poll(&tab);
        world.stopped(&unused).then_some(())
    });
    let why = world.why(&unused);
    let reason = why["reason"].as_str().unwrap();
    assert!(reason.starts_with("stopped at ") && reason.contains("without use (idle time: 8 s)"), "{why}");
    assert_eq!(why["stops_at"], Value::Null);
    let shown = silent.join().unwrap();
    assert!(shown.contains("cocalc: this project has been idle and will be stopped in"), "{shown:?}");
    assert!(shown.contains(&format!("cocalc project keep {} --for 2h", unused.id)), "{shown:?}");

    // The others have been left alone for longer than that.
    while begun.elapsed() < TIMEOUT * 2 {
        poll(&tab);
        std::thread::sleep(Duration::from_millis(200));
    }
    for (project, used) in [
        (&ssh, "SSH or a terminal"),
        (&kernel, "computing"),
        (&upload, "an HTTP request"),
        (&job, "\"render\""),
    ] {
        let why = world.why(project);
        assert_eq!(why["state"], "running", "{why}\n{}", world.log());
        assert!(why["reason"].as_str().unwrap().contains(used), "{why}");
        assert_eq!(why["warned"], false, "{why}");
    }
    let why = world.why(&tab);
    assert_eq!(why["state"], "running", "somebody may be reading: {why}");
    assert!(why["reason"].as_str().unwrap().contains("(a page is open, untouched"), "{why}");

    // The tab does not keep it for ever; one click does, for a while.
    let answer = until("the tab's warning", || {
        let answer = poll(&tab);
        answer.contains("cocalc-idle-stop: ").then_some(answer)
    });
    let left: u64 =
        answer.split("cocalc-idle-stop: ").nth(1).unwrap().split("\r\n").next().unwrap().parse().unwrap();
    assert!(left <= 8, "{answer}");
    assert!(world.why(&tab)["warned"] == true);
    let kept = world.ok("POST", &format!("/projects/{}/keep", tab.id), json!({ "for_secs": 7200 }));
    assert!(kept["keep_until"].is_string(), "{kept}");
    until("the end of the warning", || (!poll(&tab).contains("cocalc-idle-stop")).then_some(()));
    let why = world.why(&tab);
    assert!(why["reason"].as_str().unwrap().contains("is kept until 20"), "{why}");

    // Work ends, and so do they.
    working.store(false, Ordering::Relaxed);
    runtime.block_on(run_line(&job.way, "rm ~/.cocalc/jobs/render".to_owned()));
    runtime.block_on(run_line(&kernel.way, "touch ~/computed".to_owned()));
    assert!(uploading.join().unwrap().contains("200 OK"), "the upload came to its end");
    until("the stop of all", || {
        [&ssh, &kernel, &upload, &job].iter().all(|project| world.stopped(project)).then_some(())
    });
    assert!(terminal.join().unwrap().contains("will be stopped in"));
    assert!(world.runs(&tab), "it is kept");

    // What was promised outlives the daemon, and is taken back by command.
    world.kill("alpha");
    world.start("alpha");
    world.connected(1, 0);
    until("the host's word", || world.why(&tab)["keep_until"].is_string().then_some(()));
    world.ok("POST", &format!("/projects/{}/keep", tab.id), json!({ "for_secs": 0 }));
    until("its stop", || world.stopped(&tab).then_some(()));
}

#[test]
fn plans_bound_what_owners_wish_and_members_alone_may_keep() {
    let mut world = World::new("");
    world.add_host("alpha", "");
    world.connected(1, 0);
    let begun = world.ok("POST", "/projects", json!({ "name": "x" }));
    world.settle(&begun);
    let id = begun["project"]["id"].as_str().unwrap();
    let path = format!("/projects/{id}/idle");
    let set = |body: Value| world.call("PATCH", &path, body);
    assert_eq!(set(json!({ "timeout_secs": 600, "plan_secs": 3600 })).unwrap()["plan_secs"], 3600);
    assert_eq!(
        set(json!({ "timeout_secs": null })).unwrap(),
        json!({ "timeout_secs": null, "plan_secs": 3600, "keep_until": null })
    );
    assert!(set(json!({ "timeout_secs": 5 })).unwrap_err().contains("timeout_secs"));
    assert!(set(json!({ "timeout": 600 })).is_err());
    let keep = |body: Value| world.call("POST", &format!("/projects/{id}/keep"), body);
    assert!(keep(json!({ "for_secs": 999_999_999 })).unwrap_err().contains("for_secs"));
    assert!(keep(json!({})).is_err());
    let account = world.ok("POST", "/accounts", json!({ "name": "somebody" }));
    let account = account["id"].as_str().unwrap();
    let token = world.ok("POST", &format!("/accounts/{account}/tokens"), json!({}));
    let token = token["token"].as_str().unwrap().to_owned();
    let other = world::Api { url: world.url.clone(), token };
    let refused = other.call("POST", &format!("/projects/{id}/keep"), json!({ "for_secs": 60 }));
    assert!(refused.unwrap_err().contains("404"));
    let member = json!({ "account_id": account, "role": "viewer" });
    world.ok("POST", &format!("/projects/{id}/members"), member);
    let refused = other.call("POST", &format!("/projects/{id}/keep"), json!({ "for_secs": 60 }));
    assert!(refused.unwrap_err().contains("access_denied"));
}
