//! Where clients go, as aliases of a configuration of OpenSSH's client.

use std::{
    fmt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use super::peer::Sshd;
use crate::{Result, federation::Federation};

/// A server, and the way there.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Place {
    /// The ingress of the project's host.
    Host,
    /// An sshd in a container of the same image.
    Sshd,
    /// The project's host, by a proxy that terminates.
    Proxy,
    /// The same, by a proxy that passes the connection on.
    EndToEnd,
    /// The sshd, by another one (`ssh -J`).
    Jump,
}

impl Place {
    /// In the order of their numbers.
    pub(super) const ALL: [Self; 5] = [Self::Host, Self::Sshd, Self::Proxy, Self::EndToEnd, Self::Jump];

    /// The name in the configuration.
    pub(super) fn alias(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Proxy => "proxy",
            Self::EndToEnd => "end-to-end",
            Self::Sshd => "sshd",
            Self::Jump => "jump",
        }
    }

    /// Whose memory is looked at.
    pub(super) fn keeper(self) -> &'static str {
        match self {
            Self::Host => "host and helper",
            Self::Proxy => "the proxy",
            Self::EndToEnd => "the proxy (end to end)",
            Self::Sshd => "sshd",
            Self::Jump => "the sshd that is jumped over",
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Host => "host",
            Self::Proxy => "proxy",
            Self::EndToEnd => "proxy end to end",
            Self::Sshd => "sshd",
            Self::Jump => "ssh -J",
        })
    }
}

/// The configuration, and a place for files.
#[derive(Debug)]
pub(super) struct Places {
    pub(super) dir: PathBuf,
    pub(super) config: PathBuf,
    /// In memory: a disk that takes thousands of small files would be what is
    /// measured. It goes with the value.
    pub(super) memory: tempfile::TempDir,
}

impl Places {
    pub(super) fn new(federation: &Federation, sshd: &Sshd) -> Result<Self> {
        let dir = sshd.dir.clone();
        let config = dir.join("config");
        let connect = federation.connect(federation.project())?;
        let (user, host) = connect.ssh.0.split_once('@').ok_or("an SSH address without a user")?;
        let (proxy, proxy_port) = connect.proxy_ssh.rsplit_once(':').ok_or("a proxy without a port")?;
        let proxy = proxy.rsplit('@').next().unwrap_or_default();
        let (port, own, jump) = (&connect.ssh.1, sshd.port, sshd.jump_port);
        let key = federation.key();
        let known_hosts = federation.dir.join("data/known_hosts");
        let text = format!(
            "Host *\n BatchMode yes\n IdentitiesOnly yes\n IdentityFile {key}\n StrictHostKeyChecking yes\n \
             UserKnownHostsFile {known} {peers}\n GlobalKnownHostsFile /dev/null\n ConnectTimeout 60\n \
             Compression no\n ServerAliveInterval 60\n  LogLevel ERROR\n UpdateHostKeys no\n\
             Host host\n HostName {host}\n Port {port}\n User {user}\n\
             Host proxy\n HostName {proxy}\n Port {proxy_port}\n User {user}\n\
             Host passage\n HostName {proxy}\n Port {proxy_port}\n User jump\n\
             Host end-to-end\n HostName {user}\n HostKeyAlias [{host}]:{port}\n User {user}\n ProxyJump passage\n\
             Host sshd\n HostName 127.0.0.1\n Port {own}\n User root\n\
             Host between\n HostName 127.0.0.1\n Port {jump}\n User root\n\
             Host jump\n HostName 127.0.0.1\n Port {own}\n User root\n ProxyJump between\n",
            key = key.display(),
            known = known_hosts.display(),
            peers = sshd.known_hosts.display(),
        );
        std::fs::write(&config, text)?;
        // Named after the bench, whose script looks for it when this was killed.
        let name = federation.dir.file_name().unwrap_or_default().to_string_lossy();
        let memory = tempfile::Builder::new().prefix(&format!("{name}-")).tempdir_in("/dev/shm")?;
        Ok(Self { dir, config, memory })
    }

    /// A program of OpenSSH with the configuration.
    pub(super) fn program(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.arg("-F").arg(&self.config).stdin(Stdio::null());
        command
    }

    /// A client that runs a line.
    pub(super) fn line(&self, place: Place, line: &str) -> Command {
        let mut ssh = self.program("ssh");
        ssh.args([place.alias(), line]);
        ssh
    }

    /// A file of the bench.
    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The file that goes through.
    pub(super) fn blob(&self) -> PathBuf {
        self.file("blob")
    }

    /// The small files that go through.
    pub(super) fn tree(&self) -> PathBuf {
        self.file("tree")
    }
}

/// Files below a directory are many; removing them is not what is measured.
pub(super) fn clear(dir: &Path) -> Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::Place;

    #[test]
    fn places_are_listed_by_their_numbers() {
        assert!(Place::ALL.iter().enumerate().all(|(number, place)| *place as usize == number));
    }
}
