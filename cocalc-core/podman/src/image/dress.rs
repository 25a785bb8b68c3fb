//! What a project needs of its root file system and others leave out.

use std::{
    io::{self, Read, Write},
    os::fd::OwnedFd,
};

use rustix::{
    fs::{AtFlags, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid},
    io::Errno,
};

use crate::mounts::USER_ID;

/// Larger files of users are not looked into.
const USERS_MAX: u64 = 1 << 20;

/// Adds to the root file system below `root`, where it is missing: the
/// directories that are mounted over, and the ordinary user, who may become root
/// where there is `sudo`. The same root file system always becomes the same one.
/// No link in it is followed. Blocks.
///
/// # Errors
///
/// If it cannot be written, or has something else in the place of a directory.
pub fn dress(root: &OwnedFd) -> io::Result<()> {
    for (path, mode) in [
        ("dev", 0o755),
        ("etc", 0o755),
        ("proc", 0o755),
        ("run", 0o755),
        ("sys", 0o755),
        ("tmp", 0o1777),
        ("home", 0o755),
    ] {
        directory(root, path, mode, 0)?;
    }
    let home = open(root, "home", OFlags::PATH | OFlags::DIRECTORY)?;
    directory(&home, "user", 0o700, USER_ID)?;
    let etc = open(root, "etc", OFlags::PATH | OFlags::DIRECTORY)?;
    let passwd = read(&etc, "passwd")?;
    if !has_id(&passwd, USER_ID) {
        let shell = if open(root, "bin/bash", OFlags::PATH).is_ok()
            || open(root, "usr/bin/bash", OFlags::PATH).is_ok()
        {
            "/bin/bash"
        } else {
            "/bin/sh"
        };
        let name = if has_name(&passwd, "user") { "cocalc" } else { "user" };
        append(
            &etc,
            "passwd",
            &passwd,
            &format!("{name}:x:{USER_ID}:{USER_ID}::/home/user:{shell}\n"),
            0o644,
        )?;
        let group = read(&etc, "group")?;
        if !has_id(&group, USER_ID) {
            append(&etc, "group", &group, &format!("{name}:x:{USER_ID}:\n"), 0o644)?;
        }
        let sudoers = open(&etc, "sudoers.d", OFlags::PATH | OFlags::DIRECTORY);
        if let Ok(sudoers) = sudoers
            && open(&sudoers, name, OFlags::PATH).is_err()
        {
            append(&sudoers, name, "", &format!("{name} ALL=(ALL:ALL) NOPASSWD: ALL\n"), 0o440)?;
        }
    }
    Ok(())
}

fn open(at: &OwnedFd, path: &str, flags: OFlags) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
    // A directory of the way may be a link within the root, as /bin is.
    let resolve = if path.contains('/') { resolve } else { resolve | ResolveFlags::NO_SYMLINKS };
    rustix::fs::openat2(at, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)
}

const EPOCH: Timestamps = Timestamps {
    last_access: Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT },
    last_modification: Timespec { tv_sec: 0, tv_nsec: 0 },
};

fn times(stat: &rustix::fs::Stat) -> Timestamps {
    let tv_nsec = i64::try_from(stat.st_mtime_nsec).unwrap_or(0);
    Timestamps {
        last_access: EPOCH.last_access,
        last_modification: Timespec { tv_sec: stat.st_mtime, tv_nsec },
    }
}

/// Makes a directory unless there is one, and leaves its parent's time alone.
fn directory(parent: &OwnedFd, name: &str, mode: u32, owner: u32) -> io::Result<()> {
    let before = rustix::fs::fstat(parent)?;
    match rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(mode)) {
        Ok(()) => {}
        Err(Errno::EXIST) => {
            let there = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
            let kind = rustix::fs::FileType::from_raw_mode(there.st_mode);
            // Some have /run or /tmp as a link to another place in them.
            return match kind {
                rustix::fs::FileType::Directory | rustix::fs::FileType::Symlink => Ok(()),
                _ => Err(io::Error::other(format!("the image's /{name} is no directory"))),
            };
        }
        Err(error) => return Err(error.into()),
    }
    rustix::fs::chmodat(parent, name, Mode::from_raw_mode(mode), AtFlags::empty())?;
    let id = (Some(Uid::from_raw(owner)), Some(Gid::from_raw(owner)));
    rustix::fs::chownat(parent, name, id.0, id.1, AtFlags::SYMLINK_NOFOLLOW)?;
    rustix::fs::utimensat(parent, name, &EPOCH, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(rustix::fs::utimensat(parent, ".", &times(&before), AtFlags::empty())?)
}

