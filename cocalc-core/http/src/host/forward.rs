//! A request to an app, and its response.

use std::{sync::Arc, time::Duration};

use cocalc_core::{
    activity::{Meter, Source, Tap, Use},
    auth::{Admission, Denial, Principal},
    chain,
    ids::{Action, Epoch, ProjectId, Scope},
    runner,
    stream::BoxStream,
    wake::Awake,
};
use http::{HeaderName, Request, Response, StatusCode, header, uri::PathAndQuery};
use hyper::{
    body::{Body as _, Incoming},
    upgrade::OnUpgrade,
};
use tokio::time::{sleep, timeout};

use super::{Asked, Inner, Rest, respond::App, session::question};
use crate::{
    body::Body,
    headers::{self, X_FORWARDED_FOR, X_FORWARDED_HOST, X_FORWARDED_PREFIX, X_FORWARDED_PROTO},
    path::What,
    pool::{Key, Lease},
    problem::Problem,
    server::Connection,
    upstream::{self, Codes},
    websocket::{self, Wish},
};

const CODES: Codes = Codes { what: "The app", failed: "app_error", timed_out: "app_timeout" };

/// A request that waits longer than this is watched for a change of rights.
const SHORT: Duration = Duration::from_millis(200);

const WAKE_LIMIT: Duration = Duration::from_secs(5);

/// Who a request is for, once it was admitted.
struct Watch<'a> {
    inner: &'a Inner,
    principal: &'a Principal,
    project: ProjectId,
    action: Action,
    admission: Option<Arc<Admission>>,
    meter: Option<Meter>,
    kind: Use,
}

impl Watch<'_> {
    /// Registers the connection, once.
    async fn admit(&mut self) -> Result<Arc<Admission>, Problem> {
        if let Some(admission) = &self.admission {
            return Ok(admission.clone());
        }
        let admitted = self.inner.auth.admit(self.principal, self.project, self.action).await;
        let admission = Arc::new(admitted.map_err(|denial| self.inner.denied(self.project, &denial))?);
        self.admission = Some(admission.clone());
        Ok(admission)
    }
}

impl Watch<'_> {
    /// Registers the connection if it goes on for longer, and resolves when that is
    /// refused, or its right ends.
    fn later(&self, connection: &Connection) -> impl Future<Output = Denial> + Send + 'static {
        let (auth, principal) = (Arc::clone(&self.inner.auth), self.principal.clone());
        let (project, action, connection) = (self.project, self.action, connection.clone());
        async move {
            sleep(SHORT).await;
            match auth.admit(&principal, project, action).await {
                Ok(admission) => connection.bound(Arc::new(admission)).await,
                Err(denial) => denial,
            }
        }
    }
}

async fn revoked(admission: Arc<Admission>) -> Denial {
    admission.revoked().await
}

impl Inner {
    pub(super) async fn forward(
        &self,
        asked: Asked<'_>,
        rest: Rest,
        principal: &Principal,
        action: Action,
        (epoch, port): (Epoch, u16),
    ) -> Result<Response<Body>, Problem> {
        let project = asked.place.project;
        let app = App::of(&asked, principal);
        let websocket = asked.wish == Wish::WebSocket;
        let (meter, kind) = (self.meter(project), use_of(&asked.parts, websocket));
        let tap = meter.as_ref().map(|meter| meter.tap(Source::Http, kind));
        tap.iter().for_each(Tap::moved);
        let mut watch = Watch { inner: self, principal, project, action, admission: None, meter, kind };
        let Rest { body, upgrade, connection } = rest;
        let mut request = outgoing(asked, body.metered(tap))?;
        let upgrade = upgrade.filter(|_| websocket);

        if websocket || upstream::is_long(request.body()) {
            let admission = watch.admit().await?;
            request = request.map(|body| body.until(revoked(admission)));
        }
        let dial = || self.dial(project, port);
        let exchange = upstream::exchange(
            &self.pool,
            Key::App(project, epoch, port),
            &self.limits,
            CODES,
            request,
            websocket,
            dial,
        );
        let mut exchange = std::pin::pin!(exchange);
        let mut early = None;
        if watch.admission.is_none() {
            tokio::select! {
                response = exchange.as_mut() => early = Some(response),
                () = sleep(SHORT) => {}
            }
        }
        let (response, lease) = match early {
            Some(response) => response?,
            None => {
                let admission = watch.admit().await?;
                tokio::select! {
                    response = exchange.as_mut() => response?,
                    denial = revoked(admission) => return Err(self.denied(project, &denial)),
                }
            }
        };
        self.pass_back(response, lease, watch, app, upgrade, connection).await
    }

