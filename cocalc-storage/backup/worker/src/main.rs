//! The process that makes and restores the backups of `cocalc-backup`: one job
//! per process, told on standard input; see `cocalc_backup::protocol`.
//!
//! It ends when standard input does, whatever it is doing: the caller is gone,
//! or has lost interest. Everything it does may be cut off at any point.

mod backend;
mod backup;
mod browse;
mod failure;
mod repository;
mod restore;
mod root;
mod said;
mod store;
mod tend;

use std::{
    fs,
    io::{BufRead as _, Read as _},
    panic::{AssertUnwindSafe, catch_unwind},
    process::ExitCode,
    sync::Arc,
    thread,
};

use cocalc_backup::protocol::{Event, Failure, FailureKind, Job, LINE_BYTES_MAX, Task};

use crate::{backend::Backend, failure::Failed};

/// The exit status of a worker whose standard input ended.
const UNWANTED: i32 = 3;

fn main() -> ExitCode {
    said::listen();
    let job = match hear() {
        Ok(job) => job,
        Err(words) => {
            eprintln!("{words}");
            return ExitCode::from(2);
        }
    };
    let outcome = match catch_unwind(AssertUnwindSafe(|| work(&job))) {
        Ok(outcome) => outcome,
        // rustic unwraps what fails in its threads; the hook kept the words.
        Err(_) => Err(Failed::panicked()),
    };
    said::tell(&match outcome {
        Ok(event) => event,
        Err(failed) => Event::Failed(failed.0),
    });
    ExitCode::SUCCESS
}

/// Takes the job, and from then on watches whether it is still wanted.
fn hear() -> Result<Job, String> {
    let mut line = Vec::new();
    let mut stdin = std::io::stdin().lock();
    // Nothing but the job is sent, so that what is buffered beyond it is empty.
    (&mut stdin)
        .take(LINE_BYTES_MAX as u64)
        .read_until(b'\n', &mut line)
        .map_err(|error| format!("cannot read the job: {error}"))?;
    drop(stdin);
    let job: Job = serde_json::from_slice(&line)
        .map_err(|_| "standard input is not a job of cocalc-backup".to_owned())?;
    if let Some(group) = &job.bounds.control_group {
        fs::write(group.join("cgroup.procs"), std::process::id().to_string())
            .map_err(|error| format!("cannot join the control group {}: {error}", group.display()))?;
    }
    thread::spawn(|| {
        let mut rest = [0; 64];
        while matches!(std::io::stdin().read(&mut rest), Ok(1..)) {}
        std::process::exit(UNWANTED);
    });
    Ok(job)
}

fn work(job: &Job) -> Result<Event, Failed> {
    let backend = Arc::new(Backend::open(&job.repository.location, &job.bounds)?);
    let done = match &job.task {
        Task::BackUp(source) => backup::back_up(job, &backend, source).map(Event::BackedUp),
        Task::List => browse::list(job, &backend).map(Event::Listed),
        Task::Ls { backup, directory, after, max } => {
            browse::ls(job, &backend, backup, directory, after.as_ref(), *max).map(Event::Entries)
        }
        Task::Find { backup, text, max } => {
            browse::find(job, &backend, backup, text, *max).map(Event::Entries)
        }
        Task::Restore { backup, path, target } => {
            catch_unwind(AssertUnwindSafe(|| restore::restore(job, &backend, backup, path, target)))
                .unwrap_or_else(|_| Err(Failed::panicked()))
                .map(Event::Restored)
        }
        Task::Forget { backups } => tend::forget(job, &backend, backups).map(|()| Event::Forgotten),
        Task::Prune(options) => tend::prune(job, &backend, options).map(Event::Pruned),
        Task::Check(options) => tend::check(job, &backend, options).map(Event::Checked),
        Task::Erase => tend::erase(&backend).map(Event::Erased),
    };
    // What the store said first says more than what rustic made of it.
    done.map_err(|failed| match backend.fault() {
        Some(fault) => Failed(Failure { kind: fault.kind, words: [fault.words, failed.0.words].concat() }),
        None => failed,
    })
}

impl Failed {
    fn panicked() -> Self {
        let words = said::panic().unwrap_or_else(|| "it panicked".to_owned());
        let is_damage = ["kind: Cryptography", "kind: Verification", "kind: Repository"];
        let kind = match failure::local(&words) {
            Some(kind) => kind,
            None if is_damage.iter().any(|kind| words.contains(kind)) => FailureKind::Damaged,
            None => FailureKind::Other,
        };
        Self(Failure { kind, words: vec![words] })
    }
}
