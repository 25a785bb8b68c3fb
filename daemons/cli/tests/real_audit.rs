//! The audit logs of a real master, host and proxy: what is in them, what is
//! not, and that nobody rewrites one unnoticed.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

mod world;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use cocalc_auth::audit::{Chain, Event, Head};
use cocalc_core::ids::Timestamp;
use serde_json::{Value, json};
use world::{Api, LIMIT, World, until};

/// Runs the command line as the administrator.
fn cocalc(world: &World, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_cocalc"))
        .args(arguments)
        .env("COCALC_URL", &world.url)
        .env("COCALC_TOKEN", &world.admin)
        .output()
        .unwrap()
}

fn json_of(world: &World, arguments: &[&str]) -> Value {
    let output = cocalc(world, &[arguments, &["--output", "json"]].concat());
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// What a command that must fail says.
fn complaint(world: &World, arguments: &[&str]) -> String {
    let output = cocalc(world, arguments);
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {output:?}");
    String::from_utf8(output.stderr).unwrap()
}

struct Person {
    id: String,
    api: Api,
    project: String,
}

fn person(world: &World, name: &str) -> Person {
    let made = world.ok("POST", "/accounts", json!({ "name": name }));
    let id = made["id"].as_str().unwrap().to_owned();
    let token = world.ok("POST", &format!("/accounts/{id}/tokens"), json!({}));
    let api = Api { url: world.url.clone(), token: token["token"].as_str().unwrap().to_owned() };
    let begun = api.call("POST", "/projects", json!({ "name": name, "host": "alpha" })).unwrap();
    world.settle(&begun);
    let project = begun["project"]["id"].as_str().unwrap().to_owned();
    world.settle(&api.call("POST", &format!("/projects/{project}/start"), json!({})).unwrap());
    Person { id, api, project }
}

/// A request by HTTP; status and session cookies.
fn ask(url: &str, method: &str, bearer: Option<&str>, cookie: Option<&str>) -> (u16, Vec<String>) {
    let mut request = ureq::http::Request::builder().method(method).uri(url);
    if let Some(token) = bearer {
        request = request.header("authorization", format!("Bearer {token}"));
    }
    if let Some(cookie) = cookie {
        request = request.header("cookie", cookie);
    }
    let agent = ureq::Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .timeout_global(Some(LIMIT))
        .build();
    let response = ureq::Agent::from(agent).run(request.body(()).unwrap()).unwrap();
    let cookies = response.headers().get_all("set-cookie").iter();
    let cookies = cookies.map(|field| field.to_str().unwrap().split(';').next().unwrap().to_owned());
    (response.status().as_u16(), cookies.collect())
}

#[test]
fn audit_logs_say_who_did_what_and_cannot_be_rewritten() {
    let mut world = World::new("");
    world.add_host("alpha", "");
    world.add_proxy("proxy");
    world.connected(1, 1);
    let (alice, bob) = (person(&world, "alice"), person(&world, "bob"));
    let begun = now();
    let secrets = use_everything(&world, &alice, &bob);

    // The host says goodbye, and with it where its log ends.
    world.stop("alpha");
    world.stop("proxy");
    let folders = ["alpha", "proxy"].map(|name| world.data_dir(name).join("audit"));
    queries(&world, &folders[0], &alice, &bob, &begun);
    masters_log(&world, &alice, &bob);
    no_secret(&world, &secrets);
    heads(&world, &folders);
    rewritten(&mut world, &folders[0]);
}

fn now() -> String {
    let output = Command::new("date").args(["-u", "+%Y-%m-%dT%H:%M:%SZ"]).output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// Everything that leaves a trace, and returns every secret that was used.
fn use_everything(world: &World, alice: &Person, bob: &Person) -> Vec<String> {
    let mut secrets = vec![world.admin.clone(), alice.api.token.clone(), bob.api.token.clone()];
    let host = format!("http://{}", world.hosts[0]);
    let path = format!("/projects/{}/connect", alice.project);
    let connect = |options: Value| alice.api.call("POST", &path, options).unwrap();
    let way = connect(json!({}));
    let proxy = way["proxy"]["path_url"].as_str().unwrap().trim_end_matches('/').to_owned();
    let at_host = |project: &str, rest: &str| format!("{host}/{project}{rest}");
    let token = way["token"].as_str().unwrap().to_owned();
    let once = connect(json!({ "use": "once" }))["token"].as_str().unwrap().to_owned();
    let other = connect(json!({ "use": "once" }))["token"].as_str().unwrap().to_owned();
    // Redeemed at the host and through the proxy, and once more in vain.
    for (url, token, status) in [
        (at_host(&alice.project, "/.cocalc/session"), &once, 303),
        (at_host(&alice.project, "/.cocalc/session"), &once, 403),
        (format!("{proxy}/.cocalc/session"), &other, 303),
    ] {
        let (seen, cookies) = ask(&url, "POST", Some(token), None);
        assert_eq!(seen, status, "{url}");
        for cookie in cookies {
            let (seen, _) = ask(&at_host(&alice.project, "/port/1/"), "GET", None, Some(&cookie));
            assert_eq!(seen, 502, "the session opens it");
            secrets.push(cookie.split_once('=').unwrap().1.to_owned());
        }
    }
    // Denied: Alice's token at Bob's project, here and at the proxy; in the
    // address, too; and what is no token at all.
    let of_bob = proxy.replace(&alice.project, &bob.project);
    for (url, token) in [
        (at_host(&bob.project, "/port/1/"), Some(&token)),
        (format!("{of_bob}/port/1/"), Some(&token)),
        (format!("{}?cocalc_token={token}", at_host(&bob.project, "/port/1/")), None),
    ] {
        assert_eq!(ask(&url, "GET", token.map(String::as_str), None).0, 403, "{url}");
    }
    let invented = "cookie-that-nobody-was-given-aaaaaaaaaaaaaaaaa".to_owned();
    let name = format!("cocalc-session-{}={invented}", way["host_id"].as_str().unwrap());
    assert_eq!(ask(&at_host(&bob.project, "/port/1/"), "GET", None, Some(&name)).0, 403);
    secrets.extend([token, once, other, invented]);

    // At the master: a password, a key with limits, members, a ban, keys.
    let password = "alice's secret password".to_owned();
    let set = json!({ "login": "alice", "password": password });
    alice.api.call("PUT", &format!("/accounts/{}/password", alice.id), set).unwrap();
    let logged_in = world.ok("POST", "/login", json!({ "login": "alice", "password": password }));
    let wrong = "not alice's password".to_owned();
    world.call("POST", "/login", json!({ "login": "alice", "password": wrong })).unwrap_err();
    secrets.extend([password, wrong, logged_in["token"].as_str().unwrap().to_owned()]);
    let limited = json!({ "projects": [alice.project], "verbs": ["read"] });
    let key = alice.api.call("POST", &format!("/accounts/{}/tokens", alice.id), limited).unwrap();
    let limited = Api { url: world.url.clone(), token: key["token"].as_str().unwrap().to_owned() };
    limited.call("GET", &format!("/projects/{}", alice.project), Value::Null).unwrap();
    limited.call("POST", &format!("/projects/{}/stop", alice.project), json!({})).unwrap_err();
    let path = format!("/projects/{}/members", alice.project);
    let added = json!({ "account_id": bob.id, "role": "viewer" });
    alice.api.call("POST", &path, added).unwrap();
    alice.api.call("DELETE", &format!("{path}/{}", bob.id), Value::Null).unwrap();
    alice.api.call("POST", &format!("/projects/{}/start", bob.project), json!({})).unwrap_err();
    world.ok("POST", &format!("/accounts/{}/ban", bob.id), json!({}));
    bob.api.call("GET", "/account", Value::Null).unwrap_err();
    world.ok("POST", "/keys/rotate?force=true", json!({}));
    let join = world.ok("POST", "/join-tokens", json!({ "kind": "host" }));
    secrets.extend([limited.token, join["token"].as_str().unwrap().to_owned()]);
    let nobody = Api { url: world.url.clone(), token: "cct_invented-by-somebody".to_owned() };
    nobody.call("GET", "/projects", Value::Null).unwrap_err();
    secrets.push(nobody.token);
    secrets
}

fn events(world: &World, folder: &Path, options: &[&str]) -> Vec<Value> {
    let folder = folder.to_str().unwrap();
    let found = json_of(world, &[&["audit", "query", folder], options].concat());
    found.as_array().unwrap().clone()
}

fn queries(world: &World, folder: &Path, alice: &Person, bob: &Person, begun: &str) {
    let all = events(world, folder, &[]);
    let of_alice = events(world, folder, &["--project", &alice.project]);
    let of_bob = events(world, folder, &["--project", &bob.project]);
    assert!(of_alice.iter().all(|event| event["project"] == alice.project.as_str()));
    let kinds = |events: &[Value], kind: &str| events.iter().filter(|event| event["kind"] == kind).count();
    assert_eq!(kinds(&of_alice, "redeem"), 2, "{of_alice:#?}");
    assert!(
        of_alice
            .iter()
            .any(|event| event["kind"] == "deny" && event["reason"] == "the token was already used")
    );
    assert_eq!(kinds(&of_bob, "deny"), 3, "{of_bob:#?}");
    assert!(of_bob.iter().all(|event| event["source"] == "127.0.0.1"), "{of_bob:#?}");
    assert!(of_bob.iter().any(|event| event["reason"].as_str().unwrap().contains("for another project")));
    let by_alice = events(world, folder, &["--account", &alice.id]);
    assert!(
        kinds(&by_alice, "redeem") == 2 && by_alice.iter().all(|event| event["account"] == alice.id.as_str())
    );
    assert!(events(world, folder, &["--account", &bob.id]).len() < all.len());
    // By time, whole and not at all.
    assert_eq!(events(world, folder, &["--since", begun, "--project", &bob.project]), of_bob);
    assert!(events(world, folder, &["--until", begun, "--project", &bob.project]).is_empty());
    assert!(events(world, folder, &["--since", "2100-01-01T00:00:00Z"]).is_empty());
    let usage = cocalc(world, &["audit", "query", folder.to_str().unwrap(), "--since", "soon"]);
    assert_eq!(usage.status.code(), Some(2));
    // What a proxy turned away is in its own.
    let proxys = events(world, &world.data_dir("proxy").join("audit"), &["--project", &bob.project]);
    assert_eq!(kinds(&proxys, "deny"), 1, "{proxys:#?}");
}

fn masters_log(world: &World, alice: &Person, bob: &Person) {
    let folder = world.dir.path().join("master/audit");
    let all = events(world, &folder, &[]);
    let has = |kind: &str, account: &str, action: &str, subject: &str, reason: &str| {
        let text = |event: &Value, name: &str| event[name].as_str().unwrap_or_default().to_owned();
        let found = all.iter().any(|event| {
            event["kind"] == kind
                && (account.is_empty() || event["account"] == account)
                && text(event, "action").starts_with(action)
                && text(event, "subject").contains(subject)
                && text(event, "reason").starts_with(reason)
        });
        assert!(found, "no {kind} {action} {subject} {reason} in {all:#?}");
    };
    let admin = world.ok("GET", "/account", Value::Null);
    let admin = admin["id"].as_str().unwrap();
    let (a, b, project) = (&alice.id, &bob.id, &alice.project);
    let members = format!("POST /projects/{project}/members");
    has("change", a, &members, &format!("collaborator.add {project} {b}"), "200");
    has("change", a, &format!("DELETE /projects/{project}/members/{b}"), "collaborator.remove", "200");
    has("change", admin, &format!("POST /accounts/{b}/ban"), "account.ban", "200");
    has("change", admin, "POST /keys/rotate", "", "200");
    has("change", admin, "POST /accounts", &format!("account.create {b}"), "201");
    has("change", a, &format!("POST /accounts/{a}/tokens"), "api-key.create", "201");
    has("change", admin, "POST /join-tokens", "join-token.create host", "201");
    has("change", "", "POST /hosts/join", "join host:", "200");
    has("login", a, "POST /login", "", "201");
    has("deny", "", "POST /login", "", "401 unauthenticated");
    has("deny", "", "GET /projects", "", "401 unauthenticated");
    has("deny", a, &format!("POST /projects/{project}/stop"), "", "403 access_denied");
    has("deny", a, &format!("POST /projects/{}/start", bob.project), "", "404 not_found");
    has("deny", "", "GET /account", "", "403 access_denied");
    // Changes made with an API key name it.
    assert!(all.iter().any(|event| event["kind"] == "deny" && event["key"].is_string()));
    assert!(all.iter().all(|event| event["source"] == "127.0.0.1"), "{all:#?}");
    let of_alice = events(world, &folder, &["--project", project, "--account", a]);
    assert!(!of_alice.is_empty() && of_alice.len() < all.len());
    json_of(world, &["audit", "verify", folder.to_str().unwrap()]);
    let metrics =
        ureq::get(format!("{}/metrics", world.url)).call().unwrap().body_mut().read_to_string().unwrap();
    assert!(metrics.contains("cocalc_master_audit_dropped_total 0\n"), "{metrics}");
}

/// Neither in an audit log nor in what the daemons print.
fn no_secret(world: &World, secrets: &[String]) {
    let mut looked_at = 0;
    let mut folders = vec![world.dir.path().to_owned(), world.dir.path().join("master/audit")];
    folders.extend(["alpha", "proxy"].map(|name| world.data_dir(name).join("audit")));
    for file in folders.iter().flat_map(|folder| fs::read_dir(folder).unwrap()) {
        let path = file.unwrap().path();
        if path.extension().is_some_and(|end| end == "log") {
            let text = String::from_utf8_lossy(&fs::read(&path).unwrap()).into_owned();
            looked_at += 1;
            for secret in secrets {
                assert!(secret.len() >= 20, "too short to be looked for");
                assert!(!text.contains(secret), "{} has {secret}", path.display());
                // Nor the part of a token that makes it one.
                let signature = secret.rsplit('.').next().unwrap();
                assert!(!text.contains(signature), "{} has a part of {secret}", path.display());
            }
        }
    }
    assert_eq!(looked_at, 6, "logs and audit logs of a master, a host and a proxy");
}

fn heads(world: &World, folders: &[PathBuf; 2]) {
    for ((kind, name), folder) in [("hosts", "alpha"), ("proxies", "proxy")].into_iter().zip(folders) {
        let proxy: &[&str] = if kind == "proxies" { &["--proxy"] } else { &[] };
        let known = json_of(world, &[&["audit", "heads", name], proxy].concat());
        let head = known["heads"].as_array().unwrap().last().unwrap();
        let folder = folder.to_str().unwrap();
        let whole = json_of(world, &["audit", "verify", folder]);
        assert_eq!(whole["lines"], head["count"], "{name} told the master its end: {known}");
        assert_eq!(whole["head"], head["head"]);
        assert!(known["contradiction"].is_null());
        // Anybody can check who signed it.
        let signed = Head {
            count: head["count"].as_u64().unwrap(),
            hash: head["head"].as_str().unwrap().to_owned(),
            time: Timestamp::from_millis(head["time_ms"].as_i64().unwrap()),
        };
        let key = head["identity"].as_str().unwrap().parse().unwrap();
        let signature = head["signature"].as_str().unwrap();
        assert!(signed.is_signed(known["peer"].as_str().unwrap(), &key, signature));
        let option = if kind == "hosts" { "--host" } else { "--proxy" };
        let compared = json_of(world, &["audit", "verify", folder, option, name]);
        assert!(compared["heads_compared"].as_u64().unwrap() >= 1);
        assert_eq!(json_of(world, &["audit", "verify", folder, "--against-master"]), compared);
    }
    let table = cocalc(world, &["audit", "heads", "alpha"]);
    assert!(String::from_utf8_lossy(&table.stdout).starts_with("TIME"), "{table:?}");
    assert_eq!(cocalc(world, &["audit", "heads", "nobody"]).status.code(), Some(3));
    let nowhere = cocalc(world, &["audit", "verify", world.dir.path().to_str().unwrap(), "--against-master"]);
    assert_eq!(nowhere.status.code(), Some(2), "{nowhere:?}");
}

/// Somebody with the host's disk writes a new log, whose chain is perfect.
fn rewritten(world: &mut World, folder: &Path) {
    let path = folder.join("audit.log");
    let text = fs::read_to_string(&path).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let forge = |keep: &dyn Fn(usize, Event) -> Option<Event>| {
        let mut chain = Chain::default();
        let mut forged = String::new();
        for (number, line) in lines.iter().enumerate() {
            let event: Event = serde_json::from_str(line.split_once(' ').unwrap().1).unwrap();
            if let Some(event) = keep(number, event) {
                forged.push_str(&chain.append(&event));
            }
        }
        fs::write(&path, forged).unwrap();
    };
    let folder = folder.to_str().unwrap();
    // In as many lines, one of which says otherwise.
    forge(&|number, event| {
        Some(if number == 0 { Event { reason: "member".repeat(2), ..event } } else { event })
    });
    json_of(world, &["audit", "verify", folder]);
    let told = complaint(world, &["audit", "verify", folder, "--host", "alpha"]);
    assert!(told.contains("written anew"), "{told}");
    assert!(complaint(world, &["audit", "verify", folder, "--against-master"]).contains("written anew"));
    // Without the last line.
    forge(&|number, event| (number + 1 < lines.len()).then_some(event));
    json_of(world, &["audit", "verify", folder]);
    assert!(complaint(world, &["audit", "verify", folder, "--host", "alpha"]).contains("it was cut"));
    // Changed within the chain, which shows by itself.
    fs::write(&path, text.replacen("deny", "DENY", 1)).unwrap();
    assert!(complaint(world, &["audit", "verify", folder]).contains("is not as it was written"));

    // A host that goes on from a log that was cut contradicts itself, and the
    // master keeps that.
    forge(&|number, event| (number + 1 < lines.len()).then_some(event));
    world.start("alpha");
    until("the contradiction", || {
        let known = world.ok("GET", "/hosts/alpha/audit-heads", Value::Null);
        (!known["contradiction"].is_null()).then_some(())
    });
    world.stop("alpha");
    assert!(complaint(world, &["audit", "verify", folder, "--host", "alpha"]).contains("cut"));
    fs::write(&path, &text).unwrap();
    let told = complaint(world, &["audit", "verify", folder, "--host", "alpha"]);
    assert!(told.contains("contradicts"), "the right log again does not undo it: {told}");
}
