//! A second place for a repository.

use std::{collections::HashMap, sync::Arc};

use cocalc_backup::{
    Mirrored,
    protocol::{Event, FailureKind},
};
use cocalc_core::backups::{Phase, Progress};

use crate::{
    backend::{Backend, CONFIG, DIRECTORIES},
    fail,
    failure::Failed,
    said,
    store::Mode,
};

/// Copies what the mirror lacks, data first and the configuration last, so that
/// at any moment what is listed there is whole there. What is there with another
/// size is replaced.
pub(crate) fn mirror(backend: &Arc<Backend>, mirror: Option<&Arc<Backend>>) -> Result<Mirrored, Failed> {
    let Some(mirror) = mirror else {
        return Err(Failed::new(FailureKind::Invalid, "the repository has no mirror"));
    };
    let mut mirrored = Mirrored::default();
    if !backend.is_repository()? {
        return Ok(mirrored);
    }
    let (from, to) = (backend.store(), mirror.store());
    to.create()?;
    let mut names = Vec::new();
    // What is listed first may count on what is listed later, never the other way
    // round: so snapshots are listed before what they need is.
    for directory in DIRECTORIES {
        if directory == "locks" {
            continue;
        }
        let there: HashMap<_, _> = to.list(directory)?.into_iter().collect();
        for (name, size) in from.list(directory)? {
            if there.get(&name) != Some(&size) {
                let path = match directory {
                    "data" => format!("data/{}/{name}", name.get(..2).unwrap_or_default()),
                    _ => format!("{directory}/{name}"),
                };
                names.push((path, size, there.contains_key(&name)));
            }
        }
    }
    let total: u64 = names.iter().map(|(_, size, _)| *size).sum();
    let tell = |bytes| {
        said::tell(&Event::Progress(Progress { phase: Phase::Tending, bytes, total_bytes: Some(total) }));
    };
    for (name, size, is_there) in names.iter().rev() {
        let bytes = match from.read(name) {
            Ok(bytes) => bytes,
            // Pruned since it was listed.
            Err(failed) if failed.0.kind == FailureKind::Damaged && from.size(name)?.is_none() => continue,
            Err(failed) => return Err(failed),
        };
        to.write(name, &[bytes], if *is_there { Mode::Over } else { Mode::Once })?;
        fail::point("mirror.copied");
        mirrored.files += 1;
        mirrored.bytes += size;
        tell(mirrored.bytes);
    }
    if to.size(CONFIG)?.is_none() {
        to.write(CONFIG, &[from.read(CONFIG)?], Mode::First)?;
    }
    Ok(mirrored)
}
