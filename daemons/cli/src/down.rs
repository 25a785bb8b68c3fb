//! `cocalc down`: clean up after `cocalc up`, however it ended.

use crate::{args::DirOption, failure::Failure, up};

/// Ends what runs for the federation in the directory, and removes what it made.
pub(crate) fn run(options: &DirOption) -> Result<(), Failure> {
    up::down(&options.dir)
}
