//! The HTTP API.

mod access;
mod accounts;
mod alias;
mod backups;
mod caller;
mod connect;
mod document;
mod fences;
mod files;
mod health;
mod hosts;
mod identities;
mod idle;
mod images;
mod input;
mod inside;
mod keys;
mod login;
mod members;
mod oidc;
mod operations;
mod page;
mod problem;
mod project_limits;
mod projects;
mod receipts;
mod restores;
mod scope;
mod snapshots;
mod ssh_ca;
mod ssh_keys;
mod trail;
mod view;

use std::sync::Arc;

use axum::{
    Json, Router, middleware,
    routing::{get, post},
};
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;

use self::document::Access;
pub(crate) use self::{problem::Problem, view::time};
use crate::{limits, shared::Shared};

/// No request's body is larger.
pub(crate) const BODY_BYTES_MAX: usize = 64 * 1024;

/// The OpenAPI document's own part; the rest comes from the handlers.
#[derive(OpenApi)]
#[openapi(
    info(title = "CoCalc master", description = "Accounts, projects and hosts of a CoCalc federation."),
    servers((url = "/api/v1"))
)]
struct Document;

/// The whole API, without `/conat/`.
pub(crate) fn router(shared: Arc<Shared>) -> Router {
    let (closed, mut document) = OpenApiRouter::with_openapi(Document::openapi())
        .merge(accounts::routes())
        .merge(projects::routes())
        .merge(project_limits::routes())
        .merge(connect::routes())
        .merge(members::routes())
        .merge(snapshots::routes())
        .merge(files::routes())
        .merge(backups::routes())
        .merge(idle::routes())
        .merge(images::routes())
        .merge(inside::routes())
        .merge(ssh_keys::routes())
        .merge(ssh_ca::routes())
        .merge(hosts::routes())
        .merge(fences::routes())
        .merge(alias::routes())
        .merge(restores::routes())
        .merge(operations::routes())
        .merge(keys::routes())
        .merge(receipts::routes())
        .merge(login::routes())
        .merge(identities::routes())
        .merge(access::routes())
        .split_for_parts();
    let (open, mut rest) = OpenApiRouter::with_openapi(Document::openapi())
        .merge(hosts::open_routes())
        .merge(ssh_ca::open_routes())
        .merge(login::open_routes())
        .merge(oidc::open_routes())
        .split_for_parts();
    document::complete(&mut document, Access::Bearer);
    document::complete(&mut rest, Access::Anybody);
    document.merge(rest);
    let document = Arc::new(document);
    let closed = closed.layer(middleware::from_fn_with_state(shared.clone(), caller::authenticate));
    let api = closed
        .merge(open)
        .route("/openapi.json", get(move || async move { Json(document.as_ref().clone()) }))
        .fallback(nothing)
        .method_not_allowed_fallback(wrong_method)
        .layer(middleware::from_fn_with_state(shared.clone(), trail::record));
    let browser = Router::new()
        .route("/auth/oidc/{name}/start", get(oidc::start))
        .route("/auth/oidc/{name}/callback", get(oidc::callback))
        .route("/auth/oidc/{name}/agree", post(oidc::agree))
        .layer(middleware::from_fn_with_state(shared.clone(), trail::record));
    Router::new()
        .nest("/api/v1", api)
        .merge(browser)
        .route("/.well-known/jwks.json", get(keys::jwks))
        .route("/projects/{id}", get(page::project))
        .route("/healthz", get(health::alive))
        .route("/readyz", get(health::ready))
        .route("/metrics", get(health::metrics))
        .fallback(nothing)
        .method_not_allowed_fallback(wrong_method)
        .layer(middleware::from_fn_with_state(shared.clone(), limits::limit))
        .with_state(shared)
}

async fn nothing() -> Problem {
    Problem::not_found("thing")
}

async fn wrong_method() -> Problem {
    Problem::new(http::StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", "this path has other methods")
}
