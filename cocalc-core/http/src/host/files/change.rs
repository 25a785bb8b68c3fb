//! Changes of files.

use std::{
    any::Any,
    fs::File,
    io::{self, Write},
    os::unix::fs::PermissionsExt,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::BytesMut;
use cocalc_core::{
    auth::Principal,
    ids::{Action, ProjectId, SnapshotName},
};
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header};
use http_body_util::BodyExt;
use hyper::body::Body as _;
use rustix::{
    fs::{FileType, Stat},
    io::Errno,
};
use tokio::{sync::OwnedMutexGuard, time::timeout};

use super::{
    Raw, TURN_LIMIT, blocking, blocking_with,
    refusals::{changed, failed, holds_read_only, into_itself, no_parent, not_copied, refused, unfinished},
};
use crate::{
    body::{Body, BodyError},
    files::{
        Copying,
        conditions::{Verdict, Version, weigh},
        path::FilePath,
        remove::{read_only_within, remove_all},
        tree::{Node, Tree, version},
    },
    headers,
    host::{Asked, DRAIN_BYTES, DRAIN_TIME, Inner, Rest, view::without_port},
    problem::Problem,
};

/// How much of an upload is held in memory.
const HELD_BYTES: usize = 256 * 1024;
/// How long the removal of a folder takes at most, at a time: meanwhile the project
/// is neither stopped nor moved.
const REMOVAL_LIMIT: Duration = Duration::from_secs(20);
const DESTINATION: HeaderName = HeaderName::from_static("destination");

/// A change that is asked for.
pub(super) enum Change {
    /// The content for the file of this name, which has none yet.
    File(File),
    Directory,
    Removal {
        /// Whether a folder goes with all that is in it.
        recursive: bool,
    },
    Move {
        to: FilePath,
        /// Whether a file that is there is replaced.
        replace: bool,
    },
}

impl Change {
    /// What `DELETE` asks for.
    pub(super) fn removal(asked: &Asked<'_>) -> Result<Self, Problem> {
        let mut recursive = false;
        for pair in asked.parts.uri.query().unwrap_or_default().split('&') {
            match pair.split_once('=').unwrap_or((pair, "true")) {
                ("recursive", "true") => recursive = true,
                ("recursive", "false") => recursive = false,
                ("recursive", _) => {
                    let message = "`recursive` is true or false.";
                    return Err(Problem::new(StatusCode::BAD_REQUEST, "bad_query", message));
                }
                _ => {}
            }
        }
        Ok(Self::Removal { recursive })
    }

    /// What `MOVE` and `COPY` ask for (RFC 4918, 9.8 and 9.9).
    pub(super) fn moving(asked: &Asked<'_>) -> Result<Self, Problem> {
        let bad = |message: &'static str| Problem::new(StatusCode::BAD_REQUEST, "bad_destination", message);
        let fields = &asked.parts.headers;
        let replace = match fields.get("overwrite").map(HeaderValue::as_bytes) {
            None | Some(b"T" | b"t") => true,
            Some(b"F" | b"f") => false,
            Some(_) => return Err(bad("`Overwrite` is T or F.")),
        };
        let to = headers::single(fields, &DESTINATION)
            .ok_or_else(|| bad("`Destination` says once to where it is moved."))?;
        let to = destination(to, asked)
            .ok_or_else(|| bad("The destination is no path below this project's files/."))?;
        Ok(Self::Move { to, replace })
    }
}

