//! Looking into backups.

use std::{os::unix::ffi::OsStrExt as _, sync::Arc};

use cocalc_backup::protocol::{FailureKind, Job};
use cocalc_core::{
    backups::{Backup, Entries, Entry, Phase},
    ids::{Timestamp, TreePath},
    storage::NodeKind,
};
use rustic_core::repofile::{Node, NodeType};

use crate::{
    backend::Backend,
    failure::Failed,
    repository::{self, node, one, subtree},
};

/// The most entries of one answer, whatever was asked for.
const ENTRIES_MAX: usize = 100_000;

pub(crate) fn list(job: &Job, backend: &Arc<Backend>) -> Result<Vec<Backup>, Failed> {
    if !backend.is_repository()? {
        return Ok(Vec::new());
    }
    let opened = repository::open(job, backend, Phase::Opening)?;
    Ok(repository::backups(job, backend, &opened)?.into_iter().map(|(backup, _)| backup).collect())
}

pub(crate) fn ls(
    job: &Job,
    backend: &Arc<Backend>,
    backup: &str,
    directory: &TreePath,
    after: Option<&TreePath>,
    max: usize,
) -> Result<Entries, Failed> {
    let opened = repository::open(job, backend, Phase::Opening)?.to_indexed_ids()?;
    let snapshot = one(job, backend, &opened, backup)?;
    let found = node(&opened, &snapshot, directory)?;
    let tree = subtree(&opened, &found)?
        .ok_or_else(|| Failed::new(FailureKind::NotFound, format!("{directory} is not a directory")))?;
    let mut entries = Entries::default();
    let mut nodes: Vec<_> = tree.nodes.iter().collect();
    nodes.sort_by(|a, b| a.name().as_bytes().cmp(b.name().as_bytes()));
    for node in nodes {
        let entry = entry(directory, node)?;
        if after.is_some_and(|after| entry.path <= *after) {
            continue;
        }
        if entries.entries.len() == max.min(ENTRIES_MAX) {
            entries.truncated = true;
            break;
        }
        entries.entries.push(entry);
    }
    Ok(entries)
}

pub(crate) fn find(
    job: &Job,
    backend: &Arc<Backend>,
    backup: &str,
    text: &str,
    max: usize,
) -> Result<Entries, Failed> {
    if text.is_empty() {
        return Err(Failed::new(FailureKind::Invalid, "nothing to look for"));
    }
    let text = text.to_ascii_lowercase().into_bytes();
    let opened = repository::open(job, backend, Phase::Opening)?.to_indexed_ids()?;
    let snapshot = one(job, backend, &opened, backup)?;
    let mut entries = Entries::default();
    let mut open = vec![(TreePath::root(), node(&opened, &snapshot, &TreePath::root())?)];
    while let Some((directory, found)) = open.pop() {
        let Some(tree) = subtree(&opened, &found)? else { continue };
        let mut below = Vec::new();
        for node in &tree.nodes {
            let entry = entry(&directory, node)?;
            if node.is_dir() {
                below.push((entry.path.clone(), node.clone()));
            }
            let name = node.name().as_bytes().to_ascii_lowercase();
            if name.windows(text.len()).any(|part| part == text) {
                if entries.entries.len() == max.min(ENTRIES_MAX) {
                    entries.truncated = true;
                    return Ok(entries);
                }
                entries.entries.push(entry);
            }
        }
        open.extend(below.into_iter().rev());
    }
    Ok(entries)
}

fn entry(directory: &TreePath, node: &Node) -> Result<Entry, Failed> {
    let path = directory
        .join(node.name().as_bytes())
        .map_err(|error| Failed::new(FailureKind::Damaged, format!("a name in {directory}: {error}")))?;
    let kind = match node.node_type {
        NodeType::File => NodeKind::File,
        NodeType::Dir => NodeKind::Directory,
        NodeType::Symlink { .. } => NodeKind::Symlink,
        _ => NodeKind::Special,
    };
    Ok(Entry {
        path,
        kind,
        bytes: if kind == NodeKind::File { node.meta.size } else { 0 },
        modified: node.meta.mtime.map(|time| Timestamp::from_millis(time.as_millisecond())),
    })
}
