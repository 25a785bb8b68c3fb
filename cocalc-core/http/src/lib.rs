//! HTTP and WebSocket ingress of CoCalc: how users' requests reach the apps
//! inside their projects.
//!
//! [`HostIngress`] runs on the machine that has the projects. It routes on the
//! raw path ([`path`]), asks an [`Auth`](cocalc_core::auth::Auth) on every
//! request, exchanges connect tokens for session cookies, and reaches apps
//! through [`Runner::dial`](cocalc_core::runner::Runner::dial), so nothing of a
//! project is ever published on the host. [`ProxyIngress`] finds a project's
//! host and passes requests on; it decides nothing.
//!
//! Both stream with back-pressure, carry WebSockets, refuse every message that
//! two parsers could read differently, keep all credentials of their own from
//! apps and logs, and end open WebSockets and long responses at once when the
//! right to them is withdrawn.
//!
//! Users come over HTTP/1.1, or over HTTPS ([`Tls`]) and then also over HTTP/2,
//! WebSockets included (RFC 8441); apps are spoken to in HTTP/1.1.
//!
//! This is not a general reverse proxy: it rewrites no bodies, and caches
//! nothing.
//!
//! ```
//! use std::sync::Arc;
//!
//! use cocalc_core::{auth::Auth, ids::HostId, router::Router, runner::Runner};
//! use cocalc_http::{HostIngress, Served};
//!
//! async fn run(
//!     host: HostId,
//!     auth: Arc<dyn Auth>,
//!     router: Arc<dyn Router>,
//!     runner: Arc<dyn Runner>,
//! ) -> Result<(), Box<dyn std::error::Error>> {
//!     let listener = tokio::net::TcpListener::bind("127.0.0.1:7810").await?;
//!     let ingress = HostIngress::builder(host, auth, router, runner)
//!         .served(Served::new().domain("alpha.localhost:7810")?)
//!         .build();
//!     // A real program waits for a signal here.
//!     let shutdown = std::future::pending();
//!     ingress.serve(listener, shutdown).await;
//!     Ok(())
//! }
//! ```
//!
//! # Sessions
//!
//! A session's cookie has two spellings, because browsers and programs do not
//! agree on whether loopback is secure:
//!
//! - `__Host-cocalc-session-<host id>` on a project's own origin, and
//!   `cocalc-session-<host id>` under the project's path in path routing, with
//!   `HttpOnly; Secure; SameSite=None; Partitioned`. Browsers keep these over
//!   HTTPS, and over plain HTTP on `localhost`, `*.localhost` and loopback
//!   addresses, also in frames.
//! - `cocalc-session-http-<host id>`, with `HttpOnly; SameSite=Lax` and the same
//!   value, is set, and believed, only over plain HTTP. curl and most HTTP
//!   libraries would not send the other one there.
//!
//! Both hold the same session; apps never see either, and cannot set them.
//!
//! # What path routing gives up
//!
//! With `/<project_id>/…` all projects of a host share one origin, so a page
//! of one project can make requests to another in its user's name, and open its
//! terminals, where they are served. Give each
//! project its own origin ([`Served::domain`]) wherever names can be had.

mod activity;
mod body;
mod cookies;
mod credential;
mod failures;
mod files;
mod framing;
#[doc(hidden)]
pub mod fuzzing;
mod headers;
mod host;
mod http2;
mod limits;
mod page;
pub mod path;
mod pool;
mod problem;
mod proxy;
mod server;
mod tls;
mod trailers;
mod upstream;
mod websocket;
mod wire;

pub use body::{Body, BodyError};
pub use files::{Copying, Former, FormerState, ProjectFiles};
pub use host::{BusEndpoint, Endpoints, HostIngress, HostIngressBuilder, Opening, Stats};
pub use limits::{HttpSettings, Limits};
pub use page::{SHARED_SCRIPT, SHARED_STYLE, TerminalLimits};
pub use path::{Served, ServedError};
pub use problem::CODE_HEADER;
pub use proxy::{ProxyIngress, ProxyIngressBuilder, TokenHost, TokenPrecheck};
pub use server::Client;
pub use tls::{Tls, TlsError};
