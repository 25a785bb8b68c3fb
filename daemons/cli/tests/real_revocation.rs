//! Revocation with real processes: a master, three hosts, a thousand WebSockets
//! and a hundred SSH sessions of two hundred accounts. Keys rotate under load,
//! fifty collaborators are removed, and then the master is killed.
//!
//! Storage is plain directories and projects are plain processes: what is shown
//! is the control plane, and a thousand sockets need no containers.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod world;

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use cocalc_core::{
    auth::Secret,
    runner::{Command as Run, ExecRequest},
};
use cocalc_ssh::client::{Client, HostKeyCheck, Identity};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, tcp::OwnedWriteHalf},
    task::{JoinHandle, JoinSet},
};
use world::{Api, LIMIT, Way, World, free_port, run_line, start_app, until, waits_for, way};

const ACCOUNTS: usize = if FULL { 200 } else { 40 };
const SOCKETS_EACH: usize = if FULL { 5 } else { 2 };
const SSH_SESSIONS: usize = ACCOUNTS / 2;
const REMOVED: usize = ACCOUNTS / 4;
/// A thousand WebSockets, when built with `COCALC_REVOCATION_FULL` set.
const FULL: bool = option_env!("COCALC_REVOCATION_FULL").is_some();
const HOSTS: usize = 3;
const PROJECTS: usize = 12;
/// The master's timing: ten minutes of grace, sixty times as fast.
const LEASE: Duration = Duration::from_secs(3);
const GRACE: Duration = Duration::from_secs(10);

/// Something of an account's that is open.
struct Open {
    account: usize,
    kind: &'static str,
    /// Resolves when it was closed.
    closed: JoinHandle<Instant>,
    is_closed: Arc<AtomicBool>,
    /// Of WebSockets: to talk to the app, and what it has answered.
    talk: Option<(OwnedWriteHalf, Arc<AtomicUsize>)>,
    /// Of streams: who says that no more comes is taken for gone.
    _write: Option<OwnedWriteHalf>,
    _session: Option<Client>,
}

/// Each account has an address of its own, as users do.
fn source(account: usize) -> SocketAddr {
    let low = u8::try_from(account).unwrap();
    (Ipv4Addr::new(127, 1, 0, low), 0).into()
}

/// Sends a request of an account, and reads the head of the answer.
async fn request(account: usize, way: &Way, path: &str, upgrade: bool) -> (tokio::net::TcpStream, String) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(source(account)).unwrap();
    let mut stream = socket.connect(way.http).await.unwrap();
    let Way { project, port, token, http, .. } = way;
    let mut text = format!(
        "GET /{project}/port/{port}{path} HTTP/1.1\r\nHost: {http}\r\nAuthorization: Bearer {token}\r\n"
    );
    if upgrade {
        text.push_str(
            "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
             Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n",
        );
    }
    text.push_str("\r\n");
    stream.write_all(text.as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => break,
        }
    }
    (stream, String::from_utf8_lossy(&head).into_owned())
}

fn status(head: &str) -> u16 {
    head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0)
}

async fn open_http(account: usize, way: &Way, upgrade: bool) -> Open {
    let (path, expected) = if upgrade { ("/", 101) } else { ("/stream", 200) };
    let deadline = Instant::now() + LIMIT;
    let (stream, head) = loop {
        let (stream, head) = request(account, way, path, upgrade).await;
        // The process runner looks through /proc for each connection, which may
        // take longer than the host waits on a busy machine.
        if status(&head) != 504 || Instant::now() > deadline {
            break (stream, head);
        }
    };
    assert_eq!(status(&head), expected, "account {account}: {head}");
    let (mut read, write) = stream.into_split();
    let (answers, is_closed) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let (count, flag) = (answers.clone(), is_closed.clone());
    let closed = tokio::spawn(async move {
        let mut bytes = [0; 1024];
        while matches!(read.read(&mut bytes).await, Ok(got) if got > 0) {
            count.fetch_add(1, Ordering::SeqCst);
        }
        flag.store(true, Ordering::SeqCst);
        Instant::now()
    });
    let (talk, kept) = if upgrade { (Some((write, answers)), None) } else { (None, Some(write)) };
    let kind = if upgrade { "websocket" } else { "stream" };
    Open { account, kind, closed, is_closed, talk, _write: kept, _session: None }
}

