//! Short-lived credentials for one repository, from S3's and Google's token
//! services.

use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use cocalc_backup::{
    Bounds, Gcs, GcsAccess, GcsCredentials, Location, Mint, Minted, Place, S3, S3Access, Secret,
    protocol::FailureKind,
};
use cocalc_core::{error::chain, ids::Timestamp};
use http::{Method, header};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use object_store::{
    aws::{AwsAuthorizer, AwsCredential},
    client::{HttpClient, HttpConnector as _, HttpRequest, ReqwestConnector},
};
use serde::{Deserialize, Serialize};

use crate::{
    failure::Failed,
    store::bucket::{client, words},
};

/// The longest answer that is read.
const ANSWER_BYTES_MAX: usize = 1 << 20;
const FORM: &str = "application/x-www-form-urlencoded";

pub(crate) fn mint(mint: &Mint, bounds: &Bounds) -> Result<Minted, Failed> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failed::new(FailureKind::Other, error.to_string()))?;
    runtime.block_on(async {
        let minted = async {
            match &mint.from {
                Place::S3(_) => s3(mint, bounds).await,
                Place::Gcs(_) => gcs(mint, bounds).await,
                Place::Directory { .. } => Err(nothing_to_mint()),
            }
        };
        // Asked once: whoever wants them asks again.
        tokio::time::timeout(bounds.retry_max, minted)
            .await
            .unwrap_or_else(|_| Err(Failed::new(FailureKind::Unavailable, "no answer in time")))
    })
}

fn nothing_to_mint() -> Failed {
    Failed::new(FailureKind::Invalid, "this place has no short-lived credentials")
}

/// Assumes the role, with a policy for the scope.
async fn s3(mint: &Mint, bounds: &Bounds) -> Result<Minted, Failed> {
    let Place::S3(place) = &mint.from else { return Err(nothing_to_mint()) };
    let S3Access::Role { keys, role_arn, sts_endpoint, life_secs } = &place.credentials else {
        return Err(nothing_to_mint());
    };
    let url = sts_endpoint.clone().unwrap_or_else(|| format!("https://sts.{}.amazonaws.com", place.region));
    let form = form(&[
        ("Action", "AssumeRole"),
        ("Version", "2011-06-15"),
        ("RoleArn", role_arn),
        ("RoleSessionName", &session_name(&mint.scope.prefix)),
        ("DurationSeconds", &life_secs.to_string()),
        ("Policy", &mint.scope.s3_policy().to_string()),
    ]);
    let mut request = post(&url, form)?;
    let credential = AwsCredential {
        key_id: keys.access_key_id.clone(),
        secret_key: keys.secret_access_key.expose().to_owned(),
        token: None,
    };
    let signed = AwsAuthorizer::new(&credential, "sts", &place.region).try_authorize(&mut request, None);
    signed.map_err(|error| Failed::new(FailureKind::Other, words(&error)))?;
    let answer = ask(&url, request, bounds).await?;
    let text = String::from_utf8_lossy(&answer);
    let assumed: Assumed = quick_xml::de::from_str(&text).map_err(|error| not_understood(&url, &error))?;
    let made = assumed.result.credentials;
    let expires: jiff::Timestamp =
        made.expiration.parse().map_err(|error: jiff::Error| not_understood(&url, &error))?;
    Ok(Minted {
        location: Location::S3(S3 {
            bucket: place.bucket.clone(),
            prefix: mint.scope.prefix.clone(),
            region: place.region.clone(),
            endpoint: place.endpoint.clone(),
            access_key_id: made.access_key_id,
            secret_access_key: Secret::new(made.secret_access_key),
            session_token: Some(Secret::new(made.session_token)),
        }),
        expires: Timestamp::from_millis(expires.as_millisecond()),
    })
}

/// What is called in the logs of the cloud who used the role: 2 to 64 of few
/// characters.
fn session_name(prefix: &str) -> String {
    let last = prefix.rsplit('/').next().unwrap_or_default();
    let allowed = last.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-');
    format!("cocalc-{}", allowed.take(50).collect::<String>())
}

#[derive(Deserialize)]
struct Assumed {
    #[serde(rename = "AssumeRoleResult")]
    result: AssumedResult,
}

#[derive(Deserialize)]
struct AssumedResult {
    #[serde(rename = "Credentials")]
    credentials: AssumedCredentials,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct AssumedCredentials {
    access_key_id: String,
    secret_access_key: String,
    session_token: String,
    expiration: String,
}

/// The parts of a service account's key that are needed.
#[derive(Deserialize)]
struct Account {
    client_email: String,
    private_key_id: String,
    private_key: Secret,
    #[serde(default = "google_token_uri")]
    token_uri: String,
}

fn google_token_uri() -> String {
    "https://oauth2.googleapis.com/token".to_owned()
}

#[derive(Serialize)]
struct Claims<'a> {
    iss: &'a str,
    scope: &'static str,
    aud: &'a str,
    iat: u64,
    exp: u64,
}

#[derive(Deserialize)]
struct Token {
    access_token: Secret,
    expires_in: Option<u64>,
}