/// A path of this project's files, from an address as the user has it.
fn destination(address: &str, asked: &Asked<'_>) -> Option<FilePath> {
    let path = match address.split_once("://") {
        Some(("http" | "https", rest)) => {
            let (authority, _) = rest.split_once('/')?;
            let https = asked.view.https;
            let same = without_port(authority, https)
                .eq_ignore_ascii_case(without_port(&asked.view.authority, https));
            rest.get(authority.len()..).filter(|_| same)?
        }
        _ => address,
    };
    let place = format!("{}{}/files", asked.view.prefix, asked.place.mount);
    let rest = path.strip_prefix(&place)?;
    FilePath::parse(rest).filter(|_| !rest.contains(['?', '#']))
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
        let fields = &asked.parts.headers;
        let admission = self.admitted(principal, project, Action::Write).await?;
        let tree = self.tree(raw, project).await?;
        let (opened, conditions) = (path.clone(), fields.clone());
        let mut body =
            rest.body.until(async move { admission.revoked().await }).stalled_after(self.limits.body_idle);
        let mut begun = !fields.contains_key(header::EXPECT);
        let received = async {
            let file = blocking_with(move || {
                let parent = tree.open(&opened.parent()).map_err(no_parent)?;
                // Told before the content is sent, if it is known by then.
                check_target(&parent, &name, &conditions)?;
                parent.nameless(tree.owner().map_err(refused)?).map_err(refused)
            })
            .await?;
            begun = true;
            self.receive(&mut body, file, project).await
        };
        match received.await {
            Ok(file) => self.change_files(raw, fields, principal, project, path, Change::File(file)).await,
            Err(problem) => {
                // Who is still sending would see a broken connection instead of
                // the answer. Who waits to be told to send is not told so.
                if begun && !problem.close && !body.is_end_stream() {
                    rest.connection.spawn(body.drained(DRAIN_BYTES, DRAIN_TIME));
                }
                Err(problem)
            }
        }
    }

    /// Writes what comes to a file, durably.
    async fn receive(&self, body: &mut Body, mut file: File, project: ProjectId) -> Result<File, Problem> {
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
                return Ok(file);
            }
        }
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

    /// Copies something, also from a former state; what it replaces is kept in
    /// another one.
    #[expect(clippy::too_many_arguments, reason = "what a request says, taken apart once")]
    pub(super) async fn copy_files(
        &self,
        raw: &Raw,
        asked: &Asked<'_>,
        principal: &Principal,
        path: FilePath,
        state: Option<SnapshotName>,
        to: FilePath,
        replace: bool,
    ) -> Result<Response<Body>, Problem> {
        let project = asked.place.project;
        let (turn, alone) = self.turn(raw, project).await?;
        self.authorize(principal, project, Action::Write).await?;
        let (from, held) = self.tree_in(raw, project, state.as_ref()).await?;
        let into = self.tree(raw, project).await?;
        let (source, target) = (path.relative(), to.relative());
        let fields = asked.parts.headers.clone();
        let replaced = blocking_with(move || check_copy(&from, &path, &into, &to, replace, &fields)).await?;
        // Only if there is something to replace: the state before is kept then. What
        // appears there meanwhile stays, and is said to be in the way.
        let copying = Copying { from: state, path: source, to: target, replace: replaced };
        let files = Arc::clone(&raw.files);
        // Also if nobody waits for it any more.
        let copied = tokio::spawn(async move {
            let _held = (held, alone, turn);
            files.copy(project, copying).await
        });
        match copied.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(not_copied(&error)),
            Err(error) => {
                tracing::error!(%error, "a copy ended by itself");
                return Err(refused(io::Error::other("a copy ended by itself")));
            }
        }
        let mut response = Response::new(Body::empty());
        *response.status_mut() = if replaced { StatusCode::NO_CONTENT } else { StatusCode::CREATED };
        Ok(response)
    }

    /// Waits until nobody else changes the project's files.
    async fn turn(
        &self,
        raw: &Raw,
        project: ProjectId,
    ) -> Result<(Box<dyn Any + Send>, OwnedMutexGuard<()>), Problem> {
        let busy =
            || Problem::unavailable("project_busy", "The project's files cannot be changed just now.", 2);
        // The project's own turn first: who waits for that holds up nobody else.
        let turn = timeout(TURN_LIMIT, raw.files.turn(project)).await.ok().flatten().ok_or_else(busy)?;
        let alone = timeout(TURN_LIMIT, raw.changes(project).lock_owned()).await.map_err(|_| busy())?;
        Ok((turn, alone))
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
        let (turn, alone) = self.turn(raw, project).await?;
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
        Change::Removal { .. } | Change::Move { .. } => tree.open(&path.parent()).map_err(refused)?,
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
            let old = parent.look(name).map_err(refused)?;
            if weigh(fields, old.as_ref().map(version).as_ref(), false) != Verdict::Go {
                return Err(failed());
            }
            if old.is_some() {
                let message = "There is something of this name.";
                let problem = Problem::new(StatusCode::METHOD_NOT_ALLOWED, "exists", message);
                return Err(problem.header("allow", "GET, HEAD, OPTIONS, PUT, DELETE, MOVE".to_owned()));
            }
            parent.make_directory(name, tree.owner().map_err(refused)?).map_err(refused)?;
            (StatusCode::CREATED, None)
        }
        Change::Removal { recursive } => {
            let directory = source(&parent, path, name, fields)?.is_directory;
            if directory && recursive {
                if let Some(found) = read_only_within(&parent, name).map_err(refused)? {
                    return Err(holds_read_only(&found));
                }
                let until = Instant::now() + REMOVAL_LIMIT;
                if !remove_all(&parent, name, until).map_err(refused)? {
                    return Err(unfinished());
                }
            } else {
                parent.remove(name, directory).map_err(refused)?;
            }
            (StatusCode::NO_CONTENT, None)
        }
        Change::Move { to, replace } => {
            let source = source(&parent, path, name, fields)?;
            let into = tree.open(&to.parent()).map_err(no_parent)?;
            let replaced = move_to(&parent, name, &source, &into, &to, replace)?;
            into.sync().map_err(refused)?;
            // The move itself has changed what it is told by.
            let moved = to.name().map(|name| into.look(name)).transpose().map_err(refused)?.flatten();
            let status = if replaced { StatusCode::NO_CONTENT } else { StatusCode::CREATED };
            (status, moved.map(|stat| version(&stat).tag))
        }
    };
    parent.sync().map_err(refused)?;
    Ok(done)
}

