//! Secrets on their way from the master to one host: credentials of a backup
//! repository, the secrets of a project.
//!
//! They pass a bus whose broker, log and transport need not be trusted with
//! them: HPKE (RFC 9180, base mode, X25519, HKDF-SHA256, AES-256-GCM) seals
//! each to the key of the host, for one [`Purpose`]. The host's sealing key
//! follows from its identity key and is announced with a signature of that, so
//! nobody between can put in a key of theirs.
//!
//! It is not a channel: who seals is not authenticated by it (the bus does
//! that), and whoever gets hold of a host's identity key later can open what
//! was recorded before. Send nothing through it that outlives its use.
//!
//! ```
//! use cocalc_auth::identity::Identity;
//! use cocalc_auth_sealed::{Announced, Opener, Purpose};
//! use cocalc_ids::{Epoch, HostId, ProjectId};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let purpose =
//!     Purpose { what: "backup", host: HostId::random(), project: ProjectId::random(), epoch: Epoch::FIRST };
//! // At the host; what it announces goes to the master when it registers.
//! let identity = Identity::generate()?;
//! let opener = Opener::of(&identity);
//! let announced: Announced = opener.announce(&identity);
//!
//! // At the master, which knows the public identity key of each host.
//! let key = announced.verify(&identity.public_key())?;
//! let sealed = key.seal(&purpose, b"hunter2")?;
//!
//! // At the host again.
//! assert_eq!(&**opener.open(&purpose, &sealed)?, b"hunter2");
//! # Ok(())
//! # }
//! ```

use std::fmt;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use cocalc_auth::{PublicKey, RandomError, identity::Identity};
use cocalc_ids::{Epoch, HostId, ProjectId};
use hpke::{
    Deserializable as _, Kem as _, OpModeR, OpModeS, Serializable as _, aead::AesGcm256, kdf::HkdfSha256,
    kem::X25519HkdfSha256,
};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

type Kem = X25519HkdfSha256;

/// The longest secret that is sealed, in bytes: it has to fit in a control
/// frame, with what else is in it.
pub const SECRET_BYTES_MAX: usize = 128 * 1024;

/// What both sides name as the protocol. Another suite is another name.
const PROTOCOL: &[u8] = b"cocalc-sealed-1";
/// What the signature of an announcement begins with, so that it is none of
/// anything else.
const ANNOUNCEMENT: &[u8] = b"cocalc-sealing-key-1\0";
/// From the identity's seed to the seed of this key.
const DERIVATION: &str = "cocalc-sealing-key-1";
/// The encapsulated key (RFC 9180, section 7.1) and the tag of AES-GCM.
const OVERHEAD_BYTES: usize = 32 + 16;

/// What a secret is for. It opens for exactly that, so that a message that is
/// kept and shown again elsewhere, or for another project, opens nothing.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Purpose<'a> {
    /// What kind of secret, by a name of ours; no NUL.
    pub what: &'a str,
    /// Who may open it.
    pub host: HostId,
    /// Whose secret it is.
    pub project: ProjectId,
    /// Under which grant.
    pub epoch: Epoch,
}

impl Purpose<'_> {
    /// The ids have one spelling, so no two purposes have the same bytes.
    fn bytes(&self) -> Vec<u8> {
        format!("{}\0{}\0{}\0{}", self.what, self.host, self.project, self.epoch.number()).into_bytes()
    }
}

/// A secret that one host can open.
#[derive(Clone, Deserialize, Eq, PartialEq, Serialize)]
#[serde(transparent)]
pub struct Sealed(String);

impl fmt::Debug for Sealed {
    // Of no use to who reads a log, and long.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sealed({} bytes)", self.0.len())
    }
}

/// The public sealing key of a host.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct SealingKey([u8; 32]);

impl SealingKey {
    /// Seals `secret` for `purpose`.
    ///
    /// # Errors
    ///
    /// It is longer than [`SECRET_BYTES_MAX`], the purpose has a NUL in it, the
    /// key is a point that shares nothing, or the system has no randomness.
    pub fn seal(&self, purpose: &Purpose<'_>, secret: &[u8]) -> Result<Sealed, SealError> {
        if secret.len() > SECRET_BYTES_MAX {
            return Err(SealError::TooLong(secret.len()));
        }
        if purpose.what.contains('\0') {
            return Err(SealError::Purpose);
        }
        // The library panics where there is no randomness, so ask before.
        Identity::generate()?;
        let key = <Kem as hpke::Kem>::PublicKey::from_bytes(&self.0).map_err(|_| SealError::Key)?;
        let (shared, text) = hpke::single_shot_seal::<AesGcm256, HkdfSha256, Kem>(
            &OpModeS::Base,
            &key,
            PROTOCOL,
            secret,
            &purpose.bytes(),
        )
        .map_err(|_| SealError::Key)?;
        let mut bytes = shared.to_bytes().to_vec();
        bytes.extend_from_slice(&text);
        Ok(Sealed(URL_SAFE_NO_PAD.encode(bytes)))
    }
}

