//! What is in a project's root, as seen from the host.
//!
//! Paths and files are the tenant's: they are resolved with the project's root as
//! root, so that no link leads out of it, and only regular files are read, a bounded
//! part of them.

use std::{fs::File, io::Read as _, os::fd::OwnedFd, path::Path};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};

use super::super::project::Running;
use crate::users::{self, User};

/// Who root is where no file says it.
const ROOT: &str = "root:x:0:0:root:/root:/bin/sh";

/// The root of a running project.
pub(super) struct Inside(OwnedFd);

impl Inside {
    pub(super) fn of(running: &Running) -> std::io::Result<Self> {
        let root = rustix::fs::open(
            Path::new("/proc").join(running.pid.to_string()).join("root"),
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        // If it is alive after that, the number meant it.
        if running.process.is_alive() { Ok(Self(root)) } else { Err(std::io::ErrorKind::NotFound.into()) }
    }

    fn open(&self, path: &str, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        rustix::fs::openat2(
            &self.0,
            path,
            flags | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
        )
    }

    /// A file as text; empty if it is not there, or none.
    fn read(&self, path: &str) -> String {
        let mut bytes = Vec::new();
        // Looked at before it is opened for reading: opening a device may do something.
        let regular = |file: &OwnedFd| {
            rustix::fs::fstat(file).is_ok_and(|about| FileType::from_raw_mode(about.st_mode).is_file())
        };
        if self.open(path, OFlags::PATH).is_ok_and(|file| regular(&file))
            && let Ok(file) = self.open(path, OFlags::RDONLY | OFlags::NOCTTY | OFlags::NONBLOCK)
            && regular(&file)
        {
            let _ = File::from(file).take(users::BYTES_MAX).read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// A user of the project; without a name, its ordinary one. That one and root
    /// are known whatever the tenant did to the files, which may be what is to be
    /// mended.
    pub(super) fn user(&self, name: Option<&str>) -> Option<User> {
        let (passwd, group) = (self.read("/etc/passwd"), self.read("/etc/group"));
        let known = || match name {
            Some("root") => users::lookup(ROOT, "", name),
            Some("user") => users::lookup("", "", None),
            _ => None,
        };
        users::lookup(&passwd, &group, name).or_else(known)
    }

    /// Whether something is there that is no directory.
    pub(super) fn has(&self, path: &str) -> bool {
        self.kind(path).is_some_and(|kind| !kind.is_dir())
    }

    /// Whether this file of the host's is there.
    pub(super) fn has_file(&self, path: &str, file: &Path) -> bool {
        let found = self.open(path, OFlags::PATH).and_then(rustix::fs::fstat);
        let same = |one: rustix::fs::Stat, other: rustix::fs::Stat| {
            (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)
        };
        found.is_ok_and(|found| rustix::fs::stat(file).is_ok_and(|file| same(found, file)))
    }

    /// Whether a directory is there.
    pub(super) fn has_directory(&self, path: &str) -> bool {
        self.kind(path).is_some_and(FileType::is_dir)
    }

    fn kind(&self, path: &str) -> Option<FileType> {
        let found = self.open(path, OFlags::PATH).ok()?;
        Some(FileType::from_raw_mode(rustix::fs::fstat(&found).ok()?.st_mode))
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink, process::Command};

    use super::*;

    #[test]
    fn what_a_tenant_plants_is_read_within_their_root_bounded_and_without_waiting() {
        let dir = tempfile::tempdir().unwrap();
        let (root, outside) = (dir.path().join("root"), dir.path().join("outside"));
        fs::create_dir_all(root.join("etc")).unwrap();
        fs::create_dir_all(root.join("home/other")).unwrap();
        fs::write(&outside, "root:x:0:0::/root:/bin/sh\nstolen:x:7:7::/:/bin/sh\n").unwrap();
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let inside = Inside(rustix::fs::open(&root, flags, Mode::empty()).unwrap());
        let passwd = root.join("etc/passwd");

        // Links, absolute or with any number of steps up, end in the root.
        fs::write(root.join("kept"), "other:x:1500:1500::/home/other:/sh\n").unwrap();
        for link in ["/kept", "../../../../../../kept"] {
            symlink(link, &passwd).unwrap();
            assert_eq!(inside.user(Some("other")).unwrap().identity.uid, 1500, "{link}");
            fs::remove_file(&passwd).unwrap();
        }
        let up = outside.strip_prefix(dir.path()).unwrap();
        for link in [outside.clone(), Path::new("..").join(up), Path::new("../..").join(up)] {
            symlink(&link, &passwd).unwrap();
            assert!(inside.user(Some("stolen")).is_none(), "{}", link.display());
            fs::remove_file(&passwd).unwrap();
        }
        // What would make a reader wait, or is no file.
        assert!(Command::new("mkfifo").arg(&passwd).status().unwrap().success());
        assert!(inside.user(Some("other")).is_none());
        fs::remove_file(&passwd).unwrap();
        fs::create_dir(&passwd).unwrap();
        assert_eq!(inside.user(None).unwrap().identity.uid, 1000, "known all the same");
        assert_eq!(inside.user(Some("root")).unwrap().identity.uid, 0);
        fs::remove_dir(&passwd).unwrap();
        // One without an end.
        fs::File::create(&passwd).unwrap().set_len(1 << 40).unwrap();
        assert_eq!(inside.read("/etc/passwd").len(), usize::try_from(users::BYTES_MAX).unwrap());
        assert!(inside.has("kept") && !inside.has("home") && inside.has_directory("/home/other"));
        // One that looks the same is another.
        fs::copy(root.join("kept"), root.join("copy")).unwrap();
        assert!(inside.has_file("/kept", &root.join("kept")));
        assert!(!inside.has_file("/copy", &root.join("kept")) && !inside.has_file("/none", &outside));
    }
}
