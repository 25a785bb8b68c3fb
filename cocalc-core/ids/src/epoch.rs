//! The epoch: which owner of a project something belongs to.

use std::{fmt, num::NonZeroU64};

use serde::{Deserialize, Serialize};

/// Counts the owners a project has had. Every change of owner is a higher
/// epoch; a state, token or command of a lower one is stale. The first is 1.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(transparent)]
pub struct Epoch(NonZeroU64);

impl Epoch {
    /// The epoch of a project's first owner.
    pub const FIRST: Self = Self(NonZeroU64::MIN);

    /// An epoch from its number; `None` for 0.
    pub const fn new(number: u64) -> Option<Self> {
        match NonZeroU64::new(number) {
            Some(number) => Some(Self(number)),
            None => None,
        }
    }

    /// The epoch of the next owner. Saturates, after 2^64 changes of owner.
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }

    /// The number, from 1.
    pub const fn number(self) -> u64 {
        self.0.get()
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::str::FromStr for Epoch {
    type Err = crate::ParseIdError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        s.parse()
            .ok()
            .filter(|n: &NonZeroU64| n.to_string() == s)
            .map(Self)
            .ok_or(crate::ParseIdError { kind: "epoch", expected: "a decimal number from 1" })
    }
}
