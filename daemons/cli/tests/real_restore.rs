//! A host is lost for good: what it had comes up elsewhere from its backups, and
//! if it comes back after all, it harms nobody.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod world;

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};

use cocalc_core::auth::Secret;
use cocalc_ssh::client::{Client, HostKeyCheck, Identity};
use serde_json::{Value, json};
use world::{World, program, run_line, until, way, way_in};

/// A federation of plain directories and processes, with backups in a directory
/// beside it, and leases that run out soon.
fn with_backups() -> (World, PathBuf) {
    let place = tempfile::Builder::new().prefix("cocalc-restore-").tempdir().unwrap().keep();
    let table = format!(
        "keepalive_ms = 500\nlease_ms = 3000\ngrace_ms = 2000\n[backups]\ndrill_hours = 0\n\
         [backups.place]\nkind = 'directory'\npath = '{}'\n",
        place.display()
    );
    (World::new(&table), place)
}

impl World {
    /// A project that runs on a host; `backed_up` by itself, too, or never.
    fn project_on(&self, host: &str, backed_up: bool) -> String {
        let begun = self.ok("POST", "/projects", json!({ "name": "sample", "host": host }));
        self.settle(&begun);
        let id = begun["project"]["id"].as_str().unwrap().to_owned();
        if !backed_up {
            self.ok("PUT", &format!("/projects/{id}/backups/policy"), json!({ "enabled": false }));
        }
        self.settle(&self.ok("POST", &format!("/projects/{id}/start"), json!({})));
        id
    }

    /// Runs a line in a project, which may just have come up.
    fn line(&self, project: &str, line: &str) {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let way = way_in(&self.api(), project);
        runtime.block_on(run_line(&way, line.to_owned()));
    }

    /// Whether a login works now.
    fn lets_in(&self, project: &str) -> bool {
        let way = way(&self.api(), project, 1);
        let login = async {
            let identity = Identity::Token(Secret::new(way.token.clone()));
            let id = way.project.parse().unwrap();
            Client::connect(&way.ssh, id, &identity, HostKeyCheck::Any).await.is_ok()
        };
        tokio::runtime::Runtime::new().unwrap().block_on(login)
    }

    fn state(&self, project: &str) -> Value {
        self.ok("GET", &format!("/projects/{project}"), Value::Null)
    }

    fn host(&self, name: &str) -> Value {
        self.ok("GET", &format!("/hosts/{name}"), Value::Null)
    }

    fn cocalc(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(program("cocalc"));
        command.env("COCALC_URL", &self.url).env("COCALC_TOKEN", &self.admin);
        command.args(arguments).output().unwrap()
    }

    /// What a command prints as JSON, and its exit code.
    fn json(&self, arguments: &[&str]) -> (i32, Value) {
        let output = self.cocalc(&[arguments, &["--output", "json"]].concat());
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let parsed = serde_json::from_str(&said).unwrap_or(Value::Null);
        (output.status.code().unwrap(), parsed)
    }

    fn back_up(&self, project: &str) -> Value {
        let (code, made) = self.json(&["backup", "create", project]);
        assert_eq!(code, 0, "{made}\n{}", self.log());
        made["progress"].clone()
    }

    fn audit(&self) -> String {
        let files = std::fs::read_dir(self.dir.path().join("master/audit")).unwrap().flatten();
        files.map(|entry| std::fs::read_to_string(entry.path()).unwrap_or_default()).collect()
    }
}

/// Whether there is something of that name below a directory.
fn has(dir: &Path, name: &str) -> bool {
    let output = Command::new("find").arg(dir).args(["-name", name]).output().unwrap();
    !output.stdout.is_empty()
}

