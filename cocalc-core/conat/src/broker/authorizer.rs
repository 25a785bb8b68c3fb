//! Who connects, and what they may do.

use std::{any::Any, fmt, net::SocketAddr, sync::Arc};

use async_trait::async_trait;
use cocalc_core::subject::{self, Access};
use serde_json::Value;

use crate::router::Limits;

/// Decides who may connect, and what they may do.
///
/// The broker asks before each publication and subscription, one at a time for
/// each connection, in the order of arrival; so an answer should come from
/// memory. It remembers nothing: what was revoked is refused from the next
/// question on, and [`Broker::revoke`](super::Broker::revoke) ends what is
/// already connected.
///
/// Inboxes (subjects below `_INBOX.`) are the broker's own business: whoever
/// knows one may reply to it, and an identity may listen to its own only.
#[async_trait]
pub trait Authorizer: fmt::Debug + Send + Sync + 'static {
    /// Says who is connecting, by what came with the upgrade request and by
    /// the object in the first packet (`bearer`, `project_id`, …). The error
    /// is shown to the client.
    async fn sign_in(&self, handshake: &Handshake, auth: &Value) -> Result<Identity, String>;

    /// Whether `identity` may publish to the subject, or subscribe to the
    /// pattern, `subject`. Use [`covers`](cocalc_core::subject::covers) for
    /// patterns: it does not let `>` pass for something narrower.
    async fn may(&self, identity: &Identity, subject: &str, access: Access) -> bool;
}

/// What is known of a connection before it signs in.
#[derive(Clone, Default)]
pub struct Handshake {
    /// The token of the `Authorization: Bearer` header.
    pub bearer: Option<String>,
    /// The `Cookie` header.
    pub cookie: Option<String>,
    /// The `Origin` header. Who accepts cookies must check it before.
    pub origin: Option<String>,
    /// The other end.
    pub peer: Option<SocketAddr>,
}

impl fmt::Debug for Handshake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Tokens and cookies don't belong into logs.
        f.debug_struct("Handshake")
            .field("origin", &self.origin)
            .field("peer", &self.peer)
            .finish_non_exhaustive()
    }
}

/// Who is connected, and what their connection may use.
#[derive(Clone)]
pub struct Identity {
    name: Arc<str>,
    user: Value,
    limits: Limits,
    details: Option<Arc<dyn Any + Send + Sync>>,
}

impl Identity {
    /// Names an identity, such as `host-<id>`: what is revoked by, what
    /// connections are counted by, and whose inboxes are its own. Names are
    /// single tokens; others get no inbox.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into().into(), user: Value::Null, limits: Limits::default(), details: None }
    }

    /// Sets what the client is told about itself: an object with one of
    /// `account_id`, `project_id`, `host_id`, `hub_id`. Default: null.
    pub fn user(mut self, user: Value) -> Self {
        self.user = user;
        self
    }

    /// Sets how large a message of it may be, all chunks together. Default:
    /// 256 MiB.
    pub fn message_bytes_max(mut self, limit: usize) -> Self {
        self.limits.message_bytes_max = limit;
        self
    }

    /// Sets how far behind it may be in reading, before it is disconnected.
    /// Default: 32 MiB.
    pub fn queue_bytes_max(mut self, limit: usize) -> Self {
        self.limits.queue_bytes_max = limit;
        self
    }

    /// Sets how many patterns a connection may subscribe to. Default: 500.
    pub fn subscriptions_max(mut self, limit: usize) -> Self {
        self.limits.subscriptions_max = limit;
        self
    }

    /// Attaches what the authorizer wants to find again in `may`.
    pub fn with_details<T: Send + Sync + 'static>(mut self, details: T) -> Self {
        self.details = Some(Arc::new(details));
        self
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What was attached, if it was a `T`.
    pub fn details<T: 'static>(&self) -> Option<&T> {
        self.details.as_deref()?.downcast_ref()
    }

    /// Below which subject its inboxes are.
    pub fn inbox_prefix(&self) -> String {
        format!("_INBOX.{}", self.name)
    }

    pub(crate) fn shared_name(&self) -> Arc<str> {
        self.name.clone()
    }

    pub(crate) fn user_value(&self) -> &Value {
        &self.user
    }

    pub(crate) fn limits(&self) -> Limits {
        self.limits
    }

    /// What the broker decides without asking; `None` for all other subjects.
    pub(crate) fn may_use_inbox(&self, subject: &str, access: Access) -> Option<bool> {
        if !subject.starts_with("_INBOX.") {
            return None;
        }
        Some(match access {
            Access::Publish => true,
            Access::Subscribe => {
                // A name that is itself a wildcard must not open all inboxes.
                subject::is_subject(&self.name)
                    && !self.name.contains('.')
                    && subject::covers(&format!("_INBOX.{}.>", self.name), subject)
            }
        })
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("name", &self.name).finish_non_exhaustive()
    }
}
