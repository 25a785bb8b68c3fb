//! Logging in with an OpenID provider: two addresses for browsers, and what
//! programs call.

use std::{net::IpAddr, sync::Arc};

use axum::{
    Extension, Form, Json,
    extract::{Path, Query, State},
    response::{IntoResponse, Response},
};
use cocalc_auth_oidc::{Begun, Error, Person};
use cocalc_ids::AccountId;
use cocalc_sqlite::master::{self as store, Account};
use http::{HeaderMap, HeaderValue, StatusCode, Uri, header};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    input::{Body, clean_name},
    login::{LoggedIn, log_in},
    page::{escaped, respond},
    problem::{Answer, Problem},
    trail::Trail,
};
use crate::{
    limits::Source,
    oidc::{self, Consent, Handoff, Known, LOGIN_LIFE, Login, Program, Target},
    secret,
    shared::Shared,
};

const PAGE: &str = include_str!("oidc.html");

/// What its pages may do: their own script.
const POLICY: &str = "default-src 'none'; script-src 'sha256-SCRIPT'; style-src 'unsafe-inline'; \
     form-action 'none'; base-uri 'none'; frame-ancestors 'none'";

pub(super) fn open_routes() -> OpenApiRouter<Arc<Shared>> {
    OpenApiRouter::new().routes(routes!(providers, redeem))
}

#[derive(Serialize, ToSchema)]
struct ProviderView {
    name: String,
    display_name: String,
}

#[derive(Serialize, ToSchema)]
struct Providers {
    providers: Vec<ProviderView>,
}

/// Lists the OpenID providers with which people can log in.
#[utoipa::path(get, path = "/login/oidc", tag = "accounts",
    responses((status = 200, body = Providers), (status = "default", body = Problem)))]
async fn providers(State(shared): State<Arc<Shared>>) -> Json<Providers> {
    let view =
        |known: &Arc<Known>| ProviderView { name: known.name.clone(), display_name: known.shown.clone() };
    Json(Providers { providers: shared.oidc.all().iter().map(view).collect() })
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Redeem {
    /// What the program's own address got.
    code: String,
    /// The secret whose hash was named at the beginning.
    verifier: String,
}

/// Ends a program's log-in with an OpenID provider: it has a code, and the
/// secret that goes with it.
#[utoipa::path(post, path = "/login/oidc", tag = "accounts",
    request_body = Redeem,
    responses((status = 201, body = LoggedIn), (status = "default", body = Problem)))]
async fn redeem(
    State(shared): State<Arc<Shared>>,
    trail: Option<Extension<Trail>>,
    Body(asked): Body<Redeem>,
) -> Answer<(StatusCode, Json<LoggedIn>)> {
    let refused = || {
        let detail = "the code is not good, was used, or is older than two minutes";
        Problem::new(StatusCode::UNAUTHORIZED, "unauthenticated", detail)
    };
    match shared.oidc.redeem(&asked.code, &asked.verifier, shared.clock.boot()) {
        Some(Handoff::LogIn(account)) => {
            if let Some(Extension(trail)) = trail {
                trail.is(account.id, None);
            }
            Ok((StatusCode::CREATED, Json(log_in(&shared, account).await?)))
        }
        _ => Err(refused()),
    }
}

/// How a log-in begins. With `port`, for a program on that port of 127.0.0.1.
#[derive(Deserialize)]
struct Asked {
    next: Option<String>,
    port: Option<u16>,
    challenge: Option<String>,
    state: Option<String>,
    #[serde(default)]
    link: bool,
}

impl Asked {
    fn target(self) -> Answer<Target> {
        let Some(port) = self.port else {
            return match self.next {
                Some(next) if !oidc::is_local_path(&next) => {
                    Err(Problem::invalid("next: only a path of this server"))
                }
                next => Ok(Target::Page { next }),
            };
        };
        let is_state = |text: &String| {
            (16..=128).contains(&text.len())
                && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
        };
        let challenge = self.challenge.as_deref().and_then(oidc::parse_challenge);
        match (port, challenge, self.state.filter(is_state), self.next) {
            (1.., Some(challenge), Some(state), None) => {
                Ok(Target::Program(Program { port, state, challenge, link: self.link }))
            }
            _ => Err(Problem::invalid(
                "a program names port, challenge (SHA-256 of its verifier, base64url) and state \
                 (16 to 128 of A-Z, a-z, 0-9, - and _), and no next",
            )),
        }
    }
}

/// The cookie by which a browser is known again. Its prefix keeps other hosts
/// of the domain from setting it; without TLS there is no such thing.
fn cookie_name(shared: &Shared) -> &'static str {
    if shared.issuer.starts_with("https://") { "__Host-cocalc-oidc" } else { "cocalc-oidc" }
}

