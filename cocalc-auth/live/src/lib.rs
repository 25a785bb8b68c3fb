//! Authentication that is connected: the cores of `cocalc-auth` with a bus, a
//! store and the clock.
//!
//! - [`Knowledge`] is what a host or proxy knows of who may do what: the ACL
//!   cache, its store, and the live connections that a change must close.
//! - [`StreamDriver`] keeps it current: it registers with the master, follows
//!   the ordered stream, acknowledges, and renews the lease.
//! - [`TokenAuth`] decides with it on a host (`impl Auth`); [`ProxyCheck`] does
//!   the lesser check of a proxy.
//! - [`LimitedAuth`] bounds how often anybody may ask it.
//! - [`AuditLog`] writes what was decided.
//!
//! It does not mint: the master's part is `cocalc_auth::mint`.
//!
//! ```no_run
//! use std::{sync::Arc, time::Duration};
//! use cocalc_auth::store::MemoryStore;
//! use cocalc_auth_live::{DriverConfig, Knowledge, PeerHandler, StreamDriver, TokenAuth};
//! use cocalc_core::{auth::Auth, bus::Bus, clock::SystemClock, connector::Peer};
//! use cocalc_core::ids::{Epoch, HostId, ProjectId, SessionId};
//!
//! # fn start(
//! #     host: HostId,
//! #     bus: Arc<dyn Bus>,
//! #     keepalive: Arc<dyn Bus>,
//! #     handler: Arc<dyn PeerHandler>,
//! # ) -> Result<(), cocalc_auth_live::Error> {
//! let store = Arc::new(MemoryStore::default());
//! let knowledge = Knowledge::open(store, Arc::new(SystemClock), None)?;
//! let driver = StreamDriver::start(
//!     knowledge.clone(),
//!     DriverConfig { peer: Peer::Host(host), session: SessionId::random(), bus, keepalive, handler, audit: None },
//! );
//! let held = |project: ProjectId| Some(Epoch::FIRST);
//! let auth: Arc<dyn Auth> = Arc::new(TokenAuth::new(knowledge, host, Arc::new(held), None));
//! # let _ = (driver, auth);
//! # Ok(())
//! # }
//! ```

mod audit_log;
mod driver;
mod fetch;
mod knowledge;
mod limited;
mod proxy;
mod token_auth;
mod verified;

pub use self::{
    audit_log::{AuditError, AuditLog, AuditQuery},
    driver::{AuditReport, DriverConfig, PeerHandler, StreamDriver},
    knowledge::{Error, Knowledge},
    limited::{AuthLimits, LimitedAuth},
    proxy::ProxyCheck,
    token_auth::{Grants, InsideKeys, TokenAuth},
};

use cocalc_auth::acl::{Refusal, Tier as AclTier};
use cocalc_core::auth::{Denial, Tier};

fn tier(tier: AclTier) -> Tier {
    match tier {
        AclTier::Fresh => Tier::Fresh,
        AclTier::Grace => Tier::Grace,
        AclTier::Expired => Tier::Expired,
    }
}

fn denial(refusal: Refusal) -> Denial {
    match refusal {
        Refusal::NotHeld | Refusal::OtherEpoch | Refusal::Left => Denial::NotHere(refusal.to_string()),
        Refusal::Stale => Denial::Stale,
        other => Denial::Forbidden(other.to_string()),
    }
}
