//! One connection that is made again whenever it breaks, and what survives it.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use cocalc_core::{
    bus::{Error, Feed, Message},
    subject::Access,
};
use serde_json::value::RawValue;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch},
    task::JoinHandle,
    time::Instant,
};

use super::{options::ClientOptions, session, target::Target};
use crate::{
    chunk::{Assembler, Chunk},
    client::Credentials,
    failure,
    router::Failure,
    wire::Frame,
};

/// A connection, kept up by a task that ends with this.
#[derive(Debug)]
pub(super) struct Lane {
    pub(super) shared: Arc<Shared>,
    task: JoinHandle<()>,
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.task.abort();
        self.shared.disconnect();
        self.shared.lock().subscriptions.clear();
    }
}

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) target: Target,
    pub(super) credentials: Arc<dyn Credentials>,
    pub(super) options: ClientOptions,
    state: Mutex<State>,
    pub(super) connected: watch::Sender<bool>,
    pub(super) generation: watch::Sender<u64>,
    sending: Arc<Semaphore>,
}

#[derive(Debug, Default)]
struct State {
    link: Option<Link>,
    next_ack: u64,
    next_subscription: u64,
    acks: HashMap<u64, oneshot::Sender<Result<Box<RawValue>, Failure>>>,
    replies: HashMap<String, oneshot::Sender<Message>>,
    subscriptions: BTreeMap<String, Entry>,
    last_error: Option<String>,
}

/// What a live connection offers.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) frames: mpsc::UnboundedSender<Sending>,
    pub(super) inbox: Option<String>,
    pub(super) max_payload: usize,
}

/// A frame, with its share of what may wait to be sent.
pub(super) type Sending = (Frame, Option<OwnedSemaphorePermit>);

#[derive(Debug)]
struct Entry {
    id: u64,
    queue: String,
    feed: Feed,
    assembler: Assembler,
}

impl Lane {
    pub(super) fn start(target: Target, credentials: Arc<dyn Credentials>, options: ClientOptions) -> Self {
        let sending = options.send_bytes_max.clamp(1, Semaphore::MAX_PERMITS);
        let shared = Arc::new(Shared {
            target,
            credentials,
            options,
            state: Mutex::default(),
            connected: watch::Sender::new(false),
            generation: watch::Sender::new(0),
            sending: Arc::new(Semaphore::new(sending)),
        });
        let task = tokio::spawn(keep_up(shared.clone()));
        Self { shared, task }
    }
}

