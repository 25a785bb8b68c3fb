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

/// Plants, in `home` below `root`, what a careless carrier loses. As root, also
/// owners, devices, and attributes that only root sets.
pub fn plant(root: &Path) {
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

    // A socket, access lists, capabilities, names in every order, deep places.
    drop(std::os::unix::net::UnixListener::bind(home.join("socket")).unwrap());
    fs::create_dir_all(home.join("a/b/c/d/e/f/g/h/i/j/k/l/m/n/o/p")).unwrap();
    fs::create_dir(home.join("empty")).unwrap();
    if privileged {
        // user::rw-, user:1001:r--, group::r--, mask::r--, other::---
        // (`linux/posix_acl_xattr.h`: version 2, then tag, permissions, id).
        let mut acl = 2_u32.to_le_bytes().to_vec();
        for (tag, permissions, id) in
            [(1_u16, 6_u16, u32::MAX), (2, 4, 1001), (4, 4, u32::MAX), (16, 4, u32::MAX), (32, 0, u32::MAX)]
        {
            acl.extend(tag.to_le_bytes());
            acl.extend(permissions.to_le_bytes());
            acl.extend(id.to_le_bytes());
        }
        fs::write(home.join("listed"), "listed").unwrap();
        rustix::fs::setxattr(home.join("listed"), "system.posix_acl_access", &acl, XattrFlags::empty())
            .unwrap();
        // `linux/capability.h`: VFS_CAP_REVISION_2, effective, cap_net_raw.
        let capability: Vec<u8> =
            [0x0200_0001_u32, 1 << 13, 0, 0, 0].iter().flat_map(|word| word.to_le_bytes()).collect();
        fs::write(home.join("capable"), "capable").unwrap();
        rustix::fs::setxattr(home.join("capable"), "security.capability", &capability, XattrFlags::empty())
            .unwrap();
    }

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

/// Sets the modification time of a path, to 123456789 ns after `tv_sec`.
pub fn set_time(path: &Path, tv_sec: i64) {
    let time = Timespec { tv_sec, tv_nsec: 123_456_789 };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

/// Changes what [`plant`] planted, in the ways that deltas get wrong.
pub fn disturb(root: &Path) {
    let home = root.join("home");
    // Two names swapped, a directory into a new one, a file over another.
    fs::rename(home.join("plain"), home.join("swap")).unwrap();
    fs::rename(home.join("odd"), home.join("plain")).unwrap();
    fs::rename(home.join("swap"), home.join("odd")).unwrap();
    fs::create_dir(home.join("new")).unwrap();
    fs::rename(home.join("d1"), home.join("new/d1")).unwrap();
    fs::create_dir(home.join("d1")).unwrap();
    fs::rename(home.join("setuid"), home.join("setgid")).unwrap();
    fs::remove_file(home.join("dangling")).unwrap();
    fs::create_dir(home.join("dangling")).unwrap();
    fs::remove_dir(home.join("empty")).unwrap();
    symlink("a link where a directory was", home.join("empty")).unwrap();
    // Contents: longer, shorter, a hole punched by writing around it.
    fs::write(home.join(OsStr::from_bytes(b"not utf-8 \xff\xfe")), vec![3; 300_000]).unwrap();
    fs::File::options().write(true).open(home.join("sparse")).unwrap().set_len(12 << 20).unwrap();
    fs::hard_link(home.join("nothing"), home.join("new/linked")).unwrap();
    fs::remove_file(home.join("a-linked")).unwrap();
    rustix::fs::setxattr(home.join("odd"), "user.short", b"other", XattrFlags::empty()).unwrap();
    rustix::fs::removexattr(home.join("odd"), "user.long").unwrap();
    fs::set_permissions(home.join("nothing"), fs::Permissions::from_mode(0o777)).unwrap();
    set_time(&home.join("nothing"), 4_000_000_000);
    set_time(&home.join("new"), 3);
    set_time(&home, 1_234_567_999);
    set_time(root, 987_654_999);
}

/// FNV-1a, 64 bits: tells contents apart, and that is all.
fn hash(data: &[u8]) -> u64 {
    data.iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

/// Everything about each name below `root`: a line of text, by path, and one line
/// for the groups of names of one file.
pub fn manifest(root: &Path) -> BTreeMap<Vec<u8>, String> {
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
            format!("{} bytes, hash {:x}, sparse {hole}", data.len(), hash(&data))
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
