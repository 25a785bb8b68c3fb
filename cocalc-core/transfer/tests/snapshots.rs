//! Snapshots over real TCP and TLS: what arrives, and what is left of what
//! does not.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test reports by panicking")]

use std::{
    io,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Duration,
};

use async_trait::async_trait;
use cocalc_auth::{PublicKey, identity::Identity};
use cocalc_core::{
    connector::Peer,
    control::{CommandError, ErrorCode},
    ids::{HostId, MoveId, ProjectId, Timestamp, VolumeUuid},
    moves::host::{Inbound, StreamSource, Transfer, TransferError},
    router::HostAddress,
    storage::{SendHeader, SendStream, Snapshot},
    stream::BoxRead,
};
use cocalc_transfer::{Incoming, PeerListener, PeerTransfer, SnapshotReceiver};
use tokio::{
    io::{AsyncRead, AsyncReadExt, ReadBuf},
    net::{TcpListener, TcpStream},
    time::timeout,
};

const SOON: Duration = Duration::from_secs(20);

/// A destination that keeps what arrives whole.
#[derive(Debug, Default)]
struct Destination {
    kept: Mutex<Vec<(SendHeader, Vec<u8>)>>,
    expected: Mutex<Option<(HostId, MoveId)>>,
    refuse_after: Mutex<Option<usize>>,
    failures: Mutex<Vec<String>>,
    slow: Mutex<Duration>,
}

fn listed(header: &SendHeader) -> Snapshot {
    Snapshot {
        project: header.project,
        name: header.name.clone(),
        uuid: VolumeUuid::random(),
        origin: header.origin,
        created: Timestamp::now(),
    }
}

#[async_trait]
impl Inbound for Destination {
    async fn offered(
        &self,
        from: HostId,
        move_id: MoveId,
        header: &SendHeader,
    ) -> Result<Option<Snapshot>, CommandError> {
        if *self.expected.lock().unwrap() != Some((from, move_id)) {
            return Err(CommandError { code: ErrorCode::NotFound, message: "not expected".into() });
        }
        Ok(self.kept.lock().unwrap().iter().find(|(kept, _)| kept == header).map(|(kept, _)| listed(kept)))
    }

    async fn receive(
        &self,
        _from: HostId,
        _move_id: MoveId,
        header: &SendHeader,
        mut stream: BoxRead,
    ) -> Result<Snapshot, CommandError> {
        let mut bytes = Vec::new();
        let mut buffer = vec![0; 64 << 10];
        loop {
            let slow = *self.slow.lock().unwrap();
            if !slow.is_zero() {
                tokio::time::sleep(slow).await;
            }
            let read = stream.read(&mut buffer).await.map_err(|error| {
                self.failures.lock().unwrap().push(error.to_string());
                CommandError { code: ErrorCode::Failed, message: error.to_string() }
            })?;
            if read == 0 {
                break;
            }
            bytes.extend_from_slice(&buffer[..read]);
            if self.refuse_after.lock().unwrap().is_some_and(|limit| bytes.len() > limit) {
                return Err(CommandError { code: ErrorCode::NoSpace, message: "the volume is full".into() });
            }
        }
        self.kept.lock().unwrap().push((header.clone(), bytes));
        Ok(listed(header))
    }
}

