//! What projects notice of others that take all they can get: the slowest
//! answers of their apps, with and without hogs beside them.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::{
    Effort, Result,
    federation::{Connect, Federation, split},
    projects::Projects,
    table::{Better, Goal, Table},
    tool::first_byte,
};

const LIMIT: Duration = Duration::from_secs(60);
/// How often each app is asked in one run.
const REQUESTS: usize = 50;

/// Each hog: its name, what its owner may use, and what it does whenever it is
/// started.
const HOGS: [(&str, &str); 5] = [
    ("fork bomb", "import os\nwhile True:\n try: os.fork()\n except OSError: pass"),
    (
        "memory",
        "import os\nwhile True:\n if os.fork() == 0:\n  a = []\n  while True: a.append(bytearray(8 << 20))\n os.wait()",
    ),
    (
        "disk",
        "import os\nn = 0\nwhile True:\n n += 1\n try:\n  with open(os.path.expanduser(f\"~/fill{n % 9}\"), \"wb\") as f:\n   while True: f.write(os.urandom(1 << 20)); f.flush(); os.fsync(f)\n except OSError: pass",
    ),
    ("log", "while True: print(\"flood \" * 1000)"),
    (
        "network",
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
    let (mut beside, mut alone) = (Vec::new(), Vec::new());
    // The first run warms caches and is not counted.
    for round in 0..=effort.runs {
        let quiet = slowest(&connects)?;
        for hog in &hogs {
            federation.change(hog, "start")?;
        }
        std::thread::sleep(Duration::from_secs(2));
        let loud = slowest(&connects)?;
        for hog in &hogs {
            federation.change(hog, "stop")?;
        }
        if round > 0 {
            alone.push(quiet);
            beside.push(loud);
        }
    }
    let what = format!("p99 of {} apps beside {} hogs", neighbours.len(), hogs.len());
    let goal = Some(Goal::AtMost(1.2));
    table.compare(what, "the same without hogs", ("ms", Better::Less), &beside, &alone, goal);
    projects.end()
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
