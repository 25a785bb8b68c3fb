//! The client: the bus of a program at the far end of a WebSocket.

mod lane;
mod options;
mod session;
mod target;

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use async_trait::async_trait;
use cocalc_core::{
    bus::{Bus, Error, Message, Payload, Subscription},
    subject::{self, Access},
};
use serde::Deserialize;
use tokio::sync::watch;

use self::{
    lane::{Lane, OnDrop},
    target::Target,
};
pub use options::{Bearer, ClientOptions, Credentials, Dial};
pub use target::UrlError;

use crate::{
    chunk::{chunk_bytes, cut},
    failure,
    router::Failure,
    wire::{self, event},
};

/// A client of a broker, which connects again whenever the connection breaks.
/// Clones are the same client; when the last is dropped, it disconnects.
///
/// Subscriptions outlive a connection: they are made again on the next one,
/// and what was published in between is not seen. Who has to know of that,
/// watches [`generation`](Self::generation). Calls that are under way when the
/// connection breaks fail; calls made without one wait for it, but not for
/// long.
#[derive(Clone)]
pub struct Client(Arc<Inner>);

struct Inner {
    first: Lane,
    /// The protocol knows one subscription of a connection to a pattern; each
    /// further one gets a connection of its own.
    others: Mutex<Vec<Arc<Lane>>>,
    target: Target,
    credentials: Arc<dyn Credentials>,
    options: ClientOptions,
}

impl Client {
    /// Makes a client of the bus at `url` (`ws://host:port/base/`, to which
    /// `conat/` is added), which starts to connect. It has to be called within
    /// a Tokio runtime.
    ///
    /// # Errors
    ///
    /// URLs that cannot be dialed.
    pub fn connect(
        url: &str,
        credentials: Arc<dyn Credentials>,
        options: ClientOptions,
    ) -> Result<Self, UrlError> {
        let target = Target::parse(url, options.dial.is_some())?;
        let first = Lane::start(target.clone(), credentials.clone(), options.clone());
        Ok(Self(Arc::new(Inner { first, others: Mutex::default(), target, credentials, options })))
    }

    /// Whether it is connected, signed in and subscribed.
    pub fn connected(&self) -> watch::Receiver<bool> {
        self.0.first.shared.connected.subscribe()
    }

    /// Counts connections; changes whenever it has connected again.
    pub fn generation(&self) -> watch::Receiver<u64> {
        self.0.first.shared.generation.subscribe()
    }

