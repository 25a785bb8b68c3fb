//! Connect tokens, the ACL cache, sessions, rate limits and the audit chain,
//! as pure cores: no async, no socket, and the time is an argument. Only
//! [`key_file`] touches the disk.
//!
//! | module | what it is |
//! |---|---|
//! | [`token`] | what a connect token says, and the verifier |
//! | [`mint`] | the master's part: the ring of signing keys |
//! | [`jwks`] | the public keys, for third parties |
//! | [`identity`] | the key of a host or proxy |
//! | [`peer`] | short assertions, with which a host or proxy signs in |
//! | [`key_file`] | secrets on disk, mode 0600 |
//! | [`stream`] | the frames from the master to a host |
//! | [`acl`] | what is allowed now: the cache that the stream feeds |
//! | [`store`] | what of it outlives the process |
//! | [`session`] | browser sessions |
//! | [`limit`] | rate limits |
//! | [`audit`] | the hash-chained log of decisions |
//!
//! It is not an account system, and no generic JWT library: it verifies its
//! own two kinds of tokens, and refuses everything else.
//!
//! ```
//! use cocalc_auth::{mint::{NewToken, SigningRing}, token::{Algorithm, Expect, Verifier}};
//! use cocalc_ids::{AccountId, Epoch, HostId, ProjectId, Scope, Timestamp};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let now = Timestamp::from_secs(1_800_000_000);
//! let (host, project) = (HostId::random(), ProjectId::random());
//!
//! // At the master:
//! let ring = SigningRing::generate(Algorithm::EdDsa, now)?;
//! let minted = ring.mint(
//!     &NewToken::new("https://master.example", host, AccountId::random(), project, Epoch::FIRST)
//!         .scopes([Scope::Http, Scope::Ws]),
//!     now,
//! )?;
//!
//! // At the host, which has only the public keys:
//! let verifier = Verifier::new(&ring.public());
//! let expect = Expect { issuer: "https://master.example", host: Some(host), project };
//! let claims = verifier.verify(&minted.token, &expect, now)?;
//! assert!(claims.scp.contains(&Scope::Http));
//! # Ok(())
//! # }
//! ```

mod compact;
mod public_key;

pub mod acl;
pub mod audit;
pub mod identity;
pub mod jwks;
pub mod key_file;
pub mod limit;
pub mod mint;
pub mod peer;
pub mod receipt;
pub mod session;
pub mod store;
pub mod stream;
pub mod token;

pub use public_key::{KeyError, PublicKey};

/// The system has no randomness to give.
#[derive(Clone, Debug, thiserror::Error)]
#[error("the system's random source failed: {0}")]
pub struct RandomError(String);

/// Fills `buffer` from the system's random source.
pub(crate) fn fill_random(buffer: &mut [u8]) -> Result<(), RandomError> {
    getrandom::fill(buffer).map_err(|error| RandomError(error.to_string()))
}
