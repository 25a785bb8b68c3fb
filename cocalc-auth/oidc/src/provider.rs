//! A provider: discovered when it is needed, and asked who somebody is.

use std::{sync::Arc, time::Duration};

use openidconnect::{
    AccessToken, AccessTokenHash, AuthType, AuthorizationCode, ClaimsVerificationError, ClientId,
    ClientSecret, CsrfToken, DiscoveryError, EndpointMaybeSet, EndpointNotSet, EndpointSet, IssuerUrl, Nonce,
    OAuth2TokenResponse, PkceCodeChallenge, PkceCodeVerifier, RedirectUrl, RequestTokenError, Scope,
    SignatureVerificationError, TokenResponse,
    core::{
        CoreAuthenticationFlow, CoreClient, CoreClientAuthMethod, CoreIdToken, CoreIdTokenClaims,
        CoreIdTokenVerifier, CoreJwsSigningAlgorithm as Alg, CoreProviderMetadata, CoreTokenResponse,
        CoreUserInfoClaims,
    },
};
use tokio::{
    sync::{Mutex, Semaphore, SemaphorePermit},
    time::{Instant, timeout},
};

use crate::{
    error::{Error, chain, tame},
    http::{Http, HttpError},
    settings::{Settings, SettingsError, may_be_asked},
};

/// How long what was discovered is used. A key that is not known by then is
/// looked for at once.
const DISCOVERY_LIFE: Duration = Duration::from_secs(3600);
/// How long after a failure nobody tries again.
const FAILURE_LIFE: Duration = Duration::from_secs(5);
/// How many people are asked about at the same time.
const AT_ONCE_MAX: usize = 32;
/// How long somebody waits for their turn.
const TURN_LIMIT: Duration = Duration::from_secs(10);

/// What may sign an ID token: keys that only the provider has. Not `none`, and
/// not HMAC, whose key is the client's secret.
const ALGORITHMS: [Alg; 9] = [
    Alg::RsaSsaPkcs1V15Sha256,
    Alg::RsaSsaPkcs1V15Sha384,
    Alg::RsaSsaPkcs1V15Sha512,
    Alg::RsaSsaPssSha256,
    Alg::RsaSsaPssSha384,
    Alg::RsaSsaPssSha512,
    Alg::EcdsaP256Sha256,
    Alg::EcdsaP384Sha384,
    Alg::EdDsa,
];

type Client = CoreClient<
    EndpointSet,
    EndpointNotSet,
    EndpointNotSet,
    EndpointNotSet,
    EndpointMaybeSet,
    EndpointMaybeSet,
>;

/// Somebody whom the provider knows.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Person {
    /// What never changes of them at this provider, and is nobody else's there.
    pub subject: String,
    /// What they are called, as the provider wrote it.
    pub name: Option<String>,
    /// Their address, if the provider told it and has verified that it is theirs.
    pub email: Option<String>,
}

/// A log-in that has begun.
#[derive(Debug)]
pub struct Begun {
    /// Where the browser goes.
    pub url: String,
    /// What it must come back with, 128 random bits at least.
    pub state: String,
    /// What it takes to finish.
    pub pending: Pending,
}

/// What it takes to finish a log-in. Good once; its `Debug` prints no secret.
#[derive(Debug)]
pub struct Pending {
    nonce: Nonce,
    verifier: PkceCodeVerifier,
}

#[derive(Debug)]
enum Discovered {
    Nothing,
    Known(Arc<CoreProviderMetadata>, Instant),
    Failed(Error, Instant),
}

/// A provider, which need not be there yet.
#[derive(Debug)]
pub struct Provider {
    settings: Settings,
    http: Http,
    /// Held while it is discovered, so that that is done once.
    discovered: Mutex<Discovered>,
    turns: Semaphore,
}

impl Provider {
    /// Checks the settings, and asks nobody yet.
    ///
    /// # Errors
    ///
    /// Which setting makes no sense; or this machine has no certificates to
    /// trust.
    pub fn new(settings: Settings) -> Result<Self, SettingsError> {
        settings.validate()?;
        let http = Http::new(settings.loopback())
            .map_err(|error| SettingsError { field: "issuer", problem: format!("no TLS: {error}") })?;
        Ok(Self {
            settings,
            http,
            discovered: Mutex::new(Discovered::Nothing),
            turns: Semaphore::new(AT_ONCE_MAX),
        })
    }

    /// Its name, which never changes.
    pub fn issuer(&self) -> &str {
        &self.settings.issuer
    }

