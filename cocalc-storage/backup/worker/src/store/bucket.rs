//! A repository in a bucket of S3 or of Google Cloud Storage.

use std::{
    fmt,
    future::Future,
    io,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use async_trait::async_trait;
use bytes::Bytes;
use cocalc_backup::{Bounds, Gcs, GcsCredentials, Location, S3, protocol::FailureKind};
use futures_util::TryStreamExt as _;
use object_store::{
    BackoffConfig, ClientOptions, CredentialProvider, Error, ObjectStore, ObjectStoreExt as _, PutMode,
    PutOptions, PutPayload, RetryConfig,
    aws::{AmazonS3Builder, AwsCredential},
    gcp::{GcpCredential, GoogleCloudStorageBuilder},
    path::Path,
};
use tokio::runtime::Runtime;

use super::{CLOCK, Mode, Store, exists};
use crate::{
    failure::Failed,
    renewal::{Renewal, Which},
};

/// How long a connection may take to be made.
const CONNECT_MAX: Duration = Duration::from_secs(10);
/// How often other credentials are asked for because of one request.
const RENEWALS_MAX: u32 = 2;
/// The longest pause between two tries.
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// Credentials that can be replaced while requests are made.
#[derive(Debug)]
struct Shown<T>(Mutex<Arc<T>>);

impl<T> Shown<T> {
    fn new(credential: T) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Arc::new(credential))))
    }

    fn set(&self, credential: T) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(credential);
    }
}

#[async_trait]
impl<T: fmt::Debug + Send + Sync> CredentialProvider for Shown<T> {
    type Credential = T;

    async fn get_credential(&self) -> Result<Arc<T>, Error> {
        Ok(Arc::clone(&self.0.lock().unwrap_or_else(PoisonError::into_inner)))
    }
}

/// What is shown to the store, if it can be replaced.
enum Replaceable {
    S3(Arc<Shown<AwsCredential>>),
    Gcs(Arc<Shown<GcpCredential>>),
    /// The client makes its own.
    No,
}

pub(crate) struct Bucket {
    objects: Arc<dyn ObjectStore>,
    prefix: String,
    runtime: Runtime,
    retry_max: Duration,
    shown: Replaceable,
    renewal: Arc<Renewal>,
    which: Which,
    /// Where this is, with the credentials that are shown, and the number of the
    /// answer that they came with.
    now: Mutex<(u64, Location)>,
}

impl fmt::Debug for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bucket").field("prefix", &self.prefix).finish_non_exhaustive()
    }
}

impl Bucket {
    pub(crate) fn new(
        location: &Location,
        bounds: &Bounds,
        renewal: &Arc<Renewal>,
        which: Which,
    ) -> Result<Self, Failed> {
        let (objects, prefix, shown) = match location {
            Location::S3(place) => {
                let (objects, shown) = s3(place, bounds);
                (objects, &place.prefix, shown)
            }
            Location::Gcs(place) => {
                let (objects, shown) = gcs(place, bounds);
                (objects, &place.prefix, shown)
            }
            Location::Directory { path } => {
                return Err(Failed::new(FailureKind::Invalid, format!("{} is no bucket", path.display())));
            }
        };
        let objects = objects.map_err(|error| Failed::new(FailureKind::Invalid, words(&error)))?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .map_err(|error| Failed::new(FailureKind::Other, error.to_string()))?;
        Ok(Self {
            objects,
            prefix: prefix.clone(),
            runtime,
            retry_max: bounds.retry_max,
            shown,
            renewal: Arc::clone(renewal),
            which,
            now: Mutex::new((0, location.clone())),
        })
    }

    /// The number of the answer whose credentials are shown now.
    fn answer(&self) -> u64 {
        self.now.lock().unwrap_or_else(PoisonError::into_inner).0
    }

    /// Shows others than those of answer `seen`, which were refused. False if
    /// there are none.
    fn renew(&self, seen: u64) -> bool {
        if matches!(self.shown, Replaceable::No) {
            return false;
        }
        let mut now = self.now.lock().unwrap_or_else(PoisonError::into_inner);
        if now.0 > seen {
            return true;
        }
        let Some((answer, location)) = self.renewal.after(seen, self.which) else { return false };
        if location == now.1 {
            return false;
        }
        match (&self.shown, &location) {
            (Replaceable::S3(shown), Location::S3(place)) => shown.set(aws(place)),
            (Replaceable::Gcs(shown), Location::Gcs(place)) => match bearer(&place.credentials) {
                Some(token) => shown.set(token),
                None => return false,
            },
            _ => return false,
        }
        *now = (answer, location);
        true
    }

