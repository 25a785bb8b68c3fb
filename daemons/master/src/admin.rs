//! The data directory, and the first administrator.

use std::{os::unix::fs::DirBuilderExt, path::Path};

use cocalc_auth::key_file;
use cocalc_core::BoxError;
use cocalc_ids::{AccountId, KeyId, Timestamp};
use cocalc_sqlite::master::{ApiToken, Store};

use crate::secret;

/// Makes the directory, for its owner only, if it is not there.
pub(crate) fn make_directory(path: &Path) -> std::io::Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Makes the first administrator, whose API token is written to `path`.
///
/// The file comes first: a crash in between leaves a token that is registered
/// at the next start, and never an administrator without a token.
pub(crate) fn ensure(store: &Store, path: &Path, now: Timestamp) -> Result<(), BoxError> {
    if store.has_admin()? {
        return Ok(());
    }
    let text = match key_file::load(path)? {
        Some(bytes) => std::str::from_utf8(&bytes)?.trim().to_owned(),
        None => {
            let text = secret::generate("cct_")?;
            key_file::save(path, format!("{text}\n").as_bytes())?;
            text
        }
    };
    if text.len() < 40 {
        return Err(format!("{} holds no token", path.display()).into());
    }
    let token = ApiToken {
        id: KeyId::random(),
        name: "first administrator".to_owned(),
        limits: None,
        created: now,
        expires: None,
    };
    store.create_first_admin(AccountId::random(), &secret::hash(&text), &token)?;
    tracing::info!(file = %path.display(), "made the first administrator");
    Ok(())
}
