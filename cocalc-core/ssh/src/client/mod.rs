//! A small SSH client, for programs that run commands in projects.
//!
//! It speaks to this crate's server with a connect token, a certificate or a key, and checks
//! the server's key against those that the master published.

mod process;
mod terminal;

use std::{fmt, path::PathBuf, sync::Arc, time::Duration};

use cocalc_core::{
    BoxError,
    auth::Secret,
    ids::ProjectId,
    runner::{Command, ExecRequest, Process, Pty},
};
use russh::{
    ChannelMsg, Disconnect, SshId,
    client::{Config, Handle, Handler, KeyboardInteractiveAuthResponse, connect_stream},
    keys::{Certificate, PrivateKey, PrivateKeyWithHashAlg, PublicKeyOrCertificate},
};
use tokio::{net::TcpStream, time::timeout};

pub use terminal::{attach, terminal_modes, terminal_size};

use crate::{HostKeyError, HostKeys, algorithms::preferred, host_keys::key_text};

/// How long reaching the server and logging in may take.
const CONNECT_MAX: Duration = Duration::from_secs(30);
/// How long opening a channel may take.
const OPEN_MAX: Duration = Duration::from_secs(30);

/// What proves who the user is.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Identity {
    /// A connect token.
    Token(Secret),
    /// A key that lives as long as this process, with its certificate.
    Certificate(ClientKey, String),
    /// A private key in this file, in OpenSSH's format, without a passphrase.
    KeyFile(PathBuf),
}

/// An Ed25519 key that lives as long as this process, in memory only.
#[derive(Clone)]
pub struct ClientKey(Arc<PrivateKey>);

impl ClientKey {
    /// Makes one.
    ///
    /// # Errors
    ///
    /// The system gives no randomness.
    pub fn generate() -> Result<Self, HostKeyError> {
        let mut keys = HostKeys::generate()?;
        keys.keys.pop().map(|key| Self(Arc::new(key))).ok_or(HostKeyError::NoRandomness)
    }

    /// The public key, `algorithm base64`.
    pub fn public(&self) -> String {
        key_text(self.0.public_key()).unwrap_or_default()
    }
}

impl fmt::Debug for ClientKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ClientKey").field(&self.public()).finish()
    }
}

/// What the server must prove.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum HostKeyCheck {
    /// That it has one of these keys, given as `algorithm base64`.
    Pinned(Vec<String>),
    /// Nothing. Only for a server on this very machine.
    Any,
}

/// A connection to the SSH server of a project. Dropping it ends it, and all
/// its processes.
pub struct Client {
    handle: Arc<Handle<Check>>,
    project: ProjectId,
    /// The connection that carries this one, if it goes through a proxy.
    _outer: Option<Handle<Check>>,
}

/// A proxy that passes a connection on to a project's host, and reads none of
/// it.
#[derive(Clone, Debug)]
pub struct Jump {
    /// The proxy, as `host:port`.
    pub address: String,
    /// What it must prove.
    pub host_keys: HostKeyCheck,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("project", &self.project).finish_non_exhaustive()
    }
}

impl Client {
    /// Connects to the server at `address` (`host:port`) and logs in to
    /// `project`.
    ///
    /// # Errors
    ///
    /// See [`ClientError`].
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes the connection.
    pub async fn connect(
        address: &str,
        project: ProjectId,
        identity: &Identity,
        host_keys: HostKeyCheck,
    ) -> Result<Self, ClientError> {
        let connecting = async {
            let mut handle = connect_stream(config(), dial(address).await?, Check(host_keys)).await?;
            log_in(&mut handle, project, identity).await?;
            Ok(Self { handle: Arc::new(handle), project, _outer: None })
        };
        in_time(address, connecting).await
    }

