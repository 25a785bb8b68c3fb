//! HTTPS and HTTP/2, with curl and Node from outside.

use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use cocalc_core::router::Reach;
use cocalc_http::Tls;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::support::*;

/// Certificates of the names that are served, in files.
pub(crate) struct Certificates(tempfile::TempDir);

impl Certificates {
    pub(crate) fn new() -> Self {
        let this = Self(tempfile::tempdir().unwrap());
        this.renew();
        this
    }

    /// Replaces both files.
    fn renew(&self) {
        let names = ["localhost", "*.alpha.localhost", "*.proxy.localhost"].map(str::to_owned);
        let made = rcgen::generate_simple_self_signed(names).unwrap();
        std::fs::write(self.path("cert.pem"), made.cert.pem()).unwrap();
        std::fs::write(self.path("key.pem"), made.signing_key.serialize_pem()).unwrap();
    }

    pub(crate) fn path(&self, name: &str) -> std::path::PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn tls(&self) -> Tls {
        Tls::open(&self.path("cert.pem"), &self.path("key.pem")).unwrap()
    }

    pub(crate) fn shown(&self) -> CertificateDer<'static> {
        CertificateDer::from_pem_file(self.path("cert.pem")).unwrap()
    }
}

/// A connection in HTTP/1.1 that trusts only `certificate`.
async fn connect(
    address: SocketAddr,
    certificate: CertificateDer<'static>,
) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(certificate).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let stream = TcpStream::connect(address).await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    timeout(DEADLINE, TlsConnector::from(Arc::new(config)).connect(name, stream)).await.unwrap()
}

