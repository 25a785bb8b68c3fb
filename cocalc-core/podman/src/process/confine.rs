//! What the kernel has for keeping plain processes apart: Landlock and
//! capabilities.
//!
//! With Landlock a project reads and runs what is in the system's directories,
//! writes its own home alone, and neither signals nor traces nor reaches by
//! abstract sockets what is not below its supervisor.

use std::{
    ffi::{OsStr, OsString},
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetError, Scope, path_beneath_rules,
};

/// The newest version of Landlock that is made use of; of an older kernel's,
/// what it has.
const NEWEST: ABI = ABI::V7;
/// The system's directories: programs, libraries and their settings.
const SYSTEM: [&str; 16] = [
    "/bin",
    "/etc",
    "/lib",
    "/lib32",
    "/lib64",
    "/libx32",
    "/nix",
    "/opt",
    "/proc",
    "/run",
    "/sbin",
    "/snap",
    "/sys",
    "/usr",
    "/var/cache",
    "/var/lib/dpkg",
];
/// What is written to, beside the home: terminals, the null device, shared
/// memory.
const DEVICES: &str = "/dev";
/// Where programs put what they need for a moment.
const TEMPORARY: &str = "/tmp";

/// What confines the processes of a project.
#[derive(Debug)]
pub(crate) struct Confinement {
    /// `None` where the kernel has no Landlock.
    pub(crate) ruleset: Option<OwnedFd>,
    /// Whether `/tmp` may be used.
    pub(crate) temporary: bool,
    /// What may be read; nothing is known of that without a ruleset.
    open: Vec<PathBuf>,
}

impl Confinement {
    /// For a project whose home is `home`. `private` are directories of the host
    /// and of other projects, wherever they are. `program` is what is started.
    pub(crate) fn new(home: &Path, private: &[PathBuf], program: &Path) -> io::Result<Self> {
        let temporary = !private.iter().any(|path| path.starts_with(TEMPORARY));
        let mut open = Vec::new();
        for directory in SYSTEM {
            around(Path::new(directory), private, &mut open);
        }
        let ruleset = ruleset(home, &open, program, temporary).map_err(io::Error::other)?;
        open.push(home.to_owned());
        Ok(Self { ruleset, temporary, open })
    }

    /// Of a search path, what may be read: programs in the home of the host's own
    /// user would hide those that can be run.
    pub(crate) fn search_path(&self, path: &OsStr) -> OsString {
        let readable = |directory: &PathBuf| {
            let resolved = directory.canonicalize().unwrap_or_default();
            self.ruleset.is_none() || self.open.iter().any(|open| resolved.starts_with(open))
        };
        // What was split can be joined.
        std::env::join_paths(std::env::split_paths(path).filter(readable)).unwrap_or_default()
    }
}

/// Whether this kernel has Landlock.
pub(crate) fn available() -> bool {
    let probe = Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(ABI::V1))
        .and_then(Ruleset::create);
    probe.is_ok()
}

/// Whether its Landlock keeps signals and abstract sockets apart, too.
pub(crate) fn scopes() -> bool {
    let probe = Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .scope(Scope::from_all(ABI::V6))
        .and_then(Ruleset::create);
    probe.is_ok()
}

fn ruleset(
    home: &Path,
    open: &[PathBuf],
    program: &Path,
    temporary: bool,
) -> Result<Option<OwnedFd>, RulesetError> {
    let all: BitFlags<AccessFs> = AccessFs::from_all(NEWEST);
    let read = AccessFs::from_read(NEWEST);
    let mut written = vec![home.to_owned(), PathBuf::from(DEVICES)];
    if temporary {
        written.push(TEMPORARY.into());
    }
    let made = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(all)?
        .scope(Scope::from_all(NEWEST))?
        .create()?
        .add_rules(path_beneath_rules(open, read))?
        .add_rules(path_beneath_rules([program], read))?
        .add_rules(path_beneath_rules(written, all))?;
    Ok(made.into())
}

/// Collects what covers a directory without any of `private`.
fn around(directory: &Path, private: &[PathBuf], open: &mut Vec<PathBuf>) {
    if private.iter().any(|path| directory.starts_with(path)) {
        return;
    }
    if !private.iter().any(|path| path.starts_with(directory)) {
        open.push(directory.to_owned());
        return;
    }
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        // Of links the other end counts, which has its own place.
        if !entry.file_type().is_ok_and(|kind| kind.is_symlink()) {
            around(&entry.path(), private, open);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn private_directories_are_left_out_wherever_they_are() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["a/x", "a/y/secret", "a/y/z", "b"] {
            std::fs::create_dir_all(dir.path().join(name)).unwrap();
        }
        let cover = |directory: &str, private: &[&str]| {
            let private: Vec<PathBuf> = private.iter().map(|name| dir.path().join(name)).collect();
            let mut open = Vec::new();
            around(&dir.path().join(directory), &private, &mut open);
            let mut names: Vec<String> = open
                .iter()
                .map(|path| path.strip_prefix(dir.path()).unwrap().display().to_string())
                .collect();
            names.sort();
            names
        };
        assert_eq!(cover("a", &[]), ["a"]);
        assert_eq!(cover("a", &["b"]), ["a"]);
        assert_eq!(cover("a", &["a/y/secret"]), ["a/x", "a/y/z"]);
        assert_eq!(cover("a", &["a"]), [""; 0]);
        assert_eq!(cover("a/y", &["a"]), [""; 0]);
    }
}
