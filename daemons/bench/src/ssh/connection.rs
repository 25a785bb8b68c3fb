//! A client that keeps its connection for others (`ControlMaster`): what goes
//! through is measured without connecting and logging in.

use std::{
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use super::{
    LIMIT,
    places::{Place, Places},
};
use crate::{
    Result,
    tool::{end, run, wait_for},
};

/// It ends with the value.
#[derive(Debug)]
pub(super) struct Connection<'a> {
    pub(super) places: &'a Places,
    place: Place,
    socket: PathBuf,
    child: Child,
}

impl<'a> Connection<'a> {
    pub(super) fn open(places: &'a Places, place: Place) -> Result<Self> {
        Self::open_with(places, place, None)
    }

    /// With one cipher instead of what client and server agree on.
    pub(super) fn open_with(places: &'a Places, place: Place, cipher: Option<&str>) -> Result<Self> {
        let socket = places.file(&format!("mux-{}{}", place as usize, cipher.map_or("", |_| "-c")));
        let mut ssh = places.program("ssh");
        if let Some(cipher) = cipher {
            ssh.args(["-c", cipher]);
        }
        ssh.args(["-M", "-N", "-S"]).arg(&socket).arg(place.alias());
        let child = ssh.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let mut connection = Self { places, place, socket, child };
        wait_for("a connection to share", Duration::from_secs(60), || {
            if let Some(status) = connection.child.try_wait()? {
                return Err(format!("{place}: the client ended with {status}").into());
            }
            let mut check = connection.program("ssh");
            Ok(run(check.args(["-O", "check", place.alias()]), LIMIT).ok())
        })?;
        Ok(connection)
    }

    /// A program of OpenSSH that shares it.
    pub(super) fn program(&self, program: &str) -> Command {
        let mut command = self.places.program(program);
        command.arg("-o").arg(format!("ControlPath={}", self.socket.display()));
        command
    }

    /// A client that runs a line.
    pub(super) fn line(&self, line: &str) -> Command {
        let mut ssh = self.program("ssh");
        ssh.args([self.name(), line]);
        ssh
    }

    /// An rsync that shares it.
    pub(super) fn rsync(&self) -> Command {
        let (config, socket) = (self.places.config.display(), self.socket.display());
        let shell = format!("ssh -F {config} -o ControlPath={socket}");
        let mut rsync = Command::new("rsync");
        rsync.args(["--archive", "--rsh", &shell]).stdin(Stdio::null());
        rsync
    }

    /// The server, for these programs.
    pub(super) fn name(&self) -> &'static str {
        self.place.alias()
    }
}

impl Drop for Connection<'_> {
    fn drop(&mut self) {
        end(&mut self.child, Duration::from_secs(5));
        // It removes its socket itself, unless it was killed.
        let _ = std::fs::remove_file(&self.socket);
    }
}
