//! What an attacker tries at a real host and a real proxy, by name: tokens that
//! are not what was minted, credentials used twice, names that are not what they
//! look like, cookies that somebody planted, and answers that might tell what is
//! nobody's business.
//!
//! The attacker has more than any should: for claims that nobody mints, the test
//! signs with the master's own key.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

mod world;

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    sync::{Arc, Barrier},
    time::{Duration, Instant},
};

use base64::{
    Engine,
    engine::general_purpose::{STANDARD, URL_SAFE, URL_SAFE_NO_PAD},
};
use cocalc_auth::mint::SigningRing;
use cocalc_core::auth::Secret;
use cocalc_ssh::client::{Client, HostKeyCheck, Identity};
use ed25519_dalek::{Signer, SigningKey};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use world::{Api, LIMIT, World, free_port, start_app, until, way};

/// Tries of each side of the timing test; ten thousand, when built with
/// `COCALC_ATTACKS_FULL` set.
const TRIES: usize = if option_env!("COCALC_ATTACKS_FULL").is_some() { 10_000 } else { 1_500 };

/// Alice and Bob with a project each, on the host alpha.
struct Stage {
    world: World,
    /// The host alpha, and the proxy.
    doors: [(&'static str, SocketAddr); 2],
    ssh: [String; 2],
    alpha: String,
    beta: String,
    alice: Person,
    bob: Person,
    forge: Forge,
}

struct Person {
    id: String,
    api: Api,
    project: String,
}

impl Person {
    fn connect(&self, options: Value) -> String {
        let path = format!("/projects/{}/connect", self.project);
        self.api.call("POST", &path, options).unwrap()["token"].as_str().unwrap().to_owned()
    }
}

/// Signs whatever is wanted with the master's key.
struct Forge {
    key: SigningKey,
    kid: String,
    next_kid: String,
}

impl Forge {
    fn open(world: &World) -> Self {
        let path = world.dir.path().join("master/signing-keys");
        let bytes = cocalc_auth::key_file::load(&path).unwrap().unwrap();
        let ring = SigningRing::from_bytes(&bytes).unwrap();
        let stored: Value = serde_json::from_slice(&bytes).unwrap();
        let seed = URL_SAFE_NO_PAD.decode(stored["current"]["seed"].as_str().unwrap()).unwrap();
        Self {
            key: SigningKey::from_bytes(&seed.try_into().unwrap()),
            kid: ring.current_kid().to_owned(),
            next_kid: ring.next_kid().to_owned(),
        }
    }

    fn header(&self) -> String {
        format!(r#"{{"alg":"EdDSA","typ":"cocalc-connect+jwt","kid":"{}"}}"#, self.kid)
    }

    fn sign(&self, header: &str, payload: &str) -> String {
        let signed = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(payload));
        let signature = self.key.sign(signed.as_bytes()).to_bytes();
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
    }

    fn token(&self, claims: &Value) -> String {
        self.sign(&self.header(), &claims.to_string())
    }
}

fn claims(token: &str) -> Value {
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(token.split('.').nth(1).unwrap()).unwrap()).unwrap()
}

fn with(claims: &Value, name: &str, value: impl Into<Value>) -> Value {
    let mut changed = claims.clone();
    changed[name] = value.into();
    changed
}

impl Stage {
    fn set() -> Self {
        let mut world = World::new("");
        // Denials are what this is about: none waits for another.
        world.add_host("alpha", "");
        world.add_host("beta", "");
        world.add_proxy("proxy");
        world.connected(2, 1);
        let hosts = world.ok("GET", "/hosts", Value::Null);
        let host = |name: &str| {
            let all = hosts["hosts"].as_array().unwrap();
            all.iter().find(|host| host["name"] == name).unwrap()["id"].as_str().unwrap().to_owned()
        };
        let person = |name: &str| {
            let made = world.ok("POST", "/accounts", json!({ "name": name }));
            let id = made["id"].as_str().unwrap().to_owned();
            let token = world.ok("POST", &format!("/accounts/{id}/tokens"), json!({}));
            let api = Api { url: world.url.clone(), token: token["token"].as_str().unwrap().to_owned() };
            let begun = api
                .call("POST", "/projects", json!({ "name": format!("of {name}"), "host": "alpha" }))
                .unwrap();
            world.settle(&begun);
            let project = begun["project"]["id"].as_str().unwrap().to_owned();
            world.settle(&api.call("POST", &format!("/projects/{project}/start"), json!({})).unwrap());
            Person { id, api, project }
        };
        let (alice, bob) = (person("alice"), person("bob"));
        let answer =
            alice.api.call("POST", &format!("/projects/{}/connect", alice.project), json!({})).unwrap();
        let address = |way: &str| {
            let url = answer[way]["path_url"].as_str().unwrap();
            url.strip_prefix("http://").unwrap().split('/').next().unwrap().parse().unwrap()
        };
        let ssh = |way: &str| answer[way]["ssh"].as_str().unwrap().split_once('@').unwrap().1.to_owned();
        Self {
            doors: [("host", address("direct")), ("proxy", address("proxy"))],
            ssh: [ssh("direct"), ssh("proxy")],
            alpha: host("alpha"),
            beta: host("beta"),
            forge: Forge::open(&world),
            alice,
            bob,
            world,
        }
    }
}

/// An answer, as it came.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
struct Answer {
    status: u16,
    /// Without the date, which tells the time to everybody.
    fields: Vec<(String, String)>,
    body: String,
}

impl Answer {
    fn field(&self, name: &str) -> &str {
        self.fields.iter().find(|(other, _)| other == name).map_or("", |(_, value)| value)
    }

    /// Status and code.
    fn said(&self) -> (u16, &str) {
        (self.status, self.field("cocalc-code"))
    }

