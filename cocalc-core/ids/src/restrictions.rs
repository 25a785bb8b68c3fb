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
    /// The ports of the project on which the user's side may be reached.
    #[serde(default = "Ports::none")]
    pub listen: Ports,
    /// Whether the user's agent may be reached from the project.
    #[serde(default)]
    pub agent: bool,
    /// Whether the user's X display may be.
    #[serde(default)]
    pub x11: bool,
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
        Self {
            command: None,
            pty: true,
            ports: Ports::All,
            listen: Ports::All,
            agent: true,
            x11: true,
            environment: BTreeMap::new(),
        }
    }
}

impl Restrictions {
    /// Whether nothing is restricted or set.
    pub fn are_none(&self) -> bool {
        *self == Self::default()
    }

    /// Nothing but commands without a terminal: what OpenSSH calls `restrict`.
    pub fn all() -> Self {
        Self {
            pty: false,
            ports: Ports::none(),
            listen: Ports::none(),
            agent: false,
            x11: false,
            ..Self::default()
        }
    }

    /// The most that `self` and `other` both allow. A command of `self` goes
    /// before that of `other`.
    pub fn and(self, other: &Self) -> Self {
        let mut environment = other.environment.clone();
        environment.extend(self.environment);
        Self {
            command: self.command.or_else(|| other.command.clone()),
            pty: self.pty && other.pty,
            ports: self.ports.and(&other.ports),
            listen: self.listen.and(&other.listen),
            agent: self.agent && other.agent,
            x11: self.x11 && other.x11,
            environment,
        }
    }
}

impl Ports {
    /// No port.
    pub fn none() -> Self {
        Self::Only(BTreeSet::new())
    }

    /// The ports that both contain.
    pub fn and(self, other: &Self) -> Self {
        match (self, other) {
            (Self::All, other) => other.clone(),
            (own, Self::All) => own,
            (Self::Only(own), Self::Only(other)) => Self::Only(&own & other),
        }
    }

    /// Whether `port` may be connected to.
    pub fn contain(&self, port: u16) -> bool {
        match self {
            Self::All => true,
            Self::Only(ports) => ports.contains(&port),
        }
    }
}
