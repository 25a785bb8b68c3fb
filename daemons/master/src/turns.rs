//! What is done to one project one after the other.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use cocalc_ids::ProjectId;
use tokio::sync::OwnedMutexGuard;

/// Turns of projects. Who waits for one project holds up no other.
#[derive(Debug, Default)]
pub(crate) struct Turns(Mutex<BTreeMap<ProjectId, Arc<tokio::sync::Mutex<()>>>>);

impl Turns {
    /// The turn of `project`, in the order of asking; `None` if others have it
    /// for longer than `limit`.
    pub(crate) async fn of(&self, project: ProjectId, limit: Duration) -> Option<OwnedMutexGuard<()>> {
        let turn = {
            let mut turns = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            // Nobody has these, nor waits for them.
            turns.retain(|_, turn| Arc::strong_count(turn) > 1);
            Arc::clone(turns.entry(project).or_default())
        };
        tokio::time::timeout(limit, turn.lock_owned()).await.ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_turn_is_one_projects_and_ends_with_its_guard() {
        let (turns, limit) = (Turns::default(), Duration::from_secs(5));
        let (one, two) = (ProjectId::random(), ProjectId::random());
        let held = turns.of(one, limit).await.unwrap();
        assert!(turns.of(one, limit).await.is_none(), "somebody has it");
        assert!(turns.of(two, limit).await.is_some(), "another project's is free");
        drop(held);
        assert!(turns.of(one, limit).await.is_some());
        let held = turns.of(two, limit).await;
        assert_eq!((held.is_some(), turns.0.lock().unwrap().len()), (true, 1), "what is over is not kept");
    }
}
