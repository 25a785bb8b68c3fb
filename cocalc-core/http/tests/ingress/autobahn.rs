//! WebSocket conformance: the cases of the Autobahn test suite (run by kosoku,
//! from PyPI) end through host and proxy as well as at the app itself.

use std::{collections::BTreeMap, path::PathBuf, process::Stdio, time::Duration};

use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
    time::timeout,
};

use crate::support::*;

/// Where `.ci/setup.sh` has put kosoku and websockets.
fn program(name: &str) -> PathBuf {
    let place = std::env::var_os("COCALC_WEBSOCKETS").unwrap_or("/var/cache/cocalc/websockets".into());
    PathBuf::from(place).join("bin").join(name)
}

/// Sends every message back, compressed if that is wished for.
const ECHO: &str = r#"
import asyncio, logging
from websockets.asyncio.server import serve
logging.disable(logging.CRITICAL)
async def echo(socket):
    async for message in socket:
        await socket.send(message)
async def main():
    # No pings of its own: the cases of compression, which last longer than its 20 s
    # on a busy machine, take a ping for their end, and fail.
    async with serve(echo, "127.0.0.1", 0, max_size=None, ping_interval=None) as server:
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()
asyncio.run(main())
"#;

async fn app() -> (Child, u16) {
    let mut app = Command::new(program("python"))
        .args(["-c", ECHO])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .expect(".ci/setup.sh test installs it");
    let mut lines = BufReader::new(app.stdout.take().unwrap()).lines();
    let port = timeout(DEADLINE * 6, lines.next_line()).await.unwrap().unwrap().unwrap();
    (app, port.parse().unwrap())
}

/// How each case ends: behaviour, and that of the closing handshake.
async fn outcomes_at(url: &str, cases: &[&str], at_once: usize) -> BTreeMap<String, (String, String)> {
    let reports = tempfile::tempdir().unwrap();
    let mut kosoku = Command::new(program("kosoku"));
    kosoku.arg(url).args(["--parallelism", &at_once.to_string(), "--outdir"]).arg(reports.path());
    kosoku.args(cases).stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
    // That cases fail is said in the report.
    timeout(Duration::from_secs(1800), kosoku.status()).await.expect("it hangs").unwrap();
    let index = std::fs::read(reports.path().join("index.json")).expect("a report");
    let index: BTreeMap<String, BTreeMap<String, serde_json::Value>> =
        serde_json::from_slice(&index).unwrap();
    let word = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    let all = index.into_values().flatten();
    all.map(|(case, report)| (case, (word(&report["behavior"]), word(&report["behaviorClose"])))).collect()
}

/// Whether RFC 6455 allows it. Between these it is a matter of who is faster: the
/// answer to a good frame, or the end because of the bad one after it.
fn conforms((behavior, close): &(String, String)) -> bool {
    ["OK", "NON-STRICT", "INFORMATIONAL"].contains(&&**behavior)
        && ["OK", "INFORMATIONAL"].contains(&&**close)
}

#[tokio::test(flavor = "multi_thread")]
async fn websocket_cases_end_as_they_do_at_the_app() {
    // Messages of 16 MiB and more, and 200 cases of compression, take long.
    let some: &[&str] =
        &["-x", "9.1.6", "-x", "9.2.6", "-x", "9.3.*", "-x", "9.4.*", "-x", "12.*", "-x", "13.*", "-i", "*"];
    let cases = if std::env::var_os("COCALC_FULL").is_some() { &[] } else { some };
    if !cases.is_empty() {
        println!("without compression and the longest messages; all with COCALC_FULL");
    }
    let world = World::with(cocalc_http::Limits::default()).await;
    let (_app, port) = app().await;
    let direct = outcomes_at(&format!("ws://127.0.0.1:{port}/"), cases, 4).await;
    assert!(direct.len() > 200, "{} cases", direct.len());
    let good = direct.values().filter(|outcome| conforms(outcome)).count();
    assert!(good * 10 > direct.len() * 9, "{good} of {} are good at the app", direct.len());
    for (address, base, _) in world.ways() {
        let (project, token) = (world.project, world.token());
        let url =
            format!("ws://127.0.0.1:{}{base}/{project}/port/{port}/?cocalc_token={token}", address.port());
        let mut through = outcomes_at(&url, cases, 4).await;
        let worse = |through: &BTreeMap<String, (String, String)>| -> Vec<String> {
            let good = direct.iter().filter(|(_, outcome)| conforms(outcome)).map(|(case, _)| case);
            good.filter(|case| !through.get(*case).is_some_and(conforms)).cloned().collect()
        };
        // Those of a thousand large messages have a clock of their own, and fail where
        // much else goes on: each is tried again by itself.
        let again = worse(&through);
        if !again.is_empty() {
            println!("again, one by one, at {address}: {again:?}");
            let cases: Vec<&str> = again.iter().flat_map(|case| ["-i", case.as_str()]).collect();
            through.extend(outcomes_at(&url, &cases, 1).await);
        }
        let worse: Vec<_> = worse(&through)
            .into_iter()
            .map(|case| (direct.get(&case), through.get(&case).cloned(), case))
            .collect();
        assert!(worse.is_empty(), "at {address}: {worse:?}");
    }
}
