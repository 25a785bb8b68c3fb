//! Logging in with OpenID providers: a real one (npm's `oidc-provider`), and
//! ones that mean ill.
//!
//! Needs node and npm, which fetches the provider once into the target folder,
//! openssl for its certificates, and the program `cocalc` beside the master's.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by it, in its helpers too")]

mod browser;
mod hostile;
mod master;
mod provider;
mod terminal;

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::{
    browser::{Browser, Shown, parameter},
    hostile::{Hostile, Reply, unsigned, with_hmac},
    master::{Master, callback, free_port},
    provider::{Provider, SECRET, client, until},
};

/// A real provider, and a master that knows it as `local`.
fn world(more: &str) -> (Provider, Master) {
    let port = free_port();
    let provider = Provider::start(0, &client(&callback(port)));
    let master = Master::start(port, &[("local", &provider.issuer)], more);
    (provider, master)
}

fn token(shown: &Shown) -> String {
    assert_eq!(shown.status, 200, "{shown:?}");
    shown.data("token").unwrap()
}

/// A refusal, for people: never with a token.
fn refused(shown: &Shown, status: u16, words: &str) {
    assert_eq!(shown.status, status, "{shown:?}");
    assert!(shown.text.contains(words), "{words}: {}", shown.text);
    assert!(shown.data("token").is_none() && !shown.text.contains("cct_"), "{}", shown.text);
}

#[test]
fn people_log_in_with_a_real_provider() {
    let (provider, master) = world("create_accounts = true");
    let mut browser = Browser::default();
    let start = browser.get(&format!("{}?next=/projects/1", master.start_of("local")));
    assert_eq!(start.status, 303, "{start:?}");
    let cookie = start.headers["set-cookie"].to_str().unwrap();
    assert!(cookie.contains("; HttpOnly; SameSite=Lax") && cookie.contains("Max-Age=600"), "{cookie}");
    let at = start.location().unwrap();
    assert!(at.starts_with(&provider.issuer), "{at}");
    assert_eq!(start.parameter("code_challenge_method").as_deref(), Some("S256"));
    assert_eq!(start.parameter("response_type").as_deref(), Some("code"));

    let back = browser.back(&at, "ada");
    let shown = browser.get(&back);
    let first = token(&shown);
    assert_eq!(shown.data("next").as_deref(), Some("/projects/1"));
    let policy = shown.headers["content-security-policy"].to_str().unwrap();
    assert!(policy.contains("default-src 'none'; script-src 'sha256-"), "{policy}");
    assert_eq!(shown.headers["cache-control"], "no-store");
    let (status, ada) = master.who(&first);
    assert_eq!((status, &ada["name"], &ada["admin"]), (200, &json!("ada by name"), &json!(false)), "{ada}");

    // The address is good once.
    refused(&browser.get(&back), 400, "was used");
    // So is the code: another log-in of the same browser cannot use it again.
    let another = browser.get(&master.start_of("local"));
    let state = another.parameter("state").unwrap();
    let code = parameter(&back, "code").unwrap();
    let url = format!("{}?state={state}&code={code}", callback_of(&master));
    refused(&browser.get(&url), 403, "proves nobody");

    // The same account from another browser, and another for somebody else.
    let before = master.accounts();
    let mut other = Browser::default();
    let again = other.back(&master.start_of("local"), "ada");
    let second = token(&other.get(&again));
    assert_eq!(master.who(&second).1["id"], ada["id"]);
    assert_eq!(master.accounts(), before);
    let mut third = Browser::default();
    let eves = third.back(&master.start_of("local"), "eve");
    assert_ne!(master.who(&token(&third.get(&eves))).1["id"], ada["id"]);

    // Who signs out everywhere is signed out.
    let id = ada["id"].as_str().unwrap();
    assert_eq!(master.call("POST", &format!("/accounts/{id}/sign-out"), &second, &json!({})).0, 200);
    assert_eq!((master.who(&first).0, master.who(&second).0), (401, 401));
    let once_more = other.back(&master.start_of("local"), "ada");
    let third = token(&other.get(&once_more));
    assert_eq!(master.call("POST", "/logout", &third, &Value::Null).0, 204);
    assert_eq!(master.who(&third).0, 401);

    // Who is banned does not get in.
    master.ok("POST", &format!("/accounts/{id}/ban"), &json!({}));
    let banned = other.back(&master.start_of("local"), "ada");
    refused(&other.get(&banned), 403, "may not do that");

    let log = master.log();
    for secret in [SECRET, &first, &second, &code, &state, &parameter(&eves, "code").unwrap()] {
        assert!(!log.contains(secret), "{secret} is in the log");
    }
    assert!(log.contains("a log-in with OpenID was refused") && !log.contains("panicked"), "{log}");
}

