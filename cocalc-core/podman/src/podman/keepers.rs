//! What a podman that was killed has left behind without noting it.
//!
//! podman starts a keeper for each container (conmon), which has the runtime make the
//! container's first process, and notes only then that there is one. If it is killed in
//! between, keeper and process wait for ever, hold the project's files, and are none of
//! podman's: to remove the container does not end them.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    time::Duration,
};

use cocalc_core::ids::ProjectId;
use rustix::process::Signal;

use super::Shared;
use crate::{command, pidfd::PidFd};

/// How long the runtime may take to remove a container.
const RUNTIME_LIMIT: Duration = Duration::from_secs(20);
/// How long processes may take to end that were told to, or whose container is gone.
const END_LIMIT: Duration = Duration::from_secs(5);

/// A keeper that still has something to keep.
#[derive(Debug)]
pub(super) struct Keeper {
    /// The name of its container.
    pub(super) name: String,
    /// And its id.
    container: String,
    /// Where it leaves word of the end, which nobody collects.
    exits: Option<PathBuf>,
    process: PidFd,
    /// The processes in the container that are seen from here.
    inside: Vec<PidFd>,
}

impl Shared {
    /// Ends what keeps the containers of a project that podman knows nothing of, and
    /// what is in them. The caller holds the project's operation, and nothing of it is
    /// to run.
    pub(super) async fn end_keepers(&self, project: ProjectId) {
        let name = self.container(project);
        let found = tokio::task::spawn_blocking(move || find(|other| other == name)).await;
        for keeper in found.unwrap_or_default() {
            tracing::warn!(%project, "ends a container that podman has left half made");
            keeper.end(&self.cli.runtime).await;
        }
    }

    /// Whether a container of this id was made by the runtime and never started.
    pub(super) async fn waits_to_start(&self, id: &str) -> bool {
        let mut state = tokio::process::Command::new(&self.cli.runtime);
        state.args(["state", id]).stdin(std::process::Stdio::null());
        let said = command::run(state, RUNTIME_LIMIT).await.unwrap_or_default();
        let said: serde_json::Value = serde_json::from_str(&said).unwrap_or_default();
        said.get("status").and_then(serde_json::Value::as_str) == Some("created")
    }
}

impl Keeper {
    /// Ends it, and what it keeps.
    pub(super) async fn end(self, runtime: &str) {
        delete(runtime, &self.container).await;
        for process in self.inside.iter().chain([&self.process]) {
            if !process.ended(END_LIMIT).await.unwrap_or(false) {
                process.signal(Signal::KILL);
                let _ = process.ended(END_LIMIT).await;
            }
        }
        // Groups can be removed that are empty.
        delete(runtime, &self.container).await;
        if let Some(exits) = self.exits {
            let _ = std::fs::remove_file(exits.join(&self.container));
        }
    }
}

/// Has the runtime end and forget a container; harmless if it does not know it.
async fn delete(runtime: &str, id: &str) {
    let mut delete = tokio::process::Command::new(runtime);
    delete.args(["delete", "--force", id]).stdin(std::process::Stdio::null());
    if let Err(error) = command::run(delete, RUNTIME_LIMIT).await {
        tracing::debug!(error = %cocalc_core::chain(&error), "the runtime does not remove a container");
    }
}

/// The keepers of containers with such names that have processes in them. Blocks.
pub(super) fn find(wanted: impl Fn(&str) -> bool) -> Vec<Keeper> {
    let mut keepers: Vec<Keeper> = processes()
        .filter_map(|pid| {
            // Opened before it is looked at: the number cannot come to mean another.
            let process = PidFd::open(pid).ok().flatten()?;
            let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let (name, container, exits) = parse(&arguments).filter(|(name, ..)| wanted(name))?;
            is_ours(pid).then_some(Keeper { name, container, exits, process, inside: Vec::new() })
        })
        .collect();
    if keepers.is_empty() {
        return keepers;
    }
    for pid in processes() {
        let Ok(Some(process)) = PidFd::open(pid) else { continue };
        let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        let within = |keeper: &&mut Keeper| is_within(&groups, &keeper.container);
        if let Some(keeper) = keepers.iter_mut().find(within) {
            keeper.inside.push(process);
        }
    }
    // Others end by themselves.
    keepers.retain(|keeper| !keeper.inside.is_empty());
    keepers
}

/// Whether these control groups are the container's, or in them, and not its keeper's.
fn is_within(groups: &str, container: &str) -> bool {
    groups.lines().filter_map(|line| line.splitn(3, ':').nth(2)).flat_map(|path| path.split('/')).any(
        |part| {
            part.strip_suffix(".scope").unwrap_or(part).strip_prefix("libpod-").unwrap_or(part) == container
        },
    )
}

fn processes() -> impl Iterator<Item = i32> {
    let all = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    all.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// The name and the id of a keeper's container, and where it leaves word of its end, by
/// its arguments.
fn parse(arguments: &[u8]) -> Option<(String, String, Option<PathBuf>)> {
    let arguments: Vec<&str> = std::str::from_utf8(arguments).ok()?.split('\0').collect();
    let program = Path::new(arguments.first()?).file_name()?;
    let after = |name: &str| {
        let at = arguments.iter().position(|argument| *argument == name)?;
        arguments.get(at + 1).map(|value| (*value).to_owned())
    };
    let id = after("-c").filter(|id| id.len() == 64 && id.bytes().all(|byte| byte.is_ascii_hexdigit()))?;
    (program == OsStr::new("conmon")).then_some((after("-n")?, id, after("--exit-dir").map(PathBuf::from)))
}

/// Whether a process is root's and in this process's user namespace: tenants can give
/// their processes any arguments.
fn is_ours(pid: i32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let root = status
        .lines()
        .find_map(|line| line.strip_prefix("Uid:"))
        .is_some_and(|ids| ids.split_whitespace().all(|id| id == "0"));
    let namespace = |of: &str| std::fs::read_link(format!("/proc/{of}/ns/user")).ok();
    root && namespace("self").is_some_and(|own| namespace(&pid.to_string()) == Some(own))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_keeper_is_known_by_its_arguments_and_its_containers_processes_by_their_groups() {
        let id = "62f36934e9c5edf9c8249305aa7d4b95889a9487c61cd9210801a0eb2e872f67";
        let line = format!(
            "/usr/bin/conmon\0--api-version\01\0-c\0{id}\0-u\0{id}\0-n\0cocalc-a-b\0--exit-dir\0/x\0"
        );
        assert_eq!(parse(line.as_bytes()), Some(("cocalc-a-b".to_owned(), id.to_owned(), Some("/x".into()))));
        for other in [
            line.replace("conmon", "podman"),
            line.replace("-n\0", "-m\0"),
            line.replace(&id[1..], "0"),
            format!("/usr/bin/conmon\0-c\0{id}\0-n"),
            String::new(),
        ] {
            assert_eq!(parse(other.as_bytes()), None, "{other:?}");
        }
        for (groups, within) in [
            (format!("9:memory:/libpod_parent/libpod-{id}\n0::/\n"), true),
            (format!("0::/machine.slice/libpod-{id}.scope/container/x\n"), true),
            (format!("0::/{id}\n"), true),
            (format!("0::/libpod_parent/libpod-conmon-{id}\n0::/machine.slice/conmon\n"), false),
            (format!("9:memory:/libpod_parent/libpod-{id}0\n"), false),
            ("0::/\n".to_owned(), false),
        ] {
            assert_eq!(is_within(&groups, id), within, "{groups}");
        }
    }
}
