//! Streams under way, at most one per project and direction, so that an abort
//! can end them and wait until they have ended.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use cocalc_ids::ProjectId;
use tokio_util::sync::CancellationToken;

#[derive(Clone, Debug, Default)]
pub(super) struct InFlight(Arc<Mutex<BTreeMap<ProjectId, Lane>>>);

#[derive(Clone, Debug, Default)]
struct Lane {
    stop: CancellationToken,
    turn: Arc<tokio::sync::Mutex<()>>,
}

impl InFlight {
    /// Runs `work` when the project's lane is free; `None` if it was stopped,
    /// before or meanwhile.
    pub(super) async fn run<T>(&self, project: ProjectId, work: impl Future<Output = T>) -> Option<T> {
        let lane = {
            let mut lanes = self.lanes();
            lanes.retain(|_, lane| Arc::strong_count(&lane.turn) > 1);
            lanes.entry(project).or_default().clone()
        };
        let stop = lane.stop.clone();
        stop.run_until_cancelled(async {
            let _turn = lane.turn.lock().await;
            work.await
        })
        .await
    }

    /// Ends what runs in the project's lane, and returns when it has ended.
    /// Who comes later runs in a new lane: the ledger refuses them first.
    pub(super) async fn stop(&self, project: ProjectId) {
        let lane = self.lanes().remove(&project);
        if let Some(lane) = lane {
            lane.stop.cancel();
            let _ended = lane.turn.lock().await;
        }
    }

    fn lanes(&self) -> MutexGuard<'_, BTreeMap<ProjectId, Lane>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
