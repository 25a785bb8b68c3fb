//! Known ways out of containers that need no bug of the kernel, tried on real
//! ones, by who has root inside or the whole volume. Needs root.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

#[path = "world/mod.rs"]
mod world;

use std::{
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use cocalc_core::runner::{self, ExecRequest, Exit, Runner, State};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use world::{World, must};

/// A file of the host's that no project may read, change or own.
struct Secret {
    dir: tempfile::TempDir,
}

impl Secret {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("secret"), "of the host").unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o711)).unwrap();
        Self { dir }
    }

    fn untouched(&self) {
        let about = std::fs::metadata(self.dir.path()).unwrap();
        assert_eq!((about.uid(), about.mode() & 0o7777), (0, 0o711), "its owner and mode");
        let names: Vec<_> =
            std::fs::read_dir(self.dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["secret"]);
        let file = self.dir.path().join("secret");
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "of the host");
        assert_eq!(std::fs::metadata(&file).unwrap().uid(), 0);
    }
}

/// Exchanges two names, over and over, until it is dropped.
struct Exchanging {
    over: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<u64>>,
}

impl Exchanging {
    fn begin(one: &Path, other: &Path) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let (until, one, other) = (over.clone(), one.to_owned(), other.to_owned());
        let thread = std::thread::spawn(move || {
            let mut count = 0;
            while !until.load(Ordering::Relaxed) {
                let exchanged = rustix::fs::renameat_with(
                    rustix::fs::CWD,
                    &one,
                    rustix::fs::CWD,
                    &other,
                    rustix::fs::RenameFlags::EXCHANGE,
                );
                // Gone for a moment, when the host makes what is missing.
                count += u64::from(exchanged.is_ok());
                if count % 64 == 0 {
                    std::thread::yield_now();
                }
            }
            count
        });
        Self { over, thread: Some(thread) }
    }

    fn end(mut self) -> u64 {
        self.over.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn names_exchanged_for_links_while_the_host_works_lead_nowhere() {
    let world = World::new().await;
    let secret = Secret::new();
    let digest = world::IMAGE.to_string();
    for (round, place) in ["home", "system", &format!("system/{digest}/upper")].into_iter().enumerate() {
        let spec = world.project(u32::try_from(round).unwrap());
        let path = spec.volume.join(place);
        std::fs::create_dir_all(&path).unwrap();
        let link = path.with_extension("link");
        std::os::unix::fs::symlink(secret.dir.path(), &link).unwrap();
        let exchanging = Exchanging::begin(&path, &link);
        let mut outcomes = (0, 0);
        for _ in 0..8 {
            // Either of them may be seen; the link is never followed.
            match world.podman.start(&spec).await {
                Ok(_) => {
                    outcomes.0 += 1;
                    let (exit, said) =
                        world.run_as(spec.project, Some("root"), "cat /home/user/secret /secret").await;
                    assert_ne!(exit, Exit::Code(0), "{place}: {said}");
                    world
                        .run_as(spec.project, Some("root"), "chmod 777 /home/user; touch /home/user/made")
                        .await;
                }
                Err(_) => outcomes.1 += 1,
            }
            world.podman.remove(spec.project).await.unwrap();
        }
        assert!(exchanging.end() > 100, "{place}: there was a race");
        secret.untouched();
        assert_eq!(outcomes.0 + outcomes.1, 8);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_process_leads_nowhere() {
    let world = World::new().await;
    let spec = world.started(10).await;
    let helper = Path::new("/run/cocalc").join(world.instance.to_string()).join("helper");
    let before = std::fs::read(&helper).unwrap();
    // Writing to the program that the host made (as runc's once was overwritten),
    // by its name, by a running process, and once nobody runs it.
    for line in [
        "echo evil > /dev/cocalc-init",
        "echo evil > /proc/1/exe",
        "exec 9< /proc/1/exe; echo evil > /proc/self/fd/9",
        "rm -f /dev/cocalc-init && echo evil > /dev/cocalc-init",
        "mv /dev/cocalc-init /dev/other",
        "cp /bin/true /proc/1/root/dev/cocalc-init",
    ] {
        let (exit, said) = world.run_as(spec.project, Some("root"), line).await;
        assert_ne!(exit, Exit::Code(0), "{line}: {said}");
    }
    assert_eq!(std::fs::read(&helper).unwrap(), before);
    // Its root and directory are the project's own, and its descriptors pipes,
    // sockets and the null device.
    let root = world.root(spec.project, "stat -c %d:%i / /proc/1/root/ /proc/1/cwd/ | sort -u | wc -l").await;
    assert_eq!(root, "1\n");
    let open = world.root(spec.project, "for f in /proc/1/fd/*; do readlink $f; done").await;
    for target in open.lines() {
        let known = ["pipe:[", "socket:[", "anon_inode:", "/dev/null"];
        assert!(known.iter().any(|known| target.starts_with(known)), "{target}");
    }
    // An ordinary user sees none of them, and inherits none.
    let (exit, _) = world.run_as(spec.project, None, "ls /proc/1/fd/").await;
    assert_ne!(exit, Exit::Code(0));
    assert_eq!(world.run(spec.project, "exec ls /proc/self/fd").await, "0\n1\n2\n3\n", "3 is the listing's");
    // What root inside kills, stops or renices is the project.
    world.root(spec.project, "kill -STOP 1; kill -KILL 1; true").await;
    assert_eq!(
        world.run(spec.project, "echo alive").await,
        "alive\n",
        "a first process heeds no such signal"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn devices_and_setuid_files_have_no_effect_wherever_they_come_from() {
    let world = World::new().await;
    let spec = world.started(11).await;
    // Made inside.
    for (directory, kind) in
        [("/tmp", "b 7 0"), ("/home/user", "b 7 0"), ("/dev", "c 1 1"), ("/dev/shm", "b 7 0")]
    {
        let (exit, said) =
            world.run_as(spec.project, Some("root"), &format!("mknod {directory}/n {kind}")).await;
        assert_ne!(exit, Exit::Code(0), "{directory}: {said}");
    }
    // Come with a volume, as from a hostile backup: the host's loop device and
    // its memory, open to everybody, in the home and in the root.
    let upper = spec.volume.join("system").join(world::IMAGE.to_string()).join("upper");
    for directory in [spec.volume.join("home"), upper.join("srv")] {
        std::fs::create_dir_all(&directory).unwrap();
        for (name, kind) in [("disk", ["b", "7", "0"]), ("mem", ["c", "1", "1"]), ("zero", ["c", "1", "5"])] {
            let path = directory.join(name);
            must(Command::new("mknod").args(["-m", "666"]).arg(&path).args(kind));
        }
    }
    world.podman.stop(spec.project, Duration::ZERO).await.unwrap();
    world.podman.start(&spec).await.unwrap();
    for user in [None, Some("root")] {
        for path in ["/home/user", "/srv"]
            .iter()
            .flat_map(|dir| ["disk", "mem", "zero"].map(|name| format!("{dir}/{name}")))
        {
            let (exit, said) = world
                .run_as(spec.project, user, &format!("head -c1 {path} | wc -c; head -c1 {path} >/dev/null"))
                .await;
            assert!(exit != Exit::Code(0) && said.starts_with("0\n"), "{path} as {user:?}: {said}");
            assert!(!said.contains("No such file"), "{said}");
        }
    }

    // Setuid: in the home without effect, for root is root of the root alone.
    world.root(spec.project, "install -m 4755 /usr/bin/id /home/user/id; install -m 4755 /usr/bin/id /opt/id; setcap cap_sys_admin+ep /opt/id 2>/dev/null; true").await;
    assert_eq!(world.run(spec.project, "~/id -u").await, "1000\n", "the home is nosuid");
    // From the host's view it is root's and setuid, but on a volume mounted
    // without both: whoever runs it stays who he is.
    let id = spec.volume.join("home/id");
    let about = std::fs::metadata(&id).unwrap();
    assert_eq!((about.uid(), about.mode() & 0o7777), (0, 0o4755), "so it is stored");
    let parents: Vec<_> = id.ancestors().skip(1).filter(|dir| dir.starts_with("/tmp")).collect();
    let former: Vec<_> = parents.iter().map(|dir| std::fs::metadata(dir).unwrap().permissions()).collect();
    for dir in &parents {
        let mode = std::fs::metadata(dir).unwrap().permissions().mode() | 0o055;
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(mode)).unwrap();
    }
    let ran = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(&id)
        .arg("-u")
        .output()
        .unwrap();
    for (dir, permissions) in parents.iter().zip(former) {
        std::fs::set_permissions(dir, permissions).unwrap();
    }
    let said = String::from_utf8_lossy(&ran.stdout).into_owned();
    assert_eq!(said, "65534\n", "{}", String::from_utf8_lossy(&ran.stderr));
}

#[tokio::test(flavor = "multi_thread")]
async fn mounts_pass_in_neither_direction() {
    let world = World::new().await;
    let spec = world.started(12).await;
    world.run(spec.project, "mkdir ~/m; echo mine > ~/m/mine").await;
    let place = spec.volume.join("home/m");
    must(Command::new("mount").args(["-t", "tmpfs", "tmpfs"]).arg(&place));
    std::fs::write(place.join("secret"), "of the host").unwrap();
    let seen = world.root(spec.project, "ls /home/user/m").await;
    must(Command::new("umount").arg(&place));
    assert_eq!(seen, "mine\n");
    let before = std::fs::read_to_string("/proc/self/mountinfo").unwrap().lines().count();
    for line in [
        "mount -t tmpfs x /mnt",
        "mount --bind / /mnt",
        "mount --make-rshared /",
        "mount -t cgroup -o memory x /mnt",
        "mount -t proc x /mnt",
        "mount -o remount,rw /proc/sys",
        "mount -o remount,suid,dev /home/user",
        "umount /home/user",
        "umount -l /sys",
        "umount /proc/sysrq-trigger",
        "unshare -Urm true",
        "unshare -Urp --fork --mount-proc true",
        "unshare -n true",
        "nsenter -t 1 -m true",
        "python3 -c 'import os; os.unshare(os.CLONE_NEWUSER)' || python3 -c 'import ctypes; exit(ctypes.CDLL(None).clone(0, 0, 0x10000000 | 17, 0) <= 0)'",
    ] {
        let (exit, said) = world.run_as(spec.project, Some("root"), line).await;
        assert_ne!(exit, Exit::Code(0), "{line}: {said}");
    }
    // Others start and stop meanwhile, so only what names this project counts.
    let after = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(before > 0 && !after.lines().any(|line| line.contains("home/m")));
}

#[tokio::test(flavor = "multi_thread")]
async fn processes_and_sockets_of_others_are_not_there() {
    let world = World::new().await;
    let (one, other) = (world.started(13).await, world.started(14).await);
    // The neighbour: a process with a secret, and an abstract socket.
    let serve = "exec env MARK=of-the-neighbour python3 -u -c '\nimport os, socket, time\ns = socket.socket(socket.AF_UNIX); s.bind(\"\\0neighbour\"); s.listen()\nm = open(\"/dev/shm/mark\", \"w\"); print(\"up\")\ntime.sleep(600)'";
    let request = ExecRequest { command: runner::Command::Line(serve.into()), ..ExecRequest::default() };
    let mut process = world.podman.exec(other.project, request).await.unwrap();
    BufReader::new(&mut process.stdout).read_line(&mut String::new()).await.unwrap();
    let connect =
        "python3 -c 'import socket; s = socket.socket(socket.AF_UNIX); s.connect(\"\\0neighbour\")'";
    assert_eq!(world.run_as(other.project, None, connect).await.0, Exit::Code(0), "it is there");
    assert_ne!(world.run_as(one.project, Some("root"), connect).await.0, Exit::Code(0));

    let pids =
        |said: String| said.split_whitespace().map(|pid| pid.parse::<u32>().unwrap()).collect::<Vec<_>>();
    let list = "ls /proc | grep '^[0-9]*$'";
    let seen = pids(world.root(one.project, list).await);
    assert!(seen.len() < 12 && seen.contains(&1), "{seen:?}");
    let look = "grep -ls of-the-neighbou[r] /proc/[0-9]*/environ; ls /dev/shm/mark; true";
    let found = world.root(one.project, look).await;
    assert!(!found.contains("/proc/"), "{found}");
    assert!(found.contains("No such file"), "{found}");
    // By the numbers that the host knows them by: signals, tracing, memory.
    let host = world.first_process(other.project);
    let trace = format!(
        "kill -0 {host} || cat /proc/{host}/environ || ls /proc/{host}/root/ || \
         python3 -c 'import ctypes; exit(ctypes.CDLL(None).ptrace(16, {host}, 0, 0) != 0)'"
    );
    let (exit, said) = world.run_as(one.project, Some("root"), &trace).await;
    assert_ne!(exit, Exit::Code(0), "{said}");
    // Shared memory and message queues have keys of their own, too.
    let make = "python3 -c 'import ctypes; print(ctypes.CDLL(None).shmget(4242, 4096, 0o1666))'";
    let find = "python3 -c 'import ctypes; print(ctypes.CDLL(None).shmget(4242, 4096, 0))'";
    assert_ne!(world.run(other.project, make).await, "-1\n");
    assert_eq!(world.root(one.project, find).await, "-1\n");
}

/// Takes the first process's socket, as root inside can, holds the process, and
/// answers in its place: with this, after each request.
const FAKE: &str = r#"
import ctypes, os, socket, sys, time
libc = ctypes.CDLL(None, use_errno=True)
pidfd = os.pidfd_open(1)
for number in range(3, 20):
    fd = libc.syscall(438, pidfd, number, 0)
    if fd < 0: continue
    try:
        listener = socket.socket(fileno=fd)
        if listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN): break
    except OSError: pass
else:
    print("no socket", flush=True); sys.exit(3)
if libc.ptrace(16, 1, 0, 0) != 0:
    print("cannot hold it", ctypes.get_errno(), flush=True); sys.exit(4)
os.waitpid(1, 0x40000000)
listener.setblocking(True)
print("in its place", flush=True)
while True:
    connection, _ = listener.accept()
    answer = ANSWER
    if answer is None: time.sleep(1000)
    try:
        while True:
            connection.sendall(answer)
            if not answer or ONCE: break
        time.sleep(1000 if ONCE == 2 else 0)
    except OSError: pass
"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_first_process_that_lies_or_is_silent_costs_the_host_nothing() {
    let world = World::new().await;
    let other = world.started(15).await;
    for (round, (what, answer, once)) in [
        ("says nothing", "None", "1"),
        ("says a huge length", "b'\\xff\\xff\\xff\\xff' + b'x' * 4096", "0"),
        ("never ends", "b'\\x00\\x00\\x10\\x00' + b'E' * 4096", "0"),
        ("says nonsense", "b'\\x00\\x00\\x00\\x01Z'", "2"),
        ("hangs up", "b''", "1"),
        ("says that it has started, and no more", "b'\\x00\\x00\\x00\\x01S'", "2"),
    ]
    .into_iter()
    .enumerate()
    {
        let spec = world.started(16 + u32::try_from(round).unwrap()).await;
        let script = FAKE.replace("ANSWER", answer).replace("ONCE", once);
        std::fs::write(spec.volume.join("home/fake.py"), script).unwrap();
        let request = ExecRequest {
            command: runner::Command::Line("exec python3 /home/user/fake.py".into()),
            user: Some("root".into()),
            ..ExecRequest::default()
        };
        let mut fake = world.podman.exec(spec.project, request).await.unwrap();
        let mut line = String::new();
        BufReader::new(&mut fake.stdout).read_line(&mut line).await.unwrap();
        assert_eq!(line, "in its place\n", "{what}");

        let begun = Instant::now();
        let request =
            ExecRequest { command: runner::Command::Line("echo hi".into()), ..ExecRequest::default() };
        let started = world.podman.exec(spec.project, request).await;
        // An error in good time; or a process that does nothing, which ends when
        // whoever waits for it lets go.
        if let Ok(mut process) = started {
            let _ = process.stdin.write_all(b"x").await;
            let ended = tokio::time::timeout(Duration::from_millis(500), process.handle.wait()).await;
            drop((ended, process));
        }
        assert!(begun.elapsed() < Duration::from_secs(90), "{what}: {:?}", begun.elapsed());
        // Nobody else notices, and the project still stops and starts.
        assert_eq!(world.run(other.project, "echo fine").await, "fine\n", "{what}");
        let stopped = world.podman.stop(spec.project, Duration::from_millis(500)).await.unwrap();
        assert_eq!(stopped.state, State::Stopped, "{what}");
        world.podman.start(&spec).await.unwrap();
        assert_eq!(world.run(spec.project, "echo again").await, "again\n", "{what}");
        world.podman.remove(spec.project).await.unwrap();
    }
}
