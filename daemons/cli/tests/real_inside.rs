//! Apps, secrets, logs and stats of projects in real containers, and daemons that
//! are killed while all of it runs: nothing is restarted, nothing lost. Needs root.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod federation;

use std::{collections::BTreeMap, process::Command, time::Duration};

use federation::Federation;
use serde_json::{Value, json};

/// Every wait has an end; none is what is measured.
const LIMIT: Duration = Duration::from_secs(120);
const CANARY: &str = "s3cr3t-canary-0815-value";
const CHANGED: &str = "s3cr3t-canary-4711-later";

const APPS: &str = r#"
[apps.web]
command = "exec python3 -u -m http.server 8123 --bind 127.0.0.1"
port = 8123
ready = "/"
[apps.crash]
command = "echo crashing; exit 3"
[apps.once]
command = "echo done; id -un"
restart = "on-failure"
"#;

fn apps(federation: &Federation, project: &str) -> BTreeMap<String, Value> {
    let answer = federation.json(&["project", "apps", project]);
    let list = answer["apps"].as_array().cloned().unwrap_or_default();
    list.into_iter().map(|app| (app["name"].as_str().unwrap().to_owned(), app)).collect()
}

fn write(federation: &Federation, path: &str, text: &str) {
    let line = format!("mkdir -p ~/.cocalc && cat >~/{path} <<'END'\n{text}\nEND");
    let output = federation.exec(&line);
    assert!(output.status.success(), "{output:?}");
}

fn said(federation: &Federation, line: &str) -> String {
    String::from_utf8_lossy(&federation.exec(line).stdout).into_owned()
}

/// The daemon of the first host.
fn kill_host(federation: &mut Federation) {
    let name = federation.json["hosts"][0]["name"].as_str().unwrap().to_owned();
    kill_host_named(federation, &name);
}

/// Kills the daemon of a host, and waits for the next one.
fn kill_host_named(federation: &mut Federation, name: &str) {
    let pid_in = |json: &Value| {
        let host = json["hosts"].as_array()?.iter().find(|host| host["name"] == name)?;
        host["pid"].as_u64()
    };
    federation.reload();
    let pid = pid_in(&federation.json).unwrap();
    assert!(Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap().success());
    let before = pid;
    let path = federation.data().join("federation.json");
    federation.wait_for("another daemon", LIMIT, || {
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        let json: Value = serde_json::from_str(&text).unwrap_or_default();
        pid_in(&json).is_some_and(|pid| pid != before)
    });
    federation.reload();
}

