//! A proxy before a store that fails as clouds do, which emulators never do.

use std::{
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

/// What happens to a request.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Fault {
    /// It reaches the store.
    None,
    /// The store says 500.
    Broken,
    /// The store says 429, too many requests.
    Busy,
    /// It takes a while.
    Slow,
    /// The answer stops in the middle of its body.
    Truncated,
    /// The connection ends without an answer; the store may have acted.
    Reset,
    /// The credentials have run out.
    Expired,
    /// Nothing is ever answered.
    Silent,
    /// The store says that the credentials do not allow this.
    Forbidden,
    /// What is sent is taken, and not kept.
    Forgetful,
    /// What is answered has a bit changed in its body.
    Changed,
}

/// What is known of a request when its fate is decided.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    /// Counted from 0 since the plan began.
    pub(crate) number: usize,
    pub(crate) method: String,
    /// With what comes after `?`.
    pub(crate) path: String,
    /// The session token of S3.
    pub(crate) token: Option<String>,
    /// Whether it is to write only what is not there.
    pub(crate) only_new: bool,
}

/// What the store behind speaks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Store {
    S3,
    /// fake-gcs-server takes uploads in the JSON dialect, and in the XML dialect
    /// only if they look signed; then it neither looks at preconditions nor
    /// answers in XML. The proxy does what is missing.
    Gcs,
}

type Plan = Arc<Mutex<Box<dyn FnMut(&Request) -> Fault + Send>>>;

/// A running proxy. It takes no more connections when this is dropped.
pub(crate) struct Proxy {
    pub(crate) port: u16,
    plan: Plan,
    requests: Arc<AtomicUsize>,
    ended: Arc<AtomicBool>,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Release);
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

impl Proxy {
    /// Starts before the store at `upstream`. `plan` says what happens to each
    /// request.
    pub(crate) fn start(
        store: Store,
        upstream: u16,
        plan: impl FnMut(&Request) -> Fault + Send + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let plan: Plan = Arc::new(Mutex::new(Box::new(plan)));
        let (requests, ended) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let proxy = Self { port, plan: plan.clone(), requests: requests.clone(), ended: ended.clone() };
        thread::spawn(move || {
            for stream in listener.incoming() {
                if ended.load(Ordering::Acquire) {
                    break;
                }
                let (Ok(stream), plan, requests) = (stream, plan.clone(), requests.clone()) else { continue };
                // A client that goes away is not an error of the proxy.
                thread::spawn(move || serve(&stream, store, upstream, &plan, &requests).ok());
            }
        });
        proxy
    }

    /// Changes what happens from now on, and counts from 0 again.
    pub(crate) fn plan(&self, plan: impl FnMut(&Request) -> Fault + Send + 'static) {
        *self.plan.lock().unwrap() = Box::new(plan);
        self.requests.store(0, Ordering::Release);
    }

    /// Requests since the plan began.
    pub(crate) fn requests(&self) -> usize {
        self.requests.load(Ordering::Acquire)
    }

    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }
}

