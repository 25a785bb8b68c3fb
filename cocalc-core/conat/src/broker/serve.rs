//! A listener that serves nothing but the bus.

use std::{io, sync::Arc, time::Duration};

use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

use super::{Shared, connection};
use crate::upgrade::{self, Refused, Upgrade};

/// The longest head of a request, in bytes.
const HEAD_BYTES_MAX: usize = 16 * 1024;

/// The most headers in it.
const HEADERS_MAX: usize = 64;

/// How long a head may take to arrive.
const HEAD_LIMIT: Duration = Duration::from_secs(10);

pub(super) async fn serve(shared: Arc<Shared>, listener: TcpListener) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    // Beyond, connections wait in the kernel until one ends.
                    let most = shared.config.connections_max + shared.config.signing_in_max;
                    while connections.len() >= most {
                        connections.join_next().await;
                    }
                    connections.spawn(one(shared.clone(), stream));
                }
                Err(error) => {
                    tracing::warn!(%error, "accepting a connection failed");
                    // Without file descriptors it would fail again at once.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn one(shared: Arc<Shared>, mut stream: TcpStream) {
    let _ = stream.set_nodelay(true);
    let head = tokio::time::timeout(HEAD_LIMIT, head(&shared, &mut stream)).await;
    match head {
        Ok(Ok((upgrade, rest))) => {
            let _ = connection::run(shared, stream, rest, upgrade.handshake).await;
        }
        Ok(Err(error)) => tracing::debug!(%error, "no upgrade"),
        Err(_) => tracing::debug!("no upgrade in time"),
    }
}

/// Reads the head of the request and answers it; what was read behind it is
/// returned too.
async fn head(shared: &Shared, stream: &mut TcpStream) -> io::Result<(Upgrade, Vec<u8>)> {
    let mut buffer = Vec::new();
    let (upgrade, length) = loop {
        if stream.read_buf(&mut buffer).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        match parse(&buffer, shared) {
            Parsed::Partial if buffer.len() < HEAD_BYTES_MAX => {}
            Parsed::Partial => {
                let status = StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE;
                return refuse(stream, Refused { status, body: "{}" }).await;
            }
            Parsed::Refused(refused) => return refuse(stream, refused).await,
            Parsed::Complete(upgrade, length) => break (upgrade, length),
        }
    };
    let upgrade = stream.peer_addr().map(|peer| upgrade.with_peer(peer))?;
    let mut answer = b"HTTP/1.1 101 Switching Protocols\r\n".to_vec();
    for (name, value) in upgrade.headers() {
        answer.extend_from_slice(name.as_str().as_bytes());
        answer.extend_from_slice(b": ");
        answer.extend_from_slice(value.as_bytes());
        answer.extend_from_slice(b"\r\n");
    }
    answer.extend_from_slice(b"\r\n");
    stream.write_all(&answer).await?;
    Ok((upgrade, buffer.split_off(length)))
}

enum Parsed {
    Partial,
    Complete(Upgrade, usize),
    Refused(Refused),
}

fn parse(buffer: &[u8], shared: &Shared) -> Parsed {
    let bad = Parsed::Refused(Refused { status: StatusCode::BAD_REQUEST, body: "{}" });
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut request = httparse::Request::new(&mut headers);
    let length = match request.parse(buffer) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Parsed::Partial,
        Err(_) => return bad,
    };
    let method = request.method.and_then(|method| method.parse::<Method>().ok());
    let uri = request.path.and_then(|path| path.parse::<Uri>().ok());
    let (Some(method), Some(uri)) = (method, uri) else { return bad };
    if !uri.path().ends_with("/conat/") && !uri.path().ends_with("/conat") {
        return Parsed::Refused(Refused { status: StatusCode::NOT_FOUND, body: "{}" });
    }
    let mut map = HeaderMap::new();
    for header in request.headers.iter() {
        let name = HeaderName::from_bytes(header.name.as_bytes());
        let value = HeaderValue::from_bytes(header.value);
        let (Ok(name), Ok(value)) = (name, value) else { return bad };
        map.append(name, value);
    }
    match upgrade::check(&method, &uri, &map, &shared.config.origins) {
        Ok(upgrade) => Parsed::Complete(upgrade, length),
        Err(refused) => Parsed::Refused(refused),
    }
}

async fn refuse<T>(stream: &mut TcpStream, refused: Refused) -> io::Result<T> {
    let Refused { status, body } = &refused;
    let answer = format!(
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(answer.as_bytes()).await?;
    stream.shutdown().await?;
    Err(io::Error::other(refused))
}
