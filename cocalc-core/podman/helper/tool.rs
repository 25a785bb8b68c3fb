//! What the host needs done inside the project besides the user's processes:
//! listening and connecting there, as the user. It speaks on its standard
//! streams, which are pipes of the host's.
//!
//! A listener holds what it has accepted until another process of this program
//! takes it over, one for each connection: so each has pipes of its own, and
//! the host never gets a descriptor from inside.

use std::{
    collections::BTreeMap,
    fs::{DirBuilder, File},
    io::{self, BufRead, Read, Write},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs},
    os::{
        fd::{AsFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::{
            fs::DirBuilderExt,
            net::{UnixListener, UnixStream},
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use crate::{sftp, sys, terminal};

/// How many accepted connections wait for being taken over.
const WAITING_MAX: usize = 64;
/// How long they wait.
const WAITING_LIMIT: Duration = Duration::from_secs(30);
/// How long connecting may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(30);
/// The first X display that is tried, and the last.
const DISPLAYS: std::ops::Range<u16> = 10..1000;

/// Runs the tool that `args` name; its exit status.
pub(crate) fn run(args: &[String]) -> i32 {
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match args[..] {
        ["listen-tcp", ticket, port] => {
            port.parse().map_err(io::Error::other).and_then(tcp).and_then(|(listeners, port)| {
                Listening::new(ticket, listeners, &port.to_string(), Vec::new())
            })
        }
        ["listen-unix", ticket, path] => unix(Path::new(path))
            .and_then(|listener| Listening::new(ticket, vec![listener], path, vec![path.into()])),
        ["listen-agent", ticket] => agent(ticket),
        ["listen-x11", ticket] => x11(ticket),
        ["take", ticket, number] => return carry(take(ticket, number)),
        ["connect-tcp", host, port] => return carry(connect(host, port)),
        ["connect-unix", path] => return carry(UnixStream::connect(path).map(OwnedFd::from)),
        ["sftp"] => return sftp::serve(),
        ["terminal", modes, program, ref args @ ..] => return in_terminal(modes, program, args),
        _ => Err(io::Error::other("unknown tool")),
    };
    match done {
        Ok(listening) => listening.run(),
        Err(error) => {
            say(&format!("E {}", one_line(&error)));
            1
        }
    }
}

/// Gives the terminal that this is started in its modes, and becomes the program;
/// its exit status is what a shell says of one that is not there.
fn in_terminal(modes: &str, program: &str, args: &[&str]) -> i32 {
    if let Ok(own) = io::stdin().as_fd().try_clone_to_owned() {
        let own = File::from(own);
        terminal::await_runtime(&own);
        terminal::set_modes(&own, &terminal::parse(modes));
    }
    let error = Command::new(program).args(args).exec();
    eprintln!("{program}: {}", one_line(&error));
    if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 }
}

fn one_line(error: &io::Error) -> String {
    error.to_string().chars().map(|c| if c.is_control() { ' ' } else { c }).take(500).collect()
}

/// Writes a line to the host; false if it has gone.
fn say(line: &str) -> bool {
    let mut out = io::stdout().lock();
    out.write_all(format!("{line}\n").as_bytes()).and_then(|()| out.flush()).is_ok()
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    fn accept(&self) -> io::Result<(OwnedFd, String)> {
        match self {
            Self::Tcp(listener) => {
                let (stream, peer) = listener.accept()?;
                let _ = stream.set_nodelay(true);
                Ok((stream.into(), format!("{} {}", peer.ip(), peer.port())))
            }
            Self::Unix(listener) => Ok((listener.accept()?.0.into(), "- 0".to_owned())),
        }
    }
}

/// Listens on the loopback addresses, as sshd does.
fn tcp(port: u16) -> io::Result<(Vec<Listener>, u16)> {
    let four = TcpListener::bind((Ipv4Addr::LOCALHOST, port))?;
    let port = four.local_addr()?.port();
    let mut listeners = vec![Listener::Tcp(four)];
    // There may be no IPv6.
    if let Ok(six) = TcpListener::bind((Ipv6Addr::LOCALHOST, port)) {
        listeners.push(Listener::Tcp(six));
    }
    Ok((listeners, port))
}

fn unix(path: &Path) -> io::Result<Listener> {
    let mask = sys::set_umask(0o177);
    let bound = UnixListener::bind(path);
    sys::set_umask(mask);
    Ok(Listener::Unix(bound?))
}

fn agent(ticket: &str) -> io::Result<Listening> {
    let directory = PathBuf::from(format!("/tmp/cocalc-{}", &ticket[..ticket.len().min(16)]));
    DirBuilder::new().mode(0o700).create(&directory)?;
    let path = directory.join("agent.sock");
    let listener = unix(&path)?;
    let place = path.display().to_string();
    Listening::new(ticket, vec![listener], &place, vec![path, directory])
}

fn x11(ticket: &str) -> io::Result<Listening> {
    let mut line = String::new();
    io::stdin().lock().take(4096).read_line(&mut line)?;
    let [protocol, cookie, screen] = line.split_whitespace().collect::<Vec<_>>()[..] else {
        return Err(io::Error::other("the request makes no sense"));
    };
    let word = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    if !word(protocol) || !word(cookie) || screen.parse::<u32>().is_err() {
        return Err(io::Error::other("the request makes no sense"));
    }
    let xauth = ["/usr/bin/xauth", "/usr/local/bin/xauth", "/usr/X11R6/bin/xauth"]
        .into_iter()
        .find(|path| Path::new(path).exists())
        .ok_or_else(|| io::Error::other("the image has no xauth"))?;
    let (listeners, display) = DISPLAYS
        .filter_map(|display| Some((tcp(6000 + display).ok()?.0, display)))
        .next()
        .ok_or_else(|| io::Error::other("no X display is free"))?;
    let mut child = Command::new(xauth)
        .args(["-q", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    if let Some(mut input) = child.stdin.take() {
        let name = format!("unix:{display}.{screen}");
        input.write_all(format!("remove {name}\nadd {name} {protocol} {cookie}\n").as_bytes())?;
    }
    if !child.wait()?.success() {
        return Err(io::Error::other("xauth failed"));
    }
    Listening::new(ticket, listeners, &format!("localhost:{display}.{screen}"), Vec::new())
}

/// What was accepted, by number.
#[derive(Default)]
struct Waiting {
    last: u32,
    sockets: BTreeMap<u32, (OwnedFd, Instant)>,
}

struct Listening {
    collect: UnixListener,
    listeners: Vec<Listener>,
    place: String,
    litter: Vec<PathBuf>,
}

fn meeting(ticket: &str) -> io::Result<std::os::unix::net::SocketAddr> {
    std::os::unix::net::SocketAddr::from_abstract_name(format!("cocalc-{ticket}"))
}

fn lock(waiting: &Mutex<Waiting>) -> MutexGuard<'_, Waiting> {
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Listening {
    fn new(ticket: &str, listeners: Vec<Listener>, place: &str, litter: Vec<PathBuf>) -> io::Result<Self> {
        let collect = UnixListener::bind_addr(&meeting(ticket)?);
        let place = place.to_owned();
        let collect = collect.inspect_err(|_| remove(&litter))?;
        Ok(Self { collect, listeners, place, litter })
    }

    /// Serves until the host closes standard input.
    fn run(self) -> i32 {
        let waiting = Arc::new(Mutex::new(Waiting::default()));
        say(&format!("L {}", self.place));
        for listener in self.listeners {
            let waiting = waiting.clone();
            spawn(move || {
                loop {
                    match listener.accept() {
                        Ok((socket, peer)) => announce(&waiting, socket, &peer),
                        Err(_) => std::thread::sleep(Duration::from_millis(100)),
                    }
                }
            });
        }
        let collect = self.collect;
        spawn(move || {
            loop {
                match collect.accept() {
                    Ok((stream, _)) => {
                        let _ = hand_over(&waiting, &stream);
                    }
                    Err(_) => std::thread::sleep(Duration::from_millis(100)),
                }
            }
        });
        let mut rest = [0; 256];
        while !matches!(io::stdin().lock().read(&mut rest), Ok(0) | Err(_)) {}
        remove(&self.litter);
        0
    }
}

fn remove(litter: &[PathBuf]) {
    for path in litter {
        let _ = std::fs::remove_file(path).or_else(|_| std::fs::remove_dir(path));
    }
}

fn spawn(work: impl FnOnce() + Send + 'static) {
    if std::thread::Builder::new().stack_size(128 << 10).spawn(work).is_err() {
        say("E the project has no room for another thread");
        std::process::exit(1);
    }
}

fn announce(waiting: &Mutex<Waiting>, socket: OwnedFd, peer: &str) {
    let number = {
        let mut waiting = lock(waiting);
        waiting.sockets.retain(|_, (_, since)| since.elapsed() < WAITING_LIMIT);
        if waiting.sockets.len() >= WAITING_MAX {
            return;
        }
        waiting.last = waiting.last.wrapping_add(1);
        let number = waiting.last;
        waiting.sockets.insert(number, (socket, Instant::now()));
        number
    };
    if !say(&format!("A {number} {peer}")) {
        std::process::exit(0);
    }
}

fn hand_over(waiting: &Mutex<Waiting>, stream: &UnixStream) -> io::Result<()> {
    if !sys::is_own(stream) {
        return Ok(());
    }
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut number = [0; 4];
    (&*stream).read_exact(&mut number)?;
    let socket = lock(waiting).sockets.remove(&u32::from_be_bytes(number));
    match socket {
        Some((socket, _)) => sys::send_fd(stream, &socket),
        None => Ok(()),
    }
}

fn take(ticket: &str, number: &str) -> io::Result<OwnedFd> {
    let number: u32 = number.parse().map_err(io::Error::other)?;
    let stream = UnixStream::connect_addr(&meeting(ticket)?)?;
    if !sys::is_own(&stream) {
        return Err(io::Error::other("another user's listener"));
    }
    stream.set_read_timeout(Some(CONNECT_LIMIT))?;
    (&stream).write_all(&number.to_be_bytes())?;
    let (_, mut fds) = sys::receive_fds(&stream)?;
    fds.pop().ok_or_else(|| io::Error::other("the connection was not kept"))
}

fn connect(host: &str, port: &str) -> io::Result<OwnedFd> {
    let port: u16 = port.parse().map_err(io::Error::other)?;
    let until = Instant::now() + CONNECT_LIMIT;
    let mut failed = io::Error::other("the name has no address");
    for address in (host, port).to_socket_addrs()? {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        match connect_to(&address, left) {
            Ok(stream) => return Ok(stream.into()),
            Err(error) => failed = error,
        }
    }
    Err(failed)
}

fn connect_to(address: &SocketAddr, limit: Duration) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(address, limit)?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Says whether there is a connection, and carries it to its end.
fn carry(connected: io::Result<OwnedFd>) -> i32 {
    // The end of standard output alone must be the end of all output.
    sys::end_errors();
    let (mut input, mut output) = (File::from(sys::inherited(0)), File::from(sys::inherited(1)));
    let socket = match connected {
        Ok(socket) => File::from(socket),
        Err(error) => {
            let _ = output.write_all(format!("-{}\n", one_line(&error)).as_bytes());
            return 1;
        }
    };
    let Ok(mut to_socket) = socket.try_clone() else { return 1 };
    if output.write_all(b"+").is_err() {
        return 1;
    }
    let sending = std::thread::Builder::new().stack_size(128 << 10).spawn(move || {
        let _ = copy(&mut input, &mut to_socket);
        sys::end_sending(&to_socket);
    });
    let Ok(sending) = sending else { return 1 };
    let mut from_socket = socket;
    let _ = copy(&mut from_socket, &mut output);
    // Its end is what the host sees; the other half may go on.
    drop(output);
    let _ = sending.join();
    0
}

fn copy(from: &mut File, to: &mut File) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => to.write_all(&buffer[..count])?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
