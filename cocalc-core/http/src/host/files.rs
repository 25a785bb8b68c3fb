//! Requests for raw files.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Write},
    os::unix::fs::PermissionsExt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use cocalc_core::{
    activity::{Source, Use},
    auth::{Admission, Principal},
    ids::{Action, ProjectId, Scope},
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode, header};
use http_body_util::BodyExt;
use rustix::{fs::FileType, io::Errno};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

use super::{Asked, Inner, Rest, respond::frame_ancestors, session};
use crate::{
    body::{Body, BodyError},
    files::{
        ProjectFiles, archive,
        conditions::{Span, Verdict, Version, span, weigh},
        kind, listing,
        path::{FilePath, decode, encode},
        read::{FileBody, read_at},
        tree::{Node, Tree, version},
    },
    headers,
    problem::{Problem, wants_page},
    upstream::is_long,
    websocket::Wish,
};

/// How many archives are made at a time; each reads as fast as it is taken.
const ARCHIVES_MAX: usize = 16;
/// How many of them one project has.
const ARCHIVES_OF_ONE: usize = 2;
/// How many folders are read for a listing at a time, and how many of them of
/// one project: each may take its time, and a thread.
const SCANS_MAX: usize = 16;
const SCANS_OF_ONE: usize = 2;
/// How long a listing waits for others.
const SCAN_TURN: Duration = Duration::from_secs(10);
/// How many entries a page of a listing has, unless fewer are asked for.
const ENTRIES_MAX: usize = 1_000;
/// Files up to this size are read when they are opened.
const SMALL_BYTES: u64 = 64 * 1024;
/// How much of an upload is held in memory.
const HELD_BYTES: usize = 256 * 1024;
/// How long a finished upload waits for a start, stop or snapshot to end.
const TURN_LIMIT: Duration = Duration::from_secs(30);
const METHODS: &str = "GET, HEAD, OPTIONS, PUT, DELETE, MKCOL";

/// What an ingress needs for raw files.
#[derive(Debug)]
pub(super) struct Raw {
    files: Arc<dyn ProjectFiles>,
    archives: Places,
    scans: Places,
    /// One change at a time per project, of those that come this way: between
    /// the look at what is there and the change, none of them changes it.
    changes: Vec<Arc<tokio::sync::Mutex<()>>>,
}

impl Raw {
    pub(super) fn new(files: Arc<dyn ProjectFiles>) -> Self {
        Self {
            files,
            archives: Places::new(ARCHIVES_MAX, ARCHIVES_OF_ONE),
            scans: Places::new(SCANS_MAX, SCANS_OF_ONE),
            changes: (0..64).map(|_| Arc::default()).collect(),
        }
    }

    fn changes(&self, project: ProjectId) -> Arc<tokio::sync::Mutex<()>> {
        use std::hash::BuildHasher;
        let hash = std::hash::BuildHasherDefault::<std::hash::DefaultHasher>::default().hash_one(project);
        let shard = usize::try_from(hash % 64).unwrap_or(0);
        self.changes.get(shard).cloned().unwrap_or_default()
    }
}

/// Places for something that is done a few times at once, of which one project
/// gets a part only.
#[derive(Debug)]
struct Places {
    all: Arc<Semaphore>,
    of_one: usize,
    by_project: Mutex<BTreeMap<ProjectId, Arc<Semaphore>>>,
}

/// A place, until it is dropped.
#[derive(Debug)]
struct Held {
    _one: OwnedSemaphorePermit,
    _all: OwnedSemaphorePermit,
}

impl Places {
    fn new(all: usize, of_one: usize) -> Self {
        Self { all: Arc::new(Semaphore::new(all)), of_one, by_project: Mutex::default() }
    }

    fn own(&self, project: ProjectId) -> Arc<Semaphore> {
        let mut known = self.by_project.lock().unwrap_or_else(PoisonError::into_inner);
        // Who waits or holds a place has one of them, too.
        known.retain(|other, places| *other == project || Arc::strong_count(places) > 1);
        let new = || Arc::new(Semaphore::new(self.of_one));
        Arc::clone(known.entry(project).or_insert_with(new))
    }

