//! What projects may use, and how they are kept apart: who may say so, and that
//! hosts hear of it.

use cocalc_core::{
    control::{HostCommand, ProjectConfig},
    runner::NetworkPolicy,
};
use serde_json::{Value, json};

use crate::world::{Host, World};

/// What the host was told last of how a project is made.
fn told(host: &Host) -> Option<ProjectConfig> {
    let script = host.script.lock().unwrap();
    script.commands.iter().rev().find_map(|command| match command {
        HostCommand::Configure { config, .. } | HostCommand::Start { config, .. } => Some(config.clone()),
        _ => None,
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limits_are_within_the_plan_and_reach_the_host() {
    let world = World::new().await;
    let host = world.host("alpha").await;
    let id = world.project("alpha").await;
    let path = format!("/projects/{id}/limits");
    let (account, token) = world.account("owner").await;
    let members = format!("/projects/{id}/members");
    world.ok("POST", &members, json!({ "account_id": account, "role": "owner" })).await;

    let set =
        world.call("PUT", &path, &token, json!({ "memory_bytes": 1_u64 << 30, "cpu_weight": 200 })).await;
    assert_eq!(set.0, 200, "{}", set.1);
    assert_eq!((&set.1["limits"]["memory_bytes"], &set.1["applied"]), (&json!(1_u64 << 30), &json!(false)));
    let limits = told(&host).unwrap().limits;
    assert_eq!((limits.memory_bytes, limits.cpu_weight, limits.pids), (Some(1 << 30), Some(200), None));
    assert_eq!(world.ok("GET", &path, Value::Null).await["limits"], set.1["limits"]);
    for bad in [json!({ "memory": 1 }), json!({ "pids": -1 }), json!({ "cpu_weight": 70_000 })] {
        assert_eq!(world.call("PUT", &path, &token, bad.clone()).await.0, 400, "{bad}");
    }

    // The plan is the operator's.
    let max = format!("{path}-max");
    let plan = json!({ "memory_bytes": 2_u64 << 30, "pids": 500 });
    assert_eq!(world.call("PUT", &max, &token, plan.clone()).await.0, 403);
    world.ok("PUT", &max, plan).await;
    assert_eq!(told(&host).unwrap().effective_limits().pids, Some(500), "what is left open is the plan's");
    let greedy = world.call("PUT", &path, &token, json!({ "memory_bytes": 3_u64 << 30 })).await;
    assert_eq!((greedy.0, &greedy.1["code"]), (403, &json!("limit_above_plan")));
    assert!(greedy.1["detail"].as_str().unwrap().contains("memory"), "{}", greedy.1);
    assert_eq!(world.call("PUT", &path, &token, json!({ "memory_bytes": 2_u64 << 30 })).await.0, 200);
    world.ok("PUT", &path, json!({ "memory_bytes": 3_u64 << 30 })).await;
    let lowered = world.call("PUT", &max, &world.admin, json!({ "memory_bytes": 1_u64 << 30 })).await;
    assert_eq!((lowered.0, &lowered.1["code"]), (409, &json!("limit_above_plan")));

    // What the host can't keep is not kept here either.
    host.script.lock().unwrap().refuse = Some(cocalc_core::control::ErrorCode::Invalid);
    let refused = world.call("PUT", &path, &token, json!({ "memory_bytes": 64 << 20 })).await;
    assert_eq!(refused.0, 409, "{}", refused.1);
    host.script.lock().unwrap().refuse = None;
    assert_eq!(world.ok("GET", &path, Value::Null).await["limits"]["memory_bytes"], json!(3_u64 << 30));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_changes_at_once_are_both_known_to_the_host() {
    let world = World::new().await;
    let host = world.host("alpha").await;
    let id = world.project("alpha").await;
    let path = format!("/projects/{id}/limits");
    let plan = format!("{path}-max");
    // Each is under way while the other one begins.
    host.script.lock().unwrap().slow = std::time::Duration::from_millis(300);
    for round in 1..=2_u64 {
        let (limits, max) = (json!({ "pids": 100 * round }), json!({ "pids": 1_000 * round }));
        tokio::join!(world.ok("PUT", &path, limits), world.ok("PUT", &plan, max));
        let stored = world.ok("GET", &path, Value::Null).await;
        let config = told(&host).unwrap();
        let heard = (json!(config.limits.pids), json!(config.limits_max.pids));
        assert_eq!(heard, (stored["limits"]["pids"].clone(), stored["max"]["pids"].clone()), "round {round}");
        assert_eq!(heard, (json!(100 * round), json!(1_000 * round)), "round {round}");
    }
    // What is asked for is measured against the plan as it is when its turn has
    // come, and nothing is left at the host of what is refused.
    let (_, lowered) = tokio::join!(
        world.call("PUT", &path, &world.admin, json!({ "pids": 150 })),
        world.call("PUT", &plan, &world.admin, json!({ "pids": 120 }))
    );
    let stored = world.ok("GET", &path, Value::Null).await;
    let config = told(&host).unwrap();
    assert_eq!(json!(config.limits.pids), stored["limits"]["pids"], "{lowered:?}");
    assert_eq!(json!(config.limits_max.pids), stored["max"]["pids"], "{lowered:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_project_is_kept_apart_as_its_owner_says_unless_the_operator_does() {
    let world = World::new().await;
    let host = world.host("alpha").await;
    let id = world.project("alpha").await;
    let path = format!("/projects/{id}/isolation");
    let (account, token) = world.account("owner").await;
    let members = format!("/projects/{id}/members");
    world.ok("POST", &members, json!({ "account_id": account, "role": "owner" })).await;
    let shown = world.ok("GET", &path, Value::Null).await;
    assert_eq!(shown, json!({ "strict": false, "network": { "policy": "full" }, "fixed": false }));

    let list = json!({ "policy": "only", "allow": ["PyPI.org:443", "192.0.2.0/24"] });
    let set = world.call("PUT", &path, &token, json!({ "network": list })).await;
    assert_eq!((set.0, &set.1["network"]["allow"]), (200, &json!(["pypi.org:443", "192.0.2.0/24"])));
    world.settled(&world.ok("POST", &format!("/projects/{id}/start"), json!({})).await).await;
    let isolation = told(&host).unwrap().isolation;
    assert!(matches!(isolation.network, NetworkPolicy::Only { .. }) && !isolation.strict);
    for bad in [
        json!({ "network": { "policy": "only", "allow": ["*.org"] } }),
        json!({ "network": { "policy": "some" } }),
        json!({ "strickt": true }),
    ] {
        assert_eq!(world.call("PUT", &path, &token, bad.clone()).await.0, 400, "{bad}");
    }

    assert_eq!(world.call("PUT", &path, &token, json!({ "fixed": true })).await.0, 403);
    world.ok("PUT", &path, json!({ "network": { "policy": "none" }, "strict": true, "fixed": true })).await;
    let full = json!({ "network": { "policy": "full" } });
    assert_eq!(world.call("PUT", &path, &token, full.clone()).await.0, 403);
    world.ok("PUT", &path, json!({ "fixed": false })).await;
    let set = world.call("PUT", &path, &token, full).await;
    assert_eq!((set.0, &set.1["strict"]), (200, &json!(true)), "what is not said stays");
}
