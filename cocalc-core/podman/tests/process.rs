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
    runner::{Command, ExecRequest, Exit, Isolation, Limits, ProjectSpec, Pty, Runner, State, WindowSize},
};
use cocalc_podman::{ProcessRunner, Unenforceable};
use cocalc_testkit::runner::{Harness, contract};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};

/// Every wait has an end.
const LIMIT: Duration = Duration::from_secs(60);
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
        let runner =
            ProcessRunner::open_confined(dir.path().join("state"), Unenforceable::Refuse).await.unwrap();
        Self { dir, runner, slot: AtomicU32::new(0) }
    }
}

#[async_trait::async_trait]
impl Harness for Processes {
    fn runner(&self) -> Arc<dyn Runner> {
        Arc::new(self.runner.clone())
    }

    async fn reopen(&self) -> Arc<dyn Runner> {
        Arc::new(
            ProcessRunner::open_confined(self.dir.path().join("state"), Unenforceable::Refuse).await.unwrap(),
        )
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
async fn a_terminal_has_the_modes_that_were_asked_for() {
    let world = Processes::new().await;
    let spec = world.spec().await;
    world.runner.start(&spec).await.unwrap();
    let shown = async |modes: Vec<(u8, u32)>| {
        let size = WindowSize { cols: 80, rows: 24 };
        let request = ExecRequest {
            command: Command::Line("stty -a".into()),
            pty: Some(Pty { modes, ..Pty::new("xterm", size) }),
            ..ExecRequest::default()
        };
        let mut process = world.runner.exec(spec.project, request).await.unwrap();
        let mut shown = String::new();
        process.stdout.read_to_string(&mut shown).await.unwrap();
        assert_eq!(process.handle.wait().await.unwrap(), Exit::Code(0), "{shown}");
        assert!(!process.handle.ended_with_its_project());
        shown
    };
    let new = shown(Vec::new()).await;
    assert!(new.contains("intr = ^C") && new.contains(" echo "), "{new}");
    // Unknown ones, and far too many, do no harm.
    let mut modes = vec![(1, 7), (53, 0), (129, 9600), (200, 5), (11, 1)];
    modes.extend([(54, 1); 1000]);
    let set = shown(modes).await;
    for mode in ["speed 9600 baud", "intr = ^G", "quit = ^\\", " -echo ", " echoe ", " icanon "] {
        assert!(set.contains(mode), "{mode}: {set}");
    }
    world.runner.cleanup().await.unwrap();
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

    let request = ExecRequest { command: Command::Line("sleep 1000".into()), ..ExecRequest::default() };
    let mut lives = world.runner.exec(spec.project, request).await.unwrap();

    // The supervisor is killed, as by the kernel when memory is short.
    let record = world.dir.path().join("state/projects").join(format!("{}.json", spec.project));
    let record: serde_json::Value = serde_json::from_slice(&std::fs::read(record).unwrap()).unwrap();
    let supervisor = record["pid"].as_i64().unwrap().to_string();
    assert!(std::process::Command::new("kill").args(["-9", &supervisor]).status().unwrap().success());
    let exit = process.handle.wait().await.unwrap();
    assert_eq!(exit, Exit::Code(0), "it had ended before, by itself");
    assert!(!process.handle.ended_with_its_project());
    let exit = tokio::time::timeout(LIMIT, lives.handle.wait()).await.unwrap().unwrap();
    assert_eq!(exit, Exit::Signal("KILL".into()));
    assert!(lives.handle.ended_with_its_project());
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
    let again =
        ProcessRunner::open_confined(world.dir.path().join("state"), Unenforceable::Refuse).await.unwrap();
    again.cleanup().await.unwrap();
    assert!(again.list().await.unwrap().is_empty());
    assert_eq!(world.runner.status(spec.project).await.unwrap().state, State::Stopped);
}

/// Runs a line to its end: its status, and what it printed.
async fn run(world: &Processes, project: ProjectId, line: &str) -> (Exit, String) {
    let line = format!("{{ {line}; }} 2>&1");
    let request = ExecRequest { command: Command::Line(line), ..ExecRequest::default() };
    let mut process = world.runner.exec(project, request).await.unwrap();
    drop(process.stdin);
    let mut said = String::new();
    process.stdout.read_to_string(&mut said).await.unwrap();
    (process.handle.wait().await.unwrap(), said)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_project_is_confined_as_far_as_the_kernel_has_it() {
    let world = Processes::new().await;
    let (one, other) = (world.spec().await, world.spec().await);
    world.runner.start(&one).await.unwrap();
    world.runner.start(&other).await.unwrap();
    let weaknesses = world.runner.capabilities().weaknesses;
    assert!(!weaknesses.iter().any(|weakness| weakness.contains("no Landlock")), "this test needs Landlock");
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("secret"), "of the host").unwrap();
    run(&world, other.project, "echo of-the-other > ~/secret").await;
    let name = format!("cocalc-process-{}", std::process::id());
    let _listener = {
        use std::os::{linux::net::SocketAddrExt, unix::net};
        let address = net::SocketAddr::from_abstract_name(&name).unwrap();
        net::UnixListener::bind_addr(&address).unwrap()
    };
    let home = other.volume.join("home");
    let state = world.dir.path().join("state");
    let me = std::process::id();
    for line in [
        format!("cat {}/secret", home.display()),
        format!("ls {}", home.display()),
        format!("echo x > {}/made", home.display()),
        format!("cat {}/projects/*", state.display()),
        format!("ls {}/sockets", state.display()),
        format!("cat {}/secret", outside.path().display()),
        "echo x > /etc/cocalc-made".into(),
        "ls /root /home".into(),
        format!("kill -0 {me}"),
        format!("cat /proc/{me}/environ"),
        format!("ls /proc/{me}/root/"),
        format!("python3 -c 'import socket; s = socket.socket(socket.AF_UNIX); s.connect(\"\\0{name}\")'"),
        "mount -t tmpfs x /mnt".into(),
    ] {
        let (exit, said) = run(&world, one.project, &line).await;
        assert_ne!(exit, Exit::Code(0), "{line}: {said}");
    }
    // It has what it needs.
    let (exit, said) = run(
        &world,
        one.project,
        "set -e; echo mine > ~/mine; cat ~/mine; python3 -c 'import tempfile; tempfile.mkstemp()'; \
         sleep 9 & kill -TERM $!; echo x > /dev/null; ls /usr/bin/env",
    )
    .await;
    assert_eq!((exit, said.as_str()), (Exit::Code(0), "mine\n/usr/bin/env\n"));
    let (_, status) = run(&world, one.project, "cat /proc/self/status").await;
    for line in ["CapEff:\t0000000000000000", "CapPrm:\t0000000000000000", "NoNewPrivs:\t1"] {
        assert!(status.contains(line), "{line}: {status}");
    }

    // Of limits there is that of open files; others are refused by name.
    let mut limited = world.spec().await;
    limited.limits.nofile = Some(300);
    world.runner.start(&limited).await.unwrap();
    assert_eq!(run(&world, limited.project, "ulimit -n").await.1, "300\n");
    let mut refused = world.spec().await;
    refused.limits.memory_bytes = Some(1 << 30);
    let error = world.runner.start(&refused).await.unwrap_err();
    assert!(error.to_string().contains("memory"), "{error}");
    let state = world.dir.path().join("other-state");
    let accepting = ProcessRunner::open_confined(state, Unenforceable::Accept).await.unwrap();
    accepting.start(&refused).await.unwrap();
    accepting.cleanup().await.unwrap();
    world.runner.cleanup().await.unwrap();
}

/// This test alone, in another process that was started by this line of a shell.
fn again(test: &str, line: &str) {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("process");
    cocalc_testkit::executable::copy(&std::env::current_exe().unwrap(), &program);
    std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    let output = std::process::Command::new("/bin/sh")
        .args(["-c", line, "sh"])
        .arg(&program)
        .args(["--exact", test, "--nocapture"])
        .env("AGAIN", "1")
        .env("TMPDIR", dir.path())
        .current_dir(dir.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && said.contains("1 passed"),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn signals_that_the_host_ignores_are_the_projects_own() {
    if std::env::var_os("AGAIN").is_none() {
        again("signals_that_the_host_ignores_are_the_projects_own", "trap '' INT HUP QUIT; exec \"$@\"");
        return;
    }
    let ignored = std::fs::read_to_string("/proc/self/status").unwrap();
    let mask = |status: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix("SigIgn:\t")).unwrap();
        u64::from_str_radix(line, 16).unwrap()
    };
    assert_eq!(mask(&ignored) & 7, 7, "this process ignores HUP, INT and QUIT");
    let world = Processes::new().await;
    let spec = world.spec().await;
    world.runner.start(&spec).await.unwrap();
    let (_, status) = run(&world, spec.project, "cat /proc/self/status").await;
    // The C library keeps 32 and 33 to itself.
    assert_eq!(mask(&status) & 0x7fff_ffff, 0, "{status}");
    world.runner.cleanup().await.unwrap();
}

#[test]
fn the_contract_is_kept_for_an_ordinary_user_too() {
    if !rustix::process::geteuid().is_root() {
        // Then the test above was for one.
        return;
    }
    let line = "exec setpriv --reuid=65534 --regid=65534 --clear-groups \"$@\"";
    again("processes_keep_the_contract", line);
    again("a_project_is_confined_as_far_as_the_kernel_has_it", line);
}

fn is_alive(process: &Path) -> bool {
    std::fs::read_to_string(process.join("stat")).is_ok_and(|stat| !stat.contains(") Z "))
}
