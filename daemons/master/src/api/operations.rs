//! Operations: what goes on, and how it ended.

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{
    Json,
    extract::State,
    response::sse::{Event, KeepAlive, Sse},
};
use cocalc_ids::OperationId;
use cocalc_sqlite::master::{self as store, Operation, OperationState};
use futures_util::{Stream, StreamExt, stream};
use serde::{Deserialize, Serialize};
use tokio::sync::broadcast;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    caller::Caller,
    input::{Asked, Body, Id},
    problem::{Answer, Problem},
    projects::Nothing,
    view::{OperationView, time},
};
use crate::{operations, shared::Shared};

/// Even without news the database is looked at so often.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// One on an image, which is in memory, is looked at so often.
const LOOK_SOON: Duration = Duration::from_millis(250);

/// How long a call waits for what is found before its operation does anything.
const CHECK_LIMIT: Duration = Duration::from_secs(10);

/// What may be found then.
const FOUND: [&str; 1] = ["snapshot_exists"];

pub(super) fn routes() -> OpenApiRouter<Arc<Shared>> {
    OpenApiRouter::new()
        .routes(routes!(list))
        .routes(routes!(show))
        .routes(routes!(events))
        .routes(routes!(wait))
        .routes(routes!(cancel))
}

#[derive(Serialize, ToSchema)]
struct Operations {
    operations: Vec<OperationView>,
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct Page {
    /// Also those of others. Administrators.
    #[serde(default)]
    all: bool,
    /// At most so many; 1 to 1000, default 50.
    limit: Option<usize>,
}

/// Lists the newest operations on the caller's projects.
#[utoipa::path(get, path = "/operations", tag = "operations", params(Page),
    responses((status = 200, body = Operations), (status = "default", body = Problem)))]
async fn list(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Asked(page): Asked<Page>,
) -> Answer<Json<Operations>> {
    if page.all {
        caller.require_admin()?;
    }
    let account = (!page.all).then_some(caller.id);
    let limit = page.limit.unwrap_or(50).clamp(1, 1000);
    let operations = shared.db(move |store| store.operations(account, limit)).await?;
    let operations = operations.into_iter().filter(|operation| caller.covers(operation.project));
    Ok(Json(Operations { operations: operations.map(Into::into).collect() }))
}

/// The operation, if the caller may see its project.
async fn find(shared: &Shared, caller: &Caller, id: OperationId) -> Answer<Operation> {
    let (account, admin) = (caller.id, caller.admin);
    let (operation, seen) = shared
        .db(move |store| {
            let operation = store.operation(id)?;
            // Who deleted a project may still see how that went.
            let seen =
                admin || operation.account == account || store.role(operation.project, account)?.is_some();
            Ok((operation, seen))
        })
        .await?;
    let seen = seen && caller.covers(operation.project);
    if seen { Ok(operation) } else { Err(Problem::not_found("operation")) }
}

/// Shows an operation.
#[utoipa::path(get, path = "/operations/{id}", tag = "operations", params(("id" = String, Path)),
    responses((status = 200, body = OperationView), (status = "default", body = Problem)))]
async fn show(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<OperationId>,
) -> Answer<Json<OperationView>> {
    Ok(Json(look(&shared, &caller, id).await?))
}

/// The operation as people see it: on a project, or on an image.
async fn look(shared: &Shared, caller: &Caller, id: OperationId) -> Answer<OperationView> {
    match shared.image_job(id) {
        Some(job) if caller.admin || job.account == caller.id => Ok(job.into()),
        Some(_) => Err(Problem::not_found("operation")),
        None => Ok(find(shared, caller, id).await?.into()),
    }
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct Timeout {
    /// How long to wait; 1 to 600, default 30.
    timeout_secs: Option<u64>,
}

/// Waits until an operation has ended, or the time is over: look at `state`.
#[utoipa::path(get, path = "/operations/{id}/wait", tag = "operations",
    params(("id" = String, Path), Timeout),
    responses((status = 200, body = OperationView), (status = "default", body = Problem)))]
async fn wait(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<OperationId>,
    Asked(timeout): Asked<Timeout>,
) -> Answer<Json<OperationView>> {
    let limit = Duration::from_secs(timeout.timeout_secs.unwrap_or(30).clamp(1, 600));
    let deadline = tokio::time::Instant::now() + limit;
    let mut changes = shared.operations.changes();
    loop {
        let operation = look(&shared, &caller, id).await?;
        let now = tokio::time::Instant::now();
        if operation.is_over() || now >= deadline {
            return Ok(Json(operation));
        }
        if shared.image_job(id).is_some() {
            tokio::time::sleep_until(deadline.min(now + LOOK_SOON)).await;
            continue;
        }
        let until = deadline.min(now + LOOK_AGAIN);
        changed(&mut changes, id, until).await;
    }
}

/// Waits until it has turned out whether an operation makes sense, for a while
/// at most: fails with what was found, in that case.
pub(super) async fn checked(shared: &Shared, id: OperationId) -> Answer<()> {
    let deadline = tokio::time::Instant::now() + CHECK_LIMIT;
    let mut changes = shared.operations.changes();
    loop {
        let operation = shared.db(move |store| store.operation(id)).await?;
        if operation.state == OperationState::Failed
            && let Some(error) = &operation.error
            && let Some(code) = FOUND.iter().find(|code| error["code"] == **code)
        {
            return Err(Problem::conflict(code, error["detail"].as_str().unwrap_or_default()));
        }
        let unchecked = [operations::QUEUED, operations::CHECKING].contains(&&*operation.phase);
        if !unchecked || tokio::time::Instant::now() >= deadline {
            return Ok(());
        }
        changed(&mut changes, id, deadline).await;
    }
}

