//! The host's inboxes: commands from the master, each answered where it asks.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use cocalc_core::{
    bus::{Bus, Message, Payload},
    control::{
        CommandError, ErrorCode, FRAME_BYTES_MAX, HostCommand, HostReply, ImageReply, ImageRequest,
        images_subject, inbox_subject,
    },
    ids::HostId,
};
use serde::{Serialize, de::DeserializeOwned};
use tokio::{sync::Semaphore, task::JoinSet};

use crate::{
    images::{Images, World},
    lifecycle::Lifecycle,
};

/// Commands under way at once; more wait in the subscription's queue.
const COMMANDS_MAX: usize = 256;
/// How long to wait before subscribing again.
const AGAIN: Duration = Duration::from_millis(200);

/// Serves commands about projects until the future is dropped.
pub(crate) async fn serve(bus: Arc<dyn Bus>, host: HostId, lifecycle: Lifecycle) {
    let execute = move |command: HostCommand| {
        let lifecycle = lifecycle.clone();
        async move { lifecycle.execute(command).await }
    };
    answer_all(bus, inbox_subject(host), execute, HostReply::Error).await;
}

/// Serves requests about images until the future is dropped.
pub(crate) async fn serve_images(bus: Arc<dyn Bus>, host: HostId, images: Images, world: World) {
    let execute = move |request: ImageRequest| {
        let (images, world) = (images.clone(), world.clone());
        async move { images.execute(request, &world).await }
    };
    answer_all(bus, images_subject(host), execute, ImageReply::Error).await;
}

/// Answers what is asked on a subject until the future is dropped, subscribing
/// again whenever the subscription ends.
async fn answer_all<Q, A, F>(
    bus: Arc<dyn Bus>,
    subject: String,
    execute: impl Fn(Q) -> F + Clone + Send + 'static,
    refuse: fn(CommandError) -> A,
) where
    Q: DeserializeOwned + Send + 'static,
    A: Serialize + Send + Sync + 'static,
    F: Future<Output = A> + Send + 'static,
{
    let places = Arc::new(Semaphore::new(COMMANDS_MAX));
    // Commands end with this future, as a crash would end them: the master
    // repeats what it got no answer to.
    let mut running = JoinSet::new();
    loop {
        match bus.subscribe(&subject, None).await {
            Ok(mut subscription) => {
                while let Some(message) = subscription.next().await {
                    let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
                    let (bus, execute) = (Arc::clone(&bus), execute.clone());
                    running.spawn(async move {
                        answer(&*bus, message, execute, refuse).await;
                        drop(place);
                    });
                    while running.try_join_next().is_some() {}
                }
            }
            Err(error) => tracing::debug!(error = %cocalc_core::chain(&error), "no inbox yet"),
        }
        tokio::time::sleep(AGAIN).await;
    }
}

async fn answer<Q, A, F>(
    bus: &dyn Bus,
    message: Message,
    execute: impl Fn(Q) -> F + Send,
    refuse: fn(CommandError) -> A,
) where
    Q: DeserializeOwned,
    A: Serialize + Send + Sync,
    F: Future<Output = A> + Send,
{
    let Some(reply) = message.reply else {
        tracing::warn!("a command without a place for its answer was passed over");
        return;
    };
    let refused = |message: String| refuse(CommandError { code: ErrorCode::Invalid, message });
    let answer = if message.payload.data.len() > FRAME_BYTES_MAX {
        refused("the command is larger than a control frame may be".to_owned())
    } else {
        match message.payload.parse::<Q>() {
            Ok(command) => execute(command).await,
            Err(error) => refused(format!("the command cannot be read: {error}")),
        }
    };
    let payload = match Payload::json(&answer) {
        Ok(payload) => Payload { headers: BTreeMap::new(), ..payload },
        Err(error) => {
            tracing::error!(%error, "an answer cannot be written");
            return;
        }
    };
    if let Err(error) = bus.publish(&reply, payload).await {
        // The master asks again.
        tracing::info!(error = %cocalc_core::chain(&error), "an answer could not be sent");
    }
}
