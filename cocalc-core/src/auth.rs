//! Who somebody is, and what they may do now.

use std::{collections::BTreeSet, fmt, net::IpAddr, time::Duration};

use async_trait::async_trait;
use cocalc_ids::{AccountId, Action, Epoch, KeyId, ProjectId, ProxyId, Restrictions, Scope, Timestamp};
use serde::{Deserialize, Serialize};

/// Verifies credentials and decides, on a host, from what it knows now.
///
/// # Contract
///
/// - `verify` decides on the credential and context alone: nothing is
///   remembered between calls but used-up tokens and opened sessions.
/// - `authorize` fails closed: unknown, too old or unreachable is a denial.
/// - A connection is admitted with [`admit`](Self::admit), kept for its whole
///   life, and ended as soon as [`Admission::revoked`] resolves.
/// - Nothing a caller can observe from outside tells an unknown project from
///   a forbidden one; [`Denial::public`] says what may be told.
#[async_trait]
pub trait Auth: fmt::Debug + Send + Sync + 'static {
    /// Proves who holds `credential`. A one-use token is used up by
    /// [`open_session`](Self::open_session), not here.
    async fn verify(&self, credential: &Credential, context: &Context) -> Result<Principal, Denial>;

    /// Decides whether `principal` may do `action` to `project` now.
    async fn authorize(&self, principal: &Principal, project: ProjectId, action: Action) -> Decision;

    /// Authorizes, and registers a connection that lives on, so that a change
    /// of rights ends it at once.
    async fn admit(
        &self,
        principal: &Principal,
        project: ProjectId,
        action: Action,
    ) -> Result<Admission, Denial>;

    /// Redeems a connect token for a browser session, and returns the cookie's
    /// value (only its hash is kept). A `once` token is used up: the second
    /// call with the same `jti` is denied.
    async fn open_session(&self, principal: &Principal, project: ProjectId) -> Result<Secret, Denial>;

    /// Ends the browser session whose cookie has this value, with what it has
    /// open; one that there is not has ended already. Whoever shows a cookie may
    /// end its session.
    ///
    /// # Errors
    ///
    /// [`Denial::Stale`] if it may come back, because that could not be kept.
    async fn close_session(&self, session: &Secret) -> Result<(), Denial>;
}

/// Something that is claimed to prove an identity.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Credential {
    /// A connect token, compact JWT.
    Token(Secret),
    /// The value of a session cookie.
    Session(Secret),
    /// An SSH public key whose possession the caller has verified, as the
    /// OpenSSH text `algorithm base64`, without comment.
    SshKey(String),
    /// An SSH public key that an enrolled proxy attests over its own
    /// authenticated connection.
    AttestedSshKey {
        /// As in [`SshKey`](Self::SshKey).
        key: String,
        /// Which proxy says so.
        proxy: String,
    },
    /// An OpenSSH user certificate, as text, the possession of whose key the
    /// caller has verified; of the certificate itself nothing.
    SshCertificate(String),
    /// The same, where an enrolled proxy attests the possession.
    AttestedSshCertificate {
        /// As in [`SshCertificate`](Self::SshCertificate).
        certificate: String,
        /// Which proxy says so.
        proxy: String,
    },
}

/// Where and for what a credential was shown.
#[derive(Clone, Copy, Debug)]
pub struct Context {
    /// The project that is asked for.
    pub project: ProjectId,
    /// The user's address, as far as it is known.
    pub source: Option<IpAddr>,
}

/// Who was proved to be there.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Principal {
    /// The account.
    pub account: AccountId,
    /// The only project this credential is good for.
    pub project: ProjectId,
    /// What it opens.
    pub scopes: BTreeSet<Scope>,
    /// The owner's epoch it was made for; `None` for keys, which outlive moves.
    pub epoch: Option<Epoch>,
    /// The account's session epoch it was made under; `None` for keys, which
    /// have no login.
    pub session_epoch: Option<u64>,
    /// The lowest ACL version that may decide.
    pub acl: u64,
    /// Which proof it was.
    pub via: Via,
    /// The origin that may embed the project, from the token.
    pub embed_origin: Option<String>,
    /// When the proof itself ends; sessions and keys have none.
    pub expires: Option<Timestamp>,
    /// What its SSH sessions are limited to, by the key's or certificate's own
    /// words. Whoever opens sessions keeps to it.
    pub restrictions: Restrictions,
    /// From where the proof was shown, as far as it is known. For the audit log.
    pub source: Option<IpAddr>,
}