    fn path(&self, name: &str) -> Path {
        Path::from(format!("{}/{name}", self.prefix))
    }

    /// Asks, and asks again while it may help: the client below tries again
    /// what a server refused, but not a body that was cut off.
    fn ask<T, F>(&self, what: &str, name: &str, call: impl Fn() -> F) -> Result<T, Failed>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let until = Instant::now() + self.retry_max;
        let mut pause = Duration::from_millis(100);
        let mut renewals = 0;
        loop {
            let answer = self.answer();
            match self.runtime.block_on(call()) {
                Ok(done) => return Ok(done),
                Err(error)
                    if kind(&error) == FailureKind::Denied
                        && renewals < RENEWALS_MAX
                        && self.renew(answer) =>
                {
                    renewals += 1;
                }
                Err(error) if is_transient(&error) && Instant::now() + pause < until => {
                    std::thread::sleep(pause);
                    pause = (pause * 2).min(PAUSE_MAX);
                }
                Err(Error::AlreadyExists { .. } | Error::Precondition { .. }) => return Err(exists(name)),
                Err(error) => {
                    return Err(Failed::new(
                        kind(&error),
                        format!("cannot {what} {name}: {}", words(&error)),
                    ));
                }
            }
        }
    }
}

impl Store for Bucket {
    fn create(&self) -> Result<(), Failed> {
        Ok(())
    }

    fn list(&self, directory: &str) -> Result<Vec<(String, u64)>, Failed> {
        let path = self.path(directory);
        self.ask("list", directory, || async {
            let found = self
                .objects
                .list(Some(&path))
                .map_ok(|object| (object.location.filename().unwrap_or_default().to_owned(), object.size));
            found.try_collect().await
        })
    }

    fn size(&self, name: &str) -> Result<Option<u64>, Failed> {
        let path = self.path(name);
        self.ask("look at", name, || async {
            match self.objects.head(&path).await {
                Ok(object) => Ok(Some(object.size)),
                Err(Error::NotFound { .. }) => Ok(None),
                Err(error) => Err(error),
            }
        })
    }

    fn read(&self, name: &str) -> Result<Bytes, Failed> {
        let path = self.path(name);
        self.ask("read", name, || async {
            let object = self.objects.get(&path).await?;
            let size = object.meta.size;
            whole(object.bytes().await?, size)
        })
    }

    fn read_part(&self, name: &str, offset: u64, length: u64) -> Result<Bytes, Failed> {
        let path = self.path(name);
        self.ask("read", name, || async {
            whole(self.objects.get_range(&path, offset..offset.saturating_add(length)).await?, length)
        })
    }

    fn write(&self, name: &str, parts: &[Bytes], mode: Mode) -> Result<(), Failed> {
        let path = self.path(name);
        let put = if mode == Mode::Over { PutMode::Overwrite } else { PutMode::Create };
        self.ask("write", name, || async {
            let payload = PutPayload::from_iter(parts.iter().cloned());
            match self.objects.put_opts(&path, payload, PutOptions::from(put.clone())).await {
                // Another was faster, or our own request was heard and its answer
                // was not.
                Err(Error::AlreadyExists { .. } | Error::Precondition { .. }) if mode == Mode::Once => Ok(()),
                done => done.map(drop),
            }
        })
    }

    fn remove(&self, name: &str) -> Result<(), Failed> {
        let path = self.path(name);
        self.ask("delete", name, || async {
            match self.objects.delete(&path).await {
                Err(Error::NotFound { .. }) => Ok(()),
                done => done,
            }
        })
    }

    fn tidy(&self, _: Duration) -> Result<(), Failed> {
        // An upload that is cut off leaves nothing: each is one request.
        Ok(())
    }

    fn now(&self) -> Result<SystemTime, Failed> {
        self.write(CLOCK, &[Bytes::from_static(b"now")], Mode::Over)?;
        let path = self.path(CLOCK);
        let object = self.ask("look at", CLOCK, || self.objects.head(&path))?;
        Ok(object.last_modified.into())
    }

    fn erase(&self) -> Result<(), Failed> {
        self.remove(CLOCK)
    }
}

type Built = Result<Arc<dyn ObjectStore>, Error>;

fn s3(place: &S3, bounds: &Bounds) -> (Built, Replaceable) {
    let shown = Shown::new(aws(place));
    let mut builder = AmazonS3Builder::new()
        .with_bucket_name(&place.bucket)
        .with_region(&place.region)
        .with_credentials(Arc::clone(&shown) as _)
        .with_client_options(client(place.endpoint.as_deref(), bounds))
        .with_retry(retry(bounds));
    if let Some(endpoint) = &place.endpoint {
        builder = builder.with_endpoint(endpoint);
    }
    (builder.build().map(|store| Arc::new(store) as _), Replaceable::S3(shown))
}

