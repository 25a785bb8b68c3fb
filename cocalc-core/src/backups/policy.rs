//! What a project's owner wants of backups.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// How soon after a change, in seconds: five minutes to a week.
const RPO_SECS: std::ops::RangeInclusive<u32> = 300..=604_800;
/// The most of one kind, and of all.
const KIND_MAX: u16 = 400;
const ALL_MAX: u32 = 1_000;
/// The most patterns of what is left out, and the most bytes of all of them.
const EXCLUDES_MAX: usize = 100;
const EXCLUDES_BYTES_MAX: usize = 16 * 1024;

/// When a project is backed up, which backups are kept, and what is left out.
/// Valid by construction.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(try_from = "PolicyFields", into = "PolicyFields")]
pub struct Policy(PolicyFields);

/// The fields of a [`Policy`], not yet checked.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct PolicyFields {
    /// Whether it is backed up by itself, and old backups go by themselves.
    /// Without, what is there stays.
    pub enabled: bool,
    /// How long after a change it is backed up at the latest: what it may lose
    /// with its host. 300 to 604800.
    pub rpo_secs: u32,
    /// Of so many hours one is kept.
    pub hourly: u16,
    /// Of so many days one is kept.
    pub daily: u16,
    /// Of so many weeks, from Monday, one is kept.
    pub weekly: u16,
    /// Of so many months one is kept.
    pub monthly: u16,
    /// Of those that people asked for, so many are kept besides.
    pub manual: u16,
    /// Patterns, as in `.gitignore`, of what is left out.
    pub excludes: Vec<String>,
}

impl Default for PolicyFields {
    fn default() -> Self {
        Self {
            enabled: true,
            rpo_secs: 86_400,
            hourly: 6,
            daily: 7,
            weekly: 4,
            monthly: 6,
            manual: 10,
            excludes: Vec::new(),
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
        if !RPO_SECS.contains(&fields.rpo_secs) {
            return refuse("rpo_secs", "300 to 604800");
        }
        let kinds = fields.kinds();
        if let Some((field, _)) = kinds.iter().find(|(_, keep)| *keep > KIND_MAX) {
            return refuse(field, "at most 400");
        }
        if kinds.iter().map(|(_, keep)| u32::from(*keep)).sum::<u32>() > ALL_MAX {
            return refuse("hourly, daily, weekly, monthly, manual", "at most 1000 together");
        }
        if fields.excludes.len() > EXCLUDES_MAX
            || fields.excludes.iter().map(String::len).sum::<usize>() > EXCLUDES_BYTES_MAX
        {
            return refuse("excludes", "at most 100 patterns, and 16 KiB of them");
        }
        let bad = |pattern: &String| {
            pattern.trim().is_empty() || pattern.starts_with('!') || pattern.contains(char::is_control)
        };
        if fields.excludes.iter().any(bad) {
            return refuse(
                "excludes",
                "patterns of what is left out: none empty, none with `!` first, none of several lines",
            );
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
            ("hourly", self.hourly),
            ("daily", self.daily),
            ("weekly", self.weekly),
            ("monthly", self.monthly),
            ("manual", self.manual),
        ]
    }
}

impl Policy {
    /// Its fields.
    pub fn fields(&self) -> &PolicyFields {
        &self.0
    }

    /// How long after a change the project is backed up at the latest.
    pub fn rpo(&self) -> Duration {
        Duration::from_secs(self.0.rpo_secs.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        for (json, field) in [
            (r#"{"rpo_secs":299}"#, "rpo_secs"),
            (r#"{"rpo_secs":604801}"#, "rpo_secs"),
            (r#"{"hourly":401}"#, "hourly"),
            (r#"{"hourly":400,"daily":400,"weekly":400}"#, "together"),
            (r#"{"excludes":["!home"]}"#, "excludes"),
            (r#"{"excludes":[" "]}"#, "excludes"),
            (r#"{"excludes":["a\nb"]}"#, "excludes"),
            (r#"{"yearly":1}"#, "yearly"),
        ] {
            let error = serde_json::from_str::<Policy>(json).unwrap_err().to_string();
            assert!(error.contains(field), "{error}");
        }
        let many = PolicyFields { excludes: vec!["x".repeat(200); 100], ..PolicyFields::default() };
        assert_eq!(Policy::try_from(many).unwrap_err().field, "excludes");
        let policy: Policy = serde_json::from_str(r#"{"rpo_secs":900,"excludes":["*.tmp"]}"#).unwrap();
        assert_eq!((policy.rpo(), policy.fields().daily), (Duration::from_secs(900), 7));
        assert_eq!(serde_json::from_value::<Policy>(serde_json::to_value(&policy).unwrap()).unwrap(), policy);
    }
}
