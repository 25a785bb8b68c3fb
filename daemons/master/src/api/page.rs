//! The page that embeds a project.

use std::sync::Arc;

use axum::{
    extract::State,
    response::{Html, IntoResponse, Response},
};
use cocalc_ids::ProjectId;
use http::{HeaderValue, StatusCode, header};

use super::{
    input::Id,
    problem::{Answer, Problem},
};
use crate::shared::Shared;

/// The page. It holds nothing secret: the person's API token is asked for, or
/// taken from this tab, and sent to this master only; the project gets a
/// connect token that is good once.
const PAGE: &str = include_str!("page.html");

/// What the page may do: its own script, calls to this master, and frames,
/// which are projects on origins of their own. Nobody may frame it.
const POLICY: &str = "default-src 'none'; script-src 'sha256-SCRIPT'; style-src 'unsafe-inline'; \
     connect-src 'self'; frame-src http: https:; form-action http: https:; base-uri 'none'; \
     frame-ancestors 'none'";

pub(super) async fn project(State(shared): State<Arc<Shared>>, Id(id): Id<ProjectId>) -> Answer<Response> {
    let link = |known: &Arc<crate::oidc::Known>| {
        let (name, shown) = (&known.name, escaped(&known.shown));
        format!("<a href=\"/auth/oidc/{name}/start?next=/projects/{id}\">Log in with {shown}</a>\n")
    };
    let links: String = shared.oidc.all().iter().map(link).collect();
    let page = PAGE
        .replace("SHARED_STYLE", cocalc_http::SHARED_STYLE)
        .replace("SHARED_SCRIPT", cocalc_http::SHARED_SCRIPT)
        .replace("PROJECT_ID", &id.to_string())
        .replace("LOG_INS", &links);
    respond(StatusCode::OK, page, POLICY)
}

/// A page with one script at most, which `policy` names `SCRIPT`. It may hold
/// secrets: nobody keeps it, and nobody learns where it was.
pub(super) fn respond(status: StatusCode, page: String, policy: &str) -> Answer<Response> {
    let policy = policy.replace("SCRIPT", &script_hash(&page));
    let policy = HeaderValue::from_str(&policy).map_err(|error| Problem::internal(&error))?;
    let mut response = (status, Html(page)).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_SECURITY_POLICY, policy);
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    Ok(response)
}

/// Text as it is written in HTML, within attributes, too.
pub(super) fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            c => escaped.push(c),
        }
    }
    escaped
}

/// Of the one script in the page, as a content security policy names it.
fn script_hash(page: &str) -> String {
    use base64::Engine;
    use sha2::Digest;
    let script = page.split_once("<script>").and_then(|(_, rest)| rest.split_once("</script>"));
    let digest = sha2::Sha256::digest(script.map_or("", |(script, _)| script).as_bytes());
    base64::engine::general_purpose::STANDARD.encode(digest)
}
