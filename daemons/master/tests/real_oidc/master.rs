//! A master, as its operator runs it.

use std::{
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::Path,
    process::{Child, Command, Stdio},
};

use serde_json::{Value, json};

use crate::{
    browser::Browser,
    provider::{LIMIT, SECRET, until},
};

/// A running master; killed when it goes out of scope.
pub(crate) struct Master {
    child: Child,
    pub(crate) dir: tempfile::TempDir,
    pub(crate) url: String,
}

impl Drop for Master {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A port that was free a moment ago.
pub(crate) fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// The callback of the provider `local` at a master on `port`.
pub(crate) fn callback(port: u16) -> String {
    format!("http://127.0.0.1:{port}/auth/oidc/local/callback")
}

impl Master {
    /// Starts one on `port` that knows each issuer by its name. `more` goes into
    /// the table of each.
    pub(crate) fn start(port: u16, issuers: &[(&str, &str)], more: &str) -> Self {
        Self::start_with(port, issuers, more, None)
    }

    /// The same, trusting the certificates in a file.
    pub(crate) fn start_with(
        port: u16,
        issuers: &[(&str, &str)],
        more: &str,
        trusted: Option<&Path>,
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (file, secret) = (dir.path().join("master.toml"), dir.path().join("secret"));
        let mut options = std::fs::OpenOptions::new();
        let mut open = options.write(true).create_new(true).mode(0o600).open(&secret).unwrap();
        writeln!(open, "{SECRET}").unwrap();
        let data = dir.path().join("data");
        let mut text = format!("listen = '127.0.0.1:{port}'\ndata_dir = '{}'\n", data.display());
        for (name, issuer) in issuers {
            text += &format!(
                "[[oidc]]\nname = '{name}'\nissuer = '{issuer}'\nclient_id = 'cocalc'\n\
                 client_secret_file = '{}'\n{more}\n",
                secret.display()
            );
        }
        std::fs::write(&file, text).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_cocalc-master"));
        for (key, _) in std::env::vars_os().filter(|(key, _)| key.to_string_lossy().starts_with("COCALC_")) {
            command.env_remove(key);
        }
        command.env_remove("SSL_CERT_FILE").env_remove("SSL_CERT_DIR");
        command.envs(trusted.map(|file| ("SSL_CERT_FILE", file)));
        let log = std::fs::File::create(dir.path().join("log")).unwrap();
        let child = command
            .arg("--config")
            .arg(file)
            .env("COCALC_LOG", "debug")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let url = format!("http://127.0.0.1:{port}");
        let mut master = Self { child, dir, url };
        until("the master is ready", || {
            assert_eq!(master.child.try_wait().unwrap(), None, "{}", master.log());
            std::net::TcpStream::connect(("127.0.0.1", port)).ok()?;
            (Browser::default().get(&format!("{}/readyz", master.url)).status == 200).then_some(())
        });
        master
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap()
    }

    pub(crate) fn admin(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("data/admin-token")).unwrap().trim().to_owned()
    }

    pub(crate) fn call(&self, method: &str, path: &str, token: &str, body: &Value) -> (u16, Value) {
        let text = if body.is_null() { String::new() } else { body.to_string() };
        let request = http::Request::builder()
            .method(method)
            .uri(format!("{}/api/v1{path}", self.url))
            .header("authorization", format!("Bearer {token}"))
            .body(text)
            .unwrap();
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .allow_non_standard_methods(true)
            .timeout_global(Some(LIMIT))
            .build();
        let mut response = ureq::Agent::from(config).run(request).unwrap();
        let text = response.body_mut().read_to_string().unwrap();
        (response.status().as_u16(), serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    /// A call of the administrator that must succeed.
    pub(crate) fn ok(&self, method: &str, path: &str, body: &Value) -> Value {
        let (status, answer) = self.call(method, path, &self.admin(), body);
        assert!((200..300).contains(&status), "{method} {path}: {status} {answer}");
        answer
    }

    /// Another account with a token.
    pub(crate) fn account(&self, name: &str) -> (String, String) {
        let account = self.ok("POST", "/accounts", &json!({ "name": name }));
        let id = account["id"].as_str().unwrap().to_owned();
        let token = self.ok("POST", &format!("/accounts/{id}/tokens"), &json!({}));
        (id, token["token"].as_str().unwrap().to_owned())
    }

    /// The account that a token speaks for.
    pub(crate) fn who(&self, token: &str) -> (u16, Value) {
        self.call("GET", "/account", token, &Value::Null)
    }

    /// Where a log-in with a provider begins.
    pub(crate) fn start_of(&self, provider: &str) -> String {
        format!("{}/auth/oidc/{provider}/start", self.url)
    }

    /// How many accounts there are.
    pub(crate) fn accounts(&self) -> usize {
        self.ok("GET", "/accounts", &Value::Null)["accounts"].as_array().unwrap().len()
    }
}
