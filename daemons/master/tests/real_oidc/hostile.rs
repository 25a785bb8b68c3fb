//! A provider that means ill, or is broken: it answers as the test says.

use std::{
    collections::BTreeMap,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use cocalc_auth::identity::Identity;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// What it answers.
#[derive(Clone)]
pub(crate) enum Reply {
    Json(u16, Value),
    /// Elsewhere.
    Redirect(String),
    /// Bytes without end.
    Endless,
    /// Nothing, while the connection stays.
    Silent,
    /// These bytes as the whole answer.
    Raw(&'static [u8]),
}

type Replies = Arc<Mutex<BTreeMap<String, Reply>>>;

/// Many providers at one address, told apart by their path.
pub(crate) struct Hostile {
    origin: String,
    replies: Replies,
    ended: Arc<AtomicBool>,
    key: Identity,
}

impl Drop for Hostile {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        // Wakes the listener, which sees it then.
        let _ = TcpStream::connect(self.origin.trim_start_matches("http://"));
    }
}

impl Hostile {
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let origin = format!("http://{}", listener.local_addr().unwrap());
        let (replies, ended) = (Replies::default(), Arc::new(AtomicBool::new(false)));
        let (shared, over) = (replies.clone(), ended.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().take_while(|_| !over.load(Ordering::Relaxed)) {
                let (shared, over) = (shared.clone(), over.clone());
                std::thread::spawn(move || answer(stream.unwrap(), &shared, &over));
            }
        });
        Self { origin, replies, ended, key: Identity::generate().unwrap() }
    }

    pub(crate) fn issuer(&self, name: &str) -> String {
        format!("{}/{name}", self.origin)
    }

    /// How it answers at a path from now on.
    pub(crate) fn set(&self, path: &str, reply: Reply) {
        self.replies.lock().unwrap().insert(path.to_owned(), reply);
    }

    /// What a provider that means well says of itself.
    pub(crate) fn discovery(&self, name: &str) -> Value {
        let issuer = self.issuer(name);
        json!({
            "issuer": issuer,
            "authorization_endpoint": format!("{issuer}/auth"),
            "token_endpoint": format!("{issuer}/token"),
            "jwks_uri": format!("{issuer}/jwks"),
            "response_types_supported": ["code"],
            "subject_types_supported": ["public"],
            // Whatever it says, we know better.
            "id_token_signing_alg_values_supported": ["EdDSA", "HS256", "none"],
        })
    }

    /// Sets a provider up as one that means well.
    pub(crate) fn set_up(&self, name: &str) {
        let key = json!({
            "kty": "OKP", "crv": "Ed25519", "use": "sig", "alg": "EdDSA", "kid": "k1",
            "x": self.key.public_key().to_string(),
        });
        self.set(&format!("/{name}/jwks"), Reply::Json(200, json!({ "keys": [key] })));
        let path = format!("/{name}/.well-known/openid-configuration");
        self.set(&path, Reply::Json(200, self.discovery(name)));
    }

    /// Claims that are as they should be.
    pub(crate) fn claims(&self, name: &str, subject: &str, nonce: &str) -> Value {
        let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs();
        json!({
            "iss": self.issuer(name), "aud": "cocalc", "sub": subject, "nonce": nonce,
            "iat": now, "exp": now + 300,
            "name": "Ada", "email": "ada@example.org", "email_verified": true,
        })
    }

    /// An ID token, signed with its key.
    pub(crate) fn signed(&self, header: &Value, claims: &Value) -> String {
        let text = unsigned(header, claims);
        let signature = URL_SAFE_NO_PAD.encode(self.key.sign(text.as_bytes()));
        format!("{text}.{signature}")
    }

    /// What its token endpoint answers from now on.
    pub(crate) fn give(&self, name: &str, id_token: &str) {
        let answer = json!({
            "access_token": "an-access-token", "token_type": "Bearer", "expires_in": 60, "id_token": id_token,
        });
        self.set(&format!("/{name}/token"), Reply::Json(200, answer));
    }

    pub(crate) fn public_key(&self) -> String {
        self.key.public_key().to_string()
    }
}

pub(crate) fn unsigned(header: &Value, claims: &Value) -> String {
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    format!("{}.{}", part(header), part(claims))
}

/// An ID token whose key is `secret`.
pub(crate) fn with_hmac(claims: &Value, secret: &[u8]) -> String {
    let text = unsigned(&json!({ "alg": "HS256" }), claims);
    // RFC 2104, for keys of at most a block.
    let padded =
        |pad: u8| -> Vec<u8> { (0..64).map(|at| secret.get(at).copied().unwrap_or(0) ^ pad).collect() };
    let inner = Sha256::new().chain_update(padded(0x36)).chain_update(&text).finalize();
    let outer = Sha256::new().chain_update(padded(0x5c)).chain_update(inner).finalize();
    format!("{text}.{}", URL_SAFE_NO_PAD.encode(outer))
}

fn answer(mut stream: TcpStream, replies: &Replies, ended: &AtomicBool) {
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut head = Vec::new();
    let mut part = [0; 4096];
    // Requests are small: head and body come in a few reads.
    let whole = |head: &[u8]| {
        let text = String::from_utf8_lossy(head).to_ascii_lowercase();
        let (top, body) = text.split_once("\r\n\r\n")?;
        let length = top.lines().find_map(|line| line.strip_prefix("content-length:"));
        let length: usize = length.map_or(0, |length| length.trim().parse().unwrap());
        (body.len() >= length).then_some(())
    };
    while whole(&head).is_none() {
        match stream.read(&mut part) {
            Ok(count @ 1..) => head.extend_from_slice(&part[..count]),
            _ => return,
        }
    }
    let text = String::from_utf8_lossy(&head);
    let path = text.split(' ').nth(1).unwrap_or_default().to_owned();
    let reply = replies.lock().unwrap().get(&path).cloned();
    let json = "content-type: application/json\r\nconnection: close\r\n";
    match reply.unwrap_or(Reply::Json(404, json!({}))) {
        Reply::Json(status, value) => {
            let body = value.to_string();
            let length = body.len();
            let _ = write!(stream, "HTTP/1.1 {status} X\r\n{json}content-length: {length}\r\n\r\n{body}");
        }
        Reply::Redirect(to) => {
            let _ = write!(stream, "HTTP/1.1 302 X\r\n{json}content-length: 0\r\nlocation: {to}\r\n\r\n");
        }
        Reply::Raw(bytes) => {
            let _ = stream.write_all(bytes);
        }
        Reply::Endless => {
            let _ = write!(stream, "HTTP/1.1 200 X\r\n{json}\r\n[");
            while !ended.load(Ordering::Relaxed) && stream.write_all(&[b' '; 65536]).is_ok() {}
        }
        // Until the other side has had enough.
        Reply::Silent => {
            let _ = stream.read(&mut part);
        }
    }
}
