//! A project's root and home as mounts: the image and the project's own upper
//! layer through idmapped mounts, joined by an overlay.
//!
//! What is stored has canonical owners; the project sees them through its own
//! range of ids. Everything below the volume is a tenant's: each component is
//! opened beneath the one before, without following symbolic links and without
//! crossing into another mount or subvolume.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::{
    fs::{AtFlags, Gid, Mode, OFlags, ResolveFlags, Uid},
    io::Errno,
    mount::{MountFlags as Flags, MoveMountFlags, OpenTreeFlags, UnmountFlags},
};

use crate::kernel::{self, MountFlags};

/// The ordinary user of every image, by whom the home is owned.
pub(crate) const USER_ID: u32 = 1000;

/// Where a project's mounts are, below the runner's runtime directory.
#[derive(Clone, Debug)]
pub(crate) struct ProjectDirs {
    base: PathBuf,
}

impl ProjectDirs {
    pub(crate) fn new(base: PathBuf) -> Self {
        Self { base }
    }

    /// The merged root file system.
    pub(crate) fn root(&self) -> PathBuf {
        self.base.join("root")
    }

    /// The user's home.
    pub(crate) fn home(&self) -> PathBuf {
        self.base.join("home")
    }

    fn layer(&self) -> PathBuf {
        self.base.join("layer")
    }

    fn image(&self) -> PathBuf {
        self.base.join("image")
    }

    /// Makes the directories, so that the container can name them. They are
    /// the mapped root's: the runtime enters them as that, and nobody else.
    pub(crate) fn create(&self, base_id: u32) -> io::Result<()> {
        for dir in [self.base.clone(), self.image(), self.layer(), self.home(), self.root()] {
            match rustix::fs::mkdir(&dir, Mode::RWXU) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
        }
        rustix::fs::chown(&self.base, Some(Uid::from_raw(base_id)), Some(Gid::from_raw(base_id)))?;
        Ok(())
    }

    /// Mounts everything, in a thread of its own. What was mounted before is
    /// unmounted: the volume may be another one by now.
    pub(crate) fn mount(&self, image: &Path, volume: &Path, digest: &str, base_id: u32) -> io::Result<()> {
        self.unmount()?;
        self.create(base_id)?;
        let done = std::thread::scope(|scope| {
            std::thread::Builder::new()
                .name("mount".into())
                .spawn_scoped(scope, || self.mount_here(image, volume, digest, base_id))
                .map(|thread| thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread failed"))))
        });
        match done {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) | Err(error) => {
                // Half a set of mounts would only confuse.
                let _ = self.unmount();
                Err(error)
            }
        }
    }

    /// Mounts, and leaves the thread unfit for anything else.
    fn mount_here(&self, image: &Path, volume: &Path, digest: &str, base_id: u32) -> io::Result<()> {
        let userns = kernel::user_namespace(base_id)?;
        let volume = open_dir(volume).map_err(|error| context(error, "open the volume"))?;
        let (home, layer) = tenant_dirs(&volume, digest)?;
        let image = open_dir(image).map_err(|error| context(error, "open the image"))?;

        attach(&home, &userns, MountFlags { read_only: false }, &self.home())?;
        attach(&layer, &userns, MountFlags { read_only: false }, &self.layer())?;
        attach(&image, &userns, MountFlags { read_only: true }, &self.image())?;

        // Not xino, index, redirects or metacopy: the upper layer must mean
        // the same after it was sent to another host.
        let options = format!(
            "lowerdir={},upperdir={layer}/upper,workdir={layer}/work,\
             index=off,metacopy=off,redirect_dir=off,xino=off",
            self.image().display(),
            layer = self.layer().display(),
        );
        let options = std::ffi::CString::new(options).map_err(io::Error::other)?;
        // The overlay writes to its upper layer as whoever mounted it, and
        // root itself has no id in an idmapped mount.
        kernel::act_on_files_as(base_id).map_err(|error| context(error, "take the project's root id"))?;
        rustix::mount::mount("overlay", self.root(), "overlay", Flags::NODEV, Some(options.as_c_str()))
            .map_err(|error| context(error.into(), "mount the overlay"))?;
        // podman makes this link where it is missing, and can't here: its own
        // root id means nothing in this file system.
        let root = open_dir(&self.root())?;
        let etc = enter(&root, "etc", 0o755, Some(base_id))?;
        match rustix::fs::symlinkat("/proc/mounts", &etc, "mtab") {
            Ok(()) | Err(Errno::EXIST) => Ok(()),
            Err(error) => Err(context(error.into(), "make /etc/mtab")),
        }
    }

