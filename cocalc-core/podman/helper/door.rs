//! Who may speak to the helper of a plain process.
//!
//! There the socket has a path that every process of the same user can connect to,
//! those of other projects among them, and the kernel lists it for all. So the host
//! gives the helper a key when it starts it, and says that key first in every
//! connection. Other projects can read it nowhere: Landlock keeps them from this
//! process's environment and from the host's directory. In a container nothing
//! inside has a path to the socket, and there is no key.

use std::{
    collections::VecDeque,
    io::Read,
    net::Shutdown,
    os::unix::net::UnixStream,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

/// Names the key in the environment, as hexadecimal digits.
const KEY: &str = "COCALC_HELPER_KEY";
const KEY_BYTES: usize = 32;
/// How long somebody may take to say it.
const LIMIT: Duration = Duration::from_secs(5);
/// How many may be about to say it. Beyond, whoever has waited the longest goes: the
/// host says it at once.
const GUESTS_MAX: usize = 32;

pub(crate) struct Door {
    key: Option<[u8; KEY_BYTES]>,
    guests: Arc<Mutex<Guests>>,
}

#[derive(Default)]
struct Guests {
    next: u64,
    waiting: VecDeque<(u64, UnixStream)>,
}

/// Somebody who has connected.
pub(crate) struct Guest {
    number: u64,
    key: Option<[u8; KEY_BYTES]>,
    guests: Arc<Mutex<Guests>>,
}

impl Door {
    /// With the key that the host has given, if it has. One that makes no sense
    /// lets nobody in.
    pub(crate) fn open() -> Self {
        let key = std::env::var_os(KEY).map(|text| {
            let digits = text.into_encoded_bytes();
            let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
            let bytes: Option<Vec<u8>> = digits.chunks(2).map(byte).collect();
            bytes.and_then(|bytes| bytes.try_into().ok())
        });
        match key {
            Some(None) => std::process::exit(1),
            key => Self { key: key.flatten(), guests: Arc::default() },
        }
    }

    /// Somebody connects; `None` if they cannot be attended to.
    pub(crate) fn knock(&self, stream: &UnixStream) -> Option<Guest> {
        let mut guests = self.guests.lock().unwrap_or_else(PoisonError::into_inner);
        let number = guests.next;
        guests.next += 1;
        if self.key.is_some() {
            guests.waiting.push_back((number, stream.try_clone().ok()?));
            if guests.waiting.len() > GUESTS_MAX
                && let Some((_, longest)) = guests.waiting.pop_front()
            {
                // Its thread reads the end, and ends.
                let _ = longest.shutdown(Shutdown::Both);
            }
        }
        drop(guests);
        Some(Guest { number, key: self.key, guests: Arc::clone(&self.guests) })
    }
}

impl Guest {
    /// Whether they say the key, if there is one. Blocks.
    pub(crate) fn show(self, stream: &UnixStream) -> bool {
        let Some(key) = self.key else { return true };
        let mut said = [0; KEY_BYTES];
        let good = stream.set_read_timeout(Some(LIMIT)).is_ok()
            && (&mut &*stream).read_exact(&mut said).is_ok()
            // As long for any difference.
            && said.iter().zip(key).fold(0, |all, (a, b)| all | (a ^ b)) == 0
            && stream.set_read_timeout(None).is_ok();
        // Let go by the drop.
        good
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if self.key.is_some() {
            let mut guests = self.guests.lock().unwrap_or_else(PoisonError::into_inner);
            guests.waiting.retain(|(number, _)| *number != self.number);
        }
    }
}
