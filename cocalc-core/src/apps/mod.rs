//! The apps of a project: what its file declares, and when each is started, stopped
//! and tried again. Pure, but for the trait [`Services`] of what runs them.
//!
//! They are started inside the project by its helper, which they outlive the
//! daemon with; the host decides by what it sees ([`Supervisor`]). A project can
//! tell lies about its apps, which harm nobody but itself.

mod backoff;
mod services;
mod supervisor;

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

pub use backoff::Backoff;
pub use services::{Service, ServiceList, ServiceOutput, Services};
pub use supervisor::{Action, AppState, AppStatus, Supervisor};

/// The name of an app: 1 to 32 of `a-z`, `0-9` and `-`, no `-` first or last.
#[derive(Clone, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct AppName(String);

/// Says that a text is no name of an app.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("not a name of an app: 1 to 32 of a-z, 0-9 and -, no - first or last")]
pub struct AppNameError;

impl FromStr for AppName {
    type Err = AppNameError;

    fn from_str(s: &str) -> Result<Self, AppNameError> {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        let good = (1..=32).contains(&s.len()) && s.chars().all(plain);
        let edges = s.starts_with('-') || s.ends_with('-');
        if good && !edges { Ok(Self(s.to_owned())) } else { Err(AppNameError) }
    }
}

impl TryFrom<String> for AppName {
    type Error = AppNameError;

    fn try_from(s: String) -> Result<Self, AppNameError> {
        s.parse()
    }
}

impl From<AppName> for String {
    fn from(name: AppName) -> Self {
        name.0
    }
}

impl AppName {
    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for AppName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a project declares of one app.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct App {
    /// A line for the user's shell.
    pub command: String,
    /// Where it listens, if it does.
    #[serde(default)]
    pub port: Option<u16>,
    /// It is ready when this path answers; default: when the port accepts.
    #[serde(default)]
    pub ready: Option<String>,
    /// When it is started again.
    #[serde(default)]
    pub restart: Restart,
    /// Whether viewers should see it. That they may is its owner's to say.
    #[serde(default)]
    pub viewable: bool,
}

/// When an app that has ended is started again.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Restart {
    /// Whenever it has ended.
    #[default]
    Always,
    /// Unless it ended with code 0.
    OnFailure,
    /// Never.
    Never,
}
