//! What a connect token says, and the verifier.
//!
//! A token is a compact JWT that others can verify against the master's JWKS,
//! but this verifier accepts far less than JWT allows: the header must equal,
//! byte for byte, the one that the ring gives for a key, so no header is ever
//! parsed and no `alg`, `jku`, `crit` or `x5u` can be chosen by whoever made
//! the token; the payload is one exact set of claims; the signature is checked
//! by `verify_strict`.

use std::{collections::BTreeSet, fmt, str::FromStr, time::Duration};

use cocalc_ids::{AccountId, Epoch, HostId, KeyId, ProjectId, Scope, Timestamp};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest, Sha256};

use crate::{
    PublicKey, RandomError,
    compact::{self, Parts},
    stream::PublicRing,
};

/// The longest life that any verifier accepts.
pub const TTL_MAX: Duration = Duration::from_secs(300);
/// How far the clocks may differ, after the estimate of master time.
pub const LEEWAY: Duration = Duration::from_secs(5);
/// A token is never longer.
pub const BYTES_MAX: usize = compact::TOKEN_BYTES_MAX;
/// A ring with more keys is not used beyond these.
pub const RING_KEYS_MAX: usize = 16;
/// `typ` of connect tokens. A change of claims is another `typ`.
pub const TYP: &str = "cocalc-connect+jwt";

/// What a connect token says.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Claims {
    /// Who issued it: the master's URL.
    pub iss: String,
    /// Which host it is for.
    pub aud: Audience,
    /// Whose it is.
    pub sub: AccountId,
    /// The project it opens.
    pub prj: ProjectId,
    /// The owner's epoch it was made for.
    pub epoch: Epoch,
    /// What it opens; never empty.
    #[serde(deserialize_with = "scopes")]
    pub scp: BTreeSet<Scope>,
    /// When it was made, in seconds of master time.
    pub iat: u64,
    /// When it ends.
    pub exp: u64,
    /// Its own id.
    pub jti: TokenId,
    /// The account's session epoch.
    pub sep: u64,
    /// The lowest version of the project's ACL that may decide.
    pub acl: u64,
    /// How often it may be used.
    #[serde(rename = "use")]
    pub usage: Usage,
    /// The origin that may embed the project in a frame.
    #[serde(default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    pub emb: Option<String>,
}

impl Claims {
    /// When it was made.
    pub fn issued(&self) -> Timestamp {
        Timestamp::from_secs(i64::try_from(self.iat).unwrap_or(i64::MAX))
    }

    /// When it ends.
    pub fn expires(&self) -> Timestamp {
        Timestamp::from_secs(i64::try_from(self.exp).unwrap_or(i64::MAX))
    }

    /// Checks that authentic claims are what is expected, at `now` in master
    /// time.
    ///
    /// # Errors
    ///
    /// [`TokenError::Expired`] only if nothing else is wrong.
    pub fn check(&self, expect: &Expect<'_>, now: Timestamp) -> Result<(), TokenError> {
        if self.iss != expect.issuer {
            return Err(TokenError::WrongIssuer);
        }
        if expect.host.is_some_and(|host| self.aud != Audience(host)) {
            return Err(TokenError::WrongAudience);
        }
        if self.prj != expect.project {
            return Err(TokenError::WrongProject);
        }
        check_times(self.iat, self.exp, TTL_MAX, LEEWAY, now)
    }
}

/// Scopes as tokens list them: at least one, in order, none twice.
fn scopes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeSet<Scope>, D::Error> {
    let list = Vec::<Scope>::deserialize(deserializer)?;
    if list.is_empty() || !list.is_sorted_by(|a, b| a < b) {
        return Err(serde::de::Error::custom("scopes are listed in order, each once"));
    }
    Ok(list.into_iter().collect())
}

/// A claim that may be left out, but is never null.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    String::deserialize(deserializer).map(Some)
}

/// How often a token may be used (claim `use`).
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Usage {
    /// Redeemed once, for a browser session.
    Once,
    /// Shown again and again until it ends.
    Multi,
}

/// The host that a token is for (claim `aud`): `project-host:<host id>`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Audience(pub HostId);

const AUDIENCE_PREFIX: &str = "project-host:";

impl fmt::Display for Audience {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{AUDIENCE_PREFIX}{}", self.0)
    }
}

impl Serialize for Audience {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Audience {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        let id = text.strip_prefix(AUDIENCE_PREFIX).and_then(|id| id.parse().ok());
        id.map(Self).ok_or_else(|| serde::de::Error::custom("not a host's audience"))
    }
}

