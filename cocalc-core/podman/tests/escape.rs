//! The escape probe runs inside real projects, and finds no way out. Needs root.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

#[path = "world/mod.rs"]
mod world;

use std::{
    collections::BTreeMap,
    os::unix::{
        fs::MetadataExt,
        net::{SocketAddr, UnixListener},
    },
    path::Path,
};

use cocalc_core::runner::{Exit, ProjectSpec, Runner};
use world::World;

/// The probe, statically linked, as it runs in any image.
const PROBE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/escape-probe"));

/// One check: whether it was as it should be, and what was found.
type Checks = BTreeMap<String, (bool, String)>;

fn parse(lines: &str) -> Checks {
    lines
        .lines()
        .map(|line| {
            let value: serde_json::Value =
                serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
            let text = |name: &str| value[name].as_str().unwrap().to_owned();
            (text("check"), (value["ok"].as_bool().unwrap(), text("found")))
        })
        .collect()
}

fn failed(checks: &Checks) -> Vec<String> {
    checks.iter().filter(|(_, (ok, _))| !ok).map(|(check, (_, found))| format!("{check}: {found}")).collect()
}

/// The namespaces of a process of this machine, as the probe is told them.
fn namespaces(pid: &str) -> String {
    ["user", "pid", "mnt", "net", "ipc", "uts", "cgroup"]
        .iter()
        .map(|kind| {
            let inode = std::fs::metadata(format!("/proc/{pid}/ns/{kind}")).unwrap().ino();
            format!("--foreign-ns {kind}={inode} ")
        })
        .collect()
}

/// Everything that the probe is told, beside the host's and the neighbour's
/// namespaces: the host's services, and the neighbour's.
struct Surroundings {
    args: String,
    _listeners: (std::net::TcpListener, UnixListener),
}

async fn surroundings(world: &World, neighbour: &ProjectSpec) -> Surroundings {
    // A service of the host on every address, and one in the abstract namespace.
    let service = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
    let port = service.local_addr().unwrap().port();
    let name = format!("cocalc-escape-{}", world.instance);
    let listener = {
        use std::os::linux::net::SocketAddrExt;
        UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap()
    };
    let first = world.first_process(neighbour.project);
    let mut args = format!("{} {}", namespaces("self"), namespaces(&first));
    args.push_str(&format!("--abstract {name} --foreign {} ", neighbour.project));
    for path in [&world.volume.root, world.state.path(), Path::new("/run/cocalc"), Path::new("/work")] {
        args.push_str(&format!("--absent {} ", path.display()));
    }
    let mut hosts: Vec<String> = world::must(std::process::Command::new("hostname").arg("-I"))
        .split_whitespace()
        .map(str::to_owned)
        .collect();
    hosts.push("127.0.0.1".into());
    // The gateway is the host's as well; the neighbour answers on its own address.
    let gateway = world.run(neighbour.project, "awk '$2 == \"00000000\" {print $3}' /proc/net/route").await;
    let gateway = u32::from_str_radix(gateway.trim(), 16).unwrap().swap_bytes();
    hosts.push(std::net::Ipv4Addr::from_bits(gateway).to_string());
    for host in hosts {
        let host = if host.contains(':') { format!("[{host}]") } else { host };
        args.push_str(&format!("--deny {host}:{port} --deny-udp {host}:53 "));
    }
    let address = world
        .run(neighbour.project, "python3 -c 'import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.connect((\"192.0.2.99\", 9)); print(s.getsockname()[0])'")
        .await;
    args.push_str(&format!("--deny {}:4444 ", address.trim()));
    Surroundings { args, _listeners: (service, listener) }
}

