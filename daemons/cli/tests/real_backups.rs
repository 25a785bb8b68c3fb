//! Backups in a federation: made when they are due and when somebody asks,
//! through restarts, outages and moves; with keys that reach one host only; and
//! gone, with proof, when their time has come. Restores are in `real_restore`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../../../cocalc-storage/backup/worker/tests/common/emulators.rs"]
#[expect(dead_code, reason = "the other store is tried with the worker alone")]
mod emulators;
mod federation;
mod world;

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

use cocalc_auth_sealed::{Opener, Purpose, Sealed};
use cocalc_backup::Repository;
use cocalc_core::{
    backups::Access,
    bus::{Bus, Payload},
    connector::Peer,
    control::{BackupAccess, PeerReply, PeerRequest, api_subject},
    ids::{Epoch, HostId, ProjectId},
};
use cocalc_daemon::join;
use federation::Federation;
use serde_json::{Value, json};
use world::{LIMIT, World, run_line, until, way_in};

/// A federation of plain directories and processes, with backups below its own
/// directory; `settings` are more lines of the table.
fn with_backups(settings: &str) -> (World, PathBuf) {
    let place = tempfile::Builder::new().prefix("cocalc-backups-").tempdir().unwrap().keep();
    let table =
        format!("[backups]\n{settings}\n[backups.place]\nkind = 'directory'\npath = '{}'\n", place.display());
    (World::new(&table), place)
}

impl World {
    /// A project that runs on a host.
    fn project_on(&self, host: &str) -> String {
        let begun = self.ok("POST", "/projects", json!({ "name": "sample", "host": host }));
        self.settle(&begun);
        let id = begun["project"]["id"].as_str().unwrap().to_owned();
        self.settle(&self.ok("POST", &format!("/projects/{id}/start"), json!({})));
        id
    }

    fn write(&self, project: &str, line: &str) {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let way = way_in(&self.api(), project);
        runtime.block_on(run_line(&way, line.to_owned()));
    }

    fn backups(&self, project: &str) -> Vec<Value> {
        let list = self.ok("GET", &format!("/projects/{project}/backups"), Value::Null);
        list["backups"].as_array().unwrap().clone()
    }

    /// How an operation ended.
    fn ended(&self, begun: &Value) -> Value {
        let id = begun["operation_id"].as_str().unwrap();
        until("the end of an operation", || {
            let seen =
                self.call("GET", &format!("/operations/{id}/wait?timeout_secs=10"), Value::Null).ok()?;
            (seen["state"] != "running").then_some(seen)
        })
    }

    fn done(&self, method: &str, path: &str, body: Value) -> Value {
        let seen = self.ended(&self.ok(method, path, body));
        assert_eq!(seen["state"], "done", "{path}: {seen}\n{}", self.log());
        seen["progress"].clone()
    }

    fn state(&self, project: &str) -> Value {
        self.ok("GET", &format!("/projects/{project}"), Value::Null)
    }

    /// Waits until the bytes of an operation's backup flow.
    fn storing(&self, begun: &Value) {
        let id = begun["operation_id"].as_str().unwrap();
        until("bytes of a backup", || {
            let seen = self.ok("GET", &format!("/operations/{id}"), Value::Null);
            assert_eq!(seen["state"], "running", "{seen}");
            (seen["phase"] == "storing" && seen["progress"]["bytes"].as_u64() > Some(0)).then_some(())
        });
    }
}

