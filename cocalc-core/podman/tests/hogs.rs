//! Projects that take all they can get, beside others that don't. Needs root.
//!
//! How much slower the others get is measured in the bench; here they have to
//! be alive and right, and the limits have to hold.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

#[path = "world/mod.rs"]
mod world;

use std::{process::Command, time::Duration};

use cocalc_core::runner::{Command as Run, ExecRequest, Limits, ProjectSpec, Runner, State};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use world::{World, must};

/// Forks for ever, whatever it is told.
const BOMB: &str = "import os\nwhile True:\n try: os.fork()\n except OSError: pass";
/// Takes memory until it is killed, and again.
const MEMORY: &str = "import os\nwhile True:\n if os.fork() == 0:\n  all = []\n  while True: all.append(bytearray(8 << 20))\n os.wait()";
/// Fills the disk, and goes on trying.
const DISK: &str = "import os, time\nn = 0\nwhile True:\n n += 1\n try:\n  with open(os.path.expanduser(f\"~/fill{n}\"), \"wb\") as f:\n   while True: f.write(os.urandom(1 << 20)); f.flush()\n except OSError: time.sleep(0.05)";
/// Writes into the log of the project, with a copy of the first process's output:
/// root inside can take one.
const LOG: &str = "import ctypes, os\nfd = ctypes.CDLL(None).syscall(438, os.pidfd_open(1), 1, 0)\nwhile True: os.write(fd, b\"flood \" * 1000 + b\"\\n\")";
/// Sends what nobody asked for, to its host, its neighbours and the world.
const NETWORK: &str = "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\nwhile True:\n for to in (\"198.51.100.77\", \"100.100.0.1\", \"255.255.255.255\", \"127.0.0.11\"):\n  try: s.sendto(b\"x\" * 1400, (to, 53))\n  except OSError: pass";

