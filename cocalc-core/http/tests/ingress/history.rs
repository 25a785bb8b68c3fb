//! Former states of files: looked at, and brought back.

use std::sync::{Arc, atomic::Ordering};

use tokio::io::AsyncReadExt;

use crate::{
    files::{begin, body, field},
    support::*,
};

impl World {
    fn past(&self, below: &str) -> std::path::PathBuf {
        self.home.states.path().join(below)
    }

    async fn own(&self, path: &str) -> String {
        let url = format!("http://localhost:{}/{}/.cocalc{path}", self.host_address.port(), self.project);
        curl(&["-i", "-H", &format!("Authorization: Bearer {}", self.token()), &url]).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_former_state_is_listed_read_and_downloaded_by_who_may_change_files() {
    let world = World::new().await;
    world.write("now", "now");
    std::fs::create_dir_all(world.past("auto-1/dir/sub")).unwrap();
    std::fs::write(world.past("auto-1/dir/file"), "0123456789").unwrap();
    std::fs::create_dir(world.past("mine")).unwrap();
    let listed = world.own("/snapshots").await;
    let listed: serde_json::Value = serde_json::from_str(body(&listed)).unwrap();
    assert_eq!(
        listed["snapshots"],
        serde_json::json!([
            { "name": "auto-1", "taken": 1_700_000_000, "automatic": true },
            { "name": "mine", "taken": 1_700_000_000, "automatic": false },
        ])
    );
    let root = world.ask("GET", "/?snapshot=auto-1", &[]).await;
    let root: serde_json::Value = serde_json::from_str(body(&root)).unwrap();
    assert_eq!(
        (root["entries"][0]["name"].as_str(), root["snapshot"].as_str()),
        (Some("dir"), Some("auto-1"))
    );
    let page = world.ask("GET", "/dir/?snapshot=auto-1&max=1", &["-H", "Accept: text/html"]).await;
    for link in [
        "\"file?snapshot=auto-1\"",
        "\"../?snapshot=auto-1\"",
        "\"?archive=zip&amp;snapshot=auto-1\"",
        "in auto-1",
    ] {
        assert!(page.contains(link), "{link}: {page}");
    }
    assert!(page.contains("\"?after=file&amp;max=1&amp;snapshot=auto-1\""), "{page}");
    let redirect = world.ask("GET", "/dir?snapshot=auto-1", &[]).await;
    assert!(field(&redirect, "location").unwrap().ends_with("/files/dir/?snapshot=auto-1"), "{redirect}");
    let part = world.ask("GET", "/dir/file?snapshot=auto-1", &["-H", "Range: bytes=2-4"]).await;
    assert!(part.starts_with("HTTP/1.1 206 ") && body(&part) == "234", "{part}");
    assert!(field(&part, "content-security-policy").is_some(), "{part}");
    let archive = world.ask("HEAD", "/dir/?archive=tar&snapshot=auto-1", &[]).await;
    assert!(archive.starts_with("HTTP/1.1 200 "), "{archive}");

    for (method, place, expected) in [
        ("GET", "/now?snapshot=auto-1", "404 not_found"),
        ("GET", "/?snapshot=other", "404 no_snapshot"),
        ("GET", "/?snapshot=..", "400 bad_query"),
        ("GET", "/?snapshot=a%2fb", "400 bad_query"),
        ("GET", "/?snapshot=", "400 bad_query"),
        ("PUT", "/x?snapshot=auto-1", "400 bad_query"),
        ("DELETE", "/dir/file?snapshot=auto-1", "400 bad_query"),
        ("MOVE", "/dir/file?snapshot=auto-1", "400 bad_query"),
        ("MKCOL", "/x?snapshot=auto-1", "400 bad_query"),
    ] {
        assert_eq!(world.outcome(method, place, &[]).await, expected, "{method} {place}");
    }
    // What was deleted is not for who may only look.
    world.auth.viewers.store(true, Ordering::Relaxed);
    for place in ["/?snapshot=auto-1", "/dir/file?snapshot=auto-1"] {
        assert_eq!(world.outcome("GET", place, &[]).await, "403 access_denied", "{place}");
    }
    assert!(world.own("/snapshots").await.contains("cocalc-code: access_denied"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_former_state_is_kept_for_as_long_as_it_is_read() {
    let world = World::new().await;
    std::fs::create_dir_all(world.past("auto-1/dir")).unwrap();
    let big = std::fs::File::create(world.past("auto-1/dir/big.gz")).unwrap();
    big.set_len(64 << 20).unwrap();
    for place in ["/dir/big.gz?snapshot=auto-1", "/dir/?archive=zip&snapshot=auto-1"] {
        let mut stream = begin(&world, &format!("GET {place} HTTP/1.1\r\nConnection: close"), b"").await;
        stream.read_u8().await.unwrap();
        eventually("it is held", || Arc::strong_count(&world.home.held) == 2).await;
        drop(stream);
        eventually("it is free", || Arc::strong_count(&world.home.held) == 1).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_is_brought_back_beside_or_in_the_place_of_what_is() {
    let world = World::new().await;
    std::fs::create_dir_all(world.past("auto-1/dir/sub")).unwrap();
    std::fs::write(world.past("auto-1/dir/file"), "old").unwrap();
    std::os::unix::fs::symlink("/etc", world.past("auto-1/out")).unwrap();
    std::fs::create_dir(world.path("dir")).unwrap();
    world.write("dir/file", "new");
    world.write("dir/later", "x");
    let to = |place: &str| format!("Destination: /{}/files{place}", world.project);
    let (past, only_new) = ("?snapshot=auto-1", "Overwrite: F".to_owned());
    for (from, headers, expected) in [
        (format!("/dir/file{past}"), vec![], "400 bad_destination"),
        (format!("/none{past}"), vec![to("/x")], "404 not_found"),
        (format!("/dir/file/{past}"), vec![to("/x")], "404 not_found"),
        ("/dir/file?snapshot=other".to_owned(), vec![to("/x")], "404 no_snapshot"),
        (format!("/out/passwd{past}"), vec![to("/x")], "403 link_refused"),
        (format!("/{past}"), vec![to("/x")], "409 into_itself"),
        (format!("/dir{past}"), vec![to("/")], "409 into_itself"),
        (format!("/dir/file{past}"), vec![to("/none/x")], "409 no_parent"),
        (format!("/dir/file{past}"), vec![to("/dir/file"), only_new.clone()], "412 precondition_failed"),
        (
            format!("/dir/file{past}"),
            vec![to("/dir/x"), "If-Match: \"x\"".to_owned()],
            "412 precondition_failed",
        ),
        (format!("/dir/file{past}"), vec![to("/dir/file.restored"), only_new], "201"),
        (format!("/dir/{past}"), vec![to("/dir")], "204"),
        // Of what is there now, too.
        ("/dir/file".to_owned(), vec![to("/dir/file")], "409 into_itself"),
        ("/dir/file".to_owned(), vec![to("/copy"), "Overwrite: F".to_owned()], "201"),
    ] {
        let more: Vec<&str> = headers.iter().flat_map(|header| ["-H", header]).collect();
        assert_eq!(world.outcome("COPY", &from, &more).await, expected, "COPY {from} {headers:?}");
    }
    assert_eq!(std::fs::read(world.path("dir/file")).unwrap(), b"old");
    assert_eq!(std::fs::read(world.path("copy")).unwrap(), b"old");
    assert!(!world.path("dir/later").exists(), "it is what it was");
    // What was there is kept, with what had been brought back beside it.
    assert_eq!(std::fs::read(world.past("before/dir/file.restored")).unwrap(), b"old");
    assert_eq!(std::fs::read(world.past("before/dir/later")).unwrap(), b"x");
    world.home.thawed.store(false, Ordering::Relaxed);
    let (from, to) = (format!("/dir/file{past}"), to("/y"));
    assert_eq!(world.outcome("COPY", &from, &["-H", &to]).await, "503 project_busy");
    world.auth.viewers.store(true, Ordering::Relaxed);
    assert_eq!(world.outcome("COPY", &from, &["-H", &to]).await, "403 access_denied");
}
