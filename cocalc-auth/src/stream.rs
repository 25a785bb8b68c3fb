//! The frames of the ordered stream from the master to a host or proxy.
//!
//! Frames carry absolute state (the full member set of a project, the whole
//! key ring), so that applying one twice is harmless. `seq` grows by one;
//! a gap means that the receiver must ask for a resync, which the master
//! answers with `Reset`, the whole state, and `Live`.

use cocalc_ids::{AccountId, Epoch, HostId, KeyId, ProjectId, ProxyId, Role};
use serde::{Deserialize, Serialize};

use crate::token::LoginTag;

/// One frame.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Frame {
    /// The stream's epoch: higher for every life of the master's database.
    pub stream: u64,
    /// Its place, from 1.
    pub seq: u64,
    /// What it says.
    pub entry: Entry,
}

/// What a frame says.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(tag = "entry", rename_all = "snake_case")]
pub enum Entry {
    /// The whole state follows; forget at `Live` what it did not name.
    Reset,
    /// The state is complete.
    Live,
    /// Who may use a project that this receiver serves.
    Project(ProjectAcl),
    /// A project that this receiver no longer serves, or that is gone.
    ProjectGone {
        /// Which project.
        project: ProjectId,
    },
    /// An account that is a member of any served project.
    Account(AccountState),
    /// The keys that sign connect tokens.
    KeyRing(PublicRing),
    /// The keys that sign SSH certificates.
    SshAuthorities(SshAuthorities),
    /// A host: where it is and what proves it. For proxies, and for transfers.
    Host {
        /// Which.
        host: HostId,
        /// `HostAddress` of `cocalc-core`, kept opaque here.
        address: serde_json::Value,
    },
    /// A proxy whose attestations are to be believed.
    Proxy {
        /// Which.
        proxy: ProxyId,
        /// Its identity key, base64url; `None` when it was withdrawn.
        identity: Option<String>,
    },
    /// A new owner of a project. For proxies.
    Route {
        /// Which project.
        project: ProjectId,
        /// Its owner.
        host: HostId,
        /// The owner's epoch.
        epoch: Epoch,
    },
}

/// Who may use a project: the whole set, with its version.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct ProjectAcl {
    /// Which project.
    pub project: ProjectId,
    /// The version of this set; grows with each change.
    pub version: u64,
    /// The owner's epoch that this host was granted.
    pub epoch: Epoch,
    /// Every member.
    pub members: Vec<(AccountId, Role)>,
    /// SSH keys that belong to the project, and act as their account.
    pub keys: Vec<SshKey>,
    /// How long cached rights go on after the lease, in milliseconds; `None`
    /// is the federation's default.
    pub grace_ms: Option<u64>,
    /// Whether a proxy that terminates SSH may attest for this project.
    pub proxy_ssh: bool,
    /// The ports whose apps viewers may see.
    #[serde(default)]
    pub viewable_ports: Vec<u16>,
    /// Whether the project's own `~/.ssh/authorized_keys` opens it.
    #[serde(default)]
    pub authorized_keys: bool,
}

/// What is known of an account.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct AccountState {
    /// Which account.
    pub account: AccountId,
    /// Grows when the account signs out everywhere; older tokens and sessions
    /// end.
    pub session_epoch: u64,
    /// Log-ins that ended, and whose tokens and sessions end with them, for as
    /// long as any could live.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ended_logins: Vec<LoginTag>,
    /// A banned account may do nothing.
    pub banned: bool,
    /// Its SSH keys.
    pub keys: Vec<SshKey>,
}

/// A public SSH key in an account's or project's list.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct SshKey {
    /// Its place in the list.
    pub id: KeyId,
    /// As whom it acts.
    pub account: AccountId,
    /// OpenSSH text `algorithm base64`, without options and comment.
    pub key: String,
    /// The options in front of it, as in `authorized_keys`. Whoever cannot
    /// honour them refuses the key.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub options: String,
}

/// The public keys that verify connect tokens.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct PublicRing {
    /// Grows with each change.
    pub version: u64,
    /// Next, current and previous; tokens of any of them are valid.
    pub keys: Vec<RingKey>,
    /// Keys that were withdrawn, as opposed to retired after their last token
    /// had expired: what their tokens opened ends too.
    #[serde(default)]
    pub withdrawn: Vec<String>,
}

/// One public key of the ring.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct RingKey {
    /// Its name, as in a token's header.
    pub kid: String,
    /// The Ed25519 public key, base64url without padding.
    pub key: String,
    /// The algorithm's name in the header: `EdDSA`, or `Ed25519` (RFC 9864).
    pub alg: String,
}

/// The public keys that sign SSH certificates, each `algorithm base64`.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct SshAuthorities {
    /// Grows with each change.
    pub version: u64,
    /// Those of users' certificates: current, next and former.
    pub user: Vec<String>,
    /// Those of hosts' certificates.
    pub host: Vec<String>,
    /// Keys that were withdrawn, as opposed to retired after their last
    /// certificate had ended: what their certificates opened ends too.
    #[serde(default)]
    pub withdrawn: Vec<String>,
}
