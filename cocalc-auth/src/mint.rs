//! The master's part: the ring of signing keys, with which tokens are minted.
//!
//! The next key is published a day before it signs, so that every host and
//! proxy has it by then; the previous one is still accepted until its last
//! token has expired. Rotation therefore drops nobody. A key that leaked is
//! withdrawn at once.

use std::{collections::BTreeSet, fmt, time::Duration};

use base64::Engine;
use cocalc_ids::{AccountId, Epoch, HostId, ProjectId, Scope, Timestamp};
use ed25519_dalek::SigningKey;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use zeroize::{Zeroize, Zeroizing};

use crate::{
    PublicKey, RandomError, compact,
    stream::{PublicRing, RingKey},
    token::{self, Algorithm, Audience, Claims, LoginTag, TokenId, Usage},
};

/// How long a key is published before it signs.
pub const PUBLISHED_BEFORE: Duration = Duration::from_secs(24 * 3600);
/// How long a key signs.
pub const SIGNS_FOR: Duration = Duration::from_secs(30 * 24 * 3600);
/// At most this many old keys are kept. Rotating faster is refused: the tokens of
/// one that was dropped would fail.
const PREVIOUS_MAX: usize = 8;
/// The names of withdrawn keys are told to hosts that were away; older ones
/// have long been forgotten by every lease.
const WITHDRAWN_MAX: usize = 64;

/// What may be told of a key of the ring.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct KeyInfo {
    /// Its name, as in a token's header.
    pub kid: String,
    /// What its tokens say of it.
    pub algorithm: Algorithm,
    /// Its place in the ring.
    pub state: KeyState,
    /// When it was published, for the next; when it began to sign, for the
    /// current one.
    pub since: Option<Timestamp>,
    /// When a previous one is accepted no more.
    pub until: Option<Timestamp>,
}

/// A key's place in the ring.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum KeyState {
    /// Published, and does not sign yet.
    Next,
    /// Signs.
    Current,
    /// Signs no more; its tokens are accepted until the last has expired.
    Previous,
}

impl KeyState {
    /// As in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Next => "next",
            Self::Current => "current",
            Self::Previous => "previous",
        }
    }
}

/// The keys that sign connect tokens. It prints nothing of its secrets, and
/// wipes them from memory when it is dropped.
pub struct SigningRing {
    version: u64,
    algorithm: Algorithm,
    next: Pair,
    current: Pair,
    /// Public keys only: a key that no longer signs has no secret any more.
    previous: Vec<Retired>,
    withdrawn: Vec<String>,
}

/// A key that signs or will sign. `SigningKey` wipes itself on drop.
struct Pair {
    kid: String,
    algorithm: Algorithm,
    /// When it was published, and for `current`, when it began to sign.
    since: Timestamp,
    secret: SigningKey,
}

#[derive(Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Retired {
    kid: String,
    alg: Algorithm,
    key: String,
    until: Timestamp,
}

impl Pair {
    fn generate(algorithm: Algorithm, since: Timestamp) -> Result<Self, RandomError> {
        let mut seed = Zeroizing::new([0; 32]);
        crate::fill_random(&mut *seed)?;
        Ok(Self::from_seed(&seed, algorithm, since))
    }

    fn from_seed(seed: &[u8; 32], algorithm: Algorithm, since: Timestamp) -> Self {
        let secret = SigningKey::from_bytes(seed);
        // Named by what it is: a key can't come back under another name.
        let digest = Sha256::digest(secret.verifying_key().as_bytes());
        Self { kid: compact::encode(&digest[..12]), algorithm, since, secret }
    }

    fn public(&self) -> RingKey {
        RingKey {
            kid: self.kid.clone(),
            key: PublicKey::from(self.secret.verifying_key()).to_string(),
            alg: self.algorithm.name().to_owned(),
        }
    }
}

impl SigningRing {
    /// Makes a new ring: a key that signs from now on, and its successor.
    ///
    /// # Errors
    ///
    /// The system has no randomness to give.
    pub fn generate(algorithm: Algorithm, now: Timestamp) -> Result<Self, RandomError> {
        Ok(Self {
            version: 1,
            algorithm,
            next: Pair::generate(algorithm, now)?,
            current: Pair::generate(algorithm, now)?,
            previous: Vec::new(),
            withdrawn: Vec::new(),
        })
    }

