//! The app that is measured: answers every HTTP/1.1 request with the same few
//! bytes, a thread per connection, so that what stands before it is what shows.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
};

const ANSWER: &[u8] =
    b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 13\r\n\r\nhello, world\n";

/// To an authority's question: yes, without a body, as nginx likes it best.
const ALLOWED: &[u8] = b"HTTP/1.1 204 No Content\r\n\r\n";

fn main() -> std::io::Result<()> {
    let port = std::env::args().nth(1).and_then(|port| port.parse().ok()).unwrap_or(8000u16);
    for stream in TcpListener::bind(("0.0.0.0", port))?.incoming().flatten() {
        std::thread::spawn(move || serve(stream));
    }
    Ok(())
}

/// Requests have no bodies here, so each ends with an empty line.
fn serve(mut stream: TcpStream) -> Option<()> {
    stream.set_nodelay(true).ok()?;
    let mut buffer = [0; 16384];
    let mut filled = 0;
    loop {
        let count = stream.read(buffer.get_mut(filled..)?).ok().filter(|&count| count > 0)?;
        filled += count;
        while let Some(end) = buffer[..filled].windows(4).position(|four| four == b"\r\n\r\n") {
            let asked = buffer.starts_with(b"GET /auth ");
            stream.write_all(if asked { ALLOWED } else { ANSWER }).ok()?;
            buffer.copy_within(end + 4..filled, 0);
            filled -= end + 4;
        }
    }
}