#[test]
fn apps_secrets_logs_and_stats_in_containers_also_when_daemons_are_killed() {
    let mut federation = Federation::up(8860, &["--storage", "btrfs", "--runner", "podman", "--hosts", "1"]);
    let project = federation.project();
    let started = federation.json(&["project", "show", &project])["started"].clone();
    assert!(started.is_string());

    // Apps are started, found ready, listed, and tried again with pauses.
    write(&federation, ".cocalc/apps.toml", APPS);
    federation.wait_for("the apps", LIMIT, || {
        let apps = apps(&federation, &project);
        apps.get("web").is_some_and(|web| web["state"] == "ready")
            && apps.get("once").is_some_and(|once| once["state"] == "ended")
            && apps.get("crash").is_some_and(|crash| crash["failures"].as_u64() >= Some(2))
    });
    let all = apps(&federation, &project);
    assert_eq!((&all["web"]["starts"], &all["once"]["exit"]), (&json!(1), &json!({ "code": 0 })));
    assert_eq!(all["crash"]["exit"], json!({ "code": 3 }));
    let log = federation.cocalc(&["project", "logs", &project, "--app", "once"]);
    assert_eq!(String::from_utf8_lossy(&log.stdout), "done\nuser\n");
    // A slip of the pen ends nothing.
    write(&federation, ".cocalc/apps.toml", "[apps.web\n");
    federation.wait_for("the complaint", LIMIT, || {
        federation.json(&["project", "apps", &project])["complaint"].is_string()
    });
    assert_eq!(apps(&federation, &project)["web"]["state"], "ready");
    write(&federation, ".cocalc/apps.toml", APPS);

    // Secrets: in memory, for the user alone, changed while it runs.
    federation.json(&["project", "secret", "set", &project, "TOKEN", CANARY]);
    federation.json(&["project", "secret", "set", &project, "other.pem", "x"]);
    federation.wait_for("the secret", LIMIT, || said(&federation, "cat /run/secrets/TOKEN") == CANARY);
    assert_eq!(
        said(&federation, "stat -c '%a %U' /run/secrets/TOKEN; stat -f -c %T /run/secrets"),
        "600 user\ntmpfs\n"
    );
    let names = federation.json(&["project", "secret", "list", &project]);
    assert_eq!(names["secrets"].as_array().unwrap().len(), 2);
    assert!(!names.to_string().contains("canary"), "{names}");
    federation.json(&["project", "secret", "set", &project, "TOKEN", CHANGED]);
    federation.json(&["project", "secret", "unset", &project, "other.pem"]);
    federation.wait_for("the change", LIMIT, || {
        said(&federation, "cat /run/secrets/TOKEN; ls -A /run/secrets") == format!("{CHANGED}TOKEN\n")
    });
    for wrong in ["../x", "a/b", ".hidden", "-x", "a b"] {
        let refused = federation.cocalc(&["project", "secret", "set", &project, "--", wrong, "x"]);
        assert!(!refused.status.success(), "{wrong}: {refused:?}");
    }
    assert_eq!(said(&federation, "env | grep -c canary"), "0\n", "in no environment");
    federation.json(&["snapshot", "create", &project, "--name", "with-secret"]);

    // Nothing on disk has them: master, host, volume with its snapshots, podman.
    let sync = Command::new("sync").status().unwrap();
    assert!(sync.success());
    {
        let needle = "s3cr3t-canary";
        let found =
            Command::new("grep").args(["-r", "-l", "-a", needle]).arg(federation.data()).output().unwrap();
        let files = String::from_utf8_lossy(&found.stdout).into_owned();
        assert_eq!(files, "", "on disk");
        let names = Command::new("podman").args(["ps", "-a", "--format", "{{.Names}}"]).output().unwrap();
        let names = String::from_utf8_lossy(&names.stdout).into_owned();
        let container = names.lines().find(|name| name.contains(&project)).expect("its container");
        let about = Command::new("podman").args(["inspect", container]).output().unwrap();
        assert!(!String::from_utf8_lossy(&about.stdout).contains(needle), "podman inspect");
    }

    // The environment, from the next start on.
    federation.json(&["project", "env", "set", &project, "GREETING", "hello"]);
    for wrong in ["LD_PRELOAD", "1A", "A-B"] {
        assert!(!federation.cocalc(&["project", "env", "set", &project, wrong, "x"]).status.success());
    }
    let stats = federation.json(&["project", "stats", &project]);
    assert_eq!(stats["running"], true);
    for name in ["memory_bytes", "cpu_micros", "pids", "disk_bytes"] {
        assert!(stats[name].as_u64() > Some(0), "{name}: {stats}");
    }
    assert!(federation.cocalc(&["project", "logs", &project]).status.success());

    // Daemons die; projects and apps don't notice.
    let rounds = if std::env::var_os("COCALC_FULL").is_some() { 10 } else { 3 };
    for round in 0..rounds {
        kill_host(&mut federation);
        federation.wait_for("the host", LIMIT, || {
            let why = federation.json(&["project", "why", &project]);
            why["state"] == "running"
                && why["reason"].as_str().is_some_and(|reason| reason.starts_with("it runs since"))
        });
        federation.wait_for("its apps", LIMIT, || {
            apps(&federation, &project).get("web").is_some_and(|web| web["state"] == "ready")
        });
        let now = federation.json(&["project", "show", &project])["started"].clone();
        assert_eq!(now, started, "not restarted in round {round}");
        assert_eq!(apps(&federation, &project)["web"]["starts"], 1, "nor was its app");
        assert_eq!(said(&federation, "cat /run/secrets/TOKEN"), CHANGED);
    }

    // After a stop and a start everything is there again.
    let output = federation.cocalc(&["project", "stop", &project]);
    assert!(output.status.success(), "{output:?}");
    let output = federation.cocalc(&["project", "start", &project]);
    assert!(output.status.success(), "{output:?}");
    federation.wait_for("secret and app", LIMIT, || {
        said(&federation, "cat /run/secrets/TOKEN; printenv GREETING") == format!("{CHANGED}hello\n")
            && apps(&federation, &project).get("web").is_some_and(|web| web["state"] == "ready")
    });

    memory_that_is_used_up(&federation, &project);
    deaths_again_and_again(&federation, &project);
}

