//! The compact form of JWS, of which exactly one spelling is accepted.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use ed25519_dalek::{Signer, SigningKey};

use crate::PublicKey;

/// No token of ours is longer; what is, is not looked at.
pub(crate) const TOKEN_BYTES_MAX: usize = 2048;

/// Base64url without padding.
pub(crate) fn encode(bytes: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

/// Decodes base64url without padding; other alphabets, padding, white space
/// and stray last bits are refused, so that a text has one spelling.
pub(crate) fn decode(text: &str) -> Option<Vec<u8>> {
    URL_SAFE_NO_PAD.decode(text).ok()
}

/// As [`decode`], for a known length.
pub(crate) fn decode_exact<const N: usize>(text: &str) -> Option<[u8; N]> {
    decode(text)?.try_into().ok()
}

/// The three parts of a token, still encoded.
#[derive(Clone, Copy)]
pub(crate) struct Parts<'a> {
    pub(crate) header: &'a str,
    pub(crate) payload: &'a str,
    signature: &'a str,
    signed: &'a str,
}

impl<'a> Parts<'a> {
    /// Splits a token of acceptable length into exactly three parts.
    pub(crate) fn split(token: &'a str) -> Option<Self> {
        if token.len() > TOKEN_BYTES_MAX {
            return None;
        }
        let (signed, signature) = token.rsplit_once('.')?;
        let (header, payload) = signed.split_once('.')?;
        let three = !payload.contains('.') && ![header, payload, signature].contains(&"");
        three.then_some(Self { header, payload, signature, signed })
    }

    /// Whether the signature is of `key`.
    pub(crate) fn signed_by(&self, key: &PublicKey) -> bool {
        match decode_exact(self.signature) {
            Some(signature) => key.verify(self.signed.as_bytes(), &signature),
            None => false,
        }
    }

    /// Reads the payload as a typed object. Arrays, which serde would take for
    /// a struct, are refused.
    pub(crate) fn payload<T: serde::de::DeserializeOwned>(&self) -> Option<T> {
        let bytes = decode(self.payload)?;
        if bytes.first() != Some(&b'{') {
            return None;
        }
        serde_json::from_slice(&bytes).ok()
    }
}

/// Signs `payload` under an encoded header.
pub(crate) fn sign(header: &str, payload: &[u8], key: &SigningKey) -> String {
    let mut token = format!("{header}.{}", encode(payload));
    let signature = key.sign(token.as_bytes()).to_bytes();
    token.push('.');
    token.push_str(&encode(&signature));
    token
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_three_parts_are_a_token() {
        assert!(Parts::split("a.b.c").is_some());
        for bad in ["", "a", "a.b", "a.b.c.d", ".b.c", "a..c", "a.b.", "..", "..."] {
            assert!(Parts::split(bad).is_none(), "{bad:?}");
        }
        assert!(Parts::split(&format!("a.b.{}", "c".repeat(TOKEN_BYTES_MAX - 4))).is_some());
        assert!(Parts::split(&format!("a.b.{}", "c".repeat(TOKEN_BYTES_MAX - 3))).is_none());
    }

    #[test]
    fn base64_has_one_spelling() {
        assert_eq!(decode("AQ"), Some(vec![1]));
        // Padding, stray bits, the other alphabet, white space.
        for bad in ["AQ==", "AR", "+/8", "AQ\n", " AQ", "A"] {
            assert_eq!(decode(bad), None, "{bad:?}");
        }
    }
}
