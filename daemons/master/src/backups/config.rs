//! Where backups go, with what credentials, and what is done to them when.

use std::path::{Path, PathBuf};

use cocalc_backup::Bounds;
use cocalc_core::backups::Policy;
use serde::Deserialize;

/// The `[backups]` table.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackupsConfig {
    /// What keeps the repositories.
    pub kind: PlaceKind,
    /// Of a directory: where each project has its repository. It must exist,
    /// and be the same files at the master and on every host.
    pub directory: Option<PathBuf>,
    /// Of a cloud: the bucket.
    pub bucket: Option<String>,
    /// Of a cloud: what all names begin with. Default: `cocalc`.
    #[serde(default = "prefix")]
    pub prefix: String,
    /// Of S3: the region.
    pub region: Option<String>,
    /// Of a cloud: another server than the usual one.
    pub endpoint: Option<String>,
    /// A program that prints short-lived credentials for one repository, as
    /// JSON: it is called with `append`, `read` or `delete`, the bucket, and
    /// the prefix that they must be good for and nothing else.
    pub credentials_command: Option<PathBuf>,
    /// A file with the credentials to add backups, which hosts get.
    pub append_credentials_file: Option<PathBuf>,
    /// A file with the credentials to read. Default: those to add.
    pub read_credentials_file: Option<PathBuf>,
    /// A file with the credentials to delete, which never leave the master.
    pub delete_credentials_file: Option<PathBuf>,
    /// Says that hosts may get credentials from a file, which are good for the
    /// repositories of all projects, not only of their own. Default: no.
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

