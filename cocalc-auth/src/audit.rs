//! The log of decisions, each line chained to the one before by its hash, so
//! that nothing can be changed, removed or inserted unnoticed.
//!
//! A line is `<hash> <event as JSON>`, and `hash` is
//! SHA-256 of the previous line's hash (64 hexadecimal digits) and the JSON
//! text. A cut at the end, or a chain that was written anew from some line on,
//! shows only against a [`Head`] that was kept elsewhere: hosts and proxies sign
//! theirs and send them to the master.

use std::io::BufRead;

use cocalc_ids::{AccountId, Epoch, KeyId, ProjectId, Timestamp};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{PublicKey, compact, identity::Identity};

/// The hash before the first line.
pub const GENESIS: &str = "0000000000000000000000000000000000000000000000000000000000000000";
/// A longer line is damage.
const LINE_BYTES_MAX: usize = 16 * 1024;
/// Longer texts from outside are cut.
const TEXT_BYTES_MAX: usize = 512;

/// What was decided, about whom, and why.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Event {
    /// When, by this machine's wall clock.
    pub time: Timestamp,
    /// What happened. On hosts and proxies `deny`, `allow` (a sample), `login` (by
    /// SSH), `begin` and `end` (of what it opened), `redeem`, `close`; at the master `change`, `fail`, `deny`, `allow` (a
    /// sample), `login`; of the log itself `dropped`, `broken`.
    pub kind: String,
    /// Who, if it was proved.
    pub account: Option<AccountId>,
    /// Which project was asked for.
    pub project: Option<ProjectId>,
    /// From where.
    pub source: Option<String>,
    /// What was asked for.
    pub action: Option<String>,
    /// Why it was decided so; never a credential.
    pub reason: String,
    /// The epoch this host holds.
    pub epoch: Option<Epoch>,
    /// How old the knowledge was that decided, in milliseconds.
    pub staleness_ms: Option<u64>,
    /// With which of the account's API keys.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<KeyId>,
    /// What was changed, in the words of a receipt: `collaborator.add <project>
    /// <account>`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<String>,
}

/// Cut so that it fits, between characters.
pub fn shortened(mut text: String) -> String {
    if text.len() > TEXT_BYTES_MAX {
        let cut = (0..=TEXT_BYTES_MAX).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        text.truncate(cut);
    }
    text
}

impl Event {
    /// An event without details.
    pub fn new(kind: &str, reason: impl Into<String>, time: Timestamp) -> Self {
        Self {
            time,
            kind: kind.to_owned(),
            account: None,
            project: None,
            source: None,
            action: None,
            reason: shortened(reason.into()),
            epoch: None,
            staleness_ms: None,
            key: None,
            subject: None,
        }
    }
}

/// The end of a chain: how many lines, and the hash of the last.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Chain {
    count: u64,
    head: String,
}

impl Default for Chain {
    fn default() -> Self {
        Self { count: 0, head: GENESIS.to_owned() }
    }
}

impl Chain {
    /// A chain that continues after `count` lines, the last with hash `head`:
    /// after a rotation of files, or a restart.
    pub fn resume(count: u64, head: &str) -> Self {
        Self { count, head: head.to_owned() }
    }

    /// How many lines there are.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The hash of the last line.
    pub fn head(&self) -> &str {
        &self.head
    }

    /// Appends an event, and returns its line, newline included.
    pub fn append(&mut self, event: &Event) -> String {
        // Text, numbers and ids always become JSON.
        let json = serde_json::to_string(event).unwrap_or_default();
        self.head = link(&self.head, &json);
        self.count += 1;
        format!("{} {json}\n", self.head)
    }

    /// Checks one line, and steps over it.
    fn step(&mut self, line: &str) -> bool {
        let Some((hash, json)) = line.split_once(' ') else { return false };
        let expected = link(&self.head, json);
        if hash != expected || serde_json::from_str::<Event>(json).is_err() {
            return false;
        }
        self.head = expected;
        self.count += 1;
        true
    }
}

/// Where a chain was at some time, for whoever keeps it elsewhere.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Head {
    /// How many lines there were; all of them durable.
    pub count: u64,
    /// The hash of the last.
    pub hash: String,
    /// When, by the wall clock of who signs.
    pub time: Timestamp,
}

impl Head {
    /// What is signed, for `peer` (`host:<id>`, `proxy:<id>`). The name in front
    /// keeps it apart from everything else that the key signs.
    fn message(&self, peer: &str) -> String {
        format!("cocalc-audit-head-1 {peer} {} {} {}", self.count, self.hash, self.time.millis())
    }

    /// Signs it with the identity key of `peer`; base64url without padding.
    pub fn sign(&self, peer: &str, identity: &Identity) -> String {
        compact::encode(&identity.sign(self.message(peer).as_bytes()))
    }

    /// Whether `signature` is of `key` over this head of `peer`.
    pub fn is_signed(&self, peer: &str, key: &PublicKey, signature: &str) -> bool {
        let signature = compact::decode_exact(signature);
        signature.is_some_and(|signature| key.verify(self.message(peer).as_bytes(), &signature))
    }
}

