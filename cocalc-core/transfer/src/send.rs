//! Sending a snapshot to another host.

use std::{
    io,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use cocalc_auth::identity::Identity;
use cocalc_core::{
    connector::{self, Service},
    moves::host::{Delivered, StreamSource, Transfer, TransferError},
    router::HostAddress,
    storage::SendStream,
    stream::{BoxRead, BoxStream},
};
use cocalc_ids::{HostId, MoveId};
use serde::Serialize;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::timeout,
};

use crate::{
    chunks::{self, Pace, Prefix, PumpError},
    connector::Dialer,
    frame::{self, Answer, Decision, Offer},
    throttle::Throttle,
    tls::SetupError,
};

/// How long a receiver that has refused may take to say why.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// How often a broken connection is made again without a byte more arriving.
const TRIES: u32 = 6;
/// The first pause before it is made again; doubles each time.
const PAUSE: Duration = Duration::from_millis(200);

/// Sends snapshots over a direct, authenticated connection. When that breaks,
/// it is made again, and the stream goes on where the receiver has it, if the
/// source can be read again and still begins with the same bytes.
#[derive(Clone, Debug)]
pub struct PeerTransfer {
    dialer: Dialer,
    connect_limit: Duration,
    pace: Pace,
    throttle: Throttle,
}

impl PeerTransfer {
    /// Sends as `identity`.
    ///
    /// # Errors
    ///
    /// If TLS does not accept the identity.
    pub fn new(identity: &Identity) -> Result<Self, SetupError> {
        let (connect_limit, throttle) = (Duration::from_secs(10), Throttle::default());
        Ok(Self { dialer: Dialer::new(identity)?, connect_limit, pace: PACE, throttle })
    }

    /// Ends a stream that makes no progress for this long. Default: 60 s.
    pub fn stall_limit(mut self, limit: Duration) -> Self {
        self.pace = Pace { stall: limit, beat: limit / 6 };
        self
    }

    /// How fast its streams go, all together.
    pub fn throttle(&self) -> &Throttle {
        &self.throttle
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
        source: &dyn StreamSource,
        progress: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<Delivered, TransferError> {
        let stream = source.open().await?;
        let header = stream.header.clone();
        let parcel = Parcel {
            transfer: self,
            host: to,
            source,
            opened: Mutex::new(Some(stream)),
            offer: Offer { move_id, header, again: source.repeatable() },
            shown: AtomicU64::new(0),
            progress,
        };
        let mut tries = 0;
        loop {
            let before = parcel.shown.load(Ordering::Relaxed);
            let dial = self.dialer.dial(to, address, Service::Transfer, None, self.connect_limit);
            let sent = match dial.await {
                Ok(wire) => parcel.send(wire).await,
                Err(error @ connector::Error::Untrusted { .. }) => return Err(unreachable(to, error)),
                Err(error) => Err(unreachable(to, error)),
            };
            match sent {
                Err(TransferError::Cut { host, source }) if parcel.offer.again => {
                    let further = parcel.shown.load(Ordering::Relaxed) > before;
                    tries = if further { 1 } else { tries + 1 };
                    if tries >= TRIES {
                        return Err(TransferError::Cut { host, source });
                    }
                    tracing::info!(%host, %move_id, name = %parcel.offer.header.name,
                        error = %cocalc_core::chain(&*source), "the connection broke; making it again");
                    // Its thread and its pipe are of no more use.
                    drop(parcel.take());
                    tokio::time::sleep(PAUSE * 2u32.pow(tries - 1)).await;
                }
                other => return other,
            }
        }
    }
}

fn unreachable(host: HostId, error: connector::Error) -> TransferError {
    TransferError::Cut { host, source: error.into() }
}

/// A snapshot to be sent, over as many connections as it takes.
struct Parcel<'a> {
    transfer: &'a PeerTransfer,
    host: HostId,
    source: &'a dyn StreamSource,
    /// The stream at its beginning, if it is open already.
    opened: Mutex<Option<SendStream>>,
    offer: Offer,
    /// How many bytes people have been shown; never goes back.
    shown: AtomicU64,
    progress: &'a (dyn Fn(u64) + Send + Sync),
}

