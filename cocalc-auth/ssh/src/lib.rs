//! What SSH knows of identities, without sockets and clocks: the master's
//! certificate authority, the certificates it signs, and the options that a
//! key or certificate carries.
//!
//! - [`Authority`] holds the secret keys and signs; [`verify_user`] is the other
//!   side, on hosts.
//! - [`Options`] are those of a line of `authorized_keys`; what cannot be
//!   honoured refuses the key, nothing is passed over.
//! - [`Restrictions`] are what both come to: what the session may do.
//!
//! ```
//! use cocalc_auth_ssh::{Options, KeyLine};
//!
//! let line = r#"from="10.0.0.0/8",no-pty ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl me"#;
//! let line = KeyLine::parse(line)?;
//! let admits = |address: &str| line.options.admits(address.parse().ok(), Default::default()).is_ok();
//! assert!(admits("10.1.2.3") && !admits("192.0.2.1"));
//! assert!(!line.options.restrictions().pty);
//! assert!(Options::parse("tunnel=\"0\"").is_err());
//! # Ok::<(), cocalc_auth_ssh::OptionError>(())
//! ```

mod authority;
mod certificate;
mod line;
mod options;
mod source;

pub use cocalc_auth::stream::SshAuthorities;
pub use cocalc_ids::{Ports, Restrictions};

pub use self::{
    authority::{Authority, AuthorityError, HostRequest, KeyInfo, Kind, SignedCertificate, UserRequest},
    certificate::{
        CertificateError, HostCertificate, USER_LIFE, USER_LIFE_MAX, UserCertificate,
        certificate_fingerprint, check_host, verify_user,
    },
    line::{FILE_BYTES_MAX, Found, KeyLine, find_key, fingerprint},
    options::{OptionError, Options},
    source::{SourceError, SourceList},
};
