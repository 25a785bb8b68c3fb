//! Opening a volume, and refusing what is not ours.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use cocalc_core::{ids::VolumeUuid, storage::Holds};
use rustix::fs::FlockOperation;

use super::{
    Btrfs, Store,
    commit::Commits,
    layout::{self, DIRECTORIES, Layout, MARKER, Marker, VERSION},
    quota::{self, QuotaKind, Quotas},
    sys,
    trash::Reaper,
};
use crate::{failure::Failure, locks::Locks};

/// How much of a marker is read; a whole one is shorter.
const MARKER_MAX: u64 = 4096;

/// Why a volume could not be opened or prepared.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The path is on another file system.
    #[error("{path} is not on Btrfs")]
    NotBtrfs {
        /// The path.
        path: PathBuf,
    },
    /// It was never prepared.
    #[error("{path} is not a prepared volume; an empty one can be initialized")]
    NotInitialized {
        /// The path.
        path: PathBuf,
    },
    /// It holds what we do not know, and will not touch.
    #[error("{path} holds {unknown:?}, which is not ours; nothing was changed")]
    UnknownData {
        /// The path.
        path: PathBuf,
        /// One of the names found.
        unknown: String,
    },
    /// Another process has it open.
    #[error("{path} is in use by another process")]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// Its layout is of another version.
    #[error("{path} has a layout or marker that this version does not know: {found}")]
    UnknownLayout {
        /// The path.
        path: PathBuf,
        /// What its marker says.
        found: String,
    },
    /// The file system is read-only, by its mount or after an error.
    #[error("{path} is on a file system that is read-only; mount it writable, and look for its errors first")]
    ReadOnly {
        /// The path.
        path: PathBuf,
    },
    /// A call failed.
    #[error("could not open the volume at {path}")]
    Io {
        /// The path.
        path: PathBuf,
        /// Why.
        source: cocalc_core::BoxError,
    },
}

/// What a path could serve as.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Probe {
    /// Whether it is on Btrfs.
    pub is_btrfs: bool,
    /// Whether it is a prepared volume.
    pub is_initialized: bool,
    /// What quotas are enabled.
    pub quotas: QuotaKind,
    /// Free bytes, as the file system estimates them.
    pub free_bytes: u64,
}

/// Looks at a directory, and changes nothing.
///
/// # Errors
///
/// Those of opening it.
pub fn probe(path: &Path) -> io::Result<Probe> {
    let fd = File::open(path)?;
    let is_btrfs = sys::is_btrfs(&fd)?;
    let stat = rustix::fs::fstatvfs(&fd)?;
    Ok(Probe {
        is_btrfs,
        is_initialized: is_btrfs && path.join(MARKER).is_file(),
        quotas: if is_btrfs { quota::kind(&fd).unwrap_or(QuotaKind::Off) } else { QuotaKind::Off },
        free_bytes: stat.f_bavail.saturating_mul(stat.f_frsize),
    })
}

/// Opens a [`Btrfs`] store.
#[derive(Clone, Debug)]
#[must_use]
pub struct BtrfsBuilder {
    path: PathBuf,
    quotas: bool,
    classic_quotas: bool,
    stall_limit: Duration,
    loses_commits: bool,
}

impl BtrfsBuilder {
    /// Whether to use quotas where the kernel has simple ones. Default: yes.
    pub fn quotas(mut self, quotas: bool) -> Self {
        self.quotas = quotas;
        self
    }

    /// Whether to use classic quota groups where they are on, or where the
    /// kernel has no simple ones. They get slow with snapshots: with a thousand
    /// of them, one snapshot takes seconds. Default: no.
    pub fn classic_quotas(mut self, classic: bool) -> Self {
        self.classic_quotas = classic;
        self
    }

    /// Ends a receive that makes no progress for this long. Default: ten
    /// minutes.
    pub fn stall_limit(mut self, limit: Duration) -> Self {
        self.stall_limit = limit;
        self
    }

    /// Acknowledges before it is durable, in builds with fail points: for tests
    /// that must find that out.
    #[doc(hidden)]
    pub fn lose_commits(mut self) -> Self {
        self.loses_commits = true;
        self
    }

    /// Opens the volume, finishes or undoes what a crash cut off, and empties
    /// staging.
    ///
    /// # Errors
    ///
    /// A path that is not a prepared volume, or is in use, is refused with
    /// nothing changed.
    pub async fn open(self) -> Result<Btrfs, OpenError> {
        let path = self.path.clone();
        let opened = tokio::task::spawn_blocking(move || self.open_blocking()).await;
        opened.unwrap_or_else(|error| Err(OpenError::Io { path, source: error.into() }))
    }

