//! The public keys as a JSON Web Key Set, for third parties.
//!
//! Hosts and proxies never read it: they get keys on their authenticated
//! stream only.

use serde_json::{Value, json};

use crate::stream::PublicRing;

/// The ring as a JWKS document (RFC 7517, RFC 8037).
pub fn document(ring: &PublicRing) -> Value {
    let keys: Vec<Value> = ring
        .keys
        .iter()
        .map(|key| {
            json!({
                "kty": "OKP",
                "crv": "Ed25519",
                "use": "sig",
                "alg": key.alg,
                "kid": key.kid,
                "x": key.key,
            })
        })
        .collect();
    json!({ "keys": keys })
}
