//! What projects reach: a stand-in for the world outside, for a network of the
//! host's neighbours and for a metadata service, all on this machine. Needs root.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

#[path = "world/mod.rs"]
mod world;

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
};

use cocalc_core::{
    ids::ProjectId,
    runner::{Exit, NetworkPolicy, ProjectSpec, Runner},
};
use cocalc_podman::Fences;
use world::World;

/// A server of the internet, one of the host's own network, and one that lends
/// credentials to who is on the host: each answers on port 80 and 81 with the
/// address that it is asked from.
const INTERNET: &str = "198.51.100.2";
const OTHER: &str = "198.51.100.3";
const NEIGHBOUR: &str = "10.203.77.2";
const METADATA: &str = "169.254.77.254";

const SERVE: &str = r#"
import socket, threading, sys
def serve(listener):
    while True:
        connection, peer = listener.accept()
        connection.sendall(peer[0].encode())
        connection.close()
for host in sys.argv[1:]:
    for port in (80, 81):
        listener = socket.create_server((host, port))
        threading.Thread(target=serve, args=(listener,)).start()
print("up", flush=True)
"#;

/// A network namespace behind a cable of its own, which the projects of this
/// machine reach only by forwarding.
struct Outside {
    name: String,
    _server: world::Guarded,
}

impl Outside {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("ct{}x{}", std::process::id() % 100_000, NEXT.fetch_add(1, Ordering::Relaxed));
        let run = |line: String| world::must(Command::new("sh").args(["-ec", &line]));
        run(format!("ip netns add {name}"));
        run(format!(
            "ip link add {name} type veth peer name eth0 netns {name}
             ip addr add 198.51.100.1/29 dev {name}; ip link set {name} up
             ip -n {name} link set lo up; ip -n {name} link set eth0 up
             ip -n {name} route add default dev eth0 via 198.51.100.1 onlink"
        ));
        for address in [INTERNET, OTHER, NEIGHBOUR, METADATA] {
            run(format!(
                "ip -n {name} addr add {address}/32 dev eth0
                 ip route replace {address}/32 dev {name} src 198.51.100.1"
            ));
        }
        let mut serve = Command::new("ip");
        serve.args(["netns", "exec", &name, "python3", "-c", SERVE, INTERNET, OTHER, NEIGHBOUR, METADATA]);
        let server = world::Guarded::spawn(&mut serve);
        let outside = Self { name, _server: server };
        let begun = std::time::Instant::now();
        for address in [INTERNET, OTHER, NEIGHBOUR, METADATA] {
            let address: SocketAddr = format!("{address}:81").parse().unwrap();
            let limit = std::time::Duration::from_millis(500);
            // The host itself reaches all of them: so it is a fence that keeps
            // projects from them.
            while std::net::TcpStream::connect_timeout(&address, limit).is_err() {
                assert!(begun.elapsed().as_secs() < 30, "{address} does not answer the host");
                std::thread::sleep(std::time::Duration::from_millis(50));
            }
        }
        outside
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "del", &self.name]).status();
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

/// How often a name server of these tests was asked for `flood.test`.
static FLOOD: AtomicU32 = AtomicU32::new(0);

/// A name server on the host's loopback, where a project can't reach it: knows a
/// few names, over UDP and TCP. Returns its address.
fn name_server() -> SocketAddr {
    // A port that is free for both.
    let (socket, listener) = (0..100)
        .find_map(|_| {
            let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
            let listener = std::net::TcpListener::bind(socket.local_addr().unwrap()).ok()?;
            Some((socket, listener))
        })
        .unwrap();
    let address = socket.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 512];
        while let Ok((count, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&answer(&buffer[..count]), from);
        }
    });
    std::thread::spawn(move || {
        use std::io::{Read, Write};
        while let Ok((mut stream, _)) = listener.accept() {
            let mut length = [0; 2];
            while stream.read_exact(&mut length).is_ok() {
                let mut question = vec![0; u16::from_be_bytes(length).into()];
                if stream.read_exact(&mut question).is_err() {
                    break;
                }
                let answer = answer(&question);
                let length = u16::try_from(answer.len()).unwrap().to_be_bytes();
                let _ = stream.write_all(&[&length[..], &answer].concat());
            }
        }
    });
    address
}

