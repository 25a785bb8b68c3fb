//! Restores whose master dies at every step, and projects that are made from a
//! backup. The backup itself is the host's, which does what the test says.

use cocalc_core::control::{BackupsCommand, HostCommand};
use cocalc_ids::ProjectId;
use serde_json::{Value, json};

use crate::world::{Fall, Host, World, until};

async fn silent(what: &str, host: &Host) {
    until(what, async || host.script.lock().unwrap().mute.then_some(())).await;
}

fn set(host: &Host, fall: Option<(&'static str, Fall)>) {
    let mut script = host.script.lock().unwrap();
    (script.fall, script.mute) = (fall, false);
}

async fn there(world: &World) {
    until("its host is there", async || {
        (world.ok("GET", "/hosts/alpha", Value::Null).await["state"] == "connected").then_some(())
    })
    .await;
}

/// How often it was asked to bring a backup.
fn fetches(host: &Host) -> usize {
    let script = host.script.lock().unwrap();
    let work = |command: &&HostCommand| {
        matches!(command, HostCommand::Backups { what: BackupsCommand::Work { .. }, .. })
    };
    script.commands.iter().filter(work).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_master_that_dies_at_any_step_of_a_restore_leaves_what_was_or_what_was_restored() {
    let mut world = World::with_backups().await;
    let host = world.host("alpha").await;
    let id = world.project("alpha").await;
    let project: ProjectId = id.parse().unwrap();
    world.settled(&world.ok("POST", &format!("/projects/{id}/start"), json!({})).await).await;
    let path = format!("/projects/{id}/backups/latest/restore");
    for step in ["fetch", "stop", "swap", "delete a snapshot", "start"] {
        for fall in [Fall::Before, Fall::After] {
            there(&world).await;
            let before = host.script.lock().unwrap().swaps.len();
            set(&host, Some((step, fall)));
            let begun = world.ok("POST", &path, json!({ "to": "in_place" })).await;
            silent(step, &host).await;
            world.restart().await;
            set(&host, None);
            let ended = world.settled(&begun).await;
            assert_eq!(ended["state"], "done", "{step} {fall:?}: {ended}");
            let shown = world.ok("GET", &format!("/projects/{id}"), Value::Null).await;
            assert_eq!((&shown["state"], &shown["operation_id"]), (&json!("running"), &Value::Null));
            let script = host.script.lock().unwrap();
            let swaps = &script.swaps[before..];
            assert_eq!(swaps.len(), 1, "once, whatever was repeated: {step} {fall:?}: {swaps:?}");
            let (_, fetched, former) = &swaps[0];
            let left = &script.snapshots[&project];
            assert!(left.contains(former) && !left.contains(fetched), "{step} {fall:?}: {left:?}");
            drop(script);
            assert_eq!(world.running.once(project), Some(host.id));
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restore_that_is_cancelled_leaves_the_project_running_as_it_was() {
    let mut world = World::with_backups().await;
    let host = world.host("alpha").await;
    let id = world.project("alpha").await;
    world.settled(&world.ok("POST", &format!("/projects/{id}/start"), json!({})).await).await;
    host.script.lock().unwrap().fetches_for_ever = true;
    let path = format!("/projects/{id}/backups/latest/restore");
    for restarted in [false, true] {
        there(&world).await;
        let begun = world.ok("POST", &path, json!({ "to": "in_place" })).await;
        let operation = format!("/operations/{}", begun["operation_id"].as_str().unwrap());
        let seen = until("people see how far it is", async || {
            let seen = world.ok("GET", &operation, Value::Null).await;
            (seen["progress"]["bytes"] == 5).then_some(seen)
        })
        .await;
        assert_eq!(seen["progress"]["cancellable"], true, "{seen}");
        if restarted {
            world.restart().await;
            there(&world).await;
        }
        world.ok("POST", &format!("{operation}/cancel"), json!({})).await;
        let ended = world.settled(&begun).await;
        assert_eq!(ended["state"], "cancelled", "{ended}");
        let shown = world.ok("GET", &format!("/projects/{id}"), Value::Null).await;
        assert_eq!(shown["state"], "running", "{shown}");
        let script = host.script.lock().unwrap();
        assert!(script.swaps.is_empty(), "{:?}", script.swaps);
        let stops = |command: &&HostCommand| matches!(command, HostCommand::Stop { .. });
        assert_eq!(script.commands.iter().filter(stops).count(), 0, "it ran on");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_project_made_from_a_backup_is_filled_once_also_if_the_master_dies() {
    let mut world = World::with_backups().await;
    let host = world.host("alpha").await;
    let original = world.project("alpha").await;
    let path = format!("/projects/{original}/backups/latest/restore");
    for step in ["create", "fetch", "swap", "delete a snapshot"] {
        for fall in [Fall::Before, Fall::After] {
            there(&world).await;
            let before = host.script.lock().unwrap().swaps.len();
            set(&host, Some((step, fall)));
            let begun = world.ok("POST", &path, json!({ "to": "new_project", "host": "alpha" })).await;
            let id = begun["project"]["id"].as_str().unwrap();
            silent(step, &host).await;
            world.restart().await;
            set(&host, None);
            let ended = world.settled(&begun).await;
            assert_eq!(ended["state"], "done", "{step} {fall:?}: {ended}");
            assert_eq!(host.script.lock().unwrap().swaps.len(), before + 1, "{step} {fall:?}");
            // What is done in it later stays.
            let fetched = fetches(&host);
            let started = world.ok("POST", &format!("/projects/{id}/start"), json!({})).await;
            assert_eq!(world.settled(&started).await["state"], "done");
            assert_eq!(host.script.lock().unwrap().swaps.len(), before + 1, "{step} {fall:?}");
            assert_eq!(fetches(&host), fetched);
            world.settled(&world.ok("DELETE", &format!("/projects/{id}"), Value::Null).await).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_project_whose_making_from_a_backup_was_cancelled_is_not_started_nor_filled() {
    let mut world = World::with_backups().await;
    let host = world.host("alpha").await;
    let original = world.project("alpha").await;
    host.script.lock().unwrap().fetches_for_ever = true;
    let path = format!("/projects/{original}/backups/latest/restore");
    let begun = world.ok("POST", &path, json!({ "to": "new_project", "host": "alpha" })).await;
    let (id, operation) =
        (begun["project"]["id"].as_str().unwrap(), begun["operation_id"].as_str().unwrap().to_owned());
    until("it is being fetched", async || {
        let seen = world.ok("GET", &format!("/operations/{operation}"), Value::Null).await;
        (seen["progress"]["bytes"] == 5).then_some(())
    })
    .await;
    world.ok("POST", &format!("/operations/{operation}/cancel"), json!({})).await;
    assert_eq!(world.settled(&begun).await["state"], "cancelled");
    let shown = world.ok("GET", &format!("/projects/{id}"), Value::Null).await;
    assert_eq!(shown["state"], "failed", "{shown}");
    host.script.lock().unwrap().fetches_for_ever = false;
    let fetched = fetches(&host);
    for restart in [false, true] {
        if restart {
            world.restart().await;
            there(&world).await;
        }
        let started =
            world.settled(&world.ok("POST", &format!("/projects/{id}/start"), json!({})).await).await;
        assert_eq!(started["state"], "failed", "{started}");
        let detail = started["error"]["detail"].as_str().unwrap();
        assert!(detail.contains("delete it, and restore the backup again"), "{detail}");
    }
    assert_eq!(fetches(&host), fetched);
    assert!(host.script.lock().unwrap().swaps.is_empty());
    // As it says.
    let gone = world.ok("DELETE", &format!("/projects/{id}"), Value::Null).await;
    assert_eq!(world.settled(&gone).await["state"], "done");
    let begun = world.ok("POST", &path, json!({ "to": "new_project", "host": "alpha" })).await;
    assert_eq!(world.settled(&begun).await["state"], "done");
    assert_eq!(host.script.lock().unwrap().swaps.len(), 1);
}
