//! Two hosts: the real ledger and host side over simulated disks, containers
//! and streams.

use std::{fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use cocalc_core::{
    BoxError,
    control::ProjectConfig,
    grant::{Entry, Ledger, LedgerStore},
    moves::{
        host::{Delivered, Inbound, MoveHost, StreamSource, Transfer, TransferError},
        undo_name,
    },
    router::HostAddress,
    runner::{self, Runner, State, Status},
    storage::{self, SendHeader, SendStream, Snapshot, Storage, Volume},
    stream::{BoxRead, BoxStream},
};
use cocalc_ids::{Epoch, HostId, MoveId, ProjectId, SnapshotName, Timestamp, TreePath, VolumeUuid};
use tokio::{io::AsyncReadExt, time::Instant};
use tokio_util::sync::CancellationToken;

use super::world::{Daemon, Fault, Frozen, Shared, SimClock, World};

/// One life of a host's process, as its backends see it.
#[derive(Clone)]
struct Site {
    world: Shared,
    host: usize,
    incarnation: u64,
}

impl fmt::Debug for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Site({}, {})", self.host, self.incarnation)
    }
}

impl Site {
    /// Lets time pass. The process may crash here; then this never returns.
    async fn wait(&self) {
        let delay = self.world.lock().millis(8);
        tokio::time::sleep(delay).await;
        let dead = {
            let mut world = self.world.lock();
            let dead = world.machines[self.host].incarnation != self.incarnation;
            if !dead && world.fault(Fault::HostCrash) {
                crash(&mut world, &self.world, self.host);
            }
            world.machines[self.host].incarnation != self.incarnation
        };
        if dead {
            std::future::pending::<()>().await;
        }
    }

    /// Makes a change to the world, between two points where it may crash.
    async fn effect<T>(&self, what: &str, effect: impl FnOnce(&mut World) -> T) -> T {
        self.wait().await;
        let done = {
            let mut world = self.world.lock();
            world.event(&format!("host {} {what}", self.host));
            let done = effect(&mut world);
            world.check();
            done
        };
        self.wait().await;
        done
    }

    fn fails(&self) -> bool {
        self.world.lock().fault(Fault::Backend)
    }
}

fn crash(world: &mut World, shared: &Shared, host: usize) {
    let reboot = world.fault(Fault::Reboot);
    world.crashed();
    world.event(&format!("host {host} crashes{}", if reboot { ", the whole machine" } else { "" }));
    let machine = &mut world.machines[host];
    machine.incarnation += 1;
    if let Some(daemon) = machine.daemon.take() {
        daemon.stop.cancel();
    }
    if reboot {
        machine.running = None;
    }
    let (shared, delay) = (shared.clone(), world.millis(4000));
    tokio::spawn(async move {
        tokio::time::sleep(delay).await;
        boot(shared, host).await;
    });
}

/// Starts a host's process: load the ledger, finish what was cut off, hear
/// from the master who owns what.
pub(super) async fn boot(world: Shared, host: usize) {
    let (id, incarnation) = {
        let world = world.lock();
        (world.machines[host].id, world.machines[host].incarnation)
    };
    let site = Site { world: world.clone(), host, incarnation };
    let Ok(ledger) = Ledger::open(id, Arc::new(site.clone())).await else { return };
    let backend = Arc::new(site.clone());
    let moves = MoveHost::builder(ledger.clone(), backend.clone(), backend.clone(), backend)
        .clock(Arc::new(SimClock(Instant::now())))
        .build();
    let stop = CancellationToken::new();
    let daemon = Daemon { stop: stop.clone(), ledger, moves: moves.clone() };
    {
        let mut world = world.lock();
        if world.machines[host].incarnation != incarnation {
            return;
        }
        world.event(&format!("host {host} is up"));
        world.machines[host].daemon = Some(daemon);
    }
    let news = async {
        moves.recover().await;
        let (project, owner, epoch) = {
            let world = world.lock();
            (world.project, world.machines[world.row.0].id, world.row.1)
        };
        // What the master said may be old when it arrives.
        let delay = world.lock().millis(3000);
        tokio::time::sleep(delay).await;
        let address = HostAddress { peer: "owner".into(), ..HostAddress::default() };
        // A failure here is mended by the commands that follow.
        let _ = moves.observe(project, owner, epoch, Some(address)).await;
    };
    stop.run_until_cancelled(news).await;
}