fn cookie(shared: &Shared, headers: &HeaderMap) -> Option<String> {
    let name = cookie_name(shared);
    let texts = headers.get_all(header::COOKIE).iter().filter_map(|field| field.to_str().ok());
    let mut pairs = texts.flat_map(|field| field.split(';')).filter_map(|pair| pair.trim().split_once('='));
    let value = pairs.find(|(key, _)| *key == name).map(|(_, value)| value)?;
    oidc::is_secret(value).then(|| value.to_owned())
}

fn set_cookie(shared: &Shared, value: &str) -> Answer<HeaderValue> {
    let secure = if shared.issuer.starts_with("https://") { "; Secure" } else { "" };
    let (name, age) = (cookie_name(shared), LOGIN_LIFE.as_secs());
    // Lax: it comes along when the provider sends the browser back.
    let text = format!("{name}={value}; Path=/; Max-Age={age}; HttpOnly; SameSite=Lax{secure}");
    HeaderValue::from_str(&text).map_err(|error| Problem::internal(&error))
}

/// Sends a browser to a provider.
pub(super) async fn start(
    State(shared): State<Arc<Shared>>,
    source: Option<Extension<Source>>,
    Path(name): Path<String>,
    headers: HeaderMap,
    uri: Uri,
) -> Response {
    let source = source.map(|Extension(Source(source))| source);
    match begin(&shared, source, &name, &headers, &uri).await {
        Ok(response) => response,
        Err(problem) => refusal(&problem),
    }
}

async fn begin(
    shared: &Shared,
    source: Option<IpAddr>,
    name: &str,
    headers: &HeaderMap,
    uri: &Uri,
) -> Answer<Response> {
    let known = shared.oidc.by_name(name).ok_or_else(|| Problem::not_found("provider"))?;
    let Query(asked) =
        Query::<Asked>::try_from_uri(uri).map_err(|error| Problem::invalid(error.body_text()))?;
    let target = asked.target()?;
    if let Some(source) = source {
        shared.limits.begin(source, shared.clock.boot())?;
    }
    let Begun { url, state, pending } =
        known.provider.begin().await.map_err(|error| failed(known, &error))?;
    // One that is there goes on, so that log-ins in two tabs are both good.
    let browser = match cookie(shared, headers) {
        Some(value) => value,
        None => secret::generate("").map_err(|error| Problem::internal(&error))?,
    };
    let login = Login { known: known.clone(), pending, browser: secret::hash(&browser), target };
    shared.oidc.begin(&state, login, shared.clock.boot());
    let mut response = redirect(&url)?;
    response.headers_mut().insert(header::SET_COOKIE, set_cookie(shared, &browser)?);
    Ok(response)
}

/// How a browser comes back.
#[derive(Deserialize)]
struct Returned {
    state: Option<String>,
    code: Option<String>,
    error: Option<String>,
    /// RFC 9207.
    iss: Option<String>,
}

/// Takes a browser back from its provider.
pub(super) async fn callback(
    State(shared): State<Arc<Shared>>,
    source: Option<Extension<Source>>,
    trail: Option<Extension<Trail>>,
    Path(name): Path<String>,
    headers: HeaderMap,
    uri: Uri,
) -> Response {
    let source = source.map(|Extension(Source(source))| source);
    let trail = trail.map(|Extension(trail)| trail).unwrap_or_default();
    let refused = |problem: &Problem| {
        trail.refuses(problem.code());
        tracing::info!(
            ?source,
            provider = shared.oidc.by_name(&name).map(|known| &*known.name),
            code = problem.code(),
            reason = problem.detail(),
            "a log-in with OpenID was refused"
        );
    };
    let (login, returned) = match resume(&shared, &name, &headers, &uri) {
        Ok(resumed) => resumed,
        Err(problem) => {
            refused(&problem);
            return refusal(&problem);
        }
    };
    let target = login.target.clone();
    let answer = match finish(&shared, &trail, login, returned).await {
        Ok(response) => return response,
        Err(problem) => problem,
    };
    refused(&answer);
    // From here on it is known who waits for an answer.
    match &target {
        Target::Page { .. } => refusal(&answer),
        Target::Program(program) => {
            let said = [("error", answer.code()), ("detail", answer.detail())];
            to_program(program, &said).unwrap_or_else(|problem| refusal(&problem))
        }
    }
}

