//! The lists of SSH keys inside projects: `~/.ssh/authorized_keys`.

use std::{
    fs::File,
    io::{self, Read},
    os::fd::OwnedFd,
    path::Path,
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use cocalc_auth_live::InsideKeys;
use cocalc_auth_ssh::FILE_BYTES_MAX;
use cocalc_core::{ids::ProjectId, storage::Storage};
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, fstat, openat2};

/// How long reading it may take.
const READ_LIMIT: Duration = Duration::from_secs(5);

/// Reads them from the volumes of the projects, whether these run or not.
#[derive(Debug)]
pub(crate) struct VolumeKeys {
    pub(crate) storage: Arc<dyn Storage>,
}

#[async_trait]
impl InsideKeys for VolumeKeys {
    async fn file(&self, project: ProjectId) -> Option<Vec<u8>> {
        let read = async {
            let path = self.storage.volume(project).await.ok()?.path?;
            let read = tokio::task::spawn_blocking(move || read(&path)).await.ok()?;
            read.inspect_err(|error| {
                tracing::info!(%project, %error, "its authorized_keys were not read");
            })
            .ok()
        };
        tokio::time::timeout(READ_LIMIT, read).await.ok()?
    }
}

/// Reads the file in the home of a volume, each step beneath the one before:
/// links of the tenant's lead nowhere.
///
/// As OpenSSH's `StrictModes` has it, what others may write is not believed:
/// neither the file nor a directory on the way.
fn read(volume: &Path) -> io::Result<Vec<u8>> {
    let root = File::open(volume)?;
    let directory = OFlags::DIRECTORY | OFlags::RDONLY;
    let home = step(&root.into(), "home", directory)?;
    let ssh = step(&home, ".ssh", directory)?;
    // A pipe that nobody writes to must not be waited for.
    let file = File::from(step(&ssh, "authorized_keys", OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY)?);
    let stat = fstat(&file)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(io::Error::other("it is not a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if u64::try_from(bytes.len()).is_ok_and(|length| length > FILE_BYTES_MAX) {
        return Err(io::Error::other(format!("it is larger than {FILE_BYTES_MAX} bytes")));
    }
    Ok(bytes)
}

fn step(from: &OwnedFd, name: &str, flags: OFlags) -> io::Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::NO_XDEV;
    let opened = openat2(from, name, flags | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty(), resolve)?;
    if fstat(&opened)?.st_mode & 0o022 != 0 {
        return Err(io::Error::other(format!("{name} may be written by others than its owner")));
    }
    Ok(opened)
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::fs::{PermissionsExt, symlink},
        path::PathBuf,
    };

    use super::*;

    fn set_mode(path: &Path, mode: u32) {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    fn volume() -> (tempfile::TempDir, PathBuf) {
        let volume = tempfile::tempdir().unwrap();
        let ssh = volume.path().join("home/.ssh");
        std::fs::create_dir_all(&ssh).unwrap();
        for path in [volume.path().join("home"), ssh.clone()] {
            set_mode(&path, 0o700);
        }
        let file = ssh.join("authorized_keys");
        std::fs::write(&file, "a key\n").unwrap();
        set_mode(&file, 0o600);
        (volume, file)
    }

    #[test]
    fn the_file_is_read() {
        let (volume, file) = volume();
        assert_eq!(read(volume.path()).unwrap(), b"a key\n");
        std::fs::remove_file(file).unwrap();
        assert_eq!(read(volume.path()).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn links_pipes_and_what_others_may_write_are_not() {
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("authorized_keys"), "of somebody else\n").unwrap();

        let (volume, file) = volume();
        std::fs::remove_file(&file).unwrap();
        symlink(outside.path().join("authorized_keys"), &file).unwrap();
        assert!(read(volume.path()).is_err());

        std::fs::remove_file(&file).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, &file, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        assert!(read(volume.path()).is_err());

        std::fs::remove_file(&file).unwrap();
        let ssh = file.parent().unwrap();
        std::fs::remove_dir(ssh).unwrap();
        symlink(outside.path(), ssh).unwrap();
        assert!(read(volume.path()).is_err());

        for open in ["home", "home/.ssh", "home/.ssh/authorized_keys"] {
            let (volume, _) = self::volume();
            set_mode(&volume.path().join(open), 0o722);
            assert!(read(volume.path()).unwrap_err().to_string().contains("written by others"), "{open}");
        }
    }

    #[test]
    fn a_file_that_is_too_large_is_none() {
        let (volume, file) = volume();
        let bytes = vec![b'#'; usize::try_from(FILE_BYTES_MAX).unwrap() + 1];
        std::fs::write(&file, &bytes).unwrap();
        assert!(read(volume.path()).is_err());
        std::fs::write(&file, &bytes[1..]).unwrap();
        assert!(read(volume.path()).is_ok());
    }
}
