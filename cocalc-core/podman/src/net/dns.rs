//! The resolver of a project: it listens on the loopback of the project's own
//! network namespace, and asks the servers that the host itself asks.
//!
//! So names mean in a project what they mean on its host, whatever resolver the
//! host has (one on its loopback, or at a link-local address of its cloud), and
//! the project needs no way to any of them. A project with a list of names gets
//! answers for those only, and what they are answered with is opened in the
//! firewall before the answer is passed on.

mod rate;

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicUsize},
    time::{Duration, Instant},
};

use cocalc_core::{
    ids::ProjectId,
    runner::{Destinations, NetworkPolicy},
};
use simple_dns::{Packet, RCODE, rdata::RData};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    task::{AbortHandle, JoinSet},
};

pub(crate) use self::rate::QUESTIONS_PER_SEC;
use self::rate::{QUESTIONS_MAX, Rate, Waiting};
use super::{Network, Sockets, rules};

/// Where it listens, in each project: an address that programs don't take for
/// themselves, as container engines have it.
pub(crate) const ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 11);
const PORT: u16 = 53;

/// How many connections of one project are served.
const CONNECTIONS_MAX: usize = 8;
/// How long a server may take, and a connection may be idle.
const ANSWER_LIMIT: Duration = Duration::from_secs(4);
const IDLE_LIMIT: Duration = Duration::from_secs(10);
/// The largest message over UDP.
const MESSAGE_BYTES_MAX: usize = 4096;
/// How long an address stays open that a name had, in seconds, at least and at
/// most: programs keep an answer a little longer than they should.
const OPEN_SECS: std::ops::RangeInclusive<u32> = 60..=3600;
/// How long the host's list of servers counts as known.
const SERVERS_FRESH: Duration = Duration::from_secs(5);

/// The servers that the host itself asks.
#[derive(Debug)]
pub(crate) struct Servers {
    fixed: Option<Vec<SocketAddr>>,
    known: Mutex<Option<(Instant, Vec<SocketAddr>)>>,
    /// How often each project may ask.
    per_sec: u32,
    /// How many questions of all projects wait for their answers.
    waiting: AtomicUsize,
}

impl Servers {
    /// These, or those of the host's configuration as it is at each time, for
    /// projects that ask so often.
    pub(crate) fn new(fixed: Option<Vec<SocketAddr>>, per_sec: u32) -> Self {
        Self { fixed, known: Mutex::default(), per_sec, waiting: AtomicUsize::new(0) }
    }

    fn list(&self) -> Vec<SocketAddr> {
        if let Some(fixed) = &self.fixed {
            return fixed.clone();
        }
        let mut known = lock(&self.known);
        match &*known {
            Some((when, servers)) if when.elapsed() < SERVERS_FRESH => servers.clone(),
            _ => {
                let text = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
                let servers = nameservers(&text);
                *known = Some((Instant::now(), servers.clone()));
                servers
            }
        }
    }
}

/// The servers that a `resolv.conf` names.
fn nameservers(resolv_conf: &str) -> Vec<SocketAddr> {
    resolv_conf
        .lines()
        .filter_map(|line| line.strip_prefix("nameserver")?.trim().parse().ok())
        .map(|server: IpAddr| SocketAddr::new(server, PORT))
        .take(3)
        .collect()
}

/// Serves one project; dropping it ends that.
#[derive(Debug)]
pub(crate) struct Resolver(AbortHandle);

impl Drop for Resolver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What answering needs to know.
#[derive(Debug)]
struct Served {
    project: ProjectId,
    slot: u32,
    /// The names that are answered; `None` for all.
    only: Option<Destinations>,
    network: Network,
    servers: Arc<Servers>,
    /// Until when addresses are open.
    open: Mutex<BTreeMap<Ipv4Addr, Instant>>,
    waiting: AtomicUsize,
    rate: Mutex<Rate>,
}

impl Resolver {
    /// Listens in the namespace of a project, and serves it. A project that
    /// reaches nothing has no resolver.
    pub(crate) async fn start(
        network: &Network,
        sockets: &Sockets,
        servers: &Arc<Servers>,
        project: ProjectId,
        slot: u32,
        policy: &NetworkPolicy,
    ) -> io::Result<Option<Self>> {
        let only = match policy {
            NetworkPolicy::Full => None,
            NetworkPolicy::Only { allow } => Some(allow.clone()),
            NetworkPolicy::None => return Ok(None),
        };
        let path = network.path(project);
        let address = SocketAddr::new(ADDRESS.into(), PORT);
        let (udp, tcp) = (bind_udp(sockets, &path, address).await?, listen(sockets, &path, address).await?);
        let served = Arc::new(Served {
            project,
            slot,
            only,
            network: network.clone(),
            servers: Arc::clone(servers),
            open: Mutex::default(),
            waiting: AtomicUsize::new(0),
            rate: Mutex::new(Rate::new(servers.per_sec, Instant::now())),
        });
        let task = tokio::spawn(async move {
            tokio::join!(datagrams(Arc::clone(&served), Arc::new(udp)), connections(served, tcp));
        });
        Ok(Some(Self(task.abort_handle())))
    }
}

