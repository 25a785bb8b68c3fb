//! Raw files, of tenants who do what they can.

use std::{
    ffi::OsStr,
    os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, PermissionsExt, symlink},
    },
    path::PathBuf,
    sync::atomic::Ordering,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use crate::support::*;

impl World {
    pub(crate) fn path(&self, below: &str) -> PathBuf {
        self.home.dir.path().join(below)
    }

    pub(crate) fn write(&self, below: &str, content: impl AsRef<[u8]>) {
        std::fs::write(self.path(below), content).unwrap();
    }

    /// Asks the host, with further arguments for curl.
    pub(crate) async fn ask(&self, method: &str, place: &str, more: &[&str]) -> String {
        let url = format!("http://localhost:{}/{}/files{place}", self.host_address.port(), self.project);
        let bearer = format!("Authorization: Bearer {}", self.token());
        let how: &[&str] = if method == "HEAD" { &["-I"] } else { &["-i", "-X", method] };
        curl(&[how, &["--path-as-is", "-H", &bearer], more, &[&url]].concat()).await
    }

    /// The status and code of the last answer.
    pub(crate) async fn outcome(&self, method: &str, place: &str, more: &[&str]) -> String {
        let answer = self.ask(method, place, more).await;
        let (status, code) = outcomes(answer.as_bytes()).pop().unwrap();
        format!("{status} {code}").trim().to_owned()
    }
}

pub(crate) fn field<'a>(answer: &'a str, name: &str) -> Option<&'a str> {
    let head = answer.split("\r\n\r\n").next().unwrap();
    head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
}

pub(crate) fn body(answer: &str) -> &str {
    answer.split_once("\r\n\r\n").unwrap().1
}

#[tokio::test(flavor = "multi_thread")]
async fn files_are_read_and_revalidated_by_either_way_while_the_project_is_stopped() {
    let world = World::new().await;
    *world.ports.running.lock().unwrap() = false;
    world.write("a b.html", "<script>alert(1)</script>");
    world.write("data.bin", "0123456789");
    std::fs::create_dir(world.path("dir")).unwrap();
    for (address, base, name) in world.ways() {
        let bearer = format!("Authorization: Bearer {}", world.token());
        let port = address.port();
        for place in [
            format!("http://localhost:{port}{base}/{}/files", world.project),
            format!("http://{}.{name}.localhost:{port}/files", world.project),
        ] {
            let get = async |rest: &str, more: &[&str]| {
                let url = format!("{place}{rest}");
                curl(&[&["-i", "-H", &bearer], more, &[&url]].concat()).await
            };
            let page = get("/a%20b.html", &[]).await;
            assert!(
                page.starts_with("HTTP/1.1 200 ") && body(&page) == "<script>alert(1)</script>",
                "{page}"
            );
            assert_eq!(field(&page, "x-content-type-options"), Some("nosniff"));
            assert_eq!(field(&page, "content-type"), Some("text/html; charset=utf-8"));
            let policy = field(&page, "content-security-policy").unwrap();
            assert!(policy.starts_with("sandbox allow-downloads; default-src 'none'"), "{page}");
            assert!(page.contains("\r\ncontent-security-policy: frame-ancestors 'self'\r\n"), "{page}");
            let shown = "inline; filename=\"a b.html\"; filename*=UTF-8''a%20b.html";
            assert_eq!(field(&page, "content-disposition"), Some(shown));
            let saved = get("/a%20b.html?download", &[]).await;
            assert!(field(&saved, "content-disposition").unwrap().starts_with("attachment; "), "{saved}");

            let whole = get("/data.bin", &[]).await;
            let (tag, date) = (
                field(&whole, "etag").unwrap().to_owned(),
                field(&whole, "last-modified").unwrap().to_owned(),
            );
            assert_eq!(field(&whole, "content-type"), Some("application/octet-stream"));
            assert!(field(&whole, "content-disposition").unwrap().starts_with("attachment; "), "{whole}");
            for condition in [format!("If-None-Match: {tag}"), format!("If-Modified-Since: {date}")] {
                let same = get("/data.bin", &["-H", &condition]).await;
                assert!(same.starts_with("HTTP/1.1 304 ") && body(&same).is_empty(), "{same}");
                assert_eq!(field(&same, "etag"), Some(&*tag));
            }
            let part = get("/data.bin", &["-H", "Range: bytes=3-5"]).await;
            assert!(part.starts_with("HTTP/1.1 206 ") && body(&part) == "345", "{part}");
            assert_eq!(field(&part, "content-range"), Some("bytes 3-5/10"));
            let stale = get("/data.bin", &["-H", "Range: bytes=3-5", "-H", "If-Range: \"x\""]).await;
            assert!(stale.starts_with("HTTP/1.1 200 ") && body(&stale) == "0123456789", "{stale}");
            let outside = get("/data.bin", &["-H", "Range: bytes=10-"]).await;
            assert!(outside.starts_with("HTTP/1.1 416 "), "{outside}");
            assert_eq!(field(&outside, "content-range"), Some("bytes */10"));
            let head = get("/data.bin", &["-I"]).await;
            assert!(
                head.starts_with("HTTP/1.1 200 ") && field(&head, "content-length") == Some("10"),
                "{head}"
            );
            assert!(body(&head).is_empty());

            let redirect = get("/dir?x", &[]).await;
            let location = format!(
                "{}/files/dir/?x",
                place.split_once(&port.to_string()).unwrap().1.trim_end_matches("/files")
            );
            assert_eq!(field(&redirect, "location"), Some(&*location), "{redirect}");
            let root = get("/", &["-H", "Accept: text/html"]).await;
            assert!(body(&root).contains("<a href=\"a%20b.html\">a b.html</a>"), "{root}");
        }
        let url = format!("http://localhost:{port}{base}/{}/files/data.bin", world.project);
        assert!(curl(&["-i", &url]).await.contains("cocalc-code: unauthenticated"));
    }
    assert_eq!(*world.wake.calls.lock().unwrap(), 0, "nothing was woken");
}

