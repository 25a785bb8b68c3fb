//! Restoring: written, read back, compared, and durable.

use std::{
    collections::{HashMap, HashSet},
    ffi::OsStr,
    fs::{self, File},
    os::unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use cocalc_backup::protocol::{Failure, FailureKind, Job};
use cocalc_core::{
    backups::{Phase, Restored},
    ids::TreePath,
};
use rustic_core::{
    IndexedFullStatus, LocalDestination, LsOptions, Repository, RestoreOptions, RusticResult,
    repofile::{Node, NodeType},
};

use crate::{
    backend::Backend,
    contents, fail,
    failure::{Failed, local},
    repository,
    root::Root,
    said,
};

/// How many differences are told.
pub(crate) const DIFFERENCES_MAX: usize = 20;

/// Everything that is restored, by its path below the target.
pub(crate) type Nodes = Vec<(PathBuf, Node)>;

pub(crate) fn restore(
    job: &Job,
    backend: &Arc<Backend>,
    backup: &str,
    path: &TreePath,
    target: &Path,
) -> Result<Restored, Failed> {
    let place = empty(target)?;
    // The index of a large repository takes a while.
    said::phase(Phase::Opening);
    let opened = repository::open(job, backend, Phase::Restoring)?.to_indexed()?;
    let snapshot = repository::one(job, backend, &opened, backup)?;
    let top = repository::node(&opened, &snapshot, path)?;
    let nodes = nodes(&opened, path, &top)?;
    let stream = || nodes.iter().cloned().map(RusticResult::Ok);

    let destination = LocalDestination::new(place, false, false)?;
    let options = RestoreOptions::default().numeric_id(true);
    // The directories.
    opened.prepare_restore(&options, stream(), &destination, false)?;
    fail::point("restore.planned");
    contents::write(&opened, backend, target, &nodes)?;
    fail::point("restore.contents");
    // All but the contents, which are found to be there, by size and time.
    let plan = opened.prepare_restore(&options, stream(), &destination, false)?;
    opened.restore(plan, &options, stream(), &destination)?;
    if path.is_root() {
        let root = Root::from_description(snapshot.description.as_deref())?;
        root.set(target).map_err(|error| {
            Failed::new(
                local(&error.to_string()).unwrap_or(FailureKind::Other),
                format!("cannot set the attributes of {}: {error}", target.display()),
            )
        })?;
    }
    let written = said::warnings();
    let unset: Vec<_> = written.into_iter().filter(|warning| warning.starts_with("restore ")).collect();
    if !unset.is_empty() {
        // Attributes need room, too.
        let full = unset.iter().find_map(|warning| local(warning));
        return Err(Failed(Failure { kind: full.unwrap_or(FailureKind::Incomplete), words: unset }));
    }

    fail::point("restore.written");
    said::phase(Phase::Verifying);
    let mut differences = differences(target, &nodes);
    differences.extend(contents::verify(&opened, target, &nodes)?);
    if !differences.is_empty() {
        return Err(Failed(Failure { kind: FailureKind::Incomplete, words: differences }));
    }
    fail::point("restore.compared");
    let synced = File::open(target).and_then(|directory| Ok(rustix::fs::syncfs(directory)?));
    synced.map_err(|error| {
        Failed::new(FailureKind::Other, format!("cannot make {} durable: {error}", target.display()))
    })?;
    fail::point("restore.synced");
    let bytes = nodes.iter().filter(|(_, node)| node.is_file()).map(|(_, node)| node.meta.size).sum();
    Ok(Restored { entries: nodes.len() as u64, bytes })
}

/// The target as rustic takes it, if it is an empty directory.
fn empty(target: &Path) -> Result<&str, Failed> {
    let invalid = |words: String| Failed::new(FailureKind::Invalid, words);
    let place = target
        .to_str()
        .filter(|_| target.is_absolute())
        .ok_or_else(|| invalid(format!("{} is not an absolute path in UTF-8", target.display())))?;
    let metadata = fs::symlink_metadata(target);
    if !metadata.is_ok_and(|metadata| metadata.is_dir()) {
        return Err(invalid(format!("{place} is not a directory")));
    }
    match fs::read_dir(target).map(|mut entries| entries.next().is_none()) {
        Ok(true) => Ok(place),
        Ok(false) => Err(invalid(format!("{place} is not empty"))),
        Err(error) => Err(invalid(format!("cannot read {place}: {error}"))),
    }
}

/// What is at and below `path`, in the order of the tree.
///
/// The names come from a repository, which somebody who held its key may have
/// written: a name that leads elsewhere, or one that is there twice, once as a
/// link to follow, is damage.
fn nodes(opened: &Repository<IndexedFullStatus>, path: &TreePath, top: &Node) -> Result<Nodes, Failed> {
    let mut nodes = Nodes::new();
    let mut seen = HashSet::new();
    let base = match path.split_last() {
        None => PathBuf::new(),
        Some((_, name)) => {
            let name = PathBuf::from(OsStr::from_bytes(name));
            seen.insert(name.clone());
            nodes.push((name.clone(), top.clone()));
            name
        }
    };
    if top.is_dir() {
        for item in opened.ls(top, &LsOptions::default())? {
            let (below, node) = item?;
            let good = below.file_name() == Some(&*node.name())
                && below.components().all(|part| matches!(part, Component::Normal(_)))
                && below
                    .parent()
                    .is_some_and(|parent| parent.as_os_str().is_empty() || seen.contains(&base.join(parent)));
            let full = base.join(&below);
            if !good || !seen.insert(full.clone()) {
                return Err(Failed::new(
                    FailureKind::Damaged,
                    format!("the backup has a name that cannot be: {}", below.display()),
                ));
            }
            // A socket is of use only to the process that made it.
            if node.node_type != NodeType::Socket {
                nodes.push((full, node));
            }
        }
    }
    Ok(nodes)
}

/// Where what is on the disk is not what was backed up, apart from contents.
fn differences(target: &Path, nodes: &Nodes) -> Vec<String> {
    let mut differences = Vec::new();
    let mut linked = HashMap::new();
    for (path, node) in nodes {
        if differences.len() >= DIFFERENCES_MAX {
            break;
        }
        let there = match fs::symlink_metadata(target.join(path)) {
            Ok(there) => there,
            Err(error) => {
                differences.push(format!("{}: {error}", path.display()));
                continue;
            }
        };
        let meta = &node.meta;
        let same_kind = match &node.node_type {
            NodeType::File => there.is_file() && there.len() == meta.size,
            NodeType::Dir => there.is_dir(),
            NodeType::Symlink { .. } => {
                fs::read_link(target.join(path)).is_ok_and(|link| link == node.node_type.to_link())
            }
            NodeType::Dev { device } | NodeType::Chardev { device } => there.rdev() == *device,
            _ => true,
        };
        let same_file = node.is_file().then(|| contents::link(node)).flatten().is_none_or(|link| {
            *linked.entry(link).or_insert((there.dev(), there.ino())) == (there.dev(), there.ino())
        });
        let is_link = there.file_type().is_symlink();
        let same = same_kind
            && same_file
            && meta.uid.is_none_or(|uid| uid == there.uid())
            && meta.gid.is_none_or(|gid| gid == there.gid())
            && (is_link || meta.mode.is_none_or(|mode| unix_mode(mode) == there.mode() & 0o7777))
            && meta.mtime.is_none_or(|time| {
                seconds(time) == (i128::from(there.mtime()), i128::from(there.mtime_nsec()))
            });
        if !same {
            differences.push(format!("{} is not as it was backed up", path.display()));
        }
    }
    differences
}

/// Seconds and nanoseconds of a time, as the kernel counts them.
pub(crate) fn seconds(time: jiff::Timestamp) -> (i128, i128) {
    (time.as_nanosecond().div_euclid(1_000_000_000), time.as_nanosecond().rem_euclid(1_000_000_000))
}

/// The bits of a mode as restic stores it: those of Go.
pub(crate) fn unix_mode(go: u32) -> u32 {
    let bit = |from: u32, to: u32| if go & (1 << from) == 0 { 0 } else { to };
    (go & 0o777) | bit(23, 0o4000) | bit(22, 0o2000) | bit(20, 0o1000)
}
