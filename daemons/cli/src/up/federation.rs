//! `federation.json`: where everything is, for tools. A public contract.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::failure::{Failure, While};

#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(crate) struct Federation {
    pub(crate) master: Master,
    pub(crate) proxy: Proxy,
    pub(crate) hosts: Vec<Host>,
    pub(crate) project: Project,
}

#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(crate) struct Master {
    pub(crate) url: String,
    pub(crate) admin_token: String,
    pub(crate) pid: u32,
}

#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(crate) struct Proxy {
    pub(crate) url: String,
    /// `host:port`.
    pub(crate) ssh: String,
    pub(crate) pid: u32,
}

#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(crate) struct Host {
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) url: String,
    /// `host:port`.
    pub(crate) ssh: String,
    /// `btrfs` or `directory`.
    pub(crate) storage: String,
    pub(crate) volume: PathBuf,
    pub(crate) pid: u32,
}

#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(crate) struct Project {
    pub(crate) id: String,
}

impl Federation {
    fn path(dir: &Path) -> PathBuf {
        dir.join("federation.json")
    }

    /// Writes it into `dir`, whole or not at all, mode 0600: it holds the
    /// administrator's token.
    pub(crate) fn write(&self, dir: &Path) -> Result<(), Failure> {
        let bytes = serde_json::to_vec_pretty(self).during("cannot write federation.json")?;
        let path = Self::path(dir);
        cocalc_daemon::files::write_atomic(&path, &bytes).during(format!("cannot write {}", path.display()))
    }

    /// Removes it: nothing runs any more.
    pub(crate) fn remove(dir: &Path) {
        // Missing already is as good.
        let _ = std::fs::remove_file(Self::path(dir));
    }
}
