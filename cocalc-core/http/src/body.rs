//! The body of a message on its way through.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use cocalc_core::{BoxError, activity::Tap, auth::Denial};
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use tokio::time::{Instant, Sleep};

use crate::{activity::Activity, pool::Lease, trailers};

/// A body that streams, with back-pressure, and ends with an error when the
/// right to it is withdrawn.
pub struct Body {
    kind: Kind,
    watch: Option<Box<Watch>>,
}

enum Kind {
    Empty,
    Full(Bytes),
    Incoming(Incoming),
    /// Nobody wants it, and nothing more of it is read.
    Unwanted,
    Boxed(Pin<Box<dyn HttpBody<Data = Bytes, Error = BoxError> + Send>>),
}

#[derive(Default)]
struct Watch {
    revoked: Option<Pin<Box<dyn Future<Output = Denial> + Send>>>,
    /// Whether `revoked` counts only while nothing is there to be read.
    patient: bool,
    stall: Option<(Duration, Pin<Box<Sleep>>)>,
    lease: Option<Lease>,
    activity: Option<Arc<Activity>>,
    tap: Option<Tap>,
    gate: Option<Pin<Box<dyn Future<Output = Wanted> + Send>>>,
    begun: Option<Arc<AtomicBool>>,
}

/// What became of a body whose sender waits to be asked for it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Wanted {
    Yes,
    /// It was answered without.
    No,
}

/// Why a body ended before its end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BodyError {
    /// Whoever it is for may no longer have it.
    #[error("access was withdrawn: {0}")]
    Revoked(Denial),
    /// Nothing came for too long.
    #[error("no byte of the body for {0:?}")]
    Stalled(Duration),
}

impl Body {
    /// A body without a byte.
    pub const fn empty() -> Self {
        Self { kind: Kind::Empty, watch: None }
    }

    /// A body that is known already.
    pub fn full(bytes: impl Into<Bytes>) -> Self {
        let bytes = bytes.into();
        Self { kind: if bytes.is_empty() { Kind::Empty } else { Kind::Full(bytes) }, watch: None }
    }

