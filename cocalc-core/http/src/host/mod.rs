//! The ingress of a host: it decides, and reaches the apps.

mod bus;
mod files;
mod forward;
mod moved;
mod page;
mod respond;
mod session;
mod view;

use std::{
    fmt,
    future::Future,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use cocalc_core::{
    BoxError,
    activity::{Meter, Meters},
    auth::{Auth, Context, Credential, Decision, Denial, Principal, Tier, Via},
    ids::{Action, Epoch, HostId, ProjectId, Scope},
    router::{self, Reach, Router},
    runner::Runner,
    wake::Wake,
};
use http::{HeaderMap, Method, Request, Response, StatusCode, header, request::Parts};
use hyper::{body::Body as _, upgrade::OnUpgrade};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    sync::{Semaphore, broadcast::error::RecvError},
    time::{Instant, timeout_at},
};
use tokio_util::sync::DropGuard;

pub use self::bus::{BusEndpoint, Opening};
use self::{files::Raw, view::View};
pub(crate) use self::{session::claimed, view::unknown_host};
use crate::{
    body::Body,
    cookies,
    credential::{self, Shown},
    failures::Failures,
    files::ProjectFiles,
    headers::check_request,
    limits::Limits,
    page::{TerminalLimits, terminals::Terminals},
    path::{Origin, Place, SESSION_PATH, Served, Target, What},
    pool::Pool,
    problem::{Problem, wants_page},
    server::{Client, Connection, Handler, Server},
    tls::Tls,
    websocket::{self, Wish},
};

/// Answers what is asked of the daemon itself: `/healthz`, `/metrics` and the
/// like.
#[async_trait]
pub trait Endpoints: fmt::Debug + Send + Sync + 'static {
    /// Answers a request for `path` (without a base path), or `None` if there
    /// is nothing at that path.
    async fn answer(&self, path: &str, request: Request<Body>, client: Client) -> Option<Response<Body>>;
}

/// Serves projects over HTTP on their own host.
///
/// Cloning is cheap and shares everything; when the last clone is dropped,
/// what is still open is closed.
#[derive(Clone, Debug)]
pub struct HostIngress {
    inner: Arc<Inner>,
    _closing: Arc<DropGuard>,
}

/// Builds a [`HostIngress`].
#[derive(Debug)]
pub struct HostIngressBuilder {
    host: HostId,
    auth: Arc<dyn Auth>,
    router: Arc<dyn Router>,
    runner: Arc<dyn Runner>,
    wake: Option<Arc<dyn Wake>>,
    endpoints: Option<Arc<dyn Endpoints>>,
    bus: Option<Arc<dyn BusEndpoint>>,
    meters: Option<Meters>,
    files: Option<Arc<dyn ProjectFiles>>,
    terminals: Option<TerminalLimits>,
    served: Served,
    https: bool,
    tls: Option<Tls>,
    limits: Limits,
}

/// What an ingress has done since it was built.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[non_exhaustive]
pub struct Stats {
    /// Connections that are open now.
    pub connections: u64,
    /// Requests.
    pub requests: u64,
    /// Requests that were denied.
    pub denied: u64,
    /// WebSockets that began.
    pub websockets: u64,
}

#[derive(Debug)]
struct Inner {
    host: HostId,
    auth: Arc<dyn Auth>,
    router: Arc<dyn Router>,
    runner: Arc<dyn Runner>,
    wake: Option<Arc<dyn Wake>>,
    endpoints: Option<Arc<dyn Endpoints>>,
    bus: Option<Arc<dyn BusEndpoint>>,
    meters: Option<Meters>,
    raw: Option<Raw>,
    terminals: Option<Terminals>,
    served: Served,
    /// What proxies call this host, on connections of their own.
    internal: Served,
    https: bool,
    tls: Option<Tls>,
    limits: Limits,
    pool: Arc<Pool>,
    server: Arc<Server>,
    parked: Semaphore,
    failures: Failures,
    requests: AtomicU64,
    denied: AtomicU64,
    websockets: AtomicU64,
}

impl HostIngress {
    /// Begins an ingress for `host`, which asks `auth` who may do what,
    /// `router` whether a project is here, and `runner` for its ports.
    pub fn builder(
        host: HostId,
        auth: Arc<dyn Auth>,
        router: Arc<dyn Router>,
        runner: Arc<dyn Runner>,
    ) -> HostIngressBuilder {
        HostIngressBuilder {
            host,
            auth,
            router,
            runner,
            wake: None,
            endpoints: None,
            bus: None,
            meters: None,
            files: None,
            terminals: None,
            served: Served::new(),
            https: false,
            tls: None,
            limits: Limits::default(),
        }
    }

