//! The ingress of a proxy: it finds the project's host and passes on; the host
//! decides.

use std::{
    fmt,
    future::{Future, pending},
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use cocalc_core::{
    BoxError,
    auth::{Denial, Secret},
    chain,
    connector::{self, Connector, Service},
    ids::{Epoch, HostId, ProjectId},
    router::{self, Router},
};
use http::{
    HeaderMap, Method, Request, Response, StatusCode, Uri, header, request::Parts, uri::PathAndQuery,
};
use http_body_util::BodyExt;
use hyper::{
    body::{Body as _, Incoming},
    upgrade::OnUpgrade,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    sync::broadcast::error::RecvError,
    time::{Instant, timeout, timeout_at},
};
use tokio_util::sync::DropGuard;

use crate::{
    body::Body,
    cookies, credential,
    failures::Failures,
    headers::{
        self, X_FORWARDED_FOR, X_FORWARDED_HOST, X_FORWARDED_PREFIX, X_FORWARDED_PROTO, check_request,
    },
    host::{Endpoints, Stats},
    limits::Limits,
    path::{Origin, SESSION_PATH, Served, Target, What},
    pool::{Key, Lease, Pool},
    problem::{CODE_HEADER, Problem, wants_page},
    server::{Client, Connection, Handler, Server},
    tls::Tls,
    upstream::{self, Codes},
    websocket::{self, Wish},
    wire,
};

const CODES: Codes =
    Codes { what: "The project's host", failed: "host_unreachable", timed_out: "host_timeout" };

/// Requests with a body up to this size can be sent again, to another host.
const REPLAY_BYTES_MAX: u64 = 64 * 1024;

/// How long to wait for the news of a move that a host has already told of.
const NEWS_WAIT: Duration = Duration::from_secs(2);

/// Checks what a proxy can check of a connect token: signature, time and
/// project. It never redeems one, and does not decide.
pub trait TokenPrecheck: fmt::Debug + Send + Sync + 'static {
    /// Refuses a token that its host would certainly refuse, and says which
    /// host it is for, if that is known.
    ///
    /// # Errors
    ///
    /// The reason, as the host would give it.
    fn verify(&self, token: &Secret, project: ProjectId) -> Result<Option<TokenHost>, Denial>;
}

/// The only host that redeems a token.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct TokenHost {
    /// Which host.
    pub host: HostId,
    /// As owner in which epoch.
    pub epoch: Epoch,
}

/// Carries HTTP and WebSocket to the hosts of projects, for users who cannot
/// reach them.
///
/// Cloning is cheap and shares everything; when the last clone is dropped,
/// what is still open is closed.
#[derive(Clone, Debug)]
pub struct ProxyIngress {
    inner: Arc<Inner>,
    _closing: Arc<DropGuard>,
}

/// Builds a [`ProxyIngress`].
#[derive(Debug)]
pub struct ProxyIngressBuilder {
    router: Arc<dyn Router>,
    connector: Arc<dyn Connector>,
    precheck: Arc<dyn TokenPrecheck>,
    endpoints: Option<Arc<dyn Endpoints>>,
    decoy: Decoy,
    served: Served,
    https: bool,
    tls: Option<Tls>,
    limits: Limits,
}

/// Which host answers for a project that nobody knows.
#[derive(Clone)]
struct Decoy(Arc<dyn Fn(ProjectId) -> Option<HostId> + Send + Sync>);

impl fmt::Debug for Decoy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Decoy")
    }
}

#[derive(Debug)]
struct Inner {
    decoy: Decoy,
    router: Arc<dyn Router>,
    connector: Arc<dyn Connector>,
    precheck: Arc<dyn TokenPrecheck>,
    endpoints: Option<Arc<dyn Endpoints>>,
    served: Served,
    https: bool,
    tls: Option<Tls>,
    limits: Limits,
    pool: Arc<Pool>,
    server: Arc<Server>,
    failures: Failures,
    requests: AtomicU64,
    denied: AtomicU64,
    websockets: AtomicU64,
}

