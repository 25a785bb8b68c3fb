//! Who gets in, who no more, and how that is shown.

use std::{sync::Arc, time::Duration};

use cocalc_auth::{identity::Identity, peer::PeerId, stream::Entry};
use cocalc_core::{control::PeerRequest, router::HostAddress};
use cocalc_ids::ProjectId;
use serde_json::{Value, json};

use crate::world::{Assertions, LIMIT, World, client, join, until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_receipt_outlives_its_master() {
    let mut world = World::new().await;
    let (host, gone) = (world.host("alpha").await, world.host("beta").await);
    let (id, other) = (world.project("alpha").await, world.project("beta").await);
    let (guest, token) = world.account("guest").await;
    for project in [&id, &other] {
        world.ok("POST", &format!("/projects/{project}/members"), json!({ "account_id": guest })).await;
    }
    host.script.lock().unwrap().silent = true;
    // One that was cut off says nothing ever again.
    drop(gone);
    let banned = world.ok("POST", &format!("/accounts/{guest}/ban"), json!({})).await;
    let receipt = &banned["receipt"];
    assert_eq!(
        (&receipt["complete"], &receipt["change"]),
        (&json!(false), &json!("account.ban")),
        "{banned}"
    );
    assert_eq!(receipt["peers"].as_array().unwrap().len(), 2, "{banned}");
    let path = format!("/receipts/{}", receipt["id"].as_str().unwrap());

    world.restart().await;
    let after = world.ok("GET", &path, Value::Null).await;
    let outcome = |receipt: &Value, name: &str| {
        let peers = receipt["peers"].as_array().unwrap();
        let peer = peers.iter().find(|peer| peer["peer"] == name).unwrap();
        peer["outcome"].as_str().unwrap().to_owned()
    };
    let alpha = format!("host:{}", host.id);
    assert_eq!((outcome(&after, &alpha).as_str(), &after["complete"]), ("pending", &json!(false)), "{after}");

    // It is registered with the new master, and acknowledges the whole state.
    host.script.lock().unwrap().silent = false;
    host.again();
    let done = until("both are settled", async || {
        let seen = world.ok("GET", &format!("{path}?wait=true&timeout_secs=2"), Value::Null).await;
        (seen["complete"] == true).then_some(seen)
    })
    .await;
    assert_eq!(outcome(&done, &alpha), "acknowledged", "{done}");
    let outcomes: Vec<_> = done["peers"].as_array().unwrap().iter().map(|peer| &peer["outcome"]).collect();
    assert!(outcomes.contains(&&json!("expired")), "{done}");
    // What was settled stays so.
    world.restart().await;
    assert_eq!(world.ok("GET", &path, Value::Null).await, done);
    let (stranger, strangers) = world.account("stranger").await;
    assert_ne!(stranger, guest);
    assert_eq!(world.call("GET", &path, &strangers, Value::Null).await.0, 404, "not theirs");
    assert_eq!(world.call("GET", &path, &token, Value::Null).await.0, 403, "banned");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_longer_grace_is_waited_for() {
    let world = World::new().await;
    let host = world.host("alpha").await;
    let id = world.project("alpha").await;
    let access = format!("/projects/{id}/access");
    let long = world.ok("PATCH", &format!("{access}?wait=true"), json!({ "grace_secs": 4 })).await;
    assert_eq!(long["receipt"]["complete"], true, "{long}");
    // Cut off before it hears that the grace is none any more.
    drop(host);
    let none = world.ok("PATCH", &access, json!({ "grace_secs": 0 })).await;
    let path = format!("/receipts/{}?wait=true&timeout_secs=15", none["receipt"]["id"].as_str().unwrap());
    let receipt = world.ok("GET", &path, Value::Null).await;
    let peer = &receipt["peers"][0];
    assert_eq!(peer["outcome"], "expired", "{receipt}");
    // A lease of one second, and the four that the host knows.
    assert!(peer["millis"].as_u64().unwrap() >= 3_900, "{receipt}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn viewers_see_what_is_marked() {
    let world = World::new().await;
    let host = world.host("alpha").await;
    let id = world.project("alpha").await;
    let (viewer, token) = world.account("viewer").await;
    let members = format!("/projects/{id}/members");
    world.ok("POST", &members, json!({ "account_id": viewer, "role": "viewer" })).await;
    let connect = format!("/projects/{id}/connect");
    let ask = async |body: Value| world.call("POST", &connect, &token, body).await.0;
    assert_eq!(ask(json!({ "scopes": ["ssh"] })).await, 403);
    assert_eq!(ask(json!({ "scopes": ["bus"] })).await, 403);
    assert_eq!(ask(json!({ "scopes": ["files", "http", "ws"] })).await, 200);
    assert_eq!(ask(json!({ "port": 8080 })).await, 403, "not marked");
    let access = format!("/projects/{id}/access");
    assert_eq!(world.call("PATCH", &access, &token, json!({ "viewable_ports": [8080] })).await.0, 403);
    let marked = world.ok("PATCH", &access, json!({ "viewable_ports": [8080, 80, 8080] })).await;
    assert_eq!(marked["viewable_ports"], json!([80, 8080]));
    assert_eq!(ask(json!({ "port": 8080 })).await, 200);
    assert_eq!(ask(json!({ "port": 8081 })).await, 403);
    until("its host knows", async || {
        let script = host.script.lock().unwrap();
        let ports = script.frames.iter().rev().find_map(|frame| match &frame.entry {
            Entry::Project(acl) => Some(acl.viewable_ports.clone()),
            _ => None,
        });
        (ports == Some(vec![80, 8080])).then_some(())
    })
    .await;
    for action in ["start", "stop"] {
        let path = format!("/projects/{id}/{action}");
        assert_eq!(world.call("POST", &path, &token, json!({})).await.0, 403, "{action}");
    }
    for bad in [json!({ "viewable_ports": [0] }), json!({ "grace_secs": 86_401 }), json!({ "x": 1 })] {
        assert_eq!(world.call("PATCH", &access, &world.admin, bad).await.0, 400);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_scoped_key_does_what_it_is_for() {
    let world = World::new().await;
    let _host = world.host("alpha").await;
    let (own, token) = world.account("user").await;
    let make = async |name: &str| {
        let (status, begun) = world.call("POST", "/projects", &token, json!({ "name": name })).await;
        assert_eq!(status, 202, "{begun}");
        begun["project"]["id"].as_str().unwrap().to_owned()
    };
    let (mine, other) = (make("mine").await, make("other").await);
    let keys = format!("/accounts/{own}/tokens");
    let limits = json!({ "name": "ci", "projects": [mine], "verbs": ["read", "connect"], "ttl_secs": 600 });
    let (status, made) = world.call("POST", &keys, &token, limits).await;
    assert_eq!(status, 201, "{made}");
    let key = made["token"].as_str().unwrap();
    let all = format!("/projects/{mine}");
    until("both exist", async || {
        let (_, list) = world.call("GET", "/projects", &token, Value::Null).await;
        list["projects"].as_array().unwrap().iter().all(|project| project["state"] == "stopped").then_some(())
    })
    .await;
    for (method, path, status) in [
        ("GET", all.clone(), 200),
        ("POST", format!("{all}/connect"), 200),
        ("GET", format!("/projects/{other}"), 404),
        ("POST", format!("/projects/{other}/connect"), 404),
        ("POST", format!("{all}/start"), 403),
        ("DELETE", all.clone(), 403),
        ("GET", keys.clone(), 403),
        ("POST", keys.clone(), 403),
        ("POST", format!("/accounts/{own}/sign-out"), 403),
        ("POST", "/projects".to_owned(), 403),
        ("POST", "/ssh-keys".to_owned(), 403),
        ("GET", "/hosts".to_owned(), 200),
        ("GET", "/account".to_owned(), 200),
    ] {
        let (got, answer) = world.call(method, &path, key, Value::Null).await;
        assert_eq!(got, status, "{method} {path}: {answer}");
    }
    let (_, list) = world.call("GET", "/projects", key, Value::Null).await;
    assert_eq!(list["projects"].as_array().unwrap().len(), 1, "{list}");
    let (_, list) = world.call("GET", "/operations", key, Value::Null).await;
    assert!(list["operations"].as_array().unwrap().iter().all(|seen| seen["project_id"] == mine), "{list}");

    // An administrator's scoped key administers nothing.
    let admin = world.ok("GET", "/account", Value::Null).await["id"].as_str().unwrap().to_owned();
    let path = format!("/accounts/{admin}/tokens");
    let weak = world.ok("POST", &path, json!({ "verbs": ["read", "manage", "operate"] })).await;
    let weak = weak["token"].as_str().unwrap();
    assert_eq!(world.call("GET", "/projects?all=true", weak, Value::Null).await.0, 403);
    assert_eq!(world.call("GET", &all, weak, Value::Null).await.0, 404);
    assert_eq!(world.call("POST", "/hosts/alpha/cordon", weak, Value::Null).await.0, 403);

    for bad in [
        json!({ "verbs": [] }),
        json!({ "verbs": ["everything"] }),
        json!({ "projects": [] }),
        json!({ "projects": [mine], "verbs": ["create"] }),
        json!({ "ttl_secs": 0 }),
        json!({ "name": "a\u{202e}b" }),
    ] {
        let (status, answer) = world.call("POST", &keys, &token, bad.clone()).await;
        assert_eq!(status, 400, "{bad}: {answer}");
    }
    // It is listed without the key, and the database has only its hash.
    let (_, list) = world.call("GET", &keys, &token, Value::Null).await;
    let seen = list["tokens"].as_array().unwrap().iter().find(|seen| seen["name"] == "ci").unwrap();
    assert_eq!((&seen["verbs"], &seen["projects"]), (&json!(["read", "connect"]), &json!([mine])), "{list}");
    assert!(!list.to_string().contains(key));
    for file in ["master.db", "master.db-wal"] {
        let bytes = std::fs::read(world.dir.path().join("data").join(file)).unwrap_or_default();
        assert!(!bytes.windows(key.len()).any(|part| part == key.as_bytes()), "{file} has the key");
    }
    let end = format!("{keys}/{}", made["id"].as_str().unwrap());
    assert_eq!(world.call("DELETE", &end, &token, Value::Null).await.0, 204);
    assert_eq!(world.call("GET", &all, key, Value::Null).await.0, 401, "it has ended");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_withdrawn_host_is_out_and_comes_back_with_another_key() {
    let world = World::new().await;
    let host = world.host("alpha").await;
    let witness = world.host("beta").await;
    let id: ProjectId = world.project("alpha").await.parse().unwrap();
    assert_eq!(world.call("POST", "/hosts/alpha/withdraw", &world.admin, json!({})).await.0, 409);
    let before = world.master.as_ref().unwrap().connections();
    let path = "/hosts/alpha/withdraw?force=true&wait=true";
    let withdrawn = world.ok("POST", path, json!({})).await;
    assert_eq!(withdrawn["receipt"]["complete"], true, "{withdrawn}");
    // It let go of its project, and its connection is closed.
    let last = host.script.lock().unwrap().frames.last().unwrap().entry.clone();
    assert_eq!(last, Entry::ProjectGone { project: id });
    until("its bus connection is closed", async || {
        (world.master.as_ref().unwrap().connections() < before).then_some(())
    })
    .await;
    assert_eq!(world.ok("GET", "/hosts/alpha", Value::Null).await["state"], "withdrawn");
    // Others pin no key for it any more.
    until("the others know", async || {
        let script = witness.script.lock().unwrap();
        let address = script.frames.iter().rev().find_map(|frame| match &frame.entry {
            Entry::Host { host: which, address } if *which == host.id => Some(address["identity"].clone()),
            _ => None,
        });
        (address == Some(json!(""))).then_some(())
    })
    .await;
    let again = host.client.ready(Duration::from_millis(1500)).await;
    assert!(again.is_err(), "a withdrawn host signed in");

    // Another key, with a token for this host.
    let token = world.ok("POST", "/hosts/alpha/rotate-key", json!({})).await;
    let token = token["token"].as_str().unwrap();
    let identity = Arc::new(Identity::generate().unwrap());
    let address = HostAddress {
        url: "http://alpha.example".into(),
        identity: identity.public_key().to_string(),
        ..HostAddress::default()
    };
    let body = join(token, "alpha", &identity, &address);
    for _ in 0..2 {
        let (status, joined) = world.call("POST", "/hosts/join", "", body.clone()).await;
        assert_eq!((status, &joined["host_id"]), (200, &json!(host.id.to_string())), "{joined}");
    }
    let thief = Arc::new(Identity::generate().unwrap());
    let theirs = HostAddress { identity: thief.public_key().to_string(), ..address };
    let stolen = join(token, "alpha", &thief, &theirs);
    assert_eq!(world.call("POST", "/hosts/join", "", stolen).await.0, 401, "used up");
    let credentials = Assertions { identity, peer: PeerId::Host(host.id), audience: world.url.clone() };
    let fresh = client(&world.url, credentials);
    fresh.ready(LIMIT).await.unwrap();
    let reply = crate::world::ask(&fresh, host.id, &PeerRequest::FetchProject { project: id }).await;
    assert!(reply.is_some(), "the new key has no voice");
    assert!(host.client.ready(Duration::from_millis(500)).await.is_err(), "the old key signed in");
    let (_, user) = world.account("user").await;
    for path in ["/hosts/alpha/withdraw", "/hosts/alpha/rotate-key", "/proxies/x/withdraw"] {
        assert_eq!(world.call("POST", path, &user, json!({})).await.0, 403, "{path}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_are_listed_rotated_and_withdrawn() {
    let world = World::new().await;
    let _host = world.host("alpha").await;
    let states = async || {
        let keys = world.ok("GET", "/keys", Value::Null).await["keys"].as_array().unwrap().clone();
        keys.iter()
            .map(|key| (key["kid"].as_str().unwrap().to_owned(), key["state"].as_str().unwrap().to_owned()))
            .collect::<Vec<_>>()
    };
    let before = states().await;
    let (next, current) = (before[0].0.clone(), before[1].0.clone());
    assert_eq!((before[0].1.as_str(), before[1].1.as_str()), ("next", "current"));
    let rotated = world.ok("POST", "/keys/rotate?force=true&wait=true", json!({})).await;
    assert_eq!(rotated["receipt"]["complete"], true, "{rotated}");
    let after = states().await;
    assert_eq!(after[1], (next.clone(), "current".to_owned()), "the next key signs");
    assert_eq!(after[2], (current.clone(), "previous".to_owned()), "its tokens are still good");
    let path = format!("/keys/{current}/withdraw?wait=true");
    let withdrawn = world.ok("POST", &path, json!({})).await;
    assert_eq!(withdrawn["receipt"]["complete"], true, "{withdrawn}");
    assert!(states().await.iter().all(|(kid, _)| *kid != current));
    assert_eq!(world.ok("GET", "/keys", Value::Null).await["withdrawn"], json!([current]));
    let (_, user) = world.account("user").await;
    assert_eq!(world.call("GET", "/keys", &user, Value::Null).await.0, 403);
}
