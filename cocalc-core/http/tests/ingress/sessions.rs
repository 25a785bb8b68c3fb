//! Tokens, sessions, denials: with real curl, directly and through a proxy.

use std::time::Duration;

use cocalc_core::{auth::Tier, ids::ProjectId};
use cocalc_http::{Body, Client, Limits};
use serde_json::json;

use crate::support::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_token_in_the_address_becomes_a_session() {
    let world = World::new().await;
    let (id, app) = (world.project, world.app.port);
    for (address, base, name) in world.ways() {
        let port = address.port();
        let by_path = format!("http://127.0.0.1:{port}{base}/{id}/port/{app}/x%2Fy");
        let own = format!("http://{id}.{name}.localhost:{port}/port/{app}/x%2Fy");
        let of_port = format!("http://{app}--{id}.{name}.localhost:{port}/x%2Fy");
        for url in [by_path, own, of_port] {
            let token = token(id, json!({ "once": true }));
            let with_token = format!("{url}?a=%20b&cocalc_token={token}&c");
            let redirect = curl(&["-i", &with_token]).await;
            let path = url.splitn(4, '/').nth(3).unwrap();
            assert!(redirect.starts_with("HTTP/1.1 303 "), "{redirect}");
            assert!(redirect.contains(&format!("location: /{path}?a=%20b&c\r\n")), "{redirect}");
            assert!(redirect.contains("referrer-policy: no-referrer\r\n"), "{redirect}");
            assert!(redirect.contains("cache-control: no-store\r\n"), "{redirect}");
            let own_origin = !url.contains("127.0.0.1");
            let (prefix, scope) = if own_origin {
                ("__Host-", "Path=/;".to_owned())
            } else {
                ("", format!("Path={base}/{id}/;"))
            };
            let cookie = redirect.lines().find(|line| line.contains("Partitioned")).unwrap();
            assert!(
                cookie.contains(&format!("set-cookie: {prefix}cocalc-session-{}=", world.host)),
                "{cookie}"
            );
            assert!(cookie.contains(&scope), "{cookie}");
            assert!(cookie.contains("HttpOnly; Secure; SameSite=None; Partitioned"), "{cookie}");
            let again =
                curl(&["-o", "/dev/null", "-w", "%{http_code} %header{cocalc-code}", &with_token]).await;
            assert_eq!(again, "403 access_denied", "a one-use token is used up");

            // The secure cookie works as browsers send it.
            let pair = cookie.split_once(": ").unwrap().1.split(';').next().unwrap();
            let seen = curl(&["-H", &format!("Cookie: mine=1; {pair}"), &format!("{url}?q")]).await;
            let target = if url.contains(&format!("{app}--")) { "/x%2Fy" } else { &format!("/{path}") };
            assert!(seen.starts_with(&format!("GET {target}?q HTTP/1.1\r\n")), "{seen}");
            assert!(seen.to_lowercase().contains("cookie: mine=1\r\n"), "{seen}");

            // And a cookie jar of a program that only knows HTTP.
            let once = self::token(id, json!({ "once": true }));
            let jar = curl(&["-L", "-c", "-", "-b", "", &format!("{url}?cocalc_token={once}")]).await;
            assert!(jar.starts_with(&format!("GET {target} HTTP/1.1\r\n")), "{jar}");
            for secret in [&token, &once, "session-"] {
                assert!(!world.app.has_seen(secret), "the app saw {secret}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_posted_token_becomes_a_session() {
    let world = World::new().await;
    let (id, app) = (world.project, world.app.port);
    for (address, base, name) in world.ways() {
        let port = address.port();
        let places = [
            (format!("http://127.0.0.1:{port}{base}/{id}"), format!("{base}/{id}"), ""),
            (format!("http://127.0.0.1:{port}{base}"), format!("{base}/{id}"), ""),
            (format!("http://{id}.{name}.localhost:{port}"), String::new(), "__Host-"),
        ];
        for (place, mount, prefix) in places {
            let url = format!("{place}/.cocalc/session");
            let token = world.token();
            let by_header =
                curl(&["-i", "-X", "POST", "-H", &format!("Authorization: Bearer {token}"), &url]).await;
            assert!(by_header.starts_with("HTTP/1.1 303 "), "{by_header}");
            assert!(by_header.contains(&format!("location: {mount}/\r\n")), "{by_header}");
            assert!(by_header.contains(&format!("set-cookie: {prefix}cocalc-session-")), "{by_header}");
            let field = format!("cocalc_token={token}");
            for (next, location) in [
                (format!("{mount}/port/{app}/?a"), format!("{mount}/port/{app}/?a")),
                ("https://evil.example/".to_owned(), format!("{mount}/")),
                ("//evil.example/".to_owned(), format!("{mount}/")),
                (format!("{mount}/../x"), format!("{mount}/")),
            ] {
                let next = format!("next={next}");
                let by_form =
                    curl(&["-i", "--data-urlencode", &field, "--data-urlencode", &next, &url]).await;
                assert!(by_form.starts_with("HTTP/1.1 303 "), "{by_form}");
                assert!(by_form.contains(&format!("location: {location}\r\n")), "{by_form}");
            }
            let code = ["-o", "/dev/null", "-w", "%{http_code} %header{cocalc-code}"];
            let get = curl(&[&code[..], &[&url]].concat()).await;
            let none = curl(&[&code[..], &["-X", "POST", &url]].concat()).await;
            let bad = curl(&[&code[..], &["-d", "cocalc_token=x.y.z", &url]].concat()).await;
            assert!(get == "405 method_not_allowed" || get == "401 unauthenticated", "{get}");
            assert_eq!((&*none, &*bad), ("401 unauthenticated", "403 access_denied"));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn denials_tell_no_more_than_they_must() {
    let world = World::new().await;
    let (id, other) = (world.project, ProjectId::random());
    let tampered = format!("{}x", world.token());
    let expired = token(id, json!({ "expired": true }));
    let foreign = token(other, json!({}));
    let good = world.token();
    let once = token(id, json!({ "once": true }));
    let cases = [
        (id, None, "401 unauthenticated"),
        (other, None, "401 unauthenticated"),
        (id, Some(&*expired), "401 token_expired"),
        (id, Some(&tampered), "403 access_denied"),
        (id, Some(&foreign), "403 access_denied"),
        (id, Some("not-a-token"), "403 access_denied"),
        (id, Some(&once), "403 access_denied"),
        (other, Some(&foreign), "403 access_denied"),
        (id, Some(&good), "200 "),
    ];
    for (address, base, _) in world.ways() {
        for (project, token, expected) in &cases {
            let url = format!("http://127.0.0.1:{}{base}/{project}/port/{}/", address.port(), world.app.port);
            let field = token.map(|token| format!("Authorization: Bearer {token}"));
            let mut arguments = vec!["-o", "/dev/null", "-w", "%{http_code} %header{cocalc-code}", &url];
            if let Some(field) = &field {
                arguments.extend(["-H", field]);
            }
            assert_eq!(curl(&arguments).await, *expected, "{token:?} at {url}");
            arguments.extend(["-H", "Connection: Upgrade", "-H", "Upgrade: websocket"]);
            arguments.extend(["-H", "Sec-WebSocket-Version: 13"]);
            arguments.extend(["-H", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="]);
            assert_eq!(curl(&arguments).await, *expected, "WebSocket, {token:?} at {url}");
        }
        let url = format!("http://127.0.0.1:{}{base}/{id}/port/1/", address.port());
        let json = curl(&[&url]).await;
        let problem: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!((&problem["code"], &problem["status"]), (&json!("unauthenticated"), &json!(401)));
        assert!(problem["message"].is_string());
        let page = curl(&["-i", "-H", "Accept: text/html,*/*;q=0.8", &url]).await;
        assert!(page.contains("content-type: text/html") && page.contains("<h1>Sign in"), "{page}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn apps_see_the_user_and_nothing_else() {
    let world = World::new().await;
    let (id, app) = (world.project, world.app.port);
    for (address, base, _) in world.ways() {
        let port = address.port();
        let bearer = format!("Authorization: Bearer {}", world.token());
        let url = format!("http://localhost:{port}{base}{}/h?x=1", world.mount());
        let seen = curl(&[
            "-H",
            &bearer,
            "-H",
            "X-Forwarded-For: 6.6.6.6",
            "-H",
            "X-Forwarded-Host: evil.example",
            "-H",
            "Forwarded: for=6.6.6.6",
            "-H",
            "X-Real-IP: 6.6.6.6",
            "-H",
            "Cocalc-Account: root",
            "-H",
            "Connection: X-Hop",
            "-H",
            "X-Hop: 1",
            "-H",
            "TE: gzip, trailers",
            "-H",
            "Mine: kept",
            "-H",
            "Referer: http://x/?cocalc_token=abc",
            &url,
        ])
        .await
        .to_lowercase();
        assert!(seen.starts_with("get /h?x=1 http/1.1\r\n"), "{seen}");
        for gone in [
            "6.6.6.6",
            "evil",
            "bearer",
            "authorization",
            "cocalc-",
            "x-hop",
            "gzip",
            "cocalc_token",
            "internal",
        ] {
            assert!(!seen.contains(gone), "{gone} in {seen}");
        }
        for here in [
            "mine: kept".to_owned(),
            "connection: te\r\nte: trailers".to_owned(),
            format!("host: localhost:{port}"),
            format!("x-forwarded-host: localhost:{port}"),
            "x-forwarded-proto: http".to_owned(),
            "x-forwarded-for: 127.0.0.1".to_owned(),
            format!("x-forwarded-prefix: {base}/{id}/proxy/{app}"),
        ] {
            assert!(seen.contains(&format!("\r\n{here}\r\n")), "{here} not in {seen}");
        }
        let whole =
            curl(&["-H", &bearer, &format!("http://localhost:{port}{base}/{id}/port/{app}/a//b/../%2e?")])
                .await;
        let path_as_is = curl(&[
            "--path-as-is",
            "-H",
            &bearer,
            &format!("http://localhost:{port}{base}/{id}/port/{app}/a//b/../%2e"),
        ])
        .await;
        assert!(
            path_as_is.starts_with(&format!("GET {base}/{id}/port/{app}/a//b/../%2e HTTP/1.1\r\n")),
            "{path_as_is}"
        );
        assert!(whole.starts_with("GET "), "{whole}");

        let cookies =
            curl(&["-i", "-H", &bearer, &format!("http://localhost:{port}{base}{}/cookies", world.mount())])
                .await;
        assert!(
            cookies.contains(&format!("set-cookie: a=b; Path={base}/{id}/proxy/{app}/\r\n")),
            "{cookies}"
        );
        assert!(!cookies.contains("session") && !cookies.contains("x-hop"), "{cookies}");
        assert!(cookies.contains("content-security-policy: frame-ancestors 'self'\r\n"), "{cookies}");

        // A bearer of the app's own passes when a session says who asks.
        let opened = curl(&[
            "-i",
            "-X",
            "POST",
            "-H",
            &bearer,
            &format!("http://localhost:{port}{base}/{id}/.cocalc/session"),
        ])
        .await;
        let cookie = opened.lines().find_map(|line| line.strip_prefix("set-cookie: ")).unwrap();
        let pair = format!("Cookie: {}", cookie.split(';').next().unwrap());
        let own = curl(&["-H", &pair, "-H", "Authorization: Bearer sk-app", &url]).await.to_lowercase();
        assert!(own.contains("authorization: bearer sk-app\r\n") && !own.contains("cocalc-"), "{own}");

        // What another site makes a browser do is refused.
        let code = ["-o", "/dev/null", "-w", "%{http_code} %header{cocalc-code}", "-H", &pair, "-X", "POST"];
        let here = format!("Origin: http://localhost:{port}");
        assert_eq!(
            curl(&[&code[..], &["-H", "Origin: http://evil.example", &url]].concat()).await,
            "403 origin_refused"
        );
        assert_eq!(curl(&[&code[..], &["-H", &here, &url]].concat()).await, "200 ");
    }
}

/// An app of another project on the same origin can set a cookie of our name
/// for a path above or below. It neither lets anybody in nor keeps out who has
/// a session.
#[tokio::test(flavor = "multi_thread")]
async fn planted_cookies_are_passed_over_and_two_people_are_refused() {
    let world = World::new().await;
    let url = format!("http://127.0.0.1:{}{}/x", world.host_address.port(), world.mount());
    let posted = format!("http://127.0.0.1:{}/{}/.cocalc/session", world.host_address.port(), world.project);
    let name = format!("cocalc-session-{}", world.host);
    let session = async || {
        let bearer = format!("Authorization: Bearer {}", world.token());
        let opened = curl(&["-i", "-X", "POST", "-H", &bearer, &posted]).await;
        let field = opened.lines().find(|line| line.contains(&format!("{name}="))).unwrap();
        field.split_once('=').unwrap().1.split(';').next().unwrap().to_owned()
    };
    let (mine, theirs) = (session().await, session().await);
    let crowd: Vec<String> = (0..17).map(|n| format!("{name}=planted{n}")).collect();
    let crowd = crowd.join("; ");
    for (cookies, expected) in [
        (format!("{name}=a; {name}=b"), "403 access_denied"),
        (format!("{name}={mine}"), "200 "),
        (format!("{name}=planted; {name}={mine}"), "200 "),
        (format!("{name}={mine}; {name}=planted; {name}="), "200 "),
        (format!("{name}={mine}; {name}={mine}"), "200 "),
        (format!("odd=\u{e9}; {name}={mine}"), "200 "),
        (format!("cocalc-session-http-{}={theirs}; {name}={mine}", world.host), "200 "),
        (format!("{name}={theirs}; {name}={mine}"), "403 session_conflict"),
        (format!("{crowd}; {name}={mine}"), "403 session_conflict"),
    ] {
        let field = format!("Cookie: {cookies}");
        let code = ["-o", "/dev/null", "-w", "%{http_code} %header{cocalc-code}", "-H", &field, &url];
        assert_eq!(curl(&code).await, expected, "{cookies}");
    }
    let told = curl(&["-H", &format!("Cookie: {name}={theirs}; {name}={mine}"), &url]).await;
    assert!(told.contains("Delete the cookies of this site"), "{told}");
    for secret in ["planted", &mine, &theirs] {
        assert!(!world.app.has_seen(secret), "the app saw {secret}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn grace_is_noticed() {
    let world = World::new().await;
    let url = format!("http://127.0.0.1:{}{}/x", world.host_address.port(), world.mount());
    *world.auth.tier.lock().unwrap() = Tier::Grace;
    let bearer = format!("Authorization: Bearer {}", world.token());
    let tier = ["-o", "/dev/null", "-w", "%{http_code} %header{cocalc-tier}", "-H", &bearer, &url];
    assert_eq!(curl(&tier).await, "200 grace");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_denied_too_often_waits() {
    let limits = Limits { failures_per_source: 20, failure_recovery: Duration::from_secs(3600), ..quick() };
    let world = World::with(limits).await;
    let code = ["-o", "/dev/null", "-w", "%{http_code} %header{cocalc-code} %header{retry-after}"];
    let good = format!("Authorization: Bearer {}", world.token());
    let bad = format!("{good}x");
    for (address, base, _) in world.ways() {
        let origin = format!("http://127.0.0.1:{}", address.port());
        let url = format!("{origin}{base}{}/", world.mount());
        let answer = async |more: &[&str]| curl(&[&code[..], more].concat()).await;
        for _ in 0..30 {
            // Nobody has shown anything: not a failure.
            assert_eq!(answer(&[&url]).await, "401 unauthenticated ");
        }
        for _ in 0..20 {
            assert_eq!(answer(&["-H", &bad, &url]).await, "403 access_denied ");
        }
        for refused in [
            answer(&["-H", &bad, &url]).await,
            answer(&["-H", &good, &url]).await,
            answer(&["-d", "cocalc_token=x.y.z", &format!("{origin}{base}/.cocalc/session")]).await,
        ] {
            let (problem, after) = refused.rsplit_once(' ').unwrap();
            assert_eq!(problem, "429 rate_limited");
            assert!((3500..=3600).contains(&after.parse().unwrap()), "{after}");
        }
        let own = answer(&[&format!("{origin}{base}/healthz")]).await;
        assert!(!own.starts_with("429"), "what is the daemon's own is answered: {own}");
        let elsewhere = answer(&["--interface", "127.0.0.2", "-H", &good, &url]).await;
        assert_eq!(elsewhere, "200  ", "another address");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_proxy_passes_on_counts_for_the_user() {
    let limits = Limits { failures_per_source: 20, failure_recovery: Duration::from_secs(3600), ..quick() };
    let world = World::with(limits).await;
    let url = format!("http://127.0.0.1:{}/some/base{}/", world.proxy_address.port(), world.mount());
    // A proxy lets it pass; only the host knows that it opens no connection.
    let once = token(world.project, json!({ "once": true }));
    let field = format!("Authorization: Bearer {once}");
    let code = ["-o", "/dev/null", "-w", "%{http_code}", "-H", &field, &url];
    for n in 0..21 {
        assert_eq!(curl(&code).await, if n < 20 { "403" } else { "429" });
    }
    assert_eq!(curl(&[&code[..], &["--interface", "127.0.0.2"]].concat()).await, "403");
}

#[tokio::test(flavor = "multi_thread")]
async fn over_https_a_cookie_that_any_sibling_can_set_opens_nothing() {
    let world = World::new().await;
    let id = world.project;
    let own = format!("{id}.alpha.localhost:{}", world.host_address.port());
    let path = format!("/port/{}/", world.app.port);
    let posted = format!("http://{own}/.cocalc/session");
    let bearer = format!("Authorization: Bearer {}", world.token());
    let opened = curl(&["-i", "-X", "POST", "-H", &bearer, &posted]).await;
    let session = |name: &str| {
        let field = opened.lines().find(|line| line.contains(name)).unwrap();
        field.split_once(": ").unwrap().1.split(';').next().unwrap().to_owned()
    };
    let (plain, secure) = (session("cocalc-session-http-"), session("__Host-"));
    let front = Client { address: Some([192, 0, 2, 1].into()), trusted: true };
    for (cookie, scheme, expected) in
        [(&plain, "http", 200), (&plain, "https", 401), (&secure, "http", 200), (&secure, "https", 200)]
    {
        let request = http::Request::get(&path)
            .header("host", &own)
            .header("x-forwarded-proto", scheme)
            .header("cookie", cookie)
            .body(Body::empty())
            .unwrap();
        let status = world.ingress.handle(request, front).await.status();
        assert_eq!(status, expected, "{cookie} over {scheme}");
    }
}
