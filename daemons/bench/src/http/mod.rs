//! Requests and WebSockets to an app in a project, through host and proxy, against
//! nginx and configurable-http-proxy before the same app.
//!
//! These and the `wrk` that loads them run in the project's network namespace, so
//! that each way of the host is two connections over a loopback device.

mod load;
mod others;
mod websockets;

use std::{
    fmt,
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    process::Command,
    time::Duration,
};

use self::{
    load::{Load, Seen},
    others::Others,
};
use crate::{
    Effort, Result,
    federation::{APP_PORT, Federation},
    processes,
    table::{Better, Goal, Table, median},
    tool::{attached, run},
};

const RATE: (&str, Better) = ("requests/s", Better::More);
const MICROS: (&str, Better) = ("µs", Better::Less);

/// What answers, and the way there.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Way {
    /// The ingress of the project's host, with a token.
    Host,
    /// The same with a browser's session.
    Session,
    /// The same by the proxy.
    Proxy,
    /// nginx with `proxy_pass`.
    Nginx,
    /// The same with `auth_request`.
    Auth,
    /// configurable-http-proxy.
    Node,
    /// The app, with nothing before it.
    App,
}

impl Way {
    /// In the order of their numbers.
    const ALL: [Self; 7] =
        [Self::Host, Self::Session, Self::Proxy, Self::Nginx, Self::Auth, Self::Node, Self::App];

    /// In the project's namespace.
    fn port(self) -> Option<u16> {
        match self {
            Self::Host | Self::Session | Self::Proxy => None,
            Self::Nginx => Some(others::NGINX_PORT),
            Self::Auth => Some(others::AUTH_PORT),
            Self::Node => Some(others::NODE_PORT),
            Self::App => Some(APP_PORT),
        }
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Host => "host with token",
            Self::Session => "host with session",
            Self::Proxy => "proxy and host",
            Self::Nginx => "nginx proxy_pass",
            Self::Auth => "nginx auth_request",
            Self::Node => "configurable-http-proxy",
            Self::App => "the app alone",
        })
    }
}

/// What is compared, and what is aimed at for a rate.
const PAIRS: [(Way, Way, Option<Goal>); 9] = [
    (Way::Host, Way::Auth, Some(Goal::AtLeast(1.0))),
    (Way::Host, Way::Nginx, Some(Goal::AtLeast(0.8))),
    (Way::Host, Way::Node, Some(Goal::AtLeast(3.0))),
    (Way::Session, Way::Auth, Some(Goal::AtLeast(1.0))),
    (Way::Session, Way::Nginx, Some(Goal::AtLeast(0.8))),
    (Way::Session, Way::Node, Some(Goal::AtLeast(3.0))),
    // Two stations with TLS between them have no goal against one.
    (Way::Proxy, Way::Auth, None),
    (Way::Proxy, Way::Nginx, None),
    (Way::Proxy, Way::Node, None),
];

pub(crate) fn measure(federation: &Federation, effort: Effort, table: &mut Table) -> Result<()> {
    // Of the app: one thread and one file for each connection. Processes that run
    // keep their limit of files, so it is started again.
    let limits = ["--pids", "20000", "--nofile", "19000", "--memory", "3G"];
    federation.limits(federation.project(), &limits)?;
    federation.change(federation.project(), "stop")?;
    federation.change(federation.project(), "start")?;
    federation.wait_for_app()?;
    let others = Others::start(federation)?;
    let bench = Bench { federation, others, effort };
    if bench.others.node.is_none() {
        table.note("configurable-http-proxy is not installed, so it was not measured");
    }
    for way in bench.ways() {
        if let Some(port) = way.port() {
            wait_inside(federation, &format!("http://{}/", SocketAddr::from((Ipv4Addr::LOCALHOST, port))))?;
        }
    }
    // First: what an allocator keeps of earlier load would serve them, unseen.
    websockets::measure(&bench, table)?;
    for (name, path) in [("1 KB", "kib"), ("1 MB", "mib")] {
        for connections in [1, 64, 512] {
            bench.load(table, name, Load { path, connections, seconds: effort.seconds, kept: true })?;
        }
    }
    let load = Load { path: "kib", connections: 64, seconds: effort.seconds, kept: false };
    bench.load(table, "1 KB, a connection for each,", load)
}

struct Bench<'a> {
    federation: &'a Federation,
    others: Others,
    effort: Effort,
}

