//! Images of the federation: which host has which, and the work of bringing
//! them there.
//!
//! Hosts keep images, and tell which they have. Work on one is done by a host in
//! a task of its own; this process asks after it and shows how far it is. When
//! the process ends, the host goes on; the repeated call finds what it began.

mod ensure;
mod jobs;

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use cocalc_core::{
    bus::Payload,
    connector::Peer,
    control::{CommandError, ErrorCode, ImageReply, ImageReport, ImageRequest, ImageTask, images_subject},
};
use cocalc_ids::{HostId, ImageDigest, OperationId};
use cocalc_sqlite::master as store;
use tokio::sync::watch;

pub(crate) use self::jobs::ImageJob;
use crate::shared::Shared;

/// How long a host waits for news before it answers.
const NEWS: Duration = Duration::from_secs(1);
/// How long it may take to answer at all.
const LIMIT: Duration = Duration::from_secs(30);
/// How long to wait before asking again a host that was not there.
const AGAIN: Duration = Duration::from_secs(1);
/// How long a host may be away before its work is given up.
const AWAY_MAX: Duration = Duration::from_secs(60);

/// What this process knows of images.
#[derive(Debug, Default)]
pub(crate) struct Images {
    /// What each host told last.
    hosts: Mutex<BTreeMap<HostId, Vec<ImageReport>>>,
    jobs: jobs::Jobs,
}

impl Images {
    /// Hears from a host which images it has.
    pub(crate) fn heard(&self, host: HostId, images: Vec<ImageReport>) {
        self.hosts().insert(host, images);
    }

    /// What each host told last.
    pub(crate) fn told(&self) -> BTreeMap<HostId, Vec<ImageReport>> {
        self.hosts().clone()
    }

    fn hosts(&self) -> MutexGuard<'_, BTreeMap<HostId, Vec<ImageReport>>> {
        self.hosts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Says how far some work is: what is being done, bytes, and about how many
/// there will be.
pub(crate) type Tell<'a> = dyn FnMut(&str, u64, Option<u64>) + Send + 'a;

impl Shared {
    /// The image that `text` means: a digest, or a name that an administrator
    /// gave. What hosts call their images means nothing here: one of them may be
    /// somebody else's by now.
    pub(crate) async fn resolve_image(&self, text: &str) -> store::Result<Option<ImageDigest>> {
        if let Ok(digest) = text.parse() {
            return Ok(Some(digest));
        }
        let name = text.to_owned();
        self.db(move |store| store.image_named(&name)).await
    }

    /// Asks a host something about its images.
    pub(crate) async fn ask_images(
        &self,
        host: HostId,
        request: &ImageRequest,
    ) -> Result<ImageReply, CommandError> {
        let away =
            || CommandError { code: ErrorCode::Unavailable, message: format!("host {host} does not answer") };
        if !self.alive(Peer::Host(host)) {
            return Err(away());
        }
        let payload = Payload::json(request).map_err(|_| nonsense())?;
        let answer = self.bus.request(&images_subject(host), payload, LIMIT).await.map_err(|_| away())?;
        match answer.payload.parse() {
            Ok(ImageReply::Error(error)) => Err(error),
            Ok(reply) => Ok(reply),
            Err(_) => Err(nonsense()),
        }
    }

    /// Has work done at a host, and waits for its end.
    pub(crate) async fn image_work(
        &self,
        host: HostId,
        operation: OperationId,
        task: ImageTask,
        cancel: &mut watch::Receiver<bool>,
        tell: &mut Tell<'_>,
    ) -> Result<ImageReport, CommandError> {
        let wait_ms = u64::try_from(NEWS.as_millis()).unwrap_or(u64::MAX);
        let request = ImageRequest::Work { operation, task, wait_ms };
        let mut away_since = None;
        loop {
            if *cancel.borrow() {
                tell("cancelling", 0, None);
                self.ask_images(host, &ImageRequest::Cancel { operation }).await?;
                let message = "it was cancelled".to_owned();
                return Err(CommandError { code: ErrorCode::Cancelled, message });
            }
            let answer = tokio::select! {
                answer = self.ask_images(host, &request) => answer,
                Ok(()) = cancel.changed() => continue,
            };
            match answer {
                Ok(ImageReply::Working { operation: id, phase, bytes, bytes_expected })
                    if id == operation =>
                {
                    away_since = None;
                    tell(&phase, bytes, bytes_expected);
                }
                Ok(ImageReply::Done { operation: id, image }) if id == operation => return Ok(image),
                Ok(_) => return Err(nonsense()),
                Err(error) if error.code == ErrorCode::Unavailable && !self.alive(Peer::Host(host)) => {
                    let since = *away_since.get_or_insert_with(|| self.clock.boot());
                    if self.clock.boot().saturating_sub(since) >= AWAY_MAX {
                        return Err(error);
                    }
                    tell("waiting for the host", 0, None);
                    tokio::time::sleep(AGAIN).await;
                }
                Err(error) => return Err(error),
            }
        }
    }
}

fn nonsense() -> CommandError {
    CommandError { code: ErrorCode::Failed, message: "the host's answer makes no sense".to_owned() }
}