/// Makes the project on the first host, and begins the time of faults.
pub(super) async fn place(world: &Shared) {
    let (project, daemon, wanted) = {
        let mut world = world.lock();
        world.machines[0].live = Some(0);
        // It lived on both before, and left its undo.
        for (host, machine) in world.machines.iter_mut().enumerate() {
            let earlier = MoveId::from_random_bytes([u8::from(host == 0); 16]);
            let undo = Frozen { content: 0, origin: VolumeUuid::from_random_bytes([9; 16]) };
            machine.snapshots.insert(undo_name(earlier), undo);
        }
        furnish(&mut world);
        (world.project, world.machines[0].daemon.clone().expect("no faults yet"), world.wanted)
    };
    daemon.ledger.create(project, Epoch::FIRST, ProjectConfig::default()).await.expect("a new project");
    if wanted {
        try_start(world, 0).await;
    }
    world.lock().unleash();
}

/// The snapshots that the project has, and what lies at the second host of an
/// earlier stay: some of them, some that the project has no more, and one that
/// has the name of another.
fn furnish(world: &mut World) {
    for number in 0..4 {
        let name: SnapshotName = format!("daily-{number}").parse().expect("a name");
        let frozen = Frozen { content: number, origin: world.uuid() };
        let (owned, known) = (world.below(3) > 0, world.below(3));
        if owned {
            world.machines[0].snapshots.insert(name.clone(), frozen);
            world.own.insert(name.clone(), frozen);
        }
        let there = match known {
            0 => continue,
            1 => frozen,
            _ => Frozen { content: 77, origin: world.uuid() },
        };
        if owned && there != frozen {
            world.replaced.insert(name.clone());
        }
        world.machines[1].snapshots.insert(name.clone(), there);
        world.earlier.insert(name, there);
    }
}

/// The schedule takes snapshots and deletes old ones, on the host that may run
/// the project.
pub(super) async fn keep_house(world: Shared) {
    for number in 0.. {
        let (delay, host, take, which) = {
            let mut world = world.lock();
            // Once the move is over, now and then is enough.
            let below = if world.stored.outcome().is_none() { 8000 } else { 40_000 };
            let chosen = (usize::from(world.below(2) == 1), world.below(2) == 0, world.below(1 << 20));
            (world.millis(below), chosen.0, chosen.1, chosen.2)
        };
        tokio::time::sleep(delay).await;
        let (project, daemon, incarnation) = {
            let world = world.lock();
            let machine = &world.machines[host];
            (world.project, machine.daemon.clone(), machine.incarnation)
        };
        let Some(daemon) = daemon else { continue };
        let site = Site { world: world.clone(), host, incarnation };
        let work = async {
            let _turn = daemon.ledger.turn(project).await;
            if daemon.ledger.entry(project).is_none_or(|entry| entry.may_run().is_none()) {
                return;
            }
            let done = |w: &mut World| {
                let machine = &mut w.machines[host];
                let Some(content) = machine.live else { return };
                if take {
                    let name: SnapshotName = format!("auto-{number}").parse().expect("a name");
                    let frozen = Frozen { content, origin: w.uuid() };
                    w.machines[host].snapshots.insert(name.clone(), frozen);
                    w.own.insert(name, frozen);
                } else if !w.own.is_empty() {
                    let nth = usize::try_from(which).unwrap_or(0) % w.own.len();
                    let name = w.own.keys().nth(nth).cloned().expect("there is one");
                    w.own.remove(&name);
                    if w.machines[host].snapshots.remove(&name).is_none() {
                        w.violate("the owner lacks one of the project's snapshots");
                    }
                }
            };
            site.effect(if take { "takes a snapshot by schedule" } else { "deletes an old one" }, done).await;
        };
        daemon.stop.run_until_cancelled(work).await;
    }
}