/// An answer with the address of a name; without one for other kinds; no such
/// name for others.
fn answer(question: &[u8]) -> Vec<u8> {
    let mut labels = Vec::new();
    let mut at = 12;
    while let Some(length) = question.get(at).copied().filter(|length| *length > 0) {
        labels.push(String::from_utf8_lossy(&question[at + 1..][..length.into()]).to_ascii_lowercase());
        at += 1 + usize::from(length);
    }
    let ended = at + 5;
    if labels == ["flood", "test"] {
        FLOOD.fetch_add(1, Ordering::Relaxed);
    }
    let address: Option<IpAddr> = match labels.join(".").as_str() {
        "allowed.test" | "many.test" => Some(INTERNET.parse().unwrap()),
        "other.test" => Some(OTHER.parse().unwrap()),
        "inside.test" => Some(NEIGHBOUR.parse().unwrap()),
        "metadata.test" => Some(METADATA.parse().unwrap()),
        _ => None,
    };
    let is_a = question[at + 1..at + 3] == [0, 1];
    let mut reply = question[..ended].to_vec();
    reply[2..12].copy_from_slice(&[
        0x81,
        if address.is_some() { 0x80 } else { 0x83 },
        0,
        1,
        0,
        0,
        0,
        0,
        0,
        0,
    ]);
    if let Some(IpAddr::V4(address)) = address.filter(|_| is_a) {
        reply[7] = 1;
        reply.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 30, 0, 4]);
        reply.extend(address.octets());
    }
    reply
}

/// What the server at `host:port` says to the project; what went wrong, if it
/// says nothing.
async fn ask(world: &World, project: ProjectId, host: &str, port: u16) -> Result<String, String> {
    let line = format!(
        "python3 -c 'import socket; s = socket.create_connection((\"{host}\", {port}), 1.5); print(s.recv(99).decode())'"
    );
    let (exit, said) = world.run_as(project, None, &line).await;
    let said = said.trim().to_owned();
    if exit == Exit::Code(0) { Ok(said) } else { Err(said.lines().last().unwrap_or_default().to_owned()) }
}

async fn started(world: &World, slot: u32, network: &str) -> ProjectSpec {
    let mut spec = world.project(slot);
    spec.isolation.network = serde_json::from_str(network).unwrap();
    world.podman.start(&spec).await.unwrap();
    spec
}

