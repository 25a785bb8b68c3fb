//! Tokens for one repository in Google Cloud Storage, from a service that speaks
//! as Google's do: there is no emulator of it.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests report by panicking, in helpers too")]

mod common;

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpListener,
    process::Command,
    sync::{Arc, Mutex},
    thread,
};

use cocalc_backup::{
    Access, Bounds, GcsAccess, GcsCredentials, GcsPlace, Location, Minter, Place, Secret, ShardId,
};
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use serde_json::{Value, json};

/// Answers each form that is posted with what `answer` makes of its fields.
fn serve(answer: impl Fn(&str, &BTreeMap<String, String>) -> Value + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let (mut path, mut length) = (String::new(), 0);
            loop {
                let mut line = String::new();
                reader.read_line(&mut line).unwrap();
                if path.is_empty() {
                    path = line.split(' ').nth(1).unwrap_or_default().to_owned();
                }
                if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                    length = value.trim().parse().unwrap();
                }
                if line == "\r\n" {
                    break;
                }
            }
            let mut body = vec![0; length];
            reader.read_exact(&mut body).unwrap();
            let body = answer(&path, &fields(&String::from_utf8(body).unwrap())).to_string();
            write!(
                stream,
                "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
                body.len()
            )
            .unwrap();
        }
    });
    url
}

fn fields(form: &str) -> BTreeMap<String, String> {
    let url = reqwest::Url::parse(&format!("http://form/?{form}")).unwrap();
    url.query_pairs().map(|(name, value)| (name.into_owned(), value.into_owned())).collect()
}

#[tokio::test]
async fn a_token_is_exchanged_for_one_of_the_repository() {
    let openssl = |arguments: &[&str], input: &[u8]| -> String {
        let mut child = Command::new("openssl")
            .args(arguments)
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(input).unwrap();
        let done = child.wait_with_output().unwrap();
        assert!(done.status.success(), "openssl {arguments:?}");
        String::from_utf8(done.stdout).unwrap()
    };
    let private = openssl(&["genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"], b"");
    let public = openssl(&["pkey", "-pubout"], private.as_bytes());
    let asked = Arc::new(Mutex::new(Vec::new()));
    let note = asked.clone();
    let url = serve(move |path, fields| {
        note.lock().unwrap().push((path.to_owned(), fields.clone()));
        match path {
            "/token" => json!({ "access_token": "of all", "expires_in": 1800, "token_type": "Bearer" }),
            _ => json!({ "access_token": "of one", "token_type": "Bearer" }),
        }
    });
    let account = json!({
        "type": "service_account", "client_email": "backups@example.iam", "private_key_id": "key-1",
        "private_key": private, "token_uri": format!("{url}/token"),
    });
    let place = |account: String| {
        Place::Gcs(GcsPlace {
            bucket: "backups".into(),
            prefix: "a/b".into(),
            endpoint: None,
            credentials: GcsAccess::Scoped {
                account: Secret::new(account),
                sts_endpoint: Some(format!("{url}/exchange")),
            },
        })
    };
    let minter = |account: String| {
        let worker = env!("CARGO_BIN_EXE_cocalc-backup-worker").into();
        Minter::new(place(account), Some(worker), Bounds::default()).unwrap()
    };
    let (location, expires) =
        minter(account.to_string()).mint(ShardId(7).into(), Access::Append).await.unwrap();
    let Location::Gcs(given) = location else { panic!("{location:?}") };
    assert_eq!(given.credentials, GcsCredentials::Token(Secret::new("of one")));
    assert_eq!(given.prefix, "a/b/shard-7");
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis();
    let life = expires.unwrap().millis() - i64::try_from(now).unwrap();
    assert!(life <= 1_800_000 && life > 1_500_000, "it ends with the one it was made of: {life} ms");

    let asked = asked.lock().unwrap().clone();
    let [(_, first), (path, second)] = &asked[..] else { panic!("{asked:?}") };
    let mut validation = Validation::new(Algorithm::RS256);
    validation.set_audience(&[format!("{url}/token")]);
    let key = DecodingKey::from_rsa_pem(public.as_bytes()).unwrap();
    let claims = jsonwebtoken::decode::<Value>(&first["assertion"], &key, &validation).unwrap();
    assert_eq!(claims.claims["iss"], "backups@example.iam");
    assert_eq!(claims.header.kid.as_deref(), Some("key-1"));
    assert_eq!(first["grant_type"], "urn:ietf:params:oauth:grant-type:jwt-bearer");
    assert_eq!(path, "/exchange");
    assert_eq!(second["subject_token"], "of all");
    let boundary: Value = serde_json::from_str(&fields(&format!("x={}", second["options"]))["x"]).unwrap();
    let rule = &boundary["accessBoundary"]["accessBoundaryRules"][0];
    assert_eq!(rule["availableResource"], "//storage.googleapis.com/projects/_/buckets/backups");
    assert!(rule["availabilityCondition"]["expression"].as_str().unwrap().contains("/a/b/shard-7/"));

    let wrong = minter("{}".into()).mint(ShardId(7).into(), Access::Read).await.unwrap_err();
    assert!(cocalc_core::chain(&wrong).contains("not the key of a service account"), "{wrong:?}");
}