/// The project writes whenever it runs, daemon or not.
pub(super) async fn write_while_running(world: Shared) {
    loop {
        let delay = {
            let mut world = world.lock();
            // Once the move is over, now and then is enough.
            let below = if world.stored.outcome().is_none() { 60 } else { 2000 };
            world.millis(below)
        };
        tokio::time::sleep(delay).await;
        let mut world = world.lock();
        world.check();
        if let Some(host) = (0..2).find(|h| world.machines[*h].running.is_some()) {
            world.written += 1;
            if let Some(content) = &mut world.machines[host].live {
                *content += 1;
            }
            world.check();
        }
    }
}

/// Users and restart policies try to start the project wherever they can.
pub(super) async fn meddle(world: Shared) {
    loop {
        let (delay, host) = {
            let mut world = world.lock();
            (world.millis(3000), usize::from(world.below(2) == 1))
        };
        tokio::time::sleep(delay).await;
        let wanted = world.lock().wanted;
        if wanted {
            try_start(&world, host).await;
        }
    }
}

/// Starts the project on `host`, if the host thinks that it may.
pub(super) async fn try_start(world: &Shared, host: usize) {
    let (project, daemon) = {
        let world = world.lock();
        (world.project, world.machines[host].daemon.clone())
    };
    let Some(daemon) = daemon else { return };
    let incarnation = world.lock().machines[host].incarnation;
    let site = Site { world: world.clone(), host, incarnation };
    let start = async {
        let _turn = daemon.ledger.turn(project).await;
        let Some(entry) = daemon.ledger.entry(project).filter(|entry| entry.may_run().is_some()) else {
            return;
        };
        if let Ok(spec) = daemon.moves.spec(&entry).await {
            // Faults of the runner are part of the world.
            let _ = site.start(&spec).await;
        }
    };
    daemon.stop.run_until_cancelled(start).await;
}

#[async_trait]
impl LedgerStore for Site {
    async fn load(&self) -> Result<Vec<Entry>, BoxError> {
        Ok(self.effect("loads", |w| w.machines[self.host].ledger.values().cloned().collect()).await)
    }

    async fn save(&self, entry: &Entry) -> Result<(), BoxError> {
        if self.fails() {
            return Err("the disk does not answer".into());
        }
        let entry = entry.clone();
        let what = format!("saves granted {:?} frozen {}", entry.granted, entry.frozen.is_some());
        self.effect(&what, |w| w.machines[self.host].ledger.insert(entry.project, entry)).await;
        Ok(())
    }
}

#[async_trait]
impl Runner for Site {
    fn capabilities(&self) -> runner::Capabilities {
        runner::Capabilities {
            backend: "sim".into(),
            isolation: true,
            limits: true,
            weaknesses: Vec::new(),
            unenforced: Vec::new(),
        }
    }

    async fn prepare(&self, _spec: &runner::ProjectSpec) -> runner::Result<()> {
        self.wait().await;
        Ok(())
    }

    async fn start(&self, spec: &runner::ProjectSpec) -> runner::Result<Status> {
        let project = spec.project;
        if self.fails() {
            return Err(runner::Error::Invalid { project, reason: "it does not start".into() });
        }
        let started = self.effect("starts it", |w| {
            let machine = &mut w.machines[self.host];
            if machine.running.is_some_and(|epoch| epoch != spec.epoch) {
                return Err(runner::Error::Busy { project, reason: "another epoch runs".into() });
            }
            machine.running = Some(spec.epoch);
            // The promise itself: on disk, not in this process's memory.
            if machine.ledger.get(&project).and_then(Entry::may_run) != Some(spec.epoch) {
                w.violate("it was started without a grant on disk");
            }
            Ok(())
        });
        started.await?;
        self.status(project).await
    }

    async fn stop(&self, project: ProjectId, _grace: Duration) -> runner::Result<Status> {
        if self.fails() {
            let limit = Duration::from_secs(1);
            return Err(runner::Error::TimedOut { project, operation: "stop", limit });
        }
        self.effect("stops it", |w| w.machines[self.host].running = None).await;
        self.status(project).await
    }

    async fn remove(&self, project: ProjectId) -> runner::Result<()> {
        self.stop(project, Duration::ZERO).await.map(drop)
    }

