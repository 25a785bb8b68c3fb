//! The master over real HTTP and the real bus, with scripted hosts.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by it, in its helpers too")]

mod access;
mod document;
mod fences;
mod files;
mod limits;
mod login;
mod moves;
mod promises;
mod restores;
mod world;

use std::{sync::Arc, time::Duration};

use cocalc_auth::{identity::Identity, peer::PeerId, stream::Entry};
use cocalc_core::{
    bus::{Bus, Payload},
    connector::Peer,
    control::{ErrorCode, HostCommand, PeerReply, PeerRequest, api_subject, inbox_subject, stream_subject},
    router::Reach,
};
use cocalc_ids::{HostId, ProjectId};
use serde_json::{Value, json};
use world::{Assertions, World, client, until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_project_lives_from_create_to_delete() {
    let world = World::new().await;
    let host = world.host("alpha").await;
    let begun = world.ok("POST", "/projects", json!({ "name": "first" })).await;
    assert_eq!((&begun["project"]["state"], &begun["project"]["epoch"]), (&json!("creating"), &json!(1)));
    assert_eq!(begun["project"]["host_id"], host.id.to_string());
    let id = begun["project"]["id"].as_str().unwrap();
    let done = world.settled(&begun).await;
    assert_eq!((&done["kind"], &done["state"]), (&json!("create"), &json!("done")));

    // The host knew who may use it before it was asked to make it.
    let frames = host.script.lock().unwrap().frames.clone();
    assert!(
        frames
            .iter()
            .any(|frame| matches!(&frame.entry, Entry::Project(acl) if acl.project.to_string() == id))
    );
    assert!(frames.windows(2).all(|pair| pair[1].seq == pair[0].seq + 1), "no gap");

    world.settled(&world.ok("POST", &format!("/projects/{id}/start"), json!({})).await).await;
    let shown = world.ok("GET", &format!("/projects/{id}"), Value::Null).await;
    assert_eq!((&shown["state"], &shown["phases"]), (&json!("running"), &json!([["mount", 3]])));

    let connected = world.ok("POST", &format!("/projects/{id}/connect"), json!({ "port": 8080 })).await;
    assert_eq!(connected["direct"]["url"], format!("http://8080--{id}.alpha.apps.example/"));
    assert_eq!(connected["direct"]["path_url"], format!("http://alpha.example/{id}/port/8080/"));
    assert_eq!(connected["direct"]["ssh"], format!("{id}@alpha.example:22"));
    assert_eq!((&connected["proxy"], &connected["epoch"]), (&Value::Null, &json!(1)));
    assert_eq!(connected["token"].as_str().unwrap().split('.').count(), 3);

    world.settled(&world.ok("POST", &format!("/projects/{id}/stop"), json!({})).await).await;
    let why = world.ok("GET", &format!("/projects/{id}/why"), Value::Null).await;
    assert_eq!(why["state"], "stopped");
    let deleted = world.settled(&world.ok("DELETE", &format!("/projects/{id}"), Value::Null).await).await;
    assert_eq!(deleted["state"], "done");
    assert_eq!(world.call("GET", &format!("/projects/{id}"), &world.admin, Value::Null).await.0, 404);
    assert!(host.script.lock().unwrap().projects.is_empty());
    let project: ProjectId = id.parse().unwrap();
    until("the host is told", async || {
        let script = host.script.lock().unwrap();
        script.frames.iter().any(|frame| frame.entry == Entry::ProjectGone { project }).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_move_changes_the_owner_once_and_tells_both() {
    let world = World::new().await;
    let (alpha, beta) = (world.host("alpha").await, world.host("beta").await);
    let id = world.project("alpha").await;
    world.settled(&world.ok("POST", &format!("/projects/{id}/start"), json!({})).await).await;
    let moved = world
        .settled(&world.ok("POST", &format!("/projects/{id}/move"), json!({ "to": "beta" })).await)
        .await;
    assert_eq!(moved["state"], "done", "{moved}");
    let shown = world.ok("GET", &format!("/projects/{id}"), Value::Null).await;
    assert_eq!((&shown["host_id"], &shown["epoch"]), (&json!(beta.id.to_string()), &json!(2)));
    assert_eq!((&shown["state"], &shown["operation_id"]), (&json!("running"), &Value::Null));
    let project: ProjectId = id.parse().unwrap();
    assert!(!alpha.script.lock().unwrap().projects.contains_key(&project));
    let gone = Entry::ProjectGone { project };
    until("both know", async || {
        let old = alpha.script.lock().unwrap().frames.iter().any(|frame| frame.entry == gone);
        let new = beta.script.lock().unwrap().frames.iter().any(
            |frame| matches!(&frame.entry, Entry::Project(acl) if acl.project == project && acl.epoch.number() == 2),
        );
        (old && new).then_some(())
    })
    .await;
    let again =
        world.call("POST", &format!("/projects/{id}/move"), &world.admin, json!({ "to": "beta" })).await;
    assert_eq!((again.0, &again.1["code"]), (409, &json!("already_there")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_move_leaves_the_source_as_it_was() {
    let world = World::new().await;
    let (alpha, beta) = (world.host("alpha").await, world.host("beta").await);
    let id = world.project("alpha").await;
    world.settled(&world.ok("POST", &format!("/projects/{id}/start"), json!({})).await).await;
    beta.script.lock().unwrap().refuse = Some(ErrorCode::NoSpace);
    let begun = world.ok("POST", &format!("/projects/{id}/move"), json!({ "to": "beta" })).await;
    until("the source is free", async || {
        let shown = world.ok("GET", &format!("/projects/{id}"), Value::Null).await;
        (shown["operation_id"].is_null() && shown["state"] == "running").then_some(shown)
    })
    .await;
    beta.script.lock().unwrap().refuse = None;
    let ended = world.settled(&begun).await;
    assert_eq!((&ended["state"], &ended["error"]["code"]), (&json!("failed"), &json!("no_space")));
    let shown = world.ok("GET", &format!("/projects/{id}"), Value::Null).await;
    assert_eq!((&shown["host_id"], &shown["epoch"]), (&json!(alpha.id.to_string()), &json!(1)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_master_that_crashes_in_the_middle_goes_on_with_what_it_began() {
    let mut world = World::new().await;
    let host = world.host("alpha").await;
    let id = world.project("alpha").await;
    host.script.lock().unwrap().mute = true;
    let begun = world.ok("POST", &format!("/projects/{id}/start"), json!({})).await;
    until("the command is there", async || {
        let script = host.script.lock().unwrap();
        script.commands.iter().any(|command| matches!(command, HostCommand::Start { .. })).then_some(())
    })
    .await;
    let busy = world.call("POST", &format!("/projects/{id}/stop"), &world.admin, json!({})).await;
    assert_eq!((busy.0, &busy.1["code"]), (409, &json!("project_busy")));
    assert_eq!(busy.1["operation_id"], begun["operation_id"]);

    let before = host.script.lock().unwrap().frames.last().unwrap().stream;
    world.restart().await;
    host.script.lock().unwrap().mute = false;
    let ended = world.settled(&begun).await;
    assert_eq!(ended["state"], "done", "{ended}");
    assert_eq!(world.ok("GET", &format!("/projects/{id}"), Value::Null).await["state"], "running");
    let frames = host.script.lock().unwrap().frames.clone();
    let newer: Vec<_> = frames.iter().filter(|frame| frame.stream > before).collect();
    assert_eq!((newer[0].seq, &newer[0].entry), (1, &Entry::Reset), "a new stream from its start");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repeated_call_is_the_same_call() {
    let world = World::new().await;
    let _host = world.host("alpha").await;
    let post = |body: Value| {
        let world = &world;
        async move { world.call_with("POST", "/projects", &world.admin, body, Some("key-1")).await }
    };
    let (first, second) = tokio::join!(post(json!({ "name": "one" })), post(json!({ "name": "one" })));
    // One of them may have found the other under way; asked again, all agree.
    let third = post(json!({ "name": "one" })).await;
    assert_eq!(third.0, 202);
    for answer in [first, second] {
        assert!(answer == third || answer.1["code"] == "call_under_way", "{answer:?}");
    }
    let other = post(json!({ "name": "two" })).await;
    assert_eq!((other.0, &other.1["code"]), (422, &json!("idempotency_key_reused")));
    let listed = world.ok("GET", "/projects", Value::Null).await;
    assert_eq!(listed["projects"].as_array().unwrap().len(), 1);

    // Another's key is another key.
    let (_, token) = world.account("other").await;
    let body = json!({ "name": "two" });
    let theirs = world.call_with("POST", "/projects", &token, body.clone(), Some("key-1")).await;
    assert_eq!((theirs.0, &theirs.1["project"]["name"]), (202, &json!("two")));
    assert_ne!(theirs.1["project"]["id"], third.1["project"]["id"]);
    world.settled(&theirs.1).await;
    // What came to nothing is not remembered: it may be mended and repeated.
    let path = format!("/projects/{}/move", theirs.1["project"]["id"].as_str().unwrap());
    let to = json!({ "to": "beta" });
    let failed = world.call_with("POST", &path, &token, to.clone(), Some("key-2")).await;
    assert_eq!((failed.0, &failed.1["code"]), (404, &json!("not_found")));
    let _beta = world.host("beta").await;
    let mended = world.call_with("POST", &path, &token, to, Some("key-2")).await;
    assert_eq!(mended.0, 202, "{mended:?}");
    assert_eq!(world.settled(&mended.1).await["state"], "done");
    // Not for everybody else's calls, and not of any form.
    for key in ["", &"k".repeat(201)] {
        let refused = world.call_with("POST", "/projects", &token, body.clone(), Some(key)).await;
        assert_eq!((refused.0, &refused.1["code"]), (400, &json!("invalid_request")), "{key:?}");
    }
    let anonymous = world.call_with("POST", "/projects", "", body, Some("key-1")).await;
    assert_eq!(anonymous.0, 401);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_each_role_may_do() {
    let world = World::new().await;
    let (_alpha, _beta) = (world.host("alpha").await, world.host("beta").await);
    let id = world.project("alpha").await;
    let members = format!("/projects/{id}/members");
    let mut tokens = Vec::new();
    for role in ["viewer", "collaborator", "owner"] {
        let (account, token) = world.account(role).await;
        world.ok("POST", &members, json!({ "account_id": account, "role": role })).await;
        tokens.push(token);
    }
    tokens.insert(0, world.account("stranger").await.1);
    let (guest, _) = world.account("guest").await;
    let unknown = ProjectId::random();
    // Of a stranger, a viewer, a collaborator, an owner.
    for (method, path, body, expected) in [
        ("GET", String::new(), Value::Null, [404, 200, 200, 200]),
        ("GET", "/why".into(), Value::Null, [404, 200, 200, 200]),
        ("GET", "/members".into(), Value::Null, [404, 200, 200, 200]),
        ("GET", "/snapshots".into(), Value::Null, [404, 200, 200, 200]),
        ("POST", "/connect".into(), json!({ "scopes": ["files"] }), [404, 200, 200, 200]),
        ("POST", "/connect".into(), json!({ "scopes": ["ssh"] }), [404, 403, 200, 200]),
        ("POST", "/members".into(), json!({ "account_id": guest, "role": "owner" }), [404, 403, 403, 200]),
        ("DELETE", format!("/members/{guest}"), Value::Null, [404, 403, 403, 200]),
        ("POST", "/start".into(), json!({}), [404, 403, 202, 202]),
        ("POST", "/move".into(), json!({ "to": "beta" }), [404, 403, 403, 202]),
        ("POST", "/snapshots".into(), json!({}), [404, 403, 202, 202]),
        ("DELETE", "/snapshots/x".into(), Value::Null, [404, 403, 403, 202]),
        ("POST", "/stop".into(), json!({}), [404, 403, 202, 202]),
        ("POST", "/snapshots/x/restore".into(), json!({}), [404, 403, 403, 202]),
        ("DELETE", String::new(), Value::Null, [404, 403, 403, 202]),
    ] {
        for (token, expected) in tokens.iter().zip(expected) {
            let (status, answer) =
                world.call(method, &format!("/projects/{id}{path}"), token, body.clone()).await;
            let call = format!("{method} {path}: {answer}");
            assert_eq!(status, expected, "{call}");
            if status == 404 {
                // Nobody learns whether there is such a project.
                let path = format!("/projects/{unknown}{path}");
                assert_eq!(world.call(method, &path, token, body.clone()).await, (404, answer), "{call}");
            } else if status == 202 {
                assert_eq!(world.settled(&answer).await["state"], "done", "{call}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revocation_is_acknowledged_or_has_expired() {
    let world = World::new().await;
    let host = world.host("alpha").await;
    let id = world.project("alpha").await;
    let (guest, token) = world.account("guest").await;
    let members = format!("/projects/{id}/members");
    assert_eq!(world.call("GET", &members, &token, Value::Null).await.0, 404, "a stranger sees nothing");
    let added = world.ok("POST", &format!("{members}?wait=true"), json!({ "account_id": guest })).await;
    assert_eq!(added["receipt"]["peers"][0]["outcome"], "acknowledged", "{added}");
    assert_eq!(world.call("GET", &members, &token, Value::Null).await.0, 200);
    assert_eq!(world.call("DELETE", &format!("/projects/{id}"), &token, Value::Null).await.0, 403);

    let pending = format!("{members}/{guest}?wait=true&timeout_secs=1");
    host.script.lock().unwrap().silent = true;
    let removed = world.ok("DELETE", &pending, Value::Null).await;
    // It renews its lease, so that it may still admit the guest.
    assert_eq!(removed["receipt"]["complete"], false, "{removed}");
    assert_eq!(removed["receipt"]["peers"][0]["peer"], format!("host:{}", host.id));
    drop(host);
    let banned = world.ok("POST", &format!("/accounts/{guest}/ban"), json!({})).await;
    assert_eq!(banned["banned"], true);
    let world = &world;
    until("its lease and grace run out", async || {
        let answer = world.ok("POST", "/keys/rotate?force=true&wait=true&timeout_secs=5", json!({})).await;
        let receipt = &answer["receipt"];
        (receipt["complete"] == true && receipt["peers"][0]["outcome"] == "expired").then_some(())
    })
    .await;
    assert_eq!(world.call("GET", "/projects", &token, Value::Null).await.0, 403, "banned");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_may_call_what() {
    let world = World::new().await;
    let _host = world.host("alpha").await;
    let id = world.project("alpha").await;
    let (own, token) = world.account("user").await;
    let other = world.ok("GET", "/account", Value::Null).await["id"].as_str().unwrap().to_owned();
    for (method, path, anonymous, user) in [
        ("GET", "/projects", 401, 200),
        ("POST", "/projects", 401, 400),
        ("GET", "/projects?all=true", 401, 403),
        ("GET", &*format!("/projects/{id}"), 401, 404),
        ("DELETE", &*format!("/projects/{id}"), 401, 404),
        ("POST", &*format!("/projects/{id}/start"), 401, 404),
        ("POST", &*format!("/projects/{id}/stop"), 401, 404),
        ("POST", &*format!("/projects/{id}/connect"), 401, 404),
        ("GET", &*format!("/projects/{id}/why"), 401, 404),
        ("GET", &*format!("/projects/{id}/members"), 401, 404),
        ("DELETE", &*format!("/projects/{id}/members/{own}"), 401, 404),
        ("GET", &*format!("/projects/{id}/snapshots"), 401, 404),
        ("POST", &*format!("/projects/{id}/snapshots"), 401, 404),
        ("DELETE", &*format!("/projects/{id}/snapshots/x"), 401, 404),
        ("GET", "/projects/not-an-id", 401, 404),
        ("GET", "/accounts", 401, 403),
        ("POST", "/accounts", 401, 400),
        ("GET", &*format!("/accounts/{own}"), 401, 200),
        ("GET", &*format!("/accounts/{other}"), 401, 404),
        ("POST", &*format!("/accounts/{other}/tokens"), 401, 404),
        ("POST", &*format!("/accounts/{other}/sign-out"), 401, 404),
        ("POST", &*format!("/accounts/{other}/ban"), 401, 403),
        ("POST", "/keys/rotate", 401, 403),
        ("POST", "/keys/x/withdraw", 401, 403),
        ("GET", "/hosts", 401, 200),
        ("POST", "/hosts/alpha/cordon", 401, 403),
        ("POST", "/join-tokens", 401, 400),
        ("GET", "/ssh-keys", 401, 200),
        ("POST", "/ssh-keys", 401, 400),
        ("GET", "/operations", 401, 200),
        ("GET", "/operations?all=true", 401, 403),
        ("PATCH", "/projects", 405, 405),
        ("GET", "//healthz", 200, 200),
        ("GET", "//readyz", 200, 200),
        ("GET", "//.well-known/jwks.json", 200, 200),
        ("GET", "/openapi.json", 200, 200),
        ("GET", "/nothing", 404, 404),
    ] {
        for (token, expected) in [("", anonymous), ("cct_wrong", anonymous), (&*token, user)] {
            let (status, answer) = world.call(method, path, token, Value::Null).await;
            assert_eq!(status, expected, "{method} {path} {answer}");
            if status >= 400 {
                assert!(answer["code"].is_string() && answer["status"] == status, "{method} {path} {answer}");
            }
        }
    }
    let admin = world.call("POST", "/accounts", &token, json!({ "name": "x" })).await;
    assert_eq!((admin.0, &admin.1["code"]), (403, &json!("access_denied")));
    let unknown = world.call("POST", "/projects", &world.admin, json!({ "name": "x", "colour": 1 })).await;
    assert!(unknown.1["detail"].as_str().unwrap().contains("colour"), "{unknown:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_bus_admits_registered_keys_to_their_own_subjects() {
    let world = World::new().await;
    let (alpha, beta) = (world.host("alpha").await, world.host("beta").await);
    let limit = Duration::from_secs(2);
    // Another's key, and an audience that is not this master.
    for (peer, audience) in [(alpha.id, &*world.url), (HostId::random(), &*world.url)] {
        let identity = Arc::new(Identity::generate().unwrap());
        let stranger = client(
            &world.url,
            Assertions { identity, peer: PeerId::Host(peer), audience: audience.to_owned() },
        );
        assert!(stranger.ready(limit).await.is_err());
    }
    let payload = Payload::json(&HostCommand::Report { project: ProjectId::random() }).unwrap();
    for subject in [inbox_subject(beta.id), inbox_subject(alpha.id), api_subject(Peer::Host(beta.id))] {
        assert!(alpha.client.publish(&subject, payload.clone()).await.is_err(), "{subject}");
    }
    for pattern in [inbox_subject(beta.id), "host.*.inbox".to_owned(), ">".to_owned(), "master.>".to_owned()]
    {
        assert!(alpha.client.subscribe(&pattern, None).await.is_err(), "{pattern}");
    }
    assert!(beta.script.lock().unwrap().commands.is_empty());
    // An answer cannot be sent to somebody else with the master's rights.
    let request = PeerRequest::Route { project: ProjectId::random() };
    for reply in [stream_subject(Peer::Host(beta.id)), inbox_subject(beta.id)] {
        let mut payload = Payload::json(&request).unwrap();
        payload.headers.insert("CN-Reply".to_owned(), reply.clone().into());
        assert!(alpha.client.publish(&api_subject(Peer::Host(alpha.id)), payload).await.is_err(), "{reply}");
    }

    let id = world.project("alpha").await;
    let project: ProjectId = id.parse().unwrap();
    let PeerReply::Route { route: Some(route) } = beta.ask(&PeerRequest::Route { project }).await else {
        panic!("no route");
    };
    assert_eq!(route.host, alpha.id);
    assert!(matches!(route.how, Reach::Remote(address) if address.url == "http://alpha.example"));
    // A host that is not the owner learns that, and nothing of the members.
    beta.ask(&PeerRequest::FetchProject { project }).await;
    until("the answer", async || {
        let script = beta.script.lock().unwrap();
        script.frames.iter().any(|frame| frame.entry == Entry::ProjectGone { project }).then_some(())
    })
    .await;
    let epoch = cocalc_ids::Epoch::FIRST;
    assert!(matches!(beta.ask(&PeerRequest::Wake { project, epoch }).await, PeerReply::Error { .. }));
    assert_eq!(alpha.ask(&PeerRequest::Wake { project, epoch }).await, PeerReply::Done);
    until("it runs", async || {
        let shown = world.ok("GET", &format!("/projects/{id}"), Value::Null).await;
        (shown["state"] == "running").then_some(())
    })
    .await;
}
