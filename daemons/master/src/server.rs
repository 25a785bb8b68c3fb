//! The listener: HTTP/1.1, and the way to the bus.

use std::{
    collections::HashMap,
    convert::Infallible,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use axum::{
    Extension, Router,
    body::Body,
    extract::{Request, State},
    response::{IntoResponse, Response},
    routing::get,
};
use cocalc_conat::{
    Broker,
    upgrade::{self, OriginPolicy},
};
use cocalc_http::Tls;
use http::{StatusCode, header};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

/// How many connections there may be, besides those of the bus.
const CONNECTIONS_MAX: usize = 20_000;
/// How long a client may take to send a request's head, and to shake hands.
const HEAD_LIMIT: Duration = Duration::from_secs(10);
/// At shutdown, how long a connection may take to send its first request, if it
/// has sent none: it was accepted a moment ago, and its client is on its way.
const FIRST_REQUEST: Duration = Duration::from_secs(2);
/// How large a request's head may be.
const HEAD_BYTES_MAX: usize = 32 * 1024;

#[derive(Clone, Debug)]
struct Bus {
    broker: Broker,
    closing: CancellationToken,
}

/// The API, and `/conat/`.
pub(crate) fn router(api: Router, broker: Broker, closing: CancellationToken) -> Router {
    let bus = Router::new()
        .route("/conat", get(connect))
        .route("/conat/", get(connect))
        .with_state(Bus { broker, closing });
    api.merge(bus)
}

/// Hands a connection over to the bus.
async fn connect(
    State(bus): State<Bus>,
    Extension(peer): Extension<SocketAddr>,
    mut request: Request<Body>,
) -> Response {
    // Peers sign in with assertions and never with cookies, and no page of a
    // browser has business here.
    let checked = upgrade::check(request.method(), request.uri(), request.headers(), &OriginPolicy::SameHost);
    let upgrade = match checked {
        Ok(upgrade) => upgrade.with_peer(peer),
        Err(refused) => {
            let json = [(header::CONTENT_TYPE, "application/json")];
            return (refused.status, json, refused.body).into_response();
        }
    };
    let headers = upgrade.headers();
    let upgraded = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        // Ends with the connection, with the master, or with the broker.
        let served = async {
            match upgraded.await {
                Ok(io) => {
                    let ended = bus.broker.accept(TokioIo::new(io), upgrade.handshake).await;
                    tracing::debug!(%peer, ?ended, "a bus connection ended");
                }
                Err(error) => tracing::debug!(%peer, %error, "an upgrade failed"),
            }
        };
        bus.closing.run_until_cancelled(served).await;
    });
    (StatusCode::SWITCHING_PROTOCOLS, headers, Body::empty()).into_response()
}

/// The connections of each address.
#[derive(Debug)]
struct ByAddress {
    max: usize,
    counts: Mutex<HashMap<IpAddr, usize>>,
}

/// One of them, counted until this is dropped.
#[derive(Debug)]
struct Counted {
    all: Arc<ByAddress>,
    address: IpAddr,
}

impl ByAddress {
    fn lock(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts one more, unless there are enough.
    fn enter(self: &Arc<Self>, address: IpAddr) -> Option<Counted> {
        let address = match address.to_canonical() {
            // Who has one address of a network has all of it.
            IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
            address => address,
        };
        let mut counts = self.lock();
        let count = counts.entry(address).or_default();
        if *count >= self.max {
            return None;
        }
        *count += 1;
        Some(Counted { all: self.clone(), address })
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut counts = self.all.lock();
        if let Some(count) = counts.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.address);
            }
        }
    }
}

/// Accepts and serves connections until `closing`, then lets requests end.
pub(crate) async fn serve(
    listener: TcpListener,
    tls: Option<Tls>,
    router: Router,
    per_address_max: usize,
    closing: CancellationToken,
) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let by_address = Arc::new(ByAddress { max: per_address_max, counts: Mutex::default() });
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            biased;
            () = closing.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, peer)) => {
                // One too many is dropped, so that those who are there go on.
                let Ok(place) = places.clone().try_acquire_owned() else { continue };
                let Some(counted) = by_address.enter(peer.ip()) else { continue };
                let (tls, router, closing) = (tls.clone(), router.clone(), closing.clone());
                connections.spawn(async move {
                    begin(stream, peer, tls, router, closing).await;
                    drop((place, counted));
                });
                while connections.try_join_next().is_some() {}
            }
            Err(error) => {
                // Out of file descriptors, most likely: that passes.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

async fn begin(
    stream: TcpStream,
    peer: SocketAddr,
    tls: Option<Tls>,
    router: Router,
    closing: CancellationToken,
) {
    // Small frames are the rule here.
    let _ = stream.set_nodelay(true);
    let Some(tls) = tls else { return connection(stream, peer, router, closing).await };
    match tokio::time::timeout(HEAD_LIMIT, tls.accept(stream)).await {
        Ok(Ok(stream)) => connection(stream, peer, router, closing).await,
        Ok(Err(error)) => tracing::debug!(%peer, %error, "no TLS connection came about"),
        Err(_) => tracing::debug!(%peer, "a TLS handshake took too long"),
    }
}

async fn connection(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    peer: SocketAddr,
    router: Router,
    closing: CancellationToken,
) {
    let begun = CancellationToken::new();
    let seen = begun.clone();
    let service = service_fn(move |mut request: hyper::Request<Incoming>| {
        seen.cancel();
        request.extensions_mut().insert(peer);
        let router = router.clone();
        async move {
            let mut router = router;
            let response = tower_call(&mut router, request.map(Body::new)).await;
            Ok::<_, Infallible>(response)
        }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_LIMIT)
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = async {
            closing.cancelled().await;
            // The library would close it at once, and lose the request.
            let _ = tokio::time::timeout(FIRST_REQUEST, begun.cancelled()).await;
        } => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%peer, %error, "a connection broke");
    }
}

async fn tower_call(router: &mut Router, request: Request<Body>) -> Response {
    use hyper::service::Service;
    let service = hyper_util::service::TowerToHyperService::new(router.clone());
    match service.call(request).await {
        Ok(response) => response,
        Err(never) => match never {},
    }
}
