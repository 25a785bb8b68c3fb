//! Removes what runs here of projects that this host does not know.
//!
//! What a host may run is in its ledger before anything is made of it, so a container
//! of this host whose project is not there is left over: from a ledger that was
//! restored or lost, or from a removal that was cut off. It has no grant, its owner
//! may be another host by now, and nobody would ever stop it. Only the container
//! goes. Files are the storage's, and are not touched.

use std::{sync::Arc, time::Duration};

use cocalc_core::{
    grant::Ledger,
    ids::ProjectId,
    runner::{Runner, State},
};

/// How often it is looked for them: a runner may hear late of what is there.
const INTERVAL: Duration = Duration::from_secs(60);
/// How long their processes have to put away what they have in memory.
const GRACE: Duration = Duration::from_secs(30);

/// Looks for them until the future is dropped.
pub(crate) async fn keep(ledger: Ledger, runner: Arc<dyn Runner>) {
    loop {
        sweep(&ledger, &*runner).await;
        tokio::time::sleep(INTERVAL).await;
    }
}

/// Removes those that are there now; which.
pub(crate) async fn sweep(ledger: &Ledger, runner: &dyn Runner) -> Vec<ProjectId> {
    let known = match runner.list().await {
        Ok(known) => known,
        Err(error) => {
            tracing::warn!(error = %cocalc_core::chain(&error), "cannot look for what is left over");
            return Vec::new();
        }
    };
    let mut removed = Vec::new();
    for status in known {
        let project = status.project;
        if ledger.entry(project).is_some() {
            continue;
        }
        // It may have come here while its turn was waited for.
        let _turn = ledger.turn(project).await;
        if ledger.entry(project).is_some() {
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
                    "removed the container of a project that this host's ledger does not know; its files stay"
                );
                removed.push(project);
            }
            Err(error) => {
                let error = cocalc_core::chain(&error);
                tracing::warn!(%project, error, "cannot remove a container that is left over");
            }
        }
    }
    removed
}

#[cfg(test)]
mod tests {
    use cocalc_core::{
        clock::SystemClock,
        control::ProjectConfig,
        grant::MemoryLedgerStore,
        ids::{Epoch, HostId},
        memory::runner::MemoryRunner,
        runner::{Isolation, Limits, ProjectSpec},
    };

    use super::*;

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
        let (ours, left) = (ProjectId::random(), ProjectId::random());
        ledger.create(ours, Epoch::FIRST, ProjectConfig::default()).await.unwrap();
        runner.start(&spec(ours)).await.unwrap();
        runner.start(&spec(left)).await.unwrap();
        assert_eq!(sweep(&ledger, &runner).await, [left]);
        let list = runner.list().await.unwrap();
        assert_eq!(list.iter().map(|status| status.project).collect::<Vec<_>>(), [ours]);
        assert_eq!(list.first().map(|status| status.state), Some(State::Running));
        assert!(sweep(&ledger, &runner).await.is_empty());
    }
}
