//! One connection is one process: its request, its end; closing it kills it.

use std::{
    ffi::CString,
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::OwnedFd,
        unix::{fs::fchown, net::UnixStream, process::CommandExt},
    },
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    time::{Duration, Instant},
};

use crate::{Registry, sys, terminal, users};

/// The largest request: command, environment.
const REQUEST_BYTES_MAX: usize = 2 << 20;
/// The most modes that a terminal is given.
const MODES_MAX: usize = 128;
/// The largest message about a running process.
const MESSAGE_BYTES_MAX: usize = 64;
/// Where images keep the sftp server.
const SFTP_SERVERS: [&str; 4] = [
    "/usr/lib/openssh/sftp-server",
    "/usr/libexec/openssh/sftp-server",
    "/usr/lib/ssh/sftp-server",
    "/usr/libexec/sftp-server",
];
const SEARCH_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Serves a connection.
pub(crate) fn serve(stream: UnixStream, registry: &Arc<Registry>, supervisor: bool) {
    let mut answers = &stream;
    if let Err(error) = attempt(&stream, registry, supervisor) {
        let mut frame = vec![b'E'];
        frame.extend(error.to_string().bytes().take(1000));
        let _ = write_frame(&mut answers, &frame);
    }
}

fn attempt(stream: &UnixStream, registry: &Arc<Registry>, supervisor: bool) -> io::Result<()> {
    let (kind, fds) = sys::receive_fds(stream)?;
    let frame = sys::read_frame(&mut &*stream, REQUEST_BYTES_MAX)?;
    match kind {
        b'X' => execute(stream, registry, supervisor, &frame, fds),
        b'A' => {
            let mut input = Input(&frame);
            let name = input.text()?;
            let mut asked = Asked::read(&mut input, supervisor)?;
            let directories = asked.directories()?;
            sys::on_spawn(&mut asked.command, asked.user.map(|user| user.identity), false, directories);
            registry.services.start(name, &mut asked.command, registry)?;
            write_frame(&mut &*stream, b"S")
        }
        b'L' => {
            let mut input = Input(&frame);
            let (generation, limit) = (input.u64()?, input.u32()?);
            let answer = registry.services.list(generation, Duration::from_millis(limit.into()));
            write_frame(&mut &*stream, &answer)
        }
        b'O' => {
            let mut input = Input(&frame);
            let (name, offset) = (input.text()?, input.u64()?);
            write_frame(&mut &*stream, &registry.services.output(&name, offset))
        }
        b'K' => {
            let mut input = Input(&frame);
            let (name, grace) = (input.text()?, input.u32()?);
            registry.services.stop(&name, Duration::from_millis(grace.into()), registry);
            write_frame(&mut &*stream, b"K")
        }
        b'T' => {
            let grace = Input(&frame).u32()?;
            end_all(registry, supervisor, Some(Duration::from_millis(grace.into())));
            write_frame(&mut &*stream, b"T")?;
            std::process::exit(0)
        }
        b'P' => write_frame(&mut &*stream, b"P"),
        _ => Err(io::Error::other("unknown request")),
    }
}

/// A process that the host asks for.
struct Asked {
    command: Command,
    user: Option<users::User>,
    home: String,
    pty: bool,
    cols: u16,
    rows: u16,
    modes: Vec<(u8, u32)>,
}

impl Asked {
    fn read(input: &mut Input<'_>, supervisor: bool) -> io::Result<Self> {
        let pty = input.u8()? == 1;
        let (cols, rows) = (input.u16()?, input.u16()?);
        let user = input.text()?;
        let home = input.text()?;
        let kind = input.u8()?;
        let args = input.texts()?;
        let env = input.texts()?;
        let modes = input.modes()?;

        let user = if supervisor {
            // Nobody to become: everything runs as whoever started it.
            None
        } else {
            let found = users::find((!user.is_empty()).then_some(user.as_str()));
            Some(found.ok_or_else(|| io::Error::other(format!("no user {user:?} in the project")))?)
        };
        let home = user.as_ref().map_or(home, |user| user.home.clone());
        let shell = user.as_ref().map_or("/bin/bash", |user| user.shell.as_str());
        let shell = if std::path::Path::new(shell).exists() { shell } else { "/bin/sh" };

        let mut command = match kind {
            0 => {
                let mut command = Command::new(shell);
                let name = shell.rsplit('/').next().unwrap_or("sh");
                command.arg0(format!("-{name}"));
                command
            }
            1 => {
                let mut command = Command::new(shell);
                // Its name in its complaints, as sshd has it.
                command.arg0(shell.rsplit('/').next().unwrap_or("sh")).arg("-c").args(&args);
                command
            }
            2 => {
                let (program, args) = args.split_first().ok_or_else(|| io::Error::other("no program"))?;
                let mut command = Command::new(program);
                command.args(args);
                command
            }
            3 => match SFTP_SERVERS.iter().find(|server| std::path::Path::new(server).exists()) {
                Some(server) => Command::new(server),
                None => myself(&["tool".into(), "sftp".into()]),
            },
            4 => myself(&args),
            _ => return Err(io::Error::other("unknown command")),
        };
        command.env_clear().env("PATH", SEARCH_PATH).env("HOME", &home).env("SHELL", shell);
        if let Some(user) = &user {
            command.env("USER", &user.name).env("LOGNAME", &user.name);
        }
        command.env("LANG", "C.UTF-8");
        for pair in &env {
            if let Some((name, value)) = pair.split_once('=') {
                command.env(name, value);
            }
        }
        Ok(Self { command, user, home, pty, cols, rows, modes })
    }

