//! The OpenAPI document, and the codes of errors.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::world::World;

/// Every call; `!` those without a bearer token. Programs rely on them: the
/// list only grows.
const CALLS: &[&str] = &[
    "!GET /login/oidc",
    "!GET /ssh-ca",
    "!POST /hosts/join",
    "!POST /login",
    "!POST /login/oidc",
    "!POST /proxies/join",
    "DELETE /accounts/{id}/identities/{identity}",
    "DELETE /accounts/{id}/tokens/{token}",
    "DELETE /projects/{id}",
    "DELETE /projects/{id}/backups/policy",
    "DELETE /projects/{id}/backups/{backup}",
    "DELETE /projects/{id}/env/{name}",
    "DELETE /projects/{id}/members/{account}",
    "DELETE /projects/{id}/secrets/{name}",
    "DELETE /projects/{id}/snapshot-policy",
    "DELETE /projects/{id}/snapshots/{name}",
    "DELETE /ssh-keys/{id}",
    "GET /account",
    "GET /accounts",
    "GET /accounts/{id}",
    "GET /accounts/{id}/identities",
    "GET /accounts/{id}/tokens",
    "GET /backups",
    "GET /hosts",
    "GET /hosts/{id}",
    "GET /hosts/{id}/audit-head",
    "GET /hosts/{id}/audit-heads",
    "GET /images",
    "GET /keys",
    "GET /operations",
    "GET /operations/{id}",
    "GET /operations/{id}/events",
    "GET /operations/{id}/wait",
    "GET /projects",
    "GET /projects/{id}",
    "GET /projects/{id}/access",
    "GET /projects/{id}/apps",
    "GET /projects/{id}/apps/{name}/logs",
    "GET /projects/{id}/backups",
    "GET /projects/{id}/backups/escrow",
    "GET /projects/{id}/backups/policy",
    "GET /projects/{id}/backups/{backup}/diff",
    "GET /projects/{id}/backups/{backup}/find",
    "GET /projects/{id}/backups/{backup}/ls",
    "GET /projects/{id}/env",
    "GET /projects/{id}/idle",
    "GET /projects/{id}/isolation",
    "GET /projects/{id}/limits",
    "GET /projects/{id}/logs",
    "GET /projects/{id}/members",
    "GET /projects/{id}/secrets",
    "GET /projects/{id}/snapshot-policy",
    "GET /projects/{id}/snapshots",
    "GET /projects/{id}/snapshots/{name}/diff",
    "GET /projects/{id}/stats",
    "GET /projects/{id}/usage",
    "GET /projects/{id}/why",
    "GET /proxies",
    "GET /proxies/{id}/audit-heads",
    "GET /receipts/{id}",
    "GET /ssh-keys",
    "PATCH /images/{id}",
    "PATCH /projects/{id}/access",
    "PATCH /projects/{id}/idle",
    "POST /accounts",
    "POST /accounts/{id}/ban",
    "POST /accounts/{id}/identities",
    "POST /accounts/{id}/sign-out",
    "POST /accounts/{id}/tokens",
    "POST /accounts/{id}/unban",
    "POST /backups/drill",
    "POST /backups/rotate-wrapping-key",
    "POST /hosts/{id}/cordon",
    "POST /hosts/{id}/fence",
    "POST /hosts/{id}/restore-all",
    "POST /hosts/{id}/rotate-key",
    "POST /hosts/{id}/uncordon",
    "POST /hosts/{id}/unfence",
    "POST /hosts/{id}/withdraw",
    "POST /images/build",
    "POST /images/import",
    "POST /images/prune",
    "POST /images/pull",
    "POST /images/{id}/fetch",
    "POST /join-tokens",
    "POST /keys/rotate",
    "POST /keys/{kid}/withdraw",
    "POST /logout",
    "POST /operations/{id}/cancel",
    "POST /projects",
    "POST /projects/{id}/apps/{name}/restart",
    "POST /projects/{id}/backups",
    "POST /projects/{id}/backups/check",
    "POST /projects/{id}/backups/erase",
    "POST /projects/{id}/backups/prune",
    "POST /projects/{id}/backups/{backup}/restore",
    "POST /projects/{id}/clone",
    "POST /projects/{id}/connect",
    "POST /projects/{id}/copy",
    "POST /projects/{id}/keep",
    "POST /projects/{id}/members",
    "POST /projects/{id}/move",
    "POST /projects/{id}/snapshots",
    "POST /projects/{id}/snapshots/{name}/restore",
    "POST /projects/{id}/ssh-certificate",
    "POST /projects/{id}/start",
    "POST /projects/{id}/stop",
    "POST /proxies/{id}/rotate-key",
    "POST /proxies/{id}/withdraw",
    "POST /ssh-ca/rotate",
    "POST /ssh-ca/withdraw",
    "POST /ssh-keys",
    "PUT /accounts/{id}/password",
    "PUT /projects/{id}/alias",
    "PUT /projects/{id}/backups/policy",
    "PUT /projects/{id}/env/{name}",
    "PUT /projects/{id}/image",
    "PUT /projects/{id}/isolation",
    "PUT /projects/{id}/limits",
    "PUT /projects/{id}/limits-max",
    "PUT /projects/{id}/secrets/{name}",
    "PUT /projects/{id}/snapshot-policy",
];

