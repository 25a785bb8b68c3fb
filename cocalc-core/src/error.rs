//! What every error type here shares.

use std::{error::Error, fmt::Write};

/// A foreign error, kept as the source of one of ours.
pub type BoxError = Box<dyn Error + Send + Sync + 'static>;

/// The message of `error` and of all its sources, joined by `: `, which is how
/// daemons print and log errors.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        // Writing to a String cannot fail.
        let _ = write!(text, ": {error}");
        source = error.source();
    }
    text
}