    /// Where it may begin.
    fn directories(&self) -> io::Result<Vec<CString>> {
        Ok(vec![CString::new(self.home.clone()).map_err(io::Error::other)?, c"/".into()])
    }
}

fn execute(
    stream: &UnixStream,
    registry: &Arc<Registry>,
    supervisor: bool,
    frame: &[u8],
    fds: Vec<OwnedFd>,
) -> io::Result<()> {
    let asked = Asked::read(&mut Input(frame), supervisor)?;
    let directories = asked.directories()?;
    let Asked { mut command, user, home: _, pty, cols, rows, modes } = asked;

    let mut fds = fds.into_iter();
    let mut next = || fds.next().ok_or_else(|| io::Error::other("a descriptor is missing"));
    let terminal = if pty {
        let (master, slave) = sys::open_pty()?;
        sys::set_size(&master, cols, rows);
        terminal::set_modes(&slave, &modes);
        if let Some(user) = &user {
            let _ = fchown(&slave, Some(user.identity.uid), None);
        }
        command.stdin(slave.try_clone()?).stdout(slave.try_clone()?).stderr(slave);
        Some((master, File::from(next()?), File::from(next()?)))
    } else {
        command.stdin(Stdio::from(next()?)).stdout(Stdio::from(next()?)).stderr(Stdio::from(next()?));
        None
    };
    sys::on_spawn(&mut command, user.map(|user| user.identity), pty, directories);

    let (sender, ended) = mpsc::sync_channel(1);
    let pid = {
        let mut waiting = registry.lock();
        if registry.ending() {
            return Err(io::Error::other("the project is stopping"));
        }
        let pid = command.spawn()?.id().cast_signed();
        waiting.insert(pid, sender);
        pid
    };
    // Its descriptors must not stay open here: readers wait for their end.
    drop(command);
    write_frame(&mut &*stream, b"S")?;

    let over = Arc::new(AtomicBool::new(false));
    let (master, relays) = match terminal {
        Some((master, from_host, to_host)) => {
            let shared = master.try_clone()?;
            (Some(shared), Some(relay(master, from_host, to_host, over.clone())?))
        }
        None => (None, None),
    };
    let control = stream.try_clone()?;
    let steering = {
        let registry = registry.clone();
        std::thread::Builder::new()
            .stack_size(64 << 10)
            .spawn(move || steer(control, pid, master.as_ref(), &registry))
    };
    if steering.is_err() {
        // Without a thread that notices the host's leaving it could not be
        // killed; so it must not go on.
        signal(registry, pid, sys::SIGKILL);
    }
    let status = ended.recv().map_err(io::Error::other)?;
    over.store(true, Ordering::Release);
    if let Some(output) = relays {
        // What the terminal still shows goes out before the end is told.
        let _ = output.recv_timeout(Duration::from_secs(2));
    }
    let end = match status & 0x7f {
        0 => [b'X', 0, u8::try_from(status >> 8 & 0xff).unwrap_or(255)],
        signal => [b'X', 1, u8::try_from(signal).unwrap_or(0)],
    };
    let told = write_frame(&mut &*stream, &end);
    let _ = stream.shutdown(std::net::Shutdown::Both);
    told
}

/// This program, as one of its tools.
fn myself(args: &[String]) -> Command {
    // Found by the child itself: where it is seen may have changed.
    let mut command = Command::new("/proc/self/exe");
    command.args(args);
    command
}

