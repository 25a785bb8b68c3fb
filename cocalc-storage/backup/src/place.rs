//! Where an operator keeps repositories, and how far the credentials reach
//! that are given out for one of them.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    location::{Gcs, GcsCredentials, Location, S3, Secret},
    name::RepositoryName,
    repositories::Access,
};

/// Where repositories are: what a master is configured with. What it gives out
/// for one repository is a [`Location`].
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", tag = "kind", deny_unknown_fields)]
pub enum Place {
    /// A directory that exists, with a repository in each of its directories.
    /// Whoever can write there can also delete: access is not told apart.
    Directory {
        /// Absolute path.
        path: PathBuf,
    },
    /// A bucket of S3.
    S3(S3Place),
    /// A bucket of Google Cloud Storage.
    Gcs(GcsPlace),
}

/// A bucket of S3 for repositories.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct S3Place {
    /// The bucket.
    pub bucket: String,
    /// What all keys begin with; may be empty.
    #[serde(default)]
    pub prefix: String,
    /// The region, for instance `eu-central-1`.
    pub region: String,
    /// Another server than Amazon's.
    #[serde(default)]
    pub endpoint: Option<String>,
    /// What is given out.
    pub credentials: S3Access,
}

/// What is given out for a repository in S3.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", tag = "from", deny_unknown_fields)]
pub enum S3Access {
    /// Keys that the operator made, one for each access. They stay valid, and
    /// reach every repository of the place.
    Keys {
        /// For listing and restoring.
        read: S3Keys,
        /// For backing up.
        append: S3Keys,
        /// For forgetting, pruning and erasing.
        delete: S3Keys,
    },
    /// Session credentials of a role, made for each repository and access by
    /// `sts:AssumeRole` with a policy that reaches that repository only.
    Role {
        /// Whose keys may assume the role.
        keys: S3Keys,
        /// The role, which may do everything with the bucket.
        role_arn: String,
        /// Another server than Amazon's of the region.
        #[serde(default)]
        sts_endpoint: Option<String>,
        /// How long they are valid: 900 to 43,200 seconds. Default: an hour.
        #[serde(default = "hour")]
        life_secs: u32,
    },
}

/// A long-lived key of S3.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct S3Keys {
    /// Whose requests these are.
    pub access_key_id: String,
    /// What signs them.
    pub secret_access_key: Secret,
}

/// A bucket of Google Cloud Storage for repositories.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct GcsPlace {
    /// The bucket.
    pub bucket: String,
    /// What all names begin with; may be empty.
    #[serde(default)]
    pub prefix: String,
    /// Another server than Google's.
    #[serde(default)]
    pub endpoint: Option<String>,
    /// What is given out.
    pub credentials: GcsAccess,
}

/// What is given out for a repository in Google Cloud Storage.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", tag = "from", deny_unknown_fields)]
pub enum GcsAccess {
    /// Service accounts that the operator made, one for each access. Their keys
    /// stay valid, and reach every repository of the place.
    Accounts {
        /// For listing and restoring.
        read: Secret,
        /// For backing up.
        append: Secret,
        /// For forgetting, pruning and erasing.
        delete: Secret,
    },
    /// Tokens of at most an hour, made for each repository and access by
    /// exchanging one of this service account for one that reaches that
    /// repository only.
    Scoped {
        /// The key of an account that may do everything with the bucket.
        account: Secret,
        /// Another server than Google's for the exchange.
        #[serde(default)]
        sts_endpoint: Option<String>,
    },
    /// Nothing: an emulator.
    Anonymous,
}

fn hour() -> u32 {
    3600
}

/// Short-lived credentials that are still to be made: what the worker is asked
/// for.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Mint {
    /// For what.
    pub scope: Scope,
    /// With what.
    pub from: Place,
}

/// What credentials reach.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Scope {
    /// The bucket.
    pub bucket: String,
    /// The prefix, without `/` at either end.
    pub prefix: String,
    /// For what.
    pub access: Access,
}

