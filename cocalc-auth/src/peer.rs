//! Short assertions, with which a host or proxy signs in.
//!
//! A peer signs with its own identity key that it is itself, for one audience,
//! for at most a minute; whoever knows its registered key verifies it. The
//! assertion is as strict as a connect token, and is good for one sign-in:
//! [`Seen`] refuses it the second time.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    str::FromStr,
    time::Duration,
};

use cocalc_ids::{HostId, ProxyId, Timestamp};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{
    PublicKey, RandomError,
    compact::{self, Parts},
    identity::Identity,
    token::{TokenError, TokenId, check_times},
};

/// `typ` of assertions.
pub const TYP: &str = "cocalc-peer+jwt";
/// The longest life of an assertion.
pub const TTL_MAX: Duration = Duration::from_secs(60);
/// How far a peer's clock may be off before it is refused: it has no estimate
/// of master time yet when it signs in.
pub const LEEWAY: Duration = Duration::from_secs(30);

const HEADER: &str = r#"{"alg":"EdDSA","typ":"cocalc-peer+jwt"}"#;

/// A host or proxy, as assertions name it: `host:<id>` or `proxy:<id>`.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum PeerId {
    /// A host.
    Host(HostId),
    /// A proxy.
    Proxy(ProxyId),
}

impl fmt::Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host(id) => write!(f, "host:{id}"),
            Self::Proxy(id) => write!(f, "proxy:{id}"),
        }
    }
}

impl FromStr for PeerId {
    type Err = ParsePeerError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        match s.split_once(':') {
            Some(("host", id)) => id.parse().map(Self::Host).map_err(|_| ParsePeerError),
            Some(("proxy", id)) => id.parse().map(Self::Proxy).map_err(|_| ParsePeerError),
            _ => Err(ParsePeerError),
        }
    }
}

impl Serialize for PeerId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PeerId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// A text that names no peer.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("not a peer: expected host:<id> or proxy:<id>")]
pub struct ParsePeerError;

/// What an assertion says.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct PeerClaims {
    /// Who signs in.
    pub iss: PeerId,
    /// Where: the master's URL.
    pub aud: String,
    /// When it was made, in seconds.
    pub iat: u64,
    /// When it ends.
    pub exp: u64,
    /// Its own id.
    pub jti: TokenId,
}

/// Makes an assertion by `peer`, whose key `identity` is, for `audience`.
///
/// # Errors
///
/// The system has no randomness to give.
pub fn assert(
    identity: &Identity,
    peer: PeerId,
    audience: &str,
    now: Timestamp,
) -> Result<String, RandomError> {
    let iat = u64::try_from(now.secs()).unwrap_or(0);
    let claims = PeerClaims {
        iss: peer,
        aud: audience.to_owned(),
        iat,
        exp: iat.saturating_add(TTL_MAX.as_secs()),
        jti: TokenId::random()?,
    };
    Ok(sign(identity, &claims))
}

/// Signs claims as they are. [`assert()`] is what daemons call; this serves tests
/// that need claims which nobody should sign.
pub fn sign(identity: &Identity, claims: &PeerClaims) -> String {
    // Text and integers always become JSON.
    let payload = serde_json::to_vec(claims).unwrap_or_default();
    compact::sign(&compact::encode(HEADER.as_bytes()), &payload, identity.secret())
}

/// Verifies an assertion for `audience` at `now`. `registered` gives the key of
/// the peer that it claims to be of, if that peer is known and not withdrawn;
/// nothing is believed before its signature is checked.
///
/// # Errors
///
/// Everything that is not exactly an assertion of that key, for this place and
/// time. Replays are refused by [`Seen`].
pub fn verify(
    token: &str,
    audience: &str,
    now: Timestamp,
    registered: impl FnOnce(PeerId) -> Option<PublicKey>,
) -> Result<PeerClaims, TokenError> {
    let parts = Parts::split(token).ok_or(TokenError::Malformed)?;
    if parts.header != compact::encode(HEADER.as_bytes()) {
        return Err(TokenError::UnknownHeader);
    }
    let claims: PeerClaims = parts.payload().ok_or(TokenError::Payload)?;
    let key = registered(claims.iss).ok_or(TokenError::WrongIssuer)?;
    if !parts.signed_by(&key) {
        return Err(TokenError::BadSignature);
    }
    if claims.aud != audience {
        return Err(TokenError::WrongAudience);
    }
    check_times(claims.iat, claims.exp, TTL_MAX, LEEWAY, now)?;
    Ok(claims)
}

/// Remembers assertions until they end, so that each is good once. Bounded: when
/// it is full of assertions that have not ended, it refuses.
#[derive(Debug)]
pub struct Seen {
    limit: usize,
    ids: BTreeMap<TokenId, u64>,
    ends: BTreeSet<(u64, TokenId)>,
}