/// Puts the probe where everybody in the project finds it.
fn install(spec: &ProjectSpec) {
    let path = spec.volume.join("home/escape-probe");
    cocalc_testkit::executable::write(&path, PROBE);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_escape_probe_finds_no_way_out() {
    let world = World::new().await;
    let (spec, neighbour) = (world.started(0).await, world.started(1).await);
    let listen = "nohup python3 -c 'import socket\nl = socket.create_server((\"0.0.0.0\", 4444))\nwhile True: l.accept()' >/dev/null 2>&1 & sleep 0.1";
    world.run(neighbour.project, listen).await;
    world::until("the neighbour listens", async || world.podman.dial(neighbour.project, 4444).await.is_ok())
        .await;
    let around = surroundings(&world, &neighbour).await;
    install(&spec);
    for user in [None, Some("root")] {
        let line = format!("/home/user/escape-probe {}", around.args);
        let (exit, said) = world.run_as(spec.project, user, &line).await;
        let checks = parse(&said);
        assert_eq!(failed(&checks), [""; 0], "as {user:?}");
        assert!(checks.len() > 130, "{}", checks.len());
        assert_eq!(exit, Exit::Code(0));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_strict_project_gains_no_privileges_and_the_others_have_sudo() {
    let world = World::new().await;
    let (plain, neighbour) = (world.started(2).await, world.started(3).await);
    assert_eq!(world.run(plain.project, "sudo -n id -u").await, "0\n");
    let mut strict = world.project(4);
    strict.isolation.strict = true;
    world.podman.start(&strict).await.unwrap();
    let (exit, said) = world.run_as(strict.project, None, "sudo -n id -u").await;
    assert_ne!(exit, Exit::Code(0), "{said}");
    // A setuid file of root's stays without effect.
    world.root(strict.project, "install -m 4755 /usr/bin/id /opt/id").await;
    assert_eq!(world.run(strict.project, "/opt/id -u").await, "1000\n");
    world.root(plain.project, "install -m 4755 /usr/bin/id /opt/id").await;
    assert_eq!(world.run(plain.project, "/opt/id -u").await, "0\n");

    let around = surroundings(&world, &neighbour).await;
    install(&strict);
    let line = format!("/home/user/escape-probe --strict {}", around.args);
    let checks = parse(&world.run_as(strict.project, None, &line).await.1);
    assert_eq!(failed(&checks), [""; 0]);
    // The same, told that it is not strict: a check that is not met is seen.
    let line = format!("/home/user/escape-probe {}", around.args);
    let (exit, said) = world.run_as(strict.project, None, &line).await;
    assert_eq!((exit, failed(&parse(&said)).len()), (Exit::Code(1), 1));
}

#[test]
fn outside_of_a_project_the_probe_fails() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("escape-probe");
    cocalc_testkit::executable::write(&path, PROBE);
    let service = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let name = format!("cocalc-outside-{}", std::process::id());
    let _listener = {
        use std::os::linux::net::SocketAddrExt;
        UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap()
    };
    let answering = udp.try_clone().unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok((count, from)) = answering.recv_from(&mut buffer) {
            let _ = answering.send_to(&buffer[..count], from);
        }
    });
    let address = service.local_addr().unwrap();
    let udp = udp.local_addr().unwrap();
    let mut command = std::process::Command::new(&path);
    command.args(namespaces("self").split_whitespace());
    command.args(["--abstract", &name, "--deny", &address.to_string(), "--deny-udp", &udp.to_string()]);
    command.args(["--absent", dir.path().to_str().unwrap(), "--foreign", "rw", "--strict"]);
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let checks = parse(&String::from_utf8(output.stdout).unwrap());
    let failed: Vec<&String> = checks.iter().filter(|(_, (ok, _))| !ok).map(|(check, _)| check).collect();
    let wanted = [
        "namespace user",
        "namespace pid",
        "namespace mnt",
        "namespace net",
        "namespace ipc",
        "namespace uts",
        "namespace cgroup",
        "uid_map",
        "gid_map",
        "capabilities bounding",
        "capabilities effective",
        "seccomp",
        "no_new_privs",
        "first process",
        "call keyctl",
        "call bpf",
        "call mount",
        "call io_uring_setup",
        "call userfaultfd",
        "call perf_event_open",
        "call syslog",
        "file system proc",
        "file system overlay",
        "socket raw",
        "user namespace",
        "write /proc/sys/kernel/core_pattern",
        "nothing in /sys/class/net",
        "nothing in /sys/block",
        "release agents",
        "make device 7:0 in /tmp",
        "mounts name no other project",
        "the home is nosuid,nodev",
        "the kernel's files are read-only",
    ];
    let missed: Vec<_> = wanted.iter().filter(|check| !failed.iter().any(|other| other == *check)).collect();
    assert!(missed.is_empty(), "not noticed outside: {missed:?}");
    for more in [
        format!("abstract socket {name}"),
        format!("unreachable {address}"),
        format!("unreachable by udp {udp}"),
        format!("absent {}", dir.path().display()),
    ] {
        assert!(failed.contains(&&more), "not noticed outside: {more}");
    }
}
