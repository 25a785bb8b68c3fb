//! Apps and hosts that misbehave, projects that sleep, park and move.

use std::time::Duration;

use cocalc_core::{
    ids::{Epoch, HostId},
    router::{HostAddress, Reach},
};
use cocalc_http::{HostIngress, Served, TokenHost};
use tokio::time::timeout;

use crate::support::*;

const CODE: [&str; 4] = ["-o", "/dev/null", "-w", "%{http_code} %header{cocalc-code}"];

#[tokio::test(flavor = "multi_thread")]
async fn hostile_apps_hurt_only_their_own_users() {
    let world = World::new().await;
    let bearer = format!("Authorization: Bearer {}", world.token());
    for (address, base, _) in world.ways() {
        let url = format!("http://localhost:{}{base}{}", address.port(), world.mount());
        for (path, expected) in [
            ("closes", "502 app_error"),
            ("garbage", "502 app_error"),
            ("hugehead", "502 app_error"),
            ("split", "502 app_error"),
            ("fake101", "502 app_error"),
            ("moved", "421 "),
            ("both", "200 "),
            ("fine", "200 "),
        ] {
            let got = curl(&[&CODE[..], &["-H", &bearer, &format!("{url}/{path}")]].concat()).await;
            assert_eq!(got, expected, "{path} at {url}");
        }
        let request = |path: &str| {
            format!(
                "GET {base}{}/{path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{bearer}\r\n\r\n",
                world.mount()
            )
        };
        let cut = text(raw(address, request("cut")).await);
        assert!(cut.contains("0123456789") && cut.contains("content-length: 100"), "{cut}");
        let refused = format!("http://localhost:{}{base}/{}/port/1/", address.port(), world.project);
        assert_eq!(curl(&[&CODE[..], &["-H", &bearer, &refused]].concat()).await, "502 app_refused");
    }
    let direct = format!("http://localhost:{}{}", world.host_address.port(), world.mount());
    let silent = curl(&[&CODE[..], &["-H", &bearer, &format!("{direct}/silent")]].concat()).await;
    assert_eq!(silent, "504 app_timeout");
    assert!(world.app.has_seen("GET /fine"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closed_idle_connection_is_replaced() {
    let world = World::new().await;
    let bearer = format!("Authorization: Bearer {}", world.token());
    let url = format!("http://localhost:{}{}", world.host_address.port(), world.mount());
    for _ in 0..20 {
        assert_eq!(curl(&["-H", &bearer, &format!("{url}/once")]).await, "once");
    }
    let sent = curl(&["-H", &bearer, "-d", "12345", &format!("{url}/upload")]).await;
    assert_eq!(sent, "5");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_early_answer_reaches_the_sender() {
    let world = World::new().await;
    let request = format!(
        "POST {}/early HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {}\r\nContent-Length: 1000000\r\n\r\nxx",
        world.mount(),
        world.token()
    );
    let answer = text(raw(world.host_address, request).await);
    assert!(answer.starts_with("HTTP/1.1 413 ") && answer.ends_with("early"), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_stops_is_given_up() {
    let world = World::new().await;
    for (address, base, _) in world.ways() {
        let request = format!(
            "POST {base}{}/upload HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {}\r\nContent-Length: 1000000\r\n\r\nxx",
            world.mount(),
            world.token()
        );
        let answer = raw(address, request).await;
        let outcomes = outcomes(&answer);
        assert_eq!(outcomes.len(), 1, "{}", text(answer));
        assert!([408, 502, 504].contains(&outcomes[0].0), "{outcomes:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_project_is_woken() {
    let world = World::new().await;
    *world.ports.running.lock().unwrap() = false;
    let bearer = format!("Authorization: Bearer {}", world.token());
    let url = format!("http://localhost:{}{}/x", world.host_address.port(), world.mount());
    let page = curl(&["-i", "-H", "Accept: text/html", "-H", &bearer, &url]).await;
    assert!(page.starts_with("HTTP/1.1 503 ") && page.contains("retry-after: 1\r\n"), "{page}");
    assert!(
        page.contains("mounting &lt;home&gt;") && page.contains("http-equiv=\"refresh\" content=\"1;url=?\""),
        "{page}"
    );
    assert!(page.contains("cocalc-code: project_starting"), "{page}");
    assert!(!page.contains("no such file"), "what it wrote is on its own page only: {page}");
    *world.wake.calls.lock().unwrap() = 0;
    let front = format!("http://localhost:{}/{}/", world.host_address.port(), world.project);
    let page = curl(&["-H", "Accept: text/html", "-H", &bearer, &front]).await;
    assert!(page.contains("startup: &lt;b&gt;no such file&lt;/b&gt;"), "{page}");
    assert!(!page.contains("<script"), "it works without: {page}");
    *world.wake.calls.lock().unwrap() = 0;
    world.auth.viewers.store(true, std::sync::atomic::Ordering::Relaxed);
    let page = curl(&["-H", "Accept: text/html", "-H", &bearer, &front]).await;
    assert!(page.contains("mounting") && !page.contains("no such file"), "{page}");
    *world.wake.calls.lock().unwrap() = 1;
    assert!(curl(&["-H", &bearer, &url]).await.starts_with("GET /x "));
    assert_eq!(*world.wake.calls.lock().unwrap(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn parked_requests_wait_and_are_bounded() {
    let world = World::new().await;
    world.table.set(world.project, world.host, 1, Reach::Parked);
    let bearer = format!("Authorization: Bearer {}", world.token());
    let url = format!("http://localhost:{}{}/parked", world.host_address.port(), world.mount());
    let waiting: Vec<_> = (0..2)
        .map(|_| {
            let (bearer, url) = (bearer.clone(), url.clone());
            tokio::spawn(async move { curl(&["-H", &bearer, &url]).await })
        })
        .collect();
    eventually("two requests wait", || world.table.waiting() == 2).await;
    assert_eq!(curl(&[&CODE[..], &["-H", &bearer, &url]].concat()).await, "503 project_parked");
    world.table.set(world.project, world.host, 2, Reach::Local);
    for waiting in waiting {
        let answer = timeout(DEADLINE, waiting).await.unwrap().unwrap();
        assert!(answer.starts_with("GET /parked "), "{answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parked_request_is_given_up_in_time() {
    let limits = cocalc_http::Limits { parked_wait: Duration::from_millis(100), ..quick() };
    let world = World::with(limits).await;
    world.table.set(world.project, world.host, 1, Reach::Parked);
    let bearer = format!("Authorization: Bearer {}", world.token());
    let url = format!("http://localhost:{}{}/parked", world.host_address.port(), world.mount());
    let answer = curl(&["-i", "-H", &bearer, &url]).await;
    assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("retry-after: "), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_moved_project_is_followed() {
    let world = World::new().await;
    let (id, next) = (world.project, HostId::random());
    let new_address = HostAddress {
        url: "http://127.0.0.1:7820".to_owned(),
        domain: "beta.localhost:7820".to_owned(),
        ..HostAddress::default()
    };
    // The new owner, known to the old one but not yet to the proxy.
    let table = Table::new();
    table.set(id, next, 2, Reach::Local);
    let ingress = HostIngress::builder(next, world.auth.clone(), table, world.ports.clone()).build();
    world.pipes.0.lock().unwrap().insert(next, ingress);
    world.table.set(id, next, 2, Reach::Remote(new_address));

    let bearer = format!("Authorization: Bearer {}", world.token());
    let port = world.host_address.port();
    let by_path = format!("http://localhost:{port}{}/x?y=1&cocalc_token=z", world.mount());
    let problem: serde_json::Value = serde_json::from_str(&curl(&["-H", &bearer, &by_path]).await).unwrap();
    assert_eq!(problem["code"], "project_moved");
    assert_eq!(problem["location"], format!("http://127.0.0.1:7820{}/x?y=1", world.mount()));
    let own = format!("http://{id}.alpha.localhost:{port}/port/80/x");
    let browser = curl(&["-i", "-H", &bearer, "-H", "Accept: text/html", &own]).await;
    assert!(browser.starts_with("HTTP/1.1 307 "), "{browser}");
    assert!(
        browser.contains(&format!("location: http://{id}.beta.localhost:7820/port/80/x\r\n")),
        "{browser}"
    );
    assert_eq!(curl(&[&CODE[..], &[&own]].concat()).await, "401 unauthenticated");

    let proxied = format!("http://localhost:{}/some/base{}", world.proxy_address.port(), world.mount());
    let seen = curl(&["-H", &bearer, &format!("{proxied}/x")]).await;
    assert!(seen.starts_with("GET /x "), "{seen}");
    assert_eq!(curl(&["-H", &bearer, "-d", "12345", &format!("{proxied}/upload")]).await, "5");
    // Once the news has reached the proxy, it goes there at once.
    world.pipes.0.lock().unwrap().remove(&world.host);
    let gone = curl(&[&CODE[..], &["-H", &bearer, &proxied]].concat()).await;
    assert_eq!(gone, "502 host_unreachable");
    world.proxy_table.set(id, next, 2, Reach::Remote(HostAddress::default()));
    assert!(curl(&["-H", &bearer, &format!("{proxied}/x")]).await.starts_with("GET /x "));
    world.proxy_table.set(id, world.host, 3, Reach::Remote(HostAddress::default()));
    world.pipes.0.lock().unwrap().insert(world.host, world.ingress.clone());
    // Too large to be sent twice: the client is asked to come back.
    let big = format!("@{}", env!("CARGO_MANIFEST_DIR").to_owned() + "/../../Cargo.lock");
    let again =
        curl(&[&CODE[..], &["-H", &bearer, "--data-binary", &big, &format!("{proxied}/upload")]].concat())
            .await;
    assert_eq!(again, "503 project_moved");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_for_the_former_host_is_told_so_at_the_proxy() {
    let world = World::new().await;
    let (id, next) = (world.project, HostId::random());
    let epoch = |number| Epoch::new(number).unwrap();
    let bearer = format!("Authorization: Bearer {}", world.token());
    let proxied = format!("http://localhost:{}/some/base{}/x", world.proxy_address.port(), world.mount());
    let only = |host, number| {
        *world.auth.only_host.lock().unwrap() = Some(TokenHost { host, epoch: epoch(number) });
    };
    only(world.host, 1);
    assert!(curl(&["-H", &bearer, &proxied]).await.starts_with("GET /x "));
    // It has moved: the address stays, and another token is needed.
    world.proxy_table.set(id, next, 2, Reach::Remote(HostAddress::default()));
    let answer = curl(&["-H", &bearer, &proxied]).await;
    let problem: serde_json::Value = serde_json::from_str(&answer).unwrap();
    assert_eq!((&problem["status"], &problem["code"]), (&421.into(), &"project_moved".into()), "{answer}");
    assert_eq!(problem["location"], proxied, "{answer}");
    // A token of a later epoch than the proxy has heard of goes to its host.
    only(world.host, 3);
    assert!(curl(&["-H", &bearer, &proxied]).await.starts_with("GET /x "));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_out_of_reach_has_a_code() {
    let world = World::new().await;
    world.pipes.0.lock().unwrap().clear();
    let bearer = format!("Authorization: Bearer {}", world.token());
    let url = format!("http://localhost:{}/some/base{}/x", world.proxy_address.port(), world.mount());
    assert_eq!(curl(&[&CODE[..], &["-H", &bearer, &url]].concat()).await, "502 host_unreachable");
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_of_one_address_are_bounded() {
    let limits = cocalc_http::Limits { connections_per_source: 3, ..quick() };
    let world = World::with(limits).await;
    let mut held = Vec::new();
    for n in 1..=3 {
        held.push(tokio::net::TcpStream::connect(world.host_address).await.unwrap());
        eventually("it is counted", || world.ingress.stats().connections == n).await;
    }
    assert!(raw(world.host_address, "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").await.is_empty());
    drop(held);
    eventually("they are gone", || world.ingress.stats().connections == 0).await;
    let answer =
        raw(world.host_address, "GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").await;
    assert_eq!(outcomes(&answer), [(404, "not_found".to_owned())]);
}

#[test]
fn served_names_are_checked_when_built() {
    assert!(Served::new().domain("Alpha.localhost").is_err());
}
