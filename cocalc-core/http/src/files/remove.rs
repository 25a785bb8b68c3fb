//! Removes folders with all that is in them.

use std::{
    io,
    time::{Duration, Instant},
};

use cocalc_core::ids::OperationId;
use rustix::{
    fs::{Access, AtFlags, Dir, FileType},
    io::Errno,
};

use super::tree::Node;

/// How many names of a folder are held at a time.
const NAMES_MAX: usize = 256;
/// How many folders are held open. What is deeper is first brought up.
const OPEN_MAX: usize = 64;

/// How long it is looked for what cannot be removed, before anything is.
const LOOK_LIMIT: Duration = Duration::from_secs(4);

/// Finds a read-only subvolume in the folder `name` of `parent`, or the folder
/// itself if it is one: nothing in it can be removed, and who asks for all or
/// nothing is told before anything is. Its path, from `parent` on. What is very
/// deep, or cannot be looked at in time, is not looked at: the removal ends there.
///
/// # Errors
///
/// What cannot be looked at.
pub(crate) fn read_only_within(parent: &Node, name: &[u8]) -> io::Result<Option<Vec<u8>>> {
    look(parent, name, OPEN_MAX, Instant::now() + LOOK_LIMIT)
}

fn look(above: &Node, name: &[u8], depth: usize, until: Instant) -> io::Result<Option<Vec<u8>>> {
    let Some(depth) = depth.checked_sub(1) else { return Ok(None) };
    let folder = match above.entry(name) {
        Ok(folder) if folder.kind() == FileType::Directory => folder,
        // It is something else by now.
        Ok(_) => return Ok(None),
        Err(error) => match Errno::from_io_error(&error) {
            Some(Errno::NOENT | Errno::LOOP | Errno::NOTDIR) => return Ok(None),
            _ => return Err(error),
        },
    };
    let directory = folder.directory()?;
    // Another device, and yet no other mount: a subvolume.
    if folder.stat.st_dev != above.stat.st_dev
        && rustix::fs::accessat(&directory, ".", Access::WRITE_OK, AtFlags::empty()) == Err(Errno::ROFS)
    {
        return Ok(Some(name.to_vec()));
    }
    for (number, entry) in Dir::new(directory)?.enumerate() {
        if number % 1024 == 0 && Instant::now() >= until {
            return Ok(None);
        }
        let entry = entry?;
        let inner = entry.file_name().to_bytes();
        let folders = matches!(entry.file_type(), FileType::Directory | FileType::Unknown);
        if !folders || inner == b"." || inner == b".." {
            continue;
        }
        if let Some(found) = look(&folder, inner, depth, until)? {
            return Ok(Some([name, b"/", &found].concat()));
        }
    }
    Ok(None)
}

/// A folder that is being emptied.
struct Level {
    folder: Node,
    /// What it is called in the folder above it.
    name: Vec<u8>,
    /// Names that were in it.
    names: Vec<Vec<u8>>,
}

/// Removes the folder `name` of `parent`, and what is in it; false if `until` has
/// come before all of it was gone. What tenants put in the way of that meanwhile
/// is removed as well, or ends it; nothing outside of the folder is.
///
/// # Errors
///
/// What cannot be removed, for instance because it is immutable. The rest may be
/// gone by then.
pub(crate) fn remove_all(parent: &Node, name: &[u8], until: Instant) -> io::Result<bool> {
    let folder = parent.entry(name)?;
    if folder.kind() != FileType::Directory {
        return Err(Errno::NOTDIR.into());
    }
    let mut levels = vec![Level { folder, name: name.to_vec(), names: vec![] }];
    while let Some(level) = levels.last_mut() {
        if Instant::now() >= until {
            return Ok(false);
        }
        if level.names.is_empty() {
            level.names = names(&level.folder)?;
        }
        let Some(next) = level.names.pop() else {
            // It was empty just now. If it is no more, it is found again from
            // above, until the time is over.
            let Some(done) = levels.pop() else { break };
            let above = levels.last().map_or(parent, |level| &level.folder);
            match gone(above.remove(&done.name, true)) {
                Err(error) if Errno::from_io_error(&error) == Some(Errno::NOTEMPTY) && levels.is_empty() => {
                    levels.push(done);
                }
                Err(error) if Errno::from_io_error(&error) == Some(Errno::NOTEMPTY) => {}
                other => other?,
            }
            continue;
        };
        match gone(level.folder.remove(&next, false)) {
            Err(error) if Errno::from_io_error(&error) == Some(Errno::ISDIR) => {}
            other => {
                other?;
                continue;
            }
        }
        let folder = match level.folder.entry(&next) {
            Ok(folder) if folder.kind() == FileType::Directory => folder,
            // It is something else by now: found again.
            Ok(_) => continue,
            Err(error) => match Errno::from_io_error(&error) {
                Some(Errno::NOENT | Errno::LOOP | Errno::NOTDIR) => continue,
                _ => return Err(error),
            },
        };
        if levels.len() < OPEN_MAX {
            levels.push(Level { folder, name: next, names: vec![] });
        } else if let (Some(top), Some(level)) = (levels.first(), levels.last()) {
            // Its turn comes once what is here is gone.
            let passing = format!(".cocalc-{}", OperationId::random());
            gone(level.folder.rename(&next, &top.folder, passing.as_bytes(), false))?;
        }
    }
    Ok(true)
}

