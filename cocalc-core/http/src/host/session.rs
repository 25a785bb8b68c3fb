//! Tokens become sessions.

use std::time::Duration;

use cocalc_core::{
    auth::{Denial, Principal, Secret},
    ids::{Action, ProjectId, Scope},
};
use http::{HeaderValue, Method, Response, StatusCode, Uri, header, request::Parts};
use http_body_util::{BodyExt, Limited};
use tokio::time::timeout;

use super::{Asked, Inner, view::View};
use crate::{
    body::Body,
    cookies::{self, Scope as CookieScope},
    credential::{self, Shown, TOKEN_FIELD},
    path::{Origin, Place, What},
    problem::Problem,
    websocket::Wish,
};

const FORM_BYTES_MAX: usize = 8 * 1024;
const FORM_WAIT: Duration = Duration::from_secs(10);

impl Inner {
    /// `?cocalc_token=` on a page: a session, and the same address without it.
    pub(super) async fn redeem_and_clean(
        &self,
        asked: &Asked<'_>,
        principal: &Principal,
    ) -> Result<Response<Body>, Problem> {
        let clean = format!("{}{}{}", asked.view.prefix, asked.parts.uri.path(), question(&asked.parts.uri));
        self.redeem(principal, &asked.place, &asked.view, &clean).await
    }

    /// `POST /.cocalc/session` of a project.
    pub(super) async fn session(&self, asked: Asked<'_>, body: Body) -> Result<Response<Body>, Problem> {
        let project = asked.place.project;
        if asked.parts.method == Method::DELETE {
            // Not because a page of another site wishes it.
            self.check_origin(&asked, &Shown::Cookies(cookies::Found::default()))?;
            // What was stolen is good for nothing any more, either.
            for session in self.sessions_shown(&asked) {
                let closed = self.auth.close_session(&session).await;
                closed.map_err(|denial| self.denied(project, &denial))?;
            }
            return Ok(self.forget(&asked));
        }
        if asked.parts.method != Method::POST {
            let problem = Problem::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "method_not_allowed",
                "A session is opened with POST, and forgotten with DELETE.",
            );
            return Err(problem.header("allow", "POST, DELETE".to_owned()));
        }
        let (token, next) = self.posted(&asked.parts, body, project).await?;
        let principal = self.verify(&Shown::Bearer(token), project, &asked.view).await?;
        // Where the project is matters only to who has a token for it.
        self.here(&asked, project).await?;
        self.open(&principal, &asked.place, &asked.view, next).await
    }

    /// The values of session cookies that the request has; as many as are looked
    /// up.
    fn sessions_shown(&self, asked: &Asked<'_>) -> Vec<Secret> {
        let own_origin = asked.place.mount.is_empty();
        let found = cookies::find_sessions(&asked.parts.headers, self.host, own_origin, asked.view.https);
        found.spellings.into_iter().flatten().collect()
    }

    /// `POST /.cocalc/session` on the daemon's own origin: the token says which
    /// project it is for.
    pub(super) async fn claimed_session(
        &self,
        parts: Parts,
        body: Body,
        view: View,
    ) -> Result<Response<Body>, Problem> {
        let (project, body) = claimed(&parts, body).await?;
        let mount = format!("{}/{project}", self.served.base());
        let place = Place { project, mount: &mount, what: What::Session };
        let asked = Asked { parts, wish: Wish::Plain, origin: Origin::Base, view, place };
        self.session(asked, body).await
    }

    /// The token and where to go next, from the header or from a form.
    async fn posted(
        &self,
        parts: &Parts,
        body: Body,
        project: ProjectId,
    ) -> Result<(Secret, Option<String>), Problem> {
        let bearer = credential::bearer(&parts.headers).map_err(|denial| self.denied(project, &denial))?;
        let is_form = parts.headers.get(header::CONTENT_TYPE).is_some_and(|kind| {
            let kind = kind.as_bytes();
            let form = b"application/x-www-form-urlencoded";
            kind.len() >= form.len() && kind[..form.len()].eq_ignore_ascii_case(form)
        });
        let form = if is_form { collect(body).await? } else { String::new() };
        let token = match bearer {
            Some(token) => Some(token.to_owned()),
            None => credential::form_field(&form, TOKEN_FIELD),
        };
        let unauthenticated = Denial::Unauthenticated;
        let token = token.ok_or_else(|| self.denied(project, &unauthenticated))?;
        Ok((Secret::new(token), credential::form_field(&form, "next")))
    }

    /// Opens a session for whatever the token is good for.
    async fn open(
        &self,
        principal: &Principal,
        place: &Place<'_>,
        view: &View,
        next: Option<String>,
    ) -> Result<Response<Body>, Problem> {
        let of_http = [Scope::Files, Scope::Http, Scope::Ws, Scope::Bus];
        let Some(scope) = of_http.into_iter().find(|scope| principal.scopes.contains(scope)) else {
            let denial = Denial::Forbidden("the token opens nothing of HTTP".to_owned());
            return Err(self.denied(place.project, &denial));
        };
        self.authorize(principal, place.project, Action::Use(scope)).await?;
        let root = format!("{}{}/", view.prefix, place.mount);
        let next = next.filter(|next| is_local(next, &root)).unwrap_or(root);
        self.redeem(principal, place, view, &next).await
    }

    /// Uses the token up, and answers with the cookie and the way on.
    async fn redeem(
        &self,
        principal: &Principal,
        place: &Place<'_>,
        view: &View,
        next: &str,
    ) -> Result<Response<Body>, Problem> {
        let opened = self.auth.open_session(principal, place.project).await;
        let session = opened.map_err(|denial| self.denied(place.project, &denial))?;
        let mut response = redirect(next)?;
        *response.status_mut() = StatusCode::SEE_OTHER;
        // On an own origin the mount is empty, and so is the prefix.
        let mount =
            if place.mount.is_empty() { String::new() } else { format!("{}{}", view.prefix, place.mount) };
        let scope = CookieScope { mount: &mount, https: view.https };
        for cookie in cookies::set_session(self.host, &session, scope) {
            let Ok(mut cookie) = HeaderValue::try_from(cookie) else {
                tracing::error!("a session's value is no cookie value");
                return Err(Problem::unavailable("session_failed", "No session could be opened.", 5));
            };
            cookie.set_sensitive(true);
            response.headers_mut().append(header::SET_COOKIE, cookie);
        }
        Ok(response)
    }
}

