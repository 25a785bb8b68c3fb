//! `/healthz`, `/readyz` and `/metrics` of a proxy.

use std::sync::{Arc, OnceLock, atomic::Ordering};

use async_trait::async_trait;
use cocalc_auth_live::{AuditLog, Knowledge};
use cocalc_core::auth::Tier;
use cocalc_daemon::{ending::Ending, probe::Metrics};
use cocalc_http::{Body, Client, Endpoints, ProxyIngress};
use http::{Request, Response, StatusCode, header};
use tokio::sync::watch;

#[derive(Debug)]
pub(crate) struct ProxyEndpoints {
    pub(crate) ending: Ending,
    pub(crate) knowledge: Arc<Knowledge>,
    pub(crate) connected: watch::Receiver<bool>,
    pub(crate) metrics: Metrics,
    /// The ingress that has these endpoints, once it is built.
    pub(crate) ingress: Arc<OnceLock<ProxyIngress>>,
    pub(crate) audit: AuditLog,
}

#[async_trait]
impl Endpoints for ProxyEndpoints {
    async fn answer(&self, path: &str, request: Request<Body>, client: Client) -> Option<Response<Body>> {
        match path {
            "/healthz" => Some(text(StatusCode::OK, "alive\n")),
            "/readyz" if self.ending.is_announced() => {
                Some(text(StatusCode::SERVICE_UNAVAILABLE, "not ready: shutting down\n"))
            }
            "/readyz" if self.ready() => Some(text(StatusCode::OK, "ready\n")),
            "/readyz" => {
                Some(text(StatusCode::SERVICE_UNAVAILABLE, "not ready: the master has not been reached\n"))
            }
            "/metrics"
                if client.address.is_some_and(|address| address.is_loopback()) && !is_forwarded(&request) =>
            {
                self.measure();
                Some(text(StatusCode::OK, &self.metrics.render()))
            }
            _ => None,
        }
    }
}

impl ProxyEndpoints {
    fn ready(&self) -> bool {
        *self.connected.borrow() || *self.knowledge.tier().borrow() != Tier::Expired
    }

    fn measure(&self) {
        let Some(stats) = self.ingress.get().map(ProxyIngress::stats) else { return };
        let gauge = |name, help, value| self.metrics.gauge(name, help).store(value, Ordering::Relaxed);
        let counter = |name, help, value| self.metrics.counter(name, help).store(value, Ordering::Relaxed);
        gauge("cocalc_proxy_connections_count", "HTTP connections that are open.", stats.connections);
        counter("cocalc_proxy_requests_total", "HTTP requests.", stats.requests);
        counter("cocalc_proxy_denials_total", "HTTP requests that were denied here.", stats.denied);
        counter("cocalc_proxy_websockets_total", "WebSockets that began.", stats.websockets);
        counter("cocalc_proxy_audit_events_total", "Lines of the audit log.", self.audit.head().0);
        let help = "Audit events that were dropped: the disk was full or slow.";
        counter("cocalc_proxy_audit_dropped_total", help, self.audit.lost());
        let help = "Writes of the audit log that failed.";
        counter("cocalc_proxy_audit_failures_total", help, self.audit.failures());
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
