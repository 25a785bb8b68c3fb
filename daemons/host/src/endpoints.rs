//! `/healthz`, `/readyz` and `/metrics` of a host.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use async_trait::async_trait;
use cocalc_auth_live::{AuditLog, Knowledge};
use cocalc_core::{auth::Tier, ids::ProjectId, snapshots::Keeper};
use cocalc_daemon::probe::Metrics;
use cocalc_http::{Body, Client, Endpoints};
use http::{Request, Response, StatusCode, header};
use tokio::sync::watch;

use crate::{backends::Backends, visits::Visits};

/// How long the probe of a part may take.
const PROBE_LIMIT: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub(crate) struct HostEndpoints {
    pub(crate) backends: Backends,
    pub(crate) knowledge: Arc<Knowledge>,
    pub(crate) connected: watch::Receiver<bool>,
    pub(crate) keeper: Keeper,
    pub(crate) metrics: Metrics,
    pub(crate) audit: AuditLog,
    pub(crate) visits: Arc<Visits>,
}

#[async_trait]
impl Endpoints for HostEndpoints {
    async fn answer(&self, path: &str, _request: Request<Body>, client: Client) -> Option<Response<Body>> {
        match path {
            "/healthz" => Some(text(StatusCode::OK, "alive\n")),
            "/readyz" => Some(match self.lack().await {
                None => text(StatusCode::OK, "ready\n"),
                Some(lack) => text(StatusCode::SERVICE_UNAVAILABLE, &format!("not ready: {lack}\n")),
            }),
            // Through a proxy everybody's address may be loopback.
            "/metrics" if !client.trusted && client.address.is_some_and(|address| address.is_loopback()) => {
                self.measure().await;
                Some(text(StatusCode::OK, &self.metrics.render()))
            }
            _ => None,
        }
    }
}

impl HostEndpoints {
    /// What keeps this host from serving, found by asking each part.
    async fn lack(&self) -> Option<String> {
        // The first registration may still be on its way, or the master gone
        // for longer than lease and grace.
        if !*self.connected.borrow() && *self.knowledge.tier().borrow() == Tier::Expired {
            return Some("the master has not been reached".to_owned());
        }
        let nobody = ProjectId::from_bytes([0; 16]);
        let storage = self.backends.storage.snapshots(nobody);
        if !matches!(tokio::time::timeout(PROBE_LIMIT, storage).await, Ok(Ok(_))) {
            return Some("the storage does not answer".to_owned());
        }
        let runner = self.backends.runner.status(nobody);
        if !matches!(tokio::time::timeout(PROBE_LIMIT, runner).await, Ok(Ok(_))) {
            return Some("the runner does not answer".to_owned());
        }
        None
    }

    async fn measure(&self) {
        let counter =
            |name, help, value: u64| self.metrics.counter(name, help).store(value, Ordering::Relaxed);
        let gauge = |name, help, value: u64| self.metrics.gauge(name, help).store(value, Ordering::Relaxed);
        gauge(
            "cocalc_host_connections_count",
            "Connections of users that a revocation would close.",
            self.knowledge.connections().try_into().unwrap_or(u64::MAX),
        );
        let ssh = self.visits.numbers();
        gauge("cocalc_host_ssh_visits_count", "Users' SSH connections that are open.", ssh.open);
        counter("cocalc_host_ssh_in_bytes_total", "Bytes from users to projects over SSH.", ssh.inward);
        counter("cocalc_host_ssh_out_bytes_total", "Bytes from projects to users over SSH.", ssh.outward);
        gauge("cocalc_host_free_bytes", "Free bytes on the project volume.", (self.backends.free_bytes)());
        let tier = match *self.knowledge.tier().borrow() {
            Tier::Fresh => 0,
            Tier::Grace => 1,
            Tier::Expired => 2,
        };
        if let Some(volume) = &self.backends.volume
            && let Ok(Ok(trash)) = tokio::time::timeout(PROBE_LIMIT, volume.trash()).await
        {
            let count = u64::try_from(trash.volumes).unwrap_or(u64::MAX);
            gauge("cocalc_host_trash_volumes_count", "Deleted volumes that are not gone yet.", count);
            let help = "Bytes that deleted projects are still charged for.";
            gauge("cocalc_host_trash_bytes", help, trash.bytes.unwrap_or(0));
        }
        let kept = self.keeper.numbers();
        let overdue = "How long the longest overdue automatic snapshot has been due.";
        gauge("cocalc_host_snapshots_overdue_secs", overdue, kept.overdue.as_secs());
        counter("cocalc_host_snapshots_taken_total", "Automatic snapshots taken.", kept.taken);
        counter("cocalc_host_snapshots_deleted_total", "Automatic snapshots deleted.", kept.deleted);
        let failed = "Looks at a project's automatic snapshots that failed.";
        counter("cocalc_host_snapshots_failures_total", failed, kept.failed);
        let (lines, _) = self.audit.head();
        counter("cocalc_host_audit_events_total", "Lines of the audit log.", lines);
        let help = "Audit events that were dropped: the disk was full or slow. Nothing administrative is decided then.";
        counter("cocalc_host_audit_dropped_total", help, self.audit.lost());
        let help = "Writes of the audit log that failed.";
        counter("cocalc_host_audit_failures_total", help, self.audit.failures());
        gauge("cocalc_host_auth_tier", "0 fresh, 1 in grace, 2 expired.", tier);
    }
}

fn text(status: StatusCode, body: &str) -> Response<Body> {
    let mut response = Response::new(Body::full(body.to_owned()));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, header::HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}