async fn open_ssh(account: usize, way: &Way, command: Run) -> Open {
    let identity = Identity::Token(Secret::new(way.token.clone()));
    let project = way.project.parse().unwrap();
    let client = Client::connect(&way.ssh, project, &identity, HostKeyCheck::Any).await.unwrap();
    let kind = if matches!(command, Run::Sftp) { "sftp" } else { "ssh" };
    let request = ExecRequest { command, ..ExecRequest::default() };
    let process = client.exec(&request).await.unwrap();
    let is_closed = Arc::new(AtomicBool::new(false));
    let flag = is_closed.clone();
    let closed = tokio::spawn(async move {
        let mut bytes = [0; 256];
        // The whole of it: without its input and its handle it would end.
        let mut process = process;
        while matches!(process.stdout.read(&mut bytes).await, Ok(got) if got > 0) {}
        flag.store(true, Ordering::SeqCst);
        Instant::now()
    });
    Open { account, kind, closed, is_closed, talk: None, _write: None, _session: Some(client) }
}

async fn api(world: &World, method: &'static str, path: String, body: Value) -> Value {
    let api = world.api();
    let call =
        tokio::task::spawn_blocking(move || api.call(method, &path, body).map_err(|error| (path, error)));
    call.await.unwrap().unwrap_or_else(|(path, error)| panic!("{method} {path}: {error}\n{}", world.log()))
}

fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    sorted[(sorted.len() * percent / 100).min(sorted.len() - 1)]
}

#[test]
fn revocation_is_exact_and_bounded_with_real_processes() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let mut world = World::new(&format!(
        "keepalive_ms = 500\nlease_ms = {}\ngrace_ms = {}\n",
        LEASE.as_millis(),
        GRACE.as_millis()
    ));
    for number in 0..HOSTS {
        world.add_host(&format!("host{number}"), "");
    }
    world.connected(HOSTS, 0);
    runtime.block_on(scenario(&mut world));
}

async fn scenario(world: &mut World) {
    let began = Instant::now();
    let projects = tokio::task::block_in_place(|| make_projects(world));
    start_apps(world, &projects).await;
    let users = Arc::new(Mutex::new(Vec::new()));
    tokio::task::block_in_place(|| make_accounts(world, &projects, &users));
    let mut users: Vec<(usize, String, String, Way)> = std::mem::take(&mut users.lock().unwrap());
    users.sort_by_key(|(account, ..)| *account);
    println!("{ACCOUNTS} accounts in {PROJECTS} projects on {HOSTS} hosts after {:?}", began.elapsed());

    rotate_under_load(world, &users).await;
    refresh_tokens(world, &mut users).await;

    let mut open: Vec<Open> = Vec::new();
    for chunk in users.chunks(4) {
        let mut tasks = JoinSet::new();
        for (account, _, _, way) in chunk {
            let (account, way) = (*account, way.clone());
            tasks.spawn(async move {
                let mut open = Vec::new();
                for _ in 0..SOCKETS_EACH {
                    open.push(open_http(account, &way, true).await);
                }
                if account.is_multiple_of(20) {
                    open.push(open_http(account, &way, false).await);
                    open.push(open_ssh(account, &way, Run::Sftp).await);
                }
                if account < SSH_SESSIONS {
                    open.push(open_ssh(account, &way, Run::Line("cat".to_owned())).await);
                }
                open
            });
        }
        while let Some(opened) = tasks.join_next().await {
            open.extend(opened.unwrap());
        }
    }
    let count = |kind: &str| open.iter().filter(|open| open.kind == kind).count();
    println!(
        "open: {} WebSockets, {} SSH sessions, {} sftp, {} streams",
        count("websocket"),
        count("ssh"),
        count("sftp"),
        count("stream")
    );
    assert_eq!((count("websocket"), count("ssh")), (ACCOUNTS * SOCKETS_EACH, SSH_SESSIONS));
    let early = open.iter().filter(|open| open.is_closed.load(Ordering::SeqCst));
    let early: Vec<_> = early.map(|open| (open.account, open.kind)).collect();
    assert!(early.is_empty(), "closed before anything was revoked: {early:?}");

    let mut open = remove_collaborators(world, &users, open).await;
    everyone_else_goes_on(&mut open).await;
    without_the_master(world, &users, open).await;
}

