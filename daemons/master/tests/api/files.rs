//! Files of projects: differences, copies, clones, usage, policies.

use cocalc_core::{
    control::{HostCommand, PeerRequest},
    storage::{Storage, VolumeOptions},
};
use cocalc_ids::ProjectId;
use serde_json::{Value, json};

use crate::world::{Host, World};

/// A project with files on its host.
async fn with_files(world: &World, host: &Host) -> (String, ProjectId) {
    let id = world.project("alpha").await;
    let project: ProjectId = id.parse().unwrap();
    let files = host.script.lock().unwrap().files.clone();
    files.create(project, &VolumeOptions::default()).await.unwrap();
    for (path, content) in [("home/a", "one"), ("home/b", "two"), ("home/deep/c", "three")] {
        files.write(project, path, content).unwrap();
    }
    (id, project)
}

fn files(host: &Host) -> cocalc_core::memory::storage::MemoryStorage {
    host.script.lock().unwrap().files.clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn differences_come_in_pages_and_a_path_comes_back() {
    let world = World::new().await;
    let host = world.host("alpha").await;
    let (id, project) = with_files(&world, &host).await;
    let store = files(&host);
    store.snapshot(project, &"first".parse().unwrap()).await.unwrap();
    store.write(project, "home/a", "changed").unwrap();
    store.remove(project, "home/b").unwrap();
    store.write(project, "home/new", "x").unwrap();

    let path = format!("/projects/{id}/snapshots/first/diff");
    let mut seen = Vec::new();
    let mut query = "?limit=1".to_owned();
    loop {
        let page = world.ok("GET", &format!("{path}{query}"), Value::Null).await;
        let changes = page["changes"].as_array().unwrap();
        assert_eq!(changes.len(), 1);
        seen.push((changes[0]["path"].as_str().unwrap().to_owned(), changes[0]["kind"].clone()));
        let Some(next) = page["next"].as_str() else { break };
        query = format!("?limit=1&after={}", next.replace('/', "%2F"));
    }
    let expected = [("home/a", "modified"), ("home/b", "removed"), ("home/new", "added")]
        .map(|(p, k)| (p.to_owned(), json!(k)));
    assert_eq!(seen, expected);
    let same = world.ok("GET", &format!("{path}?to=first"), Value::Null).await;
    assert_eq!(same, json!({ "changes": [], "next": null }));

    // While it runs; what was there is kept.
    world.settled(&world.ok("POST", &format!("/projects/{id}/start"), json!({})).await).await;
    let restore = format!("/projects/{id}/snapshots/first/restore");
    let done = world.settled(&world.ok("POST", &restore, json!({ "path": "home/a" })).await).await;
    assert_eq!((&done["kind"], &done["state"]), (&json!("restore_path"), &json!("done")));
    assert_eq!(store.files(project).unwrap()["home/a"], "one");
    let kept = store.snapshots(project).await.unwrap();
    let former = kept.iter().find(|s| s.name.as_str().starts_with("before-restore-")).unwrap();
    assert_eq!(store.snapshot_files(project, &former.name).unwrap()["home/a"], "changed");
    assert_eq!(world.ok("GET", &format!("/projects/{id}"), Value::Null).await["state"], "running");
    // As a whole only when it is stopped.
    let whole = world.call("POST", &restore, &world.admin, json!({})).await;
    assert_eq!((whole.0, &whole.1["code"]), (409, &json!("wrong_state")));

    for (query, code) in [("?to=none", 404), ("?after=../x", 400), ("?to=a%2Fb", 400)] {
        assert_eq!(
            world.call("GET", &format!("{path}{query}"), &world.admin, Value::Null).await.0,
            code,
            "{query}"
        );
    }
    let unknown =
        world.call("GET", &format!("/projects/{id}/snapshots/none/diff"), &world.admin, Value::Null).await;
    assert_eq!((unknown.0, &unknown.1["code"]), (404, &json!("not_found")));
    for bad in ["", "..", "/etc/passwd", "a/../b", "%00"] {
        let refused = world.call("POST", &restore, &world.admin, json!({ "path": bad })).await;
        assert_eq!((refused.0, &refused.1["code"]), (400, &json!("invalid_request")), "{bad:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_takes_the_right_to_read_there_and_to_write_here() {
    let world = World::new().await;
    let (host, _beta) = (world.host("alpha").await, world.host("beta").await);
    let ((one, _), (two, second)) = (with_files(&world, &host).await, with_files(&world, &host).await);
    let store = files(&host);
    let body = json!({ "from_project": one, "from_path": "home/deep", "to_path": "home/copied" });
    let path = format!("/projects/{two}/copy");
    let key = Some("copy-1");
    let first = world.call_with("POST", &path, &world.admin, body.clone(), key).await;
    assert_eq!(world.settled(&first.1).await["state"], "done");
    assert_eq!(store.files(second).unwrap()["home/copied/c"], "three");
    // The same call again is the same operation, and is not done again.
    let again = world.call_with("POST", &path, &world.admin, body.clone(), key).await;
    assert_eq!(first.1["operation_id"], again.1["operation_id"]);
    let copies = |host: &Host| {
        let script = host.script.lock().unwrap();
        script.commands.iter().filter(|command| matches!(command, HostCommand::Copy { .. })).count()
    };
    assert_eq!(copies(&host), 1);
    // What is there is not replaced unless that is asked for.
    let failed = world.settled(&world.ok("POST", &path, body.clone()).await).await;
    assert_eq!((&failed["state"], &failed["error"]["code"]), (&json!("failed"), &json!("already_exists")));
    assert_eq!(world.ok("GET", &format!("/projects/{two}"), Value::Null).await["state"], "stopped");
    let mut replace = body.clone();
    replace["replace"] = true.into();
    assert_eq!(world.settled(&world.ok("POST", &path, replace).await).await["state"], "done");

    // Viewers read, collaborators write, strangers see nothing.
    let (account, token) = world.account("reader").await;
    let other =
        |n: &str| json!({ "from_project": one, "from_path": "home/a", "to_path": format!("home/{n}") });
    let refused = world.call("POST", &path, &token, other("x")).await;
    assert_eq!((refused.0, &refused.1["code"]), (404, &json!("not_found")));
    for (project, role) in [(&one, "viewer"), (&two, "viewer")] {
        let members = format!("/projects/{project}/members");
        world.ok("POST", &members, json!({ "account_id": account, "role": role })).await;
    }
    let refused = world.call("POST", &path, &token, other("x")).await;
    assert_eq!((refused.0, &refused.1["code"]), (403, &json!("access_denied")));
    let members = format!("/projects/{two}/members");
    world.ok("POST", &members, json!({ "account_id": account, "role": "collaborator" })).await;
    let (status, begun) = world.call("POST", &path, &token, other("x")).await;
    assert_eq!(status, 202, "{begun}");
    assert_eq!(world.settled(&begun).await["state"], "done");

    // Between hosts nothing is copied yet.
    let far = world.project("beta").await;
    let refused = world.call("POST", &format!("/projects/{far}/copy"), &world.admin, other("x")).await;
    assert_eq!((refused.0, &refused.1["code"]), (409, &json!("other_host")));
    assert!(refused.1["detail"].as_str().unwrap().contains("move one of them"), "{}", refused.1);
    for bad in [
        json!({ "from_project": one, "from_path": "../x", "to_path": "y" }),
        json!({ "from_project": one, "from_path": "x", "to_path": "" }),
        json!({ "from_project": one, "from_path": "x" }),
        json!({ "from_project": "x", "from_path": "x", "to_path": "y" }),
    ] {
        assert_eq!(world.call("POST", &path, &world.admin, bad.clone()).await.0, 400, "{bad}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clone_is_the_caller_s_and_is_made_once() {
    let world = World::new().await;
    let host = world.host("alpha").await;
    let (id, project) = with_files(&world, &host).await;
    let store = files(&host);
    store.snapshot(project, &"first".parse().unwrap()).await.unwrap();
    store.write(project, "home/a", "later").unwrap();
    let (account, token) = world.account("friend").await;
    let path = format!("/projects/{id}/clone");
    let body = json!({ "name": "mine", "snapshot": "first" });
    assert_eq!(world.call("POST", &path, &token, body.clone()).await.0, 404);
    let members = format!("/projects/{id}/members");
    world.ok("POST", &members, json!({ "account_id": account, "role": "viewer" })).await;
    assert_eq!(world.call("POST", &path, &token, body.clone()).await.0, 403);
    world.ok("POST", &members, json!({ "account_id": account, "role": "collaborator" })).await;
    let (status, begun) = world.call_with("POST", &path, &token, body.clone(), Some("k")).await;
    assert_eq!(status, 202, "{begun}");
    assert_eq!(world.settled(&begun).await["state"], "done");
    let again = world.call_with("POST", &path, &token, body, Some("k")).await;
    assert_eq!(again.1["project"]["id"], begun["project"]["id"]);
    let new = begun["project"]["id"].as_str().unwrap();
    let shown = world.call("GET", &format!("/projects/{new}"), &token, Value::Null).await.1;
    assert_eq!(
        (&shown["owner"], &shown["name"], &shown["state"]),
        (&json!(account), &json!("mine"), &json!("stopped"))
    );
    assert_eq!(shown["host_id"], host.id.to_string());
    assert_eq!(store.files(new.parse().unwrap()).unwrap()["home/a"], "one");
    let same_owner = host.script.lock().unwrap().commands.iter().find_map(|command| match command {
        HostCommand::Clone { same_owner, .. } => Some(*same_owner),
        _ => None,
    });
    assert_eq!(same_owner, Some(false), "between owners every byte is copied");

    // One that fails is made good by a start, as a clone and not as an empty project.
    let lost = world.ok("POST", &path, json!({ "snapshot": "not-yet" })).await;
    host.script.lock().unwrap().refuse = Some(cocalc_core::control::ErrorCode::NoSpace);
    let second = world.ok("POST", &path, json!({ "snapshot": "first" })).await;
    let ended = world.settled(&second).await;
    host.script.lock().unwrap().refuse = None;
    world.settled(&lost).await;
    if ended["state"] == "failed" {
        let second = second["project"]["id"].as_str().unwrap();
        world.settled(&world.ok("POST", &format!("/projects/{second}/start"), json!({})).await).await;
        assert_eq!(store.files(second.parse().unwrap()).unwrap()["home/a"], "one");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn usage_is_told_in_numbers_and_in_words() {
    let world = World::new().await;
    let host = world.host("alpha").await;
    let (id, project) = with_files(&world, &host).await;
    let usage = world.ok("GET", &format!("/projects/{id}/usage"), Value::Null).await;
    let expected = json!({
        "charged_bytes": 11, "limit_bytes": null, "plan_bytes": 1000, "allowance_bytes": 500,
        "source": "quota", "notice": null, "du": null,
    });
    assert_eq!(usage, expected);
    let counted = world.ok("GET", &format!("/projects/{id}/usage?du=true"), Value::Null).await;
    let du = json!({ "entries": 6, "total_bytes": 11, "exclusive_bytes": 11, "shared_bytes": 0 });
    assert_eq!(counted["du"], du);
    host.script.lock().unwrap().notice = Some("its files alone take too much".into());
    let why = world.ok("GET", &format!("/projects/{id}/why"), Value::Null).await;
    assert!(why["reason"].as_str().unwrap().ends_with("its files alone take too much"), "{why}");
    files(&host).delete(project).await.unwrap();
    assert_eq!(world.call("GET", &format!("/projects/{id}/usage"), &world.admin, Value::Null).await.0, 404);
    host.script.lock().unwrap().mute = true;
    host.script.lock().unwrap().away = true;
    crate::world::until("its absence is told", async || {
        let away = world.call("GET", &format!("/projects/{id}/usage"), &world.admin, Value::Null).await;
        (away.0 == 503 && away.1["code"] == "host_unavailable").then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_policy_is_checked_and_reaches_the_host_and_the_next_start() {
    let world = World::new().await;
    let host = world.host("alpha").await;
    let (id, _) = with_files(&world, &host).await;
    let path = format!("/projects/{id}/snapshot-policy");
    let shown = world.ok("GET", &path, Value::Null).await;
    assert_eq!((&shown["from"], &shown["policy"]["hourly"]), (&json!("host"), &json!(24)));
    let set = world.ok("PUT", &path, json!({ "hourly": 12 })).await;
    assert_eq!(
        (&set["from"], &set["policy"]["hourly"], &set["policy"]["daily"]),
        (&json!("project"), &json!(12), &json!(7))
    );
    assert_eq!(world.ok("GET", &path, Value::Null).await, set);
    let configured = |host: &Host| {
        let script = host.script.lock().unwrap();
        script.commands.iter().rev().find_map(|command| match command {
            HostCommand::Configure { config, .. } | HostCommand::Start { config, .. } => config.snapshots,
            _ => None,
        })
    };
    assert_eq!(configured(&host).unwrap().fields().hourly, 12);
    host.script.lock().unwrap().commands.clear();
    world.settled(&world.ok("POST", &format!("/projects/{id}/start"), json!({})).await).await;
    assert_eq!(configured(&host).unwrap().fields().hourly, 12);
    for (bad, field) in [
        (json!({ "interval_secs": 1 }), "interval_secs"),
        (json!({ "hourly": 101 }), "hourly"),
        (json!({ "yearly": 1 }), "yearly"),
    ] {
        let (status, refused) = world.call("PUT", &path, &world.admin, bad).await;
        assert_eq!(status, 400);
        assert!(refused["detail"].as_str().unwrap().contains(field), "{refused}");
    }
    // More space than the operator gives is not the owner's to take.
    let (account, token) = world.account("owner").await;
    let members = format!("/projects/{id}/members");
    world.ok("POST", &members, json!({ "account_id": account, "role": "owner" })).await;
    let greedy = json!({ "allowance_percent": 1000 });
    assert_eq!(world.call("PUT", &path, &token, greedy).await.0, 403);
    assert_eq!(world.call("PUT", &path, &token, json!({ "allowance_percent": 20 })).await.0, 200);
    assert_eq!(world.ok("DELETE", &path, Value::Null).await["from"], "host");
    assert_eq!(world.ok("GET", &path, Value::Null).await["from"], "host");
    // Names of automatic snapshots are not for people.
    let snapshots = format!("/projects/{id}/snapshots");
    let body = json!({ "name": "auto-2026-11-26T23-51-28Z" });
    assert_eq!(world.call("POST", &snapshots, &world.admin, body).await.0, 400);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_does_not_say_what_the_name_of_an_image_means() {
    let world = World::new().await;
    let host = world.host("alpha").await;
    let digest = cocalc_ids::ImageDigest::from_bytes([7; 32]);
    let image = cocalc_core::control::ImageReport {
        digest,
        names: ["debian".to_owned()].into(),
        sources: Default::default(),
        bytes: 1,
        pinned: false,
        projects: 0,
        used: None,
        imported: None,
    };
    host.ask(&PeerRequest::Images { images: vec![image] }).await;
    let all = world.ok("GET", "/images", Value::Null).await;
    assert_eq!(
        (&all["images"][0]["digest"], &all["images"][0]["names"]),
        (&json!(digest.to_string()), &json!([])),
        "{all}"
    );
    let body = json!({ "name": "p", "image": "debian" });
    let (status, refused) = world.call("POST", "/projects", &world.admin, body).await;
    assert_eq!((status, &refused["code"]), (409, &json!("no_image")), "{refused}");
}