    /// Unmounts everything that is mounted; harmless if nothing is.
    pub(crate) fn unmount(&self) -> io::Result<()> {
        for dir in [self.root(), self.home(), self.layer(), self.image()] {
            unmount(&dir)?;
        }
        Ok(())
    }

    /// Unmounts, and removes the directories.
    pub(crate) fn remove(&self) -> io::Result<()> {
        self.unmount()?;
        for dir in [self.root(), self.home(), self.layer(), self.image(), self.base.clone()] {
            match rustix::fs::rmdir(&dir) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// The project's home, and the layer of this image, made if they are missing.
pub(crate) fn tenant_dirs(volume: &OwnedFd, digest: &str) -> io::Result<(OwnedFd, OwnedFd)> {
    let home = enter(volume, "home", 0o700, Some(USER_ID))?;
    let system = enter(volume, "system", 0o700, Some(0))?;
    let layer = enter(&system, digest, 0o700, Some(0))?;
    enter(&layer, "upper", 0o755, Some(0))?;
    enter(&layer, "work", 0o700, Some(0))?;
    Ok((home, layer))
}

/// Opens a directory by a path of ours.
pub(crate) fn open_dir(path: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(
        path,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )?)
}

/// Opens the directory `name` in `parent`, and makes it if there is nothing of
/// that name. A symbolic link, a file, a mount or a nested subvolume of that
/// name is refused.
pub(crate) fn enter(parent: &OwnedFd, name: &str, mode: u32, owner: Option<u32>) -> io::Result<OwnedFd> {
    let made = match rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(mode)) {
        Ok(()) => true,
        Err(Errno::EXIST) => false,
        Err(error) => return Err(context(error.into(), &format!("make {name}"))),
    };
    let opened = rustix::fs::openat2(
        parent,
        name,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV,
    )
    .map_err(|error| context(error.into(), &format!("enter {name}")))?;
    if made {
        // Otherwise it is whose process this is.
        if let Some(owner) = owner {
            let (uid, gid) = (Uid::from_raw(owner), Gid::from_raw(owner));
            rustix::fs::chownat(&opened, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH)?;
        }
        // The umask must not decide who can use a project's root. By the
        // descriptor: the name may be a link by now.
        let itself = format!("/proc/self/fd/{}", opened.as_raw_fd());
        rustix::fs::chmod(itself, Mode::from_raw_mode(mode))?;
    }
    Ok(opened)
}

/// Attaches an idmapped clone of a directory at `target`.
fn attach(directory: &OwnedFd, userns: &OwnedFd, flags: MountFlags, target: &Path) -> io::Result<()> {
    let clone = rustix::mount::open_tree(
        directory,
        "",
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH,
    )
    .map_err(|error| context(error.into(), "clone a mount"))?;
    kernel::set_mount(clone.as_fd(), userns.as_fd(), flags)
        .map_err(|error| context(error, "map the ids of a mount"))?;
    rustix::mount::move_mount(&clone, "", rustix::fs::CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(|error| context(error.into(), "attach a mount"))
}

/// Unmounts whatever is at `path`, however often.
pub(crate) fn unmount(path: &Path) -> io::Result<()> {
    let begun = Instant::now();
    loop {
        match rustix::mount::unmount(path, UnmountFlags::NOFOLLOW) {
            // There may be another below.
            Ok(()) => {}
            Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
            // A runtime that is just ending still has it open.
            Err(Errno::BUSY) if begun.elapsed() < Duration::from_secs(2) => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(Errno::BUSY) => {
                tracing::warn!(path = %path.display(), "still in use, detaching it");
                rustix::mount::unmount(path, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH)?;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

fn context(error: io::Error, what: &str) -> io::Error {
    io::Error::new(error.kind(), format!("could not {what}: {error}"))
}
