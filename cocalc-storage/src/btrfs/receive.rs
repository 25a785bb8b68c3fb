//! Receiving: guarded, confined, in staging, and put in place only when it is
//! whole and written out.

use std::{ffi::OsStr, process::Stdio, time::Duration};

use cocalc_core::{
    ids::{ProjectId, SnapshotName, VolumeUuid},
    storage::{CloneOptions, Error, Result, SendHeader, SendOptions, Snapshot, Volume},
    stream::BoxRead,
};
use rustix::fs::{Timespec, Timestamps};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::oneshot,
    time::timeout,
};

use super::{
    BACKEND, Btrfs, Store,
    guard::StreamGuard,
    layout::{self, need_subvolume, open_directory},
    recover::{Intent, Staged},
    send::{Extra, PIPE_BYTES},
    sys::{self, Qgroup},
};
use crate::{
    child::Running,
    fail,
    failure::{Doing as _, Failure},
};

const CHUNK: usize = 256 << 10;

/// More than `btrfs receive` ever needs: a stream that makes it take more is
/// not an honest one.
const MEMORY_MAX: &str = "--as=1073741824";

/// The highest version of streams that this kernel and `btrfs` program take.
pub(super) fn stream_version() -> u32 {
    let kernel = std::fs::read_to_string("/sys/fs/btrfs/features/send_stream_version");
    let kernel: u32 = kernel.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(1);
    // Programs before 6.0.2 lose data when they fall back from an encoded
    // write, those before 6.2 damage what zstd has compressed.
    let said = std::process::Command::new("btrfs").arg("--version").output();
    let said = said.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    if kernel >= 2 && program_version(&said) >= Some((6, 2)) { 2 } else { 1 }
}

fn program_version(said: &str) -> Option<(u32, u32)> {
    let (_, version) = said.lines().next()?.split_once(" v")?;
    let mut parts = version.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((parts.next()?.ok()?, parts.next().and_then(Result::ok).unwrap_or(0)))
}

