//! `/healthz`, `/readyz` and `/metrics` of a host.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use async_trait::async_trait;
use cocalc_auth_live::{AuditLog, Knowledge};
use cocalc_core::{auth::Tier, backups, ids::ProjectId, snapshots::Keeper};
use cocalc_daemon::{ending::Ending, probe::Metrics};
use cocalc_http::{Body, Client, Endpoints};
use http::{Request, Response, StatusCode, header};
use tokio::sync::watch;

use crate::{backends::Backends, lifecycle::Lifecycle, visits::Visits};

/// How long the probe of a part may take.
const PROBE_LIMIT: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub(crate) struct HostEndpoints {
    pub(crate) ending: Ending,
    pub(crate) backends: Backends,
    pub(crate) knowledge: Arc<Knowledge>,
    pub(crate) connected: watch::Receiver<bool>,
    pub(crate) keeper: Keeper,
    pub(crate) backups: Option<backups::Keeper>,
    pub(crate) metrics: Metrics,
    pub(crate) lifecycle: Lifecycle,
    pub(crate) audit: AuditLog,
    pub(crate) visits: Arc<Visits>,
}

#[async_trait]
impl Endpoints for HostEndpoints {
    async fn answer(&self, path: &str, request: Request<Body>, client: Client) -> Option<Response<Body>> {
        match path {
            "/healthz" => Some(text(StatusCode::OK, "alive\n")),
            "/readyz" => Some(match self.lack().await {
                None => text(StatusCode::OK, "ready\n"),
                Some(lack) => text(StatusCode::SERVICE_UNAVAILABLE, &format!("not ready: {lack}\n")),
            }),
            // Through a proxy everybody's address may be loopback.
            "/metrics"
                if !client.trusted
                    && client.address.is_some_and(|address| address.is_loopback())
                    && !is_forwarded(&request) =>
            {
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
        if self.ending.is_announced() {
            return Some("shutting down".to_owned());
        }
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
        let (starting, waiting) = self.lifecycle.gate().numbers();
        let number = |count: usize| u64::try_from(count).unwrap_or(u64::MAX);
        gauge("cocalc_host_starts_going_count", "Projects that are being started.", number(starting));
        let help = "Projects that wait for others to be started first.";
        gauge("cocalc_host_starts_waiting_count", help, number(waiting));
        let help = "Time from when a project was to be started until it ran.";
        self.metrics.times("cocalc_host_start_seconds", help, self.lifecycle.starts());
        let dying = number(self.lifecycle.deaths().loops());
        let help = "Projects that have ended by themselves again and again, soon after their start.";
        gauge("cocalc_host_projects_dying_count", help, dying);
        if let Some(idle) = self.lifecycle.use_of_projects() {
            let totals = idle.totals();
            gauge("cocalc_host_projects_running_count", "Projects that run.", totals.running);
            gauge(
                "cocalc_host_projects_memory_bytes",
                "Memory of the projects that run.",
                totals.memory_bytes,
            );
            let help = "Processes and threads of the projects that run.";
            gauge("cocalc_host_projects_pids_count", help, totals.pids);
            let used = totals.used;
            let help = "CPU time of all projects, in microseconds, since the daemon started.";
            counter("cocalc_host_projects_cpu_micros_total", help, used.cpu_micros);
            let help = "Bytes that projects read from disks, since the daemon started.";
            counter("cocalc_host_projects_read_bytes_total", help, used.read_bytes);
            let help = "Bytes that projects wrote to disks, since the daemon started.";
            counter("cocalc_host_projects_written_bytes_total", help, used.written_bytes);
            let help = "Bytes that projects received over their own networks, since the daemon started.";
            counter("cocalc_host_projects_received_bytes_total", help, used.received_bytes);
            let help = "Bytes that projects sent over their own networks, since the daemon started.";
            counter("cocalc_host_projects_sent_bytes_total", help, used.sent_bytes);
            let help = "Processes of projects that were killed because their memory was used up.";
            counter("cocalc_host_projects_oom_kills_total", help, used.oom_kills);
        }
        let images = self.backends.images.digests().len();
        gauge("cocalc_host_images_count", "Images on this host.", number(images));
        let kept = self.keeper.numbers();
        let overdue = "How long the longest overdue automatic snapshot has been due.";
        gauge("cocalc_host_snapshots_overdue_secs", overdue, kept.overdue.as_secs());
        counter("cocalc_host_snapshots_taken_total", "Automatic snapshots taken.", kept.taken);
        counter("cocalc_host_snapshots_deleted_total", "Automatic snapshots deleted.", kept.deleted);
        let failed = "Looks at a project's automatic snapshots that failed.";
        counter("cocalc_host_snapshots_failures_total", failed, kept.failed);
        let made = self.backups.as_ref().map(backups::Keeper::numbers).unwrap_or_default();
        let help = "How long the oldest change that no backup has has been waiting for one.";
        gauge("cocalc_host_backups_oldest_secs", help, made.oldest.as_secs());
        let help = "How long the longest overdue look at a project's backups has been due.";
        gauge("cocalc_host_backups_overdue_secs", help, made.overdue.as_secs());
        gauge("cocalc_host_backups_running_count", "Backups that go on now.", made.running);
        let help = "Projects with changes that no backup has.";
        gauge("cocalc_host_backups_pending_count", help, made.pending);
        let help = "Of these, projects whose last backup failed.";
        gauge("cocalc_host_backups_failing_count", help, made.failing);
        counter("cocalc_host_backups_made_total", "Backups made.", made.made);
        counter("cocalc_host_backups_failures_total", "Backups that failed.", made.failed);
        let help = "Backups that were broken off, because the project left or somebody asked.";
        counter("cocalc_host_backups_cancelled_total", help, made.cancelled);
        counter("cocalc_host_backups_bytes_total", "Bytes in the backups made.", made.bytes);
        let help = "Bytes that the backups made added to repositories.";
        counter("cocalc_host_backups_added_bytes_total", help, made.added_bytes);
        counter("cocalc_host_backups_millis_total", "Milliseconds that the backups made took.", made.millis);
        let (lines, _) = self.audit.head();
        counter("cocalc_host_audit_events_total", "Lines of the audit log.", lines);
        let help = "Audit events that were dropped: the disk was full or slow. Nothing administrative is decided then.";
        counter("cocalc_host_audit_dropped_total", help, self.audit.lost());
        let help = "Writes of the audit log that failed.";
        counter("cocalc_host_audit_failures_total", help, self.audit.failures());
        gauge("cocalc_host_auth_tier", "0 fresh, 1 in grace, 2 expired.", tier);
    }
}

/// Whether something in front has passed it on: then its own address says nothing
/// of who asks.
fn is_forwarded(request: &Request<Body>) -> bool {
    ["forwarded", "x-forwarded-for", "x-real-ip", "via"]
        .iter()
        .any(|name| request.headers().contains_key(*name))
}

fn text(status: StatusCode, body: &str) -> Response<Body> {
    let mut response = Response::new(Body::full(body.to_owned()));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, header::HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}
