//! The repository as rustic sees it.

use std::{
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;
use cocalc_backup::{
    Access, Bounds, Location,
    protocol::{Failure, FailureKind},
};
use cocalc_core::ids::ProjectId;
use rustic_core::{BytesList, ErrorKind, FileType, Id, ReadBackend, RusticError, RusticResult, WriteBackend};

use crate::{
    fail,
    failure::Failed,
    renewal::{Renewal, Which},
    store::{self, Mode, Store},
};

/// The names of all directories of a repository, the keys first: whoever erases
/// it begins with them.
pub(crate) const DIRECTORIES: [&str; 5] = ["keys", "snapshots", "index", "locks", "data"];
pub(crate) const CONFIG: &str = "config";
/// Where a repair sets aside what is damaged. No repository program looks there.
pub(crate) const DAMAGED: &str = "cocalc/damaged";

/// How far the clock of whoever prunes may be from that of the store.
const SKEW_MAX: Duration = Duration::from_mins(10);

/// A store in restic's layout, which remembers the first thing that failed,
/// keeps to a rate, deletes nothing unless that is its task, and can hold back
/// snapshots until they are known to be complete.
pub(crate) struct Backend {
    store: Box<dyn Store>,
    location: String,
    access: Access,
    fault: Mutex<Option<Failure>>,
    /// A file that was listed was gone when it was read.
    vanished: AtomicBool,
    holds: AtomicBool,
    held: Mutex<Vec<(Id, Vec<Bytes>)>>,
    /// What was written, with its size, and not yet seen in the store.
    written: Mutex<Vec<(String, u64)>>,
    reads: Rate,
    writes: Rate,
    /// Parts of packs that are kept for a while.
    windows: Mutex<Vec<Arc<Part>>>,
}

/// A part of a pack.
struct Part {
    pack: Id,
    offset: u32,
    bytes: Bytes,
}

impl Part {
    fn slice(&self, pack: &Id, offset: u32, length: u32) -> Option<Bytes> {
        let from = usize::try_from(offset.checked_sub(self.offset)?).ok()?;
        let to = from.checked_add(usize::try_from(length).ok()?)?;
        (self.pack == *pack && to <= self.bytes.len()).then(|| self.bytes.slice(from..to))
    }
}

/// A part of a pack is kept until this is dropped.
pub(crate) struct Window<'a> {
    backend: &'a Backend,
    part: Arc<Part>,
}

impl Drop for Window<'_> {
    fn drop(&mut self) {
        self.backend.windows().retain(|other| !Arc::ptr_eq(other, &self.part));
    }
}

impl fmt::Debug for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Backend").field("location", &self.location).finish_non_exhaustive()
    }
}

impl Backend {
    pub(crate) fn open(
        location: &Location,
        access: Access,
        bounds: &Bounds,
        renewal: &Arc<Renewal>,
        which: Which,
    ) -> Result<Self, Failed> {
        Ok(Self {
            store: store::open(location, bounds, renewal, which)?,
            location: location.restic(),
            access,
            fault: Mutex::new(None),
            vanished: AtomicBool::new(false),
            holds: AtomicBool::new(false),
            held: Mutex::new(Vec::new()),
            written: Mutex::new(Vec::new()),
            reads: Rate::new(bounds.bytes_per_sec_max),
            writes: Rate::new(bounds.bytes_per_sec_max),
            windows: Mutex::default(),
        })
    }

