//! Whole moves between two hosts with real volumes and connections: what
//! becomes of the project's snapshots.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test reports by panicking")]

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use cocalc_auth::{PublicKey, identity::Identity};
use cocalc_core::{
    BoxError,
    clock::SystemClock,
    connector::Peer,
    control::{CommandError, ErrorCode, HostCommand, HostReply, MoveCommand, ProjectConfig},
    grant::{Ledger, MemoryLedgerStore},
    ids::{Epoch, HostId, MoveId, ProjectId, SnapshotName, Timestamp, VolumeUuid},
    memory::runner::MemoryRunner,
    moves::{
        Change, MoveEffects, MoveOutcome, MoveSpec, MoveState, NoAnswer, Saved, Tuning, drive, host::MoveHost,
    },
    router::HostAddress,
    storage::{Storage, VolumeOptions},
};
use cocalc_storage::{Btrfs, loopback::Loopback};
use cocalc_transfer::{Incoming, PeerListener, PeerTransfer, SnapshotReceiver};
use tokio::{net::TcpListener, sync::watch};

struct Host {
    id: HostId,
    address: HostAddress,
    store: Btrfs,
    ledger: Ledger,
    moves: MoveHost,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Host {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Two hosts, and who has the project.
struct World {
    hosts: [Host; 2],
    project: ProjectId,
    epoch: Epoch,
    owner: usize,
    _volumes: [Loopback; 2],
    _root: tempfile::TempDir,
}

async fn host(path: &Path, id: HostId, key: Identity, known: [(PublicKey, HostId); 2]) -> Host {
    Btrfs::initialize(path).unwrap();
    let store = Btrfs::open(path).await.unwrap();
    let ledger = Ledger::open(id, Arc::new(MemoryLedgerStore::default())).await.unwrap();
    let clock = Arc::new(SystemClock);
    let runner = Arc::new(MemoryRunner::new(clock));
    let transfer = Arc::new(PeerTransfer::new(&key).unwrap());
    let moves = MoveHost::builder(ledger.clone(), Arc::new(store.clone()), runner, transfer).build();
    let directory = move |asked: &PublicKey| {
        known.iter().find(|(key, _)| key == asked).map(|(_, host)| Peer::Host(*host))
    };
    let receiver = SnapshotReceiver::new(Arc::new(moves.clone()));
    let handler = move |incoming: Incoming| {
        let receiver = receiver.clone();
        async move {
            receiver.serve(incoming).await.unwrap();
        }
    };
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = HostAddress {
        peer: socket.local_addr().unwrap().to_string(),
        identity: key.public_key().to_string(),
        ..HostAddress::default()
    };
    let listener = PeerListener::builder(&key, Arc::new(directory), Arc::new(handler)).build().unwrap();
    let task = tokio::spawn(async move { listener.serve(socket, std::future::pending()).await });
    Host { id, address, store, ledger, moves, task }
}

async fn world() -> World {
    let root = tempfile::tempdir().unwrap();
    let volume = |name: &str| {
        let made =
            Loopback::create(&root.path().join(format!("{name}.img")), 512 << 20, &root.path().join(name));
        made.unwrap_or_else(|error| {
            panic!("needs root, mkfs.btrfs and loop devices: {}", cocalc_core::chain(&error))
        })
    };
    let volumes = [volume("a"), volume("b")];
    let keys = [Identity::generate().unwrap(), Identity::generate().unwrap()];
    let ids = [HostId::random(), HostId::random()];
    let known = [(keys[0].public_key(), ids[0]), (keys[1].public_key(), ids[1])];
    let [key_a, key_b] = keys;
    let a = host(volumes[0].path(), ids[0], key_a, known).await;
    let b = host(volumes[1].path(), ids[1], key_b, known).await;
    let project = ProjectId::random();
    a.store.create(project, &VolumeOptions::default()).await.unwrap();
    a.ledger.create(project, Epoch::FIRST, ProjectConfig::default()).await.unwrap();
    World { hosts: [a, b], project, epoch: Epoch::FIRST, owner: 0, _volumes: volumes, _root: root }
}

/// The master, in one struct.
struct Master<'a> {
    world: &'a World,
    stored: Mutex<MoveState>,
    /// A step that a host refuses.
    refused: Option<&'static str>,
}

impl fmt::Debug for Master<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Master")
    }
}

