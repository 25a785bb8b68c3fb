//! What runs where: directories, ports, names, and which backends.

use std::path::{Path, PathBuf};

use crate::{
    args::{RunnerKind, StorageKind, UpOptions},
    failure::{Exit, Failure},
};

/// Names of the hosts, in order; after these, `host<i>`.
const HOST_NAMES: [&str; 6] = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"];

/// The whole federation, decided before anything is made.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) dir: PathBuf,
    pub(crate) base_port: u16,
    pub(crate) hosts: Vec<HostPlan>,
    pub(crate) btrfs: bool,
    pub(crate) podman: bool,
    /// What is weaker than it could be, and why, for people.
    pub(crate) weaker: Vec<String>,
}

/// One host.
#[derive(Clone, Debug)]
pub(crate) struct HostPlan {
    pub(crate) name: String,
    pub(crate) dir: PathBuf,
    pub(crate) port: u16,
}

impl HostPlan {
    pub(crate) fn image_file(&self) -> PathBuf {
        self.dir.join("volume.btrfs")
    }

    pub(crate) fn volume(&self) -> PathBuf {
        self.dir.join("volume")
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    pub(crate) fn config(&self) -> PathBuf {
        self.dir.join("host.toml")
    }
}

impl Plan {
    /// Decides, from what was asked and what this machine can do.
    ///
    /// # Errors
    ///
    /// What was asked for by name but cannot be had, and how to get it.
    pub(crate) fn new(options: &UpOptions, dir: PathBuf) -> Result<Self, Failure> {
        let mut weaker = Vec::new();
        let btrfs = decide(
            options.storage == StorageKind::Btrfs,
            options.storage == StorageKind::Auto,
            loopback_lack(),
            "directory storage: no quotas, no delta moves, snapshots are copies",
            &mut weaker,
        )?;
        let podman = decide(
            options.runner == RunnerKind::Podman,
            options.runner == RunnerKind::Auto,
            if btrfs { podman_lack() } else { Some("podman projects need Btrfs volumes here".into()) },
            "process runner: projects are plain processes of this user, without isolation or limits",
            &mut weaker,
        )?;
        let hosts = (0..options.hosts)
            .map(|index| {
                let name = HOST_NAMES
                    .get(usize::from(index))
                    .map_or_else(|| format!("host{}", index + 1), |name| (*name).to_owned());
                HostPlan {
                    dir: dir.join("hosts").join(&name),
                    name,
                    port: options.base_port + 10 * (index + 1),
                }
            })
            .collect();
        Ok(Self { dir, base_port: options.base_port, hosts, btrfs, podman, weaker })
    }

    pub(crate) fn master_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.base_port)
    }

    pub(crate) fn proxy_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.base_port + 1)
    }

    pub(crate) fn proxy_ssh(&self) -> String {
        format!("127.0.0.1:{}", self.base_port + 2)
    }

    pub(crate) fn master_dir(&self) -> PathBuf {
        self.dir.join("master")
    }

    pub(crate) fn proxy_dir(&self) -> PathBuf {
        self.dir.join("proxy")
    }

    /// Where each project has its repository of backups.
    pub(crate) fn backups(&self) -> PathBuf {
        self.dir.join("backups")
    }

    pub(crate) fn logs(&self) -> PathBuf {
        self.dir.join("log")
    }

    /// Every port that must be free.
    pub(crate) fn ports(&self) -> Vec<u16> {
        let mut ports: Vec<u16> = (0..3).map(|i| self.base_port + i).collect();
        for host in &self.hosts {
            ports.extend((0..3).map(|i| host.port + i));
        }
        ports
    }
}

fn decide(
    wanted: bool,
    auto: bool,
    lack: Option<String>,
    instead: &str,
    weaker: &mut Vec<String>,
) -> Result<bool, Failure> {
    match lack {
        None if wanted || auto => Ok(true),
        Some(lack) if wanted => Err(Failure::new(Exit::Usage, lack)),
        Some(lack) if auto => {
            weaker.push(format!("{instead} ({lack})"));
            Ok(false)
        }
        _ => {
            weaker.push(instead.to_owned());
            Ok(false)
        }
    }
}

/// Why there can be no loopback Btrfs here, and what mends it.
fn loopback_lack() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("Btrfs volumes need root".into());
    }
    btrfs_lack()
}

/// What keeps this machine from making Btrfs volumes, and what mends it.
pub(crate) fn btrfs_lack() -> Option<String> {
    let kernel = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if !kernel.split_whitespace().any(|word| word == "btrfs") {
        return Some("the kernel has no Btrfs: modprobe btrfs".into());
    }
    if !Path::new("/dev/loop-control").exists() {
        return Some("there are no loop devices: modprobe loop".into());
    }
    let on_path = |name: &str| {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).any(|dir| dir.join(name).is_file())
    };
    let missing = ["mkfs.btrfs", "btrfs"].into_iter().find(|name| !on_path(name))?;
    Some(format!("{missing} is missing: apt-get install -y btrfs-progs"))
}

/// Why podman cannot be used here, and what mends it.
fn podman_lack() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("containers with a user id range of their own need root".into());
    }
    let lack = cocalc_podman::probe().lacks.into_iter().find(|lack| !lack.optional)?;
    Some(if lack.mend.is_empty() { lack.what } else { format!("{}: {}", lack.what, lack.mend) })
}

/// Where images are kept between runs, outside any federation's directory.
pub(crate) fn image_cache() -> PathBuf {
    if let Some(dir) = std::env::var_os("COCALC_IMAGE_CACHE") {
        return dir.into();
    }
    if rustix::process::geteuid().is_root() {
        return "/var/cache/cocalc".into();
    }
    let home = std::env::var_os("HOME").map_or_else(std::env::temp_dir, PathBuf::from);
    std::env::var_os("XDG_CACHE_HOME").map_or(home.join(".cache"), PathBuf::from).join("cocalc")
}

/// A daemon's program: beside this one, as cargo and packages install them.
pub(crate) fn program(name: &str) -> Result<PathBuf, Failure> {
    let this = std::env::current_exe()?;
    let program = this.parent().unwrap_or(Path::new(".")).join(name);
    if program.is_file() {
        return Ok(program);
    }
    Err(Failure::failed(format!(
        "{} is missing: build all daemons with `cargo build --workspace --bins`",
        program.display()
    )))
}