impl Seen {
    /// Remembers at most `limit` of them.
    pub fn new(limit: usize) -> Self {
        Self { limit, ids: BTreeMap::new(), ends: BTreeSet::new() }
    }

    /// Whether this is the first time, and remembers it.
    pub fn first(&mut self, claims: &PeerClaims, now: Timestamp) -> bool {
        let now = u64::try_from(now.secs()).unwrap_or(0);
        while let Some((end, id)) = self.ends.first().copied()
            && end < now
        {
            self.ends.pop_first();
            self.ids.remove(&id);
        }
        if self.ids.contains_key(&claims.jti) || self.ids.len() >= self.limit {
            return false;
        }
        let end = claims.exp.saturating_add(LEEWAY.as_secs());
        self.ids.insert(claims.jti, end);
        self.ends.insert((end, claims.jti));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MASTER: &str = "https://master.example";
    const NOW: Timestamp = Timestamp::from_secs(1_800_000_000);

    fn host() -> (Identity, PeerId) {
        (Identity::from_seed(&[1; 32]), PeerId::Host(HostId::from_bytes([2; 16])))
    }

    fn check(token: &str, now: Timestamp) -> Result<PeerClaims, TokenError> {
        let (identity, peer) = host();
        verify(token, MASTER, now, |claimed| (claimed == peer).then(|| identity.public_key()))
    }

    #[test]
    fn an_assertion_is_accepted_for_its_minute() {
        let (identity, peer) = host();
        let token = assert(&identity, peer, MASTER, NOW).unwrap();
        assert_eq!(check(&token, NOW).unwrap().iss, peer);
        assert!(check(&token, NOW.plus(Duration::from_millis(89_999))).is_ok());
        assert_eq!(check(&token, NOW.plus(Duration::from_secs(90))), Err(TokenError::Expired));
        assert!(check(&token, Timestamp::from_secs(NOW.secs() - 30)).is_ok());
        assert_eq!(check(&token, Timestamp::from_secs(NOW.secs() - 31)), Err(TokenError::NotYetValid));
    }

    #[test]
    fn nobody_signs_in_as_somebody_else() {
        let (identity, peer) = host();
        let other = Identity::from_seed(&[9; 32]);
        assert_eq!(check(&assert(&other, peer, MASTER, NOW).unwrap(), NOW), Err(TokenError::BadSignature));
        let proxy = PeerId::Proxy(ProxyId::from_bytes([2; 16]));
        let claims_to_be_a_proxy = assert(&identity, proxy, MASTER, NOW).unwrap();
        assert_eq!(check(&claims_to_be_a_proxy, NOW), Err(TokenError::WrongIssuer));
        let elsewhere = assert(&identity, peer, "https://evil.example", NOW).unwrap();
        assert_eq!(check(&elsewhere, NOW), Err(TokenError::WrongAudience));
    }

    #[test]
    fn a_long_life_and_another_header_are_refused() {
        let (identity, peer) = host();
        let iat = NOW.secs() as u64;
        let mut claims = PeerClaims {
            iss: peer,
            aud: MASTER.to_owned(),
            iat,
            exp: iat + 61,
            jti: TokenId::random().unwrap(),
        };
        assert_eq!(check(&sign(&identity, &claims), NOW), Err(TokenError::BadLife));
        claims.exp = iat;
        assert_eq!(check(&sign(&identity, &claims), NOW), Err(TokenError::BadLife));
        claims.exp = iat + 60;
        let payload = serde_json::to_vec(&claims).unwrap();
        for header in
            [r#"{"typ":"cocalc-peer+jwt","alg":"EdDSA"}"#, r#"{"alg":"none","typ":"cocalc-peer+jwt"}"#]
        {
            let token = compact::sign(&compact::encode(header.as_bytes()), &payload, identity.secret());
            assert_eq!(check(&token, NOW), Err(TokenError::UnknownHeader));
        }
    }

    #[test]
    fn an_assertion_is_good_once_and_memory_is_bounded() {
        let (identity, peer) = host();
        let mut seen = Seen::new(2);
        let claims = |now| check(&assert(&identity, peer, MASTER, now).unwrap(), now).unwrap();
        let first = claims(NOW);
        assert!(seen.first(&first, NOW));
        assert!(!seen.first(&first, NOW));
        assert!(seen.first(&claims(NOW), NOW));
        assert!(!seen.first(&claims(NOW), NOW), "full");
        let later = NOW.plus(Duration::from_secs(91));
        assert!(seen.first(&claims(later), later));
        assert!(seen.ids.len() <= 2 && seen.ends.len() == seen.ids.len());
    }
}
