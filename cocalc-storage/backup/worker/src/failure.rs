//! What went wrong, in the terms of the caller.

use cocalc_backup::protocol::{Failure, FailureKind};
use rustic_core::{ErrorKind, RusticError};

/// A failed job.
#[derive(Debug)]
pub(crate) struct Failed(pub(crate) Failure);

impl Failed {
    pub(crate) fn new(kind: FailureKind, words: impl Into<String>) -> Self {
        Self(Failure { kind, words: vec![words.into()] })
    }
}

impl From<Box<RusticError>> for Failed {
    fn from(error: Box<RusticError>) -> Self {
        let words = error.display_log();
        // The type keeps its kind to itself; the words begin with it.
        let kind = local(&words).unwrap_or_else(|| {
            let is = |kind: ErrorKind| words.contains(&format!("(kind: related to {kind}"));
            if is(ErrorKind::Cryptography)
                || is(ErrorKind::Verification)
                || is(ErrorKind::Repository)
                || words.contains("missing in index")
                || words.contains("not found in index")
            {
                FailureKind::Damaged
            } else {
                FailureKind::Other
            }
        });
        Self::new(kind, words)
    }
}

/// What the words of a failed system call mean to the caller, if anything.
pub(crate) fn local(words: &str) -> Option<FailureKind> {
    let full = ["No space left on device", "Quota exceeded", "Disk quota exceeded", "StorageFull"];
    full.iter().any(|text| words.contains(text)).then_some(FailureKind::Full)
}