    fn open_blocking(self) -> Result<Btrfs, OpenError> {
        let path = self.path.as_path();
        let (root_fd, marker) = open_root(path)?;
        let Some(marker) = marker else {
            check_names(path)?;
            return Err(OpenError::NotInitialized { path: path.to_owned() });
        };
        check_names(path)?;
        refuse_read_only(path, &root_fd)?;
        lay_out(path).map_err(|error| failed(path, error))?;

        let promised = sys::shown(&root_fd).map_err(|error| failed(path, error))?;
        let layout = Layout {
            root: path.to_owned(),
            root_fd,
            commits: Commits::losing(self.loses_commits),
            promised: promised.join("allocation/data/bytes_may_use"),
        };
        let mut weaknesses = Vec::new();
        let mut quotas = None;
        if self.quotas {
            match Quotas::open(&layout.root_fd, self.classic_quotas) {
                Ok((opened, weakness)) => {
                    quotas = Some(opened);
                    weaknesses.extend(weakness);
                }
                Err(weakness) => weaknesses.push(weakness),
            }
        } else {
            weaknesses.push("no quotas: they are turned off".to_owned());
        }
        let flags = rustix::fs::fstatvfs(&layout.root_fd).map_err(|error| failed(path, error))?.f_flag;
        if !flags.contains(rustix::fs::StatVfsMountFlags::NOSUID | rustix::fs::StatVfsMountFlags::NODEV) {
            weaknesses.push("the volume is not mounted nosuid,nodev".to_owned());
        }
        let stream_version = super::receive::stream_version(&layout.root_fd);
        for weakness in &weaknesses {
            tracing::warn!(path = %path.display(), weakness, "the volume is weaker than it could be");
        }
        let store = Store {
            layout,
            quotas,
            weaknesses,
            stall_limit: self.stall_limit,
            stream_version,
            locks: Locks::default(),
            holds: Holds::default(),
            trash: Arc::default(),
            images: std::sync::Mutex::default(),
            _marker: marker,
        };
        store.recover().map_err(|failure: Failure| failed(path, failure))?;
        let store = Arc::new(store);
        let reaper = Reaper::start(&store).map_err(|error| failed(path, error))?;
        Ok(Btrfs(store, Arc::new(reaper)))
    }
}

impl Btrfs {
    /// A builder for the store at `path`, a directory of a mounted Btrfs that
    /// [`initialize`](Self::initialize) has prepared.
    pub fn builder(path: impl Into<PathBuf>) -> BtrfsBuilder {
        BtrfsBuilder {
            path: path.into(),
            quotas: true,
            classic_quotas: false,
            stall_limit: Duration::from_secs(600),
            loses_commits: false,
        }
    }

    /// Opens the store at `path` with the defaults.
    ///
    /// # Errors
    ///
    /// A path that is not a prepared volume, or is in use, is refused with
    /// nothing changed.
    pub async fn open(path: impl Into<PathBuf>) -> Result<Self, OpenError> {
        Self::builder(path).open().await
    }

    /// Prepares an empty directory of a mounted Btrfs, usually its root.
    /// Harmless when it has been prepared. Formats nothing.
    ///
    /// # Errors
    ///
    /// A directory that holds anything unknown is refused with nothing
    /// changed.
    pub fn initialize(path: &Path) -> Result<(), OpenError> {
        let (root_fd, marker) = open_root(path)?;
        check_names(path)?;
        if marker.is_some() {
            return Ok(());
        }
        refuse_read_only(path, &root_fd)?;
        let marker = Marker { layout: VERSION, id: VolumeUuid::random() };
        let prepare = || -> io::Result<()> {
            lay_out(path)?;
            // The marker comes last: without it nothing else counts.
            layout::write_atomically(&path.join(MARKER), &serde_json::to_vec(&marker)?)?;
            sys::commit(&root_fd)
        };
        prepare().map_err(|error| failed(path, error))
    }
}

fn failed(path: &Path, source: impl Into<cocalc_core::BoxError>) -> OpenError {
    OpenError::Io { path: path.to_owned(), source: source.into() }
}

/// Opens the directory and, if there is one, its marker, locked.
fn open_root(path: &Path) -> Result<(File, Option<File>), OpenError> {
    let root = layout::open_directory(path).map_err(|error| failed(path, error))?;
    if !sys::is_btrfs(&root).map_err(|error| failed(path, error))? {
        return Err(OpenError::NotBtrfs { path: path.to_owned() });
    }
    let text = match read_marker(&path.join(MARKER)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((root, None)),
        other => other.map_err(|error| failed(path, error))?,
    };
    match serde_json::from_slice::<Marker>(&text) {
        Ok(marker) if marker.layout == VERSION => {}
        _ => {
            let found = String::from_utf8_lossy(&text).chars().take(200).collect();
            return Err(OpenError::UnknownLayout { path: path.to_owned(), found });
        }
    }
    let file = File::open(path.join(MARKER)).map_err(|error| failed(path, error))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Err(rustix::io::Errno::WOULDBLOCK) => Err(OpenError::InUse { path: path.to_owned() }),
        other => other.map(|()| (root, Some(file))).map_err(|error| failed(path, error)),
    }
}

/// The beginning of a marker, whatever is in it.
fn read_marker(path: &Path) -> io::Result<Vec<u8>> {
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, rustix::fs::Mode::empty())?);
    let mut text = Vec::new();
    io::Read::read_to_end(&mut io::Read::take(file, MARKER_MAX), &mut text)?;
    Ok(text)
}

/// Refuses a file system that cannot be written, before anything is tried.
fn refuse_read_only(path: &Path, root: &File) -> Result<(), OpenError> {
    let flags = rustix::fs::fstatvfs(root).map_err(|error| failed(path, error))?.f_flag;
    if flags.contains(rustix::fs::StatVfsMountFlags::RDONLY) {
        return Err(OpenError::ReadOnly { path: path.to_owned() });
    }
    Ok(())
}

/// Refuses a directory that holds anything but the layout.
fn check_names(path: &Path) -> Result<(), OpenError> {
    for entry in fs::read_dir(path).map_err(|error| failed(path, error))? {
        let name = entry.map_err(|error| failed(path, error))?.file_name();
        let known = name.to_str().is_some_and(|name| {
            DIRECTORIES.contains(&name) || name == MARKER || name.strip_suffix(".new") == Some(MARKER)
        });
        if !known {
            let unknown = name.to_string_lossy().into_owned();
            return Err(OpenError::UnknownData { path: path.to_owned(), unknown });
        }
    }
    Ok(())
}

/// Makes the directories, closed to everybody else.
fn lay_out(path: &Path) -> io::Result<()> {
    layout::private_directory(path)?;
    DIRECTORIES.iter().try_for_each(|name| layout::private_directory(&path.join(name)))
}
