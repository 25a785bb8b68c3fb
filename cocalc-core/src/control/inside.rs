//! What the master asks of a host about the inside of a project that runs there.

use serde::{Deserialize, Serialize};

use crate::{
    apps::{AppName, AppStatus},
    runner::Stats,
    storage::Usage,
};

/// A question about the inside of a project.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(tag = "what", rename_all = "snake_case")]
pub enum InsideCommand {
    /// Its apps.
    Apps,
    /// What an app has printed from byte `offset` on.
    AppOutput {
        /// Which app.
        name: AppName,
        /// From where on.
        offset: u64,
    },
    /// End an app, so that it is started anew.
    RestartApp {
        /// Which app.
        name: AppName,
    },
    /// The last lines that its first process wrote.
    Logs {
        /// At most so many.
        lines: usize,
    },
    /// What it uses.
    Stats,
}

/// The answer to an [`InsideCommand`].
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(tag = "what", rename_all = "snake_case")]
pub enum InsideReply {
    /// Its apps.
    Apps {
        /// In the order of their names.
        apps: Vec<AppStatus>,
        /// What is wrong with the file that declares them.
        complaint: Option<String>,
    },
    /// A piece of output.
    AppOutput {
        /// Where it begins: later than asked for, if the rest is no longer kept.
        offset: u64,
        /// As text; what is none is replaced.
        text: String,
        /// From where on to ask next.
        next: u64,
    },
    /// The app was ended.
    Restarted,
    /// Lines of its log.
    Logs {
        /// The lines.
        text: String,
    },
    /// What it uses.
    Stats {
        /// Of processor, memory, disks and network; `None` if it does not run.
        stats: Option<Stats>,
        /// Of the disk.
        usage: Option<Usage>,
    },
}
