//! Looking for damage, and putting right what can be.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    os::unix::ffi::OsStrExt as _,
    sync::Arc,
};

use bytes::Bytes;
use cocalc_backup::protocol::{FailureKind, Job};
use cocalc_core::{
    backups::{CheckOptions, Checked, Lost, Phase},
    ids::TreePath,
};
use rustic_core::{
    CheckOptions as RusticCheck, FileType, Id, IndexedFullStatus, ReadBackend as _, RepairIndexOptions,
    Repository, TreeId,
    repofile::{IndexFile, SnapshotFile},
};
use sha2::{Digest as _, Sha256};

use crate::{
    backend::{Backend, DAMAGED, name},
    fail,
    failure::Failed,
    repository::{self, Opened},
    store::Mode,
};

/// How much damage is told.
const DAMAGE_MAX: usize = 100;
/// How many paths are told of one backup.
const LOST_MAX: usize = 20;
/// How much of an id rustic shows.
const ID_CHARS: usize = 8;

pub(crate) fn check(
    job: &Job,
    backend: &Arc<Backend>,
    mirror: Option<&Arc<Backend>>,
    options: &CheckOptions,
) -> Result<Checked, Failed> {
    if !backend.is_repository()? {
        return Ok(Checked::default());
    }
    let opened = repository::open(job, backend, Phase::Tending)?;
    let mut repaired = 0;
    if options.repair {
        repaired = repair(&opened, backend, mirror, options.read_data)?;
    }
    // With a snapshot that cannot be read nothing is known of its trees.
    let backups = repository::backups(job, backend, &opened)?;
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
        return Ok(Checked { repaired, ..Checked::default() });
    }
    let mut survey = Survey {
        there: backend.list(FileType::Pack)?.into_iter().collect(),
        damaged: packs_in(&damage),
        opened: opened.to_indexed()?,
        whole: HashSet::new(),
    };
    let mut found = Checked { damage, repaired, ..Checked::default() };
    for (backup, snapshot) in &backups {
        let lost = survey.lost(snapshot);
        backend.forgive();
        if !lost.is_empty() {
            found.affected.push(backup.id.clone());
            let lost = lost.into_iter().map(|path| Lost { backup: backup.id.clone(), path });
            found.lost.extend(lost);
        }
    }
    Ok(found)
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

/// Finds what of a backup is in packs that are damaged or missing.
struct Survey {
    there: HashSet<Id>,
    damaged: BTreeSet<String>,
    opened: Repository<IndexedFullStatus>,
    /// Trees with nothing missing at or below them: backups of one project have
    /// most of theirs in common.
    whole: HashSet<TreeId>,
}

impl Survey {
    fn is_good(&self, pack: Id) -> bool {
        let hex = pack.to_hex();
        self.there.contains(&pack)
            && !self.damaged.iter().any(|begin| hex.as_str().starts_with(begin.as_str()))
    }

    /// The first paths that cannot be restored. The root stands for all.
    fn lost(&mut self, snapshot: &SnapshotFile) -> Vec<TreePath> {
        let mut lost = Vec::new();
        self.walk(snapshot.tree, None, &mut lost);
        lost
    }

    /// Looks at one tree, which is what is in `path`; `None` is above the root of
    /// the project, where its directory is the only name.
    fn walk(&mut self, id: TreeId, path: Option<&TreePath>, lost: &mut Vec<TreePath>) {
        if lost.len() >= LOST_MAX || self.whole.contains(&id) {
            return;
        }
        let here = path.cloned().unwrap_or_else(TreePath::root);
        let good = self.opened.get_index_entry(&id).is_ok_and(|entry| self.is_good(*entry.pack));
        let Some(tree) = good.then(|| self.opened.get_tree(&id).ok()).flatten() else {
            lost.push(here);
            return;
        };
        let before = lost.len();
        for node in &tree.nodes {
            let below = match path {
                None => Ok(TreePath::root()),
                Some(path) => path.join(node.name().as_bytes()),
            };
            let Ok(below) = below else {
                lost.push(here.clone());
                continue;
            };
            if let Some(subtree) = node.subtree {
                self.walk(subtree, Some(&below), lost);
            }
            let blobs = node.content.iter().flatten();
            let mut packs = blobs.map(|blob| self.opened.get_index_entry(blob).map(|entry| *entry.pack));
            if !packs.all(|pack| pack.is_ok_and(|pack| self.is_good(pack))) && lost.len() < LOST_MAX {
                lost.push(below);
            }
        }
        if lost.len() == before {
            self.whole.insert(id);
        }
    }
}

