//! The peers, in the project's network namespace.

use std::path::{Path, PathBuf};

use crate::{
    Result,
    federation::{APP_PORT, Federation},
    tool::Server,
};

pub(super) const NGINX_PORT: u16 = 8081;
pub(super) const AUTH_PORT: u16 = 8082;
pub(super) const NODE_PORT: u16 = 8083;
const NODE_API_PORT: u16 = 8084;
/// Where `.ci/setup.sh bench` installs it.
const NODE_PLACE: &str = "/var/cache/cocalc/chp";

/// They end with the value.
#[derive(Debug)]
pub(super) struct Others {
    pub(super) nginx: Server,
    /// `None` if it is not installed.
    pub(super) node: Option<Server>,
}

impl Others {
    pub(super) fn start(federation: &Federation) -> Result<Self> {
        Ok(Self { nginx: nginx(federation)?, node: node(federation)? })
    }
}

fn nginx(federation: &Federation) -> Result<Server> {
    let dir = federation.dir.join("nginx");
    std::fs::create_dir_all(&dir)?;
    let config = dir.join("nginx.conf");
    std::fs::write(&config, configuration(&dir))?;
    let mut nginx = federation.inside("nginx")?;
    nginx.arg("-p").arg(&dir).arg("-e").arg(dir.join("error.log")).arg("-c").arg(&config);
    Server::start(nginx)
}

/// Kept connections on both sides, no log, a worker per core: as fast as it
/// gets without caching. The question to the authority goes to the app, too.
fn configuration(dir: &Path) -> String {
    let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .iter()
        .map(|what| format!("{what}_temp_path {};\n", dir.join(what).display()))
        .collect();
    let pass = "proxy_pass http://app; proxy_http_version 1.1; proxy_set_header Connection \"\";";
    let upgrade = "location /ws { proxy_pass http://app; proxy_http_version 1.1; proxy_read_timeout 1h; \
                   proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection upgrade; }";
    format!(
        "user root;\ndaemon off;\nworker_processes auto;\nworker_rlimit_nofile 20000;\npid {pid};\n\
         events {{ worker_connections 20000; }}\n\
         http {{\naccess_log off;\nkeepalive_requests 1000000000;\n{temporary}\
         upstream app {{ server 127.0.0.1:{APP_PORT}; keepalive 512; keepalive_requests 1000000000; }}\n\
         server {{ listen 127.0.0.1:{NGINX_PORT} backlog=4096; location / {{ {pass} }}\n{upgrade} }}\n\
         server {{ listen 127.0.0.1:{AUTH_PORT} backlog=4096; location / {{ auth_request /auth; {pass} }}\n\
         location = /auth {{ internal; proxy_pass_request_body off; {pass} }} }}\n}}\n",
        pid = dir.join("nginx.pid").display(),
    )
}

fn node(federation: &Federation) -> Result<Option<Server>> {
    let place = std::env::var_os("COCALC_CHP").map_or_else(|| PathBuf::from(NODE_PLACE), PathBuf::from);
    let program = place.join("node_modules/configurable-http-proxy/bin/configurable-http-proxy");
    if !program.is_file() {
        return Ok(None);
    }
    let mut node = federation.inside("node")?;
    node.arg(program)
        .args(["--ip", "127.0.0.1", "--port", &NODE_PORT.to_string()])
        .args(["--api-ip", "127.0.0.1", "--api-port", &NODE_API_PORT.to_string()])
        .args(["--default-target", &format!("http://127.0.0.1:{APP_PORT}"), "--log-level", "error"]);
    Server::start(node).map(Some)
}
