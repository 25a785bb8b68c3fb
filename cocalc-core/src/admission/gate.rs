//! Waiting for one's turn in a [`Queue`].

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::sync::oneshot;

use super::{Full, Queue, QueueLimits, Ticket, Urgency};

/// How often memory is looked at while somebody waits for it.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// A [`Queue`] in which tasks wait. Clones share it.
#[derive(Clone)]
pub struct Gate(Arc<Inner>);

struct Inner {
    lines: Mutex<Lines>,
    available_bytes: Box<dyn Fn() -> u64 + Send + Sync>,
}

struct Lines {
    queue: Queue,
    waiting: BTreeMap<Ticket, oneshot::Sender<()>>,
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gate").field("queue", &self.lines().queue).finish_non_exhaustive()
    }
}

impl Gate {
    /// A gate with these limits, which asks for the available memory, in bytes,
    /// whenever somebody may go through.
    pub fn new(limits: QueueLimits, available_bytes: impl Fn() -> u64 + Send + Sync + 'static) -> Self {
        let lines = Lines { queue: Queue::new(limits), waiting: BTreeMap::new() };
        Self(Arc::new(Inner { lines: Mutex::new(lines), available_bytes: Box::new(available_bytes) }))
    }

    /// Waits for a turn, which lasts until what this returns is dropped.
    ///
    /// # Errors
    ///
    /// [`Full`].
    ///
    /// # Cancel safety
    ///
    /// Whoever goes away gives up the place.
    pub async fn enter(&self, urgency: Urgency) -> Result<Admitted, Full> {
        let (sender, mut turn) = oneshot::channel();
        let admitted = {
            let mut lines = self.lines();
            let ticket = lines.queue.enter(urgency)?;
            lines.waiting.insert(ticket, sender);
            Admitted { gate: self.clone(), ticket }
        };
        loop {
            self.admit();
            match tokio::time::timeout(LOOK_AGAIN, &mut turn).await {
                // The sender goes only after it has sent.
                Ok(_) => return Ok(admitted),
                Err(_) => continue,
            }
        }
    }

    /// How many start now, and how many wait.
    pub fn numbers(&self) -> (usize, usize) {
        let lines = self.lines();
        (lines.queue.starting(), lines.queue.waiting())
    }

    fn admit(&self) {
        let available = (self.0.available_bytes)();
        let mut lines = self.lines();
        for ticket in lines.queue.admit(available) {
            if let Some(sender) = lines.waiting.remove(&ticket) {
                // Who has gone has given up the place, or is about to.
                let _ = sender.send(());
            }
        }
    }

    fn lines(&self) -> MutexGuard<'_, Lines> {
        self.0.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A turn, or a place on the way to it.
#[derive(Debug)]
pub struct Admitted {
    gate: Gate,
    ticket: Ticket,
}

impl Drop for Admitted {
    fn drop(&mut self) {
        {
            let mut lines = self.gate.lines();
            lines.waiting.remove(&self.ticket);
            lines.queue.leave(self.ticket);
        }
        self.gate.admit();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: QueueLimits =
        QueueLimits { starts_max: 2, waiting_max: 10, start_bytes: 1, reserve_bytes: 0 };

    #[tokio::test(start_paused = true)]
    async fn turns_pass_on_and_a_place_that_is_given_up_is_nobodys() {
        let gate = Gate::new(LIMITS, || u64::MAX);
        let (one, two) =
            (gate.enter(Urgency::Asked).await.unwrap(), gate.enter(Urgency::Asked).await.unwrap());
        let third = tokio::spawn({
            let gate = gate.clone();
            async move { gate.enter(Urgency::Asked).await }
        });
        let fourth = tokio::spawn({
            let gate = gate.clone();
            async move { gate.enter(Urgency::Asked).await }
        });
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert_eq!(gate.numbers(), (2, 2));
        third.abort();
        let _ = third.await;
        assert_eq!(gate.numbers(), (2, 1));
        drop(one);
        let fourth = fourth.await.unwrap().unwrap();
        assert_eq!(gate.numbers(), (2, 0));
        drop((two, fourth));
        assert_eq!(gate.numbers(), (0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_memory_goes_on_when_there_is_some() {
        let memory = Arc::new(Mutex::new(0_u64));
        let gate = Gate::new(LIMITS, {
            let memory = Arc::clone(&memory);
            move || *memory.lock().unwrap()
        });
        let _one = gate.enter(Urgency::Asked).await.unwrap();
        let two = tokio::time::timeout(Duration::from_secs(10), gate.enter(Urgency::Asked)).await;
        assert!(two.is_err());
        *memory.lock().unwrap() = 100;
        tokio::time::timeout(Duration::from_secs(10), gate.enter(Urgency::Asked)).await.unwrap().unwrap();
    }
}