fn link(previous: &str, json: &str) -> String {
    let mut hash = Sha256::new();
    hash.update(previous.as_bytes());
    hash.update(json.as_bytes());
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Verifies lines that continue `chain`, and returns its end.
///
/// # Errors
///
/// The number of the first line that is not as it was written.
pub fn verify(mut chain: Chain, mut lines: impl BufRead) -> Result<Chain, VerifyError> {
    let mut line = Vec::new();
    loop {
        line.clear();
        let at = chain.count + 1;
        let limit = u64::try_from(LINE_BYTES_MAX).unwrap_or(u64::MAX);
        let read = std::io::Read::take(&mut lines, limit).read_until(b'\n', &mut line);
        if read.map_err(|source| VerifyError::Read { line: at, source })? == 0 {
            return Ok(chain);
        }
        let text = std::str::from_utf8(&line).ok().and_then(|line| line.strip_suffix('\n'));
        if !text.is_some_and(|text| chain.step(text)) {
            return Err(VerifyError::Broken { line: at });
        }
    }
}

/// Why a chain could not be verified.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VerifyError {
    /// This line, or one removed before it, was changed.
    #[error("the audit log is broken at line {line}")]
    Broken {
        /// From 1.
        line: u64,
    },
    /// The file could not be read.
    #[error("the audit log cannot be read at line {line}")]
    Read {
        /// From 1.
        line: u64,
        /// Why.
        source: std::io::Error,
    },
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn log(count: usize) -> (Chain, String) {
        let mut chain = Chain::default();
        let lines = (0..count).map(|n| {
            chain.append(&Event::new("deny", format!("reason {n} é\n"), Timestamp::from_secs(n as i64)))
        });
        let text = lines.collect();
        (chain, text)
    }

    #[test]
    fn what_was_written_verifies_also_in_pieces() {
        let (chain, text) = log(5);
        assert_eq!(verify(Chain::default(), text.as_bytes()).unwrap(), chain);
        let lines: Vec<&str> = text.split_inclusive('\n').collect();
        let first = verify(Chain::default(), lines[..2].concat().as_bytes()).unwrap();
        let resumed = Chain::resume(first.count(), first.head());
        assert_eq!(verify(resumed, lines[2..].concat().as_bytes()).unwrap(), chain);
    }

    #[test]
    fn removed_swapped_and_cut_lines_show() {
        let (_, text) = log(4);
        let lines: Vec<&str> = text.split_inclusive('\n').collect();
        for (broken, line) in [
            ([lines[0], lines[2], lines[3]].concat(), 2),
            ([lines[1], lines[0]].concat(), 1),
            ([lines[0], lines[0]].concat(), 2),
            (text[..text.len() - 1].to_owned(), 4),
            (format!("{text}{}\n", "x".repeat(LINE_BYTES_MAX * 2)), 5),
        ] {
            match verify(Chain::default(), broken.as_bytes()) {
                Err(VerifyError::Broken { line: at }) => assert_eq!(at, line),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn a_head_is_good_for_its_peer_and_itself_only() {
        let (identity, other) = (Identity::from_seed(&[1; 32]), Identity::from_seed(&[2; 32]));
        let (chain, _) = log(3);
        let time = Timestamp::from_secs(1);
        let head = Head { count: chain.count(), hash: chain.head().to_owned(), time };
        let signature = head.sign("host:a", &identity);
        let key = identity.public_key();
        assert!(head.is_signed("host:a", &key, &signature));
        assert!(!head.is_signed("host:b", &key, &signature));
        assert!(!head.is_signed("host:a", &other.public_key(), &signature));
        assert!(!head.is_signed("host:a", &key, &signature[1..]));
        for other in [
            Head { count: 4, ..head.clone() },
            Head { hash: GENESIS.to_owned(), ..head.clone() },
            Head { time: Timestamp::from_secs(2), ..head.clone() },
        ] {
            assert!(!other.is_signed("host:a", &key, &signature), "{other:?}");
        }
    }

    #[test]
    fn lines_of_before_still_read() {
        let json = r#"{"time":0,"kind":"deny","account":null,"project":null,"source":null,"action":null,"reason":"x","epoch":null,"staleness_ms":null}"#;
        let event: Event = serde_json::from_str(json).unwrap();
        assert_eq!(event, Event::new("deny", "x", Timestamp::UNIX_EPOCH));
        assert_eq!(serde_json::to_string(&event).unwrap(), json);
    }

    #[test]
    fn long_texts_are_cut_between_characters() {
        let event = Event::new("deny", "é".repeat(10_000), Timestamp::UNIX_EPOCH);
        assert!(event.reason.len() <= TEXT_BYTES_MAX && event.reason.ends_with('é'));
    }

    proptest! {
        #[test]
        fn every_changed_byte_shows(at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let (_, text) = log(3);
            let mut bytes = text.into_bytes();
            let index = at.index(bytes.len());
            bytes[index] ^= 1 << bit;
            prop_assert!(verify(Chain::default(), bytes.as_slice()).is_err());
        }
    }
}
