//! The SSH ingress of host and proxy, against OpenSSH's sshd in a container of the
//! same image, directly and by a jump. The client, the files and their file system
//! are the same; a cipher is what the client and each server agree on.

mod connection;
mod files;
mod many;
mod peer;
mod places;
mod rounds;

use std::time::Duration;

use self::{
    connection::Connection,
    many::Many,
    peer::Sshd,
    places::{Place, Places},
};
use crate::{
    Effort, Result,
    federation::Federation,
    table::{Better, Goal, Table, median},
};

const LIMIT: Duration = Duration::from_secs(300);
const AES: &str = "aes256-gcm@openssh.com";

pub(crate) fn measure(federation: &Federation, effort: Effort, table: &mut Table) -> Result<()> {
    let sshd = Sshd::start(federation)?;
    let places = Places::new(federation, &sshd)?;
    files::make(federation, &places, effort)?;
    let bench = Bench { places: &places, effort };

    let took = bench.by_turns(effort.runs * 2, |place| Ok(rounds::connect(&places, place)?.as_secs_f64()))?;
    bench.add(table, "ssh true", ("s", Better::Less), &took, (Goal::AtMost(1.2), Goal::AtMost(1.2)));
    bench.connected(table)?;
    bench.many(federation, &sshd, table)?;
    let ciphers: Vec<String> = Place::ALL
        .iter()
        .map(|place| Ok(format!("{place} {}", rounds::cipher(&places, *place)?)))
        .collect::<Result<_>>()?;
    table.note(format!("ciphers: {}", ciphers.join(", ")));
    Ok(())
}

/// What each place took, in the order of [`Place::ALL`].
type Samples = [Vec<f64>; Place::ALL.len()];

struct Bench<'a> {
    places: &'a Places,
    effort: Effort,
}