#[test]
fn what_a_dead_host_had_comes_up_elsewhere_and_its_return_harms_nobody() {
    let (mut world, place) = with_backups();
    world.add_host("alpha", "");
    // Slow enough to be caught in the act.
    world.add_host("beta", "[backups]\nbytes_per_sec = 1500000\n");
    world.connected(2, 0);
    let (lucky, unlucky) = (world.project_on("alpha", false), world.project_on("alpha", false));
    world.line(&lucky, "head -c 30000000 /dev/urandom >blob; sha256sum blob >sum; echo one >text");
    world.line(&unlucky, "echo mine >text");
    let made = world.back_up(&lucky);
    // What is written from now on is in no backup.
    world.line(&lucky, "echo two >text; echo new >new");

    // Nobody's word is needed for a host that is there, and none counts.
    let word = ["host", "fence", "alpha", "--reason", "it burned", "--attest"];
    assert_eq!(world.json(&word).0, 5, "a host that is connected is not dead");
    let unasked = world.cocalc(&["host", "fence", "alpha", "--reason", "it burned"]);
    assert_eq!(unasked.status.code(), Some(2), "{}", String::from_utf8_lossy(&unasked.stderr));
    assert!(String::from_utf8_lossy(&unasked.stderr).contains("--attest"));
    assert_eq!(world.json(&["backup", "restore", "--all-of", "alpha"]).0, 5, "it is not fenced");

    world.kill("alpha");
    until("its lease to run out", || (world.host("alpha")["state"] == "away").then_some(()));
    // Silence alone moves nothing.
    assert_eq!(world.state(&lucky)["host_id"], world.host("alpha")["id"]);
    let body = json!({ "reason": "it burned", "attest": false });
    let error = world.call("POST", "/hosts/alpha/fence", body).unwrap_err();
    assert!(error.starts_with("400") && error.contains("attest"), "{error}");
    let error =
        world.call("POST", "/hosts/alpha/fence", json!({ "reason": " ", "attest": true })).unwrap_err();
    assert!(error.starts_with("400") && error.contains("reason"), "{error}");
    let (code, fenced) = world.json(&word);
    assert_eq!(
        (code, &fenced["state"], &fenced["fence"]["reason"]),
        (0, &json!("fenced"), &json!("it burned"))
    );
    assert!(world.audit().contains("host.fence"), "it is a line of the audit log");
    let error = world.call("POST", &format!("/projects/{lucky}/connect"), json!({})).unwrap_err();
    assert!(error.starts_with("503") && error.contains("host_fenced"), "{error}");

    // The host that the files come to dies in the middle, and then the master.
    let begun = world.ok("POST", "/hosts/alpha/restore-all", json!({ "to": ["beta"] }));
    let id = begun["operation_id"].as_str().unwrap().to_owned();
    let error = world.call("POST", "/hosts/alpha/restore-all", json!({})).unwrap_err();
    assert!(error.starts_with("409") && error.contains(&id), "one at a time: {error}");
    let error = world.call("POST", "/hosts/alpha/unfence", json!({})).unwrap_err();
    assert!(error.starts_with("409"), "{error}");
    restoring(&world, &id, &lucky);
    world.kill("beta");
    world.start("beta");
    restoring(&world, &id, &lucky);
    world.kill("master");
    world.start("master");
    until("the master", || world.call("GET", "/account", Value::Null).ok());

    let ended = until("the end of the recovery", || {
        let seen = world.call("GET", &format!("/operations/{id}/wait?timeout_secs=10"), Value::Null).ok()?;
        (seen["state"] != "running").then_some(seen)
    });
    // What was lost is said of each; who has no backup is not touched.
    assert_eq!((&ended["kind"], &ended["state"]), (&json!("restore_all"), &json!("failed")), "{ended}");
    let of = |project: &str| {
        let all = ended["progress"]["projects"].as_array().unwrap();
        all.iter().find(|one| one["project_id"] == project).unwrap().clone()
    };
    let (restored, lost) = (of(&lucky), of(&unlucky));
    assert_eq!(
        (&restored["outcome"], &restored["backup_id"]),
        (&json!("restored"), &made["backup_id"]),
        "{ended}"
    );
    let text = restored["lost"]["text"].as_str().unwrap();
    assert!(text.contains("last heard of"), "{restored}");
    assert_eq!(lost["outcome"], "no_backup", "{ended}");
    let (alpha, beta) = (world.host("alpha")["id"].clone(), world.host("beta")["id"].clone());
    let now = world.state(&lucky);
    assert_eq!((&now["host_id"], &now["epoch"]), (&beta, &json!(2)), "{now}");
    let untouched = world.state(&unlucky);
    assert_eq!((&untouched["host_id"], &untouched["epoch"]), (&alpha, &json!(1)), "{untouched}");
    // It ran, so it runs again, as it was when it was backed up.
    world.line(&lucky, "sha256sum -c sum && test \"$(cat text)\" = one && test ! -e new");
    // Nothing is left of how it came.
    until("the move's snapshot to be gone", || {
        let list = world.ok("GET", &format!("/projects/{lucky}/snapshots"), Value::Null);
        (!list.to_string().contains("move-")).then_some(())
    });
    let table = world.cocalc(&["backup", "restore", "--all-of", "alpha"]);
    let said = String::from_utf8_lossy(&table.stdout).into_owned();
    assert_eq!(table.status.code(), Some(1), "one is still lost: {said}");
    assert!(said.contains("no_backup") && said.contains(&unlucky) && !said.contains(&lucky), "{said}");

    // The dead come back: it hears who has what, stops that, and keeps its files
    // aside; it gets no lease.
    let volume = world.dir.path().join("alpha/volume");
    world.start("alpha");
    until("its copy to be kept aside", || has(&volume, "conflict-1").then_some(()));
    assert_eq!(world.host("alpha")["state"], "fenced");
    world.line(&lucky, "test \"$(cat text)\" = one; echo three >text");
    let error = world.call("POST", &format!("/projects/{unlucky}/connect"), json!({})).unwrap_err();
    assert!(error.contains("host_fenced"), "{error}");
    let refused = world.ok("POST", &format!("/projects/{unlucky}/start"), json!({}));
    let refused = until("a refusal", || {
        let id = refused["operation_id"].as_str().unwrap();
        let seen = world.ok("GET", &format!("/operations/{id}/wait?timeout_secs=5"), Value::Null);
        (seen["state"] != "running").then_some(seen)
    });
    assert_eq!(refused["error"]["code"], "host_fenced", "{refused}");

    // Its fence is taken back: what nobody else has goes on there.
    assert_eq!(world.json(&["host", "unfence", "alpha"]).0, 0);
    world.connected(2, 0);
    world.settle(&world.ok("POST", &format!("/projects/{unlucky}/start"), json!({})));
    // The host has a lease again; a moment later it knows who may do what.
    until("a login", || world.lets_in(&unlucky).then_some(()));
    world.line(&unlucky, "test \"$(cat text)\" = mine");
    world.line(&lucky, "test \"$(cat text)\" = three");
    assert_eq!(world.state(&lucky)["host_id"], beta);
    assert!(world.audit().contains("host.unfence"));
    // And it can be moved to where it was.
    world.settle(&world.ok("POST", &format!("/projects/{lucky}/move"), json!({ "to": "alpha" })));
    world.line(&lucky, "test \"$(cat text)\" = three");
    std::fs::remove_dir_all(place).unwrap();
}