async fn bind_udp(sockets: &Sockets, path: &Path, address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = sockets.datagram(path).await?;
    // Beside a resolver that is just ending; no user but this one may.
    rustix::net::sockopt::set_socket_reuseport(&socket, true)?;
    rustix::net::bind(&socket, &address)?;
    UdpSocket::from_std(socket.into())
}

async fn listen(sockets: &Sockets, path: &Path, address: SocketAddr) -> io::Result<TcpListener> {
    let socket = sockets.stream(path).await?;
    rustix::net::sockopt::set_socket_reuseaddr(&socket, true)?;
    rustix::net::sockopt::set_socket_reuseport(&socket, true)?;
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, 16)?;
    TcpListener::from_std(socket.into())
}

async fn datagrams(served: Arc<Served>, socket: Arc<UdpSocket>) {
    let mut answering = JoinSet::new();
    let mut buffer = [0; MESSAGE_BYTES_MAX];
    loop {
        let (count, from) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            // An answer that nobody waited for comes back as an error.
            Err(_) => continue,
        };
        while answering.try_join_next().is_some() {}
        // Beyond its number a question is dropped; it will be asked again.
        if answering.len() >= QUESTIONS_MAX {
            served.dropped();
            continue;
        }
        let (served, socket, question) = (Arc::clone(&served), Arc::clone(&socket), buffer[..count].to_vec());
        answering.spawn(async move {
            if let Some(answer) = served.answer(&question, Over::Udp).await {
                let _ = socket.send_to(&answer, from).await;
            }
        });
    }
}

async fn connections(served: Arc<Served>, listener: TcpListener) {
    let mut serving = JoinSet::new();
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        while serving.try_join_next().is_some() {}
        if serving.len() < CONNECTIONS_MAX {
            serving.spawn(connection(Arc::clone(&served), stream));
        }
    }
}

async fn connection(served: Arc<Served>, mut stream: TcpStream) {
    loop {
        let question = tokio::time::timeout(IDLE_LIMIT, read_message(&mut stream)).await;
        let Ok(Ok(question)) = question else { return };
        let Some(answer) = served.answer(&question, Over::Tcp).await else { return };
        if !matches!(tokio::time::timeout(IDLE_LIMIT, write_message(&mut stream, &answer)).await, Ok(Ok(())))
        {
            return;
        }
    }
}

