//! What a project's owner wants of automatic snapshots.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The shortest and the longest interval.
const INTERVAL_SECS: std::ops::RangeInclusive<u32> = 60..=86_400;
/// The most of one kind, and of all: with more than about a hundred snapshots
/// of a volume Btrfs takes noticeably longer for each next one.
const KIND_MAX: u16 = 100;
const ALL_MAX: u32 = 200;
/// The most that may be charged for snapshots, in percent of the plan.
const ALLOWANCE_PERCENT_MAX: u16 = 1000;

/// When automatic snapshots are taken, how long they are kept, and how much
/// they may take beside the plan. Valid by construction.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(try_from = "PolicyFields", into = "PolicyFields")]
pub struct Policy(PolicyFields);

/// The fields of a [`Policy`], not yet checked.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct PolicyFields {
    /// Whether any are taken and deleted. Without, what is there stays.
    pub enabled: bool,
    /// How often one is taken, if anything has changed; 60 to 86400. Also the
    /// width of the finest period of which one is kept.
    pub interval_secs: u32,
    /// Of so many intervals one is kept.
    pub frequent: u16,
    /// Of so many hours one is kept.
    pub hourly: u16,
    /// Of so many days one is kept.
    pub daily: u16,
    /// Of so many weeks, from Monday, one is kept.
    pub weekly: u16,
    /// Of so many months one is kept.
    pub monthly: u16,
    /// How much the snapshots may take beyond the plan, in percent of it; at
    /// most 1000.
    pub allowance_percent: u16,
}

impl Default for PolicyFields {
    fn default() -> Self {
        Self {
            enabled: true,
            interval_secs: 900,
            frequent: 4,
            hourly: 24,
            daily: 7,
            weekly: 4,
            monthly: 6,
            allowance_percent: 50,
        }
    }
}

/// Says which field of a policy cannot be.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{field}: {expected}")]
#[non_exhaustive]
pub struct PolicyError {
    /// The field at fault.
    pub field: &'static str,
    /// What it may be.
    pub expected: &'static str,
}

impl TryFrom<PolicyFields> for Policy {
    type Error = PolicyError;

    fn try_from(fields: PolicyFields) -> Result<Self, PolicyError> {
        let refuse = |field, expected| Err(PolicyError { field, expected });
        if !INTERVAL_SECS.contains(&fields.interval_secs) {
            return refuse("interval_secs", "60 to 86400");
        }
        let kinds = fields.kinds();
        if let Some((field, _)) = kinds.iter().find(|(_, keep)| *keep > KIND_MAX) {
            return refuse(field, "at most 100");
        }
        if kinds.iter().map(|(_, keep)| u32::from(*keep)).sum::<u32>() > ALL_MAX {
            return refuse("frequent, hourly, daily, weekly, monthly", "at most 200 together");
        }
        if fields.allowance_percent > ALLOWANCE_PERCENT_MAX {
            return refuse("allowance_percent", "at most 1000");
        }
        Ok(Self(fields))
    }
}

impl From<Policy> for PolicyFields {
    fn from(policy: Policy) -> Self {
        policy.0
    }
}

impl PolicyFields {
    fn kinds(&self) -> [(&'static str, u16); 5] {
        [
            ("frequent", self.frequent),
            ("hourly", self.hourly),
            ("daily", self.daily),
            ("weekly", self.weekly),
            ("monthly", self.monthly),
        ]
    }
}

impl Policy {
    /// Its fields.
    pub fn fields(&self) -> &PolicyFields {
        &self.0
    }

    /// How often a snapshot is taken.
    pub fn interval(&self) -> Duration {
        Duration::from_secs(self.0.interval_secs.into())
    }

    /// The most snapshots that it keeps, beside those of people and those of
    /// times to come.
    pub fn kept_max(&self) -> usize {
        self.0.kinds().iter().map(|(_, keep)| usize::from(*keep)).sum::<usize>().max(1)
    }

    /// What is allowed beyond a plan of this size, for snapshots.
    pub fn allowance_bytes(&self, plan_bytes: u64) -> u64 {
        let bytes = u128::from(plan_bytes) * u128::from(self.0.allowance_percent) / 100;
        u64::try_from(bytes).unwrap_or(u64::MAX)
    }

    /// The limit of live volume and snapshots together, for a plan of this size.
    pub fn limit_bytes(&self, plan_bytes: u64) -> u64 {
        plan_bytes.saturating_add(self.allowance_bytes(plan_bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        for (json, field) in [
            (r#"{"interval_secs":59}"#, "interval_secs"),
            (r#"{"hourly":101}"#, "hourly"),
            (r#"{"hourly":100,"daily":100,"weekly":1}"#, "together"),
            (r#"{"allowance_percent":1001}"#, "allowance_percent"),
            (r#"{"yearly":1}"#, "yearly"),
        ] {
            let error = serde_json::from_str::<Policy>(json).unwrap_err().to_string();
            assert!(error.contains(field), "{error}");
        }
        let policy: Policy = serde_json::from_str(r#"{"frequent":0}"#).unwrap();
        assert_eq!((policy.fields().frequent, policy.fields().hourly), (0, 24));
        assert_eq!(serde_json::from_value::<Policy>(serde_json::to_value(policy).unwrap()).unwrap(), policy);
    }

    #[test]
    fn the_limit_is_the_plan_and_half_of_it() {
        let policy = Policy::default();
        assert_eq!(policy.limit_bytes(10 << 30), 15 << 30);
        assert_eq!(policy.limit_bytes(u64::MAX), u64::MAX);
        assert_eq!(policy.kept_max(), 45);
    }
}
