//! The performance table of a federation on this machine. Each number stands
//! beside that of a peer which was measured in the same run, by turns with it;
//! what counts is the ratio of the medians.

mod auth;
mod backup;
mod container;
mod federation;
mod hogs;
mod http;
mod moves;
mod processes;
mod projects;
mod ssh;
mod start;
mod storage;
mod table;
mod tokens;
mod tool;

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, ValueEnum};

use self::{federation::Federation, table::Table};

type Error = Box<dyn std::error::Error>;
type Result<T> = std::result::Result<T, Error>;

/// Measures a federation on this machine against its peers.
#[derive(Debug, Parser)]
#[command(name = "cocalc-bench", version)]
struct Arguments {
    /// Where the federation keeps everything while it is measured.
    #[arg(long)]
    dir: PathBuf,
    /// The first of the ports that are used.
    #[arg(long, default_value_t = 27800, value_parser = clap::value_parser!(u16).range(1024..=65000))]
    base_port: u16,
    /// Only these parts.
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Part>,
    /// How often each is measured; the median counts.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// Less data and less time: to see that it works, not how fast.
    #[arg(long)]
    quick: bool,
    /// Prints JSON, too.
    #[arg(long)]
    json: bool,
    /// Writes the JSON to this file.
    #[arg(long)]
    out: Option<PathBuf>,
}

/// A part of the table.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Part {
    /// From `project start` to the first byte of an app, stops, commands, and what
    /// idle projects take.
    Start,
    /// A start on a host with thousands of stopped projects.
    Stopped,
    /// Verifications of connect tokens.
    Tokens,
    /// Decisions of a host: token, limits, ACL, audit.
    Auth,
    /// Requests through host and proxy.
    Http,
    /// Bytes through the SSH ingress.
    Ssh,
    /// A project with 1 GB of files to another host.
    Moves,
    /// Apps beside projects that take all they can get.
    Hogs,
    /// Snapshots, clones and streams of the storage alone, and volumes with
    /// thousands of projects.
    Storage,
    /// Backups and restores, against restic.
    Backup,
}

/// How much to measure.
#[derive(Clone, Copy, Debug)]
struct Effort {
    runs: u32,
    /// Of each run of `wrk`, and of the token loop.
    seconds: u32,
    /// Of the file that goes through SSH.
    ssh_mib: u32,
    /// Of the tree that goes through it.
    small_files: u32,
    /// Of SSH sessions that are open at once.
    sessions: u32,
    /// Of commands one after the other in a connection.
    rounds: u32,
    /// Of the project that moves.
    move_mib: u32,
    /// With how many snapshots present another one is taken.
    snapshots: &'static [u32],
    /// How often.
    snapshot_runs: u32,
    /// Of the project that is streamed.
    stream_mib: u32,
    stream_files: u32,
    /// On the volume with many of them.
    projects: u32,
    /// That are silent at the same time.
    websockets: u32,
    /// That are started at once, and that are idle.
    at_once: u32,
    /// How long they are looked at.
    idle_secs: u64,
    /// That a host has beside the one that is started.
    stopped: u32,
    /// Beside hogs.
    neighbours: u32,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let (table, result) = measure(&arguments);
    // What was measured before a failure is worth showing, too.
    table.print();
    let result = result.and_then(|()| {
        let json = table.json()?;
        if arguments.json {
            println!("{json}");
        }
        match &arguments.out {
            Some(path) => Ok(std::fs::write(path, json + "\n")?),
            None => Ok(()),
        }
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cocalc-bench: {}", cocalc_core::chain(&*error));
            ExitCode::FAILURE
        }
    }
}

fn measure(arguments: &Arguments) -> (Table, Result<()>) {
    let mut table = Table::default();
    let result = fill(arguments, &mut table);
    (table, result)
}

fn fill(arguments: &Arguments, table: &mut Table) -> Result<()> {
    let effort = if arguments.quick {
        Effort {
            runs: arguments.runs.min(2),
            seconds: 1,
            ssh_mib: 16,
            small_files: 300,
            sessions: 20,
            rounds: 5,
            move_mib: 64,
            snapshots: &[1, 20],
            snapshot_runs: 5,
            stream_mib: 16,
            stream_files: 400,
            projects: 100,
            websockets: 200,
            at_once: 3,
            idle_secs: 5,
            stopped: 20,
            neighbours: 4,
        }
    } else {
        Effort {
            runs: arguments.runs,
            seconds: 3,
            ssh_mib: 256,
            small_files: 20_000,
            sessions: 200,
            rounds: 50,
            move_mib: 1024,
            snapshots: &[1, 100, 1000],
            snapshot_runs: 50,
            stream_mib: 1024,
            stream_files: 20_000,
            projects: 5_000,
            websockets: 10_000,
            at_once: 10,
            idle_secs: 60,
            stopped: 2_000,
            neighbours: 20,
        }
    };
    let wanted = |part| arguments.only.is_empty() || arguments.only.contains(&part);
    if wanted(Part::Tokens) {
        tokens::measure(effort, table)?;
    }
    if wanted(Part::Auth) {
        auth::measure(effort, table)?;
    }
    if wanted(Part::Storage) {
        storage::measure(&arguments.dir, effort, table)?;
    }
    if wanted(Part::Backup) {
        backup::measure(&arguments.dir, effort, table)?;
    }
    let alone = [Part::Tokens, Part::Auth, Part::Storage, Part::Backup];
    if !arguments.only.is_empty() && arguments.only.iter().all(|part| alone.contains(part)) {
        return Ok(());
    }
    let federation = Federation::up(&arguments.dir, arguments.base_port)?;
    federation.install_app()?;
    // One that fails does not hide the others.
    let mut failures = Vec::new();
    for (part, measure) in [
        (Part::Start, start::measure as fn(&Federation, Effort, &mut Table) -> Result<()>),
        (Part::Http, http::measure),
        (Part::Ssh, ssh::measure),
        (Part::Moves, moves::measure),
        (Part::Hogs, hogs::measure),
        (Part::Stopped, start::stopped::measure),
    ] {
        if !wanted(part) {
            continue;
        }
        if let Err(error) = measure(&federation, effort, table) {
            failures.push(format!("{part:?}: {error}"));
        }
    }
    if failures.is_empty() { Ok(()) } else { Err(failures.join("\n").into()) }
}