/// What a place gives out for a repository.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Given {
    /// This.
    Location(Location),
    /// What has to be made first.
    Mint(Mint),
}

impl Place {
    /// The place of the repository called `name`, for `access`.
    pub fn give(&self, name: RepositoryName, access: Access) -> Given {
        match self {
            Self::Directory { path } => {
                Given::Location(Location::Directory { path: path.join(name.to_string()) })
            }
            Self::S3(place) => {
                let keys = match &place.credentials {
                    S3Access::Role { .. } => return self.mint(&place.bucket, &place.prefix, name, access),
                    S3Access::Keys { read, append, delete } => per_access(access, read, append, delete),
                };
                Given::Location(Location::S3(S3 {
                    bucket: place.bucket.clone(),
                    prefix: below(&place.prefix, name),
                    region: place.region.clone(),
                    endpoint: place.endpoint.clone(),
                    access_key_id: keys.access_key_id.clone(),
                    secret_access_key: keys.secret_access_key.clone(),
                    session_token: None,
                }))
            }
            Self::Gcs(place) => {
                let credentials = match &place.credentials {
                    GcsAccess::Scoped { .. } => return self.mint(&place.bucket, &place.prefix, name, access),
                    GcsAccess::Anonymous => GcsCredentials::Anonymous,
                    GcsAccess::Accounts { read, append, delete } => {
                        GcsCredentials::ServiceAccount(per_access(access, read, append, delete).clone())
                    }
                };
                Given::Location(Location::Gcs(Gcs {
                    bucket: place.bucket.clone(),
                    prefix: below(&place.prefix, name),
                    endpoint: place.endpoint.clone(),
                    credentials,
                }))
            }
        }
    }

    fn mint(&self, bucket: &str, prefix: &str, name: RepositoryName, access: Access) -> Given {
        let scope = Scope { bucket: bucket.to_owned(), prefix: below(prefix, name), access };
        Given::Mint(Mint { scope, from: self.clone() })
    }

    /// Where restic finds the repository called `name`: for escrow files, which
    /// hold no credentials of a cloud.
    pub fn shown(&self, name: RepositoryName) -> Location {
        match self {
            Self::Directory { path } => Location::Directory { path: path.join(name.to_string()) },
            Self::S3(place) => Location::S3(S3 {
                bucket: place.bucket.clone(),
                prefix: below(&place.prefix, name),
                region: place.region.clone(),
                endpoint: place.endpoint.clone(),
                access_key_id: String::new(),
                secret_access_key: Secret::default(),
                session_token: None,
            }),
            Self::Gcs(place) => Location::Gcs(Gcs {
                bucket: place.bucket.clone(),
                prefix: below(&place.prefix, name),
                endpoint: place.endpoint.clone(),
                credentials: GcsCredentials::Anonymous,
            }),
        }
    }
}

fn per_access<'a, T>(access: Access, read: &'a T, append: &'a T, delete: &'a T) -> &'a T {
    match access {
        Access::Read => read,
        Access::Append => append,
        Access::Delete => delete,
    }
}

fn below(prefix: &str, name: RepositoryName) -> String {
    match prefix.trim_matches('/') {
        "" => name.to_string(),
        prefix => format!("{prefix}/{name}"),
    }
}

impl Scope {
    /// The policy of a session of S3 that reaches this and nothing else.
    ///
    /// Appending is adding only: a request to write must say that nothing may be
    /// there yet, so that whoever holds it can change nothing.
    pub fn s3_policy(&self) -> Value {
        let bucket = format!("arn:aws:s3:::{}", self.bucket);
        let objects = format!("{bucket}/{}/*", self.prefix);
        let mut statements = vec![
            json!({
                "Effect": "Allow",
                "Action": "s3:ListBucket",
                "Resource": bucket,
                "Condition": { "StringLike": { "s3:prefix": [format!("{}/*", self.prefix)] } },
            }),
            json!({ "Effect": "Allow", "Action": "s3:GetObject", "Resource": objects }),
        ];
        match self.access {
            Access::Read => {}
            Access::Append => statements.push(json!({
                "Effect": "Allow",
                "Action": "s3:PutObject",
                "Resource": objects,
                "Condition": { "Null": { "s3:if-none-match": "false" } },
            })),
            Access::Delete => statements.push(json!({
                "Effect": "Allow",
                "Action": ["s3:PutObject", "s3:DeleteObject"],
                "Resource": objects,
            })),
        }
        json!({ "Version": "2012-10-17", "Statement": statements })
    }