    fn now(&self, project: ProjectId) -> Option<Held> {
        let one = self.own(project).try_acquire_owned().ok()?;
        Some(Held { _one: one, _all: Arc::clone(&self.all).try_acquire_owned().ok()? })
    }

    /// Waits, but not for long. Its own others first: who waits for those keeps
    /// no place from anybody else.
    async fn soon(&self, project: ProjectId) -> Option<Held> {
        let places = async {
            let one = self.own(project).acquire_owned().await.ok()?;
            Some(Held { _one: one, _all: Arc::clone(&self.all).acquire_owned().await.ok()? })
        };
        timeout(SCAN_TURN, places).await.ok().flatten()
    }
}

/// What has to be permitted for a method.
pub(super) fn action(method: &Method) -> Action {
    match *method {
        Method::GET | Method::HEAD | Method::OPTIONS => Action::Use(Scope::Files),
        _ => Action::Write,
    }
}

/// What is at a path.
enum Found {
    Directory(Node),
    File(Node, Content),
}

enum Content {
    Open(File),
    Read(Bytes),
}

/// A change that is asked for.
enum Change {
    /// The content for the file of this name, which has none yet.
    File(File),
    Directory,
    Removal,
}

impl Inner {
    pub(super) async fn files(
        &self,
        asked: Asked<'_>,
        rest: Rest,
        principal: &Principal,
        action: Action,
        path: &str,
    ) -> Result<Response<Body>, Problem> {
        let Some(raw) = &self.raw else {
            let message = "Raw files are not served on this host.";
            return Err(Problem::new(StatusCode::NOT_FOUND, "not_available", message));
        };
        if asked.wish == Wish::WebSocket {
            return Err(Problem::not_found());
        }
        let path = FilePath::parse(path).ok_or_else(Problem::not_found)?;
        if let Some(meter) = self.meter(asked.place.project) {
            // Its files are used, whether it runs or not.
            meter.tap(Source::Http, Use::Work).moved();
        }
        let method = asked.parts.method.clone();
        let mut response = match method.as_str() {
            "OPTIONS" => {
                let mut response = Response::new(Body::empty());
                *response.status_mut() = StatusCode::NO_CONTENT;
                headers::set(response.headers_mut(), header::ALLOW, METHODS);
                response
            }
            "GET" | "HEAD" => self.read_files(raw, &asked, principal, action, path).await?,
            "PUT" => self.put_file(raw, asked, rest, principal, path).await?,
            "DELETE" => {
                self.change_files(
                    raw,
                    &asked.parts.headers,
                    principal,
                    asked.place.project,
                    path,
                    Change::Removal,
                )
                .await?
            }
            "MKCOL" => {
                if !hyper::body::Body::is_end_stream(&rest.body) {
                    let message = "A folder is made without a body.";
                    return Err(Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "body_refused", message));
                }
                let (headers, project) = (&asked.parts.headers, asked.place.project);
                self.change_files(raw, headers, principal, project, path, Change::Directory).await?
            }
            _ => {
                let message = "Files are read, written with PUT, deleted, and folders made with MKCOL.";
                let problem = Problem::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message);
                return Err(problem.header("allow", METHODS.to_owned()));
            }
        };
        if method == Method::HEAD {
            *response.body_mut() = Body::empty();
        }
        Ok(response)
    }

    async fn tree(&self, raw: &Raw, project: ProjectId) -> Result<Arc<Tree>, Problem> {
        match timeout(self.limits.connect_timeout, raw.files.root(project)).await {
            Ok(Ok(Some(root))) => Ok(Arc::new(Tree(root))),
            Ok(Ok(None)) => Err(Problem::not_found()),
            Ok(Err(error)) => {
                tracing::warn!(%project, %error, "cannot open the files");
                Err(Problem::unavailable("files_unavailable", "The project's files cannot be read now.", 2))
            }
            Err(_) => {
                Err(Problem::unavailable("files_unavailable", "The project's files cannot be read now.", 2))
            }
        }
    }

    async fn read_files(
        &self,
        raw: &Raw,
        asked: &Asked<'_>,
        principal: &Principal,
        action: Action,
        path: FilePath,
    ) -> Result<Response<Body>, Problem> {
        let project = asked.place.project;
        let tree = self.tree(raw, project).await?;
        let opened = path.clone();
        let found = blocking(move || {
            let node = tree.open(&opened)?;
            match node.kind() {
                FileType::Directory => Ok(Found::Directory(node)),
                FileType::RegularFile if !opened.slash => {
                    let file = node.read()?;
                    let content = if node.length() <= SMALL_BYTES {
                        Content::Read(read_at(&file, 0, node.length())?)
                    } else {
                        Content::Open(file)
                    };
                    Ok(Found::File(node, content))
                }
                FileType::RegularFile => Err(Errno::NOTDIR.into()),
                _ => Err(Errno::NXIO.into()),
            }
        })
        .await?;
        let mut response = match found {
            Found::Directory(_) if !path.slash => {
                let query = session::question(&asked.parts.uri);
                let place = format!("{}{}/files", asked.view.prefix, asked.place.mount);
                return session::redirect(&format!("{place}{}/{query}", path.encoded()));
            }
            Found::Directory(node) => directory(raw, asked, &path, node, self.limits.body_idle).await?,
            Found::File(node, content) => file(asked, &path, &node, content)?,
        };
        let fields_out = response.headers_mut();
        headers::set(fields_out, header::X_CONTENT_TYPE_OPTIONS, "nosniff");
        headers::set(fields_out, header::REFERRER_POLICY, "no-referrer");
        headers::set(fields_out, HeaderName::from_static("cross-origin-resource-policy"), "same-origin");
        // It is the tenant's content on an origin that may be others' as well:
        // it runs nothing, sends nothing, and is nobody's page.
        let policy = "sandbox allow-downloads; default-src 'none'; img-src 'self' data:; media-src 'self'; \
                      style-src 'unsafe-inline'";
        headers::set(fields_out, header::CONTENT_SECURITY_POLICY, policy);
        fields_out
            .append(header::CONTENT_SECURITY_POLICY, frame_ancestors(principal.embed_origin.as_deref()));
        if is_long(response.body()) {
            let admission = self.admitted(principal, project, action).await?;
            response = response.map(|body| body.until(async move { admission.revoked().await }));
        }
        Ok(response)
    }

    async fn admitted(
        &self,
        principal: &Principal,
        project: ProjectId,
        action: Action,
    ) -> Result<Admission, Problem> {
        let admitted = self.auth.admit(principal, project, action).await;
        admitted.map_err(|denial| self.denied(project, &denial))
    }

    /// Takes a file's content, and puts it in its place once it is all there.
    async fn put_file(
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
    async fn change_files(
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

/// A listing, or an archive.
async fn directory(
    raw: &Raw,
    asked: &Asked<'_>,
    path: &FilePath,
    node: Node,
    idle: Duration,
) -> Result<Response<Body>, Problem> {
    let bad = |message: &'static str| Problem::new(StatusCode::BAD_REQUEST, "bad_query", message);
    let (mut after, mut max, mut json) = (Vec::new(), ENTRIES_MAX, !wants_page(&asked.parts.headers));
    let mut tar = false;
    for pair in asked.parts.uri.query().unwrap_or_default().split('&') {
        match pair.split_once('=').unwrap_or((pair, "")) {
            ("after", name) => after = decode(name).ok_or_else(|| bad("`after` is no name of a file."))?,
            ("max", number) => {
                let number: usize = number.parse().map_err(|_| bad("`max` is no number."))?;
                max = number.clamp(1, ENTRIES_MAX);
            }
            ("format", "json") => json = true,
            ("format", "html") => json = false,
            ("archive", "tar") => tar = true,
            ("archive" | "format", _) => {
                return Err(bad("Known are archive=tar, format=json and format=html."));
            }
            _ => {}
        }
    }
    if tar {
        let name = path.name().unwrap_or(b"files").to_vec();
        let mut response = Response::new(Body::empty());
        dispose(response.headers_mut(), "attachment", &[&name[..], b".tar"].concat());
        headers::set(response.headers_mut(), header::CONTENT_TYPE, "application/x-tar");
        headers::set(response.headers_mut(), header::CACHE_CONTROL, "no-store");
        if asked.parts.method == Method::GET {
            let place = raw.archives.now(asked.place.project).ok_or_else(|| {
                Problem::unavailable("archives_busy", "Too many folders are being downloaded. Try again.", 5)
            })?;
            *response.body_mut() = Body::new(archive::tar(node, &name, idle, place));
        }
        return Ok(response);
    }
    let place = raw.scans.soon(asked.place.project).await.ok_or_else(|| {
        Problem::unavailable("listings_busy", "Too many folders are being listed. Try again.", 5)
    })?;
    let page = blocking(move || {
        // Also if nobody waits for it any more.
        let _place = place;
        node.list(&after, max)
    })
    .await?;
    let (kind, text) = if json {
        ("application/json", listing::json(path, &page, max))
    } else {
        ("text/html; charset=utf-8", listing::html(path, &page, max))
    };
    let mut response = Response::new(Body::empty());
    headers::set(response.headers_mut(), header::CONTENT_TYPE, kind);
    headers::set(response.headers_mut(), header::CONTENT_LENGTH, &text.len().to_string());
    headers::set(response.headers_mut(), header::CACHE_CONTROL, "no-store");
    headers::set(response.headers_mut(), header::VARY, "Accept");
    *response.body_mut() = Body::from(text);
    Ok(response)
}

/// The file, or the part of it that is asked for.
fn file(
    asked: &Asked<'_>,
    path: &FilePath,
    node: &Node,
    content: Content,
) -> Result<Response<Body>, Problem> {
    let fields = &asked.parts.headers;
    let version = node.version();
    let mut response = Response::new(Body::empty());
    let status = match weigh(fields, Some(&version), true) {
        Verdict::Failed => return Err(failed()),
        Verdict::NotModified => StatusCode::NOT_MODIFIED,
        Verdict::Go => StatusCode::OK,
    };
    *response.status_mut() = status;
    let out = response.headers_mut();
    headers::set(out, header::ETAG, &version.tag);
    headers::set(out, header::LAST_MODIFIED, &version.last_modified());
    headers::set(out, header::CACHE_CONTROL, "private, no-cache");
    headers::set(out, header::ACCEPT_RANGES, "bytes");
    if status == StatusCode::NOT_MODIFIED {
        return Ok(response);
    }
    let name = path.name().unwrap_or_default();
    let kind = kind::of(name);
    headers::set(out, header::CONTENT_TYPE, kind);
    let wanted = |pair: &str| pair == "download" || pair.starts_with("download=");
    let saved = asked.parts.uri.query().is_some_and(|query| query.split('&').any(wanted));
    dispose(out, if saved || !kind::is_shown(kind) { "attachment" } else { "inline" }, name);

    let length = node.length();
    let asked_for =
        if asked.parts.method == Method::GET { span(fields, &version, length) } else { Span::Whole };
    let (first, bytes) = match asked_for {
        Span::Whole => (0, length),
        Span::Part(first, last) => {
            headers::set(out, header::CONTENT_RANGE, &format!("bytes {first}-{last}/{length}"));
            *response.status_mut() = StatusCode::PARTIAL_CONTENT;
            (first, last - first + 1)
        }
        Span::Outside => {
            let message = "The file does not have the bytes that were asked for.";
            let problem = Problem::new(StatusCode::RANGE_NOT_SATISFIABLE, "range_not_satisfiable", message);
            return Err(problem.header("content-range", format!("bytes */{length}")));
        }
    };
    headers::set(response.headers_mut(), header::CONTENT_LENGTH, &bytes.to_string());
    *response.body_mut() = match content {
        Content::Open(file) => Body::new(FileBody::new(file, first, bytes)),
        Content::Read(read) => {
            if u64::try_from(read.len()).is_ok_and(|read| read < length) {
                return Err(Problem::unavailable(
                    "file_changed",
                    "The file was changed just now. Try again.",
                    1,
                ));
            }
            let from = usize::try_from(first).unwrap_or(usize::MAX);
            let to = from.saturating_add(usize::try_from(bytes).unwrap_or(usize::MAX));
            Body::full(read.slice(from..to))
        }
    };
    Ok(response)
}

/// Says how a file is to be shown, and under what name saved (RFC 6266).
fn dispose(fields: &mut HeaderMap, how: &str, name: &[u8]) {
    let name = String::from_utf8_lossy(name);
    let plain: String =
        name.chars().map(|c| if c.is_ascii_alphanumeric() || " .-_".contains(c) { c } else { '_' }).collect();
    let text = format!("{how}; filename=\"{plain}\"; filename*=UTF-8''{}", encode(name.as_bytes()));
    if let Ok(value) = HeaderValue::try_from(text) {
        fields.insert(header::CONTENT_DISPOSITION, value);
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, Problem> {
    blocking_with(move || work().map_err(refused)).await
}

/// Does what may wait for a disk where it keeps nobody else waiting.
async fn blocking_with<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Problem> + Send + 'static,
) -> Result<T, Problem> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
        tracing::error!(%error, "work on files ended by itself");
        Err(Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "files_error", "The files cannot be used."))
    })
}

