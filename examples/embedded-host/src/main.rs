//! A server of one's own, with pages of its own, that also serves projects.

mod accounts;
mod apps;

use std::{collections::BTreeMap, convert::Infallible, error::Error, net::SocketAddr, sync::Arc};

use accounts::Accounts;
use apps::{LocalApps, OneMachine};
use cocalc_core::{
    auth::Secret,
    ids::{HostId, ProjectId},
};
use cocalc_http::{Body, Client, HostIngress};
use hyper::{Request, Response, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::broadcast,
    task::JoinSet,
};

type BoxError = Box<dyn Error + Send + Sync>;

/// The port by which users name the project's app.
const APP_PORT: u16 = 8888;

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    // The project's app: any program that listens on this machine.
    let app = TcpListener::bind("127.0.0.1:0").await?;
    let app_address = app.local_addr()?;
    let app = tokio::spawn(serve(app, hello));

    let (project, host) = (ProjectId::random(), HostId::random());
    let secret = ProjectId::random().to_string();
    let accounts = Arc::new(Accounts::new(project, Secret::new(&*secret)));
    let runner = LocalApps { ports: BTreeMap::from([(project, BTreeMap::from([(APP_PORT, app_address)]))]) };
    let router = OneMachine { host, changes: broadcast::Sender::new(1) };
    let ingress = HostIngress::builder(host, accounts.clone(), Arc::new(router), Arc::new(runner)).build();

    // The server is ours; so are its listener, its timeouts and its pages.
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let projects = ingress.clone();
    let server = tokio::spawn(serve(listener, move |request, peer: SocketAddr| {
        let projects = projects.clone();
        async move {
            if request.uri().path() == "/" {
                return Response::new(Body::from("The server's own page.\n"));
            }
            projects.handle(request, Client { address: Some(peer.ip()), trusted: false }).await
        }
    }));

    let url = format!("/{project}/proxy/{APP_PORT}/");
    println!("own page   http://{address}/");
    println!("project    http://{address}{url}?cocalc_token={secret}");
    if std::env::args().any(|argument| argument == "--once") {
        let bearer = format!("Authorization: Bearer {secret}\r\n");
        expect("own page", &ask(address, "/", "").await?, "The server's own page.")?;
        expect("no token", &ask(address, &url, "").await?, "unauthenticated")?;
        expect("with token", &ask(address, &url, &bearer).await?, "Hello from the project, at /")?;
        accounts.revoke();
        expect("revoked", &ask(address, &url, &bearer).await?, "access_denied")?;
    } else {
        tokio::signal::ctrl_c().await?;
    }
    ingress.shut_down().await;
    server.abort();
    app.abort();
    Ok(())
}

/// A hyper server such as anybody has. `with_upgrades` lets WebSockets pass.
async fn serve<H, F>(listener: TcpListener, handler: H) -> Result<(), BoxError>
where
    H: Fn(Request<Incoming>, SocketAddr) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Response<Body>> + Send + 'static,
{
    let mut connections = JoinSet::new();
    loop {
        let (stream, peer) = listener.accept().await?;
        while connections.try_join_next().is_some() {}
        let handler = handler.clone();
        let service = service_fn(move |request| {
            let answer = handler(request, peer);
            async move { Ok::<_, Infallible>(answer.await) }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades();
        connections.spawn(async move {
            if let Err(error) = connection.await {
                eprintln!("a connection ended: {error}");
            }
        });
    }
}

async fn hello(request: Request<Incoming>, _: SocketAddr) -> Response<Body> {
    Response::new(Body::from(format!("Hello from the project, at {}\n", request.uri())))
}

async fn ask(address: SocketAddr, path: &str, fields: &str) -> Result<String, BoxError> {
    let mut stream = TcpStream::connect(address).await?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n{fields}\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}

fn expect(what: &str, answer: &str, expected: &str) -> Result<(), BoxError> {
    println!("{what:10} {}", answer.lines().next().unwrap_or_default());
    if answer.contains(expected) { Ok(()) } else { Err(format!("{what}: {answer}").into()) }
}
