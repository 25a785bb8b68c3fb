//! The master as its operator runs it: a process with a configuration file.

#![allow(clippy::unwrap_used, reason = "a test fails by it, in its helpers too")]

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(30);

fn until<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(value) = done() {
            return value;
        }
        assert!(Instant::now() < deadline, "not within {LIMIT:?}: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The program, without this process's own settings.
fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cocalc-master"));
    for (key, _) in std::env::vars_os().filter(|(key, _)| key.to_string_lossy().starts_with("COCALC_")) {
        command.env_remove(key);
    }
    command
}

/// A port that was free a moment ago.
fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A running master; killed when it goes out of scope.
struct Process {
    child: Child,
    address: SocketAddr,
    data: PathBuf,
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Process {
    fn start(config: &Path, port: u16, data: &Path) -> Self {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(data.with_extension("log"));
        let child = program()
            .arg("--config")
            .arg(config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log.unwrap())
            .spawn()
            .unwrap();
        let address = ([127, 0, 0, 1], port).into();
        let mut process = Self { child, address, data: data.to_owned() };
        until("the master is ready", || {
            let ended = process.child.try_wait().unwrap();
            assert_eq!(ended, None, "{}", process.log());
            let answer = process.call("GET", "/readyz", "", Value::Null);
            answer.is_some_and(|(status, _)| status == 200).then_some(())
        });
        process
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.data.with_extension("log")).unwrap()
    }

    fn admin(&self) -> String {
        std::fs::read_to_string(self.data.join("admin-token")).unwrap().trim().to_owned()
    }

    fn call(&self, method: &str, path: &str, token: &str, body: Value) -> Option<(u16, Value)> {
        self.call_with(method, path, token, body, None)
    }

    fn call_with(
        &self,
        method: &str,
        path: &str,
        token: &str,
        body: Value,
        key: Option<&str>,
    ) -> Option<(u16, Value)> {
        let text = if body.is_null() { String::new() } else { body.to_string() };
        let mut request = http::Request::builder()
            .method(method)
            .uri(format!("http://{}{path}", self.address))
            .header("authorization", format!("Bearer {token}"));
        if let Some(key) = key {
            request = request.header("idempotency-key", key);
        }
        let request = request.body(text).unwrap();
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .allow_non_standard_methods(true)
            .timeout_global(Some(LIMIT))
            .build();
        let mut response = ureq::Agent::from(config).run(request).ok()?;
        let text = response.body_mut().read_to_string().ok()?;
        let value = serde_json::from_str(&text).unwrap_or(Value::String(text));
        Some((response.status().as_u16(), value))
    }

    fn ok(&self, method: &str, path: &str, body: Value) -> Value {
        let (status, answer) = self.call(method, &format!("/api/v1{path}"), &self.admin(), body).unwrap();
        assert!((200..300).contains(&status), "{method} {path}: {status} {answer}");
        answer
    }

    fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args([name, &pid]).status().unwrap().success());
    }

    fn ended(&mut self) -> std::process::ExitStatus {
        until("the process ends", || self.child.try_wait().unwrap())
    }
}

