//! The in-memory bus.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use async_trait::async_trait;
use tokio::sync::watch;

use crate::{
    bus::{Bus, Error, Feed, Message, Payload, Subscription},
    subject::{self, Access},
};

/// A bus within one process, for tests and for programs that are one process.
/// Clones are the same bus.
///
/// It routes as the brokers do: every queue group that matches gets a message
/// once, and a pattern `>` listens without being counted.
///
/// ```
/// # tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(async {
/// use cocalc_core::{bus::{Bus, Payload}, memory::bus::MemoryBus, subject::Access};
///
/// let bus = MemoryBus::new();
/// let reader = bus.client("reader", |_, _| true);
/// let writer = bus.client("writer", |access, subject| {
///     access == Access::Publish && subject.starts_with("news.")
/// });
/// let mut news = reader.subscribe("news.*", None).await?;
/// assert_eq!(writer.publish("news.today", Payload::default()).await?, 1);
/// assert_eq!(news.next().await.map(|message| message.subject).as_deref(), Some("news.today"));
/// # Ok::<_, cocalc_core::bus::Error>(())
/// # }).unwrap();
/// ```
#[derive(Clone, Debug)]
pub struct MemoryBus(Arc<Shared>);

/// Whether one identity may do something.
type Policy = dyn Fn(Access, &str) -> bool + Send + Sync;

struct Shared {
    queue_bytes_max: usize,
    state: Mutex<State>,
    /// Counts subscriptions ever made, so that waiters look again.
    interest: watch::Sender<u64>,
}

#[derive(Default)]
struct State {
    next: u64,
    members: BTreeMap<u64, Member>,
    /// Which member of a group is next, so that work is spread.
    turn: usize,
}

struct Member {
    identity: String,
    pattern: String,
    group: String,
    feed: Feed,
}

impl MemoryBus {
    /// Makes a bus whose subscriptions queue at most 8 MiB each.
    pub fn new() -> Self {
        Self::with_queue_bytes(8 * 1024 * 1024)
    }

    /// Makes a bus whose subscriptions queue at most `queue_bytes_max` each.
    pub fn with_queue_bytes(queue_bytes_max: usize) -> Self {
        Self(Arc::new(Shared { queue_bytes_max, state: Mutex::default(), interest: watch::Sender::new(0) }))
    }

    /// A client that acts as `identity`, and may do what `policy` says.
    /// Replies to its own requests always reach it.
    pub fn client(
        &self,
        identity: &str,
        policy: impl Fn(Access, &str) -> bool + Send + Sync + 'static,
    ) -> Arc<dyn Bus> {
        Arc::new(MemoryClient {
            bus: self.0.clone(),
            identity: identity.to_owned(),
            policy: Arc::new(policy),
        })
    }

    /// Ends all subscriptions of `identity`; how many there were.
    pub fn revoke(&self, identity: &str) -> usize {
        let mut state = self.0.lock();
        let before = state.members.len();
        state.members.retain(|_, member| member.identity != identity);
        before - state.members.len()
    }
}

