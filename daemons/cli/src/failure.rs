//! Why a command failed, and the exit code that says so to programs.

use std::process::ExitCode;

/// A failed command. The code is part of the public contract.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Failure {
    /// The process's exit code.
    pub(crate) exit: Exit,
    /// For people.
    pub(crate) message: String,
}

/// The exit codes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Exit {
    /// Something failed.
    Failed = 1,
    /// Wrong usage.
    Usage = 2,
    /// It is not there.
    NotFound = 3,
    /// Not permitted.
    Denied = 4,
    /// Something else is under way, or it was changed meanwhile.
    Conflict = 5,
    /// The other side does not answer.
    Unreachable = 6,
    /// It took too long.
    TimedOut = 7,
}

impl Failure {
    /// A failure of this kind.
    pub(crate) fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into() }
    }

    /// A plain failure.
    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self::new(Exit::Failed, message)
    }

    /// The process's exit code.
    pub(crate) fn code(&self) -> ExitCode {
        ExitCode::from(self.exit as u8)
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::failed(error.to_string())
    }
}

/// Adds what was being done to an error.
pub(crate) trait While<T> {
    /// Prefixes the error with `what`.
    fn during(self, what: impl std::fmt::Display) -> Result<T, Failure>;
}

impl<T, E: std::error::Error + 'static> While<T> for Result<T, E> {
    fn during(self, what: impl std::fmt::Display) -> Result<T, Failure> {
        self.map_err(|error| Failure::failed(format!("{what}: {}", cocalc_core::chain(&error))))
    }
}
