//! What runs inside projects: services that outlive the daemon, a helper that does
//! not do its work, memory for secrets, what is measured, and podman that hangs.
//! Needs root.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

#[path = "world/mod.rs"]
mod world;

use std::{
    os::unix::net::UnixListener,
    path::PathBuf,
    process::Command as Program,
    time::{Duration, Instant},
};

use cocalc_core::{
    apps::{Service, Services},
    ids::ProjectId,
    runner::{Command, Error, ExecRequest, Exit, Process, Pty, Runner, State, Tool, WindowSize},
};
use cocalc_podman::Podman;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use world::{World, until};

fn line(text: &str) -> ExecRequest {
    ExecRequest { command: Command::Line(text.into()), ..ExecRequest::default() }
}

async fn services(podman: &Podman, project: ProjectId) -> Vec<Service> {
    podman.services(project, 0, Duration::ZERO).await.unwrap().services
}

fn socket(world: &World, project: ProjectId) -> PathBuf {
    let sockets = PathBuf::from("/run/cocalc").join(world.instance.to_string()).join("sockets");
    sockets.join(format!("{project}.sock"))
}

#[tokio::test(flavor = "multi_thread")]
async fn services_outlive_who_started_them_and_end_with_their_project() {
    let world = World::new().await;
    let spec = world.started(0).await;
    let (podman, project) = (&world.podman, spec.project);
    let app = "echo begun as $(id -un); trap 'echo asked; exit 3' TERM; while :; do sleep 0.1; done";
    podman.start_service(project, "app:one", &line(app)).await.unwrap();
    podman.start_service(project, "app:one", &line("echo another")).await.unwrap();
    podman.start_service(project, "app:two", &line("echo out; echo err >&2; exit 7")).await.unwrap();
    until("the second one has ended", async || {
        services(podman, project).await.iter().any(|one| one.exit == Some(Exit::Code(7)))
    })
    .await;
    let text = async |name: &str, offset: u64| {
        let output = podman.service_output(project, name, offset).await.unwrap();
        (output.offset, String::from_utf8(output.bytes).unwrap())
    };
    until("what it printed is kept", async || text("app:one", 0).await.1 == "begun as user\n").await;
    assert_eq!(text("app:two", 0).await, (0, "out\nerr\n".to_owned()));
    assert_eq!(text("app:two", 4).await, (4, "err\n".to_owned()));
    assert_eq!(text("app:none", 4).await.1, "");

    // Another daemon finds it as it was.
    let builder = world::builder(world.instance, world.state.path(), world.index, &world.volume);
    let again = builder.build().await.unwrap();
    let before = services(&again, project).await.into_iter().find(|one| one.name == "app:one").unwrap();
    assert_eq!((before.run, before.exit), (1, None));
    again.stop_service(project, "app:one", Duration::from_secs(20)).await.unwrap();
    assert!(!services(&again, project).await.iter().any(|one| one.name == "app:one"), "it is forgotten");

    // One that prints without end fills no memory.
    podman
        .start_service(project, "app:flood", &line("yes | head -c 3000000; echo end; sleep 600"))
        .await
        .unwrap();
    until("all of it was printed", async || {
        let (offset, _) = text("app:flood", 0).await;
        text("app:flood", offset + 262_140).await.1.ends_with("end\n")
            || text("app:flood", 3_000_000).await.1 == "end\n"
    })
    .await;
    assert!(text("app:flood", 0).await.0 >= 2_700_000, "only the end is kept");
    podman.stop(project, Duration::from_secs(5)).await.unwrap();
    assert!(matches!(podman.services(project, 0, Duration::ZERO).await, Err(Error::NotRunning { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_project_whose_helper_is_dead_silent_or_lies_is_entered_without_it() {
    let world = World::new().await;
    let spec = world.started(0).await;
    let (project, socket) = (spec.project, socket(&world, spec.project));
    assert_eq!(world.run(project, "id -un").await, "user\n");
    let original = socket.with_extension("kept");
    std::fs::rename(&socket, &original).unwrap();
    let look = "id -u; cat /proc/self/status | grep -E 'Seccomp:|CapBnd|NoNewPrivs'; readlink /proc/self/ns/net; \
        cat /proc/self/cgroup | grep memory";
    // With the helper, for comparison.
    std::fs::rename(&original, &socket).unwrap();
    let with = world.run(project, look).await;
    let modes_with = modes_of(&world, project).await;

    // Dead: nobody listens.
    std::fs::rename(&socket, &original).unwrap();
    let without = world.run(project, look).await;
    assert_eq!(with, without, "the same namespaces, groups, filter and bounding set");
    assert_eq!(world.root(project, "id -u; whoami").await, "0\nroot\n");
    let (exit, text) = world.run_as(project, None, "echo out; echo err >&2; exit 9").await;
    assert_eq!((exit, text.as_str()), (Exit::Code(9), "out\nerr\n"));
    assert_eq!(world.run(project, "printenv FROM_SPEC").await, "yes\n");
    // Other users, of its own files, with their groups; and none that is not there.
    world
        .root(
            project,
            "useradd -m -s /bin/sh -G video other; echo 'odd:x:1500:1500::/nowhere:/no/shell' >>/etc/passwd",
        )
        .await;
    let (_, who) = world.run_as(project, Some("other"), "id -un; id -Gn; pwd; echo $HOME $USER").await;
    assert_eq!(who, "other\nother video\n/home/other\n/home/other other\n");
    assert_eq!(world.run_as(project, Some("odd"), "id -u; pwd").await.1, "1500\n/\n");
    let request = ExecRequest { user: Some("nobody-here".into()), ..line("true") };
    let refused = world.podman.exec(project, request).await.unwrap_err();
    assert!(matches!(&refused, Error::Invalid { reason, .. } if reason.contains("no user")), "{refused}");
    assert_eq!(world.run(project, "pwd").await, "/home/user\n");
    terminals_without_the_helper(&world, project).await;
    assert_eq!(modes_of(&world, project).await, modes_with, "of terminals, as they were asked for");
    nobody_else_sees_the_environment(&world, project).await;
    // What ingresses need inside: here it is refused by the kernel, and says so.
    let tool = Tool::ConnectTcp { host: "127.0.0.1".into(), port: 9 };
    let request = ExecRequest { command: Command::Tool(tool), ..ExecRequest::default() };
    let mut process = world.podman.exec(project, request).await.unwrap();
    let mut answer = String::new();
    process.stdout.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with('-'), "{answer:?}");
    // Files of the tenant's that lead elsewhere do so within the project; and who has
    // none is not locked out.
    world
        .root(project, "mv /etc/passwd /etc/passwd.kept; ln -s ../../../../../etc/passwd.kept /etc/passwd")
        .await;
    assert_eq!(world.run_as(project, Some("other"), "id -un").await.1, "other\n");
    world.root(project, "rm /etc/passwd").await;
    assert_eq!(world.root(project, "id -u; mv /etc/passwd.kept /etc/passwd; id -un").await, "0\nroot\n");

    // Dropping it ends the process inside, not the runtime's own only.
    let mut process = world.podman.exec(project, line("echo up; exec sleep 98765")).await.unwrap();
    let mut up = [0; 3];
    process.stdout.read_exact(&mut up).await.unwrap();
    assert!(world.run(project, "pgrep -f 'sleep 9876[5]' | wc -l").await.trim() == "1");
    drop(process);
    until("it is gone", async || world.run(project, "pgrep -f 'sleep 9876[5]' | wc -l").await.trim() == "0")
        .await;

    // Also if it is dropped before anybody knows which process it is: at any moment of
    // its start.
    for millis in (0..160).step_by(5) {
        let process = world.podman.exec(project, line("exec sleep 65432")).await.unwrap();
        tokio::time::sleep(Duration::from_millis(millis)).await;
        drop(process);
    }
    let pid_files = format!("{}/sockets/exec-", world.instance);
    until("nobody starts anything any more", async || {
        let lines = std::fs::read_dir("/proc").unwrap().flatten();
        let mut lines = lines.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
        !lines.any(|line| String::from_utf8_lossy(&line).contains(&pid_files))
    })
    .await;
    until("all are gone", async || {
        world.run(project, "pgrep -f 'sleep 6543[2]' | wc -l").await.trim() == "0"
    })
    .await;

    // Silent, and lying: a runner that has not seen it fail finds out in time.
    for lies in [false, true] {
        let listener = UnixListener::bind(&socket).unwrap();
        let liar = std::thread::spawn(move || {
            let mut held = Vec::new();
            listener.set_nonblocking(true).unwrap();
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_secs(40) && (held.is_empty() || !lies) {
                if let Ok((mut stream, _)) = listener.accept() {
                    use std::io::Write;
                    if lies {
                        let _ = stream.write_all(&[0xff; 64]);
                    }
                    held.push(stream);
                    if !lies {
                        std::thread::sleep(Duration::from_secs(12));
                        return;
                    }
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        let builder = world::builder(world.instance, world.state.path(), world.index, &world.volume);
        let podman = builder.build().await.unwrap();
        let begun = Instant::now();
        let mut process = podman.exec(project, line("echo mended")).await.unwrap();
        let mut text = String::new();
        process.stdout.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "mended\n");
        assert!(begun.elapsed() < Duration::from_secs(60), "it is not waited for, for ever");
        std::fs::remove_file(&socket).unwrap();
        liar.join().unwrap();
    }
    std::fs::rename(&original, &socket).unwrap();
    world.podman.stop(project, Duration::from_secs(5)).await.unwrap();
}

/// The modes of terminals inside, new ones and such as were asked for, and what they
/// show of a line.
async fn modes_of(world: &World, project: ProjectId) -> Vec<String> {
    // No echo, ^G interrupts, no ^D, returns are not made from line feeds nor the other
    // way round, another speed, and one that nobody knows.
    let asked = vec![(53, 0), (1, 7), (5, 255), (36, 0), (72, 0), (129, 9600), (200, 1)];
    let mut all = Vec::new();
    for modes in [Vec::new(), asked, vec![(51, 0), (70, 0)], [(71, 1)].repeat(300)] {
        let size = WindowSize { cols: 80, rows: 24 };
        let pty = Some(Pty { modes, ..Pty::new("xterm", size) });
        let mut process = world
            .podman
            .exec(project, ExecRequest { pty, ..line("stty -g; stty speed; echo end") })
            .await
            .unwrap();
        let mut shown = String::new();
        let read = process.stdout.read_to_string(&mut shown);
        tokio::time::timeout(Duration::from_secs(60), read).await.unwrap().unwrap();
        assert_eq!(process.handle.wait().await.unwrap(), Exit::Code(0), "{shown:?}");
        all.push(shown);
    }
    assert!(all[0].ends_with("\r\nend\r\n") && all[1].ends_with("\nend\n"), "{all:?}");
    assert!(all[1].contains("9600") && all[1] != all[0], "{all:?}");
    all
}

/// What is in the environment of a process is on no command line that others can read,
/// neither while it starts nor afterwards; and it gets signals.
async fn nobody_else_sees_the_environment(world: &World, project: ProjectId) {
    use std::sync::atomic::{AtomicBool, Ordering};
    let says = |what: &str| {
        let lines = std::fs::read_dir("/proc").unwrap().flatten();
        let lines = lines.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
        lines.filter(|line| String::from_utf8_lossy(line).contains(what)).count()
    };
    let (mut seen, over) = (0, std::sync::Arc::new(AtomicBool::new(false)));
    let looking = over.clone();
    let looks = std::thread::spawn(move || {
        let mut looks = 0;
        while !looking.load(Ordering::Relaxed) {
            seen += says("an-environment-canary");
            looks += 1;
        }
        (looks, seen)
    });
    for pty in [None, Some(Pty::new("xterm", WindowSize { cols: 80, rows: 24 }))] {
        let mut request = ExecRequest {
            pty,
            ..line("trap 'exit 5' USR1; echo $TOLD; while :; do sleep 0.02; done #87654")
        };
        request.env.insert("TOLD".into(), "an-environment-canary".into());
        let mut process = world.podman.exec(project, request).await.unwrap();
        let mut told = [0; 21];
        process.stdout.read_exact(&mut told).await.unwrap();
        assert_eq!(&told, b"an-environment-canary");
        // Between one program and the next there is no line.
        until("its own line is there", async || says("#87654") > 0).await;
        process.handle.signal("USR1").await.unwrap();
        let end = tokio::time::timeout(Duration::from_secs(60), process.handle.wait()).await;
        assert_eq!(end.unwrap().unwrap(), Exit::Code(5));
    }
    over.store(true, Ordering::Relaxed);
    let (looks, seen) = looks.join().unwrap();
    assert!(looks > 1 && seen == 0, "seen {seen} times in {looks} looks");
}

/// A terminal that the runtime carries: it shows, is typed in, has a size that changes,
/// passes signals of keys on, and ends.
async fn terminals_without_the_helper(world: &World, project: ProjectId) {
    let pty = |cols, rows| Pty::new("xterm-256color", WindowSize { cols, rows });
    let shell = ExecRequest { command: Command::Shell, pty: Some(pty(100, 30)), ..ExecRequest::default() };
    let mut process = world.podman.exec(project, shell).await.unwrap();
    assert!(process.stderr.is_none(), "a terminal has one output");
    let mut shown = String::new();
    let mut see = async |process: &mut Process, what: &str| {
        let mut buffer = [0; 4096];
        let begun = Instant::now();
        while !shown.contains(what) {
            assert!(begun.elapsed() < Duration::from_secs(60), "waited for {what:?}: {shown:?}");
            let read = tokio::time::timeout(Duration::from_millis(200), process.stdout.read(&mut buffer));
            match read.await {
                Ok(Ok(0)) => panic!("it ended before {what:?}: {shown:?}"),
                Ok(count) => shown.push_str(&String::from_utf8_lossy(&buffer[..count.unwrap()])),
                Err(_) => {}
            }
        }
        shown.clear();
    };
    // The digits are put together inside, so that the echo does not count.
    process.stdin.write_all(b"tty; stty size; echo $TERM $((40 + 2))-one\n").await.unwrap();
    see(&mut process, "42-one").await;
    process.stdin.write_all(b"stty size; echo $((40 + 3))-two\n").await.unwrap();
    see(&mut process, "30 100\r\n43-two").await;
    process.handle.resize(WindowSize { cols: 91, rows: 21 }).await.unwrap();
    let begun = Instant::now();
    loop {
        // A size may arrive after what was typed next, so it is asked for again.
        let mut buffer = [0; 4096];
        process.stdin.write_all(b"stty size\n").await.unwrap();
        let read = tokio::time::timeout(Duration::from_millis(300), process.stdout.read(&mut buffer)).await;
        if let Ok(count) = read
            && String::from_utf8_lossy(&buffer[..count.unwrap()]).contains("21 91")
        {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "the terminal keeps its size");
    }
    // A key that interrupts.
    process.stdin.write_all(b"echo $((40 + 4))-sleeps; sleep 86400\n").await.unwrap();
    see(&mut process, "44-sleeps").await;
    let mut tries = 0;
    loop {
        process.stdin.write_all(b"\x03echo $((40 + 5))-awake\n").await.unwrap();
        let found = tokio::time::timeout(Duration::from_secs(5), see(&mut process, "45-awake")).await;
        tries += 1;
        assert!(tries < 12, "it cannot be interrupted");
        if found.is_ok() {
            break;
        }
    }
    // An interrupt throws away what was typed a moment before or after it.
    let mut rest = Vec::new();
    for tries in 0.. {
        assert!(tries < 12, "it does not end: {}", String::from_utf8_lossy(&rest));
        let _ = process.stdin.write_all(b"\x03\nexit 9\n").await;
        let end = process.stdout.read_to_end(&mut rest);
        if let Ok(ended) = tokio::time::timeout(Duration::from_secs(5), end).await {
            ended.unwrap();
            break;
        }
    }
    assert_eq!(process.handle.wait().await.unwrap(), Exit::Code(9));

    // The end of what is typed ends what reads it; root has one, too.
    let request =
        ExecRequest { pty: Some(pty(80, 24)), user: Some("root".into()), ..line("id -un; cat; exit 4") };
    let mut process = world.podman.exec(project, request).await.unwrap();
    process.stdin.shutdown().await.unwrap();
    let mut rest = String::new();
    process.stdout.read_to_string(&mut rest).await.unwrap();
    assert!(rest.starts_with("root\r\n"), "{rest:?}");
    assert_eq!(process.handle.wait().await.unwrap(), Exit::Code(4));

    // Dropped, it is gone.
    let request = ExecRequest { pty: Some(pty(80, 24)), ..line("echo up; exec sleep 76543") };
    let mut process = world.podman.exec(project, request).await.unwrap();
    let mut up = [0; 2];
    process.stdout.read_exact(&mut up).await.unwrap();
    drop(process);
    until("it is gone", async || world.run(project, "pgrep -f 'sleep 7654[3]' | wc -l").await.trim() == "0")
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_have_memory_of_the_user_alone_and_what_is_used_is_measured() {
    let world = World::new().await;
    let spec = world.started(0).await;
    let project = spec.project;
    let about = world.run(project, "stat -f -c %T /run/secrets; stat -c '%U %a' /run/secrets").await;
    assert_eq!(about, "tmpfs\nuser 700\n");
    world.run(project, "printf s3cr3t-canary-4711 >/run/secrets/TOKEN && chmod 600 /run/secrets/TOKEN").await;
    world.root(project, "useradd -m other").await;
    let (exit, _) = world.run_as(project, Some("other"), "cat /run/secrets/TOKEN").await;
    assert_ne!(exit, Exit::Code(0));

    world
        .run(
            project,
            "head -c 3000000 /dev/zero >~/data && sync ~/data; head -c 30000000 /dev/zero | sha256sum",
        )
        .await;
    let stats = world.podman.stats(project).await.unwrap();
    assert!(
        stats.cpu_micros > 0 && stats.memory_bytes > 0 && stats.memory_limit_bytes.is_some(),
        "{stats:?}"
    );
    assert_eq!(stats.oom_kills, 0);
    let hog = "python3 -c 'x = bytearray(1 << 33)'";
    let limits = cocalc_core::runner::Limits { memory_bytes: Some(256 << 20), ..Default::default() };
    world.podman.set_limits(project, &limits).await.unwrap();
    let (exit, _) = world.run_as(project, None, hog).await;
    assert_ne!(exit, Exit::Code(0));
    let stats = world.podman.stats(project).await.unwrap();
    assert!(stats.oom_kills >= 1 || exit == Exit::Code(1), "{stats:?} {exit:?}");

    // Neither in the volume, nor known to podman, nor in anybody's environment.
    let grep =
        Program::new("grep").args(["-r", "-l", "s3cr3t-canary-4711"]).arg(&spec.volume).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&grep.stdout), "");
    let names = world::must(Program::new("podman").args(["ps", "-a", "--format", "{{.Names}}"]));
    let name = names.lines().find(|name| name.contains(&project.to_string())).unwrap().to_owned();
    let inspected = world::must(Program::new("podman").args(["inspect", &name]));
    assert!(!inspected.contains("s3cr3t-canary-4711"));
    world.podman.stop(project, Duration::from_secs(5)).await.unwrap();
    world.podman.start(&spec).await.unwrap();
    let (exit, _) = world.run_as(project, None, "test -e /run/secrets/TOKEN").await;
    assert_ne!(exit, Exit::Code(0), "it went with the memory");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_podman_that_hangs_holds_up_nobody_and_what_was_meddled_with_is_seen() {
    let world = World::new().await;
    let (one, two) = (world.started(0).await, world.started(1).await);
    let (wrapper, switch) = world::podman_that_may_hang(world.state.path());
    let builder = world::builder(world.instance, world.state.path(), world.index, &world.volume);
    let podman = builder.podman(&wrapper).build().await.unwrap();
    std::fs::write(&switch, "").unwrap();
    let quickly = async {
        let all = podman.list().await.unwrap();
        assert_eq!(all.iter().filter(|status| status.state == State::Running).count(), 2, "adopted");
        podman.status(one.project).await.unwrap();
        let mut process = podman.exec(one.project, line("echo still")).await.unwrap();
        let mut text = String::new();
        process.stdout.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "still\n");
        assert!(podman.stats(one.project).await.unwrap().pids > 0);
        assert!(matches!(podman.dial(one.project, 1).await, Err(Error::Refused { .. })));
    };
    tokio::time::timeout(Duration::from_secs(50), quickly).await.expect("nothing of that asks podman");
    std::fs::remove_file(&switch).unwrap();

    // Somebody removes a container by hand, and has one of their own.
    let name = format!("{}", one.project);
    let names = world::must(Program::new("podman").args(["ps", "-a", "--format", "{{.Names}}"]));
    let container = names.lines().find(|line| line.contains(&name)).unwrap().to_owned();
    world::must(Program::new("podman").args(["rm", "-f", "-t", "0", &container]));
    until("it is seen", async || podman.status(one.project).await.unwrap().state == State::Stopped).await;
    let status = podman.status(two.project).await.unwrap();
    assert_eq!(status.state, State::Running);
    let begun = status.started;
    podman.start(&one).await.unwrap();
    assert_eq!(podman.status(one.project).await.unwrap().state, State::Running);
    assert_eq!(podman.status(two.project).await.unwrap().started, begun, "the other was left alone");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_finds_podman_hanging_starts_and_what_runs_goes_on() {
    let world = World::new().await;
    let (one, two) = (world.started(0).await, world.started(1).await);
    let (stopped, fresh) = (world.started(2).await, world.project(3));
    world.podman.stop(stopped.project, Duration::from_secs(5)).await.unwrap();
    let before = world.podman.status(one.project).await.unwrap();
    let (wrapper, switch) = world::podman_that_may_hang(world.state.path());
    std::fs::write(&switch, "").unwrap();
    // One that the former daemon was about to start when it was killed.
    let cut_off = ProjectId::random();
    let notes = PathBuf::from("/run/cocalc").join(world.instance.to_string()).join("running");
    let note = std::fs::read_to_string(notes.join(format!("{}.json", one.project))).unwrap();
    let mut note: serde_json::Value = serde_json::from_str(&note).unwrap();
    note["run"] = serde_json::Value::Null;
    let intent = notes.join(format!("{cut_off}.json"));
    std::fs::write(&intent, note.to_string()).unwrap();

    let builder = world::builder(world.instance, world.state.path(), world.index, &world.volume);
    let podman = builder.podman(&wrapper).build().await.expect("it starts all the same");
    assert!(podman.capabilities().backend.contains("does not say"), "{}", podman.capabilities().backend);
    assert_eq!(podman.status(one.project).await.unwrap(), before, "the same state, epoch and time");
    assert_eq!(podman.list().await.unwrap().len(), 2);
    let text = world::run_in(&podman, one.project, None, "echo still; printenv FROM_SPEC").await;
    assert_eq!(text, "still\nyes\n");
    assert!(podman.stats(two.project).await.unwrap().pids > 0);
    assert!(matches!(podman.dial(one.project, 1).await, Err(Error::Refused { .. })));
    assert_eq!(podman.start(&one).await.unwrap(), before, "it is not started again");
    // What was never started, and what was stopped, is known not to run.
    assert_eq!(podman.status(stopped.project).await.unwrap().state, State::Stopped);
    // Of what may run that is not said, and nothing is done to it.
    for refused in [
        podman.status(cut_off).await.map(drop),
        podman.exec(cut_off, line("true")).await.map(drop),
        podman.start(&fresh).await.map(drop),
    ] {
        let error = refused.unwrap_err();
        assert!(matches!(&error, Error::Unknown { reason, .. } if reason.contains("podman")), "{error:?}");
    }
    // One that dies meanwhile is seen to, although podman does not say of what.
    world::must(Program::new("kill").args(["-9", &world.first_process(two.project)]));
    let dies = async {
        until("its end is seen", async || podman.status(two.project).await.unwrap().state == State::Stopped)
            .await;
    };
    dies.await;
    assert!(podman.status(two.project).await.unwrap().reason.is_some());

    // podman is mended, which is found by itself.
    std::fs::remove_file(&switch).unwrap();
    let begun = Instant::now();
    while podman.status(cut_off).await.is_err() {
        assert!(begun.elapsed() < Duration::from_secs(300), "podman answers, and nobody asks it");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(podman.status(cut_off).await.unwrap().state, State::Stopped, "there is no container of it");
    assert_eq!(podman.status(one.project).await.unwrap(), before, "untouched");
    assert!(podman.list().await.unwrap().iter().any(|status| status.project == stopped.project));
    assert_eq!(podman.start(&fresh).await.unwrap().state, State::Running);
    assert_eq!(podman.start(&two).await.unwrap().state, State::Running);
    podman.stop(one.project, Duration::from_secs(5)).await.unwrap();
    assert!(!notes.join(format!("{}.json", one.project)).exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_of_others_are_neither_listed_nor_touched() {
    let world = World::new().await;
    let spec = world.started(0).await;
    // One of somebody else's, which runs; one with our instance but no project of ours;
    // and one whose name looks like ours.
    let empty = tempfile::tempdir().unwrap();
    std::fs::create_dir(empty.path().join("bin")).unwrap();
    let helper = PathBuf::from("/run/cocalc").join(world.instance.to_string()).join("helper");
    cocalc_testkit::executable::copy(&helper, &empty.path().join("bin/init"));
    let names = [
        format!("foreign-{}", ProjectId::random()),
        format!("cocalc-{}-{}", world.instance, ProjectId::random()),
        format!("odd-{}", ProjectId::random()),
    ];
    for name in &names {
        let mut podman = Program::new("podman");
        podman.args(["--runtime", "runc", "create", "--network", "none", "--name", name]);
        if name.starts_with("odd-") {
            podman.args(["--label", &format!("cocalc.instance={}", world.instance), "--label"]);
            podman.arg("cocalc.project=not-a-project");
        }
        podman.arg("--rootfs").arg(empty.path()).arg("/bin/init");
        world::must(&mut podman);
    }
    let again = world::builder(world.instance, world.state.path(), world.index, &world.volume);
    let again = again.build().await.unwrap();
    let list = again.list().await.unwrap();
    assert_eq!(list.iter().map(|status| status.project).collect::<Vec<_>>(), [spec.project]);
    again.remove(spec.project).await.unwrap();
    let there = world::must(Program::new("podman").args(["ps", "-a", "--format", "{{.Names}}"]));
    for name in &names {
        assert!(there.lines().any(|line| line == name), "{name} is gone: {there}");
        world::must(Program::new("podman").args(["rm", "-f", "-t", "0", name]));
    }
}