/// Some of the names in a folder.
fn names(folder: &Node) -> io::Result<Vec<Vec<u8>>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(folder.directory()?)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(name.to_vec());
        }
        if names.len() == NAMES_MAX {
            break;
        }
    }
    Ok(names)
}

/// What is no longer there need not be removed.
fn gone(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::symlink, path::Path, time::Duration};

    use super::*;
    use crate::files::{path::FilePath, tree::Tree};

    fn root(path: &Path) -> Node {
        let root = std::fs::File::open(path).unwrap();
        Tree(root.into()).open(&FilePath::parse("").unwrap()).unwrap()
    }

    #[test]
    fn all_of_a_folder_goes_and_nothing_that_its_links_lead_to() {
        let (inside, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::write(outside.path().join("kept"), "x").unwrap();
        let folder = inside.path().join("folder");
        std::fs::create_dir_all(folder.join("a/b/c")).unwrap();
        for number in 0..NAMES_MAX * 2 + 3 {
            std::fs::write(folder.join(format!("a/b/{number}")), "x").unwrap();
        }
        symlink(outside.path(), folder.join("a/link")).unwrap();
        symlink(outside.path().join("kept"), folder.join("a/b/c/link")).unwrap();
        std::fs::write(inside.path().join("kept"), "x").unwrap();
        let parent = root(inside.path());
        let until = Instant::now() + Duration::from_secs(600);
        assert!(remove_all(&parent, b"folder", until).unwrap());
        assert!(!folder.exists() && inside.path().join("kept").exists());
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 1);
        symlink(outside.path(), inside.path().join("link")).unwrap();
        assert!(remove_all(&parent, b"link", until).is_err());
        assert!(outside.path().join("kept").exists());
    }

    /// Deeper than one process may hold folders open, and than a path is long.
    #[test]
    fn depth_takes_no_more_than_what_is_there_at_the_top() {
        let inside = tempfile::tempdir().unwrap();
        let parent = root(inside.path());
        let owner = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
        parent.make_directory(b"folder", owner).unwrap();
        let mut at = parent.entry(b"folder").unwrap();
        let name = [b'n'; 200];
        for _ in 0..3_000 {
            at.make_directory(&name, owner).unwrap();
            at = at.entry(&name).unwrap();
        }
        drop(at);
        assert!(remove_all(&parent, b"folder", Instant::now() + Duration::from_secs(600)).unwrap());
        assert_eq!(std::fs::read_dir(inside.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_there_is_no_time_for_stays_and_is_removed_when_it_is_asked_again() {
        let inside = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(inside.path().join("folder/a")).unwrap();
        let parent = root(inside.path());
        assert!(!remove_all(&parent, b"folder", Instant::now()).unwrap());
        assert!(inside.path().join("folder/a").exists());
        assert!(remove_all(&parent, b"folder", Instant::now() + Duration::from_secs(600)).unwrap());
        assert!(!inside.path().join("folder").exists());
    }
}