    /// The boundary of a token of Google Cloud Storage that reaches this and
    /// nothing else. Who may create objects may not overwrite them.
    pub fn gcs_boundary(&self) -> Value {
        let roles: &[&str] = match self.access {
            Access::Read => &["inRole:roles/storage.objectViewer"],
            Access::Append => &["inRole:roles/storage.objectViewer", "inRole:roles/storage.objectCreator"],
            Access::Delete => &["inRole:roles/storage.objectAdmin"],
        };
        let prefix = quoted(&format!("{}/", self.prefix));
        let object = quoted(&format!("projects/_/buckets/{}/objects/{}/", self.bucket, self.prefix));
        let listed = "api.getAttribute('storage.googleapis.com/objectListPrefix', '')";
        json!({ "accessBoundary": { "accessBoundaryRules": [{
            "availableResource": format!("//storage.googleapis.com/projects/_/buckets/{}", self.bucket),
            "availablePermissions": roles,
            "availabilityCondition": {
                "expression":
                    format!("resource.name.startsWith({object}) || {listed}.startsWith({prefix})"),
            },
        }] } })
    }
}

/// A text in the language of Google's conditions.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\\', r"\\").replace('\'', r"\'"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::name::ShardId;

    fn place() -> Place {
        serde_json::from_value(json!({
            "kind": "s3", "bucket": "b", "prefix": "/cocalc/", "region": "r",
            "credentials": {
                "from": "role", "role_arn": "arn:aws:iam::1:role/x",
                "keys": { "access_key_id": "id", "secret_access_key": "secret" },
            },
        }))
        .unwrap()
    }

    #[test]
    fn a_scope_reaches_one_repository_and_appending_changes_nothing() {
        let Given::Mint(mint) = place().give(ShardId(3).into(), Access::Append) else { panic!() };
        assert_eq!(mint.scope.prefix, "cocalc/shard-3");
        let policy = mint.scope.s3_policy().to_string();
        assert!(policy.contains("arn:aws:s3:::b/cocalc/shard-3/*") && !policy.contains("DeleteObject"));
        assert!(policy.contains(r#""s3:if-none-match":"false""#), "{policy}");
        // One shard's prefix is not the beginning of another's.
        assert!(!policy.contains("shard-3*"), "{policy}");
        let boundary = mint.scope.gcs_boundary().to_string();
        assert!(boundary.contains("objects/cocalc/shard-3/'") && !boundary.contains("objectAdmin"));
        let read = Scope { access: Access::Read, ..mint.scope.clone() };
        assert!(!read.s3_policy().to_string().contains("PutObject"));
        assert!(!read.gcs_boundary().to_string().contains("Creator"));
        let delete = Scope { access: Access::Delete, ..mint.scope };
        assert!(delete.s3_policy().to_string().contains("DeleteObject"));
    }

    #[test]
    fn what_is_wrong_in_a_configuration_is_named() {
        let wrong = json!({ "kind": "directory", "path": "/srv", "pth": 1 });
        let error = serde_json::from_value::<Place>(wrong).unwrap_err().to_string();
        assert!(error.contains("pth"), "{error}");
        assert!(!format!("{:?}", place()).contains("secret\""), "{:?}", place());
        assert_eq!(
            place().shown(ShardId(1).into()).restic(),
            "s3:https://s3.r.amazonaws.com/b/cocalc/shard-1"
        );
    }
}
