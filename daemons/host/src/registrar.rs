//! What the host tells the master of itself, and what it does about the
//! stream's news.

use std::sync::Arc;

use async_trait::async_trait;
use cocalc_auth::stream::Entry;
use cocalc_auth_live::PeerHandler;
use cocalc_auth_sealed::Announced;
use cocalc_core::{
    backups,
    control::{Capabilities, Register, Registered},
    ids::{HostName, SessionId},
    moves::host::MoveHost,
    router::HostAddress,
};

use crate::{backends::Backends, lifecycle::Lifecycle, peers::Peers};

/// Introduces this process and hears the stream.
#[derive(Debug)]
pub(crate) struct Registrar {
    pub(crate) name: HostName,
    pub(crate) session: SessionId,
    pub(crate) address: HostAddress,
    pub(crate) ssh_host_keys: Vec<String>,
    pub(crate) sealing_key: Announced,
    pub(crate) backends: Backends,
    pub(crate) lifecycle: Lifecycle,
    pub(crate) moves: MoveHost,
    pub(crate) peers: Arc<Peers>,
    pub(crate) backups: Option<backups::Keeper>,
}

#[async_trait]
impl PeerHandler for Registrar {
    async fn register(&self) -> Register {
        // What the master was told before may be forgotten there.
        self.backends.images.tell_again();
        Register {
            name: self.name.clone(),
            session: self.session,
            boot_id: boot_id(),
            address: self.address.clone(),
            ssh_host_keys: self.ssh_host_keys.clone(),
            capabilities: Some(Capabilities {
                storage: self.backends.storage.capabilities(),
                runner: self.backends.runner.capabilities(),
                images: self.backends.images.digests(),
                free_bytes: (self.backends.free_bytes)(),
                sealing_key: Some(self.sealing_key.to_string()),
            }),
            held: self.lifecycle.held().await,
        }
    }

    fn registered(&self, reply: &Registered) {
        if let Some(backups) = &self.backups {
            backups.set_policy(reply.backups.clone());
        }
        for (project, owner, epoch) in reply.owners.clone() {
            let (moves, address) = (self.moves.clone(), self.peers.address(owner));
            tokio::spawn(async move {
                if let Err(error) = moves.observe(project, owner, epoch, address).await {
                    tracing::warn!(%project, error = %error.message, "cannot act on who owns it now");
                }
            });
        }
    }

    fn entry(&self, entry: &Entry) {
        self.peers.apply(entry);
    }
}

/// The kernel's boot id.
pub(crate) fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|id| id.trim().to_owned())
        .unwrap_or_default()
}
