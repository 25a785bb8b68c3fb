//! The project page: terminals on a real shell and a real pseudo-terminal, and
//! what else is below `/.cocalc/`.

use std::{net::SocketAddr, sync::Arc, sync::atomic::Ordering, time::Duration};

use cocalc_core::{
    activity::{Source, Warning},
    clock::{Clock, SystemClock},
    ids::Epoch,
    runner::{Command as Run, ExecRequest, Isolation, Limits, ProjectSpec, Runner},
};
use cocalc_podman::{ProcessRunner, Unenforceable};
use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::{net::TcpStream, time::timeout};
use tokio_tungstenite::{
    WebSocketStream, client_async,
    tungstenite::{self, Message, client::IntoClientRequest, protocol::frame::coding::CloseCode},
};

use crate::support::*;

/// A world whose project has processes.
struct Shells {
    world: World,
    runner: ProcessRunner,
    _dir: tempfile::TempDir,
}

impl Shells {
    async fn new() -> Self {
        let world = World::new().await;
        let dir = tempfile::tempdir().unwrap();
        let runner = ProcessRunner::open(dir.path().join("state"), Unenforceable::Accept).await.unwrap();
        let volume = dir.path().join("volume");
        std::fs::create_dir(&volume).unwrap();
        let spec = ProjectSpec {
            project: world.project,
            epoch: Epoch::FIRST,
            volume,
            image: None,
            slot: 0,
            limits: Limits::default(),
            env: [("PS1".to_owned(), "$ ".to_owned())].into(),
            isolation: Isolation::default(),
        };
        runner.start(&spec).await.unwrap();
        *world.ports.shells.lock().unwrap() = Some(Arc::new(runner.clone()));
        Self { world, runner, _dir: dir }
    }

    async fn terminal(&self, way: usize, rest: &str) -> Result<Screen, tungstenite::Error> {
        let (address, base, _) = self.world.ways()[way];
        let bearer = format!("Bearer {}", self.world.token());
        open(&self.world, address, base, rest, &[("authorization", &bearer)]).await
    }

    async fn end(self) {
        self.runner.remove(self.world.project).await.unwrap();
    }
}

