//! Signing out of one log-in, at the master: what was opened under it ends at
//! every host, and what was opened under another one does not.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod world;

use std::{
    io::{Read, Write},
    net::TcpStream,
};

use cocalc_core::{
    auth::Secret,
    runner::{Command as Run, ExecRequest, Process},
};
use cocalc_ssh::client::{Client, HostKeyCheck, Identity};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use world::{Api, LIMIT, Way, World, until, way};

/// The status of an answer, and the cookies that it sets.
fn ask(way: &Way, method: &str, path: &str, fields: &str) -> (u16, String) {
    // A host that was started again may not listen yet.
    let mut stream = until("a connection", || TcpStream::connect(way.http).ok());
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    write!(
        stream,
        "{method} /{}{path} HTTP/1.1\r\nHost: {}\r\nContent-Length: 0\r\nConnection: close\r\n{fields}\r\n",
        way.project, way.http
    )
    .unwrap();
    let mut text = Vec::new();
    stream.read_to_end(&mut text).unwrap();
    let text = String::from_utf8_lossy(&text).into_owned();
    let (head, _) = text.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let set = head.lines().filter_map(|line| {
        let (name, value) = line.split_once(": ")?;
        name.eq_ignore_ascii_case("set-cookie").then(|| value.split(';').next().unwrap())
    });
    (status, set.collect::<Vec<_>>().join("; "))
}

/// What somebody has open at a host: a browser's session, and a command over SSH.
struct Open {
    way: Way,
    cookie: String,
    process: Process,
    _client: Client,
}

impl Open {
    async fn new(api: &Api, project: &str) -> Self {
        let (own, id) = (api.clone(), project.to_owned());
        let way = tokio::task::spawn_blocking(move || way(&own, &id, 1)).await.unwrap();
        let bearer = format!("Authorization: Bearer {}\r\n", way.token);
        let (status, cookie) = ask(&way, "POST", "/.cocalc/session", &bearer);
        assert_eq!(status, 303);
        let identity = Identity::Token(Secret::new(way.token.clone()));
        let id = way.project.parse().unwrap();
        let client = Client::connect(&way.ssh, id, &identity, HostKeyCheck::Any).await.unwrap();
        let request = ExecRequest { command: Run::Line("cat".to_owned()), ..ExecRequest::default() };
        let process = client.exec(&request).await.unwrap();
        let mut open = Self { way, cookie, process, _client: client };
        assert_eq!(open.status(), 200);
        assert!(open.echoes().await);
        open
    }

    /// What the session opens: the project's files.
    fn status(&self) -> u16 {
        ask(&self.way, "GET", "/files/", &format!("Cookie: {}\r\n", self.cookie)).0
    }

    /// Whether the command still answers; if not, it has ended.
    async fn echoes(&mut self) -> bool {
        let stdin = &mut self.process.stdin;
        if stdin.write_all(b"hi\n").await.is_err() || stdin.flush().await.is_err() {
            return false;
        }
        let mut said = [0; 3];
        let read = tokio::time::timeout(LIMIT, self.process.stdout.read_exact(&mut said)).await.unwrap();
        read.is_ok() && &said == b"hi\n"
    }

    async fn ends(&mut self, what: &str) {
        until(what, || (self.status() == 403).then_some(()));
        let deadline = tokio::time::Instant::now() + LIMIT;
        while self.echoes().await {
            assert!(tokio::time::Instant::now() < deadline, "the command goes on: {what}");
        }
    }
}

