//! The channel over real TCP: who gets in, and what a broken peer can do.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test reports by panicking")]

use std::{
    net::IpAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use cocalc_auth::{PublicKey, identity::Identity};
use cocalc_core::{
    connector::{Connector, Error, Peer, Service},
    ids::{HostId, ProxyId},
    router::HostAddress,
};
use cocalc_transfer::{DirectConnector, Incoming, PeerListener};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::timeout,
};

const SOON: Duration = Duration::from_secs(10);

struct Served {
    address: HostAddress,
    host: HostId,
    proxy: ProxyId,
    proxy_key: Identity,
    peers: Arc<Mutex<Vec<(PublicKey, Peer)>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A host whose services echo, after saying who is there.
async fn serve(handshake_limit: Duration, per_address: usize) -> Served {
    let (host_key, proxy_key) = (Identity::generate().unwrap(), Identity::generate().unwrap());
    let (host, proxy) = (HostId::random(), ProxyId::random());
    let peers = Arc::new(Mutex::new(vec![(proxy_key.public_key(), Peer::Proxy(proxy))]));
    let known = Arc::clone(&peers);
    let directory = move |key: &PublicKey| {
        known.lock().unwrap().iter().find(|(known, _)| known == key).map(|(_, peer)| *peer)
    };
    let echo = async |mut incoming: Incoming| {
        let who = format!("{:?} {:?} {:?}\n", incoming.peer, incoming.service, incoming.source);
        if incoming.stream.write_all(who.as_bytes()).await.is_ok() {
            let (mut read, mut write) = tokio::io::split(incoming.stream);
            let _ = tokio::io::copy(&mut read, &mut write).await;
            let _ = write.shutdown().await;
        }
    };
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = HostAddress {
        peer: socket.local_addr().unwrap().to_string(),
        identity: host_key.public_key().to_string(),
        ..HostAddress::default()
    };
    let listener = PeerListener::builder(&host_key, Arc::new(directory), Arc::new(echo))
        .handshake_limit(handshake_limit)
        .handshakes_per_address(per_address)
        .build()
        .unwrap();
    let task = tokio::spawn(async move { listener.serve(socket, std::future::pending()).await });
    Served { address, host, proxy, proxy_key, peers, task }
}

fn connector(identity: &Identity, host: HostId, address: &HostAddress) -> DirectConnector {
    let address = address.clone();
    DirectConnector::new(identity, Arc::new(move |asked| (asked == host).then(|| address.clone()))).unwrap()
}

async fn works(served: &Served) {
    let connector = connector(&served.proxy_key, served.host, &served.address);
    let source: IpAddr = "203.0.113.9".parse().unwrap();
    let mut stream = connector.open(served.host, Service::Ssh, Some(source), SOON).await.unwrap();
    stream.write_all(b"hello").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = String::new();
    timeout(SOON, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    let expected = format!("{:?} Ssh {:?}\nhello", Peer::Proxy(served.proxy), Some(source));
    assert_eq!(answer, expected);
}

#[tokio::test]
async fn a_known_peer_gets_through_and_is_named() {
    let served = serve(SOON, 64).await;
    works(&served).await;
}

#[tokio::test]
async fn a_stranger_and_a_withdrawn_key_are_refused() {
    let served = serve(SOON, 64).await;
    let stranger = connector(&Identity::generate().unwrap(), served.host, &served.address);
    let error = stranger.open(served.host, Service::Http, None, SOON).await.err().unwrap();
    assert!(matches!(error, Error::Untrusted { .. }), "{error:?}");
    works(&served).await;
    served.peers.lock().unwrap().clear();
    let known = connector(&served.proxy_key, served.host, &served.address);
    let error = known.open(served.host, Service::Http, None, SOON).await.err().unwrap();
    assert!(matches!(error, Error::Untrusted { .. }), "{error:?}");
}

#[tokio::test]
async fn an_impostor_host_is_refused() {
    let served = serve(SOON, 64).await;
    let mut address = served.address.clone();
    address.identity = Identity::generate().unwrap().public_key().to_string();
    let connector = connector(&served.proxy_key, served.host, &address);
    let error = connector.open(served.host, Service::Http, None, SOON).await.err().unwrap();
    assert!(matches!(error, Error::Untrusted { .. }), "{error:?}");
}

#[tokio::test]
async fn a_weak_or_missing_key_is_never_dialed() {
    let served = serve(SOON, 64).await;
    // The identity point, in base64url.
    let weak = format!("AQ{}", "A".repeat(41));
    for identity in [weak, String::new(), "x".into()] {
        let address = HostAddress { identity, ..served.address.clone() };
        let connector = connector(&served.proxy_key, served.host, &address);
        let error = connector.open(served.host, Service::Http, None, SOON).await.err().unwrap();
        assert!(matches!(error, Error::Untrusted { .. }), "{error:?}");
    }
}

#[tokio::test]
async fn proxies_send_no_snapshots_and_hosts_carry_no_users() {
    let served = serve(SOON, 64).await;
    let proxy = connector(&served.proxy_key, served.host, &served.address);
    let error = proxy.open(served.host, Service::Transfer, None, SOON).await.err().unwrap();
    assert!(matches!(error, Error::Untrusted { .. }), "{error:?}");
    let peer_key = Identity::generate().unwrap();
    served.peers.lock().unwrap().push((peer_key.public_key(), Peer::Host(HostId::random())));
    let peer = connector(&peer_key, served.host, &served.address);
    for service in [Service::Http, Service::Ssh] {
        let error = peer.open(served.host, service, None, SOON).await.err().unwrap();
        assert!(matches!(error, Error::Untrusted { .. }), "{error:?}");
    }
    assert!(peer.open(served.host, Service::Transfer, None, SOON).await.is_ok());
}

#[tokio::test]
async fn an_unknown_or_dead_or_silent_host_is_an_error_in_time() {
    let served = serve(SOON, 64).await;
    let connector_ = connector(&served.proxy_key, served.host, &served.address);
    let error = connector_.open(HostId::random(), Service::Http, None, SOON).await.err().unwrap();
    assert!(matches!(error, Error::Unknown { .. }), "{error:?}");

    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = HostAddress { peer: silent.local_addr().unwrap().to_string(), ..served.address.clone() };
    let connector_ = connector(&served.proxy_key, served.host, &address);
    let limit = Duration::from_millis(200);
    let error = connector_.open(served.host, Service::Http, None, limit).await.err().unwrap();
    assert!(matches!(error, Error::TimedOut { .. }), "{error:?}");
    drop(silent);
    let error = connector_.open(served.host, Service::Http, None, SOON).await.err().unwrap();
    assert!(matches!(error, Error::Unreachable { .. }), "{error:?}");
}

#[tokio::test]
async fn garbage_ends_its_own_connection_and_nobody_elses() {
    let served = serve(SOON, 64).await;
    let mut bad = vec![b"GET / HTTP/1.1\r\n\r\n".to_vec(), vec![0; 1 << 20], vec![0x16, 3, 1, 0xff, 0xff]];
    let mut seed = 1u32;
    for _ in 0..20 {
        let noise = (0..600).map(|_| {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 24) as u8
        });
        bad.push(noise.collect());
    }
    for bytes in bad {
        let mut stream = TcpStream::connect(&served.address.peer).await.unwrap();
        // The listener may have closed it already.
        let _ = stream.write_all(&bytes).await;
        let _ = stream.shutdown().await;
        let mut rest = Vec::new();
        let _ = timeout(SOON, stream.read_to_end(&mut rest)).await.expect("it is closed");
    }
    works(&served).await;
}

#[tokio::test]
async fn half_a_handshake_is_cut_at_the_deadline_and_takes_no_place_of_others() {
    let served = serve(Duration::from_millis(300), 8).await;
    let mut halves = Vec::new();
    for _ in 0..8 {
        let mut stream = TcpStream::connect(&served.address.peer).await.unwrap();
        stream.write_all(&[0x16, 3, 1]).await.unwrap();
        halves.push(stream);
    }
    for stream in &mut halves {
        let mut rest = Vec::new();
        let closed = timeout(SOON, stream.read_to_end(&mut rest)).await;
        assert!(closed.is_ok(), "the deadline closes it");
    }
    works(&served).await;
}

#[tokio::test]
async fn one_address_has_so_many_handshakes_and_no_more() {
    let served = serve(SOON, 2).await;
    let mut halves = Vec::new();
    for _ in 0..2 {
        halves.push(TcpStream::connect(&served.address.peer).await.unwrap());
    }
    // The third is closed at once, whatever it says.
    let mut third = TcpStream::connect(&served.address.peer).await.unwrap();
    let mut rest = Vec::new();
    let _ = timeout(SOON, third.read_to_end(&mut rest)).await.expect("it is closed");
    drop(halves);
    let connector = connector(&served.proxy_key, served.host, &served.address);
    // The places come back when the listener has noticed.
    let deadline = tokio::time::Instant::now() + SOON;
    while connector.open(served.host, Service::Http, None, SOON).await.is_err() {
        assert!(tokio::time::Instant::now() < deadline, "no place comes back");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn many_streams_at_once_wait_for_their_handshakes_instead_of_failing() {
    let served = serve(SOON * 6, 64).await;
    let connector = connector(&served.proxy_key, served.host, &served.address);
    let mut opening = tokio::task::JoinSet::new();
    for _ in 0..400 {
        let (connector, host) = (connector.clone(), served.host);
        opening.spawn(async move { connector.open(host, Service::Http, None, SOON * 6).await });
    }
    let mut open = Vec::new();
    while let Some(opened) = opening.join_next().await {
        open.push(opened.unwrap().unwrap());
    }
    assert_eq!(open.len(), 400);
}

#[tokio::test]
async fn a_host_that_is_silent_holds_up_no_other() {
    let served = serve(SOON, 64).await;
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (dead, here) = (HostId::random(), served.host);
    let at = HostAddress { peer: silent.local_addr().unwrap().to_string(), ..served.address.clone() };
    let there = served.address.clone();
    let book = move |asked| {
        let address = if asked == dead { &at } else { &there };
        (asked == dead || asked == here).then(|| address.clone())
    };
    let connector = DirectConnector::new(&served.proxy_key, Arc::new(book)).unwrap();
    let mut waiting = tokio::task::JoinSet::new();
    for _ in 0..100 {
        let connector = connector.clone();
        waiting.spawn(async move { connector.open(dead, Service::Http, None, Duration::from_secs(3)).await });
    }
    tokio::task::yield_now().await;
    connector.open(here, Service::Http, None, SOON * 6).await.unwrap();
    while let Some(ended) = waiting.join_next().await {
        assert!(matches!(ended.unwrap(), Err(Error::TimedOut { .. })));
    }
}

#[tokio::test]
async fn shutdown_ends_the_listener_and_its_connections() {
    let (host_key, proxy_key) = (Identity::generate().unwrap(), Identity::generate().unwrap());
    let key = proxy_key.public_key();
    let directory = move |asked: &PublicKey| (*asked == key).then(|| Peer::Proxy(ProxyId::random()));
    let hold = async |incoming: Incoming| {
        let _held = incoming;
        std::future::pending::<()>().await;
    };
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let host = HostId::random();
    let address = HostAddress {
        peer: socket.local_addr().unwrap().to_string(),
        identity: host_key.public_key().to_string(),
        ..HostAddress::default()
    };
    let listener = PeerListener::builder(&host_key, Arc::new(directory), Arc::new(hold)).build().unwrap();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let serving = tokio::spawn(async move {
        listener.serve(socket, async move { stopped.await.unwrap_or_default() }).await;
    });
    let connector = connector(&proxy_key, host, &address);
    let mut stream = connector.open(host, Service::Http, None, SOON).await.unwrap();
    stop.send(()).unwrap();
    timeout(SOON, serving).await.unwrap().unwrap();
    let mut rest = Vec::new();
    let _ = timeout(SOON, stream.read_to_end(&mut rest)).await.expect("the connection has ended");
}
