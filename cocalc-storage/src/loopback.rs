//! Btrfs file systems in files, for demonstrations, tests, and machines
//! without a disk to spare. Everything here blocks.

use std::{
    fs::{self, OpenOptions},
    io,
    os::unix::{ffi::OsStrExt as _, fs::OpenOptionsExt as _},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use rustix::{
    io::Errno,
    mount::{MountFlags, UnmountFlags, mount, unmount},
};

/// How long to wait for what is being let go of.
const DETACH_LIMIT: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(5);

/// A mounted Btrfs file system in a file. Dropping it unmounts it; the file
/// stays. After kill -9 of its owner, [`release`] unmounts it by its file.
///
/// ```no_run
/// use std::path::Path;
/// use cocalc_storage::{Btrfs, loopback::Loopback};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let volume = Loopback::open_or_create(Path::new("data/alpha.img"), 8 << 30, Path::new("data/alpha"))?;
/// Btrfs::initialize(volume.path())?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[must_use = "dropping it unmounts it"]
pub struct Loopback {
    image: PathBuf,
    mount_point: PathBuf,
    keep: bool,
}

/// Why a loopback file system could not be made, mounted or released.
#[derive(Debug, thiserror::Error)]
#[error("could not {doing} {path}")]
pub struct LoopbackError {
    doing: &'static str,
    path: PathBuf,
    source: io::Error,
}

fn at<'a, E: Into<io::Error>>(
    doing: &'static str,
    path: &'a Path,
) -> impl FnOnce(E) -> LoopbackError + use<'a, E> {
    move |source| LoopbackError { doing, path: path.to_owned(), source: source.into() }
}

impl Loopback {
    /// Makes the sparse file `image`, which must not exist, with an empty
    /// Btrfs of `bytes` in it, and mounts that at `mount_point`, which is made
    /// if it is not there.
    ///
    /// # Errors
    ///
    /// Nothing is left of a file system that could not be made.
    pub fn create(image: &Path, bytes: u64, mount_point: &Path) -> Result<Self, LoopbackError> {
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(image);
        let made = file
            .and_then(|file| file.set_len(bytes))
            .map_err(at("make the file", image))
            .and_then(|()| run(Command::new("mkfs.btrfs").arg("-q").arg(image)).map_err(at("format", image)))
            .and_then(|_| Self::open(image, mount_point));
        if matches!(&made, Err(error) if error.source.kind() != io::ErrorKind::AlreadyExists) {
            // It is ours, and of no use.
            let _ = fs::remove_file(image);
        }
        made
    }

    /// Mounts the file system in `image` at `mount_point`. If it is mounted
    /// there already, by a process that was killed, it is taken over.
    ///
    /// # Errors
    ///
    /// Those of attaching and mounting it.
    pub fn open(image: &Path, mount_point: &Path) -> Result<Self, LoopbackError> {
        let image = fs::canonicalize(image).map_err(at("find", image))?;
        fs::create_dir_all(mount_point).map_err(at("make the mount point", mount_point))?;
        let mount_point = fs::canonicalize(mount_point).map_err(at("find", mount_point))?;
        let opened = Self { image, mount_point, keep: false };
        if mounts_of(&opened.image)
            .map_err(at("list the mounts of", &opened.image))?
            .contains(&opened.mount_point)
        {
            return Ok(opened);
        }
        // What a killed process left would keep the file system busy.
        release(&opened.image)?;

        let attached = run(Command::new("losetup").args(["--find", "--show"]).arg(&opened.image));
        let device = PathBuf::from(attached.map_err(at("attach", &opened.image))?.trim_end());
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOATIME;
        let mounted = mount(&device, &opened.mount_point, "btrfs", flags, None);
        // A device in use is detached when it is no longer: with the unmount,
        // whoever does that.
        let detached = run(Command::new("losetup").arg("--detach").arg(&device));
        mounted.map_err(at("mount", &opened.image))?;
        detached.map_err(at("prepare to detach", &opened.image))?;
        Ok(opened)
    }

    /// Mounts the file system in `image`, or makes it if there is no such
    /// file.
    ///
    /// # Errors
    ///
    /// Those of [`open`](Self::open) and [`create`](Self::create).
    pub fn open_or_create(image: &Path, bytes: u64, mount_point: &Path) -> Result<Self, LoopbackError> {
        if image.try_exists().map_err(at("find", image))? {
            Self::open(image, mount_point)
        } else {
            Self::create(image, bytes, mount_point)
        }
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.mount_point
    }

    /// The file that it is in.
    pub fn image(&self) -> &Path {
        &self.image
    }

    /// Leaves it mounted; [`release`] unmounts it.
    pub fn keep(mut self) {
        self.keep = true;
    }

