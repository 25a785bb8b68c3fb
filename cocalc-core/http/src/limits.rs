//! How much and how long.

use std::time::Duration;

use serde::Deserialize;

/// Bounds of an ingress. Every wait is bounded and every queue sized; the
/// defaults suit one busy machine.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Connections at a time, WebSockets among them. Default: 20,000. More wait
    /// in the listen queue.
    pub connections: usize,
    /// Connections at a time from one source address (IPv6: one /64 network).
    /// Default: 1,000. More are closed at once.
    pub connections_per_source: u32,
    /// Denied credentials at once from one source address (IPv6: one /64
    /// network), counted where they are denied. Beyond, every request of it for
    /// a project is 429 `rate_limited`. What a trusted proxy passes on counts
    /// for the user's address. Default: 200: an office may share one address.
    pub failures_per_source: u32,
    /// After how long one of them is forgiven. Default: 50 ms.
    pub failure_recovery: Duration,
    /// Bytes of a request's or response's head. Default: 64 KiB; at least
    /// 8 KiB.
    pub head_bytes: usize,
    /// From the end of a request to the whole head of the next. Default: 60 s.
    pub head_timeout: Duration,
    /// To connect to an app, or to a host. Default: 5 s.
    pub connect_timeout: Duration,
    /// From the end of a request to the whole head of its response. Default:
    /// 5 min. A proxy waits longer for a host, by as much as that may need before
    /// it asks the app.
    pub response_timeout: Duration,
    /// Without a byte of a request's body. Default: 60 s.
    pub body_idle: Duration,
    /// Without a byte in either direction of a WebSocket. Default: 2 h; dead
    /// peers are noticed sooner, by TCP keepalive.
    pub websocket_idle: Duration,
    /// Requests that wait while moves cut over. Default: 1,000.
    pub parked: usize,
    /// How long each of them waits. Default: 30 s.
    pub parked_wait: Duration,
    /// How long open connections may go on at shutdown. Default: 10 s.
    pub drain: Duration,
    /// Idle connections kept to one app or host. Default: 64.
    pub idle_per_target: usize,
    /// Idle connections kept in all. Default: 2,048.
    pub idle_total: usize,
    /// How long an idle connection is kept. Default: 30 s.
    pub idle_for: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 20_000,
            connections_per_source: 1_000,
            failures_per_source: 200,
            failure_recovery: Duration::from_millis(50),
            head_bytes: 64 * 1024,
            head_timeout: Duration::from_secs(60),
            connect_timeout: Duration::from_secs(5),
            response_timeout: Duration::from_secs(300),
            body_idle: Duration::from_secs(60),
            websocket_idle: Duration::from_secs(7200),
            parked: 1_000,
            parked_wait: Duration::from_secs(30),
            drain: Duration::from_secs(10),
            idle_per_target: 64,
            idle_total: 2_048,
            idle_for: Duration::from_secs(30),
        }
    }
}

/// The table `[http]` of a host's or a proxy's configuration: those of the
/// [`Limits`] that are of bytes and waits.
///
/// Proxies must keep idle connections to hosts (`idle_secs`) for less time than
/// hosts keep those of their clients (`head_secs`).
#[derive(Clone, Debug, Deserialize, Eq, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct HttpSettings {
    /// [`Limits::head_bytes`], 8,192 to 1,048,576. Default: 65,536.
    pub head_bytes: u32,
    /// [`Limits::head_timeout`], in seconds, 1 to 604,800, as all of these.
    /// Default: 60.
    pub head_secs: u32,
    /// [`Limits::connect_timeout`]. Default: 5.
    pub connect_secs: u32,
    /// [`Limits::response_timeout`]. Default: 300.
    pub response_secs: u32,
    /// [`Limits::body_idle`]. Default: 60.
    pub body_idle_secs: u32,
    /// [`Limits::websocket_idle`]. Default: 7,200.
    pub websocket_idle_secs: u32,
    /// [`Limits::parked`], 1 to 1,000,000. Default: 1,000.
    pub parked: u32,
    /// [`Limits::parked_wait`]. Default: 30.
    pub parked_secs: u32,
    /// [`Limits::idle_per_target`], 0 to 1,000,000. Default: 64.
    pub idle_per_target: u32,
    /// [`Limits::idle_total`], 0 to 1,000,000. Default: 2,048.
    pub idle_total: u32,
    /// [`Limits::idle_for`]. Default: 30.
    pub idle_secs: u32,
}

