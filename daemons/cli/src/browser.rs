//! Showing who one is in a browser, which hands a code to this program (RFC
//! 8252).
//!
//! The program listens on 127.0.0.1. The code that arrives there is good once,
//! for two minutes, and only with a secret that has not left this process: who
//! reads the address of the browser can do nothing with it.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::{
    api::{Api, encoded},
    args::BrowserOptions,
    failure::{Exit, Failure, While},
    output::items,
};

/// How long one connection may take to say what it wants.
const REQUEST_LIMIT: Duration = Duration::from_secs(10);
/// How large a request's head may be.
const HEAD_BYTES_MAX: usize = 16 * 1024;
/// How many connections are read at the same time: browsers open some that
/// they do not use.
const CONNECTIONS_MAX: usize = 32;

/// What the browser brought.
#[derive(Debug, Eq, PartialEq)]
enum Brought {
    Code(String),
    /// The master's word for why not, and the reason for people.
    Error(String, String),
}

/// Lets somebody show who they are with `provider`: the code and the secret with
/// which the master believes it.
pub(crate) fn show_who(
    url: &str,
    api: &Api,
    provider: &str,
    link: bool,
    options: &BrowserOptions,
) -> Result<Value, Failure> {
    let known = api.get("/login/oidc")?;
    let names: Vec<&str> = items(&known, "providers")
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|p| p["name"].as_str())
        .collect();
    if !names.contains(&provider) {
        let have = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
        return Err(Failure::new(
            Exit::NotFound,
            format!("{url} has no provider {provider:?}; it has: {have}"),
        ));
    }
    let listener = TcpListener::bind(("127.0.0.1", 0)).during("cannot listen on 127.0.0.1")?;
    let port = listener.local_addr().during("cannot listen on 127.0.0.1")?.port();
    let (verifier, state) = (random()?, random()?);
    let hash = Sha256::digest(verifier.as_bytes());
    let challenge = URL_SAFE_NO_PAD.encode(hash);
    let address = format!(
        "{}/auth/oidc/{}/start?port={port}&challenge={challenge}&state={state}{}",
        url.trim_end_matches('/'),
        encoded(provider),
        if link { "&link=true" } else { "" }
    );
    eprintln!("Open this address in a browser on this machine:\n\n{address}\n");
    eprintln!("It will ask whether to go on with the code {}.\n", shown_code(&hash));
    if !options.no_browser {
        open(&address);
    }
    match wait(&listener, &state, Duration::from_secs(options.browser_timeout))? {
        Brought::Code(code) => Ok(json!({ "code": code, "verifier": verifier })),
        Brought::Error(code, detail) => {
            let exit = if code.ends_with("unavailable") { Exit::Unreachable } else { Exit::Denied };
            Err(Failure::new(exit, format!("{detail} ({code})")))
        }
    }
}

/// What the browser shows, too, as the master makes it: of the first eight bytes
/// of the challenge a letter each.
fn shown_code(challenge: &[u8]) -> String {
    const LETTERS: &[u8; 32] = b"ABCDEFGHJKLMNPQRSTUVWXYZ23456789";
    let letter = |byte: &u8| LETTERS.get(usize::from(byte & 31)).copied().map_or('?', char::from);
    let (first, second) = (challenge.iter().take(4), challenge.iter().skip(4).take(4));
    first.map(letter).chain(['-']).chain(second.map(letter)).collect()
}

fn random() -> Result<String, Failure> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).map_err(|e| Failure::failed(format!("no randomness: {e}")))?;
    Ok(URL_SAFE_NO_PAD.encode(bytes))
}

/// Asks the desktop for a browser. Whether there is one is not known: the
/// address was printed.
fn open(address: &str) {
    let program = if cfg!(target_os = "macos") { "open" } else { "xdg-open" };
    let mut command = Command::new(program);
    command.arg(address).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    // Waited for, so that it leaves nothing behind; by nobody who is in a hurry.
    std::thread::spawn(move || {
        let _ = command.status();
    });
}

