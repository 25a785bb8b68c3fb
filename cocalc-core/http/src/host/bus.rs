//! The message bus of a project, for endpoints that speak it.

use std::{fmt, future::Future};

use async_trait::async_trait;
use cocalc_core::{
    activity::{Source, Use},
    auth::{Denial, Principal},
    ids::{Action, ProjectId},
    stream::BoxStream,
};
use http::{HeaderMap, Response, Uri};
use tokio::time::timeout;

use super::{Asked, Inner, Rest};
use crate::{
    body::Body,
    problem::Problem,
    upstream::boxed,
    websocket::{self, Wish, tapped},
};

/// Serves upgraded WebSocket connections of authorized users.
#[async_trait]
pub trait BusEndpoint: fmt::Debug + Send + Sync + 'static {
    /// Serves one connection until it ends. The future is dropped when the
    /// right to it is withdrawn, or the ingress shuts down.
    async fn serve(&self, stream: BoxStream, opening: Opening);
}

/// Who opened a connection, and with what.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Opening {
    /// The project whose bus is asked for.
    pub project: ProjectId,
    /// Who asks.
    pub principal: Principal,
    /// The request's target.
    pub uri: Uri,
    /// The request's header, without credentials of ours.
    pub headers: HeaderMap,
}

impl Inner {
    pub(super) async fn bus(
        &self,
        asked: Asked<'_>,
        rest: Rest,
        principal: Principal,
        action: Action,
    ) -> Result<Response<Body>, Problem> {
        let Some(bus) = self.bus.clone() else {
            return Err(Problem::new(
                http::StatusCode::NOT_FOUND,
                "not_available",
                "The message bus is not served on this host.",
            ));
        };
        let (Wish::WebSocket, Some(upgrade)) = (asked.wish, rest.upgrade) else {
            let problem = Problem::new(
                http::StatusCode::UPGRADE_REQUIRED,
                "websocket_required",
                "The message bus is spoken over WebSocket.",
            );
            return Err(problem.header("upgrade", "websocket".to_owned()));
        };
        let project = asked.place.project;
        let admitted = self.auth.admit(&principal, project, action).await;
        let admission = admitted.map_err(|denial| self.denied(project, &denial))?;
        let response = websocket::accept(&asked.parts);
        let opening = Opening { project, principal, uri: asked.parts.uri, headers: asked.parts.headers };
        let (draining, switch) = (rest.connection.draining.clone(), self.limits.connect_timeout);
        let tap = self.meter(project).map(|meter| meter.tap(Source::Bus, Use::Work));
        rest.connection.spawn(async move {
            let Ok(Ok(upgraded)) = timeout(switch, upgrade).await else { return };
            tokio::select! {
                () = bus.serve(tapped(boxed(upgraded), tap), opening) => {}
                _ = revoked(&admission) => {}
                () = draining.cancelled() => {}
            }
        });
        Ok(response)
    }
}

fn revoked(admission: &cocalc_core::auth::Admission) -> impl Future<Output = Denial> {
    admission.revoked()
}
