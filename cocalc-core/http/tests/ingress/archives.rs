//! Folders as archives, which other programs open.

use std::{
    ffi::OsStr,
    os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, PermissionsExt, symlink},
    },
    path::Path,
    process::{Command, Output},
};

use tokio::{io::AsyncReadExt, time::timeout};

use crate::{files::begin, support::*};

fn unpack(archive: &Path) -> tempfile::TempDir {
    let to = tempfile::tempdir().unwrap();
    let done = Command::new("tar").arg("-xf").arg(archive).arg("-C").arg(to.path()).output();
    let done = done.unwrap();
    assert!(done.status.success(), "{done:?}");
    to
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_is_downloaded_as_tar() {
    let world = World::new().await;
    let deep = format!("dir/{}/{}", "d".repeat(120), "e".repeat(120));
    std::fs::create_dir_all(world.path(&deep)).unwrap();
    world.write(&format!("{deep}/file"), "deep");
    world.write("dir/run.sh", vec![b'x'; 300_000]);
    std::fs::set_permissions(world.path("dir/run.sh"), std::fs::Permissions::from_mode(0o4755)).unwrap();
    std::fs::write(world.path("dir").join(OsStr::from_bytes(b"\xff")), "odd").unwrap();
    symlink("/etc/passwd", world.path("dir/link")).unwrap();
    let pipe = Command::new("mkfifo").arg(world.path("dir/pipe")).status().unwrap();
    assert!(pipe.success());
    let out = tempfile::tempdir().unwrap();
    let archive = out.path().join("a.tar");
    for (address, base, _) in world.ways() {
        let url =
            format!("http://localhost:{}{base}/{}/files/dir/?archive=tar", address.port(), world.project);
        let bearer = format!("Authorization: Bearer {}", world.token());
        let head = curl(&["-D", "-", "-o", archive.to_str().unwrap(), "-H", &bearer, &url]).await;
        assert!(head.contains("content-disposition: attachment; filename=\"dir.tar\""), "{head}");
        let unpacked = unpack(&archive);
        let root = unpacked.path();
        assert_eq!(std::fs::read(root.join(&deep).join("file")).unwrap(), b"deep");
        assert_eq!(std::fs::read(root.join("dir/run.sh")).unwrap().len(), 300_000);
        assert_eq!(std::fs::metadata(root.join("dir/run.sh")).unwrap().mode() & 0o7777, 0o755);
        assert_eq!(std::fs::read(root.join("dir").join(OsStr::from_bytes(b"\xff"))).unwrap(), b"odd");
        assert_eq!(std::fs::read_link(root.join("dir/link")).unwrap(), Path::new("/etc/passwd"));
        assert!(!root.join("dir/pipe").exists());
    }
}

/// What Python makes of a zip archive: it checks every checksum, and says of each
/// entry its name in hexadecimal digits, type and permissions, and length.
fn entries(archive: &Path) -> Vec<String> {
    let program = r#"
import sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as archive:
    assert archive.testzip() is None
    for entry in archive.infolist():
        utf8 = entry.flag_bits & 0x800 or any(entry.filename.encode("utf-8") in field for field in [entry.extra])
        name = entry.filename.encode("utf-8" if utf8 else "cp437")
        print(name.hex(), oct(entry.external_attr >> 16), entry.file_size, archive.read(entry)[:20].hex())
"#;
    let Output { status, stdout, stderr } =
        Command::new("python3").args(["-c", program]).arg(archive).output().unwrap();
    assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
    String::from_utf8(stdout).unwrap().lines().map(str::to_owned).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_is_downloaded_as_zip_with_every_name_it_has() {
    let world = World::new().await;
    let names: [&[u8]; 6] =
        [b"plain.txt", b"12:30\\x.log", "ä.txt".as_bytes(), "ä:ö.txt".as_bytes(), b"\xff\xfe", b"a..b~"];
    std::fs::create_dir_all(world.path("dir/empty")).unwrap();
    std::fs::set_permissions(world.path("dir/empty"), std::fs::Permissions::from_mode(0o1700)).unwrap();
    for name in names {
        std::fs::write(world.path("dir").join(OsStr::from_bytes(name)), name).unwrap();
    }
    world.write("dir/none", "");
    world.write("dir/run.sh", vec![b'x'; 300_000]);
    std::fs::set_permissions(world.path("dir/run.sh"), std::fs::Permissions::from_mode(0o4755)).unwrap();
    world.write("dir/old", "old");
    let old = std::fs::File::options().write(true).open(world.path("dir/old")).unwrap();
    // Before zip knows any time.
    old.set_modified(std::time::UNIX_EPOCH).unwrap();
    symlink("../../etc/passwd", world.path("dir/link")).unwrap();
    let special = Command::new("sh")
        .args(["-c", "mkfifo pipe && mknod null c 1 3"])
        .current_dir(world.path("dir"))
        .status()
        .unwrap();
    assert!(special.success(), "this test makes device nodes and needs root");
    let mut expected = vec![
        format!("{} 0o40755 0 ", hex(b"dir/")),
        format!("{} 0o40700 0 ", hex(b"dir/empty/")),
        format!("{} 0o100644 0 ", hex(b"dir/none")),
        format!("{} 0o100755 300000 {}", hex(b"dir/run.sh"), hex(&[b'x'; 20])),
        format!("{} 0o100644 3 {}", hex(b"dir/old"), hex(b"old")),
        format!("{} 0o120777 16 {}", hex(b"dir/link"), hex(b"../../etc/passwd")),
    ];
    expected.extend(
        names
            .iter()
            .map(|name| format!("{} 0o100644 {} {}", hex(&[b"dir/", *name].concat()), name.len(), hex(name))),
    );
    expected.sort();
    let out = tempfile::tempdir().unwrap();
    let archive = out.path().join("a.zip");
    for (address, base, _) in world.ways() {
        let url =
            format!("http://localhost:{}{base}/{}/files/dir/?archive=zip", address.port(), world.project);
        let bearer = format!("Authorization: Bearer {}", world.token());
        let head = curl(&["-D", "-", "-o", archive.to_str().unwrap(), "-H", &bearer, &url]).await;
        assert!(head.contains("content-type: application/zip\r\n"), "{head}");
        assert!(head.contains("content-disposition: attachment; filename=\"dir.zip\""), "{head}");
        let mut found = entries(&archive);
        found.sort();
        assert_eq!(found, expected);
    }
    let head = world.ask("HEAD", "/dir/?archive=zip", &[]).await;
    assert!(head.starts_with("HTTP/1.1 200 ") && head.contains("application/zip"), "{head}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archive_of_files_that_change_meanwhile_is_whole_and_as_long_as_it_said() {
    let world = World::with(cocalc_http::Limits { body_idle: DEADLINE, ..quick() }).await;
    // More than the sockets between hold, of a kind that is not compressed again.
    let length: u64 = 48 << 20;
    for format in ["tar", "zip"] {
        for (grows, name) in [(true, "grows.gz"), (false, "shrinks.gz")] {
            let _ = std::fs::remove_dir_all(world.path("dir"));
            std::fs::create_dir(world.path("dir")).unwrap();
            world.write(&format!("dir/{name}"), "");
            let file = std::fs::File::options().write(true).open(world.path("dir").join(name)).unwrap();
            file.set_len(length).unwrap();
            // Names that are read, and are not there when it is their turn.
            world.write("dir/vanishes", "x");
            let request = format!("GET /dir/?archive={format} HTTP/1.1\r\nConnection: close");
            let mut stream = begin(&world, &request, b"").await;
            // So much that it is in the middle of the file.
            let mut answer = vec![0; 1 << 20];
            timeout(DEADLINE, stream.read_exact(&mut answer)).await.unwrap().unwrap();
            file.set_len(if grows { length * 2 } else { 1 << 20 }).unwrap();
            std::fs::remove_file(world.path("dir/vanishes")).unwrap();
            timeout(DEADLINE * 3, stream.read_to_end(&mut answer)).await.unwrap().unwrap();
            let out = tempfile::tempdir().unwrap();
            let archive = out.path().join("archive");
            std::fs::write(&archive, unchunked(&answer)).unwrap();
            if format == "zip" {
                let found = entries(&archive);
                let lengths: Vec<_> = found.iter().filter_map(|entry| entry.split(' ').nth(2)).collect();
                assert_eq!(lengths, ["0", &length.to_string()], "{found:?}");
            } else {
                let unpacked = unpack(&archive);
                let file = std::fs::metadata(unpacked.path().join("dir").join(name)).unwrap();
                assert_eq!(file.len(), length);
                assert!(!unpacked.path().join("dir/vanishes").exists());
            }
        }
    }
}

/// The content of an answer that came in chunks, to the last of them.
fn unchunked(answer: &[u8]) -> Vec<u8> {
    let mut rest = &answer[answer.windows(4).position(|end| end == b"\r\n\r\n").unwrap() + 4..];
    let mut content = Vec::new();
    loop {
        let end = rest.windows(2).position(|end| end == b"\r\n").unwrap();
        let length = usize::from_str_radix(std::str::from_utf8(&rest[..end]).unwrap(), 16).unwrap();
        if length == 0 {
            return content;
        }
        content.extend_from_slice(&rest[end + 2..end + 2 + length]);
        rest = &rest[end + 2 + length + 2..];
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archive_that_cannot_have_everything_breaks_off() {
    let world = World::new().await;
    std::fs::create_dir_all(world.path(&format!("n/{}", "x/".repeat(150)))).unwrap();
    for format in ["tar", "zip"] {
        let port = world.host_address.port();
        let url = format!("http://localhost:{port}/{}/files/n/?archive={format}", world.project);
        let bearer = format!("Authorization: Bearer {}", world.token());
        let run = tokio::process::Command::new("curl")
            .args(["-s", "--max-time", "30", "-o", "/dev/null", "-H", &bearer, &url])
            .status();
        let status = timeout(DEADLINE * 4, run).await.unwrap().unwrap();
        // Cut in the middle, at once, or by a reset; but curl knows it.
        assert!(matches!(status.code(), Some(18 | 52 | 56)), "a {format} looks like the whole: {status}");
    }
}
