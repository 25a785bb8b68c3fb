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
    /// Whether this role may do `action`, whatever the project says of its
    /// ports: that a viewer may see an app is said by its ACL.
    pub fn permits(self, action: Action) -> bool {
        match self {
            Self::Owner => true,
            Self::Collaborator => action != Action::Administer,
            Self::Viewer => action == Action::Use(Scope::Files),
        }
    }

    /// Whether this role may do `action` in a project whose `viewable` ports
    /// serve apps that viewers may see.
    pub fn permits_in(self, viewable: &[u16], action: Action) -> bool {
        let seen = match action {
            Action::App { scope: Scope::Http | Scope::Ws, port } => viewable.contains(&port),
            // The page that lists what there is, where there is something.
            Action::Use(Scope::Http) => !viewable.is_empty(),
            _ => false,
        };
        self.permits(action) || seen
    }

    /// What a token for this role may open. A viewer's opens apps, too: which
    /// ones is decided at the host, on each use.
    pub fn scopes(self) -> &'static [Scope] {
        match self {
            Self::Owner | Self::Collaborator => &Scope::ALL,
            Self::Viewer => &[Scope::Http, Scope::Ws, Scope::Files],
        }
    }
}

/// What somebody wants to do with a project, for an authorization decision.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Action {
    /// Reach it through one of the scopes. Of files: read them.
    Use(Scope),
    /// Reach the app on a port.
    App {
        /// By [`Scope::Http`] or [`Scope::Ws`].
        scope: Scope,
        /// The port that it listens on.
        port: u16,
    },
    /// Change files by the address that serves them raw.
    Write,
    /// Start or stop it.
    Operate,
    /// Share, move or delete it. Never decided from a cache in grace.
    Administer,
}

impl Action {
    /// The scope that a credential must have for this; `None` for what is not
    /// of the data plane.
    pub fn scope(self) -> Option<Scope> {
        match self {
            Self::Use(scope) | Self::App { scope, .. } => Some(scope),
            Self::Write => Some(Scope::Files),
            Self::Operate | Self::Administer => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_viewer_sees_files_and_what_is_marked() {
        let app = |port| Action::App { scope: Scope::Http, port };
        for (action, permitted) in [
            (Action::Use(Scope::Files), true),
            (app(8080), true),
            (Action::App { scope: Scope::Ws, port: 8080 }, true),
            (Action::Use(Scope::Http), true),
            (app(8081), false),
            // No shell, whatever is marked: not even through a port's number.
            (Action::App { scope: Scope::Ssh, port: 8080 }, false),
            (Action::Use(Scope::Ssh), false),
            (Action::Use(Scope::Bus), false),
            (Action::Write, false),
            (Action::Operate, false),
            (Action::Administer, false),
        ] {
            assert_eq!(Role::Viewer.permits_in(&[8080], action), permitted, "{action:?}");
            assert!(Role::Owner.permits_in(&[], action), "{action:?}");
            assert_eq!(Role::Collaborator.permits_in(&[], action), action != Action::Administer);
        }
        assert!(!Role::Viewer.permits_in(&[], Action::Use(Scope::Http)), "there is nothing to see");
    }
}
