//! Sending a snapshot to another host.

use std::{
    io,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use async_trait::async_trait;
use cocalc_auth::identity::Identity;
use cocalc_core::{
    connector::{self, Service},
    moves::host::{Delivered, Transfer, TransferError},
    router::HostAddress,
    storage::SendStream,
    stream::BoxStream,
};
use cocalc_ids::{HostId, MoveId};
use tokio::time::timeout;

use crate::{
    chunks::{self, Pace, PumpError},
    connector::Dialer,
    frame::{self, Answer, Offer},
    tls::SetupError,
};

/// How long a receiver that has refused may take to say why.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Sends snapshots over a direct, authenticated connection.
#[derive(Clone, Debug)]
pub struct PeerTransfer {
    dialer: Dialer,
    connect_limit: Duration,
    pace: Pace,
}

impl PeerTransfer {
    /// Sends as `identity`.
    ///
    /// # Errors
    ///
    /// If TLS does not accept the identity.
    pub fn new(identity: &Identity) -> Result<Self, SetupError> {
        Ok(Self { dialer: Dialer::new(identity)?, connect_limit: Duration::from_secs(10), pace: PACE })
    }

    /// Ends a stream that makes no progress for this long. Default: 60 s.
    pub fn stall_limit(mut self, limit: Duration) -> Self {
        self.pace = Pace { stall: limit, beat: limit / 6 };
        self
    }
}

/// Both ends' default.
pub(crate) const PACE: Pace = Pace { stall: Duration::from_secs(60), beat: Duration::from_secs(10) };

#[async_trait]
impl Transfer for PeerTransfer {
    async fn send(
        &self,
        to: HostId,
        address: &HostAddress,
        move_id: MoveId,
        stream: SendStream,
        progress: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<Delivered, TransferError> {
        let dial = self.dialer.dial(to, address, Service::Transfer, None, self.connect_limit);
        let wire = dial.await.map_err(|error| unreachable(to, error))?;
        send_snapshot(wire, to, move_id, stream, self.pace, progress).await
    }
}

fn unreachable(host: HostId, error: connector::Error) -> TransferError {
    TransferError::Cut { host, source: error.into() }
}

async fn send_snapshot(
    wire: BoxStream,
    host: HostId,
    move_id: MoveId,
    snapshot: SendStream,
    pace: Pace,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<Delivered, TransferError> {
    let cut = |error: io::Error| TransferError::Cut { host, source: error.into() };
    let (mut from, mut to) = tokio::io::split(wire);
    let offer = Offer { move_id, header: snapshot.header };
    timeout(pace.stall, frame::write(&mut to, &offer))
        .await
        .map_err(|_| cut(chunks::stalled()))?
        .map_err(cut)?;
    let first = timeout(pace.stall, frame::read(&mut from)).await;
    match first.map_err(|_| cut(chunks::stalled()))?.map_err(cut)? {
        Answer::Go => {}
        Answer::Have(snapshot) => return Ok(Delivered { snapshot, bytes: 0 }),
        Answer::Refused(error) => return Err(TransferError::Refused(error)),
        Answer::Working => return Err(cut(frame::invalid("it works before it was told to"))),
    }
    let heard = AtomicU64::new(0);
    let mut verdict = Box::pin(async {
        loop {
            match frame::read(&mut from).await {
                Ok(Answer::Working) => {
                    heard.fetch_add(1, Ordering::Relaxed);
                }
                other => return other,
            }
        }
    });
    let pumped = {
        let mut pump = Box::pin(chunks::pump(snapshot.reader, &mut to, pace, progress));
        tokio::select! {
            biased;
            // It can refuse before it has everything: no space, for instance.
            early = &mut verdict => return conclude(early, 0, host),
            pumped = &mut pump => pumped,
        }
    };
    match pumped {
        // Applying it and making it durable may take long; the receiver says
        // that it lives meanwhile.
        Ok(bytes) => loop {
            let before = heard.load(Ordering::Relaxed);
            match timeout(pace.stall, &mut verdict).await {
                Ok(last) => return conclude(last, bytes, host),
                Err(_) if heard.load(Ordering::Relaxed) != before => {}
                Err(_) => return Err(cut(chunks::stalled())),
            }
        },
        Err(PumpError::Source(error)) => Err(TransferError::Source { source: error.into() }),
        Err(PumpError::Wire(error)) => match timeout(LAST_WORDS, verdict).await {
            Ok(Ok(Answer::Refused(refusal))) => Err(TransferError::Refused(refusal)),
            _ => Err(cut(error)),
        },
    }
}

fn conclude(answer: io::Result<Answer>, bytes: u64, host: HostId) -> Result<Delivered, TransferError> {
    match answer {
        Ok(Answer::Have(snapshot)) => Ok(Delivered { snapshot, bytes }),
        Ok(Answer::Refused(error)) => Err(TransferError::Refused(error)),
        Ok(Answer::Go | Answer::Working) => {
            let source = frame::invalid("it answered out of turn").into();
            Err(TransferError::Cut { host, source })
        }
        Err(error) => Err(TransferError::Cut { host, source: error.into() }),
    }
}