fn prefix() -> String {
    "cocalc".to_owned()
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

/// What keeps repositories.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "lowercase")]
pub enum PlaceKind {
    /// A directory.
    Directory,
    /// Amazon S3, or what speaks its protocol.
    S3,
    /// Google Cloud Storage.
    Gcs,
}

/// Ten years, in hours.
const HOURS_MAX: u32 = 10 * 366 * 24;

impl BackupsConfig {
    /// Backups in a directory, with defaults, for embedders and tests.
    pub fn in_directory(directory: impl Into<PathBuf>) -> Self {
        Self {
            kind: PlaceKind::Directory,
            directory: Some(directory.into()),
            bucket: None,
            prefix: prefix(),
            region: None,
            endpoint: None,
            credentials_command: None,
            append_credentials_file: None,
            read_credentials_file: None,
            delete_credentials_file: None,
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
        match self.kind {
            PlaceKind::Directory => {
                match &self.directory {
                    None => return refuse("directory", "is needed for kind = \"directory\""),
                    Some(path) if !plain(path) => return refuse("directory", "an absolute path, without .."),
                    Some(_) => {}
                }
                if let Some(key) = self.of_clouds() {
                    return refuse(key, "means nothing for kind = \"directory\"; remove the key");
                }
            }
            PlaceKind::S3 | PlaceKind::Gcs => {
                if self.directory.is_some() {
                    return refuse("directory", "means nothing for a cloud; remove the key");
                }
                match self.bucket.as_deref() {
                    None | Some("") => return refuse("bucket", "is needed"),
                    Some(bucket) if bucket.contains('/') => {
                        return refuse("bucket", "only its name; what comes after it is the prefix");
                    }
                    Some(_) => {}
                }
                if self.kind == PlaceKind::S3 && self.region.as_deref().is_none_or(str::is_empty) {
                    return refuse("region", "is needed for S3, for instance eu-central-1");
                }
                if self.kind == PlaceKind::Gcs && self.region.is_some() {
                    return refuse("region", "means nothing for Google Cloud Storage; remove the key");
                }
                self.validate_credentials()?;
            }
        }
        if self.prefix.starts_with('/') || self.prefix.ends_with('/') || self.prefix.contains("//") {
            return refuse("prefix", "no / at either end, and no two in a row");
        }
        if let Some(endpoint) = &self.endpoint
            && !endpoint.starts_with("https://")
            && !endpoint.starts_with("http://")
        {
            return refuse("endpoint", "begins with neither http:// nor https://");
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

    fn validate_credentials(&self) -> Result<(), String> {
        let refuse = |key: &str, why: &str| Err(format!("backups.{key}: {why}"));
        if let Some(program) = &self.credentials_command {
            if !program.is_absolute() {
                return refuse("credentials_command", "an absolute path");
            }
            let files = [
                ("append_credentials_file", &self.append_credentials_file),
                ("read_credentials_file", &self.read_credentials_file),
                ("delete_credentials_file", &self.delete_credentials_file),
            ];
            return match files.iter().find(|(_, file)| file.is_some()) {
                Some((key, _)) => refuse(key, "there is a credentials_command; remove one of them"),
                None => Ok(()),
            };
        }
        let Some(_) = &self.append_credentials_file else {
            return refuse(
                "credentials_command",
                "is needed for a cloud: what gives each host credentials for the repositories of its own projects; or set append_credentials_file and hosts_share_credentials",
            );
        };
        if !self.hosts_share_credentials {
            return refuse(
                "append_credentials_file",
                "every host would get credentials for the repositories of all projects. Set credentials_command instead, or hosts_share_credentials = true to accept it",
            );
        }
        if self.delete_credentials_file.is_none() {
            return refuse(
                "delete_credentials_file",
                "is needed to tidy up; those to add backups go to hosts and must not delete",
            );
        }
        Ok(())
    }

    /// The first key that only means something for a cloud.
    fn of_clouds(&self) -> Option<&'static str> {
        [
            ("bucket", self.bucket.is_some()),
            ("region", self.region.is_some()),
            ("endpoint", self.endpoint.is_some()),
            ("credentials_command", self.credentials_command.is_some()),
            ("append_credentials_file", self.append_credentials_file.is_some()),
            ("read_credentials_file", self.read_credentials_file.is_some()),
            ("delete_credentials_file", self.delete_credentials_file.is_some()),
            ("hosts_share_credentials", self.hosts_share_credentials),
        ]
        .into_iter()
        .find(|(_, set)| *set)
        .map(|(key, _)| key)
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
        let directory = "kind = 'directory'\ndirectory = '/srv/backups'\n";
        let s3 = "kind = 's3'\nbucket = 'b'\nregion = 'r'\n";
        assert_eq!(parse(directory).unwrap().policy, Policy::default());
        parse(&format!("{s3}credentials_command = '/usr/bin/mint'")).unwrap();
        let shared = "append_credentials_file = '/a'\ndelete_credentials_file = '/d'\n";
        parse(&format!("{s3}{shared}hosts_share_credentials = true")).unwrap();
        parse("kind = 'gcs'\nbucket = 'b'\ncredentials_command = '/usr/bin/mint'").unwrap();
        for (text, key) in [
            ("kind = 'directory'".to_owned(), "backups.directory"),
            ("kind = 'directory'\ndirectory = 'srv'".to_owned(), "backups.directory"),
            ("kind = 'directory'\ndirectory = '/srv/../etc'".to_owned(), "backups.directory"),
            (format!("{directory}bucket = 'b'"), "backups.bucket"),
            (format!("{directory}jobs_max = 0"), "backups.jobs_max"),
            (format!("{directory}unneeded_hours = 12"), "backups.unneeded_hours"),
            (format!("{directory}check_hours = 0"), "backups.check_hours"),
            (format!("{directory}[policy]\nrpo_secs = 1"), "rpo_secs"),
            (format!("{directory}colour = 'blue'"), "colour"),
            ("kind = 'ftp'".to_owned(), "kind"),
            ("kind = 's3'\nregion = 'r'".to_owned(), "backups.bucket"),
            ("kind = 's3'\nbucket = 'b'".to_owned(), "backups.region"),
            (s3.to_owned(), "backups.credentials_command"),
            (format!("{s3}{shared}"), "backups.append_credentials_file"),
            (
                format!("{s3}append_credentials_file = '/a'\nhosts_share_credentials = true"),
                "backups.delete_credentials_file",
            ),
            (
                format!("{s3}credentials_command = '/m'\nread_credentials_file = '/r'"),
                "backups.read_credentials_file",
            ),
            (format!("{s3}credentials_command = '/m'\nprefix = '/x'"), "backups.prefix"),
            (format!("{s3}credentials_command = '/m'\nendpoint = 'ftp://x'"), "backups.endpoint"),
        ] {
            let error = parse(&text).unwrap_err();
            assert!(error.contains(key), "{text}: {error}");
        }
    }
}