    /// Begins a log-in. Asks the provider only if it is not known, within 40 s.
    ///
    /// # Errors
    ///
    /// [`Error::Unavailable`] or [`Error::Busy`].
    ///
    /// # Cancel safety
    ///
    /// Nothing is left behind.
    pub async fn begin(&self) -> Result<Begun, Error> {
        let metadata = self.metadata(None).await?;
        let client = self.client(&metadata)?;
        let (challenge, verifier) = PkceCodeChallenge::new_random_sha256();
        let mut request = client
            .authorize_url(CoreAuthenticationFlow::AuthorizationCode, random_state, random_nonce)
            .set_pkce_challenge(challenge);
        for scope in &self.settings.scopes {
            request = request.add_scope(Scope::new(scope.clone()));
        }
        let (url, state, nonce) = request.url();
        Ok(Begun { url: url.to_string(), state: state.into_secret(), pending: Pending { nonce, verifier } })
    }

    /// Exchanges the code with which the browser came back, and says who it is.
    /// Takes two minutes at most.
    ///
    /// # Errors
    ///
    /// See [`Error`]. The code is spent then, too.
    pub async fn finish(&self, pending: Pending, code: &str) -> Result<Person, Error> {
        let metadata = self.metadata(None).await?;
        let _turn = self.turn().await?;
        let client = self.client(&metadata)?;
        let request = client
            .exchange_code(AuthorizationCode::new(code.to_owned()))
            .map_err(|error| Error::unavailable(&chain(&error)))?
            .set_pkce_verifier(pending.verifier);
        let answer: CoreTokenResponse = request.request_async(&self.http).await.map_err(refused)?;
        let token = answer.id_token().ok_or_else(|| Error::untrusted("it has no ID token"))?;
        let person = match self.verify(&client, token, &answer, &pending.nonce) {
            Err(Unverified::UnknownKey) => {
                // Its keys may have changed since.
                let newer = self.metadata(Some(&metadata)).await?;
                self.verify(&self.client(&newer)?, token, &answer, &pending.nonce)
            }
            settled => settled,
        };
        match person {
            Ok(claims) => Ok(self.described(&client, claims, answer.access_token()).await),
            Err(Unverified::UnknownKey) => {
                Err(Error::untrusted("its ID token is signed with an unknown key"))
            }
            Err(Unverified::Bad(detail)) => Err(Error::untrusted(&detail)),
        }
    }

