//! The routing core: a plain state machine.
//!
//! Requests and the time go in, [`Effect`]s come out; it knows no socket, no
//! clock and no randomness but its seed. A driver gives it one request after
//! the other, which is what makes the order in which subscribers see messages
//! the order in which they arrived, across all connections.

mod call;
mod index;
mod message;
mod random;

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use cocalc_core::subject;

use self::{call::PendingCall, index::Index, random::Random};
pub use message::{
    Batch, Call, CallKind, Delivery, Failure, Listen, Outgoing, Publication, RawMessage, Reply, Request,
    SocketId, Times,
};

/// How long chunks of one message may pause before its receivers forget it.
const PIN_IDLE: Duration = Duration::from_secs(120);

/// What one socket may use.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// How much may wait to be sent to it, in bytes. Beyond, it is closed.
    pub queue_bytes_max: usize,
    /// How much a message of it may hold, all chunks together, in bytes.
    pub message_bytes_max: usize,
    /// How many patterns it may listen to, and as many it may serve.
    pub subscriptions_max: usize,
    /// How many of its requests may wait for something, of each kind.
    pub pending_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            queue_bytes_max: 32 * 1024 * 1024,
            message_bytes_max: 256 * 1024 * 1024,
            subscriptions_max: 500,
            pending_max: 1000,
        }
    }
}

/// What the driver has to do.
#[derive(Debug)]
pub enum Effect {
    /// Send this, after what was to be sent before.
    Send {
        /// To whom.
        socket: SocketId,
        /// What.
        outgoing: Outgoing,
    },
    /// End this connection; the core has forgotten it.
    Close {
        /// Which.
        socket: SocketId,
        /// Why.
        reason: Closed,
    },
}

/// Why the core, or who drives it, ended a connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum Closed {
    /// It was too far behind in reading.
    Slow,
    /// Its access was revoked.
    Revoked,
    /// The broker ends.
    Shutdown,
}

/// A request with what the driver knows about it.
#[derive(Debug)]
pub struct Received {
    /// From whom.
    pub socket: SocketId,
    /// Where the answer goes, if one is wanted.
    pub ack: Option<u64>,
    /// What is asked.
    pub request: Request,
    /// When it arrived.
    pub at: Duration,
    /// How much of the time since then authorization took.
    pub auth: Duration,
}

/// The routing core of one broker.
#[derive(Debug)]
pub struct Router {
    sockets: BTreeMap<SocketId, Socket>,
    topics: Index,
    services: Index,
    waiters: BTreeMap<u64, Waiter>,
    calls: BTreeMap<u64, PendingCall>,
    timers: BTreeMap<(Duration, u64), Timer>,
    next: u64,
    random: Random,
    effects: VecDeque<Effect>,
}

#[derive(Debug)]
struct Socket {
    limits: Limits,
    /// Bytes that wait to be sent to it.
    queued: usize,
    /// Pattern → group.
    topics: BTreeMap<Arc<str>, Arc<str>>,
    services: BTreeMap<Arc<str>, Arc<str>>,
    /// Messages of which not all chunks have come, by id.
    pins: BTreeMap<String, Pin>,
    waiting: usize,
    calling: usize,
}

/// To whom all chunks of one message go.
#[derive(Debug)]
struct Pin {
    subject: String,
    next_seq: u64,
    bytes: usize,
    targets: Vec<Target>,
    timer: (Duration, u64),
}

#[derive(Clone, Debug)]
struct Target {
    pattern: Arc<str>,
    group: Arc<str>,
    member: SocketId,
}

#[derive(Debug)]
struct Waiter {
    socket: SocketId,
    ack: u64,
    subject: String,
    timer: (Duration, u64),
}

#[derive(Debug)]
enum Timer {
    Waiter(u64),
    Call(u64),
    Pin(SocketId, String),
}

impl Router {
    /// Starts without sockets. What is left to chance follows from `seed`.
    pub fn new(seed: u64) -> Self {
        Self {
            sockets: BTreeMap::new(),
            topics: Index::default(),
            services: Index::default(),
            waiters: BTreeMap::new(),
            calls: BTreeMap::new(),
            timers: BTreeMap::new(),
            // Below are the acknowledgements that drivers ask for themselves.
            next: 1000,
            random: Random::new(seed),
            effects: VecDeque::new(),
        }
    }

    /// Admits a socket; `socket` must be new.
    pub fn open(&mut self, socket: SocketId, limits: Limits) {
        self.sockets.insert(
            socket,
            Socket {
                limits,
                queued: 0,
                topics: BTreeMap::new(),
                services: BTreeMap::new(),
                pins: BTreeMap::new(),
                waiting: 0,
                calling: 0,
            },
        );
    }

