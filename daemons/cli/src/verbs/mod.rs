//! The verbs that call the master's API.

mod account;
mod backup;
mod certificate;
mod host;
mod image;
mod limits;
mod operation;
mod project;
mod reach;
mod receipt;
mod snapshot;
mod ssh_config;

use std::{
    io::{IsTerminal, Write},
    process::ExitCode,
    time::Duration,
};

use serde_json::Value;

pub(crate) use self::limits::{Isolation, Limits};
use crate::{
    api::Api,
    args::{Command, Output},
    failure::{Exit, Failure},
};

/// How long a verb waits for an operation before it leaves it to go on.
const OPERATION_LIMIT: Duration = Duration::from_secs(600);

/// Runs a verb.
pub(crate) fn run(api: &Api, output: Output, command: Command) -> Result<ExitCode, Failure> {
    match command {
        Command::Project(verb) => return project::run(api, output, verb),
        Command::Snapshot(verb) => snapshot::run(api, output, verb)?,
        Command::Image(verb) => image::run(api, output, verb)?,
        Command::Backup(verb) => backup::run(api, output, verb)?,
        Command::Host(verb) => host::run(api, output, verb)?,
        Command::Collaborator(verb) => account::collaborator(api, output, verb)?,
        Command::Key(verb) => account::key(api, output, verb)?,
        Command::Account(verb) => account::run(api, output, verb)?,
        Command::Keys(verb) => account::keys(api, output, verb)?,
        Command::SshConfig { direct, identity } => {
            ssh_config::show(api, output, direct, identity.as_deref())?;
        }
        Command::SshKnownHosts { pattern } => certificate::known_hosts(api, output, pattern)?,
        Command::Receipt { id, wait } => receipt::show(api, output, &id, wait)?,
        Command::Operation(verb) => operation::run(api, output, verb)?,
        // The others were dispatched before a master was looked for.
        Command::Up(_)
        | Command::Down(_)
        | Command::Doctor(_)
        | Command::Audit(_)
        | Command::Login { .. }
        | Command::Logout { .. }
        | Command::Completion { .. } => {}
    }
    Ok(ExitCode::SUCCESS)
}

/// Asks for the word `expected` before something that cannot be taken back;
/// where nobody can be asked, `flag` says it.
fn confirm(given: bool, question: &str, expected: &str, flag: &str) -> Result<(), Failure> {
    if given {
        return Ok(());
    }
    let asked = std::io::stdin().is_terminal() && std::io::stderr().is_terminal();
    if !asked {
        return Err(Failure::new(Exit::Usage, format!("say {flag}: nobody can be asked here. {question}")));
    }
    write!(std::io::stderr(), "{question}\nType {expected:?} to go on: ")?;
    let mut line = String::new();
    std::io::stdin().read_line(&mut line)?;
    if line.trim() == expected { Ok(()) } else { Err(Failure::failed("nothing was done")) }
}

/// Waits for the operation that `answer` started, showing progress to people.
fn settle(api: &Api, answer: &Value) -> Result<Value, Failure> {
    settle_within(api, answer, OPERATION_LIMIT)
}

/// The same for at most `limit`.
fn settle_within(api: &Api, answer: &Value, limit: Duration) -> Result<Value, Failure> {
    let operation =
        answer["operation_id"].as_str().ok_or_else(|| Failure::failed("the master started no operation"))?;
    let shown = std::io::stderr().is_terminal();
    let result = api.wait(operation, limit, |seen| {
        if shown {
            // Progress is a courtesy; a closed terminal must not end the wait.
            let _ = write!(std::io::stderr(), "\r\x1b[K{}", progress(seen));
        }
    });
    if shown {
        let _ = write!(std::io::stderr(), "\r\x1b[K");
    }
    if let Ok(ended) = &result {
        for remark in left_out(ended) {
            let _ = writeln!(std::io::stderr(), "not carried along: {remark}");
        }
    }
    result
}

/// What a move left out, in words.
fn left_out(operation: &Value) -> impl Iterator<Item = &str> {
    operation["progress"]["left_out"].as_array().into_iter().flatten().filter_map(Value::as_str)
}

/// One line about a running operation: phase, bytes, rate and estimate.
fn progress(operation: &Value) -> String {
    let mut line = operation["kind"].as_str().unwrap_or("operation").to_owned();
    if let Some(phase) = operation["phase"].as_str() {
        line.push_str(&format!(": {phase}"));
    }
    let progress = &operation["progress"];
    if let Some(bytes) = progress["bytes"].as_u64() {
        line.push_str(&format!(", {}", size(bytes)));
        if let Some(expected) = progress["bytes_expected"].as_u64() {
            line.push_str(&format!(" of about {}", size(expected)));
        }
    }
    if let Some(rate) = progress["bytes_per_sec"].as_u64() {
        line.push_str(&format!(", {}/s", size(rate)));
    }
    if let Some(left) = progress["remaining_secs"].as_u64() {
        line.push_str(&format!(", {left} s left"));
    }
    line
}

/// Bytes for people.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes;
    let mut rest = 0;
    let mut unit = 0;
    while value >= 1024 && unit + 1 < UNITS.len() {
        rest = value % 1024;
        value /= 1024;
        unit += 1;
    }
    if unit == 0 { format!("{value} B") } else { format!("{value}.{} {}", rest * 10 / 1024, UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{left_out, progress, size};

    #[test]
    fn a_move_is_one_line_and_what_it_left_out_is_said() {
        let mut operation = json!({ "kind": "move", "phase": "seeding", "progress": {
            "bytes": 1 << 20, "bytes_expected": 3 << 20, "bytes_per_sec": 1 << 19, "remaining_secs": 4,
            "left_out": ["one file"] } });
        assert_eq!(progress(&operation), "move: seeding, 1.0 MiB of about 3.0 MiB, 512.0 KiB/s, 4 s left");
        assert_eq!(left_out(&operation).collect::<Vec<_>>(), ["one file"]);
        operation["progress"] = json!({});
        assert_eq!((progress(&operation), left_out(&operation).count()), ("move: seeding".to_owned(), 0));
    }

    #[test]
    fn sizes_are_readable() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(1023), "1023 B");
        assert_eq!(size(1536), "1.5 KiB");
        assert_eq!(size(u64::MAX), "16777215.9 TiB");
    }
}
