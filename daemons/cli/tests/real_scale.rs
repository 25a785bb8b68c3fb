//! Many projects, and a host's daemon that is killed again and again while they are
//! started, stopped and used: what runs is not restarted, nothing is lost, and
//! nothing is left over. A reboot brings back what ran. Needs root.
//!
//! With `COCALC_FULL` 200 projects, 50 of them running, and ten kills; otherwise
//! 20, 6 and 3.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod federation;

use std::{
    collections::BTreeMap,
    process::{Command, Stdio},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use federation::{COCALC, Federation};
use serde_json::Value;

/// Every wait has an end; none is what is measured.
const LIMIT: Duration = Duration::from_secs(240);
const APPS: &str = "[apps.small]\ncommand = \"echo $$ >~/small.pid; exec sleep 86400\"";

/// What is needed to call the command line from several threads.
#[derive(Clone)]
struct Cli {
    url: String,
    token: String,
}

impl Cli {
    fn call(&self, arguments: &[&str]) -> Result<String, String> {
        let output = Command::new(COCALC)
            .args(arguments)
            .env("COCALC_URL", &self.url)
            .env("COCALC_TOKEN", &self.token)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        match output.status.success() {
            true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
            false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        }
    }

    fn ok(&self, arguments: &[&str]) -> String {
        self.call(arguments).unwrap_or_else(|error| panic!("{arguments:?}: {error}"))
    }

    fn exec(&self, project: &str, line: &str) -> Result<String, String> {
        self.call(&["project", "exec", project, "--", "sh", "-c", line])
    }

    fn show(&self, project: &str) -> Value {
        serde_json::from_str(&self.ok(&["project", "show", project, "--output", "json"])).unwrap()
    }
}

/// Does it for each, four at a time.
fn each<T: Sync>(all: &[T], work: impl Fn(usize, &T) + Sync) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::SeqCst);
                    let Some(one) = all.get(at) else { return };
                    work(at, one);
                }
            });
        }
    });
}

/// The containers of a host: name, the pid of the first process, 0 without.
fn containers(host: &str) -> BTreeMap<String, String> {
    let filter = format!("label=cocalc.instance={host}");
    let format = "{{.Names}} {{.Pid}}";
    let output =
        Command::new("podman").args(["ps", "-a", "--filter", &filter, "--format", format]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines().filter_map(|line| line.split_once(' ')).map(|(a, b)| (a.to_owned(), b.to_owned())).collect()
}

/// Start times of the first process and of the app, and the app's pid.
fn lives(cli: &Cli, project: &str) -> Result<String, String> {
    cli.exec(
        project,
        "cut -d' ' -f22 /proc/1/stat && cat ~/small.pid && cut -d' ' -f22 /proc/$(cat ~/small.pid)/stat",
    )
}

fn pid(federation: &Federation) -> u64 {
    let text = std::fs::read_to_string(federation.data().join("federation.json")).unwrap_or_default();
    let json: Value = serde_json::from_str(&text).unwrap_or_default();
    json["hosts"][0]["pid"].as_u64().unwrap_or_default()
}

/// kill -9, and another one; `between` is done while there is none.
fn kill(federation: &Federation, between: impl FnOnce()) {
    let mut before = 0;
    federation.wait_for("a daemon", LIMIT, || {
        before = pid(federation);
        before != 0
    });
    assert!(Command::new("kill").args(["-9", &before.to_string()]).status().unwrap().success());
    between();
    federation.wait_for("another daemon", LIMIT, || ![0, before].contains(&pid(federation)));
}

#[test]
fn nothing_is_restarted_lost_or_left_over_when_the_daemon_dies_under_load() {
    let full = std::env::var_os("COCALC_FULL").is_some();
    let (count, run, rounds) = if full { (200, 50, 10) } else { (20, 6, 3) };
    println!("{count} projects, {run} running, {rounds} kills{}", if full { "" } else { " (reduced)" });
    let federation = Federation::up(9060, &["--storage", "btrfs", "--runner", "podman", "--hosts", "1"]);
    let cli = Cli {
        url: federation.json["master"]["url"].as_str().unwrap().to_owned(),
        token: federation.json["master"]["admin_token"].as_str().unwrap().to_owned(),
    };
    let host = federation.json["hosts"][0]["id"].as_str().unwrap().to_owned();

    let begun = Instant::now();
    let numbers: Vec<usize> = (0..count).collect();
    let made = Mutex::new(BTreeMap::new());
    each(&numbers, |_, number| {
        let name = format!("many-{number}");
        let text = cli.ok(&["project", "create", &name, "--output", "json"]);
        let json: Value = serde_json::from_str(&text).unwrap();
        let project = json["id"].as_str().or(json["project"]["id"].as_str());
        let project = project.unwrap_or_else(|| panic!("no id in {json}")).to_owned();
        made.lock().unwrap().insert(*number, project);
    });
    let projects: Vec<String> = made.into_inner().unwrap().into_values().collect();
    assert_eq!(projects.len(), count);
    let (steady, others) = projects.split_at(run);
    each(steady, |_, project| {
        cli.ok(&["project", "start", project]);
        let declare = format!("mkdir -p ~/.cocalc && cat >~/.cocalc/apps.toml <<'END'\n{APPS}\nEND");
        cli.exec(project, &declare).unwrap();
    });
    let before = Mutex::new(BTreeMap::new());
    each(steady, |_, project| {
        federation.wait_for("its app", LIMIT, || match lives(&cli, project) {
            Ok(lives) => before.lock().unwrap().insert(project.clone(), lives).is_none(),
            Err(_) => false,
        });
    });
    let before = before.into_inner().unwrap();
    println!("{count} made and {run} running after {:?}", begun.elapsed());
    // Files of the others, which nobody must lose.
    let some: Vec<String> = others.iter().take(run).cloned().collect();
    each(&some, |at, project| {
        cli.ok(&["project", "start", project]);
        cli.exec(project, &format!("echo kept-{at} >~/kept && sync ~/kept")).unwrap();
    });

    // Under load: calls fail while there is no daemon, and that is all.
    let (over, done) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for lane in 0..2 {
            let (cli, some, steady, over, done) = (&cli, &some, steady, &over, &done);
            scope.spawn(move || {
                for at in (lane..).step_by(2) {
                    if over.load(Ordering::SeqCst) {
                        return;
                    }
                    let (moving, still) = (&some[at % some.len()], &steady[at % steady.len()]);
                    let good = [
                        cli.call(&["project", "stop", moving]).is_ok(),
                        cli.exec(still, "echo used").is_ok(),
                        cli.call(&["project", "start", moving]).is_ok(),
                    ];
                    done.fetch_add(good.iter().filter(|good| **good).count(), Ordering::SeqCst);
                }
            });
        }
        // Also when an assertion fails, the threads end.
        struct End<'a>(&'a AtomicBool);
        impl Drop for End<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::SeqCst);
            }
        }
        let _end = End(&over);
        for round in 0..rounds {
            let begun = Instant::now();
            let was = done.load(Ordering::SeqCst);
            federation.wait_for("work", LIMIT, || done.load(Ordering::SeqCst) > was + 2);
            kill(&federation, || {});
            each(steady, |_, project| {
                let mut now = Err(String::new());
                federation.wait_for("a project that answers", LIMIT, || {
                    now = lives(&cli, project);
                    now.is_ok()
                });
                assert_eq!(now.as_ref(), Ok(&before[project]), "restarted in round {round}");
            });
            println!("round {round}: {:?}", begun.elapsed());
        }
    });

    // What master and machine say is the same again.
    each(&some, |at, project| {
        federation.wait_for("a start", LIMIT, || cli.call(&["project", "start", project]).is_ok());
        assert_eq!(cli.exec(project, "cat ~/kept").unwrap(), format!("kept-{at}\n"));
        cli.ok(&["project", "stop", project]);
    });
    // Nobody asks for anything any more: what was found as it should be stays so.
    let mut open: Vec<(usize, &String)> = projects.iter().enumerate().collect();
    federation.wait_for("one state", LIMIT, || {
        let all = containers(&host);
        open.retain(|(at, project)| {
            let mut own = all.iter().filter(|(name, _)| name.contains(project.as_str()));
            let Some((_, pid)) = own.next() else { return true };
            let runs = *at < run;
            let same = own.next().is_none()
                && (pid != "0") == runs
                && cli.show(project)["state"] == if runs { "running" } else { "stopped" };
            !same
        });
        open.is_empty()
    });
    println!("one state after {:?}", begun.elapsed());
    // Each has one, and the sample project.
    assert_eq!(containers(&host).len(), count + 1, "orphans");

    reboot(&federation, &cli, &host, steady, &others[0]);
}

