//! A repository in a directory, laid out as restic does.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use cocalc_backup::protocol::FailureKind;
use rustic_core::Id;

use super::{CLOCK, Mode, Store, exists};
use crate::failure::Failed;

/// Where files are until they are whole; no repository program looks there.
const STAGING: &str = "tmp";

#[derive(Debug)]
pub(crate) struct Directory {
    root: PathBuf,
}

impl Directory {
    pub(crate) fn new(root: &Path) -> Result<Self, Failed> {
        let parent = root.parent().filter(|_| root.is_absolute()).ok_or_else(|| {
            Failed::new(FailureKind::Invalid, format!("{} is not an absolute path", root.display()))
        })?;
        if !parent.is_dir() {
            return Err(Failed::new(
                FailureKind::Unavailable,
                format!("{} is not there; is its disk mounted?", parent.display()),
            ));
        }
        Ok(Self { root: root.into() })
    }

    fn failed(what: &str, path: &Path, error: &io::Error) -> Failed {
        let kind = match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => FailureKind::Full,
            // Whoever reads a file has seen its name in a list or an index.
            io::ErrorKind::NotFound | io::ErrorKind::UnexpectedEof => FailureKind::Damaged,
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => FailureKind::Denied,
            _ => FailureKind::Unavailable,
        };
        Failed::new(kind, format!("cannot {what} {}: {error}", path.display()))
    }

    fn stage(&self, parts: &[Bytes]) -> io::Result<PathBuf> {
        // Processes of several machines may share the directory.
        let path = self.root.join(STAGING).join(Id::random().to_hex().as_str());
        let written = (|| {
            let mut options = OpenOptions::new();
            let mut file = options.write(true).create_new(true).mode(0o600).open(&path)?;
            parts.iter().try_for_each(|part| file.write_all(part))?;
            file.sync_all()
        })();
        match written {
            Ok(()) => Ok(path),
            Err(error) => {
                let _ = fs::remove_file(&path);
                Err(error)
            }
        }
    }

    fn place(&self, staged: &Path, path: &Path, mode: Mode) -> io::Result<()> {
        let parent = path.parent().unwrap_or(&self.root);
        if !parent.is_dir() {
            let there = parent.ancestors().find(|above| above.is_dir()).unwrap_or(&self.root).to_owned();
            make(parent)?;
            let mut made = parent.ancestors().skip(1).take_while(|above| above.starts_with(&there));
            made.try_for_each(|above| File::open(above)?.sync_all())?;
        }
        // A name that says what is in it takes what is there along: it is the
        // same, or damaged.
        if mode == Mode::First {
            fs::hard_link(staged, path)?;
            fs::remove_file(staged)?;
        } else {
            fs::rename(staged, path)?;
        }
        File::open(parent)?.sync_all()
    }
}

fn make(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

impl Store for Directory {
    fn create(&self) -> Result<(), Failed> {
        (|| {
            make(&self.root)?;
            for name in ["data", "index", "keys", "locks", "snapshots", STAGING] {
                make(&self.root.join(name))?;
            }
            File::open(&self.root)?.sync_all()?;
            self.root.parent().map_or(Ok(()), |parent| File::open(parent)?.sync_all())
        })()
        .map_err(|error| Self::failed("create", &self.root, &error))
    }

    fn list(&self, directory: &str) -> Result<Vec<(String, u64)>, Failed> {
        let top = self.root.join(directory);
        let mut found = Vec::new();
        let mut open = vec![top.clone()];
        while let Some(path) = open.pop() {
            let listed = (|| {
                let entries = match fs::read_dir(&path) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                    entries => entries?,
                };
                for entry in entries {
                    let entry = entry?;
                    match entry.metadata() {
                        // Deleted since.
                        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                        Err(error) => return Err(error),
                        Ok(metadata) if metadata.is_dir() => open.push(entry.path()),
                        Ok(metadata) => {
                            found.push((entry.file_name().to_string_lossy().into_owned(), metadata.len()));
                        }
                    }
                }
                Ok(())
            })();
            listed.map_err(|error| Self::failed("list", &path, &error))?;
        }
        Ok(found)
    }

    fn size(&self, name: &str) -> Result<Option<u64>, Failed> {
        let path = self.root.join(name);
        match fs::metadata(&path) {
            Ok(metadata) => Ok(Some(metadata.len())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Self::failed("look at", &path, &error)),
        }
    }

    fn read(&self, name: &str) -> Result<Bytes, Failed> {
        let path = self.root.join(name);
        fs::read(&path).map(Bytes::from).map_err(|error| Self::failed("read", &path, &error))
    }

    fn read_part(&self, name: &str, offset: u64, length: u64) -> Result<Bytes, Failed> {
        let path = self.root.join(name);
        (|| {
            let file = File::open(&path)?;
            // Not more is allotted than there is, whatever an index says.
            if file.metadata()?.len() < offset.saturating_add(length) {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it is too short"));
            }
            let mut bytes = vec![0; usize::try_from(length).map_err(io::Error::other)?];
            file.read_exact_at(&mut bytes, offset)?;
            Ok(Bytes::from(bytes))
        })()
        .map_err(|error| Self::failed("read", &path, &error))
    }

    fn write(&self, name: &str, parts: &[Bytes], mode: Mode) -> Result<(), Failed> {
        let path = self.root.join(name);
        let staged = self.stage(parts).map_err(|error| Self::failed("write", &path, &error))?;
        self.place(&staged, &path, mode).map_err(|error| {
            let _ = fs::remove_file(&staged);
            if error.kind() == io::ErrorKind::AlreadyExists {
                exists(name)
            } else {
                Self::failed("write", &path, &error)
            }
        })
    }

    fn remove(&self, name: &str) -> Result<(), Failed> {
        let path = self.root.join(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Self::failed("delete", &path, &error))
            }
            _ => Ok(()),
        }
    }

    fn tidy(&self, older_than: Duration) -> Result<(), Failed> {
        let staging = self.root.join(STAGING);
        (|| {
            for entry in fs::read_dir(&staging)? {
                let entry = entry?;
                // A clock that went back makes a file young, which is safe.
                let age = entry.metadata()?.modified()?.elapsed().unwrap_or_default();
                if age > older_than {
                    fs::remove_file(entry.path())?;
                }
            }
            Ok(())
        })()
        .map_err(|error| Self::failed("tidy", &staging, &error))
    }

    fn now(&self) -> Result<SystemTime, Failed> {
        self.write(CLOCK, &[], Mode::Over)?;
        let path = self.root.join(CLOCK);
        let written = fs::metadata(&path).and_then(|metadata| metadata.modified());
        written.map_err(|error| Self::failed("look at", &path, &error))
    }

    fn erase(&self) -> Result<(), Failed> {
        match fs::remove_dir_all(&self.root) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Self::failed("delete", &self.root, &error))
            }
            _ => Ok(()),
        }
    }
}