    /// Unmounts it, and waits until its device is free.
    ///
    /// # Errors
    ///
    /// Something in it stays in use; it is out of sight then, and goes when
    /// that is let go of.
    pub fn close(mut self) -> Result<(), LoopbackError> {
        unmount_idle(&self.mount_point).map_err(at("unmount", &self.mount_point))?;
        self.keep = true;
        wait_detached(&self.image).map_err(at("detach", &self.image))
    }
}

impl Drop for Loopback {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        // What is still open in it keeps it until it is closed.
        let unmounted = unmount(&self.mount_point, UnmountFlags::empty())
            .or_else(|_| unmount(&self.mount_point, UnmountFlags::DETACH));
        if let Err(error) = unmounted {
            tracing::warn!(path = %self.mount_point.display(), %error, "a loopback volume stays mounted");
        }
    }
}

/// Unmounts every file system in the file `image` and detaches its devices,
/// whoever mounted it. Harmless if there are none, or no such file.
///
/// # Errors
///
/// Something in it is in use.
pub fn release(image: &Path) -> Result<(), LoopbackError> {
    let image = match fs::canonicalize(image) {
        // A file that is gone can still be attached.
        Err(error) if error.kind() == io::ErrorKind::NotFound => image.to_owned(),
        other => other.map_err(at("find", image))?,
    };
    // The innermost was mounted last.
    let mounts = mounts_of(&image).map_err(at("list the mounts of", &image))?;
    for mount_point in mounts.into_iter().rev() {
        unmount_idle(&mount_point).map_err(at("unmount", &mount_point))?;
    }
    for device in devices_of(&image).map_err(at("list the devices of", &image))? {
        // It may be gone already, with the unmount.
        let _ = run(Command::new("losetup").arg("--detach").arg(&device));
    }
    wait_detached(&image).map_err(at("detach", &image))
}

/// The loop devices whose backing file is `image`.
///
/// # Errors
///
/// Those of reading `/sys/block`.
pub fn devices_of(image: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/sys/block")? {
        let entry = entry?;
        // Absent where nothing is attached.
        let Ok(backing) = fs::read(entry.path().join("loop/backing_file")) else { continue };
        let backing = backing.strip_suffix(b"\n").unwrap_or(&backing);
        let backing = backing.strip_suffix(b" (deleted)").unwrap_or(backing);
        if backing == image.as_os_str().as_bytes() {
            found.push(Path::new("/dev").join(entry.file_name()));
        }
    }
    Ok(found)
}

/// Where the file systems in `image` are mounted, in order.
fn mounts_of(image: &Path) -> io::Result<Vec<PathBuf>> {
    let devices = devices_of(image)?;
    let mounts = fs::read("/proc/self/mounts")?;
    let mut found = Vec::new();
    for line in mounts.split(|byte| *byte == b'\n') {
        let mut fields = line.split(|byte| *byte == b' ');
        let (Some(device), Some(mount_point)) = (fields.next(), fields.next()) else { continue };
        if devices.iter().any(|known| known.as_os_str().as_bytes() == device) {
            found.push(PathBuf::from(std::ffi::OsStr::from_bytes(&unescape(mount_point))));
        }
    }
    Ok(found)
}

/// Undoes the kernel's `\ooo` for blanks and backslashes.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut text = Vec::new();
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        let digits = after.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if *first == b'\\' => {
                text.push(byte);
                rest = &after[3..];
            }
            _ => {
                text.push(*first);
                rest = after;
            }
        }
    }
    text
}

/// Unmounts, waiting for who is just going: a process that was killed, or a
/// child of ours between fork and exec, which has our descriptors.
fn unmount_idle(mount_point: &Path) -> io::Result<()> {
    let deadline = Instant::now() + DETACH_LIMIT;
    loop {
        match unmount(mount_point, UnmountFlags::empty()) {
            Err(Errno::BUSY) if Instant::now() < deadline => std::thread::sleep(PAUSE),
            other => return Ok(other?),
        }
    }
}

/// The kernel detaches after the unmount has returned.
fn wait_detached(image: &Path) -> io::Result<()> {
    let deadline = Instant::now() + DETACH_LIMIT;
    while !devices_of(image)?.is_empty() {
        if Instant::now() > deadline {
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, "its loop device is still in use"));
        }
        std::thread::sleep(PAUSE);
    }
    Ok(())
}

/// Runs a program to its end; what it prints.
fn run(command: &mut Command) -> io::Result<String> {
    let output = command.output().map_err(|error| {
        let program = command.get_program().to_string_lossy().into_owned();
        io::Error::new(error.kind(), format!("{program}: {error}"))
    })?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_unescaped() {
        assert_eq!(unescape(br"/a\040b\134c\0"), br"/a b\c\0");
        assert_eq!(unescape(b"/plain"), b"/plain");
    }
}
