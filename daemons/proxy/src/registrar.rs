//! What the proxy tells the master of itself, and what it learns from the
//! stream.

use async_trait::async_trait;
use cocalc_auth::stream::Entry;
use cocalc_auth_live::PeerHandler;
use cocalc_core::{
    control::{Register, Registered},
    ids::{HostName, SessionId},
    memory::router::TableRouter,
    router::HostAddress,
};

/// Introduces this process and feeds the routing table.
#[derive(Debug)]
pub(crate) struct Registrar {
    pub(crate) name: HostName,
    pub(crate) session: SessionId,
    pub(crate) address: HostAddress,
    pub(crate) ssh_host_keys: Vec<String>,
    pub(crate) table: TableRouter,
}

#[async_trait]
impl PeerHandler for Registrar {
    async fn register(&self) -> Register {
        Register {
            name: self.name.clone(),
            session: self.session,
            boot_id: std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
                .map(|id| id.trim().to_owned())
                .unwrap_or_default(),
            address: self.address.clone(),
            ssh_host_keys: self.ssh_host_keys.clone(),
            capabilities: None,
            held: Vec::new(),
        }
    }

    fn registered(&self, _reply: &Registered) {}

    fn entry(&self, entry: &Entry) {
        match entry {
            Entry::Host { host, address } => match serde_json::from_value(address.clone()) {
                Ok(address) => self.table.set_host(*host, address),
                Err(error) => tracing::warn!(%host, %error, "an address cannot be read"),
            },
            Entry::Route { project, host, epoch } => self.table.set_owner(*project, *host, *epoch),
            Entry::ProjectGone { project } => self.table.forget(*project),
            _ => {}
        }
    }
}
