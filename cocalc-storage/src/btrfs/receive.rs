//! Receiving: guarded, in staging, and put in place only when it is whole and
//! written out.

use std::{
    fs::File,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use cocalc_core::{
    ids::{ProjectId, SnapshotName, VolumeUuid},
    storage::{CloneOptions, Error, Result, SendHeader, SendOptions, Snapshot, Volume},
    stream::BoxRead,
};
use rustix::fs::{Timespec, Timestamps};
use tokio::{io::AsyncReadExt as _, sync::oneshot, time::timeout};

use super::{
    BACKEND, Btrfs, Store,
    apply::Applier,
    guard::StreamGuard,
    layout::{self, need_subvolume, open_directory},
    send::Extra,
    sys::{self, Qgroup},
};
use crate::{
    fail,
    failure::{Doing as _, Failure},
};

/// How much is applied at a time: what the sender's pipe holds.
const CHUNK: usize = 1 << 20;

/// The highest version of streams that this kernel takes on this volume, of
/// which `root` is an open directory.
pub(super) fn stream_version(root: &File) -> u32 {
    let kernel = std::fs::read_to_string("/sys/fs/btrfs/features/send_stream_version");
    let kernel: u32 = kernel.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(1);
    if kernel >= 2 && takes_compressed(root) { 2 } else { 1 }
}

/// Whether what is compressed can be written as it is: not on a mount without
/// checksums or copy on write (`btrfs_do_encoded_write` in fs/btrfs/inode.c).
fn takes_compressed(root: &File) -> bool {
    let flags = rustix::fs::StatxFlags::MNT_ID;
    let Ok(found) = rustix::fs::statx(root, "", rustix::fs::AtFlags::EMPTY_PATH, flags) else { return false };
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    mount_options(&mounts, found.stx_mnt_id)
        .is_some_and(|mut options| options.all(|option| option != "nodatasum" && option != "nodatacow"))
}

/// The file system's own options of a mount: those after the hyphen and two
/// more words, see proc_pid_mountinfo(5).
fn mount_options(mounts: &str, id: u64) -> Option<impl Iterator<Item = &str>> {
    let of = |line: &&str| line.split(' ').next().and_then(|word| word.parse().ok()) == Some(id);
    let (_, rest) = mounts.lines().find(of)?.split_once(" - ")?;
    Some(rest.split(' ').nth(2)?.split(','))
}

/// A stream that was applied in staging.
struct Applied {
    /// The subvolume in staging that holds it.
    staging: String,
    group: Option<Qgroup>,
    name: SnapshotName,
    origin: VolumeUuid,
    /// The sender's transaction.
    sent_transid: u64,
    extra: Option<Extra>,
}

impl Btrfs {
    pub(super) async fn receive_stream(&self, header: &SendHeader, stream: BoxRead) -> Result<Snapshot> {
        let project = header.project;
        let bad = |reason: String| Error::BadStream { project, reason };
        if header.backend != BACKEND {
            return Err(bad(format!("it is of {} storage, this is {BACKEND}", header.backend)));
        }
        let extra = match header.extra.as_str() {
            "" => None,
            extra if extra.len() > 4096 => return Err(bad("what comes beside it is too long".to_owned())),
            extra => Some(serde_json::from_str(extra).map_err(|error| bad(error.to_string()))?),
        };
        let announced = header.clone();
        let sources = extra.as_ref().map(|extra: &Extra| extra.sources.clone()).unwrap_or_default();
        let admitted = self.exclusive(project, "receive", move |store| {
            let admitted = store.admit(&announced)?;
            if admitted.is_none() {
                store.admit_sources(project, &sources)?;
            }
            Ok(admitted)
        });
        let admitted = admitted.await?;
        if let Some(snapshot) = admitted {
            return Ok(snapshot);
        }
        let header = header.clone();
        self.applied(project, header.name.clone(), header.origin, header.base.clone(), extra, stream, {
            move |store, applied| {
                // Somebody else may have brought it meanwhile.
                match store.admit(&header)? {
                    Some(snapshot) => Ok(snapshot),
                    None => store.publish(header.project, &applied),
                }
            }
        })
        .await
    }

    /// Clones. What simple quotas charge stays with who wrote it first, so
    /// another owner gets a copy of its own.
    pub(super) async fn clone_from(
        &self,
        source: ProjectId,
        name: &SnapshotName,
        target: ProjectId,
        options: &CloneOptions,
    ) -> Result<Volume> {
        let (from, options) = (name.clone(), options.clone());
        let copies = !options.same_owner;
        let first = self.exclusive(target, "clone into", move |store| {
            let snapshot = store.layout.need(source, &from)?;
            store.refuse_live(target)?;
            let group = store.ensure_project(target)?;
            store.apply(group, &options.volume)?;
            if copies {
                return Ok(None);
            }
            // One step, which the kernel commits.
            let parent = open_directory(&store.layout.projects()).doing("open the directory of projects")?;
            sys::create_snapshot(&snapshot.fd, &parent, &target.to_string(), false, group)
                .doing("clone a snapshot")?;
            fail::point("clone.in-place");
            store.live_volume(target).map(Some)
        });
        if let Some(volume) = first.await? {
            return Ok(volume);
        }
        let sent = self.send_stream(source, name, &SendOptions::whole()).await?;
        let header = sent.header;
        let extra = serde_json::from_str(&header.extra).ok();
        self.applied(target, header.name, header.origin, None, extra, sent.reader, move |store, applied| {
            store.refuse_live(target)?;
            store.finish_times(&applied)?;
            store.come_alive(target, &store.layout.staging().join(&applied.staging))
        })
        .await
    }

    /// Applies a stream in staging, calls `then` with it when it is the
    /// project's turn, and removes it from staging.
    #[allow(clippy::too_many_arguments, reason = "what a stream is announced as")]
    async fn applied<T: Send + 'static>(
        &self,
        project: ProjectId,
        name: SnapshotName,
        origin: VolumeUuid,
        base: Option<(SnapshotName, VolumeUuid)>,
        extra: Option<Extra>,
        stream: BoxRead,
        then: impl FnOnce(&Store, Applied) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T> {
        // A task of its own, so that staging is removed even if the caller goes
        // away; which ends it.
        let (caller, gone) = Caller::new();
        let this = self.clone();
        let task = tokio::spawn(async move {
            let staging = VolumeUuid::random().to_string();
            let sources = extra.as_ref().map(|extra| extra.sources.clone()).unwrap_or_default();
            let guard = StreamGuard::new(&name, origin, base.as_ref().map(|(_, origin)| *origin))
                .sources(sources.clone());
            let prepared = {
                let staging = staging.clone();
                let base = base.map(|(name, _)| name);
                let flag = Arc::clone(&gone.flag);
                this.exclusive(project, "receive", move |store| {
                    let (group, root, sources) = store.prepare(project, &staging, base.as_ref(), &sources)?;
                    Ok((group, Applier::new(root, origin, sources, flag)))
                })
                .await
            };
            let (group, applier) = prepared?;
            fail::point("receive.prepared");
            let stall_limit = this.0.stall_limit;
            let flag = Arc::clone(&gone.flag);
            let outcome = match pump(project, applier, guard, stream, gone.told, stall_limit).await {
                Err(failure) => Err(failure.public(BACKEND, project, "receive")),
                Ok(applier) => {
                    fail::point("receive.applied");
                    let sent_transid = applier.sent_transid();
                    drop(applier);
                    let applied =
                        Applied { staging: staging.clone(), group, name, origin, sent_transid, extra };
                    this.exclusive(project, "receive", move |store| {
                        if flag.load(Ordering::Relaxed) {
                            let reason = "nobody waits for it any more".to_owned();
                            return Err(Error::BadStream { project, reason }.into());
                        }
                        then(store, applied)
                    })
                    .await
                }
            };
            let removed = this
                .exclusive(project, "clean up after", move |store| {
                    store.remove_staged(&staging, group)?;
                    store.forget_if_empty(project)
                })
                .await;
            if let Err(error) = removed {
                let error = cocalc_core::chain(&error);
                tracing::warn!(%project, error, "staging is left until the store opens again");
            }
            outcome
        });
        let outcome = task.await;
        drop(caller);
        outcome.unwrap_or_else(|error| {
            Err(Error::Backend { backend: BACKEND, operation: "receive", project, source: error.into() })
        })
    }
}

impl Store {
    /// Whether a stream with this header may come; `Some` if what it holds is
    /// here already.
    fn admit(&self, header: &SendHeader) -> Result<Option<Snapshot>, Failure> {
        let project = header.project;
        if let Some(found) = self.layout.find(project, &header.name)? {
            if layout::origin(&found.info) == header.origin {
                return Ok(Some(layout::snapshot(project, &header.name, &found.info)));
            }
            return Err(Error::AlreadyExists { project, what: format!("a snapshot {}", header.name) }.into());
        }
        if let Some((name, origin)) = &header.base {
            let base = self.layout.need(project, name)?;
            if layout::origin(&base.info) != *origin {
                let reason = format!("its base {name} is not the snapshot of that name here");
                return Err(Error::BadStream { project, reason }.into());
            }
        }
        Ok(None)
    }

    /// Refuses a stream that wants to refer to anything but snapshots that the
    /// project has here.
    fn admit_sources(&self, project: ProjectId, sources: &[VolumeUuid]) -> Result<(), Failure> {
        if sources.is_empty() {
            return Ok(());
        }
        let here = self.layout.list_snapshots(project)?;
        match sources.iter().find(|source| here.iter().all(|snapshot| snapshot.origin != **source)) {
            Some(source) => {
                let reason = format!("it refers to {source}, which is no snapshot of the project here");
                Err(Error::BadStream { project, reason }.into())
            }
            None => Ok(()),
        }
    }

    /// Makes the subvolume in staging that the stream is applied to: a copy of
    /// the base, or an empty one. It is in the project's quota group.
    /// Returns the group, the subvolume, and what may be cloned from, by origin.
    #[allow(clippy::type_complexity, reason = "three things, told above")]
    pub(super) fn prepare(
        &self,
        project: ProjectId,
        staging: &str,
        base: Option<&SnapshotName>,
        sources: &[VolumeUuid],
    ) -> Result<(Option<Qgroup>, File, Vec<(VolumeUuid, File)>), Failure> {
        let group = self.ensure_project(project)?;
        let parent = open_directory(&self.layout.staging()).doing("open staging")?;
        let mut open = Vec::new();
        if let Some(base) = base {
            let base = self.layout.need(project, base)?;
            sys::create_snapshot(&base.fd, &parent, staging, false, group)
                .doing("make a copy of the base to receive into")?;
            open.push((layout::origin(&base.info), base.fd));
        } else {
            sys::create_subvolume(&parent, staging, group).doing("make a place to receive into")?;
        }
        if !sources.is_empty() {
            for snapshot in self.layout.list_snapshots(project)? {
                if sources.contains(&snapshot.origin) {
                    open.push((snapshot.origin, self.layout.need(project, &snapshot.name)?.fd));
                }
            }
        }
        let root = need_subvolume(&self.layout.staging().join(staging))?;
        Ok((group, root.fd, open))
    }

    /// Gives the root directory of what was applied its own time, which the
    /// kernel does not send, and returns what was applied.
    fn finish_times(&self, applied: &Applied) -> Result<layout::Subvolume, Failure> {
        let staged = need_subvolume(&self.layout.staging().join(&applied.staging))?;
        if let Some(Extra { root_mtime: (tv_sec, nanos), .. }) = applied.extra {
            let times = Timestamps {
                last_access: Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT },
                last_modification: Timespec { tv_sec, tv_nsec: nanos.min(999_999_999).into() },
            };
            rustix::fs::futimens(&staged.fd, &times).doing("set the time of the root directory")?;
        }
        Ok(staged)
    }

    /// Makes what was applied a snapshot of the project.
    ///
    /// A read-only subvolume cannot be moved to another directory, so a
    /// read-only snapshot of it is taken there. That is one step, which the
    /// kernel commits (`create_snapshot` in fs/btrfs/ioctl.c); what was applied
    /// has been written out before. It keeps the received id, as read-only
    /// snapshots do (`create_pending_snapshot` in fs/btrfs/transaction.c).
    fn publish(&self, project: ProjectId, applied: &Applied) -> Result<Snapshot, Failure> {
        if self.ensure_project(project)? != applied.group {
            return Err(Failure::Wrong("the project was deleted while its snapshot came".to_owned()));
        }
        let staged = self.finish_times(applied)?;
        let taken = applied.extra.as_ref().map_or((0, 0), |extra| extra.taken);
        sys::set_received(&staged.fd, applied.origin.as_bytes(), applied.sent_transid, taken)
            .doing("mark a snapshot as received")?;
        fail::point("receive.marked");
        let parent = open_directory(&self.layout.snapshots(project)).doing("open the snapshots")?;
        sys::create_snapshot(&staged.fd, &parent, applied.name.as_str(), true, applied.group)
            .doing("take a snapshot of what was received")?;
        fail::point("receive.published");
        let made = self.layout.need(project, &applied.name)?;
        if layout::origin(&made.info) != applied.origin {
            return Err(Failure::Wrong("what was received has lost its origin".to_owned()));
        }
        Ok(layout::snapshot(project, &applied.name, &made.info))
    }
}