/// Gets a token of the account, and exchanges it for one within the scope.
async fn gcs(mint: &Mint, bounds: &Bounds) -> Result<Minted, Failed> {
    let Place::Gcs(place) = &mint.from else { return Err(nothing_to_mint()) };
    let GcsAccess::Scoped { account, sts_endpoint } = &place.credentials else {
        return Err(nothing_to_mint());
    };
    let wrong = |words: String| Failed::new(FailureKind::Invalid, format!("the service account: {words}"));
    // An error of the parser shows what it met, which may be the key.
    let account: Account = serde_json::from_str(account.expose())
        .map_err(|_| wrong("not the key of a service account, as Google gives it out".into()))?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let claims = Claims {
        iss: &account.client_email,
        scope: "https://www.googleapis.com/auth/devstorage.full_control",
        aud: &account.token_uri,
        iat: now,
        exp: now + 3600,
    };
    let key = EncodingKey::from_rsa_pem(account.private_key.expose().as_bytes())
        .map_err(|error| wrong(error.to_string()))?;
    let header = Header { kid: Some(account.private_key_id.clone()), ..Header::new(Algorithm::RS256) };
    let assertion = jsonwebtoken::encode(&header, &claims, &key).map_err(|error| wrong(error.to_string()))?;
    let whole: Token = token(
        &account.token_uri,
        &[("grant_type", "urn:ietf:params:oauth:grant-type:jwt-bearer"), ("assertion", &assertion)],
        bounds,
    )
    .await?;

    const ACCESS_TOKEN: &str = "urn:ietf:params:oauth:token-type:access_token";
    let url = sts_endpoint.clone().unwrap_or_else(|| "https://sts.googleapis.com/v1/token".to_owned());
    // Encoded once for the field and once more for the form, as Google wants it.
    let boundary = mint.scope.gcs_boundary().to_string();
    let boundary = form(&[("", &boundary)]);
    let scoped: Token = token(
        &url,
        &[
            ("grant_type", "urn:ietf:params:oauth:grant-type:token-exchange"),
            ("requested_token_type", ACCESS_TOKEN),
            ("subject_token_type", ACCESS_TOKEN),
            ("subject_token", whole.access_token.expose()),
            ("options", boundary.trim_start_matches('=')),
        ],
        bounds,
    )
    .await?;
    // It ends with the one that it was exchanged for, if it says nothing else.
    let life = scoped.expires_in.or(whole.expires_in).unwrap_or(3600).min(43_200);
    Ok(Minted {
        location: Location::Gcs(Gcs {
            bucket: place.bucket.clone(),
            prefix: mint.scope.prefix.clone(),
            endpoint: place.endpoint.clone(),
            credentials: GcsCredentials::Token(scoped.access_token),
        }),
        expires: Timestamp::from_secs(i64::try_from(now + life).unwrap_or(i64::MAX / 1000)),
    })
}

async fn token(url: &str, fields: &[(&str, &str)], bounds: &Bounds) -> Result<Token, Failed> {
    let answer = ask(url, post(url, form(fields))?, bounds).await?;
    // An error of the parser shows what it met, which may be the token.
    serde_json::from_slice(&answer)
        .map_err(|_| Failed::new(FailureKind::Unavailable, format!("{url} answered with no token")))
}

/// A form's fields as HTML encodes them.
fn form(fields: &[(&str, &str)]) -> String {
    let Ok(mut url) = reqwest::Url::parse("http://form/") else { return String::new() };
    url.query_pairs_mut().extend_pairs(fields);
    url.query().unwrap_or_default().to_owned()
}

fn post(url: &str, form: String) -> Result<HttpRequest, Failed> {
    http::Request::builder()
        .method(Method::POST)
        .uri(url)
        .header(header::CONTENT_TYPE, FORM)
        .body(form.into())
        .map_err(|error| Failed::new(FailureKind::Invalid, format!("{url}: {error}")))
}

async fn ask(url: &str, request: HttpRequest, bounds: &Bounds) -> Result<Bytes, Failed> {
    let unavailable = |words: String| Failed::new(FailureKind::Unavailable, format!("{url}: {words}"));
    let client: HttpClient = ReqwestConnector::default()
        .connect(&client(Some(url), bounds))
        .map_err(|error| unavailable(chain(&error)))?;
    let answer = client.execute(request).await.map_err(|error| unavailable(chain(&error)))?;
    let (head, body) = answer.into_parts();
    let body = body.bytes().await.map_err(|error| unavailable(chain(&error)))?;
    if body.len() > ANSWER_BYTES_MAX {
        return Err(unavailable("the answer is too long".into()));
    }
    if head.status.is_success() {
        return Ok(body);
    }
    let kind = if head.status.is_client_error() { FailureKind::Denied } else { FailureKind::Unavailable };
    let said: String = String::from_utf8_lossy(&body).chars().take(500).collect();
    Err(Failed::new(kind, format!("{url}: {}: {said}", head.status)))
}

fn not_understood(url: &str, error: &dyn std::fmt::Display) -> Failed {
    Failed::new(FailureKind::Unavailable, format!("{url}: the answer is not understood: {error}"))
}
