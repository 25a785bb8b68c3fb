//! What projects notice of others that take all they can get: the slowest
//! answers of their apps, with and without hogs beside them.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::{
    Effort, Result,
    federation::{Connect, Federation, field, split},
    table::{Better, Table},
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
    let mut projects = Projects { federation, made: Vec::new() };
    let neighbours: Vec<String> =
        (0..effort.neighbours).map(|number| projects.neighbour(number)).collect::<Result<_>>()?;
    let hogs: Vec<String> =
        HOGS.iter().map(|(name, script)| projects.hog(name, script)).collect::<Result<_>>()?;
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
    table.add(what, "the same without hogs", ("ms", Better::Less), &beside, &alone);
    Ok(())
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

/// Deletes what was made, whatever happens.
struct Projects<'a> {
    federation: &'a Federation,
    made: Vec<String>,
}

impl Projects<'_> {
    /// A copy of the sample project, with its app, running.
    fn neighbour(&mut self, number: u32) -> Result<String> {
        let sample = self.federation.project();
        let body = json!({ "name": format!("neighbour {number}") });
        let begun = self.federation.api(&format!("/projects/{sample}/clone"), Some(body))?;
        let id = field(&begun["project"], "id")?;
        self.made.push(id.clone());
        self.federation.wait(&begun)?;
        self.federation.change(&id, "start")?;
        Ok(id)
    }

    /// A project that does this whenever it is started; stopped.
    fn hog(&mut self, name: &str, script: &str) -> Result<String> {
        let limits = json!({
            "memory_bytes": 256 << 20, "cpu_millis": 1000, "cpu_weight": 20, "pids": 256,
        });
        let body = json!({ "name": name, "limits": limits, "quota_bytes": 256 << 20 });
        let begun = self.federation.api("/projects", Some(body))?;
        let id = field(&begun["project"], "id")?;
        self.made.push(id.clone());
        self.federation.wait(&begun)?;
        self.federation.change(&id, "start")?;
        let install = format!(
            "mkdir -p ~/.cocalc && cat > ~/hog.py <<'END'\n{script}\nEND\n\
             printf '#!/bin/sh\\nexec python3 ~/hog.py\\n' > ~/.cocalc/startup && chmod 700 ~/.cocalc/startup"
        );
        self.federation.exec(&id, &install, LIMIT)?;
        self.federation.change(&id, "stop")?;
        Ok(id)
    }
}

impl Drop for Projects<'_> {
    fn drop(&mut self) {
        for id in &self.made {
            if let Err(error) = self.federation.delete(id) {
                eprintln!("could not delete project {id}: {error}");
            }
        }
    }
}