    /// Grows with each change.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The name of the key that signs.
    pub fn current_kid(&self) -> &str {
        &self.current.kid
    }

    /// The name of the key that signs next.
    pub fn next_kid(&self) -> &str {
        &self.next.kid
    }

    /// The algorithm's name for keys made from now on.
    pub fn use_algorithm(&mut self, algorithm: Algorithm) {
        self.algorithm = algorithm;
    }

    /// Whether the current key has signed for [`SIGNS_FOR`], and its successor
    /// is known long enough.
    pub fn rotation_due(&self, now: Timestamp) -> bool {
        now.since(self.current.since) >= SIGNS_FOR && now.since(self.next.since) >= PUBLISHED_BEFORE
    }

    /// Lets the next key sign, and makes another next one. The caller saves
    /// the ring, then publishes it.
    ///
    /// # Errors
    ///
    /// [`RotateError::TooEarly`] when hosts may not know the next key yet;
    /// `force` does it nevertheless. [`RotateError::TooOften`] when tokens of as
    /// many old keys as are kept may still be good. Nothing is changed on an
    /// error.
    pub fn rotate(&mut self, force: bool, now: Timestamp) -> Result<(), RotateError> {
        let published = now.since(self.next.since);
        if published < PUBLISHED_BEFORE && !force {
            return Err(RotateError::TooEarly { wait: PUBLISHED_BEFORE - published });
        }
        let good = self.previous.iter().filter(|key| now < key.until);
        if good.clone().count() >= PREVIOUS_MAX {
            let first = good.map(|key| key.until).min().unwrap_or(now);
            return Err(RotateError::TooOften { wait: first.since(now) });
        }
        let fresh = Pair::generate(self.algorithm, now)?;
        self.expire(now);
        let mut old = std::mem::replace(&mut self.current, std::mem::replace(&mut self.next, fresh));
        self.current.since = now;
        let public = old.public();
        self.previous.push(Retired {
            kid: std::mem::take(&mut old.kid),
            alg: old.algorithm,
            key: public.key,
            until: now.plus(token::TTL_MAX + token::LEEWAY),
        });
        self.version += 1;
        Ok(())
    }

    /// Withdraws a key at once; what it signed is refused as soon as hosts
    /// hear of it. `false`: no such key.
    ///
    /// # Errors
    ///
    /// The system has no randomness for the key that takes its place.
    pub fn withdraw(&mut self, kid: &str, now: Timestamp) -> Result<bool, RandomError> {
        if self.current.kid == kid {
            let fresh = Pair::generate(self.algorithm, now)?;
            self.current = std::mem::replace(&mut self.next, fresh);
            self.current.since = now;
        } else if self.next.kid == kid {
            self.next = Pair::generate(self.algorithm, now)?;
        } else {
            let before = self.previous.len();
            self.previous.retain(|key| key.kid != kid);
            if self.previous.len() == before {
                return Ok(false);
            }
        }
        self.withdrawn.push(kid.to_owned());
        if self.withdrawn.len() > WITHDRAWN_MAX {
            self.withdrawn.remove(0);
        }
        self.version += 1;
        Ok(true)
    }

    /// Drops previous keys whose last token has expired; whether there was one.
    pub fn expire(&mut self, now: Timestamp) -> bool {
        let before = self.previous.len();
        self.previous.retain(|key| now < key.until);
        let changed = self.previous.len() != before;
        self.version += u64::from(changed);
        changed
    }

    /// Every key of the ring: next, current, then previous ones, oldest first.
    pub fn list(&self) -> Vec<KeyInfo> {
        let pair = |pair: &Pair, state| KeyInfo {
            kid: pair.kid.clone(),
            algorithm: pair.algorithm,
            state,
            since: Some(pair.since),
            until: None,
        };
        let retired = self.previous.iter().map(|key| KeyInfo {
            kid: key.kid.clone(),
            algorithm: key.alg,
            state: KeyState::Previous,
            since: None,
            until: Some(key.until),
        });
        let signing = [pair(&self.next, KeyState::Next), pair(&self.current, KeyState::Current)];
        signing.into_iter().chain(retired).collect()
    }

