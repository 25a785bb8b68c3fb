//! A client within the broker's process.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use cocalc_core::{
    bus::{Bus, Error, Feed, Message, Payload, Subscription},
    subject::{self, Access},
};
use tokio::{
    sync::{OnceCell, mpsc, oneshot},
    task::JoinHandle,
    time::Instant,
};

use super::{
    Identity, Shared,
    core::{CloseSignal, Control, Outbox},
};
use crate::{
    chunk::{Assembler, Chunk, chunk_bytes, cut},
    failure,
    router::{Batch, Listen, Outgoing, Received, Reply, Request, SocketId},
    wire::MESSAGE_BYTES_MAX,
};

/// Each subscription is a socket of its own in the core, so that a slow reader
/// loses only that; one more socket publishes and receives replies.
pub(super) struct LocalBus {
    shared: Arc<Shared>,
    identity: Identity,
    main: OnceCell<Main>,
}

struct Main {
    socket: LocalSocket,
    inbox: String,
    pending: Arc<Mutex<Pending>>,
    task: JoinHandle<()>,
}

impl Drop for Main {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[derive(Default)]
struct Pending {
    next: u64,
    acks: HashMap<u64, oneshot::Sender<Reply>>,
    replies: HashMap<String, oneshot::Sender<Message>>,
}

/// A socket in the core, closed when this is dropped.
struct LocalSocket {
    shared: Arc<Shared>,
    id: SocketId,
    closed: Arc<CloseSignal>,
}

impl Drop for LocalSocket {
    fn drop(&mut self) {
        let _ = self.shared.control.send(Control::Close { socket: self.id });
    }
}

impl LocalSocket {
    async fn open(
        shared: &Arc<Shared>,
        identity: &Identity,
    ) -> Result<(Self, mpsc::UnboundedReceiver<Outgoing>), Error> {
        let (queue, outbox) = mpsc::unbounded_channel();
        let socket = Self { shared: shared.clone(), id: shared.socket(), closed: Arc::default() };
        let sender = Outbox { queue, closed: socket.closed.clone() };
        if shared.open(socket.id, identity, sender).await {
            Ok((socket, outbox))
        } else {
            Err(disconnected())
        }
    }

    async fn ask(&self, ack: u64, request: Request) -> Result<(), Error> {
        let at = self.shared.now();
        let received = Received { socket: self.id, ack: Some(ack), request, at, auth: Duration::ZERO };
        if self.shared.ask(received).await { Ok(()) } else { Err(disconnected()) }
    }

    /// Subscribes, on a socket that does nothing else yet.
    async fn listen(
        &self,
        outbox: &mut mpsc::UnboundedReceiver<Outgoing>,
        pattern: &str,
        queue: Option<&str>,
    ) -> Result<(), Error> {
        let queue = queue.map_or_else(|| crate::random::name(10), str::to_owned);
        let listen = Listen { pattern: pattern.to_owned(), queue };
        self.ask(0, Request::Subscribe(Batch { items: vec![Ok(listen)], many: false })).await?;
        let answer = outbox.recv().await.ok_or_else(disconnected)?;
        self.wrote(&answer);
        match answer {
            Outgoing::Reply { reply: Reply::Failed(failed), .. } => {
                Err(failure::error(&failed, pattern, Access::Subscribe, 0))
            }
            _ => Ok(()),
        }
    }

    fn wrote(&self, outgoing: &Outgoing) {
        let _ = self.shared.control.send(Control::Wrote { socket: self.id, bytes: outgoing.bytes() });
    }
}

impl LocalBus {
    pub(super) fn new(shared: Arc<Shared>, identity: Identity) -> Self {
        Self { shared, identity, main: OnceCell::new() }
    }

    async fn main(&self) -> Result<&Main, Error> {
        let main = self.main.get_or_try_init(|| self.connect()).await?;
        if main.socket.closed.reason().is_some() {
            return Err(disconnected());
        }
        Ok(main)
    }

    async fn connect(&self) -> Result<Main, Error> {
        let (socket, mut outbox) = LocalSocket::open(&self.shared, &self.identity).await?;
        let inbox = format!("{}.{}", self.identity.inbox_prefix(), crate::random::name(10));
        socket.listen(&mut outbox, &format!("{inbox}.*"), None).await?;
        let pending = Arc::<Mutex<Pending>>::default();
        let (shared, id) = (self.shared.clone(), socket.id);
        let message_bytes_max = self.identity.limits().message_bytes_max;
        let task = tokio::spawn({
            let pending = pending.clone();
            async move {
                let mut assembler = Assembler::new(message_bytes_max);
                while let Some(outgoing) = outbox.recv().await {
                    let bytes = outgoing.bytes();
                    settle(&pending, outgoing, &mut assembler);
                    let _ = shared.control.send(Control::Wrote { socket: id, bytes });
                }
                // Whoever waits learns that there will be no answer.
                let mut pending = lock(&pending);
                pending.acks.clear();
                pending.replies.clear();
            }
        });
        Ok(Main { socket, inbox, pending, task })
    }

    async fn check_publish(&self, subject: &str) -> Result<(), Error> {
        if !subject::is_subject(subject) {
            return Err(Error::InvalidSubject { subject: subject.to_owned() });
        }
        if self.shared.may(&self.identity, subject, Access::Publish).await {
            return Ok(());
        }
        Err(Error::Denied { action: "publish to", subject: subject.to_owned() })
    }