async fn open(
    world: &World,
    address: SocketAddr,
    base: &str,
    rest: &str,
    fields: &[(&'static str, &str)],
) -> Result<Screen, tungstenite::Error> {
    let url = format!("ws://localhost:{}{base}/{}/.cocalc/terminal/{rest}", address.port(), world.project);
    let mut request = url.into_client_request().unwrap();
    for (name, value) in fields {
        request.headers_mut().append(*name, value.parse().unwrap());
    }
    let stream = TcpStream::connect(address).await.unwrap();
    let (socket, _) = timeout(DEADLINE, client_async(request, stream)).await.unwrap()?;
    Ok(Screen { socket, shown: Vec::new(), at: 0, said: Vec::new(), sees: true, close: None })
}

/// One who looks at a terminal.
struct Screen {
    socket: WebSocketStream<TcpStream>,
    shown: Vec<u8>,
    /// The place of the next byte.
    at: u64,
    said: Vec<Value>,
    /// Whether it says that it has seen what it was shown.
    sees: bool,
    close: Option<CloseCode>,
}

impl Screen {
    /// Takes the next message; whether there was one.
    async fn step(&mut self) -> bool {
        let message = timeout(DEADLINE * 3, self.socket.next()).await.expect("the terminal says nothing");
        match message {
            Some(Ok(Message::Binary(bytes))) => {
                self.at += bytes.len() as u64;
                self.shown.extend_from_slice(&bytes);
                if self.sees {
                    self.say(json!({ "seen": self.at })).await;
                }
            }
            Some(Ok(Message::Text(text))) => {
                let said: Value = serde_json::from_str(&text).unwrap();
                if let Some(at) = said.pointer("/hello/at").and_then(Value::as_u64) {
                    self.at = at;
                }
                self.said.push(said);
            }
            Some(Ok(Message::Close(frame))) => self.close = frame.map(|frame| frame.code),
            Some(Ok(_)) => {}
            Some(Err(_)) | None => return false,
        }
        true
    }

    async fn say(&mut self, what: Value) {
        // The far side may have ended it.
        let _ = self.socket.send(Message::text(what.to_string())).await;
    }

    async fn types(&mut self, text: &str) {
        self.socket.send(Message::binary(text.as_bytes().to_vec())).await.unwrap();
    }

    async fn until(&mut self, what: &str) {
        while !String::from_utf8_lossy(&self.shown).contains(what) {
            let shown = String::from_utf8_lossy(&self.shown).into_owned();
            assert!(self.step().await, "ended before {what:?}: {shown}");
        }
    }

    /// Until it is closed; returns the code.
    async fn ended(&mut self) -> Option<CloseCode> {
        while self.step().await {}
        self.close
    }

    async fn hello(&mut self) -> Value {
        loop {
            if let Some(hello) = self.said.iter().find_map(|said| said.get("hello")) {
                return hello.clone();
            }
            assert!(self.step().await);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shell_goes_on_when_its_connection_breaks() {
    let shells = Shells::new().await;
    for way in 0..2 {
        let mut screen = shells.terminal(way, &format!("t{way}?cols=101&rows=31")).await.unwrap();
        let hello = screen.hello().await;
        assert_eq!((&hello["at"], &hello["resumed"]), (&json!(0), &json!(false)));
        screen.types("stty size; kept=7; printf 'm\\303\\244rk-%s\\n' $((40+2))\r").await;
        screen.until("31 101").await;
        screen.until("märk-42").await;
        screen.say(json!({ "resize": { "cols": 90, "rows": 20 } })).await;
        screen.types("stty size\r").await;
        screen.until("20 90").await;
        screen.types("(until test -e go; do sleep 0.01; done; echo mean''while; rm go) &\r").await;
        screen.until("done;").await;
        let at = screen.at;
        // Nobody says goodbye.
        drop(screen);

        let mut other = shells.terminal(way, "other?").await.unwrap();
        other.types("touch go; until ! test -e go; do sleep 0.01; done; echo went''on\r").await;
        other.until("wenton").await;
        other.types("exit 3\r").await;
        assert_eq!(other.ended().await, Some(CloseCode::Normal));
        assert_eq!(other.said.last().unwrap()["ended"], json!({ "why": "exited", "code": 3 }));

        let id = hello["terminal"].as_str().unwrap();
        let mut again = shells.terminal(way, &format!("t{way}?terminal={id}&at={at}")).await.unwrap();
        let hello = again.hello().await;
        assert_eq!((&hello["at"], &hello["resumed"]), (&json!(at), &json!(true)));
        again.until("meanwhile").await;
        again.types("echo still-$kept\r").await;
        again.until("still-7").await;
        assert!(!String::from_utf8_lossy(&again.shown).contains("märk-42"), "what it has is not sent twice");
        // Somebody new sees all of it.
        let mut new = shells.terminal(way, &format!("t{way}")).await.unwrap();
        new.until("märk-42").await;
        new.until("still-7").await;
    }
    shells.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_waits_for_who_looks_and_can_be_stopped() {
    let shells = Shells::new().await;
    let mut screen = shells.terminal(0, "1").await.unwrap();
    screen.sees = false;
    screen.types("yes flooded\r").await;
    // It says nothing of having seen it, so the host sends no more than this.
    while screen.shown.len() < 128 * 1024 {
        assert!(screen.step().await);
    }
    let more = timeout(Duration::from_millis(300), screen.socket.next()).await;
    assert!(more.is_err(), "{:?}", more.map(|more| more.map(|more| more.map(|more| more.len()))));
    screen.types("\x03").await;
    screen.sees = true;
    screen.say(json!({ "seen": screen.at })).await;
    screen.types("echo al''ive\r").await;
    screen.until("alive").await;
    let skipped = screen.said.iter().any(|said| said.get("skipped").is_some());
    assert!(!skipped, "the only one who looks misses nothing");

    // Much that is typed at once goes through in pieces, with answers.
    screen.types("stty -echo -icanon; head -c 200000 | wc -c\r").await;
    screen.until("-icanon").await;
    for _ in 0..20 {
        screen.types(&"x".repeat(10_000)).await;
        let wanted = |said: &Value| said.get("taken").is_some();
        let before = screen.said.iter().filter(|said| wanted(said)).count();
        while screen.said.iter().filter(|said| wanted(said)).count() == before {
            assert!(screen.step().await);
        }
    }
    screen.until("200000").await;
    // Who does not wait is cut off.
    screen.types("sleep 1000\r").await;
    for _ in 0..40 {
        if screen.socket.send(Message::binary(vec![b'x'; 60_000])).await.is_err() {
            break;
        }
    }
    assert!(matches!(screen.ended().await, Some(CloseCode::Again) | None));
    shells.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn terminals_are_for_who_may_use_everything() {
    let shells = Shells::new().await;
    let world = &shells.world;
    for (address, base, _) in world.ways() {
        let bearer = format!("Bearer {}", world.token());
        let session = format!("http://localhost:{}{base}/{}/.cocalc/session", address.port(), world.project);
        let opened = curl(&["-i", "-X", "POST", "-H", &format!("Authorization: {bearer}"), &session]).await;
        let cookie = opened.lines().find_map(|line| line.strip_prefix("set-cookie: ")).unwrap();
        let cookie = cookie.split(';').next().unwrap();
        let here = format!("http://localhost:{}", address.port());
        for (fields, expected) in [
            (vec![("cookie", cookie), ("origin", &*here)], true),
            (vec![("cookie", cookie)], false),
            (vec![("cookie", cookie), ("origin", "http://evil.example")], false),
            (vec![("authorization", &*bearer), ("origin", "http://evil.example")], false),
            (vec![], false),
        ] {
            let opened = open(world, address, base, "1", &fields).await;
            assert_eq!(opened.is_ok(), expected, "{fields:?}");
        }
        // A page of another site cannot sign anybody out.
        let head = |origin: &str| format!("Origin: {origin}");
        let forgets = async |origin: &str| {
            let header = head(origin);
            curl(&["-i", "-X", "DELETE", "-H", &header, "-b", cookie, &session]).await
        };
        assert!(forgets("http://evil.example").await.starts_with("HTTP/1.1 403 "));
        let forgotten = forgets(&here).await;
        assert!(forgotten.starts_with("HTTP/1.1 204 ") && forgotten.contains("=; Path="), "{forgotten}");
        assert!(forgotten.contains("Max-Age=0"), "{forgotten}");
    }
    let mut watched = shells.terminal(1, "1").await.unwrap();
    watched.hello().await;
    world.auth.viewers.store(true, Ordering::Relaxed);
    let status = |opened: Result<Screen, tungstenite::Error>| match opened {
        Err(tungstenite::Error::Http(response)) => response.status().as_u16(),
        Err(error) => panic!("{error}"),
        Ok(_) => 101,
    };
    assert_eq!(status(shells.terminal(0, "1").await), 403, "a viewer has no shell");
    let bearer = format!("Authorization: Bearer {}", world.token());
    let own = |rest: &str| {
        let port = world.host_address.port();
        format!("http://localhost:{port}/{}/.cocalc/{rest}", world.project)
    };
    for (method, rest) in [("GET", "ports"), ("GET", "terminals"), ("POST", "stay"), ("DELETE", "terminal/1")]
    {
        let answer = curl(&["-i", "-X", method, "-H", &bearer, &own(rest)]).await;
        assert!(answer.starts_with("HTTP/1.1 403 "), "{rest}: {answer}");
    }
    let page = curl(&["-H", "Accept: text/html", "-H", &bearer, &own("../")]).await;
    assert!(page.contains("data-terminals=\"no\""), "{page}");
    world.auth.viewers.store(false, Ordering::Relaxed);

    for name in ["A", "a%2fb", "", "a/b", &"x".repeat(33)] {
        assert_eq!(status(shells.terminal(0, name).await), 404, "{name:?}");
    }
    let mut all = Vec::new();
    for number in 0..15 {
        all.push(shells.terminal(0, &format!("n{number}")).await.unwrap());
    }
    assert_eq!(status(shells.terminal(0, "onemore").await), 429);
    let listed = curl(&["-H", &bearer, &own("terminals")]).await;
    let listed: Value = serde_json::from_str(&listed).unwrap();
    assert_eq!(listed["terminals"].as_array().unwrap().len(), 16, "{listed}");
    assert!(listed["terminals"].as_array().unwrap().contains(&json!({ "name": "n3", "looking": 1 })));
    let ended = curl(&["-i", "-X", "DELETE", "-H", &bearer, &own("terminal/n3")]).await;
    assert!(ended.starts_with("HTTP/1.1 204 "), "{ended}");
    assert_eq!(all[3].ended().await, Some(CloseCode::Normal));
    let ended = curl(&["-i", "-X", "DELETE", "-H", &bearer, &own("terminal/n3")]).await;
    assert!(ended.starts_with("HTTP/1.1 404 "), "{ended}");
    shells.terminal(0, "onemore").await.unwrap();

    // Through the proxy, and at once.
    world.auth.revoke();
    assert_eq!(watched.ended().await, Some(CloseCode::Policy));
    assert_eq!(all[0].ended().await, Some(CloseCode::Policy));
    shells.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_starts_no_project_and_says_that_it_has_stopped() {
    let shells = Shells::new().await;
    let mut screen = shells.terminal(0, "1").await.unwrap();
    screen.types("echo he''re\r").await;
    screen.until("here").await;
    *shells.world.ports.running.lock().unwrap() = false;
    shells.runner.stop(shells.world.project, Duration::from_secs(5)).await.unwrap();
    assert_eq!(screen.ended().await, Some(CloseCode::Normal));
    assert_eq!(screen.said.last().unwrap()["ended"], json!({ "why": "stopped" }));
    match shells.terminal(0, "1").await {
        Err(tungstenite::Error::Http(response)) => assert_eq!(response.status(), 503),
        _ => panic!("a terminal in a stopped project"),
    }
    let bearer = format!("Authorization: Bearer {}", shells.world.token());
    let port = shells.world.host_address.port();
    let url = format!("http://localhost:{port}/{}/.cocalc/status", shells.world.project);
    let status: Value = serde_json::from_str(&curl(&["-H", &bearer, &url]).await).unwrap();
    assert_eq!(status["state"], "stopped", "{status}");
    assert_eq!(*shells.world.wake.calls.lock().unwrap(), 0);
    shells.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_and_its_files_are_served_on_both_ways() {
    let shells = Shells::new().await;
    let world = &shells.world;
    let token = token(world.project, json!({ "emb": "https://master.example" }));
    let bearer = format!("Authorization: Bearer {token}");
    for (address, base, domain) in world.ways() {
        let by_path = format!("localhost:{}{base}/{}", address.port(), world.project);
        let by_name = format!("{}.{domain}.localhost:{}", world.project, address.port());
        let resolve = format!("{}.{domain}.localhost:{}:127.0.0.1", world.project, address.port());
        for here in [by_path, by_name] {
            let get = async |rest: &str| {
                let url = format!("http://{here}/{rest}");
                curl(&["-i", "--resolve", &resolve, "-H", "Accept: text/html", "-H", &bearer, &url]).await
            };
            let page = get("").await;
            assert!(page.contains(&format!("script-src http://{here}/.cocalc/assets/;")), "{page}");
            assert!(page.contains("frame-ancestors 'self' https://master.example"), "{page}");
            assert!(page.contains("data-embedder=\"https://master.example\""), "{page}");
            assert!(page.contains("data-terminals=\"yes\""), "{page}");
            let script = page.split("src=\"").nth(1).unwrap().split('"').next().unwrap();
            let file = get(script).await;
            assert!(file.starts_with("HTTP/1.1 200 ") && file.contains("immutable"), "{script}");
            assert!(file.contains("content-type: text/javascript"), "{script}");
            let old = get(".cocalc/assets/xterm.LICENSE?v=old").await;
            assert!(old.contains("no-cache") && old.contains("Permission is hereby granted"), "{old}");
            assert!(get(".cocalc/assets/nothing.js").await.starts_with("HTTP/1.1 404 "));
        }
    }
    let port = world.host_address.port();
    let url = format!("http://localhost:{port}/{}/.cocalc/ports", world.project);
    let ports: Value = serde_json::from_str(&curl(&["-H", &bearer, &url]).await).unwrap();
    assert!(ports["ports"].as_array().unwrap().contains(&json!(world.app.port)), "{ports}");
    let nobody =
        curl(&["-i", &format!("http://localhost:{port}/{}/.cocalc/assets/page.js", world.project)]).await;
    assert!(nobody.starts_with("HTTP/1.1 401 "), "{nobody}");
    shells.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_types_works_and_is_warned_before_an_idle_project_stops() {
    let shells = Shells::new().await;
    let (world, project) = (&shells.world, shells.world.project);
    let mut screen = shells.terminal(0, "1").await.unwrap();
    screen.types("(until test -e go; do sleep 0.01; done; echo sho''wn) &\r").await;
    screen.until("done;").await;
    eventually("what was typed is work", || {
        world.meters.take(project).work.iter().any(|(source, _)| *source == Source::WebSocket)
    })
    .await;
    // What the shell shows by itself, and a page that looks how the project
    // does, is no work.
    let other = ExecRequest { command: Run::Line("touch go".to_owned()), ..ExecRequest::default() };
    let mut other = shells.runner.exec(project, other).await.unwrap();
    other.handle.wait().await.unwrap();
    screen.until("shown").await;
    let bearer = format!("Authorization: Bearer {}", world.token());
    let own = format!("http://localhost:{}/{project}/.cocalc", world.host_address.port());
    curl(&["-H", &bearer, &format!("{own}/status")]).await;
    screen.say(json!({ "resize": { "cols": 90, "rows": 20 } })).await;
    let noted = world.meters.take(project);
    assert!(noted.work.is_empty() && !noted.presence.is_empty(), "{noted:?}");

    let at = SystemClock.boot() + Duration::from_secs(300);
    world.meters.warn(project, Some(Warning { at, text: "It is idle.".to_owned() }));
    let idle = |screen: &Screen| screen.said.iter().rev().find_map(|said| said.get("idle").cloned());
    while idle(&screen).is_none() {
        assert!(screen.step().await);
    }
    let warned = idle(&screen).unwrap();
    assert_eq!(warned["text"], "It is idle.");
    assert!((200..=300).contains(&warned["secs"].as_u64().unwrap()), "{warned}");
    let status: Value =
        serde_json::from_str(&curl(&["-H", &bearer, &format!("{own}/status")]).await).unwrap();
    assert!(status["idle_stop_secs"].as_u64().is_some(), "{status}");
    // One click is enough.
    curl(&["-X", "POST", "-H", &bearer, &format!("{own}/stay")]).await;
    assert_eq!(world.meters.take(project).work.len(), 1);
    world.meters.warn(project, None);
    while idle(&screen) != Some(Value::Null) {
        assert!(screen.step().await);
    }
    shells.end().await;
}