/// Connects, again and again.
async fn keep_up(shared: Arc<Shared>) {
    let mut pause = shared.options.reconnect_min;
    loop {
        let before = *shared.generation.borrow();
        let error = session::run(&shared).await;
        shared.disconnect();
        let text = cocalc_core::chain(&error);
        tracing::info!(error = %text, target = %shared.target, "bus connection ended");
        shared.lock().last_error = Some(text);
        if *shared.generation.borrow() != before {
            pause = shared.options.reconnect_min;
        }
        // Between half of it and one and a half, so that the clients of a
        // broker that restarts don't come all at once.
        let chance = u32::try_from(crate::random::number() % 1000).unwrap_or(0);
        tokio::time::sleep(pause / 2 + pause * chance / 1000).await;
        pause = (pause * 2).min(shared.options.reconnect_max);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn last_error(&self) -> Option<String> {
        self.lock().last_error.clone()
    }

    /// Waits until the connection is up, for as long as patience lasts.
    pub(super) async fn ready(&self, limit: Duration) -> Result<(), Error> {
        let mut connected = self.connected.subscribe();
        let up = connected.wait_for(|up| *up);
        match tokio::time::timeout(limit.min(self.options.patience), up).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(self.disconnected()),
        }
    }

    pub(super) fn disconnected(&self) -> Error {
        Error::Disconnected { source: self.last_error().map(Into::into) }
    }

    /// Takes note that the connection works.
    pub(super) fn connect(&self, link: Link) {
        let mut state = self.lock();
        state.link = Some(link);
        state.last_error = None;
        drop(state);
        self.generation.send_modify(|generation| *generation += 1);
        self.connected.send_replace(true);
    }

    /// Takes note that it doesn't: who waits for an answer won't get one.
    pub(super) fn disconnect(&self) {
        let mut state = self.lock();
        state.link = None;
        state.acks.clear();
        state.replies.clear();
        drop(state);
        self.connected.send_replace(false);
    }

    /// The inbox of the present connection, and how large a frame may be.
    pub(super) fn link(&self) -> Result<(Option<String>, usize), Error> {
        let state = self.lock();
        match &state.link {
            Some(link) => Ok((link.inbox.clone(), link.max_payload)),
            None => {
                drop(state);
                Err(self.disconnected())
            }
        }
    }

    /// Sends what `frame` makes of an acknowledgement's number, and waits for
    /// that.
    pub(super) async fn ask(
        &self,
        bytes: usize,
        limit: Duration,
        frame: impl FnOnce(u64) -> Frame,
    ) -> Result<Result<Box<RawValue>, Failure>, Error> {
        let share = (bytes + 256).min(self.options.send_bytes_max).try_into().unwrap_or(u32::MAX);
        let exchange = async {
            let permit = self.sending.clone().acquire_many_owned(share).await.ok();
            let (sender, answer) = oneshot::channel();
            let ack = {
                let mut state = self.lock();
                state.next_ack += 1;
                let ack = state.next_ack;
                let sent =
                    state.link.as_ref().is_some_and(|link| link.frames.send((frame(ack), permit)).is_ok());
                if !sent {
                    drop(state);
                    return Err(self.disconnected());
                }
                state.acks.insert(ack, sender);
                ack
            };
            let _forget = OnDrop(|| {
                self.lock().acks.remove(&ack);
            });
            answer.await.map_err(|_| self.disconnected())
        };
        tokio::time::timeout(limit, exchange).await.unwrap_or_else(|_| {
            Err(Error::Disconnected { source: Some("the broker did not answer in time".into()) })
        })
    }

    /// Takes an acknowledgement.
    pub(super) fn answered(&self, id: u64, argument: Option<Box<RawValue>>) {
        let Some(waiting) = self.lock().acks.remove(&id) else { return };
        let Some(argument) = argument else { return };
        let _ = waiting.send(outcome(argument));
    }

    /// Registers who waits for a reply with this name.
    pub(super) fn expect_reply(&self, token: &str) -> oneshot::Receiver<Message> {
        let (sender, reply) = oneshot::channel();
        self.lock().replies.insert(token.to_owned(), sender);
        reply
    }

    /// Forgets it.
    pub(super) fn forget_reply(&self, token: &str) {
        self.lock().replies.remove(token);
    }

    /// Hands a reply to who waits for it.
    pub(super) fn replied(&self, message: Message) {
        let token = message.subject.rsplit('.').next().unwrap_or_default();
        let waiting = self.lock().replies.remove(token);
        if let Some(waiting) = waiting {
            let _ = waiting.send(message);
        }
    }

    /// Reserves a pattern; `None` if it is taken, because the protocol knows
    /// only one subscription of a connection to each.
    pub(super) fn reserve(&self, pattern: &str, queue: &str, feed: &mut Option<Feed>) -> Option<u64> {
        let mut state = self.lock();
        if state.subscriptions.contains_key(pattern) {
            return None;
        }
        let feed = feed.take()?;
        state.next_subscription += 1;
        let id = state.next_subscription;
        let assembler = Assembler::new(self.options.message_bytes_max);
        state
            .subscriptions
            .insert(pattern.to_owned(), Entry { id, queue: queue.to_owned(), feed, assembler });
        Some(id)
    }

    /// Ends a subscription here and at the broker; `true` if none are left.
    pub(super) fn release(&self, pattern: &str, id: u64) -> bool {
        let mut state = self.lock();
        if state.subscriptions.get(pattern).is_some_and(|entry| entry.id == id) {
            state.drop_subscription(pattern);
        }
        state.subscriptions.is_empty()
    }

    /// What has to be subscribed to on a new connection.
    pub(super) fn wanted(&self) -> Vec<(String, String)> {
        let state = self.lock();
        state.subscriptions.iter().map(|(pattern, entry)| (pattern.clone(), entry.queue.clone())).collect()
    }

    /// Ends a subscription that the broker refuses to continue.
    pub(super) fn refused(&self, pattern: &str, failure: &Failure) {
        let error = failure::error(failure, pattern, Access::Subscribe, 0);
        tracing::warn!(pattern, %error, "subscription ended");
        self.lock().subscriptions.remove(pattern);
    }

    /// Takes a delivery.
    pub(super) fn delivered(&self, pattern: &str, chunk: &Chunk<'_>) {
        let mut state = self.lock();
        // Late deliveries of what was unsubscribed are normal.
        let Some(entry) = state.subscriptions.get_mut(pattern) else { return };
        let Some(message) = entry.assembler.push(chunk, Instant::now()) else { return };
        if !entry.feed.push(message) {
            // The reader is gone, or too slow: it must see the end, not a gap.
            state.drop_subscription(pattern);
        }
    }
}

impl State {
    fn drop_subscription(&mut self, pattern: &str) {
        self.subscriptions.remove(pattern);
        if let Some(link) = &self.link {
            let argument = serde_json::json!({ "subject": pattern }).to_string();
            let _ = link.frames.send((crate::wire::event("unsubscribe", &argument, None, None), None));
        }
    }
}

/// Tells failures from answers.
pub(super) fn outcome(argument: Box<RawValue>) -> Result<Box<RawValue>, Failure> {
    #[derive(serde::Deserialize)]
    struct Failed {
        error: String,
        #[serde(default)]
        code: Option<serde_json::Value>,
    }
    if !argument.get().starts_with('{') {
        return Ok(argument);
    }
    match serde_json::from_str::<Failed>(argument.get()) {
        Err(_) => Ok(argument),
        Ok(failed) => {
            let message = failed.error.strip_prefix("Error: ").unwrap_or(&failed.error).to_owned();
            let code = failed.code.as_ref().and_then(serde_json::Value::as_u64);
            let known = code.and_then(|code| u16::try_from(code).ok());
            // Some brokers leave out the code of what is malformed.
            let code = known.unwrap_or(if message.contains("invalid subject") { 400 } else { 500 });
            Err(Failure { code, message })
        }
    }
}

/// Runs a function at the end of a scope, also when a future is dropped there.
pub(super) struct OnDrop<F: FnMut()>(pub(super) F);

impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}
