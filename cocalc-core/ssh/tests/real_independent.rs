//! The server against programs that share no code with it or with each other:
//! paramiko, asyncssh, dropbear, ssh-audit, and OpenSSH's own server beside it.
//! Needs the packages dropbear-bin, openssh-client, openssh-server and sshfs,
//! and what `.ci/setup.sh test` installs from PyPI.

#![allow(clippy::unwrap_used, reason = "a test fails by it, in its helpers too")]

mod common;

use std::{net::IpAddr, process::Stdio, sync::atomic::Ordering, time::Duration};

use cocalc_ssh::{HostKeyType, HostKeys, SshIngress};
use common::{World, client, finish, text, until, within};
use tokio::{
    io::AsyncReadExt,
    net::{TcpListener, TcpStream},
    process::Command,
};

fn keygen(world: &World, name: &str, options: &[&str]) -> String {
    let made = std::process::Command::new("ssh-keygen")
        .args(["-q", "-N", "", "-C", "test", "-f"])
        .arg(world.path(name))
        .args(options)
        .status()
        .unwrap();
    assert!(made.success(), "{options:?}");
    let public = std::fs::read_to_string(world.path(name).with_extension("pub")).unwrap();
    public.split_whitespace().take(2).collect::<Vec<_>>().join(" ")
}

/// Makes the world's clients know the server at `port`, which has its key.
fn trust(world: &World, port: u16) {
    let known = world.path("known_hosts");
    let mut text = std::fs::read_to_string(&known).unwrap();
    text += &format!("[127.0.0.1]:{port} {}\n", world.host_keys[0]);
    std::fs::write(known, text).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_of_every_kind_log_in() {
    let world = World::new().await;
    let ssh = |port: u16, key: &str, options: &[&str]| {
        let mut command = Command::new("ssh");
        command
            .args(world.options(key))
            .args(["-o", "BatchMode=yes", "-p", &port.to_string(), "-l", &world.project.to_string()])
            .args(options)
            .args(["127.0.0.1", "echo in"])
            .kill_on_drop(true);
        finish(command, b"")
    };
    for (name, options) in [
        ("rsa", &["-t", "rsa", "-b", "3072"][..]),
        ("p256", &["-t", "ecdsa", "-b", "256"]),
        ("p384", &["-t", "ecdsa", "-b", "384"]),
        ("p521", &["-t", "ecdsa", "-b", "521"]),
        ("ed", &["-t", "ed25519"]),
    ] {
        let public = keygen(&world, name, options);
        world.rights.more.lock().unwrap().push(public);
        for port in [world.direct, world.proxied] {
            let output = ssh(port, name, &[]).await;
            assert_eq!(text(&output.stdout), "in\n", "{name}: {}", text(&output.stderr));
        }
    }
    for hash in ["rsa-sha2-256", "rsa-sha2-512"] {
        let output = ssh(world.direct, "rsa", &["-o", &format!("PubkeyAcceptedAlgorithms={hash}")]).await;
        assert_eq!(text(&output.stdout), "in\n", "{hash}: {}", text(&output.stderr));
    }
    // SHA-1, and keys that are too small, open nothing.
    let output = ssh(world.direct, "rsa", &["-o", "PubkeyAcceptedAlgorithms=ssh-rsa"]).await;
    assert_eq!(output.status.code(), Some(255), "{}", text(&output.stdout));
    let small = keygen(&world, "small", &["-t", "rsa", "-b", "1024"]);
    world.rights.more.lock().unwrap().push(small);
    let output = ssh(world.direct, "small", &["-o", "RequiredRSASize=1024"]).await;
    assert_eq!(output.status.code(), Some(255), "{}", text(&output.stdout));
}

/// A security key in software: it signs as one does, with flags and counter.
const SECURITY_KEY: &str = r#"
import base64, hashlib, struct, sys
import paramiko
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
class Key(paramiko.PKey):
    name = "sk-ssh-ed25519@openssh.com"
    def __init__(self, forge):
        self.key = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"test").digest())
        self.forge = forge
    def get_name(self): return self.name
    @property
    def algorithm_name(self): return self.name
    def asbytes(self):
        m = paramiko.Message()
        m.add_string(self.name)
        m.add_string(self.key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw))
        m.add_string("ssh:")
        return m.asbytes()
    def can_sign(self): return True
    def sign_ssh_data(self, data, algorithm=None):
        tail = struct.pack(">BI", 1, 7)
        signed = hashlib.sha256(b"ssh:").digest() + tail + hashlib.sha256(data).digest()
        if self.forge: tail = struct.pack(">BI", 5, 7)
        m = paramiko.Message()
        m.add_string(self.name)
        m.add_string(self.key.sign(signed))
        return type("Signature", (), {"asbytes": lambda _: m.asbytes() + tail, "__bytes__": lambda _: m.asbytes() + tail})()