/// Restores with Debian's restic and the escrow file alone, and gives the text
/// of one file.
fn restic(world: &World, project: &str, path: &str) -> Vec<u8> {
    let escrow = world.ok("GET", &format!("/projects/{project}/backups/escrow"), Value::Null);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("escrow");
    std::fs::write(&file, escrow["file"].as_str().unwrap()).unwrap();
    let script = format!(
        "set -a; . {}; restic --no-cache --no-lock restore latest --target {}",
        file.display(),
        dir.path().join("out").display()
    );
    let output = Command::new("sh").args(["-c", &script]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let found = Command::new("find")
        .arg(dir.path().join("out"))
        .args(["-path", &format!("*{path}")])
        .output()
        .unwrap();
    let found = String::from_utf8(found.stdout).unwrap();
    std::fs::read(found.trim()).unwrap_or_else(|error| panic!("{path}: {error}: {found:?}"))
}

#[test]
fn backups_are_made_browsed_tidied_tried_out_and_erased_with_proof() {
    let (mut world, place) = with_backups("erase_after_hours = 0\ndrill_hours = 0");
    world.add_host("alpha", "");
    world.connected(1, 0);
    let project = world.project_on("alpha");
    let path = format!("/projects/{project}/backups");
    world.write(&project, "mkdir -p notes; echo one >notes/text; head -c 300000 /dev/urandom >blob");

    let first = world.done("POST", &path, json!({}));
    assert!(first["bytes"].as_u64() >= Some(300_000) && first["files"].as_u64() >= Some(2), "{first}");
    world.write(&project, "echo two >notes/text");
    let second = world.done("POST", &path, json!({}));
    // What is there already is not stored again.
    assert!(second["added_bytes"].as_u64() < Some(20_000), "{second}");
    let list = world.backups(&project);
    let kinds: Vec<&str> = list.iter().map(|one| one["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["manual", "manual"], "{list:?}");
    let newest = second["backup_id"].as_str().unwrap();
    assert_eq!(list[1]["id"], newest);
    assert_eq!(restic(&world, &project, "/notes/text"), b"two\n");

    // Browsing.
    let found = world.ok("GET", &format!("{path}/{newest}/find?text=TEXT"), Value::Null);
    let text = found["entries"][0]["path"].as_str().unwrap().to_owned();
    assert!(text.ends_with("notes/text"), "{found}");
    let folder = text.strip_suffix("/text").unwrap();
    let listed = world.ok("GET", &format!("{path}/{newest}/ls?path={folder}"), Value::Null);
    assert_eq!(
        (listed["entries"][0]["path"].as_str(), &listed["entries"][0]["bytes"]),
        (Some(&*text), &json!(4))
    );
    for (bad, status) in [("nothing", "404"), ("../../x", "404"), (&"0".repeat(64), "404")] {
        let error = world.call("GET", &format!("{path}/{bad}/ls"), Value::Null).unwrap_err();
        assert!(error.starts_with(status), "{bad}: {error}");
    }

    // Who may do what.
    let member = |name: &str, role: &str| {
        let account = world.ok("POST", "/accounts", json!({ "name": name }));
        let id = account["id"].as_str().unwrap();
        let token = world.ok("POST", &format!("/accounts/{id}/tokens"), json!({}));
        world.ok("POST", &format!("/projects/{project}/members"), json!({ "account_id": id, "role": role }));
        world::Api { url: world.url.clone(), token: token["token"].as_str().unwrap().to_owned() }
    };
    let (collaborator, viewer) = (member("carol", "collaborator"), member("victor", "viewer"));
    assert_eq!(collaborator.call("GET", &path, Value::Null).unwrap()["backups"].as_array().unwrap().len(), 2);
    assert_eq!(viewer.call("GET", &path, Value::Null).unwrap()["backups"].as_array().unwrap().len(), 2);
    for (who, method, path) in [
        (&viewer, "POST", path.clone()),
        (&collaborator, "DELETE", format!("{path}/{newest}")),
        (&collaborator, "POST", format!("{path}/prune")),
        (&collaborator, "PUT", format!("{path}/policy")),
        (&collaborator, "GET", format!("{path}/escrow")),
        (&collaborator, "POST", format!("{path}/erase")),
        (&collaborator, "POST", "/backups/drill".to_owned()),
        (&collaborator, "POST", "/backups/rotate-wrapping-key".to_owned()),
        (&collaborator, "GET", "/backups".to_owned()),
    ] {
        let error =
            who.call(method, &path, if method == "GET" { Value::Null } else { json!({}) }).unwrap_err();
        assert!(error.starts_with("403"), "{method} {path}: {error}");
    }
    world.ended(&collaborator.call("POST", &path, json!({})).unwrap());
    let error = world.call("PUT", &format!("{path}/policy"), json!({ "rpo_secs": 1 })).unwrap_err();
    assert!(error.contains("rpo_secs"), "{error}");

    // A new wrapping key opens the same repositories.
    let rotated = world.ok("POST", "/backups/rotate-wrapping-key", json!({}));
    assert_eq!(rotated["repositories"], 1);
    assert_eq!(world.backups(&project).len(), 3);

    // The newest is tried out against its snapshot, and one that is damaged is
    // found by a check.
    let drill = world.done("POST", "/backups/drill", json!({}));
    assert_eq!((&drill["against"], &drill["wrong"]), (&json!("snapshot"), &json!([])), "{drill}");
    let seen = world.ok("GET", "/backups", Value::Null);
    assert_eq!((&seen["projects"], &seen["last_drill"]["failure"]), (&json!(1), &Value::Null), "{seen}");
    let sound = world.done("POST", &format!("{path}/check"), json!({ "read_data": true }));
    assert_eq!(sound["sound"], true);
    let pack = largest(&place.join(&project).join("data"));
    let kept = std::fs::read(&pack).unwrap();
    let mut spoiled = kept.clone();
    spoiled[1000] ^= 1;
    writable(&pack);
    std::fs::write(&pack, spoiled).unwrap();
    let damaged = world.done("POST", &format!("{path}/check"), json!({ "read_data": true }));
    assert_eq!(damaged["sound"], false, "{damaged}");
    assert!(!damaged["affected"].as_array().unwrap().is_empty(), "{damaged}");
    assert_ne!(world.ok("GET", &path, Value::Null)["damage"], json!([]));
    assert_eq!(world.ok("GET", "/backups", Value::Null)["damaged"][0]["project_id"], project);
    let failed = world.ended(&world.ok("POST", "/backups/drill", json!({ "project": project })));
    assert_eq!(failed["state"], "failed", "{failed}");
    std::fs::write(&pack, kept).unwrap();
    world.done("POST", &format!("{path}/check"), json!({ "read_data": true }));
    assert_eq!(world.ok("GET", &path, Value::Null)["damage"], json!([]));

    // The newest is forgotten by hand: its host makes another by itself.
    let before: Vec<Value> = world.backups(&project);
    let last = before.last().unwrap()["id"].as_str().unwrap().to_owned();
    world.done("DELETE", &format!("{path}/{last}"), json!({}));
    until("a backup in the place of what was forgotten", || {
        let now = world.backups(&project);
        (now.len() == before.len() && now.iter().all(|one| one["id"] != *last)).then_some(())
    });
    let policy = json!({ "hourly": 1, "daily": 0, "weekly": 0, "monthly": 0, "manual": 0 });
    world.ok("PUT", &format!("{path}/policy"), policy);
    let pruned = world.done("POST", &format!("{path}/prune"), json!({}));
    assert_eq!((&pruned["left"], world.backups(&project).len()), (&json!(1), 1), "{pruned}");

    // Deleted, and its backups with it, by themselves.
    world.settle(&world.ok("DELETE", &format!("/projects/{project}"), json!({})));
    until("the end of its repository", || (!place.join(&project).exists()).then_some(()));
    let erased = until("the operation that erased it", || {
        let all = world.ok("GET", "/operations?all=true", Value::Null);
        let all = all["operations"].as_array().unwrap().clone();
        all.into_iter().find(|one| one["kind"] == "erase_backups" && one["state"] == "done")
    });
    assert!(erased["progress"]["freed_bytes"].as_u64() > Some(300_000), "{erased}");
    assert_eq!((&erased["progress"]["left"], &erased["progress"]["backups"]), (&json!(0), &json!(1)));
    let audit = read_all(&world.dir.path().join("master").join("audit"));
    for line in ["\"erase\"", "backup.escrow", "backup.rotate-wrapping-key", "\"key\""] {
        assert!(audit.contains(line), "no {line} in the audit log");
    }
    std::fs::remove_dir_all(place).unwrap();
}

/// The largest file below a directory.
fn largest(dir: &Path) -> PathBuf {
    let output = Command::new("find").arg(dir).args(["-type", "f", "-printf", "%s %p\n"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let size = |line: &&str| line.split(' ').next().unwrap().parse::<u64>().unwrap();
    text.lines().max_by_key(size).unwrap().split_once(' ').unwrap().1.into()
}

fn writable(path: &Path) {
    let mut permissions = std::fs::metadata(path).unwrap().permissions();
    #[allow(clippy::permissions_set_readonly_false, reason = "a file of this test")]
    permissions.set_readonly(false);
    std::fs::set_permissions(path, permissions).unwrap();
}

fn read_all(dir: &Path) -> String {
    let files = std::fs::read_dir(dir).unwrap().flatten();
    files.map(|entry| std::fs::read_to_string(entry.path()).unwrap_or_default()).collect()
}

#[test]
fn a_backup_outlives_its_hosts_death_an_outage_of_the_master_and_a_move() {
    let (mut world, place) = with_backups("drill_hours = 0");
    // Slow enough to be caught in the act.
    let slow = "[backups]\nbytes_per_sec = 1000000\n";
    world.add_host("alpha", slow);
    world.add_host("beta", "");
    world.connected(2, 0);
    let project = world.project_on("alpha");
    let path = format!("/projects/{project}/backups");
    world.write(&project, "head -c 12000000 /dev/urandom >blob; echo first >text");

    // kill -9 of the host: the operation is done by the next process.
    let begun = world.ok("POST", &path, json!({}));
    world.storing(&begun);
    let busy = world.call("POST", &path, json!({})).unwrap_err();
    assert!(
        busy.contains("project_busy") && busy.contains(begun["operation_id"].as_str().unwrap()),
        "{busy}"
    );
    // Nothing waits for it.
    world.settle(&world.ok("POST", &format!("/projects/{project}/stop"), json!({})));
    world.settle(&world.ok("POST", &format!("/projects/{project}/start"), json!({})));
    world.kill("alpha");
    until("the end of its worker", || (!worker_below(&place)).then_some(()));
    world.start("alpha");
    let ended = world.ended(&begun);
    assert_eq!(ended["state"], "done", "{ended}\n{}", world.log());
    assert_eq!(world.backups(&project).iter().filter(|one| one["kind"] == "manual").count(), 1);
    assert_eq!(restic(&world, &project, "/text"), b"first\n");

    // The master goes away in the middle: what goes on has all that it needs.
    world.write(&project, "head -c 6000000 /dev/urandom >more");
    let begun = world.ok("POST", &path, json!({}));
    world.storing(&begun);
    let made = world.metric(0, "cocalc_host_backups_made_total");
    world.stop("master");
    until("a backup without a master", || {
        (world.metric(0, "cocalc_host_backups_made_total") > made).then_some(())
    });
    world.start("master");
    until("the master", || world.call("GET", "/account", Value::Null).ok());
    world.connected(2, 0);
    let ended = world.ended(&begun);
    assert_eq!(ended["state"], "done", "{ended}\n{}", world.log());

    // A move waits for no backup: it is broken off here, and made there.
    world.write(&project, "head -c 12000000 /dev/urandom >most; echo moved >text");
    let begun = world.ok("POST", &path, json!({}));
    world.storing(&begun);
    let beta = world.ok("GET", "/hosts", Value::Null)["hosts"]
        .as_array()
        .unwrap()
        .iter()
        .find(|host| host["name"] == "beta")
        .unwrap()["id"]
        .clone();
    world.settle(&world.ok("POST", &format!("/projects/{project}/move"), json!({ "to": "beta" })));
    let ended = world.ended(&begun);
    assert_eq!(ended["state"], "done", "{ended}\n{}", world.log());
    let last = world.backups(&project).pop().unwrap();
    assert_eq!((&last["host_id"], &last["epoch"]), (&beta, &json!(2)), "{last}");
    assert_eq!(restic(&world, &project, "/text"), b"moved\n");
    assert!(world.metric(0, "cocalc_host_backups_cancelled_total") >= 1);
    // Nothing has changed there since: no data are stored again.
    let again = world.done("POST", &path, json!({}));
    assert!(again["added_bytes"].as_u64() < Some(20_000), "{again}");

    // And one can be ended by who began it.
    world.write(&project, "head -c 30000000 /dev/urandom >last");
    let begun = world.ok("POST", &path, json!({}));
    let id = begun["operation_id"].as_str().unwrap();
    let _ = world.call("POST", &format!("/operations/{id}/cancel"), json!({}));
    let ended = world.ended(&begun);
    assert!(["cancelled", "done"].contains(&ended["state"].as_str().unwrap()), "{ended}");
    std::fs::remove_dir_all(place).unwrap();
}

/// Whether a worker has a file below a directory open, or works in it.
fn worker_below(place: &Path) -> bool {
    std::fs::read_dir("/proc").unwrap().flatten().any(|entry| {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let worker = String::from_utf8_lossy(&line).contains("cocalc-backup-worker");
        worker
            && std::fs::read_dir(entry.path().join("fd"))
                .into_iter()
                .flatten()
                .flatten()
                .any(|fd| std::fs::read_link(fd.path()).is_ok_and(|path| path.starts_with(place)))
    })
}

#[test]
fn what_is_out_of_reach_is_pending_and_told_and_caught_up_with() {
    let (mut world, place) = with_backups("drill_hours = 0\n[backups.policy]\nrpo_secs = 86400");
    world.add_host("alpha", "");
    world.connected(1, 0);
    let project = world.project_on("alpha");
    world.done("POST", &format!("/projects/{project}/backups"), json!({}));
    world.write(&project, "echo one >text");
    let away = place.with_extension("away");
    std::fs::rename(&place, &away).unwrap();
    // A stop does not wait, and says what is still to be done.
    world.settle(&world.ok("POST", &format!("/projects/{project}/stop"), json!({})));
    let state = until("a failed backup to be told", || {
        let state = world.state(&project);
        (!state["backup"]["failure"].is_null()).then_some(state)
    });
    assert_eq!((&state["state"], &state["backup"]["pending"]), (&json!("stopped"), &json!(true)), "{state}");
    let why = world.ok("GET", &format!("/projects/{project}/why"), Value::Null);
    assert!(why["reason"].as_str().unwrap().contains("backup"), "{why}");
    assert_eq!(world.metric(0, "cocalc_host_backups_failing_count"), 1);
    let error = world.call("GET", &format!("/projects/{project}/backups"), Value::Null);
    assert!(error.is_err() || error.unwrap()["backups"] == json!([]), "the place is gone");
    let failed = world.ended(&world.ok("POST", &format!("/projects/{project}/backups"), json!({})));
    assert_eq!(failed["state"], "failed", "{failed}");

    // The master away as well, and its host restarted: it is still known.
    world.stop("master");
    world.kill("alpha");
    world.start("alpha");
    until("the host to know what is pending", || {
        (world.metric_if_up(0, "cocalc_host_backups_pending_count") == Some(1)).then_some(())
    });
    std::fs::rename(&away, &place).unwrap();
    world.start("master");
    until("the backup that was pending", || {
        let state = world.call("GET", &format!("/projects/{project}"), Value::Null).ok()?;
        (state["backup"]["pending"] == false && state["backup"]["failure"].is_null()).then_some(())
    });
    assert_eq!(world.backups(&project).pop().unwrap()["kind"], "stop", "or nobody noted why");
    assert_eq!(restic(&world, &project, "/text"), b"one\n");
    std::fs::remove_dir_all(place).unwrap();
}

impl World {
    fn metric_if_up(&self, host: usize, name: &str) -> Option<u64> {
        let mut answer = ureq::get(format!("http://{}/metrics", self.hosts[host])).call().ok()?;
        let text = answer.body_mut().read_to_string().ok()?;
        let line = text.lines().find(|line| line.split(' ').next() == Some(name))?.to_owned();
        line.rsplit(' ').next()?.parse().ok()
    }
}

/// A host's key in the wrong hands: what the master gives to it.
struct Stolen {
    host: HostId,
    identity: Arc<cocalc_auth::identity::Identity>,
    bus: cocalc_conat::Client,
}

impl Stolen {
    fn of(world: &World, name: &str) -> Self {
        let data = world.data_dir(name);
        let identity = Arc::new(join::identity(&data, None).unwrap());
        let text = std::fs::read_to_string(data.join("membership.json")).unwrap();
        let membership: Value = serde_json::from_str(&text).unwrap();
        let host: HostId = membership["id"].as_str().unwrap().parse().unwrap();
        let bus =
            cocalc_daemon::bus::connect(&world.url, &world.url, Peer::Host(host), Arc::clone(&identity))
                .unwrap();
        Self { host, identity, bus }
    }

    async fn ask(&self, request: BackupAccess) -> Result<Sealed, String> {
        let request = PeerRequest::BackupAccess(request);
        let subject = api_subject(Peer::Host(self.host));
        let payload = Payload::json(&request).unwrap();
        let answer = self.bus.request(&subject, payload, LIMIT).await.unwrap();
        match answer.payload.parse::<PeerReply>().unwrap() {
            PeerReply::BackupAccess { sealed } => Ok(serde_json::from_value(sealed.into()).unwrap()),
            PeerReply::Error { message } => Err(message),
            other => panic!("{other:?}"),
        }
    }

    fn open(&self, project: ProjectId, epoch: Epoch, sealed: &Sealed) -> Option<Repository> {
        let purpose = Purpose { what: "backup repository", host: self.host, project, epoch };
        let text = Opener::of(&self.identity).open(&purpose, sealed).ok()?;
        serde_json::from_slice(&text).ok()
    }
}

#[test]
fn a_stolen_host_opens_no_repository_but_those_of_its_own_projects() {
    let (mut world, place) = with_backups("drill_hours = 0");
    world.add_host("alpha", "");
    world.add_host("beta", "");
    world.connected(2, 0);
    let (mine, other) = (world.project_on("alpha"), world.project_on("beta"));
    for project in [&mine, &other] {
        world.done("POST", &format!("/projects/{project}/backups"), json!({}));
    }
    let (mine, other): (ProjectId, ProjectId) = (mine.parse().unwrap(), other.parse().unwrap());
    // Its daemon is off; the thief has its disk.
    world.kill("alpha");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let (thief, beta) = (Stolen::of(&world, "alpha"), Stolen::of(&world, "beta"));
        let ask = |project, epoch, repository, access| BackupAccess { project, epoch, repository, access };
        let (first, second) = (Epoch::FIRST, Epoch::FIRST.next());
        let own = thief.ask(ask(mine, first, mine, Access::Append)).await.unwrap();
        assert!(thief.open(mine, first, &own).is_some(), "what it has anyway");
        for request in [
            ask(other, first, other, Access::Read),
            ask(other, second, other, Access::Append),
            ask(mine, first, other, Access::Read),
            ask(mine, first, other, Access::Append),
            ask(mine, second, mine, Access::Append),
            ask(mine, first, mine, Access::Delete),
            ask(ProjectId::random(), first, mine, Access::Read),
        ] {
            let refused = thief.ask(request.clone()).await;
            assert!(refused.is_err(), "{request:?}");
        }
        // What is sealed to another host, for another project or epoch, opens
        // nothing.
        let theirs = beta.ask(ask(other, first, other, Access::Read)).await.unwrap();
        assert!(beta.open(other, first, &theirs).is_some());
        assert!(thief.open(other, first, &theirs).is_none());
        assert!(thief.open(other, first, &own).is_none() && thief.open(mine, second, &own).is_none());
    });
    // Withdrawn, it gets nothing at all.
    let alpha = world.ok("GET", "/hosts", Value::Null)["hosts"]
        .as_array()
        .unwrap()
        .iter()
        .find(|host| host["name"] == "alpha")
        .unwrap()["id"]
        .as_str()
        .unwrap()
        .to_owned();
    world.ok("POST", &format!("/hosts/{alpha}/withdraw?force=true"), json!({}));
    runtime.block_on(async {
        let thief = Stolen::of(&world, "alpha");
        let request =
            BackupAccess { project: mine, epoch: Epoch::FIRST, repository: mine, access: Access::Read };
        let payload = Payload::json(&PeerRequest::BackupAccess(request)).unwrap();
        let subject = api_subject(Peer::Host(thief.host));
        let answer = thief.bus.request(&subject, payload, Duration::from_secs(5)).await;
        let given = answer.ok().and_then(|answer| answer.payload.parse::<PeerReply>().ok());
        assert!(!matches!(given, Some(PeerReply::BackupAccess { .. })), "{given:?}");
    });
    let audit = read_all(&world.dir.path().join("master").join("audit"));
    assert!(audit.contains("hosts do not delete backups"), "refusals are lines of the audit log");
    std::fs::remove_dir_all(place).unwrap();
}

/// In a bucket, with credentials of a role that are made for one repository and
/// do not live long; two projects share a repository and its copy.
#[test]
fn a_bucket_keeps_the_backups_of_hosts_that_never_see_its_keys() {
    let store = emulators::s3();
    let mirror = tempfile::tempdir().unwrap();
    let table = format!(
        "[backups]\nlayout = 'shared'\n[backups.mirror]\nkind = 'directory'\npath = '{}'\n\
         [backups.place]\nkind = 's3'\nbucket = '{}'\nprefix = 'cocalc'\nregion = 'us-east-1'\n\
         endpoint = '{url}'\n[backups.place.credentials]\nfrom = 'role'\n\
         role_arn = 'arn:aws:iam::123456789012:role/backups'\nsts_endpoint = '{url}'\n\
         [backups.place.credentials.keys]\naccess_key_id = 'operator'\n\
         secret_access_key = 'the-operators-secret'\n",
        mirror.path().display(),
        emulators::BUCKET,
        url = store.url(),
    );
    let mut world = World::new(&table);
    world.add_host("alpha", "");
    world.add_host("beta", "");
    world.connected(2, 0);
    let (one, two) = (world.project_on("alpha"), world.project_on("beta"));
    // What both have is stored once.
    let noise = "seq 1 400000 >noise";
    for (project, text) in [(&one, "one"), (&two, "two")] {
        world.write(project, &format!("{noise}; echo {text} >text"));
    }
    let back_up = |project: &str| world.done("POST", &format!("/projects/{project}/backups"), json!({}));
    let (first, second) = (back_up(&one), back_up(&two));
    assert!(second["added_bytes"].as_u64() < first["added_bytes"].as_u64(), "{first} {second}");
    for (project, made) in [(&one, &first), (&two, &second)] {
        let all = world.backups(project);
        assert_eq!(all.len(), 1, "each has its own: {all:?}");
        assert_eq!(all[0]["id"], made["backup_id"]);
    }
    world.write(&one, "echo lost >text; rm noise");
    let id = first["backup_id"].as_str().unwrap();
    let path = format!("/projects/{one}/backups/{id}/restore");
    world.done("POST", &path, json!({ "to": "in_place" }));
    world.write(&one, "test \"$(cat text)\" = one && test \"$(wc -l <noise)\" = 400000");
    // Tidied up by the master, which copies it; and a project's go alone.
    world.done("POST", &format!("/projects/{two}/backups/prune"), json!({}));
    assert!(largest(mirror.path()).metadata().unwrap().len() > 10_000);
    let erase = format!("/projects/{one}/backups/erase");
    // Something that is due by itself may go on.
    let erasing = until("its turn", || world.call("POST", &erase, json!({})).ok());
    assert_eq!(world.ended(&erasing)["state"], "done");
    assert_eq!(world.backups(&one).len(), 0);
    assert_eq!(world.backups(&two).len(), 1);
    // The keys themselves are nowhere but in the master's configuration.
    for host in ["alpha", "beta"] {
        assert!(!read_all(&world.dir.path().join(host)).contains("the-operators-secret"));
    }
    assert!(!world.log().contains("the-operators-secret"));
}

/// On Btrfs and podman: a whole machine, whose change is known in an instant,
/// and a drill against the snapshot, byte by byte.
#[test]
fn a_real_project_is_backed_up_whole_and_its_backup_tried_out() {
    let federation = Federation::up(18660, &["--storage", "btrfs", "--runner", "podman"]);
    let project = federation.project();
    let api = world::Api {
        url: federation.json["master"]["url"].as_str().unwrap().to_owned(),
        token: federation.json["master"]["admin_token"].as_str().unwrap().to_owned(),
    };
    let done = |path: &str, body: Value| {
        let begun = api.call("POST", path, body).unwrap();
        let id = begun["operation_id"].as_str().unwrap().to_owned();
        let seen = until("an operation", || {
            let seen =
                api.call("GET", &format!("/operations/{id}/wait?timeout_secs=10"), Value::Null).unwrap();
            (seen["state"] != "running").then_some(seen)
        });
        assert_eq!(seen["state"], "done", "{path}: {seen}\n{}", federation.log());
        seen["progress"].clone()
    };
    let path = format!("/projects/{project}/backups");
    let line = "mkdir -p ~/many; for i in $(seq 500); do echo $i >~/many/$i; done; ln ~/many/1 ~/hard; \
        ln -s many ~/soft; sudo touch /usr/local/bin/tool; sudo chmod 4755 /usr/local/bin/tool; truncate -s 1G ~/hole";
    assert!(federation.exec(line).status.success());
    let first = done(&path, json!({}));
    assert!(first["files"].as_u64() > Some(500), "{first}");
    let drill = done("/backups/drill", json!({ "project": project }));
    assert_eq!((&drill["against"], &drill["wrong"]), (&json!("snapshot"), &json!([])), "{drill}");
    // At its new host nothing is sent again.
    federation.json(&["project", "move", &project, "--to", "beta"]);
    let moved = done(&path, json!({}));
    assert!(moved["files_read"].as_u64() < Some(50), "{moved}");
    assert!(moved["added_bytes"].as_u64() < first["added_bytes"].as_u64(), "{first} {moved}");
    let drill = done("/backups/drill", json!({ "host": "beta" }));
    assert_eq!((&drill["against"], &drill["wrong"]), (&json!("snapshot"), &json!([])), "{drill}");

    // What root did to the machine comes back with it: what it has taken away of
    // the image, too.
    let root = |line: &str| {
        let output = federation.exec(&format!("sudo sh -c '{line}'"));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{line}: {said}\n{}", federation.log());
    };
    root(
        "rm /etc/debian_version && rm -r /usr/share/common-licenses && mkdir /usr/share/common-licenses \
          && echo own >/usr/share/common-licenses/own && chown 1234:4321 /usr/local/bin/tool \
          && chmod 4755 /usr/local/bin/tool",
    );
    let package = "set -e; d=$(mktemp -d); mkdir -p $d/p/DEBIAN $d/p/usr/bin; chmod 755 $d $d/p; \
        printf \"Package: cocalc-tool\\nVersion: 1.2\\nArchitecture: all\\nMaintainer: nobody\\nDescription: a tool\\n\" \
        >$d/p/DEBIAN/control; printf \"#!/bin/sh\\necho tool works\\n\" >$d/p/usr/bin/cocalc-tool; \
        chmod 755 $d/p/usr/bin/cocalc-tool; dpkg-deb --root-owner-group --build $d/p $d/tool.deb; \
        DEBIAN_FRONTEND=noninteractive apt-get install -y $d/tool.deb";
    root(package);
    let kept = done(&path, json!({}));
    root("DEBIAN_FRONTEND=noninteractive apt-get purge -y cocalc-tool && ! command -v cocalc-tool");
    root("rm /usr/local/bin/tool; echo other >/etc/debian_version; rm -r /usr/share/common-licenses");
    assert!(federation.exec("rm -r ~/many ~/hard ~/hole").status.success());
    let id = kept["backup_id"].as_str().unwrap();
    done(&format!("{path}/{id}/restore"), json!({ "to": "in_place" }));
    root(
        "test ! -e /etc/debian_version && test \"$(ls /usr/share/common-licenses)\" = own \
          && test \"$(stat -c %u:%g:%a /usr/local/bin/tool)\" = 1234:4321:4755",
    );
    let tool = federation.exec("cocalc-tool && dpkg-query -W -f \"\\${Status}\" cocalc-tool");
    assert_eq!(String::from_utf8_lossy(&tool.stdout), "tool works\ninstall ok installed", "{tool:?}");
    let line = "test $(ls ~/many | wc -l) = 500 && test ~/many/1 -ef ~/hard && test $(stat -c %s ~/hole) = 1073741824 \
         && test $(du -k ~/hole | cut -f1) -lt 1000 && test $(readlink ~/soft) = many";
    let output = federation.exec(line);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
