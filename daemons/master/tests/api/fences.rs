//! Hosts that somebody says are dead.

use cocalc_core::{
    bus::{Bus, Payload},
    connector::Peer,
    control::{Keepalive, KeepaliveReply, PeerReply, PeerRequest, keepalive_subject},
};
use cocalc_ids::ProjectId;
use serde_json::{Value, json};

use crate::world::{LIMIT, World, until};

/// The lease that a host gets now, in milliseconds.
async fn lease(host: &crate::world::Host) -> u64 {
    let keepalive = Keepalive { session: host.session(), position: None };
    let payload = Payload::json(&keepalive).unwrap();
    let reply = host.client.request(&keepalive_subject(Peer::Host(host.id)), payload, LIMIT).await.unwrap();
    reply.payload.parse::<KeepaliveReply>().unwrap().lease_ms
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fenced_host_gets_no_lease_and_hears_only_who_owns_what() {
    let mut world = World::new().await;
    let host = world.host("alpha").await;
    world.host("beta").await;
    let text = world.project("alpha").await;
    let id: ProjectId = text.parse().unwrap();
    let word = json!({ "reason": "it burned", "attest": true });
    let (_, user) = world.account("user").await;
    for path in ["/hosts/alpha/fence", "/hosts/alpha/unfence", "/hosts/alpha/restore-all"] {
        let body = if path.ends_with("/fence") { word.clone() } else { json!({}) };
        assert_eq!(world.call("POST", path, &user, body).await.0, 403, "{path}");
    }
    let (status, alive) = world.call("POST", "/hosts/alpha/fence", &world.admin, word.clone()).await;
    assert_eq!((status, &alive["code"]), (409, &json!("host_alive")), "{alive}");
    host.script.lock().unwrap().away = true;
    until("the lease is over", async || {
        (world.ok("GET", "/hosts/alpha", Value::Null).await["state"] == "away").then_some(())
    })
    .await;
    for bad in [json!({ "reason": "x", "attest": false }), json!({ "reason": "", "attest": true })] {
        assert_eq!(world.call("POST", "/hosts/alpha/fence", &world.admin, bad).await.0, 400);
    }
    let fenced = world.ok("POST", "/hosts/alpha/fence", word.clone()).await;
    assert_eq!(
        (&fenced["state"], &fenced["fence"]["reason"]),
        (&json!("fenced"), &json!("it burned")),
        "{fenced}"
    );
    assert!(fenced["fence"]["last_heard"].is_string(), "{fenced}");
    let (_, seen) = world.call("GET", "/hosts/alpha", &user, Value::Null).await;
    assert_eq!((&seen["state"], &seen["fence"]), (&json!("fenced"), &Value::Null), "{seen}");
    let connect = format!("/projects/{text}/connect");
    let (status, lost) = world.call("POST", &connect, &world.admin, json!({})).await;
    assert_eq!((status, &lost["code"]), (503, &json!("host_fenced")), "{lost}");
    // Without backups there is nothing to restore.
    let (status, none) = world.call("POST", "/hosts/alpha/restore-all", &world.admin, json!({})).await;
    assert_eq!((status, &none["code"]), (409, &json!("no_backups")), "{none}");

    // It is back: also of a master that has been restarted it gets nothing.
    for restart in [false, true] {
        if restart {
            world.restart().await;
        }
        host.wake();
        host.client.ready(LIMIT).await.unwrap();
        assert_eq!(lease(&host).await, 0);
        let refused = host.ask(&PeerRequest::FetchProject { project: id }).await;
        assert!(
            matches!(&refused, PeerReply::Error { message } if message.contains("fenced")),
            "{refused:?}"
        );
        let nowhere = host.ask(&PeerRequest::Route { project: id }).await;
        assert!(matches!(nowhere, PeerReply::Error { .. }), "{nowhere:?}");
        assert_eq!(world.ok("GET", "/hosts/alpha", Value::Null).await["state"], "fenced");
        // Work that waits for it has an end.
        let begun = world.ok("POST", &format!("/projects/{text}/start"), json!({})).await;
        assert_eq!(world.settled(&begun).await["error"]["code"], "host_fenced");
    }

    world.ok("POST", "/hosts/alpha/unfence", json!({})).await;
    until("its lease", async || {
        (world.ok("GET", "/hosts/alpha", Value::Null).await["state"] == "connected").then_some(())
    })
    .await;
    let begun = world.ok("POST", &format!("/projects/{text}/start"), json!({})).await;
    assert_eq!(world.settled(&begun).await["state"], "done");
}
