//! Requests per second to an app in a project, through host and proxy, against
//! nginx before the same app.
//!
//! nginx and the `wrk` that loads it run in the project's network namespace, so
//! that both ways are two connections over a loopback device.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    process::Command,
    time::Duration,
};

use crate::{
    Effort, Result,
    federation::{APP_PORT, Federation},
    table::{Better, Table, median},
    tool::{Server, attached, run, text},
};

/// The port of nginx in the project's namespace.
const NGINX_PORT: u16 = 8081;
const NGINX_AUTH_PORT: u16 = 8082;

pub(crate) fn measure(federation: &Federation, effort: Effort, table: &mut Table) -> Result<()> {
    let _nginx = nginx(federation)?;
    let at = |port: u16| format!("http://{}/", SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
    for port in [APP_PORT, NGINX_PORT, NGINX_AUTH_PORT] {
        wait_inside(federation, &at(port))?;
    }
    for connections in [1, 64] {
        let mut seen: [Vec<f64>; 5] = Default::default();
        // One after the other each round, so that none has the quieter machine.
        for _ in 0..effort.runs {
            let connect = federation.connect(federation.project())?;
            let load = Load { seconds: effort.seconds, connections };
            let outside = || Ok::<_, crate::Error>(attached("wrk"));
            seen[0].push(load.run(outside()?, &connect.direct, Some(&connect.token))?);
            seen[1].push(load.run(outside()?, &connect.proxy, Some(&connect.token))?);
            for (index, port) in [(2, NGINX_PORT), (3, NGINX_AUTH_PORT), (4, APP_PORT)] {
                seen[index].push(load.run(federation.inside("wrk")?, &at(port), None)?);
            }
        }
        let [host, proxy, nginx, auth, app] = &seen;
        let unit = ("requests/s", Better::More);
        let what = |way: &str| format!("HTTP, {way}, {connections} connections");
        table.add(what("host with token"), "nginx proxy_pass", unit, host, nginx);
        table.add(what("host with token"), "nginx auth_request", unit, host, auth);
        table.add(what("proxy and host"), "nginx proxy_pass", unit, proxy, nginx);
        table.note(format!(
            "the app alone, {connections} connections, nothing before it: {:.0} requests/s",
            median(app)
        ));
    }
    Ok(())
}

/// Starts nginx in the project's namespace.
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
    format!(
        "user root;\ndaemon off;\nworker_processes auto;\npid {pid};\nevents {{ worker_connections 1024; }}\n\
         http {{\naccess_log off;\nkeepalive_requests 1000000000;\n{temporary}\
         upstream app {{ server 127.0.0.1:{APP_PORT}; keepalive 128; keepalive_requests 1000000000; }}\n\
         server {{ listen 127.0.0.1:{NGINX_PORT}; location / {{ {pass} }} }}\n\
         server {{ listen 127.0.0.1:{NGINX_AUTH_PORT}; location / {{ auth_request /auth; {pass} }}\n\
         location = /auth {{ internal; proxy_pass_request_body off; {pass} }} }}\n}}\n",
        pid = dir.join("nginx.pid").display(),
    )
}

/// Waits until something in the project's namespace answers.
fn wait_inside(federation: &Federation, url: &str) -> Result<()> {
    let mut curl = federation.inside("curl")?;
    curl.args([
        "--silent",
        "--show-error",
        "--fail",
        "--max-time",
        "5",
        "--retry",
        "20",
        "--retry-delay",
        "0",
    ]);
    curl.args(["--retry-max-time", "20", "--retry-connrefused", "--noproxy", "*", url]);
    run(&mut curl, Duration::from_secs(40)).map(drop)
}

/// A run of `wrk`.
#[derive(Clone, Copy, Debug)]
struct Load {
    seconds: u32,
    connections: u32,
}

impl Load {
    /// Runs it, and returns the requests per second, all of which were good.
    fn run(self, mut wrk: Command, url: &str, token: Option<&str>) -> Result<f64> {
        let threads = self.connections.min(2);
        wrk.args(["--threads", &threads.to_string(), "--connections", &self.connections.to_string()]);
        wrk.args(["--duration", &format!("{}s", self.seconds), "--timeout", "10s"]);
        if let Some(token) = token {
            wrk.arg("--header").arg(format!("Authorization: Bearer {token}"));
        }
        let said = text(wrk.arg(url), Duration::from_secs(u64::from(self.seconds) + 30))?;
        if said.contains("Non-2xx") || said.contains("Socket errors") {
            return Err(format!("requests failed: {said}").into());
        }
        let rate = said.lines().find_map(|line| line.trim().strip_prefix("Requests/sec:"));
        Ok(rate.ok_or_else(|| format!("wrk said: {said}"))?.trim().parse()?)
    }
}