    /// Any other body.
    pub fn new<B>(body: B) -> Self
    where
        B: HttpBody<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        if body.is_end_stream() {
            return Self::empty();
        }
        use http_body_util::BodyExt;
        Self { kind: Kind::Boxed(Box::pin(body.map_err(Into::into))), watch: None }
    }

    pub(crate) fn incoming(body: Incoming) -> Self {
        if body.is_end_stream() {
            return Self::empty();
        }
        Self { kind: Kind::Incoming(body), watch: None }
    }

    /// Ends with an error as soon as `revoked` resolves.
    pub(crate) fn until(mut self, revoked: impl Future<Output = Denial> + Send + 'static) -> Self {
        self.watch().revoked = Some(Box::pin(revoked));
        self
    }

    /// Ends with an error when `revoked` resolves while nothing of it is there to be
    /// read: one that is there whole costs no timer.
    pub(crate) fn until_late(self, revoked: impl Future<Output = Denial> + Send + 'static) -> Self {
        let mut body = self.until(revoked);
        body.watch().patient = true;
        body
    }

    /// Is not read before `gate` resolves.
    pub(crate) fn behind(mut self, gate: impl Future<Output = Wanted> + Send + 'static) -> Self {
        self.watch().gate = Some(Box::pin(gate));
        self
    }

    /// Notes on `begun` that it is read; hyper then tells a sender that waits
    /// to go on.
    pub(crate) fn noting_begin(mut self, begun: Arc<AtomicBool>) -> Self {
        self.watch().begun = Some(begun);
        self
    }

    /// Ends with an error when no byte comes for `limit`.
    pub(crate) fn stalled_after(mut self, limit: Duration) -> Self {
        if !matches!(self.kind, Kind::Empty | Kind::Full(_)) {
            self.watch().stall = Some((limit, Box::pin(tokio::time::sleep(limit))));
        }
        self
    }

    /// Reads what still comes, at most so many bytes and for so long, and
    /// throws it away.
    pub(crate) async fn drained(mut self, bytes_max: u64, limit: Duration) {
        use http_body_util::BodyExt;
        let read = async {
            let mut left = bytes_max;
            while let Some(Ok(frame)) = self.frame().await {
                let bytes = frame.data_ref().map_or(0, |data| u64::try_from(data.len()).unwrap_or(u64::MAX));
                let Some(rest) = left.checked_sub(bytes) else { return };
                left = rest;
            }
        };
        // Whether it ended by itself is nobody's business any more.
        let _ = tokio::time::timeout(limit, read).await;
    }

    /// Notes on `activity` whenever something moves.
    pub(crate) fn noting(mut self, activity: Arc<Activity>) -> Self {
        self.watch().activity = Some(activity);
        self
    }

    /// Notes on `tap` whenever something moves.
    pub(crate) fn metered(mut self, tap: Option<Tap>) -> Self {
        if let (Some(tap), false) = (tap, matches!(self.kind, Kind::Empty)) {
            self.watch().tap = Some(tap);
        }
        self
    }

    /// Gives the connection back when the body has been read to its end.
    pub(crate) fn returning(mut self, lease: Lease) -> Self {
        if HttpBody::is_end_stream(&self) {
            lease.give_back();
        } else {
            self.watch().lease = Some(lease);
        }
        self
    }

    /// The whole body, if it is there without waiting: empty or known.
    pub(crate) fn replay(&self) -> Option<Self> {
        match &self.kind {
            Kind::Empty => Some(Self::empty()),
            Kind::Full(bytes) => Some(Self::full(bytes.clone())),
            _ => None,
        }
    }

    fn watch(&mut self) -> &mut Watch {
        self.watch.get_or_insert_default()
    }

    /// The error with which it ends now, if it does.
    fn poll_revoked(&mut self, cx: &mut Context<'_>, patient: bool) -> Option<BoxError> {
        let watch = self.watch.as_mut().filter(|watch| watch.patient == patient)?;
        let Poll::Ready(denial) = watch.revoked.as_mut()?.as_mut().poll(cx) else { return None };
        self.watch = None;
        self.kind = Kind::Empty;
        Some(BodyError::Revoked(denial).into())
    }

    fn poll_kind(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match &mut self.kind {
            Kind::Empty => Poll::Ready(None),
            Kind::Unwanted => Poll::Pending,
            Kind::Full(bytes) => {
                let bytes = std::mem::take(bytes);
                self.kind = Kind::Empty;
                Poll::Ready(Some(Ok(Frame::data(bytes))))
            }
            Kind::Incoming(body) => Pin::new(body).poll_frame(cx).map_err(Into::into),
            Kind::Boxed(body) => body.as_mut().poll_frame(cx),
        }
    }
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if let Some(denial) = self.poll_revoked(cx, false) {
            return Poll::Ready(Some(Err(denial)));
        }
        if let Some(watch) = self.watch.as_mut()
            && let Some(gate) = watch.gate.as_mut()
            && let Poll::Ready(wanted) = gate.as_mut().poll(cx)
        {
            watch.gate = None;
            if wanted == Wanted::No {
                watch.stall = None;
                self.kind = Kind::Unwanted;
            }
        }
        let shut = self.watch.as_ref().is_some_and(|watch| watch.gate.is_some());
        if !shut && let Some(begun) = self.watch.as_mut().and_then(|watch| watch.begun.take()) {
            begun.store(!matches!(self.kind, Kind::Unwanted), Ordering::Release);
        }
        loop {
            let polled = if shut { Poll::Pending } else { self.poll_kind(cx) };
            let frame = match polled {
                Poll::Ready(frame) => frame,
                Poll::Pending => {
                    if let Some(denial) = self.poll_revoked(cx, true) {
                        return Poll::Ready(Some(Err(denial)));
                    }
                    if let Some((limit, sleep)) = self.watch.as_mut().and_then(|watch| watch.stall.as_mut())
                        && sleep.as_mut().poll(cx).is_ready()
                    {
                        let limit = *limit;
                        return Poll::Ready(Some(Err(BodyError::Stalled(limit).into())));
                    }
                    return Poll::Pending;
                }
            };
            match frame {
                Some(Ok(mut frame)) => {
                    if let Some(trailers) = frame.trailers_mut() {
                        trailers::filter(trailers);
                        if trailers.is_empty() {
                            continue;
                        }
                    }
                    // Nothing comes after trailers, and hyper asks for nothing.
                    let ended = frame.is_trailers() || HttpBody::is_end_stream(&*self);
                    if let Some(watch) = &mut self.watch {
                        if let Some((limit, sleep)) = &mut watch.stall {
                            sleep.as_mut().reset(Instant::now() + *limit);
                        }
                        if let Some(activity) = &watch.activity {
                            activity.moved();
                        }
                        if let Some(tap) = &watch.tap {
                            tap.moved();
                        }
                        if ended && let Some(lease) = watch.lease.take() {
                            lease.give_back();
                        }
                    }
                    return Poll::Ready(Some(Ok(frame)));
                }
                Some(Err(error)) => {
                    self.watch = None;
                    return Poll::Ready(Some(Err(error)));
                }
                None => {
                    if let Some(lease) = self.watch.as_mut().and_then(|watch| watch.lease.take()) {
                        lease.give_back();
                    }
                    self.watch = None;
                    return Poll::Ready(None);
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.kind {
            Kind::Empty => true,
            Kind::Full(_) | Kind::Unwanted => false,
            Kind::Incoming(body) => body.is_end_stream(),
            Kind::Boxed(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.kind {
            Kind::Empty => SizeHint::with_exact(0),
            Kind::Unwanted => SizeHint::default(),
            Kind::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Kind::Incoming(body) => body.size_hint(),
            Kind::Boxed(body) => body.size_hint(),
        }
    }
}

impl Default for Body {
    fn default() -> Self {
        Self::empty()
    }
}

impl From<String> for Body {
    fn from(text: String) -> Self {
        Self::full(text)
    }
}

impl From<&'static str> for Body {
    fn from(text: &'static str) -> Self {
        Self::full(text)
    }
}

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Body").field("size", &self.size_hint().exact()).finish_non_exhaustive()
    }
}