/// The log-in that goes on here, if it began here and in this browser.
fn resume(shared: &Shared, name: &str, headers: &HeaderMap, uri: &Uri) -> Answer<(Login, Returned)> {
    let unknown =
        || Problem::invalid("this log-in is not known, was used, or is older than ten minutes: begin again");
    let Query(returned) =
        Query::<Returned>::try_from_uri(uri).map_err(|error| Problem::invalid(error.body_text()))?;
    let state = returned.state.as_deref().ok_or_else(unknown)?;
    let login = shared.oidc.resume(state, shared.clock.boot()).ok_or_else(unknown)?;
    if login.known.name != name {
        return Err(unknown());
    }
    // Otherwise somebody could be made to use another's log-in.
    if cookie(shared, headers).is_none_or(|value| secret::hash(&value) != login.browser) {
        return Err(Problem::new(
            StatusCode::FORBIDDEN,
            "access_denied",
            "this log-in began in another browser, or cookies are off: begin again",
        ));
    }
    Ok((login, returned))
}

async fn finish(shared: &Shared, trail: &Trail, login: Login, returned: Returned) -> Answer<Response> {
    let known = &login.known;
    let denied = |detail: String| Problem::new(StatusCode::FORBIDDEN, "access_denied", detail);
    if let Some(error) = returned.error {
        let word: String =
            error.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '_').take(40).collect();
        return Err(denied(format!("{} did not log you in: {word}", known.shown)));
    }
    if returned.iss.is_some_and(|issuer| issuer != known.provider.issuer()) {
        return Err(denied("the answer is of another provider".to_owned()));
    }
    let code = returned.code.ok_or_else(|| Problem::invalid("the provider gave no code"))?;
    let person = known.provider.finish(login.pending, &code).await.map_err(|error| failed(known, &error))?;
    if !known.admits(&person) {
        return Err(denied(format!(
            "only people with a verified address in certain domains are let in with {}",
            known.shown
        )));
    }
    let provider = known.provider.issuer().to_owned();
    match login.target {
        Target::Program(program) if program.link => {
            let ask = format!("wants to link your identity of {} to an account", known.shown);
            let handoff = Handoff::Link { provider, subject: person.subject };
            ask_first(shared, known, Consent { browser: login.browser, program, handoff }, &ask)
        }
        Target::Program(program) => {
            let account = account_of(shared, known, person).await?;
            trail.is(account.id, None);
            let ask = format!("wants to log in as {}", account.name);
            let handoff = Handoff::LogIn(account);
            ask_first(shared, known, Consent { browser: login.browser, program, handoff }, &ask)
        }
        Target::Page { next } => {
            let account = account_of(shared, known, person).await?;
            trail.is(account.id, None);
            let text = format!("You are logged in as {}.", account.name);
            let logged = log_in(shared, account).await?;
            logged_in_page(&text, &logged.token, next.as_deref())
        }
    }
}

/// Whose identity it is: by issuer and subject, and by nothing else that a
/// provider says, such as an address.
async fn account_of(shared: &Shared, known: &Known, person: Person) -> Answer<Account> {
    let name = oidc::account_name(&person, |name| clean_name(name).ok());
    let (provider, id, now) = (known.provider.issuer().to_owned(), AccountId::random(), shared.now());
    let make = known.create_accounts;
    let find = move |store: &store::Store| {
        let make = make.then_some((id, &*name));
        store.account_of_identity(&provider, &person.subject, make, now)
    };
    let account = shared.db(find).await.map_err(|error| match error {
        store::Error::NotFound { .. } => Problem::new(
            StatusCode::FORBIDDEN,
            "access_denied",
            format!(
                "no account here has this identity of {}: link it to yours, or ask an administrator",
                known.shown
            ),
        ),
        other => other.into(),
    })?;
    if account.id == id {
        tracing::info!(account = %id, provider = known.name, "an account was made for who logged in");
    }
    if account.banned {
        return Err(Problem::denied());
    }
    shared.limits.identified(account.id, shared.clock.boot())?;
    Ok(account)
}

/// What people and programs learn of a provider's failure; the log learns why.
fn failed(known: &Known, error: &Error) -> Problem {
    tracing::warn!(provider = known.name, %error, "a log-in with an OpenID provider failed");
    let shown = &known.shown;
    match error {
        Error::Unavailable { .. } => Problem::unavailable(
            "provider_unavailable",
            format!("{shown} cannot be reached now, or does not answer as it should; try again later"),
        ),
        Error::Busy => Problem::unavailable("busy", "too many people log in at this moment"),
        _ => Problem::new(
            StatusCode::FORBIDDEN,
            "access_denied",
            format!(
                "what {shown} answered proves nobody; begin again, and tell an administrator if it stays so"
            ),
        ),
    }
}

