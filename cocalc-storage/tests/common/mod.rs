//! Files that are hard to carry, and everything that is known of a tree.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs::{self, File},
    os::unix::{
        ffi::OsStrExt as _,
        fs::{FileExt as _, FileTypeExt as _, MetadataExt as _, PermissionsExt as _, symlink},
    },
    path::Path,
};

use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags};

/// Plants, below `root`, what a careless carrier loses.
pub(crate) fn plant(root: &Path) {
    let home = root.join("home");
    let privileged = rustix::process::geteuid().is_root();
    fs::write(home.join("plain"), "plain").unwrap();
    fs::write(home.join(OsStr::from_bytes(b"not utf-8 \xff\xfe")), "bytes").unwrap();
    fs::write(home.join("new\nline"), "").unwrap();
    fs::write(home.join("x".repeat(255)), "long").unwrap();
    symlink("/nowhere/at/all", home.join("dangling")).unwrap();
    symlink("t".repeat(4000), home.join("far")).unwrap();

    fs::create_dir_all(home.join("d1/d2")).unwrap();
    fs::hard_link(home.join("plain"), home.join("d1/d2/linked")).unwrap();
    fs::hard_link(home.join("plain"), home.join("a-linked")).unwrap();

    let sparse = File::create(home.join("sparse")).unwrap();
    sparse.write_all_at(b"middle", 10 << 20).unwrap();
    sparse.set_len(30 << 20).unwrap();

    for (name, mode) in [("setuid", 0o4755), ("setgid", 0o2750), ("nothing", 0o400), ("odd", 0o641)] {
        fs::write(home.join(name), name).unwrap();
        if privileged {
            std::os::unix::fs::chown(home.join(name), Some(1000), Some(1234)).unwrap();
        }
        fs::set_permissions(home.join(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    rustix::fs::mknodat(CWD, home.join("pipe"), FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    if privileged {
        let null = rustix::fs::makedev(1, 3);
        rustix::fs::mknodat(
            CWD,
            home.join("null"),
            FileType::CharacterDevice,
            Mode::from_raw_mode(0o666),
            null,
        )
        .unwrap();
        rustix::fs::setxattr(home.join("plain"), "trusted.overlay.opaque", b"y", XattrFlags::empty())
            .unwrap();
    }
    for (name, value) in
        [("user.short", b"v".to_vec()), ("user.long", vec![0xa5; 2000]), ("user.empty", vec![])]
    {
        rustix::fs::setxattr(home.join("plain"), name, &value, XattrFlags::empty()).unwrap();
    }
    rustix::fs::setxattr(home.join("d1"), "user.of-a-directory", b"1", XattrFlags::empty()).unwrap();

    // Before the epoch, after 2038, and to the nanosecond; directories last.
    fs::create_dir(home.join("closed")).unwrap();
    fs::write(home.join("closed/inside"), "x").unwrap();
    fs::set_permissions(home.join("closed"), fs::Permissions::from_mode(0o555)).unwrap();
    for (name, secs) in
        [("plain", -1), ("odd", 4_102_444_800), ("d1/d2", 1_000_000_000), ("closed", 77), ("d1", 5)]
    {
        set_time(&home.join(name), secs);
    }
    set_time(&home, 1_234_567_890);
    set_time(root, 987_654_321);
}

pub(crate) fn set_time(path: &Path, tv_sec: i64) {
    let time = Timespec { tv_sec, tv_nsec: 123_456_789 };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

/// Everything about each name: a line of text, by path.
pub(crate) fn manifest(root: &Path) -> BTreeMap<Vec<u8>, String> {
    let mut found = BTreeMap::new();
    let mut inodes: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
    let mut todo = vec![root.to_owned()];
    while let Some(path) = todo.pop() {
        let about = fs::symlink_metadata(&path).unwrap();
        let name = path.strip_prefix(root).unwrap().as_os_str().as_bytes().to_vec();
        let kind = about.file_type();
        let content = if kind.is_dir() {
            todo.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            "directory".to_owned()
        } else if kind.is_file() {
            let data = fs::read(&path).unwrap();
            let hole = about.len() > 1 << 20 && about.blocks() * 512 < about.len() / 2;
            format!("{} bytes, crc {:x}, sparse {hole}", data.len(), crc32c::crc32c(&data))
        } else if kind.is_symlink() {
            format!("to {:?}", fs::read_link(&path).unwrap())
        } else {
            format!("fifo {} char {} {:x}", kind.is_fifo(), kind.is_char_device(), about.rdev())
        };
        // The same file under several names, by the first of these.
        let group = if about.nlink() > 1 && !kind.is_dir() { Some(about.ino()) } else { None };
        let mut attributes = BTreeMap::new();
        if kind.is_file() || kind.is_dir() {
            let mut list = vec![0; 65536];
            let length = rustix::fs::llistxattr(&path, &mut list[..]).unwrap();
            for attribute in list[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
                let mut value = vec![0; 65536];
                let length = rustix::fs::lgetxattr(&path, attribute, &mut value[..]).unwrap();
                value.truncate(length);
                attributes.insert(String::from_utf8_lossy(attribute).into_owned(), value);
            }
        }
        let line = format!(
            "{content}; {:o} {}:{} {}.{:09} links {}",
            about.mode(),
            about.uid(),
            about.gid(),
            about.mtime(),
            about.mtime_nsec(),
            if kind.is_dir() { 0 } else { about.nlink() },
        );
        found.insert(name.clone(), format!("{line} {attributes:?}"));
        if let Some(inode) = group {
            let first = inodes.entry(inode).or_insert_with(|| name.clone());
            *first = first.clone().min(name);
        }
    }
    found.insert(
        b"hard links".to_vec(),
        format!("{:?}", inodes.values().collect::<std::collections::BTreeSet<_>>()),
    );
    found
}
