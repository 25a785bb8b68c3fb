//! Moves whose master dies at every step, that are cancelled, and that people
//! follow.

use std::{
    io::{BufRead, BufReader},
    time::Duration,
};

use cocalc_core::control::{HostCommand, PeerRequest};
use cocalc_ids::ProjectId;
use serde_json::{Value, json};

use crate::world::{Fall, Host, World, label, until, until_within};

/// A project that runs on `alpha`.
async fn running(world: &World) -> (String, ProjectId) {
    let id = world.project("alpha").await;
    world.settled(&world.ok("POST", &format!("/projects/{id}/start"), json!({})).await).await;
    let project = id.parse().unwrap();
    (id, project)
}

async fn begin(world: &World, id: &str, to: &str) -> Value {
    until("both are there", async || {
        let listed = world.ok("GET", "/hosts", Value::Null).await;
        let there = |host: &Value| host["state"] == "connected";
        listed["hosts"].as_array().unwrap().iter().all(there).then_some(())
    })
    .await;
    world.ok("POST", &format!("/projects/{id}/move"), json!({ "to": to })).await
}

/// Waits until a host has fallen silent.
async fn silent(what: &str, hosts: [&Host; 2]) {
    until(what, async || hosts.iter().any(|host| host.script.lock().unwrap().mute).then_some(())).await;
}

