//! Using the project: web app, WebSocket, SSH and sftp, directly and through
//! the proxy; and being refused.

use std::time::{Duration, Instant};

use serde_json::json;

use super::reach::{
    APP_PORT, Answer, Connect, Echo, Way, ensure, expect_status, get, sftp, ssh, ssh_output, ssh_with_input,
};
use crate::{
    failure::{Failure, While},
    up::{
        Up,
        configure::ssh_key,
        narrator::{Narrator, done, told, wait_for},
        rate,
    },
};

/// Runs when the project starts, so that the app comes back after a move.
const STARTUP: &str = "#!/bin/sh\nexec python3 ~/app.py 8000\n";

/// Brings the app up inside the project.
pub(super) fn app(up: &Up, narrator: &Narrator) -> Result<(), Failure> {
    narrator.step("a web app inside, on 127.0.0.1 of the project", || {
        let connect = Connect::long(up)?;
        let write = |path: &str, text: &str| {
            let line = format!("mkdir -p ~/.cocalc && cat > {path} && chmod +x {path}");
            ssh_with_input(up, &connect, Way::Direct, &line, text.as_bytes())
        };
        write("~/app.py", include_str!("app.py"))?;
        write("~/tree.py", include_str!("tree.py"))?;
        write("~/.cocalc/startup", STARTUP)?;
        ssh(up, &connect, Way::Direct, "setsid -f ~/.cocalc/startup </dev/null >/dev/null 2>&1")?;
        answers(&connect, Way::Direct)?;
        told((), format!("port {APP_PORT}"))
    })
}

/// Waits until the app answers, and returns what it says.
pub(super) fn answers(connect: &Connect, way: Way) -> Result<Answer, Failure> {
    let url = connect.url(way, "hello?a=1")?;
    let bearer = format!("Bearer {}", connect.token()?);
    let answer = wait_for("the app to answer", Duration::from_secs(20), || {
        let answer = get(&url, &[("authorization", &bearer)])?;
        Ok(!matches!(answer.status, 502 | 503)).map(|up| up.then_some(answer))
    })?;
    expect_status(&answer, 200)?;
    Ok(answer)
}

/// HTTP and WebSocket, both ways.
pub(super) fn web(up: &Up, narrator: &Narrator) -> Result<(), Failure> {
    for way in Way::BOTH {
        narrator.step(format!("HTTP, {}", way.name()), || {
            let connect = Connect::long(up)?;
            let seen = answers(&connect, way)?.json();
            ensure(seen["path"].as_str().is_some_and(|p| p.ends_with("/hello?a=1")), "the path was changed")?;
            ensure(!seen.to_string().contains(&connect.token()?), "the app was shown the token")?;
            done()
        })?;
        narrator.step(format!("browser bootstrap, {}", way.name()), || {
            let connect = Connect::new(up, &up.federation.project.id, &json!({ "use": "once" }))?;
            let token = connect.token()?;
            let url = connect.url(way, "page")?;
            let with_token = format!("{url}?cocalc_token={token}");
            let first = get(&with_token, &[])?;
            ensure(
                matches!(first.status, 302 | 303),
                format!("no redirect: {} {}", first.status, first.body),
            )?;
            ensure(!first.header("location").contains("cocalc_token"), "the redirect keeps the token")?;
            let cookie = first.header("set-cookie").split(';').next().unwrap_or_default().to_owned();
            ensure(!cookie.is_empty(), "no cookie was set")?;
            let second = get(&url, &[("cookie", &cookie)])?;
            expect_status(&second, 200)?;
            let secret = cookie.split_once('=').map_or("", |(_, value)| value);
            ensure(!second.body.contains(secret), "the app was shown our cookie")?;
            let again = get(&with_token, &[])?;
            refused(&again, 403, "access_denied")?;
            told((), "redeemed once, clean address, cookie")
        })?;
        narrator.step(format!("WebSocket echo, {}", way.name()), || {
            let connect = Connect::long(up)?;
            let mut echo = Echo::open(&connect.url(way, "echo")?, &connect.token()?)?;
            for i in 0..20 {
                echo.round(&format!("message {i}"))?;
            }
            done()
        })?;
    }
    Ok(())
}