impl Default for HttpSettings {
    fn default() -> Self {
        Self {
            head_bytes: 64 * 1024,
            head_secs: 60,
            connect_secs: 5,
            response_secs: 300,
            body_idle_secs: 60,
            websocket_idle_secs: 7200,
            parked: 1_000,
            parked_secs: 30,
            idle_per_target: 64,
            idle_total: 2_048,
            idle_secs: 30,
        }
    }
}

impl HttpSettings {
    /// Finds a value that is none.
    ///
    /// # Errors
    ///
    /// Naming the key at fault, and what it may be.
    pub fn validate(&self) -> Result<(), String> {
        const WAITS: (u32, u32) = (1, 604_800);
        const COUNTS: (u32, u32) = (0, 1_000_000);
        for (name, value, (least, most)) in [
            ("head_bytes", self.head_bytes, (8 * 1024, 1024 * 1024)),
            ("head_secs", self.head_secs, WAITS),
            ("connect_secs", self.connect_secs, WAITS),
            ("response_secs", self.response_secs, WAITS),
            ("body_idle_secs", self.body_idle_secs, WAITS),
            ("websocket_idle_secs", self.websocket_idle_secs, WAITS),
            ("parked", self.parked, (1, COUNTS.1)),
            ("parked_secs", self.parked_secs, WAITS),
            ("idle_per_target", self.idle_per_target, COUNTS),
            ("idle_total", self.idle_total, COUNTS),
            ("idle_secs", self.idle_secs, WAITS),
        ] {
            if !(least..=most).contains(&value) {
                return Err(format!("http.{name}: {value} is not {least} to {most}"));
            }
        }
        Ok(())
    }

    /// `others` with these.
    pub fn limits(&self, others: Limits) -> Limits {
        let secs = |secs: u32| Duration::from_secs(secs.into());
        let size = |size: u32| usize::try_from(size).unwrap_or(usize::MAX);
        Limits {
            head_bytes: size(self.head_bytes),
            head_timeout: secs(self.head_secs),
            connect_timeout: secs(self.connect_secs),
            response_timeout: secs(self.response_secs),
            body_idle: secs(self.body_idle_secs),
            websocket_idle: secs(self.websocket_idle_secs),
            parked: size(self.parked),
            parked_wait: secs(self.parked_secs),
            idle_per_target: size(self.idle_per_target),
            idle_total: size(self.idle_total),
            idle_for: secs(self.idle_secs),
            ..others
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_say_nothing_change_nothing() {
        let settings = HttpSettings::default();
        settings.validate().unwrap();
        let unchanged = format!("{:?}", Limits::default());
        assert_eq!(format!("{:?}", settings.limits(Limits::default())), unchanged);
    }

    #[test]
    fn a_value_that_is_none_is_named() {
        let none = [
            HttpSettings { head_bytes: 100, ..HttpSettings::default() },
            HttpSettings { head_secs: 0, ..HttpSettings::default() },
            HttpSettings { parked: 0, ..HttpSettings::default() },
            HttpSettings { idle_total: 1_000_001, ..HttpSettings::default() },
        ];
        for (settings, name) in none.iter().zip(["head_bytes", "head_secs", "parked", "idle_total"]) {
            assert!(settings.validate().unwrap_err().starts_with(&format!("http.{name}: ")), "{name}");
        }
    }
}