#[tokio::test(flavor = "multi_thread")]
async fn paths_and_what_tenants_plant_lead_nowhere() {
    let world = World::new().await;
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("secret"), "secret").unwrap();
    std::fs::create_dir(world.path("dir")).unwrap();
    world.write("dir/file", "file");
    symlink(outside.path(), world.path("out")).unwrap();
    symlink(outside.path().join("secret"), world.path("link")).unwrap();
    symlink("dir", world.path("inner")).unwrap();
    let made = std::process::Command::new("sh")
        .args(["-c", "mkfifo pipe && mknod null c 1 3 && mknod disk b 7 0"])
        .current_dir(world.home.dir.path())
        .status()
        .unwrap();
    assert!(made.success(), "this test makes device nodes and needs root");
    let socket = std::os::unix::net::UnixListener::bind(world.path("socket")).unwrap();
    for (place, expected) in [
        ("/dir/file", "200"),
        ("/dir/file/", "404 not_found"),
        ("/dir/%2e%2e/dir/file", "404 not_found"),
        ("/dir/../dir/file", "404 not_found"),
        ("/..%2f..%2fetc/passwd", "404 not_found"),
        ("/dir%2ffile", "404 not_found"),
        ("/dir//file", "404 not_found"),
        ("//etc/passwd", "404 not_found"),
        ("/dir/file%00", "404 not_found"),
        ("/dir/%zz", "404 not_found"),
        ("/none", "404 not_found"),
        ("/link", "403 link_refused"),
        ("/out/secret", "403 link_refused"),
        ("/inner/file", "403 link_refused"),
        ("/pipe", "403 not_a_file"),
        ("/null", "403 not_a_file"),
        ("/disk", "403 not_a_file"),
        ("/socket", "403 not_a_file"),
    ] {
        assert_eq!(world.outcome("GET", place, &[]).await, expected, "GET {place}");
    }
    drop(socket);
    for (place, expected) in [
        ("/link", "403 link_refused"),
        ("/out/new", "403 link_refused"),
        ("/inner/new", "403 link_refused"),
        ("/pipe", "403 not_a_file"),
        ("/dir", "409 is_directory"),
        ("/dir/", "409 is_directory"),
        ("/", "409 is_directory"),
        ("/none/new", "409 no_parent"),
        ("/dir/file/new", "409 no_parent"),
        ("/dir/../x", "404 not_found"),
    ] {
        assert_eq!(world.outcome("PUT", place, &["-d", "x"]).await, expected, "PUT {place}");
    }
    assert_eq!(std::fs::read(outside.path().join("secret")).unwrap(), b"secret");
    assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 1);
    for (place, expected) in [
        ("/out/secret", "403 link_refused"),
        ("/", "405 method_not_allowed"),
        ("/dir/", "409 not_empty"),
        ("/none", "404 not_found"),
        ("/link/", "404 not_found"),
        ("/link", "204"),
        ("/pipe", "204"),
        ("/dir/file", "204"),
        ("/dir", "204"),
    ] {
        assert_eq!(world.outcome("DELETE", place, &[]).await, expected, "DELETE {place}");
    }
    assert!(outside.path().join("secret").exists(), "the link is gone, not what it said");
    assert_eq!(world.outcome("POST", "/x", &["-d", "x"]).await, "405 method_not_allowed");
    assert_eq!(world.outcome("OPTIONS", "/x", &[]).await, "204");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_who_swaps_a_folder_for_a_link_gains_nothing() {
    let world = World::new().await;
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("file"), "secret").unwrap();
    std::fs::create_dir(world.path("a")).unwrap();
    world.write("a/file", "mine");
    let root = world.home.dir.path().to_owned();
    let target = outside.path().to_owned();
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stopped = stop.clone();
    let swapping = std::thread::spawn(move || {
        while !stopped.load(Ordering::Relaxed) {
            std::fs::rename(root.join("a"), root.join("b")).unwrap();
            symlink(&target, root.join("a")).unwrap();
            std::fs::remove_file(root.join("a")).unwrap();
            std::fs::rename(root.join("b"), root.join("a")).unwrap();
        }
    });
    for round in 0..25 {
        let read = world.ask("GET", "/a/file", &[]).await;
        assert!(!read.contains("secret"), "{read}");
        world.ask("PUT", "/a/file", &["-d", "mine"]).await;
        world.ask("PUT", &format!("/a/new{round}"), &["-d", "mine"]).await;
        world.ask("DELETE", "/a/file", &[]).await;
    }
    stop.store(true, Ordering::Relaxed);
    swapping.join().unwrap();
    assert_eq!(std::fs::read(outside.path().join("file")).unwrap(), b"secret");
    assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_are_whole_conditional_and_the_tenants() {
    let world = World::new().await;
    let root = world.home.dir.path();
    // As root, so that what is written is seen to be somebody else's.
    std::os::unix::fs::chown(root, Some(1000), Some(1001)).unwrap();
    let created = world.ask("PUT", "/new.txt", &["-d", "one"]).await;
    assert!(created.starts_with("HTTP/1.1 201 "), "{created}");
    let tag = field(&created, "etag").unwrap().to_owned();
    let read = world.ask("GET", "/new.txt", &[]).await;
    assert_eq!((field(&read, "etag"), body(&read)), (Some(&*tag), "one"));
    let about = |name: &str| {
        let stat = std::fs::metadata(root.join(name)).unwrap();
        (stat.uid(), stat.gid(), stat.mode() & 0o7777)
    };
    assert_eq!(about("new.txt"), (1000, 1001, 0o644));

    std::fs::set_permissions(root.join("new.txt"), std::fs::Permissions::from_mode(0o4750)).unwrap();
    let (matching, other) = (format!("If-Match: {tag}"), "If-Match: \"other\"");
    assert_eq!(
        world.outcome("PUT", "/new.txt", &["-d", "x", "-H", &matching]).await,
        "412 precondition_failed",
        "its mode was changed"
    );
    let tag = field(&world.ask("HEAD", "/new.txt", &[]).await, "etag").unwrap().to_owned();
    let matching = format!("If-Match: {tag}");
    for (more, expected) in [
        (vec!["-H", other], "412 precondition_failed"),
        (vec!["-H", "If-None-Match: *"], "412 precondition_failed"),
        (vec!["-H", "Content-Range: bytes 0-0/3"], "400 range_refused"),
        (vec!["-H", &matching], "204"),
        (vec!["-H", &matching], "412 precondition_failed"),
        (vec!["-H", "Transfer-Encoding: chunked"], "204"),
    ] {
        let outcome = world.outcome("PUT", "/new.txt", &[&["-d", "two"], &more[..]].concat()).await;
        assert_eq!(outcome, expected, "{more:?}");
    }
    assert_eq!(std::fs::read(root.join("new.txt")).unwrap(), b"two");
    assert_eq!(about("new.txt"), (1000, 1001, 0o750), "without the bit that lends rights");
    assert_eq!(world.outcome("PUT", "/only", &["-d", "1", "-H", "If-None-Match: *"]).await, "201");
    assert_eq!(
        world.outcome("PUT", "/none", &["-d", "1", "-H", "If-Match: *"]).await,
        "412 precondition_failed"
    );
    assert_eq!(world.outcome("PUT", "/empty", &["-d", ""]).await, "201");

    assert_eq!(world.outcome("MKCOL", "/folder/", &[]).await, "201");
    assert_eq!(about("folder"), (1000, 1001, 0o755));
    assert_eq!(world.outcome("MKCOL", "/folder", &[]).await, "405 exists");
    assert_eq!(world.outcome("MKCOL", "/a/b", &[]).await, "409 no_parent");
    assert_eq!(world.outcome("MKCOL", "/c", &["-d", "x"]).await, "415 body_refused");
    assert_eq!(world.outcome("PUT", "/folder/%ff%0a", &["-d", "odd"]).await, "201");
    assert_eq!(std::fs::read(root.join("folder").join(OsStr::from_bytes(b"\xff\n"))).unwrap(), b"odd");
    assert_eq!(world.outcome("DELETE", "/only", &["-H", other]).await, "412 precondition_failed");

    world.auth.viewers.store(true, Ordering::Relaxed);
    for method in ["PUT", "DELETE", "MKCOL"] {
        assert_eq!(world.outcome(method, "/new.txt", &[]).await, "403 access_denied", "{method}");
    }
    assert_eq!(world.outcome("GET", "/new.txt", &[]).await, "200");
    world.auth.viewers.store(false, Ordering::Relaxed);
    world.home.thawed.store(false, Ordering::Relaxed);
    assert_eq!(world.outcome("PUT", "/new.txt", &["-d", "lost"]).await, "503 project_busy");
    assert_eq!(std::fs::read(root.join("new.txt")).unwrap(), b"two");
    let names: Vec<_> = std::fs::read_dir(root).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(names.iter().all(|name| !name.as_bytes().starts_with(b".cocalc-")), "{names:?}");
}