/// What is removed or moved.
struct Source {
    stat: Stat,
    is_directory: bool,
}

/// What is at a name, if it is in the state that the request expects.
fn source(parent: &Node, path: &FilePath, name: &[u8], fields: &HeaderMap) -> Result<Source, Problem> {
    let stat = parent.look(name).map_err(refused)?.ok_or_else(Problem::not_found)?;
    let is_directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
    if path.slash && !is_directory {
        return Err(Problem::not_found());
    }
    if weigh(fields, Some(&version(&stat)), false) != Verdict::Go {
        return Err(failed());
    }
    Ok(Source { stat, is_directory })
}

/// Gives something another name; true if a file was replaced by it. A folder is
/// never replaced: what is in it would be lost by a slip.
fn move_to(
    parent: &Node,
    name: &[u8],
    source: &Source,
    into: &Node,
    to: &FilePath,
    replace: bool,
) -> Result<bool, Problem> {
    let Some(new) = to.name() else { return Err(refused(Errno::ISDIR.into())) };
    if into.kind() != FileType::Directory {
        return Err(no_parent(Errno::NOTDIR.into()));
    }
    if to.slash && !source.is_directory {
        return Err(refused(Errno::ISDIR.into()));
    }
    let old = into.look(new).map_err(refused)?;
    if let Some(old) = &old {
        let same = (old.st_dev, old.st_ino) == (source.stat.st_dev, source.stat.st_ino);
        match FileType::from_raw_mode(old.st_mode) {
            _ if same && (parent.is(into) && name == new) => return Err(into_itself()),
            _ if !replace => return Err(failed()),
            FileType::Directory => return Err(refused(Errno::ISDIR.into())),
            _ if source.is_directory => return Err(refused(Errno::EXIST.into())),
            FileType::Symlink => return Err(refused(Errno::LOOP.into())),
            FileType::RegularFile => {}
            _ => return Err(refused(Errno::NXIO.into())),
        }
        if same {
            // Two names of one file: the kernel would leave both.
            parent.remove(name, false).map_err(refused)?;
            return Ok(true);
        }
    }
    match parent.rename(name, into, new, old.is_some()) {
        Ok(()) => Ok(old.is_some()),
        Err(error) => Err(match Errno::from_io_error(&error) {
            Some(Errno::INVAL) => into_itself(),
            // Somebody in the project was faster.
            Some(Errno::EXIST | Errno::NOTEMPTY | Errno::NOTDIR | Errno::ISDIR) => changed(),
            Some(Errno::XDEV) => {
                let message = "The destination is on another volume. Copy it there.";
                Problem::new(StatusCode::CONFLICT, "other_volume", message)
            }
            _ => refused(error),
        }),
    }
}

/// Whether something can be copied; whether it replaces something then.
fn check_copy(
    from: &Tree,
    path: &FilePath,
    into: &Tree,
    to: &FilePath,
    replace: bool,
    fields: &HeaderMap,
) -> Result<bool, Problem> {
    let (Some(name), Some(new)) = (path.name(), to.name()) else { return Err(into_itself()) };
    let source = source(&from.open(&path.parent()).map_err(refused)?, path, name, fields)?;
    let parent = into.open(&to.parent()).map_err(no_parent)?;
    if parent.kind() != FileType::Directory {
        return Err(no_parent(Errno::NOTDIR.into()));
    }
    if to.slash && !source.is_directory {
        return Err(refused(Errno::ISDIR.into()));
    }
    match parent.look(new).map_err(refused)? {
        None => Ok(false),
        Some(_) if !replace => Err(failed()),
        Some(old) if (old.st_dev, old.st_ino) == (source.stat.st_dev, source.stat.st_ino) => {
            Err(into_itself())
        }
        Some(_) => Ok(true),
    }
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