impl Parcel<'_> {
    fn cut(&self, error: io::Error) -> TransferError {
        TransferError::Cut { host: self.host, source: error.into() }
    }

    fn show(&self, bytes: u64) {
        if self.shown.fetch_max(bytes, Ordering::Relaxed) < bytes {
            (self.progress)(bytes);
        }
    }

    fn take(&self) -> Option<SendStream> {
        self.opened.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    async fn open(&self) -> Result<BoxRead, TransferError> {
        let stream = match self.take() {
            Some(stream) => stream,
            None => self.source.open().await?,
        };
        Ok(stream.reader)
    }

    async fn say<T: Serialize + Sync>(
        &self,
        to: &mut (impl AsyncWrite + Unpin),
        message: &T,
    ) -> Result<(), TransferError> {
        let written = timeout(self.transfer.pace.stall, frame::write(to, message)).await;
        written.map_err(|_| self.cut(chunks::stalled()))?.map_err(|error| self.cut(error))
    }

    async fn hear(&self, from: &mut (impl AsyncRead + Unpin)) -> Result<Answer, TransferError> {
        let read = timeout(self.transfer.pace.stall, frame::read(from)).await;
        read.map_err(|_| self.cut(chunks::stalled()))?.map_err(|error| self.cut(error))
    }

    /// Sends it over this connection, from where the receiver has it.
    async fn send(&self, wire: BoxStream) -> Result<Delivered, TransferError> {
        let (mut from, mut to) = tokio::io::split(wire);
        self.say(&mut to, &self.offer).await?;
        let mut before = Prefix::default();
        let mut reader = None;
        let mut answer = self.hear(&mut from).await?;
        if let Answer::Resume { bytes, sha256 } = &answer {
            let mut again = self.open().await?;
            match self.reread(&mut again, *bytes, &mut to).await? {
                Some(prefix) if prefix.hex() == *sha256 => {
                    self.say(&mut to, &Decision::Continue).await?;
                    tracing::info!(host = %self.host, bytes, "going on where the connection broke");
                    (before, reader, answer) = (prefix, Some(again), Answer::Go);
                }
                _ => {
                    drop(again);
                    self.say(&mut to, &Decision::Restart).await?;
                    answer = self.hear(&mut from).await?;
                }
            }
        }
        match answer {
            Answer::Go => {}
            Answer::Have(snapshot) => {
                // The connection may have broken right before the receipt.
                return Ok(Delivered { snapshot, bytes: self.shown.load(Ordering::Relaxed) });
            }
            Answer::Refused(error) => return Err(TransferError::Refused(error)),
            Answer::Working | Answer::Resume { .. } => {
                return Err(self.cut(frame::invalid("it answers out of turn")));
            }
        }
        let reader = match reader {
            Some(reader) => reader,
            None => self.open().await?,
        };
        self.show(before.bytes);
        self.stream(reader, before, &mut from, &mut to).await
    }

    /// Reads the prefix of a stream again, and says meanwhile that it does.
    async fn reread(
        &self,
        reader: &mut BoxRead,
        bytes: u64,
        to: &mut (impl AsyncWrite + Unpin),
    ) -> Result<Option<Prefix>, TransferError> {
        let mut read = Box::pin(chunks::reread(reader, bytes));
        loop {
            match timeout(self.transfer.pace.beat, &mut read).await {
                Ok(read) => return read.map_err(|error| TransferError::Source { source: error.into() }),
                Err(_) => self.say(to, &Decision::Checking).await?,
            }
        }
    }

    async fn stream(
        &self,
        reader: BoxRead,
        before: Prefix,
        from: &mut (impl AsyncRead + Unpin + Send),
        to: &mut (impl AsyncWrite + Unpin),
    ) -> Result<Delivered, TransferError> {
        let (pace, host) = (self.transfer.pace, self.host);
        let heard = AtomicU64::new(0);
        let mut verdict = Box::pin(async {
            loop {
                match frame::read(from).await {
                    Ok(Answer::Working) => {
                        heard.fetch_add(1, Ordering::Relaxed);
                    }
                    other => return other,
                }
            }
        });
        let pumped = {
            let progress = |bytes| self.show(bytes);
            let pump = chunks::pump(reader, before, to, pace, &self.transfer.throttle, &progress);
            let mut pump = Box::pin(pump);
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
                    Err(_) => return Err(self.cut(chunks::stalled())),
                }
            },
            Err(PumpError::Source(error)) => Err(TransferError::Source { source: error.into() }),
            Err(PumpError::Wire(error)) => match timeout(LAST_WORDS, verdict).await {
                Ok(Ok(Answer::Refused(refusal))) => Err(TransferError::Refused(refusal)),
                _ => Err(self.cut(error)),
            },
        }
    }
}

fn conclude(answer: io::Result<Answer>, bytes: u64, host: HostId) -> Result<Delivered, TransferError> {
    match answer {
        Ok(Answer::Have(snapshot)) => Ok(Delivered { snapshot, bytes }),
        Ok(Answer::Refused(error)) => Err(TransferError::Refused(error)),
        Ok(Answer::Go | Answer::Resume { .. } | Answer::Working) => {
            let source = frame::invalid("it answered out of turn").into();
            Err(TransferError::Cut { host, source })
        }
        Err(error) => Err(TransferError::Cut { host, source: error.into() }),
    }
}
