//! The podman runner on real podman, Btrfs and network. Needs root.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

#[path = "world/mod.rs"]
mod world;

use std::{
    os::unix::fs::MetadataExt,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use cocalc_core::{
    ids::ProjectId,
    runner::{Command, Error, ExecRequest, Exit, Limits, ProjectSpec, Runner, State},
};
use cocalc_testkit::runner::{Harness, contract};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use world::World;

#[tokio::test(flavor = "multi_thread")]
async fn what_root_installs_is_in_the_volume_with_canonical_owners_and_survives() {
    let world = World::new().await;
    let spec = world.started(3).await;
    let project = spec.project;
    world
        .root(
            project,
            "useradd -m -u 1234 other && echo tool > /usr/local/bin/tool && chown user: /usr/local/bin/tool",
        )
        .await;
    world.run(project, "sudo -n sh -c 'echo root > /root/made' && echo mine > ~/mine").await;

    let upper = spec.volume.join("system").join(world::IMAGE.to_string()).join("upper");
    let owner = |path: &std::path::Path| {
        let about = std::fs::symlink_metadata(path).unwrap();
        (about.uid(), about.gid())
    };
    assert_eq!(owner(&upper.join("usr/local/bin/tool")), (1000, 1000));
    assert_eq!(owner(&upper.join("root/made")), (0, 0));
    assert_eq!(owner(&upper.join("home/other")), (1234, 1234));
    assert_eq!(owner(&spec.volume.join("home/mine")), (1000, 1000));
    assert!(!upper.join("dev/cocalc-init").exists(), "the helper leaves no trace");
    assert!(!world.volume.root.join("image/root/made").exists(), "the image is untouched");

    let stopped = world.podman.stop(project, Duration::from_secs(5)).await.unwrap();
    assert_eq!((stopped.state, stopped.reason), (State::Stopped, None));
    assert!(matches!(world.podman.dial(project, 80).await, Err(Error::NotRunning { .. })));
    let again = world.podman.start(&spec).await.unwrap();
    assert_eq!(again.state, State::Running);
    assert!(again.started >= stopped.started);
    assert_eq!(world.run(project, "cat /usr/local/bin/tool ~/mine; id -u other").await, "tool\nmine\n1234\n");
    let (exit, _) = world.run_as(project, None, "exit 7").await;
    assert_eq!(exit, Exit::Code(7));
}

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

struct Containers {
    world: World,
    slot: AtomicU32,
}

#[async_trait::async_trait]
impl Harness for Containers {
    fn runner(&self) -> Arc<dyn Runner> {
        Arc::new(self.world.podman.clone())
    }

    async fn reopen(&self) -> Arc<dyn Runner> {
        let world = &self.world;
        let builder = world::builder(world.instance, world.state.path(), world.index, &world.volume);
        Arc::new(builder.build().await.unwrap())
    }

    async fn spec(&self) -> ProjectSpec {
        self.world.project(self.slot.fetch_add(1, Ordering::Relaxed))
    }

    async fn echo_server(&self, project: ProjectId) -> u16 {
        let request = ExecRequest { command: Command::Line(ECHO.into()), ..ExecRequest::default() };
        let mut process = self.world.podman.exec(project, request).await.unwrap();
        let mut line = String::new();
        BufReader::new(&mut process.stdout).read_line(&mut line).await.unwrap();
        // It lives as long as its project.
        std::mem::forget(process);
        line.trim().parse().unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn podman_keeps_the_contract() {
    contract(&Containers { world: World::new().await, slot: AtomicU32::new(0) }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn root_inside_is_nobody_outside() {
    let world = World::new().await;
    let (one, other) = (world.started(0).await, world.started(1).await);
    let map = async |spec: &ProjectSpec| world.root(spec.project, "cat /proc/self/uid_map").await;
    let (a, b) = (map(&one).await, map(&other).await);
    let field = |map: &str, n: usize| map.split_whitespace().nth(n).unwrap().parse::<u64>().unwrap();
    assert_eq!((field(&a, 0), field(&a, 2)), (0, 65_536));
    assert_eq!(field(&b, 1), field(&a, 1) + 65_536, "ranges follow each other");
    assert!(field(&a, 1) >= 0x1000_0000);

    let status = world.root(one.project, "cat /proc/self/status").await;
    let line = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim_start_matches(':').trim().to_owned()
    };
    // chown, dac_override, fowner, fsetid, kill, setgid, setuid, setpcap,
    // net_bind_service, sys_chroot, audit_write, setfcap: nothing else.
    assert_eq!(line("CapBnd"), "00000000a00405fb");
    assert_eq!(line("CapEff"), line("CapBnd"));
    assert_eq!(line("Seccomp"), "2");
    assert_eq!(line("CapAmb"), "0000000000000000");

    for forbidden in [
        "mount -t tmpfs none /mnt",
        "mknod /tmp/disk b 8 0",
        "echo 1 > /proc/sys/kernel/panic",
        "echo x > /proc/sysrq-trigger",
        "ip link set lo down || python3 -c 'import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW)'",
        "python3 -c 'import socket; socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)'",
        "ls /sys/fs/cgroup",
        "ls /sys/class/net",
        "touch /sys/x",
        "touch /dev/cocalc-init",
        "unshare --net true",
    ] {
        let (exit, _) = world.run_as(one.project, Some("root"), forbidden).await;
        assert_ne!(exit, Exit::Code(0), "{forbidden}");
    }
    // What root there does need.
    world.root(one.project, "install -o 1234 -g 1234 -m 4755 /bin/true /opt/t && python3 -c 'import socket; socket.create_server((\"\", 80))'").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn projects_reach_neither_the_host_nor_each_other() {
    let world = World::new().await;
    let (one, other) = (world.started(5).await, world.started(6).await);
    // A service of the host, on every address it has.
    let service = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
    let port = service.local_addr().unwrap().port();
    std::thread::spawn(move || while service.accept().is_ok() {});
    assert!(std::net::TcpStream::connect(("127.0.0.1", port)).is_ok(), "the service is there");

    let script = "import socket\nlistener = socket.create_server(('0.0.0.0', 4444))\nprint('up', flush=True)\nwhile True: listener.accept()";
    let request = ExecRequest {
        command: Command::Argv(vec!["python3".into(), "-c".into(), script.into()]),
        ..ExecRequest::default()
    };
    let mut process = world.podman.exec(other.project, request).await.unwrap();
    let mut line = String::new();
    BufReader::new(&mut process.stdout).read_line(&mut line).await.unwrap();
    world.podman.dial(other.project, 4444).await.unwrap();

    let address = world.run(other.project, "python3 -c 'import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.connect((\"192.0.2.99\", 9)); print(s.getsockname()[0])'").await;
    let gateway = world.run(one.project, "awk '$2 == \"00000000\" {print $3}' /proc/net/route").await;
    let gateway = u32::from_str_radix(gateway.trim(), 16).unwrap().swap_bytes();
    let mut targets: Vec<(String, u16)> = vec![
        (address.trim().to_owned(), 4444),
        (std::net::Ipv4Addr::from_bits(gateway).to_string(), port),
        ("169.254.169.254".into(), 80),
        ("127.0.0.1".into(), port),
    ];
    for host in world::must(std::process::Command::new("hostname").arg("-I")).split_whitespace() {
        targets.push((host.to_owned(), port));
    }
    assert!(targets.len() >= 4);
    for (host, port) in targets {
        let connect =
            format!("python3 -c 'import socket; socket.create_connection((\"{host}\", {port}), 1.5)'");
        let (exit, said) = world.run_as(one.project, None, &connect).await;
        assert_ne!(exit, Exit::Code(0), "{host}:{port} was reached: {said}");
    }
    assert!(std::net::TcpStream::connect(("127.0.0.1", port)).is_ok(), "the service is still there");
    // Nothing is published on the host either.
    assert!(std::net::TcpStream::connect(("127.0.0.1", 4444)).is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_hold_and_the_host_goes_on() {
    let world = World::new().await;
    let mut spec = world.project(9);
    spec.limits = Limits {
        memory_bytes: Some(128 << 20),
        cpu_millis: Some(500),
        pids: Some(100),
        nofile: Some(512),
        ..Limits::default()
    };
    world.podman.start(&spec).await.unwrap();
    let project = spec.project;
    assert_eq!(world.run(project, "ulimit -n").await, "512\n");

    // A fork bomb with an end: more children than the limit, none of which ends.
    let bomb = "for i in $(seq 300); do sleep 30 & done 2>/dev/null; echo over";
    let request = ExecRequest { command: Command::Line(bomb.into()), ..ExecRequest::default() };
    let process = world.podman.exec(project, request).await.unwrap();
    world::until("the bomb has gone off", async || world.podman.stats(project).await.unwrap().pids >= 95)
        .await;
    assert!(world.podman.stats(project).await.unwrap().pids <= 100);
    drop(process);

    // Memory: the process is killed, not the host, and the project can say why
    // or goes on.
    world.podman.stop(project, Duration::ZERO).await.unwrap();
    world.podman.start(&spec).await.unwrap();
    let (exit, said) = world.run_as(project, None, "exec python3 -c 'x = bytearray(400 << 20)'").await;
    assert_ne!(exit, Exit::Code(0), "{said}");
    assert!(!std::path::Path::new("oom").exists(), "nothing is left in the caller's directory");
    let stats = world.podman.stats(project).await;
    if let Ok(stats) = stats {
        assert!(stats.memory_bytes <= 128 << 20);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_change_while_it_runs_and_are_kept_by_the_kernel() {
    let world = World::new().await;
    let mut spec = world.project(10);
    spec.limits = Limits {
        memory_bytes: Some(128 << 20),
        tmp_bytes: Some(8 << 20),
        shm_bytes: Some(8 << 20),
        log_bytes: Some(128 << 10),
        ..Limits::default()
    };
    world.podman.start(&spec).await.unwrap();
    let project = spec.project;
    let memory = || world.limit(project, "memory/memory.limit_in_bytes", "memory.max");
    let pids = || world.limit(project, "pids/pids.max", "pids.max");
    assert_eq!((memory(), pids()), (128 << 20, 4096));
    // What is in memory counts as memory, and has a size of its own.
    for place in ["/tmp", "/dev/shm"] {
        let fill = format!("head -c 20M /dev/zero > {place}/fill");
        let (exit, said) = world.run_as(project, None, &fill).await;
        assert!(exit != Exit::Code(0) && said.contains("No space left"), "{place}: {said}");
        world.run(project, &format!("rm {place}/fill; cp /bin/true {place}/t; {place}/t 2>&1 || true")).await;
    }

    let hold = "exec python3 -c 'x = bytearray(70 << 20); print(1, flush=True); input()'";
    let request = ExecRequest { command: Command::Line(hold.into()), ..ExecRequest::default() };
    let mut holder = world.podman.exec(project, request).await.unwrap();
    BufReader::new(&mut holder.stdout).read_line(&mut String::new()).await.unwrap();
    // Less than it uses: refused, and nothing is killed or changed.
    let less = Limits { memory_bytes: Some(64 << 20), pids: Some(200), ..spec.limits.clone() };
    let Err(Error::Invalid { reason, .. }) = world.podman.set_limits(project, &less).await else {
        panic!("less memory than is used")
    };
    assert!(reason.contains("use"), "{reason}");
    assert_eq!((memory(), pids()), (128 << 20, 4096));

    let more = Limits {
        memory_bytes: Some(256 << 20),
        cpu_millis: Some(250),
        cpu_weight: Some(50),
        pids: Some(64),
        nofile: Some(300),
        tmp_bytes: Some(32 << 20),
        shm_bytes: Some(32 << 20),
        log_bytes: Some(256 << 10),
        ..Limits::default()
    };
    let applied = world.podman.set_limits(project, &more).await.unwrap();
    assert_eq!(applied.later, [cocalc_core::runner::LimitKind::Log]);
    assert_eq!((memory(), pids()), (256 << 20, 64));
    assert!(world.limit(project, "cpu/cpu.shares", "cpu.weight") < 1000);
    assert_eq!(world.run(project, "ulimit -n").await, "300\n");
    for place in ["/tmp", "/dev/shm"] {
        world.run(project, &format!("head -c 20M /dev/zero > {place}/fill")).await;
        let (exit, _) = world.run_as(project, None, &format!("head -c 40M /dev/zero > {place}/fill")).await;
        assert_ne!(exit, Exit::Code(0), "{place}");
        world.run(project, &format!("rm {place}/fill")).await;
    }
    holder.stdin.write_all(b"\n").await.unwrap();
    assert_eq!(holder.handle.wait().await.unwrap(), Exit::Code(0), "it was never disturbed");

    // A daemon that finds it knows, and a limit that this machine can't keep is
    // refused by name or, where it was told so, let be.
    let found = world::builder(world.instance, world.state.path(), world.index, &world.volume);
    let found = found.unenforceable(cocalc_podman::Unenforceable::Accept).build().await.unwrap();
    let weighted = Limits { io_weight: Some(10), ..more.clone() };
    assert_eq!(found.set_limits(project, &weighted).await.unwrap().limits.io_weight, Some(10));
    let refused = world.podman.set_limits(project, &weighted).await;
    let can = world.podman.capabilities();
    if can.unenforced.contains(&cocalc_core::runner::LimitKind::IoWeight) {
        assert!(
            matches!(&refused, Err(Error::Invalid { reason, .. }) if reason.contains("I/O weight")),
            "{refused:?}"
        );
        assert!(can.weaknesses.iter().any(|weakness| weakness.contains("I/O weight")));
    } else {
        refused.unwrap();
    }
    world.podman.stop(project, Duration::ZERO).await.unwrap();
    let stopped = world.podman.set_limits(project, &more).await;
    assert!(matches!(stopped, Err(Error::NotRunning { .. })), "{stopped:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_have_defaults_a_minimum_and_the_machine_as_maximum() {
    let world = World::new().await;
    let mut spec = world.project(14);
    for (wrong, what) in [
        (Limits { memory_bytes: Some(1 << 20), ..Limits::default() }, "memory"),
        (Limits { memory_bytes: Some(1 << 50), ..Limits::default() }, "memory"),
        (Limits { cpu_millis: Some(1), ..Limits::default() }, "core"),
        (Limits { pids: Some(1), ..Limits::default() }, "processes"),
        (Limits { nofile: Some(u32::MAX), ..Limits::default() }, "open files"),
    ] {
        spec.limits = wrong;
        let Err(Error::Invalid { reason, .. }) = world.podman.start(&spec).await else {
            panic!("{:?} is refused", spec.limits)
        };
        assert!(reason.contains(what), "{reason}");
    }
    spec.limits = Limits::default();
    world.podman.start(&spec).await.unwrap();
    assert_eq!(world.run(spec.project, "ulimit -n").await, "8192\n");
    let pids = world.limit(spec.project, "pids/pids.max", "pids.max");
    assert_eq!(pids, 4096);
    let memory = world.limit(spec.project, "memory/memory.limit_in_bytes", "memory.max");
    let about = std::fs::read_to_string("/proc/meminfo").unwrap();
    let total: u64 = about.split_whitespace().nth(1).unwrap().parse().unwrap();
    let quarter = (total * 1024 / 4).max(512 << 20);
    // In whole pages.
    assert!(memory <= quarter && memory + 65_536 > quarter, "{memory} of {quarter}");
}

/// Tries the calls that are refused and their neighbours that are not, and
/// prints the number of each error.
const CALLS: &str = r#"
import ctypes, os, socket, termios
intel = os.uname().machine == "x86_64"
home = os.open(os.path.expanduser("~"), os.O_RDONLY | os.O_DIRECTORY)
libc = ctypes.CDLL(None, use_errno=True)
def error(number, *args):
    ctypes.set_errno(0)
    libc.syscall(number, *(ctypes.c_ulong(arg) if isinstance(arg, int) else arg for arg in args))
    return ctypes.get_errno()
def body(request):
    begins = home.to_bytes(8, "little") + (bytes(48) if request & 0xff in (0x17, 0x18) else b"")
    return (begins + b"made-%x" % request).ljust(4096, b"\0")
for request in (0x5000940e, 0x50009401, 0x50009417, 0x50009418):
    wide = request | 1 << 32
    print(hex(request), error(16 if intel else 29, home, request, body(request)),
          error(16 if intel else 29, home, wide, body(request)))
# The flags of a directory; the size of what is no terminal.
for request in (0x80086601, termios.TIOCGWINSZ):
    print(hex(request), error(16 if intel else 29, home, request, bytes(4096)))
for family in (40, 40 | 1 << 32, socket.AF_INET, socket.AF_UNIX):
    print(hex(family), error(41 if intel else 198, family, 1, 0))
"#;

/// `socketcall(SYS_SOCKET, {FAMILY, 1, 0})` as a 32-bit program makes it: ends
/// well only if there is a socket then.
const OLD_CALL: &str = r#"
import ctypes, mmap, struct
page = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40, prot=7)
start = ctypes.addressof(ctypes.c_char.from_buffer(page))
page[256:268] = struct.pack("III", FAMILY, 1, 0)
# push rbx; mov eax, 102; mov ebx, 1; mov ecx, start + 256; int 0x80; pop rbx; ret
code = b"\x53\xb8\x66\0\0\0\xbb\x01\0\0\0\xb9" + struct.pack("I", start + 256) + b"\xcd\x80\x5b\xc3"
page[:len(code)] = code
got = ctypes.CFUNCTYPE(ctypes.c_int)(start)()
print(got)
raise SystemExit(0 if got >= 0 else 1)
"#;

#[tokio::test(flavor = "multi_thread")]
async fn subvolumes_and_sockets_to_the_hypervisor_are_refused() {
    let world = World::new().await;
    let spec = world.started(15).await;
    let project = spec.project;
    std::fs::write(spec.volume.join("home/calls.py"), CALLS).unwrap();
    for user in [None, Some("root")] {
        let (_, said) = world.run_as(project, user, "HOME=/home/user python3 /home/user/calls.py").await;
        let expected = "0x5000940e 1 1\n0x50009401 1 1\n0x50009417 1 1\n0x50009418 1 1\n\
            0x80086601 0\n0x5413 25\n0x28 97\n0x100000028 97\n0x2 0\n0x1 0\n";
        assert_eq!(said, expected, "as {user:?}");
    }
    if cfg!(target_arch = "x86_64") {
        for family in ["40", "2"] {
            let script = OLD_CALL.replace("FAMILY", family);
            std::fs::write(spec.volume.join("home/old.py"), script).unwrap();
            let (exit, said) = world.run_as(project, None, "python3 ~/old.py").await;
            assert_ne!(exit, Exit::Code(0), "{family}: {said}");
        }
    }
    // What people do all day still works.
    world.run(project, "mkdir ~/made && python3 -c 'import pty; pty.spawn([\"stty\", \"size\"])'").await;
    world
        .root(
            project,
            "set -e; mkdir -p /tmp/p/DEBIAN; cd /tmp
             printf 'Package: p\\nVersion: 1\\nArchitecture: all\\nMaintainer: p\\nDescription: p\\n' > p/DEBIAN/control
             dpkg-deb -b p p.deb; apt-get install -y ./p.deb; dpkg -s p; ssh -V",
        )
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_project_sees_no_other_control_groups() {
    let world = World::new().await;
    let (one, _other) = (world.started(16).await, world.started(17).await);
    // Nothing of the host's devices and file systems, but what programs look for.
    assert_eq!(
        world.root(one.project, "cd /sys; echo * */*").await,
        "devices kernel devices/system kernel/mm\n"
    );
    let cores = world.run(one.project, "ls -d /sys/devices/system/cpu/cpu0; nproc").await;
    assert!(cores.starts_with("/sys/devices/system/cpu/cpu0\n"), "{cores}");
    let named = world.root(one.project, "cat /proc/self/cgroup /proc/1/cgroup").await;
    assert!(named.lines().all(|line| line.ends_with(":/")), "{named}");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_user_it_is_the_ordinary_one_whatever_the_tenant_removed() {
    let world = World::new().await;
    let spec = world.started(18).await;
    world.root(spec.project, "rm /etc/passwd /etc/group").await;
    assert_eq!(
        world.run(spec.project, "id -u; id -g; id -G; echo $HOME").await,
        "1000\n1000\n1000\n/home/user\n"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removal_that_was_cut_off_is_finished_by_another_process() {
    let world = World::new().await;
    let spec = world.started(19).await;
    let project = spec.project;
    let container = format!("cocalc-{}-{project}", world.instance);
    // As if the daemon was killed right after the container went.
    world::must(std::process::Command::new("podman").args(["rm", "-f", "-t", "0", &container]));
    let again = world::builder(world.instance, world.state.path(), world.index, &world.volume);
    let again = again.build().await.unwrap();
    let list = again.list().await.unwrap();
    let known: Vec<_> = list.iter().map(|one| (one.project, one.state)).collect();
    assert_eq!(known, [(project, State::Stopped)], "by what is left of it");
    let runtime = std::path::Path::new("/run/cocalc").join(world.instance.to_string());
    let named = || {
        let name = project.to_string();
        [runtime.as_path(), world.state.path()]
            .into_iter()
            .flat_map(|dir| {
                world::must(std::process::Command::new("find").arg(dir).args([
                    "-xdev",
                    "-name",
                    &format!("*{name}*"),
                ]))
                .lines()
                .map(str::to_owned)
                .collect::<Vec<_>>()
            })
            .chain(
                std::fs::read_to_string("/proc/self/mountinfo")
                    .unwrap()
                    .lines()
                    .filter(|line| line.contains(&name))
                    .map(str::to_owned),
            )
            .collect::<Vec<_>>()
    };
    assert!(!named().is_empty());
    again.remove(project).await.unwrap();
    assert_eq!(named(), [""; 0]);
    assert!(again.list().await.unwrap().is_empty());
    world::until("its cable is gone", async || {
        !cocalc_podman::leftovers(world.instance).iter().any(|left| left.starts_with("network interface"))
    })
    .await;
    again.remove(project).await.unwrap();
    assert!(spec.volume.join("home").is_dir(), "files stay");
}

#[tokio::test(flavor = "multi_thread")]
async fn links_planted_in_a_volume_lead_nowhere() {
    let world = World::new().await;
    let secret = tempfile::tempdir().unwrap();
    std::fs::write(secret.path().join("secret"), "of the host").unwrap();
    let digest = world::IMAGE.to_string();
    let upper = format!("system/{digest}/upper");
    let work = format!("system/{digest}/work");
    for place in ["home", "system", &format!("system/{digest}"), &upper, &work] {
        let spec = world.project(12);
        let path = spec.volume.join(place);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::os::unix::fs::symlink(secret.path(), &path).unwrap();
        let started = world.podman.start(&spec).await;
        assert!(matches!(started, Err(Error::Backend { .. })), "{place}: {started:?}");
        assert_eq!(world.podman.status(spec.project).await.unwrap().state, State::Stopped);
        let names: Vec<_> =
            std::fs::read_dir(secret.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["secret"], "{place}: nothing was made behind the link");
        // The project starts once the link is gone.
        std::fs::remove_file(&path).unwrap();
        assert_eq!(world.podman.start(&spec).await.unwrap().state, State::Running);
        world.podman.remove(spec.project).await.unwrap();
    }
    // Within the running project, a link to the host's files finds the
    // project's own.
    let spec = world.started(13).await;
    world.run(spec.project, &format!("ln -s {} ~/link", secret.path().display())).await;
    let (exit, _) = world.run_as(spec.project, None, "cat ~/link/secret").await;
    assert_ne!(exit, Exit::Code(0));
    let (exit, _) =
        world.run_as(spec.project, Some("root"), &format!("ls {}", world.volume.root.display())).await;
    assert_ne!(exit, Exit::Code(0), "the host's volume is not visible");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_project_says_why_and_cleanup_leaves_nothing() {
    let world = World::new().await;
    let spec = world.started(20).await;
    let pid = world.first_process(spec.project);
    world::must(std::process::Command::new("kill").args(["-9", &pid]));
    world::until("its end is noticed", async || {
        world.podman.status(spec.project).await.unwrap().state == State::Stopped
    })
    .await;
    let status = world.podman.status(spec.project).await.unwrap();
    assert!(status.reason.is_some(), "{status:?}");
    // It is started again over whatever was left.
    world.podman.start(&spec).await.unwrap();
    assert_eq!(world.run(spec.project, "echo again").await, "again\n");

    // As after kill -9 of the daemon: only the instance is known.
    let left = cocalc_podman::leftovers(world.instance);
    for kind in ["container ", "mount ", "directory ", "network interface ", "firewall table "] {
        assert!(left.iter().any(|one| one.starts_with(kind)), "{kind}: {left:?}");
    }
    cocalc_podman::cleanup_instance(world.instance, None).await.unwrap();
    assert_eq!(cocalc_podman::leftovers(world.instance), [""; 0]);
    let runtime = std::path::Path::new("/run/cocalc").join(world.instance.to_string());
    assert!(!runtime.exists());
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(&world.instance.to_string()));
    let left = world::must(std::process::Command::new("podman").args([
        "ps",
        "-aq",
        "--filter",
        &format!("label=cocalc.instance={}", world.instance),
    ]));
    assert_eq!(left, "");
    assert!(spec.volume.join("home").is_dir(), "files stay");
    cocalc_podman::cleanup_instance(world.instance, None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_volume_stops_the_write_and_nothing_else() {
    let world = World::new().await;
    let mut spec = world.project(30);
    // A small file system of its own, mounted where the volume would be.
    let dir = tempfile::tempdir().unwrap();
    let (file, mount) = (dir.path().join("small.img"), dir.path().join("small"));
    std::fs::create_dir(&mount).unwrap();
    std::fs::File::create(&file).unwrap().set_len(120 << 20).unwrap();
    world::must(std::process::Command::new("mkfs.btrfs").arg("-q").arg(&file));
    world::must(std::process::Command::new("mount").args(["-o", "loop,nosuid,nodev"]).arg(&file).arg(&mount));
    spec.volume = mount.clone();
    world.podman.start(&spec).await.unwrap();
    let (exit, said) = world.run_as(spec.project, None, "head -c 300M /dev/urandom > ~/big").await;
    assert_eq!(exit, Exit::Code(1));
    assert!(said.contains("No space left on device"), "{said}");
    assert_eq!(world.run(spec.project, "echo still here; rm ~/big").await, "still here\n");
    world.podman.remove(spec.project).await.unwrap();
    world::must(std::process::Command::new("umount").arg(&mount));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_image_serves_sftp_to_its_ordinary_user() {
    let world = World::new().await;
    let spec = world.started(40).await;
    let request = ExecRequest { command: Command::Sftp, ..ExecRequest::default() };
    let mut process = world.podman.exec(spec.project, request).await.unwrap();
    // SSH_FXP_INIT of version 3 is answered by SSH_FXP_VERSION.
    process.stdin.write_all(&[0, 0, 0, 5, 1, 0, 0, 0, 3]).await.unwrap();
    let mut answer = [0; 9];
    process.stdout.read_exact(&mut answer).await.unwrap();
    assert_eq!(answer[4..], [2, 0, 0, 0, 3]);
    process.stdin.shutdown().await.unwrap();
    assert_eq!(process.handle.wait().await.unwrap(), Exit::Code(0));
    let said = world.run(spec.project, "id -un; pwd; echo $SHELL; sudo -n id -u; hostname").await;
    let short: String = spec.project.to_string().chars().take(8).collect();
    assert_eq!(said, format!("user\n/home/user\n/bin/bash\n0\nproject-{short}\n"));
    let nobody = ExecRequest { user: Some("nosuch".into()), ..ExecRequest::default() };
    assert!(matches!(world.podman.exec(spec.project, nobody).await, Err(Error::Invalid { .. })));
}
