//! Connections that break in the middle of a snapshot, over real TCP and TLS:
//! the stream goes on where it was, or begins again, and what arrives is right.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test reports by panicking")]

use std::{
    io,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use cocalc_auth::{PublicKey, identity::Identity};
use cocalc_core::{
    connector::Peer,
    control::{CommandError, ErrorCode},
    ids::{HostId, MoveId, ProjectId, SnapshotName, Timestamp, VolumeUuid},
    moves::host::{Inbound, StreamSource, Transfer, TransferError},
    router::HostAddress,
    storage::{SendHeader, SendOptions, SendStream, Snapshot, Storage, VolumeOptions},
    stream::BoxRead,
};
use cocalc_storage::{Btrfs, loopback::Loopback};
use cocalc_transfer::{Incoming, PeerListener, PeerTransfer, SnapshotReceiver};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::timeout,
};

const SOON: Duration = Duration::from_secs(60);
const SIZE: usize = 6 << 20;

/// A destination that keeps what arrives whole.
#[derive(Debug, Default)]
struct Destination {
    kept: Mutex<Vec<(SendHeader, Vec<u8>)>>,
    begun: AtomicUsize,
    /// Refuses everything, before it has read a byte.
    full: std::sync::atomic::AtomicBool,
    broken: AtomicUsize,
}

#[async_trait]
impl Inbound for Destination {
    async fn offered(
        &self,
        _from: HostId,
        _move_id: MoveId,
        header: &SendHeader,
    ) -> Result<Option<Snapshot>, CommandError> {
        Ok(self.kept.lock().unwrap().iter().find(|(kept, _)| kept == header).map(|(kept, _)| listed(kept)))
    }

    async fn receive(
        &self,
        _from: HostId,
        _move_id: MoveId,
        header: &SendHeader,
        mut stream: BoxRead,
    ) -> Result<Snapshot, CommandError> {
        self.begun.fetch_add(1, Ordering::SeqCst);
        if self.full.load(Ordering::SeqCst) {
            return Err(CommandError { code: ErrorCode::NoSpace, message: "the volume is full".into() });
        }
        let mut bytes = Vec::new();
        if let Err(error) = stream.read_to_end(&mut bytes).await {
            self.broken.fetch_add(1, Ordering::SeqCst);
            return Err(CommandError { code: ErrorCode::Failed, message: error.to_string() });
        }
        self.kept.lock().unwrap().push((header.clone(), bytes));
        Ok(listed(header))
    }
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

/// A snapshot that can be read again, and then may be another.
struct Again {
    header: SendHeader,
    content: Mutex<Vec<u8>>,
    opened: AtomicUsize,
    /// Changed each time that it is opened.
    changing: bool,
}

impl Again {
    fn new(changing: bool) -> Self {
        let header = SendHeader {
            backend: "test".into(),
            project: ProjectId::random(),
            name: "daily".parse().unwrap(),
            origin: VolumeUuid::random(),
            base: None,
            extra: String::new(),
            estimated_bytes: SIZE as u64,
            left_out: Vec::new(),
        };
        let content = (0..SIZE).map(|i| (i * 31 % 251) as u8).collect();
        Self { header, content: Mutex::new(content), opened: AtomicUsize::new(0), changing }
    }
}

#[async_trait]
impl StreamSource for Again {
    async fn open(&self) -> Result<SendStream, TransferError> {
        let mut content = self.content.lock().unwrap();
        self.opened.fetch_add(1, Ordering::SeqCst);
        if self.changing {
            content[10] ^= 1;
        }
        Ok(SendStream { header: self.header.clone(), reader: Box::pin(io::Cursor::new(content.clone())) })
    }

