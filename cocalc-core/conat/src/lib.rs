//! The conat message bus: subjects, queue groups, request and reply over
//! WebSocket, as the TypeScript programs of CoCalc speak it.
//!
//! - [`Broker`] embeds a bus into a server: hand it upgraded connections with
//!   [`Broker::accept`], or let it [`serve`](Broker::serve) a listener. An
//!   [`Authorizer`] decides who connects and what they may do.
//! - [`Client`] is the bus of a program elsewhere, [`Broker::local_bus`] that
//!   of one in the same process. Both are a [`Bus`](cocalc_core::bus::Bus).
//! - [`router`] and [`wire`] are what both are made of: the routing core and
//!   the frames, as state machines and functions that open no socket.
//!
//! It is not a log or a queue on disk: who isn't connected gets nothing. It
//! has no clusters either: a broker is one process.
//!
//! ```
//! use std::{sync::Arc, time::Duration};
//!
//! use cocalc_conat::{Authorizer, Bearer, Broker, BrokerConfig, Client, ClientOptions, Handshake, Identity};
//! use cocalc_core::{bus::{Bus, Payload}, subject::{self, Access}};
//!
//! /// Lets everybody greet, under the name that is their token.
//! #[derive(Debug)]
//! struct Greeters;
//!
//! #[async_trait::async_trait]
//! impl Authorizer for Greeters {
//!     async fn sign_in(&self, handshake: &Handshake, _: &serde_json::Value) -> Result<Identity, String> {
//!         handshake.bearer.as_deref().map(Identity::new).ok_or_else(|| "no token".to_owned())
//!     }
//!
//!     async fn may(&self, _: &Identity, subject: &str, _: Access) -> bool {
//!         subject::covers("greetings.>", subject)
//!     }
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let broker = Broker::start(BrokerConfig::default(), Arc::new(Greeters));
//! let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
//! let url = format!("ws://{}/", listener.local_addr()?);
//! let serving = broker.clone();
//! let server = tokio::spawn(async move { serving.serve(listener).await });
//!
//! let near = broker.local_bus(Identity::new("near"));
//! let far = Client::connect(&url, Arc::new(Bearer("far".to_owned())), ClientOptions::default())?;
//! let mut greetings = near.subscribe("greetings.*", None).await?;
//! far.publish("greetings.morning", Payload::json(&"hello")?).await?;
//! assert_eq!(greetings.next().await.unwrap().payload.parse::<String>()?, "hello");
//! # server.abort();
//! # Ok(())
//! # }
//! ```

mod broker;
mod chunk;
mod client;
mod failure;
mod random;
pub mod router;
pub mod upgrade;
pub mod wire;

pub use broker::{Authorizer, Broker, BrokerConfig, Ended, Handshake, Identity};
pub use client::{Bearer, Client, ClientOptions, Credentials, Dial, UrlError};