    async fn status(&self, project: ProjectId) -> runner::Result<Status> {
        let epoch = self.world.lock().machines[self.host].running;
        let state = if epoch.is_some() { State::Running } else { State::Stopped };
        Ok(Status { project, epoch, state, started: None, reason: None })
    }

    async fn list(&self) -> runner::Result<Vec<Status>> {
        Ok(Vec::new())
    }

    async fn exec(&self, project: ProjectId, _: runner::ExecRequest) -> runner::Result<runner::Process> {
        Err(runner::Error::NotRunning { project })
    }

    async fn dial(&self, project: ProjectId, _port: u16) -> runner::Result<BoxStream> {
        Err(runner::Error::NotRunning { project })
    }

    async fn stats(&self, project: ProjectId) -> runner::Result<runner::Stats> {
        Err(runner::Error::NotRunning { project })
    }

    async fn set_limits(
        &self,
        project: ProjectId,
        _limits: &runner::Limits,
    ) -> runner::Result<runner::Applied> {
        Err(runner::Error::NotRunning { project })
    }

    async fn logs(&self, project: ProjectId, _lines: usize) -> runner::Result<String> {
        Err(runner::Error::NotRunning { project })
    }
}

fn listed(project: ProjectId, name: &SnapshotName, frozen: Frozen) -> Snapshot {
    let (uuid, origin) = (frozen.origin, frozen.origin);
    Snapshot { project, name: name.clone(), uuid, origin, created: Timestamp::UNIX_EPOCH }
}

fn live(project: ProjectId, content: Option<u64>) -> storage::Result<Volume> {
    let uuid = VolumeUuid::from_bytes([1; 16]);
    content.map(|_| Volume { project, uuid, path: None }).ok_or(storage::Error::NotFound { project })
}

impl Site {
    fn storage_fault(&self, project: ProjectId, operation: &'static str) -> storage::Result<()> {
        if self.fails() {
            return Err(storage::Error::NoSpace { project, operation, what: "the host's volume" });
        }
        Ok(())
    }

    fn must_be_stopped(&self, world: &mut World) {
        if world.machines[self.host].running.is_some() {
            world.violate("files were taken from under a running project");
        }
    }
}

#[async_trait]
impl Storage for Site {
    fn capabilities(&self) -> storage::Capabilities {
        storage::Capabilities { backend: "sim".into(), deltas: true, ..storage::Capabilities::default() }
    }

    async fn create(&self, project: ProjectId, _: &storage::VolumeOptions) -> storage::Result<Volume> {
        Err(storage::Error::AlreadyExists { project, what: "a volume".into() })
    }

    async fn volume(&self, project: ProjectId) -> storage::Result<Volume> {
        self.wait().await;
        live(project, self.world.lock().machines[self.host].live)
    }

    async fn list(&self) -> storage::Result<Vec<Volume>> {
        Ok(Vec::new())
    }

    async fn delete(&self, _project: ProjectId) -> storage::Result<()> {
        self.world.violate("a move deleted a whole project");
        Ok(())
    }

    async fn snapshot(&self, project: ProjectId, name: &SnapshotName) -> storage::Result<Snapshot> {
        self.storage_fault(project, "snapshot")?;
        let taken = self.effect("takes a snapshot", |w| {
            if let Some(frozen) = w.machines[self.host].snapshots.get(name) {
                return Ok(*frozen);
            }
            let content = w.machines[self.host].live.ok_or(storage::Error::NotFound { project })?;
            let frozen = Frozen { content, origin: w.uuid() };
            w.machines[self.host].snapshots.insert(name.clone(), frozen);
            Ok(frozen)
        });
        Ok(listed(project, name, taken.await?))
    }

    async fn snapshots(&self, project: ProjectId) -> storage::Result<Vec<Snapshot>> {
        self.wait().await;
        let world = self.world.lock();
        Ok(world.machines[self.host].snapshots.iter().map(|(n, f)| listed(project, n, *f)).collect())
    }

    async fn snapshot_path(
        &self,
        _project: ProjectId,
        _name: &SnapshotName,
    ) -> storage::Result<Option<std::path::PathBuf>> {
        Ok(None)
    }

