//! What deleted projects leave on hosts that once had them.

use std::{sync::Arc, time::Duration};

use cocalc_core::{
    connector::Peer,
    control::{ErrorCode, HostCommand, HostReply},
    moves::MoveState,
};
use cocalc_ids::{HostId, ProjectId};
use cocalc_sqlite::master::{self as store, Project};

use crate::shared::Shared;

/// How long a host may take to forget a project.
const LIMIT: Duration = Duration::from_secs(600);
/// How many operations of a project are looked through.
const OPERATIONS_MAX: usize = 10_000;
/// How long to wait before asking again. A host that has just registered may
/// not hear commands yet; one that is away is asked when it registers.
const PAUSES: [Duration; 3] = [Duration::from_millis(200), Duration::from_secs(1), Duration::from_secs(5)];

/// Notes where the project was before, besides where it is.
pub(super) async fn note(shared: &Shared, project: &Project) -> store::Result<()> {
    let (id, owner) = (project.id, project.host);
    shared
        .db(move |store| {
            let mut hosts = Vec::new();
            for row in store.moves_of(id)? {
                match serde_json::from_str::<MoveState>(&row.state) {
                    Ok(state) => hosts.extend([state.spec.source, state.spec.destination]),
                    Err(error) => tracing::warn!(move_id = %row.id, %error, "an old move cannot be read"),
                }
            }
            hosts.extend(super::recovering::hosts(&store.operations_of(id, OPERATIONS_MAX)?));
            hosts.retain(|host| *host != owner);
            store.leave(id, &hosts)
        })
        .await
}

impl Shared {
    /// Lets all hosts forget a project that was deleted.
    pub(super) async fn forget_project(self: &Arc<Self>, project: ProjectId) -> store::Result<()> {
        for host in self.db(move |store| store.leftover_hosts(project)).await? {
            self.tidy(host);
        }
        Ok(())
    }

    /// Lets a host forget what was deleted since it had it. Nobody waits for
    /// that, and it is tried again when the host registers.
    pub(crate) fn tidy(self: &Arc<Self>, host: HostId) {
        let (shared, stop) = (self.clone(), self.operations.stop.clone());
        self.operations.tasks.spawn(async move {
            let work = async {
                if let Err(error) = forget_all(&shared, host).await {
                    tracing::warn!(%host, error = %cocalc_core::chain(&error), "cannot tidy a host");
                }
            };
            stop.run_until_cancelled(work).await;
        });
    }
}

async fn forget_all(shared: &Shared, host: HostId) -> store::Result<()> {
    for (project, epoch) in shared.db(move |store| store.leftovers(host)).await? {
        let command = HostCommand::Forget { project, epoch };
        for pause in PAUSES {
            if !shared.alive(Peer::Host(host)) {
                return Ok(());
            }
            match shared.command(host, &command, LIMIT).await {
                Ok(HostReply::Deleted { project: gone, .. }) if gone == project => {
                    shared.db(move |store| store.forgotten(host, project)).await?;
                    break;
                }
                Ok(HostReply::Error(error)) if error.code == ErrorCode::NotFound => {
                    shared.db(move |store| store.forgotten(host, project)).await?;
                    break;
                }
                Ok(answer) => {
                    tracing::warn!(%host, %project, ?answer, "a host does not forget a deleted project");
                    break;
                }
                Err(_) => tokio::time::sleep(pause).await,
            }
        }
    }
    Ok(())
}
