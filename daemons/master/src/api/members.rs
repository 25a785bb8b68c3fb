//! Who may use a project.

use std::sync::Arc;

use axum::{Json, extract::State};
use cocalc_ids::{AccountId, Action, ProjectId, Role};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    caller::Caller,
    input::{Asked, Body, Id, Ids},
    problem::{Answer, Problem},
    receipts::Wait,
};
use crate::{receipts::Receipt, shared::Shared};

pub(super) fn routes() -> OpenApiRouter<Arc<Shared>> {
    OpenApiRouter::new().routes(routes!(add, list)).routes(routes!(remove))
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct NewMember {
    #[schema(value_type = String)]
    account_id: AccountId,
    /// `viewer`, `collaborator` (the default) or `owner`.
    #[serde(default = "collaborator")]
    #[schema(value_type = Option<String>)]
    role: Role,
}

fn collaborator() -> Role {
    Role::Collaborator
}

#[derive(Serialize, ToSchema)]
struct MemberView {
    account_id: String,
    #[schema(value_type = String)]
    role: Role,
}

#[derive(Serialize, ToSchema)]
struct Changed {
    account_id: String,
    /// The new role; none if the membership ended.
    #[schema(value_type = Option<String>)]
    role: Option<Role>,
    /// The version of the member set that says so.
    acl_version: u64,
    /// Where it is in force; with `wait`, when it is so everywhere.
    receipt: Option<Receipt>,
}

/// Adds a member, or changes its role.
#[utoipa::path(post, path = "/projects/{id}/members", tag = "members", params(("id" = String, Path), Wait),
    request_body = NewMember,
    responses((status = 200, body = Changed), (status = "default", body = Problem)))]
async fn add(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<ProjectId>,
    Asked(wait): Asked<Wait>,
    Body(new): Body<NewMember>,
) -> Answer<Json<Changed>> {
    caller.project(&shared, id, Some(Action::Administer)).await?;
    let (account, role) = (new.account_id, new.role);
    let acl_version = shared.db(move |store| store.add_member(id, account, role)).await?;
    let targets = shared.announce_project(id).await?;
    let change = caller.change("collaborator.add", format!("{id} {account}"));
    let receipt = wait.receipt(&shared, change, targets).await?;
    Ok(Json(Changed { account_id: account.to_string(), role: Some(role), acl_version, receipt }))
}

#[derive(Serialize, ToSchema)]
struct Members {
    acl_version: u64,
    members: Vec<MemberView>,
}

/// Lists members.
#[utoipa::path(get, path = "/projects/{id}/members", tag = "members", params(("id" = String, Path)),
    responses((status = 200, body = Members), (status = "default", body = Problem)))]
async fn list(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<ProjectId>,
) -> Answer<Json<Members>> {
    caller.project(&shared, id, None).await?;
    let (acl_version, members) = shared.db(move |store| store.members(id)).await?;
    let members = members
        .into_iter()
        .map(|member| MemberView { account_id: member.account.to_string(), role: member.role })
        .collect();
    Ok(Json(Members { acl_version, members }))
}

/// Ends a membership. Members may end their own.
#[utoipa::path(delete, path = "/projects/{id}/members/{account}", tag = "members",
    params(("id" = String, Path), ("account" = String, Path), Wait),
    responses((status = 200, body = Changed), (status = "default", body = Problem)))]
async fn remove(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Ids(id, account): Ids<ProjectId, AccountId>,
    Asked(wait): Asked<Wait>,
) -> Answer<Json<Changed>> {
    let action = (caller.id != account).then_some(Action::Administer);
    caller.project(&shared, id, action).await?;
    let acl_version = shared.db(move |store| store.remove_member(id, account)).await?;
    let targets = shared.announce_project(id).await?;
    let change = caller.change("collaborator.remove", format!("{id} {account}"));
    let receipt = wait.receipt(&shared, change, targets).await?;
    Ok(Json(Changed { account_id: account.to_string(), role: None, acl_version, receipt }))
}
