//! What is different in a directory from a backup.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    fs::{self, Metadata},
    io,
    os::unix::{
        ffi::{OsStrExt as _, OsStringExt as _},
        fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use cocalc_backup::protocol::{FailureKind, Job};
use cocalc_core::{
    backups::Phase,
    ids::TreePath,
    storage::{Change, ChangeKind, Changes, NodeKind},
};
use ignore::overrides::Override;
use rustic_core::{
    IndexedIdsStatus, Repository,
    repofile::{Node, NodeType, Tree},
};

use crate::{
    backend::Backend,
    excludes,
    failure::{self, Failed},
    repository::{self, node, one, subtree},
    restore::{seconds, unix_mode},
    root::{self, Root},
};

/// The most changes of one answer, whatever was asked for.
const CHANGES_MAX: usize = 100_000;

/// What is asked.
pub(crate) struct Question<'a> {
    pub(crate) backup: &'a str,
    pub(crate) now: &'a Path,
    pub(crate) directory: &'a TreePath,
    pub(crate) after: Option<&'a TreePath>,
    pub(crate) max: usize,
}

pub(crate) fn diff(job: &Job, backend: &Arc<Backend>, asked: &Question<'_>) -> Result<Changes, Failed> {
    let invalid = |words: String| Failed::new(FailureKind::Invalid, words);
    if !asked.now.is_absolute() || !fs::symlink_metadata(asked.now).is_ok_and(|now| now.is_dir()) {
        return Err(invalid(format!("{} is not a directory", asked.now.display())));
    }
    let begin = match asked.after {
        Some(after) if !after.is_within(asked.directory) => {
            return Err(invalid(format!("{after} is not in {}", asked.directory)));
        }
        after => after.map(|after| after.names().skip(asked.directory.names().count()).collect::<Vec<_>>()),
    };
    let opened = repository::open(job, backend, Phase::Opening)?.to_indexed_ids()?;
    let snapshot = one(job, backend, &opened, asked.backup)?;
    let excludes = Root::from_description(snapshot.description.as_deref())?.excludes;
    let tree = match node(&opened, &snapshot, asked.directory) {
        Ok(found) => subtree(&opened, &found)?,
        Err(failed) if failed.0.kind == FailureKind::NotFound => None,
        Err(failed) => return Err(failed),
    };
    let mut trees = Trees {
        opened: &opened,
        now: asked.now,
        excluded: excludes::matcher(asked.now, &excludes)?,
        max: asked.max.min(CHANGES_MAX),
        changes: Vec::new(),
    };
    let there = trees.names(asked.directory)?;
    if tree.is_none() && there.is_none() {
        return Err(Failed::new(FailureKind::NotFound, format!("{} is no directory", asked.directory)));
    }
    trees.walk(asked.directory, tree, there.unwrap_or_default(), begin.as_deref().unwrap_or_default())?;
    let more = trees.changes.len() > trees.max;
    trees.changes.truncate(trees.max);
    Ok(Changes { changes: trees.changes, more })
}

type Names = BTreeMap<Vec<u8>, Metadata>;

struct Trees<'a> {
    opened: &'a Repository<IndexedIdsStatus>,
    now: &'a Path,
    excluded: Override,
    max: usize,
    /// One more than asked for, if there are more.
    changes: Vec<Change>,
}