/// Serves one connection: one request, then it is closed.
fn serve(
    client: &TcpStream,
    kind: Store,
    upstream: u16,
    plan: &Plan,
    requests: &AtomicUsize,
) -> io::Result<()> {
    let mut reader = BufReader::new(client);
    let mut head = Vec::new();
    let mut length = 0;
    let (mut path, mut only_new) = (None, false);
    let mut request =
        Request { number: 0, method: String::new(), path: String::new(), token: None, only_new: false };
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let lower = line.to_ascii_lowercase();
        if let Some(value) = lower.strip_prefix("content-length:") {
            length = value.trim().parse().map_err(io::Error::other)?;
        }
        if line == "\r\n" {
            break;
        }
        if request.method.is_empty() {
            let mut words = line.split(' ').map(str::to_owned);
            request.method = words.next().unwrap_or_default();
            request.path = words.next().unwrap_or_default();
        } else if lower.starts_with("x-amz-security-token:") {
            request.token = line.split_once(':').map(|(_, token)| token.trim().to_owned());
        }
        request.only_new |=
            lower.trim_end() == "if-none-match: *" || lower.trim_end() == "x-goog-if-generation-match: 0";
        if kind == Store::Gcs {
            if let Some(wanted) = line.strip_prefix("PUT ") {
                let wanted = wanted.split(' ').next().unwrap_or_default().to_owned();
                line = format!("PUT {wanted}?X-Goog-Algorithm=none HTTP/1.1\r\n");
                path = Some(wanted);
            } else if lower.starts_with("host:") {
                line = format!("Host: 127.0.0.1:{upstream}\r\n");
            }
            only_new |= lower.trim_end() == "x-goog-if-generation-match: 0";
        }
        if !lower.starts_with("connection:") {
            head.extend_from_slice(line.as_bytes());
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;

    request.number = requests.fetch_add(1, Ordering::AcqRel);
    let fault = (plan.lock().unwrap())(&request);
    let mut client = client;
    let mut say = |status: &str, body: &str| {
        write!(
            client,
            "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        )
    };
    match fault {
        Fault::Broken => {
            return say("500 Internal Server Error", "<Error><Code>InternalError</Code></Error>");
        }
        Fault::Busy => return say("429 Too Many Requests", "<Error><Code>SlowDown</Code></Error>"),
        Fault::Expired => return say("400 Bad Request", "<Error><Code>ExpiredToken</Code></Error>"),
        Fault::Forbidden => return say("403 Forbidden", "<Error><Code>AccessDenied</Code></Error>"),
        Fault::Forgetful if request.method == "PUT" => {
            return write!(
                client,
                "HTTP/1.1 200 OK\r\nETag: \"1\"\r\nx-goog-generation: 1\r\nContent-Length: 0\r\n\
                 Connection: close\r\n\r\n"
            );
        }
        Fault::Silent => {
            // Until the client loses patience.
            let _ = reader.read(&mut [0]);
            return Ok(());
        }
        Fault::Slow => thread::sleep(Duration::from_millis(300)),
        Fault::None | Fault::Truncated | Fault::Reset | Fault::Forgetful | Fault::Changed => {}
    }
    if let Some(path) = path.as_ref().filter(|_| only_new) {
        let ask = format!("HEAD {path} HTTP/1.1\r\nHost: 127.0.0.1:{upstream}\r\nConnection: close\r\n\r\n");
        if answer(upstream, &[ask.as_bytes()])?.starts_with(b"HTTP/1.1 200") {
            return say("412 Precondition Failed", "");
        }
    }
    let mut answer = answer(upstream, &[&head, b"Connection: close\r\n\r\n", &body])?;
    if path.is_some() && answer.starts_with(b"HTTP/1.1 200") {
        answer = b"HTTP/1.1 200 OK\r\nETag: \"1\"\r\nx-goog-generation: 1\r\nContent-Length: 0\r\n\
            Connection: close\r\n\r\n"
            .to_vec();
    }
    match fault {
        Fault::Reset => client.shutdown(Shutdown::Both),
        Fault::Changed => {
            let body = body_of(&answer);
            if let Some(byte) = answer.get_mut(body) {
                *byte ^= 1;
            }
            client.write_all(&answer)
        }
        Fault::Truncated => {
            let head = body_of(&answer);
            client.write_all(&answer[..head + (answer.len() - head) / 2])
        }
        _ => client.write_all(&answer),
    }
}

/// Where the body of an answer begins.
fn body_of(answer: &[u8]) -> usize {
    answer.windows(4).position(|part| part == b"\r\n\r\n").map_or(answer.len(), |at| at + 4)
}

/// What the store answers, to the end.
fn answer(upstream: u16, parts: &[&[u8]]) -> io::Result<Vec<u8>> {
    let mut store = TcpStream::connect(("127.0.0.1", upstream))?;
    parts.iter().try_for_each(|part| store.write_all(part))?;
    let mut answer = Vec::new();
    store.read_to_end(&mut answer)?;
    Ok(answer)
}
