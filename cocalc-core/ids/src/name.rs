//! Names that people or schedules choose, restricted so that each is one safe
//! path component and one DNS-like label.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize};

use crate::ParseIdError;

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $kind:literal, $expected:literal, $valid:expr) => {
        $(#[$doc])*
        #[derive(Clone, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
        #[serde(transparent)]
        pub struct $name(Box<str>);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(s: &str) -> Result<Self, ParseIdError> {
                let valid: fn(&str) -> bool = $valid;
                if valid(s) {
                    Ok(Self(s.into()))
                } else {
                    Err(ParseIdError { kind: $kind, expected: $expected })
                }
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

name!(
    /// Names a snapshot within its project. Also a directory name, so it can
    /// contain no slash, no leading dot and no dash in front.
    SnapshotName,
    "snapshot name",
    "1 to 100 of a-z A-Z 0-9 . _ : + -, beginning with a letter or digit",
    |s| (1..=100).contains(&s.len())
        && s.as_bytes()[0].is_ascii_alphanumeric()
        && s.bytes().all(|b| b.is_ascii_alphanumeric() || b"._:+-".contains(&b))
);
name!(
    /// Another name of a project, unique within a federation, under which SSH
    /// reaches it; one label of a DNS name (RFC 1035, lower case). Nothing that
    /// can be the id of a project, and none of the names that mean something to
    /// SSH servers here.
    ProjectAlias,
    "project alias",
    "3 to 32 of a-z 0-9 -, beginning with a letter, not ending with -, not project-..., jump, or 32 hex digits",
    |s| (3..=32).contains(&s.len())
        && s.as_bytes()[0].is_ascii_lowercase()
        && !s.ends_with('-')
        && s.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !s.starts_with("project-")
        && s != "jump"
        && !(s.len() == 32 && s.bytes().all(|b| b.is_ascii_hexdigit()))
);
name!(
    /// Names a host or a proxy for people, unique within a federation; one
    /// label of a DNS name (RFC 1035, lower case).
    HostName,
    "host name",
    "1 to 40 of a-z 0-9 -, beginning with a letter, not ending with -",
    |s| (1..=40).contains(&s.len())
        && s.as_bytes()[0].is_ascii_lowercase()
        && !s.ends_with('-')
        && s.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn snapshot_names_are_single_path_components() {
        for good in ["a", "2026-11-22T10:00:00.000Z", "move-1.final", &"x".repeat(100)] {
            assert!(good.parse::<SnapshotName>().is_ok(), "{good}");
        }
        for bad in ["", ".", "..", ".hidden", "-rf", "a/b", "a\0b", "a b", "é", &"x".repeat(101)] {
            assert!(bad.parse::<SnapshotName>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn host_names_are_dns_labels() {
        assert!("alpha".parse::<HostName>().is_ok());
        for bad in ["", "Alpha", "-a", "a-", "1a", "a.b", "a_b"] {
            assert!(bad.parse::<HostName>().is_err(), "{bad:?}");
        }
    }
}