fn gcs(place: &Gcs, bounds: &Bounds) -> (Built, Replaceable) {
    let mut builder = GoogleCloudStorageBuilder::new()
        .with_bucket_name(&place.bucket)
        .with_client_options(client(place.endpoint.as_deref(), bounds))
        .with_retry(retry(bounds));
    let mut shown = Replaceable::No;
    // There is always something to show: without it, the client would ask the
    // metadata server of the machine for the machine's own.
    if let Some(token) = bearer(&place.credentials) {
        let token = Shown::new(token);
        builder = builder.with_credentials(Arc::clone(&token) as _);
        shown = Replaceable::Gcs(token);
    } else if let GcsCredentials::ServiceAccount(key) = &place.credentials {
        builder = builder.with_service_account_key(key.expose());
    }
    if let Some(endpoint) = &place.endpoint {
        builder = builder.with_base_url(endpoint);
    }
    (builder.build().map(|store| Arc::new(store) as _), shown)
}

fn aws(place: &S3) -> AwsCredential {
    AwsCredential {
        key_id: place.access_key_id.clone(),
        secret_key: place.secret_access_key.expose().to_owned(),
        token: place.session_token.as_ref().map(|token| token.expose().to_owned()),
    }
}

fn bearer(credentials: &GcsCredentials) -> Option<GcpCredential> {
    let token = match credentials {
        GcsCredentials::Token(token) => token.expose(),
        GcsCredentials::Anonymous => "anonymous",
        GcsCredentials::ServiceAccount(_) => return None,
    };
    Some(GcpCredential { bearer: token.to_owned() })
}

pub(crate) fn client(endpoint: Option<&str>, bounds: &Bounds) -> ClientOptions {
    ClientOptions::new()
        .with_allow_http(endpoint.is_some_and(|endpoint| endpoint.starts_with("http://")))
        .with_connect_timeout(CONNECT_MAX.min(bounds.request_max))
        .with_timeout(bounds.request_max)
}

fn retry(bounds: &Bounds) -> RetryConfig {
    RetryConfig {
        backoff: BackoffConfig {
            init_backoff: Duration::from_millis(100),
            max_backoff: PAUSE_MAX,
            base: 2.0,
        },
        max_retries: 10,
        retry_timeout: bounds.retry_max,
    }
}

/// Takes a body for what it is only if it is as long as it was said to be.
fn whole(bytes: Bytes, length: u64) -> Result<Bytes, Error> {
    if bytes.len() as u64 == length {
        return Ok(bytes);
    }
    let source =
        io::Error::new(io::ErrorKind::UnexpectedEof, format!("{} bytes came of {length}", bytes.len()));
    Err(Error::Generic { store: "bucket", source: source.into() })
}

fn is_transient(error: &Error) -> bool {
    matches!(error, Error::Generic { .. }) && kind(error) == FailureKind::Unavailable && {
        let words = words(error);
        // Answers that will not change, and what was tried often enough below.
        let may_change = ["status code: 408", "status code: 429", "RequestTimeout", "SlowDown"];
        let is_final =
            words.contains("status code: 4") && !may_change.iter().any(|words_of| words.contains(words_of));
        !is_final && !words.contains("after 10 retries")
    }
}

pub(crate) fn kind(error: &Error) -> FailureKind {
    match error {
        // Whoever reads an object has seen its name in a list or an index.
        Error::NotFound { .. } => FailureKind::Damaged,
        Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => FailureKind::Denied,
        Error::Generic { .. } => {
            let words = words(error);
            // S3 answers 400 to a token that has run out, and to a HEAD it says no
            // more than that. Of a list, the client does not tell what was refused.
            let refused = ["ExpiredToken", "InvalidToken", "TokenRefreshRequired", "InvalidAccessKeyId"];
            let status = ["status code: 401", "status code: 403"];
            let says_no_more = words.ends_with("status code: 400 Bad Request: ");
            if says_no_more || refused.iter().chain(&status).any(|code| words.contains(code)) {
                FailureKind::Denied
            } else if words.contains("NoSuchBucket") {
                FailureKind::Invalid
            } else {
                FailureKind::Unavailable
            }
        }
        _ => FailureKind::Unavailable,
    }
}

pub(crate) fn words(error: &Error) -> String {
    cocalc_core::error::chain(error)
}
