//! One request to an app or a host, and its response.

use std::{future::Future, sync::Arc, time::Duration};

use cocalc_core::{BoxError, activity::Meter, stream::BoxStream};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri, header};
use hyper::{
    body::{Body as _, Incoming},
    upgrade::OnUpgrade,
};
use hyper_util::rt::TokioIo;
use tokio::{sync::watch, time::timeout};

use crate::{
    activity::Activity,
    body::{Body, BodyError, Wanted},
    limits::Limits,
    pool::{Key, Lease, LeaseError, Pool},
    problem::Problem,
    server::Connection,
    websocket::{self, Stop},
};

/// The codes of what can go wrong with the far side.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Codes {
    pub(crate) what: &'static str,
    pub(crate) failed: &'static str,
    pub(crate) timed_out: &'static str,
}

/// How long an app may take to ask for a body whose sender waits to be asked.
/// Many never do; senders wait about as long (RFC 9110, 10.1.1).
const CONTINUE_WAIT: Duration = Duration::from_secs(1);

/// Sends `request` over an idle connection or a new one, and returns the head
/// of the response.
///
/// An idle connection may turn out to be closed. The request is then sent once
/// more, over a new connection, if not a byte of it was sent, or if it may be
/// repeated (RFC 9110, 9.2.2), has no body and not a byte of an answer came.
/// Whatever has a body is never sent twice.
pub(crate) async fn exchange<F>(
    pool: &Arc<Pool>,
    key: Key,
    limits: &Limits,
    codes: Codes,
    mut request: Request<Body>,
    fresh: bool,
    dial: impl Fn() -> F,
) -> Result<(Response<Incoming>, Lease), Problem>
where
    F: Future<Output = Result<BoxStream, Problem>>,
{
    let repeatable = is_idempotent(request.method()) && request.body().is_end_stream();
    let age = match key {
        _ if fresh => None,
        // Apps close idle connections, many after 5 s; a request that arrives
        // at that moment is lost, and this one could not be repeated.
        Key::App(..) if !repeatable => Some(Duration::from_secs(2)),
        _ => Some(Duration::MAX),
    };
    frame(&mut request);
    let (request, asking) = waiting(request);
    let mut lease = lease(pool, key, codes, age, &dial).await?;
    let spare = (lease.reused && repeatable).then(|| Spare::of(&request));
    let request = watched(request, limits);
    let response = match send(&mut lease, request, limits, codes).await {
        Ok(response) => response,
        Err(Failed::Timeout(problem)) => return Err(problem),
        Err(failed) => {
            let again = match (failed, spare) {
                (Failed::Unsent(request), _) if lease.reused => *request,
                (Failed::Broken(_), Some(spare)) if !lease.has_heard() => spare.request(),
                (failed, _) => return Err(failed.problem(codes)),
            };
            lease = self::lease(pool, key, codes, None, &dial).await?;
            let again = send(&mut lease, watched(again, limits), limits, codes).await;
            again.map_err(|failed| failed.problem(codes))?
        }
    };
    if let Some(asking) = asking
        && !asking.is_asked()
    {
        // It was answered without the body, which stays where it is.
        lease.spent = true;
    }
    Ok((response, lease))
}

/// Says how the body is framed. hyper sends none with GET and HEAD otherwise,
/// whatever there is.
fn frame(request: &mut Request<Body>) {
    if request.body().is_end_stream() {
        for name in [header::TRAILER, header::EXPECT] {
            request.headers_mut().remove(name);
        }
    } else if request.body().size_hint().exact().is_none() {
        request.headers_mut().remove(header::CONTENT_LENGTH);
        let chunked = HeaderValue::from_static("chunked");
        request.headers_mut().insert(header::TRANSFER_ENCODING, chunked);
    }
}

/// Holds the body of a request back that says `Expect: 100-continue`, until it
/// is asked for, or for a while; its own sender is asked when it is read.
fn waiting(mut request: Request<Body>) -> (Request<Body>, Option<Asking>) {
    let Some(expect) = request.headers().get(header::EXPECT) else { return (request, None) };
    if !expect.as_bytes().eq_ignore_ascii_case(b"100-continue") {
        // There are no others.
        request.headers_mut().remove(header::EXPECT);
        return (request, None);
    }
    let asked = Arc::new(watch::Sender::new(false));
    let mut gate = asked.subscribe();
    let on_continue = asked.clone();
    hyper::ext::on_informational(&mut request, move |response| {
        if response.status() == StatusCode::CONTINUE {
            on_continue.send_replace(true);
        }
    });
    let opened = Arc::downgrade(&asked);
    let gate = async move {
        match timeout(CONTINUE_WAIT, gate.wait_for(|asked| *asked)).await {
            // An app may never ask, but go on waiting.
            Err(_) => match opened.upgrade() {
                Some(opened) => {
                    opened.send_replace(true);
                    Wanted::Yes
                }
                None => Wanted::No,
            },
            Ok(Ok(_)) => Wanted::Yes,
            Ok(Err(_)) => Wanted::No,
        }
    };
    (request.map(|body| body.behind(gate)), Some(Asking(asked)))
}

/// Whether a body was asked for; dropped, it is not any more.
struct Asking(Arc<watch::Sender<bool>>);

impl Asking {
    fn is_asked(&self) -> bool {
        *self.0.borrow()
    }
}

