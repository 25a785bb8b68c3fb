//! The vocabulary of access: scopes, roles and actions.

use serde::{Deserialize, Serialize};

/// A part of the data plane that a connect token opens (claim `scp`).
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// HTTP requests to apps in the project.
    Http,
    /// WebSocket connections to apps in the project.
    Ws,
    /// Raw files under `/files/`.
    Files,
    /// SSH: shell, exec, sftp, forwarding.
    Ssh,
    /// The project's subjects on the message bus.
    Bus,
}

impl Scope {
    /// Every scope, in the order in which tokens list them.
    pub const ALL: [Self; 5] = [Self::Http, Self::Ws, Self::Files, Self::Ssh, Self::Bus];
}

/// What an account is to a project.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Role {
    /// Reads files and apps marked viewable; no shell.
    Viewer,
    /// Uses everything in the project.
    Collaborator,
    /// Also manages collaborators, moves and deletes the project.
    Owner,
}

impl Role {
    /// Whether this role may do `action`.
    pub fn permits(self, action: Action) -> bool {
        match self {
            Self::Owner => true,
            Self::Collaborator => action != Action::Administer,
            Self::Viewer => action == Action::Use(Scope::Files),
        }
    }
}

/// What somebody wants to do with a project, for an authorization decision.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Action {
    /// Reach it through one of the scopes.
    Use(Scope),
    /// Start or stop it.
    Operate,
    /// Share, move or delete it. Never decided from a cache in grace.
    Administer,
}
