//! Which project has which range of ids and which address.

use std::{collections::BTreeSet, sync::Arc, time::Instant};

use cocalc_core::runner::{Error, ProjectSpec, Result};

use super::{Shared, project::Project};

impl Shared {
    /// `spec` with the number under which its project is made: the one that it
    /// has, the one that it asks for, or another that is free. When none is, the
    /// stopped project that was used longest ago gives up its own, with container
    /// and network, which its next start makes anew: a host has more projects than
    /// numbers. The caller holds the project's operation.
    pub(super) async fn with_slot(&self, entry: &Arc<Project>, spec: ProjectSpec) -> Result<ProjectSpec> {
        let former = entry.view().slot;
        loop {
            if let Some(slot) = self.take_slot(entry, spec.slot) {
                if former.is_some_and(|former| former != slot) {
                    self.remove_network(entry.id, former).await?;
                }
                return Ok(ProjectSpec { slot, ..spec });
            }
            if !self.free_a_slot(entry).await? {
                let reason = format!(
                    "{} projects run here, which is all that this host has ids and addresses for",
                    self.slots
                );
                return Err(Error::Busy { project: entry.id, reason });
            }
        }
    }

    fn take_slot(&self, entry: &Arc<Project>, asked: u32) -> Option<u32> {
        let own = entry.view().slot.filter(|slot| *slot < self.slots);
        let projects = self.projects();
        let slot = own.or_else(|| {
            let others = projects.values().filter(|other| other.id != entry.id);
            let taken: BTreeSet<u32> = others.filter_map(|other| other.view().slot).collect();
            let free = |slot: &u32| *slot < self.slots && !taken.contains(slot);
            Some(asked).filter(free).or_else(|| (0..self.slots).find(free))
        })?;
        // Before anything is made, and under the lock: nobody else takes it.
        let mut view = entry.view();
        view.slot = Some(slot);
        view.used = Some(Instant::now());
        Some(slot)
    }

    /// Takes a number from a project that doesn't run; `false` if there is none.
    async fn free_a_slot(&self, entry: &Arc<Project>) -> Result<bool> {
        let mut stopped: Vec<(Option<Instant>, Arc<Project>)> = {
            let projects = self.projects();
            let others = projects.values().filter(|other| other.id != entry.id);
            let with_slot = others.filter_map(|other| {
                let view = other.view();
                view.slot.map(|_| (view.used, Arc::clone(other)))
            });
            with_slot.collect()
        };
        stopped.sort_by_key(|(used, _)| *used);
        for (_, other) in stopped {
            // Who waits for another's operation, and holds one, could wait for ever.
            let Ok(_operation) = other.operation.try_lock() else { continue };
            if other.running().is_some() || other.doubt().is_some() {
                continue;
            }
            self.remove_container(other.id).await?;
            other.view().made_from = None;
            let slot = other.view().slot;
            self.remove_network(other.id, slot).await?;
            other.view().slot = None;
            return Ok(true);
        }
        Ok(false)
    }
}
