//! Running the system's tools: bounded in time, with their complaint as error.

use std::{
    ffi::OsStr,
    io,
    process::{Command as StdCommand, Stdio},
    time::Duration,
};

use tokio::process::Command;

/// Why a tool failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CommandError {
    #[error("could not run {program}")]
    Spawn { program: String, source: io::Error },
    #[error("{program} failed: {complaint}")]
    Failed { program: String, complaint: String },
    #[error("{program} took longer than {limit:?}")]
    TimedOut { program: String, limit: Duration },
}

/// Runs a tool to its end and returns its output; kills it after `limit`.
pub(crate) async fn run(mut command: Command, limit: Duration) -> Result<String, CommandError> {
    let program = name(command.as_std().get_program());
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let spawned =
        command.spawn().map_err(|source| CommandError::Spawn { program: program.clone(), source })?;
    // A later use of the command must not hold what the child inherited.
    drop(command);
    let output = tokio::time::timeout(limit, spawned.wait_with_output())
        .await
        .map_err(|_| CommandError::TimedOut { program: program.clone(), limit })?
        .map_err(|source| CommandError::Spawn { program: program.clone(), source })?;
    judge(program, &output)
}

/// Runs a quick tool from a thread that may block, with `input`.
pub(crate) fn run_blocking(mut command: StdCommand, input: &str) -> Result<String, CommandError> {
    use std::io::Write;
    let program = name(command.get_program());
    let spawn = |source| CommandError::Spawn { program: program.clone(), source };
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(spawn)?;
    if let Some(mut stdin) = child.stdin.take() {
        // A tool that stops reading says why on its standard error.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().map_err(spawn)?;
    judge(program, &output)
}

fn name(program: &OsStr) -> String {
    program.to_string_lossy().into_owned()
}

fn judge(program: String, output: &std::process::Output) -> Result<String, CommandError> {
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let complaint = String::from_utf8_lossy(&output.stderr);
    let complaint = match complaint.trim() {
        "" => output.status.to_string(),
        said => said.chars().take(2000).collect(),
    };
    Err(CommandError::Failed { program, complaint })
}
