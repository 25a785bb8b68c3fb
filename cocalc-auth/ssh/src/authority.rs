//! The secret keys that sign SSH certificates.

use std::{fmt, time::Duration};

use base64::{Engine, engine::general_purpose::STANDARD};
use cocalc_auth::stream::SshAuthorities;
use cocalc_ids::{AccountId, Ports, ProjectId, Restrictions, Timestamp};
use serde::{Deserialize, Serialize};
use ssh_key::{
    Certificate, PrivateKey, PublicKey,
    certificate::{Builder, CertType},
    private::Ed25519Keypair,
};
use zeroize::Zeroizing;

use crate::certificate::{BACKDATED, GRANT, USER_LIFE_MAX, account_principal, user_key_id};

/// How long a host's certificate lives. The master renews it long before.
const HOST_LIFE: Duration = Duration::from_secs(7 * 24 * 3600);
/// How long a key signs.
const SIGNS_FOR: Duration = Duration::from_secs(30 * 24 * 3600);
/// How long a key is published before it may sign.
const PUBLISHED_FOR: Duration = Duration::from_secs(24 * 3600);
/// How many keys of a ring are trusted at the same time beside those that sign,
/// or will: every host keeps and compares them.
const FORMER_MAX: usize = 16;
/// The most names of a host's certificate.
const NAMES_MAX: usize = 32;
/// The most keys whose withdrawal is remembered.
const WITHDRAWN_MAX: usize = 64;

/// The master's certificate authority: a ring of Ed25519 keys for users'
/// certificates and another for hosts'. In each the next key is published a day
/// before it signs, and the former one is trusted until what it signed has
/// ended. It has no `Debug` output of secrets, and wipes them when dropped.
pub struct Authority {
    version: u64,
    user: Ring,
    host: Ring,
    withdrawn: Vec<String>,
}

/// Which ring.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Signs users' certificates.
    User,
    /// Signs hosts' certificates.
    Host,
}

/// What is known of a key.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct KeyInfo {
    /// What it signs.
    pub kind: Kind,
    /// `SHA256:…`
    pub fingerprint: String,
    /// `algorithm base64`
    pub key: String,
    /// `current`: signs; `next`: published, and does not sign yet; `former`:
    /// trusted until what it signed has ended.
    pub state: &'static str,
    /// When it began to sign, was published, or ceased to sign.
    pub since: Option<Timestamp>,
}

struct Ring {
    next: Key,
    current: Key,
    former: Vec<Key>,
}

struct Key {
    seed: Zeroizing<[u8; 32]>,
    /// When it was made; from then on it is published.
    made: Timestamp,
    /// When it began to sign.
    signing: Option<Timestamp>,
    /// When it ceased to sign.
    retired: Option<Timestamp>,
}

/// What a user's certificate shall say.
#[derive(Clone, Debug)]
pub struct UserRequest {
    /// The user's public key, `algorithm base64`.
    pub key: String,
    /// Whose it is.
    pub account: AccountId,
    /// The only project it opens; `None` for all of the account's.
    pub project: Option<ProjectId>,
    /// The account's session epoch.
    pub session_epoch: u64,
    /// The lowest ACL version that may decide.
    pub acl: u64,
    /// The networks from which it is good, as `source-address`; `None` for all.
    pub sources: Option<String>,
    /// What its sessions may do. A certificate can force a command, and refuse
    /// terminals and all ports; nothing else of them can be said in one.
    pub restrictions: Restrictions,
    /// How long it lives; at most [`USER_LIFE_MAX`].
    pub life: Duration,
}

/// What a host's certificate shall say.
#[derive(Clone, Debug)]
pub struct HostRequest {
    /// The host's public key, `algorithm base64`.
    pub key: String,
    /// Who it is, for logs.
    pub id: String,
    /// The names by which it is reached.
    pub names: Vec<String>,
}

/// A certificate, as OpenSSH text.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct SignedCertificate {
    /// `algorithm base64`.
    pub text: String,
    /// Its number.
    pub serial: u64,
    /// Its name in logs.
    pub key_id: String,
    /// When it ends.
    pub expires: Timestamp,
}

