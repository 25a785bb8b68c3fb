//! Why something was not done, for programs and people.

use std::io;

use cocalc_core::{chain, storage};
use http::StatusCode;
use rustix::io::Errno;

use crate::problem::Problem;

pub(super) fn failed() -> Problem {
    let message = "The file is not in the state that the request expects.";
    Problem::new(StatusCode::PRECONDITION_FAILED, "precondition_failed", message)
}

pub(super) fn changed() -> Problem {
    let message = "The folder was changed meanwhile. Look at it, and try again.";
    Problem::new(StatusCode::CONFLICT, "changed", message)
}

pub(super) fn bad_query(message: &'static str) -> Problem {
    Problem::new(StatusCode::BAD_REQUEST, "bad_query", message)
}

/// Why storage did not copy.
pub(super) fn not_copied(error: &storage::Error) -> Problem {
    let problem = |status, code, message: String| Problem::new(status, code, message);
    match error {
        storage::Error::NotFound { .. } => Problem::not_found(),
        storage::Error::NoSnapshot { .. } => {
            problem(StatusCode::NOT_FOUND, "no_snapshot", "There is no such former state any more.".into())
        }
        storage::Error::AlreadyExists { .. } => refused(Errno::EXIST.into()),
        storage::Error::NoSpace { .. } => refused(Errno::DQUOT.into()),
        storage::Error::Path { reason, .. } => {
            problem(StatusCode::CONFLICT, "not_copied", format!("It cannot be copied there: {reason}."))
        }
        storage::Error::NestedVolumes { .. } | storage::Error::InUse { .. } => {
            problem(StatusCode::CONFLICT, "not_copied", error.to_string())
        }
        storage::Error::Unsupported { .. } => {
            problem(StatusCode::NOT_FOUND, "not_available", "Nothing is copied on this host.".into())
        }
        _ => {
            tracing::warn!(error = %chain(error), "a copy failed");
            problem(StatusCode::INTERNAL_SERVER_ERROR, "files_error", "The files cannot be used.".into())
        }
    }
}

pub(super) fn into_itself() -> Problem {
    let message = "It cannot be moved to where it is, or into itself.";
    Problem::new(StatusCode::CONFLICT, "into_itself", message)
}

pub(super) fn unfinished() -> Problem {
    let message = "So far only a part of the folder is deleted. Ask again for the rest.";
    Problem::unavailable("unfinished", message, 1)
}

pub(super) fn holds_read_only(path: &[u8]) -> Problem {
    let shown = path.escape_ascii();
    let message = format!(
        "{shown} is a read-only subvolume, so nothing was deleted. Whoever made it can delete it, or make it writable (btrfs property set)."
    );
    Problem::new(StatusCode::CONFLICT, "read_only", message)
}

pub(super) fn no_parent(error: io::Error) -> Problem {
    match Errno::from_io_error(&error) {
        Some(Errno::NOENT | Errno::NOTDIR) => {
            let message = "The folder for it is not there. MKCOL makes it.";
            Problem::new(StatusCode::CONFLICT, "no_parent", message)
        }
        _ => refused(error),
    }
}

/// Why the kernel refused, for people.
pub(super) fn refused(error: io::Error) -> Problem {
    let problem = |status, code, message: &'static str| Problem::new(status, code, message);
    match Errno::from_io_error(&error) {
        Some(Errno::NOENT | Errno::NOTDIR) => Problem::not_found(),
        Some(Errno::LOOP | Errno::XDEV) => {
            problem(StatusCode::FORBIDDEN, "link_refused", "Links are not followed here.")
        }
        Some(Errno::NXIO | Errno::INVAL) => {
            problem(StatusCode::FORBIDDEN, "not_a_file", "That is neither a file nor a folder.")
        }
        Some(Errno::ROFS) => problem(
            StatusCode::CONFLICT,
            "read_only",
            "That is in a read-only subvolume. Copy out of it what you want to change.",
        ),
        Some(Errno::ACCESS | Errno::PERM) => {
            problem(StatusCode::FORBIDDEN, "file_refused", "The file system does not allow that.")
        }
        Some(Errno::NOSPC | Errno::DQUOT) => problem(
            StatusCode::INSUFFICIENT_STORAGE,
            "no_space",
            "There is no space left for it. Delete something, or ask for a higher limit.",
        ),
        Some(Errno::FBIG) => problem(StatusCode::PAYLOAD_TOO_LARGE, "too_large", "The file is too large."),
        Some(Errno::NAMETOOLONG) => problem(StatusCode::BAD_REQUEST, "bad_path", "The path is too long."),
        Some(Errno::EXIST) => problem(StatusCode::CONFLICT, "exists", "There is something of this name."),
        Some(Errno::ISDIR) => {
            problem(StatusCode::CONFLICT, "is_directory", "There is a folder of this name.")
        }
        Some(Errno::NOTEMPTY) => problem(
            StatusCode::CONFLICT,
            "not_empty",
            "The folder is not empty. ?recursive=true deletes all that is in it.",
        ),
        Some(Errno::BUSY | Errno::TXTBSY) => problem(StatusCode::CONFLICT, "busy", "It is in use."),
        _ if error.kind() == io::ErrorKind::TimedOut => Problem::unavailable(
            "directory_too_large",
            "The folder has too many entries to be listed in time.",
            30,
        ),
        _ => {
            tracing::warn!(%error, "a file operation failed");
            problem(StatusCode::INTERNAL_SERVER_ERROR, "files_error", "The files cannot be used.")
        }
    }
}