    /// The public keys, for hosts and proxies.
    pub fn public(&self) -> PublicRing {
        let retired = self.previous.iter().map(|key| RingKey {
            kid: key.kid.clone(),
            key: key.key.clone(),
            alg: key.alg.name().to_owned(),
        });
        let keys = [self.next.public(), self.current.public()].into_iter().chain(retired).collect();
        PublicRing { version: self.version, keys, withdrawn: self.withdrawn.clone() }
    }

    /// Mints a token that begins now.
    ///
    /// # Errors
    ///
    /// Claims that no verifier would accept, or no randomness.
    pub fn mint(&self, new: &NewToken, now: Timestamp) -> Result<Minted, MintError> {
        if new.scopes.is_empty() {
            return Err(MintError::NoScope);
        }
        let ttl = new.ttl.as_secs();
        if ttl == 0 || new.ttl > token::TTL_MAX {
            return Err(MintError::BadLife);
        }
        let iat = u64::try_from(now.secs()).map_err(|_| MintError::BadLife)?;
        let claims = Claims {
            iss: new.issuer.clone(),
            aud: Audience(new.host),
            sub: new.account,
            prj: new.project,
            epoch: new.epoch,
            scp: new.scopes.clone(),
            iat,
            exp: iat.saturating_add(ttl),
            jti: match new.login {
                Some(login) => TokenId::under(login)?,
                None => TokenId::random()?,
            },
            sep: new.session_epoch,
            acl: new.acl,
            usage: new.usage,
            emb: new.embed_origin.clone(),
        };
        let token = self.sign(&claims)?;
        Ok(Minted { token, claims })
    }

    /// Signs claims as they are. [`mint`](Self::mint) is what daemons call;
    /// this serves tests that need claims which nobody should mint.
    ///
    /// # Errors
    ///
    /// A token that would be too long.
    pub fn sign(&self, claims: &Claims) -> Result<String, MintError> {
        let header = token::header_text(self.current.algorithm, &self.current.kid);
        let payload = serde_json::to_vec(claims).map_err(|_| MintError::TooLong)?;
        let token = compact::sign(&compact::encode(header.as_bytes()), &payload, &self.current.secret);
        if token.len() > token::BYTES_MAX { Err(MintError::TooLong) } else { Ok(token) }
    }

    /// The ring as bytes, for a key file ([`crate::key_file::save`]).
    pub fn to_bytes(&self) -> Zeroizing<Vec<u8>> {
        let stored = Stored {
            format: FORMAT,
            version: self.version,
            algorithm: self.algorithm,
            next: StoredPair::from(&self.next),
            current: StoredPair::from(&self.current),
            previous: self.previous.clone(),
            withdrawn: self.withdrawn.clone(),
        };
        // Large enough never to move, for a move leaves a copy behind.
        let mut bytes = Zeroizing::new(Vec::with_capacity(8192));
        let written = serde_json::to_writer(&mut *bytes, &stored);
        debug_assert!(written.is_ok(), "writing plain fields to memory does not fail");
        bytes
    }

    /// Reads what [`to_bytes`](Self::to_bytes) wrote.
    ///
    /// # Errors
    ///
    /// Anything else.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, RingFormatError> {
        let stored: Stored =
            serde_json::from_slice(bytes).map_err(|error| RingFormatError(error.to_string()))?;
        if stored.format != FORMAT {
            return Err(RingFormatError(format!("format {} is not known", stored.format)));
        }
        for key in &stored.previous {
            key.key.parse::<PublicKey>().map_err(|error| RingFormatError(error.to_string()))?;
        }
        Ok(Self {
            version: stored.version,
            algorithm: stored.algorithm,
            next: stored.next.pair()?,
            current: stored.current.pair()?,
            previous: stored.previous,
            withdrawn: stored.withdrawn,
        })
    }
}

impl fmt::Debug for SigningRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SigningRing").field("version", &self.version).finish_non_exhaustive()
    }
}

const FORMAT: u32 = 1;

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    format: u32,
    version: u64,
    algorithm: Algorithm,
    next: StoredPair,
    current: StoredPair,
    previous: Vec<Retired>,
    withdrawn: Vec<String>,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct StoredPair {
    alg: Algorithm,
    since: Timestamp,
    seed: String,
}

impl From<&Pair> for StoredPair {
    fn from(pair: &Pair) -> Self {
        Self { alg: pair.algorithm, since: pair.since, seed: compact::encode(pair.secret.as_bytes()) }
    }
}

