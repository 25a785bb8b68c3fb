//! Looking after a repository: forget, prune, check, erase.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use cocalc_backup::protocol::{FailureKind, Job};
use cocalc_core::backups::{CheckOptions, Checked, Erased, Phase, PruneOptions, Pruned};
use rustic_core::{
    CheckOptions as RusticCheck, FileType, IndexedFullStatus, ReadBackend as _, RepairIndexOptions,
    Repository, TreeId,
    repofile::{IndexFile, SnapshotFile},
};

use crate::{
    backend::{Backend, CONFIG, DIRECTORIES},
    failure::Failed,
    repository,
};

/// How much damage is told.
const DAMAGE_MAX: usize = 100;
/// How much of an id rustic shows.
const ID_CHARS: usize = 8;

pub(crate) fn forget(job: &Job, backend: &Arc<Backend>, backups: &[String]) -> Result<(), Failed> {
    if !backend.is_repository()? {
        return Ok(());
    }
    let opened = repository::open(job, backend, Phase::Tending)?;
    let ids: Vec<_> = repository::backups(job, &opened)?
        .into_iter()
        .filter(|(backup, _)| backups.contains(&backup.id))
        .map(|(_, snapshot)| snapshot.id)
        .collect();
    opened.delete_snapshots(&ids)?;
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
    let opened = repository::open(job, backend, Phase::Tending)?;
    let before: HashMap<_, _> = backend.list_with_size(FileType::Pack)?.into_iter().collect();
    // Two phases: what is not needed is marked now, and deleted by a prune
    // that comes later than the grace.
    let rustic = rustic_core::PruneOptions::default().keep_delete(grace).instant_delete(false);
    let plan = opened.prune_plan(&rustic)?;
    opened.prune(&rustic, plan)?;
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

pub(crate) fn check(job: &Job, backend: &Arc<Backend>, options: &CheckOptions) -> Result<Checked, Failed> {
    if !backend.is_repository()? {
        return Ok(Checked::default());
    }
    let opened = repository::open(job, backend, Phase::Tending)?;
    if options.repair_index {
        opened.repair_index(&RepairIndexOptions::default(), false)?;
    }
    let backups = repository::backups(job, &opened)?;
    let trees: Vec<TreeId> = backups.iter().map(|(_, snapshot)| snapshot.tree).collect();
    let rustic = RusticCheck::default().trust_cache(true).read_data(options.read_data);
    let results = opened.check_with_trees(rustic, trees)?;
    // The levels are not exported, nor is a way to ask one for its name.
    let damage: Vec<String> = results
        .0
        .iter()
        .filter(|(level, _)| format!("{level:?}") == "Error")
        .map(|(_, error)| error.to_string())
        .take(DAMAGE_MAX)
        .collect();
    // A store that cannot be read is not a damaged repository.
    if let Some(fault) = backend.fault()
        && fault.kind != FailureKind::Damaged
    {
        return Err(Failed(fault));
    }
    backend.forgive();
    if damage.is_empty() {
        return Ok(Checked::default());
    }
    let packs = packs_in(&damage);
    let opened = opened.to_indexed()?;
    let affected = backups
        .iter()
        .filter(|(_, snapshot)| {
            let whole = is_whole(&opened, backend, snapshot, &packs);
            backend.forgive();
            !whole
        })
        .map(|(backup, _)| backup.id.clone())
        .collect();
    Ok(Checked { damage, affected })
}

/// The packs that are named in what was found: the only way in which rustic
/// tells them.
fn packs_in(damage: &[String]) -> BTreeSet<String> {
    damage
        .iter()
        .flat_map(|words| words.split(|c: char| !c.is_ascii_hexdigit()))
        .filter(|word| word.len() >= ID_CHARS)
        .map(str::to_owned)
        .collect()
}

/// Whether nothing that a backup needs is missing or in a damaged pack.
fn is_whole(
    opened: &Repository<IndexedFullStatus>,
    backend: &Backend,
    snapshot: &SnapshotFile,
    damaged: &BTreeSet<String>,
) -> bool {
    let Ok(listed) = backend.list(FileType::Pack) else { return false };
    let there: HashSet<_> = listed.into_iter().collect();
    let is_good = |pack: rustic_core::Id| {
        let hex = pack.to_hex();
        there.contains(&pack) && !damaged.iter().any(|begin| hex.as_str().starts_with(begin.as_str()))
    };
    let mut open = vec![snapshot.tree];
    let mut seen = HashSet::new();
    while let Some(id) = open.pop() {
        if !seen.insert(id) {
            continue;
        }
        let good = opened.get_index_entry(&id).is_ok_and(|entry| is_good(*entry.pack));
        let Ok(tree) = opened.get_tree(&id) else { return false };
        if !good {
            return false;
        }
        for node in &tree.nodes {
            open.extend(node.subtree);
            for blob in node.content.iter().flatten() {
                if !opened.get_index_entry(blob).is_ok_and(|entry| is_good(*entry.pack)) {
                    return false;
                }
            }
        }
    }
    true
}

pub(crate) fn erase(backend: &Arc<Backend>) -> Result<Erased, Failed> {
    let store = backend.store();
    let mut erased = Erased::default();
    let mut delete = |name: &str, size: u64| {
        store.remove(name)?;
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
    // The configuration says that there is a repository: it goes last.
    if let Some(size) = store.size(CONFIG)? {
        delete(CONFIG, size)?;
    }
    store.erase()?;
    Ok(erased)
}