/// A sealing key as a host announces it: its text is the key and the signature
/// of the host's identity key over it, both in base64url, with a dot between.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(transparent)]
pub struct Announced(String);

impl fmt::Display for Announced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<String> for Announced {
    /// Any text; whether it is one, [`verify`](Self::verify) tells.
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl Announced {
    /// The key, if the host with this identity key has announced it.
    ///
    /// # Errors
    ///
    /// It is of somebody else, or no key.
    pub fn verify(&self, identity: &PublicKey) -> Result<SealingKey, OpenError> {
        let (key, signature) = self.0.split_once('.').ok_or(OpenError)?;
        let decode = |text: &str| URL_SAFE_NO_PAD.decode(text).ok();
        let key = decode(key).and_then(|key| <[u8; 32]>::try_from(key).ok());
        let signature = decode(signature).and_then(|bytes| <[u8; 64]>::try_from(bytes).ok());
        match (key, signature) {
            (Some(key), Some(signature)) if identity.verify(&announcement(&key), &signature) => {
                Ok(SealingKey(key))
            }
            _ => Err(OpenError),
        }
    }
}

fn announcement(key: &[u8; 32]) -> Vec<u8> {
    [ANNOUNCEMENT, key].concat()
}

/// The host's side: opens what was sealed to it.
pub struct Opener {
    secret: <Kem as hpke::Kem>::PrivateKey,
    public: [u8; 32],
}

impl fmt::Debug for Opener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Opener").finish_non_exhaustive()
    }
}

impl Opener {
    /// The sealing key that follows from `identity`: the same at each start.
    pub fn of(identity: &Identity) -> Self {
        let seed = identity.derive(DERIVATION);
        let (secret, public) = Kem::derive_keypair(&*seed);
        let mut bytes = [0; 32];
        bytes.copy_from_slice(&public.to_bytes());
        Self { secret, public: bytes }
    }

    /// What the host shows to the master.
    pub fn announce(&self, identity: &Identity) -> Announced {
        let signature = identity.sign(&announcement(&self.public));
        Announced(format!("{}.{}", URL_SAFE_NO_PAD.encode(self.public), URL_SAFE_NO_PAD.encode(signature)))
    }

    /// Opens what was sealed to this host for `purpose`.
    ///
    /// # Errors
    ///
    /// It was sealed to another host or for another purpose, or has changed.
    /// Which of these is not told.
    pub fn open(&self, purpose: &Purpose<'_>, sealed: &Sealed) -> Result<Zeroizing<Vec<u8>>, OpenError> {
        if sealed.0.len() > (SECRET_BYTES_MAX + OVERHEAD_BYTES).div_ceil(3) * 4 {
            return Err(OpenError);
        }
        let bytes = URL_SAFE_NO_PAD.decode(&sealed.0).map_err(|_| OpenError)?;
        let (shared, text) = bytes.split_at_checked(32).ok_or(OpenError)?;
        let shared = <Kem as hpke::Kem>::EncappedKey::from_bytes(shared).map_err(|_| OpenError)?;
        hpke::single_shot_open::<AesGcm256, HkdfSha256, Kem>(
            &OpModeR::Base,
            &self.secret,
            &shared,
            PROTOCOL,
            text,
            &purpose.bytes(),
        )
        .map(Zeroizing::new)
        .map_err(|_| OpenError)
    }
}

/// Why a secret was not sealed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SealError {
    /// It is too long.
    #[error("the secret has {0} bytes; at most {SECRET_BYTES_MAX} are sealed")]
    TooLong(usize),
    /// The purpose is not a name.
    #[error("the purpose of a secret has a NUL in it")]
    Purpose,
    /// Nothing can be sealed to that key.
    #[error("nothing can be sealed to that key")]
    Key,
    /// The system has no randomness.
    #[error("nothing can be sealed")]
    Random(#[from] RandomError),
}