fn config(dir: &Path, port: u16, more: &str) -> PathBuf {
    let file = dir.join("master.toml");
    let data = dir.join("data");
    std::fs::write(&file, format!("listen = '127.0.0.1:{port}'\ndata_dir = '{}'\n{more}", data.display()))
        .unwrap();
    file
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

#[test]
fn configuration_is_checked_before_anything_is_opened() {
    let dir = tempfile::tempdir().unwrap();
    let check = |more: &str, vars: &[(&str, &str)]| {
        let file = config(dir.path(), 0, more);
        let output = program()
            .arg("--config")
            .arg(file)
            .arg("--check-config")
            .envs(vars.iter().copied())
            .output()
            .unwrap();
        (output.status.code(), said(&output))
    };
    let good = check("", &[]);
    assert_eq!(good.0, Some(0), "{good:?}");
    for (more, vars, key) in [
        ("leese_ms = 100", &[][..], "leese_ms"),
        ("lease_ms = 'long'", &[], "lease_ms"),
        ("lease_ms = 100", &[], "lease_ms"),
        ("public_url = 'ftp://x'", &[], "public_url"),
        ("", &[("COCALC_MASTER_LEASE_MS", "1")], "lease_ms"),
        ("", &[("COCALC_MASTER_LEESE_MS", "60000")], "leese_ms"),
        ("", &[("COCALC_MASTER_LISTEN", "nowhere")], "listen"),
        ("listen = [", &[], "listen"),
    ] {
        let (code, text) = check(more, vars);
        assert_eq!(code, Some(2), "{more} {vars:?}: {text}");
        assert!(text.contains(key), "{more} {vars:?}: {text}");
    }
    // The environment wins over the file.
    assert_eq!(check("lease_ms = 100", &[("COCALC_MASTER_LEASE_MS", "60000")]).0, Some(0));
    assert_eq!(check("", &[("COCALC_HOST_LEESE_MS", "1")]).0, Some(0), "another daemon's key");

    for arguments in [&["--config", "/nowhere/master.toml"][..], &["--confg"], &["--config"], &[]] {
        let output = program().args(arguments).current_dir(dir.path()).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", said(&output));
    }
    let version = program().arg("--version").output().unwrap();
    assert!(version.status.success());
    assert_eq!(said(&version).trim(), format!("cocalc-master {}", env!("CARGO_PKG_VERSION")));
    assert!(!dir.path().join("data").exists(), "nothing was opened");

    // Not a matter of configuration: 1, and the chain of reasons.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let file = config(dir.path(), taken.local_addr().unwrap().port(), "");
    let output = program().arg("--config").arg(file).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(said(&output).contains("cannot listen on"), "{}", said(&output));
}

#[test]
fn one_address_takes_no_more_than_its_share() {
    let dir = tempfile::tempdir().unwrap();
    let port = free_port();
    let file = config(dir.path(), port, "connections_per_address_max = 3\n");
    let master = Process::start(&file, port, &dir.path().join("data"));
    let open = || {
        let mut stream = TcpStream::connect(master.address).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        // Refused ones are closed, and may be so before this is written.
        let _ = stream.write_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n");
        let mut head = [0; 12];
        (stream.read_exact(&mut head).is_ok() && head == *b"HTTP/1.1 200").then_some(stream)
    };
    // Those of the start may not be gone yet.
    let mut held: Vec<_> = (0..3).map(|_| until("a place", open)).collect();
    assert!(open().is_none(), "one too many");
    held.pop();
    until("a place is free again", open);
}

#[test]
fn what_was_answered_survives_every_end_of_the_process() {
    let dir = tempfile::tempdir().unwrap();
    let (port, data) = (free_port(), dir.path().join("data"));
    let file = config(dir.path(), port, "");
    let mut master = Process::start(&file, port, &data);
    let admin = master.admin();
    let account = master.ok("POST", "/accounts", json!({ "name": "somebody" }));
    let id = account["id"].as_str().unwrap().to_owned();
    let token = master.ok("POST", &format!("/accounts/{id}/tokens"), json!({}))["token"].clone();
    let token = token.as_str().unwrap();
    let join = master.ok("POST", "/join-tokens", json!({ "kind": "host" }))["token"].clone();
    let key = cocalc_auth::identity::Identity::generate().unwrap();
    let identity = key.public_key().to_string();
    let address =
        json!({ "url": "http://x", "domain": "", "ssh": "x:22", "peer": "x:1", "identity": identity });
    let signed = format!("cocalc-join-2 {} alpha {identity} http://x x:22 x:1", join.as_str().unwrap());
    let proof = URL_SAFE_NO_PAD.encode(key.sign(signed.as_bytes()));
    let joining = json!({
        "token": join, "name": "alpha", "identity": identity, "address": address, "proof": proof,
    });
    let joined = master.ok("POST", "/hosts/join", joining);
    let keys = master.call("GET", "/.well-known/jwks.json", "", Value::Null).unwrap();

    // One process for one directory.
    let second =
        program().arg("--config").arg(&file).env("COCALC_MASTER_LISTEN", "127.0.0.1:0").output().unwrap();
    assert_eq!(second.status.code(), Some(1), "{}", said(&second));
    assert!(said(&second).contains("data directory"), "{}", said(&second));

    // Somebody who only listens does not hold up the end.
    let mut idle = TcpStream::connect(master.address).unwrap();
    idle.write_all(b"GET /healthz HT").unwrap();
    master.signal("-TERM");
    assert_eq!(master.ended().code(), Some(0), "{}", master.log());
    drop(master);

    let mut master = Process::start(&file, port, &data);
    assert_eq!(master.ok("GET", &format!("/accounts/{id}"), Value::Null), account);
    // Killed while somebody writes: what was answered is there afterwards, and
    // what was not is there once when the call is repeated.
    let write = |master: &Process, name: &str| {
        master.call_with("POST", "/api/v1/accounts", &admin, json!({ "name": name }), Some(name))
    };
    let listed = |master: &Process| -> Vec<Value> {
        master.ok("GET", "/accounts?limit=1000", Value::Null)["accounts"].as_array().unwrap().clone()
    };
    let mut made: Vec<Value> = Vec::new();
    for round in 0..4 {
        let unanswered = std::thread::scope(|scope| {
            let (master, made) = (&master, &mut made);
            let before = listed(master).len();
            let writer = scope.spawn(move || {
                (0..)
                    .map(|number| format!("writer {round} {number}"))
                    .find(|name| match write(master, name) {
                        Some((201, account)) => {
                            made.push(account);
                            false
                        }
                        Some(other) => panic!("{other:?}"),
                        None => true,
                    })
                    .unwrap()
            });
            until("some are there", || (listed(master).len() > before + 5).then_some(()));
            master.signal("-KILL");
            writer.join().unwrap()
        });
        assert_eq!(master.ended().signal(), Some(9));
        master = Process::start(&file, port, &data);
        let found = listed(&master);
        for account in &made {
            assert!(found.contains(account), "{account} is gone");
        }
        let (status, account) = write(&master, &unanswered).unwrap();
        assert_eq!(status, 201, "{account}");
        let of_name = listed(&master).into_iter().filter(|account| account["name"] == unanswered);
        assert_eq!(of_name.collect::<Vec<_>>(), std::slice::from_ref(&account));
        // Asked again, all are answered as the first time.
        made.push(account);
        for account in &made {
            let again = write(&master, account["name"].as_str().unwrap()).unwrap();
            assert_eq!((again.0, &again.1), (201, account));
        }
    }
    assert_eq!(master.admin(), admin);
    assert_eq!(master.call("GET", "/api/v1/account", token, Value::Null).unwrap().1["id"], id);
    assert_eq!(master.ok("GET", "/hosts/alpha", Value::Null)["id"], joined["host_id"]);
    assert_eq!(master.call("GET", "/.well-known/jwks.json", "", Value::Null).unwrap(), keys);

    master.signal("-INT");
    assert_eq!(master.ended().code(), Some(0), "{}", master.log());
    assert!(!master.log().contains(token), "a token is in the log");
    assert!(!master.log().contains("panicked"), "{}", master.log());
}

/// Everything that comes until the connection ends.
fn rest(mut stream: TcpStream) -> Vec<u8> {
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let mut answer = Vec::new();
    let mut part = [0; 4096];
    loop {
        match stream.read(&mut part) {
            Ok(0) => return answer,
            Ok(count) => answer.extend_from_slice(&part[..count]),
            Err(error) => match error.kind() {
                std::io::ErrorKind::ConnectionReset | std::io::ErrorKind::BrokenPipe => return answer,
                _ => panic!("the connection is still open: {error}"),
            },
        }
    }
}

#[test]
fn bad_input_ends_its_own_connection_and_harms_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let (port, data) = (free_port(), dir.path().join("data"));
    let mut master = Process::start(&config(dir.path(), port, ""), port, &data);
    let connect = || TcpStream::connect(master.address).unwrap();
    // Somebody who uses it meanwhile, on a connection that stays.
    let admin = master.admin();
    let mut user = connect();
    user.set_read_timeout(Some(LIMIT)).unwrap();
    let mut works = |when: &str| {
        let head =
            format!("GET /api/v1/account HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {admin}\r\n\r\n");
        user.write_all(head.as_bytes()).unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"}") {
            let mut part = [0; 4096];
            let count = user.read(&mut part).unwrap();
            assert_ne!(count, 0, "{when}: the user's connection ended");
            answer.extend_from_slice(&part[..count]);
        }
        assert!(answer.starts_with(b"HTTP/1.1 200"), "{when}: {}", String::from_utf8_lossy(&answer));
    };
    works("before");

    let handshake = "GET /conat/?EIO=4&transport=websocket HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\n\
        upgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n";
    // Silent ones: half a head, half a handshake, half a body, and a whole
    // handshake without a sign-in. They are ended while the rest of this test
    // goes on.
    let slow: Vec<(&str, TcpStream)> = [
        "",
        "GET /api/v1/proj",
        "GET /conat/?EIO=4 HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\n",
        "POST /api/v1/hosts/join HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{\"token\"",
        handshake,
    ]
    .into_iter()
    .map(|text| {
        let mut stream = connect();
        stream.write_all(text.as_bytes()).unwrap();
        (text, stream)
    })
    .collect();

    // Not random, so that it is the same tomorrow.
    let noise: Vec<u8> = (0..100_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    for (what, bytes) in [
        ("noise", noise),
        ("a TLS hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".repeat(20)),
        ("an SSH banner", b"SSH-2.0-OpenSSH_9.2\r\n\r\n".to_vec()),
        ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec()),
        ("no version", b"GET /\r\n\r\n".to_vec()),
        (
            "two lengths",
            b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nx".to_vec(),
        ),
        ("a null in a header", b"GET / HTTP/1.1\r\nhost: x\r\na: b\0c\r\n\r\n".to_vec()),
    ] {
        let mut stream = connect();
        // It may be closed before all is written.
        let _ = stream.write_all(&bytes);
        let answer = rest(stream);
        assert!(
            answer.is_empty() || answer.starts_with(b"HTTP/1.1 4"),
            "{what}: {}",
            String::from_utf8_lossy(&answer)
        );
        works(what);
    }

    // Heads without end: one header of 10 MB, a target, many headers.
    let line = "a".repeat(10 << 20);
    let many = "x-a: b\r\n".repeat(200_000);
    for head in [
        format!("GET /healthz HTTP/1.1\r\nhost: x\r\nbig: {line}\r\n\r\n"),
        format!("GET /{line} HTTP/1.1\r\nhost: x\r\n\r\n"),
        format!("GET /healthz HTTP/1.1\r\nhost: x\r\n{many}\r\n"),
    ] {
        let mut stream = connect();
        let refused = stream.write_all(head.as_bytes()).is_err();
        let answer = rest(stream);
        assert!(refused || answer.starts_with(b"HTTP/1.1 4"), "{}", String::from_utf8_lossy(&answer));
        works("a head without end");
    }
    // A body over the limit is refused by its announcement or its bytes.
    let large = "x".repeat(1 << 20);
    let answer = master.call("POST", "/api/v1/hosts/join", "", Value::String(large));
    // The connection may end while the client still writes.
    assert!(answer.is_none_or(|(status, answer)| status == 413 && answer["code"] == "too_large"));
    works("a large body");

    // A bus client that speaks no protocol.
    let mut stream = connect();
    stream.write_all(handshake.as_bytes()).unwrap();
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 101", "{}", String::from_utf8_lossy(&answer));
    // A masked frame that announces 2^62 bytes.
    let _ = stream.write_all(b"\x82\xff\x40\0\0\0\0\0\0\0\x01\x02\x03\x04garbage");
    rest(stream);
    works("a frame over the limit");

    for (text, stream) in slow {
        let answer = rest(stream);
        let ended = answer.is_empty() || answer.starts_with(b"HTTP/1.1 4") || text == handshake;
        assert!(ended, "{text:?}: {}", String::from_utf8_lossy(&answer));
    }
    let last = master.call("GET", "/api/v1/account", &admin, Value::Null).unwrap();
    assert_eq!(last.0, 200, "{last:?}");
    assert_eq!(master.child.try_wait().unwrap(), None, "{}", master.log());
    assert!(!master.log().contains("panicked"), "{}", master.log());
}
