//! Servers of others that stand behind the ingress as apps, and say what they
//! took each request for: Node.js, nginx, HAProxy.

use std::{
    path::Path,
    process::Stdio,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{
    io::{AsyncBufReadExt, BufReader},
    net::TcpStream,
    process::{Child, Command},
    time::{sleep, timeout},
};
use tokio_util::task::AbortOnDropHandle;

use crate::support::*;

/// A server that is not ours.
pub(crate) struct Backend {
    pub(crate) name: &'static str,
    pub(crate) port: u16,
    /// Lines of `<method> <target> <bytes of the body>`, one for each request
    /// that was whole.
    seen: Arc<Mutex<Vec<String>>>,
    _process: Child,
    _reader: AbortOnDropHandle<()>,
    _dir: tempfile::TempDir,
}

/// Says on which port it listens, and then what comes.
const NODE: &str = r#"
const server = require('node:http').createServer((request, response) => {
  let length = 0;
  request.on('data', (data) => { length += data.length; });
  request.on('error', () => {});
  request.on('end', () => {
    console.log(request.method, request.url, length);
    response.end('ok');
  });
});
server.keepAliveTimeout = 60000;
server.on('clientError', (error, socket) => {
  if (socket.writable) socket.end('HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n');
});
server.listen(0, '127.0.0.1', () => console.log('port', server.address().port));
"#;

impl Backend {
    pub(crate) async fn node() -> Self {
        let mut command = Command::new("node");
        command.args(["-e", NODE]);
        let this = Self::run("Node.js", command, tempfile::tempdir().unwrap(), 0);
        let mut this = this.expect("node is needed");
        eventually("Node.js listens", || !this.seen.lock().unwrap().is_empty()).await;
        let said = this.seen.lock().unwrap().remove(0);
        this.port = said.strip_prefix("port ").unwrap().parse().unwrap();
        this
    }

    /// The front one takes the whole body before it asks the one behind, which
    /// then knows how long it was.
    pub(crate) async fn nginx() -> Self {
        Self::listening("nginx", |dir, port| {
            let d = dir.display();
            let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
                .iter()
                .map(|what| format!("{what}_temp_path {d}/{what};\n"))
                .collect();
            let config = format!(
                "daemon off;\nmaster_process off;\npid {d}/pid;\nerror_log {d}/error.log;\n\
                 events {{ worker_connections 256; }}\nhttp {{\n{temporary}\
                 log_format seen '$request_method $request_uri $content_length';\naccess_log off;\n\
                 keepalive_timeout 60s;\n\
                 server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://unix:{d}/inner:; }} }}\n\
                 server {{ listen unix:{d}/inner; access_log /dev/stdout seen; location / {{ return 200 ok; }} }}\n}}\n"
            );
            std::fs::write(dir.join("nginx.conf"), config).unwrap();
            let mut command = Command::new("nginx");
            command.arg("-p").arg(dir).arg("-e").arg(dir.join("error.log"));
            command.arg("-c").arg(dir.join("nginx.conf"));
            command
        })
        .await
    }

    pub(crate) async fn haproxy() -> Self {
        Self::listening("HAProxy", |dir, port| {
            let config = format!(
                "global\n  log stdout format raw local0\ndefaults\n  mode http\n  timeout client 60s\n\
                 \x20 timeout connect 5s\n  timeout server 60s\n  timeout http-keep-alive 60s\n\
                 frontend all\n  bind 127.0.0.1:{port}\n  log global\n  option http-buffer-request\n\
                 \x20 http-request set-var(txn.length) req.body_len\n\
                 \x20 log-format \"%[capture.req.method] %[capture.req.uri] %[var(txn.length)]\"\n\
                 \x20 http-request return status 200 content-type text/plain string ok\n"
            );
            std::fs::write(dir.join("haproxy.cfg"), config).unwrap();
            let mut command = Command::new("haproxy");
            command.arg("-f").arg(dir.join("haproxy.cfg"));
            command
        })
        .await
    }

    /// Starts one that must be told its port: somebody else may take a free one
    /// in between, and then there is another.
    async fn listening(name: &'static str, command: impl Fn(&Path, u16) -> Command) -> Self {
        for _ in 0..10 {
            let port = listen().await.1.port();
            let dir = tempfile::tempdir().unwrap();
            let command = command(dir.path(), port);
            let mut this = Self::run(name, command, dir, port).unwrap_or_else(|| panic!("{name} is needed"));
            let until = tokio::time::Instant::now() + DEADLINE * 3;
            while this._process.try_wait().unwrap().is_none() {
                assert!(tokio::time::Instant::now() < until, "{name} does not listen");
                if TcpStream::connect(("127.0.0.1", port)).await.is_ok() {
                    let probe = format!("GET /{port} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
                    raw(([127, 0, 0, 1], port).into(), probe).await;
                    let ours = format!("GET /{port}");
                    let seen = this.seen.clone();
                    let mine = || seen.lock().unwrap().iter().any(|line| line.starts_with(&ours));
                    for _ in 0..100 {
                        if mine() {
                            this.seen.lock().unwrap().clear();
                            return this;
                        }
                        sleep(Duration::from_millis(10)).await;
                    }
                }
                sleep(Duration::from_millis(20)).await;
            }
        }
        panic!("{name} did not start");
    }

    fn run(name: &'static str, mut command: Command, dir: tempfile::TempDir, port: u16) -> Option<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
        let mut process = command.spawn().ok()?;
        let mut lines = BufReader::new(process.stdout.take()?).lines();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = seen.clone();
        let reader = own(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                log.lock().unwrap().push(line);
            }
        });
        Some(Self { name, port, seen, _process: process, _reader: reader, _dir: dir })
    }

    /// What it has seen until a request to `last` was whole, without that.
    pub(crate) async fn seen_before(&self, last: &str) -> Vec<String> {
        let last = format!("GET {last} ");
        let found = timeout(DEADLINE * 3, async {
            loop {
                {
                    let mut seen = self.seen.lock().unwrap();
                    if let Some(at) = seen.iter().position(|line| format!("{line} ").starts_with(&last)) {
                        return seen.drain(..=at).take(at).collect();
                    }
                }
                sleep(Duration::from_millis(2)).await;
            }
        });
        found
            .await
            .unwrap_or_else(|_| panic!("{} never saw {last}: {:?}", self.name, self.seen.lock().unwrap()))
    }
}
