//! Building a [`Podman`] runner: what it is told, and what it finds out.

use std::{
    collections::BTreeMap,
    fmt, fs,
    io::Write,
    net::{Ipv4Addr, SocketAddr},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use cocalc_core::{
    BoxError,
    ids::{HostId, ImageDigest, ProjectId},
    runner::{Capabilities, LimitKind, Limits},
};
use sha2::{Digest, Sha256};

use super::{
    Podman, Shared,
    adopt::Adoption,
    cli::{CONTAINERS_CONF, Cli, find_program},
    limits::{Machine, Unenforceable},
    record::Records,
    seccomp,
};
use crate::{
    agent::HELPER,
    kernel::IDS_PER_PROJECT,
    net::{Fences, Network, QUESTIONS_PER_SEC, RESOLVER, Servers, Sockets},
    probe,
};

/// Where image directories are: digest → the root of an image's files.
pub type Images = Arc<dyn Fn(ImageDigest) -> Option<PathBuf> + Send + Sync>;

/// The first host uid of the first project, by default. Above what
/// distributions give to people, services and rootless containers.
pub const UID_BASE: u32 = 0x1000_0000;
/// How many slots a runner has, by default: 67 million ids, and a /22 of
/// addresses.
pub const SLOTS: u32 = 1022;

/// How often podman is asked whether all is as it was left.
const LOOK_AGAIN: Duration = Duration::from_secs(300);
/// Where instances keep what a reboot may take, unless they are told otherwise.
const RUNTIME_PARENT: &str = "/run/cocalc";

/// How a runner could not be made ready.
#[derive(Debug, thiserror::Error)]
#[error("the podman runner could not {what}")]
pub struct BuildError {
    pub(crate) what: String,
    #[source]
    pub(crate) source: BoxError,
}

impl BuildError {
    pub(crate) fn new(what: impl Into<String>, source: impl Into<BoxError>) -> Self {
        Self { what: what.into(), source: source.into() }
    }
}

/// Collects what a [`Podman`] runner needs.
#[must_use]
pub struct PodmanBuilder {
    instance: HostId,
    state_dir: PathBuf,
    images: Images,
    runtime_dir: Option<PathBuf>,
    uid_base: u32,
    slots: u32,
    gateway: Ipv4Addr,
    fences: Fences,
    nameservers: Option<Vec<SocketAddr>>,
    questions_per_sec: u32,
    podman: Option<PathBuf>,
    runtime: Option<String>,
    defaults: Option<Limits>,
    unenforceable: Unenforceable,
    look_again: Duration,
}

impl fmt::Debug for PodmanBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PodmanBuilder")
            .field("instance", &self.instance)
            .field("state_dir", &self.state_dir)
            .finish_non_exhaustive()
    }
}

impl PodmanBuilder {
    pub(super) fn new(instance: HostId, state_dir: PathBuf, images: Images) -> Self {
        Self {
            instance,
            state_dir,
            images,
            runtime_dir: None,
            uid_base: UID_BASE,
            slots: SLOTS,
            gateway: Ipv4Addr::new(100, 100, 0, 1),
            fences: Fences::default(),
            nameservers: None,
            questions_per_sec: QUESTIONS_PER_SEC,
            podman: None,
            runtime: None,
            defaults: None,
            unenforceable: Unenforceable::default(),
            look_again: LOOK_AGAIN,
        }
    }

