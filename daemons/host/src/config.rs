//! A host's configuration.

use std::{net::SocketAddr, num::NonZeroU32, path::PathBuf, time::Duration};

use cocalc_backup::Bounds;
use cocalc_core::{activity::IdlePolicy, ids::HostName, runner::Network, snapshots::Policy};
use cocalc_daemon::{acme::AcmeSettings, ending::Drain};
use cocalc_http::{HttpSettings, TerminalLimits};
use cocalc_ssh::HostKeyType;
use serde::Deserialize;

use crate::{images::ImageSettings, limits::HostLimits};

/// What a host is told. Every key is also `COCALC_HOST_<KEY>`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Its name in the federation.
    pub name: HostName,
    /// The master's address, for instance `https://cocalc.example.org`.
    pub master_url: String,
    /// The file with the one-use token; needed until the host has joined.
    pub join_token_file: Option<PathBuf>,
    /// Where it keeps its key, grants and cache. Not on the project volume.
    pub data_dir: PathBuf,
    /// Where it serves HTTP.
    pub listen: SocketAddr,
    /// Where it serves SSH.
    pub ssh_listen: SocketAddr,
    /// Where it serves its peers: other hosts, and proxies.
    pub peer_listen: SocketAddr,
    /// The types of SSH host keys that it has beside Ed25519: `rsa` (3072 bits)
    /// and `ecdsa` (P-256), for clients that know nothing newer. Default: `rsa`,
    /// of which nobody complains.
    #[serde(default = "more_host_keys")]
    pub ssh_more_host_keys: Vec<HostKeyType>,
    /// The file with the chain of certificates for `listen`, in PEM, the
    /// server's own first; with `tls_key`. Read again when it changes, within
    /// 10 s. Default: none, plain HTTP.
    pub tls_cert: Option<PathBuf>,
    /// The file with the certificate's private key, in PEM.
    pub tls_key: Option<PathBuf>,
    /// How users reach `listen`. Default: `http://<listen>`, or `https://` where
    /// there is a certificate.
    pub public_url: Option<String>,
    /// How users reach `ssh_listen`, as `host:port`. Default: `ssh_listen`.
    pub public_ssh: Option<String>,
    /// How peers reach `peer_listen`, as `host:port`. Default: `peer_listen`.
    pub public_peer: Option<String>,
    /// Its certificate by ACME, instead of files. Default: no.
    #[serde(default)]
    pub acme: AcmeSettings,
    /// How it ends.
    #[serde(default)]
    pub drain: Drain,
    /// The domain under which each project has its own origin, with the port
    /// if it is not the scheme's own. Default: none, path routing only.
    #[serde(default)]
    pub domain: String,
    /// What keeps the projects' files.
    pub storage: StorageKind,
    /// The mounted volume, or the directory.
    pub volume: PathBuf,
    /// What runs the projects.
    pub runner: RunnerKind,
    /// A root file system as tar, imported at the first start: the default
    /// image of this host.
    pub default_image_tar: Option<PathBuf>,
    /// How fast snapshots leave this host in moves, all together, in bytes per
    /// second. Default: 0, as fast as it goes.
    #[serde(default)]
    pub transfer_bytes_per_sec: u64,
    /// How long a project that has moved away keeps its files here as undo, in
    /// hours; at most a year. Default: 24.
    #[serde(default = "day")]
    pub undo_hours: u64,
    /// A number that no other host on this machine has, from 0: user id
    /// ranges and networks follow from it.
    #[serde(default)]
    pub machine_slot: u16,
    /// Automatic snapshots of projects whose owner has said nothing else.
    #[serde(default)]
    pub snapshots: Policy,
    /// How many projects are looked at in a second, at most, to take their
    /// snapshots; 1 to 1000.
    #[serde(default = "visits_per_sec")]
    pub snapshot_visits_per_sec: u16,
    /// What to do with a project that asks for a limit which this machine can't
    /// enforce: `refuse` it, or `accept` it without that limit. `doctor` says
    /// which those are. Default: refuse.
    #[serde(default)]
    pub unenforceable_limits: UnenforceableLimits,
    /// Whether plain processes (`runner = "process"`) lose their capabilities and,
    /// where the kernel has Landlock, are kept to their homes and the system's
    /// directories. Default: no, they may do what this host's user may.
    #[serde(default)]
    pub confine_processes: bool,
    /// What bounds the networks of its projects, whatever their own policies say.
    #[serde(default)]
    pub project_network: ProjectNetwork,
    /// When idle projects are stopped, and what counts as use.
    #[serde(default)]
    pub idle: IdlePolicy,
    /// How much one user, one address and all of them may ask.
    #[serde(default)]
    pub limits: HostLimits,
    /// Bytes and waits of its HTTP ingress.
    #[serde(default)]
    pub http: HttpSettings,
    /// The terminals of the project page.
    #[serde(default)]
    pub terminals: TerminalSettings,
    /// How this host comes by images, and when they go.
    #[serde(default)]
    pub images: ImageSettings,
    /// How backups are made here. Where they go, and when they are made, the
    /// master says.
    #[serde(default)]
    pub backups: BackupSettings,
}