    /// Turns the app's response into the user's.
    async fn pass_back(
        &self,
        mut response: Response<Incoming>,
        lease: Lease,
        mut watch: Watch<'_>,
        app: App,
        upgrade: Option<OnUpgrade>,
        connection: Connection,
    ) -> Result<Response<Body>, Problem> {
        let switched = websocket::is_switched(response.status(), response.headers());
        if let (Some(client), true) = (upgrade, switched) {
            let admission = watch.admit().await?;
            let upstream = hyper::upgrade::on(&mut response);
            let upstream = async move { Ok(upstream::boxed(upstream.await?)) };
            let ended = async move { drop(revoked(admission).await) };
            lease.leave();
            upstream::join(&connection, &self.limits, client, upstream, ended, watch.meter);
            self.websockets.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let (mut parts, _) = response.into_parts();
            app.filter(&mut parts.headers);
            websocket::switching(&mut parts.headers);
            return Ok(Response::from_parts(parts, Body::empty()));
        }
        if response.status().is_informational() {
            return Err(Problem::bad_gateway(
                "app_error",
                "The app switched to a protocol nobody asked for.",
            ));
        }
        let (mut parts, body) = response.into_parts();
        app.filter(&mut parts.headers);
        // Only what hyper needs to write it is kept.
        parts.extensions.clear();
        tell_of_idle_stop(&mut parts.headers, watch.meter.as_ref());
        // Events that an app pushes are seen by nobody, perhaps.
        let pushed = parts.headers.get(header::CONTENT_TYPE).is_some_and(|kind| {
            kind.as_bytes().get(..17).is_some_and(|kind| kind.eq_ignore_ascii_case(b"text/event-stream"))
        });
        let kind = if pushed { Use::Presence } else { watch.kind };
        let tap = watch.meter.as_ref().map(|meter| meter.tap(Source::Http, kind));
        let mut body = Body::incoming(body).metered(tap);
        if upstream::is_long(&body) || watch.admission.is_some() {
            body = body.until(connection.bound(watch.admit().await?));
        } else if !body.is_end_stream() {
            // It may take its time, however short it says it is.
            body = body.until_late(watch.later(&connection));
        }
        Ok(Response::from_parts(parts, body.returning(lease)))
    }

    /// Connects to a port of the project, starting the project if it must be.
    async fn dial(&self, project: ProjectId, port: u16) -> Result<BoxStream, Problem> {
        match self.dial_once(project, port).await {
            Err(runner::Error::NotRunning { .. }) => {
                self.wake(project).await?;
                self.dial_once(project, port).await.map_err(|error| refused(project, port, &error))
            }
            dialed => dialed.map_err(|error| refused(project, port, &error)),
        }
    }

    async fn dial_once(&self, project: ProjectId, port: u16) -> Result<BoxStream, runner::Error> {
        let limit = self.limits.connect_timeout;
        match timeout(limit, self.runner.dial(project, port)).await {
            Ok(dialed) => dialed,
            Err(_) => Err(runner::Error::TimedOut { project, operation: "dial", limit }),
        }
    }

