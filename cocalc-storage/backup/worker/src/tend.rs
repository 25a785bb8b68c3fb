//! Looking after a repository: forget, prune, erase.

use std::{collections::HashMap, sync::Arc, time::Duration};

use cocalc_backup::protocol::{FailureKind, Job};
use cocalc_core::backups::{Erased, Phase, PruneOptions, Pruned};
use rustic_core::{FileType, ReadBackend as _, WriteBackend as _, repofile::IndexFile};

use crate::{
    backend::{Backend, CONFIG, DAMAGED, DIRECTORIES},
    fail,
    failure::Failed,
    repository,
};

pub(crate) fn forget(job: &Job, backend: &Arc<Backend>, backups: &[String]) -> Result<(), Failed> {
    if !backend.is_repository()? {
        return Ok(());
    }
    let opened = repository::open(job, backend, Phase::Tending)?;
    for id in backups {
        let Some(snapshot) = repository::find(job, backend, &opened, id)? else { continue };
        opened.delete_snapshots(&[snapshot.id])?;
        if job.repository.shared {
            backend.unmark(job.project, &snapshot.id)?;
        }
    }
    Ok(())
}

pub(crate) fn prune(job: &Job, backend: &Arc<Backend>, options: &PruneOptions) -> Result<Pruned, Failed> {
    if !backend.is_repository()? {
        return Ok(Pruned::default());
    }
    let grace = i64::try_from(options.grace.as_secs())
        .ok()
        .and_then(|seconds| jiff::Span::new().try_seconds(seconds).ok())
        .ok_or_else(|| Failed::new(FailureKind::Invalid, "the grace is too long"))?;
    backend.agree_on_time()?;
    let opened = repository::open(job, backend, Phase::Tending)?;
    let before: HashMap<_, _> = backend.list_with_size(FileType::Pack)?.into_iter().collect();
    // Two phases: what is not needed is marked now, and deleted by a prune
    // that comes later than the grace.
    let rustic = rustic_core::PruneOptions::default().keep_delete(grace).instant_delete(false);
    let plan = opened.prune_plan(&rustic)?;
    fail::point("prune.planned");
    // New packs and a new index are in place before old ones are deleted.
    opened.prune(&rustic, plan)?;
    fail::point("prune.done");
    // No write takes a day.
    backend.store().tidy(Duration::from_hours(24))?;

    let after: HashMap<_, _> = backend.list_with_size(FileType::Pack)?.into_iter().collect();
    let freed = before.iter().filter(|(id, _)| !after.contains_key(id)).map(|(_, size)| u64::from(*size));
    let mut marked = 0;
    for index in opened.stream_files::<IndexFile>()? {
        let (_, index) = index?;
        let sizes = index.packs_to_delete.iter().filter_map(|pack| after.get(&*pack.id));
        marked += sizes.map(|size| u64::from(*size)).sum::<u64>();
    }
    let all: u64 = after.values().map(|size| u64::from(*size)).sum();
    Ok(Pruned { freed_bytes: freed.sum(), marked_bytes: marked, kept_bytes: all.saturating_sub(marked) })
}

/// Deletes all that a project has in a repository. Of a shared one, that is its
/// snapshots; their data are marked by a prune, as any that nobody needs.
pub(crate) fn erase(
    job: &Job,
    backend: &Arc<Backend>,
    mirror: Option<&Arc<Backend>>,
) -> Result<Erased, Failed> {
    if job.repository.shared {
        return erase_shared(job, backend);
    }
    let mut erased = Erased::default();
    for backend in mirror.into_iter().chain([backend]) {
        erase_repository(backend, &mut erased)?;
    }
    Ok(erased)
}

fn erase_shared(job: &Job, backend: &Arc<Backend>) -> Result<Erased, Failed> {
    if !backend.is_repository()? {
        return Ok(Erased::default());
    }
    let mut erased = Erased::default();
    let marks = backend.marks(job.project)?;
    let sizes: HashMap<_, _> = backend.list_with_size(FileType::Snapshot)?.into_iter().collect();
    for id in &marks {
        if let Some(size) = sizes.get(id) {
            backend.remove(FileType::Snapshot, id, false)?;
            erased.objects += 1;
            erased.freed_bytes += u64::from(*size);
        }
        backend.unmark(job.project, id)?;
    }
    if !marks.is_empty() {
        let before = backend.list_with_size(FileType::Pack)?.len();
        let pruned = prune(job, backend, &PruneOptions::default())?;
        let after = backend.list_with_size(FileType::Pack)?.len();
        erased.objects += before.saturating_sub(after) as u64;
        erased.freed_bytes += pruned.freed_bytes;
        erased.marked_bytes = pruned.marked_bytes;
    }
    Ok(erased)
}

fn erase_repository(backend: &Backend, erased: &mut Erased) -> Result<(), Failed> {
    let store = backend.store();
    let mut delete = |name: &str, size: u64| {
        store.remove(name)?;
        fail::point("erase.removed");
        erased.objects += 1;
        erased.freed_bytes += size;
        Ok::<_, Failed>(())
    };
    for directory in DIRECTORIES {
        for (name, size) in store.list(directory)? {
            let path = match directory {
                "data" => format!("data/{}/{name}", name.get(..2).unwrap_or_default()),
                _ => format!("{directory}/{name}"),
            };
            delete(&path, size)?;
        }
    }
    for (name, size) in store.list(DAMAGED)? {
        delete(&format!("{DAMAGED}/{name}"), size)?;
    }
    // The configuration says that there is a repository: it goes last.
    if let Some(size) = store.size(CONFIG)? {
        delete(CONFIG, size)?;
    }
    store.erase()
}
