//! Opening a repository, and finding what is in it.

use std::{os::unix::ffi::OsStrExt as _, sync::Arc};

use cocalc_backup::protocol::{FailureKind, Job};
use cocalc_core::{
    backups::{Backup, BackupKind, Phase},
    ids::{ProjectId, Timestamp, TreePath},
};
use rustic_core::{
    ConfigOptions, Credentials, FileType, Id, IndexedTree, KeyOptions, Open, OpenStatus, ReadBackend as _,
    Repository, RepositoryBackends, RepositoryOptions, WriteBackend,
    repofile::{MasterKey, Node, SnapshotFile, Tree},
};

use crate::{
    backend::{Backend, no_repository},
    failure::Failed,
    said::Bars,
};

/// The path under which every snapshot of a project is stored, wherever it was
/// mounted: so that the next one finds its files again.
pub(crate) const ROOT: &str = "/project";
/// The one name in it.
const ROOT_NAME: &[u8] = b"project";

pub(crate) type Opened = Repository<OpenStatus>;

/// Opens the repository, which must be there.
pub(crate) fn open(job: &Job, backend: &Arc<Backend>, phase: Phase) -> Result<Opened, Failed> {
    if !backend.is_repository()? {
        return Err(no_repository());
    }
    let opened = at(backend, phase)?.open(&Credentials::Masterkey(data_key(job)?));
    opened.map_err(|error| match backend.fault() {
        Some(_) => error.into(),
        // The configuration is the first thing that is decrypted.
        None => Failed::new(FailureKind::WrongKey, error.display_log()),
    })
}

/// Opens the repository, and makes it if need be.
pub(crate) fn open_or_create(job: &Job, backend: &Arc<Backend>, phase: Phase) -> Result<Opened, Failed> {
    if !backend.is_repository()? {
        let key = Credentials::Masterkey(data_key(job)?);
        let made = at(backend, phase)?.init(&key, &KeyOptions::default(), &ConfigOptions::default());
        match made {
            Ok(_) => {}
            // Somebody else was first; one configuration is as good as another.
            Err(_) if backend.is_repository()? => backend.forgive(),
            Err(error) => return Err(error.into()),
        }
    }
    let opened = open(job, backend, phase)?;
    // What was cut off between the two steps is made good here.
    if backend.list_with_size(FileType::Key)?.is_empty() {
        opened.add_key(job.repository.key.password.expose(), &KeyOptions::default())?;
    }
    Ok(opened)
}

pub(crate) fn at(backend: &Arc<Backend>, phase: Phase) -> Result<Repository<()>, Failed> {
    let backends = RepositoryBackends::new(Arc::clone(backend) as Arc<dyn WriteBackend>, None);
    // A cache would hold what the project's files are called, outside the
    // repository.
    let options = RepositoryOptions::default().no_cache(true);
    Ok(Repository::new_with_progress(&options, &backends, Bars(phase))?)
}

fn data_key(job: &Job) -> Result<MasterKey, Failed> {
    serde_json::from_str(job.repository.key.data.expose())
        .map_err(|_| Failed::new(FailureKind::WrongKey, "it is not a key"))
}

/// The tags of a backup.
pub(crate) fn tags(project: ProjectId) -> String {
    format!("project={project}")
}

/// The backup that a snapshot of the repository is; `None` if it is none of
/// this project's.
pub(crate) fn backup(project: ProjectId, snapshot: &SnapshotFile) -> Option<Backup> {
    if !snapshot.tags.contains(&tags(project)) {
        return None;
    }
    let tag = |name: &str| snapshot.tags.iter().find_map(|tag| tag.strip_prefix(name)?.strip_prefix('='));
    let kind = match tag("kind")? {
        "scheduled" => BackupKind::Scheduled,
        "manual" => BackupKind::Manual,
        "stop" => BackupKind::Stop,
        _ => return None,
    };
    let summary = snapshot.summary.clone().unwrap_or_default();
    Some(Backup {
        id: snapshot.id.to_hex().as_str().to_owned(),
        project,
        host: tag("host")?.parse().ok()?,
        epoch: tag("epoch")?.parse().ok()?,
        kind,
        taken: Timestamp::from_millis(snapshot.time.timestamp().as_millisecond()),
        bytes: summary.total_bytes_processed,
        added_bytes: summary.data_added_packed,
        files: summary.total_files_processed,
        files_read: summary.files_new + summary.files_changed,
    })
}

