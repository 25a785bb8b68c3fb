//! The project page's own addresses, below `/.cocalc/` of a project.

use std::sync::Arc;

use cocalc_core::{
    activity::{Source, Use},
    auth::Principal,
    chain,
    ids::{Action, ProjectId, Scope},
    runner::{self, Runner, WindowSize},
};
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode, header};
use serde_json::{Value, json};
use tokio::time::timeout;

use super::{Asked, Inner, Rest, respond::frame_ancestors};
use crate::{
    body::Body,
    cookies, headers,
    page::{
        assets, ports, socket,
        terminals::{OpenError, Terminals, is_name},
    },
    problem::Problem,
    upstream::boxed,
    websocket::{self, Stop, Wish},
};

impl Inner {
    /// Answers for `/.cocalc<path>`; who asks may use the project's pages.
    pub(super) async fn own_page(
        &self,
        asked: Asked<'_>,
        rest: Rest,
        principal: &Principal,
        path: &str,
    ) -> Result<Response<Body>, Problem> {
        let project = asked.place.project;
        let method = asked.parts.method.clone();
        let name = |prefix| path.strip_prefix(prefix);
        if let Some(name) = name("/terminal/").filter(|_| asked.wish == Wish::WebSocket) {
            return self.terminal(asked, rest, principal, name).await;
        }
        if asked.wish == Wish::WebSocket {
            return Err(Problem::not_found());
        }
        let allowed = match path {
            "/stay" => "POST",
            "/terminals" | "/ports" | "/status" | "/snapshots" => "GET, HEAD",
            path if path.starts_with("/assets/") => "GET, HEAD",
            path if path.starts_with("/terminal/") => "DELETE",
            _ => return Err(Problem::not_found()),
        };
        if !allowed.split(", ").any(|one| one == method.as_str()) {
            let message = "This address has other methods.";
            let problem = Problem::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message);
            return Err(problem.header("allow", allowed.to_owned()));
        }
        let mut response = match path {
            "/status" => self.page_status(project, principal).await?,
            "/ports" => {
                self.authorize(principal, project, Action::Use(Scope::Ws)).await?;
                let ports = ports::answering(&self.runner, project).await;
                answer(&json!({ "ports": ports.map_err(|error| not_open(project, &error))? }))
            }
            "/terminals" => {
                self.authorize(principal, project, Action::Use(Scope::Ws)).await?;
                let open = self.page_terminals()?.list(project);
                let open =
                    open.into_iter().map(|(name, looking)| json!({ "name": name, "looking": looking }));
                answer(&json!({ "terminals": open.collect::<Vec<_>>() }))
            }
            "/snapshots" => {
                self.authorize(principal, project, Action::Write).await?;
                let states = self.former_states(project).await?.into_iter().map(|state| {
                    json!({ "name": state.name, "taken": state.taken.secs(), "automatic": state.automatic })
                });
                answer(&json!({ "snapshots": states.collect::<Vec<_>>() }))
            }
            "/stay" => {
                self.authorize(principal, project, Action::Use(Scope::Ws)).await?;
                if let Some(meter) = self.meter(project) {
                    meter.tap(Source::Http, Use::Work).moved();
                }
                no_content()
            }
            _ => match (name("/terminal/"), name("/assets/")) {
                (Some(name), _) => {
                    self.authorize(principal, project, Action::Use(Scope::Ws)).await?;
                    if !self.page_terminals()?.close(project, name) {
                        return Err(Problem::not_found());
                    }
                    no_content()
                }
                (_, Some(name)) => file(name, asked.parts.uri.query())?,
                _ => return Err(Problem::not_found()),
            },
        };
        if method == Method::HEAD {
            *response.body_mut() = Body::empty();
        }
        Ok(response)
    }

    fn page_terminals(&self) -> Result<&Terminals, Problem> {
        let message = "Terminals are not served on this host.";
        let none = || Problem::new(StatusCode::NOT_FOUND, "not_available", message);
        self.terminals.as_ref().ok_or_else(none)
    }

    /// How the project does; asking starts nothing, and is no use of it.
    async fn page_status(
        &self,
        project: ProjectId,
        principal: &Principal,
    ) -> Result<Response<Body>, Problem> {
        let unknown = || Problem::unavailable("status_unavailable", "The project's state is unknown.", 5);
        let status = timeout(self.limits.connect_timeout, self.runner.status(project)).await;
        let status = status.map_err(|_| unknown())?.map_err(|error| {
            tracing::warn!(%project, error = %chain(&error), "no status");
            unknown()
        })?;
        let stops_in = self.meter(project).and_then(|meter| meter.stops_in()).map(|left| left.as_secs());
        Ok(answer(&json!({
            "project": project.to_string(),
            "account": principal.account.to_string(),
            "state": status.state,
            "reason": status.reason,
            "idle_stop_secs": stops_in,
        })))
    }

    /// A terminal, which is opened if there is none of this name. It starts no
    /// project: a page that is left open would never let one stop.
    async fn terminal(
        &self,
        asked: Asked<'_>,
        rest: Rest,
        principal: &Principal,
        name: &str,
    ) -> Result<Response<Body>, Problem> {
        let project = asked.place.project;
        let terminals = self.page_terminals()?;
        // The WebSocket was authorized by its kind; a shell wants both.
        self.authorize(principal, project, Action::Use(Scope::Http)).await?;
        if !is_name(name) {
            return Err(Problem::not_found());
        }
        let Some(upgrade) = rest.upgrade else { return Err(Problem::not_found()) };
        let asked_for = Query::of(asked.parts.uri.query());
        // Before anything is begun for them, and for as long as it lasts.
        let admitted = self.auth.admit(principal, project, Action::Use(Scope::Ws)).await;
        let admission = admitted.map_err(|denial| self.denied(project, &denial))?;
        let too_many = |what: &str| {
            Problem::new(
                StatusCode::TOO_MANY_REQUESTS,
                "too_many_terminals",
                format!("There are too many {what}."),
            )
        };
        let opened = terminals.open(project, name, asked_for.size).await;
        let terminal = opened.map_err(|error| match error {
            OpenError::Full => too_many("terminals. Close one"),
            OpenError::Runner(error) => not_open(project, &error),
        })?;
        let at = asked_for.at.filter(|_| asked_for.terminal == terminal.id());
        let looks = terminal.attach(at).ok_or_else(|| too_many("windows on this terminal"))?;
        looks.resize(asked_for.size);
        let response = websocket::accept(&asked.parts);
        let (meter, switch) = (self.meter(project), self.limits.connect_timeout);
        let (draining, closing) = (rest.connection.draining.clone(), rest.connection.closing.clone());
        self.websockets.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        rest.connection.spawn(async move {
            let Ok(Ok(upgraded)) = timeout(switch, upgrade).await else { return };
            let stop = async {
                tokio::select! {
                    biased;
                    () = closing.cancelled() => Stop::Now,
                    _ = admission.revoked() => Stop::Revoked,
                    () = draining.cancelled() => Stop::Draining,
                }
            };
            socket::serve(boxed(upgraded), looks, meter, stop).await;
        });
        Ok(response)
    }

    /// The project page itself, for a project that runs.
    pub(super) async fn project_page(
        &self,
        asked: &Asked<'_>,
        principal: &Principal,
        stops_in: Option<u64>,
    ) -> Response<Body> {
        let project = asked.place.project;
        let decision = self.auth.authorize(principal, project, Action::Use(Scope::Ws)).await;
        let told = assets::Told {
            project: &project.to_string(),
            embedder: principal.embed_origin.as_deref(),
            terminals: self.terminals.is_some() && decision.outcome.is_ok(),
            stops_in,
        };
        let mut response = Response::new(Body::from(assets::page(&told)));
        let fields = response.headers_mut();
        headers::set(fields, header::CONTENT_TYPE, "text/html; charset=utf-8");
        headers::set(fields, header::CACHE_CONTROL, "no-store");
        guard(fields);
        // Exactly these files: what else is on this origin is the project's own.
        let place = format!("{}{}", asked.view.prefix, asked.place.mount);
        let policy = policy(&asked.view.authority, asked.view.https, &place);
        headers::set(fields, header::CONTENT_SECURITY_POLICY, &policy);
        fields.append(header::CONTENT_SECURITY_POLICY, frame_ancestors(principal.embed_origin.as_deref()));
        response
    }

    /// `DELETE /.cocalc/session`: this browser forgets its session.
    pub(super) fn forget(&self, asked: &Asked<'_>) -> Response<Body> {
        let mount = format!("{}{}", asked.view.prefix, asked.place.mount);
        let mount = if asked.place.mount.is_empty() { "" } else { &mount };
        let scope = cookies::Scope { mount, https: asked.view.https };
        let mut response = no_content();
        for cookie in cookies::forget_session(self.host, scope) {
            if let Ok(cookie) = HeaderValue::try_from(cookie) {
                response.headers_mut().append(header::SET_COOKIE, cookie);
            }
        }
        response
    }
}

