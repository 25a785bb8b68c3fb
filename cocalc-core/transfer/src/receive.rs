//! Receiving a snapshot from another host.

use std::io;

use cocalc_core::{
    connector::Peer,
    control::{CommandError, ErrorCode},
    moves::host::Inbound,
};
use tokio::time::{MissedTickBehavior, interval_at, timeout};

use crate::{
    Incoming, chunks,
    chunks::Pace,
    frame::{self, Answer, Offer},
    send::PACE,
};

/// Takes in the snapshot that an authenticated host sends, if `inbound`
/// expects it, and answers with its receipt or the reason why not.
///
/// # Errors
///
/// If the connection broke or the peer spoke out of turn. Nothing of what it
/// sent is left then.
///
/// # Cancel safety
///
/// Dropping it cuts the stream, and leaves nothing.
pub async fn receive_snapshot(inbound: &dyn Inbound, incoming: Incoming) -> io::Result<()> {
    receive(inbound, incoming, PACE).await
}

async fn receive(inbound: &dyn Inbound, incoming: Incoming, pace: Pace) -> io::Result<()> {
    let (mut from, mut to) = tokio::io::split(incoming.stream);
    let Peer::Host(host) = incoming.peer else {
        return Err(frame::invalid("only hosts send snapshots"));
    };
    let offer: io::Result<Offer> = timeout(pace.stall, frame::read(&mut from)).await?;
    let Offer { move_id, header } = offer?;
    let first = match inbound.offered(host, move_id, &header).await {
        Ok(None) => Answer::Go,
        Ok(Some(snapshot)) => Answer::Have(snapshot),
        Err(error) => Answer::Refused(error),
    };
    let go = matches!(first, Answer::Go);
    timeout(pace.stall, frame::write(&mut to, &first)).await??;
    if !go {
        return Ok(());
    }
    let mut work = inbound.receive(host, move_id, &header, chunks::reader(from, pace));
    let mut beat = interval_at(tokio::time::Instant::now() + pace.beat, pace.beat);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let last = loop {
        tokio::select! {
            biased;
            done = &mut work => break match done {
                Ok(snapshot) if snapshot.origin == header.origin && snapshot.name == header.name => {
                    Answer::Have(snapshot)
                }
                Ok(_) => Answer::Refused(CommandError {
                    code: ErrorCode::Failed,
                    message: format!("what arrived is not {}", header.name),
                }),
                Err(error) => Answer::Refused(error),
            },
            _ = beat.tick() => timeout(pace.stall, frame::write(&mut to, &Answer::Working)).await??,
        }
    };
    timeout(pace.stall, frame::write(&mut to, &last)).await?
}