    async fn delete_snapshot(&self, project: ProjectId, name: &SnapshotName) -> storage::Result<()> {
        self.storage_fault(project, "delete")?;
        self.effect("deletes a snapshot", |w| w.machines[self.host].snapshots.remove(name)).await;
        Ok(())
    }

    async fn restore(
        &self,
        project: ProjectId,
        name: &SnapshotName,
        former: &SnapshotName,
    ) -> storage::Result<Volume> {
        self.storage_fault(project, "restore")?;
        let restored = self.effect("restores", |w| {
            self.must_be_stopped(w);
            let Some(frozen) = w.machines[self.host].snapshots.get(name).copied() else {
                return Err(storage::Error::NoSnapshot { project, name: name.clone() });
            };
            if let Some(content) = w.machines[self.host].live.take() {
                let origin = w.uuid();
                w.machines[self.host].snapshots.insert(former.clone(), Frozen { content, origin });
            }
            w.machines[self.host].live = Some(frozen.content);
            Ok(())
        });
        restored.await?;
        live(project, Some(0))
    }

    async fn set_aside(&self, project: ProjectId, keep_as: &SnapshotName) -> storage::Result<Snapshot> {
        self.storage_fault(project, "set aside")?;
        let aside = self.effect("sets it aside", |w| {
            self.must_be_stopped(w);
            let origin = w.uuid();
            let machine = &mut w.machines[self.host];
            match (machine.live, machine.snapshots.get(keep_as).copied()) {
                (None, Some(frozen)) => Ok(frozen),
                (None, None) => Err(storage::Error::NotFound { project }),
                (Some(_), Some(_)) => {
                    Err(storage::Error::AlreadyExists { project, what: keep_as.to_string() })
                }
                (Some(content), None) => {
                    machine.live = None;
                    let frozen = Frozen { content, origin };
                    machine.snapshots.insert(keep_as.clone(), frozen);
                    Ok(frozen)
                }
            }
        });
        Ok(listed(project, keep_as, aside.await?))
    }

    async fn clone_volume(
        &self,
        project: ProjectId,
        _name: &SnapshotName,
        _target: ProjectId,
        _options: &storage::CloneOptions,
    ) -> storage::Result<Volume> {
        Err(storage::Error::NotFound { project })
    }

    async fn usage(&self, project: ProjectId) -> storage::Result<storage::Usage> {
        Err(storage::Error::NotFound { project })
    }

    async fn set_limit(&self, _project: ProjectId, _limit: Option<u64>) -> storage::Result<()> {
        Err(storage::Error::Unsupported { backend: "sim", operation: "limit" })
    }

    async fn hold(&self, project: ProjectId, name: &SnapshotName) -> storage::Result<storage::Hold> {
        Ok(storage::Holds::default().take(project, name))
    }

    async fn changed_since(&self, _project: ProjectId, _name: &SnapshotName) -> storage::Result<bool> {
        Ok(true)
    }

    async fn footprint(
        &self,
        _project: ProjectId,
        _snapshot: Option<&SnapshotName>,
    ) -> storage::Result<storage::Footprint> {
        Err(storage::Error::Unsupported { backend: "sim", operation: "measure a project" })
    }

    async fn diff(
        &self,
        _project: ProjectId,
        _from: &SnapshotName,
        _to: Option<&SnapshotName>,
        _after: Option<&TreePath>,
        _max: usize,
    ) -> storage::Result<storage::Changes> {
        Err(storage::Error::Unsupported { backend: "sim", operation: "compare snapshots" })
    }

    async fn copy(
        &self,
        _from: &storage::Place,
        _to: &storage::Place,
        _options: &storage::CopyOptions,
    ) -> storage::Result<storage::Copied> {
        Err(storage::Error::Unsupported { backend: "sim", operation: "copy files" })
    }