    /// Where mounts, sockets and network namespaces are held; gone after a
    /// reboot. Default: `/run/cocalc/<instance>`. Every directory above it must
    /// be passable for everybody.
    pub fn runtime_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.runtime_dir = Some(dir.into());
        self
    }

    /// Which of several hosts on this machine this is, from 0: gives it ranges
    /// of uids and addresses of its own, after those of the lower numbers.
    /// Default: 0. Numbers from 56 are beyond both.
    pub fn machine_index(mut self, index: u16) -> Self {
        let index = u32::from(index);
        self.uid_base = UID_BASE.saturating_add(index.saturating_mul(IDS_PER_PROJECT * (SLOTS + 2)));
        let first = Ipv4Addr::new(100, 100, 0, 1).to_bits();
        self.gateway = Ipv4Addr::from_bits(first.saturating_add(index.saturating_mul(1024)));
        self
    }

    /// The first host uid; slot *n* has the 65,536 ids from
    /// `uid_base + n * 65536`. Default: [`UID_BASE`].
    pub fn uid_base(mut self, base: u32) -> Self {
        self.uid_base = base;
        self
    }

    /// How many slots there are. Default: [`SLOTS`].
    pub fn slots(mut self, slots: u32) -> Self {
        self.slots = slots;
        self
    }

    /// The projects' gateway; slot *n* has the address *n + 1* after it.
    /// Default: 100.100.0.1, in the range shared by carriers, which neither the
    /// internet nor most private networks use.
    pub fn gateway(mut self, gateway: Ipv4Addr) -> Self {
        self.gateway = gateway;
        self
    }

    /// What bounds the networks of all projects. Default: all but the host, each
    /// other, and link-local and private networks.
    pub fn fences(mut self, fences: Fences) -> Self {
        self.fences = fences;
        self
    }

    /// How many names a project may ask for in a second, at least one; five times as
    /// many at once, after a pause. What is more gets no answer. Default: 100.
    pub fn questions_per_sec(mut self, questions: u32) -> Self {
        self.questions_per_sec = questions.max(1);
        self
    }

    /// The name servers that are asked for projects. Default: those of the host's
    /// `/etc/resolv.conf`, as it is at each time.
    pub fn nameservers(mut self, servers: Vec<SocketAddr>) -> Self {
        self.nameservers = Some(servers);
        self
    }

    /// The podman to use. Default: the one in the search path.
    pub fn podman(mut self, program: impl Into<PathBuf>) -> Self {
        self.podman = Some(program.into());
        self
    }

    /// The OCI runtime to use. Default: one that works with this machine's
    /// control groups.
    pub fn runtime(mut self, name: impl Into<String>) -> Self {
        self.runtime = Some(name.into());
        self
    }

    /// Limits where a project's own say nothing. Default: a quarter of the
    /// machine's memory but at least 512 MiB, all cores, 4,096 processes and
    /// 8,192 open files.
    pub fn default_limits(mut self, limits: Limits) -> Self {
        self.defaults = Some(limits);
        self
    }

    /// What to do with a project that asks for a limit which this machine can't
    /// enforce. Default: refuse it.
    pub fn unenforceable(mut self, what: Unenforceable) -> Self {
        self.unenforceable = what;
        self
    }

    /// How often podman is asked whether all is as it was left: containers that nobody
    /// here knows, or that somebody else has started. At least a second. Default: five
    /// minutes.
    pub fn look_again(mut self, every: Duration) -> Self {
        self.look_again = every.max(Duration::from_secs(1));
        self
    }

    /// Checks what is needed, sets up what all projects share, and finds the
    /// containers of this instance that are there already.
    ///
    /// A podman that does not answer holds this up for about half a minute. Then the
    /// runner is there all the same: what it has noted to run goes on and is used;
    /// of what may have been started without a note, `status` says
    /// [`Unknown`](cocalc_core::runner::Error::Unknown); and nothing is started or
    /// stopped before podman has said which containers there are, for which it is
    /// asked again and again.
    ///
    /// # Errors
    ///
    /// Whatever is missing, by name; [`crate::probe`] says what mends it.
    pub async fn build(self) -> Result<Podman, BuildError> {
        let missing = |what: &str| {
            BuildError::new(format!("find {what}"), std::io::Error::from(std::io::ErrorKind::NotFound))
        };
        let podman = match self.podman {
            Some(path) => path,
            None => find_program("podman").ok_or_else(|| missing("podman"))?,
        };
        let runtime = match self.runtime {
            Some(name) => name,
            None => {
                probe::working_runtime().ok_or_else(|| missing("an OCI runtime that works here (runc)"))?
            }
        };
        let last = u64::from(self.uid_base) + u64::from(self.slots) * u64::from(IDS_PER_PROJECT);
        if self.uid_base < IDS_PER_PROJECT || last >= u64::from(u32::MAX) || self.slots == 0 {
            let range = format!("{} slots from uid {} leave the range of uids", self.slots, self.uid_base);
            return Err(BuildError::new("use its range of uids", range));
        }
        let runtime_dir =
            self.runtime_dir.unwrap_or_else(|| Path::new(RUNTIME_PARENT).join(self.instance.to_string()));
        if runtime_dir.to_str().is_none_or(|path| path.contains([',', ':', '\\', '"', '\n'])) {
            return Err(BuildError::new("use its runtime directory", "its path has a forbidden character"));
        }

        // podman is not run in this process's directory.
        let absolute =
            |path| std::path::absolute(path).map_err(|error| BuildError::new("find its directories", error));
        let (state_dir, runtime_dir) = (absolute(self.state_dir)?, absolute(runtime_dir)?);
        let records = Records::find(runtime_dir.join("running"));
        let dirs = Dirs::create(&state_dir, &runtime_dir).map_err(|error| {
            BuildError::new(format!("make its directories in {}", runtime_dir.display()), error)
        })?;
        dirs.write_shared().map_err(|error| BuildError::new("write its shared files", error))?;

        let tag = tag(self.instance);
        let network = Network::new(tag, self.fences, self.gateway, self.slots, dirs.networks.clone());
        let network = tokio::task::spawn_blocking(move || network.open().map(|()| network))
            .await
            .map_err(|error| BuildError::new("set up its network", error))?
            .map_err(|error| BuildError::new("set up its network", error))?;
        let sockets = Sockets::start().map_err(|error| BuildError::new("start a thread", error))?;

        let cli = Cli::new(podman, runtime, dirs.containers_conf.clone());
        let machine = Machine::find(self.unenforceable);
        let version =
            cli.version().await.map_err(|error| BuildError::new("ask podman for its version", error))?;
        let answers = version.is_some();
        let capabilities = capabilities(&cli, version, &machine);
        let podman = Podman {
            shared: Arc::new(Shared {
                instance: self.instance,
                cli,
                dirs,
                images: self.images,
                network,
                sockets,
                servers: Arc::new(Servers::new(self.nameservers, self.questions_per_sec)),
                uid_base: self.uid_base,
                slots: self.slots,
                defaults: self.defaults.unwrap_or_else(|| machine.defaults()),
                machine,
                capabilities,
                records,
                adoption: Adoption::default(),
                look_again: self.look_again,
                projects: Mutex::new(BTreeMap::new()),
            }),
        };
        podman.adopt(answers).await;
        Ok(podman)
    }
}

