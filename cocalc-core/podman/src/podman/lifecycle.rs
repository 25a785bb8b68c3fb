//! Bringing a project up and down.

use std::{
    io::{self, Read, Seek},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use cocalc_core::{
    BoxError,
    ids::{ProjectId, Timestamp},
    runner::{Error, Limits, NetworkPolicy, ProjectSpec, Result, State, Status},
};
use rustix::process::Signal;
use sha2::{Digest, Sha256};

use super::{
    Shared, backend, blocking,
    end::{End, Exit},
    project::{InPhase, Project, Running},
    record::{Record, Run},
};
use crate::{agent, mounts, net::Resolver};

/// What root in a project may do there: what installing packages and running
/// services needs, and nothing about the kernel, devices or the network's
/// configuration.
const CAPABILITIES: &str = "CHOWN,DAC_OVERRIDE,FOWNER,FSETID,KILL,SETGID,SETUID,SETPCAP,\
    NET_BIND_SERVICE,SYS_CHROOT,SETFCAP,AUDIT_WRITE";
/// Where secrets are seen inside.
const SECRETS_INSIDE: &str = "/run/secrets";
/// Where the helper is seen inside: in `/dev`, so that nothing of it remains in
/// the project's files.
pub(super) const HELPER_INSIDE: &str = "/dev/cocalc-init";
/// How long the kernel may take to end processes that were killed.
const KILL_LIMIT: Duration = Duration::from_secs(30);
/// How long podman may take to notice the end of a container, and how often it is
/// asked whether it has.
const NOTICE_LIMIT: Duration = Duration::from_secs(5);
const NOTICE_AGAIN: Duration = Duration::from_millis(200);
/// How long podman waits at most for what it stops, in seconds.
const GRACE_MAX: u64 = 30;
/// How much of a log is read for its last lines, in bytes.
const LOG_BYTES_READ: u64 = super::limits::DEFAULT_LOG;

pub(super) const LABEL_INSTANCE: &str = "cocalc.instance";
pub(super) const LABEL_PROJECT: &str = "cocalc.project";
pub(super) const LABEL_EPOCH: &str = "cocalc.epoch";
pub(super) const LABEL_SLOT: &str = "cocalc.slot";
pub(super) const LABEL_SPEC: &str = "cocalc.spec";
/// What the container was made with, for a daemon that finds it.
pub(super) const LABEL_LIMITS: &str = "cocalc.limits";

impl Shared {
    pub(super) async fn prepare(&self, spec: ProjectSpec) -> Result<()> {
        self.adopted(spec.project).await?;
        let entry = self.entry(spec.project);
        let _operation = entry.operation.lock().await;
        if entry.running().is_some() {
            return Ok(());
        }
        self.certain(&entry)?;
        let spec = self.with_slot(&entry, spec).await?;
        self.ready(&entry, &spec).await
    }

    /// Makes everything but the mounts, which exist only while it runs.
    async fn ready(&self, entry: &Project, spec: &ProjectSpec) -> Result<()> {
        let project = spec.project;
        self.image(spec)?;
        agent::check_env(spec)?;
        let limits = self.machine.settle(project, &spec.limits, &self.defaults)?;
        let wanted = fingerprint(spec, &limits);
        entry.view().limits = limits.clone();
        let former = entry.view().made_from.clone();
        self.create_network(spec).await?;
        let (dirs, uid) = (self.mounts(project), self.uid(spec.slot));
        blocking("make directories for", project, move || dirs.create(uid)).await?;
        if former.as_deref() == Some(&wanted) {
            return Ok(());
        }
        if former.is_some() {
            self.remove_container(project).await?;
            entry.view().made_from = None;
        }
        let created = match self.cli.run(self.create_args(spec, &limits, &wanted)).await {
            Err(error) if error.to_string().contains("already in use") => {
                // Left by a process that died between making and noting it.
                self.remove_container(project).await?;
                self.cli.run(self.create_args(spec, &limits, &wanted)).await
            }
            other => other,
        };
        let id = created.map_err(|error| backend("create", project, error))?.trim().to_owned();
        let mut view = entry.view();
        (view.made_from, view.container) = (Some(wanted), Some(id));
        Ok(())
    }

    pub(super) async fn start(&self, spec: ProjectSpec) -> Result<Status> {
        let project = spec.project;
        self.adopted(project).await?;
        let entry = self.entry(project);
        let _operation = entry.operation.lock().await;
        if entry.running().is_some() {
            let running = entry.view().epoch;
            return match running {
                Some(epoch) if epoch == spec.epoch => Ok(entry.status()),
                _ => Err(Error::Busy { project, reason: "it runs under another epoch".into() }),
            };
        }
        self.certain(&entry)?;
        let phase = InPhase::new(&entry, State::Starting);
        let mut receipt = Receipt::new();
        let spec = self.with_slot(&entry, spec).await?;
        self.ready(&entry, &spec).await?;
        receipt.done("container");
        self.write_env(&spec).map_err(|error| backend("start", project, error))?;
        entry.view().env = Arc::new(spec.env.clone());
        self.resolve(&entry, spec.slot, &spec.isolation.network).await?;
        self.mount(&spec).await?;
        receipt.done("mounts");
        let started = match self.launch(&entry, &spec, &mut receipt).await {
            Err(error) if error.missing => {
                // Somebody removed the container behind our back.
                entry.view().made_from = None;
                match self.ready(&entry, &spec).await {
                    Ok(()) => self.launch(&entry, &spec, &mut receipt).await.map_err(|error| error.error),
                    Err(error) => Err(error),
                }
            }
            other => other.map_err(|error| error.error),
        };
        if let Err(error) = started {
            // What was half started must not write to the volume any more.
            let stopped = self.cli.run(["stop", "--ignore", "--time", "0", &self.container(project)]).await;
            if let Err(error) = stopped {
                let error = cocalc_core::chain(&error);
                self.doubt(&entry, format!("its start broke off, and podman does not end it: {error}"));
                self.look_at(&entry).await;
            }
            if entry.doubt().is_none() {
                self.end_keepers(project).await;
                self.records.forget(project);
                self.unmount(project).await?;
            }
            return Err(error);
        }
        entry.view().phases = receipt.phases;
        drop(phase);
        Ok(entry.status())
    }

    async fn launch(&self, entry: &Project, spec: &ProjectSpec, receipt: &mut Receipt) -> Result<(), Launch> {
        let project = spec.project;
        let failed = |error| Launch { missing: false, error };
        let name = self.container(project);
        let listener = self
            .socket(project)
            .and_then(|socket| socket.bind())
            .map_err(|error| failed(backend("start", project, error)))?;
        let mut record = {
            let view = entry.view();
            let (limits, made_from) = (view.limits.clone(), view.made_from.clone());
            Record { epoch: spec.epoch, slot: spec.slot, limits, made_from, run: None }
        };
        // Before it runs: a daemon that is killed now, and finds a podman that hangs,
        // knows that it may.
        self.records.write(project, &record).map_err(|error| failed(backend("start", project, error)))?;
        // The log is of this run; what conmon appends begins anew.
        let _ = std::fs::remove_file(self.dirs.logs.join(format!("{project}.log")));
        let _ = std::fs::remove_file(self.dirs.pid_file(project));
        self.cli.start(&name, listener).await.map_err(|error| Launch {
            missing: error.is_missing(),
            error: backend("start", project, error),
        })?;
        let started = Some(Timestamp::now());
        receipt.done("podman start");
        let running = self.first_process(entry, &name).await.map_err(failed)?;
        // Weights: podman has no option for all of them.
        let limits = entry.view().limits.clone();
        for write in running.groups.plan(&limits) {
            write.apply().map_err(|error| failed(backend("limit", project, error)))?;
        }
        record.run = Some(Run { container: running.container.clone(), pid: running.pid, started });
        self.records.write(project, &record).map_err(|error| failed(backend("start", project, error)))?;
        receipt.done("first process");
        let mut view = entry.view();
        view.epoch = Some(spec.epoch);
        view.running = Some(running);
        view.started = started;
        view.reason = None;
        Ok(())
    }

    /// The first process of a container that was started just now: conmon has left
    /// its number in a file. Asking podman for it would take a quarter of a start.
    async fn first_process(&self, entry: &Project, name: &str) -> Result<Arc<Running>> {
        let project = entry.id;
        let failed = |error: BoxError| backend("start", project, error);
        let id = entry.view().container.clone();
        if let (Some(pid), Some(id)) = (self.dirs.pid(project), id)
            && let Some(running) = Running::of(pid, &id).map_err(|error| failed(error.into()))?
        {
            return Ok(running);
        }
        let found = self.cli.inspect(&[name.to_owned()]).await.map_err(|error| failed(error.into()))?;
        let container = found.first().ok_or_else(|| failed("its container is gone".into()))?;
        let running = Running::find(container, []).map_err(|error| failed(error.into()))?;
        running.ok_or_else(|| {
            let end = container.exit.clone().map(|exit| End { exit: Some(exit), ..End::default() });
            failed(end.map_or_else(|| "its first process ended at once".into(), |end| end.words()).into())
        })
    }

    pub(super) async fn stop(&self, project: ProjectId, grace: Duration) -> Result<Status> {
        self.adopted(project).await?;
        let Some(entry) = self.known(project) else { return Ok(unknown(project)) };
        let _operation = entry.operation.lock().await;
        if entry.doubt().is_some() {
            // Nobody minds if it ran.
            let (name, secs) = (self.container(project), grace.as_secs().min(GRACE_MAX).to_string());
            if self.cli.run(["stop", "--ignore", "--time", &secs, &name]).await.is_ok() {
                self.look_at(&entry).await;
            }
            self.certain(&entry)?;
        }
        self.stop_locked(&entry, grace).await?;
        Ok(entry.status())
    }

    pub(super) async fn stop_locked(&self, entry: &Project, grace: Duration) -> Result<()> {
        let project = entry.id;
        let _phase = InPhase::new(entry, State::Stopping);
        let running = entry.view().running.clone();
        if let Some(running) = running {
            let io = |error| backend("stop", project, error);
            if running.process.is_alive() {
                if !grace.is_zero() {
                    running.process.signal(Signal::TERM);
                }
                if grace.is_zero() || !running.process.ended(grace).await.map_err(io)? {
                    running.process.signal(Signal::KILL);
                    if !running.process.ended(KILL_LIMIT).await.map_err(io)? {
                        return Err(Error::TimedOut { project, operation: "killing", limit: KILL_LIMIT });
                    }
                }
            } else {
                self.note_reason(entry).await;
            }
            entry.view().running = None;
        }
        entry.view().resolver = None;
        // podman has to notice, and to let go of what it holds. It also ends
        // what this process does not know of.
        if entry.view().made_from.is_some() {
            let name = self.container(project);
            self.cli
                .run(["stop", "--ignore", "--time", "0", &name])
                .await
                .map_err(|error| backend("stop", project, error))?;
        }
        self.records.forget(project);
        if let Ok(socket) = self.socket(project) {
            socket.unlink();
        }
        self.unmount(project).await
    }

    pub(super) async fn remove(&self, project: ProjectId) -> Result<()> {
        // Also if it is unknown: a removal that was cut off has taken the
        // container, by which projects are found again, and left the rest.
        self.adopted(project).await?;
        let entry = self.entry(project);
        let _operation = entry.operation.lock().await;
        self.certain(&entry)?;
        self.stop_locked(&entry, Duration::ZERO).await?;
        self.remove_container(project).await?;
        let slot = entry.view().slot;
        self.remove_network(project, slot).await?;
        let dirs = self.mounts(project);
        blocking("remove", project, move || dirs.remove()).await?;
        let _ = std::fs::remove_file(self.dirs.logs.join(format!("{project}.log")));
        let _ = std::fs::remove_file(self.env_path(project));
        let _ = std::fs::remove_file(self.dirs.pid_file(project));
        *entry.view() = super::project::View::default();
        // Under the operation's lock: who waits for it finds an empty entry,
        // and may fill it again.
        if Arc::strong_count(&entry) <= 2 {
            self.projects().remove(&project);
        }
        Ok(())
    }

    pub(super) async fn status(&self, project: ProjectId) -> Result<Status> {
        let Some(entry) = self.known(project) else {
            return self.is_known_stopped(project).map(|()| unknown(project));
        };
        if entry.is_at_rest() {
            self.certain(&entry)?;
        }
        let died = {
            let view = entry.view();
            view.phase.is_none()
                && view.reason.is_none()
                && view.running.as_ref().is_some_and(|running| !running.process.is_alive())
        };
        if died {
            self.note_reason(&entry).await;
        }
        Ok(entry.status())
    }

    /// Finds out how the first process ended.
    async fn note_reason(&self, entry: &Project) {
        let Some(running) = entry.view().running.clone().filter(|running| !running.process.is_alive()) else {
            return;
        };
        let exit = self.exit(entry.id).await;
        let ended = Arc::clone(&running);
        let end = tokio::task::spawn_blocking(move || ended.end(exit)).await;
        let mut view = entry.view();
        // A start since then has made a new one.
        if view.running.as_ref().is_some_and(|now| Arc::ptr_eq(now, &running)) {
            view.reason = Some(end.unwrap_or_default().words());
        }
    }

    /// Asks podman how a first process ended, until it has noticed the end itself.
    async fn exit(&self, project: ProjectId) -> Option<Exit> {
        let name = self.container(project);
        let begun = std::time::Instant::now();
        loop {
            let found = self.cli.inspect_quickly(&name).await.ok()?.into_iter().next()?;
            if found.exit.is_some() || begun.elapsed() >= NOTICE_LIMIT {
                return found.exit;
            }
            tokio::time::sleep(NOTICE_AGAIN).await;
        }
    }

    /// The arguments that make the container of a project.
    fn create_args(&self, spec: &ProjectSpec, limits: &Limits, fingerprint: &str) -> Vec<String> {
        let project = spec.project;
        let dirs = self.mounts(project);
        let uid = self.uid(spec.slot);
        let log = self.dirs.logs.join(format!("{project}.log"));
        let short: String = project.to_string().chars().take(8).collect();
        let mut args: Vec<String> = vec!["create".into()];
        let mut option = |name: &str, value: String| {
            args.push(format!("--{name}"));
            args.push(value);
        };
        option("name", self.container(project));
        option("label", super::cleanup::label(self.instance));
        option("label", format!("{LABEL_PROJECT}={project}"));
        option("label", format!("{LABEL_EPOCH}={}", spec.epoch));
        option("label", format!("{LABEL_SLOT}={}", spec.slot));
        option("label", format!("{LABEL_SPEC}={fingerprint}"));
        option("label", format!("{LABEL_LIMITS}={}", serde_json::to_string(limits).unwrap_or_default()));
        let map = format!("0:{uid}:{}", crate::kernel::IDS_PER_PROJECT);
        option("uidmap", map.clone());
        option("gidmap", map);
        option("cap-drop", "all".into());
        option("cap-add", CAPABILITIES.into());
        option("security-opt", format!("seccomp={}", self.dirs.seccomp.display()));
        // The network namespace is not of the project's user namespace, so `/sys`
        // would be the host's: its devices, every project's cable, control group
        // and quota. What programs look for there is the processors and the pages.
        option("mount", "type=tmpfs,destination=/sys,tmpfs-size=64k,tmpfs-mode=0555,ro=true".into());
        for part in ["/sys/devices/system", "/sys/kernel/mm"] {
            option("mount", format!("type=bind,source={part},destination={part},ro=true"));
        }
        option("cgroupns", "private".into());
        option("network", format!("ns:{}", self.network.path(project).display()));
        option("hostname", format!("project-{short}"));
        option("volume", format!("{}:{HELPER_INSIDE}:ro", self.dirs.helper.display()));
        option("volume", format!("{}:/home/user", dirs.home().display()));
        // Memory that is the user's alone: what the master keeps as secrets is
        // here and nowhere else, neither in the volume nor known to podman.
        option("tmpfs", format!("{SECRETS_INSIDE}:rw,nosuid,nodev,noexec,size=1m,mode=0700"));
        option("volume", format!("{}:/etc/resolv.conf:ro", self.dirs.resolv_conf.display()));
        option("pidfile", self.dirs.pid_file(project).display().to_string());
        option("log-driver", "k8s-file".into());
        option("log-opt", format!("path={}", log.display()));
        option("log-opt", format!("max-size={}", limits.log_bytes.unwrap_or(super::limits::DEFAULT_LOG)));
        option("stop-signal", "TERM".into());
        // Explicit: podman would ask for more than this process may give.
        let hard = |resource| rustix::process::getrlimit(resource).maximum.unwrap_or(1 << 20);
        let nofile = limits.nofile.map_or(8192, u64::from);
        let nofile = nofile.min(hard(rustix::process::Resource::Nofile));
        option("ulimit", format!("nofile={nofile}:{nofile}"));
        // podman's own children are limited to 32,768 before they get there; what
        // bounds a project is the limit of its control group.
        let nproc = hard(rustix::process::Resource::Nproc).min(32_000);
        option("ulimit", format!("nproc={nproc}:{nproc}"));
        option("ulimit", "core=0:0".into());
        if let Some(pids) = limits.pids {
            option("pids-limit", pids.to_string());
        }
        if let Some(bytes) = limits.memory_bytes {
            option("memory", bytes.to_string());
            if let Some(swap) = limits.swap_bytes {
                option("memory-swap", bytes.saturating_add(swap).to_string());
            }
        }
        if let Some(millis) = limits.cpu_millis {
            option("cpus", format!("{}.{:03}", millis / 1000, millis % 1000));
        }
        if let Some(bytes) = limits.shm_bytes {
            option("shm-size", bytes.to_string());
        }
        if let Some(bytes) = limits.tmp_bytes {
            let options = "rw,exec,nosuid,nodev,notmpcopyup,mode=1777";
            option("tmpfs", format!("/tmp:{options},size={bytes}"));
        }
        if spec.isolation.strict {
            option("security-opt", "no-new-privileges".into());
        }
        args.extend(["--no-hosts".into(), "--rootfs".into(), dirs.root().display().to_string()]);
        args.push(HELPER_INSIDE.into());
        args
    }

    async fn mount(&self, spec: &ProjectSpec) -> Result<()> {
        let (image, digest) = self.image(spec)?;
        let dirs = self.mounts(spec.project);
        let (volume, uid) = (spec.volume.clone(), self.uid(spec.slot));
        blocking("mount", spec.project, move || dirs.mount(&image, &volume, &digest, uid)).await
    }

    async fn unmount(&self, project: ProjectId) -> Result<()> {
        let dirs = self.mounts(project);
        blocking("unmount", project, move || dirs.unmount()).await
    }

    /// The files of a project's image, and its name.
    fn image(&self, spec: &ProjectSpec) -> Result<(PathBuf, String)> {
        let project = spec.project;
        let digest = spec
            .image
            .ok_or_else(|| Error::Invalid { project, reason: "this runner needs an image".into() })?;
        let path = (self.images)(digest).ok_or(Error::NoImage { project, digest })?;
        Ok((path, digest.to_string()))
    }

    pub(super) async fn remove_container(&self, project: ProjectId) -> Result<()> {
        let name = self.container(project);
        match self.cli.run(["rm", "--force", "--ignore", "--time", "0", &name]).await {
            Err(error) if !error.is_missing() => return Err(backend("remove", project, error)),
            _ => {}
        }
        self.end_keepers(project).await;
        Ok(())
    }
}

impl Shared {
    fn env_path(&self, project: ProjectId) -> PathBuf {
        self.dirs.environments.join(format!("{project}.json"))
    }

    /// Keeps the environment for a restarted daemon. Not as a label of the
    /// container, which every user of podman can read.
    fn write_env(&self, spec: &ProjectSpec) -> io::Result<()> {
        let text = serde_json::to_vec(&spec.env)?;
        super::builder::write_file(&self.env_path(spec.project), &text, 0o600)
    }

    pub(super) fn read_env(&self, project: ProjectId) -> std::collections::BTreeMap<String, String> {
        let text = std::fs::read(self.env_path(project)).unwrap_or_default();
        serde_json::from_slice(&text).unwrap_or_default()
    }

    async fn create_network(&self, spec: &ProjectSpec) -> Result<()> {
        // The network outlives the caller only as files; a clone of its
        // settings is cheap.
        let network = self.network.clone();
        let (project, slot, policy) = (spec.project, spec.slot, spec.isolation.network.clone());
        blocking("connect", project, move || network.create(project, slot, &policy)).await
    }

    /// Starts the resolver of a project, whose network is there.
    pub(super) async fn resolve(&self, entry: &Project, slot: u32, policy: &NetworkPolicy) -> Result<()> {
        // The former one has the address.
        entry.view().resolver = None;
        let resolver = Resolver::start(&self.network, &self.sockets, &self.servers, entry.id, slot, policy)
            .await
            .map_err(|error| backend("resolve names for", entry.id, error))?;
        entry.view().resolver = resolver.map(Arc::new);
        Ok(())
    }

    /// The number is that which it is known to have, and else the one that its network
    /// was made with, unless another project has that by now.
    pub(super) async fn remove_network(&self, project: ProjectId, slot: Option<u32>) -> Result<()> {
        let network = self.network.clone();
        let entry = self.entry(project);
        let left = || self.network.slot(project).filter(|slot| !self.is_taken(&entry, *slot));
        let slot = slot.or_else(left);
        blocking("disconnect", project, move || network.remove(project, slot)).await
    }
}

/// What a start has done, and how long each step took, in milliseconds.
struct Receipt {
    since: std::time::Instant,
    phases: Vec<(String, u64)>,
}

impl Receipt {
    fn new() -> Self {
        Self { since: std::time::Instant::now(), phases: Vec::new() }
    }

    /// A step is done, since the one before.
    fn done(&mut self, step: &str) {
        let millis = u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.phases.push((step.to_owned(), millis));
        self.since = std::time::Instant::now();
    }
}

/// Why a start failed, and whether because the container is gone.
struct Launch {
    missing: bool,
    error: Error,
}

fn unknown(project: ProjectId) -> Status {
    Status { project, epoch: None, state: State::Stopped, started: None, reason: None }
}

/// What the container is made from: a change makes another one.
fn fingerprint(spec: &ProjectSpec, limits: &Limits) -> String {
    let ProjectSpec { project: _, epoch, volume: _, image, slot, limits: _, env: _, isolation } = spec;
    // The number in front changes with the arguments of `create_args`.
    let text = format!("5 {epoch} {image:?} {slot} {limits:?} {isolation:?}");
    Sha256::digest(text.as_bytes()).iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

/// The last lines of a log as conmon writes it: time, stream, flag, text.
pub(super) fn read_log(path: &Path, lines: usize) -> io::Result<String> {
    let mut file = match std::fs::File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(String::new()),
        other => other?,
    };
    let length = file.metadata()?.len();
    file.seek(io::SeekFrom::Start(length.saturating_sub(LOG_BYTES_READ)))?;
    let mut bytes = Vec::new();
    file.take(LOG_BYTES_READ).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<&str> = text.lines().map(|line| line.splitn(4, ' ').nth(3).unwrap_or(line)).collect();
    let last = &all[all.len().saturating_sub(lines)..];
    Ok(last.iter().flat_map(|line| [*line, "\n"]).collect())
}

/// The mount points below a directory, the earliest first.
pub(super) fn mounts_below(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let table = std::fs::read_to_string("/proc/self/mountinfo")?;
    let all = table.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    Ok(all.filter(|path| path.starts_with(directory)).collect())
}

/// Unmounts everything below a directory.
pub(super) fn unmount_below(directory: &Path) -> io::Result<()> {
    // The latest first: it may cover the others.
    mounts_below(directory)?.iter().rev().try_for_each(|path| mounts::unmount(path))
}