    /// Accepts users on `listener` until `shutdown` resolves, then lets open
    /// connections end, for [`Limits::drain`] at most.
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped, its connections are closed.
    pub async fn serve(&self, listener: TcpListener, shutdown: impl Future<Output = ()> + Send) {
        let inner = &self.inner;
        let serving = inner.server.serve(inner, &inner.pool, listener, inner.tls.as_ref(), shutdown);
        tokio::select! {
            () = serving => {}
            () = inner.forget_moved() => {}
        }
    }

    /// Serves one connection to its end. `trusted` is for connections on which
    /// a proxy has proved its identity.
    pub async fn serve_connection(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        peer: Option<IpAddr>,
        trusted: bool,
    ) {
        let connection = self.inner.server.connection(Client { address: peer, trusted });
        self.inner.server.clone().run(self.inner.clone(), stream, connection).await;
    }

    /// Answers one request that somebody else's hyper server has read.
    ///
    /// That server must leave upgrades possible (`with_upgrades`), and is
    /// itself responsible for the framing of requests and for its timeouts.
    pub async fn handle<B>(&self, request: Request<B>, client: Client) -> Response<Body>
    where
        B: hyper::body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        let connection = self.inner.server.connection(client);
        self.inner.clone().handle(request.map(Body::new), connection).await
    }

    /// Asks everything that is open, on whichever listener, to end when what is
    /// under way has ended. Does not wait, and closes nothing by force.
    pub fn ask_to_end(&self) {
        self.inner.server.ask_to_end();
    }

    /// Asks everything that is open, on whichever listener, to end, and closes
    /// it after [`Limits::drain`].
    pub async fn shut_down(&self) {
        self.inner.server.shut_down().await;
        self.inner.pool.clear();
    }

    /// What was done so far.
    pub fn stats(&self) -> Stats {
        Stats {
            connections: self.inner.server.open(),
            requests: self.inner.requests.load(Ordering::Relaxed),
            denied: self.inner.denied.load(Ordering::Relaxed),
            websockets: self.inner.websockets.load(Ordering::Relaxed),
        }
    }
}

impl HostIngressBuilder {
    /// Names and base path. Default: loopback literals, no base path.
    pub fn served(mut self, served: Served) -> Self {
        self.served = served;
        self
    }

    /// Whether users come over HTTPS, because something in front terminates
    /// it. Default: no. Connections of proxies say it themselves.
    pub fn https(mut self, https: bool) -> Self {
        self.https = https;
        self
    }

    /// Starts stopped projects that are asked for. Default: nobody does.
    pub fn wake(mut self, wake: Arc<dyn Wake>) -> Self {
        self.wake = Some(wake);
        self
    }

    /// Speaks TLS on the listeners of `serve`, which means HTTPS. Default: no.
    pub fn tls(mut self, tls: Option<Tls>) -> Self {
        self.tls = tls;
        self
    }

    /// Answers the daemon's own paths. Default: they are 404.
    pub fn endpoints(mut self, endpoints: Arc<dyn Endpoints>) -> Self {
        self.endpoints = Some(endpoints);
        self
    }

    /// Serves the message bus of projects. Default: it is not available.
    pub fn bus(mut self, bus: Arc<dyn BusEndpoint>) -> Self {
        self.bus = Some(bus);
        self
    }

    /// Notes who uses which project. Default: nobody does.
    pub fn meters(mut self, meters: Meters) -> Self {
        self.meters = Some(meters);
        self
    }

    /// Serves raw files of projects, whether these run or not. Default: they
    /// are not available.
    pub fn files(mut self, files: Arc<dyn ProjectFiles>) -> Self {
        self.files = Some(files);
        self
    }

    /// Serves terminals to the project page of who may use everything in the
    /// project: shells that go on when a connection breaks. Default: none.
    pub fn terminals(mut self, limits: TerminalLimits) -> Self {
        self.terminals = Some(limits);
        self
    }

