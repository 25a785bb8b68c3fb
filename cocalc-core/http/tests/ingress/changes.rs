//! Folders that are deleted with all that is in them, and what is moved.

use std::{
    os::unix::fs::symlink,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::{files::field, support::*};

fn names(directory: &std::path::Path) -> Vec<String> {
    let names = std::fs::read_dir(directory).unwrap();
    let mut names: Vec<_> = names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_goes_with_all_that_is_in_it_only_if_that_is_said() {
    let world = World::new().await;
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("secret"), "secret").unwrap();
    let plant = || {
        std::fs::create_dir_all(world.path("dir/a/b")).unwrap();
        world.write("dir/a/b/file", "x");
        symlink(outside.path(), world.path("dir/a/out")).unwrap();
    };
    plant();
    world.write("file", "x");
    symlink(outside.path(), world.path("out")).unwrap();
    let etag = || async {
        let listing = world.ask("GET", "/?format=json", &[]).await;
        let listing: serde_json::Value = serde_json::from_str(crate::files::body(&listing)).unwrap();
        let entries = listing["entries"].as_array().unwrap();
        let entry = entries.iter().find(|entry| entry["name"] == "dir").unwrap();
        format!("If-Match: {}", entry["etag"].as_str().unwrap())
    };
    let before = etag().await;
    world.write("dir/new", "x");
    for (place, more, expected) in [
        ("/dir", vec![], "409 not_empty"),
        ("/dir/?recursive=false", vec![], "409 not_empty"),
        ("/dir/?recursive=yes", vec![], "400 bad_query"),
        ("/dir/?recursive=true", vec!["-H", &before], "412 precondition_failed"),
        ("/dir/?recursive=true", vec!["-H", "If-Match: \"x\""], "412 precondition_failed"),
        ("/?recursive=true", vec![], "405 method_not_allowed"),
        ("/none/?recursive=true", vec![], "404 not_found"),
        ("/file/?recursive=true", vec![], "404 not_found"),
        ("/out/secret?recursive=true", vec![], "403 link_refused"),
    ] {
        assert_eq!(world.outcome("DELETE", place, &more).await, expected, "DELETE {place} {more:?}");
    }
    assert_eq!(names(&world.path("dir")), ["a", "new"]);
    world.auth.viewers.store(true, Ordering::Relaxed);
    assert_eq!(world.outcome("DELETE", "/dir/?recursive=true", &[]).await, "403 access_denied");
    world.auth.viewers.store(false, Ordering::Relaxed);
    let now = etag().await;
    assert_eq!(world.outcome("DELETE", "/dir/?recursive=true", &["-H", &now]).await, "204");
    assert_eq!(world.outcome("DELETE", "/dir/?recursive=true", &[]).await, "404 not_found");
    assert_eq!(world.outcome("DELETE", "/file?recursive=true", &[]).await, "204");
    assert_eq!(world.outcome("DELETE", "/out?recursive", &[]).await, "204");
    for (address, base, _) in world.ways() {
        plant();
        let url =
            format!("http://localhost:{}{base}/{}/files/dir?recursive=true", address.port(), world.project);
        let bearer = format!("Authorization: Bearer {}", world.token());
        let answer = curl(&["-i", "-X", "DELETE", "-H", &bearer, &url]).await;
        assert!(answer.starts_with("HTTP/1.1 204 "), "{answer}");
        assert_eq!(names(world.home.dir.path()), [""; 0]);
    }
    assert_eq!(names(outside.path()), ["secret"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_tenant_puts_in_the_way_of_a_removal_leads_out_of_nothing() {
    let world = World::new().await;
    let outside = tempfile::tempdir().unwrap();
    std::fs::create_dir(outside.path().join("sub")).unwrap();
    std::fs::write(outside.path().join("sub/file"), "secret").unwrap();
    let (root, target) = (world.home.dir.path().to_owned(), outside.path().to_owned());
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    // Swaps a folder in the one that is removed for a link, again and again, and
    // makes it anew.
    let swapping = std::thread::spawn(move || {
        while !stopped.load(Ordering::Relaxed) {
            let _ = std::fs::create_dir_all(root.join("dir/a/sub"));
            let _ = std::fs::write(root.join("dir/a/sub/file"), "mine");
            let _ = std::fs::rename(root.join("dir/a"), root.join("dir/b"));
            let _ = symlink(&target, root.join("dir/a"));
            let _ = std::fs::remove_file(root.join("dir/a"));
            let _ = std::fs::rename(root.join("dir/b"), root.join("dir/a"));
        }
    });
    for _ in 0..25 {
        let outcome = world.outcome("DELETE", "/dir?recursive=true", &["--max-time", "60"]).await;
        let known = ["204", "404 not_found", "403 link_refused", "503 unfinished"];
        assert!(known.contains(&&*outcome), "{outcome}");
        let to = format!("Destination: /{}/files/dir/a/moved", world.project);
        world.write("new", "mine");
        world.ask("MOVE", "/new", &["-H", &to]).await;
    }
    stop.store(true, Ordering::Relaxed);
    swapping.join().unwrap();
    assert_eq!(names(outside.path()), ["sub"]);
    assert_eq!(std::fs::read(outside.path().join("sub/file")).unwrap(), b"secret");
}

#[tokio::test(flavor = "multi_thread")]
async fn files_and_folders_are_moved_by_addresses_of_either_way() {
    let world = World::new().await;
    for (address, base, name) in world.ways() {
        let port = address.port();
        let bearer = format!("Authorization: Bearer {}", world.token());
        for (place, path) in [
            (format!("http://localhost:{port}"), format!("{base}/{}/files", world.project)),
            (format!("http://{}.{name}.localhost:{port}", world.project), "/files".to_owned()),
        ] {
            std::fs::create_dir_all(world.path("a/b")).unwrap();
            std::fs::create_dir_all(world.path("c")).unwrap();
            world.write("a/b/file", "x");
            for (from, to) in [
                ("/a/b/", format!("{path}/c/d%20%23")),
                ("/c/d%20%23/file", format!("{place}{path}/c/file")),
                ("/c/file", format!("{}{path}/file", place.to_uppercase().replace("HTTP", "http"))),
            ] {
                let to = format!("Destination: {to}");
                let url = format!("{place}{path}{from}");
                let answer = curl(&["-i", "-X", "MOVE", "-H", &bearer, "-H", &to, &url]).await;
                assert!(answer.starts_with("HTTP/1.1 201 "), "{url} {to}: {answer}");
                assert!(field(&answer, "etag").is_some(), "{answer}");
            }
            assert_eq!(names(&world.path("c/d #")), [""; 0]);
            assert_eq!(std::fs::read(world.path("file")).unwrap(), b"x");
            for folder in ["a", "c"] {
                std::fs::remove_dir_all(world.path(folder)).unwrap();
            }
            std::fs::remove_file(world.path("file")).unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_move_replaces_files_only_and_goes_nowhere_else() {
    let world = World::new().await;
    let outside = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(world.path("dir/sub")).unwrap();
    std::fs::create_dir(world.path("empty")).unwrap();
    world.write("one", "1");
    world.write("two", "2");
    symlink(outside.path(), world.path("out")).unwrap();
    symlink("two", world.path("link")).unwrap();
    let own = format!("/{}/files", world.project);
    let other = format!("/{}/files/x", cocalc_core::ids::ProjectId::random());
    let to = |place: &str| format!("Destination: {own}{place}");
    let tag = |answer: String| format!("If-Match: {}", field(&answer, "etag").unwrap());
    let (before, over) = (tag(world.ask("HEAD", "/one", &[]).await), "Overwrite: F");
    for (from, headers, expected) in [
        ("/one", vec![], "400 bad_destination"),
        ("/one", vec![to("/x"), to("/y")], "400 bad_destination"),
        ("/one", vec![format!("Destination: {other}")], "400 bad_destination"),
        ("/one", vec![format!("Destination: http://elsewhere.example{own}/x")], "400 bad_destination"),
        ("/one", vec![format!("Destination: http://localhost{own}/x")], "400 bad_destination"),
        ("/one", vec![format!("Destination: ftp://localhost{own}/x")], "400 bad_destination"),
        ("/one", vec!["Destination: /etc/x".to_owned()], "400 bad_destination"),
        ("/one", vec![to("/../x")], "400 bad_destination"),
        ("/one", vec![to("/a%2fb")], "400 bad_destination"),
        ("/one", vec![to("/x?y")], "400 bad_destination"),
        ("/one", vec![to("x")], "400 bad_destination"),
        ("/one", vec![to("/x"), "Overwrite: maybe".to_owned()], "400 bad_destination"),
        ("/one", vec![to("/x"), "If-Match: \"x\"".to_owned()], "412 precondition_failed"),
        ("/none", vec![to("/x")], "404 not_found"),
        ("/one/", vec![to("/x")], "404 not_found"),
        ("/", vec![to("/x")], "405 method_not_allowed"),
        ("/out/x", vec![to("/x")], "403 link_refused"),
        ("/one", vec![to("/out/x")], "403 link_refused"),
        ("/one", vec![to("/link")], "403 link_refused"),
        ("/one", vec![to("/none/x")], "409 no_parent"),
        ("/one", vec![to("/two/x")], "409 no_parent"),
        ("/one", vec![to("/")], "409 is_directory"),
        ("/one", vec![to("/x/")], "409 is_directory"),
        ("/one", vec![to("/empty")], "409 is_directory"),
        ("/dir", vec![to("/empty")], "409 is_directory"),
        ("/dir", vec![to("/one")], "409 exists"),
        ("/dir", vec![to("/dir/sub/x")], "409 into_itself"),
        ("/dir", vec![to("/dir/")], "409 into_itself"),
        ("/one", vec![to("/one")], "409 into_itself"),
        ("/one", vec![to("/two"), over.to_owned()], "412 precondition_failed"),
        ("/one", vec![to("/new"), over.to_owned(), before], "201"),
        ("/new", vec![to("/two")], "204"),
        ("/link", vec![to("/dir/link")], "201"),
        ("/out", vec![to("/dir/out")], "201"),
    ] {
        let more: Vec<&str> = headers.iter().flat_map(|header| ["-H", header]).collect();
        assert_eq!(world.outcome("MOVE", from, &more).await, expected, "MOVE {from} {headers:?}");
    }
    assert_eq!(std::fs::read(world.path("two")).unwrap(), b"1");
    assert_eq!(std::fs::read_link(world.path("dir/link")).unwrap(), std::path::Path::new("two"));
    assert_eq!(names(outside.path()), [""; 0]);
    std::fs::hard_link(world.path("two"), world.path("three")).unwrap();
    assert_eq!(world.outcome("MOVE", "/two", &["-H", &to("/three")]).await, "204");
    assert_eq!(names(world.home.dir.path()), ["dir", "empty", "three"]);
    for (header, expected) in [("If-Match: *", "412 precondition_failed"), ("If-None-Match: *", "201")] {
        assert_eq!(world.outcome("MKCOL", "/made", &["-H", header]).await, expected, "{header}");
    }
    world.auth.viewers.store(true, Ordering::Relaxed);
    assert_eq!(world.outcome("MOVE", "/three", &["-H", &to("/x")]).await, "403 access_denied");
    world.auth.viewers.store(false, Ordering::Relaxed);
    world.home.thawed.store(false, Ordering::Relaxed);
    assert_eq!(world.outcome("MOVE", "/three", &["-H", &to("/x")]).await, "503 project_busy");
    assert_eq!(names(world.home.dir.path()), ["dir", "empty", "made", "three"]);
}
