//! Passwords, log-ins, accounts of others, and how often anybody may try.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use cocalc_core::BoxError;
use cocalc_master::accounts::{Accounts, Person};
use serde_json::{Value, json};

use crate::world::World;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn people_log_in_with_a_password() {
    let world = World::new().await;
    let (id, key) = world.account("Ada").await;
    let path = format!("/accounts/{id}/password");
    let set = async |token: &str, body: Value| world.call("PUT", &path, token, body).await.0;
    assert_eq!(set(&key, json!({ "login": "ada", "password": "short" })).await, 400);
    assert_eq!(set(&key, json!({ "login": "ada", "password": "correct horse" })).await, 204);
    let login = async |name: &str, password: &str| {
        world.call("POST", "/login", "", json!({ "login": name, "password": password })).await
    };
    for (name, password) in [("ada", "wrong horse"), ("nobody", "correct horse"), ("ada", "")] {
        let (status, answer) = login(name, password).await;
        assert_eq!((status, &answer["detail"]), (401, &json!("wrong name or password")), "{name}");
    }
    let (status, logged) = login("ada", "correct horse").await;
    assert_eq!((status, &logged["account_id"]), (201, &json!(id)), "{logged}");
    let token = logged["token"].as_str().unwrap();
    assert_eq!(world.call("GET", "/account", token, Value::Null).await.1["id"], json!(id));
    // Another password takes the one of before.
    let new = json!({ "login": "ada", "password": "battery staple" });
    assert_eq!(set(token, new.clone()).await, 400);
    let with = json!({ "login": "ada", "password": "battery staple", "current": "correct horse" });
    assert_eq!(set(token, with).await, 204);
    assert_eq!(login("ada", "correct horse").await.0, 401);
    // Logging out ends this log-in; signing out, all of them, and no API key.
    let (_, second) = login("ada", "battery staple").await;
    let second = second["token"].as_str().unwrap();
    assert_eq!(world.call("POST", "/logout", token, Value::Null).await.0, 204);
    assert_eq!(world.call("GET", "/account", token, Value::Null).await.0, 401);
    assert_eq!(world.call("POST", "/logout", token, Value::Null).await.0, 401, "again");
    assert_eq!(world.call("GET", "/account", second, Value::Null).await.0, 200);
    // Who waits is told where it is in force: nowhere was anything opened.
    let (_, third) = login("ada", "battery staple").await;
    let third = third["token"].as_str().unwrap();
    let (status, ended) = world.call("POST", "/logout?wait=true", third, Value::Null).await;
    assert_eq!((status, &ended["receipt"]["complete"]), (200, &json!(true)), "{ended}");
    assert_eq!(ended["receipt"]["change"], "account.log-out");
    assert_eq!(world.call("GET", "/account", third, Value::Null).await.0, 401);
    assert_eq!(world.call("GET", "/account", second, Value::Null).await.0, 200);
    assert_eq!(world.call("POST", &format!("/accounts/{id}/sign-out"), second, json!({})).await.0, 200);
    assert_eq!(world.call("GET", "/account", second, Value::Null).await.0, 401);
    assert_eq!(world.call("GET", "/account", &key, Value::Null).await.0, 200);
    // Names are one person's; a banned one gets in no more.
    let (other, others) = world.account("Eve").await;
    let taken = json!({ "login": "ada", "password": "battery staple" });
    let path = format!("/accounts/{other}/password");
    assert_eq!(world.call("PUT", &path, &others, taken).await.0, 409);
    world.ok("POST", &format!("/accounts/{id}/ban"), json!({})).await;
    assert_eq!(login("ada", "battery staple").await.0, 401);
    for file in ["master.db", "master.db-wal"] {
        let bytes = std::fs::read(world.dir.path().join("data").join(file)).unwrap_or_default();
        for secret in ["battery staple", token] {
            assert!(!bytes.windows(secret.len()).any(|part| part == secret.as_bytes()), "{file}: {secret}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn guessing_is_slow() {
    let world = World::new().await;
    let guess = json!({ "login": "ada", "password": "a guess" });
    let mut statuses = Vec::new();
    for _ in 0..12 {
        statuses.push(world.call("POST", "/login", "", guess.clone()).await.0);
    }
    assert!(statuses[..10].iter().all(|status| *status == 401), "{statuses:?}");
    assert_eq!(statuses[10..], [429, 429], "of one name, from wherever");
    // Bad tokens of one address: then it waits, even with a good one.
    let mut refused = None;
    for n in 0..200 {
        let (status, answer) = world.call("GET", "/account", &format!("cct_{n}"), Value::Null).await;
        if status == 429 {
            refused = Some(answer);
            break;
        }
        assert_eq!(status, 401, "{answer}");
    }
    let refused = refused.expect("nobody may try for ever");
    assert_eq!(refused["code"], "rate_limited", "{refused}");
    let wait = refused["retry_after_secs"].as_u64().unwrap();
    assert!((1..=5).contains(&wait), "{refused}");
    tokio::time::sleep(Duration::from_secs(wait)).await;
    crate::world::until("what was told is enough", async || {
        let (status, _) = world.call("GET", "/account", &world.admin, Value::Null).await;
        (status == 200).then_some(())
    })
    .await;
}

/// An integrator's own accounts.
#[derive(Debug)]
struct Theirs;

#[async_trait]
impl Accounts for Theirs {
    fn provider(&self) -> &str {
        "example.org"
    }

    async fn bearer(&self, token: &str) -> Result<Option<Person>, BoxError> {
        match token.strip_prefix("their-") {
            Some("broken") => Err("their database is away".into()),
            Some(name) => Ok(Some(Person { subject: format!("id-{name}"), name: name.to_owned() })),
            None => Ok(None),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accounts_of_an_integrator_are_good_here() {
    let world = World::with(Some(Arc::new(Theirs))).await;
    let _host = world.host("alpha").await;
    let me = async |token: &str| world.call("GET", "/account", token, Value::Null).await;
    let (status, first) = me("their-ada").await;
    assert_eq!((status, &first["name"], &first["admin"]), (200, &json!("ada"), &json!(false)), "{first}");
    assert_eq!(me("their-ada").await.1["id"], first["id"], "the same account each time");
    assert_ne!(me("their-eve").await.1["id"], first["id"]);
    let (status, begun) = world.call("POST", "/projects", "their-ada", json!({ "name": "p" })).await;
    assert_eq!(status, 202, "{begun}");
    let project = format!("/projects/{}", begun["project"]["id"].as_str().unwrap());
    assert_eq!(world.call("GET", &project, "their-eve", Value::Null).await.0, 404);
    assert_eq!(world.call("GET", "/accounts", "their-ada", Value::Null).await.0, 403);
    assert_eq!(world.call("POST", "/logout", "their-ada", Value::Null).await.0, 409);
    for (token, status) in [("nobodys", 401), ("their-broken", 503), ("cct_nothing", 401)] {
        assert_eq!(me(token).await.0, status, "{token}");
    }
    assert_eq!(me(&world.admin).await.0, 200, "the master's own go on");
    world.ok("POST", &format!("/accounts/{}/ban", first["id"].as_str().unwrap()), json!({})).await;
    assert_eq!(me("their-ada").await.0, 403, "banned");
}