impl Default for MemoryBus {
    fn default() -> Self {
        Self::new()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn subscribe(self: &Arc<Self>, identity: &str, pattern: &str, queue: Option<&str>) -> Subscription {
        let mut state = self.lock();
        state.next += 1;
        let id = state.next;
        let registration = Registration { bus: Arc::downgrade(self), id };
        let (feed, subscription) = Subscription::bounded(self.queue_bytes_max, registration);
        // A name with a space cannot be confused with one that was given.
        let group = queue.map_or_else(|| format!("{id} alone"), str::to_owned);
        let (identity, pattern) = (identity.to_owned(), pattern.to_owned());
        state.members.insert(id, Member { identity, pattern, group, feed });
        drop(state);
        self.interest.send_replace(id);
        subscription
    }

    fn publish(&self, message: &Message) -> usize {
        let mut state = self.lock();
        state.turn = state.turn.wrapping_add(1);
        let turn = state.turn;
        let mut groups: BTreeMap<(String, String), Vec<u64>> = BTreeMap::new();
        for (id, member) in &state.members {
            if subject::matches(&member.pattern, &message.subject) {
                groups.entry((member.pattern.clone(), member.group.clone())).or_default().push(*id);
            }
        }
        let mut count = 0;
        for ((pattern, _), mut ids) in groups {
            while !ids.is_empty() {
                let id = ids.swap_remove(turn % ids.len());
                if state.members.get(&id).is_some_and(|member| member.feed.push(message.clone())) {
                    count += usize::from(pattern != ">");
                    break;
                }
                // Too slow, or gone: it loses the subscription, and the
                // message goes to another member of its group.
                state.members.remove(&id);
            }
        }
        count
    }

    fn has_interest(&self, subject: &str) -> bool {
        self.lock()
            .members
            .values()
            .any(|member| member.pattern != ">" && subject::matches(&member.pattern, subject))
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryBus").field("subscriptions", &self.lock().members.len()).finish()
    }
}

struct Registration {
    bus: Weak<Shared>,
    id: u64,
}

impl Drop for Registration {
    fn drop(&mut self) {
        if let Some(bus) = self.bus.upgrade() {
            // Dropped outside the lock: a feed is only a queue, but whatever
            // wakes there shall not find the bus locked.
            let member = bus.lock().members.remove(&self.id);
            drop(member);
        }
    }
}

struct MemoryClient {
    bus: Arc<Shared>,
    identity: String,
    policy: Arc<Policy>,
}

impl MemoryClient {
    fn check_publish(&self, subject: &str) -> Result<(), Error> {
        if !subject::is_subject(subject) {
            return Err(Error::InvalidSubject { subject: subject.to_owned() });
        }
        // Whoever knows an inbox was asked by its owner.
        if subject.starts_with("_INBOX.") || (self.policy)(Access::Publish, subject) {
            return Ok(());
        }
        Err(Error::Denied { action: "publish to", subject: subject.to_owned() })
    }
}

#[async_trait]
impl Bus for MemoryClient {
    async fn publish(&self, subject: &str, payload: Payload) -> Result<usize, Error> {
        self.check_publish(subject)?;
        Ok(self.bus.publish(&message(subject, payload)))
    }

    async fn subscribe(&self, pattern: &str, queue: Option<&str>) -> Result<Subscription, Error> {
        if !subject::is_pattern(pattern) {
            return Err(Error::InvalidSubject { subject: pattern.to_owned() });
        }
        if !(self.policy)(Access::Subscribe, pattern) {
            return Err(Error::Denied { action: "subscribe to", subject: pattern.to_owned() });
        }
        Ok(self.bus.subscribe(&self.identity, pattern, queue))
    }

    async fn request(&self, subject: &str, mut payload: Payload, limit: Duration) -> Result<Message, Error> {
        self.check_publish(subject)?;
        let inbox = {
            let mut state = self.bus.lock();
            state.next += 1;
            format!("_INBOX.memory.{}", state.next)
        };
        let mut replies = self.bus.subscribe(&self.identity, &inbox, None);
        payload.headers.insert("CN-Reply".to_owned(), inbox.into());
        if self.bus.publish(&message(subject, payload)) == 0 {
            return Err(Error::NoInterest { subject: subject.to_owned() });
        }
        match tokio::time::timeout(limit, replies.next()).await {
            Ok(Some(reply)) => Ok(reply),
            Ok(None) => Err(Error::Disconnected { source: None }),
            Err(_) => Err(Error::TimedOut { subject: subject.to_owned(), limit }),
        }
    }

    async fn wait_for_interest(&self, subject: &str, limit: Duration) -> Result<bool, Error> {
        self.check_publish(subject)?;
        let mut changes = self.bus.interest.subscribe();
        let wait = async {
            while !self.bus.has_interest(subject) {
                // The bus holds the sender for as long as this client lives.
                if changes.changed().await.is_err() {
                    return;
                }
            }
        };
        let _ = tokio::time::timeout(limit, wait).await;
        Ok(self.bus.has_interest(subject))
    }
}

impl fmt::Debug for MemoryClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryClient").field("identity", &self.identity).finish_non_exhaustive()
    }
}

fn message(subject: &str, payload: Payload) -> Message {
    let reply = payload.headers.get("CN-Reply").and_then(|to| to.as_str()).map(str::to_owned);
    Message { subject: subject.to_owned(), payload, reply }
}
