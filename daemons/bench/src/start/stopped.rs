//! A host with very many stopped projects: what the start of one takes there,
//! against the same host before they were made.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use super::{SECS, start};
use crate::{
    Effort, Result,
    federation::Federation,
    projects::Projects,
    table::{Goal, Table},
    tool::text,
};

pub(crate) fn measure(federation: &Federation, effort: Effort, table: &mut Table) -> Result<()> {
    let mut few = Vec::new();
    several(federation, effort, &mut few)?;
    several(federation, effort, &mut few)?;
    let mut projects = Projects::none(federation);
    let begun = Instant::now();
    projects.many(effort.stopped, &federation.hosts()?[0].name)?;
    let made = begun.elapsed();
    let mut podman = Command::new("podman");
    podman.args(["ps", "--all", "--quiet", "--filter"]);
    podman.arg(format!("label=cocalc.instance={}", federation.hosts()?[0].id));
    let containers = text(&mut podman, Duration::from_secs(120))?.lines().count();
    let mut many = Vec::new();
    several(federation, effort, &mut many)?;
    several(federation, effort, &mut many)?;
    projects.leave();
    let what = format!("start to first byte beside {} stopped projects", effort.stopped);
    table.compare(what, "without them", SECS, &many, &few, Some(Goal::AtMost(1.1)));
    table.note(format!(
        "{} projects were made in {:.0} s; podman knew {containers} containers of the host",
        effort.stopped,
        made.as_secs_f64()
    ));
    Ok(())
}

/// The first is not counted.
fn several(federation: &Federation, effort: Effort, took: &mut Vec<f64>) -> Result<()> {
    for round in 0..=effort.runs {
        federation.change(federation.project(), "stop")?;
        let one = start(federation, federation.project())?;
        if round > 0 {
            took.push(one.as_secs_f64());
        }
    }
    Ok(())
}