/// A stream that was applied in staging.
struct Applied {
    /// The subvolume in staging that holds it.
    staging: String,
    group: Option<Qgroup>,
    name: SnapshotName,
    origin: VolumeUuid,
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
            let staged = store.stage(group);
            store.copy(&snapshot, &staged)?;
            fail::point("clone.staged");
            store.come_alive(target, &staged.path()).map(Some)
        });
        if let Some(volume) = first.await? {
            return Ok(volume);
        }
        let sent = self.send_stream(source, name, &SendOptions::whole()).await?;
        let header = sent.header;
        let extra = serde_json::from_str(&header.extra).ok();
        self.applied(target, header.name, header.origin, None, extra, sent.reader, move |store, applied| {
            store.refuse_live(target)?;
            let (_, staged) = store.copy_of(&applied)?;
            store.come_alive(target, &staged.path())
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
        // A task of its own, so that staging is removed after the child has
        // really ended, even if the caller goes away; which ends it.
        let (caller, gone) = oneshot::channel::<()>();
        let this = self.clone();
        let task = tokio::spawn(async move {
            let staging = VolumeUuid::random().to_string();
            let sources = extra.as_ref().map(|extra| extra.sources.clone()).unwrap_or_default();
            let guard = StreamGuard::new(&name, origin, base.map(|(_, origin)| origin)).sources(sources);
            let prepared = {
                let staging = staging.clone();
                this.exclusive(project, "receive", move |store| store.prepare(project, &staging)).await
            };
            let group = prepared?;
            fail::point("receive.prepared");
            let path = this.0.layout.staging().join(&staging);
            let stall_limit = this.0.stall_limit;
            let outcome = match feed(path.as_os_str(), guard, stream, gone, stall_limit).await {
                Err(rejected) => Err(rejected.public(project)),
                Ok(()) => {
                    fail::point("receive.applied");
                    let applied = Applied { staging: staging.clone(), group, name, origin, extra };
                    this.exclusive(project, "receive", move |store| then(store, applied)).await
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

    /// Makes the subvolume in staging to receive into. It is in the project's
    /// quota group, and so is by inheritance what is received, while it is.
    fn prepare(&self, project: ProjectId, staging: &str) -> Result<Option<Qgroup>, Failure> {
        let group = self.ensure_project(project)?;
        let parent = open_directory(&self.layout.staging()).doing("open staging")?;
        sys::create_subvolume(&parent, staging, group).doing("make a place to receive into")?;
        Ok(group)
    }

    /// Makes a writable copy of a snapshot in staging.
    fn copy(&self, snapshot: &layout::Subvolume, staged: &Staged<'_>) -> Result<layout::Subvolume, Failure> {
        let parent = open_directory(&self.layout.staging()).doing("open staging")?;
        sys::create_snapshot(&snapshot.fd, &parent, &staged.name, false, staged.group)
            .doing("copy a snapshot")?;
        need_subvolume(&staged.path())
    }

    /// Checks what was applied, and makes a writable copy, written out and
    /// with the root directory's own time.
    fn copy_of(&self, applied: &Applied) -> Result<(layout::Subvolume, Staged<'_>), Failure> {
        let path = self.layout.staging().join(&applied.staging).join(applied.name.as_str());
        let received = need_subvolume(&path)?;
        if !received.info.read_only || received.info.received_uuid != *applied.origin.as_bytes() {
            return Err(Failure::Wrong("btrfs receive ended well but left something unfinished".to_owned()));
        }
        // Its exit says nothing about what is on the disk: files would be empty
        // after a power cut in a snapshot that looks complete. Taking a copy of
        // it writes all its data out and commits (`btrfs_mksnapshot` in
        // fs/btrfs/ioctl.c), so no sync of its own is needed.
        let staged = self.stage(applied.group);
        let made = self.copy(&received, &staged)?;
        fail::point("receive.committed");
        if let Some(Extra { root_mtime: (tv_sec, nanos), .. }) = applied.extra {
            let times = Timestamps {
                last_access: Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT },
                last_modification: Timespec { tv_sec, tv_nsec: nanos.min(999_999_999).into() },
            };
            rustix::fs::futimens(&made.fd, &times).doing("set the time of the root directory")?;
        }
        Ok((received, staged))
    }

    /// Makes what was applied a snapshot of the project.
    ///
    /// A read-only subvolume cannot be moved to another directory, so a
    /// writable copy is, which does not count until it is read-only.
    fn publish(&self, project: ProjectId, applied: &Applied) -> Result<Snapshot, Failure> {
        if self.ensure_project(project)? != applied.group {
            return Err(Failure::Wrong("the project was deleted while its snapshot came".to_owned()));
        }
        let (received, staged) = self.copy_of(applied)?;
        let copy = need_subvolume(&staged.path())?;
        let taken = applied.extra.as_ref().map_or((0, 0), |extra| extra.taken);
        sys::set_received(&copy.fd, &received.info, taken).doing("mark a snapshot as received")?;
        let name = &applied.name;
        self.intending(&Intent::Snapshot { project, name: name.clone() }, || {
            let place = self.layout.snapshot(project, name);
            super::volumes::rename(&staged.path(), &place, rustix::fs::RenameFlags::NOREPLACE)?;
            fail::point("receive.renamed");
            // Commits, the new name with it.
            sys::set_read_only(&copy.fd).doing("make a snapshot read-only")?;
            fail::point("receive.published");
            Ok(())
        })?;
        let made = self.layout.need(project, name)?;
        Ok(layout::snapshot(project, name, &made.info))
    }
}

/// Why a stream was not applied.
enum Rejected {
    Stream(String),
    Child(String),
    Io(Failure),
}

impl Rejected {
    fn public(self, project: ProjectId) -> Error {
        let (operation, no_space) =
            ("receive", |what| Error::NoSpace { project, operation: "receive", what });
        match self {
            Self::Stream(reason) => Error::BadStream { project, reason },
            // The child is a program; what it says is all there is.
            Self::Child(words) if words.contains("Disk quota exceeded") => no_space("the project's quota"),
            Self::Child(words) if words.contains("No space left on device") => no_space("the host's volume"),
            Self::Child(words) => {
                Error::BadStream { project, reason: format!("it could not be applied: {words}") }
            }
            Self::Io(failure) => failure.public(BACKEND, project, operation),
        }
    }
}

/// Runs `btrfs receive` into `place` on what the guard lets through of
/// `stream`. The child has ended when this returns.
async fn feed(
    place: &OsStr,
    guard: StreamGuard,
    stream: BoxRead,
    gone: oneshot::Receiver<()>,
    stall_limit: Duration,
) -> Result<(), Rejected> {
    // -C confines it to its directory: without it, a crafted stream writes
    // anywhere as root. -e: end at the stream's end.
    let arguments = [MEMORY_MAX, "--core=0", "--", "btrfs", "receive", "-q", "-e", "-C"].map(OsStr::new);
    let arguments = [arguments.as_slice(), &[place]].concat();
    let mut running = Running::confined("prlimit", &arguments, Stdio::piped(), Stdio::null())
        .doing("start btrfs receive")
        .map_err(Rejected::Io)?;
    let pumped = tokio::select! {
        pumped = pump(&mut running, guard, stream, stall_limit) => pumped,
        // Either the caller drops its end, or it is in the middle of waiting.
        _ = gone => Err(Rejected::Stream("nobody waits for it any more".to_owned())),
    };
    if pumped.is_err() {
        // Not an error if it has ended by itself.
        let _ = running.child.kill().await;
        return pumped;
    }
    match timeout(stall_limit, running.child.wait()).await {
        Ok(Ok(status)) if status.success() => Ok(()),
        Ok(Ok(status)) => {
            Err(Rejected::Child(format!("btrfs receive failed, {status}: {}", running.words())))
        }
        Ok(Err(error)) => Err(Rejected::Io(Failure::Io { doing: "wait for btrfs receive", source: error })),
        Err(_) => {
            let _ = running.child.kill().await;
            Err(Rejected::Child("btrfs receive did not end".to_owned()))
        }
    }
}

async fn pump(
    running: &mut Running,
    mut guard: StreamGuard,
    mut stream: BoxRead,
    stall_limit: Duration,
) -> Result<(), Rejected> {
    let stalled = |_| Rejected::Stream(format!("nothing came for {} s", stall_limit.as_secs()));
    let Some(mut stdin) = running.child.stdin.take() else {
        return Err(Rejected::Child("btrfs receive has no input".to_owned()));
    };
    // Slower without, where the user has too many pipes.
    let _ = rustix::pipe::fcntl_setpipe_size(&stdin, PIPE_BYTES);
    let mut chunk = vec![0; CHUNK];
    let mut safe = Vec::with_capacity(2 * CHUNK);
    loop {
        let length = timeout(stall_limit, stream.read(&mut chunk)).await.map_err(stalled)?;
        let length = length.map_err(|error| Rejected::Stream(format!("it broke off: {error}")))?;
        if length == 0 {
            return guard.finish().map_err(|refused| Rejected::Stream(refused.to_string()));
        }
        guard.push(&chunk[..length], &mut safe).map_err(|refused| Rejected::Stream(refused.to_string()))?;
        match timeout(stall_limit, stdin.write_all(&safe)).await {
            Ok(Ok(())) => safe.clear(),
            Ok(Err(_)) => {
                // It has closed its input; its last words say why.
                let ended = timeout(stall_limit, running.child.wait()).await;
                let status = ended.ok().and_then(Result::ok).map(|status| status.to_string());
                let status = status.unwrap_or_else(|| "still running".to_owned());
                return Err(Rejected::Child(format!("btrfs receive failed, {status}: {}", running.words())));
            }
            Err(_) => return Err(Rejected::Child("btrfs receive takes no more".to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_of_the_program_is_read() {
        for (said, version) in [
            ("btrfs-progs v6.2\n", Some((6, 2))),
            ("btrfs-progs v6.14.1\n-EXPERIMENTAL", Some((6, 14))),
            ("btrfs-progs v5.16.2", Some((5, 16))),
            ("", None),
            ("what?", None),
        ] {
            assert_eq!(program_version(said), version, "{said}");
        }
    }
}