    /// The session cookie whose attributes include `mark`, as `name=value`.
    fn cookie(&self, mark: &str) -> String {
        let mut set = self.fields.iter().filter(|(name, value)| name == "set-cookie" && value.contains(mark));
        set.next().unwrap_or_else(|| panic!("no cookie in {self:?}")).1.split(';').next().unwrap().to_owned()
    }
}

/// A kept connection from an address of its own: those who are denied too often
/// wait, and each attacker counts for themselves.
struct Connection {
    stream: BufReader<TcpStream>,
    to: SocketAddr,
}

impl Connection {
    fn from(number: usize, to: SocketAddr) -> Self {
        let [_, _, high, low] = u32::try_from(number).unwrap().to_be_bytes();
        let socket = std::net::SocketAddr::from((Ipv4Addr::new(127, 9, high, low), 0));
        let stream = connect_from(socket, to);
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        Self { stream: BufReader::new(stream), to }
    }

    fn send(&mut self, text: &[u8]) {
        self.stream.get_mut().write_all(text).unwrap();
    }

    /// Sends a request without a body, and reads the answer.
    fn ask(&mut self, method: &str, target: &str, fields: &str) -> Answer {
        let text = request(method, target, self.to, fields, "");
        self.send(&text);
        self.answer()
    }

    fn answer(&mut self) -> Answer {
        let mut answer = Answer::default();
        let mut line = String::new();
        self.stream.read_line(&mut line).unwrap();
        answer.status =
            line.split(' ').nth(1).unwrap_or_else(|| panic!("no answer: {line:?}")).parse().unwrap();
        let mut length = 0;
        loop {
            line.clear();
            self.stream.read_line(&mut line).unwrap();
            let Some((name, value)) = line.trim_end().split_once(": ") else { break };
            if name == "content-length" {
                length = value.parse().unwrap();
            }
            if name != "date" {
                answer.fields.push((name.to_owned(), value.to_owned()));
            }
        }
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body).unwrap();
        answer.body = String::from_utf8(body).unwrap();
        answer
    }
}

fn connect_from(from: SocketAddr, to: SocketAddr) -> TcpStream {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let stream = runtime.block_on(async {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind(from).unwrap();
        socket.connect(to).await.unwrap().into_std().unwrap()
    });
    stream.set_nonblocking(false).unwrap();
    stream
}

fn request(method: &str, target: &str, host: SocketAddr, fields: &str, body: &str) -> Vec<u8> {
    let length = if method == "POST" { format!("content-length: {}\r\n", body.len()) } else { String::new() };
    format!("{method} {target} HTTP/1.1\r\nhost: {host}\r\n{length}{fields}\r\n{body}").into_bytes()
}

fn bearer(token: &str) -> String {
    format!("authorization: Bearer {token}\r\n")
}

/// Every way to show a token by HTTP.
fn shown(connection: &mut Connection, project: &str, token: &str) -> Vec<(&'static str, Answer)> {
    let session = format!("/{project}/.cocalc/session");
    let form = format!("cocalc_token={token}");
    let kind = "content-type: application/x-www-form-urlencoded\r\n";
    let posted = request("POST", &session, connection.to, kind, &form);
    connection.send(&posted);
    let posted = connection.answer();
    vec![
        ("form", posted),
        ("bearer", connection.ask("GET", &format!("/{project}/port/1/"), &bearer(token))),
        ("bearer for a session", connection.ask("POST", &session, &bearer(token))),
        ("query", connection.ask("GET", &format!("/{project}/port/1/?cocalc_token={token}"), "")),
    ]
}

const DENIED: (u16, &str) = (403, "access_denied");

