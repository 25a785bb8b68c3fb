//! What is known of the use of one project, and what follows from it. Pure.

use std::{collections::BTreeMap, time::Duration};

use serde::{Deserialize, Serialize};

use super::IdleLimits;

/// How many declared jobs are remembered.
const JOBS_MAX: usize = 64;

/// Where use of a project is seen.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Source {
    /// It was started.
    Start,
    /// HTTP requests, and what is sent or loaded by them.
    Http,
    /// Data frames of WebSockets.
    WebSocket,
    /// SSH and terminals.
    Ssh,
    /// The message bus.
    Bus,
    /// Its processes used the processor.
    Cpu,
    /// Its processes sent or received.
    Network,
    /// It has said so itself.
    Job,
}

impl Source {
    /// All of them.
    pub const ALL: [Self; 8] =
        [Self::Start, Self::Http, Self::WebSocket, Self::Ssh, Self::Bus, Self::Cpu, Self::Network, Self::Job];

    /// For people, behind "last used by".
    pub fn words(self) -> &'static str {
        match self {
            Self::Start => "its start",
            Self::Http => "an HTTP request",
            Self::WebSocket => "a WebSocket",
            Self::Ssh => "SSH or a terminal",
            Self::Bus => "the message bus",
            Self::Cpu => "processes that were computing",
            Self::Network => "processes that were sending or receiving",
            Self::Job => "a declared job",
        }
    }
}

/// The use of one project. Times are of the boot clock of its host.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Record {
    work: BTreeMap<Source, Duration>,
    presence: Option<(Source, Duration)>,
    keep_until: Option<Duration>,
    jobs: BTreeMap<String, Duration>,
    warned: Option<Duration>,
}

/// What else decides at this moment.
#[derive(Clone, Debug)]
pub struct Circumstances<'a> {
    /// What is in force for the project.
    pub limits: IdleLimits,
    /// What must not be cut off, in words: `a move`, `a backup`.
    pub busy: Option<&'a str>,
}

/// What is to be done about a project that runs.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Verdict {
    /// It is not stopped for being idle.
    Never,
    /// Nothing yet. It will be stopped at that time, unless it is used.
    Runs {
        /// When.
        until: Duration,
    },
    /// Its users are to be warned: it will be stopped at that time.
    Warn {
        /// When.
        until: Duration,
    },
    /// It is time, but something must not be cut off.
    Waits {
        /// What.
        busy: String,
    },
    /// Stop it now.
    Stop {
        /// For how long there was no work.
        idle: Duration,
    },
}

impl Record {
    /// Notes work. Late notes never turn time back.
    pub fn worked(&mut self, source: Source, at: Duration) {
        let last = self.work.entry(source).or_insert(at);
        *last = (*last).max(at);
    }

    /// Notes that something is open, or asks by itself.
    pub fn present(&mut self, source: Source, at: Duration) {
        if self.presence.is_none_or(|(_, last)| last <= at) {
            self.presence = Some((source, at));
        }
    }

    /// It is not stopped before then, whatever happens; `None` takes that back.
    pub fn keep(&mut self, until: Option<Duration>) {
        self.keep_until = until;
    }

    /// What the project declares to be at, each until a time at most. Replaces
    /// what it declared before; those beyond the first 64 don't count.
    pub fn declare(&mut self, jobs: BTreeMap<String, Duration>) {
        self.jobs = jobs.into_iter().take(JOBS_MAX).collect();
    }

    /// A new run begins: only what was promised to its users is left of the
    /// former one.
    pub fn started(&mut self, at: Duration) {
        let keep_until = self.keep_until;
        *self = Self { keep_until, ..Self::default() };
        self.worked(Source::Start, at);
    }

    /// The last work, and where.
    pub fn last_work(&self) -> Option<(Source, Duration)> {
        let last = self.work.iter().max_by_key(|(_, at)| **at);
        last.map(|(source, at)| (*source, *at))
    }

    /// The last presence, and where.
    pub fn last_presence(&self) -> Option<(Source, Duration)> {
        self.presence
    }

    /// When each kind of work was last seen.
    pub fn work(&self) -> &BTreeMap<Source, Duration> {
        &self.work
    }