fn callback_of(master: &Master) -> String {
    format!("{}/auth/oidc/local/callback", master.url)
}

#[test]
fn a_log_in_belongs_to_its_browser_and_leads_nowhere_else() {
    let (_provider, master) = world("create_accounts = true");
    let start = master.start_of("local");
    // Somebody sends their own answer to another, who shall use their account.
    let (mut attacker, mut victim) = (Browser::default(), Browser::default());
    let back = attacker.back(&start, "eve");
    victim.get(&start);
    refused(&victim.get(&back), 403, "another browser");
    refused(&attacker.get(&back), 400, "was used");
    refused(&Browser::default().get(&attacker.back(&start, "eve")), 403, "another browser");
    // States that nobody gave out, and none.
    let mut browser = Browser::default();
    browser.get(&start);
    for query in
        ["?code=x", "?code=x&state=", "?code=x&state=AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA", ""]
    {
        refused(&browser.get(&format!("{}{query}", callback_of(&master))), 400, "begin again");
    }
    // Two tabs of one browser are both good.
    let (one, two) = (browser.back(&start, "ada"), browser.back(&start, "ada"));
    assert_eq!(
        master.who(&token(&browser.get(&one))).1["id"],
        master.who(&token(&browser.get(&two))).1["id"]
    );

    // The provider says no, or another provider speaks.
    let state = |browser: &mut Browser| browser.get(&start).parameter("state").unwrap();
    let url = format!("{}?error=access_denied%3Cb%3E&state={}", callback_of(&master), state(&mut browser));
    refused(&browser.get(&url), 403, "access_deniedb");
    let other = "https%3A%2F%2Fevil.example";
    let url = format!("{}?code=x&iss={other}&state={}", callback_of(&master), state(&mut browser));
    refused(&browser.get(&url), 403, "another provider");
    let url = format!("{}?state={}", callback_of(&master), state(&mut browser));
    refused(&browser.get(&url), 400, "no code");

    for next in
        ["//evil.example", "https://evil.example", "/%5Cevil.example", "/%09/evil.example", "javascript:x"]
    {
        let shown = Browser::default().get(&format!("{start}?next={next}"));
        refused(&shown, 400, "only a path");
        assert!(shown.location().is_none() && !shown.headers.contains_key("set-cookie"), "{next}");
    }
    for program in ["port=0", "port=80", "port=80&challenge=x&state=0123456789abcdef", "port=70000"] {
        assert_eq!(Browser::default().get(&format!("{start}?{program}")).status, 400, "{program}");
    }
    refused(&Browser::default().get(&master.start_of("nobody")), 404, "provider");
    // What people see on the way to a project.
    let project = "00000000-0000-4000-8000-000000000000";
    let page = Browser::default().get(&format!("{}/projects/{project}", master.url));
    assert!(page.text.contains(&format!("/auth/oidc/local/start?next=/projects/{project}")), "{}", page.text);
}

#[test]
fn tries_are_counted_as_those_of_a_password() {
    let (_provider, master) = world("create_accounts = true");
    let mut browser = Browser::default();
    let mut last = None;
    for _ in 0..30 {
        let back = browser.back(&master.start_of("local"), "ada");
        let shown = browser.get(&back);
        if shown.status != 200 {
            last = Some(shown);
            break;
        }
    }
    let last = last.expect("nobody may log in for ever");
    refused(&last, 429, "too many");
    assert!(last.headers.contains_key("retry-after"));
}

#[test]
fn only_whom_we_want_gets_in() {
    let (_provider, master) = world("allowed_email_domains = ['example.org']\ncreate_accounts = true");
    let log_in = |name: &str| {
        let mut browser = Browser::default();
        let back = browser.back(&master.start_of("local"), name);
        browser.get(&back)
    };
    let before = master.accounts();
    for outside in ["eve@evil.example", "eve@sub.example.org", "unverified"] {
        refused(&log_in(outside), 403, "certain domains");
    }
    assert_eq!(master.accounts(), before);
    token(&log_in("ada"));
    token(&log_in("bob@EXAMPLE.org"));

    let (_provider, closed) = world("");
    let mut browser = Browser::default();
    let before = closed.accounts();
    let back = browser.back(&closed.start_of("local"), "ada");
    refused(&browser.get(&back), 403, "no account here");
    assert_eq!(closed.accounts(), before);
}

