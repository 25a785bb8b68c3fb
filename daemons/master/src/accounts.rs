//! Accounts that somebody else keeps.

use async_trait::async_trait;
use cocalc_core::BoxError;

/// A person whom an integrator's own accounts know.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Person {
    /// What never changes of them, for instance their id. The master's account
    /// is found by it, and made at the first time.
    pub subject: String,
    /// What people call them; used when their account is made.
    pub name: String,
}

/// Accounts that an integrator has already: their bearer tokens are good at the
/// master's API, beside its own.
///
/// # Contract
///
/// - `bearer` is asked for each call with a token that is not the master's own
///   (`cct_…`), and answers within two seconds; later is 503.
/// - Whoever it does not know is `None`, and 401. An error is 503: nobody is let
///   in, and nobody is told that their token is bad.
/// - Its people administer nothing. Bans and sign-outs at the master count for
///   them as for all others.
#[async_trait]
pub trait Accounts: std::fmt::Debug + Send + Sync + 'static {
    /// A name for these accounts, for instance `example.org`; it never changes.
    fn provider(&self) -> &str;

    /// Whose `token` it is.
    async fn bearer(&self, token: &str) -> Result<Option<Person>, BoxError>;
}