    /// Connects to `project`'s host through a proxy, end to end: `host_keys` are
    /// the host's, and only it sees the identity.
    ///
    /// # Errors
    ///
    /// See [`ClientError`].
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes both connections.
    pub async fn connect_through(
        jump: &Jump,
        project: ProjectId,
        identity: &Identity,
        host_keys: HostKeyCheck,
    ) -> Result<Self, ClientError> {
        let connecting = async {
            let stream = dial(&jump.address).await?;
            let mut outer = connect_stream(config(), stream, Check(jump.host_keys.clone())).await?;
            if !outer.authenticate_none("jump").await?.success() {
                return Err(ClientError::Refused("the proxy passes nobody on".into()));
            }
            let channel = outer.channel_open_direct_tcpip(project.to_string(), 22, "127.0.0.1", 0).await?;
            let mut handle = connect_stream(config(), channel.into_stream(), Check(host_keys)).await?;
            log_in(&mut handle, project, identity).await?;
            Ok(Self { handle: Arc::new(handle), project, _outer: Some(outer) })
        };
        in_time(&jump.address, connecting).await
    }

    /// Starts a process in the project. `request.user` is not sent: it is the
    /// project's ordinary user.
    ///
    /// # Errors
    ///
    /// [`ClientError::NotStarted`] if the server does not want to, or the
    /// connection has ended.
    pub async fn exec(&self, request: &ExecRequest) -> Result<Process, ClientError> {
        let opening = async {
            let mut channel = self.handle.channel_open_session().await?;
            for (name, value) in &request.env {
                channel.set_env(false, name.as_str(), value.as_str()).await?;
            }
            if let Some(pty) = &request.pty {
                let (cols, rows) = (u32::from(pty.size.cols), u32::from(pty.size.rows));
                let modes: Vec<_> = pty
                    .modes
                    .iter()
                    .filter_map(|(code, value)| Some((russh::Pty::from_u8(*code)?, *value)))
                    .filter(|(code, _)| *code != russh::Pty::TTY_OP_END)
                    .take(Pty::MODES_MAX)
                    .collect();
                channel.request_pty(false, &pty.term, cols, rows, 0, 0, &modes).await?;
            }
            match &request.command {
                Command::Shell => channel.request_shell(true).await?,
                Command::Line(line) => channel.exec(true, line.as_bytes()).await?,
                Command::Argv(argv) => channel.exec(true, quoted(argv)).await?,
                Command::Sftp => channel.request_subsystem(true, "sftp").await?,
                _ => return Err(ClientError::NotStarted("this client does not know such a command".into())),
            }
            loop {
                match channel.wait().await {
                    Some(ChannelMsg::Success) => return Ok(channel),
                    Some(ChannelMsg::Failure) => {
                        return Err(ClientError::NotStarted("the server refused the command".into()));
                    }
                    Some(_) => {}
                    None => return Err(ClientError::NotStarted("the connection has ended".into())),
                }
            }
        };
        let channel = timeout(OPEN_MAX, opening)
            .await
            .map_err(|_| ClientError::NotStarted("the server does not answer".into()))??;
        Ok(process::process(channel, self.handle.clone(), self.project, request.pty.is_some()))
    }

    /// Says goodbye.
    pub async fn close(self) {
        let farewell = self.handle.disconnect(Disconnect::ByApplication, "", "");
        let _ = timeout(Duration::from_secs(1), farewell).await;
    }
}

fn config() -> Arc<Config> {
    Arc::new(Config {
        client_id: SshId::Standard("SSH-2.0-CoCalc".into()),
        preferred: preferred(),
        keepalive_interval: Some(Duration::from_secs(30)),
        keepalive_max: 3,
        nodelay: true,
        ..Config::default()
    })
}

async fn dial(address: &str) -> Result<TcpStream, ClientError> {
    let stream = TcpStream::connect(address)
        .await
        .map_err(|error| ClientError::Unreachable { address: address.to_owned(), source: error.into() })?;
    let _ = stream.set_nodelay(true);
    Ok(stream)
}