impl ProxyIngress {
    /// Begins a proxy that asks `router` where projects are, reaches hosts
    /// through `connector`, and turns bad tokens away by `precheck`.
    pub fn builder(
        router: Arc<dyn Router>,
        connector: Arc<dyn Connector>,
        precheck: Arc<dyn TokenPrecheck>,
    ) -> ProxyIngressBuilder {
        ProxyIngressBuilder {
            router,
            connector,
            precheck,
            endpoints: None,
            decoy: Decoy(Arc::new(|_| None)),
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
        inner.server.serve(inner, &inner.pool, listener, inner.tls.as_ref(), shutdown).await;
    }

    /// Serves one connection to its end.
    pub async fn serve_connection(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        peer: Option<IpAddr>,
    ) {
        let connection = self.inner.server.connection(Client { address: peer, trusted: false });
        self.inner.server.clone().run(self.inner.clone(), stream, connection).await;
    }

    /// Answers one request that somebody else's hyper server has read; see
    /// [`HostIngress::handle`](crate::HostIngress::handle).
    pub async fn handle<B>(&self, request: Request<B>, client: Client) -> Response<Body>
    where
        B: hyper::body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        let connection = self.inner.server.connection(client);
        self.inner.clone().handle(request.map(Body::new), connection).await
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

impl ProxyIngressBuilder {
    /// Names and base path. Default: loopback literals, no base path.
    pub fn served(mut self, served: Served) -> Self {
        self.served = served;
        self
    }

    /// Whether users come over HTTPS, because something in front terminates
    /// it. Default: no.
    pub fn https(mut self, https: bool) -> Self {
        self.https = https;
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

    /// Which host is asked about a project that nobody knows, when whoever asks
    /// has proved nothing: it refuses them as it refuses everybody, so that
    /// neither answer nor time tells such a project from others. Default: none,
    /// the proxy refuses by itself.
    pub fn decoy(mut self, host: impl Fn(ProjectId) -> Option<HostId> + Send + Sync + 'static) -> Self {
        self.decoy = Decoy(Arc::new(host));
        self
    }

    /// Bounds. Default: [`Limits::default`].
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// The ingress. It listens nowhere yet.
    pub fn build(mut self) -> ProxyIngress {
        // What its host may need before it asks the app. The host's answer that
        // the app is late says more than this one's that the host is.
        let before = self.limits.parked_wait + self.limits.connect_timeout * 4;
        self.limits.response_timeout += before;
        let server = Arc::new(Server::new(self.limits.clone()));
        let closing = Arc::new(server.closing().clone().drop_guard());
        let inner = Inner {
            decoy: self.decoy,
            router: self.router,
            connector: self.connector,
            precheck: self.precheck,
            endpoints: self.endpoints,
            served: self.served,
            https: self.https || self.tls.is_some(),
            tls: self.tls,
            pool: Pool::new(&self.limits),
            failures: Failures::new(self.limits.failures_per_source, self.limits.failure_recovery),
            limits: self.limits,
            server,
            requests: AtomicU64::new(0),
            denied: AtomicU64::new(0),
            websockets: AtomicU64::new(0),
        };
        ProxyIngress { inner: Arc::new(inner), _closing: closing }
    }
}

/// A request in the form in which every host understands it.
struct Outgoing {
    method: Method,
    uri: Uri,
    headers: HeaderMap,
}

impl Handler for Inner {
    async fn handle(self: Arc<Self>, mut request: Request<Body>, connection: Connection) -> Response<Body> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        let browser = wants_page(request.headers());
        let upgrading = request.headers().contains_key(header::UPGRADE);
        let upgrade = upgrading.then(|| hyper::upgrade::on(&mut request));
        let (parts, body) = request.into_parts();
        match self.answer(parts, body, upgrade, connection).await {
            Ok(response) => response,
            Err(problem) => problem.response(browser),
        }
    }
}

impl Inner {
    async fn answer(
        &self,
        parts: Parts,
        body: Body,
        upgrade: Option<OnUpgrade>,
        connection: Connection,
    ) -> Result<Response<Body>, Problem> {
        let authority = check_request(&parts)?;
        let wish = websocket::wish(&parts, !body.is_end_stream())?;
        let origin = self.served.origin(&authority).ok_or_else(crate::host::unknown_host)?;
        let uri = parts.uri.clone();
        let mut only = None;
        let (project, path, body) =
            match self.served.target(origin, uri.path()).ok_or_else(Problem::not_found)? {
                Target::Own(SESSION_PATH) => {
                    self.patient(connection.client)?;
                    let (project, body) = crate::host::claimed(&parts, body).await?;
                    (project, format!("/{project}{SESSION_PATH}"), body)
                }
                Target::Own(path) => {
                    let endpoints = self.endpoints.as_ref().ok_or_else(Problem::not_found)?;
                    let request = Request::from_parts(parts, body);
                    let answer = endpoints.answer(path, request, connection.client).await;
                    return answer.ok_or_else(Problem::not_found);
                }
                Target::Project(place) => {
                    self.patient(connection.client)?;
                    only = self.precheck(&parts, place.project, place.what).inspect_err(|problem| {
                        if problem.failure {
                            self.failures.count(connection.client.address, Instant::now());
                        }
                    })?;
                    let path = match origin {
                        Origin::Base => uri.path().get(self.served.base().len()..).unwrap_or("/").to_owned(),
                        _ => uri.path().to_owned(),
                    };
                    (place.project, path, body)
                }
            };
        let outgoing = self.outgoing(parts, origin, &authority, path, wish, connection.client)?;
        let websocket = wish == Wish::WebSocket;
        let (response, lease) =
            self.send(project, outgoing, body, websocket, only).await.map_err(|problem| {
                if problem.code == wire::PROJECT_MOVED && problem.status == StatusCode::MISDIRECTED_REQUEST {
                    // The address stays what it was; what is needed is another token.
                    let scheme = if self.https { "https" } else { "http" };
                    Problem { location: Some(format!("{scheme}://{authority}{}", uri.path())), ..problem }
                } else {
                    problem
                }
            })?;
        self.pass_back(response, lease, upgrade.filter(|_| websocket), connection)
    }

    /// Turns away whom this proxy has denied too often. What hosts deny, they
    /// count.
    fn patient(&self, client: Client) -> Result<(), Problem> {
        self.failures.check(client.address, Instant::now()).map_err(|denial| {
            self.denied.fetch_add(1, Ordering::Relaxed);
            Problem::from(denial)
        })
    }

    /// Turns away what its host would certainly turn away.
    fn precheck(
        &self,
        parts: &Parts,
        project: ProjectId,
        what: What<'_>,
    ) -> Result<Option<TokenHost>, Problem> {
        let bearer = credential::bearer(&parts.headers).map_err(|denial| self.denied(project, &denial))?;
        let query =
            credential::query_token(parts.uri.query()).map_err(|denial| self.denied(project, &denial))?;
        let ours = bearer.filter(|token| credential::is_connect_token(token));
        if let Some(token) = ours.or(query) {
            let checked = self.precheck.verify(&Secret::new(token), project);
            return checked.map_err(|denial| self.denied(project, &denial));
        }
        // A form may carry a token, too.
        let posts = what == What::Session;
        if bearer.is_none() && !posts && !cookies::has_session(&parts.headers) {
            return Err(self.denied(project, &Denial::Unauthenticated));
        }
        Ok(None)
    }

    fn outgoing(
        &self,
        parts: Parts,
        origin: Origin,
        authority: &str,
        path: String,
        wish: Wish,
        client: Client,
    ) -> Result<Outgoing, Problem> {
        let target = match parts.uri.query() {
            Some(query) => format!("{path}?{query}"),
            None => path,
        };
        let target = PathAndQuery::try_from(target)
            .map_err(|_| Problem::bad_request("The address cannot be forwarded."))?;
        let domain = wire::INTERNAL_DOMAIN;
        let host = match origin {
            Origin::Base => domain.to_owned(),
            Origin::Project(project) => format!("{project}.{domain}"),
            Origin::Port(project, port) => format!("{port}--{project}.{domain}"),
        };
        let mut fields = parts.headers;
        headers::pass_request(&mut fields);
        headers::remove_forwarding(&mut fields);
        headers::set(&mut fields, header::HOST, &host);
        headers::set(&mut fields, X_FORWARDED_HOST, authority);
        headers::set(&mut fields, X_FORWARDED_PROTO, if self.https { "https" } else { "http" });
        if let Some(source) = client.address {
            headers::set(&mut fields, X_FORWARDED_FOR, &source.to_string());
        }
        if origin == Origin::Base && !self.served.base().is_empty() {
            headers::set(&mut fields, X_FORWARDED_PREFIX, self.served.base());
        }
        if wish == Wish::WebSocket {
            websocket::switching(&mut fields);
        }
        Ok(Outgoing { method: parts.method, uri: target.into(), headers: fields })
    }

    /// Sends the request to the project's host, and once more to the next one
    /// if the project has moved meanwhile.
    async fn send(
        &self,
        project: ProjectId,
        mut outgoing: Outgoing,
        body: Body,
        fresh: bool,
        only: Option<TokenHost>,
    ) -> Result<(Response<Incoming>, Lease), Problem> {
        let (mut host, mut epoch) = self.route(project, only.is_some()).await?;
        if let Some(token) = only.filter(|token| token.epoch > epoch) {
            // The token was made after a move that this proxy has not heard of
            // yet. Its host decides for itself.
            (host, epoch) = (token.host, token.epoch);
        }
        let body = self.replayable(body).await?;
        let spare = body.replay();
        if spare.is_some() {
            // It is here already: its sender was told to go on.
            outgoing.headers.remove(header::EXPECT);
        }
        let request = |body: Body| {
            let mut request = Request::new(body);
            *request.method_mut() = outgoing.method.clone();
            *request.uri_mut() = outgoing.uri.clone();
            *request.headers_mut() = outgoing.headers.clone();
            request
        };
        let moving =
            || Problem::unavailable(wire::PROJECT_MOVED, "The project has just moved. Try again.", 1);
        let mut next = request(body);
        for attempt in 0..2 {
            if only.is_some_and(|token| token.host != host) {
                return Err(token_moved(host, epoch));
            }
            let dial = || self.dial(host);
            let (response, lease) =
                upstream::exchange(&self.pool, Key::Host(host), &self.limits, CODES, next, fresh, dial)
                    .await?;
            let Some(moved) = moved(&response) else { return Ok((response, lease)) };
            let Some(body) = spare.as_ref().and_then(Body::replay).filter(|_| attempt == 0) else { break };
            drop((response, lease));
            (host, epoch) = self.next_host(project, moved).await;
            tracing::debug!(%project, %host, "following a move");
            next = request(body);
        }
        Err(moving())
    }

    /// Reads a small body in, so that it can be sent twice.
    async fn replayable(&self, body: Body) -> Result<Body, Problem> {
        if body.size_hint().exact().is_none_or(|bytes| bytes == 0 || bytes > REPLAY_BYTES_MAX) {
            return Ok(body);
        }
        match timeout(self.limits.body_idle, body.collect()).await {
            Ok(Ok(collected)) => Ok(Body::full(collected.to_bytes())),
            Ok(Err(_)) => Err(Problem::bad_request("The request's body is incomplete.")),
            Err(_) => {
                let problem = Problem::new(
                    StatusCode::REQUEST_TIMEOUT,
                    "request_timeout",
                    "The request's body did not arrive.",
                );
                Err(Problem { close: true, ..problem })
            }
        }
    }

    /// Where a project is. For one that nobody knows, somebody who has proved
    /// nothing is sent to some host, which refuses them as it refuses everybody:
    /// an answer of this proxy's would differ, and come sooner.
    async fn route(&self, project: ProjectId, proved: bool) -> Result<(HostId, Epoch), Problem> {
        match timeout(self.limits.connect_timeout, self.router.route(project)).await {
            Ok(Ok(route)) => Ok((route.host, route.epoch)),
            Ok(Err(router::Error::NotFound { .. })) => match (self.decoy.0)(project) {
                Some(host) if !proved => Ok((host, Epoch::FIRST)),
                _ => Err(self.denied(project, &Denial::NotHere("no route".to_owned()))),
            },
            Ok(Err(error)) => {
                tracing::warn!(%project, error = %chain(&error), "no route");
                Err(no_route())
            }
            Err(_) => Err(no_route()),
        }
    }

    /// The new owner: as the router says, or else as the old owner does, whose
    /// word costs nothing, because the next host decides for itself.
    async fn next_host(&self, project: ProjectId, told: (HostId, Epoch)) -> (HostId, Epoch) {
        let until = Instant::now() + NEWS_WAIT;
        let mut changes = self.router.changes();
        loop {
            match timeout_at(until, self.router.route(project)).await {
                Ok(Ok(route)) if route.epoch >= told.1 => return (route.host, route.epoch),
                Ok(_) => {}
                Err(_) => return told,
            }
            match timeout_at(until, changes.recv()).await {
                Ok(Ok(_) | Err(RecvError::Lagged(_))) => {}
                Ok(Err(RecvError::Closed)) | Err(_) => return told,
            }
        }
    }

    async fn dial(&self, host: HostId) -> Result<cocalc_core::stream::BoxStream, Problem> {
        let limit = self.limits.connect_timeout;
        let opened = timeout(limit, self.connector.open(host, Service::Http, None, limit)).await;
        match opened {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(connector::Error::TimedOut { .. })) | Err(_) => {
                Err(Problem::gateway_timeout(CODES.timed_out, "The project's host does not answer."))
            }
            Ok(Err(error)) => {
                tracing::warn!(%host, error = %chain(&error), "cannot reach a host");
                Err(Problem::bad_gateway(CODES.failed, "The project's host cannot be reached."))
            }
        }
    }

    fn pass_back(
        &self,
        mut response: Response<Incoming>,
        lease: Lease,
        upgrade: Option<OnUpgrade>,
        connection: Connection,
    ) -> Result<Response<Body>, Problem> {
        let switched = websocket::is_switched(response.status(), response.headers());
        if let (Some(client), true) = (upgrade, switched) {
            let upstream = hyper::upgrade::on(&mut response);
            let upstream = async move { Ok(upstream::boxed(upstream.await?)) };
            // The host ends it when the right to it is withdrawn.
            lease.leave();
            upstream::join(&connection, &self.limits, client, upstream, pending(), None);
            self.websockets.fetch_add(1, Ordering::Relaxed);
            let (mut parts, _) = response.into_parts();
            headers::pass_response(&mut parts.headers);
            websocket::switching(&mut parts.headers);
            return Ok(Response::from_parts(parts, Body::empty()));
        }
        if response.status().is_informational() {
            return Err(Problem::bad_gateway(CODES.failed, "The project's host answered nonsense."));
        }
        let (mut parts, body) = response.into_parts();
        headers::pass_response(&mut parts.headers);
        parts.extensions.clear();
        Ok(Response::from_parts(parts, Body::incoming(body).returning(lease)))
    }

    fn denied(&self, project: ProjectId, denial: &Denial) -> Problem {
        self.denied.fetch_add(1, Ordering::Relaxed);
        tracing::info!(%project, reason = %denial, "denied");
        Problem::from(denial)
    }
}

/// The project has moved, and the token is for its former host. Only who has
/// shown an authentic token for the project hears so.
fn token_moved(host: HostId, epoch: Epoch) -> Problem {
    let message = "The project is on another host now. Ask for a new token.";
    Problem::new(StatusCode::MISDIRECTED_REQUEST, wire::PROJECT_MOVED, message)
        .header(wire::HOST_HEADER, host.to_string())
        .header(wire::EPOCH_HEADER, epoch.to_string())
}

fn no_route() -> Problem {
    Problem::unavailable("route_unavailable", "Where the project is cannot be found out now.", 2)
}

/// The new owner, if a host says that the project has moved. Apps cannot say
/// so: hosts remove this field from what they send.
fn moved(response: &Response<Incoming>) -> Option<(HostId, Epoch)> {
    let field = |name| response.headers().get(name).and_then(|value| value.to_str().ok());
    if response.status() != StatusCode::MISDIRECTED_REQUEST || field(CODE_HEADER) != Some(wire::PROJECT_MOVED)
    {
        return None;
    }
    Some((field(wire::HOST_HEADER)?.parse().ok()?, field(wire::EPOCH_HEADER)?.parse().ok()?))
}
