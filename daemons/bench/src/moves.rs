//! A running project to another host, against `btrfs send | btrfs receive` of
//! the same files between the same two volumes, synced.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use serde_json::json;

use crate::{
    Effort, Result,
    federation::{Federation, field},
    table::{Better, Table},
    tool::run,
};

const LIMIT: Duration = Duration::from_secs(300);

pub(crate) fn measure(federation: &Federation, effort: Effort, table: &mut Table) -> Result<()> {
    let [from, to] = federation.hosts()?;
    if from.storage != "btrfs" || to.storage != "btrfs" {
        return Err("moves are measured on Btrfs only".into());
    }
    let (mut ours, mut peers) = (Vec::new(), Vec::new());
    for round in 0..effort.runs {
        // A new one each time: a project that returns travels as a delta.
        let begun = federation.api("/projects", Some(json!({ "name": "heavy", "host": from.name })))?;
        federation.wait(&begun)?;
        let project = field(&begun["project"], "id")?;
        federation.change(&project, "start")?;
        let line = format!(
            "mkdir ~/files && cd ~/files && for i in $(seq {}); do head -c 1M /dev/urandom >$i || exit 1; done; sync",
            effort.move_mib
        );
        federation.exec(&project, &line, LIMIT)?;
        // By turns first and second. The files stay where they are until the
        // move, so the raw one is first or goes from the other volume.
        if round % 2 == 0 {
            peers.push(raw(&project, &from.volume, &to.volume)?.as_secs_f64());
        }
        let begun = Instant::now();
        let operation =
            federation.api(&format!("/projects/{project}/move"), Some(json!({ "to": to.name })))?;
        let done = federation.wait(&operation)?;
        ours.push(begun.elapsed().as_secs_f64());
        if round == 0 {
            table.note(format!("what the master says of the first move: {}", done["progress"]));
        }
        if round % 2 == 1 {
            peers.push(raw(&project, &to.volume, &from.volume)?.as_secs_f64());
        }
        let found = federation.exec(&project, "ls ~/files | wc -l", LIMIT)?;
        if found.trim() != effort.move_mib.to_string() {
            return Err(format!("{} files after the move", found.trim()).into());
        }
        federation.change(&project, "stop")?;
        federation.delete(&project)?;
    }
    let what = format!("move of {} files of 1 MiB, running project", effort.move_mib);
    table.add(what, "btrfs send, receive, sync", ("s", Better::Less), &ours, &peers);
    Ok(())
}

/// A snapshot, its stream, and the sync of what was received.
fn raw(project: &str, from: &Path, to: &Path) -> Result<Duration> {
    let name = "bench-raw";
    let copies = Copies([from.join(name), to.join(name)]);
    let [source, _] = &copies.0;
    run(Command::new("sync").arg("-f").arg(from), LIMIT)?;
    let begun = Instant::now();
    let mut snapshot = Command::new("btrfs");
    snapshot.args(["subvolume", "snapshot", "-r"]).arg(from.join("projects").join(project)).arg(source);
    run(&mut snapshot, LIMIT)?;
    // The pipe and both its ends go when the time is over.
    let mut pipe = Command::new("timeout");
    pipe.args(["--kill-after=5", "240", "bash", "-c"])
        .arg("set -o pipefail; btrfs -q send \"$1\" | btrfs -q receive \"$2\" && sync -f \"$2\"")
        .arg("bash")
        .arg(source)
        .arg(to);
    run(&mut pipe, LIMIT)?;
    Ok(begun.elapsed())
}

/// Subvolumes that go with the value.
struct Copies([PathBuf; 2]);

impl Drop for Copies {
    fn drop(&mut self) {
        for path in &self.0 {
            let mut delete = Command::new("btrfs");
            // One of them may be missing after a failure.
            let _ = run(delete.args(["subvolume", "delete", "--commit-after"]).arg(path), LIMIT);
            // What is being freed in the background would slow what comes next.
            if let Some(volume) = path.parent() {
                let _ = run(
                    Command::new("timeout").args(["60", "btrfs", "subvolume", "sync"]).arg(volume),
                    LIMIT,
                );
            }
        }
    }
}
