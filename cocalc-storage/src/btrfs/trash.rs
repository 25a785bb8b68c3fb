//! The trash. What is deleted goes there in one step, and is gone; a thread
//! gives it to the kernel a little at a time, so that however much is deleted
//! at once, the projects that live have the disk for themselves most of the
//! time.
//!
//! In it are subvolumes, by tree id and by the quota group that they are in,
//! and empty files that name quota groups which still have to go.

use std::{
    fs, io,
    path::Path,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use rustix::fs::RenameFlags;

use super::{
    BACKEND, Btrfs, Store,
    layout::{entries, subvolume},
    sys::{self, Qgroup},
    volumes::rename,
};
use crate::{
    fail,
    failure::{Doing as _, Failure},
};

/// Subvolumes, by tree id and number of their quota group; 0 for none.
const VOLUME: &str = "volume-";
/// Groups of level 1, and of single subvolumes.
const GROUP: &str = "group-";
const MEMBER: &str = "member-";

/// How many subvolumes the kernel has to free at a time.
const BATCH: usize = 8;
/// How long to wait before looking again; it grows while nothing changes.
const PAUSE_MIN: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// The longest of these while the kernel has something to free.
const FREEING_MAX: Duration = Duration::from_millis(200);
/// How often the kernel, which frees when it sees fit, is reminded.
const REMIND_EVERY: Duration = Duration::from_secs(2);
/// How long the kernel may free nothing before it is given more: a process that
/// has a file open in a deleted volume must not hold up all others.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often the groups of what is long gone are looked for.
const SWEEP_EVERY: Duration = Duration::from_secs(3600);
/// How often who waits for the trash to be empty looks.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// What was deleted and is not gone yet.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Trash {
    /// Live volumes and sets of snapshots that are waiting, and subvolumes that
    /// the kernel is freeing.
    pub volumes: usize,
    /// Quota groups that go when what they count is free. That of a volume
    /// which was set aside stays as long as a snapshot has its bytes.
    pub groups: usize,
    /// Bytes that the deleted projects are still charged for; `None` without
    /// quotas.
    pub bytes: Option<u64>,
}

/// What the store and its thread tell each other.
#[derive(Debug, Default)]
pub(super) struct Signals {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    stop: bool,
    /// Something came into the trash.
    filled: bool,
    /// The subvolumes that the kernel is freeing.
    freeing: Vec<u64>,
}

impl Signals {
    /// Says that something came into the trash.
    pub(super) fn filled(&self) {
        self.lock().filled = true;
        self.changed.notify_all();
    }

    fn stop(&self) {
        self.lock().stop = true;
        self.changed.notify_all();
    }

    fn stopping(&self) -> bool {
        self.lock().stop
    }

    fn freeing(&self) -> Vec<u64> {
        self.lock().freeing.clone()
    }

