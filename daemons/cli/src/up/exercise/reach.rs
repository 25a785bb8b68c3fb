//! How the exercise reaches the project: as a browser, a program and an SSH
//! user would.

use std::{
    io::Write,
    net::TcpStream,
    path::Path,
    process::{Command, Output, Stdio},
    time::Duration,
};

use serde_json::{Value, json};
use tungstenite::{Message, WebSocket, client::IntoClientRequest};

use crate::{
    api::Api,
    failure::{Exit, Failure, While},
    up::{Up, string},
};

/// The port that the app in the project listens on.
pub(super) const APP_PORT: u16 = 8000;
/// How long one request or command may take.
const LIMIT: Duration = Duration::from_secs(30);

/// The way into the project.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Way {
    Direct,
    Proxy,
}

impl Way {
    pub(super) const BOTH: [Self; 2] = [Self::Direct, Self::Proxy];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Proxy => "proxy",
        }
    }
}

/// What `connect` answers: a token and where to use it.
#[derive(Clone, Debug)]
pub(super) struct Connect(Value);

impl Connect {
    /// Asks for a token for the project.
    pub(super) fn new(up: &Up, project: &str, options: &Value) -> Result<Self, Failure> {
        up.user.post(&format!("/projects/{project}/connect"), options).map(Self)
    }

    /// A token for everything, for five minutes.
    pub(super) fn long(up: &Up) -> Result<Self, Failure> {
        Self::with(&up.user, &up.federation.project.id)
    }

    /// As [`long`](Self::long), asked for with this API.
    pub(super) fn with(api: &Api, project: &str) -> Result<Self, Failure> {
        api.post(&format!("/projects/{project}/connect"), &json!({ "ttl_secs": 300 })).map(Self)
    }

    pub(super) fn token(&self) -> Result<String, Failure> {
        string(&self.0, "token")
    }

    /// The address of `path` at the app, in the path form, which needs no
    /// name service.
    pub(super) fn url(&self, way: Way, path: &str) -> Result<String, Failure> {
        Ok(format!("{}port/{APP_PORT}/{path}", string(&self.0[way.name()], "path_url")?))
    }

    /// User, host and port of the SSH server.
    pub(super) fn ssh(&self, way: Way) -> Result<(String, String), Failure> {
        let text = string(&self.0[way.name()], "ssh")?;
        let (user, port) =
            text.rsplit_once(':').ok_or_else(|| Failure::failed(format!("not user@host:port: {text}")))?;
        Ok((user.to_owned(), port.to_owned()))
    }
}

/// An answer to a request.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) headers: ureq::http::HeaderMap,
    pub(super) body: String,
}

impl Answer {
    /// The body as JSON; null if it is not.
    pub(super) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or(Value::Null)
    }

    /// A header's text; empty if it is missing.
    pub(super) fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }
}

/// A client that follows no redirect and keeps no cookies.
pub(super) fn agent(limit: Duration) -> ureq::Agent {
    ureq::Agent::config_builder()
        .timeout_global(Some(limit))
        .http_status_as_error(false)
        .max_redirects(0)
        .proxy(None)
        .build()
        .into()
}

/// One GET request with these headers.
pub(super) fn get(url: &str, headers: &[(&str, &str)]) -> Result<Answer, Failure> {
    get_with(&agent(LIMIT), url, headers)
}

/// One GET request on a client's connections.
pub(super) fn get_with(agent: &ureq::Agent, url: &str, headers: &[(&str, &str)]) -> Result<Answer, Failure> {
    let mut request = agent.get(url);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let mut response = request
        .call()
        .map_err(|e| Failure::new(Exit::Unreachable, format!("{}: {e}", without_query(url))))?;
    let body = response
        .body_mut()
        .read_to_string()
        .map_err(|e| Failure::new(Exit::Unreachable, format!("{}: {e}", without_query(url))))?;
    Ok(Answer { status: response.status().as_u16(), headers: response.headers().clone(), body })
}

/// An address without what may hold a token.
fn without_query(url: &str) -> &str {
    url.split('?').next().unwrap_or(url)
}

/// Insists on a status.
pub(super) fn expect_status(answer: &Answer, status: u16) -> Result<(), Failure> {
    if answer.status == status {
        return Ok(());
    }
    Err(Failure::failed(format!("expected status {status}, got {}: {}", answer.status, answer.body.trim())))
}

/// Insists on a fact.
pub(super) fn ensure(fact: bool, otherwise: impl Into<String>) -> Result<(), Failure> {
    if fact { Ok(()) } else { Err(Failure::failed(otherwise)) }
}

