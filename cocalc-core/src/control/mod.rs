//! The messages between master, hosts and proxies, in JSON on the bus.
//!
//! Hosts and proxies dial the master's bus and never the other way round. A
//! frame is at most [`FRAME_BYTES_MAX`]. Subjects:
//!
//! | subject | who publishes | what |
//! |---|---|---|
//! | `host.<id>.inbox` | master, as a request | [`HostCommand`] → [`HostReply`] |
//! | `host.<id>.images` | master, as a request | [`ImageRequest`] → [`ImageReply`] |
//! | `host.<id>.stream`, `proxy.<id>.stream` | master | frames of the ordered stream (`cocalc-auth`) |
//! | `master.host.<id>.api`, `master.proxy.<id>.api` | that peer, as a request | [`PeerRequest`] → [`PeerReply`] |
//! | `master.host.<id>.keepalive`, `master.proxy.<id>.keepalive` | that peer, as a request, on a connection of its own | [`Keepalive`] → [`KeepaliveReply`] |
//!
//! Every command names the epoch (and within a move the move) it is for, and
//! may arrive twice. A reply that reports an effect is a receipt: it names the
//! exact input.

mod backups;
mod host;
mod images;
mod inside;
mod peer;

pub use backups::{
    BackupAccess, BackupsCommand, BackupsOutcome, BackupsReply, BackupsWork, DrillAgainst, DrillReport,
};
pub use host::{
    Carried, CommandError, ErrorCode, HostCommand, HostReply, MoveCommand, MoveReply, ProjectConfig,
    ProjectReport, UsageReport,
};
pub use images::{ImageReply, ImageReport, ImageRequest, ImageTask};
pub use inside::{InsideCommand, InsideReply};
pub use peer::{
    Capabilities, HeldProject, Keepalive, KeepaliveReply, PeerReply, PeerRequest, Register, Registered,
    Settings,
};

use cocalc_ids::{HostId, ProxyId};

use crate::connector::Peer;

/// What the secrets of a project are sealed for.
pub const SECRETS_PURPOSE: &str = "project secrets";

/// Whether a text can be the name of a secret, which becomes that of a file: 1 to
/// 64 of `A-Z a-z 0-9 _ . -`, and a letter, digit or `_` first.
pub fn is_secret_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    (1..=64).contains(&name.len()) && name.bytes().all(plain) && !name.starts_with(['.', '-'])
}

/// The largest control frame, in bytes.
pub const FRAME_BYTES_MAX: usize = 256 * 1024;

/// Where the master sends commands to a host.
pub fn inbox_subject(host: HostId) -> String {
    format!("host.{host}.inbox")
}

/// Where the master asks a host about its images.
pub fn images_subject(host: HostId) -> String {
    format!("host.{host}.images")
}

/// Where a peer receives its ordered stream.
pub fn stream_subject(peer: Peer) -> String {
    format!("{}.stream", peer_prefix(peer))
}

/// Where a peer asks the master.
pub fn api_subject(peer: Peer) -> String {
    format!("master.{}.api", peer_prefix(peer))
}

/// Where a peer renews its lease.
pub fn keepalive_subject(peer: Peer) -> String {
    format!("master.{}.keepalive", peer_prefix(peer))
}

fn peer_prefix(peer: Peer) -> String {
    match peer {
        Peer::Host(id) => format!("host.{id}"),
        Peer::Proxy(id) => format!("proxy.{id}"),
    }
}

/// The peer that publishes on a `master.….api` or `….keepalive` subject;
/// `None` for any other subject.
pub fn subject_peer(subject: &str) -> Option<Peer> {
    let mut tokens = subject.strip_prefix("master.")?.split('.');
    let (kind, id) = (tokens.next()?, tokens.next()?);
    if !matches!(tokens.next(), Some("api" | "keepalive")) || tokens.next().is_some() {
        return None;
    }
    match kind {
        "host" => id.parse().ok().map(Peer::Host),
        "proxy" => id.parse::<ProxyId>().ok().map(Peer::Proxy),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subject_names_its_peer() {
        let host = Peer::Host(HostId::random());
        let proxy = Peer::Proxy(ProxyId::random());
        for peer in [host, proxy] {
            assert_eq!(subject_peer(&api_subject(peer)), Some(peer));
            assert_eq!(subject_peer(&keepalive_subject(peer)), Some(peer));
            assert_eq!(subject_peer(&stream_subject(peer)), None);
            assert_eq!(subject_peer(&format!("{}.more", api_subject(peer))), None);
        }
    }
}