    /// Forgets a socket, whose connection has ended. Repeating it is harmless.
    pub fn close(&mut self, socket: SocketId) {
        let Some(state) = self.sockets.remove(&socket) else { return };
        for (pattern, group) in &state.topics {
            self.topics.remove(pattern, group, socket);
        }
        for (pattern, group) in &state.services {
            self.services.remove(pattern, group, socket);
        }
        for pin in state.pins.values() {
            self.timers.remove(&pin.timer);
        }
        if state.waiting > 0 {
            let gone: Vec<_> = self
                .waiters
                .iter()
                .filter(|(_, waiter)| waiter.socket == socket)
                .map(|(id, _)| *id)
                .collect();
            for waiter in gone.iter().filter_map(|id| self.waiters.remove(id)) {
                self.timers.remove(&waiter.timer);
            }
        }
        self.forget_calls_of(socket);
    }

    /// Ends a connection from this side.
    pub fn kick(&mut self, socket: SocketId, reason: Closed) {
        if self.sockets.contains_key(&socket) {
            self.effects.push_back(Effect::Close { socket, reason });
            self.close(socket);
        }
    }

    /// Takes note that `bytes` of what was to be sent to `socket` are on
    /// their way.
    pub fn wrote(&mut self, socket: SocketId, bytes: usize) {
        if let Some(socket) = self.sockets.get_mut(&socket) {
            socket.queued = socket.queued.saturating_sub(bytes);
        }
    }

    /// When [`expire`](Self::expire) wants to be called.
    pub fn deadline(&self) -> Option<Duration> {
        self.timers.first_key_value().map(|((at, _), _)| *at)
    }

    /// Gives up what has waited too long.
    pub fn expire(&mut self, now: Duration) {
        while let Some(entry) = self.timers.first_entry() {
            if entry.key().0 > now {
                break;
            }
            match entry.remove() {
                Timer::Waiter(id) => {
                    if let Some(waiter) = self.waiters.remove(&id) {
                        self.waiter_done(&waiter, false);
                    }
                }
                Timer::Call(id) => self.call_timed_out(id),
                Timer::Pin(socket, id) => {
                    if let Some(socket) = self.sockets.get_mut(&socket) {
                        socket.pins.remove(&id);
                    }
                }
            }
        }
    }

    /// The next thing to do.
    pub fn effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// Does what a socket asks for. What comes from sockets that are closed is
    /// ignored.
    pub fn request(&mut self, received: Received, now: Duration) {
        let Received { socket, ack, request, at, auth } = received;
        if !self.sockets.contains_key(&socket) {
            return;
        }
        let times = Times { auth, route: now.saturating_sub(at).saturating_sub(auth), target: None };
        let reply = match request {
            Request::Publish(publication) => match self.publish(socket, publication, now) {
                Ok(count) => Reply::Published { count, times },
                Err(failure) => Reply::Failed(failure),
            },
            Request::Subscribe(batch) => self.listen(socket, batch, Kind::Topic),
            Request::Serve(batch) => self.listen(socket, batch, Kind::Service),
            Request::Unsubscribe(batch) => self.unlisten(socket, batch, Kind::Topic),
            Request::StopServing(batch) => self.unlisten(socket, batch, Kind::Service),
            Request::Subscriptions => {
                let patterns =
                    self.sockets.get(&socket).map(|socket| socket.topics.keys().cloned().collect());
                Reply::Subscriptions(patterns.unwrap_or_default())
            }
            Request::WaitForInterest { subject, limit } => {
                // Nobody would hear the answer.
                let Some(ack) = ack else { return };
                match self.wait(socket, ack, subject, limit, now) {
                    Some(reply) => reply,
                    None => return,
                }
            }
            Request::Call(call) => match self.call(socket, ack, call, times, now) {
                Some(reply) => reply,
                None => return,
            },
            Request::Answer { id, value } => {
                self.answer(socket, id, value, now);
                return;
            }
            Request::Refuse(failure) => Reply::Failed(failure),
            Request::Echo(value) => Reply::Echo(value),
            Request::Tell(frame) => {
                self.send(socket, Outgoing::Frame(frame));
                return;
            }
        };
        if let Some(ack) = ack {
            self.send(socket, Outgoing::Reply { ack, reply });
        }
    }

