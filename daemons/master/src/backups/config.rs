//! Where backups go, with what credentials, and what is done to them when.

use std::path::{Path, PathBuf};

use cocalc_backup::{Bounds, GcsAccess, Place, S3Access};
use cocalc_core::backups::Policy;
use serde::Deserialize;

/// The `[backups]` table.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackupsConfig {
    /// What keeps the repositories, with what credentials: `[backups.place]`. A
    /// directory must exist, and be the same files at the master and on every
    /// host.
    pub place: Place,
    /// What keeps copies of them, from which damage is repaired. Default: none.
    pub mirror: Option<Place>,
    /// Whether each project has a repository and a key of its own. Default:
    /// yes.
    #[serde(default)]
    pub layout: Layout,
    /// How many projects share a repository, where they do; 1 to 10000.
    /// Default: 500.
    #[serde(default = "projects_per_shard")]
    pub projects_per_shard: u32,
    /// Says that hosts may get credentials that are good for the repositories
    /// of all projects, not only of their own: long-lived keys of a cloud.
    /// Default: no.
    #[serde(default)]
    pub hosts_share_credentials: bool,
    /// When projects are backed up, and which backups are kept, where their
    /// owners have said nothing.
    #[serde(default)]
    pub policy: Policy,
    /// The program `cocalc-backup-worker`. Default: beside this program.
    pub worker: Option<PathBuf>,
    /// How many jobs the master does at once: tidying up, checks, erasures; 1
    /// to 64. Default: 2.
    #[serde(default = "jobs_max")]
    pub jobs_max: u8,
    /// How often each repository is tidied up, in hours. Default: 24.
    #[serde(default = "prune_hours")]
    pub prune_hours: u32,
    /// How often each repository is checked, in hours. Default: a week.
    #[serde(default = "check_hours")]
    pub check_hours: u32,
    /// How often some project's newest backup is tried out, in hours, on the
    /// project's host. 0: never. Default: 24.
    #[serde(default = "drill_hours")]
    pub drill_hours: u32,
    /// How long the backups of a deleted project are kept, in hours. Default: a
    /// week.
    #[serde(default = "erase_after_hours")]
    pub erase_after_hours: u32,
    /// How long what no backup needs is kept before it is deleted, in hours:
    /// longer than a backup may take, which is 12. Default: 23.
    #[serde(default = "unneeded_hours")]
    pub unneeded_hours: u32,
}

fn projects_per_shard() -> u32 {
    500
}

fn jobs_max() -> u8 {
    2
}

fn prune_hours() -> u32 {
    24
}

fn check_hours() -> u32 {
    7 * 24
}

fn drill_hours() -> u32 {
    24
}

fn erase_after_hours() -> u32 {
    7 * 24
}

fn unneeded_hours() -> u32 {
    23
}

/// How projects are spread over repositories.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "snake_case")]
pub enum Layout {
    /// One for each project: nothing is shared, and with the project its key is
    /// erased.
    #[default]
    PerProject,
    /// Many projects in one, so that what they have in common is stored once.
    /// Whoever may back up one of them holds the key of all.
    Shared,
}

/// Ten years, in hours.
const HOURS_MAX: u32 = 10 * 366 * 24;

impl BackupsConfig {
    /// Backups in a directory, with defaults, for embedders and tests.
    pub fn in_directory(directory: impl Into<PathBuf>) -> Self {
        Self {
            place: Place::Directory { path: directory.into() },
            mirror: None,
            layout: Layout::default(),
            projects_per_shard: projects_per_shard(),
            hosts_share_credentials: false,
            policy: Policy::default(),
            worker: None,
            jobs_max: jobs_max(),
            prune_hours: prune_hours(),
            check_hours: check_hours(),
            drill_hours: drill_hours(),
            erase_after_hours: erase_after_hours(),
            unneeded_hours: unneeded_hours(),
        }
    }

    /// Finds what no single value shows, by the key at fault.
    pub(crate) fn validate(&self) -> Result<(), String> {
        let refuse = |key: &str, why: &str| Err(format!("backups.{key}: {why}"));
        self.validate_place("place", &self.place)?;
        if let Some(mirror) = &self.mirror {
            self.validate_place("mirror", mirror)?;
            if *mirror == self.place {
                return refuse("mirror", "is the place itself");
            }
        }
        if !(1..=10_000).contains(&self.projects_per_shard) {
            return refuse("projects_per_shard", "1 to 10000");
        }
        if let Some(worker) = &self.worker
            && !worker.is_absolute()
        {
            return refuse("worker", "an absolute path");
        }
        if !(1..=64).contains(&self.jobs_max) {
            return refuse("jobs_max", "1 to 64");
        }
        for (key, hours) in [("prune_hours", self.prune_hours), ("check_hours", self.check_hours)] {
            if !(1..=HOURS_MAX).contains(&hours) {
                return refuse(key, "1 to 87840, ten years");
            }
        }
        for (key, hours) in [("drill_hours", self.drill_hours), ("erase_after_hours", self.erase_after_hours)]
        {
            if hours > HOURS_MAX {
                return refuse(key, "at most 87840, ten years");
            }
        }
        let longest = Bounds::default().time_max.as_secs() / 3600;
        if u64::from(self.unneeded_hours) <= longest || self.unneeded_hours > HOURS_MAX {
            return refuse(
                "unneeded_hours",
                "13 to 87840: a backup may take 12 hours, and counts on what was there when it began",
            );
        }
        Ok(())
    }

