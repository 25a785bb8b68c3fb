//! Sees to it that snapshots don't fill a project.

use std::{collections::BTreeMap, time::Duration};

use cocalc_ids::ProjectId;

use super::{Keeper, names};
use crate::{
    grant::Entry,
    snapshots::{Need, Relief, expendable},
    storage::{self, Usage},
};

/// How often the usage of every running project is looked at, at most.
const SWEEP: Duration = Duration::from_secs(10);
/// How many are looked at in one round.
const ROUND_MAX: usize = 64;
/// How often the files of a project that stays nearly full are counted: that
/// reads all of its extents.
const COUNT: Duration = Duration::from_secs(3_600);
/// How long counting may take.
const COUNT_LIMIT: Duration = Duration::from_secs(120);

/// What is known of the space of the projects that need it.
#[derive(Debug, Default)]
pub(super) struct Space {
    /// When the sweep under way began.
    began: Option<Duration>,
    /// The last project it has looked at.
    after: Option<ProjectId>,
    pressed: BTreeMap<ProjectId, Pressed>,
}

/// A project that is nearly full.
#[derive(Debug, Default)]
struct Pressed {
    relief: Relief,
    /// When its files were counted.
    counted: Option<Duration>,
    notice: Option<String>,
}

impl Space {
    pub(super) fn notice(&self, project: ProjectId) -> Option<String> {
        self.pressed.get(&project)?.notice.clone()
    }

    pub(super) fn forget(&mut self, project: ProjectId) {
        self.pressed.remove(&project);
    }
}

impl Keeper {
    /// Looks at the usage of some running projects, and of those that were
    /// nearly full.
    pub(super) async fn sweep(&self) {
        let capabilities = self.0.storage.capabilities();
        if !capabilities.quotas || !capabilities.constant_usage {
            return;
        }
        for project in self.next_of_sweep() {
            if let Err(error) = self.look_at_space(project).await {
                tracing::warn!(%project, error = %crate::chain(&error), "cannot look after its space");
            }
        }
    }

    fn next_of_sweep(&self) -> Vec<ProjectId> {
        let now = self.0.clock.boot();
        let mut state = self.state();
        let next: Vec<ProjectId> = {
            let mut all: Vec<ProjectId> =
                state.schedule.running().chain(state.space.pressed.keys().copied()).collect();
            all.sort_unstable();
            all.dedup();
            let begin = state.space.after.map_or(0, |after| all.partition_point(|one| *one <= after));
            all.into_iter().skip(begin).take(ROUND_MAX).collect()
        };
        if next.is_empty() {
            // To the next one, when it is time.
            if state.space.began.is_none_or(|at| now >= at + SWEEP) {
                (state.space.began, state.space.after) = (Some(now), None);
            }
        } else {
            state.space.after = next.last().copied();
        }
        next
    }

    async fn look_at_space(&self, project: ProjectId) -> storage::Result<()> {
        let Some(entry) = self.0.ledger.entry(project).filter(|entry| entry.may_run().is_some()) else {
            self.state().space.forget(project);
            return Ok(());
        };
        let mut usage = match self.0.storage.usage(project).await {
            Err(storage::Error::NotFound { .. }) => {
                self.state().space.forget(project);
                return Ok(());
            }
            usage => usage?,
        };
        let limit = self.limit_bytes(&entry.config);
        if usage.limit_bytes != limit {
            let Some(_turn) = self.turn(project).await else { return Ok(()) };
            // A move may be about to take it away; then the limit is not ours.
            if self.0.ledger.entry(project).is_none_or(|now| now.may_run() != entry.may_run()) {
                return Ok(());
            }
            tracing::info!(%project, was = usage.limit_bytes, now = limit, "its limit is set");
            self.0.storage.set_limit(project, limit).await?;
            usage.limit_bytes = limit;
        }
        let now = self.0.clock.boot();
        let need = {
            let mut state = self.state();
            let mut relief =
                state.space.pressed.get(&project).map(|pressed| pressed.relief).unwrap_or_default();
            let need = relief.on_usage(&usage, now);
            match need {
                Need::Nothing => state.space.forget(project),
                Need::Wait | Need::Delete(_) => {
                    state.space.pressed.entry(project).or_default().relief = relief
                }
            }
            need
        };
        match need {
            Need::Delete(count) if self.relieve(project, count).await? == 0 => {
                self.explain(&entry, &usage).await
            }
            _ => Ok(()),
        }
    }