/// Does what the host says about a running process; kills it when the host
/// closes the connection.
fn steer(mut control: UnixStream, pid: i32, master: Option<&File>, registry: &Registry) {
    while let Ok(frame) = sys::read_frame(&mut control, MESSAGE_BYTES_MAX) {
        match (frame.as_slice(), master) {
            (&[b'R', a, b, c, d], Some(master)) => {
                sys::set_size(master, u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
            }
            (&[b'G', number], _) => signal(registry, pid, number.into()),
            _ => {}
        }
    }
    signal(registry, pid, sys::SIGHUP);
    signal(registry, pid, sys::SIGKILL);
}

/// Signals the process group of `pid`, unless it was reaped already.
pub(crate) fn signal(registry: &Registry, pid: i32, signal: i32) {
    let waiting = registry.lock();
    if waiting.contains_key(&pid) && !sys::send_signal(-pid, signal) {
        sys::send_signal(pid, signal);
    }
}

/// Copies between a terminal and the host's pipes. The channel closes when
/// everything shown was passed on.
fn relay(
    master: File,
    mut from_host: File,
    mut to_host: File,
    over: Arc<AtomicBool>,
) -> io::Result<mpsc::Receiver<()>> {
    let (done, finished) = mpsc::sync_channel(1);
    let mut keyboard = master.try_clone()?;
    let typing_over = over.clone();
    std::thread::Builder::new().stack_size(64 << 10).spawn(move || {
        let mut buffer = [0; 4096];
        while !typing_over.load(Ordering::Acquire) {
            if !sys::readable(&from_host, 500) {
                continue;
            }
            match from_host.read(&mut buffer) {
                Ok(count @ 1..) if keyboard.write_all(&buffer[..count]).is_ok() => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(_) | Err(_) => {
                    // The end of typing, as a terminal knows it.
                    let _ = keyboard.write_all(&[4]);
                    break;
                }
            }
        }
    })?;
    let mut screen = master;
    std::thread::Builder::new().stack_size(96 << 10).spawn(move || {
        let mut buffer = vec![0; 16 << 10];
        let mut drained = false;
        while !drained {
            let ended = over.load(Ordering::Acquire);
            if !sys::readable(&screen, if ended { 20 } else { 200 }) {
                // Background processes may hold the terminal for ever.
                drained = ended;
                continue;
            }
            match screen.read(&mut buffer) {
                Ok(count @ 1..) if to_host.write_all(&buffer[..count]).is_ok() => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // No process has it open any more, or the host stopped reading.
                Ok(_) | Err(_) => drained = true,
            }
        }
        drop(to_host);
        let _ = done.try_send(());
    })?;
    Ok(finished)
}

/// Asks every process to end and waits until none is left; kills them after
/// `grace`, if one is given.
pub(crate) fn end_all(registry: &Registry, supervisor: bool, grace: Option<Duration>) {
    let begun = Instant::now();
    let (never, pause) = mpsc::sync_channel::<()>(0);
    let mut asked = false;
    loop {
        let left = if supervisor { descendants() } else { others() };
        if left.is_empty() {
            drop(never);
            return;
        }
        let kill = grace.is_some_and(|grace| begun.elapsed() >= grace);
        // Not between the fork and the registration of a child.
        let waiting = registry.lock();
        for pid in left {
            if kill {
                sys::send_signal(pid, sys::SIGKILL);
            } else if !asked {
                // Interactive shells ignore TERM, and heed HUP.
                sys::send_signal(pid, sys::SIGTERM);
                sys::send_signal(pid, sys::SIGHUP);
            }
        }
        drop(waiting);
        asked = true;
        if pause.recv_timeout(Duration::from_millis(10)) != Err(RecvTimeoutError::Timeout) {
            return;
        }
    }
}

/// Every other process of this PID namespace.
fn others() -> Vec<i32> {
    processes().into_iter().map(|(pid, _)| pid).filter(|pid| *pid != 1).collect()
}

/// Every process below this one. It is their subreaper, so none gets away.
fn descendants() -> Vec<i32> {
    let all = processes();
    let mut found = vec![std::process::id().cast_signed()];
    let mut next = 0;
    while let Some(parent) = found.get(next).copied() {
        found.extend(all.iter().filter(|(_, of)| *of == parent).map(|(pid, _)| *pid));
        next += 1;
    }
    found.remove(0);
    found
}

/// All processes that are not zombies, with their parents.
fn processes() -> Vec<(i32, i32)> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    entries
        .filter_map(|entry| {
            let pid = entry.ok()?.file_name().to_str()?.parse().ok()?;
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            let mut fields = stat.rsplit_once(") ")?.1.split(' ');
            let (state, parent) = (fields.next()?, fields.next()?.parse().ok()?);
            (state != "Z").then_some((pid, parent))
        })
        .collect()
}

fn write_frame(stream: &mut impl Write, body: &[u8]) -> io::Result<()> {
    let mut frame = u32::try_from(body.len()).map_err(io::Error::other)?.to_be_bytes().to_vec();
    frame.extend_from_slice(body);
    stream.write_all(&frame)
}

/// Reads the fields of a request.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn bytes<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk().ok_or(io::ErrorKind::UnexpectedEof)?;
        self.0 = rest;
        Ok(*head)
    }

    fn u8(&mut self) -> io::Result<u8> {
        self.bytes().map(u8::from_be_bytes)
    }

    fn u16(&mut self) -> io::Result<u16> {
        self.bytes().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> io::Result<u32> {
        self.bytes().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> io::Result<u64> {
        self.bytes().map(u64::from_be_bytes)
    }

    fn text(&mut self) -> io::Result<String> {
        let length = self.u32()? as usize;
        let (head, rest) = self.0.split_at_checked(length).ok_or(io::ErrorKind::UnexpectedEof)?;
        self.0 = rest;
        String::from_utf8(head.to_vec()).map_err(io::Error::other)
    }

    /// A terminal's modes. A host of before has none to say.
    fn modes(&mut self) -> io::Result<Vec<(u8, u32)>> {
        if self.0.is_empty() {
            return Ok(Vec::new());
        }
        let count = self.u32()? as usize;
        if count > MODES_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
        (0..count).map(|_| Ok((self.u8()?, self.u32()?))).collect()
    }

    fn texts(&mut self) -> io::Result<Vec<String>> {
        (0..self.u32()?).map(|_| self.text()).collect()
    }
}