impl Bench<'_> {
    /// One after the other in each round, another one first each time. The first
    /// round warms caches and is not counted.
    fn by_turns(&self, runs: u32, measure: impl Fn(Place) -> Result<f64>) -> Result<Samples> {
        let mut samples = Samples::default();
        for round in 0..=runs {
            for turn in 0..Place::ALL.len() {
                let index = (round as usize + turn) % Place::ALL.len();
                let place = Place::ALL[index];
                let seen = measure(place).map_err(|error| format!("{place}: {error}"))?;
                if round > 0 {
                    samples[index].push(seen);
                }
            }
        }
        Ok(samples)
    }

    /// What goes through connections that are there.
    fn connected(&self, table: &mut Table) -> Result<()> {
        let effort = self.effort;
        let connections: Vec<Connection<'_>> = Place::ALL
            .into_iter()
            .map(|place| Connection::open(self.places, place))
            .collect::<Result<_>>()?;
        let of = |place: Place| &connections[place as usize];
        let mib = f64::from(effort.ssh_mib);
        for (what, measure) in files::STREAMS {
            let rates = self.by_turns(effort.runs, |place| Ok(mib / measure(of(place))?.as_secs_f64()))?;
            let goals = (Goal::AtLeast(0.9), Goal::AtLeast(1.0));
            self.add(table, &format!("{what}, {mib} MiB"), ("MiB/s", Better::More), &rates, goals);
        }
        // As `cocalc ssh-config` sets it where the client's machine has instructions
        // for it. The way over a jump keeps its own.
        let with_aes: Vec<Connection<'_>> = [Place::Host, Place::Sshd]
            .into_iter()
            .map(|place| Connection::open_with(self.places, place, Some(AES)))
            .collect::<Result<_>>()?;
        for (what, measure) in files::STREAMS {
            let (mut ours, mut peer) = (Vec::new(), Vec::new());
            for round in 0..=effort.runs {
                for (connection, rates) in with_aes.iter().zip([&mut ours, &mut peer]) {
                    let rate = mib / measure(connection)?.as_secs_f64();
                    if round > 0 {
                        rates.push(rate);
                    }
                }
            }
            let (what, unit) = (format!("{what}, {mib} MiB, host by AES"), ("MiB/s", Better::More));
            table.compare(what, "sshd", unit, &ours, &peer, Some(Goal::AtLeast(0.9)));
        }
        let files = f64::from(effort.small_files);
        for (what, measure) in files::TREES {
            let rates = self.by_turns(effort.runs, |place| Ok(files / measure(of(place))?.as_secs_f64()))?;
            let goals = (Goal::AtLeast(0.9), Goal::AtLeast(1.0));
            let what = format!("{what} of {files} small files");
            self.add(table, &what, ("files/s", Better::More), &rates, goals);
        }
        let took =
            self.by_turns(effort.runs, |place| Ok(rounds::channel(of(place), effort.rounds)? * 1e3))?;
        let what = "ssh true, another channel of a connection";
        self.add(table, what, ("ms", Better::Less), &took, (Goal::AtMost(1.2), Goal::AtMost(1.2)));
        Ok(())
    }

    /// The host beside sshd, both ways through the proxy beside a jump.
    fn add(
        &self,
        table: &mut Table,
        what: &str,
        unit: (&'static str, Better),
        samples: &Samples,
        (direct, jumped): (Goal, Goal),
    ) {
        for (ours, peer, goal) in [
            (Place::Host, Place::Sshd, direct),
            (Place::Proxy, Place::Jump, jumped),
            (Place::EndToEnd, Place::Jump, jumped),
        ] {
            let of = |place: Place| samples[place as usize].as_slice();
            table.compare(format!("{what}, {ours}"), peer.to_string(), unit, of(ours), of(peer), Some(goal));
        }
    }

    /// Many sessions at once, and what servers keep for each that is idle.
    fn many(&self, federation: &Federation, sshd: &Sshd, table: &mut Table) -> Result<()> {
        let count = self.effort.sessions;
        let (host, proxy) = (federation.hosts()?[0].pid, federation.proxy_pid());
        let helper = federation.first_process(federation.project())?;
        let servers = |place: Place| -> Result<Vec<u32>> {
            Ok(match place {
                // The helper keeps something of each, too.
                Place::Host => vec![host, helper],
                Place::Proxy | Place::EndToEnd => vec![proxy],
                Place::Sshd => sshd.servers()?,
                Place::Jump => sshd.jumps()?,
            })
        };
        let before: Vec<f64> = Place::ALL
            .iter()
            .map(|place| Ok(crate::processes::memory_kib(&servers(*place)?)))
            .collect::<Result<_>>()?;
        let mut kept = Samples::default();
        let (mut opened, mut echoed) = (Samples::default(), Samples::default());
        for _ in 0..self.effort.runs {
            for (index, place) in Place::ALL.into_iter().enumerate() {
                let mut many = Many::open(self.places, place, count)?;
                opened[index].push(many.took.as_secs_f64());
                let echoes: Vec<f64> = (0..self.effort.rounds)
                    .map(|_| Ok(many.echo()?.as_secs_f64() * 1e3))
                    .collect::<Result<_>>()?;
                echoed[index].push(median(&echoes));
                // What was needed for logging in is given back.
                std::thread::sleep(Duration::from_secs(u64::from(self.effort.seconds)));
                let with = crate::processes::memory_kib(&servers(place)?);
                kept[index].push((with - before[index]) / f64::from(count));
                many.close()?;
            }
        }
        let goals = (Goal::AtMost(1.2), Goal::AtMost(1.2));
        let what = format!("{count} sessions at once, until all have begun");
        self.add(table, &what, ("s", Better::Less), &opened, goals);
        let what = format!("a line there and back in all of {count} sessions");
        self.add(table, &what, ("ms", Better::Less), &echoed, goals);
        for place in [Place::Host, Place::Proxy, Place::EndToEnd] {
            let what = format!("memory kept by {} for an idle session", place.keeper());
            table.number(what, "KiB", &kept[place as usize], Some(Goal::AtMost(1024.0)));
        }
        for place in [Place::Sshd, Place::Jump] {
            let what = format!("memory kept by {} for an idle session", place.keeper());
            table.number(what, "KiB", &kept[place as usize], None);
        }
        Ok(())
    }
}
