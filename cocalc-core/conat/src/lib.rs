//! The conat message bus: broker and client over WebSocket.
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