    /// Bounds. Default: [`Limits::default`].
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// The ingress. It listens nowhere yet.
    pub fn build(self) -> HostIngress {
        let server = Arc::new(Server::new(self.limits.clone()));
        let closing = Arc::new(server.closing().clone().drop_guard());
        let terminals = self.terminals.map(|limits| Terminals::new(Arc::clone(&self.runner), limits));
        let inner = Inner {
            terminals,
            host: self.host,
            auth: self.auth,
            router: self.router,
            runner: self.runner,
            wake: self.wake,
            endpoints: self.endpoints,
            bus: self.bus,
            meters: self.meters,
            raw: self.files.map(Raw::new),
            served: self.served,
            internal: view::internal(),
            https: self.https || self.tls.is_some(),
            tls: self.tls,
            pool: Pool::new(&self.limits),
            failures: Failures::new(self.limits.failures_per_source, self.limits.failure_recovery),
            parked: Semaphore::new(self.limits.parked.min(Semaphore::MAX_PERMITS)),
            limits: self.limits,
            server,
            requests: AtomicU64::new(0),
            denied: AtomicU64::new(0),
            websockets: AtomicU64::new(0),
        };
        HostIngress { inner: Arc::new(inner), _closing: closing }
    }
}

/// How much of a body that nobody wants is still read, and for how long.
const DRAIN_BYTES: u64 = 8 << 20;
const DRAIN_TIME: Duration = Duration::from_secs(5);

/// The head of a request for something of a project.
struct Asked<'a> {
    parts: Parts,
    wish: Wish,
    origin: Origin,
    view: View,
    place: Place<'a>,
}

/// What comes with the head.
struct Rest {
    body: Body,
    upgrade: Option<OnUpgrade>,
    connection: Connection,
}

impl Handler for Inner {
    async fn handle(self: Arc<Self>, mut request: Request<Body>, connection: Connection) -> Response<Body> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        let browser = wants_page(request.headers());
        let again = if browser { session::question(request.uri()) } else { String::new() };
        let upgrade =
            request.headers().contains_key(header::UPGRADE).then(|| hyper::upgrade::on(&mut request));
        let (parts, body) = request.into_parts();
        match self.answer(parts, Rest { body, upgrade, connection }).await {
            Ok(response) => response,
            Err(problem) => problem.asked_again(again).response(browser),
        }
    }
}

impl Inner {
    async fn answer(&self, parts: Parts, rest: Rest) -> Result<Response<Body>, Problem> {
        let authority = check_request(&parts)?;
        let wish = websocket::wish(&parts, !rest.body.is_end_stream())?;
        let client = rest.connection.client;
        let (served, origin, view) = self.view(&parts, authority, client)?;
        // Both borrow from the path, which outlives the parts that are sent on.
        let uri = parts.uri.clone();
        let target = served.target(origin, uri.path()).ok_or_else(Problem::not_found)?;
        let source = view.source;
        if !matches!(target, Target::Own(path) if path != SESSION_PATH) {
            self.failures.check(source, Instant::now()).map_err(|denial| {
                self.denied.fetch_add(1, Ordering::Relaxed);
                Problem::from(denial)
            })?;
        }
        let answer = match target {
            Target::Own(SESSION_PATH) => self.claimed_session(parts, rest.body, view).await,
            Target::Own(path) => {
                let endpoints = self.endpoints.as_ref().ok_or_else(Problem::not_found)?;
                let request = Request::from_parts(parts, rest.body);
                endpoints.answer(path, request, client).await.ok_or_else(Problem::not_found)
            }
            Target::Project(place) => {
                let asked = Asked { parts, wish, origin, view, place };
                match asked.place.what {
                    What::Session => self.session(asked, rest.body).await,
                    _ => self.project(asked, rest).await,
                }
            }
        };
        answer.inspect_err(|problem| {
            if problem.failure {
                self.failures.count(source, Instant::now());
            }
        })
    }