#[async_trait]
impl MoveEffects for Master<'_> {
    async fn command(
        &self,
        host: HostId,
        command: HostCommand,
        _timeout: Duration,
    ) -> Result<HostReply, NoAnswer> {
        let HostCommand::Move { move_id, project, step } = command else { return Err(NoAnswer) };
        if self.refused == Some("stage") && matches!(step, MoveCommand::Stage { .. }) {
            let message = "not today".to_owned();
            return Ok(HostReply::Error(CommandError { code: ErrorCode::Invalid, message }));
        }
        let host = self.world.hosts.iter().find(|known| known.id == host).unwrap();
        Ok(host.moves.execute(move_id, project, step).await)
    }

    async fn save(&self, state: &MoveState, expected: u64, _change: Change) -> Result<Saved, BoxError> {
        let mut stored = self.stored.lock().unwrap();
        assert_eq!(stored.revision, expected);
        *stored = state.clone();
        Ok(Saved::Yes)
    }

    async fn pause(&self, _host: Option<HostId>, delay: Duration) {
        tokio::time::sleep(delay).await;
    }

    fn progress(&self, _state: &MoveState) {}
}

fn named(text: &str) -> SnapshotName {
    text.parse().unwrap()
}

type Listed = Vec<(SnapshotName, VolumeUuid, Timestamp)>;

impl World {
    /// Moves the project to the other host, and returns what was sent.
    async fn move_over(&mut self, refused: Option<&'static str>) -> MoveState {
        let (source, destination) = (&self.hosts[self.owner], &self.hosts[1 - self.owner]);
        let spec = MoveSpec {
            move_id: MoveId::random(),
            project: self.project,
            source: source.id,
            destination: destination.id,
            destination_address: destination.address.clone(),
            epoch: self.epoch,
            config: ProjectConfig::default(),
            bytes: 0,
            stream_version: destination.store.capabilities().stream_version,
            deltas: true,
            tuning: Tuning::default(),
        };
        let state = MoveState::new(spec);
        let master = Master { world: self, stored: Mutex::new(state.clone()), refused };
        let (_cancel, cancelled) = watch::channel(false);
        let outcome = drive(&master, state, cancelled).await.unwrap();
        let state = master.stored.into_inner().unwrap();
        let expected = if refused.is_some() { MoveOutcome::Aborted } else { MoveOutcome::Moved };
        assert_eq!(outcome, expected, "{:?}", state.failure);
        self.epoch = state.new_epoch.unwrap();
        if outcome == MoveOutcome::Moved {
            self.owner = 1 - self.owner;
        }
        state
    }

    async fn live(&self) -> PathBuf {
        self.hosts[self.owner].store.volume(self.project).await.unwrap().path.unwrap()
    }

    async fn snapshot(&self, name: &str) {
        self.hosts[self.owner].store.snapshot(self.project, &named(name)).await.unwrap();
    }

    async fn own(&self, host: usize) -> Listed {
        let own = self.hosts[host].moves.own_snapshots(self.project).await.unwrap();
        own.into_iter().map(|snapshot| (snapshot.name, snapshot.origin, snapshot.created)).collect()
    }

    async fn all(&self, host: usize) -> Vec<String> {
        let all = self.hosts[host].store.snapshots(self.project).await.unwrap();
        all.into_iter().map(|snapshot| snapshot.name.to_string()).collect()
    }

    async fn same(&self, name: &str) {
        let at = async |host: usize| {
            self.hosts[host].store.snapshot_path(self.project, &named(name)).await.unwrap()
        };
        let status = Command::new("diff").arg("-r").args([at(0).await, at(1).await]).status().unwrap();
        assert!(status.success(), "{name}");
    }
}

fn text(seed: u64, size: usize) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..size).map(|_| next()).collect()
}

