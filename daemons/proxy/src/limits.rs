//! How much one address and all of them together may ask of a proxy.

use std::time::Duration;

use cocalc_http::Limits;
use serde::Deserialize;

/// The table `[limits]`; each key is also `COCALC_PROXY_LIMITS_<KEY>`. Those keys
/// of a host's table that a proxy decides: rates of accounts and projects are the
/// hosts', who hear of each user's own address.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct ProxyLimits {
    /// Credentials of one source address (IPv6: one /64 network) that are denied
    /// here, at once; beyond, all of its requests wait. Default: 200.
    pub failures_burst: u32,
    /// After how many milliseconds one of them is forgiven. Default: 50.
    pub failure_recovery_ms: u32,
    /// HTTP connections at a time. Default: 20,000.
    pub connections: u32,
    /// Of these, from one source address. Default: 1,000.
    pub connections_per_source: u32,
    /// SSH connections at a time. Default: 10,000.
    pub ssh_connections: u32,
    /// Of these, from one source address. Default: 256.
    pub ssh_connections_per_source: u32,
}

impl Default for ProxyLimits {
    fn default() -> Self {
        Self {
            failures_burst: 200,
            failure_recovery_ms: 50,
            connections: 20_000,
            connections_per_source: 1_000,
            ssh_connections: 10_000,
            ssh_connections_per_source: 256,
        }
    }
}

impl ProxyLimits {
    /// Finds a limit that would let nobody in, or is none.
    pub(crate) fn validate(&self) -> Result<(), String> {
        let Self {
            failures_burst,
            failure_recovery_ms,
            connections,
            connections_per_source,
            ssh_connections,
            ssh_connections_per_source,
        } = *self;
        cocalc_daemon::config::check_limits(&[
            ("failures_burst", failures_burst),
            ("failure_recovery_ms", failure_recovery_ms),
            ("connections", connections),
            ("connections_per_source", connections_per_source),
            ("ssh_connections", ssh_connections),
            ("ssh_connections_per_source", ssh_connections_per_source),
        ])
    }

    pub(crate) fn http(&self) -> Limits {
        Limits {
            connections: usize::try_from(self.connections).unwrap_or(usize::MAX),
            connections_per_source: self.connections_per_source,
            failures_per_source: self.failures_burst,
            failure_recovery: Duration::from_millis(self.failure_recovery_ms.into()),
            ..Limits::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Config;

    const GOOD: &str = "name='p'\nmaster_url='http://127.0.0.1:1'\ndata_dir='/a'\nlisten='127.0.0.1:0'\n\
        ssh_listen='127.0.0.1:0'\n";

    fn parse(text: &str, variables: &[(&str, &str)]) -> Result<ProxyLimits, String> {
        let variables = variables
            .iter()
            .map(|(name, value)| (format!("COCALC_PROXY_LIMITS_{name}"), (*value).to_owned()));
        let config: Config =
            cocalc_daemon::config::parse("proxy", text, variables).map_err(|error| error.to_string())?;
        config.validate().map(|()| config.limits)
    }

    #[test]
    fn defaults_are_those_of_the_parts() {
        let limits = parse(GOOD, &[]).unwrap();
        assert_eq!(limits, ProxyLimits::default());
        assert_eq!(format!("{:?}", limits.http()), format!("{:?}", Limits::default()));
    }

    #[test]
    fn limits_are_configured_in_a_table_and_by_the_environment() {
        let text = format!("{GOOD}[limits]\nconnections_per_source = 7\n");
        let limits = parse(&text, &[("SSH_CONNECTIONS", "9")]).unwrap();
        let expected =
            ProxyLimits { connections_per_source: 7, ssh_connections: 9, ..ProxyLimits::default() };
        assert_eq!(limits, expected);
        for (line, key) in [("connections = 0", "limits.connections"), ("host_burst = 1", "host_burst")] {
            let error = parse(&format!("{GOOD}[limits]\n{line}\n"), &[]).unwrap_err();
            assert!(error.contains(key), "{error}");
        }
    }
}
