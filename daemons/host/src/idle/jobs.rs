//! The jobs that a project declares: files in `~/.cocalc/jobs`, each for as long
//! as it is there, and a day after it was touched last at most.

use std::{collections::BTreeMap, io, path::Path, time::Duration};

use cocalc_core::{
    ids::{ProjectId, Timestamp},
    storage::Storage,
};
use rustix::{
    fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, openat2, statat},
    io::Errno,
};

/// How long a job counts after it was touched.
const LIFE: Duration = Duration::from_secs(86_400);
/// How many jobs count, and how many names are read.
const JOBS_MAX: usize = 64;
const NAMES_MAX: usize = 256;
const NAME_BYTES_MAX: usize = 64;
/// How long looking may take.
const LIMIT: Duration = Duration::from_secs(5);

/// The jobs of a project, and for how long each counts; `None` if that cannot be
/// known now, which is no reason to take it for idle.
pub(super) async fn declared(
    storage: &dyn Storage,
    project: ProjectId,
    now: Timestamp,
) -> Option<BTreeMap<String, Duration>> {
    let look = async {
        let path = storage.volume(project).await.ok()?.path?;
        tokio::task::spawn_blocking(move || read(&path, now)).await.ok()?.ok()
    };
    tokio::time::timeout(LIMIT, look).await.ok().flatten()
}

/// Reads the directory beneath the volume: links of the tenant lead nowhere, and
/// nothing in it is opened.
fn read(volume: &Path, now: Timestamp) -> io::Result<BTreeMap<String, Duration>> {
    let root = std::fs::File::open(volume)?;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let directory = match openat2(&root, "home/.cocalc/jobs", flags, Mode::empty(), resolve) {
        // None, or what the tenant put in its place, behind which nobody looks.
        Err(Errno::NOENT | Errno::LOOP | Errno::NOTDIR | Errno::XDEV) => return Ok(BTreeMap::new()),
        found => found?,
    };
    let mut jobs = BTreeMap::new();
    for entry in Dir::read_from(&directory)?.take(NAMES_MAX) {
        let entry = entry?;
        let Ok(name) = entry.file_name().to_str() else { continue };
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if name.starts_with('.') || name.len() > NAME_BYTES_MAX || !name.chars().all(plain) {
            continue;
        }
        let about = match statat(&directory, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW) {
            // Renewed by a rename just now, perhaps; the others count.
            Err(Errno::NOENT) => continue,
            about => about?,
        };
        if FileType::from_raw_mode(about.st_mode) != FileType::RegularFile {
            continue;
        }
        // A time to come is no reason to count for longer.
        let touched = Timestamp::from_secs(about.st_mtime).min(now);
        let left = LIFE.saturating_sub(now.since(touched));
        if !left.is_zero() {
            jobs.insert(name.to_owned(), left);
        }
        if jobs.len() == JOBS_MAX {
            break;
        }
    }
    Ok(jobs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_are_plain_files_and_links_lead_nowhere() {
        let dir = tempfile::tempdir().unwrap();
        let now = Timestamp::now();
        assert!(read(dir.path(), now).unwrap().is_empty());
        let jobs = dir.path().join("home/.cocalc/jobs");
        std::fs::create_dir_all(&jobs).unwrap();
        for name in ["train-1", ".hidden", "bad name", "old", "future"] {
            std::fs::write(jobs.join(name), "").unwrap();
        }
        std::os::unix::fs::symlink("/etc/passwd", jobs.join("link")).unwrap();
        std::fs::create_dir(jobs.join("directory")).unwrap();
        let set = |name: &str, secs: i64| {
            let at = std::time::UNIX_EPOCH + Duration::from_secs(secs.unsigned_abs());
            let file = std::fs::File::options().write(true).open(jobs.join(name)).unwrap();
            file.set_modified(at).unwrap();
        };
        set("old", now.secs() - 90_000);
        set("future", now.secs() + 900_000);
        let found = read(dir.path(), now).unwrap();
        assert_eq!(found.keys().collect::<Vec<_>>(), ["future", "train-1"]);
        assert!(found.values().all(|left| *left <= LIFE));

        let other = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(other.path().join("home")).unwrap();
        std::os::unix::fs::symlink(dir.path().join("home/.cocalc"), other.path().join("home/.cocalc"))
            .unwrap();
        assert!(read(other.path(), now).unwrap().is_empty(), "not through a link");
    }
}