    async fn project(&self, mut asked: Asked<'_>, rest: Rest) -> Result<Response<Body>, Problem> {
        let project = asked.place.project;
        let own_origin = asked.place.mount.is_empty();
        let (headers, query) = (&asked.parts.headers, asked.parts.uri.query());
        let shown = credential::find(headers, query, self.host, own_origin, asked.view.https);
        let shown = shown.map_err(|denial| self.denied(project, &denial))?;
        self.check_origin(&asked, &shown)?;
        let principal = self.verify(&shown, project, &asked.view).await?;
        let epoch = match self.here(&asked, project).await {
            Ok(epoch) => epoch,
            Err(problem) => {
                if rest.connection.client.trusted {
                    // A proxy that is still sending would see a broken connection
                    // instead of the answer, and could not say what has happened.
                    rest.connection.spawn(rest.body.drained(DRAIN_BYTES, DRAIN_TIME));
                }
                return Err(problem);
            }
        };

        let web = if asked.wish == Wish::WebSocket { Scope::Ws } else { Scope::Http };
        let action = match asked.place.what {
            What::Files { .. } => files::action(&asked.parts.method),
            What::Bus { .. } => Action::Use(Scope::Bus),
            What::Port { port } | What::Proxy { port, .. } => Action::App { scope: web, port },
            _ => Action::Use(web),
        };
        let decision = self.authorize(&principal, project, action).await?;
        if let Via::Token { once: true, .. } = principal.via
            && let Shown::Bearer(_) = shown
        {
            let denial = Denial::Forbidden("a one-use token is redeemed for a session".to_owned());
            return Err(self.denied(project, &denial));
        }
        if let Shown::Query(_) = shown {
            let navigates = matches!(asked.parts.method, Method::GET | Method::HEAD);
            if navigates && asked.wish != Wish::WebSocket {
                return self.redeem_and_clean(&asked, &principal).await;
            }
            if let Via::Token { once: true, .. } = principal.via {
                // Nobody will use this session, but the token is used up.
                let opened = self.auth.open_session(&principal, project).await;
                opened.map_err(|denial| self.denied(project, &denial))?;
            }
        }
        scrub(&mut asked.parts.headers, &shown);

        let mut response = match asked.place.what {
            What::Bare => session::redirect(&format!("{}{}/", asked.view.prefix, asked.place.mount))?,
            What::Root => self.front_page(project, &asked, &principal).await?,
            What::Page { rest: path } => self.own_page(asked, rest, &principal, path).await?,
            What::Proxy { rest: "", prefix, .. }
                if matches!(asked.parts.method, Method::GET | Method::HEAD)
                    && asked.wish != Wish::WebSocket =>
            {
                // Without the slash, the page's relative links lead elsewhere.
                let query = session::question(&asked.parts.uri);
                session::redirect(&format!("{}{prefix}/{query}", asked.view.prefix))?
            }
            What::Port { port } | What::Proxy { port, .. } => {
                self.forward(asked, rest, &principal, action, (epoch, port)).await?
            }
            What::Bus { .. } => self.bus(asked, rest, principal, action).await?,
            What::Files { rest: path } => self.files(asked, rest, &principal, action, path).await?,
            What::Session => return Err(Problem::not_found()),
        };
        if decision.tier == Tier::Grace {
            let grace = http::HeaderValue::from_static("grace");
            response.headers_mut().insert("cocalc-tier", grace);
        }
        Ok(response)
    }

    /// Closes idle connections to the apps of projects that leave this host,
    /// or come back to it, as soon as that is known. Never returns.
    async fn forget_moved(&self) {
        let mut changes = self.router.changes();
        loop {
            match changes.recv().await {
                Ok(route) => {
                    let here = matches!(route.how, Reach::Local).then_some(route.epoch);
                    self.pool.forget(route.project, here);
                }
                Err(RecvError::Lagged(_)) => self.pool.clear(),
                Err(RecvError::Closed) => std::future::pending().await,
            }
        }
    }

    /// Where the use of a project is noted. For authorized users only.
    fn meter(&self, project: ProjectId) -> Option<Meter> {
        self.meters.as_ref().map(|meters| meters.meter(project))
    }

    /// Proves who shows a credential for `project`.
    async fn verify(&self, shown: &Shown, project: ProjectId, view: &View) -> Result<Principal, Problem> {
        let credential = match shown {
            Shown::Nothing => return Err(self.denied(project, &Denial::Unauthenticated)),
            Shown::Bearer(token) | Shown::Query(token) => Credential::Token(token.clone()),
            Shown::Cookies(found) => return self.session_of(found, project, view).await,
        };
        let context = Context { project, source: view.source };
        let verified = self.auth.verify(&credential, &context).await;
        let principal = verified.map_err(|denial| self.denied(project, &denial))?;
        if principal.project != project {
            let denial = Denial::BadCredential("for another project".to_owned());
            return Err(self.denied(project, &denial));
        }
        Ok(principal)
    }

