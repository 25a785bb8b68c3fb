//! What a terminal has shown, as far back as there is room.

use std::collections::VecDeque;

/// The last bytes of a stream, with their places in it.
#[derive(Debug)]
pub(crate) struct Ring {
    bytes: VecDeque<u8>,
    /// How many bytes there ever were.
    end: u64,
    max: usize,
}

impl Ring {
    pub(crate) fn new(max: usize) -> Self {
        Self { bytes: VecDeque::new(), end: 0, max }
    }

    /// Appends; the oldest bytes go when there is no room.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.end += bytes.len() as u64;
        let kept = &bytes[bytes.len().saturating_sub(self.max)..];
        let room = self.max - kept.len();
        if self.bytes.len() > room {
            self.bytes.drain(..self.bytes.len() - room);
        }
        self.bytes.extend(kept);
    }

    /// The place of the first byte that is still there.
    pub(crate) fn start(&self) -> u64 {
        self.end - self.bytes.len() as u64
    }

    /// The place after the last one.
    pub(crate) fn end(&self) -> u64 {
        self.end
    }

    /// At most `max` bytes from `at` on, or from the first that is still there,
    /// and the place of the first of them.
    pub(crate) fn read(&self, at: u64, max: usize) -> (u64, Vec<u8>) {
        let at = at.clamp(self.start(), self.end);
        let skip = usize::try_from(at - self.start()).unwrap_or(usize::MAX);
        (at, self.bytes.iter().skip(skip).take(max).copied().collect())
    }

    /// Where a reader begins who has nothing yet: not within a character.
    pub(crate) fn first_character(&self) -> u64 {
        let within = if self.start() == 0 { 0 } else { 3.min(self.bytes.len()) };
        let skip = self.bytes.iter().take(within).take_while(|byte| **byte & 0xc0 == 0x80).count();
        self.start() + skip as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_bytes_are_kept_with_their_places() {
        let mut ring = Ring::new(8);
        ring.push(b"abc");
        assert_eq!((ring.start(), ring.end(), ring.read(1, 10)), (0, 3, (1, b"bc".to_vec())));
        ring.push(b"defghij");
        assert_eq!((ring.start(), ring.end()), (2, 10));
        assert_eq!(ring.read(0, 3), (2, b"cde".to_vec()), "what is gone is skipped");
        assert_eq!(ring.read(99, 3), (10, vec![]));
        ring.push(&[b'x'; 100]);
        assert_eq!((ring.start(), ring.end(), ring.read(0, 100).1.len()), (102, 110, 8));
    }

    #[test]
    fn a_new_reader_does_not_begin_within_a_character() {
        let mut ring = Ring::new(4);
        ring.push("aéé".as_bytes());
        assert_eq!(ring.first_character(), 1);
        let mut ring = Ring::new(3);
        ring.push("aéé".as_bytes());
        assert_eq!(ring.read(ring.first_character(), 9).1, "é".as_bytes());
        ring.push(&[0x80; 3]);
        assert_eq!(ring.first_character(), ring.end(), "no text at all");
    }
}
