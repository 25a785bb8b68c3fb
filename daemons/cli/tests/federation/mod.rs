//! Runs `cocalc up` as its users do, and cleans up after it, whatever happens.

#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "each test binary uses its part, and a failed start fails the test"
)]

use std::{
    io::{Read, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;

/// The program under test.
pub(crate) const COCALC: &str = env!("CARGO_BIN_EXE_cocalc");

/// A running federation, which ends with the value.
pub(crate) struct Federation {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) child: Child,
    pub(crate) json: Value,
}

impl Federation {
    /// Starts one with its own ports, and waits until its project runs.
    pub(crate) fn up(base_port: u16, arguments: &[&str]) -> Self {
        Self::up_with(base_port, arguments, &[])
    }

    /// The same, with more in the environment of its daemons.
    pub(crate) fn up_with(base_port: u16, arguments: &[&str], environment: &[(&str, &str)]) -> Self {
        require_daemons();
        let dir = tempfile::Builder::new().prefix("cocalc-test-").tempdir().unwrap();
        let log = std::fs::File::create(dir.path().join("up.log")).unwrap();
        let child = Command::new(COCALC)
            .args(["up", "--base-port", &base_port.to_string(), "--dir"])
            .arg(dir.path().join("data"))
            .args(arguments)
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut federation = Self { dir, child, json: Value::Null };
        let path = federation.data().join("federation.json");
        let deadline = Instant::now() + Duration::from_secs(300);
        while !path.exists() {
            if let Some(status) = federation.child.try_wait().unwrap() {
                panic!("cocalc up ended with {status}:\n{}", federation.log());
            }
            assert!(Instant::now() < deadline, "no federation.json in time:\n{}", federation.log());
            std::thread::sleep(Duration::from_millis(100));
        }
        federation.reload();
        federation
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    pub(crate) fn log(&self) -> String {
        let mut text = std::fs::read_to_string(self.dir.path().join("up.log")).unwrap_or_default();
        for entry in std::fs::read_dir(self.data().join("log")).into_iter().flatten().flatten() {
            let log = std::fs::read_to_string(entry.path()).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            text.push_str(&format!("\n-- {}\n", entry.path().display()));
            text.push_str(&lines[lines.len().saturating_sub(40)..].join("\n"));
        }
        text
    }

    pub(crate) fn reload(&mut self) {
        let text = std::fs::read_to_string(self.data().join("federation.json")).unwrap();
        self.json = serde_json::from_str(&text).unwrap();
    }

    pub(crate) fn project(&self) -> String {
        self.json["project"]["id"].as_str().unwrap().to_owned()
    }

    /// Runs the command line as the administrator.
    pub(crate) fn cocalc(&self, arguments: &[&str]) -> Output {
        Command::new(COCALC)
            .args(arguments)
            .env("COCALC_URL", self.json["master"]["url"].as_str().unwrap())
            .env("COCALC_TOKEN", self.json["master"]["admin_token"].as_str().unwrap())
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    /// As [`cocalc`](Self::cocalc), insisting on success and JSON.
    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        let output = self.cocalc(&[arguments, &["--output", "json"]].concat());
        assert!(output.status.success(), "{arguments:?}: {output:?}\n{}", self.log());
        serde_json::from_slice(&output.stdout).unwrap_or(Value::Null)
    }

    /// Runs a command in the sample project.
    pub(crate) fn exec(&self, line: &str) -> Output {
        let project = self.project();
        self.cocalc(&["project", "exec", &project, "--", "sh", "-c", line])
    }

    /// Waits until `look` holds.
    pub(crate) fn wait_for(&self, what: &str, limit: Duration, mut look: impl FnMut() -> bool) {
        let deadline = Instant::now() + limit;
        while !look() {
            assert!(Instant::now() < deadline, "waited {limit:?} for {what}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

impl Drop for Federation {
    fn drop(&mut self) {
        // Also when the test has failed: SIGTERM first, so that it tears down
        // itself; then the clean-up that works after any end.
        let pid = self.child.id().to_string();
        let _ = Command::new("kill").args(["-TERM", &pid]).status();
        let deadline = Instant::now() + Duration::from_secs(60);
        while Instant::now() < deadline && matches!(self.child.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(50));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        down(&self.data());
    }
}

/// Cleans up after a federation.
pub(crate) fn down(data: &Path) {
    let _ = Command::new(COCALC).args(["down", "--dir"]).arg(data).status();
}

/// The daemons are other packages' programs, which `cargo test` alone does not
/// build.
fn require_daemons() {
    for name in ["cocalc-master", "cocalc-host", "cocalc-proxy"] {
        let program = Path::new(COCALC).with_file_name(name);
        assert!(
            program.exists(),
            "{} is missing: run `cargo build --workspace --bins` first, as `make test` does",
            program.display()
        );
    }
}

/// What a federation must not leave behind: mounts and loop devices below
/// `dir`, containers and network namespaces of ours.
pub(crate) fn leftovers(dir: &Path) -> Vec<String> {
    let dir = dir.to_string_lossy().into_owned();
    let mut found = Vec::new();
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    found.extend(mounts.lines().filter(|line| line.contains(&dir)).map(|line| format!("mount {line}")));
    let loops = run("losetup", &["-a"]);
    found.extend(loops.lines().filter(|line| line.contains(&dir)).map(|line| format!("loop {line}")));
    let processes = run("ps", &["-eo", "pid,args"]);
    let ours = |line: &&str| line.contains(&dir) && !line.contains("ps -eo");
    found.extend(processes.lines().filter(ours).map(|line| format!("process {line}")));
    found
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Sends bytes to a listener, and reads what comes until it closes or `limit`.
pub(crate) fn throw(address: &str, bytes: &[u8], limit: Duration) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(limit)).unwrap();
    stream.set_write_timeout(Some(limit)).unwrap();
    // The listener may close in the middle, which is what is wanted.
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    let _ = stream.take(1 << 20).read_to_end(&mut answer);
    answer
}
