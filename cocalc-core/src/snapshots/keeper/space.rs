//! Sees to it that snapshots don't fill a project.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use cocalc_ids::{ProjectId, SnapshotName};

use super::{FETCHED_MAX, Keeper, names};
use crate::{
    control::ProjectConfig,
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

/// How often a limit is set that changes while it is being set.
const SET_MAX: usize = 8;
/// How long a project may keep the room of a restore that is over, if it does
/// not fit without: the time to delete the state before.
const OVER_MAX: Duration = Duration::from_secs(24 * 3_600);

/// What is known of the space of the projects that need it.
#[derive(Debug, Default)]
pub(super) struct Space {
    /// When the sweep under way began.
    began: Option<Duration>,
    /// The last project it has looked at.
    after: Option<ProjectId>,
    pressed: BTreeMap<ProjectId, Pressed>,
    /// What projects may take beside their plan, and for what.
    rooms: BTreeMap<ProjectId, BTreeMap<SnapshotName, Room>>,
    /// Projects whose limit is to be looked at although they don't run: the
    /// process before may have left it raised, or it is to be lowered.
    unsure: BTreeSet<ProjectId>,
}

/// Room for something that is there for a while.
#[derive(Clone, Copy, Debug)]
struct Room {
    bytes: u64,
    /// Since when, and whether what it was for has come.
    since: Duration,
    came: bool,
    /// Since when what it was for is over: it goes as soon as the project fits
    /// without, at the latest after [`OVER_MAX`].
    over: Option<Duration>,
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

    /// It is not this host's, or not any more.
    pub(super) fn forget(&mut self, project: ProjectId) {
        self.pressed.remove(&project);
        self.unsure.remove(&project);
        self.rooms.remove(&project);
    }

    /// Who is looked at although nothing of it may run.
    fn attended(&self) -> impl Iterator<Item = ProjectId> {
        self.pressed.keys().chain(self.rooms.keys()).chain(&self.unsure).copied()
    }

    /// Whose limits may have been left raised.
    pub(super) fn doubt(&mut self, projects: impl IntoIterator<Item = ProjectId>) {
        self.unsure.extend(projects);
    }

    /// What a project may take beside its plan.
    fn room(&self, project: ProjectId) -> u64 {
        let rooms = self.rooms.get(&project).into_iter().flat_map(BTreeMap::values);
        rooms.fold(0, |sum, room| sum.saturating_add(room.bytes))
    }

    /// Takes back what is over, if the project fits without it. Whether there was
    /// something: then the storage has to hear of it.
    fn take_back(
        &mut self,
        project: ProjectId,
        plan: Option<u64>,
        charged_bytes: u64,
        now: Duration,
    ) -> bool {
        let Some(rooms) = self.rooms.get_mut(&project) else { return false };
        // Nine tenths, so that somebody can go on working.
        let fits = plan.is_none_or(|limit| charged_bytes <= limit / 10 * 9);
        let before = rooms.len();
        rooms.retain(|_, room| room.over.is_none_or(|since| !fits && now < since + OVER_MAX));
        let taken = rooms.len() < before;
        if rooms.is_empty() {
            self.rooms.remove(&project);
        }
        if taken {
            // Until it has: nobody else looks at it if it does not run.
            self.unsure.insert(project);
        }
        taken
    }

    /// What came, and was neither used nor given up by whoever had asked for it.
    fn forgotten(&self, project: ProjectId, now: Duration) -> Vec<SnapshotName> {
        let rooms = self.rooms.get(&project).into_iter().flatten();
        let old =
            rooms.filter(|(_, room)| room.came && room.over.is_none() && now >= room.since + FETCHED_MAX);
        old.map(|(name, _)| name.clone()).collect()
    }

    pub(super) fn end(&mut self, project: ProjectId, name: &SnapshotName, now: Duration) {
        if let Some(room) = self.rooms.get_mut(&project).and_then(|rooms| rooms.get_mut(name)) {
            room.over.get_or_insert(now);
        }
    }
}

/// Room that a project has until [`Keeper::end_room`]; at once no more, if this
/// is dropped before [`keep`](Self::keep): then what it was for did not come.
#[derive(Debug)]
pub struct RaisedRoom {
    keeper: Keeper,
    project: ProjectId,
    name: Option<SnapshotName>,
}

impl RaisedRoom {
    /// What it is for has come.
    pub fn keep(mut self) {
        let Some(name) = self.name.take() else { return };
        let mut state = self.keeper.state();
        let rooms = state.space.rooms.get_mut(&self.project);
        if let Some(room) = rooms.and_then(|rooms| rooms.get_mut(&name)) {
            room.came = true;
        }
    }
}

impl Drop for RaisedRoom {
    fn drop(&mut self) {
        if let Some(name) = self.name.take() {
            let now = self.keeper.0.clock.boot();
            self.keeper.state().space.end(self.project, &name, now);
        }
    }
}

impl Keeper {
    /// Lets a project take `bytes` more than its plan, for the snapshot `name`
    /// that is about to come, until [`end_room`](Self::end_room); never more than
    /// twice its plan's limit, whatever came before. The caller has the
    /// project's grant, and its fence. With the process it ends by itself.
    ///
    /// # Errors
    ///
    /// As of the storage, but for a project that has no volume or a storage
    /// without limits.
    pub async fn raise(&self, entry: &Entry, name: SnapshotName, bytes: u64) -> storage::Result<RaisedRoom> {
        let project = entry.project;
        let bytes = self.limit_bytes(&entry.config).map_or(0, |limit| bytes.min(limit));
        {
            let mut state = self.state();
            let rooms = state.space.rooms.entry(project).or_default();
            // Room upon room would be a plan of one's own making.
            rooms.clear();
            rooms.insert(name.clone(), Room { bytes, since: self.0.clock.boot(), came: false, over: None });
        }
        let raised = RaisedRoom { keeper: self.clone(), project, name: Some(name) };
        self.set_limit(project).await?;
        Ok(raised)
    }

    /// What had [room](Self::raise) is gone, or has become the project: that has
    /// its plan's limit again as soon as it fits, a day later in any case. Does
    /// nothing if there was no room. The caller has the project's turn.
    ///
    /// # Errors
    ///
    /// As of the storage; it is tried again by itself.
    pub async fn end_room(&self, entry: &Entry, name: &SnapshotName) -> storage::Result<()> {
        let (project, now) = (entry.project, self.0.clock.boot());
        self.state().space.end(project, name, now);
        let charged = match self.0.storage.usage(project).await {
            Err(storage::Error::NotFound { .. }) => return Ok(()),
            usage => usage?.charged_bytes,
        };
        let plan = self.limit_bytes(&entry.config);
        self.state().space.take_back(project, plan, charged, now);
        self.set_limit(project).await
    }

    /// Has the storage hold a project to its limit: its plan's, and what it was
    /// [given room](Self::raise) for. A storage without limits has none. Of what is
    /// done at the same time the last word counts, whoever says it. Does nothing about
    /// a project that the ledger does not know.
    ///
    /// # Errors
    ///
    /// As of the storage.
    pub async fn set_limit(&self, project: ProjectId) -> storage::Result<()> {
        let wanted = || Some(self.limit_now(&self.0.ledger.entry(project)?.config, project));
        let mut set = None;
        for _ in 0..SET_MAX {
            let Some(limit) = wanted().filter(|limit| set != Some(*limit)) else { break };
            match self.0.storage.set_limit(project, limit).await {
                Err(storage::Error::Unsupported { .. } | storage::Error::NotFound { .. }) => break,
                done => done?,
            }
            set = Some(limit);
        }
        Ok(())
    }

    /// The limit that a project has now: its plan's, and what it was given room
    /// for.
    fn limit_now(&self, config: &ProjectConfig, project: ProjectId) -> Option<u64> {
        Some(self.limit_bytes(config)?.saturating_add(self.state().space.room(project)))
    }

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
            let mut all: Vec<ProjectId> = state.schedule.running().chain(state.space.attended()).collect();
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
        let (plan, now) = (self.limit_bytes(&entry.config), self.0.clock.boot());
        let forgotten = self.state().space.forgotten(project, now);
        if !forgotten.is_empty() {
            // Nobody looks at its snapshots if it does not run.
            let Some(_turn) = self.turn(project).await else { return Ok(()) };
            if self.0.ledger.entry(project).is_none_or(|now| now.may_run() != entry.may_run()) {
                return Ok(());
            }
            for name in forgotten {
                match self.delete(project, &name).await {
                    // Held by somebody who reads it: then it counts all the same.
                    Ok(_) | Err(storage::Error::NoSnapshot { .. }) => {}
                    Err(error) => return Err(error),
                }
                self.state().space.end(project, &name, now);
            }
        }
        let taken = self.state().space.take_back(project, plan, usage.charged_bytes, now);
        let limit = self.limit_now(&entry.config, project);
        if usage.limit_bytes == limit && !taken {
            self.state().space.unsure.remove(&project);
        } else {
            let Some(_turn) = self.turn(project).await else { return Ok(()) };
            // A move may be about to take it away; then the limit is not ours.
            if self.0.ledger.entry(project).is_none_or(|now| now.may_run() != entry.may_run()) {
                return Ok(());
            }
            tracing::info!(%project, was = usage.limit_bytes, now = limit, "its limit is set");
            self.set_limit(project).await?;
            usage.limit_bytes = self.limit_now(&entry.config, project);
            self.state().space.unsure.remove(&project);
        }
        let need = {
            let mut state = self.state();
            let mut relief =
                state.space.pressed.get(&project).map(|pressed| pressed.relief).unwrap_or_default();
            let need = relief.on_usage(&usage, now);
            match need {
                Need::Nothing => drop(state.space.pressed.remove(&project)),
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
