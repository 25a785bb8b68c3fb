//! Accepting connections, and ending them.

use std::{
    collections::HashMap,
    convert::Infallible,
    future::Future,
    io,
    net::IpAddr,
    pin::pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use cocalc_core::auth::{Admission, Denial};
use http::{Request, Response, header};
use hyper::{
    body::{Body as _, Incoming},
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{MissedTickBehavior, interval, sleep, timeout},
};
use tokio_util::{
    sync::CancellationToken,
    task::{AbortOnDropHandle, TaskTracker},
};

use crate::{
    activity::Activity, body::Body, failures, framing::Guarded, limits::Limits, pool::Pool, problem::Problem,
    tls::Tls,
};

/// At shutdown, how long a connection may take to send its first request, if it
/// has sent none: it was accepted a moment ago, and its client is on its way.
const FIRST_REQUEST: Duration = Duration::from_secs(2);

/// How long a client may leave unread that it may have no more.
const UNREAD: Duration = Duration::from_millis(500);

/// How long a TLS handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// Requests at a time on one HTTP/2 connection. Browsers are content with 100.
const STREAMS_MAX: u32 = 128;
/// Streams that were reset before they were accepted, and that we reset because
/// of errors; beyond, the connection is closed (CVE-2023-44487, CVE-2025-8671).
const RESETS_MAX: usize = 20;
const OWN_RESETS_MAX: usize = 256;
/// How much a client may send of one body, and of all of a connection, before
/// it is asked for more; and how much waits to be sent of a response.
const STREAM_WINDOW: u32 = 256 << 10;
const CONNECTION_WINDOW: u32 = 1 << 20;
const SEND_BUFFER: usize = 64 << 10;
/// A peer that answers no ping is gone.
const PING_EVERY: Duration = Duration::from_secs(30);
const PING_LIMIT: Duration = Duration::from_secs(20);

/// Who is at the other end of a connection.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Client {
    /// Its address, as far as it is known.
    pub address: Option<IpAddr>,
    /// Whether it is a proxy that has proved its identity on this connection,
    /// so that what it says about the user's address and origin counts.
    pub trusted: bool,
}

/// What the answering of a request may need of its connection.
#[derive(Clone, Debug)]
pub(crate) struct Connection {
    pub(crate) client: Client,
    /// Open connections are asked to end.
    pub(crate) draining: CancellationToken,
    /// It must end now: all of them must, or what it carries may no longer.
    pub(crate) closing: CancellationToken,
    /// Whatever outlives the request runs here.
    tasks: TaskTracker,
    open: Gauge,
    /// The server's name as the client gave it in the TLS handshake.
    pub(crate) name: Option<Arc<str>>,
    /// What it counts against. Whatever goes on after it was switched to another
    /// protocol keeps this.
    place: Option<Arc<Place>>,
}

/// The place of an open connection, among all and among those of its address.
#[derive(Debug)]
struct Place {
    _permit: OwnedSemaphorePermit,
    _counted: Counted,
}

impl Connection {
    /// Resolves when the right to what this connection carries ends. A client that
    /// takes in nothing would not notice, and keep it open, with what waits to be
    /// sent: its connection is closed.
    pub(crate) fn bound(&self, admission: Arc<Admission>) -> impl Future<Output = Denial> + Send + 'static {
        let (closing, right) = (self.closing.clone(), admission.clone());
        // Not polled by whoever sends, who waits for the client. It ends with what it
        // watches over.
        let unread = AbortOnDropHandle::new(tokio::spawn(async move {
            right.revoked().await;
            sleep(UNREAD).await;
            closing.cancel();
        }));
        async move {
            let _unread = unread;
            admission.revoked().await
        }
    }

    /// Runs what outlives the request, as part of the connection.
    pub(crate) fn spawn(&self, future: impl Future<Output = ()> + Send + 'static) {
        let (place, open) = (self.place.clone(), self.open.enter());
        self.tasks.spawn(async move {
            future.await;
            drop((place, open));
        });
    }

    /// Whether a request is for another name than the connection: HTTP/2
    /// clients send requests for every name that the certificate covers, and
    /// projects are kept apart by names (RFC 9110, 7.4).
    fn is_misdirected<B>(&self, request: &Request<B>) -> bool {
        let Some(name) = &self.name else { return false };
        let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok());
        let host = host.or_else(|| request.uri().authority().map(|authority| authority.as_str()));
        // None at all is refused further on.
        let Some(host) = host else { return false };
        let bare = match host.rsplit_once(':') {
            Some((bare, port)) if port.bytes().all(|b| b.is_ascii_digit()) => bare,
            _ => host,
        };
        !bare.eq_ignore_ascii_case(name)
    }
}