/// A small text file; empty if there is none.
fn read(at: &OwnedFd, name: &str) -> io::Result<String> {
    let file = match open(at, name, OFlags::RDONLY | OFlags::NONBLOCK) {
        Err(Errno::NOENT) => return Ok(String::new()),
        other => std::fs::File::from(other?),
    };
    if !file.metadata()?.is_file() {
        return Err(io::Error::other(format!("the image's /etc/{name} is no file")));
    }
    let mut bytes = Vec::new();
    file.take(USERS_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > USERS_MAX {
        return Err(io::Error::other(format!("the image's /etc/{name} is too large")));
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Adds a line to a file, or makes it with one, and leaves times alone.
fn append(at: &OwnedFd, name: &str, present: &str, line: &str, mode: u32) -> io::Result<()> {
    let before = rustix::fs::fstat(at)?;
    let old = rustix::fs::statat(at, name, AtFlags::SYMLINK_NOFOLLOW).ok();
    let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(at, name, flags, Mode::from_raw_mode(mode))?;
    let mut file = std::fs::File::from(fd);
    let missing_end = !present.is_empty() && !present.ends_with('\n');
    file.write_all(format!("{}{line}", if missing_end { "\n" } else { "" }).as_bytes())?;
    if old.is_none() {
        rustix::fs::fchmod(&file, Mode::from_raw_mode(mode))?;
    }
    rustix::fs::futimens(&file, &old.as_ref().map_or(EPOCH, times))?;
    rustix::fs::utimensat(at, ".", &times(&before), AtFlags::empty())?;
    Ok(())
}

/// Whether a line of `/etc/passwd` or `/etc/group` has this number.
fn has_id(text: &str, id: u32) -> bool {
    text.lines().any(|line| line.split(':').nth(2).and_then(|field| field.parse().ok()) == Some(id))
}

fn has_name(text: &str, name: &str) -> bool {
    text.lines().any(|line| line.split(':').next() == Some(name))
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{MetadataExt, symlink},
    };

    use super::*;

    fn root_of(path: &std::path::Path) -> OwnedFd {
        rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap()
    }

    #[test]
    fn what_is_missing_is_added_once_and_always_the_same() {
        assert!(rustix::process::geteuid().is_root(), "this test needs root");
        let make = || {
            let dir = tempfile::tempdir().unwrap();
            fs::create_dir_all(dir.path().join("etc/sudoers.d")).unwrap();
            fs::create_dir_all(dir.path().join("usr/bin")).unwrap();
            symlink("usr/bin", dir.path().join("bin")).unwrap();
            fs::write(dir.path().join("usr/bin/bash"), "").unwrap();
            fs::write(dir.path().join("etc/passwd"), "root:x:0:0::/root:/bin/sh").unwrap();
            dress(&root_of(dir.path())).unwrap();
            dir
        };
        let (one, two) = (make(), make());
        let read = |dir: &tempfile::TempDir, name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
        assert_eq!(
            read(&one, "etc/passwd"),
            "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/bash\n"
        );
        assert_eq!(read(&one, "etc/group"), "user:x:1000:\n");
        assert_eq!(read(&one, "etc/sudoers.d/user"), "user ALL=(ALL:ALL) NOPASSWD: ALL\n");
        for name in ["etc/group", "tmp", "home/user", "proc"] {
            let about = |dir: &tempfile::TempDir| {
                let about = fs::metadata(dir.path().join(name)).unwrap();
                (about.mode(), about.uid(), about.mtime(), about.mtime_nsec())
            };
            assert_eq!(about(&one), about(&two), "{name}");
        }
        assert_eq!(fs::metadata(one.path().join("tmp")).unwrap().mode() & 0o7777, 0o1777);
        assert_eq!(fs::metadata(one.path().join("home/user")).unwrap().uid(), 1000);
        dress(&root_of(one.path())).unwrap();
        assert_eq!(read(&one, "etc/passwd"), read(&two, "etc/passwd"));
    }

    #[test]
    fn links_in_an_image_lead_nowhere() {
        let (dir, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(outside.path().join("passwd"), "host").unwrap();
        symlink(outside.path(), dir.path().join("etc")).unwrap();
        assert!(dress(&root_of(dir.path())).is_err());
        fs::remove_file(dir.path().join("etc")).unwrap();
        fs::create_dir(dir.path().join("etc")).unwrap();
        symlink(outside.path().join("passwd"), dir.path().join("etc/passwd")).unwrap();
        assert!(dress(&root_of(dir.path())).is_err());
        assert_eq!(fs::read_to_string(outside.path().join("passwd")).unwrap(), "host");
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
    }
}