    /// What it declares to be at, and until when.
    pub fn jobs(&self, now: Duration) -> impl Iterator<Item = (&str, Duration)> {
        let going = self.jobs.iter().filter(move |(_, until)| **until > now);
        going.map(|(name, until)| (name.as_str(), *until))
    }

    /// Until when it is kept, if that has not passed.
    pub fn kept(&self, now: Duration) -> Option<Duration> {
        self.keep_until.filter(|until| *until > now)
    }

    /// Whether its users were warned, and when it is to be stopped then.
    pub fn is_warned(&self) -> bool {
        self.warned.is_some()
    }

    /// When it will be idle for too long, as far as is known now; `None`: never.
    pub fn idle_at(&self, limits: &IdleLimits) -> Option<Duration> {
        let timeout = limits.timeout?;
        let worked = self.last_work().map_or(Duration::ZERO, |(_, at)| at);
        let mut at = worked.saturating_add(timeout);
        if let Some((_, present)) = self.presence {
            at = at.max(present.saturating_add(timeout).min(worked.saturating_add(limits.presence)));
        }
        let promised = self.jobs.values().copied().chain(self.keep_until);
        Some(promised.fold(at, Duration::max))
    }

    /// What is to be done now. A stop is only said after a warning that is old
    /// enough, whatever the clock did meanwhile, and only if there was no work
    /// since; the warning is taken back when there was.
    pub fn verdict(&mut self, circumstances: &Circumstances<'_>, now: Duration) -> Verdict {
        let limits = &circumstances.limits;
        let Some(idle_at) = self.idle_at(limits) else {
            self.warned = None;
            return Verdict::Never;
        };
        if now.saturating_add(limits.warning) < idle_at {
            self.warned = None;
            return Verdict::Runs { until: idle_at };
        }
        let warned = *self.warned.get_or_insert(now);
        let until = idle_at.max(warned.saturating_add(limits.warning));
        if now < until {
            return Verdict::Warn { until };
        }
        if let Some(busy) = circumstances.busy {
            return Verdict::Waits { busy: busy.to_owned() };
        }
        let worked = self.last_work().map_or(Duration::ZERO, |(_, at)| at);
        Verdict::Stop { idle: now.saturating_sub(worked) }
    }

    /// What outlives the daemon, as ages and remaining times.
    pub fn save(&self, now: Duration) -> Saved {
        let age = |at: &Duration| millis(now.saturating_sub(*at));
        let left = |until: &Duration| millis(until.saturating_sub(now));
        Saved {
            work: self.work.iter().map(|(source, at)| (*source, age(at))).collect(),
            presence: self.presence.map(|(source, at)| (source, age(&at))),
            keep_ms: self.kept(now).map(|until| left(&until)),
            jobs: self.jobs(now).map(|(name, until)| (name.to_owned(), left(&until))).collect(),
            warned_ms: self.warned.as_ref().map(age),
        }
    }

    /// Goes on from what was saved, `away` ago.
    pub fn restore(saved: &Saved, away: Duration, now: Duration) -> Self {
        let at = |age: &u64| now.saturating_sub(away.saturating_add(Duration::from_millis(*age)));
        let until = |left: &u64| now.saturating_add(Duration::from_millis(*left).saturating_sub(away));
        Self {
            work: saved.work.iter().map(|(source, age)| (*source, at(age))).collect(),
            presence: saved.presence.as_ref().map(|(source, age)| (*source, at(age))),
            keep_until: saved.keep_ms.as_ref().map(until),
            jobs: saved.jobs.iter().map(|(name, left)| (name.clone(), until(left))).take(JOBS_MAX).collect(),
            // Whoever was there to read it may have lost the connection with
            // the daemon: they are warned again.
            warned: None,
        }
    }
}

/// A [`Record`] on disk.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Saved {
    /// How long ago each kind of work was last seen, in milliseconds.
    #[serde(default)]
    pub work: BTreeMap<Source, u64>,
    /// The same of presence.
    #[serde(default)]
    pub presence: Option<(Source, u64)>,
    /// For how long it is still kept.
    #[serde(default)]
    pub keep_ms: Option<u64>,
    /// How long declared jobs still count.
    #[serde(default)]
    pub jobs: BTreeMap<String, u64>,
    /// How long ago its users were warned.
    #[serde(default)]
    pub warned_ms: Option<u64>,
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