/// All in one test: there is one outside at a time.
#[tokio::test(flavor = "multi_thread")]
async fn projects_reach_what_their_policy_allows_and_never_what_is_not_theirs() {
    let outside = Outside::new();
    let server = name_server();
    let mut world = World::new().await;
    let build = |world: &World, fences: Fences| {
        world::builder(world.instance, world.state.path(), world.index, &world.volume)
            .fences(fences)
            .nameservers(vec![server])
            .build()
    };
    world.podman = build(&world, Fences::default()).await.unwrap();

    // Everything: by address, by name, masqueraded.
    let full = world.started(0).await.project;
    assert_eq!(ask(&world, full, INTERNET, 80).await.as_deref(), Ok("198.51.100.1"), "it sees the host");
    assert_eq!(ask(&world, full, "allowed.test", 81).await.as_deref(), Ok("198.51.100.1"));
    assert_eq!(ask(&world, full, "other.test", 80).await.as_deref(), Ok("198.51.100.1"));
    let unknown = ask(&world, full, "nosuch.test", 80).await.unwrap_err();
    assert!(unknown.contains("not known"), "{unknown}");
    // Over TCP as well.
    let by_tcp = "python3 -c 'import socket, struct
q = bytes.fromhex(\"000701000001000000000000\") + b\"\\x07allowed\\x04test\\0\\0\\x01\\0\\x01\"
s = socket.create_connection((\"127.0.0.11\", 53), 2)
s.sendall(struct.pack(\">H\", len(q)) + q)
print(s.recv(512)[-4:].hex())'";
    assert_eq!(world.run(full, by_tcp).await, "c6336402\n");
    // But neither the metadata service nor the host's neighbours, by no name.
    for host in [METADATA, NEIGHBOUR, "metadata.test", "inside.test"] {
        assert!(ask(&world, full, host, 80).await.is_err(), "{host}");
    }
    // Nor anything over IPv6, which no rule would have to know of.
    let six = "python3 -c 'import socket; socket.create_connection((\"fd00:ec2::254\", 80), 1.5)'";
    assert_ne!(world.run_as(full, None, six).await.0, Exit::Code(0));
    assert_eq!(world.run(full, "cat /proc/net/if_inet6 | grep -v ' lo$' | wc -l").await, "0\n");

    // Nothing.
    let none = started(&world, 1, r#"{"policy":"none"}"#).await.project;
    for host in [INTERNET, "allowed.test", NEIGHBOUR, METADATA] {
        assert!(ask(&world, none, host, 80).await.is_err(), "{host}");
    }
    assert_eq!(world.run(none, "ls /proc/sys/net/ipv4/conf | sort | tr '\\n' ' '").await, "all default lo ");
    assert!(world.podman.dial(none, 9).await.is_err());

    // A list.
    let list =
        r#"{"policy":"only","allow":["allowed.test:80","inside.test:80","metadata.test","198.51.100.3:81"]}"#;
    let only = started(&world, 2, list).await;
    let project = only.project;
    let closed = ask(&world, project, INTERNET, 80).await.unwrap_err();
    assert!(!closed.contains("timed out"), "it is told at once: {closed}");
    assert!(ask(&world, project, OTHER, 81).await.is_ok(), "by address and port");
    assert!(ask(&world, project, OTHER, 80).await.is_err(), "of that port only");
    assert!(ask(&world, project, "allowed.test", 80).await.is_ok(), "by name");
    assert!(ask(&world, project, INTERNET, 80).await.is_ok(), "which opened its address");
    assert!(ask(&world, project, "allowed.test", 81).await.is_err(), "at that port");
    let refused = ask(&world, project, "other.test", 80).await.unwrap_err();
    assert!(refused.contains("name"), "other names have no answer: {refused}");
    // A name that leads inside does not open the inside.
    for host in ["inside.test", "metadata.test", METADATA, NEIGHBOUR] {
        assert!(ask(&world, project, host, 80).await.is_err(), "{host}");
    }
    assert!(ask(&world, full, OTHER, 80).await.is_ok(), "others' policies are theirs");

    // A daemon that comes back keeps the fences, all the time and afterwards,
    // and allows what this host's owner allows.
    let inside: Fences = Fences {
        allow: vec!["10.203.77.0/24".parse().unwrap()],
        deny: vec!["198.51.100.3".parse().unwrap()],
    };
    world.podman = build(&world, inside).await.unwrap();
    assert!(ask(&world, project, "allowed.test", 80).await.is_ok(), "names are answered again");
    assert!(ask(&world, project, "allowed.test", 81).await.is_err());
    assert!(ask(&world, project, "inside.test", 80).await.is_ok(), "allowed by both");
    assert!(ask(&world, project, NEIGHBOUR, 81).await.is_err(), "by the host alone");
    assert!(ask(&world, full, NEIGHBOUR, 81).await.is_ok());
    assert!(ask(&world, project, OTHER, 81).await.is_err(), "denied by the host");
    assert!(ask(&world, full, OTHER, 80).await.is_err(), "denied by the host");
    assert!(ask(&world, none, INTERNET, 80).await.is_err());
    for project in [full, project] {
        assert!(ask(&world, project, METADATA, 80).await.is_err(), "allowed by nobody");
    }

    // Another policy takes the place of the former one.
    world.podman.stop(project, std::time::Duration::ZERO).await.unwrap();
    let mut open = only.clone();
    open.isolation.network = NetworkPolicy::Full;
    world.podman.start(&open).await.unwrap();
    assert!(ask(&world, project, INTERNET, 81).await.is_ok());
    one_that_floods_the_resolver_holds_up_nobody(&world, full, project).await;
    world.podman.remove(project).await.unwrap();
    let left = world::must(Command::new("nft").args(["list", "ruleset"]));
    assert!(!left.contains("only_2"), "{left}");
    drop(outside);
}

/// Asks as often as it can, over UDP and TCP; how often, and for how long.
const FLOOD_NAMES: &str = r#"python3 -c '
import socket, struct, time
query = bytes.fromhex("000701000001000000000000") + b"\x05flood\x04test\0\0\x01\0\x01"
began = time.monotonic()
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.connect(("127.0.0.11", 53))
udp.setblocking(False)
sent = 0
while time.monotonic() < began + 4 or sent < 4000 + 200 * (time.monotonic() - began):
    try:
        udp.send(query)
        sent += 1
        udp.recv(512)
    except OSError:
        time.sleep(0.0003)
for _ in range(200):
    try:
        tcp = socket.create_connection(("127.0.0.11", 53), 2)
        tcp.sendall(struct.pack(">H", len(query)) + query)
        tcp.recv(512)
        sent += 1
    except OSError:
        pass
print(sent, time.monotonic() - began)
'"#;

/// Of what one project asks without end only so much is asked on, and another's names
/// are found meanwhile.
async fn one_that_floods_the_resolver_holds_up_nobody(world: &World, floods: ProjectId, other: ProjectId) {
    let asked = async {
        let mut asked = 0;
        loop {
            // Well within what each may ask.
            assert!(ask(world, other, "allowed.test", 80).await.is_ok(), "after {asked}");
            asked += 1;
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
    };
    let said = tokio::select! {
        said = world.run(floods, FLOOD_NAMES) => said,
        () = asked => unreachable!("it does not end"),
    };
    let (sent, secs) = said.trim().split_once(' ').unwrap();
    let (sent, secs): (u32, f64) = (sent.parse().unwrap(), secs.parse().unwrap());
    let most = 500.0 + 100.0 * (secs + 1.0);
    let answered = FLOOD.load(Ordering::Relaxed);
    assert!(answered >= 100, "{answered} of {sent} were asked on");
    assert!(f64::from(answered) <= most, "{answered} of {sent} were asked on in {secs} s");
    assert!(f64::from(sent) > most, "that was no flood: {sent} in {secs} s");
}
