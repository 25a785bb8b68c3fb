//! Other people's JWT libraries: they verify our tokens against the JWKS, and
//! ours refuses theirs, signed with the same key, unless the header bytes match.
//!
//! Needs `python3-jwt` and `python3-cryptography`, and node with npm, which
//! installs `jose` once into the target folder.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking, in its helpers too")]

use std::{
    io::Write,
    path::Path,
    process::{Command, Stdio},
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use cocalc_auth::{
    identity::Identity,
    jwks,
    mint::{NewToken, SigningRing},
    stream::{PublicRing, RingKey},
    token::{Algorithm, Audience, Claims, Expect, TokenError, Verifier},
};
use cocalc_ids::{AccountId, Epoch, HostId, ProjectId, Scope, Timestamp};
use serde_json::{Value, json};

const ISSUER: &str = "https://master.example";
const SEED: [u8; 32] = [42; 32];
const KID: &str = "shared-key";

fn run(program: &str, arguments: &[&str], input: &Value) -> Value {
    // `timeout` bounds whatever the other side does.
    let mut child = Command::new("timeout")
        .args(["60", program])
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.to_string().as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?} failed: {errors}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// A token of ours, what the other library needs, and a verifier for what it
/// signs with a key that both have.
struct Exchange {
    claims: Claims,
    input: Value,
    verifier: Verifier,
}

fn exchange() -> Exchange {
    let now = Timestamp::now();
    let ring = SigningRing::generate(Algorithm::EdDsa, now).unwrap();
    let (host, project) = (HostId::from_bytes([1; 16]), ProjectId::from_bytes([2; 16]));
    let new = NewToken::new(ISSUER, host, AccountId::from_bytes([3; 16]), project, Epoch::FIRST)
        .scopes(Scope::ALL)
        .session_epoch(4);
    let minted = ring.mint(&new, now).unwrap();
    let mut tampered = minted.token.clone();
    let at = tampered.len() - 20;
    let other = if &tampered[at..=at] == "A" { "B" } else { "A" };
    tampered.replace_range(at..=at, other);
    let identity = Identity::from_seed(&SEED);
    let x = identity.public_key().to_string();
    let keys = vec![RingKey { kid: KID.to_owned(), key: x.clone(), alg: "EdDSA".to_owned() }];
    let input = json!({
        "token": minted.token,
        "tampered": tampered,
        "jwks": jwks::document(&ring.public()),
        "audience": Audience(host).to_string(),
        "issuer": ISSUER,
        "seed": URL_SAFE_NO_PAD.encode(SEED),
        "x": x,
        "kid": KID,
        "claims": minted.claims,
    });
    let verifier = Verifier::new(&PublicRing { version: 1, keys, withdrawn: vec![] });
    Exchange { claims: minted.claims, input, verifier }
}

impl Exchange {
    /// What ours says of each token of theirs.
    fn judge(&self, answer: &Value) -> Vec<Result<Claims, TokenError>> {
        assert_eq!(answer["claims"], json!(self.claims), "they read other claims than we wrote");
        let expect = Expect { issuer: ISSUER, host: Some(self.claims.aud.0), project: self.claims.prj };
        let tokens = answer["signed"].as_array().unwrap();
        tokens
            .iter()
            .map(|token| self.verifier.verify(token.as_str().unwrap(), &expect, Timestamp::now()))
            .collect()
    }
}

#[test]
fn pyjwt_verifies_ours_and_ours_refuses_its() {
    let python = ["/usr/bin/python3", "python3"].into_iter().find(|python| {
        let check = Command::new(python).args(["-c", "import jwt, cryptography"]).output();
        check.is_ok_and(|output| output.status.success())
    });
    let python = python.expect("python3-jwt and python3-cryptography are not installed");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/interop/pyjwt.py");
    let exchange = exchange();
    let judged = exchange.judge(&run(python, &[script], &exchange.input));
    assert_eq!(judged, [Err(TokenError::UnknownHeader)]);
}

#[test]
fn jose_verifies_ours_and_ours_accepts_only_our_header() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("jose");
    if !folder.join("node_modules/jose/package.json").exists() {
        std::fs::create_dir_all(&folder).unwrap();
        let installed = Command::new("timeout")
            .args(["300", "npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix"])
            .arg(&folder)
            .arg("jose@6")
            .output()
            .unwrap();
        let errors = String::from_utf8_lossy(&installed.stderr);
        assert!(installed.status.success(), "node's jose cannot be installed: {errors}");
    }
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/interop/jose.mjs");
    let exchange = exchange();
    let mut judged = exchange.judge(&run("node", &[script, folder.to_str().unwrap()], &exchange.input));
    assert_eq!(judged.remove(0), Ok(exchange.claims.clone()), "the same header bytes");
    assert_eq!(judged, vec![Err(TokenError::UnknownHeader); 4]);
}
