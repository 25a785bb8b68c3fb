//! Removes what a runner has of projects that are not this host's.
//!
//! What a host may run is in its ledger before anything is made of it, so a container
//! of this host whose project is not there is left over: from a ledger that was
//! restored or lost, or from a removal that was cut off. It has no grant, its owner
//! may be another host by now, and nobody would ever stop it. Only what the runner
//! made goes. Files are the storage's, and are not touched.

use std::time::Duration;

use cocalc_ids::ProjectId;

use super::{Entry, Ledger};
use crate::runner::{Runner, State};

/// How long their processes have to put away what they have in memory.
const GRACE: Duration = Duration::from_secs(30);

/// Whether there is nothing of a project that this host should have at its runner.
fn is_orphan(entry: Option<&Entry>) -> bool {
    entry.is_none_or(|entry| !entry.needs_slot())
}

/// Removes what `runner` has of projects that `ledger` does not know, or that were
/// deleted or have left; whose that was. What cannot be removed now is left for the
/// next time. Each waits for the project's turn, and is looked at again in it.
pub async fn sweep(ledger: &Ledger, runner: &dyn Runner) -> Vec<ProjectId> {
    let known = match runner.list().await {
        Ok(known) => known,
        Err(error) => {
            tracing::warn!(error = %crate::chain(&error), "cannot look for what is left over");
            return Vec::new();
        }
    };
    let mut removed = Vec::new();
    for status in known {
        let project = status.project;
        if !is_orphan(ledger.entry(project).as_ref()) {
            continue;
        }
        // It may have come here while its turn was waited for.
        let _turn = ledger.turn(project).await;
        if !is_orphan(ledger.entry(project).as_ref()) {
            continue;
        }
        let ran = status.state == State::Running;
        let outcome = async {
            runner.stop(project, GRACE).await?;
            runner.remove(project).await
        };
        match outcome.await {
            Ok(()) => {
                tracing::warn!(
                    %project, ran, epoch = ?status.epoch, started = ?status.started,
                    "removed the container of a project that this host does not have; its files stay"
                );
                removed.push(project);
            }
            Err(error) => {
                let error = crate::chain(&error);
                tracing::warn!(%project, error, "cannot remove a container that is left over");
            }
        }
    }
    removed
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use cocalc_ids::{Epoch, HostId};

    use super::*;
    use crate::{
        clock::SystemClock,
        control::ProjectConfig,
        grant::MemoryLedgerStore,
        memory::runner::MemoryRunner,
        runner::{Isolation, Limits, ProjectSpec},
    };

    fn spec(project: ProjectId) -> ProjectSpec {
        ProjectSpec {
            project,
            epoch: Epoch::FIRST,
            volume: "/nowhere".into(),
            image: None,
            slot: 0,
            limits: Limits::default(),
            env: [].into(),
            isolation: Isolation::default(),
        }
    }

    #[tokio::test]
    async fn what_runs_of_an_unknown_project_goes_and_what_is_known_stays() {
        let ledger = Ledger::open(HostId::random(), Arc::new(MemoryLedgerStore::default())).await.unwrap();
        let runner = MemoryRunner::new(Arc::new(SystemClock));
        let [ours, left, deleted] = [1, 2, 3].map(|id| ProjectId::from_bytes([id; 16]));
        for project in [ours, deleted] {
            ledger.create(project, Epoch::FIRST, ProjectConfig::default()).await.unwrap();
        }
        for project in [ours, left, deleted] {
            runner.start(&spec(project)).await.unwrap();
        }
        // Its removal was cut off when nothing of it was done but this.
        ledger.delete(deleted, Epoch::FIRST).await.unwrap();
        assert_eq!(sweep(&ledger, &runner).await, [left, deleted]);
        let list = runner.list().await.unwrap();
        assert_eq!(list.iter().map(|status| status.project).collect::<Vec<_>>(), [ours]);
        assert_eq!(list.first().map(|status| status.state), Some(State::Running));
        assert!(sweep(&ledger, &runner).await.is_empty());
    }
}
