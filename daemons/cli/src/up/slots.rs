//! Which ranges of user ids and addresses the hosts of this machine have.
//!
//! Several federations may run side by side. Each host claims a number by a
//! file in a directory that a reboot empties, as it ends containers too.

use std::{
    fs::OpenOptions,
    io::{ErrorKind, Write},
    path::{Path, PathBuf},
};

use crate::failure::{Exit, Failure, While};

/// As many as the podman runner has ranges for.
const SLOTS: u16 = 56;

fn registry() -> PathBuf {
    Path::new("/run/cocalc").join("slots")
}

/// Claims a number for a host of the federation in `dir`.
pub(super) fn claim(dir: &Path) -> Result<u16, Failure> {
    let registry = registry();
    std::fs::create_dir_all(&registry).during(format!("cannot make {}", registry.display()))?;
    for slot in 0..SLOTS {
        let path = registry.join(slot.to_string());
        // The claim of a federation whose directory is gone is nobody's.
        if let Ok(owner) = std::fs::read_to_string(&path)
            && !owner.is_empty()
            && !Path::new(&owner).exists()
        {
            let _ = std::fs::remove_file(&path);
        }
        match OpenOptions::new().write(true).create_new(true).open(&path) {
            Ok(mut file) => {
                file.write_all(dir.as_os_str().as_encoded_bytes())?;
                return Ok(slot);
            }
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error).during(format!("cannot write {}", path.display())),
        }
    }
    Err(Failure::new(
        Exit::Conflict,
        format!("{SLOTS} hosts run on this machine already; see {}", registry.display()),
    ))
}

/// Gives back what the federation in `dir` has claimed.
pub(super) fn release(dir: &Path) {
    for entry in std::fs::read_dir(registry()).into_iter().flatten().flatten() {
        let owner = std::fs::read_to_string(entry.path()).unwrap_or_default();
        if Path::new(&owner) == dir {
            // It may be gone already.
            let _ = std::fs::remove_file(entry.path());
        }
    }
}
