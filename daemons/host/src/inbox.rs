//! The host's inbox: commands from the master, each answered where it asks.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use cocalc_core::{
    bus::{Bus, Message, Payload},
    control::{CommandError, ErrorCode, FRAME_BYTES_MAX, HostCommand, HostReply, inbox_subject},
    ids::HostId,
};
use tokio::{sync::Semaphore, task::JoinSet};

use crate::lifecycle::Lifecycle;

/// Commands under way at once; more wait in the subscription's queue.
const COMMANDS_MAX: usize = 256;
/// How long to wait before subscribing again.
const AGAIN: Duration = Duration::from_millis(200);

/// Serves the inbox until the future is dropped, subscribing again whenever
/// the subscription ends.
pub(crate) async fn serve(bus: Arc<dyn Bus>, host: HostId, lifecycle: Lifecycle) {
    let subject = inbox_subject(host);
    let places = Arc::new(Semaphore::new(COMMANDS_MAX));
    // Commands end with this future, as a crash would end them: the master
    // repeats what it got no answer to.
    let mut running = JoinSet::new();
    loop {
        match bus.subscribe(&subject, None).await {
            Ok(mut subscription) => {
                while let Some(message) = subscription.next().await {
                    let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
                    let (bus, lifecycle) = (Arc::clone(&bus), lifecycle.clone());
                    running.spawn(async move {
                        answer(&*bus, &lifecycle, message).await;
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

async fn answer(bus: &dyn Bus, lifecycle: &Lifecycle, message: Message) {
    let Some(reply) = message.reply else {
        tracing::warn!("a command without a place for its answer was passed over");
        return;
    };
    let answer = if message.payload.data.len() > FRAME_BYTES_MAX {
        refused("the command is larger than a control frame may be".to_owned())
    } else {
        match message.payload.parse::<HostCommand>() {
            Ok(command) => lifecycle.execute(command).await,
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

fn refused(message: String) -> HostReply {
    HostReply::Error(CommandError { code: ErrorCode::Invalid, message })
}
