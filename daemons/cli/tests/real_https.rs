//! HTTPS of real daemons: a master that hosts, proxies and the command line reach
//! over TLS only; requests and WebSockets in both versions of HTTP, through host
//! and proxy; and a certificate that is replaced meanwhile.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod world;

use std::{
    io::{BufRead, BufReader, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Output, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use serde_json::json;
use world::{Https, LIMIT, Way, World, free_port, start_app, until};

/// Opens a WebSocket by upgrade and one by extended CONNECT (RFC 8441), and talks
/// in both, once at once and once for each line that it is sent.
const SOCKETS: &str = r#"
const [url, path, bearer] = process.argv.slice(-3);
const fail = (error) => { console.log('failed', error.code ?? error); process.exit(1); };
const message = () => {
  const mask = [1, 2, 3, 4];
  return Buffer.from([0x81, 0x82, ...mask, ...[...Buffer.from('hi')].map((byte, i) => byte ^ mask[i % 4])]);
};
const talk = (stream) => new Promise((resolve) => {
  let seen = '';
  const hear = (data) => {
    seen += data.toString('latin1');
    if (seen.endsWith('ok')) { stream.off('data', hear); resolve(); }
  };
  stream.on('data', hear);
  stream.write(message());
});
const first = new Promise((resolve) => {
  const { hostname, port } = new URL(url);
  const headers = { authorization: bearer, connection: 'Upgrade', upgrade: 'websocket',
    'sec-websocket-version': '13', 'sec-websocket-key': 'dGhlIHNhbXBsZSBub25jZQ==' };
  const request = require('node:https').request({ hostname, port, path, headers });
  request.on('error', fail);
  request.on('response', (response) => fail(response.statusCode));
  request.on('upgrade', (_, socket) => resolve(socket));
  request.end();
});
const second = new Promise((resolve) => {
  const client = require('node:http2').connect(url);
  client.on('error', fail);
  client.on('remoteSettings', () => {
    const stream = client.request({ ':method': 'CONNECT', ':protocol': 'websocket', ':path': path,
      'sec-websocket-version': '13', authorization: bearer }, { endStream: false });
    stream.on('error', fail);
    stream.on('response', (headers) => headers[':status'] === 200 ? resolve(stream) : fail(headers[':status']));
  });
});
(async () => {
  const both = [await first, await second];
  const round = async () => { for (const stream of both) await talk(stream); console.log('talked'); };
  await round();
  for await (const _ of require('node:readline').createInterface({ input: process.stdin })) await round();
  process.exit(0);
})();
"#;

/// Two certificates of the same names, each its own authority.
struct Certificates {
    dir: tempfile::TempDir,
}

impl Certificates {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut trusted = String::new();
        for name in ["first", "second"] {
            let names = ["localhost", "127.0.0.1"].map(str::to_owned);
            let made = rcgen::generate_simple_self_signed(names).unwrap();
            trusted.push_str(&made.cert.pem());
            std::fs::write(dir.path().join(format!("{name}.pem")), made.cert.pem()).unwrap();
            std::fs::write(dir.path().join(format!("{name}.key")), made.signing_key.serialize_pem()).unwrap();
        }
        std::fs::write(dir.path().join("trusted.pem"), trusted).unwrap();
        let this = Self { dir };
        this.show("first");
        this
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Puts one of them where the daemons read it.
    fn show(&self, name: &str) {
        for end in ["pem", "key"] {
            std::fs::copy(self.path(&format!("{name}.{end}")), self.path(&format!("shown.{end}"))).unwrap();
        }
    }

    fn https(&self) -> Https {
        Https { cert: self.path("shown.pem"), key: self.path("shown.key"), trusted: self.path("trusted.pem") }
    }
}

fn curl(trusted: &Path, arguments: &[&str]) -> Output {
    let limit = LIMIT.as_secs().to_string();
    Command::new("curl")
        .args(["-sS", "-m", &limit, "--cacert"])
        .arg(trusted)
        .args(arguments)
        .output()
        .unwrap()
}

/// Node with its WebSockets, which ends with the value.
struct Sockets {
    child: Child,
    input: ChildStdin,
    said: mpsc::Receiver<String>,
}

impl Sockets {
    fn open(trusted: &Path, arguments: &[&str]) -> Self {
        let mut child = Command::new("node")
            .env("NODE_EXTRA_CA_CERTS", trusted)
            .args(["-e", SOCKETS, "--"])
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let (tell, said) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                let _ = tell.send(line);
            }
        });
        let this = Self { child, input, said };
        this.talked("to begin with");
        this
    }

    fn talked(&self, when: &str) {
        assert_eq!(self.said.recv_timeout(LIMIT).as_deref(), Ok("talked"), "{when}");
    }

    fn talk_again(&mut self, when: &str) {
        self.input.write_all(b"\n").unwrap();
        self.talked(when);
    }
}

