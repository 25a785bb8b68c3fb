//! What a project sees of its volume: the calls of POSIX.1-2024 that programs
//! rely on, in the manner of `pjdfstest`.

use std::{
    fs::{self, File},
    io::{ErrorKind, Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _, PermissionsExt as _, symlink},
    path::Path,
};

use rustix::fs::{CWD, FileType, Mode, RenameFlags};

use super::{Harness, Host, promises::project};

pub(super) async fn behaves(h: &dyn Harness) {
    let project = project(h).await;
    let root = h.path(Host::First, project, None).await.expect("a backend with files says where they are");
    let home = root.join("home");
    names(&home);
    contents(&home);
    modes(&home);
    h.store(Host::First).delete(project).await.unwrap();
}

fn kind<T: std::fmt::Debug>(result: std::io::Result<T>) -> ErrorKind {
    result.expect_err("it is refused").kind()
}

fn names(home: &Path) {
    let at = |name: &str| home.join(name);
    fs::write(at("a"), "a").unwrap();
    // mkdir, rmdir
    fs::create_dir(at("d")).unwrap();
    assert_eq!(kind(fs::create_dir(at("d"))), ErrorKind::AlreadyExists);
    assert_eq!(kind(fs::create_dir(at("a/x"))), ErrorKind::NotADirectory);
    assert_eq!(kind(fs::create_dir(at("none/x"))), ErrorKind::NotFound);
    fs::write(at("d/f"), "").unwrap();
    assert_eq!(kind(fs::remove_dir(at("d"))), ErrorKind::DirectoryNotEmpty);
    assert_eq!(kind(fs::remove_dir(at("a"))), ErrorKind::NotADirectory);
    assert!(fs::remove_file(at("d")).is_err(), "unlink of a directory");
    assert!(fs::write(at(&"n".repeat(256)), "").is_err(), "NAME_MAX");
    // link, unlink: one file, as long as a name or a descriptor is left
    fs::hard_link(at("a"), at("b")).unwrap();
    assert_eq!(kind(fs::hard_link(at("a"), at("b"))), ErrorKind::AlreadyExists);
    assert_eq!(
        (fs::metadata(at("a")).unwrap().nlink(), fs::metadata(at("a")).unwrap().ino()),
        (2, fs::metadata(at("b")).unwrap().ino())
    );
    let mut open = File::open(at("b")).unwrap();
    fs::remove_file(at("a")).unwrap();
    fs::remove_file(at("b")).unwrap();
    let mut text = String::new();
    open.read_to_string(&mut text).unwrap();
    assert_eq!((text.as_str(), open.metadata().unwrap().nlink()), ("a", 0), "unlinked and open");
    // rename: atomic over files, refused over full directories and into itself
    fs::write(at("from"), "from").unwrap();
    fs::write(at("to"), "to").unwrap();
    fs::rename(at("from"), at("to")).unwrap();
    assert_eq!(fs::read(at("to")).unwrap(), b"from");
    fs::create_dir(at("e")).unwrap();
    assert_eq!(kind(fs::rename(at("e"), at("d"))), ErrorKind::DirectoryNotEmpty);
    assert!(fs::rename(at("d"), at("d/inside")).is_err());
    assert!(fs::rename(at("to"), at("e")).is_err() && fs::rename(at("e"), at("to")).is_err());
    fs::rename(at("d"), at("e")).unwrap();
    assert!(at("e/f").exists() && !at("d").exists(), "over an empty directory");
    rustix::fs::renameat_with(CWD, at("e"), CWD, at("to"), RenameFlags::EXCHANGE).unwrap();
    assert!(at("to").is_dir() && at("e").is_file(), "exchanged");
    assert!(rustix::fs::renameat_with(CWD, at("e"), CWD, at("to"), RenameFlags::NOREPLACE).is_err());
    // symlink, readlink, loops
    symlink("to/f", at("link")).unwrap();
    assert_eq!(fs::read_link(at("link")).unwrap(), Path::new("to/f"));
    assert!(
        fs::metadata(at("link")).unwrap().is_file() && fs::symlink_metadata(at("link")).unwrap().is_symlink()
    );
    symlink("loop", at("loop")).unwrap();
    assert!(File::open(at("loop")).is_err());
    // mkfifo
    rustix::fs::mknodat(CWD, at("fifo"), FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    assert!(fs::symlink_metadata(at("fifo")).unwrap().file_type().is_fifo());
}

fn contents(home: &Path) {
    let path = home.join("contents");
    let mut file = File::options().create_new(true).read(true).write(true).open(&path).unwrap();
    assert_eq!(kind(File::create_new(&path)), ErrorKind::AlreadyExists, "O_EXCL");
    file.write_all(b"0123456789").unwrap();
    // ftruncate grows with zeros
    file.set_len(4).unwrap();
    file.set_len(8).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"0123\0\0\0\0");
    // a hole past the end
    file.write_all_at(b"x", 1 << 20).unwrap();
    assert_eq!(file.metadata().unwrap().len(), (1 << 20) + 1);
    let mut byte = [1];
    file.read_exact_at(&mut byte, 1 << 19).unwrap();
    assert_eq!(byte, [0]);
    // append
    let mut appending = File::options().append(true).open(&path).unwrap();
    appending.seek(SeekFrom::Start(0)).unwrap();
    appending.write_all(b"end").unwrap();
    assert_eq!(file.metadata().unwrap().len(), (1 << 20) + 4);
    // times: writing moves them, utimensat sets them to the nanosecond
    super::zoo::set_time(&path, -5);
    let about = fs::metadata(&path).unwrap();
    assert_eq!((about.mtime(), about.mtime_nsec()), (-5, 123_456_789));
    file.write_all_at(b"y", 0).unwrap();
    file.sync_all().unwrap();
    assert!(fs::metadata(&path).unwrap().mtime() > 0);
    assert!(fs::metadata(&path).unwrap().ctime() > 0, "nobody sets that");
    // locks are per open file
    let other = File::open(&path).unwrap();
    file.try_lock().unwrap();
    assert!(other.try_lock_shared().is_err());
    file.unlock().unwrap();
    other.try_lock_shared().unwrap();
}

fn modes(home: &Path) {
    let path = home.join("modes");
    fs::write(&path, "").unwrap();
    for mode in [0o000, 0o400, 0o644, 0o777, 0o4755, 0o2755, 0o1755] {
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, mode);
    }
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(&path, Some(1000), Some(1001)).unwrap();
        let about = fs::metadata(&path).unwrap();
        assert_eq!((about.uid(), about.gid()), (1000, 1001));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o4755)).unwrap();
        std::os::unix::fs::chown(&path, Some(1002), None).unwrap();
        // Linux clears it for everybody, POSIX.1-2024 allows that.
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o4000, 0, "a new owner is not set-user-ID");
    }
    // A directory's group is inherited where it says so.
    let shared = home.join("shared");
    fs::create_dir(&shared).unwrap();
    fs::set_permissions(&shared, fs::Permissions::from_mode(0o2775)).unwrap();
    fs::create_dir(shared.join("inner")).unwrap();
    assert_eq!(fs::metadata(shared.join("inner")).unwrap().mode() & 0o2000, 0o2000);
}