/// What the page may do: run and show its own files, which are at `place`, and
/// ask its own project. Policies know no addresses but loopback's; there the
/// whole origin has to do.
fn policy(authority: &str, https: bool, place: &str) -> String {
    let host = authority.rsplit_once(':').map_or(authority, |(host, _)| host);
    let literal = authority.starts_with('[') || host.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    let (assets, asks) = if literal && host != "127.0.0.1" {
        ("'self'".to_owned(), "'self'".to_owned())
    } else {
        let (scheme, socket) = if https { ("https", "wss") } else { ("http", "ws") };
        let here = format!("{authority}{place}");
        (
            format!("{scheme}://{here}/.cocalc/assets/"),
            format!("{scheme}://{here}/ {socket}://{here}/.cocalc/"),
        )
    };
    format!(
        "default-src 'none'; script-src {assets}; style-src {assets} 'unsafe-inline'; img-src 'self' data:; \
         connect-src {asks}; form-action 'none'; base-uri 'none'"
    )
}

/// What a page asks of a terminal: sizes beyond reason are brought within it.
struct Query<'a> {
    size: WindowSize,
    terminal: &'a str,
    at: Option<u64>,
}

impl<'a> Query<'a> {
    fn of(query: Option<&'a str>) -> Self {
        let find = |name: &str| {
            let mut pairs = query.unwrap_or_default().split('&').filter_map(|pair| pair.split_once('='));
            pairs.find(|(key, _)| *key == name).map(|(_, value)| value)
        };
        let side = |name, usual| {
            let number = find(name).and_then(|number| number.parse::<u16>().ok());
            number.map_or(usual, |number| number.clamp(2, 1000))
        };
        Self {
            size: WindowSize { cols: side("cols", 80), rows: side("rows", 24) },
            terminal: find("terminal").unwrap_or_default(),
            at: find("at").and_then(|at| at.parse().ok()),
        }
    }
}