/// Who waits for a receive. Dropping it ends that.
pub(super) struct Caller {
    flag: Arc<AtomicBool>,
    _told: oneshot::Sender<()>,
}

/// How a receive hears that nobody waits for it: it is told, where it waits, and
/// looks, where it works.
pub(super) struct Gone {
    pub(super) flag: Arc<AtomicBool>,
    pub(super) told: oneshot::Receiver<()>,
}

impl Caller {
    pub(super) fn new() -> (Self, Gone) {
        let (sender, told) = oneshot::channel();
        let flag = Arc::new(AtomicBool::new(false));
        (Self { flag: Arc::clone(&flag), _told: sender }, Gone { flag, told })
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        self.flag.store(true, Ordering::Relaxed);
    }
}

async fn written_out(mut applier: Applier) -> Result<Applier, Failure> {
    let written = tokio::task::spawn_blocking(move || {
        let written = applier.write_out();
        (applier, written)
    });
    let (applier, written) = written.await.map_err(|error| Failure::Wrong(error.to_string()))?;
    written.doing("write out what was received")?;
    Ok(applier)
}

/// Applies what the guard lets through of `stream`. Nothing is being applied
/// any more when this returns.
pub(super) async fn pump(
    project: ProjectId,
    mut applier: Applier,
    mut guard: StreamGuard,
    mut stream: BoxRead,
    mut gone: oneshot::Receiver<()>,
    stall_limit: Duration,
) -> Result<Applier, Failure> {
    let bad = |reason: String| Failure::Public(Error::BadStream { project, reason });
    let mut chunk = vec![0; CHUNK];
    let mut safe = Vec::with_capacity(CHUNK + (CHUNK >> 2));
    loop {
        let filled = async {
            // As much as there is: a step to the thread that applies it costs
            // more than a read.
            let mut length = stream.read(&mut chunk).await?;
            while length > 0 && length < CHUNK {
                tokio::select! {
                    biased;
                    more = stream.read(&mut chunk[length..]) => match more? {
                        0 => break,
                        more => length += more,
                    },
                    () = std::future::ready(()) => break,
                }
            }
            Ok::<_, std::io::Error>(length)
        };
        let length = tokio::select! {
            biased;
            // Either the caller drops its end, or it is in the middle of waiting.
            _ = &mut gone => return Err(bad("nobody waits for it any more".to_owned())),
            filled = timeout(stall_limit, filled) => filled
                .map_err(|_| bad(format!("nothing came for {} s", stall_limit.as_secs())))?
                .map_err(|error| bad(format!("it broke off: {error}")))?,
        };
        if length == 0 {
            guard.finish().map_err(|refused| bad(refused.to_string()))?;
            return written_out(applier).await;
        }
        guard.push(&chunk[..length], &mut safe).map_err(|refused| bad(refused.to_string()))?;
        let applied = tokio::task::spawn_blocking(move || {
            let applied = applier.push(&safe);
            safe.clear();
            (applier, safe, applied)
        });
        let applied = applied.await.map_err(|error| Failure::Wrong(error.to_string()))?;
        let done;
        (applier, safe, done) = applied;
        done.map_err(|not| not.failure(project))?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_options_of_a_mount_are_found() {
        let mounts = "22 1 0:20 / / rw,relatime - ext4 /dev/root rw\n\
                      31 22 0:45 / /srv rw,nosuid shared:7 - btrfs /dev/loop0 rw,nodatasum,space_cache=v2\n";
        let options = |id| mount_options(mounts, id).map(|options| options.collect::<Vec<_>>());
        assert_eq!(options(31).unwrap(), ["rw", "nodatasum", "space_cache=v2"]);
        assert_eq!(options(22).unwrap(), ["rw"]);
        assert_eq!(options(1), None);
    }
}
