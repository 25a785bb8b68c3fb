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
    runner::{Command, Error, ExecRequest, Exit, Pty, Runner, State, WindowSize},
};
use cocalc_podman::Podman;
use tokio::io::AsyncReadExt;
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

    // Dead: nobody listens.
    std::fs::rename(&socket, &original).unwrap();
    let without = world.run(project, look).await;
    assert_eq!(with, without, "the same namespaces, groups, filter and bounding set");
    assert_eq!(world.root(project, "id -u; whoami").await, "0\nroot\n");
    let (exit, text) = world.run_as(project, None, "echo out; echo err >&2; exit 9").await;
    assert_eq!((exit, text.as_str()), (Exit::Code(9), "out\nerr\n"));
    assert_eq!(world.run(project, "printenv FROM_SPEC").await, "yes\n");
    let pty = Pty::new("xterm", WindowSize { cols: 80, rows: 24 });
    let terminal = ExecRequest { pty: Some(pty), ..line("true") };
    let refused = world.podman.exec(project, terminal).await.unwrap_err();
    assert!(refused.to_string().contains("without it there are no terminals"), "{refused}");

    // What is in its environment is on no command line that others can read.
    let mut request = line("echo up; exec sleep 87654");
    request.env.insert("TOLD".into(), "an-environment-canary".into());
    let mut process = world.podman.exec(project, request).await.unwrap();
    let mut up = [0; 3];
    process.stdout.read_exact(&mut up).await.unwrap();
    let lines: Vec<String> = std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok())
        .map(|line| String::from_utf8_lossy(&line).into_owned())
        .collect();
    assert!(lines.iter().any(|line| line.contains("87654")), "its own is there");
    assert!(!lines.iter().any(|line| line.contains("an-environment-canary")));
    drop(process);

    // Dropping it ends the process inside, not the runtime's own only.
    let mut process = world.podman.exec(project, line("echo up; exec sleep 98765")).await.unwrap();
    let mut up = [0; 3];
    process.stdout.read_exact(&mut up).await.unwrap();
    assert!(world.run(project, "pgrep -f 'sleep 9876[5]' | wc -l").await.trim() == "1");
    drop(process);
    until("it is gone", async || world.run(project, "pgrep -f 'sleep 9876[5]' | wc -l").await.trim() == "0")
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
    // A podman that hangs in every call.
    let wrapper = world.state.path().join("podman");
    cocalc_testkit::executable::write(&wrapper, "#!/bin/sh\nexec sleep 86400\n");
    let real = std::env::split_paths(&std::env::var_os("PATH").unwrap())
        .map(|dir| dir.join("podman"))
        .find(|path| path.exists())
        .unwrap();
    let switch = world.state.path().join("switch");
    let script = format!(
        "#!/bin/sh\nif test -e {switch}; then exec sleep 86400; fi\nexec {real} \"$@\"\n",
        switch = switch.display(),
        real = real.display()
    );
    std::fs::write(&wrapper, script).unwrap();
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