/// In each project the app.
async fn start_apps(world: &World, projects: &[(String, u16)]) {
    for (project, port) in projects {
        let (api, project, port) = (world.api(), project.clone(), *port);
        let way = tokio::task::spawn_blocking(move || way(&api, &project, port)).await.unwrap();
        start_app(world, &way, None).await;
    }
}

fn make_projects(world: &World) -> Vec<(String, u16)> {
    let mut begun = Vec::new();
    for number in 0..PROJECTS {
        let host = format!("host{}", number % HOSTS);
        begun.push(world.ok("POST", "/projects", json!({ "name": format!("p{number}"), "host": host })));
    }
    let mut projects = Vec::new();
    for begun in begun {
        world.settle(&begun);
        let id = begun["project"]["id"].as_str().unwrap().to_owned();
        world.settle(&world.ok("POST", &format!("/projects/{id}/start"), json!({})));
        projects.push((id, free_port()));
    }
    projects
}

type Users = Arc<Mutex<Vec<(usize, String, String, Way)>>>;

fn make_accounts(world: &World, projects: &[(String, u16)], users: &Users) {
    std::thread::scope(|scope| {
        for worker in 0..4 {
            let (users, admin) = (users.clone(), world.api());
            scope.spawn(move || {
                for account in (worker..ACCOUNTS).step_by(4) {
                    let ok = |api: &Api, path: &str, body| api.call("POST", path, body).unwrap();
                    let made = ok(&admin, "/accounts", json!({ "name": format!("user {account}") }));
                    let id = made["id"].as_str().unwrap().to_owned();
                    let token = ok(&admin, &format!("/accounts/{id}/tokens"), json!({}));
                    let token = token["token"].as_str().unwrap().to_owned();
                    let (project, port) = projects[account % PROJECTS].clone();
                    ok(&admin, &format!("/projects/{project}/members"), json!({ "account_id": id }));
                    let own = Api { url: admin.url.clone(), token: token.clone() };
                    let way = way(&own, &project, port);
                    users.lock().unwrap().push((account, id, token, way));
                }
            });
        }
    });
}

async fn refresh_tokens(world: &World, users: &mut [(usize, String, String, Way)]) {
    for (_, _, token, old) in users {
        let own = Api { url: world.url.clone(), token: token.clone() };
        let (project, port) = (old.project.clone(), old.port);
        *old = tokio::task::spawn_blocking(move || way(&own, &project, port)).await.unwrap();
    }
}