/// Sends the head of a request, and the beginning of its body.
pub(crate) async fn begin(world: &World, head: &str, part: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(world.host_address).await.unwrap();
    let (method, rest) = head.split_once(' ').unwrap();
    let head = format!(
        "{method} /{}/files{rest}\r\nHost: localhost\r\nAuthorization: Bearer {}\r\n\r\n",
        world.project,
        world.token()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(part).await.unwrap();
    stream
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_is_cut_stalls_or_is_revoked_changes_nothing() {
    let world = World::new().await;
    world.write("f", "old");
    let head = "PUT /f HTTP/1.1\r\nContent-Length: 1000000";
    let part = vec![b'n'; 600_000];
    drop(begin(&world, head, &part).await);
    let mut stalled = begin(&world, head, &part).await;
    let mut answer = Vec::new();
    let _ = timeout(DEADLINE, stalled.read_to_end(&mut answer)).await.unwrap();
    assert_eq!(outcomes(&answer), [(408, "request_timeout".to_owned())]);
    let mut revoked = begin(&world, head, &part).await;
    eventually("the upload is registered", || world.auth.admitted() >= 1).await;
    world.auth.revoke();
    let mut answer = Vec::new();
    let _ = timeout(DEADLINE, revoked.read_to_end(&mut answer)).await.unwrap();
    assert_eq!(outcomes(&answer), [(403, "access_denied".to_owned())]);
    assert_eq!(std::fs::read(world.path("f")).unwrap(), b"old");
    assert_eq!(std::fs::read_dir(world.home.dir.path()).unwrap().count(), 1);
}

/// A file system that is full, over the project's files, until it is dropped.
struct Full(PathBuf);

impl Full {
    fn over(path: PathBuf) -> Self {
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=2m", "tmpfs"])
            .arg(&path)
            .status()
            .unwrap();
        assert!(mounted.success(), "this test mounts a file system and needs root");
        Self(path)
    }
}

impl Drop for Full {
    fn drop(&mut self) {
        // Lazily: a request that is being answered may still hold it.
        let _ = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_does_not_fit_is_told_so_while_it_is_still_sent() {
    let world = World::new().await;
    let _full = Full::over(world.home.dir.path().to_owned());
    let sources = tempfile::tempdir().unwrap();
    let large = sources.path().join("large");
    std::fs::write(&large, vec![b'x'; 30 << 20]).unwrap();
    world.write("f", "old");
    for (address, base, _) in world.ways() {
        let url = format!("http://localhost:{}{base}/{}/files", address.port(), world.project);
        let bearer = format!("Authorization: Bearer {}", world.token());
        for (place, more, status, code) in [
            ("f", "Accept: */*", 507, "no_space"),
            ("new", "Accept: */*", 507, "no_space"),
            ("f", "If-None-Match: *", 412, "precondition_failed"),
        ] {
            // With and without asking before the content is sent.
            for expect in ["Expect: 100-continue", "Expect:"] {
                let answer = curl(&[
                    "-i",
                    "-T",
                    large.to_str().unwrap(),
                    "-H",
                    &bearer,
                    "-H",
                    more,
                    "-H",
                    expect,
                    &format!("{url}/{place}"),
                ])
                .await;
                let said = outcomes(answer.as_bytes()).pop();
                assert_eq!(said, Some((status, code.to_owned())), "{place} {more} {expect}: {answer}");
            }
        }
        assert_eq!(std::fs::read(world.path("f")).unwrap(), b"old");
        assert_eq!(std::fs::read_dir(world.home.dir.path()).unwrap().count(), 1);
        assert_eq!(world.outcome("PUT", "/small", &["-d", "fits"]).await, "201", "nothing is left of them");
        assert_eq!(world.outcome("DELETE", "/small", &[]).await, "204");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_change_while_they_are_read_break_nothing_else() {
    let world = World::new().await;
    // More than the sockets between hold.
    let length: u64 = 64 << 20;
    for (grows, name) in [(true, "grows"), (false, "shrinks")] {
        world.write(name, "");
        let file = std::fs::OpenOptions::new().write(true).open(world.path(name)).unwrap();
        file.set_len(length).unwrap();
        let mut stream = begin(&world, &format!("GET /{name} HTTP/1.1\r\nConnection: close"), b"").await;
        stream.read_u8().await.unwrap();
        file.set_len(if grows { length * 2 } else { 1 << 20 }).unwrap();
        let mut buffer = vec![0; 1 << 20];
        let mut total = 1;
        while let Ok(read @ 1..) = timeout(DEADLINE, stream.read(&mut buffer)).await.unwrap() {
            total += read as u64;
        }
        if grows {
            assert!((length..length + 2000).contains(&total), "{total}");
        } else {
            assert!(total < length, "what is missing is not made up");
        }
    }
    world.auth.revoke();
}

#[tokio::test(flavor = "multi_thread")]
async fn revocation_ends_a_download() {
    let world = World::new().await;
    world.write("big", "");
    std::fs::OpenOptions::new().write(true).open(world.path("big")).unwrap().set_len(1 << 30).unwrap();
    let mut stream = begin(&world, "GET /big HTTP/1.1", b"").await;
    stream.read_u8().await.unwrap();
    eventually("the download is registered", || world.auth.admitted() >= 1).await;
    world.auth.revoke();
    let mut total = 0;
    let mut buffer = vec![0; 1 << 20];
    while let Ok(read @ 1..) = timeout(DEADLINE, stream.read(&mut buffer)).await.unwrap() {
        total += read;
    }
    assert!(total < 1 << 30, "it went on");
}

#[tokio::test(flavor = "multi_thread")]
async fn directories_are_listed_in_pages() {
    let world = World::new().await;
    for index in 0..1_205 {
        world.write(&format!("f{index:05}"), "");
    }
    std::fs::write(world.home.dir.path().join(OsStr::from_bytes(b"\xfe<x>&\"")), "abc").unwrap();
    symlink("/etc/passwd", world.path("zlink")).unwrap();
    let mut names = Vec::new();
    let mut question = String::from("?max=100000");
    let mut pages = 0;
    loop {
        let answer = world.ask("GET", &format!("/{question}"), &[]).await;
        let listing: serde_json::Value = serde_json::from_str(body(&answer)).unwrap();
        let entries = listing["entries"].as_array().unwrap();
        assert!(entries.len() <= 1_000);
        names.extend(entries.iter().map(|entry| entry["href"].as_str().unwrap().to_owned()));
        pages += 1;
        match listing["next"].as_str() {
            Some(next) => question = next.to_owned(),
            None => break,
        }
    }
    assert_eq!((names.len(), pages), (1_207, 2));
    assert!(names.is_sorted_by_key(|name| name.starts_with('%')), "in the order of their bytes");
    let odd = names.last().unwrap();
    assert_eq!(odd, "%FE%3Cx%3E%26%22");
    assert_eq!(body(&world.ask("GET", &format!("/{odd}"), &[]).await), "abc");
    let page = world.ask("GET", "/?max=2&after=f01203", &["-H", "Accept: text/html"]).await;
    assert!(page.contains("href=\"f01204\"") && page.contains("zlink (a link)"), "{page}");
    assert!(page.contains("href=\"?after=zlink&amp;max=2\""), "{page}");
    let page = world.ask("GET", "/?after=zlink", &["-H", "Accept: text/html"]).await;
    assert!(page.contains("\u{fffd}&lt;x&gt;&amp;&quot;") && !page.contains("<x>"), "{page}");
    assert_eq!(world.outcome("GET", "/?max=x", &[]).await, "400 bad_query");
    assert_eq!(world.outcome("GET", "/?archive=rar", &[]).await, "400 bad_query");
}
