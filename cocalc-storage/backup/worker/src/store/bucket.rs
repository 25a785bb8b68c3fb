//! A repository in a bucket of S3 or of Google Cloud Storage.

use std::{
    fmt,
    future::Future,
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use cocalc_backup::{Bounds, Gcs, GcsCredentials, S3, protocol::FailureKind};
use futures_util::TryStreamExt as _;
use object_store::{
    BackoffConfig, ClientOptions, Error, ObjectStore, ObjectStoreExt as _, PutMode, PutOptions, PutPayload,
    RetryConfig, StaticCredentialProvider,
    aws::AmazonS3Builder,
    gcp::{GcpCredential, GoogleCloudStorageBuilder},
    path::Path,
};
use tokio::runtime::Runtime;

use super::{Store, exists};
use crate::failure::Failed;

/// How long a connection may take to be made.
const CONNECT_MAX: Duration = Duration::from_secs(10);
/// The longest pause between two tries.
const PAUSE_MAX: Duration = Duration::from_secs(10);

pub(crate) struct Bucket {
    objects: Arc<dyn ObjectStore>,
    prefix: String,
    runtime: Runtime,
    retry_max: Duration,
}

impl fmt::Debug for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bucket").field("prefix", &self.prefix).finish_non_exhaustive()
    }
}

impl Bucket {
    pub(crate) fn s3(s3: &S3, bounds: &Bounds) -> Result<Self, Failed> {
        let mut builder = AmazonS3Builder::new()
            .with_bucket_name(&s3.bucket)
            .with_region(&s3.region)
            .with_access_key_id(&s3.access_key_id)
            .with_secret_access_key(s3.secret_access_key.expose())
            .with_client_options(client(s3.endpoint.as_deref(), bounds))
            .with_retry(retry(bounds));
        if let Some(token) = &s3.session_token {
            builder = builder.with_token(token.expose());
        }
        if let Some(endpoint) = &s3.endpoint {
            builder = builder.with_endpoint(endpoint);
        }
        Self::new(builder.build().map(|store| Arc::new(store) as _), &s3.prefix, bounds)
    }

    pub(crate) fn gcs(gcs: &Gcs, bounds: &Bounds) -> Result<Self, Failed> {
        let mut builder = GoogleCloudStorageBuilder::new()
            .with_bucket_name(&gcs.bucket)
            .with_client_options(client(gcs.endpoint.as_deref(), bounds))
            .with_retry(retry(bounds));
        // There is always something to show: without it, the client would ask
        // the metadata server of the machine for the machine's own.
        builder = match &gcs.credentials {
            GcsCredentials::Token(token) => builder.with_credentials(shown(token.expose())),
            GcsCredentials::ServiceAccount(key) => builder.with_service_account_key(key.expose()),
            GcsCredentials::Anonymous => builder.with_credentials(shown("anonymous")),
        };
        if let Some(endpoint) = &gcs.endpoint {
            builder = builder.with_base_url(endpoint);
        }
        Self::new(builder.build().map(|store| Arc::new(store) as _), &gcs.prefix, bounds)
    }

    fn new(
        objects: Result<Arc<dyn ObjectStore>, Error>,
        prefix: &str,
        bounds: &Bounds,
    ) -> Result<Self, Failed> {
        let objects = objects.map_err(|error| Failed::new(FailureKind::Invalid, words(&error)))?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .map_err(|error| Failed::new(FailureKind::Other, error.to_string()))?;
        Ok(Self { objects, prefix: prefix.to_owned(), runtime, retry_max: bounds.retry_max })
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
        loop {
            match self.runtime.block_on(call()) {
                Ok(done) => return Ok(done),
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

    fn write(&self, name: &str, parts: &[Bytes], only_new: bool) -> Result<(), Failed> {
        let path = self.path(name);
        let mode = if only_new { PutMode::Create } else { PutMode::Overwrite };
        self.ask("write", name, || async {
            let payload = PutPayload::from_iter(parts.iter().cloned());
            self.objects.put_opts(&path, payload, PutOptions::from(mode.clone())).await.map(drop)
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

    fn erase(&self) -> Result<(), Failed> {
        Ok(())
    }
}

fn shown(token: &str) -> Arc<StaticCredentialProvider<GcpCredential>> {
    Arc::new(StaticCredentialProvider::new(GcpCredential { bearer: token.to_owned() }))
}

fn client(endpoint: Option<&str>, bounds: &Bounds) -> ClientOptions {
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
        !words.contains("status code 4") && !words.contains("after 10 retries")
    }
}

fn kind(error: &Error) -> FailureKind {
    match error {
        // Whoever reads an object has seen its name in a list or an index.
        Error::NotFound { .. } => FailureKind::Damaged,
        Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => FailureKind::Denied,
        Error::Generic { .. } => {
            let words = words(error);
            // S3 answers 400 to a token that has run out.
            let refused = ["ExpiredToken", "InvalidToken", "TokenRefreshRequired", "InvalidAccessKeyId"];
            if refused.iter().any(|code| words.contains(code)) {
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

fn words(error: &Error) -> String {
    cocalc_core::error::chain(error)
}