impl Trees<'_> {
    fn place(&self, path: &TreePath) -> PathBuf {
        if path.is_root() { self.now.into() } else { self.now.join(OsStr::from_bytes(path.as_bytes())) }
    }

    /// What is in a directory now and not left out of the backup; `None` if it is
    /// none, nor a way to it.
    fn names(&self, directory: &TreePath) -> Result<Option<Names>, Failed> {
        let mut place = self.now.to_owned();
        for name in directory.names() {
            place.push(OsStr::from_bytes(name));
            if !fs::symlink_metadata(&place).is_ok_and(|there| there.is_dir()) {
                return Ok(None);
            }
        }
        self.read(&place).map(Some).map_err(|error| unread(&place, &error))
    }

    fn read(&self, place: &Path) -> io::Result<Names> {
        let mut names = Names::new();
        for entry in fs::read_dir(place)? {
            let entry = entry?;
            let metadata = entry.metadata()?;
            if !self.excluded.matched(entry.path(), metadata.is_dir()).is_ignore() {
                names.insert(entry.file_name().into_vec(), metadata);
            }
        }
        Ok(names)
    }

    /// Compares what a directory of the backup has with what there is now. `begin`
    /// is the last path that was told, from here on; nothing up to it is told.
    fn walk(
        &mut self,
        directory: &TreePath,
        before: Option<Tree>,
        now: Names,
        begin: &[&[u8]],
    ) -> Result<(), Failed> {
        let before: BTreeMap<Vec<u8>, Node> = before
            .into_iter()
            .flat_map(|tree| tree.nodes)
            .map(|node| (node.name().as_bytes().to_vec(), node))
            .collect();
        let names: BTreeSet<_> = before.keys().chain(now.keys()).collect();
        for name in names {
            let (is_begin, below) = match begin.split_first() {
                Some((first, _)) if name.as_slice() < *first => continue,
                Some((first, below)) if name.as_slice() == *first => (true, below),
                _ => (false, &[][..]),
            };
            let path = directory.join(name).map_err(|error| {
                Failed::new(FailureKind::Damaged, format!("a name in {directory}: {error}"))
            })?;
            let (was, is) = (before.get(name), now.get(name));
            if !is_begin && let Some(change) = self.compare(&path, was, is)? {
                self.changes.push(change);
            }
            if let (Some(was), Some(is)) = (was, is)
                && was.is_dir()
                && is.is_dir()
            {
                let place = self.place(&path);
                let inner = self.read(&place).map_err(|error| unread(&place, &error))?;
                self.walk(&path, subtree(self.opened, was)?, inner, below)?;
            }
            if self.changes.len() > self.max {
                return Ok(());
            }
        }
        Ok(())
    }

    fn compare(
        &self,
        path: &TreePath,
        was: Option<&Node>,
        is: Option<&Metadata>,
    ) -> Result<Option<Change>, Failed> {
        let (kind, node, bytes) = match (was, is) {
            (None, None) => return Ok(None),
            (Some(was), None) => (ChangeKind::Removed, kind_of(was), was.meta.size),
            (None, Some(is)) => (ChangeKind::Added, kind_now(is), is.len()),
            (Some(was), Some(is)) => match self.changed(path, was, is)? {
                Some(kind) => (kind, kind_now(is), is.len()),
                None => return Ok(None),
            },
        };
        let bytes = if node == NodeKind::File { bytes } else { 0 };
        Ok(Some(Change { path: path.clone(), kind, node, bytes }))
    }

    fn changed(&self, path: &TreePath, was: &Node, is: &Metadata) -> Result<Option<ChangeKind>, Failed> {
        if kind_of(was) != kind_now(is) {
            return Ok(Some(ChangeKind::Modified));
        }
        let place = self.place(path);
        let meta = &was.meta;
        let same_time = meta
            .mtime
            .is_none_or(|time| seconds(time) == (i128::from(is.mtime()), i128::from(is.mtime_nsec())));
        let mut same =
            meta.uid.is_none_or(|uid| uid == is.uid()) && meta.gid.is_none_or(|gid| gid == is.gid());
        let is_link = is.file_type().is_symlink();
        same &= is_link || meta.mode.is_none_or(|mode| unix_mode(mode) == is.mode() & 0o7777);
        match &was.node_type {
            NodeType::File => {
                if meta.size != is.len() || !same_time {
                    return Ok(Some(ChangeKind::Modified));
                }
            }
            // Its time changes with what is in it, which is told itself.
            NodeType::Dir => {}
            NodeType::Symlink { .. } => {
                let target = fs::read_link(&place).map_err(|error| unread(&place, &error))?;
                if target != was.node_type.to_link() {
                    return Ok(Some(ChangeKind::Modified));
                }
                same &= same_time;
            }
            NodeType::Dev { device } | NodeType::Chardev { device } => {
                if *device != is.rdev() {
                    return Ok(Some(ChangeKind::Modified));
                }
                same &= same_time;
            }
            _ => same &= same_time,
        }
        if same {
            let mut before: Vec<_> = meta
                .extended_attributes
                .iter()
                .map(|attribute| {
                    (attribute.name.clone().into_bytes(), attribute.value.clone().unwrap_or_default())
                })
                .collect();
            let mut now = root::attributes(&place).map_err(|error| unread(&place, &error))?;
            before.sort();
            now.sort();
            same = before == now;
        }
        Ok((!same).then_some(ChangeKind::Metadata))
    }
}

fn kind_of(node: &Node) -> NodeKind {
    match node.node_type {
        NodeType::File => NodeKind::File,
        NodeType::Dir => NodeKind::Directory,
        NodeType::Symlink { .. } => NodeKind::Symlink,
        _ => NodeKind::Special,
    }
}

fn kind_now(metadata: &Metadata) -> NodeKind {
    match metadata.file_type() {
        kind if kind.is_file() => NodeKind::File,
        kind if kind.is_dir() => NodeKind::Directory,
        kind if kind.is_symlink() => NodeKind::Symlink,
        _ => NodeKind::Special,
    }
}

fn unread(place: &Path, error: &io::Error) -> Failed {
    let words = format!("cannot read {}: {error}", place.display());
    Failed::new(failure::local(&words).unwrap_or(FailureKind::Other), words)
}
