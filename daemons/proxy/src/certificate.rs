//! The certificate that users are shown.

use std::path::Path;

use cocalc_daemon::start::Error;
use cocalc_http::Tls;

/// Opens the files that `tls_cert` and `tls_key` name, if there are any.
pub(crate) async fn open(cert: Option<&Path>, key: Option<&Path>) -> Result<Option<Tls>, Error> {
    let (Some(cert), Some(key)) = (cert, key) else { return Ok(None) };
    let (cert, key) = (cert.to_owned(), key.to_owned());
    let opened = tokio::task::spawn_blocking(move || Tls::open(&cert, &key)).await;
    let opened = opened.map_err(|error| Error::open("certificate")(error.into()))?;
    opened.map(Some).map_err(|error| Error::open("certificate")(error.into()))
}
