//! The server against the programs that people have: OpenSSH's ssh, sftp and
//! scp, and rsync. Needs the packages openssh-client, openssh-sftp-server,
//! rsync and python3.

#![allow(clippy::unwrap_used, reason = "a test fails by it, in its helpers too")]

mod common;

use std::{
    collections::BTreeMap,
    process::Stdio,
    sync::{Arc, Mutex, atomic::Ordering},
    time::{Duration, Instant},
};

use cocalc_core::ids::Restrictions;
use common::{EXPIRED, TOKEN, World, finish, keygen, text, until, within};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exit_statuses_arrive_exactly() {
    let world = World::new().await;
    for port in [world.direct, world.proxied] {
        for code in [0, 1, 2, 42, 126, 127, 128, 200, 254, 255] {
            let output = world.run(port, &format!("exit {code}"), b"").await;
            assert_eq!(output.status.code(), Some(code), "{}", text(&output.stderr));
            assert!(output.stdout.is_empty() && output.stderr.is_empty(), "{}", text(&output.stderr));
        }
        // ssh reports a remote signal so.
        for signal in ["TERM", "KILL", "SEGV"] {
            let output = world.run(port, &format!("kill -{signal} $$"), b"").await;
            assert_eq!(output.status.code(), Some(255));
            let verbose =
                finish(world.ssh(port, &["-v", "127.0.0.1", &format!("kill -{signal} $$")]), b"").await;
            assert!(text(&verbose.stderr).contains("rtype exit-signal"), "{}", text(&verbose.stderr));
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_are_kept_apart_and_input_ends() {
    let world = World::new().await;
    for port in [world.direct, world.proxied] {
        let output = world.run(port, "echo out; echo err >&2; wc -c; echo done", b"12345").await;
        assert_eq!(text(&output.stdout), "out\n5\ndone\n");
        assert_eq!(text(&output.stderr), "err\n");
        // Who does not read its input ends all the same.
        let output = world.run(port, "exec <&-; echo early", &vec![b'x'; 4 << 20]).await;
        assert_eq!((text(&output.stdout).as_str(), output.status.code()), ("early\n", Some(0)));
        // A process that has closed its output still has a status.
        let output = world.run(port, "exec >&- 2>&-; read x; exit 7", b"\n").await;
        assert_eq!(output.status.code(), Some(7));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn variables_are_filtered() {
    let world = World::new().await;
    let arguments =
        ["-o", "SetEnv=LANG=xx_YY LD_PRELOAD=/evil.so GOOD=1", "127.0.0.1", "echo $LANG/$GOOD/$LD_PRELOAD"];
    let output = finish(world.ssh(world.direct, &arguments), b"").await;
    assert_eq!(text(&output.stdout), "xx_YY/1/\n");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_transfers_survive_rekeying() {
    let world = World::new().await;
    const MEGABYTES: usize = 96;
    for port in [world.direct, world.proxied] {
        let down = format!("head -c {} /dev/zero | tr '\\0' 'a'", MEGABYTES << 20);
        let options = ["-o", "RekeyLimit=1M", "127.0.0.1"];
        let output = finish(world.ssh(port, &[&options[..], &[&down]].concat()), b"").await;
        assert_eq!(output.stdout.len(), MEGABYTES << 20, "{}", text(&output.stderr));
        assert!(output.stdout.iter().all(|byte| *byte == b'a'));
        let up: Vec<u8> = (0..MEGABYTES << 20).map(|n| (n / 7) as u8).collect();
        std::fs::write(world.path("up"), &up).unwrap();
        let expected = std::process::Command::new("sha256sum").arg(world.path("up")).output().unwrap();
        let output = finish(world.ssh(port, &[&options[..], &["sha256sum"]].concat()), &up).await;
        assert_eq!(output.stdout[..64], expected.stdout[..64], "{}", text(&output.stderr));
        // Both directions at once: the process stops reading when it cannot
        // write, and neither side may wait for the other for ever.
        let output = finish(world.ssh(port, &[&options[..], &["cat"]].concat()), &up).await;
        assert!(output.stdout == up, "{} of {}", output.stdout.len(), up.len());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_go_both_ways_by_sftp_scp_and_rsync() {
    let world = World::new().await;
    let data: Vec<u8> = (0..8 << 20).map(|n: usize| ((n * 31) >> 3) as u8).collect();
    std::fs::write(world.path("data"), &data).unwrap();
    for port in [world.direct, world.proxied] {
        let at = format!("{}@127.0.0.1", world.project);
        let tool = |name: &str| {
            let mut command = tokio::process::Command::new(name);
            command
                .args(world.options("id"))
                .args(["-o", "BatchMode=yes", "-P", &port.to_string()])
                .current_dir(world.directory.path())
                .kill_on_drop(true);
            command
        };
        let mut sftp = tool("sftp");
        sftp.args(["-b", "-", &at]);
        let output =
            finish(sftp, format!("put data up-{port}\nget up-{port} down-{port}\n").as_bytes()).await;
        assert!(output.status.success(), "{}", text(&output.stderr));
        assert!(std::fs::read(world.path(&format!("down-{port}"))).unwrap() == data);
        // scp speaks sftp by default, and its own protocol with -O.
        for (mode, name) in [("-s", "new"), ("-O", "old")] {
            let mut up = tool("scp");
            up.args([mode, "data", &format!("{at}:{name}-{port}")]);
            let output = finish(up, b"").await;
            assert!(output.status.success(), "{}", text(&output.stderr));
            let mut down = tool("scp");
            down.args([mode, &format!("{at}:{name}-{port}"), &format!("{name}-down-{port}")]);
            assert!(finish(down, b"").await.status.success());
            assert!(std::fs::read(world.path(&format!("{name}-down-{port}"))).unwrap() == data);
        }
        std::fs::create_dir_all(world.path("tree/sub")).unwrap();
        for n in 0..200 {
            std::fs::write(world.path(&format!("tree/sub/{n}")), vec![n as u8; n * 50]).unwrap();
        }
        let shell = format!("ssh {} -o BatchMode=yes -p {port}", world.options("id").join(" "));
        for (from, to) in [
            ("tree/".to_owned(), format!("{at}:tree-{port}/")),
            (format!("{at}:tree-{port}/"), format!("tree-down-{port}/")),
        ] {
            let mut rsync = tokio::process::Command::new("rsync");
            rsync
                .args(["-a", "-e", &shell, &from, &to])
                .current_dir(world.directory.path())
                .kill_on_drop(true);
            let output = finish(rsync, b"").await;
            assert!(output.status.success(), "{}", text(&output.stderr));
        }
        let same = std::process::Command::new("diff")
            .arg("-r")
            .arg(world.path("tree"))
            .arg(world.path(&format!("tree-down-{port}")))
            .status()
            .unwrap();
        assert!(same.success());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_terminal_has_its_size_and_follows_it() {
    let world = World::new().await;
    // A terminal on this side too, whose size is changed while ssh runs.
    let script = r#"
import fcntl, os, pty, struct, sys, termios, time
pid, fd = pty.fork()
if pid == 0:
    os.execvp(sys.argv[1], sys.argv[1:])
def size(rows, cols):
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack('HHHH', rows, cols, 0, 0))
size(33, 101)
seen = b''
def expect(text):
    global seen
    deadline = time.time() + 30
    while text not in seen:
        if time.time() > deadline:
            sys.exit('missing %r in %r' % (text, seen))
        seen += os.read(fd, 4096)
    seen = seen[seen.index(text) + len(text):]
expect(b'bash-')
os.write(fd, b'stty size; tty | cut -c1-9; echo $TERM\r')
expect(b'33 101'); expect(b'/dev/pts/'); expect(b'xterm-test')
size(50, 132)
os.write(fd, b'until [ "$(stty size)" = "50 132" ]; do sleep 0.05; done; echo RE""SIZED\r')
expect(b'RESIZED')
# The interrupt key reaches the process in front.
os.write(fd, b"sh -c 'echo STAR\"\"TED; exec sleep 1000'\r")
expect(b'STARTED')
os.write(fd, b'\x03')
os.write(fd, b'exit 9\r')
try:
    while os.read(fd, 4096): pass
except OSError: pass
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"#;
    for port in [world.direct, world.proxied] {
        let ssh = world.ssh(port, &["-tt", "127.0.0.1"]);
        let mut python = tokio::process::Command::new("python3");
        python
            .args(["-c", script])
            .arg(ssh.as_std().get_program())
            .args(ssh.as_std().get_args())
            .env("TERM", "xterm-test")
            .kill_on_drop(true);
        let output = finish(python, b"").await;
        assert_eq!(output.status.code(), Some(9), "{}", text(&output.stderr));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_sessions_share_one_connection() {
    let world = World::new().await;
    for port in [world.direct, world.proxied] {
        let control = format!("ControlPath={}", world.path(&format!("mux-{port}")).display());
        let mut master = world
            .ssh(port, &["-M", "-N", "-o", &control, "-o", "RekeyLimit=4M", "127.0.0.1"])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        until("the connection stands", || world.path(&format!("mux-{port}")).exists()).await;
        let mut running = tokio::task::JoinSet::new();
        for n in 0..20_usize {
            let line = format!("cat; exit {n}");
            let command = world.ssh(port, &["-o", &control, "127.0.0.1", &line]);
            let data = vec![n as u8; 1 << 20];
            running.spawn(async move {
                let output = finish(command, &data).await;
                assert_eq!(output.status.code(), Some(n as i32), "{}", text(&output.stderr));
                assert!(output.stdout == data);
            });
        }
        while let Some(done) = running.join_next().await {
            done.unwrap();
        }
        assert_eq!(world.rights.admitted.load(std::sync::atomic::Ordering::SeqCst), 1);
        master.kill().await.unwrap();
        until("the login has ended", || world.rights.admitted.load(std::sync::atomic::Ordering::SeqCst) == 0)
            .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ports_are_forwarded_into_the_project() {
    let world = World::new().await;
    // A server that speaks first, echoes, and sees the end of its input.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let inside = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                stream.write_all(b"hello\n").await.unwrap();
                let mut data = Vec::new();
                stream.read_to_end(&mut data).await.unwrap();
                stream.write_all(&data).await.unwrap();
            });
        }
    });
    for port in [world.direct, world.proxied] {
        let outside = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
        let elsewhere = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
        let good = format!("127.0.0.1:{outside}:localhost:{inside}");
        let bad = format!("127.0.0.1:{elsewhere}:never.invalid:80");
        let mut ssh = world
            .ssh(port, &["-N", "-L", &good, "-L", &bad, "127.0.0.1"])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let connect = |port: u16| async move {
            let deadline = Instant::now() + Duration::from_secs(20);
            loop {
                match TcpStream::connect(("127.0.0.1", port)).await {
                    Ok(stream) => return stream,
                    Err(error) if Instant::now() > deadline => panic!("{error}"),
                    Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
                }
            }
        };
        for _ in 0..8 {
            let mut stream = connect(outside).await;
            let mut reply = Vec::new();
            let exchange = async {
                stream.write_all(&[b'z'; 300_000]).await.unwrap();
                stream.shutdown().await.unwrap();
                stream.read_to_end(&mut reply).await.unwrap();
            };
            within(30, exchange).await;
            assert_eq!(&reply[..6], b"hello\n");
            assert_eq!(reply.len(), 6 + 300_000);
        }
        let mut refused = connect(elsewhere).await;
        let mut nothing = Vec::new();
        let _ = within(30, refused.read_to_end(&mut nothing)).await;
        assert!(nothing.is_empty());
        ssh.kill().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_are_refused_in_the_same_words() {
    let book = Arc::new(Book::default());
    let names = book.clone();
    let world = World::with(move |builder| builder.names(names.clone())).await;
    book.0.lock().unwrap().insert("thesis".parse().unwrap(), world.project);
    let unknown = cocalc_core::ids::ProjectId::random().to_string();
    for port in [world.direct, world.proxied] {
        let mut words = Vec::new();
        let asked = world.rights.asked.load(Ordering::SeqCst);
        let mut work = Vec::new();
        for (key, user) in [
            ("stranger", world.project.to_string()),
            ("stranger", "thesis".into()),
            ("id", unknown.clone()),
            ("id", "no-such-name".into()),
            ("stranger", "root".into()),
            ("id", "project-5".into()),
        ] {
            let mut command = tokio::process::Command::new("ssh");
            command
                .args(world.options(key))
                .args(["-o", "BatchMode=yes", "-p", &port.to_string(), "-l", &user, "127.0.0.1", "true"])
                .kill_on_drop(true);
            let output = finish(command, b"").await;
            assert_eq!(output.status.code(), Some(255));
            words.push(text(&output.stderr).replace(&user, "USER"));
            work.push(world.rights.asked.load(Ordering::SeqCst) - asked - work.iter().sum::<usize>());
        }
        // A host verifies for each as often as for the others; a proxy asks one.
        assert!(work[0] > 0 && work.iter().all(|other| *other == work[0]), "{work:?}");
        assert!(words[0].contains("Permission denied"), "{words:?}");
        assert!(words.iter().all(|other| *other == words[0]), "{words:?}");
    }
    // The three spellings of a project are one, and its other name is a fourth.
    let id = world.project.to_string();
    for user in [format!("project-{id}"), id.replace('-', ""), "thesis".to_owned()] {
        for port in [world.direct, world.proxied] {
            let mut command = tokio::process::Command::new("ssh");
            command
                .args(world.options("id"))
                .args(["-o", "BatchMode=yes", "-p", &port.to_string(), "-l", &user, "127.0.0.1", "echo in"])
                .kill_on_drop(true);
            let output = finish(command, b"").await;
            assert_eq!(text(&output.stdout), "in\n", "{user}: {}", text(&output.stderr));
        }
    }
}

/// What the master would know.
#[derive(Debug, Default)]
struct Book(Mutex<BTreeMap<cocalc_core::ids::ProjectAlias, cocalc_core::ids::ProjectId>>);

#[async_trait::async_trait]
impl cocalc_ssh::Names for Book {
    async fn project(&self, alias: &cocalc_core::ids::ProjectAlias) -> Option<cocalc_core::ids::ProjectId> {
        self.0.lock().unwrap().get(alias).copied()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_is_a_password() {
    let world = World::new().await;
    let askpass = world.path("askpass");
    std::fs::write(&askpass, "#!/bin/sh\necho \"$1\" >&2\necho \"$SECRET\"\n").unwrap();
    std::fs::set_permissions(&askpass, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    for port in [world.direct, world.proxied] {
        for method in ["password", "keyboard-interactive"] {
            for (secret, code) in [(TOKEN, 0), (EXPIRED, 255), ("nonsense", 255)] {
                let mut command = tokio::process::Command::new("ssh");
                command
                    .args(world.options("stranger"))
                    .args([
                        "-o",
                        &format!("PreferredAuthentications={method}"),
                        "-o",
                        "NumberOfPasswordPrompts=2",
                    ])
                    .args(["-p", &port.to_string(), "-l", &world.project.to_string(), "127.0.0.1", "echo in"])
                    .env("SSH_ASKPASS", &askpass)
                    .env("SSH_ASKPASS_REQUIRE", "force")
                    .env("DISPLAY", "none")
                    .env("SECRET", secret)
                    .kill_on_drop(true);
                let output = finish(command, b"").await;
                let said = text(&output.stderr);
                assert_eq!(output.status.code(), Some(code), "{method} {secret}: {said}");
                // The reason is told where the protocol has a place for it.
                if method == "keyboard-interactive" && secret == EXPIRED {
                    assert!(said.contains("token has expired"), "{said}");
                }
                if method == "keyboard-interactive" && secret == "nonsense" {
                    assert!(said.contains("Access denied"), "{said}");
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn revocation_ends_what_runs_at_once() {
    for proxied in [false, true] {
        let world = World::new().await;
        let port = if proxied { world.proxied } else { world.direct };
        let mut child = world
            .ssh(port, &["127.0.0.1", "echo $$; exec sleep 1000"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let pid = within(30, lines.next_line()).await.unwrap().unwrap();
        let process = std::path::PathBuf::from(format!("/proc/{pid}"));
        assert!(process.exists());
        world.rights.revoke();
        let output = within(20, child.wait_with_output()).await.unwrap();
        assert_eq!(output.status.code(), Some(255));
        assert!(text(&output.stderr).contains("your access has ended"), "{}", text(&output.stderr));
        until("the process is gone", || !process.exists()).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_hangs_up_leaves_no_process() {
    let world = World::new().await;
    for port in [world.direct, world.proxied] {
        let mut child = world
            .ssh(port, &["127.0.0.1", "echo $$; exec sleep 1000"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let pid = within(30, lines.next_line()).await.unwrap().unwrap();
        child.kill().await.unwrap();
        until("the process is gone", || !std::path::Path::new(&format!("/proc/{pid}")).exists()).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_project_is_waited_for() {
    let world = World::new().await;
    for port in [world.direct, world.proxied] {
        world.shells.starting.store(3, std::sync::atomic::Ordering::SeqCst);
        let output = world.run(port, "echo up", b"").await;
        assert_eq!(text(&output.stdout), "up\n");
        assert!(
            text(&output.stderr).contains("the project is starting: mounting"),
            "{}",
            text(&output.stderr)
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_moved_project_says_where_it_is() {
    let world = World::new().await;
    let address =
        cocalc_core::router::HostAddress { ssh: "beta.example.com:7821".into(), ..Default::default() };
    world.router.route.lock().unwrap().as_mut().unwrap().how = cocalc_core::router::Reach::Remote(address);
    let output = world.run(world.direct, "echo never", b"").await;
    assert_eq!(output.status.code(), Some(255));
    assert!(output.stdout.is_empty());
    let said = text(&output.stderr);
    assert!(said.contains(&format!("ssh -p 7821 {}@beta.example.com", world.project)), "{said}");
    // Who is not let in is not told.
    let mut command = tokio::process::Command::new("ssh");
    command
        .args(world.options("stranger"))
        .args(["-o", "BatchMode=yes", "-p", &world.direct.to_string(), "-l", &world.project.to_string()])
        .args(["127.0.0.1", "true"]);
    let said = text(&finish(command, b"").await.stderr);
    assert!(!said.contains("beta.example.com"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_follows_a_move_that_it_has_not_heard_of() {
    let world = World::new().await;
    {
        let mut route = world.router.route.lock().unwrap();
        let route = route.as_mut().unwrap();
        route.host = world.beta;
        route.how = cocalc_core::router::Reach::Remote(cocalc_core::router::HostAddress {
            ssh: "beta.example.com:7821".into(),
            ..Default::default()
        });
    }
    // The old host knows the project's keys no more, so it tells its users
    // nothing, but the proxy where to ask.
    world.rights.held.store(false, std::sync::atomic::Ordering::SeqCst);
    let output = world.run(world.proxied, "echo in", b"").await;
    assert_eq!(text(&output.stdout), "in\n", "{}", text(&output.stderr));
    let output = world.run(world.direct, "echo in", b"").await;
    assert!(text(&output.stderr).contains("Permission denied"), "{}", text(&output.stderr));
    assert!(!text(&output.stderr).contains("beta"), "{}", text(&output.stderr));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_subsystem_that_is_not_there_is_refused_cleanly() {
    let world = World::new().await;
    let output = finish(world.ssh(world.direct, &["-s", "127.0.0.1", "netconf"]), b"").await;
    assert_eq!(output.status.code(), Some(255));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_current_algorithms_are_offered() {
    let world = World::new().await;
    let port = world.direct;
    let output = finish(world.ssh(port, &["-vv", "127.0.0.1", "true"]), b"").await;
    let said = text(&output.stderr);
    let server = said.split("peer server KEXINIT proposal").nth(1).expect("-vv shows the server's proposal");
    let server: String = server.lines().take(12).collect::<Vec<_>>().join("\n");
    for word in [
        "curve25519-sha256",
        "kex-strict-s-v00@openssh.com",
        "aes256-gcm@openssh.com",
        "compression ctos: none",
    ] {
        assert!(server.contains(word), "{word} is missing in {server}");
    }
    for word in ["diffie-hellman", "-ctr", "-cbc", "sha1", "zlib", "nistp"] {
        assert!(!server.contains(word), "{word} is offered in {server}");
    }
    for options in [["-c", "aes256-ctr"], ["-o", "KexAlgorithms=ecdh-sha2-nistp256"]] {
        let output = finish(world.ssh(port, &[&options[..], &["127.0.0.1", "true"]].concat()), b"").await;
        assert_eq!(output.status.code(), Some(255));
    }
    for cipher in ["aes128-gcm@openssh.com", "chacha20-poly1305@openssh.com"] {
        let output = finish(world.ssh(port, &["-c", cipher, "127.0.0.1", "echo in"]), b"").await;
        assert_eq!(text(&output.stdout), "in\n");
    }
}

/// Opens a shared connection, and returns the option that uses it.
async fn shared(world: &World, port: u16) -> (String, tokio::process::Child) {
    let path = world.path(&format!("shared-{port}"));
    let control = format!("ControlPath={}", path.display());
    let master =
        world.ssh(port, &["-M", "-N", "-o", &control, "127.0.0.1"]).stdin(Stdio::null()).spawn().unwrap();
    until("the connection stands", || path.exists()).await;
    (control, master)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_channel_that_is_not_read_stops_only_itself() {
    const SENT: usize = 48 << 20;
    let world = World::new().await;
    for port in [world.direct, world.proxied] {
        let (control, mut master) = shared(&world, port).await;
        let go = world.path(&format!("home/go-{port}"));
        assert!(std::process::Command::new("mkfifo").arg(&go).status().unwrap().success());
        // One more channel, open all the time, in which somebody types.
        let mut typing = world
            .ssh(port, &["-o", &control, "127.0.0.1", "cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (mut keys, mut echo) = (typing.stdin.take().unwrap(), typing.stdout.take().unwrap());
        let mut stalled = world
            .ssh(port, &["-o", &control, "127.0.0.1", &format!("cat go-{port}; wc -c")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut flood = stalled.stdin.take().unwrap();
        let feeding = tokio::spawn(async move {
            flood.write_all(&vec![0; SENT]).await.unwrap();
        });
        for round in 0..30_u8 {
            let mut byte = [0];
            let typed = async {
                keys.write_all(&[round]).await.unwrap();
                echo.read_exact(&mut byte).await.unwrap();
            };
            within(20, typed).await;
            assert_eq!(byte, [round]);
            if round % 10 == 0 {
                let fresh = world.ssh(port, &["-o", &control, "127.0.0.1", "wc -c"]);
                let output = finish(fresh, &[b'x'; 100_000]).await;
                assert_eq!(text(&output.stdout), "100000\n");
            }
        }
        assert!(!feeding.is_finished(), "everything was taken from who does not read");
        // Once it reads, all of it arrives.
        std::fs::write(&go, "now\n").unwrap();
        within(60, feeding).await.unwrap();
        let output = within(60, stalled.wait_with_output()).await.unwrap();
        assert_eq!(text(&output.stdout), format!("now\n{SENT}\n"));
        master.kill().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_goes_on_beside_a_channel_that_is_not_read() {
    const SENT: usize = 64 << 20;
    let world = World::new().await;
    let (control, mut master) = shared(&world, world.direct).await;
    let go = world.path("home/go");
    assert!(std::process::Command::new("mkfifo").arg(&go).status().unwrap().success());
    let mut stalled = world
        .ssh(world.direct, &["-o", &control, "127.0.0.1", "cat go; wc -c"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut flood = stalled.stdin.take().unwrap();
    let feeding = tokio::spawn(async move { flood.write_all(&vec![0; SENT]).await });
    // More than all that is ever kept of one channel, and of one connection.
    for _ in 0..3 {
        let data = vec![1; 48 << 20];
        let upload = finish(world.ssh(world.direct, &["-o", &control, "127.0.0.1", "wc -c"]), &data).await;
        assert_eq!(text(&upload.stdout), format!("{}\n", data.len()), "{}", text(&upload.stderr));
    }
    assert!(!feeding.is_finished(), "everything was taken from who does not read");
    std::fs::write(&go, "now\n").unwrap();
    within(60, feeding).await.unwrap().unwrap();
    let output = within(60, stalled.wait_with_output()).await.unwrap();
    assert_eq!(text(&output.stdout), format!("now\n{SENT}\n"));
    master.kill().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_all_keep_together_is_bounded_and_who_does_not_read_is_told() {
    let world = World::with(|builder| builder.input_bytes_max(8 << 20)).await;
    let flood = vec![0; 64 << 20];
    let mut stalled = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let ssh = world.ssh(world.direct, &["127.0.0.1", "exec sleep 1000"]);
        let flood = flood.clone();
        stalled.spawn(async move { finish(ssh, &flood).await });
    }
    let given_up = within(60, stalled.join_next()).await.unwrap().unwrap();
    assert_eq!(given_up.status.code(), Some(255));
    assert!(text(&given_up.stderr).contains("does not read its input"), "{}", text(&given_up.stderr));
    // Who reads notices nothing.
    let data = vec![1; 8 << 20];
    let upload = finish(world.ssh(world.direct, &["127.0.0.1", "cat"]), &data).await;
    assert!(upload.stdout == data, "{}", text(&upload.stderr));
    // Nor does who reads slowly, and has shown it, whoever comes then.
    const SENT: usize = 12 << 20;
    let script = "n=0
        while m=$(head -c 300000 | wc -c); [ $m -gt 0 ]; do
            n=$((n + m)); sleep 0.1; [ $n -lt 2000000 ] || echo > reads
        done
        echo $n";
    let slow = world.ssh(world.direct, &["127.0.0.1", script]);
    let slow = tokio::spawn(async move { finish(slow, &vec![0; SENT]).await });
    until("it reads", || world.path("home/reads").exists()).await;
    for _ in 0..4 {
        let ssh = world.ssh(world.direct, &["127.0.0.1", "exec sleep 1000"]);
        let flood = flood.clone();
        stalled.spawn(async move { finish(ssh, &flood).await });
    }
    let slow = within(60, slow).await.unwrap();
    assert_eq!(text(&slow.stdout), format!("{SENT}\n"), "{}", text(&slow.stderr));
    let given_up = within(60, stalled.join_next()).await.unwrap().unwrap();
    assert!(text(&given_up.stderr).contains("does not read its input"), "{}", text(&given_up.stderr));
    stalled.abort_all();
}

/// Runs ssh-keygen in the world's directory.
fn sign(world: &World, arguments: &[&str]) {
    let output = std::process::Command::new("ssh-keygen")
        .current_dir(world.directory.path())
        .args(arguments)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
}

/// A certificate file's two words.
fn certificate(world: &World, name: &str) -> String {
    let line = std::fs::read_to_string(world.path(name)).unwrap();
    line.split_ascii_whitespace().take(2).collect::<Vec<_>>().join(" ")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_certificate_saves_the_question() {
    let world = World::new().await;
    keygen(&world.path("ca"));
    std::fs::write(world.path("host.pub"), format!("{}\n", world.host_keys[0])).unwrap();
    sign(&world, &["-q", "-s", "ca", "-I", "h", "-h", "-n", "127.0.0.1", "-V", "-1m:+1h", "host.pub"]);
    let good = certificate(&world, "host-cert.pub");
    let authority = std::fs::read_to_string(world.path("ca.pub")).unwrap();
    std::fs::write(world.path("known_hosts"), format!("@cert-authority [127.0.0.1]:* {authority}")).unwrap();
    for port in [world.direct, world.proxied] {
        let output = world.run(port, "echo in", b"").await;
        assert_eq!(output.status.code(), Some(255), "there is no certificate yet");
    }
    for ingress in &world.ingresses {
        // What is of another key, or a user's, is never offered.
        let stranger = world.path("stranger.pub");
        std::fs::copy(stranger, world.path("other.pub")).unwrap();
        sign(&world, &["-q", "-s", "ca", "-I", "o", "-h", "-n", "127.0.0.1", "other.pub"]);
        sign(&world, &["-q", "-s", "ca", "-I", "u", "-n", "127.0.0.1", "host.pub"]);
        for bad in [certificate(&world, "other-cert.pub"), certificate(&world, "host-cert.pub"), "x".into()] {
            assert!(ingress.offer_certificates(&[bad]).is_err());
        }
        ingress.offer_certificates(std::slice::from_ref(&good)).unwrap();
    }
    for port in [world.direct, world.proxied] {
        let output = world.run(port, "echo in", b"").await;
        assert_eq!(text(&output.stdout), "in\n", "{}", text(&output.stderr));
        // Rekeying stays with it.
        let arguments = ["-o", "RekeyLimit=1M", "127.0.0.1", "head -c 8000000 /dev/zero"];
        let output = finish(world.ssh(port, &arguments), b"").await;
        assert_eq!(output.stdout.len(), 8_000_000, "{}", text(&output.stderr));
        // Who knows the key itself needs no authority.
        let known = format!("[127.0.0.1]:{port} {}\n", world.host_keys[0]);
        std::fs::write(world.path("plain"), known).unwrap();
        let file = format!("UserKnownHostsFile={}", world.path("plain").display());
        let mut ssh = tokio::process::Command::new("ssh");
        // Of two options the first counts.
        ssh.args(["-o", &file]).args(world.ssh(port, &["127.0.0.1", "echo in"]).as_std().get_args());
        let output = finish(ssh, b"").await;
        assert_eq!(text(&output.stdout), "in\n", "{}", text(&output.stderr));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_host_key_is_known_by_its_certificate_and_refused_where_the_old_one_is_pinned() {
    let (old, new) = (World::new().await, World::new().await);
    assert_ne!(old.host_keys[0], new.host_keys[0]);
    keygen(&new.path("ca"));
    std::fs::write(new.path("host.pub"), format!("{}\n", new.host_keys[0])).unwrap();
    sign(&new, &["-q", "-s", "ca", "-I", "h", "-h", "-n", "127.0.0.1", "-V", "-1m:+1h", "host.pub"]);
    for ingress in &new.ingresses {
        ingress.offer_certificates(&[certificate(&new, "host-cert.pub")]).unwrap();
    }
    let authority = std::fs::read_to_string(new.path("ca.pub")).unwrap();
    for port in [new.direct, new.proxied] {
        // The old key is known as well, as it is while keys are replaced.
        let pinned = format!("[127.0.0.1]:{port} {}\n", old.host_keys[0]);
        let certified = format!("{pinned}@cert-authority [127.0.0.1]:* {authority}");
        std::fs::write(new.path("known_hosts"), certified).unwrap();
        let output = new.run(port, "echo in", b"").await;
        assert_eq!(text(&output.stdout), "in\n", "{}", text(&output.stderr));
        std::fs::write(new.path("known_hosts"), pinned).unwrap();
        let output = new.run(port, "echo in", b"").await;
        assert_eq!((output.status.code(), output.stdout.len()), (Some(255), 0));
        let complaint = text(&output.stderr);
        assert!(complaint.contains("REMOTE HOST IDENTIFICATION HAS CHANGED"), "{complaint}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_opens_what_it_permits() {
    let world = World::new().await;
    keygen(&world.path("ca"));
    let project = world.project.to_string();
    // No key of this pair is known to anybody.
    keygen(&world.path("fresh"));
    let sign = |validity: &str| {
        sign(&world, &["-q", "-s", "ca", "-I", "u", "-n", &project, "-V", validity, "fresh.pub"]);
        certificate(&world, "fresh-cert.pub")
    };
    let ssh = |port: u16, arguments: &[&str]| {
        let mut command = tokio::process::Command::new("ssh");
        command
            .args(world.options("fresh"))
            .args(["-o", "BatchMode=yes", "-p", &port.to_string(), "-l", &project])
            .args(arguments)
            .kill_on_drop(true);
        finish(command, b"")
    };
    let permit = |text: &str, restrictions: Restrictions| {
        *world.rights.certificate.lock().unwrap() = Some((text.to_owned(), restrictions));
    };
    for port in [world.direct, world.proxied] {
        let good = sign("-1m:+5m");
        permit(&good, Restrictions::default());
        let output = ssh(port, &["127.0.0.1", "echo in; exit 3"]).await;
        assert_eq!((text(&output.stdout).as_str(), output.status.code()), ("in\n", Some(3)));
        let output = ssh(port, &["-tt", "127.0.0.1", "tty | cut -c1-8"]).await;
        assert_eq!(text(&output.stdout).trim(), "/dev/pts", "{}", text(&output.stderr));

        let forced = Restrictions {
            command: Some("echo \"forced: $SSH_ORIGINAL_COMMAND\"".into()),
            environment: [("FOR".into(), "me".into())].into(),
            ..Restrictions::all()
        };
        permit(&good, forced);
        let output = ssh(port, &["127.0.0.1", "cat /etc/shadow"]).await;
        assert_eq!(text(&output.stdout), "forced: cat /etc/shadow\n", "{}", text(&output.stderr));
        let output = ssh(port, &["-s", "127.0.0.1", "sftp"]).await;
        assert_eq!(text(&output.stdout), "forced: internal-sftp\n");
        let output = ssh(port, &["127.0.0.1"]).await;
        assert_eq!(text(&output.stdout), "forced: \n", "{}", text(&output.stderr));
        let output = ssh(port, &["-tt", "127.0.0.1"]).await;
        assert!(text(&output.stderr).contains("PTY allocation request failed"), "{}", text(&output.stderr));
        // A listener that is there, and is not reached.
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let there = listener.local_addr().unwrap().to_string();
        let output = ssh(port, &["-W", &there, "127.0.0.1"]).await;
        assert_ne!(output.status.code(), Some(0));
        assert!(text(&output.stderr).contains("open failed"), "{}", text(&output.stderr));

        let env =
            Restrictions { environment: [("FOR".into(), "me".into())].into(), ..Restrictions::default() };
        permit(&good, env);
        let output = ssh(port, &["-o", "SetEnv=FOR=you", "127.0.0.1", "echo $FOR"]).await;
        assert_eq!(text(&output.stdout), "me\n");

        // One that has ended is refused before anybody is asked.
        let ended = sign("-10m:-5m");
        permit(&ended, Restrictions::default());
        let output = ssh(port, &["127.0.0.1", "echo in"]).await;
        assert_eq!(output.status.code(), Some(255), "{}", text(&output.stdout));
        let other = sign("-1m:+6m");
        assert_ne!(other, good);
        permit(&good, Restrictions::default());
        let output = ssh(port, &["127.0.0.1", "echo in"]).await;
        assert_eq!(output.status.code(), Some(255), "{}", text(&output.stdout));
    }
}
