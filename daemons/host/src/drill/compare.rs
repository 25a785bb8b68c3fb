//! Compares a restored tree with the snapshot that it was backed up from, with
//! nothing of the programs that did either.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::{FileTypeExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use cocalc_core::ids::TreePath;

/// How many differences are told.
pub(super) const WORDS_MAX: usize = 20;
/// How much of two files is compared at once.
const PIECE: usize = 256 * 1024;

/// What a comparison found.
#[derive(Debug, Default, Eq, PartialEq)]
pub(super) struct Compared {
    /// What is restored and is not as it was, the first few.
    pub(super) wrong: Vec<String>,
    /// What was not restored, the first few.
    pub(super) missing: Vec<String>,
}

impl Compared {
    fn wrong(&mut self, path: &Path, what: &str) {
        if self.wrong.len() < WORDS_MAX {
            self.wrong.push(format!("{}: {what}", shown(path)));
        }
    }
}

/// A path as it can be shown to anybody.
fn shown(path: &Path) -> String {
    use std::os::unix::ffi::OsStrExt as _;
    TreePath::from_bytes(path.as_os_str().as_bytes()).map_or_else(|_| "/".to_owned(), |path| path.to_string())
}

/// Compares names, kinds, contents, owners, modes, times, links and extended
/// attributes. Both trees are quiet, and on one file system each; no link is
/// followed.
pub(super) fn trees(snapshot: &Path, restored: &Path) -> io::Result<Compared> {
    let mut found = Compared::default();
    // Of the snapshot's hard links: which restored inode each has.
    let mut links: BTreeMap<u64, u64> = BTreeMap::new();
    let mut todo = vec![PathBuf::new()];
    while let Some(directory) = todo.pop() {
        let (ours, theirs) = (names(&snapshot.join(&directory))?, names(&restored.join(&directory))?);
        for name in theirs.difference(&ours) {
            found.wrong(&directory.join(name), "was not in the snapshot");
        }
        for name in &ours {
            let path = directory.join(name);
            let before = fs::symlink_metadata(snapshot.join(&path))?;
            if !theirs.contains(name) {
                // Of no use to anybody but the process that made it.
                if !before.file_type().is_socket() && found.missing.len() < WORDS_MAX {
                    found.missing.push(format!("{}: is missing", shown(&path)));
                }
                continue;
            }
            let after = fs::symlink_metadata(restored.join(&path))?;
            one(&mut found, snapshot, restored, &path, &before, &after)?;
            if !before.is_dir() && before.nlink() > 1 {
                let same = *links.entry(before.ino()).or_insert_with(|| after.ino()) == after.ino();
                if !same {
                    found.wrong(&path, "is not the hard link that it was");
                }
            }
            if before.is_dir() && after.is_dir() {
                todo.push(path);
            }
        }
    }
    Ok(found)
}

fn names(directory: &Path) -> io::Result<BTreeSet<OsString>> {
    fs::read_dir(directory)?.map(|entry| entry.map(|entry| entry.file_name())).collect()
}

fn one(
    found: &mut Compared,
    snapshot: &Path,
    restored: &Path,
    path: &Path,
    before: &fs::Metadata,
    after: &fs::Metadata,
) -> io::Result<()> {
    if before.file_type() != after.file_type() {
        found.wrong(path, "is of another kind");
        return Ok(());
    }
    if (before.uid(), before.gid()) != (after.uid(), after.gid()) {
        found.wrong(path, "has another owner");
    }
    if !before.is_symlink() && before.mode() != after.mode() {
        found.wrong(path, "has another mode");
    }
    if (before.mtime(), before.mtime_nsec()) != (after.mtime(), after.mtime_nsec()) {
        found.wrong(path, "has another time");
    }
    if before.rdev() != after.rdev() {
        found.wrong(path, "is another device");
    }
    let (ours, theirs) = (snapshot.join(path), restored.join(path));
    if before.is_symlink() && fs::read_link(&ours)? != fs::read_link(&theirs)? {
        found.wrong(path, "leads elsewhere");
    }
    if before.is_file() && (before.len() != after.len() || !same_bytes(&ours, &theirs)?) {
        found.wrong(path, "has other contents");
    }
    if attributes(&ours)? != attributes(&theirs)? {
        found.wrong(path, "has other extended attributes");
    }
    Ok(())
}