/// The snapshots that are backups of the project, with what they are. Of a
/// repository that others share, only the project's own are read.
pub(crate) fn backups<S: Open>(
    job: &Job,
    backend: &Backend,
    repository: &Repository<S>,
) -> Result<Vec<(Backup, SnapshotFile)>, Failed> {
    let snapshots = if job.repository.shared {
        let mut there = Vec::new();
        for id in backend.marks(job.project)? {
            // Forgotten, or not complete yet.
            if backend.has(FileType::Snapshot, &id)? {
                there.push(id.to_hex().as_str().to_owned());
            }
        }
        repository.get_snapshots(&there)?
    } else {
        let wanted = tags(job.project);
        repository.get_matching_snapshots(|snapshot| snapshot.tags.contains(&wanted))?
    };
    let mut found: Vec<_> = snapshots
        .into_iter()
        .filter_map(|snapshot| Some((backup(job.project, &snapshot)?, snapshot)))
        .collect();
    found.sort_by(|(a, _), (b, _)| (a.taken, &a.id).cmp(&(b.taken, &b.id)));
    Ok(found)
}

/// One backup of the project by its id; `None` if it has no such.
pub(crate) fn find<S: Open>(
    job: &Job,
    backend: &Backend,
    repository: &Repository<S>,
    id: &str,
) -> Result<Option<SnapshotFile>, Failed> {
    let Ok(parsed) = id.parse::<Id>() else { return Ok(None) };
    if !backend.has(FileType::Snapshot, &parsed)? {
        return Ok(None);
    }
    let found = repository.get_snapshots(&[parsed.to_hex().as_str()])?;
    Ok(found.into_iter().find(|snapshot| backup(job.project, snapshot).is_some_and(|is| is.id == id)))
}

/// One backup of the project by its id.
pub(crate) fn one<S: Open>(
    job: &Job,
    backend: &Backend,
    repository: &Repository<S>,
    id: &str,
) -> Result<SnapshotFile, Failed> {
    find(job, backend, repository, id)?
        .ok_or_else(|| Failed::new(FailureKind::NotFound, format!("backup {id}")))
}

/// What is at `path` in a snapshot. rustic's own way to it takes only names
/// that are UTF-8.
pub(crate) fn node<S: IndexedTree>(
    repository: &Repository<S>,
    snapshot: &SnapshotFile,
    path: &TreePath,
) -> Result<Node, Failed> {
    let mut tree = repository.get_tree(&snapshot.tree)?;
    let mut found: Option<Node> = None;
    for name in std::iter::once(ROOT_NAME).chain(path.names()) {
        if let Some(node) = &found {
            tree = subtree(repository, node)?
                .ok_or_else(|| Failed::new(FailureKind::NotFound, path.to_string()))?;
        }
        let next = tree.nodes.iter().find(|node| node.name().as_bytes() == name);
        found = Some(next.ok_or_else(|| Failed::new(FailureKind::NotFound, path.to_string()))?.clone());
    }
    found.ok_or_else(|| Failed::new(FailureKind::NotFound, path.to_string()))
}

/// What is in a directory; `None` if it is none.
pub(crate) fn subtree<S: IndexedTree>(
    repository: &Repository<S>,
    node: &Node,
) -> Result<Option<Tree>, Failed> {
    if !node.is_dir() {
        return Ok(None);
    }
    match &node.subtree {
        Some(id) => Ok(Some(repository.get_tree(id)?)),
        None => Err(Failed::new(FailureKind::Damaged, format!("directory {} has no content", node.name))),
    }
}