/// Asks whether a program shall have it. Whoever is logged in at their provider
/// would otherwise be taken through all of this by a link, without a word, to a
/// port that may be somebody else's: a tunnel into a project, for one.
fn ask_first(shared: &Shared, known: &Known, consent: Consent, what: &str) -> Answer<Response> {
    let (port, code) = (consent.program.port, oidc::shown_code(&consent.program.challenge));
    let word = shared.oidc.ask(consent, shared.clock.boot()).map_err(|error| Problem::internal(&error))?;
    let text = format!(
        "A program on port {port} of this computer {what}. Agree only if you have just started it \
         yourself, and it shows the code {code}. If not, close this page."
    );
    let form = format!(
        "<form method=\"post\" action=\"/auth/oidc/{}/agree\"><input type=\"hidden\" name=\"word\" \
         value=\"{word}\"><button>The code is {code}: go on</button></form>",
        escaped(&known.name)
    );
    // Browsers hold the redirect that answers a form to this, too.
    let policy = POLICY.replace("form-action 'none'", &format!("form-action 'self' http://127.0.0.1:{port}"));
    respond(StatusCode::OK, fill("One more step", &text, "", &form), &policy)
}

/// What the form of [`ask_first`] brings.
#[derive(Deserialize)]
pub(super) struct Agreed {
    word: String,
}

/// Gives a program what the person in the browser has agreed to.
pub(super) async fn agree(
    State(shared): State<Arc<Shared>>,
    trail: Option<Extension<Trail>>,
    headers: HeaderMap,
    Form(agreed): Form<Agreed>,
) -> Response {
    let handed = agree_to(&shared, &headers, &agreed.word);
    handed.unwrap_or_else(|problem| {
        if let Some(Extension(trail)) = trail {
            trail.refuses(problem.code());
        }
        refusal(&problem)
    })
}

fn agree_to(shared: &Shared, headers: &HeaderMap, word: &str) -> Answer<Response> {
    let unknown = || Problem::invalid("this was answered, or is older than ten minutes: begin again");
    let Consent { browser, program, handoff } =
        shared.oidc.agreed(word, shared.clock.boot()).ok_or_else(unknown)?;
    if cookie(shared, headers).is_none_or(|value| secret::hash(&value) != browser) {
        return Err(Problem::denied());
    }
    let code = shared.oidc.hand_off(program.challenge, handoff, shared.clock.boot());
    let code = code.map_err(|error| Problem::internal(&error))?;
    to_program(&program, &[("code", &code)])
}

/// Sends the browser to a program on its machine.
fn to_program(program: &Program, said: &[(&str, &str)]) -> Answer<Response> {
    let mut url = format!("http://127.0.0.1:{}/?state={}", program.port, program.state);
    for (key, value) in said {
        url.push_str(&format!("&{key}={}", encoded(value)));
    }
    redirect(&url)
}

/// A text as part of a query.
fn encoded(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => encoded.push(byte.into()),
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

fn redirect(url: &str) -> Answer<Response> {
    let url = HeaderValue::from_str(url).map_err(|error| Problem::internal(&error))?;
    let mut response = StatusCode::SEE_OTHER.into_response();
    let headers = response.headers_mut();
    headers.insert(header::LOCATION, url);
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
}

fn page(status: StatusCode, title: &str, text: &str, data: &str) -> Answer<Response> {
    respond(status, fill(title, text, data, ""), POLICY)
}

fn fill(title: &str, text: &str, data: &str, form: &str) -> String {
    // None of these marks can be in what takes the place of another.
    PAGE.replace("<!--TITLE-->", &escaped(title))
        .replace("<!--DATA-->", data)
        .replace("<!--FORM-->", form)
        .replace("<!--TEXT-->", &escaped(text))
}

fn logged_in_page(text: &str, token: &str, next: Option<&str>) -> Answer<Response> {
    let next = next.map(|next| format!(" data-next=\"{}\"", escaped(next))).unwrap_or_default();
    let data = format!(" data-token=\"{}\"{next}", escaped(token));
    page(StatusCode::OK, "Logged in", text, &data)
}

/// Says to a person why not. As with all calls, 429 and 503 say when to try
/// again, and programs see the code.
fn refusal(problem: &Problem) -> Response {
    let document = problem.clone().into_response();
    let shown = page(document.status(), "Not logged in", problem.detail(), "");
    let mut response = match shown {
        Ok(response) => response,
        Err(_) => return document,
    };
    let headers = response.headers_mut();
    headers.insert("cocalc-code", HeaderValue::from_static(problem.code()));
    if let Some(after) = document.headers().get(header::RETRY_AFTER) {
        headers.insert(header::RETRY_AFTER, after.clone());
    }
    response
}