/// Waits for news of the operation, for any that were missed, or for `until`.
async fn changed(
    changes: &mut broadcast::Receiver<OperationId>,
    id: OperationId,
    until: tokio::time::Instant,
) {
    let news = async {
        loop {
            match changes.recv().await {
                Ok(changed) if changed != id => {}
                Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => return,
                Err(broadcast::error::RecvError::Closed) => std::future::pending().await,
            }
        }
    };
    let _ = tokio::time::timeout_at(until, news).await;
}

/// Shows an operation's events as they come, as server-sent events: `phase`
/// for each, `end` with the operation at the end. `Last-Event-ID` goes on where
/// a lost connection ended.
#[utoipa::path(get, path = "/operations/{id}/events", tag = "operations", params(("id" = String, Path)),
    responses((status = 200, content_type = "text/event-stream"), (status = "default", body = Problem)))]
async fn events(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<OperationId>,
    headers: http::HeaderMap,
) -> Answer<Sse<impl Stream<Item = Result<Event, Infallible>>>> {
    find(&shared, &caller, id).await?;
    let changes = shared.operations.changes();
    let last = headers.get("last-event-id").and_then(|value| value.to_str().ok()?.parse().ok());
    let follow = Follow { shared, id, changes, after: last.unwrap_or(0), ended: false };
    let batches = stream::unfold(follow, async |mut follow| follow.next().await.map(|batch| (batch, follow)));
    Ok(Sse::new(batches.flat_map(stream::iter))
        .keep_alive(KeepAlive::new().interval(Duration::from_secs(15))))
}

/// Somebody follows an operation.
struct Follow {
    shared: Arc<Shared>,
    id: OperationId,
    changes: broadcast::Receiver<OperationId>,
    after: u64,
    ended: bool,
}

impl Follow {
    /// What happened since the last time, waiting for something to happen;
    /// `None` after the end.
    async fn next(&mut self) -> Option<Vec<Result<Event, Infallible>>> {
        if self.ended {
            return None;
        }
        loop {
            let (id, after) = (self.id, self.after);
            let read = move |store: &store::Store| Ok((store.operation(id)?, store.events(id, after)?));
            // A database that fails ends the stream; the client asks again.
            let (operation, news) = self.shared.db(read).await.ok()?;
            let mut batch = Vec::with_capacity(news.len() + 1);
            for event in news {
                self.after = event.seq;
                let data = serde_json::json!({
                    "at": time(event.at), "phase": event.phase, "progress": event.progress,
                });
                batch.push(Ok(Event::default()
                    .event("phase")
                    .id(event.seq.to_string())
                    .data(data.to_string())));
            }
            if operation.state != OperationState::Running {
                self.ended = true;
                let data = serde_json::to_string(&OperationView::from(operation)).unwrap_or_default();
                batch.push(Ok(Event::default().event("end").data(data)));
            }
            if !batch.is_empty() {
                return Some(batch);
            }
            changed(&mut self.changes, self.id, tokio::time::Instant::now() + LOOK_AGAIN).await;
        }
    }
}

/// Asks an operation to cancel. A move that has not been committed is undone;
/// other operations, and a move after that, only go forward.
#[utoipa::path(post, path = "/operations/{id}/cancel", tag = "operations", params(("id" = String, Path)),
    responses((status = 202, body = OperationView), (status = "default", body = Problem)))]
async fn cancel(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<OperationId>,
    Body(Nothing {}): Body<Nothing>,
) -> Answer<(http::StatusCode, Json<OperationView>)> {
    if let Some(job) = shared.image_job(id) {
        if !caller.admin && job.account != caller.id {
            return Err(Problem::not_found("operation"));
        }
        if job.state != "running" {
            return Err(Problem::conflict("operation_ended", format!("the operation is {}", job.state)));
        }
        let job = shared.cancel_image_job(id).unwrap_or(job);
        return Ok((http::StatusCode::ACCEPTED, Json(job.into())));
    }
    let operation = find(&shared, &caller, id).await?;
    let project = caller.project(&shared, operation.project, Some(cocalc_ids::Action::Administer)).await;
    if operation.state != OperationState::Running {
        return Err(Problem::conflict(
            "operation_ended",
            format!("the operation is {}", operation.state.as_str()),
        ));
    }
    project?;
    let cancellable =
        matches!(operation.job, store::Job::Move { .. } | store::Job::BackUp | store::Job::DrillBackup)
            && operation.progress["cancellable"] != false;
    if !cancellable {
        return Err(Problem::conflict("not_cancellable", "this operation only goes forward now"));
    }
    match shared.cancel(id).await {
        Ok(operation) => Ok((http::StatusCode::ACCEPTED, Json(operation.into()))),
        Err(store::Error::Stale { .. }) => {
            Err(Problem::conflict("operation_ended", "the operation has ended"))
        }
        Err(error) => Err(error.into()),
    }
}
