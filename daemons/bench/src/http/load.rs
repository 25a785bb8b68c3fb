//! Runs of `wrk`.

use std::{path::Path, process::Command, time::Duration};

use crate::{Result, tool::text};

/// What it prints for us, beside what it prints anyway.
const SCRIPT: &str = "done = function(summary, latency, requests)\n  \
    io.write(string.format(\"SEEN %d %d %d %d %d\\n\", summary.requests, summary.duration,\n    \
    latency:percentile(50), latency:percentile(99), latency:percentile(99.9)))\nend\n";

/// How it asks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Load {
    /// The end of the path, which says how much the app answers.
    pub(super) path: &'static str,
    pub(super) connections: u32,
    pub(super) seconds: u32,
    /// Whether connections are used again.
    pub(super) kept: bool,
}

/// What it saw; times in microseconds.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Seen {
    pub(super) requests: f64,
    pub(super) rate: f64,
    pub(super) p50: f64,
    pub(super) p99: f64,
    pub(super) p999: f64,
    /// Of those who served, for each request.
    pub(super) cpu_micros: f64,
}

impl Load {
    /// Runs it; all answers must be good.
    pub(super) fn run(self, dir: &Path, mut wrk: Command, base: &str, field: Option<&str>) -> Result<Seen> {
        let script = dir.join("wrk.lua");
        std::fs::write(&script, SCRIPT)?;
        let threads = self.connections.min(2);
        wrk.args(["--threads", &threads.to_string(), "--connections", &self.connections.to_string()]);
        wrk.args(["--duration", &format!("{}s", self.seconds), "--timeout", "30s", "--script"]).arg(script);
        if let Some(field) = field {
            wrk.args(["--header", field]);
        }
        if !self.kept {
            wrk.args(["--header", "Connection: close"]);
        }
        let url = format!("{base}{}", self.path);
        let said = text(wrk.arg(url), Duration::from_secs(u64::from(self.seconds) + 60))?;
        if said.contains("Non-2xx") || said.contains("Socket errors") {
            return Err(format!("requests failed: {said}").into());
        }
        let seen = said.lines().find_map(|line| line.strip_prefix("SEEN "));
        let numbers: Vec<f64> =
            seen.unwrap_or_default().split(' ').filter_map(|word| word.parse().ok()).collect();
        let [requests, duration, p50, p99, p999] = numbers[..] else {
            return Err(format!("wrk said: {said}").into());
        };
        if requests < 1.0 {
            return Err("no request was answered".into());
        }
        Ok(Seen { requests, rate: requests * 1e6 / duration, p50, p99, p999, cpu_micros: 0.0 })
    }
}
