//! What a folder or a file shows.

use std::time::Duration;

use cocalc_core::ids::SnapshotName;
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode, header};

use super::{Content, Raw, blocking, refusals::failed};
use crate::{
    body::Body,
    files::{
        archive::{self, Format},
        conditions::{Span, Verdict, span, weigh},
        kind, listing,
        path::{FilePath, decode, encode},
        read::{FileBody, Held},
        tree::Node,
    },
    headers,
    host::Asked,
    problem::{Problem, wants_page},
};

/// How many entries a page of a listing has, unless fewer are asked for.
const ENTRIES_MAX: usize = 1_000;

/// A folder that is shown.
pub(super) struct Directory<'a> {
    pub(super) path: &'a FilePath,
    /// As it was in this state.
    pub(super) state: Option<&'a SnapshotName>,
    pub(super) node: Node,
    pub(super) held: Held,
}

/// A listing, or an archive.
pub(super) async fn directory(
    raw: &Raw,
    asked: &Asked<'_>,
    shown: Directory<'_>,
    idle: Duration,
) -> Result<Response<Body>, Problem> {
    let Directory { path, state, node, held } = shown;
    let bad = |message: &'static str| Problem::new(StatusCode::BAD_REQUEST, "bad_query", message);
    let (mut after, mut max, mut json) = (Vec::new(), ENTRIES_MAX, !wants_page(&asked.parts.headers));
    let mut archive = None;
    for pair in asked.parts.uri.query().unwrap_or_default().split('&') {
        match pair.split_once('=').unwrap_or((pair, "")) {
            ("after", name) => after = decode(name).ok_or_else(|| bad("`after` is no name of a file."))?,
            ("max", number) => {
                let number: usize = number.parse().map_err(|_| bad("`max` is no number."))?;
                max = number.clamp(1, ENTRIES_MAX);
            }
            ("format", "json") => json = true,
            ("format", "html") => json = false,
            ("archive", "tar") => archive = Some(Format::Tar),
            ("archive", "zip") => archive = Some(Format::Zip),
            ("archive" | "format", _) => {
                return Err(bad("Known are archive=tar, archive=zip, format=json and format=html."));
            }
            _ => {}
        }
    }
    if let Some(format) = archive {
        let name = path.name().unwrap_or(b"files").to_vec();
        let mut response = Response::new(Body::empty());
        dispose(
            response.headers_mut(),
            "attachment",
            &[&name[..], b".", format.extension().as_bytes()].concat(),
        );
        headers::set(response.headers_mut(), header::CONTENT_TYPE, format.media_type());
        headers::set(response.headers_mut(), header::CACHE_CONTROL, "no-store");
        if asked.parts.method == Method::GET {
            let place = raw.archives.now(asked.place.project).ok_or_else(|| {
                Problem::unavailable("archives_busy", "Too many folders are being downloaded. Try again.", 5)
            })?;
            *response.body_mut() = Body::new(archive::begin(format, node, &name, idle, (place, held)));
        }
        return Ok(response);
    }
    let place = raw.scans.soon(asked.place.project).await.ok_or_else(|| {
        Problem::unavailable("listings_busy", "Too many folders are being listed. Try again.", 5)
    })?;
    let page = blocking(move || {
        // Also if nobody waits for it any more.
        let _held = (place, held);
        node.list(&after, max)
    })
    .await?;
    let (kind, text) = if json {
        ("application/json", listing::json(path, state, &page, max))
    } else {
        ("text/html; charset=utf-8", listing::html(path, state, &page, max))
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
pub(super) fn file(
    asked: &Asked<'_>,
    path: &FilePath,
    node: &Node,
    content: Content,
    held: Held,
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
        Content::Open(file) => Body::new(FileBody::new(file, first, bytes, held)),
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