/// The terminals of the project page.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq)]
#[serde(default, deny_unknown_fields)]
pub struct TerminalSettings {
    /// Whether there are any. Default: yes.
    pub enabled: bool,
    /// Of one project, 1 to 1000. Default: 16.
    pub per_project: u16,
    /// Of all projects. Default: 1024.
    pub total: u32,
    /// How much of what each has shown is kept, in bytes; 4096 to 16777216.
    /// Default: 262144.
    pub scrollback_bytes: u32,
    /// How long one goes on that nobody looks at and that shows nothing, in
    /// seconds; 1 to 31536000. Default: 86400.
    pub detached_secs: u32,
}

impl Default for TerminalSettings {
    fn default() -> Self {
        Self {
            enabled: true,
            per_project: 16,
            total: 1024,
            scrollback_bytes: 256 * 1024,
            detached_secs: 86_400,
        }
    }
}

impl TerminalSettings {
    /// `None` if there are to be none.
    pub(crate) fn limits(&self) -> Option<TerminalLimits> {
        let size = |number: u32| usize::try_from(number).unwrap_or(usize::MAX);
        let limits = TerminalLimits::default()
            .per_project(self.per_project.into())
            .total(size(self.total))
            .scrollback_bytes(size(self.scrollback_bytes))
            .detached(Duration::from_secs(self.detached_secs.into()));
        self.enabled.then_some(limits)
    }

    fn validate(&self) -> Result<(), String> {
        if !(1..=1000).contains(&self.per_project) {
            return Err("terminals.per_project: 1 to 1000".into());
        }
        if !(4096..=16 << 20).contains(&self.scrollback_bytes) {
            return Err("terminals.scrollback_bytes: 4096 to 16777216".into());
        }
        if !(1..=31_536_000).contains(&self.detached_secs) {
            return Err("terminals.detached_secs: 1 to 31536000, a year".into());
        }
        Ok(())
    }
}

/// How backups are made on a host.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq)]
#[serde(default, deny_unknown_fields)]
pub struct BackupSettings {
    /// The program `cocalc-backup-worker`. Default: beside this program.
    pub worker: Option<PathBuf>,
    /// How many backups are made at once; 1 to 64. Default: 2.
    pub jobs_max: u8,
    /// How fast each reads from and writes to its repository, in bytes per
    /// second. Default: 0, as fast as it goes.
    pub bytes_per_sec: u64,
    /// Most memory of one of them, in bytes; beyond it, it fails. Default: 1
    /// GiB.
    pub memory_bytes_max: u64,
    /// Below which control group each gets one of its own, relative to the root
    /// of the tree; none if empty. Default: `cocalc-backup`.
    pub control_group: PathBuf,
    /// The part of the processor that each gets where it is short, 1 to 10000,
    /// where others have 100. Default: 20.
    pub cpu_weight: u16,
    /// The part of the disk, likewise. Default: 20.
    pub io_weight: u16,
}