/// What takes more memory than there is gets killed; the rest goes on, and its owner
/// is told, also when the project then ends of it.
fn memory_that_is_used_up(federation: &Federation, project: &str) {
    federation.json(&["project", "limits", project, "--memory", "256M"]);
    let started = federation.json(&["project", "show", project])["started"].clone();
    // Twice what it may have; a shell reports who was killed.
    let hog = federation.exec("python3 -c 'x = bytearray(512 << 20)'; echo ended $?");
    assert!(String::from_utf8_lossy(&hog.stdout).contains("ended 137"), "{hog:?}");
    let stats = federation.json(&["project", "stats", project]);
    assert!(stats["oom_kills"].as_u64() >= Some(1), "{stats}");
    federation.wait_for("the word of it", LIMIT, || {
        let why = federation.json(&["project", "why", project]);
        let reason = why["reason"].as_str().unwrap_or_default().to_owned();
        reason.contains("killed because its memory was used up, last at")
    });
    assert_eq!(federation.json(&["project", "show", project])["started"], started, "it goes on");
    kill_first_process(project);
    let show = stopped(federation, project);
    assert!(show["reason"].as_str().is_some_and(|reason| reason.contains("memory was used up")), "{show}");
    federation.json(&["project", "limits", project, "--reset"]);
}

/// The host's view of a project's first process, killed from there: nobody inside can.
fn kill_first_process(project: &str) {
    let format = ["ps", "--filter", &format!("label=cocalc.project={project}"), "--format", "{{.Pid}}"];
    let pid = Command::new("podman").args(format).output().unwrap();
    let pid = String::from_utf8_lossy(&pid.stdout).trim().to_owned();
    // It may have died meanwhile.
    let _ = Command::new("kill").args(["-9", &pid]).status().unwrap();
}

/// A project, once it is said to be stopped.
fn stopped(federation: &Federation, project: &str) -> Value {
    let mut show = Value::Null;
    federation.wait_for("the word that it is stopped", LIMIT, || {
        show = federation.json(&["project", "show", project]);
        show["state"] == "stopped"
    });
    show
}

/// One that dies right after each start is left alone for longer and longer, and says
/// so; who starts it by command begins anew.
fn deaths_again_and_again(federation: &Federation, project: &str) {
    let words = "times in a row, soon after its start";
    // Whoever opens it wakes it, until it has died too often.
    let mut said = String::new();
    federation.wait_for("it to be left alone", LIMIT * 3, || {
        let woken = federation.exec("true");
        said = String::from_utf8_lossy(&woken.stderr).into_owned();
        if woken.status.success() {
            kill_first_process(project);
        }
        said.contains(words)
    });
    assert!(said.contains(&format!("`cocalc project start {project}` starts it at once")), "{said}");
    let mut show = Value::Null;
    federation.wait_for("the reason", LIMIT, || {
        show = federation.json(&["project", "show", project]);
        show["state"] == "stopped" && show["reason"].as_str().is_some_and(|reason| reason.contains(words))
    });
    // By command at once, and what was before is past.
    federation.json(&["project", "start", project]);
    assert!(federation.exec("true").status.success());
    kill_first_process(project);
    let show = stopped(federation, project);
    assert!(!show["reason"].as_str().unwrap_or_default().contains(words), "{show}");
    federation.wait_for("it to be woken", LIMIT, || {
        let woken = federation.exec("echo up");
        let said = String::from_utf8_lossy(&woken.stderr);
        assert!(!said.contains(words), "{said}");
        woken.stdout == b"up\n"
    });
}