/// A command, an upload and a download, both ways.
pub(super) fn shell(up: &Up, narrator: &Narrator) -> Result<(), Failure> {
    const BYTES: u64 = 8 << 20;
    let scratch = tempfile::tempdir().during("no temporary directory")?;
    let local = scratch.path().join("upload");
    let mut data = vec![0; usize::try_from(BYTES).unwrap_or(0)];
    getrandom::fill(&mut data).map_err(|e| Failure::failed(format!("no randomness: {e}")))?;
    std::fs::write(&local, &data)?;
    for way in Way::BOTH {
        let connect = Connect::long(up)?;
        narrator.step(format!("ssh with a key, {}", way.name()), || {
            let said = ssh(up, &connect, way, "echo to $(whoami) on $(uname -s)")?;
            ensure(said.trim().starts_with("to "), format!("ssh said {said:?}"))?;
            let output = ssh_output(up, &connect, way, &up.key, "exit 42", b"")?;
            ensure(output.status.code() == Some(42), format!("exit 42 became {}", output.status))?;
            told((), format!("{}; exit status kept", said.trim()))
        })?;
        narrator.step(format!("sftp up and down, {}", way.name()), || {
            let back = scratch.path().join(way.name());
            let begun = Instant::now();
            let remote = format!("upload-{}", way.name());
            sftp(
                up,
                &connect,
                way,
                &format!("put {} {remote}\nget {remote} {}\n", local.display(), back.display()),
            )?;
            ensure(std::fs::read(&back)? == data, "the file came back changed")?;
            told((), rate(2 * BYTES, begun.elapsed()))
        })?;
    }
    Ok(())
}

/// Tokens that must be refused, with what they are refused with.
pub(super) fn refusals(up: &Up, narrator: &Narrator, expired: &(Connect, Instant)) -> Result<(), Failure> {
    let project = &up.federation.project.id;
    let here = Connect::long(up)?;
    let other = narrator.step("another project, to be kept out of", || {
        let answer = up.user.post("/projects", &json!({ "name": "other" }))?;
        up.user.wait(&crate::up::string(&answer, "operation_id")?, Duration::from_secs(60), |_| {})?;
        told(crate::up::string(&answer["project"], "id")?, "")
    })?;
    let tampered = tamper(&here.token()?);
    let of_other = Connect::new(up, &other, &json!({}))?.token()?;
    for way in Way::BOTH {
        let url = here.url(way, "hello")?;
        let try_token = |token: &str| get(&url, &[("authorization", &format!("Bearer {token}"))]);
        narrator.step(format!("refused, {}", way.name()), || {
            refused(&get(&url, &[])?, 401, "unauthenticated")?;
            refused(&try_token(&tampered)?, 403, "access_denied")?;
            refused(&try_token(&of_other)?, 403, "access_denied")?;
            told((), "no token 401, tampered 403, another project's 403")
        })?;
        if way == Way::Direct && up.federation.hosts.len() > 1 {
            narrator.step("refused, at another host", || {
                let url = format!("{}/{project}/port/{APP_PORT}/hello", up.federation.hosts[1].url);
                let token = format!("Bearer {}", here.token()?);
                refused(&get(&url, &[("authorization", &token)])?, 403, "access_denied")?;
                told((), "403")
            })?;
        }
        narrator.step(format!("refused, expired, {}", way.name()), || {
            let (connect, minted) = expired;
            // Its life of 1 s, the leeway of 5 s, and rounding to seconds.
            std::thread::sleep(Duration::from_millis(7_100).saturating_sub(minted.elapsed()));
            refused(&try_token(&connect.token()?)?, 401, "token_expired")?;
            told((), "401 token_expired")
        })?;
        narrator.step(format!("refused, unknown SSH key, {}", way.name()), || {
            let stranger = up.plan.dir.join("stranger_key");
            ssh_key(&stranger)?;
            let output = ssh_output(up, &here, way, &stranger, "true", b"")?;
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            ensure(output.status.code() == Some(255) && said.contains("denied"), format!("{output:?}"))?;
            told((), said.lines().last().unwrap_or_default().trim().to_owned())
        })?;
    }
    let answer = up.user.delete(&format!("/projects/{other}"))?;
    up.user.wait(&crate::up::string(&answer, "operation_id")?, Duration::from_secs(60), |_| {})?;
    Ok(())
}

/// Insists on a refusal with this status and code, in plain words.
pub(super) fn refused(answer: &Answer, status: u16, code: &str) -> Result<(), Failure> {
    expect_status(answer, status)?;
    let seen = answer.json()["code"].as_str().unwrap_or_default().to_owned();
    ensure(seen == code, format!("expected code {code}, got {seen:?}: {}", answer.body.trim()))
}

/// Changes one character of a token's claims.
fn tamper(token: &str) -> String {
    let middle = token.find('.').unwrap_or(0) + 10;
    token
        .char_indices()
        .map(|(i, c)| {
            if i != middle {
                c
            } else if c == 'A' {
                'B'
            } else {
                'A'
            }
        })
        .collect()
}