async fn in_time(
    address: &str,
    connecting: impl Future<Output = Result<Client, ClientError>>,
) -> Result<Client, ClientError> {
    timeout(CONNECT_MAX, connecting).await.unwrap_or_else(|_| {
        Err(ClientError::Unreachable {
            address: address.to_owned(),
            source: format!("no answer within {} s", CONNECT_MAX.as_secs()).into(),
        })
    })
}

async fn log_in(
    handle: &mut Handle<Check>,
    project: ProjectId,
    identity: &Identity,
) -> Result<(), ClientError> {
    let user = project.to_string();
    let result = match identity {
        Identity::Token(token) => handle.authenticate_password(user.as_str(), token.expose()).await?,
        Identity::Certificate(key, text) => {
            let certificate = Certificate::from_openssh(text)
                .map_err(|_| ClientError::Certificate("it cannot be read".into()))?;
            handle.authenticate_openssh_cert(user.as_str(), key.0.clone(), certificate).await?
        }
        Identity::KeyFile(path) => {
            let failed = |source: BoxError| ClientError::Key { path: path.clone(), source };
            let text = tokio::fs::read(path).await.map_err(|error| failed(error.into()))?;
            let key = PrivateKey::from_openssh(&text).map_err(|error| failed(error.into()))?;
            if key.is_encrypted() {
                return Err(failed("it has a passphrase".into()));
            }
            let key = PrivateKeyWithHashAlg::new(Arc::new(key), None);
            handle.authenticate_publickey(user.as_str(), key).await?
        }
    };
    if result.success() {
        return Ok(());
    }
    // The server says why where it may.
    let reason = match handle.authenticate_keyboard_interactive_start(user.as_str(), None).await {
        Ok(KeyboardInteractiveAuthResponse::InfoRequest { instructions, .. }) if !instructions.is_empty() => {
            instructions
        }
        _ => "access denied".to_owned(),
    };
    Err(ClientError::Refused(reason))
}

/// A line for a shell, of which these are the words.
fn quoted(argv: &[String]) -> String {
    argv.iter().map(|word| format!("'{}'", word.replace('\'', "'\\''"))).collect::<Vec<_>>().join(" ")
}

struct Check(HostKeyCheck);

impl Handler for Check {
    type Error = ClientError;

    async fn check_server_key(&mut self, key: &PublicKeyOrCertificate) -> Result<bool, ClientError> {
        let PublicKeyOrCertificate::PublicKey { key, .. } = key else { return Err(ClientError::HostKey) };
        match &self.0 {
            HostKeyCheck::Any => Ok(true),
            HostKeyCheck::Pinned(keys) => {
                let text = key_text(key);
                if keys.iter().any(|known| Some(known) == text.as_ref()) {
                    Ok(true)
                } else {
                    Err(ClientError::HostKey)
                }
            }
        }
    }
}

/// Why there is no connection or process.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// Nobody answers there.
    #[error("cannot reach the SSH server at {address}")]
    Unreachable {
        /// `host:port`.
        address: String,
        /// Why.
        source: BoxError,
    },
    /// Whoever answers has another key than was published.
    #[error("the SSH server has another key than the one that was published; somebody may be in between")]
    HostKey,
    /// The private key cannot be used.
    #[error("cannot use the SSH key {}", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// Why.
        source: BoxError,
    },
    /// The certificate cannot be used.
    #[error("cannot use the SSH certificate")]
    Certificate(#[source] BoxError),
    /// The login was refused; the server's words.
    #[error("{0}")]
    Refused(String),
    /// The command was not started.
    #[error("the command was not started: {0}")]
    NotStarted(String),
    /// The connection broke.
    #[error("the SSH connection broke")]
    Broken(#[source] BoxError),
}

impl From<russh::Error> for ClientError {
    fn from(error: russh::Error) -> Self {
        Self::Broken(error.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_a_shell() {
        let argv = ["printf", "%s|", "a b", "it's", "$HOME", "", "\\"].map(String::from);
        let output = std::process::Command::new("sh").arg("-c").arg(quoted(&argv)).output().unwrap();
        assert_eq!(output.stdout, b"a b|it's|$HOME||\\|");
    }
}
