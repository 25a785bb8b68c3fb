//! How a host comes by images, and when they go.

use std::{path::PathBuf, time::Duration};

use cocalc_core::images::Policy;
use cocalc_storage::ImageLimits;
use serde::Deserialize;

/// How a host comes by images, and when they go.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq)]
#[serde(default, deny_unknown_fields)]
pub struct ImageSettings {
    /// Credentials per registry, a file as `podman login --authfile` writes it.
    /// Default: none.
    pub auth_file: Option<PathBuf>,
    /// Registries that are spoken to without TLS, as `host:port`. Default: none.
    pub insecure_registries: Vec<String>,
    /// The directory whose archives administrators may import. Default: none.
    pub import_dir: Option<PathBuf>,
    /// Bytes that an image may have. Default: 32 GiB.
    pub bytes_max: u64,
    /// Names that an image may have. Default: two million.
    pub names_max: u64,
    /// An image goes when no project of this host has had it for so many days.
    /// Default: 30.
    pub unused_days: u32,
    /// What stays free on the volume while images come, in bytes: what would take it
    /// is broken off, and goes. Default: 256 MiB.
    pub reserve_bytes: u64,
    /// Sooner, but never within a day, while less than this is free. Default: 4
    /// GiB.
    pub free_bytes_min: u64,
}

impl Default for ImageSettings {
    fn default() -> Self {
        let (limits, policy) = (ImageLimits::default(), Policy::default());
        Self {
            auth_file: None,
            insecure_registries: Vec::new(),
            import_dir: None,
            bytes_max: limits.bytes,
            names_max: limits.names,
            unused_days: 30,
            reserve_bytes: limits.free_bytes,
            free_bytes_min: policy.free_bytes_min,
        }
    }
}

impl ImageSettings {
    pub(crate) fn limits(&self) -> ImageLimits {
        ImageLimits { bytes: self.bytes_max, names: self.names_max, free_bytes: self.reserve_bytes }
    }

    pub(crate) fn policy(&self) -> Policy {
        let unused = Duration::from_secs(86_400) * self.unused_days;
        Policy { unused, free_bytes_min: self.free_bytes_min, ..Policy::default() }
    }

    pub(crate) fn validate(&self) -> Result<(), String> {
        if self.bytes_max < 1 << 20 || self.names_max == 0 {
            return Err("images.bytes_max: at least 1048576, and names_max at least 1".into());
        }
        if self.unused_days == 0 {
            return Err("images.unused_days: at least 1".into());
        }
        let relative = |path: &Option<PathBuf>| path.as_ref().is_some_and(|path| !path.is_absolute());
        if relative(&self.auth_file) || relative(&self.import_dir) {
            return Err("images.auth_file and images.import_dir: absolute paths".into());
        }
        Ok(())
    }
}