/// Waits until a project of the recovery `id` is on its way, wherever that is.
fn restoring(world: &World, id: &str, project: &str) {
    until("a restore under way", || {
        let all = world.call("GET", &format!("/operations/{id}"), Value::Null).ok()?;
        assert_eq!(all["state"], "running", "{all}\n{}", world.log());
        let fence = world.call("GET", &format!("/projects/{project}"), Value::Null).ok()?;
        let own = format!("/operations/{}", fence["operation_id"].as_str()?);
        let seen = world.call("GET", &own, Value::Null).ok()?;
        assert_eq!(seen["kind"], "recover", "{seen}");
        (seen["state"] == "running").then_some(())
    });
}

#[test]
fn the_command_line_does_all_that_there_is_to_do_with_backups() {
    let (mut world, place) = with_backups();
    world.add_host("alpha", "");
    world.connected(1, 0);
    let project = world.project_on("alpha", false);
    world.line(&project, "mkdir -p notes; echo one >notes/text; echo kept >other");
    let first = world.back_up(&project);
    world.line(&project, "echo two >notes/text");
    let ok = |arguments: &[&str]| {
        let output = world.cocalc(arguments);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {said}{errors}\n{}", world.log());
        said
    };
    let short = &first["backup_id"].as_str().unwrap()[..12];
    assert!(ok(&["backup", "list", &project]).contains(short));
    let found = ok(&["backup", "find", &project, "latest", "TEXT"]);
    assert!(found.contains("notes/text"), "{found}");
    let folder = found.split_whitespace().last().unwrap().strip_suffix("/text").unwrap().to_owned();
    assert!(ok(&["backup", "ls", &project, short, &folder]).contains("text"));
    let missing = world.cocalc(&["backup", "ls", &project, "0123456789"]);
    assert_eq!(missing.status.code(), Some(3), "{}", String::from_utf8_lossy(&missing.stderr));

    // One path beside what is there, then in its place.
    let path = format!("{folder}/text");
    let beside = format!("{folder}/text.old");
    ok(&["backup", "restore", &project, "--path", &path, "--target", &beside]);
    let exists = world.cocalc(&["backup", "restore", &project, "--path", &path]);
    assert_eq!(exists.status.code(), Some(5), "{}", String::from_utf8_lossy(&exists.stderr));
    world.line(&project, "test \"$(cat notes/text.old)\" = one && test \"$(cat notes/text)\" = two");
    ok(&["backup", "restore", &project, short, "--path", &path, "--replace"]);
    world.line(&project, "test \"$(cat notes/text)\" = one; echo four >notes/text; rm other");
    let differs = ok(&["backup", "diff", &project, short]);
    assert!(differs.contains(&format!("{folder}/text\n")) && differs.contains("other"), "{differs}");
    let below = ok(&["backup", "diff", &project, short, "--path", &folder]);
    assert!(below.contains("text.old") && !below.contains("other"), "{below}");
    // All of it, which is asked about.
    let asked = world.cocalc(&["backup", "restore", &project, short]);
    assert_eq!(asked.status.code(), Some(2), "{}", String::from_utf8_lossy(&asked.stderr));
    ok(&["backup", "restore", &project, short, "--yes"]);
    world.line(&project, "test \"$(cat notes/text)\" = one && test -e other && test ! -e notes/text.old");
    assert!(ok(&["snapshot", "list", &project]).contains("before-restore-"), "what was is kept");
    // As another project.
    let (code, made) = world.json(&["backup", "restore", &project, "latest", "--new", "twin"]);
    assert_eq!(code, 0, "{made}");
    let twin = made["project_id"].as_str().unwrap().to_owned();
    world.settle(&world.ok("POST", &format!("/projects/{twin}/start"), json!({})));
    world.line(&twin, "test \"$(cat notes/text)\" = one");

    // Tending.
    let policy = ok(&["backup", "policy", &project, "--hourly", "3", "--exclude", "*.tmp"]);
    assert!(policy.contains("*.tmp"), "{policy}");
    let shown = world.json(&["backup", "policy", &project]).1;
    assert_eq!(
        (&shown["policy"]["hourly"], &shown["policy"]["enabled"]),
        (&json!(3), &json!(false)),
        "{shown}"
    );
    assert!(ok(&["backup", "policy", &project, "--reset"]).contains("master"));
    ok(&["backup", "check", &project, "--read-data"]);
    ok(&["backup", "prune", &project]);
    ok(&["backup", "drill", &project]);
    let file = world.dir.path().join("escrow");
    ok(&["backup", "escrow", &project, "--file", file.to_str().unwrap()]);
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&file).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    assert!(std::fs::read_to_string(&file).unwrap().contains("RESTIC_PASSWORD"));
    let again = world.cocalc(&["backup", "escrow", &project, "--file", file.to_str().unwrap()]);
    assert_eq!(again.status.code(), Some(1), "a file that is there is not replaced");
    world.json(&["backup", "delete", &project, short]);
    assert!(!ok(&["backup", "list", &project]).contains(short));
    ok(&["backup", "erase", &project, "--yes"]);
    std::fs::remove_dir_all(place).unwrap();
}

