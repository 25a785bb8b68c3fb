//! Changes of files.

use std::{
    fs::File,
    io::{self, Write},
    os::unix::fs::PermissionsExt,
};

use bytes::BytesMut;
use cocalc_core::{
    auth::Principal,
    ids::{Action, ProjectId},
};
use http::{HeaderMap, Response, StatusCode, header};
use http_body_util::BodyExt;
use rustix::{fs::FileType, io::Errno};
use tokio::time::timeout;

use super::{
    Raw, TURN_LIMIT, blocking, blocking_with,
    refusals::{changed, failed, no_parent, refused},
};
use crate::{
    body::{Body, BodyError},
    files::{
        conditions::{Verdict, Version, weigh},
        path::FilePath,
        tree::{Node, Tree, version},
    },
    headers,
    host::{Asked, Inner, Rest},
    problem::Problem,
};

/// How much of an upload is held in memory.
const HELD_BYTES: usize = 256 * 1024;

/// A change that is asked for.
pub(super) enum Change {
    /// The content for the file of this name, which has none yet.
    File(File),
    Directory,
    Removal,
}

impl Inner {
    /// Takes a file's content, and puts it in its place once it is all there.
    pub(super) async fn put_file(
        &self,
        raw: &Raw,
        asked: Asked<'_>,
        rest: Rest,
        principal: &Principal,
        path: FilePath,
    ) -> Result<Response<Body>, Problem> {
        let project = asked.place.project;
        if asked.parts.headers.contains_key(header::CONTENT_RANGE) {
            let message = "A file is replaced as a whole; parts of it cannot be written.";
            return Err(Problem::new(StatusCode::BAD_REQUEST, "range_refused", message));
        }
        let Some(name) = path.name().filter(|_| !path.slash).map(<[u8]>::to_vec) else {
            let message = "A file's address does not end with a slash. MKCOL makes a folder.";
            return Err(Problem::new(StatusCode::CONFLICT, "is_directory", message));
        };
        let admission = self.admitted(principal, project, Action::Write).await?;
        let tree = self.tree(raw, project).await?;
        let (opened, conditions) = (path.clone(), asked.parts.headers.clone());
        let mut file = blocking_with(move || {
            let parent = tree.open(&opened.parent()).map_err(no_parent)?;
            // Told before the content is sent, if it is known by then.
            check_target(&parent, &name, &conditions)?;
            parent.nameless(tree.owner().map_err(refused)?).map_err(refused)
        })
        .await?;

        let mut body =
            rest.body.until(async move { admission.revoked().await }).stalled_after(self.limits.body_idle);
        let mut held = BytesMut::new();
        loop {
            let frame = body.frame().await.transpose().map_err(|error| self.cut(project, &*error))?;
            let ended = frame.is_none();
            if let Some(data) = frame.and_then(|frame| frame.into_data().ok()) {
                held.extend_from_slice(&data);
            }
            if ended || held.len() >= HELD_BYTES {
                let piece = held.split().freeze();
                file = blocking(move || {
                    file.write_all(&piece)?;
                    if ended {
                        file.sync_all()?;
                    }
                    Ok(file)
                })
                .await?;
            }
            if ended {
                break;
            }
        }
        let headers = asked.parts.headers;
        self.change_files(raw, &headers, principal, project, path, Change::File(file)).await
    }

    /// Why a body did not come to its end.
    fn cut(&self, project: ProjectId, error: &(dyn std::error::Error + 'static)) -> Problem {
        match error.downcast_ref() {
            Some(BodyError::Revoked(denial)) => Problem { close: true, ..self.denied(project, denial) },
            Some(BodyError::Stalled(_)) => {
                let message = "The request's body did not arrive.";
                Problem {
                    close: true,
                    ..Problem::new(StatusCode::REQUEST_TIMEOUT, "request_timeout", message)
                }
            }
            _ => Problem::bad_request("The request's body ended before its end."),
        }
    }

    /// Changes something, in the project's turn and if the conditions hold.
    pub(super) async fn change_files(
        &self,
        raw: &Raw,
        fields: &HeaderMap,
        principal: &Principal,
        project: ProjectId,
        path: FilePath,
        change: Change,
    ) -> Result<Response<Body>, Problem> {
        let Some(name) = path.name().map(<[u8]>::to_vec) else {
            let message = "The root of the files is always there.";
            return Err(Problem::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message));
        };
        let busy =
            || Problem::unavailable("project_busy", "The project's files cannot be changed just now.", 2);
        // The project's own turn first: who waits for that holds up nobody else.
        let turn = timeout(TURN_LIMIT, raw.files.turn(project)).await.ok().flatten().ok_or_else(busy)?;
        let alone = timeout(TURN_LIMIT, raw.changes(project).lock_owned()).await.map_err(|_| busy())?;
        // An upload may have taken long.
        self.authorize(principal, project, Action::Write).await?;
        // In the turn, because a restore puts another directory there.
        let tree = self.tree(raw, project).await?;
        let fields = fields.clone();
        let (status, tag) = blocking_with(move || {
            // Until the change is made, even if nobody waits for it any more.
            let _held = (alone, turn);
            apply(&tree, &path, &name, &fields, change)
        })
        .await?;
        let mut response = Response::new(Body::empty());
        *response.status_mut() = status;
        if let Some(tag) = tag {
            headers::set(response.headers_mut(), header::ETAG, &tag);
        }
        Ok(response)
    }
}