/// Which proof a [`Principal`] gave.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum Via {
    /// A connect token.
    Token {
        /// Its id.
        jti: String,
        /// Whether it may be redeemed only once.
        once: bool,
    },
    /// A browser session, by the hash of its cookie.
    Session {
        /// SHA-256 of the cookie's value, in hexadecimal.
        hash: String,
        /// The log-in of the account that it was opened under, as the master
        /// names it; empty if it named none.
        login: String,
    },
    /// An SSH key.
    SshKey {
        /// The key in its list.
        key: KeyId,
        /// The proxy that attests that the user holds it; `None` if they have
        /// proved it here.
        proxy: Option<ProxyId>,
    },
    /// An SSH certificate of the master.
    SshCertificate {
        /// Its number.
        serial: u64,
        /// Its name: account, project and number.
        key_id: String,
        /// The key that signed it, `algorithm base64`.
        authority: String,
        /// The fingerprint of the user's key, `SHA256:…`.
        fingerprint: String,
        /// As of a key.
        proxy: Option<ProxyId>,
    },
    /// An SSH key in the project's own `~/.ssh/authorized_keys`, which its owner
    /// lets count. The account is the owner's, the rights a collaborator's.
    InsideSshKey {
        /// The key's fingerprint, `SHA256:…`.
        fingerprint: String,
        /// As of a key.
        proxy: Option<ProxyId>,
    },
}

/// What was decided, from how fresh knowledge.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Decision {
    /// Allowed, or why not.
    pub outcome: Result<(), Denial>,
    /// How long ago the knowledge was known to be current.
    pub staleness: Duration,
    /// Whether the master is being waited for ([`Tier`]).
    pub tier: Tier,
}

/// How well a host knows what is allowed.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Tier {
    /// Within the master's lease.
    Fresh,
    /// The master is away; what is cached goes on, nothing administrative.
    Grace,
    /// Away for too long: everything is closed.
    Expired,
}

/// Why access was denied. `Display` is for logs and audit; what outsiders may
/// learn is [`public`](Self::public).
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Denial {
    /// No credential was shown.
    #[error("no credential")]
    Unauthenticated,
    /// An authentic token whose time is over.
    #[error("the token has expired")]
    TokenExpired,
    /// The credential is not what it claims to be.
    #[error("bad credential: {0}")]
    BadCredential(String),
    /// A one-use token came a second time.
    #[error("the token was already used")]
    Used,
    /// The account may not do this.
    #[error("not permitted: {0}")]
    Forbidden(String),
    /// This host does not hold the project.
    #[error("not on this host: {0}")]
    NotHere(String),
    /// The knowledge is too old to decide, and the master did not answer.
    #[error("the master is out of reach, and what is cached may not decide")]
    Stale,
    /// Too many requests.
    #[error("too many requests, retry after {retry_after:?}")]
    RateLimited {
        /// When to come back.
        retry_after: Duration,
    },
}

impl Denial {
    /// The status and the code that an outsider is told.
    pub fn public(&self) -> (u16, &'static str) {
        match self {
            Self::Unauthenticated => (401, "unauthenticated"),
            Self::TokenExpired => (401, "token_expired"),
            Self::RateLimited { .. } => (429, "rate_limited"),
            // One answer for all others: whether a project exists, who may use
            // it and why not is nobody's business who has not proved it.
            _ => (403, "access_denied"),
        }
    }
}

/// A registered connection. Keep it as long as the connection lives.
pub struct Admission {
    revoked: tokio::sync::watch::Receiver<Option<Denial>>,
    _registration: Box<dyn Send + Sync>,
}

impl Admission {
    /// Makes an admission that ends when `revoked` becomes a reason, and whose
    /// `registration` is dropped with it.
    pub fn new(
        revoked: tokio::sync::watch::Receiver<Option<Denial>>,
        registration: impl Send + Sync + 'static,
    ) -> Self {
        Self { revoked, _registration: Box::new(registration) }
    }

    /// Resolves when the connection must end, and says why. Cancel safe. If
    /// whoever decides has gone, that is a reason too.
    pub async fn revoked(&self) -> Denial {
        let mut revoked = self.revoked.clone();
        match revoked.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or(Denial::Stale),
            Err(_) => Denial::Stale,
        }
    }
}

impl fmt::Debug for Admission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Admission").finish_non_exhaustive()
    }
}

/// A text that must not be printed. Compare it only by hash.
#[derive(Clone)]
pub struct Secret(String);

impl Secret {
    /// Wraps a secret.
    pub fn new(secret: impl Into<String>) -> Self {
        Self(secret.into())
    }

    /// The secret itself; not for logs.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}
