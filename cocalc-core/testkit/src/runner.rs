//! The contract suite of `cocalc_core::runner`.
//!
//! It runs lines that every POSIX shell knows, and that the runner in memory
//! knows too: `echo`, `printenv`, `cat`, `sleep`, `stty size`, `exit`.

use std::{future::Future, pin::Pin, sync::Arc, time::Duration};

use cocalc_core::{
    ids::{Epoch, ProjectId},
    runner::{
        Command, Error, ExecRequest, Exit, LimitKind, Limits, Process, ProjectSpec, Pty, Runner, State,
        WindowSize,
    },
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// How long anything may take before the promise counts as broken.
const LIMIT: Duration = Duration::from_secs(60);
/// How long processes may take to end by themselves.
const GRACE: Duration = Duration::from_secs(5);

/// What a backend's test hands to the suite.
#[async_trait::async_trait]
pub trait Harness: Send + Sync {
    /// The runner under test.
    fn runner(&self) -> Arc<dyn Runner>;

    /// Another runner over the same state, as a restarted daemon opens it.
    async fn reopen(&self) -> Arc<dyn Runner>;

    /// A new project, with a volume and a slot of its own, at the first epoch,
    /// and `FROM_SPEC=yes` in its environment.
    async fn spec(&self) -> ProjectSpec;

    /// Starts something in the running project that echoes what it reads until
    /// the end of its input, and then closes; returns its port.
    async fn echo_server(&self, project: ProjectId) -> u16;
}

/// Checks every promise of the contract.
///
/// # Panics
///
/// With the promise that was broken.
pub async fn contract(harness: &dyn Harness) {
    type Check<'a> = Pin<Box<dyn Future<Output = ()> + 'a>>;
    let checks: [(&str, Check<'_>); 11] = [
        ("what is unknown is stopped", Box::pin(unknown(harness))),
        ("a start is idempotent, and of one epoch", Box::pin(starting(harness))),
        ("a process has its streams, its environment and its status", Box::pin(processes(harness))),
        ("a terminal has a size that changes", Box::pin(terminals(harness))),
        ("a process ends by signals, and when it is dropped", Box::pin(ends(harness))),
        ("ports are dialed inside the project", Box::pin(ports(harness))),
        ("a restarted daemon finds what runs", Box::pin(restart(harness))),
        ("nothing is left after a stop", Box::pin(stopping(harness))),
        ("a start that was dropped can be gone on from", Box::pin(dropped(harness))),
        ("projects are apart from each other", Box::pin(apart(harness))),
        ("limits change while it runs", Box::pin(limits(harness))),
    ];
    for (promise, check) in checks {
        assert!(tokio::time::timeout(LIMIT * 2, check).await.is_ok(), "took too long: {promise}");
    }
}

/// Starts a line.
async fn exec(runner: &dyn Runner, project: ProjectId, line: &str) -> Process {
    let request = ExecRequest { command: Command::Line(line.into()), ..ExecRequest::default() };
    runner.exec(project, request).await.unwrap_or_else(|error| panic!("exec of {line:?}: {error}"))
}

/// Runs a line to its end, without input: status, output, errors.
async fn run(runner: &dyn Runner, project: ProjectId, line: &str) -> (Exit, String, String) {
    finish(exec(runner, project, line).await).await
}

async fn finish(mut process: Process) -> (Exit, String, String) {
    process.stdin.shutdown().await.unwrap();
    let (mut out, mut err) = (String::new(), String::new());
    let done = async {
        process.stdout.read_to_string(&mut out).await.unwrap();
        if let Some(stderr) = &mut process.stderr {
            stderr.read_to_string(&mut err).await.unwrap();
        }
        process.handle.wait().await.unwrap()
    };
    let exit = tokio::time::timeout(LIMIT, done).await.expect("the process did not end");
    (exit, out, err)
}

/// Waits until `condition` holds.
async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let waiting = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    assert!(tokio::time::timeout(LIMIT, waiting).await.is_ok(), "waited in vain until {what}");
}

async fn unknown(harness: &dyn Harness) {
    let runner = harness.runner();
    let project = ProjectId::random();
    let status = runner.status(project).await.unwrap();
    assert_eq!((status.state, status.epoch, status.started), (State::Stopped, None, None));
    assert_eq!(runner.stop(project, GRACE).await.unwrap().state, State::Stopped);
    runner.remove(project).await.unwrap();
    let exec = runner.exec(project, ExecRequest::default()).await;
    assert!(matches!(exec, Err(Error::NotRunning { .. })), "{exec:?}");
    let dial = runner.dial(project, 80).await.map(drop);
    assert!(matches!(dial, Err(Error::NotRunning { .. })), "{dial:?}");
    let stats = runner.stats(project).await;
    assert!(matches!(stats, Err(Error::NotRunning { .. })), "{stats:?}");
    assert!(runner.list().await.unwrap().iter().all(|status| status.project != project));
}

async fn starting(harness: &dyn Harness) {
    let runner = harness.runner();
    let spec = harness.spec().await;
    runner.prepare(&spec).await.unwrap();
    runner.prepare(&spec).await.unwrap();
    assert_eq!(runner.status(spec.project).await.unwrap().state, State::Stopped, "preparing starts nothing");

    let (first, second) = tokio::join!(runner.start(&spec), runner.start(&spec));
    let (first, second) = (first.unwrap(), second.unwrap());
    assert_eq!(first, second, "two starts at once are one");
    assert_eq!((first.state, first.epoch), (State::Running, Some(spec.epoch)));
    assert!(first.started.is_some(), "what runs was started at some time");
    assert_eq!(runner.status(spec.project).await.unwrap(), first);
    assert!(runner.list().await.unwrap().contains(&first));

    let later = ProjectSpec { epoch: spec.epoch.next(), ..spec.clone() };
    let busy = runner.start(&later).await;
    assert!(matches!(busy, Err(Error::Busy { .. })), "another epoch runs: {busy:?}");
    assert_eq!(runner.status(spec.project).await.unwrap(), first, "and is not disturbed");

    let forbidden = ProjectSpec { env: [("A=B".into(), String::new())].into(), ..harness.spec().await };
    let refused = runner.start(&forbidden).await.map(drop);
    if refused.is_ok() {
        // A runner may carry the environment to each process instead.
        let exec = runner.exec(forbidden.project, ExecRequest::default()).await;
        assert!(matches!(exec, Err(Error::Invalid { .. })), "a malformed environment: {exec:?}");
    }
    runner.remove(forbidden.project).await.unwrap();
    runner.remove(spec.project).await.unwrap();
    assert!(runner.list().await.unwrap().iter().all(|status| status.project != spec.project));
}

async fn processes(harness: &dyn Harness) {
    let runner = harness.runner();
    let spec = harness.spec().await;
    runner.start(&spec).await.unwrap();
    let run = async |line: &str| run(&*runner, spec.project, line).await;

    let text = |text: &str| text.to_owned();
    assert_eq!(run("echo out; echo err >&2").await, (Exit::Code(0), text("out\n"), text("err\n")));
    assert_eq!(run("exit 0").await.0, Exit::Code(0));
    assert_eq!(run("exit 3").await.0, Exit::Code(3));
    assert_eq!(run("exit 255").await.0, Exit::Code(255));
    assert_eq!(run("cat").await, (Exit::Code(0), text(""), text("")), "the end of the input is passed on");
    assert_eq!(run("printenv FROM_SPEC").await.1, "yes\n");

    let request = ExecRequest {
        command: Command::Line("printenv FROM_SPEC; printenv OTHER".into()),
        env: [("FROM_SPEC".into(), "a b\"'$".into()), ("OTHER".into(), "x=y".into())].into(),
        ..ExecRequest::default()
    };
    let process = runner.exec(spec.project, request).await.unwrap();
    assert_eq!(finish(process).await.1, "a b\"'$\nx=y\n", "a request's environment wins");
    let request =
        ExecRequest { command: Command::Argv(vec!["echo".into(), "a".into()]), ..ExecRequest::default() };
    assert_eq!(finish(runner.exec(spec.project, request).await.unwrap()).await.1, "a\n");

    let refused = [
        ExecRequest { env: [("A".into(), "\0".into())].into(), ..ExecRequest::default() },
        ExecRequest { env: [(String::new(), "x".into())].into(), ..ExecRequest::default() },
        ExecRequest { command: Command::Line("echo \0".into()), ..ExecRequest::default() },
        ExecRequest { command: Command::Argv(Vec::new()), ..ExecRequest::default() },
    ];
    for request in refused {
        let refused = runner.exec(spec.project, request.clone()).await;
        assert!(matches!(refused, Err(Error::Invalid { .. })), "{request:?}: {refused:?}");
    }

    // More than any pipe holds, both ways at once, byte for byte.
    let sent: Vec<u8> = (0..3_000_000_u32).flat_map(|n| n.to_le_bytes()).take(3_000_001).collect();
    let mut process = exec(&*runner, spec.project, "cat").await;
    let writing = async {
        process.stdin.write_all(&sent).await.unwrap();
        process.stdin.shutdown().await.unwrap();
    };
    let mut received = Vec::new();
    let (_, read) = tokio::join!(writing, process.stdout.read_to_end(&mut received));
    read.unwrap();
    assert!(received == sent, "{} of {} bytes came back", received.len(), sent.len());
    assert_eq!(process.handle.wait().await.unwrap(), Exit::Code(0));
    assert_eq!(process.handle.wait().await.unwrap(), Exit::Code(0), "once it has ended, it answers at once");
    runner.remove(spec.project).await.unwrap();
}

async fn terminals(harness: &dyn Harness) {
    let runner = harness.runner();
    let spec = harness.spec().await;
    runner.start(&spec).await.unwrap();
    let pty = |cols, rows| Pty::new("xterm-256color", WindowSize { cols, rows });
    let request = ExecRequest {
        command: Command::Line("stty size; cat; exit 4".into()),
        pty: Some(pty(100, 30)),
        ..ExecRequest::default()
    };
    let mut process = runner.exec(spec.project, request).await.unwrap();
    assert!(process.stderr.is_none(), "a terminal has one output");
    let mut shown = String::new();
    let mut buffer = [0; 1024];
    while !shown.contains("30 100") {
        let count = tokio::time::timeout(LIMIT, process.stdout.read(&mut buffer)).await.unwrap().unwrap();
        assert!(count > 0, "it ended early: {shown:?}");
        shown.push_str(&String::from_utf8_lossy(&buffer[..count]));
    }
    let (exit, _, _) = finish(process).await;
    assert_eq!(exit, Exit::Code(4));

    let shell = ExecRequest { pty: Some(pty(80, 24)), ..ExecRequest::default() };
    let mut process = runner.exec(spec.project, shell).await.unwrap();
    process.handle.resize(WindowSize { cols: 90, rows: 20 }).await.unwrap();
    // A size may arrive after what was typed next, so it is asked for again.
    let mut shown = String::new();
    until("the terminal has its new size", async || {
        process.stdin.write_all(b"stty size\n").await.unwrap();
        let read = tokio::time::timeout(Duration::from_millis(100), process.stdout.read(&mut buffer)).await;
        if let Ok(count) = read {
            shown.push_str(&String::from_utf8_lossy(&buffer[..count.unwrap()]));
        }
        shown.contains("20 90")
    })
    .await;
    process.stdin.write_all(b"printenv FROM_SPEC; exit 9\n").await.unwrap();
    let mut shown = Vec::new();
    tokio::time::timeout(LIMIT, process.stdout.read_to_end(&mut shown)).await.unwrap().unwrap();
    assert!(String::from_utf8_lossy(&shown).contains("yes"), "a shell reads what is typed");
    assert_eq!(process.handle.wait().await.unwrap(), Exit::Code(9));
    runner.remove(spec.project).await.unwrap();
}

async fn ends(harness: &dyn Harness) {
    let runner = harness.runner();
    let spec = harness.spec().await;
    runner.start(&spec).await.unwrap();
    let mut process = exec(&*runner, spec.project, "sleep 1000").await;
    let waiting = tokio::time::timeout(Duration::from_millis(50), process.handle.wait()).await;
    assert!(waiting.is_err(), "it has not ended");
    process.handle.signal("TERM").await.unwrap();
    let exit = tokio::time::timeout(LIMIT, process.handle.wait()).await.expect("a signal ends it").unwrap();
    assert_eq!(exit, Exit::Signal("TERM".into()));
    assert_eq!(process.handle.wait().await.unwrap(), exit);
    drop(process);

    let count = async || runner.stats(spec.project).await.unwrap().pids;
    let mut before = 0;
    until("the number of processes settles", async || {
        let last = before;
        before = count().await;
        last == before
    })
    .await;
    let kept = exec(&*runner, spec.project, "echo there; sleep 1000").await;
    until("it runs", async || count().await > before).await;
    drop(kept);
    until("a dropped process is gone", async || count().await <= before).await;
    runner.remove(spec.project).await.unwrap();
}

async fn ports(harness: &dyn Harness) {
    let runner = harness.runner();
    let spec = harness.spec().await;
    runner.start(&spec).await.unwrap();
    let refused = runner.dial(spec.project, 9).await.map(drop);
    assert!(matches!(refused, Err(Error::Refused { port: 9, .. })), "nobody listens: {refused:?}");
    let port = harness.echo_server(spec.project).await;
    for round in 0..20_u8 {
        let mut stream = runner.dial(spec.project, port).await.unwrap();
        let sent = vec![round; 100_000];
        let (mut reader, mut writer) = tokio::io::split(&mut stream);
        let writing = async {
            writer.write_all(&sent).await.unwrap();
            writer.shutdown().await.unwrap();
        };
        let mut received = Vec::new();
        let both = async { tokio::join!(writing, reader.read_to_end(&mut received)) };
        let ((), read) = tokio::time::timeout(LIMIT, both).await.expect("the echo did not come");
        read.unwrap();
        assert!(received == sent, "half-closed, then read to the end");
    }
    runner.stop(spec.project, GRACE).await.unwrap();
    let stopped = runner.dial(spec.project, port).await.map(drop);
    assert!(matches!(stopped, Err(Error::NotRunning { .. })), "{stopped:?}");
    runner.remove(spec.project).await.unwrap();
}

async fn restart(harness: &dyn Harness) {
    let runner = harness.runner();
    let (spec, stopped) = (harness.spec().await, harness.spec().await);
    let before = runner.start(&spec).await.unwrap();
    runner.start(&stopped).await.unwrap();
    runner.stop(stopped.project, GRACE).await.unwrap();

    let again = harness.reopen().await;
    let found = again.status(spec.project).await.unwrap();
    assert_eq!(found, before, "the same state, epoch and time");
    assert!(again.list().await.unwrap().contains(&before));
    assert_eq!(again.status(stopped.project).await.unwrap().state, State::Stopped);
    assert_eq!(run(&*again, spec.project, "printenv FROM_SPEC").await.1, "yes\n", "in the same environment");
    assert_eq!(again.start(&spec).await.unwrap().started, before.started, "it is not started again");
    again.remove(spec.project).await.unwrap();
    again.remove(stopped.project).await.unwrap();
    assert_eq!(
        runner.status(spec.project).await.unwrap().state,
        State::Stopped,
        "seen by the former one too"
    );
    runner.remove(spec.project).await.unwrap();
    runner.remove(stopped.project).await.unwrap();
}

async fn stopping(harness: &dyn Harness) {
    let runner = harness.runner();
    let spec = harness.spec().await;
    let first = runner.start(&spec).await.unwrap();
    let mut process = exec(&*runner, spec.project, "sleep 1000").await;
    let stopped = runner.stop(spec.project, GRACE).await.unwrap();
    assert_eq!((stopped.state, stopped.epoch), (State::Stopped, Some(spec.epoch)));
    assert_eq!(stopped.reason, None, "it was asked for");
    let exit = tokio::time::timeout(LIMIT, process.handle.wait()).await.expect("it ended").unwrap();
    assert!(matches!(exit, Exit::Signal(_)), "{exit:?}");
    let exec = runner.exec(spec.project, ExecRequest::default()).await;
    assert!(matches!(exec, Err(Error::NotRunning { .. })), "{exec:?}");
    assert_eq!(runner.stop(spec.project, GRACE).await.unwrap(), stopped, "stopping again changes nothing");

    let spec = ProjectSpec { epoch: spec.epoch.next(), ..spec };
    let second = runner.start(&spec).await.unwrap();
    assert_eq!((second.state, second.epoch), (State::Running, Epoch::FIRST.next().into()));
    assert!(second.started >= first.started);
    runner.remove(spec.project).await.unwrap();
    runner.remove(spec.project).await.unwrap();
    assert_eq!(runner.status(spec.project).await.unwrap().state, State::Stopped);
}

async fn dropped(harness: &dyn Harness) {
    let runner = harness.runner();
    let spec = harness.spec().await;
    for millis in [0, 1, 30, 200] {
        let started = tokio::time::timeout(Duration::from_millis(millis), runner.start(&spec)).await;
        drop(started);
        let status = runner.start(&spec).await.unwrap();
        assert_eq!(status.state, State::Running);
        drop(tokio::time::timeout(Duration::from_millis(millis), runner.stop(spec.project, GRACE)).await);
        assert_eq!(runner.stop(spec.project, GRACE).await.unwrap().state, State::Stopped);
        assert_eq!(runner.status(spec.project).await.unwrap().state, State::Stopped);
    }
    runner.remove(spec.project).await.unwrap();
}

async fn apart(harness: &dyn Harness) {
    let runner = harness.runner();
    let (one, other) = (harness.spec().await, harness.spec().await);
    runner.start(&one).await.unwrap();
    let before = runner.start(&other).await.unwrap();
    let port = harness.echo_server(one.project).await;
    let across = runner.dial(other.project, port).await.map(drop);
    assert!(matches!(across, Err(Error::Refused { .. })), "another project's port: {across:?}");
    runner.remove(one.project).await.unwrap();
    assert_eq!(runner.status(other.project).await.unwrap(), before);
    assert_eq!(run(&*runner, other.project, "echo still here").await.1, "still here\n");
    let list = runner.list().await.unwrap();
    assert!(list.is_sorted_by_key(|status| status.project), "ordered");
    runner.remove(other.project).await.unwrap();
}

async fn limits(harness: &dyn Harness) {
    let runner = harness.runner();
    let none = Limits::default();
    let unknown = runner.set_limits(ProjectId::random(), &none).await;
    assert!(matches!(unknown, Err(Error::NotRunning { .. })), "{unknown:?}");
    let spec = harness.spec().await;
    let before = runner.start(&spec).await.unwrap();
    let mut process = exec(&*runner, spec.project, "cat").await;

    let can = runner.capabilities();
    let asked = Limits { pids: Some(500), nofile: Some(400), cpu_weight: Some(200), ..none.clone() };
    let changed = runner.set_limits(spec.project, &asked).await;
    let kept: Vec<_> = asked.asked().filter(|kind| !can.unenforced.contains(kind)).collect();
    match &changed {
        Ok(applied) => {
            let held: Vec<_> = asked.asked().map(|kind| (kind, applied.limits.of(kind))).collect();
            let wanted: Vec<_> = asked.asked().map(|kind| (kind, asked.of(kind))).collect();
            assert_eq!(held, wanted, "what was asked for");
        }
        Err(Error::Invalid { reason, .. }) if kept.len() < asked.asked().count() => {
            let named = can.unenforced.iter().any(|kind| reason.contains(&kind.to_string()));
            assert!(named, "it says which limit can't be enforced: {reason}");
        }
        Err(error) => panic!("{error}"),
    }
    if can.limits {
        let applied = changed.unwrap();
        assert!(!applied.later.contains(&LimitKind::Pids), "counted at once");
        for (wrong, what) in [
            (Limits { pids: Some(1), ..none.clone() }, "processes"),
            (Limits { memory_bytes: Some(1), ..none.clone() }, "memory"),
        ] {
            let refused = runner.set_limits(spec.project, &wrong).await;
            let Err(Error::Invalid { reason, .. }) = refused else { panic!("{wrong:?}: {refused:?}") };
            assert!(reason.contains(what), "{reason}");
        }
    }
    runner.set_limits(spec.project, &none).await.expect("the defaults are always kept");
    assert_eq!(runner.status(spec.project).await.unwrap(), before, "it goes on");
    process.stdin.write_all(b"still here").await.unwrap();
    assert_eq!(finish(process).await.1, "still here", "and so do its processes");
    runner.stop(spec.project, GRACE).await.unwrap();
    let stopped = runner.set_limits(spec.project, &none).await;
    assert!(matches!(stopped, Err(Error::NotRunning { .. })), "{stopped:?}");
    runner.remove(spec.project).await.unwrap();
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use cocalc_core::{
        clock::SystemClock,
        memory::runner::MemoryRunner,
        runner::{Isolation, Limits},
    };

    use super::*;

    struct Memory {
        runner: MemoryRunner,
        slot: AtomicU32,
    }

    #[async_trait::async_trait]
    impl Harness for Memory {
        fn runner(&self) -> Arc<dyn Runner> {
            Arc::new(self.runner.clone())
        }

        async fn reopen(&self) -> Arc<dyn Runner> {
            Arc::new(self.runner.clone())
        }

        async fn spec(&self) -> ProjectSpec {
            ProjectSpec {
                project: ProjectId::random(),
                epoch: Epoch::FIRST,
                volume: "/nowhere".into(),
                image: None,
                slot: self.slot.fetch_add(1, Ordering::Relaxed),
                limits: Limits::default(),
                env: [("FROM_SPEC".to_owned(), "yes".to_owned())].into(),
                isolation: Isolation::default(),
            }
        }

        async fn echo_server(&self, project: ProjectId) -> u16 {
            let mut listener = self.runner.listen(project, 4000).unwrap();
            tokio::spawn(async move {
                while let Some(stream) = listener.accept().await {
                    let (mut reader, mut writer) = tokio::io::split(stream);
                    tokio::spawn(async move { tokio::io::copy(&mut reader, &mut writer).await });
                }
            });
            4000
        }
    }

    #[tokio::test]
    async fn memory_keeps_the_contract() {
        contract(&Memory { runner: MemoryRunner::new(Arc::new(SystemClock)), slot: AtomicU32::new(0) }).await;
    }
}
