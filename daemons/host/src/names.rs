//! Projects of this host by their other names, which the master gave them.

use async_trait::async_trait;
use cocalc_core::{
    grant::Ledger,
    ids::{ProjectAlias, ProjectId},
};
use cocalc_ssh::Names;

/// The names in the ledger: known while the master is away, too.
#[derive(Debug)]
pub(crate) struct LedgerNames(pub(crate) Ledger);

#[async_trait]
impl Names for LedgerNames {
    async fn project(&self, alias: &ProjectAlias) -> Option<ProjectId> {
        self.0.named(alias)
    }
}