/// Sends the user on to `location`, which is a path of this origin.
pub(super) fn redirect(location: &str) -> Result<Response<Body>, Problem> {
    // "//name" would lead to another origin; a dot segment before it doesn't
    // change the path.
    let guard = if location.starts_with("//") || location.starts_with("/\\") { "/." } else { "" };
    let location = HeaderValue::try_from(format!("{guard}{location}"))
        .map_err(|_| Problem::bad_request("The address cannot be written in a header field."))?;
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::TEMPORARY_REDIRECT;
    let headers = response.headers_mut();
    headers.insert(header::LOCATION, location);
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    Ok(response)
}

/// The query without a token, with its question mark; empty without a query.
pub(super) fn question(uri: &Uri) -> String {
    match uri.query().map(credential::clean_query) {
        Some(query) if !query.is_empty() => format!("?{query}"),
        _ => String::new(),
    }
}

/// Whether `next` stays inside the project.
fn is_local(next: &str, root: &str) -> bool {
    next.starts_with(root)
        && !next.starts_with("//")
        && next.bytes().all(|b| b.is_ascii_graphic() && b != b'\\')
        && !next.split(['/', '?', '#']).any(is_dots)
}

/// Whether a browser takes a segment for `.` or `..`.
fn is_dots(segment: &str) -> bool {
    matches!(segment.to_ascii_lowercase().replace("%2e", ".").as_str(), "." | "..")
}

/// The project that a posted token claims to be for: a hint, for routing.
pub(crate) async fn claimed(parts: &Parts, body: Body) -> Result<(ProjectId, Body), Problem> {
    let bearer = credential::bearer(&parts.headers).ok().flatten();
    if let Some(project) = bearer.and_then(credential::claimed_project) {
        return Ok((project, body));
    }
    let form = collect(body).await?;
    let token = credential::form_field(&form, TOKEN_FIELD);
    match token.as_deref().and_then(credential::claimed_project) {
        Some(project) => Ok((project, Body::from(form))),
        None if token.is_none() && bearer.is_none() => Err(Problem::from(Denial::Unauthenticated)),
        None => Err(Problem::from(Denial::BadCredential("names no project".to_owned()))),
    }
}

async fn collect(body: Body) -> Result<String, Problem> {
    let too_much = || Problem {
        close: true,
        ..Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", "The form is too large.")
    };
    let collected = timeout(FORM_WAIT, Limited::new(body, FORM_BYTES_MAX).collect()).await;
    let bytes = match collected {
        Ok(Ok(collected)) => collected.to_bytes(),
        Ok(Err(_)) | Err(_) => return Err(too_much()),
    };
    String::from_utf8(bytes.into()).map_err(|_| Problem::bad_request("The form is not text."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ways_on_stay_inside_the_project() {
        for good in ["/id/", "/id/port/80/?a=b#c", "/id/a..b/"] {
            assert!(is_local(good, "/id/"), "{good}");
        }
        for bad in [
            "",
            "/",
            "/id",
            "/idx/",
            "//id/",
            "https://evil/",
            "/id/\r\n",
            "/id/../x/",
            "/id/%2e%2E/x",
            "/id/.%2e",
            "/id/a\\b",
            "/id/é",
        ] {
            assert!(!is_local(bad, "/id/"), "{bad}");
        }
        assert!(!is_local("//evil.example/", "/"));
        assert!(is_local("/port/80/", "/"));
    }

    #[test]
    fn redirects_stay_on_this_origin() {
        let location =
            |to: &str| redirect(to).unwrap().headers()[header::LOCATION].to_str().unwrap().to_owned();
        assert_eq!(location("/a?b"), "/a?b");
        assert_eq!(location("//evil.example"), "/.//evil.example");
        assert_eq!(location("/\\evil.example"), "/./\\evil.example");
        assert!(redirect("/a\r\nb: c").is_err());
    }
}
