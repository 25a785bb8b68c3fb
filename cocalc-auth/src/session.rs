//! Browser sessions: an opaque secret in a cookie, of which the host keeps only
//! the hash.

use std::{collections::BTreeSet, fmt, str::FromStr};

use cocalc_ids::{AccountId, HostId, ProjectId, Scope, Timestamp};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use crate::{RandomError, compact, token::LoginTag};

/// What a session is good for. It is checked against the ACL on every use.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct SessionRecord {
    /// Whose it is.
    pub account: AccountId,
    /// The project it opens.
    pub project: ProjectId,
    /// What the token that opened it could open.
    pub scopes: BTreeSet<Scope>,
    /// The account's session epoch at that time.
    pub session_epoch: u64,
    /// The lowest ACL version that may decide.
    pub acl: u64,
    /// The origin that may embed the project.
    pub embed_origin: Option<String>,
    /// When it was made, in master time.
    pub created: Timestamp,
    /// The log-in under which the token was minted that opened it.
    #[serde(default)]
    pub login: Option<LoginTag>,
}

/// A new session's secret: 256 random bits, base64url. Wiped on drop.
pub struct SessionSecret(Zeroizing<String>);

impl SessionSecret {
    /// Makes a new one.
    ///
    /// # Errors
    ///
    /// The system has no randomness to give.
    pub fn random() -> Result<Self, RandomError> {
        let mut bytes = Zeroizing::new([0; 32]);
        crate::fill_random(&mut *bytes)?;
        Ok(Self(Zeroizing::new(compact::encode(&*bytes))))
    }

    /// The cookie's value. Not for logs.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// What the host keeps of it.
    pub fn hash(&self) -> SessionHash {
        SessionHash(Sha256::digest(self.0.as_bytes()).into())
    }
}

impl fmt::Debug for SessionSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SessionSecret(…)")
    }
}

/// SHA-256 of a session's secret, written in hexadecimal. Equality takes the
/// same time wherever it differs.
#[derive(Clone, Copy)]
pub struct SessionHash([u8; 32]);

impl SessionHash {
    /// The hash of a cookie's value; `None` for what cannot be a session's.
    pub fn of_cookie(value: &str) -> Option<Self> {
        compact::decode_exact::<32>(value)?;
        Some(Self(Sha256::digest(value.as_bytes()).into()))
    }

    /// A hash from its 32 bytes.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl PartialEq for SessionHash {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl Eq for SessionHash {}

impl Ord for SessionHash {
    // The order of hashes tells nothing of the secrets.
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.cmp(&other.0)
    }
}

impl PartialOrd for SessionHash {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for SessionHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for SessionHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for SessionHash {
    type Err = ParseHashError;

    fn from_str(s: &str) -> Result<Self, ParseHashError> {
        let mut bytes = [0; 32];
        if s.len() != 64 || !s.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(ParseHashError);
        }
        for (index, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&s[2 * index..2 * index + 2], 16).map_err(|_| ParseHashError)?;
        }
        Ok(Self(bytes))
    }
}

/// A text that is no hash.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("not a session hash: expected 64 lower-case hexadecimal digits")]
pub struct ParseHashError;

/// The name of the session cookie of `host`. Cookies ignore ports, so that the
/// name tells hosts on one machine apart. On a project's own origin it has the
/// `__Host-` prefix, which browsers hold to `Secure` and `Path=/`; in path
/// routing the path is part of what separates projects, and the prefix is not
/// allowed.
pub fn cookie_name(host: HostId, own_origin: bool) -> String {
    format!("{}cocalc_session_{host}", if own_origin { "__Host-" } else { "" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_found_by_its_hash_only() {
        let secret = SessionSecret::random().unwrap();
        assert_eq!(secret.expose().len(), 43);
        assert_eq!(SessionHash::of_cookie(secret.expose()), Some(secret.hash()));
        assert_ne!(SessionSecret::random().unwrap().hash(), secret.hash());
        assert_eq!(secret.hash().to_string().parse(), Ok(secret.hash()));
        assert!(!format!("{secret:?}").contains(secret.expose()));
        for bad in ["", "x", &format!("{}=", secret.expose()), &secret.hash().to_string()] {
            assert_eq!(SessionHash::of_cookie(bad), None, "{bad}");
        }
        for bad in ["", "00", &"g".repeat(64), &"A".repeat(64), &"é".repeat(32)] {
            assert!(bad.parse::<SessionHash>().is_err(), "{bad}");
        }
    }

    #[test]
    fn cookie_names_tell_hosts_apart() {
        let host = HostId::from_bytes([1; 16]);
        assert_eq!(cookie_name(host, true), format!("__Host-cocalc_session_{host}"));
        assert_ne!(cookie_name(host, false), cookie_name(HostId::from_bytes([2; 16]), false));
    }
}
