//! Bearer secrets that the master gives out and remembers only by their hash.

use base64::Engine;
use sha2::{Digest, Sha256};

/// A new secret of 256 random bits, after `prefix`.
pub(crate) fn generate(prefix: &str) -> Result<String, getrandom::Error> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes)?;
    Ok(format!("{prefix}{}", base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(bytes)))
}

/// What is kept of it. The secrets have 256 random bits, so that a plain hash
/// tells nothing, and looking it up by equality gives nothing away by time.
pub(crate) fn hash(secret: &str) -> [u8; 32] {
    Sha256::digest(secret.as_bytes()).into()
}