fn names(listed: &Listed) -> Vec<&str> {
    listed.iter().map(|(name, ..)| name.as_str()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn snapshots_move_with_their_project_and_only_what_is_missing_is_sent() {
    const MIB: usize = 1 << 20;
    let mut world = world().await;
    let live = world.live().await;
    fs::write(live.join("home/old"), text(1, 3 * MIB)).unwrap();
    world.snapshot("first").await;
    fs::write(live.join("home/new"), text(2, 2 * MIB)).unwrap();
    fs::remove_file(live.join("home/old")).unwrap();
    world.snapshot("undo-the-mess").await;
    fs::write(live.join("home/last"), text(3, MIB)).unwrap();
    world.snapshot("third").await;
    fs::write(live.join("home/live"), "now").unwrap();
    let taken = world.own(0).await;
    tokio::time::sleep(Duration::from_millis(1100)).await;

    let moved = world.move_over(None).await;
    assert_eq!(world.own(1).await, taken, "names, origins and times");
    for name in ["first", "undo-the-mess", "third"] {
        world.same(name).await;
    }
    assert_eq!(fs::read_to_string(world.live().await.join("home/live")).unwrap(), "now");
    let sent = usize::try_from(moved.bytes_sent).unwrap();
    assert!(sent > 6 * MIB && sent < 7 * MIB, "each byte once: {sent}");
    assert!(moved.spec.bytes > 5 << 20, "the source has measured it: {}", moved.spec.bytes);
    assert_eq!(world.all(1).await.len(), 3, "nothing of the move is left: {:?}", world.all(1).await);
    assert_eq!(world.all(0).await.len(), 4, "the undo, with its snapshots: {:?}", world.all(0).await);

    // Work goes on there: one snapshot more, one less, one of the same name.
    let live = world.live().await;
    fs::write(live.join("home/more"), text(4, MIB)).unwrap();
    world.snapshot("fourth").await;
    let there = &world.hosts[1].store;
    there.delete_snapshot(world.project, &named("first")).await.unwrap();
    there.delete_snapshot(world.project, &named("undo-the-mess")).await.unwrap();
    world.snapshot("undo-the-mess").await;
    fs::write(live.join("home/live"), "later").unwrap();
    let taken = world.own(1).await;
    assert_eq!(names(&taken), ["third", "fourth", "undo-the-mess"]);

    let back = world.move_over(None).await;
    let sent = usize::try_from(back.bytes_sent).unwrap();
    assert!(sent < MIB + MIB / 2, "only what is new: {sent}");
    assert_eq!(world.own(0).await, taken, "what was deleted does not come back");
    assert_eq!(world.all(0).await.len(), 3, "{:?}", world.all(0).await);
    for name in ["third", "fourth", "undo-the-mess"] {
        world.same(name).await;
    }
    assert_eq!(fs::read_to_string(world.live().await.join("home/live")).unwrap(), "later");

    // A move that does not succeed leaves the other host as it was.
    fs::write(world.live().await.join("home/again"), text(5, MIB)).unwrap();
    world.snapshot("fifth").await;
    let before = world.all(1).await;
    let (there, here) = (world.own(1).await, world.own(0).await);
    let aborted = world.move_over(Some("stage")).await;
    assert!(aborted.snapshots.iter().all(|planned| planned.arrived), "everything was there");
    assert_eq!((world.own(1).await, world.all(1).await), (there, before));
    assert_eq!(world.own(0).await, here);
    assert_eq!(world.all(0).await.len(), 4, "{:?}", world.all(0).await);

    // And when the undo is old enough, nothing is left there.
    world.hosts[1].moves.expire_undo(Duration::from_secs(3600)).await;
    assert!(!world.all(1).await.is_empty(), "not yet");
    world.hosts[1].moves.expire_undo(Duration::ZERO).await;
    assert_eq!(world.all(1).await, Vec::<String>::new());
    world.hosts[0].moves.expire_undo(Duration::ZERO).await;
    assert_eq!(world.own(0).await, here, "the owner's are no undo");
    for host in &world.hosts {
        let mut staged = fs::read_dir(host.store.path().join("staging")).unwrap();
        assert!(staged.next().is_none(), "staging is empty");
    }
    world.move_over(None).await;
    assert_eq!(world.own(1).await, here, "all of it again");
}
