//! Other people's JWT libraries: they verify our tokens against the JWKS, and
//! ours refuses theirs, signed with the same key, unless the header bytes match.
//!
//! Needs `python3-jwt`, `python3-cryptography` and `python3-venv`, which
//! installs `joserfc` once into the target folder, and node with npm, which
//! does the same with `jose` and `jsonwebtoken`.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking, in its helpers too")]

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
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

/// Makes a folder of other people's packages once, by `steps`.
fn installed(name: &str, steps: &dyn Fn(&Path) -> Vec<Command>) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let done = folder.join("installed");
    if !done.exists() {
        // What an earlier run left half made is of no use.
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).unwrap();
        for step in steps(&folder) {
            let mut bounded = Command::new("timeout");
            let output = bounded.arg("300").arg(step.get_program()).args(step.get_args()).output().unwrap();
            let errors = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{step:?} failed: {errors}");
        }
        fs::write(done, "").unwrap();
    }
    folder
}

fn command(program: impl AsRef<std::ffi::OsStr>, arguments: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(arguments);
    command
}

/// A package of the npm registry.
fn npm(name: &str, package: &str) -> PathBuf {
    installed(name, &|folder| {
        let flags = ["install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix"];
        let mut install = command("npm", &flags);
        install.arg(folder).arg(package);
        vec![install]
    })
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
    let folder = npm("jose", "jose@6");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/interop/jose.mjs");
    let exchange = exchange();
    let mut judged = exchange.judge(&run("node", &[script, folder.to_str().unwrap()], &exchange.input));
    assert_eq!(judged.remove(0), Ok(exchange.claims.clone()), "the same header bytes");
    assert_eq!(judged, vec![Err(TokenError::UnknownHeader); 4]);
}

#[test]
fn joserfc_verifies_ours_and_ours_accepts_only_our_header() {
    let folder = installed("joserfc", &|folder| {
        let python = folder.join("bin/python3");
        vec![
            command("/usr/bin/python3", &["-m", "venv", folder.to_str().unwrap()]),
            command(python, &["-m", "pip", "install", "--quiet", "joserfc==1.8.0"]),
        ]
    });
    let python = folder.join("bin/python3");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/interop/joserfc_tokens.py");
    let exchange = exchange();
    let mut judged = exchange.judge(&run(python.to_str().unwrap(), &[script], &exchange.input));
    // joserfc keeps the order of what it is given and writes compact JSON, so
    // the first header is ours, byte for byte.
    assert_eq!(judged.remove(0), Ok(exchange.claims.clone()), "the same header bytes");
    assert_eq!(judged, vec![Err(TokenError::UnknownHeader); 4]);
}

/// Of the widespread libraries this one knows no Ed25519. If it learns it, the
/// documentation has to change: docs/auth.md.
#[test]
fn npm_jsonwebtoken_cannot_verify_ours() {
    let folder = npm("jsonwebtoken", "jsonwebtoken@9");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/interop/jsonwebtoken.cjs");
    let said = run("node", &[script, folder.to_str().unwrap()], &exchange().input);
    let said: Vec<&str> = said.as_array().unwrap().iter().map(|words| words.as_str().unwrap()).collect();
    assert!(said.iter().all(|words| *words != "verified"), "{said:?}");
}