    /// Waits until it is connected.
    ///
    /// # Errors
    ///
    /// When it isn't within `limit`, with the reason of the last failure.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn ready(&self, limit: Duration) -> Result<(), Error> {
        let mut connected = self.connected();
        match tokio::time::timeout(limit, connected.wait_for(|up| *up)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(self.0.first.shared.disconnected()),
        }
    }

    /// Why it is not connected, as far as is known.
    pub fn last_error(&self) -> Option<String> {
        self.0.first.shared.last_error()
    }

    async fn send(&self, subject: &str, payload: Payload, limit: Duration) -> Result<usize, Error> {
        #[derive(Deserialize)]
        struct Published {
            count: usize,
        }
        let shared = &self.0.first.shared;
        let size = payload.data.len();
        if size > self.0.options.message_bytes_max {
            return Err(Error::TooLarge { size, limit: self.0.options.message_bytes_max });
        }
        let (_, max_payload) = shared.link()?;
        let chunks = cut(subject, payload, chunk_bytes(max_payload)).map_err(broken)?;
        let mut count = 0;
        for chunk in chunks {
            let answer = shared.ask(chunk.bytes(), limit, |ack| event::publication(&chunk, ack)).await?;
            let answer = answer.map_err(|failed| failure::error(&failed, subject, Access::Publish, size))?;
            count = serde_json::from_str::<Published>(answer.get()).map_err(broken)?.count;
        }
        Ok(count)
    }

    fn others(&self) -> MutexGuard<'_, Vec<Arc<Lane>>> {
        self.0.others.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Bus for Client {
    async fn publish(&self, subject: &str, payload: Payload) -> Result<usize, Error> {
        check_subject(subject)?;
        self.0.first.shared.ready(Duration::MAX).await?;
        self.send(subject, payload, self.0.options.answer_limit).await
    }

    async fn subscribe(&self, pattern: &str, queue: Option<&str>) -> Result<Subscription, Error> {
        if !subject::is_pattern(pattern) {
            return Err(Error::InvalidSubject { subject: pattern.to_owned() });
        }
        let queue = queue.map_or_else(|| crate::random::name(10), str::to_owned);
        let registration = Arc::new(Mutex::new(None::<Registration>));
        let (feed, subscription) =
            Subscription::bounded(self.0.options.queue_bytes_max, registration.clone());
        let mut feed = Some(feed);
        let set = |value| *registration.lock().unwrap_or_else(PoisonError::into_inner) = Some(value);

        let reserved = self.0.first.shared.reserve(pattern, &queue, &mut feed);
        let shared = if let Some(id) = reserved {
            let shared = self.0.first.shared.clone();
            set(Registration { client: Weak::new(), lane: shared.clone(), pattern: pattern.to_owned(), id });
            shared
        } else {
            let mut others = self.others();
            let mut found = None;
            for lane in others.iter() {
                if let Some(id) = lane.shared.reserve(pattern, &queue, &mut feed) {
                    found = Some((lane.shared.clone(), id));
                    break;
                }
            }
            let (shared, id) = match found {
                Some(found) => found,
                None => {
                    let lane = Lane::start(
                        self.0.target.clone(),
                        self.0.credentials.clone(),
                        self.0.options.clone(),
                    );
                    let shared = lane.shared.clone();
                    others.push(Arc::new(lane));
                    // A new connection has no subscription yet.
                    let Some(id) = shared.reserve(pattern, &queue, &mut feed) else {
                        return Err(Error::Disconnected { source: None });
                    };
                    (shared, id)
                }
            };
            let client = Arc::downgrade(&self.0);
            set(Registration { client, lane: shared.clone(), pattern: pattern.to_owned(), id });
            shared
        };

        shared.ready(Duration::MAX).await?;
        // On a connection that came up in the meantime this finds it done.
        let argument = serde_json::json!({ "subject": pattern, "queue": queue }).to_string();
        let frame = |ack| wire::event("subscribe", &argument, Some(ack), None);
        let answer = shared.ask(argument.len(), self.0.options.answer_limit, frame).await?;
        answer.map_err(|failed| failure::error(&failed, pattern, Access::Subscribe, 0))?;
        Ok(subscription)
    }

    async fn request(&self, subject: &str, mut payload: Payload, limit: Duration) -> Result<Message, Error> {
        check_subject(subject)?;
        let shared = &self.0.first.shared;
        shared.ready(limit).await?;
        let (inbox, _) = shared.link()?;
        let Some(inbox) = inbox else {
            let subject = "the inbox for replies".to_owned();
            return Err(Error::Denied { action: "subscribe to", subject });
        };
        let token = crate::random::name(16);
        payload.headers.insert("CN-Reply".to_owned(), format!("{inbox}.{token}").into());
        let reply = shared.expect_reply(&token);
        let _forget = OnDrop(|| shared.forget_reply(&token));
        let exchange = async {
            if self.send(subject, payload, limit).await? == 0 {
                return Err(Error::NoInterest { subject: subject.to_owned() });
            }
            reply.await.map_err(|_| shared.disconnected())
        };
        tokio::time::timeout(limit, exchange)
            .await
            .unwrap_or_else(|_| Err(Error::TimedOut { subject: subject.to_owned(), limit }))
    }

    async fn wait_for_interest(&self, subject: &str, limit: Duration) -> Result<bool, Error> {
        check_subject(subject)?;
        let shared = &self.0.first.shared;
        shared.ready(limit).await?;
        let millis = limit.as_secs_f64() * 1000.0;
        let argument = serde_json::json!({ "subject": subject, "timeout": millis }).to_string();
        let frame = |ack| wire::event("wait-for-interest", &argument, Some(ack), None);
        let patience = limit.saturating_add(self.0.options.answer_limit);
        let answer = shared.ask(argument.len(), patience, frame).await?;
        let answer =
            answer.map_err(|failed: Failure| failure::error(&failed, subject, Access::Publish, 0))?;
        serde_json::from_str(answer.get()).map_err(broken)
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("target", &self.0.target.to_string())
            .field("connected", &*self.0.first.shared.connected.borrow())
            .finish()
    }
}

/// Ends a subscription when it is dropped, and the connection that was made
/// for it.
struct Registration {
    client: Weak<Inner>,
    lane: Arc<lane::Shared>,
    pattern: String,
    id: u64,
}

impl Drop for Registration {
    fn drop(&mut self) {
        let empty = self.lane.release(&self.pattern, self.id);
        let Some(client) = self.client.upgrade() else { return };
        if empty {
            let mut others = client.others.lock().unwrap_or_else(PoisonError::into_inner);
            // Again under the lock: somebody may have joined it.
            others.retain(|lane| !Arc::ptr_eq(&lane.shared, &self.lane) || !lane.shared.wanted().is_empty());
        }
    }
}

fn check_subject(subject: &str) -> Result<(), Error> {
    if subject::is_subject(subject) {
        Ok(())
    } else {
        Err(Error::InvalidSubject { subject: subject.to_owned() })
    }
}

fn broken(source: serde_json::Error) -> Error {
    Error::Disconnected { source: Some(source.into()) }
}