    fn validate_place(&self, key: &str, place: &Place) -> Result<(), String> {
        let refuse = |part: &str, why: &str| Err(format!("backups.{key}.{part}: {why}"));
        let shared = |part: &str| {
            if self.hosts_share_credentials {
                return Ok(());
            }
            refuse(
                part,
                "every host would get credentials for the repositories of all projects. Let short-lived ones be made for each (from = \"role\" or \"scoped\"), or set backups.hosts_share_credentials = true to accept it",
            )
        };
        let (bucket, prefix, endpoint) = match place {
            Place::Directory { path } if plain(path) => return Ok(()),
            Place::Directory { .. } => return refuse("path", "an absolute path, without .."),
            Place::S3(s3) => {
                if s3.region.is_empty() {
                    return refuse("region", "is needed, for instance eu-central-1");
                }
                match &s3.credentials {
                    S3Access::Keys { append, delete, .. } => {
                        shared("credentials")?;
                        if append == delete {
                            return refuse(
                                "credentials.delete",
                                "those to add backups go to hosts and must not delete",
                            );
                        }
                    }
                    S3Access::Role { life_secs, .. } if !(900..=43_200).contains(life_secs) => {
                        return refuse("credentials.life_secs", "900 to 43200");
                    }
                    S3Access::Role { .. } => {}
                }
                (&s3.bucket, &s3.prefix, &s3.endpoint)
            }
            Place::Gcs(gcs) => {
                match &gcs.credentials {
                    GcsAccess::Accounts { append, delete, .. } => {
                        shared("credentials")?;
                        if append == delete {
                            return refuse(
                                "credentials.delete",
                                "those to add backups go to hosts and must not delete",
                            );
                        }
                    }
                    // Only an emulator takes nobody's requests.
                    GcsAccess::Anonymous if gcs.endpoint.is_none() => {
                        return refuse("credentials", "anonymous is for an emulator, which has an endpoint");
                    }
                    GcsAccess::Scoped { .. } | GcsAccess::Anonymous => {}
                }
                (&gcs.bucket, &gcs.prefix, &gcs.endpoint)
            }
        };
        if bucket.is_empty() || bucket.contains('/') {
            return refuse("bucket", "its name; what comes after it is the prefix");
        }
        if prefix.starts_with('/') || prefix.ends_with('/') || prefix.contains("//") {
            return refuse("prefix", "no / at either end, and no two in a row");
        }
        match endpoint {
            Some(url) if !url.starts_with("https://") && !url.starts_with("http://") => {
                refuse("endpoint", "begins with neither http:// nor https://")
            }
            _ => Ok(()),
        }
    }
}

/// An absolute path without steps upwards.
fn plain(path: &Path) -> bool {
    path.is_absolute() && path.components().all(|part| part != std::path::Component::ParentDir)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<BackupsConfig, String> {
        let config: BackupsConfig =
            cocalc_daemon::config::parse("backups", text, []).map_err(|error| error.to_string())?;
        config.validate().map(|()| config)
    }

    #[test]
    fn mistakes_are_named() {
        let directory = "[place]\nkind = 'directory'\npath = '/srv/backups'\n";
        let s3 = "[place]\nkind = 's3'\nbucket = 'b'\nregion = 'r'\n";
        let key = |id: &str| format!("{{ access_key_id = '{id}', secret_access_key = 's' }}");
        let role = format!("credentials = {{ from = 'role', role_arn = 'a', keys = {} }}\n", key("i"));
        let keys = |delete: &str| {
            format!(
                "credentials = {{ from = 'keys', read = {}, append = {}, delete = {} }}\n",
                key("r"),
                key("a"),
                key(delete)
            )
        };
        assert_eq!(parse(directory).unwrap().policy, Policy::default());
        parse(&format!("{s3}{role}")).unwrap();
        parse(&format!("hosts_share_credentials = true\n{s3}{}", keys("d"))).unwrap();
        parse("[place]\nkind = 'gcs'\nbucket = 'b'\ncredentials = { from = 'scoped', account = 'x' }")
            .unwrap();
        for (text, key) in [
            (String::new(), "place"),
            ("[place]\nkind = 'directory'".to_owned(), "path"),
            ("[place]\nkind = 'directory'\npath = 'srv'".to_owned(), "backups.place.path"),
            ("[place]\nkind = 'directory'\npath = '/srv/../etc'".to_owned(), "backups.place.path"),
            (format!("{directory}bucket = 'b'"), "bucket"),
            (format!("jobs_max = 0\n{directory}"), "backups.jobs_max"),
            (format!("unneeded_hours = 12\n{directory}"), "backups.unneeded_hours"),
            (format!("check_hours = 0\n{directory}"), "backups.check_hours"),
            (format!("projects_per_shard = 0\n{directory}"), "backups.projects_per_shard"),
            (format!("layout = 'heap'\n{directory}"), "layout"),
            (format!("{directory}[policy]\nrpo_secs = 1"), "rpo_secs"),
            (format!("colour = 'blue'\n{directory}"), "colour"),
            (format!("{directory}[mirror]\nkind = 'directory'\npath = '/srv/backups'"), "backups.mirror"),
            ("[place]\nkind = 'ftp'".to_owned(), "kind"),
            (s3.to_owned(), "credentials"),
            (format!("{s3}{}", keys("d")), "backups.place.credentials"),
            (
                format!("hosts_share_credentials = true\n{s3}{}", keys("a")),
                "backups.place.credentials.delete",
            ),
            (format!("{s3}prefix = '/x'\n{role}"), "backups.place.prefix"),
            (format!("{s3}endpoint = 'ftp://x'\n{role}"), "backups.place.endpoint"),
            (
                "[place]\nkind = 'gcs'\nbucket = 'b'\ncredentials = { from = 'anonymous' }".to_owned(),
                "backups.place.credentials",
            ),
        ] {
            let error = parse(&text).unwrap_err();
            assert!(error.contains(key), "{text}: {error}");
        }
    }
}
