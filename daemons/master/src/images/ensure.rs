//! A host that is to have a project has its image first.

use cocalc_core::{
    connector::Peer,
    control::{CommandError, ErrorCode, ImageReply, ImageRequest, ImageTask},
};
use cocalc_ids::{HostId, ImageDigest, OperationId};
use tokio::sync::watch;

use super::{Tell, nonsense};
use crate::shared::Shared;

/// For how long another host is offered an image.
const OFFER_SECS: u64 = 1800;

impl Shared {
    /// Has `host` fetch an image from another host, unless it has it.
    pub(crate) async fn ensure_image(
        &self,
        host: HostId,
        digest: ImageDigest,
        operation: OperationId,
        cancel: &mut watch::Receiver<bool>,
        tell: &mut Tell<'_>,
    ) -> Result<(), CommandError> {
        let failed = |error: cocalc_sqlite::master::Error| CommandError {
            code: ErrorCode::Failed,
            message: cocalc_core::chain(&error),
        };
        let hosts = self.db(|store| store.hosts()).await.map_err(failed)?;
        let has = |other: &cocalc_sqlite::master::Host| {
            other.capabilities.as_ref().is_some_and(|can| can.images.contains(&digest))
        };
        if hosts.iter().any(|other| other.id == host && has(other)) {
            return Ok(());
        }
        let sources = hosts
            .iter()
            .filter(|other| other.id != host && has(other) && other.withdrawn.is_none())
            .filter(|other| self.alive(Peer::Host(other.id)));
        let mut last = CommandError {
            code: ErrorCode::NotFound,
            message: format!("image {digest} is on no connected host; pull, build or import it first"),
        };
        for source in sources {
            let offer = ImageRequest::Offer { digest, to: host, life_secs: OFFER_SECS };
            match self.ask_images(source.id, &offer).await {
                Ok(ImageReply::Offered { .. }) => {}
                Ok(_) => return Err(nonsense()),
                // It has just lost it, or gone away: perhaps another has it.
                Err(error) => {
                    last = error;
                    continue;
                }
            }
            let task = ImageTask::Fetch { digest, from: source.id };
            match self.image_work(host, operation, task, cancel, tell).await {
                Ok(_) => {
                    tracing::info!(%digest, %host, from = %source.id, "an image was fetched");
                    return Ok(());
                }
                Err(error) if error.code == ErrorCode::Cancelled => return Err(error),
                Err(error) => {
                    // So that the next try is a new one.
                    let _ = self.ask_images(host, &ImageRequest::Cancel { operation }).await;
                    last = error;
                }
            }
        }
        Err(last)
    }
}
