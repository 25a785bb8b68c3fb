//! How much and how long.

use std::time::Duration;

/// Bounds of an ingress. Every wait is bounded and every queue sized; the
/// defaults suit one busy machine.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Connections at a time, WebSockets among them. Default: 20,000. More wait
    /// in the listen queue.
    pub connections: usize,
    /// Connections at a time from one source address. Default: 1,000. More
    /// are closed at once.
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
