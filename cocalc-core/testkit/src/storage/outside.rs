//! What lies beside the stores, and stays as it is.

use std::{collections::BTreeMap, fs, os::unix::fs::symlink, path::PathBuf};

use cocalc_core::ids::VolumeUuid;

use super::{Harness, zoo::manifest};

/// The directories outside, each with a tree planted in it.
pub(super) struct Outside {
    directories: Vec<PathBuf>,
    planted: Vec<PathBuf>,
    before: Vec<BTreeMap<Vec<u8>, String>>,
}

impl Outside {
    pub(super) fn plant(harness: &dyn Harness) -> Self {
        let directories = harness.outside();
        let mut planted = Vec::new();
        for directory in &directories {
            let tree = directory.join(format!("canary-{}", VolumeUuid::random()));
            fs::create_dir_all(tree.join("home/d")).unwrap();
            fs::write(tree.join("home/secret"), "secret").unwrap();
            fs::write(tree.join("home/d/f"), "also").unwrap();
            symlink("secret", tree.join("home/link")).unwrap();
            planted.push(tree);
        }
        let before = directories.iter().map(|directory| manifest(directory)).collect();
        Self { directories, planted, before }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.directories.is_empty()
    }

    /// What is no longer as it was; it counts from now on.
    pub(super) fn touched(&mut self) -> Vec<String> {
        let mut touched = Vec::new();
        for (directory, before) in self.directories.iter().zip(&mut self.before) {
            let now = manifest(directory);
            for path in before.keys().chain(now.keys().filter(|path| !before.contains_key(*path))) {
                if before.get(path) != now.get(path) {
                    touched.push(directory.join(&*String::from_utf8_lossy(path)).display().to_string());
                }
            }
            *before = now;
        }
        touched
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        for tree in &self.planted {
            // It is in the harness's own directory, which goes, too.
            let _ = fs::remove_dir_all(tree);
        }
    }
}
