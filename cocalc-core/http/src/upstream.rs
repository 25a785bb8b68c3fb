//! One request to an app or a host, and its response.

use std::{future::Future, sync::Arc, time::Duration};

use cocalc_core::{BoxError, activity::Meter, stream::BoxStream};
use http::{HeaderMap, Method, Request, Response, StatusCode, Uri};
use hyper::{body::Incoming, upgrade::OnUpgrade};
use hyper_util::rt::TokioIo;
use tokio::time::timeout;

use crate::{
    activity::Activity,
    body::{Body, BodyError},
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

/// Sends `request` over an idle connection or a new one, and returns the head
/// of the response. A request that certainly had no effect is sent once more,
/// over a new connection, when an idle one turns out to be closed.
pub(crate) async fn exchange<F>(
    pool: &Arc<Pool>,
    key: Key,
    limits: &Limits,
    codes: Codes,
    request: Request<Body>,
    fresh: bool,
    dial: impl Fn() -> F,
) -> Result<(Response<Incoming>, Lease), Problem>
where
    F: Future<Output = Result<BoxStream, Problem>>,
{
    let repeatable = is_idempotent(request.method()) && request.body().replay().is_some();
    let age = match key {
        _ if fresh => None,
        // Apps close idle connections, many after 5 s; a request that arrives
        // at that moment is lost, and this one could not be repeated.
        Key::App(..) if !repeatable => Some(Duration::from_secs(2)),
        _ => Some(Duration::MAX),
    };
    let mut lease = lease(pool, key, codes, age, &dial).await?;
    let spare = if lease.reused && repeatable { Spare::of(&request) } else { None };
    let request = watched(request, limits);
    match send(&mut lease, request, limits, codes).await {
        Ok(response) => Ok((response, lease)),
        Err(Failed::Timeout(problem)) => Err(problem),
        Err(Failed::Unsent(request)) if lease.reused => {
            let mut lease = self::lease(pool, key, codes, None, &dial).await?;
            let response = send(&mut lease, (*request, None), limits, codes).await;
            response.map(|response| (response, lease)).map_err(|failed| failed.problem(codes))
        }
        Err(failed) => {
            let Some(spare) = spare else { return Err(failed.problem(codes)) };
            let mut lease = self::lease(pool, key, codes, None, &dial).await?;
            let response = send(&mut lease, (spare.request(), None), limits, codes).await;
            response.map(|response| (response, lease)).map_err(|failed| failed.problem(codes))
        }
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
    matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS | Method::PUT | Method::DELETE)
}

/// What is needed to send a request again whose body is known.
struct Spare {
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Body,
}

impl Spare {
    fn of(request: &Request<Body>) -> Option<Self> {
        let body = request.body().replay()?;
        Some(Self {
            method: request.method().clone(),
            uri: request.uri().clone(),
            headers: request.headers().clone(),
            body,
        })
    }

    fn request(self) -> Request<Body> {
        let mut request = Request::new(self.body);
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
    let response = lease.sender.try_send_request(request);
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
    connection.tasks.spawn(async move {
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
