//! The repository as rustic sees it.

use std::{
    fmt,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use cocalc_backup::{
    Bounds, Location,
    protocol::{Failure, FailureKind},
};
use rustic_core::{BytesList, ErrorKind, FileType, Id, ReadBackend, RusticError, RusticResult, WriteBackend};

use crate::{
    failure::Failed,
    store::{self, Store},
};

/// The names of all directories of a repository, the keys first: whoever erases
/// it begins with them.
pub(crate) const DIRECTORIES: [&str; 5] = ["keys", "snapshots", "index", "locks", "data"];
pub(crate) const CONFIG: &str = "config";

/// A store in restic's layout, which remembers the first thing that failed,
/// keeps to a rate, and can hold back snapshots until they are known to be
/// complete.
pub(crate) struct Backend {
    store: Box<dyn Store>,
    location: String,
    fault: Mutex<Option<Failure>>,
    holds: AtomicBool,
    held: Mutex<Vec<(Id, Vec<Bytes>)>>,
    reads: Rate,
    writes: Rate,
}

impl fmt::Debug for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Backend").field("location", &self.location).finish_non_exhaustive()
    }
}

impl Backend {
    pub(crate) fn open(location: &Location, bounds: &Bounds) -> Result<Self, Failed> {
        if !matches!(location, Location::Directory { .. }) {
            // The HTTP client takes the process's provider. It can be set once.
            let _ = rustls::crypto::ring::default_provider().install_default();
        }
        Ok(Self {
            store: store::open(location, bounds)?,
            location: location.restic(),
            fault: Mutex::new(None),
            holds: AtomicBool::new(false),
            held: Mutex::new(Vec::new()),
            reads: Rate::new(bounds.bytes_per_sec_max),
            writes: Rate::new(bounds.bytes_per_sec_max),
        })
    }

    /// The first thing that failed in the store, if anything did.
    pub(crate) fn fault(&self) -> Option<Failure> {
        self.fault.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Forgets what failed: it was expected.
    pub(crate) fn forgive(&self) {
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner) = None;
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
    /// which makes it one.
    pub(crate) fn release_snapshots(&self) -> Result<(), Failed> {
        let held = std::mem::take(&mut *self.held.lock().unwrap_or_else(PoisonError::into_inner));
        held.iter().try_for_each(|(id, parts)| self.store.write(&name(FileType::Snapshot, id), parts, false))
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

fn name(kind: FileType, id: &Id) -> String {
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
        let bytes = self.rustic(self.store.read(&name(kind, id)))?;
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
        self.rustic(self.store.write(&name(kind, id), &parts, kind == FileType::Config))?;
        self.writes.pass(size);
        Ok(())
    }

    fn remove(&self, kind: FileType, id: &Id, _: bool) -> RusticResult<()> {
        self.rustic(self.store.remove(&name(kind, id)))
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
