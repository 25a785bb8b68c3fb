//! Changing what a running project may use.

use std::{io, path::Path};

use cocalc_core::{
    ids::ProjectId,
    runner::{Applied, Error, LimitKind, Limits, Result},
};
use rustix::{
    fs::{Mode, OFlags, ResolveFlags},
    mount::FsPickFlags,
    process::{Pid, Resource, Rlimit},
};

use super::{Shared, backend, project::Running};

/// The magic number of file systems in memory.
const TMPFS_MAGIC: rustix::fs::FsWord = 0x0102_1994;

impl Shared {
    pub(super) async fn set_limits(&self, project: ProjectId, asked: Limits) -> Result<Applied> {
        let entry = self.known(project).ok_or(Error::NotRunning { project })?;
        let _operation = entry.operation.lock().await;
        let running = entry.running().ok_or(Error::NotRunning { project })?;
        let limits = self.machine.settle(project, &asked, &self.defaults)?;
        let before = entry.view().limits.clone();
        let mut later: Vec<LimitKind> = LimitKind::ALL
            .into_iter()
            .filter(|kind| limits.of(*kind) != before.of(*kind))
            .filter(|kind| match kind {
                LimitKind::Log => true,
                // It would hide what is in it now.
                LimitKind::Tmp => limits.tmp_bytes.is_none() || before.tmp_bytes.is_none(),
                _ => false,
            })
            .collect();
        let wanted = limits.clone();
        let done = tokio::task::spawn_blocking(move || {
            let done = apply(&running, &before, &wanted);
            if done.is_err()
                && let Err(error) = apply(&running, &wanted, &before)
            {
                tracing::warn!(%project, %error, "could not go back to the former limits");
            }
            done
        })
        .await
        .map_err(|error| backend("limit", project, error))?;
        match done {
            Ok(true) => {}
            Ok(false) => later.push(LimitKind::Nofile),
            Err(Unmet::InUse(reason)) => return Err(Error::Invalid { project, reason }),
            Err(Unmet::Io(_)) if entry.running().is_none() => return Err(Error::NotRunning { project }),
            Err(Unmet::Io(error)) => return Err(backend("limit", project, error)),
        }
        // What counts later is not so yet.
        let mut now = limits.clone();
        if later.contains(&LimitKind::Tmp) {
            now.tmp_bytes = entry.view().limits.tmp_bytes;
        }
        if later.contains(&LimitKind::Log) {
            now.log_bytes = entry.view().limits.log_bytes;
        }
        entry.view().limits = now;
        Ok(Applied { limits: asked.or(&limits), later })
    }
}

/// Why limits could not be set.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unmet {
    #[error("{0}")]
    InUse(String),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Makes `limits` hold; false if that of open files can't be raised now. Blocks.
fn apply(running: &Running, before: &Limits, limits: &Limits) -> Result<bool, Unmet> {
    if let Some(bytes) = limits.memory_bytes {
        let used = running.groups.memory_in_use();
        if used > bytes {
            return Err(Unmet::InUse(format!(
                "its processes use {used} bytes of memory now, more than the new limit of {bytes}"
            )));
        }
    }
    for write in running.groups.plan(limits) {
        write.apply().map_err(|error| match error.kind() {
            io::ErrorKind::ResourceBusy => {
                Unmet::InUse(format!("it uses more now than the new limit allows: {error}"))
            }
            _ => Unmet::Io(error),
        })?;
    }
    let mut raised = true;
    if let (Some(nofile), Some(pid)) = (limits.nofile, Pid::from_raw(running.pid)) {
        // For its first process, whose children inherit it. Its number can't
        // mean another one while it is alive.
        let limit = Rlimit { current: Some(nofile.into()), maximum: Some(nofile.into()) };
        if running.process.is_alive() {
            match rustix::process::prlimit(Some(pid), Resource::Nofile, limit) {
                // A host without CAP_SYS_RESOURCE gives away what it had, and
                // can't give more to who has less.
                Err(rustix::io::Errno::PERM) => raised = false,
                done => drop(done.map_err(io::Error::from)?),
            }
        }
    }
    for (path, bytes, former) in
        [("tmp", limits.tmp_bytes, before.tmp_bytes), ("dev/shm", limits.shm_bytes, before.shm_bytes)]
    {
        if let (Some(bytes), Some(former)) = (bytes, former)
            && bytes != former
        {
            resize(running, path, bytes)?;
        }
    }
    Ok(raised)
}

/// Changes the size of a file system in memory within the project. Its path is
/// the tenant's: no link is followed, and it has to be what it should be.
fn resize(running: &Running, path: &str, bytes: u64) -> Result<(), Unmet> {
    let root = rustix::fs::open(
        Path::new("/proc").join(running.pid.to_string()).join("root"),
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(io::Error::from)?;
    if !running.process.is_alive() {
        return Err(io::Error::from(io::ErrorKind::NotFound).into());
    }
    let directory = rustix::fs::openat2(
        &root,
        path,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS,
    )
    .map_err(io::Error::from)?;
    let kind = rustix::fs::fstatfs(&directory).map_err(io::Error::from)?.f_type;
    if kind != TMPFS_MAGIC {
        return Err(io::Error::other(format!("/{path} is no file system in memory")).into());
    }
    let configure = || {
        let mount = rustix::mount::fspick(
            &directory,
            "",
            FsPickFlags::FSPICK_EMPTY_PATH | FsPickFlags::FSPICK_CLOEXEC,
        )?;
        rustix::mount::fsconfig_set_string(&mount, "size", bytes.to_string())?;
        rustix::mount::fsconfig_reconfigure(&mount)
    };
    configure().map_err(|error| match error {
        // Less than what is in it.
        rustix::io::Errno::INVAL => Unmet::InUse(format!("/{path} holds more than {bytes} bytes now")),
        error => Unmet::Io(io::Error::new(
            io::Error::from(error).kind(),
            format!("could not change the size of /{path}: {error}"),
        )),
    })
}