impl Default for BackupSettings {
    fn default() -> Self {
        let bounds = Bounds::default();
        Self {
            worker: None,
            jobs_max: 2,
            bytes_per_sec: 0,
            memory_bytes_max: bounds.memory_bytes_max,
            control_group: bounds.control_group.unwrap_or_default(),
            cpu_weight: bounds.cpu_weight,
            io_weight: bounds.io_weight,
        }
    }
}

impl BackupSettings {
    pub(crate) fn bounds(&self) -> Bounds {
        Bounds {
            bytes_per_sec_max: (self.bytes_per_sec > 0).then_some(self.bytes_per_sec),
            memory_bytes_max: self.memory_bytes_max,
            control_group: Some(self.control_group.clone()).filter(|group| *group != PathBuf::new()),
            cpu_weight: self.cpu_weight,
            io_weight: self.io_weight,
            ..Bounds::default()
        }
    }

    fn validate(&self) -> Result<(), String> {
        if !(1..=64).contains(&self.jobs_max) {
            return Err("backups.jobs_max: 1 to 64".into());
        }
        if self.memory_bytes_max < 256 << 20 {
            return Err("backups.memory_bytes_max: at least 268435456, 256 MiB".into());
        }
        if self.worker.as_ref().is_some_and(|path| !path.is_absolute()) {
            return Err("backups.worker: an absolute path".into());
        }
        let plain = |part| matches!(part, std::path::Component::Normal(_));
        if !self.control_group.components().all(plain) {
            return Err("backups.control_group: relative to the root of the tree, without ..".into());
        }
        for (key, weight) in [("cpu_weight", self.cpu_weight), ("io_weight", self.io_weight)] {
            if !(1..=10_000).contains(&weight) {
                return Err(format!("backups.{key}: 1 to 10000"));
            }
        }
        Ok(())
    }
}

fn visits_per_sec() -> u16 {
    16
}

/// A year.
const UNDO_HOURS_MAX: u64 = 8760;

fn day() -> u64 {
    24
}

/// What to do with limits that this machine can't enforce.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "snake_case")]
pub enum UnenforceableLimits {
    /// The project does not start.
    #[default]
    Refuse,
    /// It starts without them.
    Accept,
}

/// What bounds the networks of projects. IPv4 networks as `10.1.0.0/16`; only
/// IPv4 leaves a project.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct ProjectNetwork {
    /// Private networks that projects may reach. Default: none. Link-local
    /// addresses, and the host's own, they never reach.
    #[serde(default)]
    pub allow: Vec<Networks>,
    /// What else they may not reach. Default: nothing.
    #[serde(default)]
    pub deny: Vec<Networks>,
    /// How many names a project may ask for in a second; five times as many at once.
    /// Default: 100.
    #[serde(default)]
    pub questions_per_sec: Option<NonZeroU32>,
}

/// A network, as text.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(try_from = "String")]
pub struct Networks(pub Network);

impl TryFrom<String> for Networks {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let network: Network =
            text.parse().map_err(|error: cocalc_core::runner::ParseDestinationError| error.to_string())?;
        if network.address().is_ipv4() {
            Ok(Self(network))
        } else {
            Err(format!("{text}: only IPv4 leaves a project"))
        }
    }
}

/// What keeps the projects' files.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "snake_case")]
pub enum StorageKind {
    /// A Btrfs volume.
    Btrfs,
    /// A plain directory.
    Directory,
}

/// What runs the projects.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "snake_case")]
pub enum RunnerKind {
    /// Containers.
    Podman,
    /// Plain processes, without isolation.
    Process,
}

fn more_host_keys() -> Vec<HostKeyType> {
    vec![HostKeyType::Rsa]
}

impl Config {
    pub(crate) fn has_certificate(&self) -> bool {
        self.tls_cert.is_some() || self.acme.is_on()
    }