fn set(hosts: [&Host; 2], fall: Option<(&'static str, Fall)>) {
    for host in hosts {
        let mut script = host.script.lock().unwrap();
        (script.fall, script.mute) = (fall, false);
    }
}

/// The one host that has the project: by the master, by what the hosts hold,
/// and by what runs.
async fn owner(world: &World, id: &str, hosts: [&Host; 2]) -> usize {
    let project: ProjectId = id.parse().unwrap();
    let shown = until("the project is settled", async || {
        let shown = world.ok("GET", &format!("/projects/{id}"), Value::Null).await;
        (shown["operation_id"].is_null() && shown["state"] == "running").then_some(shown)
    })
    .await;
    let holds = |host: &Host| host.script.lock().unwrap().projects.get(&project).copied();
    let held: Vec<_> = hosts.iter().map(|host| holds(host)).collect();
    let at = hosts.iter().position(|host| shown["host_id"] == host.id.to_string()).unwrap();
    let (epoch, runs) = held[at].expect("the owner holds it");
    assert_eq!((json!(epoch.number()), runs), (shown["epoch"].clone(), true), "{shown}");
    assert_eq!(held[1 - at], None, "only the owner holds it: {shown}");
    assert_eq!(world.running.once(project), Some(hosts[at].id));
    at
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_master_that_dies_at_any_step_leaves_one_owner() {
    let mut world = World::new().await;
    let (alpha, beta) = (world.host("alpha").await, world.host("beta").await);
    let hosts = [&alpha, &beta];
    let (id, _) = running(&world).await;
    let mut at = 0;
    for step in [
        "reserve",
        "send",
        "park",
        "freeze",
        "send the rest",
        "stage",
        "activate",
        "retire",
        "clean",
        "clean there",
    ] {
        for fall in [Fall::Before, Fall::After] {
            match step {
                "clean there" => hosts[1 - at].script.lock().unwrap().fall = Some(("clean", fall)),
                _ => set(hosts, Some((step, fall))),
            }
            let epoch = world.ok("GET", &format!("/projects/{id}"), Value::Null).await["epoch"].clone();
            let begun = begin(&world, &id, ["beta", "alpha"][at]).await;
            silent(step, hosts).await;
            world.restart().await;
            set(hosts, None);
            let ended = world.settled(&begun).await;
            assert!(ended["state"] == "done" || ended["state"] == "failed", "{step} {fall:?}: {ended}");
            let owned = owner(&world, &id, hosts).await;
            assert_eq!(owned == at, ended["state"] == "failed", "{step} {fall:?}: {ended}");
            // Hosts that come back in time: nothing is given up.
            assert_eq!(ended["state"], "done", "{step} {fall:?}: {ended}");
            let now = world.ok("GET", &format!("/projects/{id}"), Value::Null).await["epoch"].clone();
            assert_eq!(now.as_u64(), epoch.as_u64().map(|epoch| epoch + 1), "{step} {fall:?}");
            at = owned;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_master_that_dies_while_it_undoes_a_move_undoes_it() {
    let mut world = World::new().await;
    let (alpha, beta) = (world.host("alpha").await, world.host("beta").await);
    let hosts = [&alpha, &beta];
    let (id, _) = running(&world).await;
    for step in ["thaw", "discard"] {
        for fall in [Fall::Before, Fall::After] {
            // Held up after the freeze, so that there is something to undo.
            set(hosts, Some(("send the rest", Fall::Before)));
            let begun = begin(&world, &id, "beta").await;
            silent("the stream", hosts).await;
            set(hosts, Some((step, fall)));
            let operation = begun["operation_id"].as_str().unwrap();
            world.ok("POST", &format!("/operations/{operation}/cancel"), json!({})).await;
            silent(step, hosts).await;
            world.restart().await;
            set(hosts, None);
            let ended = world.settled(&begun).await;
            assert_eq!(ended["state"], "cancelled", "{step} {fall:?}: {ended}");
            assert_eq!(owner(&world, &id, hosts).await, 0, "{step} {fall:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_destination_that_never_comes_back_gives_the_project_back() {
    let mut world = World::new().await;
    let (alpha, beta) = (world.host("alpha").await, world.host("beta").await);
    let (id, project) = running(&world).await;
    set([&alpha, &beta], Some(("stage", Fall::Before)));
    let begun = begin(&world, &id, "beta").await;
    silent("stage", [&alpha, &beta]).await;
    drop(beta);
    world.restart().await;
    alpha.script.lock().unwrap().fall = None;
    // The master waits for it a while; the promise is 60 s.
    let shown = until_within(Duration::from_secs(60), "the source has it again", async || {
        let shown = world.ok("GET", &format!("/projects/{id}"), Value::Null).await;
        (shown["operation_id"].is_null() && shown["state"] == "running").then_some(shown)
    })
    .await;
    // It had been frozen, so that the source was granted it anew.
    assert_eq!((&shown["host_id"], &shown["epoch"]), (&json!(alpha.id.to_string()), &json!(2)));
    assert_eq!(world.running.once(project), Some(alpha.id));
    let held = alpha.script.lock().unwrap().projects.get(&project).map(|(epoch, _)| epoch.number());
    assert_eq!(held, Some(2));
    // What the destination received is still to be deleted; that holds up nobody.
    let path = format!("/operations/{}", begun["operation_id"].as_str().unwrap());
    let operation = world.ok("GET", &path, Value::Null).await;
    assert_eq!(
        (&operation["state"], &operation["progress"]["cancellable"]),
        (&json!("running"), &json!(false))
    );
    let stopped = world.settled(&world.ok("POST", &format!("/projects/{id}/stop"), json!({})).await).await;
    assert_eq!(stopped["state"], "done");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_move_is_undone_and_a_committed_one_is_not() {
    let world = World::new().await;
    let (alpha, beta) = (world.host("alpha").await, world.host("beta").await);
    let hosts = [&alpha, &beta];
    let (id, _) = running(&world).await;
    for step in ["send", "send the rest"] {
        set(hosts, Some((step, Fall::Before)));
        let begun = begin(&world, &id, "beta").await;
        silent(step, hosts).await;
        set(hosts, None);
        let cancel = format!("/operations/{}/cancel", begun["operation_id"].as_str().unwrap());
        assert_eq!(world.call("POST", &cancel, &world.account(step).await.1, json!({})).await.0, 404);
        let asked = world.call("POST", &cancel, &world.admin, json!({})).await;
        assert_eq!((asked.0, &asked.1["cancelling"]), (202, &json!(true)), "{asked:?}");
        let ended = world.settled(&begun).await;
        assert_eq!((&ended["state"], &ended["error"]), (&json!("cancelled"), &Value::Null), "{ended}");
        assert_eq!(owner(&world, &id, hosts).await, 0);
        let again = world.call("POST", &cancel, &world.admin, json!({})).await;
        assert_eq!((again.0, &again.1["code"]), (409, &json!("operation_ended")));
    }

    set(hosts, Some(("activate", Fall::Before)));
    let begun = begin(&world, &id, "beta").await;
    silent("activate", hosts).await;
    let cancel = format!("/operations/{}/cancel", begun["operation_id"].as_str().unwrap());
    let refused = until("the commit shows", async || {
        let refused = world.call("POST", &cancel, &world.admin, json!({})).await;
        (refused.1["code"] == "not_cancellable").then_some(refused)
    });
    assert_eq!(refused.await.0, 409);
    let shown = world.ok("GET", &format!("/projects/{id}"), Value::Null).await;
    assert_eq!((&shown["host_id"], &shown["state"]), (&json!(beta.id.to_string()), &json!("moving")));
    let busy = world.call("POST", &format!("/projects/{id}/stop"), &world.admin, json!({})).await;
    assert_eq!((busy.0, &busy.1["operation_id"]), (409, &begun["operation_id"]));
    // A host that comes again is asked again.
    set(hosts, None);
    beta.again();
    assert_eq!(world.settled(&begun).await["state"], "done");
    assert_eq!(owner(&world, &id, hosts).await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_project_whose_new_host_dies_before_it_has_it_waits_for_nobody_once_that_is_said() {
    let mut world = World::new().await;
    let (alpha, beta) = (world.host("alpha").await, world.host("beta").await);
    let (id, _) = running(&world).await;
    set([&alpha, &beta], Some(("activate", Fall::Before)));
    let begun = begin(&world, &id, "beta").await;
    silent("activate", [&alpha, &beta]).await;
    beta.script.lock().unwrap().away = true;
    alpha.script.lock().unwrap().fall = None;
    // No time that passes ends it, nor does another process of the master.
    until("the lease is over", async || {
        (world.ok("GET", "/hosts/beta", Value::Null).await["state"] == "away").then_some(())
    })
    .await;
    world.restart().await;
    let path = format!("/projects/{id}");
    let shown = world.ok("GET", &path, Value::Null).await;
    assert_eq!((&shown["state"], &shown["operation_id"]), (&json!("moving"), &begun["operation_id"]));
    until("the master takes it for away", async || {
        (world.ok("GET", "/hosts/beta", Value::Null).await["state"] == "away").then_some(())
    })
    .await;
    world.ok("POST", "/hosts/beta/fence", json!({ "reason": "it burned", "attest": true })).await;
    let ended = world.settled(&begun).await;
    assert_eq!((&ended["state"], &ended["error"]["code"]), (&json!("failed"), &json!("host_fenced")));
    let shown = world.ok("GET", &path, Value::Null).await;
    assert_eq!(
        (&shown["state"], &shown["host_id"], &shown["epoch"], &shown["operation_id"]),
        (&json!("failed"), &json!(beta.id.to_string()), &json!(2), &Value::Null),
        "it is the dead host's, which may be recovered: {shown}"
    );
    assert!(shown["reason"].as_str().unwrap().contains("fenced"), "{shown}");
    // Nor does it go on when the next process begins.
    world.restart().await;
    assert_eq!(world.ok("GET", &path, Value::Null).await["state"], "failed");
    assert_eq!(world.settled(&begun).await["state"], "failed");
}

/// The events of an operation until its end: names and data.
fn follow(url: &str, token: &str, last: Option<&str>) -> Vec<(String, String, Value)> {
    let agent = ureq::Agent::config_builder().timeout_global(Some(crate::world::LIMIT)).build();
    let mut request = ureq::Agent::from(agent).get(url).header("authorization", format!("Bearer {token}"));
    if let Some(last) = last {
        request = request.header("last-event-id", last);
    }
    let response = request.call().unwrap();
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    let (mut events, mut name, mut id) = (Vec::new(), String::new(), String::new());
    for line in BufReader::new(response.into_body().into_reader()).lines() {
        let line = line.unwrap();
        match line.split_once(':').map(|(key, value)| (key, value.trim_start())) {
            Some(("event", value)) => value.clone_into(&mut name),
            Some(("id", value)) => value.clone_into(&mut id),
            Some(("data", value)) => {
                events.push((name.clone(), id.clone(), serde_json::from_str(value).unwrap()));
            }
            _ => {}
        }
    }
    events
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_can_be_followed_while_it_is_under_way() {
    let world = World::new().await;
    let (alpha, beta) = (world.host("alpha").await, world.host("beta").await);
    let (id, _) = running(&world).await;
    set([&alpha, &beta], Some(("send", Fall::Before)));
    let begun = begin(&world, &id, "beta").await;
    silent("the stream", [&alpha, &beta]).await;
    let operation = begun["operation_id"].as_str().unwrap().to_owned();
    let says = |bytes, bytes_per_sec| PeerRequest::Sending {
        move_id: operation.parse().unwrap(),
        name: format!("move-{operation}.0").parse().unwrap(),
        bytes,
        estimated_bytes: 900,
        bytes_per_sec,
    };
    let shown = async |what: &str, rate: u64| {
        until(what, async || {
            let seen = world.ok("GET", &format!("/operations/{operation}"), Value::Null).await;
            (seen["progress"]["bytes_per_sec"] == rate).then(|| seen["progress"].clone())
        })
        .await
    };
    // Only the source knows.
    beta.ask(&says(700, 70)).await;
    alpha.ask(&says(300, 100)).await;
    let progress = shown("how far it is", 100).await;
    let expected = json!([300, 1000, 7]);
    assert_eq!(json!([progress["bytes"], progress["bytes_expected"], progress["remaining_secs"]]), expected);
    // The stream had to begin again: people do not see it go back.
    alpha.ask(&says(10, 50)).await;
    assert_eq!(shown("the new rate", 50).await["bytes"], 300);
    set([&alpha, &beta], None);
    world.ok("POST", &format!("/operations/{operation}/cancel"), json!({})).await;
    assert_eq!(world.settled(&begun).await["state"], "cancelled");
    assert_eq!(owner(&world, &id, [&alpha, &beta]).await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_move_can_be_followed() {
    let world = World::new().await;
    let (alpha, beta) = (world.host("alpha").await, world.host("beta").await);
    let (id, _) = running(&world).await;
    // A full stream, a delta, and the rest.
    alpha.script.lock().unwrap().streams =
        vec![(1_000_000_000, 10_000), (100_000_000, 2_500), (1_000_000, 100), (500, 10)];
    set([&alpha, &beta], Some(("park", Fall::Before)));
    let begun = begin(&world, &id, "beta").await;
    let operation = begun["operation_id"].as_str().unwrap().to_owned();
    let (url, token) = (format!("{}/api/v1/operations/{operation}/events", world.url), world.admin.clone());
    let address = url.clone();
    let live = tokio::task::spawn_blocking(move || follow(&address, &token, None));
    let seen = until("the rate shows", async || {
        let seen = world.ok("GET", &format!("/operations/{operation}"), Value::Null).await;
        (seen["phase"] == "parking").then_some(seen)
    })
    .await;
    let progress = &seen["progress"];
    assert_eq!(progress["bytes"], 1_101_000_000_u64, "{seen}");
    assert_eq!(progress["bytes_per_sec"], 10_000_000, "{seen}");
    assert_eq!(progress["remaining_secs"], 1, "{seen}");
    assert_eq!(progress["cancellable"], true);
    assert!(
        world.ok("GET", &format!("/projects/{id}/why"), Value::Null).await["reason"]
            .as_str()
            .unwrap()
            .contains("parking")
    );
    // A cancel waits for the step in flight; a host that comes again has none.
    set([&alpha, &beta], None);
    world.ok("POST", &format!("/operations/{operation}/cancel"), json!({})).await;
    alpha.again();
    let ended = world.settled(&begun).await;
    assert_eq!(ended["state"], "cancelled", "{ended}");

    let live = live.await.unwrap();
    let (last, steps) = live.split_last().unwrap();
    assert_eq!((&*last.0, &last.2), ("end", &ended));
    assert!(steps.iter().all(|(name, _, data)| name == "phase" && data["at"].is_string()));
    let ids: Vec<u64> = steps.iter().map(|(_, id, _)| id.parse().unwrap()).collect();
    assert!(ids.windows(2).all(|pair| pair[1] == pair[0] + 1) && ids[0] == 1, "{ids:?}");
    let phases: Vec<&str> = steps.iter().map(|(_, _, data)| data["phase"].as_str().unwrap()).collect();
    assert_eq!(phases[0], "queued");
    assert!(phases.contains(&"parking") && phases.ends_with(&["cancelled"]), "{phases:?}");
    let bytes: Vec<u64> =
        steps.iter().filter_map(|(_, _, data)| data["progress"]["bytes"].as_u64()).collect();
    assert!(bytes.is_sorted(), "{bytes:?}");

    // Who comes later sees the same, and who comes again what is new.
    let (address, token) = (url.clone(), world.admin.clone());
    let later = tokio::task::spawn_blocking(move || follow(&address, &token, None)).await.unwrap();
    assert_eq!(later, live);
    let (after, token) = (ids[ids.len() - 2].to_string(), world.admin.clone());
    let rest = tokio::task::spawn_blocking(move || follow(&url, &token, Some(&after))).await.unwrap();
    assert_eq!(rest, live[live.len() - 2..]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repeated_move_is_the_same_move() {
    let mut world = World::new().await;
    let (alpha, beta) = (world.host("alpha").await, world.host("beta").await);
    let (id, _) = running(&world).await;
    let path = format!("/projects/{id}/move");
    let call = async |world: &World| {
        world.call_with("POST", &path, &world.admin, json!({ "to": "beta" }), Some("move-1")).await
    };
    let first = call(&world).await;
    assert_eq!(first.0, 202, "{first:?}");
    assert_eq!(world.settled(&first.1).await["state"], "done");
    assert_eq!(call(&world).await, first);
    // The answer outlives the process.
    world.restart().await;
    assert_eq!(call(&world).await, first);
    assert_eq!(owner(&world, &id, [&alpha, &beta]).await, 1);
    let reserves = |host: &Host| {
        let script = host.script.lock().unwrap();
        let steps = script.commands.iter().filter_map(|command| match command {
            HostCommand::Move { step, .. } => Some(label(step)),
            _ => None,
        });
        steps.filter(|step| *step == "reserve").count()
    };
    assert_eq!(reserves(&beta), 1);
}
