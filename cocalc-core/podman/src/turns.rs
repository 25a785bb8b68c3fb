//! How long what runs in a project keeps a processor before others may have it.

use std::{fs, io};

use crate::kernel;

/// How often new threads are looked for: those of a first process are few.
const ROUNDS_MAX: usize = 16;

/// Gives short turns to each thread of a process, and so to what they will start.
///
/// A process that wakes up takes the processor from one whose turn is over. With
/// turns of the usual length, the neighbours of a project that keeps all processors
/// busy wait for several milliseconds at each step of a request; what a project gets
/// in all is for its weight to say.
///
/// # Errors
///
/// The kernel refuses it. It runs on as it was.
pub(crate) fn shorten(pid: i32) -> io::Result<()> {
    let mut shortened = Vec::new();
    for _ in 0..ROUNDS_MAX {
        let mut found = false;
        for task in fs::read_dir(format!("/proc/{pid}/task"))? {
            let Some(task) = task?.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            // What a thread starts from now on is like itself.
            if !shortened.contains(&task) {
                kernel::shorten_turns(task)?;
                shortened.push(task);
                found = true;
            }
        }
        if !found {
            break;
        }
    }
    Ok(())
}
