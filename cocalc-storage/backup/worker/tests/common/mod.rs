//! What the tests of the worker share: backends, and stores of clouds.

#![allow(dead_code, reason = "each test program uses a part")]

pub(crate) mod emulators;
pub(crate) mod proxy;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use cocalc_backup::{
    Access, Bounds, Location, OnePerProject, Repositories, RepositoryName, Rustic, WrappingKey, WrappingKeys,
};

/// Backups in repositories that `place` names, with new keys in `keys`.
pub(crate) fn rustic(
    keys: &Path,
    bounds: Bounds,
    place: impl Fn(RepositoryName, Access) -> Location + Send + Sync + 'static,
) -> Rustic {
    let wrapping = WrappingKeys::new(WrappingKey::generate("test").unwrap());
    over(Arc::new(OnePerProject::new(keys, wrapping, place)), bounds)
}

/// Backups in the repositories of `repositories`.
pub(crate) fn over(repositories: Arc<dyn Repositories>, bounds: Bounds) -> Rustic {
    Rustic::builder(repositories)
        .worker(env!("CARGO_BIN_EXE_cocalc-backup-worker"))
        .bounds(bounds)
        .build()
        .unwrap()
}

/// Repositories as directories of `root/repositories`, keys in `root/keys`.
pub(crate) fn on_disk(root: &Path) -> Arc<OnePerProject> {
    for name in ["keys", "repositories", "scratch"] {
        fs::create_dir_all(root.join(name)).unwrap();
    }
    let wrapping = WrappingKeys::new(WrappingKey::generate("test").unwrap());
    Arc::new(OnePerProject::in_directory(root.join("keys"), wrapping, root.join("repositories")))
}

/// A small file system in memory, unmounted when this is dropped.
pub(crate) struct Memory(pub(crate) PathBuf);

impl Memory {
    pub(crate) fn mount(at: &Path, megabytes: u32) -> Self {
        fs::create_dir_all(at).unwrap();
        let size = format!("size={megabytes}m");
        run("mount", &["-t", "tmpfs", "-o", &size, "backups", at.to_str().unwrap()]);
        Self(at.to_owned())
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// Runs a program that must succeed.
pub(crate) fn run(program: &str, arguments: &[&str]) {
    let done = Command::new(program).args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{program} {arguments:?}: {said} (this needs root)");
}
