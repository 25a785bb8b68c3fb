//! Requests for raw files.

mod change;
mod places;
mod refusals;
mod shown;

use std::{fs::File, io, sync::Arc, time::Duration};

use bytes::Bytes;
use cocalc_core::{
    activity::{Source, Use},
    auth::{Admission, Principal},
    ids::{Action, ProjectId, Scope, SnapshotName},
};
use http::{HeaderName, Method, Response, StatusCode, Uri, header};
use rustix::{fs::FileType, io::Errno};
use tokio::time::timeout;

use self::{
    change::Change,
    places::Places,
    refusals::{bad_query, refused},
};
use super::{Asked, Inner, Rest, respond::frame_ancestors, session};
use crate::{
    body::Body,
    files::{
        Former, FormerState, ProjectFiles,
        path::{FilePath, decode},
        read::{Held, read_at},
        tree::{Node, Tree},
    },
    headers,
    problem::Problem,
    server::Connection,
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
/// Files up to this size are read when they are opened.
const SMALL_BYTES: u64 = 64 * 1024;
/// How long a finished upload waits for a start, stop or snapshot to end.
const TURN_LIMIT: Duration = Duration::from_secs(30);
const METHODS: &str = "GET, HEAD, OPTIONS, PUT, DELETE, MKCOL, MOVE, COPY";

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
        let state = state(&asked.parts.uri)?;
        let action = match (&state, asked.parts.method.as_str()) {
            (None, _) | (_, "OPTIONS") => action,
            // Who may only look sees what there is, not what there was.
            (Some(_), "GET" | "HEAD" | "COPY") => {
                self.authorize(principal, asked.place.project, Action::Write).await?;
                Action::Write
            }
            _ => return Err(bad_query("A former state is read, or copied from.")),
        };
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
            "GET" | "HEAD" => {
                let connection = rest.connection;
                self.read_files(raw, &asked, &connection, principal, action, path, state).await?
            }
            "PUT" => self.put_file(raw, asked, rest, principal, path).await?,
            "DELETE" => {
                let change = Change::removal(&asked)?;
                self.change_files(raw, &asked.parts.headers, principal, asked.place.project, path, change)
                    .await?
            }
            "MOVE" => {
                let change = Change::moving(&asked)?;
                self.change_files(raw, &asked.parts.headers, principal, asked.place.project, path, change)
                    .await?
            }
            "COPY" => {
                let change = Change::moving(&asked)?;
                let Change::Move { to, replace } = change else { return Err(Problem::not_found()) };
                self.copy_files(raw, &asked, principal, path, state, to, replace).await?
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
                let message = "Files are read, written with PUT, deleted, moved with MOVE, copied with COPY, and folders made with MKCOL.";
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

    /// The files as they are, or as they were in a former state, which is there
    /// for as long as what comes with it is.
    async fn tree_in(
        &self,
        raw: &Raw,
        project: ProjectId,
        state: Option<&SnapshotName>,
    ) -> Result<(Arc<Tree>, Held), Problem> {
        let Some(name) = state else { return Ok((self.tree(raw, project).await?, None)) };
        match timeout(self.limits.connect_timeout, raw.files.state(project, name)).await {
            Ok(Ok(Some(Former { root, held }))) => Ok((Arc::new(Tree(root)), Some(held))),
            Ok(Ok(None)) => {
                let message = "There is no such former state any more.";
                Err(Problem::new(StatusCode::NOT_FOUND, "no_snapshot", message))
            }
            failed => {
                tracing::warn!(%project, ?failed, "cannot open a former state of the files");
                Err(Problem::unavailable("files_unavailable", "The former state cannot be read now.", 2))
            }
        }
    }

    /// `GET /.cocalc/snapshots`: the former states of the files.
    pub(super) async fn former_states(&self, project: ProjectId) -> Result<Vec<FormerState>, Problem> {
        let unavailable =
            || Problem::unavailable("files_unavailable", "The former states cannot be listed now.", 2);
        let Some(raw) = &self.raw else { return Ok(vec![]) };
        let asked = timeout(self.limits.connect_timeout, raw.files.states(project)).await;
        asked.map_err(|_| unavailable())?.map_err(|error| {
            tracing::warn!(%project, %error, "cannot list former states of the files");
            unavailable()
        })
    }

    #[expect(clippy::too_many_arguments, reason = "what a request says, taken apart once")]
    async fn read_files(
        &self,
        raw: &Raw,
        asked: &Asked<'_>,
        connection: &Connection,
        principal: &Principal,
        action: Action,
        path: FilePath,
        state: Option<SnapshotName>,
    ) -> Result<Response<Body>, Problem> {
        let project = asked.place.project;
        let (tree, held) = self.tree_in(raw, project, state.as_ref()).await?;
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
            Found::Directory(node) => {
                let shown = shown::Directory { path: &path, state: state.as_ref(), node, held };
                shown::directory(raw, asked, shown, self.limits.body_idle).await?
            }
            Found::File(node, content) => shown::file(asked, &path, &node, content, held)?,
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
            response = response.map(|body| body.until(connection.bound(Arc::new(admission))));
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
}

/// The former state that `?snapshot=` asks for.
fn state(uri: &Uri) -> Result<Option<SnapshotName>, Problem> {
    let mut pairs = uri.query().unwrap_or_default().split('&');
    let Some(name) = pairs.find_map(|pair| pair.strip_prefix("snapshot=")) else { return Ok(None) };
    let name = decode(name).and_then(|name| String::from_utf8(name).ok()?.parse().ok());
    name.map(Some).ok_or_else(|| bad_query("`snapshot` is no name of one."))
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