/// Takes from the mirror what is damaged, sets aside what is damaged there, too,
/// and makes the index agree with what is there then.
fn repair(
    opened: &Opened,
    backend: &Arc<Backend>,
    mirror: Option<&Arc<Backend>>,
    read_data: bool,
) -> Result<u64, Failed> {
    let mut repaired = 0;
    for kind in [FileType::Snapshot, FileType::Index] {
        for id in backend.list(kind)? {
            if !is_whole(backend, kind, &id)? && fetch(backend, mirror, kind, &id)? {
                repaired += 1;
            }
        }
    }
    let there: HashMap<Id, u32> = backend.list_with_size(FileType::Pack)?.into_iter().collect();
    let mut bad: BTreeMap<Id, bool> = BTreeMap::new();
    for index in opened.stream_files::<IndexFile>()? {
        // One that cannot be read tells nothing; what it told is read from the
        // packs.
        let Ok((_, index)) = index else { continue };
        for pack in &index.packs {
            match there.get(&*pack.id) {
                Some(size) if *size == pack.pack_size() => {}
                known => drop(bad.insert(*pack.id, known.is_some())),
            }
        }
    }
    backend.forgive();
    if read_data {
        for id in there.keys() {
            if !bad.contains_key(id) && !is_whole(backend, FileType::Pack, id)? {
                bad.insert(*id, true);
            }
        }
    }
    for (id, is_there) in bad {
        if fetch(backend, mirror, FileType::Pack, &id)? {
            repaired += 1;
        } else if is_there {
            set_aside(backend, &id)?;
        }
    }
    fail::point("repair.fetched");
    backend.forgive();
    opened.repair_index(&RepairIndexOptions::default(), false)?;
    fail::point("repair.indexed");
    Ok(repaired)
}

/// The bytes of a file, if they are what its name says.
fn whole(backend: &Backend, kind: FileType, id: &Id) -> Result<Option<Bytes>, Failed> {
    match backend.store().read(&name(kind, id)) {
        Ok(bytes) => {
            let hash: [u8; 32] = Sha256::digest(&bytes).into();
            Ok((Id::new(hash) == *id).then_some(bytes))
        }
        Err(failed) if failed.0.kind == FailureKind::Damaged => Ok(None),
        Err(failed) => Err(failed),
    }
}

fn is_whole(backend: &Backend, kind: FileType, id: &Id) -> Result<bool, Failed> {
    Ok(whole(backend, kind, id)?.is_some())
}

/// Puts what the mirror has in the place of what is damaged. False if it has
/// nothing good.
fn fetch(backend: &Backend, mirror: Option<&Arc<Backend>>, kind: FileType, id: &Id) -> Result<bool, Failed> {
    let Some(mirror) = mirror else { return Ok(false) };
    let Some(bytes) = whole(mirror, kind, id)? else { return Ok(false) };
    backend.replace(kind, id, bytes)?;
    Ok(true)
}

/// Keeps a damaged pack where nobody looks for data: a part of it may be good,
/// and whoever has time may find it.
fn set_aside(backend: &Backend, id: &Id) -> Result<(), Failed> {
    let name = name(FileType::Pack, id);
    let store = backend.store();
    match store.read(&name) {
        Ok(bytes) => {
            store.write(&format!("{DAMAGED}/{}", id.to_hex().as_str()), &[bytes], Mode::Over)?;
        }
        // It cannot even be read.
        Err(failed) if failed.0.kind == FailureKind::Damaged => {}
        Err(failed) => return Err(failed),
    }
    store.remove(&name)
}