/// The host dies at whatever step it is: the restore is done or not, as its
/// operation says, and what was there is never lost.
#[test]
fn a_host_that_dies_in_a_restore_finishes_it_or_leaves_the_project_as_it_was() {
    let (mut world, place) = with_backups();
    // Slow enough to be caught in the act.
    world.add_host("alpha", "[backups]\nbytes_per_sec = 4000000\n");
    world.connected(1, 0);
    let project = world.project_on("alpha", false);
    world.line(&project, "head -c 6000000 /dev/urandom >blob; sha256sum blob >sum; echo one >text");
    let made = world.back_up(&project);
    let backup = made["backup_id"].as_str().unwrap();
    let (mut done, mut failed) = (0, 0);
    for step in
        ["restoring", "verifying", "restored and verified", "stopping", "putting it in place", "tidying"]
    {
        world.line(&project, &format!("echo '{step}' >text; rm -f new; echo new >new"));
        let path = format!("/projects/{project}/backups/{backup}/restore");
        let begun = world.ok("POST", &path, json!({ "to": "in_place" }));
        let id = begun["operation_id"].as_str().unwrap();
        let look = || world.call("GET", &format!("/operations/{id}"), Value::Null).ok();
        // Some steps are over in a moment; then it dies in a later one.
        until("its step", || {
            let seen = look()?;
            let ended = seen["state"] != "running";
            (ended || seen["phase"].as_str().unwrap_or_default().starts_with(step)).then_some(())
        });
        world.kill("alpha");
        world.start("alpha");
        world.connected(1, 0);
        let ended = until("its end", || {
            let seen =
                world.call("GET", &format!("/operations/{id}/wait?timeout_secs=10"), Value::Null).ok()?;
            (seen["state"] != "running").then_some(seen)
        });
        if world.state(&project)["state"] != "running" {
            world.settle(&world.ok("POST", &format!("/projects/{project}/start"), json!({})));
        }
        if ended["state"] == "done" {
            done += 1;
            world.line(&project, "sha256sum -c sum && test \"$(cat text)\" = one && test ! -e new");
        } else {
            failed += 1;
            world.line(
                &project,
                &format!("sha256sum -c sum && test \"$(cat text)\" = '{step}' && test -e new"),
            );
        }
        // Nothing of it is left but the state before, where there is one.
        let left = world.ok("GET", &format!("/projects/{project}/snapshots"), Value::Null).to_string();
        assert!(ended["state"] != "done" || !left.contains("\"restored-"), "{step}: {left}\n{}", world.log());
    }
    assert!(done > 0, "{failed} failed\n{}", world.log());
    std::fs::remove_dir_all(place).unwrap();
}