/// Runs a program of Node's, and returns what it printed.
pub(crate) async fn node(certificate: &Path, program: &str, arguments: &[&str]) -> String {
    let run = tokio::process::Command::new("node")
        .env("NODE_EXTRA_CA_CERTS", certificate)
        .args(["-e", program, "--"])
        .args(arguments)
        .kill_on_drop(true)
        .output();
    let output = timeout(DEADLINE * 3, run).await.unwrap().expect("node is needed");
    assert!(output.status.success(), "{output:?}");
    text(output.stdout)
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_come_over_both_versions() {
    let files = Certificates::new();
    let world = World::over(quick(), Some(files.tls())).await;
    let certificate = files.path("cert.pem");
    let bearer = format!("Authorization: Bearer {}", world.token());
    for (address, base, name) in world.ways() {
        let url = format!("https://localhost:{}{base}{}", address.port(), world.mount());
        let project = format!("{}.{name}.localhost:{}", world.project, address.port());
        let own = format!("https://{project}/proxy/{}/own", world.app.port);
        let resolve = format!("{project}:127.0.0.1");
        for (option, version) in [("--http2", "2"), ("--http1.1", "1.1")] {
            let ask = async |more: &[&str]| {
                let always = ["--cacert", certificate.to_str().unwrap(), option, "-H", &bearer];
                curl(&[&always[..], more].concat()).await
            };
            let answer = ask(&["-w", "%{http_version}", "-H", "Cookie: a=1", &format!("{url}/x")]).await;
            assert!(answer.starts_with("GET /x HTTP/1.1\r\n") && answer.ends_with(version), "{answer}");
            assert!(answer.to_lowercase().contains("x-forwarded-proto: https\r\n"), "{answer}");
            assert!(!answer.contains("Bearer"), "{answer}");
            assert!(ask(&["--resolve", &resolve, &own]).await.starts_with("GET /own "));
            // Bodies, up and down.
            let upload = ask(&["--data-binary", &"x".repeat(100_000), &format!("{url}/upload")]).await;
            assert_eq!(upload, "100000");
            let size = ask(&["-o", "/dev/null", "-w", "%{size_download}", &format!("{url}/big")]).await;
            assert_eq!(size, "8388608");
            // A request for another name than that of the connection.
            let evil = format!("{url}/evil");
            let misdirected = ask(&[&CODE[..], &["-H", "Host: other.localhost", &evil]].concat()).await;
            assert_eq!(misdirected, "421 host_mismatch");
        }
    }
    assert!(!world.app.has_seen("evil"));
}

const CODE: [&str; 4] = ["-o", "/dev/null", "-w", "%{http_code} %header{cocalc-code}"];

/// Opens a WebSocket by extended CONNECT, sends one message, prints what comes
/// back, and what other requests on the same connection lead to.
const SOCKET: &str = r#"
const [url, path, page, bearer] = process.argv.slice(-4);
const http2 = require('node:http2');
const client = http2.connect(url);
const fail = (error) => { console.error(error); process.exit(1); };
client.on('error', fail);
const ask = (fields, onOpen) => new Promise((resolve) => {
  const stream = client.request({ authorization: bearer, ...fields }, { endStream: false });
  stream.on('error', (error) => resolve('error ' + error.code));
  stream.on('response', (headers) => onOpen(stream, headers, resolve));
});
const status = (stream, headers, resolve) => { resolve(headers[':status'] + ' ' + (headers['cocalc-code'] ?? '')); stream.close(); };
client.on('remoteSettings', async (settings) => {
  console.log('connect protocol', settings.enableConnectProtocol);
  const socket = { ':method': 'CONNECT', ':protocol': 'websocket', 'sec-websocket-version': '13' };
  console.log(await ask({ ...socket, ':path': path }, (stream, headers, resolve) => {
    if (headers[':status'] !== 200 || headers['upgrade'] || headers['sec-websocket-accept']) fail(headers);
    const mask = [1, 2, 3, 4];
    const text = [...Buffer.from('hello')].map((byte, i) => byte ^ mask[i % 4]);
    stream.write(Buffer.from([0x81, 0x80 | text.length, ...mask, ...text]));
    let seen = Buffer.alloc(0);
    stream.on('data', (data) => {
      seen = Buffer.concat([seen, data]);
      if (seen.length >= 7) { resolve(seen.toString('latin1').slice(2)); stream.close(); }
    });
  }));
  console.log(await ask({ ...socket, ':path': page }, status));
  console.log(await ask({ ...socket, ':path': path, ':protocol': 'bytes' }, status));
  console.log(await ask({ ...socket, ':path': path, authorization: 'Bearer x' }, status));
  console.log(await ask({ ':method': 'CONNECT', ':authority': new URL(url).host }, status));
  client.destroy();
});
"#;

#[tokio::test(flavor = "multi_thread")]
async fn websockets_open_over_http2() {
    let files = Certificates::new();
    let world = World::over(quick(), Some(files.tls())).await;
    for (address, base, _) in world.ways() {
        let url = format!("https://localhost:{}", address.port());
        let path = format!("{base}/{}/port/{}/ws", world.project, world.echo);
        let page = format!("{base}{}/page", world.mount());
        let bearer = format!("Bearer {}", world.token());
        let said = node(&files.path("cert.pem"), SOCKET, &[&url, &path, &page, &bearer]).await;
        let lines: Vec<&str> = said.lines().collect();
        // An app that answers with a page did not open one.
        let expected = ["connect protocol true", "hello", "502 app_error", "501 protocol_unknown"];
        assert_eq!(lines[..4], expected, "{said}");
        assert_eq!(lines[4], "403 access_denied", "{said}");
        assert_eq!(lines[5], "405 method_not_allowed", "{said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_replaced_under_open_connections() {
    let files = Certificates::new();
    let tls = files.tls();
    let world = World::over(quick(), Some(tls.clone())).await;
    let (old, address) = (files.shown(), world.host_address);
    let mut open = connect(address, old.clone()).await.unwrap();
    let request = format!(
        "GET {}/x HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {}\r\n\r\n",
        world.mount(),
        world.token()
    );
    let mut buffer = vec![0; 4096];
    let mut ask = async |stream: &mut TlsStream<TcpStream>| {
        stream.write_all(request.as_bytes()).await.unwrap();
        let read = timeout(DEADLINE, stream.read(&mut buffer)).await.unwrap().unwrap();
        assert!(buffer[..read].starts_with(b"HTTP/1.1 200 OK\r\n"), "{}", text(buffer[..read].to_vec()));
    };
    ask(&mut open).await;
    assert!(!tls.reload().unwrap(), "nothing has changed");

    // One file is new, the other one not yet: what was shown goes on.
    let key = std::fs::read(files.path("key.pem")).unwrap();
    files.renew();
    let new_key = std::fs::read(files.path("key.pem")).unwrap();
    std::fs::write(files.path("key.pem"), key).unwrap();
    tls.reload().unwrap_err();
    connect(address, old.clone()).await.unwrap();

    std::fs::write(files.path("key.pem"), new_key).unwrap();
    assert!(tls.reload().unwrap());
    let mut new = connect(address, files.shown()).await.unwrap();
    connect(address, old).await.unwrap_err();
    ask(&mut new).await;
    ask(&mut open).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_shakes_no_hands_holds_up_nobody() {
    let files = Certificates::new();
    let mut world = World::over(quick(), Some(files.tls())).await;
    let _silent = TcpStream::connect(world.host_address).await.unwrap();
    // Plain HTTP where HTTPS is spoken gets no answer in it.
    let plain = raw(world.host_address, "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
    assert!(!plain.starts_with(b"HTTP/"), "{plain:?}");
    connect(world.host_address, files.shown()).await.unwrap();
    world.shut_down().await;
}

/// Keeps a slow response open, and prints what comes.
const DRAINED: &str = r#"
const [url, path, bearer] = process.argv.slice(-3);
const client = require('node:http2').connect(url);
client.on('error', (error) => console.log('error', error.code));
client.on('goaway', (code) => console.log('goaway', code));
client.on('close', () => process.exit(0));
const stream = client.request({ ':path': path, authorization: bearer });
stream.on('error', () => {});
stream.once('data', (data) => console.log('data', data.toString().trim()));
stream.resume();
"#;

#[tokio::test(flavor = "multi_thread")]
async fn draining_tells_http2_clients() {
    let files = Certificates::new();
    let mut world = World::over(quick(), Some(files.tls())).await;
    let url = format!("https://localhost:{}", world.host_address.port());
    let (path, bearer) = (format!("{}/sse", world.mount()), format!("Bearer {}", world.token()));
    let certificate = files.path("cert.pem");
    let client = tokio::spawn(async move { node(&certificate, DRAINED, &[&url, &path, &bearer]).await });
    eventually("the app is asked", || world.app.has_seen("GET /sse")).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    world.shut_down().await;
    let said = client.await.unwrap();
    assert!(said.contains("data data: 1\n") && said.contains("goaway 0\n"), "{said}");
}

/// The app serves the project of one epoch, and again that of the next one.
#[tokio::test(flavor = "multi_thread")]
async fn connections_to_apps_end_with_their_epoch() {
    let world = World::new().await;
    let bearer = format!("Authorization: Bearer {}", world.token());
    let url = format!("http://localhost:{}{}/x", world.host_address.port(), world.mount());
    let opened = || world.app.connections.load(std::sync::atomic::Ordering::Relaxed);
    for _ in 0..3 {
        curl(&["-H", &bearer, &url]).await;
    }
    assert_eq!(opened(), 1, "one connection is enough");
    world.table.set(world.project, world.host, 1, Reach::Local);
    curl(&["-H", &bearer, &url]).await;
    assert_eq!(opened(), 1, "nothing has changed");
    world.table.set(world.project, world.host, 2, Reach::Local);
    curl(&["-H", &bearer, &url]).await;
    assert_eq!(opened(), 2, "a connection of the former epoch is not used");
    let ended = || world.app.ended.load(std::sync::atomic::Ordering::Relaxed);
    eventually("the former one is closed", || ended() == 1).await;
    world.table.set(world.project, world.host, 3, Reach::Parked);
    eventually("a project that leaves keeps none", || ended() == 2).await;
}