/// An open WebSocket to the app's echo.
pub(super) struct Echo(WebSocket<TcpStream>);

impl Echo {
    /// Opens one, with a token.
    pub(super) fn open(url: &str, token: &str) -> Result<Self, Failure> {
        let url = url.replacen("http://", "ws://", 1);
        let mut request = url.as_str().into_client_request().during("cannot ask for a WebSocket")?;
        let bearer = format!("Bearer {token}");
        request.headers_mut().insert("authorization", bearer.parse().during("a token is no header value")?);
        let uri = request.uri();
        let address = (uri.host().unwrap_or("127.0.0.1").to_owned(), uri.port_u16().unwrap_or(80));
        let stream = TcpStream::connect(address).during("cannot connect")?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.set_write_timeout(Some(LIMIT))?;
        let (socket, _) = tungstenite::client(request, stream)
            .map_err(|e| Failure::new(Exit::Denied, format!("no WebSocket: {e}")))?;
        Ok(Self(socket))
    }

    /// Sends a text and insists on getting it back.
    pub(super) fn round(&mut self, text: &str) -> Result<(), Failure> {
        self.0.send(Message::text(text)).during("cannot send on the WebSocket")?;
        let back = self.0.read().during("cannot read from the WebSocket")?;
        ensure(back == Message::text(text), format!("the echo of {text:?} was {back:?}"))
    }

    /// Whether the other side has ended it, waiting up to `limit` for that.
    pub(super) fn ended(&mut self, limit: Duration) -> Result<bool, Failure> {
        self.0.get_ref().set_read_timeout(Some(limit))?;
        let ended = loop {
            match self.0.read() {
                Ok(Message::Close(_)) => break true,
                Ok(_) => {}
                Err(tungstenite::Error::Io(error))
                    if matches!(
                        error.kind(),
                        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
                    ) =>
                {
                    break false;
                }
                Err(_) => break true,
            }
        };
        Ok(ended)
    }
}

/// The system's OpenSSH client, set up for the project.
fn openssh(up: &Up, program: &str, key: &Path) -> Command {
    let mut command = Command::new(program);
    command
        .args(["-F", "/dev/null", "-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes"])
        .args(["-o", "StrictHostKeyChecking=yes", "-o", "ConnectTimeout=20", "-o", "LogLevel=ERROR"])
        .arg("-o")
        .arg(format!("UserKnownHostsFile={}", up.known_hosts.display()))
        .arg("-i")
        .arg(key)
        .stdin(Stdio::null());
    command
}

/// Runs a command line in the project by `ssh`.
pub(super) fn ssh(up: &Up, connect: &Connect, way: Way, line: &str) -> Result<String, Failure> {
    let output = ssh_output(up, connect, way, &up.key, line, b"")?;
    success(&format!("ssh {line:?}"), output)
}

/// Runs a command line in the project with something on its standard input.
pub(super) fn ssh_with_input(
    up: &Up,
    connect: &Connect,
    way: Way,
    line: &str,
    input: &[u8],
) -> Result<String, Failure> {
    let output = ssh_output(up, connect, way, &up.key, line, input)?;
    success(&format!("ssh {line:?}"), output)
}

/// Runs `ssh` with this key, and tells how it ended.
pub(super) fn ssh_output(
    up: &Up,
    connect: &Connect,
    way: Way,
    key: &Path,
    line: &str,
    input: &[u8],
) -> Result<Output, Failure> {
    let (user, port) = connect.ssh(way)?;
    let mut child = openssh(up, "ssh", key)
        .args(["-p", &port, &user, line])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .during("cannot run ssh (package openssh-client)")?;
    if let Some(mut stdin) = child.stdin.take() {
        // A command that does not read its input ends the pipe early.
        let _ = stdin.write_all(input);
    }
    child.wait_with_output().during("cannot wait for ssh")
}

/// Runs sftp commands.
pub(super) fn sftp(up: &Up, connect: &Connect, way: Way, batch: &str) -> Result<(), Failure> {
    let (user, port) = connect.ssh(way)?;
    let mut child = openssh(up, "sftp", &up.key)
        .args(["-P", &port, "-b", "-", &user])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .during("cannot run sftp (package openssh-client)")?;
    if let Some(mut stdin) = child.stdin.take() {
        // sftp may end early, which its status tells.
        let _ = stdin.write_all(batch.as_bytes());
    }
    success("sftp", child.wait_with_output().during("cannot wait for sftp")?).map(|_| ())
}

fn success(what: &str, output: Output) -> Result<String, Failure> {
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(Failure::failed(format!(
        "{what} ended with {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    )))
}
