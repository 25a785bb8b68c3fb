//! Secrets on disk: readable by their owner only, and never half written.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use zeroize::Zeroizing;

/// No secret here is larger.
const BYTES_MAX: u64 = 64 * 1024;

/// Reads a secret; `None` if there is no such file.
///
/// # Errors
///
/// A file that is not a regular one, that another user owns, or that anybody
/// but its owner may read or write.
pub fn load(path: &Path) -> Result<Option<Zeroizing<Vec<u8>>>, KeyFileError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(KeyFileError::io("open", path, source)),
    };
    // Of the open file, not of its name: that could change in between.
    let metadata = file.metadata().map_err(|source| KeyFileError::io("examine", path, source))?;
    if !metadata.is_file() || metadata.len() > BYTES_MAX {
        return Err(KeyFileError::NotAFile { path: path.to_owned() });
    }
    if metadata.mode() & 0o077 != 0 {
        return Err(KeyFileError::TooOpen { path: path.to_owned(), mode: metadata.mode() & 0o777 });
    }
    // The folder of this process belongs to its effective user, whatever else
    // hardening may hide there.
    let own = fs::metadata("/proc/self").map_err(|source| KeyFileError::io("examine", path, source))?;
    if metadata.uid() != own.uid() {
        return Err(KeyFileError::NotOurs { path: path.to_owned(), uid: metadata.uid() });
    }
    let capacity = usize::try_from(metadata.len()).unwrap_or(0) + 1;
    let mut bytes = Zeroizing::new(Vec::with_capacity(capacity));
    file.take(BYTES_MAX).read_to_end(&mut bytes).map_err(|source| KeyFileError::io("read", path, source))?;
    Ok(Some(bytes))
}

/// Writes a secret, replacing what was there; complete and durable on return,
/// and after a crash either the old or the new.
///
/// # Errors
///
/// Whatever the file system says; what was there stays.
pub fn save(path: &Path, bytes: &[u8]) -> Result<(), KeyFileError> {
    let temporary = write_beside(path, bytes)?;
    let renamed =
        fs::rename(&temporary, path).map_err(|source| KeyFileError::io("rename onto", path, source));
    finish(path, &temporary, renamed)
}

/// As [`save`], but never replaces a file.
///
/// # Errors
///
/// [`KeyFileError::Exists`] if there is one, or whatever the file system says.
pub fn create(path: &Path, bytes: &[u8]) -> Result<(), KeyFileError> {
    let temporary = write_beside(path, bytes)?;
    // A link, unlike a rename, fails if the name is taken.
    let linked = fs::hard_link(&temporary, path).map_err(|source| match source.kind() {
        io::ErrorKind::AlreadyExists => KeyFileError::Exists { path: path.to_owned() },
        _ => KeyFileError::io("create", path, source),
    });
    let _ = fs::remove_file(&temporary);
    finish(path, &temporary, linked)
}

fn write_beside(path: &Path, bytes: &[u8]) -> Result<PathBuf, KeyFileError> {
    let mut suffix = [0; 8];
    crate::fill_random(&mut suffix)
        .map_err(|error| KeyFileError::io("write", path, io::Error::other(error)))?;
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(format!(".{:016x}", u64::from_le_bytes(suffix)));
    let temporary = path.with_file_name(name);
    let written = (|| {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()
    })();
    match written {
        Ok(()) => Ok(temporary),
        Err(source) => {
            let _ = fs::remove_file(&temporary);
            Err(KeyFileError::io("write", path, source))
        }
    }
}

fn finish(path: &Path, temporary: &Path, result: Result<(), KeyFileError>) -> Result<(), KeyFileError> {
    if let Err(error) = result {
        let _ = fs::remove_file(temporary);
        return Err(error);
    }
    // The name is durable only when its folder is.
    let folder = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(|source| KeyFileError::io("make durable", path, source))
}

/// Why a secret was not read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyFileError {
    /// Others may read or change it.
    #[error("{} has mode {mode:03o}: others could read or change it; expected 0600", path.display())]
    TooOpen {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// Another user owns it.
    #[error("{} belongs to user {uid}, not to this process", path.display())]
    NotOurs {
        /// The file.
        path: PathBuf,
        /// Its owner.
        uid: u32,
    },
    /// Not a regular file of sensible size.
    #[error("{} is not a key file", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// There is one already.
    #[error("{} exists already", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// The file system failed.
    #[error("cannot {operation} {}", path.display())]
    Io {
        /// What was being done.
        operation: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

impl KeyFileError {
    fn io(operation: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { operation, path: path.to_owned(), source }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn what_is_saved_is_loaded_and_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ring");
        assert!(load(&path).unwrap().is_none());
        save(&path, b"one").unwrap();
        save(&path, b"two").unwrap();
        assert_eq!(load(&path).unwrap().unwrap().as_slice(), b"two");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(create(&path, b"three"), Err(KeyFileError::Exists { .. })));
        assert_eq!(load(&path).unwrap().unwrap().as_slice(), b"two");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "temporary files are gone");
    }

    #[test]
    fn a_failed_save_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ring");
        fs::create_dir(&path).unwrap();
        assert!(matches!(save(&path, b"x"), Err(KeyFileError::Io { .. })));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(matches!(load(&path), Err(KeyFileError::NotAFile { .. })));
    }

    #[test]
    fn any_bit_for_others_is_too_much() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        save(&path, b"x").unwrap();
        for mode in [0o604, 0o640, 0o602, 0o610, 0o666] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            assert!(matches!(load(&path), Err(KeyFileError::TooOpen { .. })), "{mode:o}");
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o400)).unwrap();
        assert!(load(&path).unwrap().is_some());
    }
}