    /// Returns when the project runs; while it is on its way, that is said.
    async fn wake(&self, project: ProjectId) -> Result<(), Problem> {
        let Some(wake) = &self.wake else {
            return Err(Problem::unavailable("project_stopped", "The project is not running.", 5));
        };
        match timeout(WAKE_LIMIT, wake.wake(project)).await {
            Ok(Awake::Running) => Ok(()),
            Ok(Awake::Starting { phase }) => {
                let message = format!("The project is starting: {phase}.");
                Err(Problem { refresh: true, ..Problem::unavailable("project_starting", message, 1) })
            }
            Ok(Awake::Failed { reason }) => {
                let message = format!("The project cannot be started: {reason}.");
                Err(Problem::unavailable("project_failed", message, 10))
            }
            Ok(_) | Err(_) => {
                let problem = Problem::unavailable("project_starting", "The project is starting.", 2);
                Err(Problem { refresh: true, ..problem })
            }
        }
    }

    /// The project's own page, or for programs that it runs. It starts the
    /// project, and shows meanwhile how far that is.
    pub(super) async fn front_page(
        &self,
        project: ProjectId,
        asked: &Asked<'_>,
        principal: &Principal,
    ) -> Result<Response<Body>, Problem> {
        if !matches!(asked.parts.method, http::Method::GET | http::Method::HEAD) {
            let problem =
                Problem::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", "This page is only read.");
            return Err(problem.header("allow", "GET, HEAD".to_owned()));
        }
        let status = timeout(self.limits.connect_timeout, self.runner.status(project)).await;
        let running = match status {
            Ok(Ok(status)) => status.state == runner::State::Running,
            Ok(Err(error)) => {
                tracing::warn!(%project, error = %chain(&error), "no status");
                return Err(Problem::unavailable("status_unavailable", "The project's state is unknown.", 5));
            }
            Err(_) => {
                return Err(Problem::unavailable("status_unavailable", "The project's state is unknown.", 5));
            }
        };
        let meter = self.meter(project);
        if let Some(meter) = &meter {
            meter.tap(Source::Http, use_of(&asked.parts, false)).moved();
        }
        if !running && let Err(problem) = self.wake(project).await {
            // What it says may be secret from who only sees some of its apps.
            let decision = self.auth.authorize(principal, project, Action::Use(Scope::Ws)).await;
            let mut problem = problem;
            if decision.outcome.is_ok() {
                let log = super::page::log_tail(&self.runner, project).await;
                problem.details.get_or_insert_default().log = log;
            }
            return Err(problem);
        }
        let stops_in = meter.and_then(|meter| meter.stops_in()).map(|left| left.as_secs());
        if crate::problem::wants_page(&asked.parts.headers) {
            return Ok(self.project_page(asked, principal, stops_in).await);
        }
        let json = serde_json::json!({
            "project": project.to_string(), "state": "running", "idle_stop_secs": stops_in,
        });
        let mut response = Response::new(Body::from(json.to_string()));
        headers::set(response.headers_mut(), header::CONTENT_TYPE, "application/json");
        headers::set(response.headers_mut(), header::CACHE_CONTROL, "no-store");
        Ok(response)
    }
}

/// What a request says of its user: a page that is only open reads in the
/// background, and opens its WebSocket anew when that breaks. Programs that are
/// no browsers ask because somebody wants them to.
fn use_of(parts: &http::request::Parts, websocket: bool) -> Use {
    let is = |name: &str, value: &str| {
        parts.headers.get(name).is_some_and(|field| field.as_bytes().eq_ignore_ascii_case(value.as_bytes()))
    };
    let reads = matches!(parts.method, http::Method::GET | http::Method::HEAD);
    let by_script = is("sec-fetch-dest", "empty") && !is("sec-fetch-user", "?1");
    if reads && (by_script || websocket) { Use::Presence } else { Use::Work }
}