/// It does not open, or was not announced by that host.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("not sealed to this host for this purpose")]
pub struct OpenError;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn purpose() -> Purpose<'static> {
        Purpose {
            what: "backup",
            host: "11111111-1111-4111-8111-111111111111".parse().unwrap(),
            project: "22222222-2222-4222-8222-222222222222".parse().unwrap(),
            epoch: Epoch::FIRST,
        }
    }

    fn parties() -> (Opener, SealingKey) {
        let identity = Identity::from_seed(&[7; 32]);
        let opener = Opener::of(&identity);
        let key = opener.announce(&identity).verify(&identity.public_key()).unwrap();
        (opener, key)
    }

    #[test]
    fn it_opens_at_that_host_for_that_purpose_only() {
        let (opener, key) = parties();
        let sealed = key.seal(&purpose(), b"secret").unwrap();
        assert_eq!(&**opener.open(&purpose(), &sealed).unwrap(), b"secret");
        // The same key after a restart.
        let again = Opener::of(&Identity::from_seed(&[7; 32]));
        assert_eq!(&**again.open(&purpose(), &sealed).unwrap(), b"secret");
        let other = Opener::of(&Identity::from_seed(&[8; 32]));
        assert_eq!(other.open(&purpose(), &sealed).unwrap_err(), OpenError);
        for wrong in [
            Purpose { what: "secrets", ..purpose() },
            Purpose { host: HostId::random(), ..purpose() },
            Purpose { project: ProjectId::random(), ..purpose() },
            Purpose { epoch: Epoch::FIRST.next(), ..purpose() },
        ] {
            assert_eq!(opener.open(&wrong, &sealed).unwrap_err(), OpenError, "{wrong:?}");
        }
        assert_ne!(key.seal(&purpose(), b"secret").unwrap(), sealed, "sealed anew each time");
        assert!(!format!("{sealed:?}{opener:?}").contains(&sealed.0[..8]));
    }

    #[test]
    fn only_the_host_announces_its_key() {
        let (host, other) = (Identity::from_seed(&[7; 32]), Identity::from_seed(&[8; 32]));
        let announced = Opener::of(&host).announce(&host);
        assert!(announced.verify(&host.public_key()).is_ok());
        assert_eq!(announced.verify(&other.public_key()), Err(OpenError));
        // A key of somebody between, with the host's signature of its own.
        let (theirs, ours) = (Opener::of(&other).announce(&other).to_string(), announced.to_string());
        let swapped =
            Announced(format!("{}.{}", theirs.split_once('.').unwrap().0, ours.split_once('.').unwrap().1));
        assert_eq!(swapped.verify(&host.public_key()), Err(OpenError));
        let text = serde_json::to_string(&announced).unwrap();
        assert_eq!(serde_json::from_str::<Announced>(&text).unwrap(), announced);
    }

    #[test]
    fn limits_are_told() {
        let (opener, key) = parties();
        let longest = vec![7; SECRET_BYTES_MAX];
        let sealed = key.seal(&purpose(), &longest).unwrap();
        assert_eq!(*opener.open(&purpose(), &sealed).unwrap(), longest);
        assert!(matches!(key.seal(&purpose(), &vec![7; SECRET_BYTES_MAX + 1]), Err(SealError::TooLong(_))));
        assert!(matches!(key.seal(&Purpose { what: "a\0b", ..purpose() }, b""), Err(SealError::Purpose)));
        // A point of small order shares nothing with anybody.
        assert!(matches!(SealingKey([0; 32]).seal(&purpose(), b""), Err(SealError::Key)));
    }

    proptest! {
        #[test]
        fn what_was_changed_does_not_open(at in 0_usize..200, bit in 0_u8..8, cut in 0_usize..200) {
            let (opener, key) = parties();
            let sealed = key.seal(&purpose(), b"a secret of some length").unwrap();
            let bytes = URL_SAFE_NO_PAD.decode(&sealed.0).unwrap();
            let mut changed = bytes.clone();
            // The top bit of an X25519 point is ignored (RFC 7748, section 5).
            let at = at % bytes.len();
            prop_assume!(!(at == 31 && bit == 7));
            changed[at] ^= 1 << bit;
            prop_assert!(opener.open(&purpose(), &Sealed(URL_SAFE_NO_PAD.encode(changed))).is_err());
            let short = &bytes[..cut % bytes.len()];
            prop_assert!(opener.open(&purpose(), &Sealed(URL_SAFE_NO_PAD.encode(short))).is_err());
        }

        #[test]
        fn garbage_is_refused(text in "\\PC{0,200}") {
            let (opener, _) = parties();
            prop_assert!(opener.open(&purpose(), &Sealed(text)).is_err());
        }
    }
}
