//! The app that is measured: answers every HTTP/1.1 request with a few bytes, or
//! with 1 KiB or 1 MiB where the path ends so, and echoes WebSocket messages; a
//! thread per connection, so that what stands before it is what shows.

mod websocket;

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
};

const ANSWER: &[u8] =
    b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 13\r\n\r\nhello, world\n";

/// To an authority's question: yes, without a body, as nginx likes it best.
const ALLOWED: &[u8] = b"HTTP/1.1 204 No Content\r\n\r\n";

/// Thousands of threads that wait need no more.
const STACK: usize = 64 << 10;

fn main() -> std::io::Result<()> {
    let port = std::env::args().nth(1).and_then(|port| port.parse().ok()).unwrap_or(8000u16);
    let answers = |bytes: usize| -> &'static [u8] {
        let head = format!("HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: {bytes}\r\n\r\n");
        [head.into_bytes(), vec![b'x'; bytes]].concat().leak()
    };
    let answers = Answers { kib: answers(1 << 10), mib: answers(1 << 20) };
    for stream in TcpListener::bind(("0.0.0.0", port))?.incoming().flatten() {
        // Without a thread the connection is closed, and its client sees that.
        let _ = std::thread::Builder::new().stack_size(STACK).spawn(move || serve(stream, answers));
    }
    Ok(())
}

/// The large ones, with their heads.
#[derive(Clone, Copy)]
struct Answers {
    kib: &'static [u8],
    mib: &'static [u8],
}

/// Requests have no bodies here, so each ends with an empty line.
fn serve(mut stream: TcpStream, answers: Answers) -> Option<()> {
    stream.set_nodelay(true).ok()?;
    let mut buffer = vec![0; 8192];
    let mut filled = 0;
    loop {
        let count = stream.read(buffer.get_mut(filled..)?).ok().filter(|&count| count > 0)?;
        filled += count;
        while let Some(end) = buffer[..filled].windows(4).position(|four| four == b"\r\n\r\n") {
            let head = &buffer[..end + 4];
            if let Some(answer) = websocket::answer(head) {
                let rest = buffer[end + 4..filled].to_vec();
                drop(buffer);
                stream.write_all(answer.as_bytes()).ok()?;
                return websocket::echo(stream, rest);
            }
            let path = head.split(|byte| *byte == b' ').nth(1)?;
            let answer = match path {
                b"/auth" => ALLOWED,
                path if path.ends_with(b"/kib") => answers.kib,
                path if path.ends_with(b"/mib") => answers.mib,
                _ => ANSWER,
            };
            stream.write_all(answer).ok()?;
            buffer.copy_within(end + 4..filled, 0);
            filled -= end + 4;
        }
    }
}