/// Under which log-in of its account a token was minted: 64 bits of a hash of the
/// log-in's id, in hexadecimal as text. What it opened ends with the log-in.
#[derive(Clone, Copy, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct LoginTag([u8; 8]);

impl LoginTag {
    /// That of the log-in, or API key, of this id.
    pub fn of(login: KeyId) -> Self {
        let mut hasher = Sha256::new();
        hasher.update(b"cocalc-login-1 ");
        hasher.update(login.to_string().as_bytes());
        let hash: [u8; 32] = hasher.finalize().into();
        let mut tag = [0; 8];
        tag.copy_from_slice(&hash[..8]);
        Self(tag)
    }
}

impl fmt::Display for LoginTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for LoginTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for LoginTag {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        let mut bytes = [0; 8];
        if text.len() != 16 || !text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(TokenError::Payload);
        }
        for (index, byte) in bytes.iter_mut().enumerate() {
            *byte =
                u8::from_str_radix(&text[2 * index..2 * index + 2], 16).map_err(|_| TokenError::Payload)?;
        }
        Ok(Self(bytes))
    }
}

impl Serialize for LoginTag {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for LoginTag {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        text.parse().map_err(|_| serde::de::Error::custom("not a log-in's tag"))
    }
}

/// The id of a token (claim `jti`): 128 bits, base64url. Of one that was minted
/// under a log-in the first 64 are that log-in's tag; all others are random.
#[derive(Clone, Copy, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct TokenId([u8; 16]);

impl TokenId {
    /// An id from 16 random bytes.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The 16 bytes.
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// A new id of a token that is minted under a log-in.
    ///
    /// # Errors
    ///
    /// The system has no randomness to give.
    pub fn under(login: LoginTag) -> Result<Self, RandomError> {
        let Self(mut bytes) = Self::random()?;
        bytes[..8].copy_from_slice(&login.0);
        Ok(Self(bytes))
    }

    /// The log-in that it was minted under; if it was under none, one that
    /// nobody has.
    pub fn login(&self) -> LoginTag {
        let mut tag = [0; 8];
        tag.copy_from_slice(&self.0[..8]);
        LoginTag(tag)
    }

    /// A new random id.
    ///
    /// # Errors
    ///
    /// The system has no randomness to give.
    pub fn random() -> Result<Self, RandomError> {
        let mut bytes = [0; 16];
        crate::fill_random(&mut bytes)?;
        Ok(Self(bytes))
    }
}

impl fmt::Display for TokenId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&compact::encode(&self.0))
    }
}

impl fmt::Debug for TokenId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for TokenId {
    type Err = TokenError;

    fn from_str(s: &str) -> Result<Self, TokenError> {
        compact::decode_exact(s).map(Self).ok_or(TokenError::Payload)
    }
}

impl Serialize for TokenId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for TokenId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        text.parse().map_err(|_| serde::de::Error::custom("not a token id"))
    }
}

/// What the header calls the signature algorithm. Both are Ed25519.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub enum Algorithm {
    /// `EdDSA` (RFC 8037), which most libraries know.
    #[default]
    #[serde(rename = "EdDSA")]
    EdDsa,
    /// `Ed25519` (RFC 9864), which replaces it.
    Ed25519,
}

impl Algorithm {
    /// Its name in headers.
    pub const fn name(self) -> &'static str {
        match self {
            Self::EdDsa => "EdDSA",
            Self::Ed25519 => "Ed25519",
        }
    }

    /// The algorithm of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::EdDsa, Self::Ed25519].into_iter().find(|known| known.name() == name)
    }
}

/// The one header that tokens of a key have.
pub fn header_text(algorithm: Algorithm, kid: &str) -> String {
    format!(r#"{{"alg":"{}","typ":"{TYP}","kid":"{kid}"}}"#, algorithm.name())
}

/// Whether a key's name can stand in a header without escapes.
pub(crate) fn valid_kid(kid: &str) -> bool {
    (1..=64).contains(&kid.len()) && kid.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b))
}

/// What whoever verifies a token expects it to say.
#[derive(Clone, Copy, Debug)]
pub struct Expect<'a> {
    /// The master's URL.
    pub issuer: &'a str,
    /// This host; `None` for a proxy, which looks the host up by the project's
    /// route and compares [`Claims::aud`] itself.
    pub host: Option<HostId>,
    /// The project that is asked for.
    pub project: ProjectId,
}

/// Verifies connect tokens with the public keys of a ring.
#[derive(Clone, Debug, Default)]
pub struct Verifier {
    version: u64,
    keys: Vec<VerifierKey>,
    refused: Vec<String>,
}

