//! Other names of projects, for SSH.

use std::sync::Arc;

use axum::{Json, extract::State};
use cocalc_ids::{Action, ProjectAlias, ProjectId};
use cocalc_sqlite::master as store;
use serde::Deserialize;
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    caller::Caller,
    input::{Body, Id},
    problem::{Answer, Problem},
    view::ProjectView,
};
use crate::shared::Shared;

pub(super) fn routes() -> OpenApiRouter<Arc<Shared>> {
    OpenApiRouter::new().routes(routes!(set_alias))
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct NewAlias {
    /// 3 to 32 of `a-z`, `0-9` and `-`, beginning with a letter; null for none.
    alias: Option<String>,
}

/// Gives a project a name under which `ssh NAME@…` reaches it besides its id, in
/// the place of the one it had. No other project of the federation has it.
#[utoipa::path(put, path = "/projects/{id}/alias", tag = "projects", params(("id" = String, Path)),
    request_body = NewAlias,
    responses((status = 200, body = ProjectView), (status = "default", body = Problem)))]
async fn set_alias(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<ProjectId>,
    Body(body): Body<NewAlias>,
) -> Answer<Json<ProjectView>> {
    caller.project(&shared, id, Some(Action::Administer)).await?;
    let alias = body.alias.map(|alias| alias.parse::<ProjectAlias>()).transpose();
    let alias = alias.map_err(|error| Problem::invalid(format!("alias: {error}")))?;
    caller.notes("project.alias", id);
    let project = match shared.db(move |store| store.set_alias(id, alias)).await {
        Err(store::Error::Exists { .. }) => {
            return Err(Problem::conflict("alias_taken", "another project has this name"));
        }
        project => project?,
    };
    if project.made {
        shared.configure_at_host(id).await;
    }
    Ok(Json(project.into()))
}