/// Tokens that are not what the master mints for Alice's project, by name.
fn bad_tokens(stage: &Stage) -> Vec<(&'static str, String)> {
    let Stage { forge, alice, bob, .. } = stage;
    let good = alice.connect(json!({ "ttl_secs": 300 }));
    let right = claims(&good);
    let now = right["iat"].as_u64().unwrap();
    let parts: Vec<&str> = good.split('.').collect();
    let signed = |header: &str| forge.sign(header, &right.to_string());
    let kid = &forge.kid;
    let flip = |text: &str, at: usize| {
        let other = if text.as_bytes()[at] == b'A' { "B" } else { "A" };
        format!("{}{other}{}", &text[..at], &text[at + 1..])
    };
    let public = forge.key.verifying_key().to_bytes();
    let hs256 = |secret: &[u8]| {
        let header = format!(r#"{{"alg":"HS256","typ":"cocalc-connect+jwt","kid":"{kid}"}}"#);
        let text =
            format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(right.to_string()));
        format!("{text}.{}", URL_SAFE_NO_PAD.encode(hmac_sha256(secret, text.as_bytes())))
    };
    let own = SigningKey::from_bytes(&[7; 32]);
    let by_own = |header: String| {
        let text = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), parts[1]);
        format!("{text}.{}", URL_SAFE_NO_PAD.encode(own.sign(text.as_bytes()).to_bytes()))
    };
    let jwk =
        |key: &[u8; 32]| format!(r#"{{"kty":"OKP","crv":"Ed25519","x":"{}"}}"#, URL_SAFE_NO_PAD.encode(key));
    let header = format!(r#"{{"alg":"EdDSA","typ":"cocalc-connect+jwt","kid":"{kid}""#);
    // One signature that a key of small order makes good for every message.
    let identity: [u8; 32] = std::array::from_fn(|at| u8::from(at == 0));
    let forged = [identity, [0; 32]].concat();
    let by_identity = |header: &str| {
        format!("{}.{}.{}", URL_SAFE_NO_PAD.encode(header), parts[1], URL_SAFE_NO_PAD.encode(&forged))
    };
    let text = right.to_string();
    let twice = |claim: &str| {
        let pair = format!("{claim},{}", &text[1..text.len() - 1]);
        forge.sign(&forge.header(), &format!("{{{pair}}}"))
    };
    let without = |name: &str| {
        let mut less = right.clone();
        less.as_object_mut().unwrap().remove(name);
        forge.token(&less)
    };
    let changed = |name: &str, value: Value| forge.token(&with(&right, name, value));
    let mut tokens = vec![
        ("signature, first character changed", format!("{}.{}.{}", parts[0], parts[1], flip(parts[2], 0))),
        ("signature, last character changed", format!("{}.{}.{}", parts[0], parts[1], flip(parts[2], 85))),
        ("header changed", format!("{}.{}.{}", flip(parts[0], 9), parts[1], parts[2])),
        (
            "Bob's account under Alice's signature",
            format!(
                "{}.{}.{}",
                parts[0],
                URL_SAFE_NO_PAD.encode(with(&right, "sub", &*bob.id).to_string()),
                parts[2]
            ),
        ),
        ("one byte short", good[..good.len() - 1].to_owned()),
        ("half of it", good[..good.len() / 2].to_owned()),
        ("without a signature", format!("{}.{}.", parts[0], parts[1])),
        ("without a signature's dot", format!("{}.{}", parts[0], parts[1])),
        ("four parts", format!("{good}.x")),
        ("empty parts", "..".to_owned()),
        ("3 KiB, well signed", changed("emb", "x".repeat(2300).into())),
        ("the account twice", twice(&format!(r#""sub":"{}""#, bob.id))),
        ("the end twice", twice(r#""exp":9999999999"#)),
        ("an unknown claim", changed("admin", true.into())),
        ("scopes twice", changed("scp", json!(["http", "http"]))),
        ("no scopes", changed("scp", json!([]))),
        ("a scope that is none", changed("scp", json!(["root"]))),
        ("embedding null", changed("emb", Value::Null)),
        ("claims in a list", forge.sign(&forge.header(), "[]")),
        ("claims that are no JSON", forge.sign(&forge.header(), "\u{0}")),
        ("alg none, no signature", format!("{}.{}.", URL_SAFE_NO_PAD.encode(r#"{"alg":"none"}"#), parts[1])),
        (
            "alg none, its signature",
            format!("{}.{}.{}", URL_SAFE_NO_PAD.encode(r#"{"alg":"none"}"#), parts[1], parts[2]),
        ),
        ("HS256 with the public key's bytes", hs256(&public)),
        ("HS256 with the public key as text", hs256(URL_SAFE_NO_PAD.encode(public).as_bytes())),
        ("HS256 with an empty secret", hs256(b"")),
        (
            "alg Ed25519, which this key has not",
            signed(&format!(r#"{{"alg":"Ed25519","typ":"cocalc-connect+jwt","kid":"{kid}"}}"#)),
        ),
        ("typ JWT", signed(&format!(r#"{{"alg":"EdDSA","typ":"JWT","kid":"{kid}"}}"#))),
        (
            "typ of an assertion",
            signed(&format!(r#"{{"alg":"EdDSA","typ":"cocalc-peer+jwt","kid":"{kid}"}}"#)),
        ),
        ("no typ", signed(&format!(r#"{{"alg":"EdDSA","kid":"{kid}"}}"#))),
        (
            "header with a space",
            signed(&format!(r#"{{"alg":"EdDSA", "typ":"cocalc-connect+jwt","kid":"{kid}"}}"#)),
        ),
        (
            "header in another order",
            signed(&format!(r#"{{"typ":"cocalc-connect+jwt","alg":"EdDSA","kid":"{kid}"}}"#)),
        ),
        ("header with crit", signed(&format!(r#"{header},"crit":["x"]}}"#))),
        (
            "the next key's name",
            signed(&format!(r#"{{"alg":"EdDSA","typ":"cocalc-connect+jwt","kid":"{}"}}"#, forge.next_kid)),
        ),
        (
            "a kid that is a path",
            signed(r#"{"alg":"EdDSA","typ":"cocalc-connect+jwt","kid":"../../dev/null"}"#),
        ),
        ("a key of one's own under the name", by_own(forge.header())),
        (
            "a key of one's own in the header",
            by_own(format!(r#"{header},"jwk":{}}}"#, jwk(&own.verifying_key().to_bytes()))),
        ),
        (
            "a key of one's own by address",
            by_own(format!(r#"{header},"jku":"http://127.0.0.1:1/jwks.json"}}"#)),
        ),
        (
            "a key of small order in the header",
            by_identity(&format!(r#"{header},"jwk":{}}}"#, jwk(&identity))),
        ),
        ("the identity's signature", by_identity(&forge.header())),
        ("for the host beta", changed("aud", format!("project-host:{}", stage.beta).into())),
        ("for a list of hosts", changed("aud", json!([format!("project-host:{}", stage.alpha)]))),
        ("for no host", changed("aud", "project-host:".into())),
        ("for Bob's project", changed("prj", bob.project.clone().into())),
        ("the project in capitals", changed("prj", alice.project.to_uppercase().into())),
        ("of another issuer", changed("iss", "http://evil.example".into())),
        ("of the issuer with a slash", changed("iss", format!("{}/", stage.world.url).into())),
        ("made in a minute", forge.token(&with(&with(&right, "iat", now + 60), "exp", now + 120))),
        ("made in the far future", forge.token(&with(&with(&right, "iat", u64::MAX - 60), "exp", u64::MAX))),
        ("good for an hour", changed("exp", (now + 3600).into())),
        ("ends before it begins", changed("exp", (now - 1).into())),
        ("times as text", changed("exp", (now + 60).to_string().into())),
        ("times with a fraction", changed("exp", json!(now as f64 + 0.5))),
        ("of the epoch to come", changed("epoch", (right["epoch"].as_u64().unwrap() + 1).into())),
        ("of epoch 0", changed("epoch", 0.into())),
        ("of nobody's account", changed("sub", "00000000-0000-4000-8000-000000000000".into())),
        ("of Bob's account", changed("sub", bob.id.clone().into())),
        ("a use that is none", changed("use", "forever".into())),
        ("an id that is none", changed("jti", "x".into())),
        (
            "with padding",
            format!(
                "{}.{}.{}",
                parts[0],
                parts[1],
                URL_SAFE.encode(URL_SAFE_NO_PAD.decode(parts[2]).unwrap())
            ),
        ),
        ("of a random text", "x".repeat(200)),
        ("a session's hash", "0".repeat(64)),
        ("an administrator's token", stage.world.admin.clone()),
    ];
    for claim in ["iss", "aud", "sub", "prj", "epoch", "scp", "iat", "exp", "jti", "sep", "acl", "use"] {
        tokens.push(("one claim less", without(claim)));
    }
    // A claim of what the master has not said yet: one fetch, then no.
    tokens.push((
        "of an ACL that is not there yet",
        changed("acl", (right["acl"].as_u64().unwrap() + 1000).into()),
    ));
    tokens
}

fn hmac_sha256(secret: &[u8], text: &[u8]) -> [u8; 32] {
    let mut key = [0; 64];
    key[..secret.len()].copy_from_slice(secret);
    let inner = Sha256::new().chain_update(key.map(|b| b ^ 0x36)).chain_update(text).finalize();
    Sha256::new().chain_update(key.map(|b| b ^ 0x5c)).chain_update(inner).finalize().into()
}

#[test]
fn attacks_at_a_real_host_and_proxy() {
    let stage = Stage::set();
    tokens_that_are_not_what_was_minted(&stage);
    once_is_once(&stage);
    keys_and_names_that_are_not_what_they_look_like(&stage);
    the_app_sees_no_credential(&stage);
    planted_cookies(&stage);
    unknown_and_forbidden_are_told_alike(&stage);
    unknown_and_forbidden_take_the_same_time(&stage);
}

fn tokens_that_are_not_what_was_minted(stage: &Stage) {
    let mut number = 1;
    let tokens = bad_tokens(stage);
    for (door, address) in stage.doors {
        for (name, token) in &tokens {
            number += 1;
            let mut connection = Connection::from(number, address);
            for (how, answer) in shown(&mut connection, &stage.alice.project, token) {
                // Authentic, and for a former owner as far as a proxy can tell: it
                // says so, and carries the token nowhere.
                let elsewhere = (door, *name) == ("proxy", "for the host beta") && how != "form";
                let expected = if elsewhere { (421, "project_moved") } else { DENIED };
                assert_eq!(answer.said(), expected, "{name}, as {how}, at the {door}: {answer:?}");
                assert!(answer.field("set-cookie").is_empty(), "{name}, as {how}, at the {door}");
            }
        }
        let mut connection = Connection::from(number + 1, address);
        number += 1;
        // Authentic and over is all that is told of a token.
        let right = claims(&stage.alice.connect(json!({})));
        let then = right["iat"].as_u64().unwrap() - 120;
        let old = stage.forge.token(&with(&with(&right, "iat", then), "exp", then + 60));
        for (how, answer) in shown(&mut connection, &stage.alice.project, &old) {
            assert_eq!(answer.said(), (401, "token_expired"), "an old token, as {how}, at the {door}");
        }
        // Two of them: nobody chooses.
        let good = stage.alice.connect(json!({}));
        let target = format!("/{}/port/1/", stage.alice.project);
        for (how, answer) in [
            ("two fields", connection.ask("GET", &target, &bearer(&good).repeat(2))),
            (
                "two in the query",
                connection.ask("GET", &format!("{target}?cocalc_token={good}&cocalc_token={good}"), ""),
            ),
        ] {
            assert_eq!(answer.said(), DENIED, "{how} at the {door}");
        }
        // That the way is right: the same with what was minted.
        for (how, answer) in shown(&mut connection, &stage.alice.project, &good) {
            let expected = if how == "bearer" { (502, "app_refused") } else { (303, "") };
            assert_eq!(answer.said(), expected, "a good token, as {how}, at the {door}: {answer:?}");
        }
        // Too large for any head.
        let large = connection.ask("GET", &target, &bearer(&"x".repeat(100_000)));
        assert!((400..500).contains(&large.status), "{large:?}");
    }

    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let project = stage.alice.project.parse().unwrap();
    for (address, (door, _)) in stage.ssh.iter().zip(stage.doors) {
        let log_in = |password: &str| {
            let identity = Identity::Token(Secret::new(password));
            runtime.block_on(async {
                Client::connect(address, project, &identity, HostKeyCheck::Any).await.is_ok()
            })
        };
        for (name, token) in tokens.iter().filter(|(_, token)| token.len() <= 1000).step_by(4) {
            assert!(!log_in(token), "{name}, as an SSH password, at the {door}");
        }
        assert!(!log_in(&stage.alice.connect(json!({ "use": "once" }))), "a one-use token at the {door}");
        assert!(
            !log_in(&stage.alice.connect(json!({ "scopes": ["http"] }))),
            "a token for HTTP at the {door}"
        );
        assert!(!log_in(&stage.bob.connect(json!({}))), "Bob's token at the {door}");
        assert!(log_in(&stage.alice.connect(json!({}))), "Alice's token at the {door}");
    }
    println!("{} bad tokens, each as bearer, form and query, were refused at host and proxy", tokens.len());
}

/// A one-use token opens one session, whoever comes at the same instant.
fn once_is_once(stage: &Stage) {
    let project = &stage.alice.project;
    let target = format!("/{project}/.cocalc/session");
    let [(_, host), (_, proxy)] = stage.doors;
    for (number, ways) in [[host, host], [proxy, proxy], [host, proxy]].into_iter().enumerate() {
        for round in 0..10 {
            let token = stage.alice.connect(json!({ "use": "once" }));
            let barrier = Arc::new(Barrier::new(2));
            let answers: Vec<Answer> = std::thread::scope(|scope| {
                let racers = ways.map(|to| {
                    let (barrier, text) =
                        (barrier.clone(), request("POST", &target, to, &bearer(&token), ""));
                    scope.spawn(move || {
                        let mut connection = Connection::from(1000 + number * 100 + round, to);
                        let (most, last) = text.split_at(text.len() - 1);
                        connection.send(most);
                        barrier.wait();
                        connection.send(last);
                        connection.answer()
                    })
                });
                racers.into_iter().map(|racer| racer.join().unwrap()).collect()
            });
            let mut said: Vec<_> = answers.iter().map(Answer::said).collect();
            said.sort_unstable();
            assert_eq!(said, [(303, ""), DENIED], "round {round} of pair {number}");
            let mut later = Connection::from(1000 + number * 100 + round, ways[0]);
            assert_eq!(later.ask("POST", &target, &bearer(&token)).said(), DENIED, "afterwards");
        }
    }
    // Nor does it open anything but a session.
    let token = stage.alice.connect(json!({ "use": "once" }));
    for (_, address) in stage.doors {
        let answer =
            Connection::from(1500, address).ask("GET", &format!("/{project}/port/1/"), &bearer(&token));
        assert_eq!(answer.said(), DENIED);
    }
    println!("30 one-use tokens, each shown twice at the same instant, opened 30 sessions");
}

fn keys_and_names_that_are_not_what_they_look_like(stage: &Stage) {
    let admin = stage.world.api();
    let refused = |api: &Api, method: &str, path: &str, body: Value| {
        let error = api.call(method, path, body.clone()).unwrap_err();
        assert!(error.starts_with("400 ") && error.contains("invalid_request"), "{path} {body}: {error}");
    };
    // Points of small order, for which anybody can sign.
    let field = |bytes: &[u8]| [&u32::try_from(bytes.len()).unwrap().to_be_bytes()[..], bytes].concat();
    for hex in [
        "0100000000000000000000000000000000000000000000000000000000000000",
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "0000000000000000000000000000000000000000000000000000000000000000",
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    ] {
        let point: [u8; 32] =
            std::array::from_fn(|at| u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).unwrap());
        let blob = [field(b"ssh-ed25519"), field(&point)].concat();
        let line = format!("ssh-ed25519 {} weak", STANDARD.encode(blob));
        refused(&stage.alice.api, "POST", "/ssh-keys", json!({ "key": line }));
        let join = json!({ "token": "ccj_x", "name": "mallory", "identity": URL_SAFE_NO_PAD.encode(point),
            "address": { "url": "http://127.0.0.1:1", "domain": "", "ssh": "127.0.0.1:2", "peer": "127.0.0.1:3", "identity": "" },
            "proof": URL_SAFE_NO_PAD.encode([0; 64]) });
        refused(&admin, "POST", "/hosts/join", join);
    }

    // Names for people: nothing unseen, nothing that turns the text around.
    for (what, name) in [
        ("a zero byte", "a\0b"),
        ("an escape sequence", "a\u{1b}[2Jb"),
        ("a line break", "a\nb"),
        ("a C1 control", "a\u{9b}2Jb"),
        ("right to left", "invoice\u{202e}fdp.exe"),
        ("an isolate", "a\u{2066}b"),
        ("a mark of direction", "\u{200f}alice"),
        ("a space without width", "ali\u{200b}ce"),
        ("a byte order mark", "alice\u{feff}"),
        ("a soft hyphen", "ali\u{ad}ce"),
        ("a filler", "\u{3164}"),
        ("tags", "alice\u{e0041}"),
        ("a line separator", "a\u{2028}b"),
        ("space around it", " alice"),
        ("wide space around it", "alice\u{3000}"),
        ("nothing", ""),
        ("too long", &"x".repeat(101)),
        ("much too long", &"x".repeat(60_000)),
    ] {
        println!("name with {what}");
        refused(&admin, "POST", "/accounts", json!({ "name": name }));
        refused(&stage.alice.api, "POST", "/projects", json!({ "name": name }));
        let path = format!("/accounts/{}/password", stage.alice.id);
        refused(&stage.alice.api, "PUT", &path, json!({ "login": name, "password": "a good password" }));
        let path = format!("/accounts/{}/tokens", stage.alice.id);
        if !name.is_empty() {
            refused(&stage.alice.api, "POST", &path, json!({ "name": name }));
        }
        let join = json!({ "token": "ccj_x", "name": name, "identity": "x", "address": {}, "proof": "x" });
        refused(&admin, "POST", "/hosts/join", join);
    }
    // Hosts have names of ASCII: no letter looks like another's.
    for name in ["\u{430}lpha", "Alpha", "alph\u{e4}", "alpha.", "alpha\u{301}", "xn--lpha-53d-"] {
        let join = json!({ "token": "ccj_x", "name": name, "identity": "x", "address": {}, "proof": "x" });
        refused(&admin, "POST", "/hosts/join", join);
    }
    // What looks the same is the same, however it was typed.
    let (composed, decomposed) = ("Jos\u{e9}", "Jose\u{301}");
    let made = admin.call("POST", "/accounts", json!({ "name": decomposed })).unwrap();
    assert_eq!(made["name"], composed);
    let set = |who: &Person, login: &str, password: &str| {
        let path = format!("/accounts/{}/password", who.id);
        who.api.call("PUT", &path, json!({ "login": login, "password": password }))
    };
    set(&stage.alice, composed, "alice's password").unwrap();
    let taken = set(&stage.bob, decomposed, "bob's password").unwrap_err();
    assert!(taken.contains("already_exists"), "two logins look alike: {taken}");
    let log_in = |login: &str| {
        admin.call("POST", "/login", json!({ "login": login, "password": "alice's password" })).unwrap()
    };
    assert_eq!(log_in(decomposed)["account_id"], *stage.alice.id);
    assert_eq!(log_in(composed)["account_id"], *stage.alice.id);
}

/// A token in the address is gone before the app or a third party could see it,
/// and one in `Referer` never reaches the app.
fn the_app_sees_no_credential(stage: &Stage) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let world = &stage.world;
    let (heads, port) = (world.dir.path().join("heads"), free_port());
    let way = way(&stage.alice.api, &stage.alice.project, port);
    runtime.block_on(start_app(world, &way, Some(&heads)));

    let project = &stage.alice.project;
    let mut secrets = Vec::new();
    for (number, (door, address)) in stage.doors.into_iter().enumerate() {
        let mut connection = Connection::from(2000 + number, address);
        let token = stage.alice.connect(json!({ "use": "once" }));
        let target = format!("/{project}/port/{port}/page");
        let redirect =
            connection.ask("GET", &format!("{target}?a=1&cocalc_token={token}&b=2"), "accept: text/html\r\n");
        assert_eq!(redirect.said(), (303, ""), "{redirect:?}");
        assert_eq!(redirect.field("location"), format!("{target}?a=1&b=2"), "at the {door}");
        assert_eq!(redirect.field("referrer-policy"), "no-referrer");
        assert_eq!(redirect.field("cache-control"), "no-store");
        assert!(!format!("{redirect:?}").contains(&token));
        let cookie = redirect.cookie("Partitioned");
        let multi = stage.alice.connect(json!({}));
        let refers = format!("referer: http://{address}{target}?cocalc_token={token}\r\n");
        let harmless = format!("referer: http://{address}{target}?harmless={number}\r\n");
        for (how, target, fields) in [
            ("referer", target.clone(), format!("cookie: {cookie}; mine=1\r\n{refers}")),
            ("another referer", target.clone(), format!("cookie: {cookie}\r\n{harmless}")),
            ("bearer", target.clone(), format!("{}{refers}", bearer(&multi))),
            ("bearer and cookie", target.clone(), format!("{}cookie: {cookie}\r\n", bearer(&multi))),
            // Not a navigation: the token serves, and is taken out of the address.
            ("query", format!("{target}?cocalc_token={multi}"), String::new()),
        ] {
            let method = if how == "query" { "POST" } else { "GET" };
            let answer = connection.ask(method, &target, &fields);
            assert_eq!((answer.said(), &*answer.body), ((200, ""), "ok"), "{how} at the {door}: {answer:?}");
        }
        secrets.extend([token, multi, cookie.split_once('=').unwrap().1.to_owned()]);
    }
    let seen = std::fs::read_to_string(&heads).unwrap();
    assert_eq!(seen.matches("HTTP/1.1\r\n").count(), 10, "{seen}");
    assert_eq!(seen.matches("harmless=").count(), 2, "other referers are the app's: {seen}");
    assert!(seen.contains("mine=1"));
    for secret in secrets.iter().map(String::as_str).chain(["cocalc_token", "cocalc-session", "Bearer"]) {
        assert!(!seen.contains(secret), "the app saw {secret}: {seen}");
    }
}

/// In path routing all projects share an origin: Bob's app can set cookies of our
/// names for Alice's address. Nobody gets in as somebody else for it, and Alice
/// still does.
fn planted_cookies(stage: &Stage) {
    for (number, (door, address)) in stage.doors.into_iter().enumerate() {
        let mut connection = Connection::from(3000 + number, address);
        let session = |connection: &mut Connection, who: &Person, project: &str| {
            let token = Person { id: String::new(), api: who.api.clone(), project: project.to_owned() }
                .connect(json!({}));
            let opened = connection.ask("POST", &format!("/{project}/.cocalc/session"), &bearer(&token));
            assert_eq!(opened.status, 303, "{opened:?}");
            opened.cookie("Partitioned")
        };
        let alices = session(&mut connection, &stage.alice, &stage.alice.project);
        let bobs = session(&mut connection, &stage.bob, &stage.bob.project);
        let (name, value) = alices.split_once('=').unwrap();
        let plain = name.replace("session-", "session-http-");
        let twisted = format!("{name}={}x", &value[..value.len() - 1]);
        let at = |project: &str| format!("/{project}/port/1/");
        let in_ = (502, "app_refused");
        let (mine, theirs) = (&stage.alice.project, &stage.bob.project);
        for (what, project, cookies, expected) in [
            ("her own", mine, alices.clone(), in_),
            ("Bob's of his project before hers", mine, format!("{bobs}; {alices}"), in_),
            ("Bob's of his project after hers", mine, format!("{alices}; {bobs}"), in_),
            ("rubbish for a longer path", mine, format!("{name}=rubbish; {alices}"), in_),
            ("an empty one", mine, format!("{name}=; {alices}"), in_),
            ("hers with a changed byte", mine, format!("{twisted}; {alices}"), in_),
            ("one of the other name", mine, format!("{plain}=rubbish; {alices}"), in_),
            ("a cookie that is no ASCII beside it", mine, format!("th\u{e8}me=\u{2603}; {alices}"), in_),
            ("many others", mine, format!("{}{alices}", "a=b; ".repeat(100)), in_),
            ("Bob's at Alice's project", mine, bobs.clone(), DENIED),
            ("Alice's at Bob's project", theirs, alices.clone(), DENIED),
            ("rubbish alone", mine, format!("{name}=rubbish"), DENIED),
            ("the name in other letters", mine, alices.to_uppercase(), (401, "unauthenticated")),
            ("a name around it", mine, format!("x{alices}"), (401, "unauthenticated")),
        ] {
            let answer = connection.ask("GET", &at(project), &format!("cookie: {cookies}\r\n"));
            // A proxy passes on whatever may be a session; the host says what it is.
            let expected = match (door, what) {
                ("proxy", "a name around it") | (_, "the name in other letters") => (401, "unauthenticated"),
                _ => expected,
            };
            assert_eq!(answer.said(), expected, "{what} at the {door}: {answer:?}");
        }
        // A member plants a session of their own: whose it is cannot be told, and
        // that is said, rather than letting Alice work in Bob's name.
        let path = format!("/projects/{mine}/members");
        stage.alice.api.call("POST", &path, json!({ "account_id": stage.bob.id })).unwrap();
        let inside = session(&mut connection, &stage.bob, mine);
        for cookies in [format!("{inside}; {alices}"), format!("{alices}; {inside}")] {
            let answer = connection.ask("GET", &at(mine), &format!("cookie: {cookies}\r\n"));
            assert_eq!(answer.said(), (403, "session_conflict"), "at the {door}");
            assert!(answer.body.contains("Delete the cookies of this site"), "{answer:?}");
        }
        let removed = format!("{path}/{}?wait=true&timeout_secs=60", stage.bob.id);
        stage.alice.api.call("DELETE", &removed, Value::Null).unwrap();
        let removed = connection.ask("GET", &at(mine), &format!("cookie: {inside}\r\n"));
        assert_eq!(removed.said(), DENIED, "at the {door}");
    }
}

/// What Alice could show for a project that is not hers.
fn probes(stage: &Stage, address: SocketAddr) -> BTreeMap<&'static str, String> {
    let token = stage.alice.connect(json!({ "ttl_secs": 300 }));
    let mut connection = Connection::from(4000, address);
    let opened =
        connection.ask("POST", &format!("/{}/.cocalc/session", stage.alice.project), &bearer(&token));
    BTreeMap::from([
        ("nothing", String::new()),
        ("her token for her project", bearer(&token)),
        ("a token with a bad signature", bearer(&format!("{}x", &token[..token.len() - 1]))),
        ("no token", bearer("x")),
        ("her session of her project", format!("cookie: {}\r\n", opened.cookie("Partitioned"))),
        ("no session", format!("cookie: {}=x\r\n", opened.cookie("Partitioned").split('=').next().unwrap())),
    ])
}

/// A project that nobody knows. A proxy lets a host answer for it, the one whose
/// id follows: here the one that Bob's project is on, for a session cookie names a
/// host, and only that host takes it for one.
fn unknown(stage: &Stage) -> String {
    stage.alpha.clone()
}

fn unknown_and_forbidden_are_told_alike(stage: &Stage) {
    let unknown = unknown(stage);
    for (door, address) in stage.doors {
        for (number, (what, fields)) in probes(stage, address).into_iter().enumerate() {
            for accept in ["", "accept: text/html\r\n"] {
                for (method, path) in [
                    ("GET", ""),
                    ("GET", "/"),
                    ("GET", "/port/8080/"),
                    ("GET", "/proxy/8080/x?y"),
                    ("GET", "/files/home/x"),
                    ("GET", "/conat/"),
                    ("POST", "/.cocalc/session"),
                    ("DELETE", "/port/8080/"),
                    ("HEAD", "/"),
                ] {
                    if method == "HEAD" {
                        continue;
                    }
                    let ask = |project: &str| {
                        let mut connection = Connection::from(4100 + number, address);
                        connection.ask(method, &format!("/{project}{path}"), &format!("{fields}{accept}"))
                    };
                    let (forbidden, unknown) = (ask(&stage.bob.project), ask(&unknown));
                    assert_eq!(forbidden, unknown, "{what}: {method} {path} at the {door}");
                    assert!((400..500).contains(&forbidden.status), "{what}: {forbidden:?}");
                }
            }
        }
    }
    // The master says nothing either.
    for (method, path, body) in [
        ("GET", "", Value::Null),
        ("POST", "/connect", json!({})),
        ("POST", "/start", json!({})),
        ("DELETE", "", Value::Null),
        ("GET", "/members", Value::Null),
        ("GET", "/snapshots", Value::Null),
        ("GET", "/access", Value::Null),
    ] {
        let ask = |project: &str| {
            stage.alice.api.call(method, &format!("/projects/{project}{path}"), body.clone()).unwrap_err()
        };
        let (forbidden, unknown) = (ask(&stage.bob.project), ask(&unknown));
        assert_eq!(forbidden, unknown, "{method} {path} at the master");
        assert!(forbidden.starts_with("404 "), "{forbidden}");
    }
}

/// How often a sample of one side is below one of the other's: a half, if nobody
/// can tell them apart (Mann and Whitney's U, divided by the number of pairs).
fn below(ours: &[Duration], others: &[Duration]) -> f64 {
    let mut all: Vec<(Duration, bool)> = ours.iter().map(|took| (*took, true)).collect();
    all.extend(others.iter().map(|took| (*took, false)));
    all.sort_unstable();
    let (mut pairs, mut seen, mut at) = (0.0, 0.0, 0);
    while at < all.len() {
        let ties = all[at..].iter().take_while(|(took, _)| *took == all[at].0).count();
        let mine = all[at..at + ties].iter().filter(|(_, ours)| *ours).count() as f64;
        let theirs = ties as f64 - mine;
        pairs += mine * seen + mine * theirs / 2.0;
        seen += theirs;
        at += ties;
    }
    1.0 - pairs / (ours.len() as f64 * others.len() as f64)
}

/// Asks for both by turns, in random order, on kept connections, and returns how
/// long each took.
fn timed(
    from: usize,
    address: SocketAddr,
    tries: usize,
    mut ask: impl FnMut(&mut Connection, bool) -> Answer,
) -> [Vec<Duration>; 2] {
    let mut connection = Connection::from(from, address);
    let mut took = [Vec::with_capacity(tries), Vec::with_capacity(tries)];
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    for number in 0..tries {
        if number % 75 == 74 {
            // From elsewhere, before so many denials make this address wait; the
            // first answers on a connection are not counted.
            connection = Connection::from(from + 1 + number / 75, address);
            ask(&mut connection, false);
            ask(&mut connection, true);
        }
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let first = random & 1 == 0;
        for side in [first, !first] {
            let begun = Instant::now();
            let answer = ask(&mut connection, side);
            took[usize::from(side)].push(begun.elapsed());
            assert!(answer.status != 429, "{answer:?}");
        }
    }
    took
}

/// The share of pairs that may fall the wrong way. For as many tries as the
/// short run makes, chance alone strays a sixth as far.
const TELLS: f64 = 0.06;

fn unknown_and_forbidden_take_the_same_time(stage: &Stage) {
    let unknown = unknown(stage);
    let mut from = 8000;
    for (door, address) in stage.doors {
        for (what, fields) in probes(stage, address) {
            let targets = [&*stage.bob.project, &*unknown].map(|project| format!("/{project}/port/8080/"));
            // Noise that comes and goes may stay with one side for once, but not
            // three times.
            let mut seen = Vec::new();
            let alike = (0..3).any(|_| {
                // As it is for tokens: they expire.
                let sides = timed(from, address, TRIES, |connection, side| {
                    connection.ask("GET", &targets[usize::from(side)], &fields)
                });
                from += TRIES / 75 + 2;
                let share = below(&sides[0], &sides[1]);
                seen.push(share);
                println!(
                    "{what} at the {door}, {TRIES} tries each: forbidden {:?}, unknown {:?} (medians), \
                     forbidden below unknown in {:.1} % of pairs",
                    median(&sides[0]),
                    median(&sides[1]),
                    share * 100.0
                );
                (share - 0.5).abs() < TELLS
            });
            assert!(alike, "{what} at the {door}: forbidden and unknown can be told apart: {seen:?}");
        }
        // That it would be noticed: a signature that is checked, and none.
        let token = stage.alice.connect(json!({ "ttl_secs": 300 }));
        let (target, fields) = (format!("/{unknown}/port/8080/"), bearer(&token));
        let sides = timed(from, address, 300, |connection, side| {
            connection.ask("GET", &target, if side { &fields } else { "" })
        });
        from += 10;
        let share = below(&sides[0], &sides[1]);
        println!("at the {door}: nothing shown below a signature checked in {:.1} % of pairs", share * 100.0);
        assert!(share > 0.5 + TELLS, "the measurement sees nothing: {share}");
    }
}

fn median(took: &[Duration]) -> Duration {
    let mut sorted = took.to_vec();
    sorted.sort_unstable();
    sorted[sorted.len() / 2]
}

#[test]
fn a_proxy_keeps_the_limits_it_is_given() {
    let mut world = World::new("");
    world.add_proxy_with(
        "proxy",
        "[limits]\nconnections_per_source = 3\nssh_connections_per_source = 2\n\
         failures_burst = 4\nfailure_recovery_ms = 600000\n",
    );
    world.connected(0, 1);
    let at = |key| SocketAddr::from((Ipv4Addr::LOCALHOST, world.ports[&("proxy".to_owned(), key)]));
    let (http, ssh) = (at("listen"), at("ssh_listen"));
    let greets = |stream: &mut TcpStream| {
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let mut byte = [0];
        stream.read(&mut byte).is_ok_and(|read| read == 1)
    };

    let from = |number| SocketAddr::from((Ipv4Addr::new(127, 9, 200, number), 0));
    let mut open: Vec<Connection> = (0..3).map(|_| Connection::from(51201, http)).collect();
    for connection in &mut open {
        assert_eq!(connection.ask("GET", "/healthz", "").status, 200);
    }
    // One more of the address is closed at once, and another address is not held up.
    assert!(!greets(&mut connect_from(from(1), http)));
    assert_eq!(Connection::from(51202, http).ask("GET", "/healthz", "").status, 200);
    // There is room again when one has gone.
    drop(open);
    until("room for another connection", || {
        let mut stream = connect_from(from(1), http);
        // It may be closed already.
        stream.write_all(&request("GET", "/healthz", http, "", "")).ok()?;
        greets(&mut stream).then_some(())
    });

    let mut open: Vec<TcpStream> = (0..2).map(|_| connect_from(from(3), ssh)).collect();
    assert!(open.iter_mut().all(greets));
    assert!(!greets(&mut connect_from(from(3), ssh)));
    assert!(greets(&mut connect_from(from(4), ssh)));

    let mut guesser = Connection::from(51205, http);
    let path = "/00000000-0000-4000-8000-000000000001/port/1/";
    let header = URL_SAFE_NO_PAD.encode(r#"{"alg":"EdDSA","typ":"cocalc-connect+jwt","kid":"k"}"#);
    let guess = format!("{header}.e30.x");
    for _ in 0..4 {
        assert_eq!(guesser.ask("GET", path, &bearer(&guess)).said(), DENIED);
    }
    assert_eq!(guesser.ask("GET", path, &bearer(&guess)).said(), (429, "rate_limited"));
    assert_eq!(Connection::from(51206, http).ask("GET", path, &bearer(&guess)).said(), DENIED);
}

#[test]
fn the_rank_test_sees_what_it_should() {
    let micros = |range: std::ops::Range<u64>| range.map(Duration::from_micros).collect::<Vec<_>>();
    assert_eq!(below(&micros(0..10), &micros(10..20)), 1.0);
    assert_eq!(below(&micros(10..20), &micros(0..10)), 0.0);
    assert_eq!(below(&micros(0..10), &micros(0..10)), 0.5);
    assert_eq!(below(&micros(0..1), &micros(0..3)), (2.0 + 0.5) / 3.0);
}