#[test]
fn a_log_in_ends_at_every_host_and_alone() {
    let mut world = World::new("keepalive_ms = 500\n");
    for name in ["alpha", "beta"] {
        world.add_host(name, "");
    }
    world.connected(2, 0);
    let alice = world.ok("POST", "/accounts", json!({ "name": "alice" }));
    let id = alice["id"].as_str().unwrap().to_owned();
    let mut projects = Vec::new();
    for host in ["alpha", "beta"] {
        let begun = world.ok("POST", "/projects", json!({ "name": format!("on {host}"), "host": host }));
        world.settle(&begun);
        let project = begun["project"]["id"].as_str().unwrap().to_owned();
        world.settle(&world.ok("POST", &format!("/projects/{project}/start"), json!({})));
        world.ok("POST", &format!("/projects/{project}/members"), json!({ "account_id": id }));
        projects.push(project);
    }
    let log_in = |name: &str| {
        let token = world.ok("POST", &format!("/accounts/{id}/tokens"), json!({ "name": name }));
        Api { url: world.url.clone(), token: token["token"].as_str().unwrap().to_owned() }
    };
    let (laptop, library, phone) = (log_in("laptop"), log_in("library"), log_in("phone"));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let (mut here, mut there) = (Vec::new(), Vec::new());
        for project in &projects {
            here.push(Open::new(&laptop, project).await);
            there.push(Open::new(&library, project).await);
        }

        // Once every host has acknowledged it, nothing of the log-in is let in.
        let ended = tokio::task::block_in_place(|| library.call("POST", "/logout?wait=true", Value::Null));
        let receipt = &ended.as_ref().unwrap()["receipt"];
        let holders: Vec<_> =
            receipt["peers"].as_array().unwrap().iter().map(|peer| &peer["outcome"]).collect();
        assert_eq!(holders, ["acknowledged", "acknowledged"], "{ended:?}");
        for open in &mut there {
            assert_eq!(open.status(), 403);
            open.ends("what was opened in the library").await;
        }
        for open in &mut here {
            assert_eq!(open.status(), 200, "{}", world.log());
            assert!(open.echoes().await, "{}", world.log());
        }

        // A host that comes back knows it still.
        tokio::task::block_in_place(|| {
            world.kill("beta");
            world.start("beta");
            world.connected(2, 0);
        });
        until("the host", || (here[1].status() == 200).then_some(()));
        assert_eq!(there[1].status(), 403);

        // At a host a session ends for good, not only in the browser that asks.
        let (stolen, way) = (here[0].cookie.clone(), &here[0].way);
        let origin = format!("Origin: http://{}\r\nCookie: {stolen}\r\n", way.http);
        assert_eq!(ask(way, "DELETE", "/.cocalc/session", &origin).0, 204);
        assert_eq!(here[0].status(), 403);
        assert_eq!(here[1].status(), 200, "another project's");

        // The command line forgets what it ends, and says so.
        let cocalc = |arguments: &[&str]| {
            let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_cocalc"));
            command.args(arguments).env("XDG_CONFIG_HOME", world.dir.path().join("config"));
            command.env_remove("COCALC_URL").env_remove("COCALC_TOKEN");
            tokio::task::block_in_place(|| command.output().unwrap())
        };
        let login = ["login", "--url", &world.url, "--token", &phone.token];
        for _ in 0..2 {
            assert!(cocalc(&["account", "api-key", "list"]).status.code() == Some(2), "nobody is logged in");
            let in_again = cocalc(&login);
            if in_again.status.success() {
                assert!(cocalc(&["account", "api-key", "list"]).status.success());
                let out = cocalc(&["logout", "--wait"]);
                assert!(out.status.success(), "{out:?}");
            } else {
                assert_eq!(in_again.status.code(), Some(4), "it has ended: {in_again:?}");
            }
        }
        assert_eq!(here[1].status(), 200, "another log-in goes on");

        // A token that is taken away is a log-in that ends.
        let path = format!("/accounts/{id}/tokens");
        let all = tokio::task::block_in_place(|| world.ok("GET", &path, Value::Null));
        let all = all["tokens"].as_array().unwrap();
        let token = all.iter().find(|token| token["name"] == "laptop").unwrap()["id"].as_str().unwrap();
        tokio::task::block_in_place(|| world.ok("DELETE", &format!("{path}/{token}"), Value::Null));
        until("the last session", || (here[1].status() == 403).then_some(()));
    });
}