/// Says in how many seconds an idle project is stopped, if its users are warned.
fn tell_of_idle_stop(fields: &mut http::HeaderMap, meter: Option<&Meter>) {
    if let Some(left) = meter.and_then(Meter::stops_in) {
        headers::set(fields, HeaderName::from_static("cocalc-idle-stop"), &left.as_secs().to_string());
    }
}

/// Why an app cannot be reached, for its user.
fn refused(project: ProjectId, port: u16, error: &runner::Error) -> Problem {
    match error {
        runner::Error::Refused { .. } => {
            Problem::bad_gateway("app_refused", format!("Nothing listens on port {port} in the project."))
        }
        runner::Error::NotRunning { .. } => {
            Problem::unavailable("project_stopped", "The project is not running.", 2)
        }
        runner::Error::TimedOut { .. } => {
            Problem::gateway_timeout("app_timeout", format!("Port {port} does not accept connections."))
        }
        error => {
            tracing::warn!(%project, port, error = %chain(error), "cannot reach an app");
            Problem::bad_gateway("app_error", format!("Port {port} cannot be reached."))
        }
    }
}

/// The request as the app sees it: nothing of ours, nothing pretended.
fn outgoing(asked: Asked<'_>, body: Body) -> Result<Request<Body>, Problem> {
    let Asked { parts, wish, view, place, .. } = asked;
    let query = question(&parts.uri);
    let (path, prefix) = match place.what {
        What::Proxy { rest: "", prefix, .. } => ("/", Some(prefix)),
        What::Proxy { rest, prefix, .. } => (rest, Some(prefix)),
        _ => (parts.uri.path(), None),
    };
    let target = if prefix.is_none() && !view.prefix.is_empty() && !place.mount.is_empty() {
        PathAndQuery::try_from(format!("{}{path}{query}", view.prefix))
    } else {
        PathAndQuery::try_from(format!("{path}{query}"))
    };
    let target = target.map_err(|_| Problem::bad_request("The address cannot be forwarded."))?;

    let mut request = Request::new(body);
    *request.method_mut() = parts.method;
    *request.uri_mut() = target.into();
    let mut fields = parts.headers;
    headers::pass_request(&mut fields);
    headers::remove_forwarding(&mut fields);
    headers::set(&mut fields, header::HOST, &view.authority);
    headers::set(&mut fields, X_FORWARDED_HOST, &view.authority);
    headers::set(&mut fields, X_FORWARDED_PROTO, if view.https { "https" } else { "http" });
    if let Some(source) = view.source {
        headers::set(&mut fields, X_FORWARDED_FOR, &source.to_string());
    }
    if let Some(prefix) = prefix {
        headers::set(&mut fields, X_FORWARDED_PREFIX, &format!("{}{prefix}", view.prefix));
    }
    if wish == Wish::WebSocket {
        websocket::switching(&mut fields);
    } else {
        remove_websocket(&mut fields);
    }
    *request.headers_mut() = fields;
    Ok(request)
}

fn remove_websocket(fields: &mut http::HeaderMap) {
    for name in
        ["sec-websocket-key", "sec-websocket-version", "sec-websocket-extensions", "sec-websocket-protocol"]
    {
        fields.remove(HeaderName::from_static(name));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_is_only_open_is_told_from_somebody_who_does_something() {
        let used = |method: &str, fields: &[(&str, &str)]| {
            let mut request = http::Request::builder().method(method).uri("/");
            for (name, value) in fields {
                request = request.header(*name, *value);
            }
            use_of(&request.body(()).unwrap().into_parts().0, false)
        };
        assert_eq!(used("GET", &[("sec-fetch-dest", "empty"), ("sec-fetch-mode", "cors")]), Use::Presence);
        assert_eq!(used("GET", &[("sec-fetch-dest", "document"), ("sec-fetch-user", "?1")]), Use::Work);
        assert_eq!(used("PUT", &[("sec-fetch-dest", "empty")]), Use::Work, "it saves something");
        assert_eq!(used("GET", &[]), Use::Work, "a program");
    }
}
