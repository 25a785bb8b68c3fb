//! Apps and clients that misbehave on purpose. Each costs a bounded time, and
//! hurts nobody else: a good request follows every one of them, on the
//! connection that is kept if one is.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{sleep, timeout},
};

use crate::support::*;

/// What an app does with a request, and what its user gets.
#[derive(Clone, Copy, Debug)]
struct Row {
    name: &'static str,
    /// Which bound ends it.
    bound: &'static str,
    does: Does,
    /// Status and code; without one, what comes is the app's.
    gets: (u16, &'static str),
    /// How the body ends; that of a refusal does not count.
    body: &'static str,
}

#[derive(Clone, Copy, Debug)]
enum Does {
    /// Says this and keeps the connection.
    Says(&'static str),
    /// Says this and closes the connection.
    Ends(&'static str),
    /// Says the first, and then the second again and again, as fast as it can.
    Floods(&'static str, &'static str),
    /// The same, a bit at a time.
    Drips(&'static str, &'static str),
}

use Does::{Drips, Ends, Floods, Says};

const ERROR: (u16, &str) = (502, "app_error");
const LATE: (u16, &str) = (504, "app_timeout");
const FINE: (u16, &str) = (200, "");

const ROWS: &[Row] = &[
    Row { name: "never answers", bound: "response_timeout", does: Says(""), gets: LATE, body: "" },
    Row {
        name: "begins an answer and stops",
        bound: "response_timeout",
        does: Says("HTTP/1.1 200 OK\r\nContent-"),
        gets: LATE,
        body: "",
    },
    Row {
        name: "a head in drips",
        bound: "response_timeout",
        does: Drips("HTTP/1.1 200 OK\r\nX: ", "x"),
        gets: LATE,
        body: "",
    },
    Row {
        name: "a head without an end",
        bound: "head_bytes",
        does: Floods("HTTP/1.1 200 OK\r\n", "X: xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\r\n"),
        gets: ERROR,
        body: "",
    },
    Row {
        name: "a field without an end",
        bound: "head_bytes",
        does: Floods(
            "HTTP/1.1 200 OK\r\nX: ",
            "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
        ),
        gets: ERROR,
        body: "",
    },
    Row {
        name: "a reason without an end",
        bound: "head_bytes",
        does: Floods("HTTP/1.1 200 ", "because because because because because because because because "),
        gets: ERROR,
        body: "",
    },
    Row {
        name: "interim answers without an end",
        bound: "response_timeout",
        does: Floods("", "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"),
        gets: LATE,
        body: "",
    },
    Row { name: "closes at once", bound: "", does: Ends(""), gets: ERROR, body: "" },
    Row {
        name: "closes in the head",
        bound: "",
        does: Ends("HTTP/1.1 200 OK\r\nX: "),
        gets: ERROR,
        body: "",
    },
    Row {
        name: "closes in the body",
        bound: "",
        does: Ends("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\npart"),
        gets: FINE,
        body: "part",
    },
    Row {
        name: "closes in a chunk",
        bound: "",
        does: Ends("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\npart"),
        gets: FINE,
        body: "part\r\n",
    },
    Row {
        name: "closes before the last chunk",
        bound: "",
        does: Ends("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\npart\r\n"),
        gets: FINE,
        body: "part\r\n",
    },
    Row {
        name: "a malformed chunk",
        bound: "",
        does: Says("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\npart\r\nxyz\r\n"),
        gets: FINE,
        body: "part\r\n",
    },
    Row {
        name: "another answer after its own",
        bound: "",
        does: Says(
            "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ngoodHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil",
        ),
        gets: FINE,
        body: "good",
    },
    Row {
        name: "a body where there is none",
        bound: "",
        does: Says(
            "HTTP/1.1 204 No Content\r\nContent-Length: 42\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil",
        ),
        gets: (204, ""),
        body: "\r\n\r\n",
    },
    Row {
        name: "two lengths",
        bound: "",
        does: Says("HTTP/1.1 200 OK\r\nContent-Length: 4\r\nContent-Length: 44\r\n\r\ngood"),
        gets: ERROR,
        body: "",
    },
    Row {
        name: "a length that is none",
        bound: "",
        does: Says("HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\ngood"),
        gets: ERROR,
        body: "",
    },
    Row {
        name: "length and coding",
        bound: "",
        does: Says(
            "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n4\r\ngood\r\n0\r\n\r\n",
        ),
        gets: FINE,
        body: "good\r\n0\r\n\r\n",
    },
    Row {
        name: "a split field",
        bound: "",
        does: Says("HTTP/1.1 200 OK\r\nX-A: b\rSet-Cookie: cocalc-session-x=y\r\nContent-Length: 0\r\n\r\n"),
        gets: ERROR,
        body: "",
    },
    Row {
        name: "NUL in a field",
        bound: "",
        does: Says("HTTP/1.1 200 OK\r\nX-A: b\0c\r\nContent-Length: 0\r\n\r\n"),
        gets: ERROR,
        body: "",
    },
    Row { name: "another protocol", bound: "", does: Says("SSH-2.0-x\r\n\r\n\r\n"), gets: ERROR, body: "" },
    Row {
        name: "a switch nobody asked for",
        bound: "",
        does: Says(
            "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nraw",
        ),
        gets: ERROR,
        body: "",
    },
    Row {
        name: "speaks for the host",
        bound: "",
        does: Says(
            "HTTP/1.1 421 No\r\ncocalc-code: project_moved\r\ncocalc-host: x\r\nContent-Length: 2\r\n\r\nno",
        ),
        gets: (421, ""),
        body: "no",
    },
];

async fn app(mut stream: TcpStream, ended: Arc<AtomicUsize>) -> std::io::Result<()> {
    loop {
        let head = until(&mut stream, "\r\n\r\n").await?;
        let path = head.split(' ').nth(1).unwrap_or_default();
        let Some(row) = path.strip_prefix("/row-").and_then(|index| index.parse::<usize>().ok()) else {
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nfine").await?;
            continue;
        };
        match ROWS[row].does {
            Says(text) => stream.write_all(text.as_bytes()).await?,
            Ends(text) => return stream.write_all(text.as_bytes()).await,
            Floods(first, again) | Drips(first, again) => {
                stream.write_all(first.as_bytes()).await?;
                let slowly = matches!(ROWS[row].does, Drips(..));
                loop {
                    if let Err(error) = stream.write_all(again.as_bytes()).await {
                        ended.fetch_add(1, Ordering::Relaxed);
                        return Err(error);
                    }
                    if slowly {
                        sleep(Duration::from_millis(20)).await;
                    }
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hostile_app_costs_its_user_a_bounded_time() {
    let world = World::new().await;
    let ended = Arc::new(AtomicUsize::new(0));
    let count = ended.clone();
    let (port, _app) = scripted(move |stream, _| app(stream, count.clone())).await;
    let mut faults = Vec::new();
    for (address, base, _) in world.ways() {
        let ask = async |path: &str| {
            let request = format!(
                "GET {base}/{}/proxy/{port}/{path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: Bearer {}\r\n\r\n",
                world.project,
                world.token()
            );
            raw(address, request).await
        };
        for (index, row) in ROWS.iter().enumerate() {
            let answer = ask(&format!("row-{index}")).await;
            let outcomes = outcomes(&answer);
            let case = format!("{} ({}) at {address}: {}", row.name, row.bound, text(answer.clone()));
            // Where the answer is cut, it may be lost on the way with its head.
            let cut = matches!(row.does, Ends(_)) && row.gets == FINE;
            let lost = cut && (answer.is_empty() || outcomes == [(502, "host_unreachable".to_owned())]);
            let good =
                outcomes == [(row.gets.0, row.gets.1.to_owned())] && text(answer.clone()).ends_with(row.body);
            if !lost && !(good || (row.body.is_empty() && outcomes == [(row.gets.0, row.gets.1.to_owned())]))
            {
                faults.push(case);
            }
            let after = text(ask("fine").await);
            if !(after.starts_with("HTTP/1.1 200 OK\r\n") && after.ends_with("fine")) {
                faults.push(format!("after {} at {address}: {after}", row.name));
            }
        }
    }
    assert!(faults.is_empty(), "{faults:#?}");
    let endless = ROWS.iter().filter(|row| matches!(row.does, Floods(..) | Drips(..))).count();
    eventually("those without an end are cut off", || ended.load(Ordering::Relaxed) == 2 * endless).await;
}

/// An answer without an end ends with its user.
#[tokio::test(flavor = "multi_thread")]
async fn an_app_hears_that_its_user_has_gone() {
    let world = World::new().await;
    let gone = Arc::new(AtomicUsize::new(0));
    let count = gone.clone();
    let (port, _app) = scripted(move |mut stream, _| {
        let count = count.clone();
        async move {
            let head = until(&mut stream, "\r\n\r\n").await?;
            stream.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nbegin\r\n").await?;
            if head.contains("/flood") {
                while stream.write_all(b"5\r\nagain\r\n").await.is_ok() {}
            } else {
                // It says no more, and is told all the same.
                let mut rest = Vec::new();
                let _ = stream.read_to_end(&mut rest).await;
            }
            count.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
    })
    .await;
    let mut expected = 0;
    for (address, base, _) in world.ways() {
        for path in ["flood", "quiet"] {
            let mut stream = TcpStream::connect(address).await.unwrap();
            let request = format!(
                "GET {base}/{}/proxy/{port}/{path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {}\r\n\r\n",
                world.project,
                world.token()
            );
            stream.write_all(request.as_bytes()).await.unwrap();
            heard(&mut stream, "begin").await;
            drop(stream);
            expected += 1;
            eventually(path, || gone.load(Ordering::Relaxed) == expected).await;
        }
    }
}

/// Sends `first`, and then a byte now and then, until it is cut off.
async fn drip(world: &World, way: usize, first: String) -> Vec<u8> {
    let mut stream = TcpStream::connect(world.ways()[way].0).await.unwrap();
    stream.write_all(first.as_bytes()).await.unwrap();
    let (mut read, mut write) = stream.split();
    let mut answer = Vec::new();
    let drips = async {
        while write.write_all(b"x").await.is_ok() {
            sleep(Duration::from_millis(50)).await;
        }
        std::future::pending::<()>().await;
    };
    let read = async {
        let _ = read.read_to_end(&mut answer).await;
    };
    tokio::select! {
        ended = timeout(DEADLINE, read) => ended.expect("it may go on and on"),
        () = drips => {}
    }
    answer
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hostile_client_costs_a_bounded_time() {
    let world = World::new().await;
    let bearer = world.token();
    for (way, (address, base, _)) in world.ways().into_iter().enumerate() {
        let path = format!("{base}{}", world.mount());
        // A head in drips: its time is that of the whole head.
        for first in ["", "GET / HT", "GET / HTTP/1.1\r\nHost: localhost\r\nX: "] {
            let answer = drip(&world, way, first.to_owned()).await;
            assert!(outcomes(&answer).iter().all(|(status, _)| *status == 400 || *status == 408), "{first}");
        }
        // A body in drips of somebody who may not: it is not even read.
        let stranger =
            format!("PUT {path}/upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n");
        let answer = drip(&world, way, stranger).await;
        assert_eq!(outcomes(&answer), [(401, "unauthenticated".to_owned())]);
        // A thousand requests at once are answered in their order.
        let one =
            format!("GET {path}/many HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {bearer}\r\n\r\n");
        let last = one.replace("Host:", "Connection: close\r\nHost:");
        let answer = raw(address, one.repeat(999) + &last).await;
        assert_eq!(outcomes(&answer).len(), 1000);
        // A body that nobody reads, and no answer either.
        let unread = format!(
            "PUT {path}/silent HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: Bearer {bearer}\r\nContent-Length: 67108864\r\n\r\n"
        );
        let mut request = unread.into_bytes();
        request.resize(request.len() + (64 << 20), b'x');
        let answer = raw(address, request).await;
        let outcomes = outcomes(&answer);
        assert!(
            outcomes.len() <= 1 && outcomes.iter().all(|(status, _)| [408, 502, 504].contains(status)),
            "{outcomes:?}"
        );
    }
}