/// What ran comes up by itself after the machine was down; what did not, does not.
/// The machine is not really down: its containers are, and the daemon finds notes of
/// another boot.
fn reboot(federation: &Federation, cli: &Cli, host: &str, ran: &[String], rested: &str) {
    let [comes, ends] = [&ran[0], &ran[1]];
    let was: Vec<String> = [comes, ends].map(|project| lives(cli, project).unwrap()).to_vec();
    let notes = walk(&federation.data(), "ran").expect("where it is noted");
    kill(federation, || {
        for project in [comes, ends] {
            let all = containers(host);
            let (_, pid) = all.iter().find(|(name, _)| name.contains(project.as_str())).unwrap();
            assert!(Command::new("kill").args(["-9", pid]).status().unwrap().success());
        }
        let path = notes.join(comes);
        let mut note: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        note["boot_id"] = "an earlier one".into();
        std::fs::write(path, note.to_string()).unwrap();
    });
    federation.wait_for("what ran", LIMIT, || lives(cli, comes).is_ok_and(|now| now != was[0]));
    federation.wait_for("the word", LIMIT, || cli.show(comes)["state"] == "running");
    // One that ended by itself in this boot stays so, and so does what was stopped.
    assert_eq!(cli.show(rested)["state"], "stopped");
    let all = containers(host);
    let (_, pid) = all.iter().find(|(name, _)| name.contains(ends.as_str())).unwrap();
    assert!(pid == "0" || !std::path::Path::new(&format!("/proc/{pid}")).exists(), "{pid}");
}

/// The directory of this name somewhere below.
fn walk(directory: &std::path::Path, name: &str) -> Option<std::path::PathBuf> {
    for level in ["hosts", ""] {
        for entry in std::fs::read_dir(directory.join(level)).into_iter().flatten().flatten() {
            for below in [entry.path().join(name), entry.path().join("data").join(name)] {
                if below.is_dir() {
                    return Some(below);
                }
            }
        }
    }
    None
}
