//! Where revocations are in force.

use std::{sync::Arc, time::Duration};

use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};
use cocalc_ids::ReceiptId;
use http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    caller::Caller,
    input::{Asked, Id},
    problem::{Answer, Problem},
};
use crate::{
    bus::streams::Target,
    receipts::{Change, Receipt},
    shared::Shared,
};

pub(super) fn routes() -> OpenApiRouter<Arc<Shared>> {
    OpenApiRouter::new().routes(routes!(show))
}

/// Whether to wait until a revocation is in force.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct Wait {
    /// Wait until it is in force everywhere.
    #[serde(default)]
    wait: bool,
    /// How long at most; 1 to 3600, default 20. What is `pending` then goes on:
    /// `GET /receipts/{id}`.
    timeout_secs: Option<u64>,
}

impl Wait {
    fn limit(&self) -> Duration {
        match self.wait {
            true => Duration::from_secs(self.timeout_secs.unwrap_or(20).clamp(1, 3600)),
            false => Duration::ZERO,
        }
    }

    /// Keeps the receipt of a change, and waits for it if that was asked for.
    pub(super) async fn receipt(
        &self,
        shared: &Shared,
        change: Change,
        targets: Vec<Target>,
    ) -> Answer<Option<Receipt>> {
        match shared.issue(change, targets).await? {
            Some(id) => Ok(Some(shared.receipt(id, self.limit()).await?.1)),
            None => Ok(None),
        }
    }
}

impl Wait {
    /// The answer to a call that says nothing unless somebody waits for it.
    pub(super) async fn answer(
        &self,
        shared: &Shared,
        change: Change,
        targets: Vec<Target>,
    ) -> Answer<Response> {
        if !self.wait {
            return Ok(StatusCode::NO_CONTENT.into_response());
        }
        let receipt = self.receipt(shared, change, targets).await?;
        Ok(Json(Ended { receipt }).into_response())
    }
}

/// Where it is in force that a log-in has ended.
#[derive(Serialize, ToSchema)]
pub(super) struct Ended {
    receipt: Option<Receipt>,
}

impl Caller {
    /// A change of this caller's.
    pub(super) fn change(&self, what: &'static str, subject: impl ToString) -> Change {
        let subject = subject.to_string();
        self.notes(what, &subject);
        Change { account: self.id, what, subject, grace: None }
    }
}

/// Shows where a revocation is in force, to who asked for it and to
/// administrators; with `wait`, when it is so everywhere.
#[utoipa::path(get, path = "/receipts/{id}", tag = "receipts", params(("id" = String, Path), Wait),
    responses((status = 200, body = Receipt), (status = "default", body = Problem)))]
async fn show(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<ReceiptId>,
    Asked(wait): Asked<Wait>,
) -> Answer<Json<Receipt>> {
    let account = shared.db(move |store| store.receipt(id)).await?.account;
    if !caller.admin && account != caller.id {
        return Err(Problem::not_found("receipt"));
    }
    Ok(Json(shared.receipt(id, wait.limit()).await?.1))
}