    /// Queues `outgoing`; `false` if the socket is gone, or is now because it
    /// was too far behind. What waits alone may be of any size.
    fn send(&mut self, socket: SocketId, outgoing: Outgoing) -> bool {
        let Some(state) = self.sockets.get_mut(&socket) else { return false };
        let size = outgoing.bytes();
        if state.queued > 0 && state.queued.saturating_add(size) > state.limits.queue_bytes_max {
            self.kick(socket, Closed::Slow);
            return false;
        }
        state.queued = state.queued.saturating_add(size);
        self.effects.push_back(Effect::Send { socket, outgoing });
        true
    }

    fn publish(&mut self, from: SocketId, publication: Publication, now: Duration) -> Result<usize, Failure> {
        if !subject::is_subject(&publication.subject) {
            return Err(Failure::subject());
        }
        let Some(socket) = self.sockets.get_mut(&from) else { return Ok(0) };
        let limit = socket.limits.message_bytes_max;
        if publication.bytes() > limit {
            return Err(Failure::too_large(limit));
        }
        let publication = Arc::new(publication);
        if publication.seq == 0 && publication.done {
            return Ok(self.deliver_fresh(&publication).0);
        }

        // A chunk. Its message has a pin, unless it is the first.
        let pin = socket.pins.remove(&publication.id);
        if let Some(pin) = &pin {
            self.timers.remove(&pin.timer);
        }
        let (count, targets, bytes) = if publication.seq == 0 {
            if socket.pins.len() >= socket.limits.pending_max {
                return Err(Failure { code: 429, message: "too many unfinished messages".to_owned() });
            }
            let (count, targets) = self.deliver_fresh(&publication);
            (count, targets, publication.bytes())
        } else {
            // Whoever would receive a chunk without those before it throws it
            // away, so it is sent to nobody.
            let Some(mut pin) = pin else { return Ok(0) };
            if pin.next_seq != publication.seq || pin.subject != publication.subject {
                return Ok(0);
            }
            let bytes = pin.bytes.saturating_add(publication.bytes());
            if bytes > limit {
                return Err(Failure::too_large(limit));
            }
            let count = self.deliver_pinned(&publication, &mut pin.targets);
            (count, pin.targets, bytes)
        };
        if !publication.done
            && let Some(socket) = self.sockets.get_mut(&from)
        {
            self.next += 1;
            let timer = (now + PIN_IDLE, self.next);
            self.timers.insert(timer, Timer::Pin(from, publication.id.clone()));
            let pin = Pin {
                subject: publication.subject.clone(),
                next_seq: publication.seq + 1,
                bytes,
                targets,
                timer,
            };
            socket.pins.insert(publication.id.clone(), pin);
        }
        Ok(count)
    }

    /// Sends to one member of each group that matches.
    fn deliver_fresh(&mut self, publication: &Arc<Publication>) -> (usize, Vec<Target>) {
        let mut targets = Vec::new();
        let random = &mut self.random;
        self.topics.visit(&publication.subject, &mut |entry| {
            for group in entry.groups.keys() {
                if let Some(member) = entry.pick(group, random) {
                    targets.push(Target { pattern: entry.pattern.clone(), group: group.clone(), member });
                }
            }
        });
        let count = self.deliver(publication, &mut targets, true);
        (count, targets)
    }

    /// Sends to the members that got the chunks before.
    fn deliver_pinned(&mut self, publication: &Arc<Publication>, targets: &mut Vec<Target>) -> usize {
        targets.retain(|target| {
            self.sockets
                .get(&target.member)
                .is_some_and(|socket| socket.topics.get(&target.pattern) == Some(&target.group))
        });
        self.deliver(publication, targets, false)
    }

    /// Sends to `targets`, and removes from them who could not be reached.
    /// With `others`, another member of the same group takes their place.
    fn deliver(&mut self, publication: &Arc<Publication>, targets: &mut Vec<Target>, others: bool) -> usize {
        let mut count = 0;
        let mut shared: Option<Arc<Delivery>> = None;
        targets.retain_mut(|target| {
            // Targets of one pattern come together, and share its frame.
            let delivery = match &shared {
                Some(delivery) if Arc::ptr_eq(&delivery.pattern, &target.pattern) => delivery.clone(),
                _ => Arc::new(Delivery::new(target.pattern.clone(), publication.clone())),
            };
            shared = Some(delivery.clone());
            while !self.send(target.member, Outgoing::Delivery(delivery.clone())) {
                let entry = self.topics.entry(&target.pattern).filter(|_| others);
                match entry.and_then(|entry| entry.pick(&target.group, &mut self.random)) {
                    Some(member) => target.member = member,
                    None => return false,
                }
            }
            // A tap on everything shall not hide that nobody listens.
            count += usize::from(&*target.pattern != ">");
            true
        });
        count
    }