    /// Sends what is permitted.
    async fn send(&self, subject: &str, payload: Payload) -> Result<usize, Error> {
        let main = self.main().await?;
        let size = payload.data.len();
        let chunks = cut(subject, payload, chunk_bytes(MESSAGE_BYTES_MAX))
            .map_err(|source| Error::Disconnected { source: Some(source.into()) })?;
        let mut count = 0;
        for chunk in chunks {
            match main.ask(Request::Publish(chunk)).await? {
                Reply::Published { count: reached, .. } => count = reached,
                Reply::Failed(failed) => {
                    return Err(failure::error(&failed, subject, Access::Publish, size));
                }
                _ => return Err(disconnected()),
            }
        }
        Ok(count)
    }
}

impl Main {
    async fn ask(&self, request: Request) -> Result<Reply, Error> {
        let (sender, reply) = oneshot::channel();
        let ack = {
            let mut pending = lock(&self.pending);
            pending.next += 1;
            let ack = pending.next;
            pending.acks.insert(ack, sender);
            ack
        };
        let _forget = OnDrop(|| {
            lock(&self.pending).acks.remove(&ack);
        });
        self.socket.ask(ack, request).await?;
        tokio::select! {
            reply = reply => reply.map_err(|_| disconnected()),
            _ = self.socket.closed.closed() => Err(disconnected()),
        }
    }
}

#[async_trait]
impl Bus for LocalBus {
    async fn publish(&self, subject: &str, payload: Payload) -> Result<usize, Error> {
        self.check_publish(subject).await?;
        self.send(subject, payload).await
    }

    async fn subscribe(&self, pattern: &str, queue: Option<&str>) -> Result<Subscription, Error> {
        if !subject::is_pattern(pattern) {
            return Err(Error::InvalidSubject { subject: pattern.to_owned() });
        }
        if !self.shared.may(&self.identity, pattern, Access::Subscribe).await {
            return Err(Error::Denied { action: "subscribe to", subject: pattern.to_owned() });
        }
        self.main().await?;
        let (socket, mut outbox) = LocalSocket::open(&self.shared, &self.identity).await?;
        socket.listen(&mut outbox, pattern, queue).await?;
        // A revocation in the meantime has reached the main socket, or will
        // reach the new one.
        self.main().await?;
        let limits = self.identity.limits();
        let (start, started) = oneshot::channel::<Feed>();
        let task = tokio::spawn(async move {
            let Ok(feed) = started.await else { return };
            let mut assembler = Assembler::new(limits.message_bytes_max);
            while let Some(outgoing) = outbox.recv().await {
                socket.wrote(&outgoing);
                let Outgoing::Delivery(delivery) = outgoing else { continue };
                let message = assembler.push(&Chunk::from(&*delivery.publication), Instant::now());
                if message.is_some_and(|message| !feed.push(message)) {
                    return;
                }
            }
        });
        let (feed, subscription) = Subscription::bounded(limits.queue_bytes_max, AbortOnDrop(task));
        let _ = start.send(feed);
        Ok(subscription)
    }

    async fn request(&self, subject: &str, mut payload: Payload, limit: Duration) -> Result<Message, Error> {
        self.check_publish(subject).await?;
        let main = self.main().await?;
        let token = crate::random::name(16);
        let (sender, reply) = oneshot::channel();
        lock(&main.pending).replies.insert(token.clone(), sender);
        let _forget = OnDrop(|| {
            lock(&main.pending).replies.remove(&token);
        });
        payload.headers.insert("CN-Reply".to_owned(), format!("{}.{token}", main.inbox).into());
        let exchange = async {
            if self.send(subject, payload).await? == 0 {
                return Err(Error::NoInterest { subject: subject.to_owned() });
            }
            tokio::select! {
                reply = reply => reply.map_err(|_| disconnected()),
                _ = main.socket.closed.closed() => Err(disconnected()),
            }
        };
        tokio::time::timeout(limit, exchange)
            .await
            .unwrap_or_else(|_| Err(Error::TimedOut { subject: subject.to_owned(), limit }))
    }

    async fn wait_for_interest(&self, subject: &str, limit: Duration) -> Result<bool, Error> {
        self.check_publish(subject).await?;
        let request = Request::WaitForInterest { subject: subject.to_owned(), limit };
        match self.main().await?.ask(request).await? {
            Reply::Interest(found) => Ok(found),
            Reply::Failed(failed) => Err(failure::error(&failed, subject, Access::Publish, 0)),
            _ => Err(disconnected()),
        }
    }
}

impl fmt::Debug for LocalBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalBus").field("identity", &self.identity).finish_non_exhaustive()
    }
}

/// Hands an answer to who waits for it.
fn settle(pending: &Mutex<Pending>, outgoing: Outgoing, assembler: &mut Assembler) {
    match outgoing {
        Outgoing::Reply { ack, reply } => {
            let waiting = lock(pending).acks.remove(&ack);
            if let Some(waiting) = waiting {
                let _ = waiting.send(reply);
            }
        }
        Outgoing::Delivery(delivery) => {
            let Some(message) = assembler.push(&Chunk::from(&*delivery.publication), Instant::now()) else {
                return;
            };
            let token = message.subject.rsplit('.').next().unwrap_or_default();
            let waiting = lock(pending).replies.remove(token);
            if let Some(waiting) = waiting {
                let _ = waiting.send(message);
            }
        }
        Outgoing::Frame(_) | Outgoing::Aside(_) => {}
    }
}

fn lock(pending: &Mutex<Pending>) -> MutexGuard<'_, Pending> {
    pending.lock().unwrap_or_else(PoisonError::into_inner)
}

fn disconnected() -> Error {
    Error::Disconnected { source: None }
}

/// Runs a function at the end of a scope, also when a future is dropped there.
struct OnDrop<F: FnMut()>(F);

impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}
