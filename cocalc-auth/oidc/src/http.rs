//! An HTTP client for answers that may be slow, endless or elsewhere.

use std::{pin::Pin, sync::Arc, time::Duration};

use openidconnect::{AsyncHttpClient, HttpRequest, HttpResponse};
use rustls_platform_verifier::BuilderVerifierExt;

use crate::settings::may_be_asked;

/// How long one request may take, answer included.
const REQUEST_LIMIT: Duration = Duration::from_secs(10);
/// How long a connection may take to be made.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// No answer is larger: a hundred times what providers have.
const ANSWER_BYTES_MAX: usize = 512 * 1024;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HttpError {
    #[error("an address of the provider is not https: {0}")]
    Plain(String),
    #[error("an answer was larger than {ANSWER_BYTES_MAX} bytes")]
    TooLarge,
    #[error("no whole answer within {} s", REQUEST_LIMIT.as_secs())]
    TooSlow,
    #[error("a request failed")]
    Failed(#[source] reqwest::Error),
}

impl HttpError {
    fn failed(error: reqwest::Error) -> Self {
        Self::Failed(error.without_url())
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Http {
    client: reqwest::Client,
    /// Whether the provider may be on this machine, without TLS.
    loopback: bool,
}

impl Http {
    /// Trusts the certificates that this machine trusts.
    pub(crate) fn new(loopback: bool) -> Result<Self, Box<dyn std::error::Error + Send + Sync>> {
        let ring = Arc::new(rustls::crypto::ring::default_provider());
        let tls = rustls::ClientConfig::builder_with_provider(ring)
            .with_safe_default_protocol_versions()?
            .with_platform_verifier()?
            .with_no_client_auth();
        let builder = reqwest::Client::builder()
            .tls_backend_preconfigured(tls)
            // A redirect could lead anywhere, with the secret.
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(CONNECT_LIMIT)
            .pool_max_idle_per_host(2)
            .user_agent(concat!("cocalc/", env!("CARGO_PKG_VERSION")));
        let builder = if loopback { builder.no_proxy() } else { builder };
        Ok(Self { client: builder.build()?, loopback })
    }

    async fn answer(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let request = reqwest::Request::try_from(request).map_err(HttpError::failed)?;
        if !may_be_asked(request.url(), self.loopback) {
            return Err(HttpError::Plain(request.url().to_string()));
        }
        let mut answer = self.client.execute(request).await.map_err(HttpError::failed)?;
        let mut response = HttpResponse::new(Vec::new());
        *response.status_mut() = answer.status();
        *response.headers_mut() = std::mem::take(answer.headers_mut());
        while let Some(part) = answer.chunk().await.map_err(HttpError::failed)? {
            if response.body().len() + part.len() > ANSWER_BYTES_MAX {
                return Err(HttpError::TooLarge);
            }
            response.body_mut().extend_from_slice(&part);
        }
        Ok(response)
    }
}

impl<'c> AsyncHttpClient<'c> for Http {
    type Error = HttpError;
    type Future = Pin<Box<dyn Future<Output = Result<HttpResponse, HttpError>> + Send + 'c>>;

    fn call(&'c self, request: HttpRequest) -> Self::Future {
        Box::pin(async {
            let answer = tokio::time::timeout(REQUEST_LIMIT, self.answer(request)).await;
            answer.unwrap_or(Err(HttpError::TooSlow))
        })
    }
}
