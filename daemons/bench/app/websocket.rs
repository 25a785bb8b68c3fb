//! Just enough of RFC 6455 for an echo.

use std::{
    io::{Read, Write},
    net::TcpStream,
};

/// The answer to a request for a WebSocket, if this is one.
pub(crate) fn answer(head: &[u8]) -> Option<String> {
    let head = std::str::from_utf8(head).ok()?;
    let key = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("sec-websocket-key").then(|| value.trim())
    })?;
    let accept = base64(&sha1(format!("{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11").as_bytes()));
    Some(format!(
        "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\n\
         sec-websocket-accept: {accept}\r\n\r\n"
    ))
}

/// Sends back what comes, until the other side closes.
pub(crate) fn echo(mut stream: TcpStream, mut pending: Vec<u8>) -> Option<()> {
    let mut buffer = [0; 4096];
    loop {
        let (length, mut frame) = loop {
            if let Some(found) = frame(&pending) {
                break found;
            }
            let count = stream.read(&mut buffer).ok().filter(|&count| count > 0)?;
            pending.extend_from_slice(&buffer[..count]);
        };
        pending.drain(..length);
        if pending.is_empty() {
            // A waiting connection keeps nothing.
            pending = Vec::new();
        }
        let closing = frame[0] & 0x0f == 8;
        if frame[0] & 0x0f == 9 {
            frame[0] = frame[0] & 0xf0 | 10;
        }
        stream.write_all(&frame).ok()?;
        if closing {
            return None;
        }
    }
}

/// The first frame of a client, if it is complete: its length, and the answer.
fn frame(bytes: &[u8]) -> Option<(usize, Vec<u8>)> {
    let second = *bytes.get(1)? & 0x7f;
    let (header, length) = match second {
        126 => (4, u16::from_be_bytes(bytes.get(2..4)?.try_into().ok()?) as usize),
        127 => (10, u64::from_be_bytes(bytes.get(2..10)?.try_into().ok()?) as usize),
        short => (2, short as usize),
    };
    let mask: [u8; 4] = bytes.get(header..header + 4)?.try_into().ok()?;
    let end = (header + 4).checked_add(length)?;
    let payload = bytes.get(header + 4..end)?;
    let mut answer = bytes.get(..header)?.to_vec();
    answer[1] = second;
    answer.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    Some((end, answer))
}

/// FIPS 180-4; the accept key of a handshake is all it is for.
fn sha1(message: &[u8]) -> [u8; 20] {
    let mut state: [u32; 5] = [0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476, 0xc3d2e1f0];
    let mut padded = message.to_vec();
    padded.push(0x80);
    padded.resize((padded.len() + 8).next_multiple_of(64), 0);
    let at = padded.len() - 8;
    padded[at..].copy_from_slice(&(message.len() as u64 * 8).to_be_bytes());
    for block in padded.chunks_exact(64) {
        let mut words = [0u32; 80];
        for (word, four) in words.iter_mut().zip(block.chunks_exact(4)) {
            *word = u32::from_be_bytes([four[0], four[1], four[2], four[3]]);
        }
        for at in 16..80 {
            words[at] = (words[at - 3] ^ words[at - 8] ^ words[at - 14] ^ words[at - 16]).rotate_left(1);
        }
        let [mut a, mut b, mut c, mut d, mut e] = state;
        for (at, word) in words.iter().enumerate() {
            let (mixed, constant) = match at / 20 {
                0 => (b & c | !b & d, 0x5a827999),
                1 => (b ^ c ^ d, 0x6ed9eba1),
                2 => (b & c | b & d | c & d, 0x8f1bbcdc),
                _ => (b ^ c ^ d, 0xca62c1d6),
            };
            let next = a
                .rotate_left(5)
                .wrapping_add(mixed)
                .wrapping_add(e)
                .wrapping_add(constant)
                .wrapping_add(*word);
            (e, d, c, b, a) = (d, c, b.rotate_left(30), a, next);
        }
        for (sum, part) in state.iter_mut().zip([a, b, c, d, e]) {
            *sum = sum.wrapping_add(part);
        }
    }
    let mut digest = [0; 20];
    for (four, word) in digest.chunks_exact_mut(4).zip(state) {
        four.copy_from_slice(&word.to_be_bytes());
    }
    digest
}

/// Of twenty bytes, so with one sign of padding.
fn base64(bytes: &[u8; 20]) -> String {
    const SIGNS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for three in bytes.chunks(3) {
        let number = three.iter().fold(0u32, |number, byte| number << 8 | u32::from(*byte));
        let number = number << (8 * (3 - three.len()));
        for sign in 0..=three.len() {
            text.push(SIGNS[(number >> (18 - 6 * sign)) as usize & 63] as char);
        }
    }
    text + "="
}
