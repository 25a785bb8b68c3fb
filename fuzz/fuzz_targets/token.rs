//! Whatever comes as a token or assertion: no panic, and nothing is accepted
//! that the keys did not sign for exactly this place and time.
#![no_main]

use std::sync::LazyLock;

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use cocalc_auth::{
    identity::Identity,
    peer::{self, PeerId},
    stream::{PublicRing, RingKey},
    token::{Algorithm, Audience, Expect, Verifier, header_text},
};
use cocalc_ids::{HostId, ProjectId, Timestamp};
use libfuzzer_sys::fuzz_target;

const NOW: Timestamp = Timestamp::from_secs(1_800_000_000);
const ISSUER: &str = "https://master.example";

static KEY: LazyLock<Identity> = LazyLock::new(|| Identity::from_seed(&[42; 32]));
static VERIFIER: LazyLock<Verifier> = LazyLock::new(|| {
    let key = RingKey { kid: "k".to_owned(), key: KEY.public_key().to_string(), alg: "EdDSA".to_owned() };
    Verifier::new(&PublicRing { version: 1, keys: vec![key], withdrawn: vec![] })
});

fn sign(header: &str, payload: &[u8]) -> String {
    let signed = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(payload));
    format!("{signed}.{}", URL_SAFE_NO_PAD.encode(KEY.sign(signed.as_bytes())))
}

fuzz_target!(|data: &[u8]| {
    let (host, project) = (HostId::from_bytes([1; 16]), ProjectId::from_bytes([2; 16]));
    let expect = Expect { issuer: ISSUER, host: Some(host), project };
    let peer_id = PeerId::Host(host);
    let registered = |claimed| (claimed == peer_id).then(|| KEY.public_key());

    // As it comes: the fuzzer cannot sign.
    if let Ok(text) = std::str::from_utf8(data) {
        assert!(VERIFIER.verify(text, &expect, NOW).is_err());
        assert!(peer::verify(text, ISSUER, NOW, registered).is_err());
    }
    // As a payload that is really signed.
    let token = sign(&header_text(Algorithm::EdDsa, "k"), data);
    if let Ok(claims) = VERIFIER.verify(&token, &expect, NOW) {
        assert_eq!((claims.iss.as_str(), claims.aud, claims.prj), (ISSUER, Audience(host), project));
        assert!(claims.exp > claims.iat && claims.exp - claims.iat <= 300 && !claims.scp.is_empty());
        let now = NOW.secs() as u64;
        assert!(claims.iat <= now + 5 && claims.exp + 5 > now);
    }
    let assertion = sign(r#"{"alg":"EdDSA","typ":"cocalc-peer+jwt"}"#, data);
    if let Ok(claims) = peer::verify(&assertion, ISSUER, NOW, registered) {
        assert_eq!((claims.iss, claims.aud.as_str()), (peer_id, ISSUER));
        assert!(claims.exp > claims.iat && claims.exp - claims.iat <= 60);
    }
    // One kind never passes for the other.
    assert!(peer::verify(&token, ISSUER, NOW, registered).is_err());
    assert!(VERIFIER.verify(&assertion, &expect, NOW).is_err());
});
