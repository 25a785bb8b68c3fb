//! Programs with an end: each is killed when its time is over.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    process::{Child, Command, Output, Stdio},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

use crate::Result;

/// How often something that is awaited is looked at.
const PAUSE: Duration = Duration::from_millis(2);

/// Runs a program to its end and returns what it printed.
pub(crate) fn run(command: &mut Command, limit: Duration) -> Result<Output> {
    let name = command.get_program().to_string_lossy().into_owned();
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("cannot run {name}: {error}"))?;
    finish(&name, child, limit)
}

/// Waits for a program that was started, whose output is piped or discarded.
pub(crate) fn finish(name: &str, child: Child, limit: Duration) -> Result<Output> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let (sender, receiver) = mpsc::channel();
    let waiting = std::thread::spawn(move || {
        // The receiver waits for it, or has killed the child.
        let _ = sender.send(child.wait_with_output());
    });
    let output = match receiver.recv_timeout(limit) {
        Ok(output) => output?,
        Err(_) => {
            if let Some(pid) = pid {
                // It has not been waited for, so the id is still its own.
                let _ = kill_process(pid, Signal::KILL);
            }
            return Err(format!("{name} took longer than {limit:?}").into());
        }
    };
    waiting.join().map_err(|_| "a thread failed")?;
    if output.status.success() {
        return Ok(output);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("{name} ended with {}: {}", output.status, said.trim()).into())
}

/// As [`run`], for its standard output as text.
pub(crate) fn text(command: &mut Command, limit: Duration) -> Result<String> {
    Ok(String::from_utf8_lossy(&run(command, limit)?.stdout).into_owned())
}

/// How long a program takes.
pub(crate) fn time(command: &mut Command, limit: Duration) -> Result<Duration> {
    let begun = Instant::now();
    run(command, limit)?;
    Ok(begun.elapsed())
}

/// A program that ends with this process, however that ends.
pub(crate) fn attached(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "TERM", "--", program]).stdin(Stdio::null());
    command
}

/// A server of ours in the background, which ends with the value.
#[derive(Debug)]
pub(crate) struct Server(Child);

impl Server {
    /// Starts it; its errors go to ours.
    pub(crate) fn start(mut command: Command) -> Result<Self> {
        let name = format!("{command:?}");
        command.stdout(Stdio::null());
        Ok(Self(command.spawn().map_err(|error| format!("cannot run {name}: {error}"))?))
    }

    /// Its process.
    pub(crate) fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        end(&mut self.0, Duration::from_secs(5));
    }
}

/// Asks a child to end, and kills it if it doesn't.
pub(crate) fn end(child: &mut Child, limit: Duration) {
    if let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        // It may have ended by itself.
        let _ = kill_process(pid, Signal::TERM);
    }
    let deadline = Instant::now() + limit;
    while matches!(child.try_wait(), Ok(None)) {
        if Instant::now() >= deadline {
            let _ = child.kill();
            let _ = child.wait();
        }
        std::thread::sleep(PAUSE);
    }
}

/// Asks until something is there.
pub(crate) fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut look: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if Instant::now() >= deadline {
            return Err(format!("waited {limit:?} for {what}").into());
        }
        std::thread::sleep(PAUSE);
    }
}

/// Waits for the first byte of a good answer to `GET path`, trying all the
/// time, each try on a new connection.
pub(crate) fn first_byte(
    address: SocketAddr,
    path: &str,
    token: Option<&str>,
    limit: Duration,
) -> Result<()> {
    let authorization = token.map(|token| format!("authorization: Bearer {token}\r\n")).unwrap_or_default();
    let request =
        format!("GET {path} HTTP/1.1\r\nhost: {address}\r\n{authorization}connection: close\r\n\r\n");
    let mut last = String::new();
    wait_for("the first byte of the app", limit, || {
        Ok(match answer(address, request.as_bytes()) {
            Ok(head) if head.starts_with("HTTP/1.1 200") => Some(()),
            Ok(head) => {
                last = head;
                None
            }
            Err(error) => {
                last = error.to_string();
                None
            }
        })
    })
    .map_err(|error| format!("{error}; the last answer: {last}").into())
}

/// The beginning of the answer to a request.
fn answer(address: SocketAddr, request: &[u8]) -> std::io::Result<String> {
    let limit = Duration::from_secs(5);
    let mut stream = TcpStream::connect_timeout(&address, limit)?;
    stream.set_read_timeout(Some(limit))?;
    stream.write_all(request)?;
    let mut head = [0; 512];
    let count = stream.read(&mut head)?;
    Ok(String::from_utf8_lossy(&head[..count]).into_owned())
}

/// Does something for each, so many at a time; the answers in their order, or the
/// first failure, after which nothing more is begun.
pub(crate) fn each<T: Sync, R: Send>(
    at_once: usize,
    items: &[T],
    work: impl Fn(&T) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let next = AtomicUsize::new(0);
    let done = Mutex::new((Vec::new(), None));
    std::thread::scope(|scope| {
        for _ in 0..at_once.min(items.len()) {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some(item) = items.get(at) else { return };
                    let answer = work(item).map_err(|error| error.to_string());
                    let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
                    match answer {
                        Ok(answer) => done.0.push((at, answer)),
                        Err(error) => {
                            done.1.get_or_insert(error);
                            next.store(items.len(), Ordering::Relaxed);
                        }
                    }
                }
            });
        }
    });
    let (mut answers, failure) = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    if let Some(failure) = failure {
        return Err(failure.into());
    }
    answers.sort_by_key(|(at, _)| *at);
    Ok(answers.into_iter().map(|(_, answer)| answer).collect())
}