impl Drop for Sockets {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The command line, which trusts what is in a file.
fn cocalc(world: &World, trusted: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_cocalc"))
        .args(arguments)
        .env("COCALC_URL", &world.url)
        .env("COCALC_TOKEN", &world.admin)
        .env("SSL_CERT_FILE", trusted)
        .env_remove("SSL_CERT_DIR")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

#[test]
fn everything_goes_over_tls_and_certificates_are_replaced_meanwhile() {
    let files = Certificates::new();
    let trusted = files.path("trusted.pem");
    let mut world = World::over_https(files.https(), "keepalive_ms = 500\n");
    world.add_host("alpha", "");
    world.add_proxy("proxy-1");
    // They have joined, and are on the bus.
    world.connected(1, 1);

    let listed = cocalc(&world, &trusted, &["host", "list"]);
    let said = String::from_utf8_lossy(&listed.stdout).into_owned();
    assert!(listed.status.success() && said.contains("alpha"), "{listed:?}");
    // Whoever does not know the authority does not say who they are.
    let refused = cocalc(&world, &files.path("second.pem"), &["host", "list"]);
    assert!(!refused.status.success(), "{refused:?}");

    let begun = world.ok("POST", "/projects", json!({ "name": "p", "host": "alpha" }));
    world.settle(&begun);
    let project = begun["project"]["id"].as_str().unwrap().to_owned();
    world.settle(&world.ok("POST", &format!("/projects/{project}/start"), json!({})));
    let connect = world.ok("POST", &format!("/projects/{project}/connect"), json!({ "ttl_secs": 300 }));
    let address = connect["direct"]["path_url"].as_str().unwrap();
    assert!(address.starts_with("https://127.0.0.1:"), "{connect}");
    let direct = Way {
        project: project.clone(),
        http: address.strip_prefix("https://").unwrap().split('/').next().unwrap().parse().unwrap(),
        ssh: connect["direct"]["ssh"].as_str().unwrap().split_once('@').unwrap().1.to_owned(),
        token: connect["token"].as_str().unwrap().to_owned(),
        port: free_port(),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(start_app(&world, &direct, None));

    let bearer = format!("Authorization: Bearer {}", direct.token);
    let path = format!("/{project}/port/{}/", direct.port);
    let mut sockets = Vec::new();
    for name in ["alpha", "proxy-1"] {
        let base = format!("https://127.0.0.1:{}", world.ports[&(name.to_owned(), "listen")]);
        let url = format!("{base}{path}scheme");
        for (option, version) in [("--http2", "2"), ("--http1.1", "1.1")] {
            let ask = [option, "-w", " %{http_version} %{http_code}", "-H", &bearer, &url];
            let expected = format!("https {version} 200");
            // The process runner may be slower than the host's patience.
            until(&format!("{name}, {option}"), || {
                let output = curl(&trusted, &ask);
                let said = String::from_utf8_lossy(&output.stdout).into_owned();
                assert!(said == expected || said.contains("app_timeout"), "{name}: {output:?}");
                (said == expected).then_some(())
            });
        }
        let plain = curl(&trusted, &[&url.replace("https:", "http:")]);
        assert!(!plain.status.success(), "{name} speaks no plain HTTP there: {plain:?}");
        let bearer = format!("Bearer {}", direct.token);
        sockets.push((name, Sockets::open(&trusted, &[&base, &path, &bearer])));
    }

    // New files, and nobody waits for the next look.
    files.show("second");
    let (first, second) = (files.path("first.pem"), files.path("second.pem"));
    for name in ["alpha", "proxy-1", "master"] {
        let url = format!("https://127.0.0.1:{}/healthz", world.ports[&(name.to_owned(), "listen")]);
        world.signal(name, "HUP");
        until(&format!("{name}'s new certificate"), || curl(&second, &[&url]).status.success().then_some(()));
        let output = curl(&first, &[&url]);
        assert_eq!(output.status.code(), Some(60), "{name} shows only the new one: {output:?}");
    }
    for (name, sockets) in &mut sockets {
        sockets.talk_again(&format!("over {name}, after the certificate was replaced"));
    }
    world.connected(1, 1);
}

/// An authority for tests that speaks ACME as Let's Encrypt does, and a name server
/// that knows every name at loopback. They end with the value.
struct Authority {
    children: Vec<Child>,
    directory: String,
    management: u16,
}

impl Authority {
    /// It checks names at `port`.
    fn new(files: &Certificates, port: u16) -> Self {
        let (listen, management, dns, control) = (free_port(), free_port(), free_port(), free_port());
        let config = json!({ "pebble": {
            "listenAddress": format!("127.0.0.1:{listen}"),
            "managementListenAddress": format!("127.0.0.1:{management}"),
            "certificate": files.path("first.pem"),
            "privateKey": files.path("first.key"),
            "httpPort": free_port(),
            "tlsPort": port,
        } });
        std::fs::write(files.path("pebble.json"), config.to_string()).unwrap();
        let quiet = |mut command: Command| {
            let log = std::fs::File::create(files.path("authority.log")).unwrap();
            command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap()
        };
        let mut names = Command::new("pebble-challtestsrv");
        names.args(["-defaultIPv4", "127.0.0.1", "-defaultIPv6", "", "-http01", "", "-https01", ""]);
        names.args(["-tlsalpn01", "", "-dns01", &format!("127.0.0.1:{dns}")]);
        names.args(["-management", &format!("127.0.0.1:{control}")]);
        let mut authority = Command::new("pebble");
        authority.env("PEBBLE_VA_NOSLEEP", "1").env("PEBBLE_WFE_NONCEREJECT", "0");
        authority.args(["-dnsserver", &format!("127.0.0.1:{dns}"), "-config"]).arg(files.path("pebble.json"));
        let children = vec![quiet(names), quiet(authority)];
        let this = Self { children, directory: format!("https://localhost:{listen}/dir"), management };
        until("the authority", || {
            curl(&files.path("first.pem"), &[&this.directory]).status.success().then_some(())
        });
        this
    }

    /// Writes down what its certificates lead to.
    fn root(&self, files: &Certificates) -> PathBuf {
        let url = format!("https://localhost:{}/roots/0", self.management);
        let output = curl(&files.path("first.pem"), &[&url]);
        assert!(output.status.success(), "{output:?}");
        let path = files.path("root.pem");
        std::fs::write(&path, output.stdout).unwrap();
        path
    }
}

impl Drop for Authority {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[test]
fn a_certificate_is_got_from_an_acme_authority_and_kept() {
    let files = Certificates::new();
    let mut world = World::new("");
    world.trusted = Some(files.path("trusted.pem"));
    let port = free_port();
    let authority = Authority::new(&files, port);
    let root = authority.root(&files);
    let settings = format!(
        "[acme]\nnames = ['alpha.cocalc.test', 'a.cocalc.test']\nagree_to_terms = true\n\
         contact = ['mailto:ops@cocalc.test']\ndirectory = '{}'\n",
        authority.directory
    );
    world.add_host_at("alpha", port, &settings);
    let shown = |name: &str| {
        let (at, url) = (format!("{name}:{port}:127.0.0.1"), format!("https://{name}:{port}/healthz"));
        curl(&root, &["--resolve", &at, &url])
    };
    for name in ["alpha.cocalc.test", "a.cocalc.test"] {
        let deadline = Instant::now() + LIMIT;
        while !shown(name).status.success() {
            let log = std::fs::read_to_string(files.path("authority.log")).unwrap_or_default();
            assert!(Instant::now() < deadline, "no certificate for {name}:\n{log}\n{}", world.log());
            std::thread::sleep(Duration::from_millis(100));
        }
    }
    assert_eq!(shown("b.cocalc.test").status.code(), Some(60), "another name");
    // Nobody else may read its key.
    let kept = world.data_dir("alpha").join("acme");
    for entry in std::fs::read_dir(&kept).unwrap().flatten() {
        use std::os::unix::fs::PermissionsExt;
        let mode = entry.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{:?}", entry.path());
    }
    // It is there at once after a restart, and nobody is asked.
    let before = std::fs::read(kept.join("certificate.pem")).unwrap();
    drop(authority);
    world.stop("alpha");
    world.start("alpha");
    until("the host", || TcpStream::connect(("127.0.0.1", port)).ok());
    assert!(shown("alpha.cocalc.test").status.success());
    assert_eq!(std::fs::read(kept.join("certificate.pem")).unwrap(), before);
}

#[test]
fn a_master_gets_its_certificate_and_is_reached_by_who_trusts_the_authority() {
    let files = Certificates::new();
    let port = free_port();
    let authority = Authority::new(&files, port);
    let root = authority.root(&files);
    let settings = format!(
        "[acme]\nnames = ['localhost', 'master.cocalc.test']\nagree_to_terms = true\ndirectory = '{}'\n",
        authority.directory
    );
    let mut world = World::certified(port, files.path("trusted.pem"), &settings);
    let admin = format!("Authorization: Bearer {}", world.admin);
    let ask = |name: &str| {
        let at = format!("{name}:{port}:127.0.0.1");
        let url = format!("https://{name}:{port}/api/v1/account");
        curl(&root, &["--resolve", &at, "-w", " %{http_code} %{ssl_verify_result}", "-H", &admin, &url])
    };
    for name in ["localhost", "master.cocalc.test"] {
        let deadline = Instant::now() + LIMIT;
        while !ask(name).status.success() {
            let log = std::fs::read_to_string(files.path("authority.log")).unwrap_or_default();
            assert!(Instant::now() < deadline, "no certificate for {name}:\n{log}\n{}", world.log());
            std::thread::sleep(Duration::from_millis(100));
        }
        let said = String::from_utf8_lossy(&ask(name).stdout).into_owned();
        assert!(said.contains("\"admin\":true") && said.ends_with(" 200 0"), "{said}");
    }
    assert_eq!(ask("other.cocalc.test").status.code(), Some(60), "another name");
    // Who trusts another authority says nothing to this master.
    let refused = curl(&files.path("trusted.pem"), &["-H", &admin, &format!("{}/api/v1/account", world.url)]);
    assert_eq!(refused.status.code(), Some(60), "{refused:?}");
    let refused = cocalc(&world, &files.path("trusted.pem"), &["host", "list"]);
    assert!(!refused.status.success(), "{refused:?}");

    // A host joins over it, and the command line, a browser's page and the bus work.
    world.trusted = Some(root.clone());
    world.add_host("alpha", "");
    world.connected(1, 0);
    let listed = cocalc(&world, &root, &["host", "list"]);
    let said = String::from_utf8_lossy(&listed.stdout).into_owned();
    assert!(listed.status.success() && said.contains("alpha"), "{listed:?}");
    let begun = world.ok("POST", "/projects", json!({ "name": "p", "host": "alpha" }));
    world.settle(&begun);
    let page = format!("{}/projects/{}", world.url, begun["project"]["id"].as_str().unwrap());
    let page = curl(&root, &[&page]);
    assert!(page.status.success() && page.stdout.starts_with(b"<!doctype html>"), "{page:?}");

    // Started again, it has it at once, and nobody is asked.
    let kept = world.dir.path().join("master/acme/certificate.pem");
    let before = std::fs::read(&kept).unwrap();
    drop(authority);
    world.stop("master");
    world.start("master");
    until("the master", || TcpStream::connect(("127.0.0.1", port)).ok());
    let again = ask("localhost");
    assert!(again.status.success(), "{again:?}");
    assert_eq!(std::fs::read(&kept).unwrap(), before);
    world.connected(1, 0);
}
