//! The passwords that open a repository with stock programs.

use std::sync::Arc;

use cocalc_backup::{
    Secret,
    protocol::{FailureKind, Job},
};
use cocalc_core::backups::Phase;
use rustic_core::{Credentials, FileType, KeyOptions, ReadBackend as _, WriteBackend as _};

use crate::{backend::Backend, failure::Failed, repository};

/// Lets one more open it. Where there is no repository yet, its first backup
/// sets the password.
pub(crate) fn add(job: &Job, backend: &Arc<Backend>, password: &Secret) -> Result<(), Failed> {
    if !backend.is_repository()? {
        return Ok(());
    }
    let opened = repository::open(job, backend, Phase::Tending)?;
    opened.add_key(password.expose(), &KeyOptions::default())?;
    Ok(())
}

/// Lets only that of the job's key open it.
pub(crate) fn keep(job: &Job, backend: &Arc<Backend>) -> Result<(), Failed> {
    if !backend.is_repository()? {
        return Ok(());
    }
    // Only whoever holds the data key may change who else gets it.
    let opened = repository::open(job, backend, Phase::Tending)?;
    let password = job.repository.key.password.expose();
    let by_password = repository::at(backend, Phase::Tending)?.open(&Credentials::password(password));
    let kept = match by_password.map(|opened| *opened.key_id()) {
        Ok(Some(id)) => id,
        _ if backend.fault().is_some() => {
            return Err(Failed::new(FailureKind::Unavailable, "the keys cannot be read"));
        }
        _ => opened.add_key(password, &KeyOptions::default())?,
    };
    for id in backend.list(FileType::Key)? {
        if id != *kept {
            backend.remove(FileType::Key, &id, false)?;
        }
    }
    Ok(())
}