#[test]
fn a_provider_may_go_come_back_and_change_its_keys() {
    let port = free_port();
    let absent = free_port();
    let issuer = format!("http://127.0.0.1:{absent}");
    // Started without it.
    let master = Master::start(port, &[("local", &issuer)], "create_accounts = true");
    let mut browser = Browser::default();
    let start = master.start_of("local");
    let shown = browser.get(&start);
    refused(&shown, 503, "cannot be reached");
    assert_eq!(shown.headers["cocalc-code"], "provider_unavailable");
    assert!(shown.headers.contains_key("retry-after"));
    // Others log in meanwhile.
    let (id, key) = master.account("Bob");
    let password = json!({ "login": "bob", "password": "correct horse" });
    assert_eq!(master.call("PUT", &format!("/accounts/{id}/password"), &key, &password).0, 204);
    assert_eq!(master.call("POST", "/login", "", &password).0, 201);

    let provider = Provider::start(absent, &client(&callback(port)));
    until("the provider is tried again", || (browser.get(&start).status == 303).then_some(()));
    let back = browser.back(&start, "ada");
    let first = master.who(&token(&browser.get(&back))).1;

    // Another process with other keys, of which the master has not heard.
    let port_of_provider = provider.port();
    drop(provider);
    let provider = until("the port is free", || {
        std::net::TcpListener::bind(("127.0.0.1", port_of_provider)).ok().map(drop)?;
        Some(Provider::start(port_of_provider, &client(&callback(port))))
    });
    let mut fresh = Browser::default();
    let back = fresh.back(&start, "ada");
    assert_eq!(master.who(&token(&fresh.get(&back))).1["id"], first["id"]);

    // It goes while somebody is there.
    let back = fresh.back(&start, "ada");
    drop(provider);
    refused(&fresh.get(&back), 503, "cannot be reached");
    assert!(!master.log().contains("panicked"));
}

#[test]
fn a_provider_is_who_its_certificate_says() {
    let dir = tempfile::tempdir().unwrap();
    let made = |name: &str| {
        let file = |end: &str| dir.path().join(format!("{name}.{end}"));
        let config = format!(
            "[req]\ndistinguished_name=dn\nx509_extensions=ext\nprompt=no\n[dn]\nCN={name}\n\
             [ext]\nsubjectAltName=DNS:{name}\nbasicConstraints=critical,CA:FALSE\n"
        );
        std::fs::write(file("conf"), config).unwrap();
        let arguments = "req -x509 -nodes -days 2 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1";
        let output = std::process::Command::new("openssl")
            .args(arguments.split(' '))
            .args(["-config".as_ref(), file("conf").as_os_str()])
            .args(["-out".as_ref(), file("crt").as_os_str()])
            .args(["-keyout".as_ref(), file("key").as_os_str()])
            .output()
            .expect("openssl is required to run this test");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        [file("crt"), file("key")]
    };
    let ([right, key], [wrong, other]) = (made("localhost"), made("id.example"));
    for (certificate, key, trusted, status) in [
        (&right, &key, &right, 303),
        // Somebody's whom we trust, for another name; and of nobody we trust.
        (&wrong, &other, &wrong, 503),
        (&right, &key, &wrong, 503),
    ] {
        let port = free_port();
        let provider = Provider::start_with(0, &client(&callback(port)), &[certificate, key]);
        assert!(provider.issuer.starts_with("https://localhost:"));
        let master = Master::start_with(port, &[("local", &provider.issuer)], "", Some(trusted));
        let shown = Browser::default().get(&master.start_of("local"));
        assert_eq!(shown.status, status, "{}", master.log());
        let to = shown.location().is_some_and(|to| to.starts_with(&provider.issuer));
        assert_eq!(to, status == 303, "{shown:?}");
    }
}

/// A log-in with a provider whose token endpoint does as it likes: `forge` gets
/// the nonce.
fn attempt(master: &Master, name: &str, forge: impl Fn(&str)) -> Shown {
    let mut browser = Browser::default();
    let start = browser.get(&master.start_of(name));
    assert_eq!(start.status, 303, "{start:?}");
    forge(&start.parameter("nonce").unwrap());
    let state = start.parameter("state").unwrap();
    browser.get(&format!("{}/auth/oidc/{name}/callback?code=any&state={state}", master.url))
}