struct Way {
    destination: Arc<Destination>,
    address: HostAddress,
    source: HostId,
    to: HostId,
    move_id: MoveId,
    transfer: PeerTransfer,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Way {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn way() -> Way {
    let (source_key, host_key) = (Identity::generate().unwrap(), Identity::generate().unwrap());
    let (source, to, move_id) = (HostId::random(), HostId::random(), MoveId::random());
    let destination = Arc::new(Destination::default());
    *destination.expected.lock().unwrap() = Some((source, move_id));
    let key = source_key.public_key();
    let directory = move |asked: &PublicKey| (*asked == key).then_some(Peer::Host(source));
    let inbound = Arc::clone(&destination);
    let receiver = SnapshotReceiver::new(destination.clone());
    let handler = move |incoming: Incoming| {
        let (inbound, receiver) = (Arc::clone(&inbound), receiver.clone());
        async move {
            if let Err(error) = receiver.serve(incoming).await {
                inbound.failures.lock().unwrap().push(error.to_string());
            }
        }
    };
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = HostAddress {
        peer: socket.local_addr().unwrap().to_string(),
        identity: host_key.public_key().to_string(),
        ..HostAddress::default()
    };
    let listener = PeerListener::builder(&host_key, Arc::new(directory), Arc::new(handler)).build().unwrap();
    let task = tokio::spawn(async move { listener.serve(socket, std::future::pending()).await });
    let transfer = PeerTransfer::new(&source_key).unwrap();
    Way { destination, address, source, to, move_id, transfer, task }
}

fn header() -> SendHeader {
    SendHeader {
        backend: "test".into(),
        project: ProjectId::random(),
        name: "move-1.0".parse().unwrap(),
        origin: VolumeUuid::random(),
        base: None,
        extra: String::new(),
        estimated_bytes: 0,
        left_out: Vec::new(),
    }
}

fn content(size: usize) -> Vec<u8> {
    (0..size).map(|i| (i * 31 % 251) as u8).collect()
}

/// Something to send that cannot be read again.
struct Once(Mutex<Option<SendStream>>);

#[async_trait]
impl StreamSource for Once {
    async fn open(&self) -> Result<SendStream, TransferError> {
        Ok(self.0.lock().unwrap().take().expect("it is not read again"))
    }

    fn repeatable(&self) -> bool {
        false
    }
}

fn once(header: SendHeader, reader: impl AsyncRead + Send + 'static) -> Once {
    Once(Mutex::new(Some(SendStream { header, reader: Box::pin(reader) })))
}

fn stream(header: &SendHeader, bytes: Vec<u8>) -> Once {
    once(header.clone(), io::Cursor::new(bytes))
}

impl Way {
    async fn send(&self, stream: Once) -> Result<u64, TransferError> {
        let sending = self.transfer.send(self.to, &self.address, self.move_id, &stream, &|_| ());
        timeout(SOON, sending).await.expect("it ends").map(|delivered| delivered.bytes)
    }

    async fn eventually(&self, what: &str, done: impl Fn(&Destination) -> bool) {
        let wait = async {
            while !done(&self.destination) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(SOON, wait).await.expect(what);
    }

    fn kept(&self) -> usize {
        self.destination.kept.lock().unwrap().len()
    }
}

#[tokio::test]
async fn what_is_sent_arrives_once() {
    let way = way().await;
    for size in [0, 1, 5 << 20] {
        let (header, bytes) = (header(), content(size));
        let heard = Arc::new(Mutex::new(Vec::new()));
        let hear = Arc::clone(&heard);
        let progress = move |bytes| hear.lock().unwrap().push(bytes);
        let sending = stream(&header, bytes.clone());
        let sending = way.transfer.send(way.to, &way.address, way.move_id, &sending, &progress);
        let delivered = timeout(SOON, sending).await.unwrap().unwrap();
        assert_eq!(delivered.bytes, size as u64);
        assert_eq!(delivered.snapshot.origin, header.origin);
        let heard = heard.lock().unwrap().clone();
        assert!(heard.is_sorted() && heard.last().copied().unwrap_or(0) == size as u64);
        assert_eq!(way.destination.kept.lock().unwrap().last().unwrap().1, bytes);
        // Again: it is there, and not a byte is sent.
        let kept = way.kept();
        assert_eq!(way.send(stream(&header, bytes)).await.unwrap(), 0);
        assert_eq!(way.kept(), kept);
    }
}

#[tokio::test]
async fn another_move_and_another_host_are_refused() {
    let way = way().await;
    for expected in [(way.source, MoveId::random()), (HostId::random(), way.move_id)] {
        *way.destination.expected.lock().unwrap() = Some(expected);
        let error = way.send(stream(&header(), content(10))).await.unwrap_err();
        let TransferError::Refused(refusal) = error else { panic!("{error}") };
        assert_eq!(refusal.code, ErrorCode::NotFound);
    }
    assert_eq!(way.kept(), 0);
}

#[tokio::test]
async fn a_full_destination_says_so_in_the_middle() {
    let way = way().await;
    *way.destination.refuse_after.lock().unwrap() = Some(1 << 20);
    let error = way.send(stream(&header(), content(64 << 20))).await.unwrap_err();
    let TransferError::Refused(refusal) = error else { panic!("{error}") };
    assert_eq!(refusal.code, ErrorCode::NoSpace);
    assert_eq!(way.kept(), 0);
}

/// Gives bytes, then an error.
struct Broken(u64);

impl AsyncRead for Broken {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.0 == 0 {
            return Poll::Ready(Err(io::Error::other("the disk is gone")));
        }
        let now = usize::try_from(self.0).unwrap().min(buf.remaining());
        buf.put_slice(&vec![7; now]);
        self.0 -= now as u64;
        Poll::Ready(Ok(()))
    }
}

#[tokio::test]
async fn a_source_that_fails_leaves_nothing() {
    let way = way().await;
    for good in [0, 100, 3 << 20] {
        let sending = once(header(), Broken(good));
        let error = way.send(sending).await.unwrap_err();
        assert!(matches!(error, TransferError::Source { .. }), "{error}");
    }
    way.eventually("the receiver notices", |d| d.failures.lock().unwrap().len() >= 3).await;
    assert_eq!(way.kept(), 0);
}

#[tokio::test]
async fn a_sender_that_goes_away_leaves_nothing() {
    let way = way().await;
    // Endless, so that it is certainly in the middle.
    let sending = once(header(), Broken(u64::MAX));
    let begun = Arc::new(Mutex::new(0));
    let hear = Arc::clone(&begun);
    let progress = move |bytes| *hear.lock().unwrap() = bytes;
    {
        let sending = way.transfer.send(way.to, &way.address, way.move_id, &sending, &progress);
        let started = async {
            while *begun.lock().unwrap() < 1 << 20 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::select! {
            ended = sending => panic!("it cannot end: {ended:?}"),
            started = timeout(SOON, started) => started.expect("it starts"),
        }
    }
    way.eventually("the receiver notices", |d| !d.failures.lock().unwrap().is_empty()).await;
    assert_eq!(way.kept(), 0);
}

/// Between the two, a wire that ends after so many bytes.
async fn cutting_wire(to: String, after: u64) -> String {
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        let (near, _) = socket.accept().await.unwrap();
        let far = TcpStream::connect(to).await.unwrap();
        let (near_read, mut near_write) = near.into_split();
        let (mut far_read, mut far_write) = far.into_split();
        let back = tokio::spawn(async move { tokio::io::copy(&mut far_read, &mut near_write).await });
        let _ = tokio::io::copy(&mut near_read.take(after), &mut far_write).await;
        back.abort();
    });
    address
}

#[tokio::test]
async fn a_cut_wire_leaves_nothing_and_the_next_attempt_succeeds() {
    let way = way().await;
    let (header, bytes) = (header(), content(2 << 20));
    for after in [0, 100, 700, 5_000, 1 << 20] {
        let peer = cutting_wire(way.address.peer.clone(), after).await;
        let address = HostAddress { peer, ..way.address.clone() };
        let sending = stream(&header, bytes.clone());
        let sending = way.transfer.send(way.to, &address, way.move_id, &sending, &|_| ());
        let error = timeout(SOON, sending).await.expect("it ends").unwrap_err();
        assert!(matches!(error, TransferError::Cut { .. }), "{after}: {error}");
        assert_eq!(way.kept(), 0, "{after}");
    }
    assert_eq!(way.send(stream(&header, bytes)).await.unwrap(), 2 << 20);
    assert_eq!(way.kept(), 1);
}

#[tokio::test]
async fn a_slow_receiver_holds_the_sender_back() {
    let way = way().await;
    *way.destination.slow.lock().unwrap() = Duration::from_millis(20);
    let sent = Arc::new(Mutex::new(0));
    let hear = Arc::clone(&sent);
    let progress = move |bytes| *hear.lock().unwrap() = bytes;
    let sending = once(header(), Broken(u64::MAX));
    let sending = way.transfer.send(way.to, &way.address, way.move_id, &sending, &progress);
    // At 64 KiB per 20 ms, a second is 3 MiB. What lies between the two is
    // bounded by the sockets' buffers and two chunks, far below what an
    // unbounded queue would take from an endless source in that time.
    let ended = timeout(Duration::from_secs(1), sending).await;
    assert!(ended.is_err());
    let sent = *sent.lock().unwrap();
    assert!(sent < 64 << 20, "{sent} bytes were taken from the source");
}

#[tokio::test]
async fn a_receiver_that_stands_still_is_given_up() {
    let mut way = way().await;
    *way.destination.slow.lock().unwrap() = Duration::from_secs(3600);
    way.transfer = way.transfer.clone().stall_limit(Duration::from_millis(300));
    let sending = once(header(), Broken(u64::MAX));
    let error = way.send(sending).await.unwrap_err();
    assert!(matches!(error, TransferError::Cut { .. }), "{error}");
}