/// Users get tokens and use them in a loop while keys rotate: no request is
/// refused. Then the key that signs is withdrawn: its tokens are, at once.
async fn rotate_under_load(world: &World, users: &[(usize, String, String, Way)]) {
    let done = Arc::new(AtomicBool::new(false));
    let mut load = JoinSet::new();
    for (account, _, token, old) in users.iter().take(4).cloned() {
        let (done, url) = (done.clone(), world.url.clone());
        load.spawn(async move {
            let mut requests = 0_usize;
            while !done.load(Ordering::SeqCst) {
                let (own, project) = (Api { url: url.clone(), token: token.clone() }, old.project.clone());
                let port = old.port;
                let fresh = tokio::task::spawn_blocking(move || way(&own, &project, port)).await.unwrap();
                // The one of before all rotations, and the one of now.
                for way in [&old, &fresh] {
                    let (_, head) = request(account, way, "/", false).await;
                    assert_eq!(status(&head), 200, "after {requests} requests: {head}");
                    requests += 1;
                }
            }
            requests
        });
    }
    let mut rotations = 0;
    while rotations < 4 {
        let path = "/keys/rotate?force=true&wait=true&timeout_secs=60".to_owned();
        let ring = api(world, "POST", path, json!({})).await;
        assert_eq!(ring["receipt"]["complete"], true, "{ring}");
        rotations += 1;
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    done.store(true, Ordering::SeqCst);
    let mut requests = 0;
    while let Some(some) = load.join_next().await {
        requests += some.unwrap();
    }
    println!("{rotations} rotations under {requests} requests: none was refused");

    let (account, _, token, old) = &users[0];
    let own = Api { url: world.url.clone(), token: token.clone() };
    let (project, port) = (old.project.clone(), old.port);
    let fresh = tokio::task::spawn_blocking(move || way(&own, &project, port)).await.unwrap();
    let opened = open_http(*account, &fresh, true).await;
    let keys = api(world, "GET", "/keys".to_owned(), Value::Null).await;
    let kid = keys["keys"].as_array().unwrap().iter().find(|key| key["state"] == "current").unwrap();
    let path = format!("/keys/{}/withdraw?wait=true&timeout_secs=60", kid["kid"].as_str().unwrap());
    let withdrawn = api(world, "POST", path, json!({})).await;
    assert_eq!(withdrawn["receipt"]["complete"], true, "{withdrawn}");
    let (_, head) = request(*account, &fresh, "/", false).await;
    assert_eq!(status(&head), 403, "what a withdrawn key signed: {head}");
    tokio::time::timeout(LIMIT, opened.closed).await.unwrap().unwrap();
}

/// Everything of theirs is closed, and nothing else.
async fn remove_collaborators(
    world: &World,
    users: &[(usize, String, String, Way)],
    open: Vec<Open>,
) -> Vec<Open> {
    let mut called = Vec::new();
    let (mut complete, mut slowest) = (0, Duration::ZERO);
    for (_, id, _, way) in users.iter().take(REMOVED) {
        let at = Instant::now();
        let path = format!("/projects/{}/members/{id}?wait=true&timeout_secs=60", way.project);
        let answer = api(world, "DELETE", path, Value::Null).await;
        complete += usize::from(answer["receipt"]["complete"] == true);
        slowest = slowest.max(at.elapsed());
        called.push(at);
    }
    assert_eq!(complete, REMOVED, "every receipt is complete");
    let (theirs, others): (Vec<Open>, Vec<Open>) = open.into_iter().partition(|open| open.account < REMOVED);
    let mut took: Vec<(&'static str, Duration)> = Vec::new();
    for open in theirs {
        let at = tokio::time::timeout(LIMIT, open.closed).await.unwrap();
        took.push((open.kind, at.unwrap().saturating_duration_since(called[open.account])));
    }
    for kind in ["websocket", "ssh", "sftp", "stream"] {
        let mut of_kind: Vec<Duration> =
            took.iter().filter(|(other, _)| *other == kind).map(|(_, took)| *took).collect();
        of_kind.sort_unstable();
        assert!(!of_kind.is_empty());
        println!(
            "from the call to the closed {kind}: p50 {:?}, p99 {:?}, {} of them",
            percentile(&of_kind, 50),
            percentile(&of_kind, 99),
            of_kind.len()
        );
    }
    println!("from the call to its receipt: {slowest:?} at most");
    let (account, _, _, way) = &users[0];
    let (_, head) = request(*account, way, "/", false).await;
    assert_eq!(status(&head), 403, "a removed user's token: {head}");
    others
}

async fn everyone_else_goes_on(open: &mut [Open]) {
    assert!(
        open.iter().all(|open| !open.is_closed.load(Ordering::SeqCst)),
        "somebody else's connection was closed"
    );
    let mut before = Vec::new();
    for open in &mut *open {
        let Some((write, answers)) = &mut open.talk else { continue };
        before.push(answers.load(Ordering::SeqCst));
        // A masked text frame of two bytes.
        write.write_all(b"\x81\x82\0\0\0\0hi").await.unwrap();
    }
    let answered = || {
        let talks = open.iter().filter_map(|open| open.talk.as_ref());
        talks.zip(&before).all(|((_, answers), before)| answers.load(Ordering::SeqCst) > *before)
    };
    let deadline = Instant::now() + LIMIT;
    while !answered() {
        assert!(Instant::now() < deadline, "a WebSocket of somebody else does not answer");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    println!("{} other connections go on; {} WebSockets answered", open.len(), before.len());
}

/// The master is killed: what is open goes on for lease and grace, and then
/// ends; what computes goes on.
async fn without_the_master(world: &mut World, users: &[(usize, String, String, Way)], mut open: Vec<Open>) {
    let (account, _, _, mut way) = users[ACCOUNTS - 1].clone();
    let tick = world.dir.path().join("tick");
    let line = format!(
        "setsid -f sh -c 'for i in $(seq 400); do echo $i >{}; sleep 0.2; done' </dev/null >/dev/null 2>&1; {}",
        tick.display(),
        waits_for(&tick)
    );
    run_line(&way, line).await;
    let own = Api { url: world.url.clone(), token: users[ACCOUNTS - 1].2.clone() };
    let (project, port) = (way.project.clone(), way.port);
    way = tokio::task::spawn_blocking(move || world::way(&own, &project, port)).await.unwrap();
    assert_eq!(world.metric(0, "cocalc_host_auth_tier"), 0);
    world.kill("master");
    let killed = Instant::now();

    let mut tiers = vec![(0, killed.elapsed())];
    let (mut in_grace, mut after) = (0, 0);
    let deadline = killed + LEASE + GRACE + LIMIT;
    while open.iter().any(|open| !open.is_closed.load(Ordering::SeqCst)) {
        assert!(Instant::now() < deadline, "something is open after lease and grace\n{}", world.log());
        let tier = tokio::task::block_in_place(|| {
            world.metric((ACCOUNTS - 1) % PROJECTS % HOSTS, "cocalc_host_auth_tier")
        });
        if tiers.last().unwrap().0 != tier {
            tiers.push((tier, killed.elapsed()));
            println!("{:?} after the kill: tier {tier}", killed.elapsed());
        }
        let (_, head) = request(account, &way, "/", false).await;
        match status(&head) {
            200 => {
                in_grace += usize::from(head.to_ascii_lowercase().contains("cocalc-tier: grace"));
                if tier == 1 && in_grace == 1 {
                    everyone_else_goes_on(&mut open).await;
                }
            }
            403 => after += 1,
            other => panic!("status {other} without the master: {head}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let mut closed = Vec::new();
    for open in open {
        closed.push(open.closed.await.unwrap().saturating_duration_since(killed));
    }
    closed.sort_unstable();
    let (first, last) = (closed[0], closed[closed.len() - 1]);
    println!(
        "{} connections closed from {first:?} to {last:?} after the kill; {in_grace} requests in grace, {after} refused at the end",
        closed.len()
    );
    // Counted from the last keepalive that was answered, a beat before the kill.
    assert!(first + Duration::from_millis(1500) >= LEASE + GRACE, "closed too early: {first:?}");
    assert!(in_grace > 0, "nothing was let in within the grace");
    until("the last tier", || (world.metric(0, "cocalc_host_auth_tier") == 2).then_some(()));
    assert!(tiers.iter().any(|(tier, _)| *tier == 1), "the metrics never said grace: {tiers:?}");
    let (_, head) = request(account, &way, "/", false).await;
    assert_eq!(status(&head), 403, "after lease and grace: {head}");
    let computed = std::fs::read_to_string(&tick).unwrap();
    until("what computes goes on", || (std::fs::read_to_string(&tick).ok()? != computed).then_some(()));

    world.start("master");
    until("the tier of before", || (world.metric(0, "cocalc_host_auth_tier") == 0).then_some(()));
    let own = Api { url: world.url.clone(), token: users[ACCOUNTS - 1].2.clone() };
    let (project, port) = (way.project.clone(), way.port);
    let fresh = tokio::task::spawn_blocking(move || world::way(&own, &project, port)).await.unwrap();
    let deadline = Instant::now() + LIMIT;
    loop {
        let (_, head) = request(account, &fresh, "/", false).await;
        if status(&head) == 200 {
            break;
        }
        assert!(Instant::now() < deadline, "not let in again: {head}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
