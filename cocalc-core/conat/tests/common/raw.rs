//! A client that sends what it is told to, frame by frame.

use futures_util::{SinkExt, StreamExt};
use tokio::net::TcpStream;
use tokio_tungstenite::{
    WebSocketStream, client_async,
    tungstenite::{Message, client::IntoClientRequest},
};

use super::{LIMIT, Server};

pub(crate) type Raw = WebSocketStream<TcpStream>;

pub(crate) async fn raw(server: &Server) -> Raw {
    let stream = TcpStream::connect(server.address).await.unwrap();
    let url = format!("ws://{}/conat/?EIO=4&transport=websocket", server.address);
    client_async(url, stream).await.unwrap().0
}

/// With a token in the upgrade request.
pub(crate) async fn with_bearer(server: &Server, token: &str) -> Raw {
    let stream = TcpStream::connect(server.address).await.unwrap();
    let url = format!("ws://{}/conat/?EIO=4&transport=websocket", server.address);
    let mut request = url.into_client_request().unwrap();
    request.headers_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    client_async(request, stream).await.unwrap().0
}

/// The next text frame that begins with `prefix`; pings are not of interest.
pub(crate) async fn expect(ws: &mut Raw, prefix: &str) -> String {
    loop {
        let message = tokio::time::timeout(LIMIT, ws.next()).await.expect("in time");
        match message {
            Some(Ok(Message::Text(text))) if text.starts_with(prefix) => return text.to_string(),
            Some(Ok(Message::Text(_) | Message::Binary(_))) => {}
            other => panic!("{other:?} instead of {prefix}"),
        }
    }
}

pub(crate) async fn signed_in(server: &Server, name: &str) -> Raw {
    let mut ws = raw(server).await;
    expect(&mut ws, "0{").await;
    ws.send(Message::text(format!(r#"40{{"bearer":"{name}"}}"#))).await.unwrap();
    expect(&mut ws, "40{").await;
    let info = expect(&mut ws, "42").await;
    assert!(info.starts_with("420[\"info\""), "{info}");
    ws.send(Message::text("430[]")).await.unwrap();
    ws
}
