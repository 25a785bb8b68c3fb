//! What proxies and hosts say to each other, on connections on which both have
//! proved who they are.

/// The domain by which a proxy addresses any host: requests for it have the
/// shapes `cocalc.internal/<project_id>/…`, `<project_id>.cocalc.internal/…`
/// and `<port>--<project_id>.cocalc.internal/…`, with the user's own view in
/// `X-Forwarded-Host`, `-Proto`, `-For` and `-Prefix`.
pub(crate) const INTERNAL_DOMAIN: &str = "cocalc.internal";

/// With the code `project_moved`: the new owner.
pub(crate) const HOST_HEADER: &str = "cocalc-host";

/// With the code `project_moved`: the new owner's epoch.
pub(crate) const EPOCH_HEADER: &str = "cocalc-epoch";

/// The code of an answer of a host that no longer has the project.
pub(crate) const PROJECT_MOVED: &str = "project_moved";