fn misdirected() -> Response<Body> {
    let message = "This connection was opened for another name.";
    Problem::new(http::StatusCode::MISDIRECTED_REQUEST, "host_mismatch", message).response(false)
}

/// Runs the streams of an HTTP/2 connection where its end is waited for.
#[derive(Clone, Debug)]
struct InTasks(TaskTracker);

impl<F> hyper::rt::Executor<F> for InTasks
where
    F: Future<Output: Send> + Send + 'static,
{
    fn execute(&self, future: F) {
        self.0.spawn(future);
    }
}

/// Answers requests.
pub(crate) trait Handler: Send + Sync + 'static {
    fn handle(
        self: Arc<Self>,
        request: Request<Body>,
        connection: Connection,
    ) -> impl Future<Output = Response<Body>> + Send;
}

/// Counts and ends the connections of one ingress.
#[derive(Debug)]
pub(crate) struct Server {
    limits: Limits,
    slots: Arc<Semaphore>,
    sources: Arc<Sources>,
    draining: CancellationToken,
    closing: CancellationToken,
    tasks: TaskTracker,
    open: Gauge,
}

impl Server {
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            slots: Arc::new(Semaphore::new(limits.connections.min(Semaphore::MAX_PERMITS))),
            sources: Arc::default(),
            limits,
            draining: CancellationToken::new(),
            closing: CancellationToken::new(),
            tasks: TaskTracker::new(),
            open: Gauge::default(),
        }
    }

    pub(crate) fn closing(&self) -> &CancellationToken {
        &self.closing
    }

    pub(crate) fn open(&self) -> u64 {
        self.open.0.load(Ordering::Relaxed)
    }

    pub(crate) fn connection(&self, client: Client) -> Connection {
        Connection {
            client,
            draining: self.draining.clone(),
            closing: self.closing.child_token(),
            tasks: self.tasks.clone(),
            open: self.open.clone(),
            name: None,
            place: None,
        }
    }

    /// Serves a listener until `shutdown`, then lets what is open end.
    pub(crate) async fn serve<H: Handler>(
        self: &Arc<Self>,
        handler: &Arc<H>,
        pool: &Arc<Pool>,
        listener: TcpListener,
        tls: Option<&Tls>,
        shutdown: impl Future<Output = ()> + Send,
    ) {
        let connection = Connection {
            client: Client::default(),
            draining: self.draining.child_token(),
            closing: self.closing.child_token(),
            tasks: TaskTracker::new(),
            open: self.open.clone(),
            name: None,
            place: None,
        };
        // Also when this future is dropped.
        let _end = connection.closing.clone().drop_guard();
        let mut shutdown = pin!(shutdown);
        let mut sweep = interval(Duration::from_secs(5));
        sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let (stream, address, permit) = tokio::select! {
                () = &mut shutdown => break,
                () = connection.closing.cancelled() => break,
                _ = sweep.tick() => {
                    pool.sweep();
                    continue;
                }
                accepted = accept(&listener, &self.slots) => match accepted {
                    Ok(accepted) => accepted,
                    Err(error) => {
                        // Out of file descriptors, or the client has gone
                        // already: neither ends the listener.
                        tracing::warn!(%error, "cannot accept a connection");
                        sleep(Duration::from_millis(50)).await;
                        continue;
                    }
                },
            };
            let counted = self.sources.enter(failures::network(address), self.limits.connections_per_source);
            let Some(counted) = counted else {
                tracing::debug!(%address, "too many connections from one address");
                continue;
            };
            prepare(&stream);
            let connection = Connection {
                client: Client { address: Some(address), trusted: false },
                closing: connection.closing.child_token(),
                place: Some(Arc::new(Place { _permit: permit, _counted: counted })),
                ..connection.clone()
            };
            let (server, handler) = (self.clone(), handler.clone());
            let tls = tls.cloned();
            connection.tasks.clone().spawn(async move {
                match tls {
                    None => server.run(handler, stream, connection).await,
                    Some(tls) => server.run_tls(handler, &tls, stream, connection).await,
                }
            });
        }
        drop(listener);
        connection.draining.cancel();
        connection.tasks.close();
        if timeout(self.limits.drain, connection.tasks.wait()).await.is_err() {
            tracing::info!(open = connection.tasks.len(), "closing what did not end in time");
            connection.closing.cancel();
            let _ = timeout(Duration::from_secs(2), connection.tasks.wait()).await;
        }
    }

    /// Asks everything that is open to end.
    pub(crate) fn ask_to_end(&self) {
        self.draining.cancel();
    }

    /// Asks everything that is open to end, and ends it after `limits.drain`.
    pub(crate) async fn shut_down(&self) {
        self.draining.cancel();
        self.tasks.close();
        if timeout(self.limits.drain, self.tasks.wait()).await.is_err() {
            self.closing.cancel();
            let _ = timeout(Duration::from_secs(2), self.tasks.wait()).await;
        }
        self.closing.cancel();
    }

    /// Serves one connection over TLS to its end, in the protocol that was
    /// agreed on.
    async fn run_tls<H: Handler>(
        self: Arc<Self>,
        handler: Arc<H>,
        tls: &Tls,
        stream: TcpStream,
        connection: Connection,
    ) {
        let shaken = tokio::select! {
            shaken = timeout(HANDSHAKE, tls.accept(stream)) => shaken,
            () = connection.closing.cancelled() => return,
        };
        let stream = match shaken {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return tracing::debug!(%error, "no TLS connection came about"),
            Err(_) => return tracing::debug!("a TLS handshake took too long"),
        };
        let session = stream.get_ref().1;
        let name = session.server_name().map(|name| Arc::from(name.to_ascii_lowercase()));
        let two = session.alpn_protocol() == Some(b"h2");
        let connection = Connection { name, ..connection };
        if two {
            self.run_http2(handler, stream, connection).await;
        } else {
            self.run(handler, stream, connection).await;
        }
    }

    /// Serves one HTTP/2 connection to its end.
    async fn run_http2<H: Handler>(
        self: Arc<Self>,
        handler: Arc<H>,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        connection: Connection,
    ) {
        let _open = self.open.enter();
        let clock = Arc::new(Activity::new());
        let service = {
            let (connection, clock) = (connection.clone(), clock.clone());
            service_fn(move |mut request: Request<Incoming>| {
                clock.moved();
                let (handler, connection) = (handler.clone(), connection.clone());
                async move {
                    let websocket = match crate::http2::into_http1(&mut request) {
                        Ok(websocket) => websocket,
                        Err(problem) => {
                            return Ok::<_, Infallible>(crate::http2::from_http1(
                                problem.response(false),
                                false,
                            ));
                        }
                    };
                    if connection.is_misdirected(&request) {
                        return Ok(crate::http2::from_http1(misdirected(), false));
                    }
                    let response = handler.handle(request.map(Body::incoming), connection).await;
                    Ok(crate::http2::from_http1(response, websocket))
                }
            })
        };
        let head_bytes = u32::try_from(self.limits.head_bytes.max(8 * 1024)).unwrap_or(u32::MAX);
        let served = http2::Builder::new(InTasks(connection.tasks.clone()))
            .timer(TokioTimer::new())
            .max_concurrent_streams(STREAMS_MAX)
            .max_header_list_size(head_bytes)
            .max_pending_accept_reset_streams(RESETS_MAX)
            .max_local_error_reset_streams(OWN_RESETS_MAX)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_send_buf_size(SEND_BUFFER)
            .keep_alive_interval(PING_EVERY)
            .keep_alive_timeout(PING_LIMIT)
            .enable_connect_protocol()
            .serve_connection(TokioIo::new(stream), service);
        let mut served = pin!(served);
        // After so long without a new request the client is asked to make the
        // next one on a new connection; what is open goes on.
        let ended = tokio::select! {
            ended = served.as_mut() => ended,
            () = connection.closing.cancelled() => return,
            () = async {
                tokio::select! {
                    () = connection.draining.cancelled() => {}
                    () = clock.idle(self.limits.head_timeout) => {}
                }
            } => {
                served.as_mut().graceful_shutdown();
                tokio::select! {
                    ended = served.as_mut() => ended,
                    () = connection.closing.cancelled() => return,
                }
            }
        };
        if let Err(error) = ended {
            tracing::debug!(error = %cocalc_core::chain(&error), "a connection ended");
        }
    }

    /// Serves one connection to its end.
    pub(crate) async fn run<H: Handler>(
        self: Arc<Self>,
        handler: Arc<H>,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        connection: Connection,
    ) {
        let _open = self.open.enter();
        let guarded = Guarded::new(stream);
        let refused = guarded.refused();
        let requests = AtomicU64::new(0);
        let begun = CancellationToken::new();
        let service = {
            let (connection, begun) = (connection.clone(), begun.clone());
            service_fn(move |request: Request<Incoming>| {
                let index = requests.fetch_add(1, Ordering::Relaxed);
                begun.cancel();
                let refused = refused.is(index);
                let (handler, connection) = (handler.clone(), connection.clone());
                async move {
                    if refused {
                        let problem = Problem::bad_request("The request's framing is ambiguous.");
                        return Ok::<_, Infallible>(problem.response(false));
                    }
                    if connection.is_misdirected(&request) {
                        return Ok(misdirected());
                    }
                    let upgrading = request.headers().contains_key(header::UPGRADE);
                    let mut asked = None;
                    let waits = request.headers().contains_key(header::EXPECT);
                    let mut request = request.map(Body::incoming);
                    if waits && !request.body().is_end_stream() {
                        let begun = Arc::new(AtomicBool::new(false));
                        asked = Some(begun.clone());
                        request = request.map(|body| body.noting_begin(begun));
                    }
                    let mut response = handler.handle(request, connection).await;
                    let upgraded = response.status() == http::StatusCode::SWITCHING_PROTOCOLS;
                    // A sender that waits was not asked for its body: whether it
                    // comes now is for it to say (RFC 9110, 10.1.1).
                    let unasked = asked.is_some_and(|begun| !begun.load(Ordering::Acquire));
                    if unasked || (upgrading && !upgraded) {
                        // What follows was not watched as HTTP, or is unclear.
                        let close = http::HeaderValue::from_static("close");
                        response.headers_mut().insert(header::CONNECTION, close);
                    }
                    Ok(response)
                }
            })
        };
        let head_bytes = self.limits.head_bytes.max(8 * 1024);
        let served = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(self.limits.head_timeout)
            .max_header_size(head_bytes)
            .max_buf_size(head_bytes + 64 * 1024)
            .serve_connection(TokioIo::new(guarded), service)
            .with_upgrades();
        let mut served = pin!(served);
        let ended = tokio::select! {
            ended = served.as_mut() => ended,
            () = connection.closing.cancelled() => return,
            () = async {
                connection.draining.cancelled().await;
                // The library would close it at once, and lose the request.
                let _ = timeout(FIRST_REQUEST, begun.cancelled()).await;
            } => {
                served.as_mut().graceful_shutdown();
                tokio::select! {
                    ended = served.as_mut() => ended,
                    () = connection.closing.cancelled() => return,
                }
            }
        };
        if let Err(error) = ended {
            tracing::debug!(error = %cocalc_core::chain(&error), "a connection ended");
        }
    }
}

