//! Who somebody is, as an OpenID provider says.
//!
//! The relying party's half of the authorization code flow (OpenID Connect Core
//! 1.0, section 3.1) with PKCE (RFC 7636), for any provider that publishes a
//! discovery document. What the provider signs is checked by the `openidconnect`
//! library; this crate says what it may sign with, keeps what was discovered for
//! a while, and bounds how long and how much a provider may answer.
//!
//! It keeps no accounts, sets no cookies and serves nothing: `cocalc-master`
//! does. It is apart from `cocalc-auth` for what it brings along: RSA, and an
//! HTTP client.
//!
//! ```no_run
//! use cocalc_auth_oidc::{Provider, Settings};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let settings = Settings::new("https://id.example", "cocalc", "https://cocalc.example/callback");
//! let provider = Provider::new(settings)?;
//! let begun = provider.begin().await?;
//! // Send the browser to `begun.url`, and remember `begun.state` for it. It
//! // comes back with that state and a code:
//! let person = provider.finish(begun.pending, "the code").await?;
//! println!("{} of {}", person.subject, provider.issuer());
//! # Ok(())
//! # }
//! ```

mod error;
mod http;
mod provider;
mod settings;

pub use self::{
    error::Error,
    provider::{Begun, Pending, Person, Provider},
    settings::{Secret, Settings, SettingsError},
};
