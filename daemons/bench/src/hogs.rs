//! What projects notice of others that take all they can get: the slowest
//! answers of their apps, with and without hogs beside them.

use std::time::{Duration, Instant};

use rustix::process::{getpriority_process, setpriority_process};
use serde_json::json;

use crate::{
    Effort, Result,
    federation::{Connect, Federation, split},
    processes,
    projects::Projects,
    table::{Better, Goal, Table},
    tool::{each, first_byte, wait_for},
};

const LIMIT: Duration = Duration::from_secs(60);
/// How long hogs run before their neighbours are asked.
const GROW: Duration = Duration::from_secs(2);
/// How often each app is asked in one run.
const REQUESTS: usize = 50;

/// Each hog: its name, what its owner may use, and what it does whenever it is
/// started.
const HOGS: [(&str, &str); 5] = [
    ("fork bomb", "import os\nwhile True:\n try: os.fork()\n except OSError: pass"),
    (
        "memory hog",
        "import os\nwhile True:\n if os.fork() == 0:\n  a = []\n  while True: a.append(bytearray(8 << 20))\n os.wait()",
    ),
    (
        "disk filler",
        "import os\nn = 0\nwhile True:\n n += 1\n try:\n  with open(os.path.expanduser(f\"~/fill{n % 9}\"), \"wb\") as f:\n   while True: f.write(os.urandom(1 << 20)); f.flush(); os.fsync(f)\n except OSError: pass",
    ),
    // What a project's log keeps is the output of its first process, of which root
    // can take a copy.
    (
        "log flooder",
        "import ctypes, os, sys\nif os.getuid(): os.execvp(\"sudo\", [\"sudo\", \"-n\", \"python3\"] + sys.argv)\nfd = ctypes.CDLL(None).syscall(438, os.pidfd_open(1), 1, 0)\nwhile True: os.write(fd, b\"flood \" * 1000 + b\"\\n\")",
    ),
    (
        "network flooder",
        "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\nwhile True:\n try: s.sendto(b\"x\" * 1400, (\"198.51.100.77\", 9))\n except OSError: pass",
    ),
];

pub(crate) fn measure(federation: &Federation, effort: Effort, table: &mut Table) -> Result<()> {
    let mut projects = Projects::none(federation);
    let neighbours: Vec<String> = (0..effort.neighbours)
        .map(|number| projects.copy(&format!("neighbour {number}")))
        .collect::<Result<_>>()?;
    let hogs: Vec<String> = HOGS
        .iter()
        .map(|(name, script)| hog(federation, &mut projects, name, script))
        .collect::<Result<_>>()?;
    let connects: Vec<Connect> =
        neighbours.iter().map(|project| federation.connect(project)).collect::<Result<_>>()?;
    // Each by itself, to see whose it is, and all together.
    let mut sets: Vec<(String, &[String])> =
        HOGS.iter().zip(hogs.chunks(1)).map(|((name, _), hog)| ((*name).to_owned(), hog)).collect();
    sets.push((format!("all {} hogs", hogs.len()), &hogs));
    let mut beside = vec![Vec::new(); sets.len()];
    let mut alone = beside.clone();
    // The first round warms caches and is not counted.
    for round in 0..=effort.runs {
        for (index, (_, hogs)) in sets.iter().enumerate() {
            let quiet = asked(&connects)?;
            each(hogs.len(), hogs, |hog| federation.change(hog, "start"))?;
            // Until they have grown as far as they can.
            std::thread::sleep(GROW);
            let loud = asked(&connects)?;
            for hog in *hogs {
                at_work(federation, hog)?;
            }
            each(hogs.len(), hogs, |hog| federation.change(hog, "stop"))?;
            if round > 0 {
                alone[index].push(quiet);
                beside[index].push(loud);
            }
        }
    }
    for (index, (name, _)) in sets.iter().enumerate() {
        let what = format!("p99 of {} apps beside {name}", neighbours.len());
        let unit = ("ms", Better::Less);
        table.compare(what, "without", unit, &beside[index], &alone[index], Some(Goal::AtMost(1.2)));
    }
    projects.end()
}

/// A hog that has ended, or sleeps, would show nothing.
fn at_work(federation: &Federation, hog: &str) -> Result<()> {
    let first = federation.first_process(hog)?;
    let used = || processes::group_cpu_ms(first);
    let before = used()?;
    wait_for("a hog to be at work", LIMIT, || Ok((used()? > before + 20.0).then_some(())))
}

/// As [`slowest`]. Users are elsewhere: what their own machine does beside is no
/// part of the answer, so who asks here goes first.
fn asked(connects: &[Connect]) -> Result<f64> {
    let before = getpriority_process(None)?;
    setpriority_process(None, -20)?;
    let slowest = slowest(connects);
    setpriority_process(None, before)?;
    slowest
}

/// The 99th percentile of the time to the first byte, in milliseconds.
fn slowest(connects: &[Connect]) -> Result<f64> {
    let mut millis = Vec::new();
    for _ in 0..REQUESTS {
        for connect in connects {
            let (address, path) = split(&connect.direct)?;
            let begun = Instant::now();
            first_byte(address, &path, Some(&connect.token), LIMIT)?;
            millis.push(begun.elapsed().as_secs_f64() * 1000.0);
        }
    }
    millis.sort_by(f64::total_cmp);
    let index = millis.len().saturating_sub(1) * 99 / 100;
    millis.get(index).copied().ok_or_else(|| "nothing was measured".into())
}

/// A project that does this whenever it is started; stopped.
fn hog(federation: &Federation, projects: &mut Projects<'_>, name: &str, script: &str) -> Result<String> {
    let limits = json!({
        "memory_bytes": 256 << 20, "cpu_millis": 1000, "cpu_weight": 20, "pids": 256,
    });
    let id = projects.make(json!({ "name": name, "limits": limits, "quota_bytes": 256 << 20 }))?;
    federation.change(&id, "start")?;
    let install = format!(
        "mkdir -p ~/.cocalc && cat > ~/hog.py <<'END'\n{script}\nEND\n\
         printf '#!/bin/sh\\nexec python3 ~/hog.py\\n' > ~/.cocalc/startup && chmod 700 ~/.cocalc/startup"
    );
    federation.exec(&id, &install, LIMIT)?;
    federation.change(&id, "stop")?;
    Ok(id)
}