/// Starts a hog that outlives the call.
async fn set_off(world: &World, spec: &ProjectSpec, user: Option<&str>, script: &str) {
    std::fs::write(spec.volume.join("home/hog.py"), script).unwrap();
    let line = "setsid -f python3 /home/user/hog.py </dev/null >/dev/null 2>&1";
    let (exit, said) = world.run_as(spec.project, user, &format!("HOME=/home/user; {line}")).await;
    assert_eq!(exit, cocalc_core::runner::Exit::Code(0), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn hogs_are_contained_and_their_neighbours_go_on() {
    let world = World::new().await;
    let normal = [world.started(0).await, world.started(1).await, world.started(2).await];
    let before: Vec<_> = {
        let mut before = Vec::new();
        for spec in &normal {
            world.run(spec.project, "echo kept > ~/kept").await;
            before.push(world.podman.status(spec.project).await.unwrap());
        }
        before
    };

    let small = |slot: u32, limits: Limits| {
        let mut spec = world.project(slot);
        spec.limits = Limits { cpu_millis: Some(100), ..limits };
        spec
    };
    let bomb = small(10, Limits { pids: Some(100), ..Limits::default() });
    let memory = small(11, Limits { memory_bytes: Some(96 << 20), ..Limits::default() });
    let mut disk = small(12, Limits::default());
    let log = small(13, Limits { log_bytes: Some(256 << 10), ..Limits::default() });
    let network = small(14, Limits::default());
    // A file system of its own in place of the quota, which the storage's tests
    // are about.
    let dir = tempfile::tempdir().unwrap();
    let (file, mount) = (dir.path().join("small.img"), dir.path().join("small"));
    std::fs::create_dir(&mount).unwrap();
    std::fs::File::create(&file).unwrap().set_len(120 << 20).unwrap();
    must(Command::new("mkfs.btrfs").arg("-q").arg(&file));
    must(Command::new("mount").args(["-o", "loop,nosuid,nodev"]).arg(&file).arg(&mount));
    disk.volume = mount.clone();

    for (spec, user, script) in [
        (&bomb, None, BOMB),
        (&memory, None, MEMORY),
        (&disk, None, DISK),
        (&log, Some("root"), LOG),
        (&network, None, NETWORK),
    ] {
        world.podman.start(spec).await.unwrap();
        set_off(&world, spec, user, script).await;
    }
    world::until("every hog is at its limit", async || {
        world.podman.stats(bomb.project).await.unwrap().pids >= 90
            && world.podman.stats(memory.project).await.unwrap().oom_kills > 2
            && world.run_as(disk.project, None, "echo x > ~/more && sync ~/more").await.1.contains("No space")
    })
    .await;

    // The others answer, rightly, from all they have: files, processes, network.
    for round in 0..5 {
        for spec in &normal {
            let line = format!(
                "echo {round} > ~/round; cat ~/kept ~/round; python3 -c 'print(sum(range({round} * 1000)))'; \
                 head -c 1M /dev/zero | sha256sum | cut -c1-8"
            );
            let sum = (0..round * 1000).sum::<u64>();
            assert_eq!(world.run(spec.project, &line).await, format!("kept\n{round}\n{sum}\n30e14955\n"));
        }
    }
    for (spec, before) in normal.iter().zip(before) {
        assert_eq!(world.podman.status(spec.project).await.unwrap(), before, "it was not disturbed");
    }

    // The limits held, all the while.
    let stats = world.podman.stats(bomb.project).await.unwrap();
    assert!(stats.pids <= 100, "{}", stats.pids);
    let stats = world.podman.stats(memory.project).await.unwrap();
    assert!(stats.memory_bytes <= 96 << 20, "{}", stats.memory_bytes);
    assert_eq!(
        world.podman.status(memory.project).await.unwrap().state,
        State::Running,
        "its first process lives"
    );
    let file = world.state.path().join("logs").join(format!("{}.log", log.project));
    // What is full begins anew.
    world::until("the log is seen with something in it", async || {
        let length = std::fs::metadata(&file).unwrap().len();
        assert!(length < 512 << 10, "the log has {length} bytes");
        length > 1000 && world.podman.logs(log.project, 2).await.unwrap().contains("flood")
    })
    .await;
    let used = |cpu: u64| cpu as f64 / 1e6;
    let begun = (std::time::Instant::now(), world.podman.stats(network.project).await.unwrap().cpu_micros);
    tokio::time::sleep(Duration::from_secs(2)).await;
    let cpu = used(world.podman.stats(network.project).await.unwrap().cpu_micros - begun.1);
    let share = cpu / begun.0.elapsed().as_secs_f64();
    // A tenth of a core, and what a tick of accounting may add.
    assert!(share < 0.2, "{share} of a core");

    // Each of them stops when it is told to, and others start.
    for spec in [&bomb, &memory, &disk, &log, &network] {
        let stopped = world.podman.stop(spec.project, Duration::from_millis(200)).await.unwrap();
        assert_eq!(stopped.state, State::Stopped);
    }
    let late = world.started(3).await;
    assert_eq!(world.run(late.project, "echo started").await, "started\n");
    world.podman.remove(disk.project).await.unwrap();
    must(Command::new("umount").arg(&mount));
}

/// Takes more memory than there is.
const HOG: &str = "x = bytearray(400 << 20)";
/// The same with two processes, neither of which has most of it.
const HOGS: &str = "import os; x = bytearray(30 << 20); os.fork(); y = bytearray(400 << 20)";

/// Uses up the memory of a project once `before` is done; root inside ends the project
/// when `then` says so.
async fn use_up_memory(world: &World, spec: &ProjectSpec, hog: &str, before: impl FnOnce(), then: &str) {
    let line = format!("echo up; read go; python3 -c '{hog}'; {then}");
    let request =
        ExecRequest { command: Run::Line(line), user: Some("root".into()), ..ExecRequest::default() };
    let mut process = world.podman.exec(spec.project, request).await.unwrap();
    process.stdout.read_exact(&mut [0; 3]).await.unwrap();
    before();
    process.stdin.write_all(b"\n").await.unwrap();
    // Where it takes its project along, nobody sees its end.
    let _ = tokio::time::timeout(Duration::from_secs(60), process.handle.wait()).await.expect("it ends");
}

/// Why a project has ended that was running a moment ago.
async fn reason(world: &World, spec: &ProjectSpec) -> String {
    let begun = std::time::Instant::now();
    loop {
        let status = world.podman.status(spec.project).await.unwrap();
        if let (State::Stopped, Some(reason)) = (status.state, status.reason) {
            return reason;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "its end is not seen: slot {}", spec.slot);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_end_for_want_of_memory_is_always_told_and_another_never_taken_for_one() {
    let world = World::new().await;
    let rounds = if std::env::var_os("COCALC_FULL").is_some() {
        20
    } else {
        eprintln!("5 of 20 rounds: COCALC_FULL=1 runs them all");
        5
    };
    let small = |slot| {
        let limits = Limits { memory_bytes: Some(96 << 20), ..Limits::default() };
        ProjectSpec { limits, ..world.project(slot) }
    };
    let [first, other, plain, late] = [0, 1, 2, 3].map(small);
    let kill = |spec: &ProjectSpec| {
        must(Command::new("kill").args(["-9", &world.first_process(spec.project)]));
    };
    for round in 0..rounds {
        let one = async {
            // The kernel's choice is the first process, with which all others end at once.
            world.podman.start(&first).await.unwrap();
            let adjust = format!("/proc/{}/oom_score_adj", world.first_process(first.project));
            // What was started before does not inherit it.
            use_up_memory(&world, &first, HOGS, || std::fs::write(adjust, "1000").unwrap(), "true").await;
            assert_eq!(reason(&world, &first).await, "killed because its memory was used up", "{round}");
        };
        let two = async {
            // Another is killed, and the project ends in the same moment.
            world.podman.start(&other).await.unwrap();
            use_up_memory(&world, &other, HOG, || (), "kill -TERM 1; sleep 60").await;
            let reason = reason(&world, &other).await;
            assert!(
                reason.starts_with("its first process ended")
                    && reason.contains("; before that its memory was used up, and a"),
                "{round}: {reason}"
            );
        };
        let three = async {
            world.podman.start(&plain).await.unwrap();
            kill(&plain);
            assert_eq!(reason(&world, &plain).await, "its first process ended with code 137", "{round}");
        };
        let four = async {
            // Killed by somebody, right after another was killed for memory.
            world.podman.start(&late).await.unwrap();
            use_up_memory(&world, &late, HOG, || (), "true").await;
            kill(&late);
            let reason = reason(&world, &late).await;
            let told =
                reason.strip_prefix("its first process ended with code 137; before that its memory was ");
            assert!(told.is_some_and(|told| told.starts_with("used up, and a")), "{round}: {reason}");
        };
        tokio::join!(one, two, three, four);
    }
    // A daemon that comes later hears it as well.
    for (spec, said) in
        [(&first, "killed because its memory was used up"), (&plain, "its first process ended with code 137")]
    {
        let again = world::builder(world.instance, world.state.path(), world.index, &world.volume);
        let status = again.build().await.unwrap().status(spec.project).await.unwrap();
        assert_eq!((status.state, status.reason.as_deref()), (State::Stopped, Some(said)));
    }
}