    /// Finds what no single value shows.
    ///
    /// # Errors
    ///
    /// Naming the key at fault and what to do.
    pub fn validate(&self) -> Result<(), String> {
        if !self.master_url.starts_with("http://") && !self.master_url.starts_with("https://") {
            return Err(format!(
                "master_url: {:?} begins with neither http:// nor https://",
                self.master_url
            ));
        }
        if self.tls_cert.is_some() != self.tls_key.is_some() {
            return Err("tls_cert: goes with tls_key; set both or none".into());
        }
        let plain = |url: &String| url.starts_with("http://");
        if self.has_certificate() && self.public_url.as_ref().is_some_and(plain) {
            return Err(
                "public_url: begins with http://, but tls_cert or acme.names is set; use https://".into()
            );
        }
        if self.runner == RunnerKind::Podman && self.storage != StorageKind::Btrfs {
            return Err("runner: podman keeps each project's root in a Btrfs subvolume; set storage = \"btrfs\", or runner = \"process\"".into());
        }
        if self.runner == RunnerKind::Process && self.default_image_tar.is_some() {
            return Err("default_image_tar: the process runner has no images; remove the key".into());
        }
        if self.undo_hours > UNDO_HOURS_MAX {
            return Err(format!("undo_hours: {} is more than {UNDO_HOURS_MAX}, a year", self.undo_hours));
        }
        if self.data_dir.starts_with(&self.volume) {
            return Err("data_dir: must not be inside the volume, which tenants can fill".into());
        }
        if !(1..=1000).contains(&self.snapshot_visits_per_sec) {
            return Err("snapshot_visits_per_sec: 1 to 1000".into());
        }
        self.acme.validate(self.tls_cert.is_some(), &self.domain)?;
        self.drain.validate()?;
        self.backups.validate()?;
        self.idle.validate().map_err(|error| format!("idle.{error}"))?;
        self.terminals.validate()?;
        self.images.validate()?;
        self.http.validate()?;
        self.limits.validate()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "name='alpha'\nmaster_url='http://127.0.0.1:1'\ndata_dir='/a'\nlisten='127.0.0.1:0'\n\
        ssh_listen='127.0.0.1:0'\npeer_listen='127.0.0.1:0'\nstorage='btrfs'\nvolume='/v'\nrunner='podman'\n";

    fn parse(text: &str) -> Result<Config, String> {
        let config: Config = cocalc_daemon::config::parse("host", text, []).map_err(|e| e.to_string())?;
        config.validate().map(|()| config)
    }

    #[test]
    fn contradictions_are_found_before_anything_is_opened() {
        parse(GOOD).unwrap();
        for (from, to, key) in [
            ("storage='btrfs'", "storage='directory'", "runner"),
            ("storage='btrfs'", "storage='ext4'", "storage"),
            ("master_url='http:", "master_url='ftp:", "master_url"),
            ("name='alpha'", "name='Alpha'", "name"),
            ("name='alpha'", "name='alpha'\ntls_cert='/c'", "tls_key"),
            (
                "name='alpha'",
                "name='alpha'\ntls_cert='/c'\ntls_key='/k'\npublic_url='http://a.example'",
                "public_url",
            ),
            ("data_dir='/a'", "data_dir='/v/a'", "data_dir"),
            ("data_dir='/a'", "data_dir='/a'\nundo_hours=9000", "undo_hours"),
            ("runner='podman'", "runner='podman'\n[idle]\nsample_secs=0", "idle.sample_secs"),
        ] {
            let error = parse(&GOOD.replace(from, to)).unwrap_err();
            assert!(error.contains(key), "{error}");
        }
    }

    #[test]
    fn waits_of_http_are_configured() {
        assert_eq!(parse(GOOD).unwrap().http, HttpSettings::default());
        let config = parse(&format!("{GOOD}[http]\nresponse_secs = 7\n")).unwrap();
        assert_eq!(config.http, HttpSettings { response_secs: 7, ..HttpSettings::default() });
        let error = parse(&format!("{GOOD}[http]\nresponse_secs = 0\n")).unwrap_err();
        assert!(error.contains("http.response_secs"), "{error}");
    }

    #[test]
    fn limits_are_configured_in_a_table_and_by_the_environment() {
        assert_eq!(parse(GOOD).unwrap().limits, HostLimits::default());
        let text = format!("{GOOD}[limits]\nsource_burst = 7\n");
        let variable = |name: &str| (format!("COCALC_HOST_LIMITS_{name}"), "9".to_owned());
        for text in [GOOD, &text] {
            let config: Config =
                cocalc_daemon::config::parse("host", text, [variable("FAILURES_BURST")]).unwrap();
            let burst = if text == GOOD { 5000 } else { 7 };
            let expected = HostLimits { failures_burst: 9, source_burst: burst, ..HostLimits::default() };
            assert_eq!(config.limits, expected);
        }
        for (line, key) in [("host_burst = 0", "host_burst"), ("sauce_burst = 1", "sauce_burst")] {
            let error = parse(&format!("{GOOD}[limits]\n{line}\n")).unwrap_err();
            assert!(error.contains(key), "{error}");
        }
        let error = cocalc_daemon::config::parse::<Config>("host", GOOD, [variable("SAUCE")]).unwrap_err();
        assert!(error.to_string().contains("sauce"), "{error}");
    }

    #[test]
    fn limits_and_networks_of_projects_are_configured() {
        let config = parse(GOOD).unwrap();
        assert_eq!(config.unenforceable_limits, UnenforceableLimits::Refuse);
        assert_eq!(config.project_network, ProjectNetwork::default());
        let text = format!(
            "{GOOD}unenforceable_limits = 'accept'\n[project_network]\nallow = ['10.1.0.0/16']\ndeny = ['192.0.2.1']\nquestions_per_sec = 7\n"
        );
        let config = parse(&text).unwrap();
        assert_eq!(config.unenforceable_limits, UnenforceableLimits::Accept);
        assert_eq!(config.project_network.allow[0].0.to_string(), "10.1.0.0/16");
        assert_eq!(config.project_network.questions_per_sec.map(NonZeroU32::get), Some(7));
        for (line, key) in [
            ("unenforceable_limits = 'ignore'", "unenforceable_limits"),
            ("[project_network]\nallow = ['10.1.0.1/16']", "10.1.0.1/16"),
            ("[project_network]\nallow = ['fd00::/8']", "fd00::/8"),
            ("[project_network]\nallow = ['10.0.0.0/8 }; flush ruleset']", "allow"),
            ("[project_network]\nopen = true", "open"),
            ("[project_network]\nquestions_per_sec = 0", "nonzero"),
        ] {
            let error = parse(&format!("{GOOD}{line}\n")).unwrap_err();
            assert!(error.contains(key), "{error}");
        }
    }

    #[test]
    fn snapshots_are_configured_in_a_table_and_by_the_environment() {
        let text = format!("{GOOD}[snapshots]\nhourly = 12\n");
        let config: Config = cocalc_daemon::config::parse(
            "host",
            &text,
            [("COCALC_HOST_SNAPSHOTS_ALLOWANCE_PERCENT".to_owned(), "80".to_owned())],
        )
        .unwrap();
        let fields = config.snapshots.fields();
        assert_eq!((fields.hourly, fields.allowance_percent, fields.daily), (12, 80, 7));
        assert_eq!(parse(GOOD).unwrap().snapshots, Policy::default());
        for (table, key) in
            [("yearly = 1", "yearly"), ("hourly = 101", "hourly"), ("interval_secs = 1", "interval_secs")]
        {
            let error = parse(&format!("{GOOD}[snapshots]\n{table}\n")).unwrap_err();
            assert!(error.contains(key), "{error}");
        }
        assert!(
            parse(&format!("{GOOD}snapshot_visits_per_sec = 0\n"))
                .unwrap_err()
                .contains("snapshot_visits_per_sec")
        );
    }
}