fn not_open(project: ProjectId, error: &runner::Error) -> Problem {
    match error {
        runner::Error::NotRunning { .. } => {
            Problem::unavailable("project_stopped", "The project is not running.", 2)
        }
        error => {
            tracing::warn!(%project, error = %chain(error), "nothing could be run in a project");
            Problem::bad_gateway("app_error", "Nothing can be run in the project now.")
        }
    }
}

fn answer(value: &Value) -> Response<Body> {
    let mut response = Response::new(Body::from(value.to_string()));
    let fields = response.headers_mut();
    headers::set(fields, header::CONTENT_TYPE, "application/json");
    headers::set(fields, header::CACHE_CONTROL, "no-store");
    guard(fields);
    response
}

fn no_content() -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::NO_CONTENT;
    headers::set(response.headers_mut(), header::CACHE_CONTROL, "no-store");
    response
}

fn guard(fields: &mut HeaderMap) {
    headers::set(fields, header::X_CONTENT_TYPE_OPTIONS, "nosniff");
    headers::set(fields, header::REFERRER_POLICY, "no-referrer");
    headers::set(fields, http::HeaderName::from_static("cross-origin-resource-policy"), "same-origin");
}

/// A file of the page; one that is asked for by version is kept.
fn file(name: &str, query: Option<&str>) -> Result<Response<Body>, Problem> {
    let asset = assets::asset(name).ok_or_else(Problem::not_found)?;
    let mut response = Response::new(Body::full(asset.bytes));
    let fields = response.headers_mut();
    let versioned = query.and_then(|query| query.strip_prefix("v=")) == Some(assets::VERSION.as_str());
    let keep = if versioned { "private, max-age=31536000, immutable" } else { "no-cache" };
    headers::set(fields, header::CONTENT_TYPE, asset.kind);
    headers::set(fields, header::CACHE_CONTROL, keep);
    guard(fields);
    Ok(response)
}

/// What a project's first process wrote last, for who may see everything of it.
pub(super) async fn log_tail(runner: &Arc<dyn Runner>, project: ProjectId) -> Option<String> {
    const LINES: usize = 20;
    const BYTES: usize = 8 * 1024;
    let log = timeout(std::time::Duration::from_secs(1), runner.logs(project, LINES)).await;
    let log = log.ok()?.ok().filter(|log| !log.trim().is_empty())?;
    let start = log.len().saturating_sub(BYTES);
    let start = (start..=log.len()).find(|at| log.is_char_boundary(*at))?;
    Some(log[start..].to_owned())
}
