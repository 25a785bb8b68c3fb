//! What an answer promises: that it is so, stays so, and is all of it.

use std::time::Duration;

use cocalc_auth::identity::Identity;
use cocalc_core::{
    control::{HostCommand, MoveCommand},
    router::HostAddress,
};
use cocalc_ids::{MoveId, ProjectId};
use serde_json::{Value, json};

use crate::world::{Host, World, join, until};

fn count(host: &Host, which: impl Fn(&HostCommand) -> bool) -> usize {
    host.script.lock().unwrap().commands.iter().filter(|command| which(command)).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_that_was_sent_is_repeated_until_it_is_answered() {
    let world = World::new().await;
    let host = world.host("alpha").await;
    let id = world.project("alpha").await;
    host.script.lock().unwrap().mute = true;
    let begun = world.ok("DELETE", &format!("/projects/{id}"), Value::Null).await;
    let deletes = || count(&host, |command| matches!(command, HostCommand::Delete { .. }));
    until("the command arrives", async || (deletes() == 1).then_some(())).await;
    // Its answer was lost; it is the same process, and still there.
    host.script.lock().unwrap().mute = false;
    assert_eq!(world.settled(&begun).await["state"], "done");
    assert_eq!(deletes(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operation_does_not_fail_and_happen_later() {
    let mut world = World::new().await;
    let host = world.host("alpha").await;
    let id = world.project("alpha").await;
    host.script.lock().unwrap().mute = true;
    let begun = world.ok("POST", &format!("/projects/{id}/start"), json!({})).await;
    let starts = || count(&host, |command| matches!(command, HostCommand::Start { .. }));
    until("the command arrives", async || (starts() == 1).then_some(())).await;
    host.script.lock().unwrap().away = true;
    // Longer than a host may be away that got no command, in this process of
    // the master and in the next.
    let path = format!("/operations/{}", begun["operation_id"].as_str().unwrap());
    tokio::time::sleep(Duration::from_secs(11)).await;
    world.restart().await;
    tokio::time::sleep(Duration::from_secs(22)).await;
    let seen = world.ok("GET", &path, Value::Null).await;
    assert_eq!(seen["state"], "running", "{seen}");
    host.wake();
    assert_eq!(world.settled(&begun).await["state"], "done");
    assert_eq!(world.ok("GET", &format!("/projects/{id}"), Value::Null).await["state"], "running");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_is_a_new_one() {
    let world = World::new().await;
    let host = world.host("alpha").await;
    let id = world.project("alpha").await;
    let path = format!("/projects/{id}/snapshots");
    let take = async |key: &str| {
        world.call_with("POST", &path, &world.admin, json!({ "name": "a" }), Some(key)).await
    };
    let first = take("one").await;
    assert_eq!(first.0, 202, "{first:?}");
    assert_eq!(world.settled(&first.1).await["state"], "done");
    assert_eq!(take("one").await, first);
    for _ in 0..2 {
        let second = take("two").await;
        assert_eq!((second.0, &second.1["code"]), (409, &json!("snapshot_exists")), "{second:?}");
    }
    assert_eq!(count(&host, |command| matches!(command, HostCommand::Snapshot { .. })), 1);
    let shown = world.ok("GET", &format!("/projects/{id}"), Value::Null).await;
    assert_eq!((&shown["state"], &shown["operation_id"]), (&json!("stopped"), &Value::Null));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_move_takes_snapshots_along_and_says_what_it_left_out() {
    let world = World::new().await;
    let (alpha, beta) = (world.host("alpha").await, world.host("beta").await);
    let id = world.project("alpha").await;
    world.settled(&world.ok("POST", &format!("/projects/{id}/start"), json!({})).await).await;
    let project: ProjectId = id.parse().unwrap();
    let old = MoveId::random();
    let names =
        ["monday".to_owned(), format!("undo-{old}"), "conflict-3".to_owned(), "undo-tuesday".to_owned()];
    let names = names.map(|name| name.parse().unwrap()).to_vec();
    alpha.script.lock().unwrap().snapshots.insert(project, names);
    let begun = world.ok("POST", &format!("/projects/{id}/move"), json!({ "to": "beta" })).await;
    let moved = world.settled(&begun).await;
    assert_eq!(moved["state"], "done", "{moved}");
    let progress = &moved["progress"];
    assert_eq!((&progress["snapshots"], &progress["snapshots_arrived"]), (&json!(2), &json!(2)), "{moved}");
    assert_eq!(progress["left_out"], json!(["one file that must not change"]), "{moved}");
    let carried = |command: &HostCommand| match command {
        HostCommand::Move { step: MoveCommand::Carry { snapshot, .. }, .. } => {
            Some(snapshot.name.to_string())
        }
        _ => None,
    };
    let carried: Vec<_> = alpha.script.lock().unwrap().commands.iter().filter_map(carried).collect();
    assert_eq!(carried, ["monday", "undo-tuesday"], "what people have named, and not what moves have made");
    let reserved = |command: &HostCommand| match command {
        HostCommand::Move { step: MoveCommand::Reserve { bytes, snapshots, .. }, .. } => {
            Some((*bytes, snapshots.len()))
        }
        _ => None,
    };
    let reserved: Vec<_> = beta.script.lock().unwrap().commands.iter().filter_map(reserved).collect();
    assert_eq!(reserved, [(1000, 2)], "the destination knows what is to come");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn former_hosts_forget_what_was_deleted() {
    let world = World::new().await;
    let (alpha, beta) = (world.host("alpha").await, world.host("beta").await);
    let _gamma = world.host("gamma").await;
    let id = world.project("alpha").await;
    for to in ["beta", "gamma"] {
        let begun = world.ok("POST", &format!("/projects/{id}/move"), json!({ "to": to })).await;
        assert_eq!(world.settled(&begun).await["state"], "done");
    }
    // Its process dies.
    beta.script.lock().unwrap().mute = true;
    beta.script.lock().unwrap().away = true;
    let begun = world.ok("DELETE", &format!("/projects/{id}"), Value::Null).await;
    assert_eq!(world.settled(&begun).await["state"], "done", "nobody waits for former hosts");
    let forgets = |host: &Host| {
        let this = |command: &HostCommand| match command {
            HostCommand::Forget { project, epoch } => project.to_string() == id && epoch.number() == 3,
            _ => false,
        };
        count(host, this)
    };
    until("alpha is told", async || (forgets(&alpha) == 1).then_some(())).await;
    let before = forgets(&beta);
    beta.wake();
    until("beta is told when it is back", async || (forgets(&beta) > before).then_some(())).await;
    // Only until it has said so.
    let told = forgets(&alpha);
    alpha.again();
    let bare = world.project("alpha").await;
    world.settled(&world.ok("DELETE", &format!("/projects/{bare}"), Value::Null).await).await;
    assert_eq!(forgets(&alpha), told);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_joins_proves_its_key_and_its_address() {
    let world = World::new().await;
    let token = world.ok("POST", "/join-tokens", json!({ "kind": "host" })).await;
    let token = token["token"].as_str().unwrap();
    let identity = Identity::generate().unwrap();
    let address = HostAddress {
        url: "http://alpha.example".into(),
        domain: "alpha.apps.example".into(),
        ssh: "alpha.example:22".into(),
        peer: "alpha.example:9".into(),
        identity: identity.public_key().to_string(),
    };
    let good = join(token, "alpha", &identity, &address);
    let other = Identity::generate().unwrap().public_key().to_string();
    for (pointer, value) in [
        ("/proof", Value::Null),
        ("/proof", json!("")),
        ("/name", json!("beta")),
        ("/identity", json!(other)),
        ("/address/url", json!("http://beta.example")),
        ("/address/ssh", json!("beta.example:22")),
        ("/address/peer", json!("beta.example:9")),
    ] {
        let mut bad = good.clone();
        *bad.pointer_mut(pointer).unwrap() = value;
        let (status, answer) = world.call("POST", "/hosts/join", "", bad).await;
        assert_eq!((status, &answer["code"]), (400, &json!("invalid_request")), "{pointer}: {answer}");
    }
    let (status, answer) = world.call("POST", "/hosts/join", "", good).await;
    assert_eq!(status, 200, "{answer}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_body_is_given_up_on() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let world = World::new().await;
    let address = world.url.trim_start_matches("http://");
    let answered = async |key: &str| {
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let head = format!(
            "POST /api/v1/projects HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\n{key}\
             content-length: 100\r\n\r\n{{",
            world.admin
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut status = [0; 12];
        stream.read_exact(&mut status).await.unwrap();
        assert_eq!(status, *b"HTTP/1.1 408");
    };
    let both = async { tokio::join!(answered(""), answered("idempotency-key: k\r\n")) };
    tokio::time::timeout(Duration::from_secs(90), both).await.expect("after ten seconds");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_makes_no_sense_is_refused() {
    let world = World::new().await;
    let _host = world.host("alpha").await;
    let id = world.project("alpha").await;
    let own = world.ok("GET", "/account", Value::Null).await["id"].as_str().unwrap().to_owned();
    let tokens = format!("/accounts/{own}/tokens");
    for (ttl, expected) in [(0, 400), (1, 201), (315_360_000, 201), (315_360_001, 400), (u64::MAX, 400)] {
        let (status, answer) = world.call("POST", &tokens, &world.admin, json!({ "ttl_secs": ttl })).await;
        assert_eq!(status, expected, "{ttl}: {answer}");
    }
    let path = format!("/projects/{id}/members/{own}");
    let leave = world.call("DELETE", &path, &world.admin, Value::Null).await;
    assert_eq!((leave.0, &leave.1["code"]), (409, &json!("owner_stays")));
    let disguised = world.call("POST", "/projects", &world.admin, json!({ "name": "a\u{202e}b" })).await;
    assert_eq!((disguised.0, &disguised.1["code"]), (400, &json!("invalid_request")));
}