    fn listen(&mut self, socket: SocketId, batch: Batch<Listen>, kind: Kind) -> Reply {
        let many = batch.many;
        let items: Vec<_> = batch
            .items
            .into_iter()
            .map(|item| item.and_then(|item| self.listen_one(socket, item, kind)))
            .collect();
        if kind == Kind::Topic {
            self.notice_interest();
        }
        match (many, items.into_iter()) {
            (false, mut items) => match items.next() {
                Some(Err(failure)) => Reply::Failed(failure),
                first => Reply::Subscribed { items: first.into_iter().collect(), many },
            },
            (true, items) => Reply::Subscribed { items: items.collect(), many },
        }
    }

    fn listen_one(&mut self, socket: SocketId, item: Listen, kind: Kind) -> Result<bool, Failure> {
        if !subject::is_pattern(&item.pattern) {
            return Err(Failure::subject());
        }
        if item.queue.len() > subject::SUBJECT_BYTES_MAX {
            return Err(Failure::invalid("the queue's name is too long"));
        }
        let Some(state) = self.sockets.get_mut(&socket) else { return Ok(false) };
        let (own, index) = match kind {
            Kind::Topic => (&mut state.topics, &mut self.topics),
            Kind::Service => (&mut state.services, &mut self.services),
        };
        if own.contains_key(item.pattern.as_str()) {
            return Ok(false);
        }
        if own.len() >= state.limits.subscriptions_max {
            let message = format!("at most {} subscriptions", state.limits.subscriptions_max);
            return Err(Failure { code: 429, message });
        }
        let pattern = index.insert(&item.pattern, &item.queue, socket);
        own.insert(pattern, item.queue.into());
        Ok(true)
    }

    fn unlisten(&mut self, socket: SocketId, batch: Batch<String>, kind: Kind) -> Reply {
        let reply = Reply::Unsubscribed { items: batch.items.len(), many: batch.many };
        let Some(state) = self.sockets.get_mut(&socket) else { return reply };
        let (own, index) = match kind {
            Kind::Topic => (&mut state.topics, &mut self.topics),
            Kind::Service => (&mut state.services, &mut self.services),
        };
        for pattern in batch.items.into_iter().flatten() {
            if let Some(group) = own.remove(pattern.as_str()) {
                index.remove(&pattern, &group, socket);
            }
        }
        reply
    }

    fn has_interest(&self, subject: &str) -> bool {
        let mut found = false;
        self.topics.visit(subject, &mut |entry| found |= &*entry.pattern != ">");
        found
    }

    fn wait(
        &mut self,
        socket: SocketId,
        ack: u64,
        subject: String,
        limit: Duration,
        now: Duration,
    ) -> Option<Reply> {
        if !subject::is_subject(&subject) {
            return Some(Reply::Failed(Failure::subject()));
        }
        if self.has_interest(&subject) {
            return Some(Reply::Interest(true));
        }
        if limit.is_zero() {
            return Some(Reply::Interest(false));
        }
        let state = self.sockets.get_mut(&socket)?;
        if state.waiting >= state.limits.pending_max {
            let message = "too many requests are waiting".to_owned();
            return Some(Reply::Failed(Failure { code: 429, message }));
        }
        state.waiting += 1;
        self.next += 1;
        let timer = (now.saturating_add(limit), self.next);
        self.timers.insert(timer, Timer::Waiter(self.next));
        self.waiters.insert(self.next, Waiter { socket, ack, subject, timer });
        None
    }

    /// Answers the waiters whose subject has found a listener.
    fn notice_interest(&mut self) {
        let found: Vec<_> = self
            .waiters
            .iter()
            .filter(|(_, waiter)| self.has_interest(&waiter.subject))
            .map(|(id, _)| *id)
            .collect();
        for waiter in found.iter().filter_map(|id| self.waiters.remove(id)).collect::<Vec<_>>() {
            self.timers.remove(&waiter.timer);
            self.waiter_done(&waiter, true);
        }
    }

    fn waiter_done(&mut self, waiter: &Waiter, found: bool) {
        if let Some(socket) = self.sockets.get_mut(&waiter.socket) {
            socket.waiting = socket.waiting.saturating_sub(1);
        }
        self.send(waiter.socket, Outgoing::Reply { ack: waiter.ack, reply: Reply::Interest(found) });
    }
}

#[derive(Clone, Copy, Eq, PartialEq)]
enum Kind {
    Topic,
    Service,
}

#[cfg(test)]
mod tests;