/// All references in a document.
fn references(value: &Value, found: &mut BTreeSet<String>) {
    match value {
        Value::Object(fields) => {
            if let Some(Value::String(reference)) = fields.get("$ref") {
                found.insert(reference.clone());
            }
            fields.values().for_each(|value| references(value, found));
        }
        Value::Array(list) => list.iter().for_each(|value| references(value, found)),
        _ => {}
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_document_is_what_is_served() {
    let world = World::new().await;
    let (status, document) = world.call("GET", "/openapi.json", "", Value::Null).await;
    assert_eq!(status, 200);
    assert!(document["openapi"].as_str().unwrap().starts_with("3."), "{}", document["openapi"]);
    assert_eq!(document["servers"][0]["url"], "/api/v1");
    let mut found = BTreeSet::new();
    references(&document, &mut found);
    for reference in found {
        let pointer = reference.strip_prefix('#').unwrap();
        assert!(document.pointer(pointer).is_some(), "{reference} leads nowhere");
    }

    let (mut calls, mut ids) = (Vec::new(), BTreeSet::new());
    for (path, methods) in document["paths"].as_object().unwrap() {
        for (method, operation) in methods.as_object().unwrap() {
            let (method, call) = (method.to_uppercase(), format!("{method} {path}"));
            let open = operation["security"].is_null();
            calls.push(format!("{}{method} {path}", if open { "!" } else { "" }));
            let id = operation["operationId"].as_str().unwrap();
            assert!(ids.insert(id.to_owned()), "{id} names two calls");
            assert!(operation["summary"].is_string() || operation["description"].is_string(), "{call}");
            for (status, response) in operation["responses"].as_object().unwrap() {
                assert_ne!(response["description"].as_str().unwrap_or(""), "", "{call}: {status}");
            }
            let content = &operation["responses"]["default"]["content"];
            let problem = &content["application/problem+json"]["schema"]["$ref"];
            assert_eq!(problem, "#/components/schemas/Problem", "{call}");
            let parameters = operation["parameters"].as_array().cloned().unwrap_or_default();
            let named = |place: &str| -> BTreeSet<String> {
                let of = parameters.iter().filter(|parameter| parameter["in"] == place);
                of.map(|parameter| parameter["name"].as_str().unwrap().to_owned()).collect()
            };
            let braces = path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'));
            assert_eq!(named("path"), braces.map(str::to_owned).collect(), "{call}");
            assert_eq!(named("header").contains("Idempotency-Key"), !open && method != "GET", "{call}");

            // It is served: whoever has no token is told so, and nothing else.
            let place = path.replace("{id}", "x").replace("{token}", "x").replace("{account}", "x");
            let place = place.replace("{identity}", "x").replace("{backup}", "x");
            // There are more calls than one address may make at once.
            let (status, answer) = loop {
                let (status, answer) = world.call(&method, &place, "", Value::Null).await;
                if status != 429 {
                    break (status, answer);
                }
                let wait = answer["retry_after_secs"].as_u64().unwrap();
                tokio::time::sleep(std::time::Duration::from_secs(wait)).await;
            };
            let expected = match (open, method.as_str()) {
                // What anybody may read needs no words either.
                (true, "GET") => (200, ""),
                (true, _) => (400, "invalid_request"),
                (false, _) => (401, "unauthenticated"),
            };
            assert_eq!((status, answer["code"].as_str().unwrap_or("")), expected, "{call}: {answer}");
        }
    }
    let sorted = |list: &[&str]| list.iter().map(|call| (*call).to_owned()).collect::<BTreeSet<_>>();
    assert_eq!(calls.into_iter().collect::<BTreeSet<_>>(), sorted(CALLS));

    let create = &document["paths"]["/projects"]["post"];
    let body = &create["requestBody"]["content"]["application/json"]["schema"]["$ref"];
    assert_eq!(body, "#/components/schemas/NewProject");
    let fields = document["components"]["schemas"]["NewProject"]["properties"].as_object().unwrap();
    assert!(["name", "image", "host"].iter().all(|field| fields.contains_key(*field)), "{fields:?}");
    assert_eq!(document["components"]["securitySchemes"]["bearer"]["scheme"], "bearer");
}

/// Status, media type, `WWW-Authenticate`, `Retry-After` and body.
async fn raw(world: &World, method: &str, path: &str, body: String) -> (u16, [Option<String>; 3], Value) {
    let request = http::Request::builder()
        .method(method)
        .uri(format!("{}{path}", world.url))
        .header("authorization", format!("Bearer {}", world.admin))
        .body(body)
        .unwrap();
    tokio::task::spawn_blocking(move || {
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .allow_non_standard_methods(true)
            .timeout_global(Some(crate::world::LIMIT))
            .build();
        let mut response = ureq::Agent::from(config).run(request).unwrap();
        let header = |name: &str| Some(response.headers().get(name)?.to_str().ok()?.to_owned());
        let headers = [header("content-type"), header("www-authenticate"), header("retry-after")];
        let text = response.body_mut().read_to_string().unwrap();
        let value = serde_json::from_str(&text).unwrap_or(Value::String(text));
        (response.status().as_u16(), headers, value)
    })
    .await
    .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_error_is_a_problem_with_its_code() {
    let mut world = World::new().await;
    let host = world.host("alpha").await;
    let id = world.project("alpha").await;
    let (project, huge) = (format!("/api/v1/projects/{id}"), format!("\"{}\"", "x".repeat(70_000)));
    let connect = format!("{project}/connect");
    let admin = world.ok("GET", "/account", Value::Null).await["id"].as_str().unwrap().to_owned();
    let text = |value: Value| value.to_string();
    world.ok("PUT", &format!("/projects/{id}/alias"), json!({ "alias": "thesis" })).await;
    let other = format!("/api/v1/projects/{}/alias", world.project("alpha").await);
    for (method, path, body, status, code) in [
        ("GET", "/api/v1/nothing".to_owned(), String::new(), 404, "not_found"),
        ("GET", "/nothing".into(), String::new(), 404, "not_found"),
        ("PUT", "/api/v1/projects".into(), String::new(), 405, "method_not_allowed"),
        ("POST", "/healthz".into(), String::new(), 405, "method_not_allowed"),
        ("GET", "/projects/x".into(), String::new(), 404, "not_found"),
        ("POST", "/api/v1/projects".into(), "{".into(), 400, "invalid_request"),
        ("POST", "/api/v1/projects".into(), huge, 413, "too_large"),
        ("GET", "/api/v1/projects?limit=x".into(), String::new(), 400, "invalid_request"),
        ("POST", "/api/v1/projects".into(), text(json!({ "name": "p", "host": "nobody" })), 404, "not_found"),
        ("POST", connect.clone(), text(json!({ "ttl_secs": 301 })), 400, "invalid_request"),
        ("POST", connect.clone(), text(json!({ "scopes": [] })), 400, "invalid_request"),
        ("POST", connect, text(json!({ "embed_origin": "x" })), 400, "invalid_request"),
        ("POST", format!("{project}/move"), text(json!({ "to": "alpha" })), 409, "already_there"),
        ("PUT", other.clone(), text(json!({ "alias": "thesis" })), 409, "alias_taken"),
        ("PUT", other, text(json!({ "alias": "Thesis" })), 400, "invalid_request"),
        ("POST", format!("{project}/snapshots/x/restore"), "[]".into(), 400, "invalid_request"),
        ("POST", format!("/api/v1/accounts/{admin}/ban"), String::new(), 409, "own_account"),
        ("POST", "/api/v1/keys/rotate".into(), String::new(), 409, "too_early"),
        ("POST", "/api/v1/keys/x/withdraw".into(), String::new(), 404, "not_found"),
        ("POST", "/api/v1/hosts/join".into(), "{}".into(), 400, "invalid_request"),
    ] {
        let (got, [media, challenge, _], answer) = raw(&world, method, &path, body).await;
        let call = format!("{method} {path}: {answer}");
        assert_eq!((got, &answer["code"]), (status, &json!(code)), "{call}");
        assert_eq!((media.as_deref(), challenge), (Some("application/problem+json"), None), "{call}");
        assert_eq!(answer["status"], status, "{call}");
        assert!(answer["title"].is_string() && answer["detail"].is_string(), "{call}");
    }
    let admin = std::mem::take(&mut world.admin);
    let (status, [_, challenge, _], _) = raw(&world, "GET", "/api/v1/projects", String::new()).await;
    assert_eq!((status, challenge.as_deref()), (401, Some("Bearer")));
    world.admin = admin;

    // No host within its lease.
    drop(host);
    let away = crate::world::until("the lease is over", async || {
        let body = json!({ "name": "second" }).to_string();
        let answer = raw(&world, "POST", "/api/v1/projects", body).await;
        (answer.0 == 503).then_some(answer)
    })
    .await;
    assert_eq!((&away.2["code"], away.1[2].as_deref()), (&json!("no_host"), Some("2")));
}

/// The page lists what the sources can answer, and nothing else.
#[test]
fn every_code_is_in_the_contract() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let contract = std::fs::read_to_string(root.join("../../docs/contract.md")).unwrap();
    let section = contract.split("\n## Codes of the master's API\n").nth(1).expect("the section");
    let section = section.split("\n## ").next().unwrap();
    let listed: BTreeSet<String> = section
        .lines()
        .filter_map(|line| Some(line.strip_prefix("| `")?.split_once('`')?.0.to_owned()))
        .collect();

    let word = |text: &str| -> Option<String> {
        let (code, _) = text.trim_start().strip_prefix('"')?.split_once('"')?;
        let plain = !code.is_empty() && code.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
        plain.then(|| code.to_owned())
    };
    let mut used = BTreeSet::new();
    let mut folders = vec![root.join("src")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let source = std::fs::read_to_string(&path).unwrap();
            let source = source.split("#[cfg(test)]").next().unwrap();
            for call in ["::conflict(", "::unavailable("] {
                used.extend(source.split(call).skip(1).filter_map(word));
            }
            for (call, arguments) in [("Problem::new(", 1), ("Self::new(", 1)] {
                let after = |text: &str| text.splitn(arguments + 1, ',').nth(arguments).and_then(word);
                used.extend(source.split(call).skip(1).filter_map(after));
            }
        }
    }
    // Those of operations, which the API shows in `error`.
    let job = std::fs::read_to_string(root.join("src/operations/job.rs")).unwrap();
    used.extend(job.split("ErrorCode::").skip(1).filter_map(|text| word(text.split_once("=> ")?.1)));
    used.extend(
        ["host_failed", "internal", "start_failed", "move_aborted", "drill_failed", "not_all_restored"]
            .map(str::to_owned),
    );
    used.insert("snapshot_exists".to_owned());
    assert_eq!(listed, used, "listed on the left, used on the right");
}

/// The project page runs its script alone, and shows what others named as text.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_project_page_takes_names_for_text() {
    let world = World::new().await;
    let path = format!("/projects/{}", cocalc_ids::ProjectId::random());
    let (url, dir) = (format!("{}{path}", world.url), tempfile::tempdir().unwrap());
    let (policy, page) = tokio::task::spawn_blocking(move || {
        let mut answer = ureq::get(&url).call().unwrap();
        let policy = answer.headers()["content-security-policy"].to_str().unwrap().to_owned();
        (policy, answer.body_mut().read_to_string().unwrap())
    })
    .await
    .unwrap();
    assert!(policy.contains("script-src 'sha256-") && !policy.contains("script-src 'unsafe"), "{policy}");
    // One script, which the policy names, and no handler in markup.
    assert_eq!(page.matches("<script").count(), 1);
    for handler in ["onclick", "onload", "onerror", "onsubmit", "javascript:"] {
        assert!(!page.contains(handler), "{handler}");
    }
    let file = dir.path().join("page.html");
    std::fs::write(&file, page).unwrap();
    let script = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/page.mjs");
    let ran = std::process::Command::new("node").arg(script).arg(&file).output();
    let ran = ran.expect("node is needed: .ci/setup.sh installs it");
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
}
