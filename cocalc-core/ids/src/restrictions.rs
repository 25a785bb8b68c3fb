//! What an SSH session may do beside running a command.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

/// The limits that an SSH key or certificate sets to the sessions it opens.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Restrictions {
    /// Run instead of whatever is asked for, which it finds in
    /// `SSH_ORIGINAL_COMMAND`.
    pub command: Option<String>,
    /// Whether there may be a terminal.
    pub pty: bool,
    /// The ports of the project that may be connected to.
    pub ports: Ports,
    /// Variables that are set.
    pub environment: BTreeMap<String, String>,
}

/// Which ports may be forwarded.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Ports {
    /// All of them.
    All,
    /// These, or none.
    Only(BTreeSet<u16>),
}

impl Default for Restrictions {
    /// None.
    fn default() -> Self {
        Self { command: None, pty: true, ports: Ports::All, environment: BTreeMap::new() }
    }
}

impl Restrictions {
    /// Whether nothing is restricted or set.
    pub fn are_none(&self) -> bool {
        *self == Self::default()
    }

    /// The most that `self` and `other` both allow. A command of `self` goes
    /// before that of `other`.
    pub fn and(self, other: &Self) -> Self {
        let ports = match (self.ports, &other.ports) {
            (Ports::All, other) => other.clone(),
            (own, Ports::All) => own,
            (Ports::Only(own), Ports::Only(other)) => Ports::Only(&own & other),
        };
        let mut environment = other.environment.clone();
        environment.extend(self.environment);
        Self {
            command: self.command.or_else(|| other.command.clone()),
            pty: self.pty && other.pty,
            ports,
            environment,
        }
    }
}

impl Ports {
    /// Whether `port` may be connected to.
    pub fn contain(&self, port: u16) -> bool {
        match self {
            Self::All => true,
            Self::Only(ports) => ports.contains(&port),
        }
    }
}