    async fn send(
        &self,
        project: ProjectId,
        name: &SnapshotName,
        options: &storage::SendOptions,
    ) -> storage::Result<SendStream> {
        self.storage_fault(project, "send")?;
        self.wait().await;
        let mut world = self.world.lock();
        let missing = |name: &SnapshotName| storage::Error::NoSnapshot { project, name: name.clone() };
        let snapshots = &world.machines[self.host].snapshots;
        let frozen = *snapshots.get(name).ok_or_else(|| missing(name))?;
        let base = match &options.base {
            Some(base) => Some((base.clone(), snapshots.get(base).ok_or_else(|| missing(base))?.origin)),
            None => None,
        };
        let whole = Bytes::copy_from_slice(&frozen.content.to_be_bytes());
        let reader: BoxRead = if world.fault(Fault::StreamCut) {
            let cut = usize::try_from(world.below(8)).unwrap_or(0);
            let broken = tokio_util::io::StreamReader::new(futures_util::stream::iter([
                Ok(whole.slice(..cut)),
                Err(std::io::Error::from(std::io::ErrorKind::ConnectionReset)),
            ]));
            Box::pin(broken)
        } else {
            Box::pin(std::io::Cursor::new(whole))
        };
        let (name, origin) = (name.clone(), frozen.origin);
        let header = SendHeader {
            backend: "sim".into(),
            project,
            name,
            origin,
            base,
            extra: String::new(),
            estimated_bytes: 8,
            left_out: Vec::new(),
        };
        Ok(SendStream { header, reader })
    }

    async fn stage(
        &self,
        _project: ProjectId,
        _name: &SnapshotName,
    ) -> storage::Result<Box<dyn storage::Staged>> {
        Err(storage::Error::Unsupported { backend: "simulated", operation: "take files: it has none" })
    }

    async fn receive(&self, header: &SendHeader, mut stream: BoxRead) -> storage::Result<Snapshot> {
        let project = header.project;
        self.storage_fault(project, "receive")?;
        let known = self.world.lock().machines[self.host].snapshots.get(&header.name).copied();
        match known {
            Some(frozen) if frozen.origin == header.origin => {
                return Ok(listed(project, &header.name, frozen));
            }
            Some(_) => {
                return Err(storage::Error::AlreadyExists { project, what: header.name.to_string() });
            }
            None => {}
        }
        self.wait().await;
        let bad = |reason: &str| storage::Error::BadStream { project, reason: reason.into() };
        let mut content = Vec::new();
        stream.read_to_end(&mut content).await.map_err(|_| bad("cut"))?;
        let content = u64::from_be_bytes(content.try_into().map_err(|_| bad("short"))?);
        let received = self.effect("has received a snapshot", |w| {
            let snapshots = &mut w.machines[self.host].snapshots;
            if let Some((base, origin)) = &header.base
                && snapshots.get(base).is_none_or(|have| have.origin != *origin)
            {
                return Err(bad("its base is not here"));
            }
            let frozen = Frozen { content, origin: header.origin };
            snapshots.insert(header.name.clone(), frozen);
            Ok(frozen)
        });
        Ok(listed(project, &header.name, received.await?))
    }
}

#[async_trait]
impl Transfer for Site {
    async fn send(
        &self,
        to: HostId,
        _address: &HostAddress,
        move_id: MoveId,
        source: &dyn StreamSource,
        progress: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<Delivered, TransferError> {
        let stream = source.open().await?;
        let cut = || TransferError::Cut { host: to, source: "the network".into() };
        self.wait().await;
        let (peer, here, bytes, lost) = {
            let mut world = self.world.lock();
            let peer = world.machines[world.machine_of(to)].daemon.clone();
            let bytes = world.below(40 << 20);
            let lost = world.fault(Fault::StreamCut);
            (peer, world.machines[self.host].id, bytes, lost)
        };
        let peer = peer.ok_or_else(cut)?;
        let deliver = async {
            if let Some(snapshot) = peer.moves.offered(here, move_id, &stream.header).await? {
                return Ok(Delivered { snapshot, bytes: 0 });
            }
            let snapshot = peer.moves.receive(here, move_id, &stream.header, stream.reader).await?;
            Ok(Delivered { snapshot, bytes })
        };
        let delivered = peer.stop.run_until_cancelled(deliver).await.ok_or_else(cut)?;
        progress(bytes);
        self.wait().await;
        if lost { Err(cut()) } else { delivered.map_err(TransferError::Refused) }
    }
}
