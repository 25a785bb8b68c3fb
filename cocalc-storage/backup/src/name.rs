//! What a repository is called.

use std::{fmt, str::FromStr};

use cocalc_core::ids::ProjectId;
use serde::{Deserialize, Serialize};

/// Names a repository: that of one project, or one that many share. It is a
/// part of a path or of an object's name, and what a wrapped key is bound to.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum RepositoryName {
    /// The repository of one project.
    Project(ProjectId),
    /// One that many share.
    Shard(ShardId),
}

/// Numbers the repositories that projects share, from 0.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(transparent)]
pub struct ShardId(pub u32);

impl From<ProjectId> for RepositoryName {
    fn from(project: ProjectId) -> Self {
        Self::Project(project)
    }
}

impl From<ShardId> for RepositoryName {
    fn from(shard: ShardId) -> Self {
        Self::Shard(shard)
    }
}

impl fmt::Display for RepositoryName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Project(project) => project.fmt(f),
            Self::Shard(ShardId(number)) => write!(f, "shard-{number}"),
        }
    }
}

impl FromStr for RepositoryName {
    type Err = ParseRepositoryNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parsed = match text.strip_prefix("shard-") {
            Some(number) => number.parse().ok().map(|number| Self::Shard(ShardId(number))),
            None => text.parse().ok().map(Self::Project),
        };
        // One spelling only: names become paths.
        parsed.filter(|name| name.to_string() == text).ok_or(ParseRepositoryNameError)
    }
}

/// Not the name of a repository.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("not the name of a repository: neither a project's id nor shard-N")]
pub struct ParseRepositoryNameError;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_one_spelling() {
        for text in ["shard-0", "shard-4294967295", "6f1c3f0e-8a35-4d8f-9a1e-2b7c4d5e6f70"] {
            assert_eq!(text.parse::<RepositoryName>().unwrap().to_string(), text);
        }
        for text in ["", "shard-", "shard-01", "shard-+1", "shard--1", "6F1C3F0E-8a35-4d8f-9a1e-2b7c4d5e6f70"]
        {
            assert_eq!(text.parse::<RepositoryName>(), Err(ParseRepositoryNameError), "{text:?}");
        }
    }
}
