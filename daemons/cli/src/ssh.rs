//! `project exec` and `project ssh`: a small SSH client with a key that lives
//! as long as it does and a certificate of the master for it, so that nobody
//! needs a key of their own.

use cocalc_core::runner::{Command, ExecRequest, Exit as Ended, Pty};
use cocalc_ssh::client::{Client, HostKeyCheck, Identity, Jump, attach, terminal_modes, terminal_size};

use crate::failure::{Exit, Failure, While};

/// Runs a command line, or a shell, at `address` (`user@host:port`), through
/// `jump` instead if there is one, joined to this process's standard streams; returns its exit status.
pub(crate) fn run(
    address: &str,
    identity: &Identity,
    keys: &[String],
    jump: Option<Jump>,
    line: Option<String>,
) -> Result<u8, Failure> {
    let (user, server) =
        address.split_once('@').ok_or_else(|| Failure::failed(format!("not user@host:port: {address}")))?;
    let project = user.parse().during("the master's answer")?;
    if keys.is_empty() {
        return Err(Failure::new(Exit::Denied, "the master publishes no SSH host key for that server"));
    }
    // A command gets a terminal only as ssh does: when none was named.
    let pty = match line {
        None => terminal_size().map(|size| Pty {
            modes: terminal_modes(),
            ..Pty::new(std::env::var("TERM").unwrap_or_else(|_| "xterm".to_owned()), size)
        }),
        Some(_) => None,
    };
    let terminal = pty.is_some();
    let request =
        ExecRequest { command: line.map_or(Command::Shell, Command::Line), pty, ..ExecRequest::default() };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let ended = runtime.block_on(async {
        let check = HostKeyCheck::Pinned(keys.to_vec());
        let connected = match &jump {
            Some(jump) => Client::connect_through(jump, project, identity, check).await,
            None => Client::connect(server, project, identity, check).await,
        };
        let client = connected.during("cannot log in")?;
        let process = client.exec(&request).await.during("cannot run it")?;
        let ended = attach(process, terminal).await.during("the connection was lost")?;
        client.close().await;
        Ok::<_, Failure>(ended)
    });
    // A reader of standard input may still wait for a key that nobody presses.
    runtime.shutdown_background();
    match ended? {
        Ended::Code(code) => Ok(code),
        Ended::Signal(name) => {
            eprintln!("cocalc: ended by signal {name}");
            Ok(signal_status(&name))
        }
    }
}

/// 128 plus the signal's number, as shells have it.
fn signal_status(name: &str) -> u8 {
    let number = match name {
        "HUP" => 1,
        "INT" => 2,
        "QUIT" => 3,
        "ILL" => 4,
        "ABRT" => 6,
        "FPE" => 8,
        "KILL" => 9,
        "SEGV" => 11,
        "PIPE" => 13,
        "ALRM" => 14,
        "TERM" => 15,
        // ssh's own answer where it has none.
        _ => return 255,
    };
    128 + number
}
