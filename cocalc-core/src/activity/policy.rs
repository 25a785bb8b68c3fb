//! When idle projects are stopped.

use std::time::Duration;

use cocalc_ids::Timestamp;
use serde::{Deserialize, Serialize};

/// The longest idle time that can be set, in seconds: 30 days.
const SECS_MAX: u32 = 30 * 86_400;

/// What a host does about idle projects, and what it counts as use.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct IdlePolicy {
    /// After how many seconds without work a project is stopped, if neither
    /// its plan nor its owner says otherwise. Default: 0, never.
    pub timeout_secs: u32,
    /// For how many seconds after the last work an open page or terminal that
    /// nobody touches defers that. Default: 4 h.
    pub presence_secs: u32,
    /// How many seconds before, at least, users are warned. Default: 10 min.
    pub warning_secs: u32,
    /// From how many thousandths of a core on, averaged over a sample, a
    /// project's processes are at work. Default: 50.
    pub cpu_floor_millis: u32,
    /// From how many bytes a second on its own connections to elsewhere are
    /// work. Default: 16,384.
    pub network_floor_bytes: u32,
    /// How often CPU, network and declared jobs of running projects are looked
    /// at, in seconds. Default: 30.
    pub sample_secs: u32,
}

impl Default for IdlePolicy {
    fn default() -> Self {
        Self {
            timeout_secs: 0,
            presence_secs: 4 * 3600,
            warning_secs: 600,
            cpu_floor_millis: 50,
            network_floor_bytes: 16_384,
            sample_secs: 30,
        }
    }
}

/// Says what is wrong with a policy.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{field}: {value} is not {range}")]
pub struct PolicyError {
    field: &'static str,
    value: u32,
    range: &'static str,
}

impl IdlePolicy {
    /// Finds values that make no sense.
    ///
    /// # Errors
    ///
    /// Naming the field at fault.
    pub fn validate(&self) -> Result<(), PolicyError> {
        let wrong = |field, value, range| Err(PolicyError { field, value, range });
        for (field, value) in [("timeout_secs", self.timeout_secs), ("presence_secs", self.presence_secs)] {
            if value > SECS_MAX {
                return wrong(field, value, "0 to 2592000");
            }
        }
        if self.warning_secs > 86_400 {
            return wrong("warning_secs", self.warning_secs, "0 to 86400");
        }
        if !(1..=3600).contains(&self.sample_secs) {
            return wrong("sample_secs", self.sample_secs, "1 to 3600");
        }
        Ok(())
    }
}

/// What the plan and the owner of a project say. Travels with it.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct IdleSettings {
    /// The longest idle time of its plan, in seconds, 0 without end; `None` for
    /// its host's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plan_secs: Option<u32>,
    /// Its owner's wish, in seconds, 0 for never; as far as the plan permits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_secs: Option<u32>,
    /// Until when somebody wants it to run, in master time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_until: Option<Timestamp>,
}

impl IdleSettings {
    /// Finds values that make no sense.
    ///
    /// # Errors
    ///
    /// Naming the field at fault.
    pub fn validate(&self) -> Result<(), PolicyError> {
        for (field, value) in [("plan_secs", self.plan_secs), ("timeout_secs", self.timeout_secs)] {
            if let Some(value) = value.filter(|value| *value > SECS_MAX || (1..60).contains(value)) {
                return Err(PolicyError { field, value, range: "0 for never, or 60 to 2592000" });
            }
        }
        Ok(())
    }
}

/// What is in force for one project.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct IdleLimits {
    /// After how long without work it is stopped; `None`: never.
    pub timeout: Option<Duration>,
    /// For how long after the last work presence defers that.
    pub presence: Duration,
    /// How long before users are warned.
    pub warning: Duration,
}

impl IdleLimits {
    /// What follows from the host's policy and the project's settings: the
    /// owner's wish within the plan, and the host's default for what nobody said.
    pub fn new(policy: &IdlePolicy, settings: &IdleSettings) -> Self {
        let plan = settings.plan_secs.unwrap_or(policy.timeout_secs);
        let secs = match (settings.timeout_secs, plan) {
            (Some(own), 0) => own,
            (Some(own), plan) if own > 0 => own.min(plan),
            (_, plan) => plan,
        };
        let timeout = (secs > 0).then(|| Duration::from_secs(secs.into()));
        let warning = Duration::from_secs(policy.warning_secs.into());
        Self {
            timeout,
            presence: Duration::from_secs(policy.presence_secs.into()),
            // A project with a short idle time would be under warning for ever.
            warning: timeout.map_or(warning, |timeout| warning.min(timeout / 2)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_owner_decides_within_the_plan_and_the_host_for_who_says_nothing() {
        let secs = |host, plan, own| {
            let policy = IdlePolicy { timeout_secs: host, ..IdlePolicy::default() };
            let settings = IdleSettings { plan_secs: plan, timeout_secs: own, keep_until: None };
            IdleLimits::new(&policy, &settings).timeout.map(|timeout| timeout.as_secs())
        };
        assert_eq!(secs(0, None, None), None);
        assert_eq!(secs(1800, None, None), Some(1800));
        assert_eq!(secs(1800, Some(0), None), None, "a plan may be without end");
        assert_eq!(secs(1800, Some(7200), None), Some(7200));
        assert_eq!(secs(1800, None, Some(600)), Some(600));
        assert_eq!(secs(1800, None, Some(7200)), Some(1800), "never beyond the plan");
        assert_eq!(secs(1800, None, Some(0)), Some(1800));
        assert_eq!(secs(0, None, Some(600)), Some(600));
        assert_eq!(secs(0, Some(0), Some(0)), None);
    }

    #[test]
    fn a_warning_is_shorter_than_the_idle_time() {
        let policy = IdlePolicy { timeout_secs: 60, ..IdlePolicy::default() };
        assert_eq!(IdleLimits::new(&policy, &IdleSettings::default()).warning, Duration::from_secs(30));
    }

    #[test]
    fn nonsense_is_named() {
        assert!(IdlePolicy::default().validate().is_ok());
        let wrong = IdlePolicy { sample_secs: 0, ..IdlePolicy::default() };
        assert!(wrong.validate().unwrap_err().to_string().contains("sample_secs"));
        let wrong = IdleSettings { timeout_secs: Some(59), ..IdleSettings::default() };
        assert!(wrong.validate().unwrap_err().to_string().contains("timeout_secs"));
    }
}