    fn windows(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Part>>> {
        self.windows.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads a part of a pack at once, for who is about to ask for it piece by
    /// piece.
    pub(crate) fn window(&self, pack: &Id, offset: u32, length: u32) -> RusticResult<Window<'_>> {
        let name = name(FileType::Pack, pack);
        let bytes = self.rustic(self.store.read_part(&name, offset.into(), length.into()))?;
        self.reads.pass(bytes.len());
        let part = Arc::new(Part { pack: *pack, offset, bytes });
        self.windows().push(Arc::clone(&part));
        Ok(Window { backend: self, part })
    }

    /// The first thing that failed in the store, if anything did.
    pub(crate) fn fault(&self) -> Option<Failure> {
        self.fault.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Forgets what failed: it was expected.
    pub(crate) fn forgive(&self) {
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Whether something that was listed was gone when it was read, as when a
    /// prune runs beside this. If so, everything is as at the beginning now.
    pub(crate) fn begin_again(&self) -> bool {
        let vanished = self.vanished.swap(false, Ordering::AcqRel);
        if vanished {
            self.forgive();
            self.holds.store(false, Ordering::Release);
            self.held.lock().unwrap_or_else(PoisonError::into_inner).clear();
            self.written.lock().unwrap_or_else(PoisonError::into_inner).clear();
        }
        vanished
    }

    /// The store itself.
    pub(crate) fn store(&self) -> &dyn Store {
        &*self.store
    }

    /// Whether there is a repository.
    pub(crate) fn is_repository(&self) -> Result<bool, Failed> {
        Ok(self.store.size(CONFIG)?.is_some())
    }

    /// Holds back snapshots that are written from now on.
    pub(crate) fn hold_snapshots(&self) {
        self.holds.store(true, Ordering::Release);
    }

    /// Writes the snapshots that were held back: the last step of a backup,
    /// which makes it one. Before it, the store must show that it has what it
    /// said that it had taken. In a repository that others share, a name says
    /// that the snapshot is of `of`.
    pub(crate) fn release_snapshots(&self, of: Option<ProjectId>) -> Result<(), Failed> {
        self.confirm()?;
        fail::point("backup.confirmed");
        let held = std::mem::take(&mut *self.held.lock().unwrap_or_else(PoisonError::into_inner));
        for (id, parts) in held {
            if let Some(project) = of {
                self.store.write(&mark(project, &id), &[], Mode::Once)?;
                fail::point("backup.marked");
            }
            self.store.write(&name(FileType::Snapshot, &id), &parts, Mode::Once)?;
        }
        fail::point("backup.listed");
        Ok(())
    }

    /// Fails unless the store shows that it has what it said that it had taken: an
    /// index that speaks of data that are not there would keep them from ever
    /// being stored again.
    fn confirm(&self) -> Result<(), Failed> {
        let written = std::mem::take(&mut *self.written.lock().unwrap_or_else(PoisonError::into_inner));
        for (name, size) in written {
            let there = self.store.size(&name)?;
            if there != Some(size) {
                return Err(Failed::new(
                    FailureKind::Unavailable,
                    format!("the store took {name}, {size} bytes, and has {} of it", there.unwrap_or(0)),
                ));
            }
        }
        Ok(())
    }

    /// The snapshots of a project in a repository that others share, as its
    /// names say: each of them may be gone, or not be there yet.
    pub(crate) fn marks(&self, project: ProjectId) -> Result<Vec<Id>, Failed> {
        let listed = self.store.list(&format!("{MARKS}/{project}"))?;
        Ok(listed.into_iter().filter_map(|(name, _)| name.parse().ok()).collect())
    }

    /// Takes back what says that a snapshot is of a project.
    pub(crate) fn unmark(&self, project: ProjectId, id: &Id) -> Result<(), Failed> {
        self.removable(&mark(project, id))?;
        self.store.remove(&mark(project, id))
    }

    /// Whether there is such a file.
    pub(crate) fn has(&self, kind: FileType, id: &Id) -> Result<bool, Failed> {
        Ok(self.store.size(&name(kind, id))?.is_some())
    }

    /// Puts a file in the place of one that is damaged.
    pub(crate) fn replace(&self, kind: FileType, id: &Id, content: Bytes) -> Result<(), Failed> {
        self.removable(&name(kind, id))?;
        self.store.write(&name(kind, id), &[content], Mode::Over)
    }

    /// Fails if this machine's clock is not about that of the store: by the one,
    /// what a prune marks gets its time, and by another it is deleted.
    pub(crate) fn agree_on_time(&self) -> Result<(), Failed> {
        let (here, there) = (SystemTime::now(), self.store.now()?);
        let (skew, way) = match here.duration_since(there) {
            Ok(ahead) => (ahead, "ahead of"),
            Err(behind) => (behind.duration(), "behind"),
        };
        if skew <= SKEW_MAX {
            return Ok(());
        }
        Err(Failed::new(
            FailureKind::Invalid,
            format!(
                "the clock of this machine is {} s {way} that of the repository: set it, then prune",
                skew.as_secs()
            ),
        ))
    }

    /// Whether deleting is what this was opened for.
    fn removable(&self, name: &str) -> Result<(), Failed> {
        if self.access == Access::Delete {
            return Ok(());
        }
        Err(Failed::new(FailureKind::Denied, format!("{name} would be deleted, which is not the task")))
    }

    fn put(&self, name: &str, parts: &[Bytes], mode: Mode) -> Result<(), Failed> {
        if self.access == Access::Read {
            return Err(Failed::new(
                FailureKind::Denied,
                format!("{name} would be written, which is not the task"),
            ));
        }
        fail::point("store.write");
        self.store.write(name, parts, mode)?;
        fail::point("store.written");
        Ok(())
    }

    /// Passes a result on to rustic, and keeps the first failure.
    fn rustic<T>(&self, done: Result<T, Failed>) -> RusticResult<T> {
        done.map_err(|Failed(failure)| {
            let words = failure.words.join("; ");
            self.fault.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(failure);
            RusticError::new(ErrorKind::Backend, words)
        })
    }
}

/// Where names say which snapshots of a shared repository are a project's. No
/// repository program looks there.
const MARKS: &str = "cocalc/of";

fn mark(project: ProjectId, id: &Id) -> String {
    format!("{MARKS}/{project}/{}", id.to_hex().as_str())
}

pub(crate) fn name(kind: FileType, id: &Id) -> String {
    let hex = id.to_hex();
    match kind {
        FileType::Config => CONFIG.to_owned(),
        FileType::Pack => format!("data/{}/{}", &hex.as_str()[..2], hex.as_str()),
        FileType::Key | FileType::Snapshot | FileType::Index => {
            format!("{}/{}", kind.dirname(), hex.as_str())
        }
    }
}

impl ReadBackend for Backend {
    fn location(&self) -> String {
        self.location.clone()
    }

    fn list_with_size(&self, kind: FileType) -> RusticResult<Vec<(Id, u32)>> {
        if kind == FileType::Config {
            let size = self.rustic(self.store.size(CONFIG))?;
            return Ok(size
                .map(|size| (Id::default(), u32::try_from(size).unwrap_or(u32::MAX)))
                .into_iter()
                .collect());
        }
        let listed = self.rustic(self.store.list(kind.dirname()))?;
        // Other programs may leave other files; no file of ours is over 4 GiB.
        Ok(listed
            .into_iter()
            .filter_map(|(name, size)| Some((name.parse::<Id>().ok()?, u32::try_from(size).ok()?)))
            .collect())
    }

    fn read_full(&self, kind: FileType, id: &Id) -> RusticResult<Bytes> {
        let read = self.store.read(&name(kind, id));
        if let Err(Failed(failure)) = &read
            && failure.kind == FailureKind::Damaged
            && matches!(kind, FileType::Index | FileType::Snapshot)
        {
            self.vanished.store(true, Ordering::Release);
        }
        let bytes = self.rustic(read)?;
        self.reads.pass(bytes.len());
        Ok(bytes)
    }

    fn read_partial(
        &self,
        kind: FileType,
        id: &Id,
        _: bool,
        offset: u32,
        length: u32,
    ) -> RusticResult<Bytes> {
        if kind == FileType::Pack
            && let Some(bytes) = self.windows().iter().find_map(|part| part.slice(id, offset, length))
        {
            return Ok(bytes);
        }
        let bytes = self.rustic(self.store.read_part(&name(kind, id), offset.into(), length.into()))?;
        self.reads.pass(bytes.len());
        Ok(bytes)
    }

    fn warmup_path(&self, kind: FileType, id: &Id) -> String {
        name(kind, id)
    }
}

impl WriteBackend for Backend {
    fn create(&self) -> RusticResult<()> {
        self.rustic(self.store.create())
    }

    fn write_bytes(&self, kind: FileType, id: &Id, _: bool, content: BytesList) -> RusticResult<()> {
        let size = content.size();
        let parts = content.into_vec();
        if kind == FileType::Snapshot && self.holds.load(Ordering::Acquire) {
            self.held.lock().unwrap_or_else(PoisonError::into_inner).push((*id, parts));
            return Ok(());
        }
        // Two that begin a repository at once must agree on one.
        let mode = if kind == FileType::Config { Mode::First } else { Mode::Once };
        let name = name(kind, id);
        if kind == FileType::Index {
            self.rustic(self.confirm())?;
        }
        self.rustic(self.put(&name, &parts, mode))?;
        if matches!(kind, FileType::Pack | FileType::Index) {
            self.written.lock().unwrap_or_else(PoisonError::into_inner).push((name, size as u64));
        }
        self.writes.pass(size);
        Ok(())
    }

    fn remove(&self, kind: FileType, id: &Id, _: bool) -> RusticResult<()> {
        let name = name(kind, id);
        fail::point("store.remove");
        self.rustic(self.removable(&name).and_then(|()| self.store.remove(&name)))?;
        fail::point("store.removed");
        Ok(())
    }
}

/// Keeps what passes to a number of bytes per second, over time.
#[derive(Debug)]
struct Rate {
    bytes_per_sec: Option<u64>,
    free_at: Mutex<Instant>,
}

impl Rate {
    fn new(bytes_per_sec: Option<u64>) -> Self {
        Self { bytes_per_sec: bytes_per_sec.map(|rate| rate.max(1)), free_at: Mutex::new(Instant::now()) }
    }

    fn pass(&self, bytes: usize) {
        let Some(rate) = self.bytes_per_sec else { return };
        #[expect(clippy::cast_precision_loss, reason = "a duration need not be exact")]
        let takes = Duration::from_secs_f64(bytes as f64 / rate as f64);
        let free_at = {
            let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
            *free_at = (*free_at).max(Instant::now()) + takes;
            *free_at
        };
        thread::sleep(free_at.saturating_duration_since(Instant::now()));
    }
}

/// The failure of a call that needs a repository where there is none.
pub(crate) fn no_repository() -> Failed {
    Failed::new(FailureKind::NotFound, "there is no repository yet")
}
