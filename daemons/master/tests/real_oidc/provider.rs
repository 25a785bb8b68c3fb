//! A real OpenID provider: npm's `oidc-provider`, in a process of its own.

use std::{
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::Mutex,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

pub(crate) const SECRET: &str = "s3cret-of-the-client";

/// A running provider; ended when it goes out of scope.
pub(crate) struct Provider {
    child: Child,
    _stdin: ChildStdin,
    pub(crate) issuer: String,
}

impl Drop for Provider {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The client that masters at `callback` are.
pub(crate) fn client(callback: &str) -> Value {
    json!({ "client_id": "cocalc", "client_secret": SECRET, "redirect_uris": [callback] })
}

impl Provider {
    /// Starts one on `port`, or any if that is 0, for a client whose
    /// description may depend on nothing yet: the issuer is known first.
    pub(crate) fn start(port: u16, client: &Value) -> Self {
        Self::start_with(port, client, &[])
    }

    /// The same, with TLS by a certificate and key in files.
    pub(crate) fn start_with(port: u16, client: &Value, tls: &[&Path]) -> Self {
        let folder = install();
        let mut child = Command::new("node")
            .arg(folder.join("provider.mjs"))
            .arg(port.to_string())
            .args(tls)
            .current_dir(&folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("node is required to run this test");
        let mut stdin = child.stdin.take().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let issuer = lines.next().expect("the provider says where it is").unwrap();
        writeln!(stdin, "{}", json!([client])).unwrap();
        assert_eq!(lines.next().unwrap().unwrap(), "ready");
        Self { child, _stdin: stdin, issuer }
    }

    pub(crate) fn port(&self) -> u16 {
        self.issuer.rsplit_once(':').unwrap().1.parse().unwrap()
    }
}

/// Fetches the library, unless that was done before.
fn install() -> PathBuf {
    // The tests of this program run side by side.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/real_oidc");
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("oidc-provider");
    std::fs::create_dir_all(&folder).unwrap();
    let manifest = std::fs::read(source.join("package.json")).unwrap();
    std::fs::copy(source.join("provider.mjs"), folder.join("provider.mjs")).unwrap();
    // Written last, so that a cut installation is not taken for a whole one.
    let marker = folder.join("installed.json");
    if std::fs::read(&marker).is_ok_and(|installed| installed == manifest) {
        return folder;
    }
    std::fs::write(folder.join("package.json"), &manifest).unwrap();
    let output = Command::new("timeout")
        .args(["300", "npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--silent"])
        .current_dir(&folder)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "npm could not install oidc-provider: {errors}");
    std::fs::write(marker, manifest).unwrap();
    folder
}

pub(crate) const LIMIT: Duration = Duration::from_secs(60);

pub(crate) fn until<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(value) = done() {
            return value;
        }
        assert!(Instant::now() < deadline, "not within {LIMIT:?}: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