    /// Waits until something comes, at most for `pause`. `None` if it is time
    /// to stop, else whether something came.
    fn wait(&self, pause: Duration) -> Option<bool> {
        let idle = |state: &mut State| !state.stop && !state.filled;
        let waited = self.changed.wait_timeout_while(self.lock(), pause, idle);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        (!state.stop).then(|| std::mem::take(&mut state.filled))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The thread that empties the trash. It ends when this is dropped, after the
/// step that it is in; the rest is done when the store opens again.
#[derive(Debug)]
pub(super) struct Reaper {
    signals: Arc<Signals>,
    thread: Option<JoinHandle<()>>,
}

impl Reaper {
    pub(super) fn start(store: &Arc<Store>) -> io::Result<Self> {
        let signals = Arc::clone(&store.trash);
        signals.filled();
        let weak = Arc::downgrade(store);
        let thread = std::thread::Builder::new().name("storage-trash".to_owned()).spawn({
            let signals = Arc::clone(&signals);
            move || run(&weak, &signals)
        })?;
        Ok(Self { signals, thread: Some(thread) })
    }
}

impl Drop for Reaper {
    fn drop(&mut self) {
        self.signals.stop();
        // Until then it may have the volume open. If it panicked, it has not.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// What a step has come to.
enum Step {
    /// Something was done.
    Done,
    /// The kernel is freeing what it was given.
    Freeing,
    /// Something is left that can't go yet.
    Waiting,
    /// There is nothing to do.
    Empty,
}

/// When the kernel was reminded of what it has to free, and when it last has
/// freed something, or was given something.
struct Kernel {
    reminded: Instant,
    progress: Instant,
}

fn run(store: &Weak<Store>, signals: &Signals) {
    let (mut pause, mut swept) = (Duration::ZERO, Instant::now());
    let mut kernel = Kernel { reminded: Instant::now(), progress: Instant::now() };
    while let Some(filled) = signals.wait(pause) {
        let Some(store) = store.upgrade() else { return };
        if filled {
            pause = Duration::ZERO;
        }
        let longer = |max| (pause * 2).clamp(PAUSE_MIN, max);
        pause = match store.empty_trash(&mut kernel) {
            Ok(Step::Done) => PAUSE_MIN,
            Ok(Step::Freeing) => longer(FREEING_MAX),
            Ok(Step::Waiting) => longer(PAUSE_MAX),
            Ok(Step::Empty) if swept.elapsed() >= SWEEP_EVERY => {
                swept = Instant::now();
                if let Err(failure) = store.remove_stale_groups() {
                    complain(&failure);
                }
                SWEEP_EVERY
            }
            Ok(Step::Empty) => SWEEP_EVERY.saturating_sub(swept.elapsed()).max(PAUSE_MIN),
            Err(failure) => {
                complain(&failure);
                PAUSE_MAX
            }
        };
    }
}

fn complain(failure: &Failure) {
    let error = cocalc_core::chain(failure);
    tracing::warn!(error, "the trash could not be emptied; it is tried again");
}

impl Btrfs {
    /// What was deleted and is not gone yet, for operators and their metrics.
    /// Takes a time that grows with it, not with what lives.
    ///
    /// # Errors
    ///
    /// Those of reading the volume.
    pub async fn trash(&self) -> cocalc_core::storage::Result<Trash> {
        let store = Arc::clone(&self.0);
        let counted = tokio::task::spawn_blocking(move || store.count_trash()).await;
        counted
            .unwrap_or_else(|error| Err(Failure::Wrong(error.to_string())))
            .map_err(|failure| failure.public(BACKEND, super::NOBODY, "count the trash of"))
    }

    /// Waits, at most for `limit`, until all that was deleted is gone and its
    /// space has returned; whether that is so.
    ///
    /// # Errors
    ///
    /// Those of reading the volume.
    pub async fn wait_trash_empty(&self, limit: Duration) -> cocalc_core::storage::Result<bool> {
        let deadline = Instant::now() + limit;
        while self.trash().await?.volumes > 0 {
            if Instant::now() >= deadline {
                return Ok(false);
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        Ok(true)
    }

    /// Removes the quota groups of subvolumes that are gone and count nothing
    /// any more: these a restore leaves, as long as a snapshot has bytes that
    /// the former volume wrote. This is done every hour, too.
    ///
    /// # Errors
    ///
    /// Those of reading the volume.
    pub async fn remove_stale_groups(&self) -> cocalc_core::storage::Result<()> {
        let store = Arc::clone(&self.0);
        let removed = tokio::task::spawn_blocking(move || store.remove_stale_groups()).await;
        removed
            .unwrap_or_else(|error| Err(Failure::Wrong(error.to_string())))
            .map_err(|failure| failure.public(BACKEND, super::NOBODY, "remove the quota groups of"))
    }
}

impl Store {
    /// Moves a subvolume into the trash. It may be full, and hold others.
    pub(super) fn bury(&self, path: &Path, tree: u64, group: Option<Qgroup>) -> Result<(), Failure> {
        let group = group.map_or(0, Qgroup::number);
        let place = self.layout.trash().join(format!("{VOLUME}{tree}-{group}"));
        rename(path, &place, RenameFlags::NOREPLACE)
    }

    /// Remembers a quota group that has to go when the kernel has cleaned up
    /// what it counted.
    pub(super) fn bury_group(&self, group: Qgroup) -> Result<(), Failure> {
        self.remember(&format!("{GROUP}{}", group.number()))
    }

    /// The same, of the group of one subvolume.
    pub(super) fn bury_member(&self, member: Qgroup) -> Result<(), Failure> {
        self.remember(&format!("{MEMBER}{}", member.number()))
    }

    fn remember(&self, name: &str) -> Result<(), Failure> {
        fs::File::create(self.layout.trash().join(name)).doing("remember a quota group")?;
        Ok(())
    }

    fn count_trash(&self) -> Result<Trash, Failure> {
        let mut trash = Trash { bytes: self.quotas.as_ref().map(|_| 0), ..Trash::default() };
        for name in entries(&self.layout.trash())? {
            if name.starts_with(VOLUME) {
                trash.volumes += 1;
                continue;
            }
            trash.groups += 1;
            let number = name.strip_prefix(GROUP).and_then(|number| number.parse().ok());
            if let (Some(quotas), Some(number), Some(bytes)) = (&self.quotas, number, &mut trash.bytes) {
                // It may have gone meanwhile.
                *bytes += quotas.usage(Qgroup::level_1(number)).map_or(0, |usage| usage.charged_bytes);
            }
        }
        // In this order: a subvolume is in the one or the other, or in both.
        trash.volumes += self.trash.freeing().len();
        Ok(trash)
    }

    /// One step of emptying the trash.
    fn empty_trash(&self, kernel: &mut Kernel) -> Result<Step, Failure> {
        let root = &self.layout.root_fd;
        let freeing = self.trash.freeing();
        let mut left = Vec::new();
        for &tree in &freeing {
            if !sys::is_freed(root, tree).doing("look for a subvolume")? {
                left.push(tree);
            }
        }
        if left.len() < freeing.len() {
            kernel.progress = Instant::now();
        }
        if !freeing.is_empty() && (left.is_empty() || kernel.reminded.elapsed() >= REMIND_EVERY) {
            // What is free can be used after a commit, which wakes the
            // kernel's cleaner, too.
            kernel.reminded = Instant::now();
            self.layout.commit()?;
        }
        self.trash.lock().freeing.clone_from(&left);
        if !left.is_empty() && kernel.progress.elapsed() < PATIENCE {
            return Ok(Step::Freeing);
        }
        let mut given = Vec::new();
        for name in entries(&self.layout.trash())? {
            if given.len() >= BATCH {
                break;
            }
            let Some((_, group)) = name.strip_prefix(VOLUME).and_then(|name| name.split_once('-')) else {
                continue;
            };
            let group = group.parse().ok().filter(|number| *number != 0).map(Qgroup::level_1);
            let Some(found) = subvolume(&self.layout.trash().join(&name))? else { continue };
            // Who counts must find it in the one place or the other.
            self.trash.lock().freeing.push(found.info.tree);
            let destroyed = self.destroy_some(found.info.tree, group, BATCH, &mut given);
            fail::point("reaper.destroyed");
            self.trash.lock().freeing = left.iter().chain(&given).copied().collect();
            destroyed?;
        }
        if !given.is_empty() {
            // Else they would be freed some time, or come back.
            self.layout.commit()?;
            fail::point("reaper.committed");
            kernel.reminded = Instant::now();
            kernel.progress = Instant::now();
            return Ok(Step::Done);
        }
        let none = self.remove_groups()?;
        Ok(if none && left.is_empty() { Step::Empty } else { Step::Waiting })
    }

    /// Removes the remembered quota groups that can go by now; whether none is
    /// left.
    fn remove_groups(&self) -> Result<bool, Failure> {
        let mut none = true;
        for name in entries(&self.layout.trash())? {
            let number = |prefix| name.strip_prefix(prefix).and_then(|number| number.parse().ok());
            let removed = match (number(GROUP), number(MEMBER)) {
                (Some(number), _) => self.remove_group(Qgroup::level_1(number)),
                (None, Some(tree)) => self.remove_member(Qgroup::of_subvolume(tree)),
                (None, None) => continue,
            };
            // If this is cut off, it is tried again with a group that is gone.
            let forgotten = removed.is_ok() && fs::remove_file(self.layout.trash().join(name)).is_ok();
            none &= forgotten;
        }
        Ok(none)
    }

    /// Removes a group of level 1, which is busy while it has members.
    fn remove_group(&self, group: Qgroup) -> io::Result<()> {
        let root = &self.layout.root_fd;
        if self.quotas.is_none() {
            return Ok(());
        }
        for member in sys::members(root, group)? {
            // The kernel removes the group of a subvolume with it, but not if
            // a snapshot held what it is charged for.
            self.remove_member(member)?;
        }
        sys::destroy_group(root, group)
    }

    /// Removes the group of a subvolume that is gone. It is busy until what it
    /// is charged for is free.
    fn remove_member(&self, member: Qgroup) -> io::Result<()> {
        let root = &self.layout.root_fd;
        if self.quotas.is_none() {
            return Ok(());
        }
        if !sys::is_gone(root, member.number())? {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        sys::destroy_group(root, member)
    }

    fn remove_stale_groups(&self) -> Result<(), Failure> {
        if self.quotas.is_none() {
            return Ok(());
        }
        for name in entries(&self.layout.root.join("snapshots"))? {
            if self.trash.stopping() {
                break;
            }
            let Ok(project) = name.parse() else { continue };
            let Some(group) = self.group(project)? else { continue };
            for member in sys::members(&self.layout.root_fd, group).doing("read the quota group")? {
                // Busy is what lives, or counts something still.
                let _ = self.remove_member(member);
            }
        }
        Ok(())
    }
}