impl Bench<'_> {
    /// Those that are there.
    fn ways(&self) -> impl Iterator<Item = Way> {
        let node = self.others.node.is_some();
        Way::ALL.into_iter().filter(move |way| *way != Way::Node || node)
    }

    /// The processes that do the work of a way.
    fn servers(&self, way: Way) -> Result<Vec<u32>> {
        Ok(match way {
            Way::Host | Way::Session => vec![self.federation.hosts()?[0].pid],
            Way::Proxy => vec![self.federation.proxy_pid(), self.federation.hosts()?[0].pid],
            Way::Nginx | Way::Auth => processes::family(self.others.nginx.pid())?,
            Way::Node => self.others.node.as_ref().map(|node| vec![node.pid()]).unwrap_or_default(),
            Way::App => Vec::new(),
        })
    }

    /// The address of a way, and the field that lets in.
    fn address(&self, way: Way) -> Result<(String, Option<String>)> {
        let connect = self.federation.connect(self.federation.project())?;
        Ok(match way.port() {
            Some(port) => (format!("http://{}/", SocketAddr::from((Ipv4Addr::LOCALHOST, port))), None),
            None => {
                let bearer = format!("Authorization: Bearer {}", connect.token);
                match way {
                    Way::Session => {
                        let cookie = self.federation.session(&connect)?;
                        (connect.direct, Some(format!("Cookie: {cookie}")))
                    }
                    Way::Host => (connect.direct, Some(bearer)),
                    _ => (connect.proxy, Some(bearer)),
                }
            }
        })
    }

    /// Where a way is to be reached from, if not from here.
    fn namespace(&self, way: Way) -> Result<Option<PathBuf>> {
        way.port().map(|_| self.federation.namespace()).transpose()
    }

    /// One after the other in each round, so that none has the quieter machine. The
    /// first round is not counted.
    fn load(&self, table: &mut Table, name: &str, load: Load) -> Result<()> {
        let mut seen: [Vec<Seen>; Way::ALL.len()] = Default::default();
        for round in 0..=self.effort.runs {
            for way in self.ways() {
                let (address, field) = self.address(way)?;
                let wrk = match way.port() {
                    Some(_) => self.federation.inside("wrk")?,
                    None => attached("wrk"),
                };
                let servers = self.servers(way)?;
                let before = processes::cpu(&servers)?;
                let mut one = load
                    .run(&self.federation.dir, wrk, &address, field.as_deref())
                    .map_err(|error| format!("{way}: {error}"))?;
                one.cpu_micros = (processes::cpu(&servers)? - before).as_secs_f64() * 1e6 / one.requests;
                if round > 0 {
                    seen[way as usize].push(one);
                }
            }
        }
        let of =
            |way: Way, what: fn(&Seen) -> f64| -> Vec<f64> { seen[way as usize].iter().map(what).collect() };
        let what = |way: Way| format!("HTTP, {name} {} connections, {way}", load.connections);
        for (ours, peer, goal) in PAIRS {
            if seen[peer as usize].is_empty() {
                continue;
            }
            let add = |table: &mut Table, what: String, unit, value: fn(&Seen) -> f64, goal| {
                table.compare(what, peer.to_string(), unit, &of(ours, value), &of(peer, value), goal);
            };
            add(table, what(ours), RATE, |seen| seen.rate, goal);
            if peer == Way::Auth {
                add(table, what(ours) + ", p50", MICROS, |seen| seen.p50, None);
                add(table, what(ours) + ", p99", MICROS, |seen| seen.p99, None);
                add(table, what(ours) + ", p99.9", MICROS, |seen| seen.p999, None);
                add(table, what(ours) + ", processor per request", MICROS, |seen| seen.cpu_micros, None);
            }
        }
        let app = |value| median(&of(Way::App, value));
        table.note(format!(
            "{}: {:.0} requests/s, p50 {:.0} µs, p99 {:.0} µs, p99.9 {:.0} µs",
            what(Way::App),
            app(|seen| seen.rate),
            app(|seen| seen.p50),
            app(|seen| seen.p99),
            app(|seen| seen.p999),
        ));
        Ok(())
    }
}

/// Waits until something in the project's namespace answers.
fn wait_inside(federation: &Federation, url: &str) -> Result<()> {
    let mut curl: Command = federation.inside("curl")?;
    curl.args(["--silent", "--show-error", "--fail", "--max-time", "5", "--output", "/dev/null"]);
    curl.args(["--retry", "60", "--retry-delay", "1", "--retry-max-time", "60", "--retry-connrefused"]);
    run(curl.args(["--noproxy", "*", url]), Duration::from_secs(90)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::Way;

    #[test]
    fn ways_are_listed_by_their_numbers() {
        assert!(Way::ALL.iter().enumerate().all(|(number, way)| *way as usize == number));
    }
}
