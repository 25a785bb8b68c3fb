//! How much one user, one address and all of them together may ask of a host.

use std::time::Duration;

use cocalc_auth::limit::Quota;
use cocalc_auth_live::AuthLimits;
use serde::Deserialize;

/// The table `[limits]`; each key is also `COCALC_HOST_LIMITS_<KEY>`. Rates are
/// of credentials and decisions: every HTTP request is one, every SSH login and
/// every stream that is opened.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct HostLimits {
    /// From one source address (IPv6: one /64 network), a second. An office may
    /// share one. Default: 500.
    pub source_per_sec: u32,
    /// At once. Default: 5,000.
    pub source_burst: u32,
    /// By one account, a second. Default: 500.
    pub account_per_sec: u32,
    /// At once. Default: 5,000.
    pub account_burst: u32,
    /// To one project, a second. Default: 2,000.
    pub project_per_sec: u32,
    /// At once. Default: 10,000.
    pub project_burst: u32,
    /// To the whole host, a second. Default: 20,000.
    pub host_per_sec: u32,
    /// At once. Default: 50,000.
    pub host_burst: u32,
    /// Denied credentials from one source address, at once; beyond, all of its
    /// requests wait. Default: 200.
    pub failures_burst: u32,
    /// After how many milliseconds one of them is forgiven. Default: 50.
    pub failure_recovery_ms: u32,
    /// HTTP connections at a time, and again as many of proxies. Default: 20,000.
    pub connections: u32,
    /// Of these, from one source address. Default: 1,000.
    pub connections_per_source: u32,
    /// SSH connections at a time. Default: 10,000.
    pub ssh_connections: u32,
    /// Of these, from one source address. Default: 256.
    pub ssh_connections_per_source: u32,
}

impl Default for HostLimits {
    fn default() -> Self {
        Self {
            source_per_sec: 500,
            source_burst: 5_000,
            account_per_sec: 500,
            account_burst: 5_000,
            project_per_sec: 2_000,
            project_burst: 10_000,
            host_per_sec: 20_000,
            host_burst: 50_000,
            failures_burst: 200,
            failure_recovery_ms: 50,
            connections: 20_000,
            connections_per_source: 1_000,
            ssh_connections: 10_000,
            ssh_connections_per_source: 256,
        }
    }
}

impl HostLimits {
    /// Finds a limit that would let nobody in, or is none.
    pub(crate) fn validate(&self) -> Result<(), String> {
        let Self {
            source_per_sec,
            source_burst,
            account_per_sec,
            account_burst,
            project_per_sec,
            project_burst,
            host_per_sec,
            host_burst,
            failures_burst,
            failure_recovery_ms,
            connections,
            connections_per_source,
            ssh_connections,
            ssh_connections_per_source,
        } = *self;
        cocalc_daemon::config::check_limits(&[
            ("source_per_sec", source_per_sec),
            ("source_burst", source_burst),
            ("account_per_sec", account_per_sec),
            ("account_burst", account_burst),
            ("project_per_sec", project_per_sec),
            ("project_burst", project_burst),
            ("host_per_sec", host_per_sec),
            ("host_burst", host_burst),
            ("failures_burst", failures_burst),
            ("failure_recovery_ms", failure_recovery_ms),
            ("connections", connections),
            ("connections_per_source", connections_per_source),
            ("ssh_connections", ssh_connections),
            ("ssh_connections_per_source", ssh_connections_per_source),
        ])
    }

    pub(crate) fn auth(&self) -> AuthLimits {
        AuthLimits {
            source: Quota::per_second(self.source_per_sec, self.source_burst),
            account: Quota::per_second(self.account_per_sec, self.account_burst),
            project: Quota::per_second(self.project_per_sec, self.project_burst),
            host: Quota::per_second(self.host_per_sec, self.host_burst),
        }
    }

    pub(crate) fn http(&self) -> cocalc_http::Limits {
        cocalc_http::Limits {
            connections: usize::try_from(self.connections).unwrap_or(usize::MAX),
            connections_per_source: self.connections_per_source,
            failures_per_source: self.failures_burst,
            failure_recovery: Duration::from_millis(self.failure_recovery_ms.into()),
            ..cocalc_http::Limits::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_those_of_the_parts() {
        let limits = HostLimits::default();
        limits.validate().unwrap();
        assert_eq!(format!("{:?}", limits.auth()), format!("{:?}", AuthLimits::default()));
        assert_eq!(format!("{:?}", limits.http()), format!("{:?}", cocalc_http::Limits::default()));
    }
}