    /// Proves whose session is among the cookies. What is none does not matter;
    /// sessions of two people do: one of them did not open theirs here.
    async fn session_of(
        &self,
        found: &cookies::Found,
        project: ProjectId,
        view: &View,
    ) -> Result<Principal, Problem> {
        let context = Context { project, source: view.source };
        let conflict = || {
            self.denied(project, &Denial::BadCredential("session cookies of several people".to_owned()));
            let message = "This browser has several people's session cookies for this project, which an app may \
                have set. Delete the cookies of this site, and open the project again.";
            Problem { failure: true, ..Problem::new(StatusCode::FORBIDDEN, "session_conflict", message) }
        };
        if found.crowded {
            return Err(conflict());
        }
        let mut last = Denial::BadCredential("no such session".to_owned());
        for values in &found.spellings {
            let mut proved: Option<Principal> = None;
            for value in values {
                match self.auth.verify(&Credential::Session(value.clone()), &context).await {
                    Ok(principal) if principal.project != project => {}
                    Ok(principal) => match &proved {
                        Some(first) if first.account != principal.account => return Err(conflict()),
                        Some(_) => {}
                        None => proved = Some(principal),
                    },
                    // Nothing can be said of the others either.
                    Err(denial @ (Denial::RateLimited { .. } | Denial::Stale)) => {
                        return Err(self.denied(project, &denial));
                    }
                    Err(denial) => last = denial,
                }
            }
            if let Some(principal) = proved {
                return Ok(principal);
            }
        }
        Err(self.denied(project, &last))
    }

    /// Waits while a move cuts over, and returns when the project is here; who
    /// asks has been authenticated.
    async fn here(&self, asked: &Asked<'_>, project: ProjectId) -> Result<Epoch, Problem> {
        let full = || Problem::unavailable("project_parked", "The project is moving. Try again.", 1);
        let mut waiting = None;
        let until = Instant::now() + self.limits.parked_wait;
        loop {
            // Subscribed before asking, so that no change falls in between.
            let changes = waiting.is_some().then(|| self.router.changes());
            let route = match self.router.route(project).await {
                Ok(route) => route,
                Err(router::Error::NotFound { .. }) => {
                    return Err(self.denied(project, &Denial::NotHere("no route".to_owned())));
                }
                Err(error) => {
                    tracing::warn!(%project, error = %cocalc_core::chain(&error), "no route");
                    let message = "Where the project is cannot be found out now.";
                    return Err(Problem::unavailable("route_unavailable", message, 2));
                }
            };
            match route.how {
                Reach::Local => return Ok(route.epoch),
                Reach::Remote(ref address) => return Err(moved::problem(asked, &route, address)),
                Reach::Parked => {}
                _ => return Err(self.denied(project, &Denial::NotHere("unknown reach".to_owned()))),
            }
            let Some(mut changes) = changes else {
                waiting = Some(self.parked.try_acquire().map_err(|_| full())?);
                continue;
            };
            loop {
                match timeout_at(until, changes.recv()).await {
                    Ok(Ok(change)) if change.project != project => {}
                    Ok(Ok(_) | Err(RecvError::Lagged(_))) => break,
                    Ok(Err(RecvError::Closed)) | Err(_) => return Err(full()),
                }
            }
        }
    }

    async fn authorize(
        &self,
        principal: &Principal,
        project: ProjectId,
        action: Action,
    ) -> Result<Decision, Problem> {
        let decision = self.auth.authorize(principal, project, action).await;
        match &decision.outcome {
            Ok(()) => Ok(decision),
            Err(denial) => Err(self.denied(project, denial)),
        }
    }

    /// Logs why, and says what may be said.
    fn denied(&self, project: ProjectId, denial: &Denial) -> Problem {
        self.denied.fetch_add(1, Ordering::Relaxed);
        tracing::info!(%project, reason = %denial, "denied");
        Problem::from(denial)
    }
}

/// Removes every credential of ours, so that none reaches an app.
fn scrub(headers: &mut HeaderMap, shown: &Shown) {
    cookies::strip(headers);
    let ours = matches!(shown, Shown::Bearer(_))
        || headers.get_all(header::AUTHORIZATION).iter().any(|field| {
            field.to_str().is_ok_and(|field| field.split(' ').any(credential::is_connect_token))
        });
    if ours {
        headers.remove(header::AUTHORIZATION);
    }
    let token = credential::TOKEN_FIELD.as_bytes();
    let has_token =
        |field: &http::HeaderValue| field.as_bytes().windows(token.len()).any(|part| part == token);
    if headers.get_all(header::REFERER).iter().any(has_token) {
        headers.remove(header::REFERER);
    }
}
