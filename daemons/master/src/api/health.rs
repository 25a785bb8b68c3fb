//! Whether the master lives, works, and what it counts.

use std::{
    fmt::Write,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use axum::{Extension, extract::State, response::IntoResponse};
use cocalc_core::connector::Peer;
use cocalc_ids::Timestamp;
use http::{HeaderMap, StatusCode, header};

use super::{
    caller,
    problem::{Answer, Problem},
};
use crate::{
    backups::{Backups, LastDrill},
    shared::Shared,
};

/// The process answers.
pub(super) async fn alive() -> &'static str {
    "ok\n"
}

/// The database answers, and so does the bus.
pub(super) async fn ready(
    State(shared): State<Arc<Shared>>,
) -> Result<&'static str, (StatusCode, &'static str)> {
    if shared.ending.is_announced() {
        return Err((StatusCode::SERVICE_UNAVAILABLE, "shutting down\n"));
    }
    let limit = Duration::from_secs(2);
    match tokio::time::timeout(limit, shared.db(|store| store.probe())).await {
        Ok(Ok(())) => {}
        _ => return Err((StatusCode::SERVICE_UNAVAILABLE, "the database does not answer\n")),
    }
    // Somebody must hear peers.
    let subject = "master.host.probe.api";
    match shared.bus.wait_for_interest(subject, limit).await {
        Ok(true) => Ok("ready\n"),
        _ => Err((StatusCode::SERVICE_UNAVAILABLE, "the bus does not answer\n")),
    }
}

/// Counters for Prometheus, for this machine or an administrator.
pub(super) async fn metrics(
    State(shared): State<Arc<Shared>>,
    Extension(peer): Extension<SocketAddr>,
    headers: HeaderMap,
) -> Answer<impl IntoResponse> {
    if !peer.ip().to_canonical().is_loopback() && !caller::bearer(&shared, &headers).await?.account.admin {
        return Err(Problem::denied());
    }
    let (hosts, proxies, running) =
        shared.db(|store| Ok((store.hosts()?, store.proxies()?, store.operations_running()?.len()))).await?;
    let projects: u64 =
        shared.db(|store| store.project_counts()).await?.into_iter().map(|(_, count)| count).sum();
    let connected = |peers: &mut dyn Iterator<Item = Peer>| peers.filter(|peer| shared.alive(*peer)).count();
    let mut text = String::new();
    for (name, help, value) in [
        ("hosts_total", "Hosts that have joined.", hosts.len()),
        (
            "hosts_connected",
            "Hosts within their lease.",
            connected(&mut hosts.iter().map(|host| Peer::Host(host.id))),
        ),
        ("proxies_total", "Proxies that have joined.", proxies.len()),
        (
            "proxies_connected",
            "Proxies within their lease.",
            connected(&mut proxies.iter().map(|proxy| Peer::Proxy(proxy.id))),
        ),
        ("projects_total", "Projects.", usize::try_from(projects).unwrap_or(usize::MAX)),
        ("operations_running", "Operations that go on.", running),
        ("receipts_open", "Revocations that are not in force everywhere yet.", shared.receipts.open()),
        ("operation_tasks", "Operations that this process works on.", shared.operations.running()),
    ] {
        // Writing to a String cannot fail.
        let _ = write!(
            text,
            "# HELP cocalc_master_{name} {help}\n# TYPE cocalc_master_{name} gauge\ncocalc_master_{name} {value}\n"
        );
    }
    for (name, help, value) in [
        ("events", "Lines of the audit log.", shared.audit.head().0),
        ("dropped", "Audit events that were dropped: the disk was full or slow.", shared.audit.lost()),
        ("failures", "Writes of the audit log that failed.", shared.audit.failures()),
    ] {
        let _ = write!(
            text,
            "# HELP cocalc_master_audit_{name}_total {help}\n# TYPE cocalc_master_audit_{name}_total counter\n\
             cocalc_master_audit_{name}_total {value}\n"
        );
    }
    if let Some(backups) = &shared.backups {
        backup_metrics(&shared, backups, &mut text).await?;
    }
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text))
}

async fn backup_metrics(shared: &Shared, backups: &Backups, text: &mut String) -> Answer<()> {
    let (repositories, damaged) = shared.db(|store| store.count_backup_repositories()).await?;
    let tended = &backups.tended;
    let last = tended.last_drill();
    let of_last = |read: &dyn Fn(&LastDrill) -> u64| last.as_ref().map_or(0, read);
    let secs = |at: Timestamp| u64::try_from(at.secs()).unwrap_or(0);
    for (name, help, value) in [
        ("repositories_count", "Projects with backups.", repositories),
        ("damaged_count", "Of these, those whose last check found damage.", damaged),
        (
            "drill_last_millis",
            "How long the last restore took that tried out a backup.",
            of_last(&|last| last.millis),
        ),
        (
            "drill_last_failed",
            "1 if the last try of a backup failed.",
            of_last(&|last| u64::from(last.failure.is_some())),
        ),
        (
            "drill_last_timestamp_secs",
            "When a backup was last tried out; 0 if not since the start.",
            of_last(&|last| secs(last.at)),
        ),
    ] {
        // Writing to a String cannot fail.
        let _ = write!(
            text,
            "# HELP cocalc_master_backups_{name} {help}\n# TYPE cocalc_master_backups_{name} gauge\n\
             cocalc_master_backups_{name} {value}\n"
        );
    }
    let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    for (name, help, value) in [
        ("tend_failures", "Prunes, checks, erasures and deletions that failed.", read(&tended.failures)),
        ("forgotten", "Backups taken off the list.", read(&tended.forgotten)),
        ("freed_bytes", "Bytes deleted from repositories.", read(&tended.freed_bytes)),
        ("erased", "Projects whose backups were erased.", read(&tended.erased)),
        ("drills", "Backups tried out.", read(&tended.drills)),
        ("drill_failures", "Of these, those that failed.", read(&tended.drill_failures)),
    ] {
        let _ = write!(
            text,
            "# HELP cocalc_master_backups_{name}_total {help}\n\
             # TYPE cocalc_master_backups_{name}_total counter\ncocalc_master_backups_{name}_total {value}\n"
        );
    }
    Ok(())
}
