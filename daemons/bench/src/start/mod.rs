//! From `project start` to the first byte of an app in the project, and its stop,
//! against `podman run` and `podman start` of the same image with the same app.

mod exec;
mod idle;
mod peer;
pub(crate) mod stopped;

use std::{
    collections::BTreeMap,
    process::Command,
    time::{Duration, Instant},
};

use serde_json::json;

use self::peer::{Kind, Peer};
use crate::{
    Effort, Result,
    container::Image,
    federation::{Federation, split},
    projects::Projects,
    table::{Better, Goal, Table, median},
    tool::{each, first_byte, run},
};

const LIMIT: Duration = Duration::from_secs(120);
const SECS: (&str, Better) = ("s", Better::Less);
/// Of starts and stops.
const GOAL: Goal = Goal::AtMost(1.15);

pub(crate) fn measure(federation: &Federation, effort: Effort, table: &mut Table) -> Result<()> {
    let image = Image::import(federation)?;
    alone(federation, &image, effort, table)?;
    at_once(federation, &image, effort, table)?;
    exec::measure(federation, &image, effort, table)?;
    idle::measure(federation, &image, effort, table)
}

/// Starts a stopped project, until the first byte of its app.
fn start(federation: &Federation, project: &str) -> Result<Duration> {
    let connect = federation.connect(project)?;
    let (address, path) = split(&connect.direct)?;
    let begun = Instant::now();
    let operation = federation.api(&format!("/projects/{project}/start"), Some(json!({})))?;
    first_byte(address, &path, Some(&connect.token), LIMIT)?;
    let took = begun.elapsed();
    federation.wait(&operation)?;
    Ok(took)
}

/// Stops a project, until that is done and its snapshot durable.
fn stop(federation: &Federation, project: &str) -> Result<Duration> {
    let begun = Instant::now();
    federation.change(project, "stop")?;
    Ok(begun.elapsed())
}

/// One at a time, on a machine that has just done the same, and on one that has
/// to read everything from its disk.
fn alone(federation: &Federation, image: &Image, effort: Effort, table: &mut Table) -> Result<()> {
    let project = federation.project();
    let peers = [Peer::new(federation, image, Kind::Run, 1)?, Peer::new(federation, image, Kind::Start, 2)?];
    let mut phases: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for (name, cold) in [("warm", false), ("cold", true)] {
        let (mut starts, mut stops) = ([const { Vec::new() }; 3], [const { Vec::new() }; 3]);
        // The first of each warms caches and is not counted, unless there are none.
        for round in u32::from(cold)..=effort.runs {
            for turn in 0..3 {
                let side = ((round + turn) % 3) as usize;
                let (started, stopped) = match peers.get(side) {
                    None => {
                        federation.change(project, "stop")?;
                        forget(cold)?;
                        let started = start(federation, project)?;
                        if round > 0 && !cold {
                            note_phases(federation, project, &mut phases)?;
                        }
                        (started, stop(federation, project)?)
                    }
                    Some(peer) => {
                        forget(cold)?;
                        (peer.start()?, peer.stop()?)
                    }
                };
                if round > 0 {
                    starts[side].push(started.as_secs_f64());
                    stops[side].push(stopped.as_secs_f64());
                }
            }
        }
        for (what, [run, start, ours]) in [("start to first byte", &starts), ("stop", &stops)] {
            let what = format!("{what}, {name}");
            table.compare(&what, peers[0].what(), SECS, ours, run, Some(GOAL));
            table.compare(&what, peers[1].what(), SECS, ours, start, Some(GOAL));
        }
    }
    federation.change(project, "start")?;
    let phases: Vec<String> =
        phases.iter().map(|(name, millis)| format!("{name} {:.0} ms", median(millis))).collect();
    table.note(format!("phases of a warm start, medians as the host reports them: {}", phases.join(", ")));
    Ok(())
}

/// What the host says of the start of a running project.
fn note_phases(
    federation: &Federation,
    project: &str,
    phases: &mut BTreeMap<String, Vec<f64>>,
) -> Result<()> {
    let shown = federation.api(&format!("/projects/{project}"), None)?;
    for phase in shown["phases"].as_array().into_iter().flatten() {
        if let (Some(name), Some(millis)) = (phase[0].as_str(), phase[1].as_f64()) {
            phases.entry(name.to_owned()).or_default().push(millis);
        }
    }
    Ok(())
}

/// Has the kernel read again what it needs.
fn forget(cold: bool) -> Result<()> {
    if cold {
        run(&mut Command::new("sync"), LIMIT)?;
        std::fs::write("/proc/sys/vm/drop_caches", "3\n")?;
    }
    Ok(())
}

/// Several that are all started at the same moment, until the last has answered.
fn at_once(federation: &Federation, image: &Image, effort: Effort, table: &mut Table) -> Result<()> {
    let count = effort.at_once;
    let mut projects = Projects::none(federation);
    let ours: Vec<String> =
        (0..count).map(|number| projects.copy(&format!("at once {number}"))).collect::<Result<_>>()?;
    let made = |kind, first: u32| -> Result<Vec<Peer>> {
        (first..first + count).map(|number| Peer::new(federation, image, kind, number)).collect()
    };
    let peers = [made(Kind::Run, 10)?, made(Kind::Start, 10 + count)?];
    let mut took = [const { Vec::new() }; 3];
    for round in 0..=effort.runs {
        for turn in 0..3 {
            let side = ((round + turn) % 3) as usize;
            let last = match peers.get(side) {
                None => {
                    each(ours.len(), &ours, |project| stop(federation, project))?;
                    each(ours.len(), &ours, |project| start(federation, project))?.into_iter().max()
                }
                Some(peers) => {
                    let last = each(peers.len(), peers, Peer::start)?.into_iter().max();
                    each(peers.len(), peers, Peer::stop)?;
                    last
                }
            };
            if round > 0 {
                took[side].push(last.ok_or("nothing was started")?.as_secs_f64());
            }
        }
    }
    let what = format!("{count} starts at once, until the last first byte");
    for (side, peer) in peers.iter().enumerate() {
        let name = peer.first().map_or_else(String::new, |peer| format!("{count} × {}", peer.what()));
        table.compare(&what, name, SECS, &took[2], &took[side], Some(GOAL));
    }
    projects.end()
}
