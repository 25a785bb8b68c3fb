//! What OpenSSH's clients see when something is killed under them, as `kill -9`
//! does: the project's processes, its first process, its host's daemon, the
//! proxy. Nobody is left hanging, and whoever comes again gets in. Needs root.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod federation;

use std::{
    fs::File,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    time::{Duration, Instant},
};

use federation::Federation;
use serde_json::Value;

/// Every wait has an end; none is what is measured.
const LIMIT: Duration = Duration::from_secs(120);
/// What waits inside the project for connections, says hello and then listens.
const SERVER: &str = r#"import socket, threading
s = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind(("127.0.0.1", 4567))
s.listen(50)
kept = []
def serve(c):
    c.sendall(b"hello")
    while c.recv(4096):
        pass
    c.close()
while True:
    c, _ = s.accept()
    threading.Thread(target=serve, args=(c,), daemon=True).start()
"#;

/// Runs a line in a terminal of its own, and prints what that shows.
const IN_TERMINAL: &str = r#"import os, pty, sys
pid, terminal = pty.fork()
if pid == 0:
    os.execvp("sh", ["sh", "-c", sys.argv[1]])
while True:
    try:
        shown = os.read(terminal, 4096)
    except OSError:
        break
    if not shown:
        break
    sys.stdout.buffer.write(shown)
os.waitpid(pid, 0)
"#;

/// The three ways to a project: its host, a proxy that ends the connection, and
/// a proxy that passes it on.
const WAYS: [&str; 3] = ["direct", "proxy", "jump"];

struct World {
    federation: Federation,
    home: tempfile::TempDir,
    project: String,
}

/// Something of a user's that is open.
struct Open {
    what: &'static str,
    way: &'static str,
    child: Child,
    errors: PathBuf,
    /// A connection through it.
    stream: Option<TcpStream>,
}

impl Drop for Open {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Open {
    fn said(&self) -> String {
        std::fs::read_to_string(&self.errors).unwrap_or_default()
    }

    /// Waits until the client has ended.
    fn end(&mut self, why: &str, world: &World) -> ExitStatus {
        let deadline = Instant::now() + LIMIT;
        loop {
            match self.child.try_wait().unwrap() {
                Some(status) => return status,
                None if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(20)),
                None => panic!(
                    "{} by {} hangs after the end of {why}; it said {:?}\n{}",
                    self.what,
                    self.way,
                    self.said(),
                    world.federation.log()
                ),
            }
        }
    }

    /// It ends, with an error, and says so.
    fn fails(&mut self, why: &str, world: &World) {
        let status = self.end(why, world);
        let said = self.said();
        // OpenSSH's sftp falls silently, and by a signal, if it has just written.
        let fell = self.what == "sftp" && status.code().is_none();
        assert!(
            status.code() != Some(0) && (fell || status.code().is_some()),
            "{} by {} after the end of {why}: {status}: {said}",
            self.what,
            self.way
        );
        assert!(
            fell || !said.trim().is_empty(),
            "{} by {}: no word of the end of {why}",
            self.what,
            self.way
        );
    }

    /// What goes through it ends.
    fn breaks(&mut self, why: &str) {
        let stream = self.stream.as_mut().unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let mut rest = [0; 16];
        match stream.read(&mut rest) {
            Ok(0) => {}
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
            other => panic!("a connection by {} after the end of {why}: {other:?}", self.way),
        }
    }
}

impl World {
    fn new() -> Self {
        let federation = Federation::up(21700, &["--storage", "btrfs", "--runner", "podman", "--hosts", "1"]);
        let home = tempfile::Builder::new().prefix("cocalc-ends-").tempdir().unwrap();
        let world = Self { project: federation.project(), federation, home };
        let made = Command::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-f"])
            .arg(world.path("id"))
            .status()
            .unwrap();
        assert!(made.success());
        let key = world.path("id.pub").display().to_string();
        world.federation.json(&["key", "add", &key]);
        let known = world.federation.cocalc(&["ssh-known-hosts"]);
        std::fs::write(world.path("known"), &known.stdout).unwrap();
        world.configure();
        for way in WAYS {
            world.opens(way);
        }
        world
    }

    fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    fn configure(&self) {
        let at = |peer: &Value| {
            let (server, port) = peer["ssh"].as_str().unwrap().rsplit_once(':').unwrap();
            (server.rsplit('@').next().unwrap().to_owned(), port.to_owned())
        };
        let (host, host_port) = at(&self.federation.json["hosts"][0]);
        let (proxy, proxy_port) = at(&self.federation.json["proxy"]);
        let project = &self.project;
        let text = format!(
            "Host direct\n HostName {host}\n Port {host_port}\n User {project}\n\
             Host proxy\n HostName {proxy}\n Port {proxy_port}\n User {project}\n\
             Host gate\n HostName {proxy}\n Port {proxy_port}\n User jump\n\
             Host jump\n HostName {project}\n HostKeyAlias {host}\n User {project}\n ProxyJump gate\n\
             Host *\n IdentityFile {}\n UserKnownHostsFile {}\n GlobalKnownHostsFile /dev/null\n \
             StrictHostKeyChecking yes\n UpdateHostKeys no\n IdentitiesOnly yes\n IdentityAgent none\n \
             BatchMode yes\n ConnectTimeout 60\n",
            self.path("id").display(),
            self.path("known").display(),
        );
        std::fs::write(self.path("config"), text).unwrap();
    }

    fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.arg("-F").arg(self.path("config")).args(arguments);
        command
    }

    fn run(&self, way: &str, line: &str) -> Output {
        self.command("ssh", &[way, line]).stdin(Stdio::null()).output().unwrap()
    }

    /// A new session works, soon.
    fn opens(&self, way: &str) {
        let mut last = None;
        let deadline = Instant::now() + LIMIT;
        while Instant::now() < deadline {
            let output = self.run(way, "echo in");
            if output.status.success() && output.stdout == b"in\n" {
                return;
            }
            last = Some(output);
            std::thread::sleep(Duration::from_millis(200));
        }
        panic!("no session by {way}: {last:?}\n{}", self.federation.log());
    }

    fn spawn(&self, what: &'static str, way: &'static str, mut command: Command, out: Stdio) -> Open {
        let errors = self.path(&format!("{what}-{way}.err"));
        let log = File::create(&errors).unwrap();
        // The input stays open: an end of it must not be what ends them.
        let child = command.stdin(Stdio::piped()).stdout(out).stderr(log).spawn().unwrap();
        Open { what, way, child, errors, stream: None }
    }

    /// A command, with and without a terminal, that has begun.
    fn session(&self, what: &'static str, way: &'static str, arguments: &[&str]) -> Open {
        let command = self.command("ssh", &[arguments, &[way, "echo in; sleep 100000"]].concat());
        let mut open = self.spawn(what, way, command, Stdio::piped());
        let mut word = [0; 2];
        let begun = open.child.stdout.as_mut().unwrap().read_exact(&mut word);
        assert!(begun.is_ok() && &word == b"in", "{what} by {way}: {}", open.said());
        open
    }

    /// A file on its way.
    fn transfer(&self, way: &'static str) -> Open {
        let (batch, file) = (self.path(&format!("{way}.batch")), self.path(&format!("{way}.got")));
        let _ = std::fs::remove_file(&file);
        std::fs::write(&batch, format!("get big {}\n", file.display())).unwrap();
        // 20 GiB of nothing, slowly.
        let mut command = self.command("sftp", &["-q", "-l", "2000", "-b"]);
        command.arg(&batch).arg(way);
        let mut open = self.spawn("sftp", way, command, Stdio::null());
        let deadline = Instant::now() + LIMIT;
        while !std::fs::metadata(&file).is_ok_and(|file| file.len() > 0) {
            assert!(open.child.try_wait().unwrap().is_none(), "sftp by {way}: {}", open.said());
            assert!(Instant::now() < deadline, "sftp by {way} does not begin: {}", open.said());
            std::thread::sleep(Duration::from_millis(20));
        }
        open
    }

    /// A forwarded port, and a connection through it.
    fn forward(&self, way: &'static str) -> Open {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let forward = format!("127.0.0.1:{port}:127.0.0.1:4567");
        let command = self.command("ssh", &["-N", "-o", "ExitOnForwardFailure=yes", "-L", &forward, way]);
        let mut open = self.spawn("forward", way, command, Stdio::null());
        let deadline = Instant::now() + LIMIT;
        let stream = loop {
            assert!(open.child.try_wait().unwrap().is_none(), "-L by {way}: {}", open.said());
            match TcpStream::connect(("127.0.0.1", port)) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > deadline => panic!("-L by {way}: {error} {}", open.said()),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let mut word = [0; 5];
        (&stream).read_exact(&mut word).unwrap();
        assert_eq!(&word, b"hello");
        open.stream = Some(stream);
        open
    }

    /// One of each by each way.
    fn open_all(&self) -> Vec<Open> {
        // In a session of its own, or it ended with the command that starts it.
        let serve = "reached() { bash -c 'exec 3<>/dev/tcp/127.0.0.1/4567' 2>/dev/null; }
            reached || setsid -f python3 ~/server.py </dev/null >/dev/null 2>&1
            for i in $(seq 600); do reached && exit 0; sleep 0.1; done; exit 1";
        let served = self.federation.exec(serve);
        assert!(served.status.success(), "{served:?}");
        std::thread::scope(|scope| {
            let begin = |way| {
                move || {
                    [
                        self.session("exec", way, &[]),
                        self.session("terminal", way, &["-tt"]),
                        self.transfer(way),
                        self.forward(way),
                    ]
                }
            };
            let ways = WAYS.map(|way| scope.spawn(begin(way)));
            ways.into_iter().flat_map(|way| way.join().unwrap()).collect()
        })
    }
}

