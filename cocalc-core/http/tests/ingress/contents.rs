//! What comes with a file: which bytes, under what name, and what it may do.

use std::{
    os::unix::{ffi::OsStrExt, fs::FileExt},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use crate::{
    files::{body, field},
    support::*,
};

/// RFC 9110, 13 and 14: what is asked, and what comes of a file of ten bytes.
#[tokio::test(flavor = "multi_thread")]
async fn the_bytes_that_are_asked_for_come_by_either_way() {
    let world = World::new().await;
    world.write("ten.bin", "0123456789");
    world.write("none.bin", "");
    let seen = world.ask("HEAD", "/ten.bin", &[]).await;
    let (tag, date) = (field(&seen, "etag").unwrap(), field(&seen, "last-modified").unwrap());
    assert!(tag.starts_with('"'), "a strong tag: {tag}");
    let weak = format!("If-Range: W/{tag}");
    let (same_tag, same_date) = (format!("If-Range: {tag}"), format!("If-Range: {date}"));
    let (if_match, if_none) = (format!("If-Match: {tag}"), format!("If-None-Match: {tag}"));
    let several = format!("If-None-Match: \"x\", {tag}");
    let since = format!("If-Modified-Since: {date}");
    let until = format!("If-Unmodified-Since: {date}");
    let old = "If-Unmodified-Since: Sat, 01 Jan 2000 00:00:00 GMT";
    // Method, fields, status, Content-Range, what comes.
    let whole = "0123456789";
    let cases: Vec<(&str, Vec<&str>, u16, Option<&str>, &str)> = vec![
        ("GET", vec![], 200, None, whole),
        ("GET", vec!["Range: bytes=0-0"], 206, Some("bytes 0-0/10"), "0"),
        ("GET", vec!["Range: bytes=0-"], 206, Some("bytes 0-9/10"), whole),
        ("GET", vec!["Range: bytes=8-20"], 206, Some("bytes 8-9/10"), "89"),
        ("GET", vec!["Range: bytes=-3"], 206, Some("bytes 7-9/10"), "789"),
        ("GET", vec!["Range: bytes=-99"], 206, Some("bytes 0-9/10"), whole),
        ("GET", vec!["Range: bytes=10-"], 416, Some("bytes */10"), ""),
        ("GET", vec!["Range: bytes=-0"], 416, Some("bytes */10"), ""),
        ("GET", vec!["Range: bytes=99999999999999999999-"], 416, Some("bytes */10"), ""),
        // What need not be understood is no range: all of it comes.
        ("GET", vec!["Range: bytes=5-4"], 200, None, whole),
        ("GET", vec!["Range: lines=0-1"], 200, None, whole),
        ("GET", vec!["Range: bytes=a-b"], 200, None, whole),
        ("GET", vec!["Range: bytes"], 200, None, whole),
        // Several ranges, also those that would multiply the work.
        ("GET", vec!["Range: bytes=0-1,4-5"], 200, None, whole),
        ("GET", vec!["Range: bytes=0-,0-,0-,0-,0-,0-,0-,0-,0-,0-,0-,0-"], 200, None, whole),
        // A part of the file that one has already begun with, if it is that.
        ("GET", vec!["Range: bytes=4-5", &same_tag], 206, Some("bytes 4-5/10"), "45"),
        ("GET", vec!["Range: bytes=4-5", &same_date], 206, Some("bytes 4-5/10"), "45"),
        ("GET", vec!["Range: bytes=4-5", &weak], 200, None, whole),
        ("GET", vec!["Range: bytes=4-5", "If-Range: \"x\""], 200, None, whole),
        ("GET", vec!["Range: bytes=4-5", "If-Range: Sat, 01 Jan 2000 00:00:00 GMT"], 200, None, whole),
        ("GET", vec!["Range: bytes=99-", "If-Range: \"x\""], 200, None, whole),
        // Conditions come before ranges.
        ("GET", vec!["Range: bytes=4-5", &if_none], 304, None, ""),
        ("GET", vec!["Range: bytes=99-", "If-Match: \"x\""], 412, None, ""),
        ("GET", vec![&several], 304, None, ""),
        ("GET", vec![&since], 304, None, ""),
        ("GET", vec![&since, "If-None-Match: \"x\""], 200, None, whole),
        ("GET", vec![&if_match], 200, None, whole),
        ("GET", vec!["If-Match: *"], 200, None, whole),
        ("GET", vec!["If-Match: \"x\""], 412, None, ""),
        ("GET", vec![&until], 200, None, whole),
        ("GET", vec![old], 412, None, ""),
        ("HEAD", vec![], 200, None, ""),
        ("HEAD", vec!["Range: bytes=0-1"], 200, None, ""),
        ("HEAD", vec![&if_none], 304, None, ""),
    ];
    for (address, base, _) in world.ways() {
        let url = format!("http://localhost:{}{base}/{}/files", address.port(), world.project);
        let bearer = format!("Authorization: Bearer {}", world.token());
        let ask = async |method: &str, place: &str, fields: &[&str]| {
            let how: &[&str] = if method == "HEAD" { &["-I"] } else { &["-i"] };
            let fields: Vec<&str> = fields.iter().flat_map(|field| ["-H", field]).collect();
            curl(&[how, &["-H", &bearer], &fields[..], &[&format!("{url}{place}")]].concat()).await
        };
        for (method, fields, status, range, content) in &cases {
            let answer = ask(method, "/ten.bin", fields).await;
            let what = format!("{method} {fields:?}: {answer}");
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{status} {what}");
            assert_eq!(field(&answer, "content-range"), *range, "{what}");
            match status {
                200 | 206 => {
                    assert_eq!(body(&answer), *content, "{what}");
                    let length = if *method == "HEAD" { 10 } else { content.len() };
                    assert_eq!(field(&answer, "content-length"), Some(&*length.to_string()), "{what}");
                    assert_eq!(field(&answer, "accept-ranges"), Some("bytes"), "{what}");
                    assert_eq!(field(&answer, "etag"), Some(tag), "{what}");
                }
                304 => assert_eq!((field(&answer, "etag"), body(&answer)), (Some(tag), ""), "{what}"),
                412 => assert_eq!(field(&answer, "cocalc-code"), Some("precondition_failed"), "{what}"),
                _ => assert_eq!(field(&answer, "cocalc-code"), Some("range_not_satisfiable"), "{what}"),
            }
        }
        let nothing = ask("GET", "/none.bin", &["Range: bytes=0-"]).await;
        assert!(nothing.starts_with("HTTP/1.1 416 "), "{nothing}");
        let nothing = ask("GET", "/none.bin", &[]).await;
        assert!(nothing.starts_with("HTTP/1.1 200 ") && body(&nothing).is_empty(), "{nothing}");
    }
    // Another state, another tag, also if length and time are the same.
    let before = tag.to_owned();
    let file = std::fs::File::options().write(true).open(world.path("ten.bin")).unwrap();
    let modified = file.metadata().unwrap().modified().unwrap();
    file.write_all_at(b"x", 0).unwrap();
    file.set_modified(modified).unwrap();
    let after = world.ask("HEAD", "/ten.bin", &[]).await;
    assert_ne!(field(&after, "etag"), Some(&*before));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_is_saved_under_its_own_name_whatever_that_is() {
    let world = World::new().await;
    for (name, shown, disposition) in [
        (&b"plain.txt"[..], "plain.txt", "inline; filename=\"plain.txt\"; filename*=UTF-8''plain.txt"),
        (
            "ä €.txt".as_bytes(),
            "%C3%A4%20%E2%82%AC.txt",
            "inline; filename=\"_ _.txt\"; filename*=UTF-8''%C3%A4%20%E2%82%AC.txt",
        ),
        (
            b"a\"b;c\\.txt",
            "a%22b%3Bc%5C.txt",
            "inline; filename=\"a_b_c_.txt\"; filename*=UTF-8''a%22b%3Bc%5C.txt",
        ),
        (
            b"a\r\nSet-Cookie: x",
            "a%0D%0ASet-Cookie%3A%20x",
            "attachment; filename=\"a__Set-Cookie_ x\"; filename*=UTF-8''a%0D%0ASet-Cookie%3A%20x",
        ),
        (b"\xff.bin", "%FF.bin", "attachment; filename=\"_.bin\"; filename*=UTF-8''%EF%BF%BD.bin"),
        (b"page.html", "page.html", "inline; filename=\"page.html\"; filename*=UTF-8''page.html"),
        (
            b"program.wasm",
            "program.wasm",
            "attachment; filename=\"program.wasm\"; filename*=UTF-8''program.wasm",
        ),
    ] {
        std::fs::write(world.home.dir.path().join(std::ffi::OsStr::from_bytes(name)), "x").unwrap();
        let answer = world.ask("GET", &format!("/{shown}"), &[]).await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        assert_eq!(field(&answer, "content-disposition"), Some(disposition));
        assert_eq!(field(&answer, "set-cookie"), None, "{answer}");
        let saved = world.ask("GET", &format!("/{shown}?download=1"), &[]).await;
        assert!(field(&saved, "content-disposition").unwrap().starts_with("attachment; "), "{saved}");
    }
}

/// What a tenant may have written, on an origin that is others' as well.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_that_a_tenant_wrote_runs_or_is_guessed() {
    let world = World::new().await;
    let script = "<script>alert(1)</script>";
    for name in ["a.html", "a.svg", "a.pdf", "a.xml", "a.js", "a.bin", "a"] {
        world.write(name, script);
    }
    std::fs::create_dir(world.path("dir")).unwrap();
    world.write("dir/<script>alert(1)<%2fscript>", "x");
    for (place, more) in [
        ("/a.html", "Accept: */*"),
        ("/a.svg", "Accept: */*"),
        ("/a.pdf", "Accept: */*"),
        ("/a.xml", "Accept: */*"),
        ("/a.js", "Accept: */*"),
        ("/a.bin", "Accept: */*"),
        ("/a", "Accept: */*"),
        ("/dir/", "Accept: text/html"),
        ("/dir/", "Accept: application/json"),
        ("/dir/?archive=tar", "Accept: */*"),
        ("/dir/?archive=zip", "Accept: */*"),
    ] {
        let answer = world.ask("HEAD", place, &["-H", more]).await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{place} {more}: {answer}");
        assert_eq!(field(&answer, "x-content-type-options"), Some("nosniff"), "{place}: {answer}");
        let policy = field(&answer, "content-security-policy").unwrap();
        assert!(policy.starts_with("sandbox allow-downloads; default-src 'none'"), "{place}: {answer}");
        assert!(!policy.contains("allow-scripts") && !policy.contains("allow-same-origin"), "{policy}");
        assert_eq!(field(&answer, "referrer-policy"), Some("no-referrer"), "{place}: {answer}");
        assert_eq!(field(&answer, "cross-origin-resource-policy"), Some("same-origin"), "{place}: {answer}");
        assert!(answer.contains("\r\ncontent-security-policy: frame-ancestors "), "{place}: {answer}");
    }
    for (place, more) in
        [("/a.html", "Range: bytes=0-7"), ("/a.html", "Range: bytes=99-"), ("/none", "Accept: text/html")]
    {
        let answer = world.ask("GET", place, &["-H", more]).await;
        assert_eq!(field(&answer, "x-content-type-options"), Some("nosniff"), "{place} {more}: {answer}");
    }
    let page = world.ask("GET", "/dir/", &["-H", "Accept: text/html"]).await;
    assert!(!page.contains(script) && page.contains("&lt;script&gt;"), "{page}");
}

/// With `COCALC_FULL=1` ten gigabytes, and no more memory for them.
#[tokio::test(flavor = "multi_thread")]
async fn a_large_file_goes_up_and_comes_down_as_it_was() {
    let full = std::env::var_os("COCALC_FULL").is_some();
    if !full {
        println!("reduced: 200 MB instead of 10 GB, and memory is not looked at, without COCALC_FULL=1");
    }
    let length: u64 = if full { 10 << 30 } else { 200 << 20 };
    let world = World::with(cocalc_http::Limits { body_idle: Duration::from_secs(60), ..quick() }).await;
    let sources = tempfile::tempdir().unwrap();
    let source = sources.path().join("source");
    let file = std::fs::File::create(&source).unwrap();
    file.set_len(length).unwrap();
    for at in [0, length / 3, length - 8] {
        file.write_all_at(&at.to_be_bytes(), at).unwrap();
    }
    let (stop, most) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let (stopped, seen) = (Arc::clone(&stop), Arc::clone(&most));
    let watching = std::thread::spawn(move || {
        while !stopped.load(Ordering::Relaxed) {
            seen.fetch_max(resident(), Ordering::Relaxed);
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    let before = resident();
    for (address, base, _) in world.ways() {
        let url = format!("http://localhost:{}{base}/{}/files/large", address.port(), world.project);
        let bearer = format!("Authorization: Bearer {}", world.token());
        let line = "set -eo pipefail; curl -sSf --noproxy '*' -H \"$1\" -T \"$2\" \"$3\"; \
                    curl -sSf --noproxy '*' -H \"$1\" \"$3\" | cmp - \"$2\"";
        let done = tokio::process::Command::new("bash")
            .args(["-c", line, "bash", &bearer])
            .arg(&source)
            .arg(&url)
            .output()
            .await
            .unwrap();
        assert!(done.status.success(), "{done:?}");
        assert_eq!(std::fs::metadata(world.path("large")).unwrap().len(), length);
        std::fs::remove_file(world.path("large")).unwrap();
    }
    stop.store(true, Ordering::Relaxed);
    watching.join().unwrap();
    let grown = most.load(Ordering::Relaxed).saturating_sub(before);
    println!("memory grew by {} MB meanwhile, with all that ran beside", grown >> 20);
    if full {
        assert!(grown < 1 << 30, "{grown} bytes");
    }
}

/// The memory of this process, in bytes.
fn resident() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4096
}