#[test]
fn forged_answers_prove_nobody() {
    let hostile = Hostile::start();
    hostile.set_up("a");
    hostile.set_up("b");
    let issuers = [("a", &*hostile.issuer("a")), ("b", &*hostile.issuer("b"))];
    let master = Master::start(free_port(), &issuers, "create_accounts = true");
    let header = json!({ "alg": "EdDSA", "kid": "k1" });
    let good = |name: &str, nonce: &str| hostile.signed(&header, &hostile.claims(name, "ada", nonce));

    let first = attempt(&master, "a", |nonce| hostile.give("a", &good("a", nonce)));
    let ada = master.who(&token(&first)).1;
    assert_eq!(ada["name"], "Ada");
    // The same subject, name and verified address at another issuer is another
    // person.
    let other = attempt(&master, "b", |nonce| hostile.give("b", &good("b", nonce)));
    assert_ne!(master.who(&token(&other)).1["id"], ada["id"]);

    let before = master.accounts();
    let with = |key: &str, value: Value| {
        let (hostile, header, key) = (&hostile, &header, key.to_owned());
        move |nonce: &str| {
            let mut claims = hostile.claims("a", "eve", nonce);
            claims[&key] = value.clone();
            hostile.signed(header, &claims)
        }
    };
    let claims = |nonce: &str| hostile.claims("a", "eve", nonce);
    let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs();
    type Forge<'a> = Box<dyn Fn(&str) -> String + 'a>;
    let forgeries: Vec<(&str, Forge<'_>)> = vec![
        ("another nonce", Box::new(with("nonce", json!("AAAAAAAAAAAAAAAAAAAAAA")))),
        ("no nonce", Box::new(with("nonce", Value::Null))),
        ("another audience", Box::new(with("aud", json!("somebody-else")))),
        ("one audience too many", Box::new(with("aud", json!(["cocalc", "somebody-else"])))),
        ("no audience", Box::new(with("aud", json!([])))),
        ("for another party", Box::new(with("azp", json!("somebody-else")))),
        ("another issuer", Box::new(with("iss", json!(hostile.issuer("b"))))),
        ("expired", Box::new(with("exp", json!(now - 1)))),
        ("no end", Box::new(with("exp", Value::Null))),
        ("nobody", Box::new(with("sub", json!("")))),
        ("too long a name", Box::new(with("sub", json!("x".repeat(256))))),
        ("another access token", Box::new(with("at_hash", json!("AAAAAAAAAAAAAAAAAAAAAA")))),
        ("not signed", Box::new(|nonce| unsigned(&json!({ "alg": "none" }), &claims(nonce)) + ".")),
        ("None", Box::new(|nonce| unsigned(&json!({ "alg": "None" }), &claims(nonce)) + ".")),
        ("no signature", Box::new(|nonce| unsigned(&header, &claims(nonce)) + ".")),
        ("HMAC with our secret", Box::new(|nonce| with_hmac(&claims(nonce), SECRET.as_bytes()))),
        ("HMAC with its key", Box::new(|nonce| with_hmac(&claims(nonce), hostile.public_key().as_bytes()))),
        ("another key", Box::new(|nonce| Hostile::start().signed(&header, &claims(nonce)))),
        (
            "an unknown key",
            Box::new(|nonce| hostile.signed(&json!({ "alg": "EdDSA", "kid": "k2" }), &claims(nonce))),
        ),
        (
            "a critical header",
            Box::new(|nonce| {
                hostile.signed(&json!({ "alg": "EdDSA", "kid": "k1", "crit": ["x"], "x": 1 }), &claims(nonce))
            }),
        ),
        ("no token", Box::new(|_| "garbage".to_owned())),
        ("nothing", Box::new(|_| String::new())),
    ];
    for (what, forge) in &forgeries {
        let shown = attempt(&master, "a", |nonce| hostile.give("a", &forge(nonce)));
        assert!(matches!(shown.status, 403 | 503), "{what}: {shown:?}");
        assert!(!shown.text.contains("cct_"), "{what}");
    }

    // Answers that are none.
    let secret = "a-secret-that-came-back";
    let replies = [
        ("an error", Reply::Json(400, json!({ "error": "invalid_grant", "error_description": secret })), 403),
        ("no ID token", Reply::Json(200, json!({ "access_token": secret, "token_type": "Bearer" })), 403),
        ("a broken server", Reply::Json(500, json!({ "id_token": secret })), 503),
        ("another type", Reply::Json(200, json!({ "access_token": secret })), 503),
        ("elsewhere", Reply::Redirect(format!("{}/token", hostile.issuer("b"))), 503),
        ("without end", Reply::Endless, 503),
        ("no HTTP", Reply::Raw(b"\x00\xff\x00 a-secret-that-came-back\r\n\r\n"), 503),
        ("half of it", Reply::Raw(b"HTTP/1.1 200 X\r\ncontent-length: 100\r\n\r\n{"), 503),
    ];
    for (what, reply, status) in replies {
        let shown = attempt(&master, "a", |_| hostile.set("/a/token", reply.clone()));
        assert_eq!(shown.status, status, "{what}: {shown:?}");
    }
    // An access token that is no header's value, sent to the user info endpoint.
    let bad = attempt(&master, "a", |nonce| {
        let mut claims = hostile.claims("a", "ada", nonce);
        claims.as_object_mut().unwrap().remove("email");
        let id_token = hostile.signed(&header, &claims);
        let answer = json!({ "access_token": "a\nb", "token_type": "Bearer", "id_token": id_token });
        hostile.set("/a/token", Reply::Json(200, answer));
    });
    assert_eq!(master.who(&token(&bad)).1["id"], ada["id"]);

    assert_eq!(master.accounts(), before, "nobody was made up");
    // And after all that it goes on.
    let last = attempt(&master, "a", |nonce| hostile.give("a", &good("a", nonce)));
    assert_eq!(master.who(&token(&last)).1["id"], ada["id"]);
    let log = master.log();
    assert!(!log.contains("panicked") && !log.contains(secret) && !log.contains(SECRET), "{log}");
}