fn capabilities(cli: &Cli, version: Option<String>, machine: &Machine) -> Capabilities {
    let version = version.unwrap_or_else(|| "of a version that it does not say".into());
    let unenforced = machine.unenforced().to_vec();
    let weakness = |kind: &LimitKind| {
        format!("limits of {kind} are not enforced: {}", probe::unenforced_because(*kind).0)
    };
    Capabilities {
        backend: format!("podman {} ({})", version, probe::runtime_version(&cli.runtime)),
        isolation: true,
        // What keeps one project from using up the host.
        limits: ![LimitKind::Memory, LimitKind::Cpu, LimitKind::Pids]
            .iter()
            .any(|kind| unenforced.contains(kind)),
        weaknesses: unenforced.iter().map(weakness).collect(),
        unenforced,
    }
}

/// Six hexadecimal digits of an instance: interfaces have short names.
pub(crate) fn tag(instance: HostId) -> String {
    let hash = Sha256::digest(instance.as_bytes());
    hash.iter().take(3).map(|byte| format!("{byte:02x}")).collect()
}

/// The runner's directories.
#[derive(Debug)]
pub(crate) struct Dirs {
    pub(crate) projects: PathBuf,
    pub(crate) sockets: PathBuf,
    pub(crate) networks: PathBuf,
    pub(crate) logs: PathBuf,
    pids: PathBuf,
    pub(crate) environments: PathBuf,
    pub(crate) helper: PathBuf,
    pub(crate) resolv_conf: PathBuf,
    pub(crate) containers_conf: PathBuf,
    pub(crate) seccomp: PathBuf,
}

