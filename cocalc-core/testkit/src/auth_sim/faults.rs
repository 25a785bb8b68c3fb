//! What goes wrong.

use cocalc_auth::store::{AclStore, MemoryStore, Save, entry_name};

use super::world::{Event, Ms, Sim, project_id};

impl Sim {
    pub(super) fn fault(&mut self) {
        if !self.faulty {
            return;
        }
        let wait = self.around(self.scenario.fault_ms);
        self.after(wait, Event::Fault);
        let host = self.pick(self.hosts.len());
        // There are more hosts than masters.
        let mostly_hosts = if self.below(self.hosts.len() as u64) < 10 { 100 } else { 92 };
        match self.below(mostly_hosts) {
            // A host is cut off: in one way, or in both, shortly or for long.
            0..=29 => {
                let time = self.outage();
                self.cut(host, true, true, time);
            }
            30..=39 => {
                let time = self.outage();
                self.cut(host, false, true, time);
            }
            40..=49 => {
                let time = self.outage();
                self.cut(host, true, false, time);
            }
            50..=56 => {
                self.links[host].deaf = true;
                self.links[host].cut += 1;
                let (wait, cut) = (self.around(20_000), self.links[host].cut);
                self.after(wait, Event::Heal { host, cut });
            }
            57..=70 => {
                self.note(|| format!("the daemon of host {host} is restarted"));
                self.kill_daemon(host);
                let wait = 200 + self.below(5_000);
                self.after(wait, Event::Boot { host });
            }
            71..=78 => {
                self.note(|| format!("host {host} reboots"));
                let now = self.now;
                self.hosts[host].reboot(now);
                let wait = 200 + self.below(40_000);
                self.after(wait, Event::Boot { host });
            }
            79..=84 => self.restore_store(host),
            85..=91 => {
                let off = self.below(240_000) as i64 - 120_000;
                self.note(|| format!("the wall clock of host {host} is {off} ms off"));
                self.hosts[host].wall_off = if self.below(2) == 0 { off } else { off / 60 };
            }
            92..=95 => {
                let wait = 2_000 + self.below(20_000);
                self.master_stops(wait);
            }
            96..=97 => {
                // The master is out of reach of many.
                let time = self.outage();
                for host in 0..self.hosts.len() {
                    if self.below(4) > 0 {
                        let time = time + self.below(10_000);
                        self.cut(host, true, true, time);
                    }
                }
            }
            _ => {
                // A standby takes over that lacks the last commits, or a backup
                // is restored that lacks those of an hour.
                let lag = if self.below(3) == 0 { self.below(3_600_000) } else { self.below(20_000) };
                let restart = self.now + 1 + lag;
                self.standby(restart);
            }
        }
    }

    fn outage(&mut self) -> Ms {
        match self.below(10) {
            0..=4 => self.below(20_000),
            5..=7 => self.below(180_000),
            8 => self.below(1_500_000),
            _ => self.below(4_000_000),
        }
    }

    /// Cuts a host off for a time.
    pub(super) fn cut(&mut self, host: usize, bus: bool, keepalive: bool, time: Ms) {
        let now = self.now;
        let link = &mut self.links[host];
        link.cut += 1;
        link.keepalive |= keepalive;
        if bus {
            link.bus.get_or_insert(now);
        }
        let cut = link.cut;
        self.after(time, Event::Heal { host, cut });
        let subscription = self.hosts[host].subscription();
        if bus && self.below(2) == 0 {
            // The host notices the dead connection, after a while.
            let wait = self.below(15_000);
            self.after(wait, Event::Unsubscribed { host, subscription });
        }
    }

    pub(super) fn heal(&mut self, host: usize, cut: u64) {
        let link = &mut self.links[host];
        if link.cut == cut {
            (link.bus, link.keepalive, link.deaf) = (None, false, false);
        }
    }

    /// The host's store is copied, changed on, and put back while the daemon is
    /// down.
    fn restore_store(&mut self, host: usize) {
        let Some(copy) = self.hosts[host].backup.take() else {
            let machine = &mut self.hosts[host];
            machine.backup = copy_of(machine, &self.master.owned[host].iter().copied().collect::<Vec<_>>());
            return;
        };
        self.note(|| format!("the store of host {host} is restored from a copy"));
        self.kill_daemon(host);
        self.hosts[host].disk = copy;
        if self.below(4) == 0 {
            let now = self.now;
            self.hosts[host].reboot(now);
        }
        let wait = 200 + self.below(5_000);
        self.after(wait, Event::Boot { host });
    }

    /// Everything works again.
    pub(super) fn quiet(&mut self) {
        self.note(|| "everything works again".to_owned());
        self.faulty = false;
        self.forget_standby();
        for host in 0..self.hosts.len() {
            self.links[host].cut += 1;
            let cut = self.links[host].cut;
            self.heal(host, cut);
            self.hosts[host].wall_off = 0;
            if self.hosts[host].daemon.is_none() {
                self.after(1_000, Event::Boot { host });
            }
        }
        // One after the other, or one would be in the way of the next.
        for n in 0..8 {
            let project = self.pick(self.master.db.projects.len()) as u32;
            let account = self.pick(self.master.db.accounts.len()) as u32;
            let wait = 60_000 + n * 10_000;
            self.after(wait, Event::Drill { step: 0, project, account });
        }
        self.after(super::world::QUIET, Event::End);
    }
}

/// A copy of what is on the host's disk.
fn copy_of(machine: &super::host::Host, projects: &[u32]) -> Option<super::host::Disk> {
    let saved = machine.disk.store.load().ok()?;
    let store = MemoryStore::default();
    let entries =
        saved.entries.into_iter().filter_map(|entry| Some((entry_name(&entry)?, Some(entry)))).collect();
    store.save(&Save { clear: true, entries, position: saved.position }).ok()?;
    for project in projects {
        for (hash, session) in machine.disk.store.sessions_of(project_id(*project)).ok()? {
            store.insert_session(&hash, &session).ok()?;
        }
    }
    Some(super::host::Disk { store, kept: machine.disk.kept.clone() })
}