/// A daemon that comes up while podman hangs, and knows of a project only that it may
/// run: that is what everybody is told, and nothing is done to it until podman answers.
#[test]
fn a_project_that_may_run_unseen_is_unknown_until_podman_answers() {
    let tools = tempfile::tempdir().unwrap();
    let hangs = tools.path().join("hangs");
    let path = std::env::var("PATH").unwrap();
    let script = format!(
        "#!/bin/sh\nwhile test -e {}; do sleep 0.2; done\nPATH='{path}' exec podman \"$@\"\n",
        hangs.display()
    );
    cocalc_testkit::executable::write(&tools.path().join("podman"), script);
    let with = format!("{}:{path}", tools.path().display());
    let arguments = ["--storage", "btrfs", "--runner", "podman", "--hosts", "2"];
    let mut federation = Federation::up_with(8930, &arguments, &[("PATH", &with)]);
    let project = federation.project();
    let before = federation.json(&["project", "show", &project]);
    let hosts = federation.json["hosts"].as_array().unwrap().clone();
    let (here, there): (Vec<&Value>, Vec<&Value>) =
        hosts.iter().partition(|host| host["id"] == before["host_id"]);
    let [here, there] = [here, there].map(|some| some[0]["name"].as_str().unwrap().to_owned());
    let id = before["host_id"].as_str().unwrap().to_owned();
    // In memory that goes when it is stopped.
    assert_eq!(said(&federation, "echo kept > /dev/shm/kept; cat /dev/shm/kept"), "kept\n");

    std::fs::write(&hangs, "").unwrap();
    // The note of it does not say of which process.
    let note = std::path::Path::new("/run/cocalc").join(&id).join(format!("running/{project}.json"));
    let text = std::fs::read_to_string(&note).unwrap();
    let mut told: Value = serde_json::from_str(&text).unwrap();
    told["run"] = Value::Null;
    std::fs::write(&note, told.to_string()).unwrap();
    kill_host_named(&mut federation, &here);
    federation.wait_for("the word that it is unknown", LIMIT, || {
        federation.json(&["project", "show", &project])["state"] == "unknown"
    });
    for verb in ["show", "why"] {
        let answer = federation.json(&["project", verb, &project]);
        let reason = answer["reason"].as_str().unwrap_or_default();
        assert_eq!(answer["state"], "unknown", "{answer}");
        assert!(
            reason.contains("podman") && reason.contains("is asked again") && reason.contains("podman ps"),
            "{reason}"
        );
    }
    for verb in [
        &["project", "start", &project][..],
        &["project", "delete", &project],
        &["project", "move", &project, "--to", &there],
    ] {
        let refused = federation.cocalc(&[verb, &["--output", "json"]].concat());
        let said = String::from_utf8_lossy(&[refused.stdout, refused.stderr].concat()).into_owned();
        assert_eq!(refused.status.code(), Some(5), "{verb:?}: {said}");
        assert!(said.contains("state_unknown"), "{verb:?}: {said}");
    }
    let after = federation.json(&["project", "show", &project]);
    assert_eq!((&after["host_id"], &after["epoch"]), (&before["host_id"], &before["epoch"]));

    std::fs::remove_file(&hangs).unwrap();
    federation.wait_for("the word that it runs", LIMIT * 3, || {
        federation.json(&["project", "show", &project])["state"] == "running"
    });
    // As it ran all the while.
    assert_eq!(said(&federation, "cat /dev/shm/kept"), "kept\n");
    let output = federation.cocalc(&["project", "stop", &project]);
    assert!(output.status.success(), "{output:?}");
    let output = federation.cocalc(&["project", "delete", &project]);
    assert!(output.status.success(), "{output:?}");
}