if sys.argv[1] == "key":
    print("sk-ssh-ed25519@openssh.com", base64.b64encode(Key(False).asbytes()).decode())
    sys.exit()
for forge in (False, True):
    t = paramiko.Transport(("127.0.0.1", int(sys.argv[2])))
    t.start_client()
    try:
        t.auth_publickey(sys.argv[1], Key(forge))
        c = t.open_session(); c.exec_command("echo in")
        print(c.makefile().read().decode().strip())
    except paramiko.AuthenticationException:
        print("refused")
    t.close()
"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn security_keys_log_in_and_their_flags_are_signed() {
    let world = World::new().await;
    let mut python = client("python3");
    python.args(["-c", SECURITY_KEY, "key"]);
    let output = finish(python, b"").await;
    world.rights.more.lock().unwrap().push(text(&output.stdout).trim().to_owned());
    for port in [world.direct, world.proxied] {
        let mut python = client("python3");
        python.args(["-c", SECURITY_KEY, &world.project.to_string(), &port.to_string()]);
        let output = finish(python, b"").await;
        assert_eq!(text(&output.stdout), "in\nrefused\n", "{}", text(&output.stderr));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ssh_audit_finds_no_weak_algorithm() {
    let world = World::new().await;
    // With an RSA key beside the Ed25519 key, too. (One of ECDSA it calls a
    // failure, for its curve.)
    let keys =
        HostKeys::generate().unwrap().and_load_or_create(&world.path("rsa"), HostKeyType::Rsa).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let both = listener.local_addr().unwrap().port();
    let ingress = SshIngress::builder(world.gate.clone(), keys).build();
    tokio::spawn(async move { ingress.serve(listener, std::future::pending()).await });
    for port in [world.direct, world.proxied, both] {
        let mut audit = client("ssh-audit");
        audit.args(["--skip-rate-test", "-n", "-l", "warn", "-p", &port.to_string(), "127.0.0.1"]);
        let output = finish(audit, b"").await;
        let said = text(&output.stdout);
        // Curve25519 stays: without it nobody with a client of before 2025 could
        // come. It is offered behind the exchange that lasts.
        let known = "does not provide protection against post-quantum attacks";
        let bad = |line: &&str| (line.contains("[fail]") || line.contains("[warn]")) && !line.contains(known);
        assert_eq!(said.lines().filter(bad).collect::<Vec<_>>(), Vec::<&str>::new(), "{said}");
        assert!(said.contains("(kex) curve25519-sha256 "), "it looked at something else: {said}");
        if port == both {
            let mut audit = client("ssh-audit");
            audit.args(["--skip-rate-test", "-n", "-p", &port.to_string(), "127.0.0.1"]);
            let said = text(&finish(audit, b"").await.stdout);
            assert!(said.contains("(key) rsa-sha2-512 (3072-bit)"), "{said}");
        }
    }
}

/// What every client is put through: `run(line, input)` gives status, output
/// and errors.
const PARAMIKO: &str = r#"
import hashlib, os, socket, sys, threading
import paramiko
user, port, keyfile = sys.argv[1], int(sys.argv[2]), sys.argv[3]
c = paramiko.SSHClient()
c.set_missing_host_key_policy(paramiko.AutoAddPolicy())
c.connect("127.0.0.1", port, user, key_filename=keyfile, allow_agent=False, look_for_keys=False)
i, o, e = c.exec_command("echo out; echo err >&2; cat; exit 7")
i.write("typed"); i.channel.shutdown_write()
assert o.read() == b"out\ntyped" and e.read() == b"err\n" and o.channel.recv_exit_status() == 7
big = os.urandom(1 << 20) * 8
i, o, e = c.exec_command("sha256sum")
i.write(big); i.channel.shutdown_write()
assert o.read().split()[0].decode() == hashlib.sha256(big).hexdigest()
i, o, e = c.exec_command("head -c 8388608 /dev/zero | tr '\\0' x")
assert o.read() == b"x" * 8388608
ch = c.get_transport().open_session()
ch.get_pty("vt100", 100, 40); ch.exec_command("stty size; echo $TERM; exit 3")
got = b""
while chunk := ch.recv(1000): got += chunk
assert got.split() == [b"40", b"100", b"vt100"] and ch.recv_exit_status() == 3, got
s = c.open_sftp()
here = f"p-{port}"
s.mkdir(here)
with s.open(here + "/a", "wb") as f: f.write(big)
assert s.stat(here + "/a").st_size == len(big)
with s.open(here + "/a", "rb") as f: assert f.read() == big
with s.open(here + "/a", "r+b") as f:
    f.seek(5); f.write(b"middle"); f.seek(0); assert f.read(11) == big[:5] + b"middle"
with s.open(here + "/a", "ab") as f: f.write(b"end")
assert s.stat(here + "/a").st_size == len(big) + 3
s.truncate(here + "/a", 10); assert s.stat(here + "/a").st_size == 10
s.symlink("a", here + "/link"); assert s.readlink(here + "/link") == "a" and s.lstat(here + "/link").st_mode & 0o170000 == 0o120000
s.chmod(here + "/a", 0o640); assert s.stat(here + "/a").st_mode & 0o777 == 0o640
s.utime(here + "/a", (1000, 2000)); assert s.stat(here + "/a").st_mtime == 2000
s.rename(here + "/a", here + "/b"); s.posix_rename(here + "/b", here + "/c")
with s.open(here + "/d", "wb") as f: f.write(b"x")
try: s.rename(here + "/c", here + "/d"); assert False, "it replaced a file"
except IOError: pass
s.posix_rename(here + "/c", here + "/d")
assert sorted(s.listdir(here)) == ["d", "link"]
for bad in (lambda: s.stat("missing"), lambda: s.open("/proc/1/mem-x", "wb"), lambda: s.rmdir(here)):
    try: bad(); assert False, "it should fail"
    except IOError: pass
for n in range(300): s.open(f"{here}/many-{n}", "w").close()
assert len(s.listdir(here)) == 302
assert s.normalize(".") == os.path.realpath(s.normalize("."))
t = c.get_transport()
there = t.request_port_forward("127.0.0.1", 0)
def inside(): 
    i, o, e = c.exec_command(f"exec 3<>/dev/tcp/127.0.0.1/{there}; echo ping >&3; head -1 <&3")
    return o.read()
result = []
worker = threading.Thread(target=lambda: result.append(inside())); worker.start()
ch = t.accept(20); assert ch.recv(100) == b"ping\n"; ch.sendall(b"pong\n"); worker.join(20)
assert result == [b"pong\n"], result
for n in range(40):
    i, o, e = c.exec_command(f"echo {n}"); assert o.read() == f"{n}\n".encode()
# paramiko itself hangs when a channel closes meanwhile.
import gc, time
del i, o, e, ch; gc.collect(); time.sleep(1)
t.renegotiate_keys()
i, o, e = c.exec_command("echo after"); assert o.read() == b"after\n"
c.close()
print("done")
"#;

const ASYNCSSH: &str = r#"
import asyncio, hashlib, os, signal, sys
import asyncssh
user, port, keyfile = sys.argv[1], int(sys.argv[2]), sys.argv[3]
async def main():
    async with asyncssh.connect("127.0.0.1", port, username=user, client_keys=[keyfile], known_hosts=None,
                                agent_path=None, keepalive_interval=1, rekey_bytes=1 << 20, config=None) as c:
        r = await c.run("echo out; echo err >&2; cat; exit 7", input="typed")
        assert (r.stdout, r.stderr, r.exit_status) == ("out\ntyped", "err\n", 7), r
        big = os.urandom(1 << 20) * 8
        r = await c.run("sha256sum", input=big, encoding=None)
        assert r.stdout.split()[0].decode() == hashlib.sha256(big).hexdigest()
        r = await c.run("head -c 8388608 /dev/zero", encoding=None)
        assert r.stdout == bytes(8388608)
        p = await c.create_process("echo ready; exec sleep 1000")
        await p.stdout.readline(); p.send_signal("TERM")
        r = await asyncio.wait_for(p.wait(), 20)
        assert r.exit_signal[0] == "TERM", r.exit_signal
        p = await c.create_process("stty size; cat", term_type="vt100", term_size=(90, 33))
        assert (await p.stdout.readline()).split() == ["33", "90"]
        p.change_terminal_size(91, 34); p.stdin.write("x\x04"); p.stdin.write("\x04"); p.stdin.write_eof()
        p.close(); await p.wait_closed()
        rs = await asyncio.gather(*(c.run(f"echo {n}") for n in range(30)))
        assert [r.stdout for r in rs] == [f"{n}\n" for n in range(30)]
        async with c.start_sftp_client() as s:
            here = f"a-{port}"
            await s.mkdir(here)
            async with s.open(here + "/a", "wb") as f:
                await f.write(big); await f.fsync()
            v = await s.statvfs(here); assert v.bsize > 0 and v.blocks > 0
            await s.link(here + "/a", here + "/hard")
            assert (await s.stat(here + "/hard")).size == len(big)
            await s.get(here + "/a", keyfile + f"-{port}"); assert open(keyfile + f"-{port}", "rb").read() == big
            names = sorted(n for n in await s.listdir(here) if n not in (".", ".."))
            assert names == ["a", "hard"], names
            await s.rmtree(here)
        seen = []
        async def inside(reader, writer):
            writer.write(b"first"); seen.append(await reader.read()); writer.write(b"last"); writer.close()
        server = await asyncio.start_server(inside, "127.0.0.1", 0)
        inner = server.sockets[0].getsockname()[1]
        reader, writer = await c.open_connection("127.0.0.1", inner)
        assert await reader.readexactly(5) == b"first"
        writer.write(b"up"); writer.write_eof()
        assert await reader.read() == b"last" and seen == [b"up"]
        print("done")
asyncio.run(main())
"#;

async fn battery(script: &str) {
    let world = World::new().await;
    for bare in [false, true] {
        // With the image's sftp server, and with the helper's.
        world.shells.bare.store(bare, Ordering::SeqCst);
        for port in [world.direct, world.proxied] {
            let mut python = client("python3");
            python.args(["-c", script, &world.project.to_string(), &port.to_string()]).arg(world.path("id"));
            let output = finish(python, b"").await;
            assert_eq!(text(&output.stdout), "done\n", "bare {bare}: {}", text(&output.stderr));
            std::fs::remove_dir_all(world.path(&format!("home/p-{port}"))).ok();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn paramiko_does_everything() {
    battery(PARAMIKO).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn asyncssh_does_everything() {
    battery(ASYNCSSH).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dropbear_runs_commands_and_forwards() {
    let world = World::new().await;
    let converted = std::process::Command::new("dropbearconvert")
        .args(["openssh", "dropbear"])
        .args([world.path("id"), world.path("id.dropbear")])
        .output()
        .expect("the package dropbear-bin is needed");
    assert!(converted.status.success(), "{}", text(&converted.stderr));
    for port in [world.direct, world.proxied] {
        let dbclient = |arguments: &[&str]| {
            let mut command = Command::new("dbclient");
            command
                .args(["-y", "-y", "-p", &port.to_string(), "-i"])
                .arg(world.path("id.dropbear"))
                .args(["-l", &world.project.to_string()])
                .args(arguments)
                .env("HOME", world.directory.path())
                .kill_on_drop(true);
            command
        };
        let data: Vec<u8> = (0..4 << 20).map(|n: usize| (n >> 3) as u8).collect();
        let output = finish(dbclient(&["127.0.0.1", "cat; echo err >&2; exit 9"]), &data).await;
        assert_eq!(output.status.code(), Some(9), "{}", text(&output.stderr));
        assert!(output.stdout == data);
        assert!(text(&output.stderr).contains("err\n"));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let target = format!("127.0.0.1:{}", listener.local_addr().unwrap().port());
        let serving = tokio::spawn(async move {
            use tokio::io::AsyncWriteExt;
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(b"inside").await.unwrap();
        });
        let output = finish(dbclient(&["-B", &target, "127.0.0.1"]), b"").await;
        assert_eq!(text(&output.stdout), "inside", "{}", text(&output.stderr));
        serving.await.unwrap();
    }
}

/// Commands whose outcome both servers must agree on.
fn commands() -> Vec<(String, Vec<u8>)> {
    let mut all: Vec<(String, Vec<u8>)> = Vec::new();
    for code in [0, 1, 3, 63, 64, 126, 127, 128, 129, 254, 255] {
        all.push((format!("exit {code}"), vec![]));
    }
    for signal in ["HUP", "INT", "QUIT", "ABRT", "KILL", "USR1", "SEGV", "PIPE", "ALRM", "TERM"] {
        all.push((format!("kill -{signal} $$; sleep 5"), vec![]));
    }
    for line in [
        "true",
        "false",
        "echo out",
        "echo err >&2",
        "echo out; echo err >&2; exit 4",
        "printf 'no newline'",
        "printf ''",
        "printf '\\0\\1\\377'",
        "head -c 100000 /dev/zero",
        "head -c 3000000 /dev/zero | tr '\\0' q",
        "head -c 300000 /dev/zero | tr '\\0' q >&2",
        "seq 1 20000",
        "for n in 1 2 3; do echo o$n; echo e$n >&2; done",
        "cat",
        "cat >&2",
        "wc -c",
        "sha256sum",
        "head -c 3",
        "head -1",
        "exec <&-; echo closed",
        "exec >&-; exit 2",
        "exec >&- 2>&-; exit 6",
        "exec 2>&-; echo only",
        "read line; echo \"[$line]\"",
        "read -r a b; printf '%s|%s' \"$a\" \"$b\"",
        "echo 'quo\"ted' \"it's\" \\$HOME",
        "echo a; (echo b; exit 3); echo $?",
        "nonexistent-command",
        "/nonexistent/command",
        "exec nonexistent-command",
        "syntax error here (",
        "exit 300",
        "exit -1",
        "set -e; false; echo never",
        "trap 'echo trapped; exit 5' TERM; kill -TERM $$; sleep 1",
        "(sleep 0.2; echo late) & wait",
        "tac",
        "tr a-z A-Z",
        "printf '%05d' 42",
        "umask >/dev/null; test -t 0; echo $?",
    ] {
        all.push((line.to_owned(), b"first line\nsecond line\n".to_vec()));
    }
    all.push(("cat".into(), (0..1_000_000).map(|n: usize| (n % 251) as u8).collect()));
    all.push(("sha256sum".into(), vec![b'x'; 2_000_000]));
    all
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_end_as_with_openssh() {
    let world = World::new().await;
    // OpenSSH's server beside ours, with the same shell on the same machine.
    let port = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    std::fs::copy(world.path("id.pub"), world.path("authorized")).unwrap();
    let config = format!(
        "Port {port}\nListenAddress 127.0.0.1\nHostKey {0}/host_key\nAuthorizedKeysFile {0}/authorized\n\
         StrictModes no\nUsePAM no\nPidFile none\nPermitRootLogin yes\nMaxStartups 100\n",
        world.directory.path().display()
    );
    std::fs::write(world.path("sshd_config"), config).unwrap();
    std::fs::create_dir_all("/run/sshd").unwrap();
    let _sshd = Command::new("/usr/sbin/sshd")
        .args(["-D", "-e", "-f"])
        .arg(world.path("sshd_config"))
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .expect("the package openssh-server is needed");
    until("sshd listens", || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()).await;
    trust(&world, port);
    let user = text(&std::process::Command::new("id").arg("-un").output().unwrap().stdout);
    let run = |port: u16, user: String, line: String, input: Vec<u8>| {
        let mut ssh = Command::new("ssh");
        ssh.args(world.options("id"))
            .args(["-o", "BatchMode=yes", "-o", "LogLevel=ERROR"])
            .args(["-p", &port.to_string(), "-l", &user, "127.0.0.1", &line])
            .kill_on_drop(true);
        async move { finish(ssh, &input).await }
    };
    let commands = commands();
    assert!(commands.len() >= 60, "{}", commands.len());
    for (line, input) in commands {
        let theirs = run(port, user.trim().to_owned(), line.clone(), input.clone()).await;
        for ours in [world.direct, world.proxied] {
            let ours = run(ours, world.project.to_string(), line.clone(), input.clone()).await;
            assert_eq!(ours.status.code(), theirs.status.code(), "{line}: {}", text(&ours.stderr));
            assert!(ours.stdout == theirs.stdout, "{line}: {} {}", ours.stdout.len(), theirs.stdout.len());
            // Both name themselves in a shell's complaint.
            assert_eq!(text(&ours.stderr), text(&theirs.stderr), "{line}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_passes_on_what_it_cannot_read() {
    let world = World::new().await;
    let jump = format!("jump@127.0.0.1:{}", world.proxied);
    let config = format!(
        "Host *\n  UserKnownHostsFile {0}/known_hosts\n  StrictHostKeyChecking no\n  IdentityFile {0}/id\n  \
         IdentitiesOnly yes\n  IdentityAgent none\n  BatchMode yes\n  LogLevel ERROR\n",
        world.directory.path().display()
    );
    std::fs::write(world.path("config"), config).unwrap();
    let ssh = |user: &str, host: &str, line: &str| {
        let mut ssh = Command::new("ssh");
        ssh.arg("-F")
            .arg(world.path("config"))
            .args(["-J", &jump, "-l", user, host, line])
            .kill_on_drop(true);
        finish(ssh, b"typed")
    };
    let project = world.project.to_string();
    let output = ssh(&project, &project, "cat; exit 6").await;
    assert_eq!(
        (text(&output.stdout).as_str(), output.status.code()),
        ("typed", Some(6)),
        "{}",
        text(&output.stderr)
    );
    // Whoever is passed on has still to be let in, and comes nowhere else.
    let stranger = ssh("0a7b1c9e-4f52-4a8e-9d3b-1c2d3e4f5a6b", &project, "true").await;
    assert!(text(&stranger.stderr).contains("Permission denied"), "{}", text(&stranger.stderr));
    for elsewhere in ["127.0.0.1", "::1", "example.com"] {
        let output = ssh(&project, elsewhere, "true").await;
        assert!(text(&output.stderr).contains("forwarding failed"), "{elsewhere}: {}", text(&output.stderr));
    }
    // Nothing runs at the proxy itself.
    let mut shell = Command::new("ssh");
    shell.arg("-F").arg(world.path("config")).args([
        "-p",
        &world.proxied.to_string(),
        "jump@127.0.0.1",
        "id",
    ]);
    let output = finish(shell, b"").await;
    assert_eq!((text(&output.stdout).as_str(), output.status.code()), ("", Some(255)));
    assert!(text(&output.stderr).contains("a way to projects"), "{}", text(&output.stderr));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mounted_project_is_a_file_system() {
    let world = World::new().await;
    for (bare, port) in [(false, world.direct), (true, world.proxied)] {
        world.shells.bare.store(bare, Ordering::SeqCst);
        let place = world.path(&format!("mounted-{port}"));
        std::fs::create_dir(&place).unwrap();
        let ssh = format!("ssh {} -o BatchMode=yes -p {port}", world.options("id").join(" "));
        let mounted = std::process::Command::new("sshfs")
            .arg(format!("{}@127.0.0.1:", world.project))
            .arg(&place)
            .args(["-o", &format!("ssh_command={ssh}")])
            .output()
            .expect("the package sshfs is needed");
        assert!(mounted.status.success(), "{}", text(&mounted.stderr));
        let script = "set -e; mkdir d; echo x >d/a; ln -s a d/l; cat d/l; mv d/a d/b; chmod 600 d/b; \
                      stat -c %a d/b; ls d; df . >/dev/null; dd if=/dev/zero of=d/big bs=1M count=8 2>/dev/null; \
                      stat -c %s d/big; rm -r d; ls";
        let used =
            std::process::Command::new("bash").args(["-c", script]).current_dir(&place).output().unwrap();
        let unmounted = std::process::Command::new("fusermount3").arg("-u").arg(&place).status();
        let unmounted = unmounted.is_ok_and(|status| status.success())
            || std::process::Command::new("umount").arg(&place).status().unwrap().success();
        assert!(unmounted);
        assert_eq!(text(&used.stdout), "x\n600\nb\nl\n8388608\n", "{}", text(&used.stderr));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_only_fails_is_barred_for_a_while() {
    let world = World::new().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let ingress = world.ingresses[0].clone();
    // Everybody here comes from one place, which is not this machine.
    let source: IpAddr = "203.0.113.5".parse().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let ingress = ingress.clone();
            tokio::spawn(async move { ingress.serve_stream(Box::pin(stream), Some(source)).await });
        }
    });
    trust(&world, port);
    let banner = async || {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        let mut start = [0; 4];
        matches!(
            tokio::time::timeout(Duration::from_secs(5), stream.read_exact(&mut start)).await,
            Ok(Ok(_)) if &start == b"SSH-"
        )
    };
    for _ in 0..4 {
        let mut ssh = Command::new("ssh");
        ssh.args(world.options("stranger"))
            .args(["-o", "BatchMode=yes"])
            .args(["-p", &port.to_string(), "-l", &world.project.to_string(), "127.0.0.1", "true"])
            .kill_on_drop(true);
        let _ = within(30, finish(ssh, b"")).await;
    }
    assert!(!banner().await, "who failed four times is still served");
    // Others are.
    let output = world.run(world.direct, "echo in", b"").await;
    assert_eq!(text(&output.stdout), "in\n");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_take_one_type_of_host_key_get_it() {
    let directory = tempfile::tempdir().unwrap();
    let world = World::new().await;
    let keys = HostKeys::load_or_create(&directory.path().join("ed25519"))
        .unwrap()
        .and_load_or_create(&directory.path().join("ecdsa"), HostKeyType::Ecdsa)
        .unwrap()
        .and_load_or_create(&directory.path().join("rsa"), HostKeyType::Rsa)
        .unwrap();
    let public = keys.public();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let ingress = SshIngress::builder(world.gate.clone(), keys).build();
    let _server = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(async move {
        let _ = ingress.serve(listener, std::future::pending()).await;
    }));
    for (key, algorithm) in public
        .iter()
        .zip(["ssh-ed25519", "ecdsa-sha2-nistp256", "rsa-sha2-512"])
        .chain([(&public[2], "rsa-sha2-256")])
    {
        let known = directory.path().join("known");
        std::fs::write(&known, format!("[127.0.0.1]:{port} {key}\n")).unwrap();
        let mut command = tokio::process::Command::new("ssh");
        command
            .args(["-F", "/dev/null", "-o", &format!("UserKnownHostsFile={}", known.display())])
            .args(["-o", "StrictHostKeyChecking=yes", "-o", &format!("HostKeyAlgorithms={algorithm}")])
            .args(world.options("id"))
            .args(["-o", "BatchMode=yes", "-p", &port.to_string()])
            .args(["-l", &world.project.to_string(), "127.0.0.1", "echo in"])
            .kill_on_drop(true);
        let output = finish(command, b"").await;
        assert_eq!(text(&output.stdout), "in\n", "{algorithm}: {}", text(&output.stderr));
    }
    // Nobody signs with SHA-1.
    let mut command = tokio::process::Command::new("ssh");
    command
        .args(["-F", "/dev/null", "-o", "HostKeyAlgorithms=ssh-rsa", "-o", "BatchMode=yes"])
        .args(["-p", &port.to_string(), "127.0.0.1", "true"])
        .kill_on_drop(true);
    let output = finish(command, b"").await;
    assert!(text(&output.stderr).contains("no matching host key type"), "{}", text(&output.stderr));
}
