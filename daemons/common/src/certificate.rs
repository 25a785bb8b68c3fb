//! The certificate of a daemon's HTTPS: from files that somebody else writes, or
//! by ACME.

use std::path::Path;

use cocalc_core::BoxError;
use cocalc_http::Tls;

use crate::acme::{Acme, AcmeSettings};

/// A certificate, and how it is kept fresh. Clones share it.
#[derive(Clone, Debug)]
pub struct Certificate {
    tls: Tls,
    acme: Option<Acme>,
}

impl Certificate {
    /// Reads the files that a configuration names, or, if it has names for ACME,
    /// what is kept in `data_dir/acme`; `None` if it has neither. With ACME it
    /// begins with a certificate that proves nothing to anybody, until the first
    /// one has come.
    ///
    /// # Errors
    ///
    /// A file cannot be read or written, or is not what it should be.
    pub async fn open(
        cert: Option<&Path>,
        key: Option<&Path>,
        acme: &AcmeSettings,
        data_dir: &Path,
    ) -> Result<Option<Self>, BoxError> {
        if !acme.is_on() {
            let tls = Tls::configured(cert, key).await?;
            return Ok(tls.map(|tls| Self { tls, acme: None }));
        }
        let (settings, folder) = (acme.clone(), data_dir.join("acme"));
        let opened = tokio::task::spawn_blocking(move || Acme::open(settings, folder)).await??;
        let (acme, tls) = opened;
        Ok(Some(Self { tls, acme: Some(acme) }))
    }

    /// For a listener.
    pub fn tls(&self) -> Tls {
        self.tls.clone()
    }

    /// Keeps it fresh, for as long as it is polled: looks at the files every 10 s,
    /// and gets new certificates in time.
    pub async fn keep(&self) {
        let renewed = async {
            match &self.acme {
                Some(acme) => acme.keep(&self.tls).await,
                None => std::future::pending().await,
            }
        };
        tokio::join!(self.tls.keep_fresh(), renewed);
    }
}