    async fn turn(&self) -> Result<SemaphorePermit<'_>, Error> {
        match timeout(TURN_LIMIT, self.turns.acquire()).await {
            Ok(Ok(turn)) => Ok(turn),
            _ => Err(Error::Busy),
        }
    }

    /// What the provider says of itself: as it is known, unless that is too old
    /// or `outdated`.
    async fn metadata(
        &self,
        outdated: Option<&Arc<CoreProviderMetadata>>,
    ) -> Result<Arc<CoreProviderMetadata>, Error> {
        let Ok(mut discovered) = timeout(2 * TURN_LIMIT, self.discovered.lock()).await else {
            return Err(Error::Busy);
        };
        match &*discovered {
            Discovered::Known(known, since)
                if since.elapsed() < DISCOVERY_LIFE
                    && outdated.is_none_or(|outdated| !Arc::ptr_eq(outdated, known)) =>
            {
                return Ok(known.clone());
            }
            Discovered::Failed(error, since) if since.elapsed() < FAILURE_LIFE => return Err(error.clone()),
            _ => {}
        }
        match self.discover().await {
            Ok(metadata) => {
                let metadata = Arc::new(metadata);
                *discovered = Discovered::Known(metadata.clone(), Instant::now());
                Ok(metadata)
            }
            Err(error) => {
                *discovered = Discovered::Failed(error.clone(), Instant::now());
                Err(error)
            }
        }
    }

    async fn discover(&self) -> Result<CoreProviderMetadata, Error> {
        let issuer = IssuerUrl::new(self.settings.issuer.clone())
            .map_err(|error| Error::unavailable(&chain(&error)))?;
        let metadata =
            CoreProviderMetadata::discover_async(issuer, &self.http).await.map_err(undiscovered)?;
        if !may_be_asked(metadata.authorization_endpoint().url(), self.settings.loopback()) {
            return Err(Error::unavailable("its authorization endpoint is not https"));
        }
        if metadata.token_endpoint().is_none() {
            return Err(Error::unavailable("it has no token endpoint"));
        }
        Ok(metadata)
    }

    fn client(&self, metadata: &CoreProviderMetadata) -> Result<Client, Error> {
        let secret = self.settings.secret.as_ref().map(|secret| ClientSecret::new(secret.0.clone()));
        let redirect = RedirectUrl::new(self.settings.redirect.clone())
            .map_err(|error| Error::unavailable(&chain(&error)))?;
        let client = CoreClient::from_provider_metadata(
            metadata.clone(),
            ClientId::new(self.settings.client_id.clone()),
            secret,
        );
        Ok(client.set_auth_type(authentication(metadata)).set_redirect_uri(redirect))
    }

    /// Checks signature, issuer, audience, time and nonce.
    fn verify<'a>(
        &self,
        client: &Client,
        token: &'a CoreIdToken,
        answer: &CoreTokenResponse,
        nonce: &Nonce,
    ) -> Result<&'a CoreIdTokenClaims, Unverified> {
        let verifier: CoreIdTokenVerifier<'_> = client.id_token_verifier().set_allowed_algs(ALGORITHMS);
        let claims = token.claims(&verifier, nonce).map_err(|error| match error {
            ClaimsVerificationError::SignatureVerification(SignatureVerificationError::NoMatchingKey) => {
                Unverified::UnknownKey
            }
            other => Unverified::Bad(chain(&other)),
        })?;
        // The library leaves this to us.
        if claims.authorized_party().is_some_and(|party| **party != *self.settings.client_id) {
            return Err(Unverified::Bad("its ID token was made for another client".to_owned()));
        }
        // OpenID Connect Core 1.0, section 2.
        if !(1..=255).contains(&claims.subject().len()) || claims.subject().chars().any(char::is_control) {
            return Err(Unverified::Bad("its ID token names nobody".to_owned()));
        }
        if let Some(expected) = claims.access_token_hash() {
            let bad = |error: &(dyn std::error::Error + 'static)| Unverified::Bad(chain(error));
            let algorithm = token.signing_alg().map_err(|error| bad(&error))?;
            let key = token.signing_key(&verifier).map_err(|error| bad(&error))?;
            let hash = AccessTokenHash::from_token(answer.access_token(), algorithm, key);
            if hash.map_err(|error| bad(&error))? != *expected {
                return Err(Unverified::Bad("its access token is another's".to_owned()));
            }
        }
        Ok(claims)
    }

    /// The person with name and address, for which some providers want to be
    /// asked again. Who it is does not depend on that.
    async fn described(&self, client: &Client, claims: &CoreIdTokenClaims, access: &AccessToken) -> Person {
        let mut person = Person {
            subject: claims.subject().to_string(),
            name: claims
                .name()
                .and_then(|name| name.get(None))
                .map(|name| name.to_string())
                .or_else(|| claims.preferred_username().map(|name| name.to_string())),
            email: verified(claims.email(), claims.email_verified()),
        };
        if person.name.is_some() && person.email.is_some() {
            return person;
        }
        // The library panics at a token that is no header's value.
        let sendable = access.secret().chars().all(|c| c.is_ascii_graphic());
        let Some(request) =
            client.user_info(access.clone(), Some(claims.subject().clone())).ok().filter(|_| sendable)
        else {
            return person;
        };
        let info: Result<CoreUserInfoClaims, _> = request.request_async(&self.http).await;
        if let Ok(info) = info {
            person.name = person
                .name
                .or_else(|| info.name().and_then(|name| name.get(None)).map(|name| name.to_string()))
                .or_else(|| info.preferred_username().map(|name| name.to_string()));
            person.email = person.email.or_else(|| verified(info.email(), info.email_verified()));
        }
        person
    }
}

enum Unverified {
    /// None of the provider's keys that are known is the one that signed.
    UnknownKey,
    Bad(String),
}

fn random_state() -> CsrfToken {
    CsrfToken::new_random_len(32)
}

fn random_nonce() -> Nonce {
    Nonce::new_random_len(32)
}

fn verified(email: Option<&openidconnect::EndUserEmail>, verified: Option<bool>) -> Option<String> {
    email.filter(|_| verified == Some(true)).map(|email| email.to_string())
}

/// How the provider wants the client's secret: in a header, unless it says that
/// it takes it in the body only.
fn authentication(metadata: &CoreProviderMetadata) -> AuthType {
    let Some(methods) = metadata.token_endpoint_auth_methods_supported() else {
        return AuthType::BasicAuth;
    };
    let takes = |method| methods.contains(&method);
    match takes(CoreClientAuthMethod::ClientSecretBasic) {
        false if takes(CoreClientAuthMethod::ClientSecretPost) => AuthType::RequestBody,
        _ => AuthType::BasicAuth,
    }
}

fn undiscovered(error: DiscoveryError<HttpError>) -> Error {
    Error::unavailable(&chain(&error))
}

fn refused<T>(error: RequestTokenError<HttpError, T>) -> Error
where
    T: openidconnect::ErrorResponse + CodeOf + 'static,
{
    match error {
        RequestTokenError::ServerResponse(said) => Error::Refused { code: tame(&said.code()) },
        RequestTokenError::Request(error) => Error::unavailable(&chain(&error)),
        // What was parsed holds tokens.
        _ => Error::unavailable("its token endpoint does not answer as one"),
    }
}

/// The provider's word for an error.
trait CodeOf {
    fn code(&self) -> String;
}

impl<T: openidconnect::ErrorResponseType + std::fmt::Display> CodeOf
    for openidconnect::StandardErrorResponse<T>
{
    fn code(&self) -> String {
        self.error().to_string()
    }
}
