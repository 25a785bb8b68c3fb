//! Questions about a project's backups, and their answers, which fit a frame.

use cocalc_ids::{ProjectId, TreePath};
use serde::{Deserialize, Serialize};

use super::{Backup, Backups, Entries, Result};
use crate::control::FRAME_BYTES_MAX;

/// What an answer may take, so that it fits a frame with what goes around it.
const BYTES_MAX: usize = FRAME_BYTES_MAX / 4 * 3;
/// The most entries in one answer, whoever asks for more.
const ENTRIES_MAX: usize = 2_000;

/// A question about the backups of a project.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(tag = "ask", rename_all = "snake_case")]
pub enum Query {
    /// Which there are.
    List,
    /// What is in a directory of one.
    Ls {
        /// Which backup.
        backup: String,
        /// Which directory.
        directory: TreePath,
        /// Only what comes after this name.
        after: Option<TreePath>,
        /// At most so many; there may be fewer.
        max: usize,
    },
    /// What in one has a name that contains a text.
    Find {
        /// Which backup.
        backup: String,
        /// The text.
        text: String,
        /// At most so many; there may be fewer.
        max: usize,
    },
}

/// An answer.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum Answer {
    /// To [`Query::List`].
    Backups {
        /// Oldest snapshot first.
        backups: Vec<Backup>,
        /// Whether older ones were left out, because they are too many.
        truncated: bool,
    },
    /// To [`Query::Ls`] and [`Query::Find`].
    Entries(Entries),
}

/// Answers a question.
///
/// # Errors
///
/// As of the backend.
pub async fn answer(backups: &dyn Backups, project: ProjectId, query: &Query) -> Result<Answer> {
    Ok(match query {
        Query::List => {
            let mut list = backups.list(project).await?;
            // The newest are the ones that people look for.
            list.reverse();
            let fits = fitting(&list, BYTES_MAX);
            let truncated = fits < list.len();
            list.truncate(fits);
            list.reverse();
            Answer::Backups { backups: list, truncated }
        }
        Query::Ls { backup, directory, after, max } => {
            let max = (*max).clamp(1, ENTRIES_MAX);
            Answer::Entries(fitted(backups.ls(project, backup, directory, after.as_ref(), max).await?))
        }
        Query::Find { backup, text, max } => {
            let max = (*max).clamp(1, ENTRIES_MAX);
            Answer::Entries(fitted(backups.find(project, backup, text, max).await?))
        }
    })
}

fn fitted(mut entries: Entries) -> Entries {
    let fits = fitting(&entries.entries, BYTES_MAX);
    if fits < entries.entries.len() {
        entries.entries.truncate(fits);
        entries.truncated = true;
    }
    entries
}

/// How many of the first fit into `bytes`; at least one.
fn fitting<T: Serialize>(list: &[T], bytes: usize) -> usize {
    let mut left = bytes;
    let fits = list.iter().take_while(|item| {
        let size = serde_json::to_vec(item).map_or(usize::MAX, |text| text.len() + 1);
        let fits = size <= left;
        left = left.saturating_sub(size);
        fits
    });
    fits.count().max(1)
}

#[cfg(test)]
mod tests {
    use super::{super::Entry, *};
    use crate::storage::NodeKind;

    #[test]
    fn entries_fit_a_frame_whatever_their_names() {
        let entry = |n: usize| Entry {
            // Each byte is three in the text.
            path: TreePath::from_bytes(&[&[0xff; 250], format!("{n:04}").as_bytes()].concat()).unwrap(),
            kind: NodeKind::File,
            bytes: u64::MAX,
            modified: None,
        };
        let all = Entries { entries: (0..ENTRIES_MAX).map(entry).collect(), truncated: false };
        let page = fitted(all.clone());
        assert!(page.truncated && page.entries[..] == all.entries[..page.entries.len()]);
        assert!(serde_json::to_vec(&page).unwrap().len() < FRAME_BYTES_MAX);
        let few = Entries { entries: all.entries[..3].to_vec(), truncated: false };
        assert_eq!(fitted(few.clone()), few);
        assert_eq!(fitting(&all.entries, 0), 1, "there is always progress");
    }
}
