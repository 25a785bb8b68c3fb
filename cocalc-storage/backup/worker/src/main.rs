//! The process that makes and restores the backups of `cocalc-backup`: one job
//! per process, told on standard input; see `cocalc_backup::protocol`.
//!
//! It ends when standard input does, whatever it is doing: the caller is gone,
//! or has lost interest. Everything it does may be cut off at any point.

mod backend;
mod backup;
mod browse;
mod check;
mod contents;
mod diff;
mod excludes;
mod fail;
mod failure;
mod mint;
mod mirror;
mod password;
mod renewal;
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

use cocalc_backup::protocol::{Event, Failure, FailureKind, Job, LINE_BYTES_MAX, Order, Renewed, Task, Work};

use crate::{
    backend::Backend,
    failure::Failed,
    renewal::{Renewal, Which},
};

/// The exit status of a worker whose standard input ended.
const UNWANTED: i32 = 3;

/// How often a job begins again because something was deleted while it looked
/// at it: a prune runs beside it, and there is at most one.
const BEGINNINGS_MAX: u32 = 3;

fn main() -> ExitCode {
    said::listen();
    let (order, renewal) = match hear() {
        Ok(heard) => heard,
        Err(words) => {
            eprintln!("{words}");
            return ExitCode::from(2);
        }
    };
    // The HTTP clients take the process's provider. It can be set once.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let outcome = match catch_unwind(AssertUnwindSafe(|| work(&order, renewal))) {
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

/// A line of standard input; `None` at its end.
fn line() -> Result<Option<Vec<u8>>, String> {
    let mut line = Vec::new();
    let mut stdin = std::io::stdin().lock().take(LINE_BYTES_MAX as u64);
    stdin.read_until(b'\n', &mut line).map_err(|error| format!("cannot read standard input: {error}"))?;
    Ok((!line.is_empty()).then_some(line))
}

/// Takes the order, and from then on watches whether it is still wanted, and
/// hands on what the caller answers.
fn hear() -> Result<(Order, Renewal), String> {
    let order = line()?.unwrap_or_default();
    let order: Order = serde_json::from_slice(&order)
        .map_err(|_| "standard input is not an order of cocalc-backup".to_owned())?;
    for group in &order.groups {
        // "0" is whoever writes.
        fs::write(group.join("cgroup.procs"), "0")
            .map_err(|error| format!("cannot join the control group {}: {error}", group.display()))?;
    }
    let (answers, renewal) = Renewal::new();
    thread::spawn(move || {
        while let Ok(Some(line)) = line() {
            if let Ok(renewed) = serde_json::from_slice::<Renewed>(&line) {
                // Whoever asked has lost patience, if nobody takes it.
                let _ = answers.try_send(renewed);
            }
        }
        std::process::exit(UNWANTED);
    });
    Ok((order, renewal))
}

fn work(order: &Order, renewal: Renewal) -> Result<Event, Failed> {
    let job = match &order.work {
        Work::Mint(wanted) => return mint::mint(wanted, &order.bounds).map(Event::Minted),
        Work::Job(job) => job,
    };
    let renewal = Arc::new(renewal);
    let open = |location, which| {
        Ok::<_, Failed>(Arc::new(Backend::open(location, job.access, &order.bounds, &renewal, which)?))
    };
    let backend = open(&job.repository.location, Which::Repository)?;
    let mirror = job.repository.mirror.as_ref().map(|location| open(location, Which::Mirror)).transpose()?;
    let mut beginnings = 1;
    let done = loop {
        let tried = catch_unwind(AssertUnwindSafe(|| attempt(job, &backend, mirror.as_ref())));
        match tried.unwrap_or_else(|_| Err(Failed::panicked())) {
            // Only of what is known to do nothing: another task may have begun.
            Err(failed)
                if beginnings < BEGINNINGS_MAX
                    && matches!(&job.task, Task::Check(options) if !options.repair)
                    && failed.is_late() =>
            {
                said::forget();
                beginnings += 1;
            }
            Err(_) | Ok(Event::Checked(_))
                if beginnings < BEGINNINGS_MAX && is_harmless(&job.task) && backend.begin_again() =>
            {
                said::forget();
                beginnings += 1;
            }
            done => break done,
        }
    };
    // What the store said first says more than what rustic made of it.
    done.map_err(|failed| match backend.fault() {
        Some(fault) => Failed(Failure { kind: fault.kind, words: [fault.words, failed.0.words].concat() }),
        None => failed,
    })
}

/// Whether the task may begin again: it has done nothing yet when it has read
/// the index, after which nothing vanishes, or it does nothing at all.
fn is_harmless(task: &Task) -> bool {
    match task {
        Task::BackUp(_)
        | Task::List
        | Task::Ls { .. }
        | Task::Find { .. }
        | Task::Diff { .. }
        | Task::Restore { .. }
        | Task::Forget { .. } => true,
        Task::Check(options) => !options.repair,
        _ => false,
    }
}

fn attempt(job: &Job, backend: &Arc<Backend>, mirror: Option<&Arc<Backend>>) -> Result<Event, Failed> {
    match &job.task {
        Task::BackUp(source) => backup::back_up(job, backend, source).map(Event::BackedUp),
        Task::List => browse::list(job, backend).map(Event::Listed),
        Task::Ls { backup, directory, after, max } => {
            browse::ls(job, backend, backup, directory, after.as_ref(), *max).map(Event::Entries)
        }
        Task::Find { backup, text, max } => {
            browse::find(job, backend, backup, text, *max).map(Event::Entries)
        }
        Task::Diff { backup, now, directory, after, max } => {
            let asked = diff::Question { backup, now, directory, after: after.as_ref(), max: *max };
            diff::diff(job, backend, &asked).map(Event::Changes)
        }
        Task::Restore { backup, path, target } => {
            restore::restore(job, backend, backup, path, target).map(Event::Restored)
        }
        Task::Forget { backups } => tend::forget(job, backend, backups).map(|()| Event::Forgotten),
        Task::Prune(options) => tend::prune(job, backend, options).map(Event::Pruned),
        Task::Check(options) => check::check(job, backend, mirror, options).map(Event::Checked),
        Task::Erase => tend::erase(job, backend, mirror).map(Event::Erased),
        Task::Mirror => mirror::mirror(backend, mirror).map(Event::Mirrored),
        Task::AddPassword { password: add } => password::add(job, backend, add).map(|()| Event::PasswordSet),
        Task::KeepPassword => password::keep(job, backend).map(|()| Event::PasswordSet),
    }
}

impl Failed {
    /// Whether rustic found a thread of its own still at work that it had given a
    /// tenth of a second to end, which on a busy machine is not enough.
    fn is_late(&self) -> bool {
        self.0.words.iter().any(|words| words.contains("index still in use"))
    }

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
