//! Operations on images, which belong to no project: they are kept in memory.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use cocalc_core::control::{CommandError, ErrorCode, ImageReport, ImageTask};
use cocalc_ids::{AccountId, HostId, ImageDigest, OperationId, Timestamp};
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::{operations::code, shared::Shared};

/// How many operations are remembered, and how long those that have ended are.
const JOBS_MAX: usize = 1000;
const REMEMBERED: Duration = Duration::from_secs(86_400);

/// The operations on images of this process.
#[derive(Debug, Default)]
pub(super) struct Jobs(Mutex<BTreeMap<OperationId, Running>>);

#[derive(Debug)]
struct Running {
    job: ImageJob,
    cancel: watch::Sender<bool>,
}

/// An operation on an image, as it is now.
#[derive(Clone, Debug)]
pub(crate) struct ImageJob {
    pub(crate) id: OperationId,
    pub(crate) account: AccountId,
    pub(crate) kind: &'static str,
    /// `running`, `done`, `failed` or `cancelled`.
    pub(crate) state: &'static str,
    pub(crate) phase: String,
    pub(crate) progress: Value,
    pub(crate) error: Option<Value>,
    pub(crate) cancelling: bool,
    pub(crate) created: Timestamp,
    pub(crate) updated: Timestamp,
}

impl Jobs {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<OperationId, Running>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, id: OperationId, now: Timestamp, change: impl FnOnce(&mut ImageJob)) {
        if let Some(running) = self.lock().get_mut(&id) {
            change(&mut running.job);
            running.job.updated = now;
        }
    }
}

impl Shared {
    /// The operation on an image of this id, if there is one.
    pub(crate) fn image_job(&self, id: OperationId) -> Option<ImageJob> {
        self.images.jobs.lock().get(&id).map(|running| running.job.clone())
    }

    /// Asks one to end.
    pub(crate) fn cancel_image_job(&self, id: OperationId) -> Option<ImageJob> {
        let mut jobs = self.images.jobs.lock();
        let running = jobs.get_mut(&id)?;
        if running.job.state == "running" {
            running.job.cancelling = true;
            running.cancel.send_replace(true);
        }
        Some(running.job.clone())
    }

    /// Begins work at a host, unless this operation was begun before.
    pub(crate) fn begin_image_job(
        self: &Arc<Self>,
        id: OperationId,
        account: AccountId,
        host: HostId,
        task: ImageTask,
    ) -> Result<(), CommandError> {
        let kind = match &task {
            ImageTask::Pull { .. } => "image_pull",
            ImageTask::Build { .. } => "image_build",
            ImageTask::Import { .. } => "image_import",
            ImageTask::Fetch { .. } => "image_fetch",
        };
        let now = self.now();
        let mut cancel = {
            let mut jobs = self.images.jobs.lock();
            if jobs.contains_key(&id) {
                return Ok(());
            }
            jobs.retain(|_, running| {
                running.job.state == "running" || now.since(running.job.updated) < REMEMBERED
            });
            if jobs.len() >= JOBS_MAX {
                let message = format!("{JOBS_MAX} operations on images go on, or have just ended");
                return Err(CommandError { code: ErrorCode::Busy, message });
            }
            let job = ImageJob {
                id,
                account,
                kind,
                state: "running",
                phase: "queued".to_owned(),
                progress: json!({ "host_id": host.to_string(), "cancellable": true }),
                error: None,
                cancelling: false,
                created: now,
                updated: now,
            };
            let (sender, receiver) = watch::channel(false);
            jobs.insert(id, Running { job, cancel: sender });
            receiver
        };
        let shared = self.clone();
        tokio::spawn(async move {
            let told = Arc::clone(&shared);
            let mut tell = |phase: &str, bytes: u64, expected: Option<u64>| {
                told.images.jobs.change(id, told.now(), |job| {
                    phase.clone_into(&mut job.phase);
                    let mut progress = json!({ "host_id": host.to_string(), "cancellable": true });
                    if bytes > 0 {
                        progress["bytes"] = bytes.into();
                    }
                    if let Some(expected) = expected {
                        progress["bytes_expected"] = expected.into();
                    }
                    job.progress = progress;
                });
            };
            let done = match task {
                // With the other host told first.
                ImageTask::Fetch { digest, .. } => shared
                    .ensure_image(host, digest, id, &mut cancel, &mut tell)
                    .await
                    .map(|()| json!({ "digest": digest.to_string() })),
                task => {
                    let name = match &task {
                        ImageTask::Pull { name, .. }
                        | ImageTask::Build { name, .. }
                        | ImageTask::Import { name, .. } => name.clone(),
                        ImageTask::Fetch { .. } => None,
                    };
                    match shared.image_work(host, id, task, &mut cancel, &mut tell).await {
                        Ok(image) => {
                            shared.name_image(name, image.digest, account).await.map(|()| shown(&image))
                        }
                        Err(error) => Err(error),
                    }
                }
            };
            shared.images.jobs.change(id, shared.now(), |job| match done {
                Ok(mut result) => {
                    result["host_id"] = host.to_string().into();
                    (job.state, job.progress) = ("done", result);
                }
                Err(error) if error.code == ErrorCode::Cancelled => job.state = "cancelled",
                Err(error) => {
                    job.state = "failed";
                    job.error = Some(json!({ "code": code(error.code), "detail": error.message }));
                }
            });
        });
        Ok(())
    }
}

impl Shared {
    /// What an administrator called an image means it from now on.
    pub(crate) async fn name_image(
        &self,
        name: Option<String>,
        digest: ImageDigest,
        account: AccountId,
    ) -> Result<(), CommandError> {
        let (Some(name), now) = (name, self.now()) else { return Ok(()) };
        let named = self.db(move |store| store.name_image(&name, digest, account, now)).await;
        named.map_err(|error| CommandError {
            code: ErrorCode::Failed,
            message: format!("image {digest} is there, but not its name: {}", cocalc_core::chain(&error)),
        })
    }
}

fn shown(image: &ImageReport) -> Value {
    json!({
        "digest": image.digest.to_string(),
        "names": image.names,
        "sources": image.sources,
        "bytes": image.bytes,
    })
}
