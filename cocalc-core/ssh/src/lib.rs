//! SSH into projects.
mod algorithms;
mod channel;
mod connection;
mod drive;
mod environment;
mod gate;
mod host_keys;
mod ingress;
mod input;
mod line;
mod peers;
mod remote;
mod sessions;
mod user;
mod wire;

pub use gate::{Access, Attempt, Gate, LocalGate, Login, Moved, Refusal, RemoteGate};
pub use host_keys::{HostKeyError, HostKeys};
pub use ingress::{SshIngress, SshIngressBuilder};
pub use peers::SshPeers;
pub use sessions::Sessions;
pub use user::project_of_user;
