//! The process runner keeps the contract. Needs no privilege.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use cocalc_core::{
    ids::{Epoch, ProjectId},
    runner::{Command, ExecRequest, Isolation, Limits, ProjectSpec, Runner, State},
};
use cocalc_podman::ProcessRunner;
use cocalc_testkit::runner::{Harness, contract};
use tokio::io::{AsyncBufReadExt, BufReader};

/// Echoes on a port of its choice, which it prints.
const ECHO: &str = r#"exec python3 -u -c '
import socket, threading
listener = socket.socket()
listener.bind(("127.0.0.1", 0))
listener.listen(64)
print(listener.getsockname()[1])
def echo(connection):
    while data := connection.recv(65536):
        connection.sendall(data)
    connection.close()
while True:
    threading.Thread(target=echo, args=(listener.accept()[0],), daemon=True).start()
'"#;

struct Processes {
    dir: tempfile::TempDir,
    runner: ProcessRunner,
    slot: AtomicU32,
}

impl Processes {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let runner = ProcessRunner::open(dir.path().join("state")).await.unwrap();
        Self { dir, runner, slot: AtomicU32::new(0) }
    }
}

#[async_trait::async_trait]
impl Harness for Processes {
    fn runner(&self) -> Arc<dyn Runner> {
        Arc::new(self.runner.clone())
    }

    async fn reopen(&self) -> Arc<dyn Runner> {
        Arc::new(ProcessRunner::open(self.dir.path().join("state")).await.unwrap())
    }

    async fn spec(&self) -> ProjectSpec {
        let project = ProjectId::random();
        let volume = self.dir.path().join(project.to_string());
        std::fs::create_dir(&volume).unwrap();
        ProjectSpec {
            project,
            epoch: Epoch::FIRST,
            volume,
            image: None,
            slot: self.slot.fetch_add(1, Ordering::Relaxed),
            limits: Limits::default(),
            env: [("FROM_SPEC".to_owned(), "yes".to_owned())].into(),
            isolation: Isolation::default(),
        }
    }

    async fn echo_server(&self, project: ProjectId) -> u16 {
        let request = ExecRequest { command: Command::Line(ECHO.into()), ..ExecRequest::default() };
        let mut process = self.runner.exec(project, request).await.unwrap();
        let mut line = String::new();
        BufReader::new(&mut process.stdout).read_line(&mut line).await.unwrap();
        // It lives as long as its project.
        std::mem::forget(process);
        line.trim().parse().unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn processes_keep_the_contract() {
    contract(&Processes::new().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_lost_its_supervisor_ends_with_the_project() {
    let world = Processes::new().await;
    let spec = world.spec().await;
    world.runner.start(&spec).await.unwrap();
    let line = "setsid sleep 4711 </dev/null >/dev/null 2>&1 & echo $!";
    let request = ExecRequest { command: Command::Line(line.into()), ..ExecRequest::default() };
    let mut process = world.runner.exec(spec.project, request).await.unwrap();
    let mut pid = String::new();
    BufReader::new(&mut process.stdout).read_line(&mut pid).await.unwrap();
    let orphan = Path::new("/proc").join(pid.trim());
    assert!(orphan.exists());

    // The supervisor is killed, as by the kernel when memory is short.
    let record = world.dir.path().join("state/projects").join(format!("{}.json", spec.project));
    let record: serde_json::Value = serde_json::from_slice(&std::fs::read(record).unwrap()).unwrap();
    let supervisor = record["pid"].as_i64().unwrap().to_string();
    assert!(std::process::Command::new("kill").args(["-9", &supervisor]).status().unwrap().success());
    let stopped = loop {
        let status = world.runner.status(spec.project).await.unwrap();
        if status.state == State::Stopped {
            break status;
        }
        tokio::task::yield_now().await;
    };
    assert!(stopped.reason.is_some(), "nobody asked for it");
    world.runner.stop(spec.project, Duration::from_secs(1)).await.unwrap();
    assert!(!is_alive(&orphan), "found by its mark, and killed");

    world.runner.start(&spec).await.unwrap();
    let again = ProcessRunner::open(world.dir.path().join("state")).await.unwrap();
    again.cleanup().await.unwrap();
    assert!(again.list().await.unwrap().is_empty());
    assert_eq!(world.runner.status(spec.project).await.unwrap().state, State::Stopped);
}

fn is_alive(process: &Path) -> bool {
    std::fs::read_to_string(process.join("stat")).is_ok_and(|stat| !stat.contains(") Z "))
}