async fn read_message(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut message = vec![0; stream.read_u16().await?.into()];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

async fn write_message(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(io::Error::other)?;
    stream.write_all(&[&length.to_be_bytes(), message].concat()).await
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Over {
    Udp,
    Tcp,
}

impl Served {
    /// The answer to a question; `None` if there is none, it made no sense, or
    /// there were too many.
    async fn answer(&self, question: &[u8], over: Over) -> Option<Vec<u8>> {
        let Some(_waiting) = Waiting::begin(&self.waiting, &self.servers.waiting) else {
            self.dropped();
            return None;
        };
        let may = lock(&self.rate).take(Instant::now());
        if !may {
            self.dropped();
            return None;
        }
        let name = name_asked(question)?;
        let ports: Vec<Option<u16>> = match &self.only {
            None => Vec::new(),
            Some(only) => {
                let ports: Vec<_> = only.ports_of(&name).collect();
                if ports.is_empty() {
                    return refusal(question, RCODE::Refused);
                }
                ports
            }
        };
        for server in self.servers.list() {
            let asked = tokio::time::timeout(ANSWER_LIMIT, ask(server, question, over)).await;
            let Ok(Ok(answer)) = asked else { continue };
            if self.only.is_some() && !self.admit(&answer, &ports).await {
                break;
            }
            return Some(answer);
        }
        refusal(question, RCODE::ServerFailure)
    }

    /// Notes that a question is not answered because there are too many.
    fn dropped(&self) {
        let count = lock(&self.rate).dropped(Instant::now());
        if let Some(count) = count {
            tracing::info!(project = %self.project, count, "it asks for more names than it may: some are not answered");
        }
    }

    /// Opens the addresses of an answer in the firewall; whether they are open.
    async fn admit(&self, answer: &[u8], ports: &[Option<u16>]) -> bool {
        let mut text = String::new();
        let now = Instant::now();
        let addresses = addresses(answer);
        {
            let mut open = lock(&self.open);
            open.retain(|_, until| *until > now);
            for (address, secs) in &addresses {
                let until = now + Duration::from_secs((*secs).into());
                let fresh = now + Duration::from_secs((*secs / 2).into());
                if open.get(address).is_some_and(|until| *until >= fresh) {
                    continue;
                }
                if open.len() >= rules::ADDRESSES_MAX / 2 && !open.contains_key(address) {
                    tracing::info!(project = %self.project, "too many addresses of its names at a time");
                    return false;
                }
                open.insert(*address, until);
                text.push_str(&rules::admit(self.network.tag(), self.slot, *address, ports, *secs));
            }
        }
        if text.is_empty() {
            return true;
        }
        let opened = tokio::task::spawn_blocking(move || super::nft(&text, "open an address")).await;
        if let Ok(Ok(())) = opened {
            return true;
        }
        tracing::warn!(project = %self.project, ?opened, "could not open the addresses of a name");
        let mut open = lock(&self.open);
        open.retain(|address, _| !addresses.iter().any(|(other, _)| other == address));
        false
    }
}

/// Asks a server, over what the question came by.
async fn ask(server: SocketAddr, question: &[u8], over: Over) -> io::Result<Vec<u8>> {
    if over == Over::Tcp {
        let mut stream = TcpStream::connect(server).await?;
        write_message(&mut stream, question).await?;
        return read_message(&mut stream).await;
    }
    let any: SocketAddr = if server.is_ipv4() {
        (Ipv4Addr::UNSPECIFIED, 0).into()
    } else {
        (std::net::Ipv6Addr::UNSPECIFIED, 0).into()
    };
    // A port of its own for each question: answers can't be guessed.
    let socket = UdpSocket::bind(any).await?;
    socket.connect(server).await?;
    socket.send(question).await?;
    let mut answer = vec![0; MESSAGE_BYTES_MAX];
    loop {
        let count = socket.recv(&mut answer).await?;
        if count >= 12 && answer[..2] == question[..2] {
            answer.truncate(count);
            return Ok(answer);
        }
    }
}

/// The name that a question is about, in lower case; `None` unless it is one.
fn name_asked(question: &[u8]) -> Option<String> {
    let packet = Packet::parse(question).ok()?;
    match &packet.questions[..] {
        [one] => Some(one.qname.to_string().trim_end_matches('.').to_ascii_lowercase()),
        _ => None,
    }
}

/// The addresses in an answer, and for how many seconds each is open.
fn addresses(answer: &[u8]) -> Vec<(Ipv4Addr, u32)> {
    let Ok(packet) = Packet::parse(answer) else { return Vec::new() };
    packet
        .answers
        .iter()
        .filter_map(|record| match &record.rdata {
            RData::A(a) => {
                Some((Ipv4Addr::from_bits(a.address), record.ttl.clamp(*OPEN_SECS.start(), *OPEN_SECS.end())))
            }
            _ => None,
        })
        .collect()
}

/// An answer that says why there is none.
fn refusal(question: &[u8], why: RCODE) -> Option<Vec<u8>> {
    let packet = Packet::parse(question).ok()?;
    let mut reply = Packet::new_reply(packet.id());
    *reply.rcode_mut() = why;
    reply.set_flags(simple_dns::PacketFlag::RECURSION_AVAILABLE);
    if packet.has_flags(simple_dns::PacketFlag::RECURSION_DESIRED) {
        reply.set_flags(simple_dns::PacketFlag::RECURSION_DESIRED);
    }
    reply.questions = packet.questions;
    reply.build_bytes_vec().ok()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use simple_dns::{CLASS, Name, Question, ResourceRecord, rdata::A};

    use super::*;

    fn question(name: &str) -> Vec<u8> {
        let mut packet = Packet::new_query(7);
        let name = Name::new(name).unwrap();
        let kind = simple_dns::TYPE::A.into();
        packet.questions.push(Question::new(name, kind, CLASS::IN.into(), false));
        packet.build_bytes_vec().unwrap()
    }

    #[test]
    fn a_question_is_about_one_name_whatever_its_case() {
        assert_eq!(name_asked(&question("PyPI.org")).as_deref(), Some("pypi.org"));
        assert_eq!(name_asked(b"nonsense"), None);
        assert_eq!(name_asked(&[0; 12]), None);
        let refused = refusal(&question("a.org"), RCODE::Refused).unwrap();
        let packet = Packet::parse(&refused).unwrap();
        assert_eq!((packet.id(), packet.rcode(), packet.questions.len()), (7, RCODE::Refused, 1));
    }

    #[test]
    fn an_address_is_open_for_a_bounded_time() {
        for (ttl, secs) in [(0, 60), (300, 300), (u32::MAX >> 1, 3600)] {
            let mut packet = Packet::new_reply(7);
            let record = RData::A(A { address: u32::from(Ipv4Addr::new(192, 0, 2, 1)) });
            packet.answers.push(ResourceRecord::new(Name::new("a.org").unwrap(), CLASS::IN, ttl, record));
            let answer = packet.build_bytes_vec().unwrap();
            assert_eq!(addresses(&answer), [(Ipv4Addr::new(192, 0, 2, 1), secs)]);
        }
        assert!(addresses(b"nonsense").is_empty());
    }

    #[test]
    fn the_servers_are_the_hosts_wherever_they_are() {
        let text = "# comment\nnameserver 127.0.0.53\nnameserver fd00::1\noptions edns0\nnameserver x\n";
        let servers: Vec<String> = nameservers(text).iter().map(ToString::to_string).collect();
        assert_eq!(servers, ["127.0.0.53:53", "[fd00::1]:53"]);
    }
}