fn kill(pid: &Value) {
    let killed = Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap();
    assert!(killed.success(), "{pid}");
}

/// The first process of the project's container, as the machine counts.
fn first_process(project: &str) -> Value {
    let run = |arguments: &[&str]| {
        let output = Command::new("podman").args(arguments).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let names = run(&["ps", "--format", "{{.Names}}"]);
    let name = names.lines().find(|name| name.contains(project)).unwrap();
    let pid: u32 = run(&["inspect", "--format", "{{.State.Pid}}", name]).trim().parse().unwrap();
    assert!(pid > 1, "{name}");
    pid.into()
}

#[test]
fn whatever_is_killed_no_client_hangs_and_who_comes_again_gets_in() {
    let mut world = World::new();
    let mut server = world.command("ssh", &["direct", "cat > server.py && truncate -s 20G big"]);
    let mut server = server.stdin(Stdio::piped()).spawn().unwrap();
    server.stdin.take().unwrap().write_all(SERVER.as_bytes()).unwrap();
    assert!(server.wait().unwrap().success());

    the_users_terminal_is_the_projects(&world);
    the_projects_processes(&world);
    its_first_process(&world);
    the_proxy(&mut world);
    the_host(&mut world);
}

/// What the user has set in their own terminal holds in the project's.
fn the_users_terminal_is_the_projects(world: &World) {
    for way in WAYS {
        let line = format!(
            "stty rows 40 columns 120 intr ^G quit undef erase ^H kill ^X -echo -echoctl iutf8 -ixon tostop 9600
             stty -a; echo ====; exec ssh -q -F {} -t {way} 'stty -a'",
            world.path("config").display()
        );
        let output = Command::new("python3").args(["-c", IN_TERMINAL, &line]).output().unwrap();
        let shown = String::from_utf8_lossy(&output.stdout).replace('\r', "");
        let (here, there) = shown.split_once("====\n").unwrap();
        assert!(here.contains("intr = ^G") && here.contains("-echo"), "{here}");
        assert_eq!(here, there, "by {way}: {output:?}");
    }
}

/// The connection is good, and only what ran in it is over: an exit by a signal,
/// of which OpenSSH says nothing, as with its own server.
fn the_projects_processes(world: &World) {
    let mut all = world.open_all();
    // All of the user's in its own namespace of processes, and of nobody else:
    // an ordinary user in there is root nowhere.
    let line = "test $(id -un) = user && test $(id -u) -ne 0 && kill -9 -1";
    world.federation.exec(line);
    for open in &mut all {
        match open.what {
            "forward" => {
                open.breaks("the project's processes");
                assert!(open.child.try_wait().unwrap().is_none(), "{}", open.said());
            }
            "exec" | "terminal" => {
                let status = open.end("the project's processes", world);
                assert_eq!(status.code(), Some(255), "{} by {}: {}", open.what, open.way, open.said());
            }
            _ => open.fails("the project's processes", world),
        }
    }
    for way in WAYS {
        world.opens(way);
    }
}

/// The project has died, and is started again for whoever comes.
fn its_first_process(world: &World) {
    let mut all = world.open_all();
    kill(&first_process(&world.project));
    for open in &mut all {
        match open.what {
            "forward" => open.breaks("its first process"),
            _ => open.fails("its first process", world),
        }
        if matches!(open.what, "exec" | "terminal") {
            let said = open.said();
            assert!(said.contains("cocalc: "), "{} by {}: {said}", open.what, open.way);
        }
    }
    for way in WAYS {
        world.opens(way);
    }
}

/// Whoever is with the host directly does not notice.
fn the_proxy(world: &mut World) {
    let mut all = world.open_all();
    world.federation.reload();
    kill(&world.federation.json["proxy"]["pid"]);
    for open in all.iter_mut().filter(|open| open.way != "direct") {
        open.fails("the proxy", world);
        if open.what == "forward" {
            open.breaks("the proxy");
        }
    }
    for open in all.iter_mut().filter(|open| open.way == "direct") {
        assert!(open.child.try_wait().unwrap().is_none(), "{}: {}", open.what, open.said());
    }
    for way in WAYS {
        world.opens(way);
    }
}

/// The project itself goes on.
fn the_host(world: &mut World) {
    let first = first_process(&world.project);
    let mut all = world.open_all();
    world.federation.reload();
    kill(&world.federation.json["hosts"][0]["pid"]);
    for open in &mut all {
        open.fails("the host", world);
        if open.what == "forward" {
            open.breaks("the host");
        }
    }
    for way in WAYS {
        world.opens(way);
    }
    assert_eq!(first_process(&world.project), first, "the project was started again");
    let left = Path::new("/proc").join(first.to_string());
    assert!(left.exists());
}
