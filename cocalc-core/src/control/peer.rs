//! What hosts and proxies ask of the master.

use cocalc_ids::{
    Epoch, HostId, HostName, ImageDigest, MoveId, ProjectAlias, ProjectId, SessionId, SnapshotName, Timestamp,
};
use serde::{Deserialize, Serialize};

use super::{BackupAccess, ImageReport, ProjectReport};
use crate::{
    backups::{Policy, Status},
    router::HostAddress,
};

/// What a host or proxy asks of the master.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub enum PeerRequest {
    /// First after each connect.
    Register(Box<Register>),
    /// Continue the ordered stream after this position, or start it anew.
    Sync {
        /// The last frame that was applied: stream epoch and sequence number.
        position: Option<(u64, u64)>,
    },
    /// Everything up to here was applied, and connections that had to end were
    /// closed.
    Acknowledge {
        /// The stream's epoch.
        stream: u64,
        /// The last applied frame.
        seq: u64,
    },
    /// Send the present ACL of this project on the stream, and answer when it
    /// has been sent. For projects that are unknown or too old here.
    FetchProject {
        /// Which project.
        project: ProjectId,
    },
    /// Where is this project? Proxies.
    Route {
        /// Which project.
        project: ProjectId,
    },
    /// Which project has this name? Proxies.
    Alias {
        /// The name.
        alias: ProjectAlias,
    },
    /// The state of a project changed by itself. Hosts.
    Changed(ProjectReport),
    /// So much space is free on the volume now. Hosts, when it has changed by
    /// what matters to placement.
    Space {
        /// Free bytes.
        free_bytes: u64,
    },
    /// How far the stream of a move is, now and then. Hosts.
    Sending {
        /// Which move.
        move_id: MoveId,
        /// Which snapshot.
        name: SnapshotName,
        /// Bytes of it that have been sent.
        bytes: u64,
        /// About how many it has; 0 if nobody knows.
        estimated_bytes: u64,
        /// How many a second, lately.
        bytes_per_sec: u64,
    },
    /// The images that are here now, the default first. Hosts, after each
    /// registration and when something has changed.
    Images {
        /// All of them.
        images: Vec<ImageReport>,
    },
    /// A place and key for a job at a repository of backups. Hosts.
    BackupAccess(BackupAccess),
    /// How a project stands with its backups has changed. Hosts.
    BackupStatus(Box<Status>),
    /// Somebody asked for a stopped project. Hosts.
    Wake {
        /// Which project.
        project: ProjectId,
        /// Under which grant.
        epoch: Epoch,
    },
    /// A project has been idle for too long, and its users were warned: stop it.
    /// Hosts.
    Idle {
        /// Which project.
        project: ProjectId,
        /// Under which grant.
        epoch: Epoch,
    },
    /// The secrets of a project that this host runs. Hosts.
    Secrets {
        /// Which project.
        project: ProjectId,
        /// Under which grant.
        epoch: Epoch,
    },
    /// Certify the SSH host keys that were registered.
    CertifySshHostKeys,
    /// The head of the audit chain.
    AuditHead {
        /// How many events.
        count: u64,
        /// SHA-256 of the last, in hexadecimal.
        head: String,
        /// When it was so, by the peer's wall clock.
        time: Timestamp,
        /// The identity key's signature over all of it.
        signature: String,
    },
}

/// What the master answers to a [`PeerRequest`].
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum PeerReply {
    /// To `Register`.
    Registered(Registered),
    /// Done.
    Done,
    /// To `Route`; `None` if there is no such project.
    Route {
        /// Where it is.
        route: Option<crate::router::Route>,
    },
    /// To `Alias`; `None` if no project has it.
    Alias {
        /// Which project.
        project: Option<ProjectId>,
    },
    /// To `BackupAccess`.
    BackupAccess {
        /// The repository, with credentials and key, sealed to the key that the
        /// host registered.
        sealed: String,
    },
    /// To `CertifySshHostKeys`.
    SshCertificates {
        /// One for each key, as OpenSSH text.
        certificates: Vec<String>,
        /// The version of the authority's keys that signed them.
        version: u64,
        /// For how long they are good from now.
        life_secs: u64,
    },
    /// To `Secrets`: a map of names and values, sealed to the host.
    Secrets {
        /// In the text form of `cocalc-auth-sealed`.
        sealed: String,
    },
    /// It was refused.
    Error {
        /// For people.
        message: String,
    },
}

/// A host or proxy introduces this process.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Register {
    /// Its name.
    pub name: HostName,
    /// This start of the process; commands to an older one fail at once.
    pub session: SessionId,
    /// The kernel's boot id.
    pub boot_id: String,
    /// Where it listens.
    pub address: HostAddress,
    /// SSH host keys, as `algorithm base64`, for the master to publish.
    pub ssh_host_keys: Vec<String>,
    /// Hosts only: what it can do.
    pub capabilities: Option<Capabilities>,
    /// Hosts only: every project it holds files or grants of.
    pub held: Vec<HeldProject>,
}

/// What a host can do, for placement.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Capabilities {
    /// The storage backend.
    pub storage: crate::storage::Capabilities,
    /// The runner.
    pub runner: crate::runner::Capabilities,
    /// The images it has; the first is the default.
    pub images: Vec<ImageDigest>,
    /// Free bytes on the volume.
    pub free_bytes: u64,
    /// The key to which secrets for it are sealed, with its signature, as
    /// `cocalc-auth-sealed` writes it. `None` from a host that cannot open any.
    #[serde(default)]
    pub sealing_key: Option<String>,
}

/// A project of which a host holds something.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct HeldProject {
    /// Its state, with the epoch that the host holds.
    pub report: ProjectReport,
    /// The epoch that is frozen, if one is.
    pub frozen: Option<Epoch>,
}

/// The master's answer to [`Register`].
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Registered {
    /// The issuer of connect tokens: the master's URL.
    pub issuer: String,
    /// Leases and graces.
    pub settings: Settings,
    /// For each held project whose owner is known: the owner and epoch. What
    /// is another's now, or of a higher epoch, must stop.
    pub owners: Vec<(ProjectId, HostId, Epoch)>,
    /// Master time.
    pub now: Timestamp,
    /// How projects are backed up whose owners have said nothing; `None` if
    /// the federation has no backups.
    #[serde(default)]
    pub backups: Option<Policy>,
}

/// Timing that the master decides.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Settings {
    /// How often to renew the lease, in milliseconds. Default 5 s.
    pub keepalive_ms: u64,
    /// How long a lease lasts from when its renewal was sent. Default 30 s.
    pub lease_ms: u64,
    /// How long cached rights go on after the lease. Default 15 min.
    pub grace_ms: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self { keepalive_ms: 5_000, lease_ms: 30_000, grace_ms: 900_000 }
    }
}

/// Renews the lease.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Keepalive {
    /// This start of the process.
    pub session: SessionId,
    /// The last applied frame of the stream.
    pub position: Option<(u64, u64)>,
}

/// The renewed lease.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct KeepaliveReply {
    /// Counted from when the request was sent, in milliseconds. 0: refused,
    /// register again.
    pub lease_ms: u64,
    /// Where the stream is: epoch and last sequence number. Who is behind asks
    /// for `Sync`.
    pub position: (u64, u64),
    /// Master time, for the estimate of the offset.
    pub now: Timestamp,
}