    fn repeatable(&self) -> bool {
        true
    }
}

/// What a wire does to one connection.
#[derive(Clone, Copy, Debug)]
enum Wire {
    /// It breaks after so many bytes towards the receiver.
    Breaks(u64),
    /// It breaks after so many bytes back.
    BreaksBack(u64),
    /// It carries so many bytes and then nothing, and stays open.
    Silent(u64),
}

/// Listens in front of a receiver, and treats the connections to it as told,
/// one after the other; those after the last one it leaves alone.
struct Between {
    address: HostAddress,
    carried: Arc<AtomicU64>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Between {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn between(to: &HostAddress, wires: Vec<Wire>) -> Between {
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = HostAddress { peer: socket.local_addr().unwrap().to_string(), ..to.clone() };
    let (carried, target) = (Arc::new(AtomicU64::new(0)), to.peer.clone());
    let count = Arc::clone(&carried);
    let task = tokio::spawn(async move {
        let mut wires = wires.into_iter();
        let mut open = tokio::task::JoinSet::new();
        loop {
            let (near, _) = socket.accept().await.unwrap();
            let far = TcpStream::connect(&target).await.unwrap();
            open.spawn(carry(near, far, wires.next(), Arc::clone(&count)));
        }
    });
    Between { address, carried, task }
}

async fn carry(near: TcpStream, far: TcpStream, wire: Option<Wire>, carried: Arc<AtomicU64>) {
    let (near_read, near_write) = near.into_split();
    let (far_read, far_write) = far.into_split();
    let (forth, back) = match wire {
        Some(Wire::Breaks(bytes) | Wire::Silent(bytes)) => (bytes, u64::MAX),
        Some(Wire::BreaksBack(bytes)) => (u64::MAX, bytes),
        None => (u64::MAX, u64::MAX),
    };
    let pipe = async |mut from: tokio::net::tcp::OwnedReadHalf,
                      mut to: tokio::net::tcp::OwnedWriteHalf,
                      mut most: u64,
                      count: Option<&AtomicU64>| {
        let mut buffer = vec![0; 16 << 10];
        while most > 0 {
            let room = usize::try_from(most).unwrap_or(buffer.len()).min(buffer.len());
            let Ok(read @ 1..) = from.read(&mut buffer[..room]).await else { break };
            if to.write_all(&buffer[..read]).await.is_err() {
                break;
            }
            most -= read as u64;
            count.map(|count| count.fetch_add(read as u64, Ordering::SeqCst));
        }
        if matches!(wire, Some(Wire::Silent(_))) {
            std::future::pending::<()>().await;
        }
        // One that has ended by itself lets the other one end; one that broke
        // takes it along.
        if most > 0 {
            let _ = to.shutdown().await;
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        () = pipe(near_read, far_write, forth, Some(&carried)) => {}
        () = pipe(far_read, near_write, back, None) => {}
    }
}

struct Way {
    destination: Arc<Destination>,
    receiver: SnapshotReceiver,
    address: HostAddress,
    to: HostId,
    move_id: MoveId,
    /// Two hosts that the destination knows.
    senders: [PeerTransfer; 2],
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Way {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve<I: Inbound>(
    inbound: Arc<I>,
    wait: Duration,
    max: usize,
) -> (SnapshotReceiver, HostAddress, [PeerTransfer; 2], tokio::task::JoinHandle<()>) {
    let keys = [Identity::generate().unwrap(), Identity::generate().unwrap()];
    let host_key = Identity::generate().unwrap();
    let known = keys.each_ref().map(|key| (key.public_key(), HostId::random()));
    let directory = move |asked: &PublicKey| {
        known.iter().find(|(key, _)| key == asked).map(|(_, host)| Peer::Host(*host))
    };
    let receiver = SnapshotReceiver::builder(inbound).wait(wait).waiting_max(max).build();
    let receiving = receiver.clone();
    let handler = move |incoming: Incoming| {
        let receiver = receiving.clone();
        async move {
            let _ = receiver.serve(incoming).await;
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
    let senders = keys.each_ref().map(|key| PeerTransfer::new(key).unwrap());
    (receiver, address, senders, task)
}

async fn way(wait: Duration, max: usize) -> Way {
    let destination = Arc::new(Destination::default());
    let (receiver, address, senders, task) = serve(Arc::clone(&destination), wait, max).await;
    let (to, move_id) = (HostId::random(), MoveId::random());
    Way { destination, receiver, address, to, move_id, senders, task }
}

impl Way {
    /// Sends, and checks that progress never goes back.
    async fn send(&self, sender: usize, at: &HostAddress, source: &Again) -> Result<u64, TransferError> {
        let last = AtomicU64::new(0);
        let progress = |bytes| {
            let before = last.swap(bytes, Ordering::SeqCst);
            assert!(before < bytes, "{before} and then {bytes} bytes");
        };
        let sending = self.senders[sender].send(self.to, at, self.move_id, source, &progress);
        let delivered = timeout(SOON, sending).await.expect("it ends")?;
        assert_eq!(delivered.snapshot.origin, source.header.origin);
        Ok(delivered.bytes)
    }

    fn begun(&self) -> usize {
        self.destination.begun.load(Ordering::SeqCst)
    }

    fn kept(&self) -> Vec<u8> {
        let kept = self.destination.kept.lock().unwrap();
        assert_eq!(kept.len(), 1, "it is kept once");
        kept[0].1.clone()
    }

    async fn eventually(&self, what: &str, done: impl Fn() -> bool) {
        let wait = async {
            while !done() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(SOON, wait).await.unwrap_or_else(|_| panic!("{what}"));
    }
}

const LONG: Duration = Duration::from_secs(60);

#[tokio::test]
async fn a_broken_stream_goes_on_where_it_was() {
    let size = SIZE as u64;
    for wires in [
        vec![Wire::Breaks(0)],
        vec![Wire::Breaks(100)],
        vec![Wire::Breaks(700), Wire::Breaks(1300)],
        vec![Wire::Breaks(5_000)],
        vec![Wire::Breaks(300_000), Wire::Breaks(300_000), Wire::Breaks(300_000)],
        vec![Wire::Breaks(3 << 20), Wire::Breaks(1 << 20)],
        vec![Wire::Breaks(size), Wire::Breaks(700)],
        vec![Wire::BreaksBack(0)],
        vec![Wire::BreaksBack(900)],
    ] {
        let way = way(LONG, 16).await;
        let between = between(&way.address, wires.clone()).await;
        let source = Again::new(false);
        assert_eq!(way.send(0, &between.address, &source).await.unwrap(), size, "{wires:?}");
        assert!(way.kept() == *source.content.lock().unwrap(), "{wires:?}");
        assert_eq!(way.begun(), 1, "{wires:?}: it is taken in once");
        // What lies between two points of the way is lost, and no more.
        let carried = between.carried.load(Ordering::SeqCst);
        assert!(carried < size + (wires.len() as u64) * (1 << 20) + (64 << 10), "{wires:?}: {carried} bytes");
        assert_eq!(way.receiver.waiting(), 0, "{wires:?}");
    }
}

#[tokio::test]
async fn a_lost_receipt_is_asked_for_again() {
    let way = way(LONG, 16).await;
    // Enough for the handshake and the answers before the last one, whose
    // length varies: every point around it.
    for back in (600..1500).step_by(60) {
        let between = between(&way.address, vec![Wire::BreaksBack(back)]).await;
        let source = Again::new(false);
        way.destination.kept.lock().unwrap().clear();
        way.send(0, &between.address, &source).await.unwrap();
        assert!(way.kept() == *source.content.lock().unwrap(), "{back}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_at_once_is_heard_and_nothing_is_tried_again() {
    let way = way(LONG, 16).await;
    way.destination.full.store(true, Ordering::SeqCst);
    for round in 1..=30 {
        let error = way.send(0, &way.address, &Again::new(false)).await.unwrap_err();
        let TransferError::Refused(refusal) = error else { panic!("{error}") };
        assert_eq!((refusal.code, way.begun()), (ErrorCode::NoSpace, round));
    }
    way.eventually("nothing waits", || way.receiver.waiting() == 0).await;
}

#[tokio::test]
async fn a_stream_that_begins_otherwise_begins_again() {
    let way = way(LONG, 16).await;
    let between = between(&way.address, vec![Wire::Breaks(3 << 20)]).await;
    let source = Again::new(true);
    way.send(0, &between.address, &source).await.unwrap();
    assert!(way.kept() == *source.content.lock().unwrap(), "all of it is of the last reading");
    assert_eq!(way.begun(), 2);
    way.eventually("the first is given up", || way.destination.broken.load(Ordering::SeqCst) <= 1).await;
}

#[tokio::test]
async fn a_receiver_that_was_started_again_begins_again() {
    let way = way(LONG, 16).await;
    let source = Again::new(false);
    break_off(&way, 0, &source).await;
    // The next process of the same destination.
    let next = SnapshotReceiver::new(way.destination.clone());
    assert_eq!(next.waiting(), 0);
    let (_, address, senders, task) = serve(Arc::clone(&way.destination), LONG, 16).await;
    let sent = senders[0].send(way.to, &address, way.move_id, &source, &|_| ());
    timeout(SOON, sent).await.unwrap().unwrap();
    assert!(way.kept() == *source.content.lock().unwrap());
    assert_eq!(way.begun(), 2);
    task.abort();
}

/// Lets a stream break off for good in the middle.
async fn break_off(way: &Way, sender: usize, source: &Again) {
    let between = between(&way.address, vec![Wire::Silent(3 << 20)]).await;
    let before = way.receiver.waiting();
    {
        let sending = way.senders[sender].send(way.to, &between.address, way.move_id, source, &|_| ());
        tokio::select! {
            ended = sending => panic!("it cannot end: {ended:?}"),
            () = way.eventually("it is under way", || between.carried.load(Ordering::SeqCst) >= 3 << 20) => {}
        }
    }
    drop(between);
    way.eventually("it waits", || way.receiver.waiting() == before + 1).await;
}

#[tokio::test]
async fn nobody_goes_on_with_what_another_host_has_begun() {
    let way = way(LONG, 16).await;
    let source = Again::new(false);
    break_off(&way, 0, &source).await;
    // The same snapshot for the same move from another host, and from the same
    // host for another move: each begins anew, and takes nothing away.
    let between_two = between(&way.address, Vec::new()).await;
    way.send(1, &between_two.address, &source).await.unwrap();
    assert!(between_two.carried.load(Ordering::SeqCst) > SIZE as u64, "all of it was sent");
    assert_eq!((way.begun(), way.receiver.waiting()), (2, 1));
    way.destination.kept.lock().unwrap().clear();
    let other = way.senders[0].send(way.to, &between_two.address, MoveId::random(), &source, &|_| ());
    timeout(SOON, other).await.unwrap().unwrap();
    assert_eq!((way.begun(), way.receiver.waiting()), (3, 1));
    way.destination.kept.lock().unwrap().clear();
    // And who has begun goes on.
    let between_one = between(&way.address, Vec::new()).await;
    way.send(0, &between_one.address, &source).await.unwrap();
    assert_eq!((way.begun(), way.receiver.waiting()), (3, 0));
    assert!(way.kept() == *source.content.lock().unwrap());
    assert!(between_one.carried.load(Ordering::SeqCst) < SIZE as u64);
}

#[tokio::test]
async fn another_snapshot_takes_the_place_of_one_that_waits() {
    let way = way(LONG, 16).await;
    let (first, second) = (Again::new(false), Again::new(false));
    break_off(&way, 0, &first).await;
    way.send(0, &way.address, &second).await.unwrap();
    assert_eq!(way.receiver.waiting(), 0, "the first is given up");
    assert_eq!(way.destination.kept.lock().unwrap()[0].0, second.header);
}

#[tokio::test]
async fn what_waits_is_bounded_in_number_and_time() {
    let mut way = way(LONG, 2).await;
    for number in 0..4usize {
        let source = Again::new(false);
        way.move_id = MoveId::random();
        let between = between(&way.address, vec![Wire::Silent(1 << 20)]).await;
        let sending = way.senders[0].send(way.to, &between.address, way.move_id, &source, &|_| ());
        tokio::select! {
            ended = sending => panic!("it cannot end: {ended:?}"),
            () = way.eventually("begun", || way.begun() == number + 1
                && between.carried.load(Ordering::SeqCst) >= 1 << 20) => {}
        }
        drop(between);
        way.eventually("it waits", || way.receiver.waiting() == (number + 1).min(2)).await;
    }
    let way = self::way(Duration::from_millis(200), 16).await;
    break_off(&way, 0, &Again::new(false)).await;
    way.eventually("it is given up", || way.receiver.waiting() == 0).await;
}

#[tokio::test]
async fn a_connection_that_fell_silent_is_replaced() {
    let mut way = way(LONG, 16).await;
    way.senders = way.senders.clone().map(|sender| sender.stall_limit(Duration::from_millis(400)));
    let between = between(&way.address, vec![Wire::Silent(2 << 20)]).await;
    let source = Again::new(false);
    // The receiver's end of the silent one stays open all the while.
    way.send(0, &between.address, &source).await.unwrap();
    assert!(way.kept() == *source.content.lock().unwrap());
    assert_eq!(way.begun(), 1);
}

/// Takes in whatever comes.
#[derive(Debug)]
struct Volume(Btrfs);

#[async_trait]
impl Inbound for Volume {
    async fn offered(
        &self,
        _from: HostId,
        _move_id: MoveId,
        header: &SendHeader,
    ) -> Result<Option<Snapshot>, CommandError> {
        let all = self.0.snapshots(header.project).await.unwrap();
        Ok(all.into_iter().find(|snapshot| snapshot.name == header.name))
    }

    async fn receive(
        &self,
        _from: HostId,
        _move_id: MoveId,
        header: &SendHeader,
        stream: BoxRead,
    ) -> Result<Snapshot, CommandError> {
        let received = self.0.receive(header, stream).await;
        received.map_err(cocalc_core::moves::host::storage_error)
    }
}

struct Frozen {
    store: Btrfs,
    project: ProjectId,
    name: SnapshotName,
    base: Option<SnapshotName>,
}

#[async_trait]
impl StreamSource for Frozen {
    async fn open(&self) -> Result<SendStream, TransferError> {
        let options = SendOptions { version_max: 2, ..SendOptions::since(self.base.as_ref()) };
        let stream = self.store.send(self.project, &self.name, &options).await;
        stream.map_err(|error| TransferError::Source { source: error.into() })
    }

    fn repeatable(&self) -> bool {
        self.store.capabilities().repeatable_streams
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn btrfs_streams_go_on_over_broken_connections() {
    let root = tempfile::tempdir().unwrap();
    let volume = |name: &str| {
        let made =
            Loopback::create(&root.path().join(format!("{name}.img")), 512 << 20, &root.path().join(name));
        made.unwrap_or_else(|error| {
            panic!("needs root, mkfs.btrfs and loop devices: {}", cocalc_core::chain(&error))
        })
    };
    let volumes = [volume("a"), volume("b")];
    let open = async |path: &Path| {
        Btrfs::initialize(path).unwrap();
        Btrfs::open(path).await.unwrap()
    };
    let (a, b) = (open(volumes[0].path()).await, open(volumes[1].path()).await);
    let project = ProjectId::random();
    let live = a.create(project, &VolumeOptions::default()).await.unwrap().path.unwrap();
    let (receiver, address, senders, task) = serve(Arc::new(Volume(b.clone())), LONG, 16).await;
    let (to, move_id) = (HostId::random(), MoveId::random());
    let mut base = None;
    for turn in 0..3u8 {
        for file in 0..300u32 {
            let content: Vec<u8> =
                (0..40_000u32).map(|i| ((i * (file + 7) * (u32::from(turn) + 3)) >> 5) as u8).collect();
            std::fs::write(live.join(format!("home/{turn}-{file}")), content).unwrap();
        }
        let name: SnapshotName = format!("turn-{turn}").parse().unwrap();
        a.snapshot(project, &name).await.unwrap();
        let source = Frozen { store: a.clone(), project, name: name.clone(), base: base.clone() };
        let wires =
            vec![Wire::Breaks(1_000_000 * (u64::from(turn) + 1)), Wire::Breaks(4_000_000), Wire::Breaks(900)];
        let between = between(&address, wires).await;
        let sent = senders[0].send(to, &between.address, move_id, &source, &|_| ());
        let sent = timeout(SOON, sent).await.unwrap().unwrap();
        let carried = between.carried.load(Ordering::SeqCst);
        assert!(sent.bytes > 12_000_000 && carried < sent.bytes + (3 << 20), "{} {carried}", sent.bytes);
        let (left, right) =
            (a.snapshot_path(project, &name).await.unwrap(), b.snapshot_path(project, &name).await.unwrap());
        let same = std::process::Command::new("diff").arg("-r").args([left, right]).status().unwrap();
        assert!(same.success());
        base = Some(name);
    }
    assert_eq!(receiver.waiting(), 0);
    assert!(std::fs::read_dir(b.path().join("staging")).unwrap().next().is_none());
    task.abort();
}