fn same_bytes(one: &Path, other: &Path) -> io::Result<bool> {
    let (mut one, mut other) = (File::open(one)?, File::open(other)?);
    let (mut a, mut b) = (vec![0; PIECE], vec![0; PIECE]);
    loop {
        let read = fill(&mut one, &mut a)?;
        if read != fill(&mut other, &mut b)? || a[..read] != b[..read] {
            return Ok(false);
        }
        if read == 0 {
            return Ok(true);
        }
    }
}

fn fill(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read(&mut buffer[filled..])? {
            0 => break,
            read => filled += read,
        }
    }
    Ok(filled)
}

/// The extended attributes of one name, itself if it is a link.
fn attributes(path: &Path) -> io::Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut list = vec![0; 64 * 1024];
    let length = match rustix::fs::llistxattr(path, &mut list[..]) {
        Ok(length) => length,
        // A file system without any.
        Err(rustix::io::Errno::OPNOTSUPP) => return Ok(BTreeMap::new()),
        Err(error) => return Err(error.into()),
    };
    let mut all = BTreeMap::new();
    for name in list[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        // Those of btrfs itself say how it stores, not what.
        if name.starts_with(b"btrfs.") {
            continue;
        }
        let mut value = vec![0; 64 * 1024];
        let length = rustix::fs::lgetxattr(path, name, &mut value[..])?;
        value.truncate(length);
        all.insert(name.to_vec(), value);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    fn tree(root: &Path) {
        fs::create_dir(root.join("home")).unwrap();
        fs::write(root.join("home/notes"), "hello").unwrap();
        fs::hard_link(root.join("home/notes"), root.join("home/again")).unwrap();
        symlink("notes", root.join("home/link")).unwrap();
        let then = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000);
        for name in ["home/notes", "home"] {
            File::open(root.join(name)).unwrap().set_times(fs::FileTimes::new().set_modified(then)).unwrap();
        }
        let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
        let stamp = rustix::fs::Timespec { tv_sec: 7, tv_nsec: 0 };
        let times = rustix::fs::Timestamps { last_access: stamp, last_modification: stamp };
        rustix::fs::utimensat(rustix::fs::CWD, root.join("home/link"), &times, flags).unwrap();
    }

    #[test]
    fn every_kind_of_difference_is_found() {
        type Damage<'a> = (&'a str, &'a dyn Fn(&Path));
        let changes: [Damage<'_>; 8] = [
            ("has other contents", &|root| {
                fs::write(root.join("home/notes"), "hellO").unwrap();
            }),
            ("has another mode", &|root| {
                fs::set_permissions(root.join("home/notes"), fs::Permissions::from_mode(0o600)).unwrap();
            }),
            ("has another time", &|root| {
                let file = File::open(root.join("home/notes")).unwrap();
                file.set_times(fs::FileTimes::new().set_modified(std::time::SystemTime::now())).unwrap();
            }),
            ("is missing", &|root| fs::remove_file(root.join("home/again")).unwrap()),
            ("was not in the snapshot", &|root| fs::write(root.join("home/more"), "").unwrap()),
            ("leads elsewhere", &|root| {
                fs::remove_file(root.join("home/link")).unwrap();
                symlink("/etc/passwd", root.join("home/link")).unwrap();
            }),
            ("is of another kind", &|root| {
                fs::remove_file(root.join("home/link")).unwrap();
                fs::create_dir(root.join("home/link")).unwrap();
            }),
            ("is not the hard link", &|root| {
                fs::remove_file(root.join("home/again")).unwrap();
                fs::copy(root.join("home/notes"), root.join("home/again")).unwrap();
            }),
        ];
        for (expected, change) in changes {
            let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
            tree(one.path());
            tree(other.path());
            let same = trees(one.path(), other.path()).unwrap();
            assert_eq!(same, Compared::default());
            change(other.path());
            let found = trees(one.path(), other.path()).unwrap();
            let told = [found.wrong, found.missing].concat();
            assert!(told.iter().any(|words| words.contains(expected)), "{expected}: {told:?}");
        }
    }
}
