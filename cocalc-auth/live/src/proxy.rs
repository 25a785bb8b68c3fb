//! The lesser check of a proxy.

use std::sync::Arc;

use cocalc_auth::token::{Claims, Expect, TokenError};
use cocalc_core::{
    auth::{Denial, Tier},
    ids::ProjectId,
};

use crate::Knowledge;

/// Checks, at a proxy, that a token is authentic, in time, and for the project
/// that is asked for. Whether the route leads to the token's host
/// ([`Claims::aud`]) is the caller's to compare; whether the account may is the
/// host's to decide, again; and a proxy never redeems.
#[derive(Clone, Debug)]
pub struct ProxyCheck(Arc<Knowledge>);

impl ProxyCheck {
    /// Checks with the keys in `knowledge`.
    pub fn new(knowledge: Arc<Knowledge>) -> Self {
        Self(knowledge)
    }

    /// What an authentic token for `project` says.
    ///
    /// # Errors
    ///
    /// As `Auth::verify` of a host, and [`Denial::Stale`] when the master has
    /// been away for longer than lease and grace.
    pub fn token(&self, token: &str, project: ProjectId) -> Result<Claims, Denial> {
        let issuer = self.0.issuer().ok_or(Denial::Stale)?;
        if self.0.skewed() || self.tier() == Tier::Expired {
            return Err(Denial::Stale);
        }
        let expect = Expect { issuer: &issuer, host: None, project };
        self.0.verify(token, &expect, self.0.master_now()).map_err(|error| match error {
            TokenError::Expired => Denial::TokenExpired,
            other => Denial::BadCredential(other.to_string()),
        })
    }

    /// How well this proxy knows what the master says. When it has expired,
    /// nothing new is let through.
    pub fn tier(&self) -> Tier {
        *self.0.tier().borrow()
    }
}
