//! The command line: logging in, and linking identities.

use std::{
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    process::{Child, ChildStderr, Command, Output, Stdio},
};

use serde_json::{Value, json};

use crate::{
    browser::{Browser, parameter},
    master::Master,
    world,
};

/// The command line program, which is built beside the master's.
fn cocalc(home: &Path) -> Command {
    let program = Path::new(env!("CARGO_BIN_EXE_cocalc-master")).with_file_name("cocalc");
    assert!(program.exists(), "{} is missing: cargo build -p cocalc-cli", program.display());
    let mut command = Command::new(program);
    for (key, _) in std::env::vars_os().filter(|(key, _)| key.to_string_lossy().starts_with("COCALC_")) {
        command.env_remove(key);
    }
    command.env("XDG_CONFIG_HOME", home);
    command
}

/// A command that waits for a browser; killed when it goes out of scope.
struct Waiting {
    child: Option<Child>,
    stderr: BufReader<ChildStderr>,
    /// Where the browser is to go.
    address: String,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Waiting {
    fn new(home: &Path, arguments: &[&str]) -> Self {
        let mut child = cocalc(home)
            .args(arguments)
            .args(["--no-browser", "--browser-timeout", "60"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut waiting = Self {
            stderr: BufReader::new(child.stderr.take().unwrap()),
            child: Some(child),
            address: String::new(),
        };
        let mut seen = String::new();
        while waiting.address.is_empty() {
            let mut line = String::new();
            let count = waiting.stderr.read_line(&mut line).unwrap();
            assert_ne!(count, 0, "{seen}");
            if line.starts_with("http://") {
                line.trim().clone_into(&mut waiting.address);
            }
            seen += &line;
        }
        waiting
    }

    fn ended(mut self) -> (Option<i32>, String) {
        let mut said = String::new();
        self.stderr.read_to_string(&mut said).unwrap();
        let Output { status, stdout, .. } = self.child.take().unwrap().wait_with_output().unwrap();
        (status.code(), String::from_utf8(stdout).unwrap() + &said)
    }
}

/// Goes through a log-in as `name`, up to the program's own address.
fn at_program(browser: &mut Browser, address: &str, name: &str) -> String {
    let port = parameter(address, "port").unwrap();
    browser.until(address, name, |url| url.starts_with(&format!("http://127.0.0.1:{port}/")))
}

fn profile(home: &Path) -> PathBuf {
    home.join("cocalc/profile.json")
}

fn run(home: &Path, arguments: &[&str]) -> (Option<i32>, String) {
    let Output { status, stdout, stderr } = cocalc(home).args(arguments).output().unwrap();
    (status.code(), String::from_utf8(stdout).unwrap() + &String::from_utf8(stderr).unwrap())
}

/// A log-in that a program without the command line begins: code and verifier.
fn by_hand(master: &Master, name: &str, more: &str) -> (String, &'static str) {
    // Of `verifier`, as RFC 7636 has it.
    let challenge = "iMnq5o6zALKXGivsnlom_0F5_WYda32GHkxlV7mq7hQ";
    let url =
        format!("{}?port=9&challenge={challenge}&state=0123456789abcdef{more}", master.start_of("local"));
    let at = at_program(&mut Browser::default(), &url, name);
    assert_eq!(parameter(&at, "state").as_deref(), Some("0123456789abcdef"));
    (parameter(&at, "code").unwrap_or_else(|| panic!("{at}")), "verifier")
}

#[test]
fn the_command_line_logs_in_by_a_browser() {
    let (_provider, master) = world("create_accounts = true");
    let home = tempfile::tempdir().unwrap();
    let login = ["login", "--url", &master.url, "--oidc", "local"];
    let waiting = Waiting::new(home.path(), &login);
    let mut browser = Browser::default();
    let at = at_program(&mut browser, &waiting.address, "ada");
    // Somebody who only knows the port gets nowhere.
    let port = parameter(&waiting.address, "port").unwrap();
    assert_eq!(browser.get(&format!("http://127.0.0.1:{port}/?state=guess&code=x")).status, 404);
    let shown = browser.get(&at);
    assert_eq!(shown.status, 200, "{shown:?}");
    assert!(shown.text.contains("close this window"));
    let (code, said) = waiting.ended();
    assert_eq!(code, Some(0), "{said}");
    let saved: Value = serde_json::from_slice(&std::fs::read(profile(home.path())).unwrap()).unwrap();
    let (status, me) = master.who(saved["token"].as_str().unwrap());
    assert_eq!((status, &me["name"]), (200, &json!("ada by name")));

    // What the browser saw is worth nothing: the code was used, and needs what
    // only the program had.
    let spent = json!({ "code": parameter(&at, "code").unwrap(), "verifier": "guess" });
    assert_eq!(master.call("POST", "/login/oidc", "", &spent).0, 401);
    let (code, _) = by_hand(&master, "ada", "");
    let guess = json!({ "code": code, "verifier": "guess" });
    assert_eq!(master.call("POST", "/login/oidc", "", &guess).0, 401);
    let late = json!({ "code": code, "verifier": "verifier" });
    assert_eq!(master.call("POST", "/login/oidc", "", &late).0, 401, "a wrong guess spends it");
    let (code, verifier) = by_hand(&master, "ada", "");
    let right = json!({ "code": code, "verifier": verifier });
    let (status, answer) = master.call("POST", "/login/oidc", "", &right);
    assert_eq!((status, &answer["account_id"]), (201, &me["id"]), "{answer}");
    assert_eq!(master.call("POST", "/login/oidc", "", &right).0, 401);
    // Who is signed out or banned in between gets nothing for it.
    let id = me["id"].as_str().unwrap();
    let (code, verifier) = by_hand(&master, "ada", "");
    master.ok("POST", &format!("/accounts/{id}/sign-out"), &json!({}));
    let stale = json!({ "code": code, "verifier": verifier });
    assert_eq!(master.call("POST", "/login/oidc", "", &stale).0, 409);

    // Refusals end the command, with the reason.
    master.ok("POST", &format!("/accounts/{id}/ban"), &json!({}));
    let waiting = Waiting::new(home.path(), &login);
    let at = at_program(&mut browser, &waiting.address, "ada");
    assert_eq!(browser.get(&at).status, 403);
    let (code, said) = waiting.ended();
    assert_eq!(code, Some(4), "{said}");
    assert!(said.contains("access_denied"), "{said}");
    let (code, said) = run(home.path(), &["login", "--url", &master.url, "--oidc", "nobody"]);
    assert_eq!(code, Some(3), "{said}");
    assert!(said.contains("local"), "what there is: {said}");
    let short = [&login[..], &["--no-browser", "--browser-timeout", "0"]].concat();
    assert_eq!(run(home.path(), &short).0, Some(7));
    assert!(!master.log().contains(saved["token"].as_str().unwrap()));
}

/// Who is logged in at the provider can be sent through a log-in by a link, to
/// a port that somebody else listens on.
#[test]
fn a_program_gets_nothing_before_the_person_has_agreed() {
    let (_provider, master) = world("create_accounts = true");
    let challenge = "iMnq5o6zALKXGivsnlom_0F5_WYda32GHkxlV7mq7hQ";
    for more in ["", "&link=true"] {
        let start =
            format!("{}?port=9&challenge={challenge}&state=0123456789abcdef{more}", master.start_of("local"));
        let mut browser = Browser::default();
        let back = browser.back(&start, "ada");
        let asked = browser.get(&back);
        assert_eq!((asked.status, asked.location()), (200, None), "{asked:?}");
        // The code of what was begun, as the program shows it.
        assert!(asked.text.contains("JKLG-QVAU"), "{}", asked.text);
        let policy = asked.headers["content-security-policy"].to_str().unwrap();
        assert!(policy.contains("frame-ancestors 'none'"), "{policy}");
        let word = asked.hidden("word").unwrap();
        let agree = format!("{}/auth/oidc/local/agree", master.url);
        let send = |browser: &mut Browser, word: &str| browser.post(&agree, &format!("word={word}"));
        assert_eq!(send(&mut browser, "guess").status, 400);
        // Not from another browser, and a try spends it.
        assert_eq!(send(&mut Browser::default(), &word).status, 403);
        assert_eq!(send(&mut browser, &word).status, 400);
    }
}

#[test]
fn identities_are_linked_by_who_has_both_and_the_last_stays() {
    let (_provider, master) = world("");
    let home = tempfile::tempdir().unwrap();
    let (id, key) = master.account("Ada");
    let log_in = |name: &str| {
        let mut browser = Browser::default();
        let back = browser.back(&master.start_of("local"), name);
        browser.get(&back)
    };
    assert_eq!(log_in("ada").status, 403, "not linked yet");
    let flags = ["--url", &master.url, "--token", &key, "--output", "json"];
    let with = |arguments: &[&str]| run(home.path(), &[arguments, &flags].concat());
    let json_of = |text: &str| -> Value { serde_json::from_str(text).unwrap() };

    let arguments = [&["account", "identity", "link", "--oidc", "local"][..], &flags].concat();
    let waiting = Waiting::new(home.path(), &arguments);
    let mut browser = Browser::default();
    let at = at_program(&mut browser, &waiting.address, "ada");
    browser.get(&at);
    let (code, said) = waiting.ended();
    assert_eq!(code, Some(0), "{said}");
    let (code, listed) = with(&["account", "identity", "list"]);
    assert_eq!(code, Some(0), "{listed}");
    let identity = json_of(&listed)[0].clone();
    assert_eq!((&identity["provider"], &identity["subject"]), (&json!("local"), &json!("ada")), "{listed}");
    let shown = log_in("ada");
    let logged = shown.data("token").unwrap();
    assert_eq!(master.who(&logged).1["id"], json!(id));

    // What was shown for linking logs nobody in, and the other way round.
    let (code, verifier) = by_hand(&master, "ada", "&link=true");
    let body = json!({ "code": code, "verifier": verifier });
    assert_eq!(master.call("POST", "/login/oidc", "", &body).0, 401);
    let (code, verifier) = by_hand(&master, "ada", "");
    let body = json!({ "code": code, "verifier": verifier });
    let path = format!("/accounts/{id}/identities");
    assert_eq!(master.call("POST", &path, &key, &body).0, 400);
    // It is one account's only, and only its own people link and see it.
    let (_, eves) = master.account("Eve");
    let (code, verifier) = by_hand(&master, "ada", "&link=true");
    let body = json!({ "code": code, "verifier": verifier });
    let eve = master.who(&eves).1["id"].as_str().unwrap().to_owned();
    let (status, answer) = master.call("POST", &format!("/accounts/{eve}/identities"), &eves, &body);
    assert_eq!((status, &answer["code"]), (409, &json!("already_exists")), "{answer}");
    assert_eq!(master.call("POST", &path, &eves, &json!({ "code": "x", "verifier": "y" })).0, 404);
    assert_eq!(master.call("POST", &path, &master.admin(), &json!({ "code": "x", "verifier": "y" })).0, 403);
    assert_eq!(master.call("GET", &path, &eves, &Value::Null).0, 404);

    let name = identity["id"].as_str().unwrap();
    let (code, said) = with(&["account", "identity", "unlink", name]);
    assert_eq!(code, Some(5), "{said}");
    assert!(said.contains("last_way_in"), "{said}");
    let password = json!({ "login": "ada", "password": "correct horse" });
    assert_eq!(master.call("PUT", &format!("/accounts/{id}/password"), &key, &password).0, 204);
    assert_eq!(with(&["account", "identity", "unlink", name]).0, Some(0));
    assert_eq!(with(&["account", "identity", "unlink", name]).0, Some(3));
    assert_eq!(log_in("ada").status, 403, "no more");
}