#[derive(Clone, Debug)]
struct VerifierKey {
    kid: String,
    /// The header in base64url, which has one spelling: comparing it compares
    /// the header's bytes.
    header: String,
    key: PublicKey,
}

impl Verifier {
    /// Prepares the keys of a ring. A key that is weak or malformed is left
    /// out, and named by [`refused`](Self::refused): keeping the ring that was
    /// there before could keep a key that was withdrawn.
    pub fn new(ring: &PublicRing) -> Self {
        let mut verifier = Self { version: ring.version, ..Self::default() };
        for entry in &ring.keys {
            let usable = valid_kid(&entry.kid)
                && verifier.keys.len() < RING_KEYS_MAX
                && verifier.keys.iter().all(|known| known.kid != entry.kid);
            match (Algorithm::from_name(&entry.alg), entry.key.parse()) {
                (Some(algorithm), Ok(key)) if usable => verifier.keys.push(VerifierKey {
                    kid: entry.kid.clone(),
                    header: compact::encode(header_text(algorithm, &entry.kid).as_bytes()),
                    key,
                }),
                _ => verifier.refused.push(entry.kid.clone()),
            }
        }
        verifier
    }

    /// The version of the ring.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The names of the keys in use.
    pub fn kids(&self) -> impl Iterator<Item = &str> {
        self.keys.iter().map(|key| key.kid.as_str())
    }

    /// The names of the keys that were left out.
    pub fn refused(&self) -> &[String] {
        &self.refused
    }

    /// Verifies `token` at `now`, in master time.
    ///
    /// # Errors
    ///
    /// [`TokenError::Expired`] only for a token that is authentic, was meant
    /// for this place, and whose time is over. The name of the key that signed
    /// it is not returned: nothing may depend on it.
    pub fn verify(&self, token: &str, expect: &Expect<'_>, now: Timestamp) -> Result<Claims, TokenError> {
        let claims = self.authenticate(token)?;
        claims.check(expect, now)?;
        Ok(claims)
    }

    /// The first half of [`verify`](Self::verify): that a key of the ring has
    /// signed exactly this, and what it says. It may be over, or for somewhere
    /// else: [`Claims::check`] is the other half.
    ///
    /// # Errors
    ///
    /// What is not well formed, or not signed by a key of the ring.
    pub fn authenticate(&self, token: &str) -> Result<Claims, TokenError> {
        let parts = Parts::split(token).ok_or(TokenError::Malformed)?;
        // Headers are no secret; which key it is may show in the time it takes.
        let key = self.keys.iter().find(|key| key.header == parts.header).ok_or(TokenError::UnknownHeader)?;
        if !parts.signed_by(&key.key) {
            return Err(TokenError::BadSignature);
        }
        parts.payload().ok_or(TokenError::Payload)
    }
}

/// Checks issue and end in master time. The end is looked at last: only what is
/// right otherwise has merely expired.
pub(crate) fn check_times(
    iat: u64,
    exp: u64,
    ttl_max: Duration,
    leeway: Duration,
    now: Timestamp,
) -> Result<(), TokenError> {
    let now_millis = u64::try_from(now.millis()).map_err(|_| TokenError::NotYetValid)?;
    let leeway = u64::try_from(leeway.as_millis()).unwrap_or(u64::MAX);
    if exp <= iat || exp - iat > ttl_max.as_secs() {
        return Err(TokenError::BadLife);
    }
    if iat.saturating_mul(1000) > now_millis.saturating_add(leeway) {
        return Err(TokenError::NotYetValid);
    }
    if exp.saturating_mul(1000).saturating_add(leeway) <= now_millis {
        return Err(TokenError::Expired);
    }
    Ok(())
}

/// Why a token is not accepted.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum TokenError {
    /// It is authentic, and its time is over.
    #[error("the token has expired")]
    Expired,
    /// Too long, or not three parts.
    #[error("the token is malformed")]
    Malformed,
    /// No key of the ring has this header.
    #[error("the token's header is of no key in use")]
    UnknownHeader,
    /// The signature is not of that key.
    #[error("the token's signature is not valid")]
    BadSignature,
    /// The claims are not exactly those of its type.
    #[error("the token's claims are malformed")]
    Payload,
    /// It is of another master.
    #[error("the token is of another issuer")]
    WrongIssuer,
    /// It is for another host.
    #[error("the token is for another host")]
    WrongAudience,
    /// It is for another project.
    #[error("the token is for another project")]
    WrongProject,
    /// It was made in the future.
    #[error("the token is not valid yet")]
    NotYetValid,
    /// It ends before it begins, or lives too long.
    #[error("the token's life is not acceptable")]
    BadLife,
}
