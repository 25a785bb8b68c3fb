//! What goes by itself, and what the master is told.

use std::{sync::Arc, time::Duration};

use cocalc_core::{
    bus::{Bus, Payload},
    connector::Peer,
    control::{ImageReport, PeerRequest, api_subject},
    grant::Ledger,
    ids::Timestamp,
    images::surplus,
};

use super::{Images, USE_STEP, uses};

/// How often uses are written down and it is looked for what may go.
const INTERVAL: Duration = Duration::from_secs(60);
/// How long the master may take to hear of a change.
const TELL_LIMIT: Duration = Duration::from_secs(5);
/// How often it is told what it may have missed.
const TELL_AGAIN: Duration = Duration::from_secs(300);
/// Of how many images it is told: what fits a frame.
const TELL_MAX: usize = 300;

/// Writes down which images are used, and deletes those that are not, until the
/// future is dropped.
pub(crate) async fn keep(images: Images, ledger: Ledger, free_bytes: Arc<dyn Fn() -> u64 + Send + Sync>) {
    if images.0.store.is_none() {
        return;
    }
    loop {
        tokio::time::sleep(INTERVAL).await;
        images.note_uses(&ledger).await;
        let kept = images.kept(&uses(&ledger));
        for digest in surplus(&kept, &images.0.settings.policy(), Timestamp::now(), free_bytes()) {
            if let Err(error) = images.remove(digest, &ledger).await {
                tracing::warn!(%digest, error = error.message, "cannot delete an image that nobody uses");
            }
        }
    }
}

impl Images {
    /// Writes down when images were last used: those that projects have, and
    /// those that somebody asked for. One of which nothing is known is noted as
    /// used now.
    async fn note_uses(&self, ledger: &Ledger) {
        let (uses, now) = (uses(ledger), Timestamp::now());
        let stale: Vec<_> = {
            let state = self.state();
            let stale = state.known.iter().filter(|(digest, known)| {
                let record = &known.record;
                let in_use = uses.contains_key(digest) || known.is_fresh();
                let old = record.used.is_none_or(|used| now.since(used) >= USE_STEP);
                (in_use && old) || (record.used.is_none() && record.imported.is_none())
            });
            stale.map(|(digest, _)| *digest).collect()
        };
        let Ok(store) = self.store() else { return };
        for digest in &stale {
            if let Err(error) = store.note_image(digest, move |record| record.used = Some(now)).await {
                tracing::warn!(%digest, error = %cocalc_core::chain(&error), "cannot note the use of an image");
            }
        }
        if !stale.is_empty()
            && let Err(error) = self.refresh().await
        {
            tracing::warn!(error = %cocalc_core::chain(&error), "cannot look at the images");
        }
    }
}

/// Tells the master which images are here, until the future is dropped: at
/// first, when something changes, and now and then.
pub(crate) async fn announce(peer: Peer, bus: Arc<dyn Bus>, images: Images, ledger: Ledger) {
    let mut changes = images.changes();
    let mut told: Option<Vec<ImageReport>> = None;
    loop {
        let again = tokio::time::timeout(TELL_AGAIN, changes.changed()).await;
        // Whoever asks for it once more has forgotten what was told.
        if again.is_err() {
            told = None;
        }
        let mut now = images.reports(&ledger);
        if now.len() > TELL_MAX {
            tracing::warn!(count = now.len(), "more images than the master can be told of");
            now.truncate(TELL_MAX);
        }
        if told.as_ref() == Some(&now) {
            continue;
        }
        let request = PeerRequest::Images { images: now.clone() };
        let Ok(payload) = Payload::json(&request) else { continue };
        match bus.request(&api_subject(peer), payload, TELL_LIMIT).await {
            Ok(_) => told = Some(now),
            Err(_) => {
                tokio::time::sleep(Duration::from_secs(1)).await;
                images.tell_again();
            }
        }
    }
}
