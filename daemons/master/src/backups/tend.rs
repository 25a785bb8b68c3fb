//! What is done to repositories with credentials that no host gets.

use std::sync::Arc;

use cocalc_core::{
    backups::{Answer, CheckOptions, PruneOptions, Query, answer, backup_error, superfluous},
    control::{CommandError, ErrorCode},
};
use cocalc_ids::ProjectId;
use cocalc_sqlite::master::{Job, Operation, Tending};
use serde_json::{Value, json};

use super::Backups;
use crate::shared::Shared;

impl Backups {
    /// Answers a question from the repository itself.
    pub(crate) async fn browse(&self, project: ProjectId, query: &Query) -> Result<Answer, CommandError> {
        let _place = self.place().await?;
        answer(self.own(), project, query).await.map_err(|error| backup_error(&error))
    }

    /// Waits until there are few enough jobs.
    async fn place(&self) -> Result<tokio::sync::OwnedSemaphorePermit, CommandError> {
        let closed =
            |_| CommandError { code: ErrorCode::Failed, message: "the master is shutting down".into() };
        Arc::clone(&self.places).acquire_owned().await.map_err(closed)
    }
}

/// Does the work of an operation on a repository. What came of it, for people.
pub(crate) async fn tend(shared: &Shared, operation: &Operation, job: &Job) -> Result<Value, CommandError> {
    let none = || CommandError { code: ErrorCode::Invalid, message: "this federation has no backups".into() };
    let backups = shared.backups.as_ref().ok_or_else(none)?;
    shared.note(operation.id, "waiting for a place", json!({})).await;
    let _place = backups.place().await?;
    let (id, own) = (operation.project, backups.own());
    let public = |error| backup_error(&error);
    match job {
        Job::ForgetBackups { backups } => {
            shared.note(operation.id, "forgetting", json!({})).await;
            let before = own.list(id).await.map_err(public)?;
            let known: Vec<String> =
                before.iter().filter(|one| backups.contains(&one.id)).map(|one| one.id.clone()).collect();
            own.forget(id, &known).await.map_err(public)?;
            Ok(json!({ "forgotten": known, "left": before.len() - known.len() }))
        }
        Job::PruneBackups => prune(shared, backups, operation).await,
        Job::CheckBackups { read_data } => {
            shared.note(operation.id, "checking", json!({})).await;
            let options = CheckOptions { read_data: *read_data, repair_index: false };
            let found = own.check(id, &options).await.map_err(public)?;
            let damage = (!found.is_sound()).then(|| found.damage.clone());
            if let Some(damage) = &damage {
                tracing::error!(project = %id, ?damage, affected = ?found.affected, "backups are damaged");
            }
            note(shared, id, Tending::Checked, Some(damage)).await?;
            Ok(json!({ "sound": found.is_sound(), "damage": found.damage, "affected": found.affected }))
        }
        Job::EraseBackups => {
            shared.note(operation.id, "erasing", json!({})).await;
            let erased = own.erase(id).await.map_err(public)?;
            // Proof: asked of the repository, after its key is gone.
            let left = own.list(id).await.map(|list| list.len()).map_err(public)?;
            shared
                .db(move |store| store.forget_backup_repository(id))
                .await
                .map_err(|error| failed(&error))?;
            tracing::info!(project = %id, objects = erased.objects, freed_bytes = erased.freed_bytes, left,
                "backups erased");
            Ok(json!({ "objects": erased.objects, "freed_bytes": erased.freed_bytes, "left": left }))
        }
        _ => Err(CommandError { code: ErrorCode::Invalid, message: "not a job of the master's".into() }),
    }
}

/// Forgets what the policy does not keep, and deletes what nothing needs.
async fn prune(shared: &Shared, backups: &Backups, operation: &Operation) -> Result<Value, CommandError> {
    let (id, own) = (operation.project, backups.own());
    let public = |error| backup_error(&error);
    shared.note(operation.id, "forgetting", json!({})).await;
    let project = shared.db(move |store| store.project(id)).await;
    let policy = project.ok().and_then(|project| project.config.backups).unwrap_or_else(|| backups.policy());
    let list = own.list(id).await.map_err(public)?;
    let gone = superfluous(&policy, &list, shared.now());
    own.forget(id, &gone).await.map_err(public)?;
    shared.note(operation.id, "pruning", json!({ "forgotten": gone.len() })).await;
    let options = PruneOptions {
        grace: std::time::Duration::from_secs(3600 * u64::from(backups.config.unneeded_hours)),
    };
    let pruned = own.prune(id, &options).await.map_err(public)?;
    note(shared, id, Tending::Pruned, None).await?;
    Ok(json!({
        "forgotten": gone.len(), "left": list.len() - gone.len(), "freed_bytes": pruned.freed_bytes,
        "marked_bytes": pruned.marked_bytes, "kept_bytes": pruned.kept_bytes,
    }))
}

/// Notes what was done, and the damage that was found, if it was looked for.
async fn note(
    shared: &Shared,
    project: ProjectId,
    tending: Tending,
    damage: Option<Option<Vec<String>>>,
) -> Result<(), CommandError> {
    let now = shared.now();
    let noted = shared.db(move |store| {
        if let Some(damage) = &damage {
            store.set_backup_damage(project, damage.as_deref())?;
        }
        store.tended_backups(project, tending, now)
    });
    noted.await.map_err(|error| failed(&error))
}

fn failed(error: &cocalc_sqlite::master::Error) -> CommandError {
    tracing::error!(error = %cocalc_core::chain(error), "the database failed");
    CommandError { code: ErrorCode::Failed, message: "the master's database failed".into() }
}
