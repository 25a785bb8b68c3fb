//! The user's own terminal, joined to a process elsewhere.

use std::io::{self, IsTerminal, Read};

use cocalc_core::runner::{Error, Exit, Process, WindowSize};
use rustix::termios::{
    InputModes, LocalModes, OptionalActions, OutputModes, SpecialCodeIndex, Termios, tcgetattr, tcgetwinsize,
    tcsetattr,
};
use tokio::{
    io::{AsyncReadExt, AsyncWrite, AsyncWriteExt},
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
};

/// The size of this process's terminal; `None` if standard input is none.
pub fn terminal_size() -> Option<WindowSize> {
    let input = io::stdin();
    if !input.is_terminal() {
        return None;
    }
    let size = tcgetwinsize(&input).ok()?;
    Some(WindowSize { cols: size.ws_col.max(1), rows: size.ws_row.max(1) })
}

/// The modes of this process's terminal, as SSH says them, so that a terminal
/// elsewhere gets the same: to be asked for before [`attach`] changes them. None if
/// standard input is no terminal.
pub fn terminal_modes() -> Vec<(u8, u32)> {
    let Ok(has) = tcgetattr(io::stdin()) else { return Vec::new() };
    modes(&has)
}

fn modes(has: &Termios) -> Vec<(u8, u32)> {
    use SpecialCodeIndex as Character;
    // As RFC 4254 numbers them, section 8.
    let characters = [
        (1, Character::VINTR),
        (2, Character::VQUIT),
        (3, Character::VERASE),
        (4, Character::VKILL),
        (5, Character::VEOF),
        (6, Character::VEOL),
        (7, Character::VEOL2),
        (8, Character::VSTART),
        (9, Character::VSTOP),
        (10, Character::VSUSP),
        (12, Character::VREPRINT),
        (13, Character::VWERASE),
        (14, Character::VLNEXT),
        (18, Character::VDISCARD),
    ];
    let input = [
        (30, InputModes::IGNPAR),
        (31, InputModes::PARMRK),
        (32, InputModes::INPCK),
        (33, InputModes::ISTRIP),
        (34, InputModes::INLCR),
        (35, InputModes::IGNCR),
        (36, InputModes::ICRNL),
        (38, InputModes::IXON),
        (39, InputModes::IXANY),
        (40, InputModes::IXOFF),
        (41, InputModes::IMAXBEL),
        (42, InputModes::IUTF8),
    ];
    let local = [
        (50, LocalModes::ISIG),
        (51, LocalModes::ICANON),
        (53, LocalModes::ECHO),
        (54, LocalModes::ECHOE),
        (55, LocalModes::ECHOK),
        (56, LocalModes::ECHONL),
        (57, LocalModes::NOFLSH),
        (58, LocalModes::TOSTOP),
        (59, LocalModes::IEXTEN),
        (60, LocalModes::ECHOCTL),
        (61, LocalModes::ECHOKE),
        (62, LocalModes::PENDIN),
    ];
    let output = [
        (70, OutputModes::OPOST),
        (72, OutputModes::ONLCR),
        (73, OutputModes::OCRNL),
        (74, OutputModes::ONOCR),
        (75, OutputModes::ONLRET),
    ];
    // A character that does nothing is 0 here, and 255 there.
    let character = |index| match has.special_codes[index] {
        0 => 255,
        character => u32::from(character),
    };
    let characters = characters.into_iter().map(|(code, index)| (code, character(index)));
    let input = input.into_iter().map(|(code, mode)| (code, has.input_modes.contains(mode)));
    let local = local.into_iter().map(|(code, mode)| (code, has.local_modes.contains(mode)));
    let output = output.into_iter().map(|(code, mode)| (code, has.output_modes.contains(mode)));
    let flags = input.chain(local).chain(output).map(|(code, on)| (code, u32::from(on)));
    let speeds = [(128, has.input_speed()), (129, has.output_speed())];
    characters.chain(flags).chain(speeds).collect()
}

/// Joins this process's standard streams to `process` until it ends, and
/// returns how it did. With `terminal`, which goes with a process that has a
/// PTY, every key is passed on and the size follows; the terminal is put back
/// afterwards.
///
/// # Errors
///
/// The process was lost, for instance with its connection.
///
/// # Cancel safety
///
/// Dropping the future kills the process and puts the terminal back. What was
/// typed and not yet passed on is lost.
pub async fn attach(process: Process, terminal: bool) -> Result<Exit, Error> {
    let Process { stdin, stdout, stderr, mut handle } = process;
    let _raw = terminal.then(Raw::enter).flatten();
    let mut resized: Option<Signal> = if terminal { signal(SignalKind::window_change()).ok() } else { None };
    let mut typed = typed();
    let feed = async {
        let mut stdin = stdin;
        while let Some(data) = typed.recv().await {
            if stdin.write_all(&data).await.is_err() || stdin.flush().await.is_err() {
                return;
            }
        }
        let _ = stdin.shutdown().await;
    };
    let show = async {
        let errors = async {
            if let Some(stderr) = stderr {
                copy(stderr, tokio::io::stderr()).await;
            }
        };
        tokio::join!(copy(stdout, tokio::io::stdout()), errors);
    };
    tokio::pin!(feed, show);
    let (mut fed, mut shown) = (false, false);
    let mut exit = None;
    loop {
        if shown && let Some(exit) = exit.take() {
            return exit;
        }
        tokio::select! {
            () = &mut feed, if !fed => fed = true,
            () = &mut show, if !shown => shown = true,
            ended = handle.wait(), if exit.is_none() => exit = Some(ended),
            () = next(&mut resized) => if let Some(size) = terminal_size() {
                let _ = handle.resize(size).await;
            },
        }
    }
}

async fn next(resized: &mut Option<Signal>) {
    let received = match resized {
        Some(signal) => signal.recv().await,
        None => None,
    };
    if received.is_none() {
        std::future::pending::<()>().await;
    }
}

/// What is written to this process. A thread reads it, which nobody waits for:
/// a read that blocks must not keep a finished program from ending.
fn typed() -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel(4);
    std::thread::spawn(move || {
        let mut input = io::stdin().lock();
        let mut buffer = vec![0; 32 * 1024];
        loop {
            match input.read(&mut buffer) {
                Ok(0) => return,
                Ok(length) if sender.blocking_send(buffer[..length].to_vec()).is_err() => return,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    });
    receiver
}

async fn copy(mut from: cocalc_core::stream::BoxRead, mut to: impl AsyncWrite + Unpin) {
    let mut buffer = vec![0; 32 * 1024];
    loop {
        match from.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(length) => {
                if to.write_all(&buffer[..length]).await.is_err() || to.flush().await.is_err() {
                    return;
                }
            }
        }
    }
}

/// A terminal that passes every key on; put back when dropped.
struct Raw(Termios);

impl Raw {
    fn enter() -> Option<Self> {
        let input = io::stdin();
        let before = tcgetattr(&input).ok()?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&input, OptionalActions::Flush, &raw).ok()?;
        Some(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // Nothing else can be done about a terminal that has gone.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.0);
    }
}