/// How many there are.
#[derive(Clone, Debug, Default)]
struct Gauge(Arc<AtomicU64>);

impl Gauge {
    fn enter(&self) -> Entered {
        self.0.fetch_add(1, Ordering::Relaxed);
        Entered(self.0.clone())
    }
}

/// One of them.
#[derive(Debug)]
struct Entered(Arc<AtomicU64>);

impl Drop for Entered {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn accept(
    listener: &TcpListener,
    slots: &Arc<Semaphore>,
) -> io::Result<(TcpStream, IpAddr, OwnedSemaphorePermit)> {
    let permit = slots.clone().acquire_owned().await.map_err(io::Error::other)?;
    let (stream, address) = listener.accept().await?;
    Ok((stream, address.ip().to_canonical(), permit))
}

/// Small messages leave at once, dead peers are noticed in about 2 min, and
/// peers that stop reading in 10 min.
fn prepare(stream: &TcpStream) {
    use rustix::net::sockopt;

    let _ = stream.set_nodelay(true);
    let _ = sockopt::set_socket_keepalive(stream, true);
    let _ = sockopt::set_tcp_keepidle(stream, Duration::from_secs(60));
    let _ = sockopt::set_tcp_keepintvl(stream, Duration::from_secs(15));
    let _ = sockopt::set_tcp_keepcnt(stream, 4);
    let _ = sockopt::set_tcp_user_timeout(stream, 600_000);
}

/// How many connections each address has.
#[derive(Debug, Default)]
struct Sources(Mutex<HashMap<IpAddr, u32>>);

impl Sources {
    fn enter(self: &Arc<Self>, address: IpAddr, limit: u32) -> Option<Counted> {
        let mut sources = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if sources.get(&address).is_some_and(|count| *count >= limit) {
            return None;
        }
        *sources.entry(address).or_default() += 1;
        Some(Counted { sources: self.clone(), address })
    }
}

#[derive(Debug)]
struct Counted {
    sources: Arc<Sources>,
    address: IpAddr,
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut sources = self.sources.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = sources.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                sources.remove(&self.address);
            }
        }
    }
}