impl Dirs {
    fn create(state: &Path, runtime: &Path) -> std::io::Result<Self> {
        let dirs = Self {
            projects: runtime.join("projects"),
            sockets: runtime.join("sockets"),
            networks: runtime.join("networks"),
            logs: state.join("logs"),
            pids: runtime.join("pids"),
            environments: state.join("env"),
            helper: runtime.join("helper"),
            resolv_conf: runtime.join("resolv.conf"),
            containers_conf: runtime.join("containers.conf"),
            seccomp: runtime.join("seccomp.json"),
        };
        fs::DirBuilder::new().recursive(true).mode(0o711).create(runtime)?;
        fs::DirBuilder::new().recursive(true).mode(0o700).create(state)?;
        for (dir, mode) in [
            (&dirs.projects, 0o711),
            (&dirs.sockets, 0o700),
            (&dirs.networks, 0o700),
            (&dirs.pids, 0o700),
            (&runtime.join("running"), 0o700),
            (&dirs.logs, 0o700),
            (&dirs.environments, 0o700),
        ] {
            fs::DirBuilder::new().recursive(true).mode(mode).create(dir)?;
            fs::set_permissions(dir, fs::Permissions::from_mode(mode))?;
        }
        // The runtime enters as the project's root, who is nobody here.
        fs::set_permissions(runtime, fs::Permissions::from_mode(0o711))?;
        // The default's parent is ours as well, and may have been made by
        // somebody who wanted it for nobody else.
        if let Some(parent) = runtime.parent().filter(|parent| *parent == Path::new(RUNTIME_PARENT)) {
            let mode = fs::metadata(parent)?.permissions().mode();
            if mode & 0o011 != 0o011 {
                fs::set_permissions(parent, fs::Permissions::from_mode(mode & 0o7777 | 0o011))?;
            }
        }
        Ok(dirs)
    }

    /// Where the numbers of first processes are left.
    pub(crate) fn pids(&self) -> &Path {
        &self.pids
    }

    /// Where the number of a project's first process is left when it starts.
    pub(crate) fn pid_file(&self, project: ProjectId) -> PathBuf {
        self.pids.join(project.to_string())
    }

    /// The number of a project's first process, as it was left when it was made.
    pub(crate) fn pid(&self, project: ProjectId) -> Option<i32> {
        std::fs::read_to_string(self.pid_file(project)).ok()?.trim().parse().ok()
    }

    fn write_shared(&self) -> std::io::Result<()> {
        // A helper that runs is another file: a new name, then a rename.
        if fs::read(&self.helper).ok().as_deref() != Some(HELPER) {
            write_file(&self.helper, HELPER, 0o555)?;
        }
        write_file(&self.resolv_conf, format!("nameserver {RESOLVER}\n").as_bytes(), 0o444)?;
        write_file(&self.seccomp, seccomp::profile().to_string().as_bytes(), 0o444)?;
        write_file(&self.containers_conf, CONTAINERS_CONF.as_bytes(), 0o444)
    }
}

pub(super) fn write_file(path: &Path, bytes: &[u8], mode: u32) -> std::io::Result<()> {
    let draft = path.with_extension("new");
    let _ = fs::remove_file(&draft);
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&draft)?;
    file.write_all(bytes)?;
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    drop(file);
    fs::rename(draft, path)
}