/// As on disk.
#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    version: u64,
    user: StoredRing,
    host: StoredRing,
    withdrawn: Vec<String>,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct StoredRing {
    next: StoredKey,
    current: StoredKey,
    former: Vec<StoredKey>,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct StoredKey {
    seed: Zeroizing<String>,
    made: Timestamp,
    signing: Option<Timestamp>,
    retired: Option<Timestamp>,
}

impl Authority {
    /// Makes new keys.
    ///
    /// # Errors
    ///
    /// The system gives no randomness.
    pub fn generate(now: Timestamp) -> Result<Self, AuthorityError> {
        Ok(Self { version: 1, user: Ring::generate(now)?, host: Ring::generate(now)?, withdrawn: Vec::new() })
    }

    /// Reads what [`to_bytes`](Self::to_bytes) wrote.
    ///
    /// # Errors
    ///
    /// It is something else.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, AuthorityError> {
        let stored: Stored = serde_json::from_slice(bytes).map_err(|_| AuthorityError::Unreadable)?;
        Ok(Self {
            version: stored.version,
            user: stored.user.read()?,
            host: stored.host.read()?,
            withdrawn: stored.withdrawn,
        })
    }

    /// The secret keys, for a file that only its owner can read.
    pub fn to_bytes(&self) -> Zeroizing<Vec<u8>> {
        let stored = Stored {
            version: self.version,
            user: StoredRing::of(&self.user),
            host: StoredRing::of(&self.host),
            withdrawn: self.withdrawn.clone(),
        };
        // Structs of texts and numbers always serialize.
        Zeroizing::new(serde_json::to_vec(&stored).unwrap_or_default())
    }

    /// Grows with each change.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The public keys, for hosts, proxies and users.
    pub fn public(&self) -> SshAuthorities {
        SshAuthorities {
            version: self.version,
            user: self.user.public(),
            host: self.host.public(),
            withdrawn: self.withdrawn.clone(),
        }
    }

    /// What is known of each key, without its secret: users' first, and in each
    /// ring the current one, the next and the former ones.
    pub fn list(&self) -> Vec<KeyInfo> {
        let of = |kind, ring: &Ring| {
            let info = |key: &Key, state, since| KeyInfo {
                kind,
                fingerprint: crate::fingerprint(&key.public()).unwrap_or_default(),
                key: key.public(),
                state,
                since,
            };
            let mut keys = vec![
                info(&ring.current, "current", ring.current.signing),
                info(&ring.next, "next", Some(ring.next.made)),
            ];
            keys.extend(ring.former.iter().map(|key| info(key, "former", key.retired)));
            keys
        };
        let mut keys = of(Kind::User, &self.user);
        keys.extend(of(Kind::Host, &self.host));
        keys
    }

    /// Signs a user's certificate.
    ///
    /// # Errors
    ///
    /// The request makes no sense, or the system gives no randomness.
    pub fn sign_user(
        &self,
        request: &UserRequest,
        now: Timestamp,
    ) -> Result<SignedCertificate, AuthorityError> {
        if request.life < Duration::from_secs(1) || request.life > USER_LIFE_MAX {
            return Err(AuthorityError::Life);
        }
        let Restrictions { command, pty, ports, listen, agent, x11, environment } = &request.restrictions;
        let forwards = match ports {
            Ports::All => true,
            Ports::Only(none) if none.is_empty() => false,
            Ports::Only(_) => return Err(AuthorityError::Restrictions),
        };
        // One extension permits both directions.
        if !environment.is_empty() || listen != ports {
            return Err(AuthorityError::Restrictions);
        }
        let serial = random_serial()?;
        let key_id = user_key_id(request.account, request.project, serial);
        let principal =
            request.project.map_or_else(|| account_principal(request.account), |project| project.to_string());
        let mut builder = begin(&request.key, now, request.life)?;
        let built = (|| {
            builder
                .serial(serial)?
                .cert_type(CertType::User)?
                .key_id(&*key_id)?
                .valid_principal(principal)?;
            if let Some(command) = command {
                builder.critical_option("force-command", command.as_str())?;
            }
            if let Some(sources) = &request.sources {
                builder.critical_option("source-address", sources.as_str())?;
            }
            let grant = format!("{} {}", request.session_epoch, request.acl);
            builder.extension(GRANT, grant)?;
            if *x11 {
                builder.extension("permit-X11-forwarding", "")?;
            }
            if *agent {
                builder.extension("permit-agent-forwarding", "")?;
            }
            if forwards {
                builder.extension("permit-port-forwarding", "")?;
            }
            if *pty {
                builder.extension("permit-pty", "")?;
            }
            Ok::<_, ssh_key::Error>(())
        })();
        built.map_err(|_| AuthorityError::NotSigned)?;
        finish(builder, &self.user.current, serial, key_id)
    }

    /// Signs a host's certificate.
    ///
    /// # Errors
    ///
    /// As [`sign_user`](Self::sign_user).
    pub fn sign_host(
        &self,
        request: &HostRequest,
        now: Timestamp,
    ) -> Result<SignedCertificate, AuthorityError> {
        if request.names.is_empty() || request.names.len() > NAMES_MAX {
            return Err(AuthorityError::Names);
        }
        let serial = random_serial()?;
        let key_id = format!("{}/{serial}", request.id);
        let mut builder = begin(&request.key, now, HOST_LIFE)?;
        let built = (|| {
            builder.serial(serial)?.cert_type(CertType::Host)?.key_id(&*key_id)?;
            for name in &request.names {
                builder.valid_principal(name.as_str())?;
            }
            Ok::<_, ssh_key::Error>(())
        })();
        built.map_err(|_| AuthorityError::NotSigned)?;
        finish(builder, &self.host.current, serial, key_id)
    }

    /// Lets the next key of a ring sign. With `force`, even if it has not been
    /// published for long; but never while sixteen former keys are trusted.
    ///
    /// # Errors
    ///
    /// [`AuthorityError::TooEarly`], or the system gives no randomness.
    pub fn rotate(&mut self, kind: Kind, force: bool, now: Timestamp) -> Result<(), AuthorityError> {
        let ring = self.ring(kind);
        if (!force && now.since(ring.next.made) < PUBLISHED_FOR) || ring.former.len() >= FORMER_MAX {
            return Err(AuthorityError::TooEarly);
        }
        ring.advance(now)?;
        self.version += 1;
        Ok(())
    }

    /// Withdraws the key of this fingerprint at once: nothing it signed is
    /// trusted any more. `false` if there is none.
    ///
    /// # Errors
    ///
    /// The system gives no randomness. Nothing is changed then.
    pub fn withdraw(&mut self, fingerprint: &str, now: Timestamp) -> Result<bool, AuthorityError> {
        for kind in [Kind::User, Kind::Host] {
            let ring = self.ring(kind);
            let is = |key: &Key| crate::fingerprint(&key.public()).as_deref() == Some(fingerprint);
            let found = if is(&ring.current) {
                let text = ring.current.public();
                ring.advance(now)?;
                ring.former.retain(|key| !is(key));
                Some(text)
            } else if is(&ring.next) {
                let text = ring.next.public();
                ring.next = Key::generate(now)?;
                Some(text)
            } else {
                let former = ring.former.iter().find(|key| is(key)).map(Key::public);
                ring.former.retain(|key| !is(key));
                former
            };
            if let Some(text) = found {
                self.withdrawn.push(text);
                let surplus = self.withdrawn.len().saturating_sub(WITHDRAWN_MAX);
                self.withdrawn.drain(..surplus);
                self.version += 1;
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Rotates what is due, and drops keys of which every certificate has
    /// ended. `true` if something changed.
    ///
    /// # Errors
    ///
    /// The system gives no randomness.
    pub fn tend(&mut self, now: Timestamp) -> Result<bool, AuthorityError> {
        let mut changed = false;
        for (kind, life) in [(Kind::User, USER_LIFE_MAX), (Kind::Host, HOST_LIFE)] {
            let ring = self.ring(kind);
            let before = ring.former.len();
            // A day more: clocks differ, and a host may not have renewed yet.
            let kept = life + PUBLISHED_FOR;
            ring.former.retain(|key| key.retired.is_some_and(|retired| now.since(retired) < kept));
            changed |= ring.former.len() != before;
            let signed_for = ring.current.signing.map_or(Duration::MAX, |began| now.since(began));
            let due = signed_for >= SIGNS_FOR && now.since(ring.next.made) >= PUBLISHED_FOR;
            if due {
                ring.advance(now)?;
                changed = true;
            }
        }
        if changed {
            self.version += 1;
        }
        Ok(changed)
    }

    fn ring(&mut self, kind: Kind) -> &mut Ring {
        match kind {
            Kind::User => &mut self.user,
            Kind::Host => &mut self.host,
        }
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").field("public", &self.public()).finish_non_exhaustive()
    }
}

impl Ring {
    fn generate(now: Timestamp) -> Result<Self, AuthorityError> {
        let current = Key { signing: Some(now), ..Key::generate(now)? };
        Ok(Self { next: Key::generate(now)?, current, former: Vec::new() })
    }

    fn advance(&mut self, now: Timestamp) -> Result<(), AuthorityError> {
        let next = Key::generate(now)?;
        let mut former = std::mem::replace(&mut self.current, std::mem::replace(&mut self.next, next));
        former.retired = Some(now);
        // Its time begins now, however long it has been published.
        self.current.signing = Some(now);
        self.former.push(former);
        Ok(())
    }

    fn public(&self) -> Vec<String> {
        [&self.current, &self.next].into_iter().chain(&self.former).map(Key::public).collect()
    }
}

impl Key {
    fn generate(now: Timestamp) -> Result<Self, AuthorityError> {
        let mut seed = Zeroizing::new([0; 32]);
        getrandom::fill(seed.as_mut_slice()).map_err(|_| AuthorityError::NoRandomness)?;
        Ok(Self { seed, made: now, signing: None, retired: None })
    }

    fn pair(&self) -> PrivateKey {
        PrivateKey::from(Ed25519Keypair::from_seed(&self.seed))
    }

    /// `algorithm base64`
    fn public(&self) -> String {
        let text = PublicKey::from(self.pair().public_key().key_data().clone()).to_openssh();
        text.map(|text| text.trim_end().to_owned()).unwrap_or_default()
    }
}

impl StoredRing {
    fn of(ring: &Ring) -> Self {
        Self {
            next: StoredKey::of(&ring.next),
            current: StoredKey::of(&ring.current),
            former: ring.former.iter().map(StoredKey::of).collect(),
        }
    }

    fn read(self) -> Result<Ring, AuthorityError> {
        let former = self.former.into_iter().map(StoredKey::read).collect::<Result<_, _>>()?;
        Ok(Ring { next: self.next.read()?, current: self.current.read()?, former })
    }
}

impl StoredKey {
    fn of(key: &Key) -> Self {
        let seed = Zeroizing::new(STANDARD.encode(key.seed.as_slice()));
        Self { seed, made: key.made, signing: key.signing, retired: key.retired }
    }

    fn read(self) -> Result<Key, AuthorityError> {
        let bytes =
            Zeroizing::new(STANDARD.decode(self.seed.as_str()).map_err(|_| AuthorityError::Unreadable)?);
        let seed = <[u8; 32]>::try_from(bytes.as_slice()).map_err(|_| AuthorityError::Unreadable)?;
        Ok(Key { seed: Zeroizing::new(seed), made: self.made, signing: self.signing, retired: self.retired })
    }
}

fn begin(key: &str, now: Timestamp, life: Duration) -> Result<Builder, AuthorityError> {
    let key = PublicKey::from_openssh(key).map_err(|_| AuthorityError::Key)?;
    let mut nonce = vec![0; 32];
    getrandom::fill(&mut nonce).map_err(|_| AuthorityError::NoRandomness)?;
    let now = u64::try_from(now.secs()).map_err(|_| AuthorityError::Life)?;
    let (from, until) = (now.saturating_sub(BACKDATED.as_secs()), now.saturating_add(life.as_secs()));
    Builder::new(nonce, key.key_data().clone(), from, until).map_err(|_| AuthorityError::NotSigned)
}

fn finish(
    builder: Builder,
    key: &Key,
    serial: u64,
    key_id: String,
) -> Result<SignedCertificate, AuthorityError> {
    let certificate: Certificate = builder.sign(&key.pair()).map_err(|_| AuthorityError::NotSigned)?;
    let text = certificate.to_openssh().map_err(|_| AuthorityError::NotSigned)?.trim_end().to_owned();
    let expires = Timestamp::from_secs(i64::try_from(certificate.valid_before()).unwrap_or(i64::MAX));
    Ok(SignedCertificate { text, serial, key_id, expires })
}

/// 63 bits: some tools read serials as signed.
fn random_serial() -> Result<u64, AuthorityError> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(|_| AuthorityError::NoRandomness)?;
    Ok((u64::from_le_bytes(bytes) >> 1).max(1))
}

/// Why nothing was signed, or no key changed.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum AuthorityError {
    /// The stored keys cannot be read.
    #[error("the SSH authority's keys cannot be read")]
    Unreadable,
    /// The key to be certified is none.
    #[error("not a public key of OpenSSH")]
    Key,
    /// The life is out of bounds.
    #[error("a certificate lives for 1 to {} seconds", USER_LIFE_MAX.as_secs())]
    Life,
    /// The restrictions cannot be said in a certificate.
    #[error("a certificate cannot say which ports are open or what the environment is")]
    Restrictions,
    /// No names, or too many.
    #[error("a host's certificate needs 1 to {NAMES_MAX} names")]
    Names,
    /// The next key was published only now.
    #[error("the next key was published less than a day ago")]
    TooEarly,
    /// The certificate could not be made.
    #[error("the certificate could not be made")]
    NotSigned,
    /// The system gives no randomness.
    #[error("the system gives no randomness")]
    NoRandomness,
}
