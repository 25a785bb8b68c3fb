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

/// A worker that runs the true one after `before`, a line of shell.
pub(crate) fn worker_after(root: &Path, name: &str, before: &str) -> PathBuf {
    let script = root.join(name);
    let text = format!("#!/bin/sh\n{before} exec {}\n", env!("CARGO_BIN_EXE_cocalc-backup-worker"));
    cocalc_testkit::executable::write(&script, text);
    script
}

/// Backups by another worker.
pub(crate) fn by(worker: &Path, repositories: Arc<dyn Repositories>, bounds: Bounds) -> Rustic {
    Rustic::builder(repositories).worker(worker).bounds(bounds).build().unwrap()
}

/// A few small files, which change with `seed`.
pub(crate) fn small(tree: &Path, seed: u64) {
    fs::create_dir_all(tree.join("home/deep")).unwrap();
    fs::write(tree.join("home/notes"), format!("notes {seed}")).unwrap();
    fs::write(tree.join("home/deep/same"), "the same").unwrap();
    fs::write(tree.join("home/noise"), noise(seed, 100_000)).unwrap();
}

/// Bytes that do not compress.
pub(crate) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let words = (0..length.div_ceil(8)).flat_map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.take(length).collect()
}

/// All files below a directory.
pub(crate) fn files(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(root).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found
}

/// Whether the long tests are wanted.
pub(crate) fn full() -> bool {
    std::env::var_os("COCALC_FULL").is_some()
}
