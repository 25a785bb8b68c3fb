//! Sockets made inside projects' network namespaces.

use std::{
    fs::File,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, OwnedFd},
    path::Path,
    sync::mpsc,
    time::Duration,
};

use rustix::{
    net::{AddressFamily, SocketFlags, SocketType},
    thread::LinkNameSpaceType,
};
use tokio::{
    net::{TcpSocket, TcpStream},
    sync::oneshot,
};

/// How many sockets may be asked for at once.
const QUEUE: usize = 256;

/// A thread that visits network namespaces: a socket belongs to the namespace
/// in which it was made, wherever it is used afterwards. No other thread of the
/// process ever leaves the host's namespace.
#[derive(Clone, Debug)]
pub(crate) struct Sockets {
    requests: mpsc::SyncSender<Request>,
}

#[derive(Debug)]
struct Request {
    namespace: OwnedFd,
    family: AddressFamily,
    kind: SocketType,
    answer: oneshot::Sender<io::Result<OwnedFd>>,
}

impl Sockets {
    /// Starts the thread; it ends when the last clone is dropped.
    pub(crate) fn start() -> io::Result<Self> {
        let (requests, queue) = mpsc::sync_channel::<Request>(QUEUE);
        std::thread::Builder::new().name("netns-sockets".into()).spawn(move || {
            while let Ok(request) = queue.recv() {
                // A caller that gave up has dropped its end.
                let socket = socket_in(&request);
                let _ = request.answer.send(socket);
            }
        })?;
        Ok(Self { requests })
    }

    /// Connects to a port on the loopback addresses of the namespace held at
    /// `path`: IPv4 first, then IPv6. `ConnectionRefused` if nobody listens on
    /// either.
    pub(crate) async fn connect(&self, path: &Path, port: u16, limit: Duration) -> io::Result<TcpStream> {
        let namespace = File::open(path)?;
        let attempt = async {
            let first = self.connect_to(&namespace, Ipv4Addr::LOCALHOST.into(), port).await;
            match first {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    match self.connect_to(&namespace, Ipv6Addr::LOCALHOST.into(), port).await {
                        // Without IPv6 there, the first answer is the true one.
                        Err(_) => Err(error),
                        connected => connected,
                    }
                }
                other => other,
            }
        };
        tokio::time::timeout(limit, attempt).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }

    /// A datagram socket in the namespace held at `path`.
    pub(crate) async fn datagram(&self, path: &Path) -> io::Result<OwnedFd> {
        self.make(&File::open(path)?, AddressFamily::INET, SocketType::DGRAM).await
    }

    /// A stream socket in the namespace held at `path`.
    pub(crate) async fn stream(&self, path: &Path) -> io::Result<OwnedFd> {
        self.make(&File::open(path)?, AddressFamily::INET, SocketType::STREAM).await
    }

    async fn make(&self, namespace: &File, family: AddressFamily, kind: SocketType) -> io::Result<OwnedFd> {
        let (answer, made) = oneshot::channel();
        let request = Request { namespace: namespace.as_fd().try_clone_to_owned()?, family, kind, answer };
        self.requests.try_send(request).map_err(|_| io::Error::from(io::ErrorKind::WouldBlock))?;
        made.await.map_err(io::Error::other)?
    }

    async fn connect_to(&self, namespace: &File, address: IpAddr, port: u16) -> io::Result<TcpStream> {
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let socket = self.make(namespace, family, SocketType::STREAM).await?;
        let socket = TcpSocket::from_std_stream(std::net::TcpStream::from(socket));
        let stream = socket.connect(SocketAddr::new(address, port)).await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }
}

fn socket_in(Request { namespace, family, kind, .. }: &Request) -> io::Result<OwnedFd> {
    rustix::thread::move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
    Ok(rustix::net::socket_with(*family, *kind, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)?)
}