async fn lease<F>(
    pool: &Arc<Pool>,
    key: Key,
    codes: Codes,
    age: Option<Duration>,
    dial: impl Fn() -> F,
) -> Result<Lease, Problem>
where
    F: Future<Output = Result<BoxStream, Problem>>,
{
    pool.lease(key, age, dial).await.map_err(|error| match error {
        LeaseError::Dial(problem) => problem,
        LeaseError::Begin(error) => {
            tracing::debug!(%error, "cannot begin HTTP");
            Problem::bad_gateway(codes.failed, format!("{} does not answer.", codes.what))
        }
    })
}

fn is_idempotent(method: &Method) -> bool {
    matches!(
        *method,
        Method::GET | Method::HEAD | Method::OPTIONS | Method::TRACE | Method::PUT | Method::DELETE
    )
}

/// What is needed to send a request again that has no body.
struct Spare {
    method: Method,
    uri: Uri,
    headers: HeaderMap,
}

impl Spare {
    fn of(request: &Request<Body>) -> Self {
        Self {
            method: request.method().clone(),
            uri: request.uri().clone(),
            headers: request.headers().clone(),
        }
    }

    fn request(self) -> Request<Body> {
        let mut request = Request::new(Body::empty());
        *request.method_mut() = self.method;
        *request.uri_mut() = self.uri;
        *request.headers_mut() = self.headers;
        request
    }
}

/// The wait for a response counts from the last byte of the request.
fn watched(request: Request<Body>, limits: &Limits) -> (Request<Body>, Option<Arc<Activity>>) {
    if request.body().replay().is_some() {
        return (request, None);
    }
    let activity = Arc::new(Activity::new());
    let noted = activity.clone();
    let request = request.map(|body| body.stalled_after(limits.body_idle).noting(noted));
    (request, Some(activity))
}

enum Failed {
    /// Not a byte of it was sent.
    Unsent(Box<Request<Body>>),
    Broken(hyper::Error),
    Timeout(Problem),
}

impl Failed {
    fn problem(self, codes: Codes) -> Problem {
        let closed = || Problem::bad_gateway(codes.failed, format!("{} closed the connection.", codes.what));
        match self {
            Self::Timeout(problem) => problem,
            Self::Unsent(_) => closed(),
            Self::Broken(error) => {
                if let Some(BodyError::Stalled(_)) = body_error(&error) {
                    let problem = Problem::new(
                        StatusCode::REQUEST_TIMEOUT,
                        "request_timeout",
                        "The request's body did not arrive.",
                    );
                    return Problem { close: true, ..problem };
                }
                tracing::debug!(error = %cocalc_core::chain(&error), "no response");
                if error.is_parse() {
                    let message = format!("{} answered something that is not HTTP.", codes.what);
                    return Problem::bad_gateway(codes.failed, message);
                }
                closed()
            }
        }
    }
}

fn body_error(error: &hyper::Error) -> Option<&BodyError> {
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        if let Some(error) = error.downcast_ref() {
            return Some(error);
        }
        source = error.source();
    }
    None
}

async fn send(
    lease: &mut Lease,
    (request, activity): (Request<Body>, Option<Arc<Activity>>),
    limits: &Limits,
    codes: Codes,
) -> Result<Response<Incoming>, Failed> {
    lease.listen();
    let response = lease.sender().try_send_request(request);
    let sent = match activity {
        None => timeout(limits.response_timeout, response).await.ok(),
        Some(activity) => tokio::select! {
            sent = response => Some(sent),
            () = activity.idle(limits.response_timeout) => None,
        },
    };
    match sent {
        Some(Ok(response)) => Ok(response),
        Some(Err(mut error)) => Err(match error.take_message() {
            Some(request) => Failed::Unsent(Box::new(request)),
            None => Failed::Broken(error.into_error()),
        }),
        None => Err(Failed::Timeout(Problem::gateway_timeout(
            codes.timed_out,
            format!("{} took too long to answer.", codes.what),
        ))),
    }
}

/// Whether a response goes on for so long that a change of rights in between
/// matters.
pub(crate) fn is_long(body: &impl hyper::body::Body) -> bool {
    !body.is_end_stream() && body.size_hint().exact().is_none_or(|bytes| bytes > 64 * 1024)
}

/// Joins the two sides of a WebSocket once both have switched, in a task of
/// the connection; `revoked` ends it.
pub(crate) fn join(
    connection: &Connection,
    limits: &Limits,
    client: OnUpgrade,
    upstream: impl Future<Output = Result<BoxStream, BoxError>> + Send + 'static,
    revoked: impl Future<Output = ()> + Send + 'static,
    meter: Option<Meter>,
) {
    let (idle, switch) = (limits.websocket_idle, limits.connect_timeout);
    let (draining, closing) = (connection.draining.clone(), connection.closing.clone());
    connection.spawn(async move {
        let both = async {
            let client = client.await?;
            let upstream = upstream.await?;
            Ok::<_, BoxError>((boxed(client), upstream))
        };
        let (client, upstream) = match timeout(switch, both).await {
            Ok(Ok(both)) => both,
            Ok(Err(error)) => return tracing::debug!(%error, "a WebSocket did not begin"),
            Err(_) => return tracing::debug!("a WebSocket did not begin in time"),
        };
        let stop = async {
            tokio::select! {
                biased;
                () = closing.cancelled() => Stop::Now,
                () = revoked => Stop::Revoked,
                () = draining.cancelled() => Stop::Draining,
            }
        };
        websocket::splice(client, upstream, idle, meter, stop).await;
    });
}

/// The upgraded connection as a stream.
pub(crate) fn boxed(upgraded: hyper::upgrade::Upgraded) -> BoxStream {
    Box::pin(TokioIo::new(upgraded))
}
