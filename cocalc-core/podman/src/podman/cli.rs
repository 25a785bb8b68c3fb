//! podman's command line, with its own configuration and a limit on each call.

use std::{
    collections::BTreeMap,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use cocalc_core::ids::Timestamp;
use serde::Deserialize;
use tokio::process::Command;

use super::{end::Exit, time::parse_time};
use crate::command::{CommandError, run};

/// How long podman may take for one call.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);
/// How long it may take where somebody waits for a word that is not needed.
const QUICK_LIMIT: Duration = Duration::from_secs(10);
/// For how long one that took too long is not asked for such a word.
const PAUSE: Duration = Duration::from_secs(60);
/// How many containers are asked about in one call: each call takes podman a tenth
/// of a second, and a name in it a thousandth.
const INSPECT_MAX: usize = 50;
/// After how many containers in a row of which podman says nothing, and nothing of
/// others, it is not asked of more.
const FAILURES_MAX: usize = 5;

/// What podman reads instead of the system's `containers.conf`: the default
/// sysctls cannot be set in a network namespace that is not the container's
/// own, and its journal of events would only grow.
pub(crate) const CONTAINERS_CONF: &str =
    "[containers]\ndefault_sysctls = []\n[engine]\nevents_logger = \"none\"\n";

/// How to call podman.
#[derive(Debug)]
pub(crate) struct Cli {
    pub(crate) program: PathBuf,
    pub(crate) runtime: String,
    /// An absolute path, in the runner's runtime directory.
    containers_conf: PathBuf,
    /// When a call last took too long.
    hung: Mutex<Option<Instant>>,
}

/// What podman knows of a container.
#[derive(Clone, Debug)]
pub(crate) struct Container {
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) labels: BTreeMap<String, String>,
    /// The state as podman calls it.
    pub(crate) status: String,
    pub(crate) pid: i32,
    pub(crate) started: Option<Timestamp>,
    /// How its first process ended; `None` if it runs or was never started.
    pub(crate) exit: Option<Exit>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Inspected {
    id: String,
    #[serde(default)]
    name: String,
    state: InspectedState,
    config: InspectedConfig,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct InspectedState {
    #[serde(default)]
    status: String,
    running: bool,
    #[serde(rename = "OOMKilled")]
    oom_killed: bool,
    pid: i32,
    exit_code: i32,
    #[serde(default)]
    error: String,
    started_at: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct InspectedConfig {
    #[serde(default)]
    labels: Option<BTreeMap<String, String>>,
}

/// A container's name, and what podman knows of it.
pub(crate) type Said = (String, Result<Container, CliError>);

/// Why a call of podman failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CliError {
    #[error(transparent)]
    Command(#[from] CommandError),
    #[error("podman's answer makes no sense")]
    Answer(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl CliError {
    /// Whether podman took too long.
    pub(crate) fn is_late(&self) -> bool {
        matches!(self, Self::Command(CommandError::TimedOut { .. }))
    }

    /// Whether it says that there is no such container.
    pub(crate) fn is_missing(&self) -> bool {
        matches!(self, Self::Command(CommandError::Failed { complaint, .. })
            if complaint.contains("no such container") || complaint.contains("no such object")
                || complaint.contains("no container with name or ID"))
    }
}

impl Cli {
    pub(crate) fn new(program: PathBuf, runtime: String, containers_conf: PathBuf) -> Self {
        Self { program, runtime, containers_conf, hung: Mutex::default() }
    }

    fn command(&self) -> Command {
        let mut command = self.in_place(&self.program);
        command.stdin(Stdio::null());
        command.args(["--runtime", &self.runtime, "--log-level", "error"]);
        command
    }

    /// A command with podman's configuration. conmon leaves a file named `oom`
    /// where it was started once a project's memory was used up: that must not
    /// be this process's directory.
    fn in_place(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        command.env("CONTAINERS_CONF", &self.containers_conf);
        if let Some(directory) = self.containers_conf.parent() {
            command.current_dir(directory);
        }
        command
    }

    /// Runs podman with these arguments.
    pub(crate) async fn run<S: AsRef<std::ffi::OsStr>>(
        &self,
        args: impl IntoIterator<Item = S>,
    ) -> Result<String, CliError> {
        self.run_within(LIMIT, args).await
    }

    /// The version of podman, for people; `None` if it does not answer at once.
    pub(crate) async fn version(&self) -> Result<Option<String>, CliError> {
        match self.run_within(QUICK_LIMIT, ["version", "--format", "{{.Client.Version}}"]).await {
            Err(error) if error.is_late() => Ok(None),
            other => other.map(|text| Some(text.trim().to_owned())),
        }
    }

    async fn run_within<S: AsRef<std::ffi::OsStr>>(
        &self,
        limit: Duration,
        args: impl IntoIterator<Item = S>,
    ) -> Result<String, CliError> {
        let mut command = self.command();
        command.args(args);
        self.noted(run(command, limit).await)
    }

    /// Keeps in mind whether podman hangs.
    fn noted(&self, outcome: Result<String, CommandError>) -> Result<String, CliError> {
        let late = matches!(outcome, Err(CommandError::TimedOut { .. }));
        *self.hung.lock().unwrap_or_else(PoisonError::into_inner) = late.then(Instant::now);
        Ok(outcome?)
    }

    /// Starts a created container, whose first process inherits `listener` as
    /// descriptor 3.
    pub(crate) async fn start(&self, name: &str, listener: OwnedFd) -> Result<(), CliError> {
        // Socket activation wants descriptor 3 and the pid of podman itself;
        // the shell arranges both, and becomes podman.
        let script = "exec 3<&0 </dev/null; LISTEN_FDS=1 LISTEN_PID=$$ exec \"$@\"";
        let mut command = self.in_place("/bin/sh");
        command.args(["-c", script, "sh"]).arg(&self.program);
        command.args(["--runtime", &self.runtime, "--log-level", "error", "start", name]);
        command.stdin(Stdio::from(listener));
        self.noted(run(command, LIMIT).await)?;
        Ok(())
    }

    /// What podman knows of these containers; missing ones are an error.
    pub(crate) async fn inspect(&self, names: &[String]) -> Result<Vec<Container>, CliError> {
        self.inspect_within(LIMIT, names).await
    }

    /// The same of one, for somebody who needs no answer: a podman that hangs is
    /// given up soon, and for a while not asked.
    pub(crate) async fn inspect_quickly(&self, name: &str) -> Result<Vec<Container>, CliError> {
        let hung = *self.hung.lock().unwrap_or_else(PoisonError::into_inner);
        if hung.is_some_and(|at| at.elapsed() < PAUSE) {
            let program = self.program.display().to_string();
            return Err(CommandError::TimedOut { program, limit: Duration::ZERO }.into());
        }
        self.inspect_within(QUICK_LIMIT, &[name.to_owned()]).await
    }

    /// What podman knows of those of these containers that are still there, or why it
    /// does not say. A podman that takes too long, or says nothing at all, fails.
    pub(crate) async fn inspect_each(&self, names: &[String]) -> Result<Vec<Said>, CliError> {
        let mut all = Vec::with_capacity(names.len());
        for some in names.chunks(INSPECT_MAX) {
            match self.inspect(some).await {
                Ok(containers) => all.extend(containers.into_iter().map(|one| (one.name.clone(), Ok(one)))),
                Err(error) if error.is_late() => return Err(error),
                // The others are there and in order.
                Err(_) => {
                    let before = all.len();
                    let mut failed = 0;
                    for name in some {
                        match self.inspect(std::slice::from_ref(name)).await {
                            Err(error) if error.is_missing() => {}
                            Err(error) if error.is_late() => return Err(error),
                            Err(error) => {
                                failed += 1;
                                // That is podman's trouble, and not a container's.
                                if failed >= FAILURES_MAX && failed == all.len() - before + 1 {
                                    return Err(error);
                                }
                                all.push((name.clone(), Err(error)));
                            }
                            Ok(one) => all.extend(one.into_iter().map(|one| (name.clone(), Ok(one)))),
                        }
                    }
                }
            }
        }
        Ok(all)
    }

    async fn inspect_within(&self, limit: Duration, names: &[String]) -> Result<Vec<Container>, CliError> {
        if names.is_empty() {
            return Ok(Vec::new());
        }
        let mut args = vec!["container", "inspect"];
        args.extend(names.iter().map(String::as_str));
        let text = self.run_within(limit, args).await?;
        let inspected: Vec<Inspected> =
            serde_json::from_str(&text).map_err(|error| CliError::Answer(error.into()))?;
        inspected.into_iter().map(Container::try_from).collect()
    }

    /// The names and states of all containers with this label, if podman says them in
    /// time.
    pub(crate) async fn listed(
        &self,
        label: &str,
        limit: Duration,
    ) -> Result<Vec<(String, String)>, CliError> {
        let filter = format!("label={label}");
        let args = ["ps", "--all", "--no-trunc", "--filter", &filter, "--format", "{{.Names}} {{.State}}"];
        let text = self.run_within(limit, args).await?;
        let of = |line: &str| {
            let (name, state) = line.split_once(' ').unwrap_or((line, ""));
            (name.to_owned(), state.trim().to_ascii_lowercase())
        };
        Ok(text.lines().filter(|line| !line.is_empty()).map(of).collect())
    }
}

impl TryFrom<Inspected> for Container {
    type Error = CliError;

    fn try_from(inspected: Inspected) -> Result<Self, CliError> {
        let state = inspected.state;
        let started = parse_time(&state.started_at).map_err(|error| CliError::Answer(error.into()))?;
        let exit = (!state.running && started.is_some()).then_some(Exit {
            code: state.exit_code,
            complaint: state.error,
            memory_used_up: state.oom_killed,
        });
        Ok(Self {
            id: inspected.id,
            name: inspected.name,
            labels: inspected.config.labels.unwrap_or_default(),
            status: state.status,
            pid: state.pid,
            started,
            exit,
        })
    }
}

/// Finds a program in the search path.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    // An ordinary user's path often lacks these, where the tools are.
    let more = ["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(more)
        .map(|directory| directory.join(name))
        .find(|candidate| is_executable(candidate))
}

fn is_executable(path: &Path) -> bool {
    rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok() && path.is_file()
}