/// Makes the change, durably.
fn apply(
    tree: &Tree,
    path: &FilePath,
    name: &[u8],
    fields: &HeaderMap,
    change: Change,
) -> Result<(StatusCode, Option<String>), Problem> {
    let parent = match &change {
        Change::Removal => tree.open(&path.parent()).map_err(refused)?,
        _ => tree.open(&path.parent()).map_err(no_parent)?,
    };
    let done = match change {
        Change::File(file) => {
            let old = check_target(&parent, name, fields)?;
            // Its permissions stay, but nothing that lends rights.
            let mode = old.map_or(0o644, |mode| mode & 0o777);
            file.set_permissions(std::fs::Permissions::from_mode(mode)).map_err(refused)?;
            let named = match old {
                None => parent.name(&file, name),
                Some(_) => parent.name_over(&file, name),
            };
            match named {
                Ok(()) => {}
                // Somebody in the project was faster.
                Err(error) if old.is_none() && error.kind() == io::ErrorKind::AlreadyExists => {
                    return Err(changed());
                }
                // The directory is on another volume than it was.
                Err(error) if Errno::from_io_error(&error) == Some(Errno::XDEV) => return Err(changed()),
                Err(error) => return Err(refused(error)),
            }
            let stat = rustix::fs::fstat(&file).map_err(|error| refused(error.into()))?;
            let status = if old.is_some() { StatusCode::NO_CONTENT } else { StatusCode::CREATED };
            (status, Some(version(&stat).tag))
        }
        Change::Directory => {
            if parent.look(name).map_err(refused)?.is_some() {
                let message = "There is something of this name.";
                let problem = Problem::new(StatusCode::METHOD_NOT_ALLOWED, "exists", message);
                return Err(problem.header("allow", "GET, HEAD, OPTIONS, PUT, DELETE".to_owned()));
            }
            parent.make_directory(name, tree.owner().map_err(refused)?).map_err(refused)?;
            (StatusCode::CREATED, None)
        }
        Change::Removal => {
            let stat = parent.look(name).map_err(refused)?.ok_or_else(Problem::not_found)?;
            let directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
            if path.slash && !directory {
                return Err(Problem::not_found());
            }
            if weigh(fields, Some(&version(&stat)), false) != Verdict::Go {
                return Err(failed());
            }
            parent.remove(name, directory).map_err(refused)?;
            (StatusCode::NO_CONTENT, None)
        }
    };
    parent.sync().map_err(refused)?;
    Ok(done)
}

/// Whether a file can be put at a name; if so, the mode of the one that is
/// there.
fn check_target(parent: &Node, name: &[u8], fields: &HeaderMap) -> Result<Option<u32>, Problem> {
    if parent.kind() != FileType::Directory {
        return Err(no_parent(Errno::NOTDIR.into()));
    }
    let old = parent.look(name).map_err(refused)?;
    let current: Option<Version> = old.as_ref().map(version);
    if weigh(fields, current.as_ref(), false) != Verdict::Go {
        return Err(failed());
    }
    match old {
        None => Ok(None),
        Some(stat) => match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => Ok(Some(stat.st_mode)),
            FileType::Directory => Err(refused(Errno::ISDIR.into())),
            FileType::Symlink => Err(refused(Errno::LOOP.into())),
            _ => Err(refused(Errno::NXIO.into())),
        },
    }
}