fn failed() -> Problem {
    let message = "The file is not in the state that the request expects.";
    Problem::new(StatusCode::PRECONDITION_FAILED, "precondition_failed", message)
}

fn changed() -> Problem {
    let message = "The folder was changed meanwhile. Look at it, and try again.";
    Problem::new(StatusCode::CONFLICT, "changed", message)
}

fn no_parent(error: io::Error) -> Problem {
    match Errno::from_io_error(&error) {
        Some(Errno::NOENT | Errno::NOTDIR) => {
            let message = "The folder for it is not there. MKCOL makes it.";
            Problem::new(StatusCode::CONFLICT, "no_parent", message)
        }
        _ => refused(error),
    }
}

/// Why the kernel refused, for people.
fn refused(error: io::Error) -> Problem {
    let problem = |status, code, message: &'static str| Problem::new(status, code, message);
    match Errno::from_io_error(&error) {
        Some(Errno::NOENT | Errno::NOTDIR) => Problem::not_found(),
        Some(Errno::LOOP | Errno::XDEV) => {
            problem(StatusCode::FORBIDDEN, "link_refused", "Links are not followed here.")
        }
        Some(Errno::NXIO | Errno::INVAL) => {
            problem(StatusCode::FORBIDDEN, "not_a_file", "That is neither a file nor a folder.")
        }
        Some(Errno::ACCESS | Errno::PERM | Errno::ROFS) => {
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
        Some(Errno::NOTEMPTY) => {
            problem(StatusCode::CONFLICT, "not_empty", "The folder is not empty. Delete what is in it first.")
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn one_project_takes_a_part_of_the_places_only() {
        let places = Places::new(3, 2);
        let (greedy, other, third) = (ProjectId::random(), ProjectId::random(), ProjectId::random());
        let first = places.now(greedy).unwrap();
        let _second = places.now(greedy).unwrap();
        assert!(places.now(greedy).is_none() && places.soon(greedy).await.is_none());
        let last = places.now(other).unwrap();
        assert!(places.soon(third).await.is_none(), "there are three in all");
        let waiting = places.soon(third);
        drop(last);
        let held = waiting.await.unwrap();
        drop((first, held));
        assert!(places.now(other).is_some());
        assert!(places.by_project.lock().unwrap().len() <= 3);
    }
}