#[test]
fn a_provider_that_cannot_be_discovered_harms_nobody() {
    let hostile = Hostile::start();
    let path = |name: &str| format!("/{name}/.well-known/openid-configuration");
    let changed = |name: &str, key: &str, value: Value| {
        let mut document = hostile.discovery(name);
        document[key] = value;
        Reply::Json(200, document)
    };
    let plain = |name: &str, key: &str| changed(name, key, json!("http://id.example/x"));
    hostile.set_up("other");
    let cases = [
        ("silent", Reply::Silent),
        ("endless", Reply::Endless),
        ("elsewhere", Reply::Redirect(hostile.issuer("other") + "/.well-known/openid-configuration")),
        ("broken", Reply::Json(500, json!({}))),
        (
            "garbage",
            Reply::Raw(b"HTTP/1.1 200 X\r\ncontent-type: application/json\r\nconnection: close\r\n\r\n{{{"),
        ),
        ("liar", changed("liar", "issuer", json!(hostile.issuer("other")))),
        ("plain-auth", plain("plain-auth", "authorization_endpoint")),
        ("plain-keys", plain("plain-keys", "jwks_uri")),
        ("file-keys", changed("file-keys", "jwks_uri", json!("file:///etc/passwd"))),
        ("script", changed("script", "authorization_endpoint", json!("javascript:alert(1)"))),
        ("no-token", changed("no-token", "token_endpoint", Value::Null)),
        ("no-keys", Reply::Json(200, hostile.discovery("no-keys"))),
    ];
    for (name, reply) in &cases {
        hostile.set(&path(name), reply.clone());
    }
    // Discovered, and then it wants the secret sent in the clear.
    hostile.set_up("plain-token");
    hostile.set(&path("plain-token"), plain("plain-token", "token_endpoint"));
    let issuers: Vec<_> = cases.iter().map(|(name, _)| (*name, hostile.issuer(name))).collect();
    let mut issuers: Vec<_> = issuers.iter().map(|(name, issuer)| (*name, &**issuer)).collect();
    let plain_token = hostile.issuer("plain-token");
    issuers.push(("plain-token", &plain_token));
    let master = Master::start(free_port(), &issuers, "create_accounts = true");

    std::thread::scope(|scope| {
        for (name, _) in &cases {
            let start = master.start_of(name);
            // Several at once, who wait for the same answer.
            for _ in 0..3 {
                let start = start.clone();
                scope.spawn(move || {
                    let began = Instant::now();
                    let shown = Browser::default().get(&start);
                    assert_eq!(shown.status, 503, "{name}: {shown:?}");
                    assert!(began.elapsed() < Duration::from_secs(45), "{name}: {:?}", began.elapsed());
                });
            }
        }
        // Others are served meanwhile.
        assert_eq!(master.who(&master.admin()).0, 200);
    });
    let shown = attempt(&master, "plain-token", |_| ());
    assert_eq!(shown.status, 503, "{shown:?}");
    assert!(!master.log().contains("panicked"));
}
