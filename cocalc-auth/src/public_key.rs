//! Ed25519 public keys that may be trusted to verify.

use std::{fmt, str::FromStr};

use ed25519_dalek::{Signature, VerifyingKey};

use crate::compact;

/// An Ed25519 public key that is not weak, written as base64url without
/// padding.
///
/// A key of small order would make the identity-point forgery possible: one
/// signature that is good for every message. It cannot become a `PublicKey`.
#[derive(Clone, Copy, Eq, PartialEq)]
pub struct PublicKey(VerifyingKey);

impl PublicKey {
    /// A key from its 32 bytes.
    ///
    /// # Errors
    ///
    /// What is no point of the curve, or a point of small order.
    pub fn from_bytes(bytes: &[u8; 32]) -> Result<Self, KeyError> {
        let key = VerifyingKey::from_bytes(bytes).map_err(|_| KeyError::NotAPoint)?;
        if key.is_weak() {
            return Err(KeyError::Weak);
        }
        Ok(Self(key))
    }

    /// The 32 bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        self.0.as_bytes()
    }

    /// Whether `signature` is of this key over `message`, by the strict rules
    /// (RFC 8032, canonical, no small-order points), which is what everything
    /// here uses.
    pub fn verify(&self, message: &[u8], signature: &[u8; 64]) -> bool {
        self.0.verify_strict(message, &Signature::from_bytes(signature)).is_ok()
    }
}

impl From<VerifyingKey> for PublicKey {
    // Only for keys derived from a secret key of ours, which are never weak.
    fn from(key: VerifyingKey) -> Self {
        Self(key)
    }
}

impl FromStr for PublicKey {
    type Err = KeyError;

    fn from_str(s: &str) -> Result<Self, KeyError> {
        Self::from_bytes(&compact::decode_exact(s).ok_or(KeyError::NotBase64)?)
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&compact::encode(self.as_bytes()))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Why a text or bytes are no usable public key.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// Not 32 bytes in base64url without padding.
    #[error("an Ed25519 public key is 43 characters of base64url")]
    NotBase64,
    /// Not a point of the curve.
    #[error("the public key is no point of the curve")]
    NotAPoint,
    /// A point of small order.
    #[error("the public key is weak: anybody can sign for it")]
    Weak,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The eight points of small order that have a canonical encoding accepted
    /// by decompression, as published with RFC 8032's discussions.
    const SMALL_ORDER: [&str; 5] = [
        "0100000000000000000000000000000000000000000000000000000000000000",
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "0000000000000000000000000000000000000000000000000000000000000000",
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    ];

    fn bytes(hex: &str) -> [u8; 32] {
        std::array::from_fn(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap())
    }

    #[test]
    fn weak_keys_are_refused() {
        for hex in SMALL_ORDER {
            assert_eq!(PublicKey::from_bytes(&bytes(hex)), Err(KeyError::Weak), "{hex}");
            let text = compact::encode(&bytes(hex));
            assert_eq!(text.parse::<PublicKey>(), Err(KeyError::Weak), "{hex}");
        }
    }

    #[test]
    fn text_has_one_spelling() {
        let key = crate::identity::Identity::generate().unwrap().public_key();
        let text = key.to_string();
        assert_eq!(text.len(), 43);
        assert_eq!(text.parse(), Ok(key));
        for bad in [format!("{text}="), format!(" {text}"), text[1..].to_owned(), String::new()] {
            assert_eq!(bad.parse::<PublicKey>(), Err(KeyError::NotBase64), "{bad}");
        }
    }
}
