//! Failures in the words of the protocol, as errors of the bus.

use cocalc_core::{bus::Error, subject::Access};

use crate::router::Failure;

/// What `failure` means for who asked for `access` to `subject`, with a
/// message of `size` bytes.
pub(crate) fn error(failure: &Failure, subject: &str, access: Access, size: usize) -> Error {
    let subject = subject.to_owned();
    match failure.code {
        400 => Error::InvalidSubject { subject },
        403 => {
            let action = match access {
                Access::Publish => "publish to",
                Access::Subscribe => "subscribe to",
            };
            Error::Denied { action, subject }
        }
        413 => Error::TooLarge { size, limit: limit(&failure.message) },
        503 => Error::NoInterest { subject },
        _ => Error::Disconnected { source: Some(failure.message.clone().into()) },
    }
}

/// The number in the message, which is the only place where the protocol has it.
fn limit(message: &str) -> usize {
    message.split(' ').find_map(|word| word.parse().ok()).unwrap_or(0)
}