/// Waits until a browser comes with this state.
fn wait(listener: &TcpListener, state: &str, limit: Duration) -> Result<Brought, Failure> {
    listener.set_nonblocking(true).during("cannot listen on 127.0.0.1")?;
    let deadline = Instant::now() + limit;
    let (sender, receiver) = mpsc::channel();
    let open = Arc::new(AtomicUsize::new(0));
    loop {
        if let Ok(brought) = receiver.try_recv() {
            return Ok(brought);
        }
        match listener.accept() {
            // One too many is closed.
            Ok((stream, _)) if open.load(Ordering::Relaxed) < CONNECTIONS_MAX => {
                open.fetch_add(1, Ordering::Relaxed);
                let (sender, open, state) = (sender.clone(), open.clone(), state.to_owned());
                std::thread::spawn(move || {
                    if let Some(brought) = serve(stream, &state) {
                        // Who waited may be gone.
                        let _ = sender.send(brought);
                    }
                    open.fetch_sub(1, Ordering::Relaxed);
                });
                continue;
            }
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(Failure::failed(format!("cannot listen on 127.0.0.1: {error}"))),
        }
        if Instant::now() >= deadline {
            return Err(Failure::new(
                Exit::TimedOut,
                format!("nobody has logged in within {} s", limit.as_secs()),
            ));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Answers one request; what it brought if it is the one.
fn serve(mut stream: TcpStream, state: &str) -> Option<Brought> {
    stream.set_nonblocking(false).ok()?;
    stream.set_read_timeout(Some(REQUEST_LIMIT)).ok()?;
    stream.set_write_timeout(Some(REQUEST_LIMIT)).ok()?;
    let deadline = Instant::now() + REQUEST_LIMIT;
    let mut head = Vec::new();
    let mut part = [0; 4096];
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        let count = stream.read(&mut part).ok()?;
        if count == 0 || head.len() + count > HEAD_BYTES_MAX || Instant::now() >= deadline {
            return None;
        }
        head.extend_from_slice(part.get(..count)?);
    }
    let brought = std::str::from_utf8(&head).ok().and_then(|head| parse(head, state));
    let (status, text) = match &brought {
        Some(Brought::Code(_)) => ("200 OK", "You can close this window, and go back to the terminal."),
        Some(Brought::Error(..)) => ("403 Forbidden", "That did not work; the terminal says why."),
        None => ("404 Not Found", "There is nothing here."),
    };
    let _ = write!(
        stream,
        "HTTP/1.1 {status}\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: {}\r\n\
         cache-control: no-store\r\nreferrer-policy: no-referrer\r\nconnection: close\r\n\r\n{text}",
        text.len()
    );
    brought
}

/// What a request brings, if it comes with this state. A page that a browser
/// shows can send anything here, but does not know the state.
fn parse(head: &str, state: &str) -> Option<Brought> {
    let target = head.strip_prefix("GET ")?.split(' ').next()?;
    let query = target.strip_prefix("/?")?;
    let value = |wanted: &str| {
        let mut found = query.split('&').filter_map(|pair| pair.split_once('='));
        found.find(|(key, _)| *key == wanted).and_then(|(_, value)| decoded(value))
    };
    if value("state")? != state {
        return None;
    }
    match (value("code"), value("error")) {
        (Some(code), None) => Some(Brought::Code(code)),
        (None, Some(code)) => Some(Brought::Error(code, value("detail").unwrap_or_default())),
        _ => None,
    }
}

/// Undoes percent-encoding. Control characters do not reach the terminal.
fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digit = |byte: u8| char::from(byte).to_digit(16);
        let (high, low) = (digit(rest.next()?)?, digit(rest.next()?)?);
        bytes.push(u8::try_from(high * 16 + low).ok()?);
    }
    let text = String::from_utf8(bytes).ok()?;
    Some(text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_browser_that_was_sent_is_believed() {
        let parse = |target: &str| parse(&format!("GET {target} HTTP/1.1\r\nhost: x\r\n\r\n"), "s1");
        assert_eq!(parse("/?state=s1&code=abc"), Some(Brought::Code("abc".into())));
        let error = Brought::Error("access_denied".into(), "not \u{fffd}you".into());
        assert_eq!(parse("/?state=s1&error=access_denied&detail=not%20%1byou"), Some(error));
        for bad in [
            "/?state=s2&code=abc",
            "/?code=abc",
            "/?state=s1",
            "/?state=s1&code=a&error=b",
            "/favicon.ico",
            "/?state=s%&code=abc",
            "/?state=s1&code=%ff",
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_code_is_the_one_that_the_master_shows() {
        // The master's tests (`real_oidc`) expect the same of this secret.
        assert_eq!(shown_code(&Sha256::digest(b"verifier")), "JKLG-QVAU");
    }

    #[test]
    fn idle_connections_do_not_hold_it_up() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let _idle: Vec<_> = (0..3).map(|_| TcpStream::connect(address).unwrap()).collect();
        let browser = std::thread::spawn(move || {
            for target in ["/favicon.ico", "/?state=s2&code=theirs", "/?state=s1&code=ours"] {
                let mut stream = TcpStream::connect(address).unwrap();
                write!(stream, "GET {target} HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
                let mut answer = String::new();
                stream.read_to_string(&mut answer).unwrap();
                let expected = if target.ends_with("ours") { "HTTP/1.1 200" } else { "HTTP/1.1 404" };
                assert!(answer.starts_with(expected), "{target}: {answer}");
            }
        });
        let brought = wait(&listener, "s1", Duration::from_secs(60)).unwrap();
        assert_eq!(brought, Brought::Code("ours".into()));
        browser.join().unwrap();
        let late = wait(&listener, "s1", Duration::ZERO).unwrap_err();
        assert_eq!(late.exit, Exit::TimedOut);
    }
}