impl StoredPair {
    fn pair(&self) -> Result<Pair, RingFormatError> {
        let mut seed = Zeroizing::new([0; 32]);
        let read = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode_slice(&self.seed, &mut *seed);
        if read != Ok(32) {
            return Err(RingFormatError("a key is not 32 bytes".to_owned()));
        }
        Ok(Pair::from_seed(&seed, self.alg, self.since))
    }
}

impl Drop for StoredPair {
    fn drop(&mut self) {
        self.seed.zeroize();
    }
}

/// What is to be minted.
#[derive(Clone, Debug)]
pub struct NewToken {
    issuer: String,
    host: HostId,
    account: AccountId,
    project: ProjectId,
    epoch: Epoch,
    scopes: BTreeSet<Scope>,
    session_epoch: u64,
    login: Option<LoginTag>,
    acl: u64,
    usage: Usage,
    embed_origin: Option<String>,
    ttl: Duration,
}

impl NewToken {
    /// A token of `issuer` for `account` to `project`, which `host` owns in
    /// `epoch`.
    pub fn new(
        issuer: impl Into<String>,
        host: HostId,
        account: AccountId,
        project: ProjectId,
        epoch: Epoch,
    ) -> Self {
        Self {
            issuer: issuer.into(),
            host,
            account,
            project,
            epoch,
            scopes: BTreeSet::new(),
            session_epoch: 0,
            login: None,
            acl: 0,
            usage: Usage::Multi,
            embed_origin: None,
            ttl: Duration::from_secs(60),
        }
    }

    /// What it opens. There is no default: a token opens at least one thing.
    #[must_use]
    pub fn scopes(mut self, scopes: impl IntoIterator<Item = Scope>) -> Self {
        self.scopes = scopes.into_iter().collect();
        self
    }

    /// The account's session epoch. Default 0.
    #[must_use]
    pub fn session_epoch(mut self, epoch: u64) -> Self {
        self.session_epoch = epoch;
        self
    }

    /// The account's log-in that it is minted under: what it opens ends with that.
    /// Default: none.
    #[must_use]
    pub fn login(mut self, login: Option<LoginTag>) -> Self {
        self.login = login;
        self
    }

    /// The lowest version of the project's ACL that may decide. Default 0.
    #[must_use]
    pub fn acl(mut self, version: u64) -> Self {
        self.acl = version;
        self
    }

    /// How often it may be used. Default [`Usage::Multi`].
    #[must_use]
    pub fn usage(mut self, usage: Usage) -> Self {
        self.usage = usage;
        self
    }

    /// The origin that may embed the project. Default none.
    #[must_use]
    pub fn embed_origin(mut self, origin: Option<String>) -> Self {
        self.embed_origin = origin;
        self
    }

    /// How long it lives, in whole seconds. Default 60 s, at most 300 s.
    #[must_use]
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl = ttl;
        self
    }
}

/// A token, with what it says.
#[derive(Clone)]
pub struct Minted {
    /// The token. Not for logs.
    pub token: String,
    /// Its claims.
    pub claims: Claims,
}

impl fmt::Debug for Minted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Minted").field("claims", &self.claims).finish_non_exhaustive()
    }
}

/// Why no token was minted.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MintError {
    /// It would open nothing.
    #[error("a token needs at least one scope")]
    NoScope,
    /// Its life is zero or over the limit.
    #[error("a token lives from 1 to 300 seconds")]
    BadLife,
    /// It would be longer than verifiers accept.
    #[error("the token would be longer than {} bytes", token::BYTES_MAX)]
    TooLong,
    /// No randomness for its id.
    #[error(transparent)]
    Random(#[from] RandomError),
}

/// Why the ring was not rotated.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RotateError {
    /// Hosts may not know the next key yet.
    #[error("the next key is not published long enough, wait {wait:?}")]
    TooEarly {
        /// How much longer.
        wait: Duration,
    },
    /// Tokens of as many old keys as are kept may still be good.
    #[error("too many keys were rotated out in the last minutes, wait {wait:?}")]
    TooOften {
        /// How much longer.
        wait: Duration,
    },
    /// No randomness for the new next key.
    #[error(transparent)]
    Random(#[from] RandomError),
}

/// Bytes that are no stored ring. It never repeats what they were.
#[derive(Clone, Debug, thiserror::Error)]
#[error("not a stored key ring: {0}")]
pub struct RingFormatError(String);