    /// Deletes the oldest automatic snapshots that are not held, at most
    /// `count`, and says how many.
    async fn relieve(&self, project: ProjectId, count: usize) -> storage::Result<usize> {
        let Some(_turn) = self.turn(project).await else { return Ok(count) };
        if self.0.ledger.entry(project).is_none_or(|entry| entry.may_run().is_none()) {
            return Ok(count);
        }
        let names = names(self.0.storage.snapshots(project).await?);
        let mut deleted = 0;
        for name in expendable(&names, self.0.clock.wall()) {
            if deleted == count {
                break;
            }
            deleted += usize::from(self.delete(project, &name).await?);
        }
        if deleted > 0 {
            tracing::info!(%project, deleted, "it is nearly full: its oldest automatic snapshots went");
        }
        Ok(deleted)
    }

    /// Finds words for a project that stays nearly full although no automatic
    /// snapshot is left to delete.
    async fn explain(&self, entry: &Entry, usage: &Usage) -> storage::Result<()> {
        let (project, now) = (entry.project, self.0.clock.boot());
        {
            let mut state = self.state();
            let pressed = state.space.pressed.entry(project).or_default();
            if pressed.counted.is_some_and(|at| now < at + COUNT) {
                return Ok(());
            }
            // Before it is done: what takes too long is not begun again at once.
            pressed.counted = Some(now);
            pressed.notice.get_or_insert_with(|| full(usage));
        }
        // In a task of its own: other projects don't wait for it.
        let (keeper, plan, usage) = (self.clone(), entry.config.quota_bytes, *usage);
        tokio::spawn(async move {
            let counted = keeper.0.storage.footprint(project, None);
            let notice = match tokio::time::timeout(COUNT_LIMIT, counted).await {
                Ok(Ok(footprint)) => words(&usage, plan, footprint.total_bytes),
                Ok(Err(error)) => {
                    tracing::info!(%project, error = %crate::chain(&error), "cannot count its files");
                    return;
                }
                Err(_) => return,
            };
            tracing::info!(%project, notice, "it stays nearly full");
            if let Some(pressed) = keeper.state().space.pressed.get_mut(&project) {
                pressed.notice = Some(notice);
            }
        });
        Ok(())
    }
}

fn full(usage: &Usage) -> String {
    format!(
        "the project is nearly full: {} of {} are used, and no automatic snapshot is left that could be deleted",
        size(usage.charged_bytes),
        size(usage.limit_bytes.unwrap_or(u64::MAX)),
    )
}

fn words(usage: &Usage, plan: Option<u64>, live: u64) -> String {
    match plan {
        Some(plan) if live > plan => format!(
            "the project's files alone take {}, and its plan has {}: delete files, or ask for more space; only \
             the newest automatic snapshot is kept until then",
            size(live),
            size(plan),
        ),
        _ => format!(
            "{}: {} are its files, the rest is kept by snapshots that were made by hand, or by deleted files \
             that the newest snapshot has; delete snapshots that are not needed",
            full(usage),
            size(live),
        ),
    }
}

/// Bytes for people.
fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut tenths = u128::from(bytes) * 10 / 1024;
    let mut unit = 0;
    while tenths >= 10_240 && unit + 1 < UNITS.len() {
        tenths /= 1024;
        unit += 1;
    }
    format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[unit])
}
