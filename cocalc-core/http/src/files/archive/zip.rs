//! As zip, for people whose system opens nothing else.

use std::{
    io::{self, Write},
    os::unix::ffi::OsStrExt,
    path::Path,
};

use flate2::{Compression, write::DeflateEncoder};
use rawzip::{
    CompressionMethod, Header, ZipArchiveWriter,
    extra_fields::ExtraFieldId,
    path::{EntryPath, ZipFilePath},
    time::UtcDateTime,
};
use rustix::fs::Stat;

use super::{Archive, body::Pieces, permissions};
use crate::files::kind;

/// How much of an archive's table of contents is held in memory, because it
/// comes last: enough for more than a hundred thousand files. A larger folder is
/// for tar.
const TABLE_BYTES_MAX: usize = 32 << 20;
/// What an entry takes of that beside its name.
const ENTRY_BYTES: usize = 192;
/// How much of a file is read at a time.
const READ_BYTES: usize = 64 * 1024;
/// "Info-ZIP Unicode Path" (APPNOTE.TXT, 4.6.9).
const UNICODE_PATH: ExtraFieldId = ExtraFieldId::new(0x7075);

const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_000;

/// An archive whose files are deflated, each followed by its length and
/// checksum, which nobody knows before.
pub(super) struct Zip {
    archive: ZipArchiveWriter<Pieces>,
    table_bytes: usize,
}

impl Zip {
    pub(super) fn new(pieces: Pieces) -> Self {
        Self { archive: ZipArchiveWriter::new(pieces), table_bytes: 0 }
    }

    fn write(
        &mut self,
        path: &Path,
        stat: &Stat,
        mode: u32,
        level: Compression,
        content: &mut dyn io::Read,
    ) -> io::Result<()> {
        let name = self.name(path, b"")?;
        let mut builder = self
            .archive
            .new_file(name.path)
            .compression_method(CompressionMethod::DEFLATE)
            .last_modified(modified(stat))
            .unix_permissions(mode);
        if let Some(unicode) = &name.unicode {
            builder = builder.extra_field(UNICODE_PATH, unicode, Header::default()).map_err(failed)?;
        }
        let (mut entry, config) = builder.start().map_err(failed)?;
        let mut data = config.wrap(DeflateEncoder::new(&mut entry, level));
        let mut buffer = vec![0; READ_BYTES];
        loop {
            match content.read(&mut buffer) {
                Ok(0) => break,
                Ok(read) => data.write_all(buffer.get(..read).unwrap_or_default())?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        let (encoder, end) = data.finish().map_err(failed)?;
        encoder.finish()?;
        entry.finish(end).map_err(failed)?;
        Ok(())
    }

    /// How an entry is called, if the table of contents has room for it.
    fn name<'a>(&mut self, path: &'a Path, end: &[u8]) -> io::Result<Name<'a>> {
        let name = Name::of(path.as_os_str().as_bytes(), end);
        let extra = name.unicode.as_ref().map_or(0, Vec::len);
        self.table_bytes += path.as_os_str().len() + extra + ENTRY_BYTES;
        if self.table_bytes > TABLE_BYTES_MAX {
            return Err(io::Error::other(
                "the folder has too many files for a zip archive; tar has no limit",
            ));
        }
        Ok(name)
    }
}

impl Archive for Zip {
    fn directory(&mut self, path: &Path, stat: &Stat) -> io::Result<()> {
        let name = self.name(path, b"/")?;
        let mut builder = self
            .archive
            .new_dir(name.path)
            .last_modified(modified(stat))
            .unix_permissions(DIRECTORY | permissions(stat));
        if let Some(unicode) = &name.unicode {
            builder = builder.extra_field(UNICODE_PATH, unicode, Header::default()).map_err(failed)?;
        }
        builder.create().map_err(failed)?;
        Ok(())
    }

    /// As Info-ZIP has it: a file of that kind, which contains where it leads.
    fn link(&mut self, path: &Path, stat: &Stat, mut target: &[u8]) -> io::Result<()> {
        self.write(path, stat, LINK | 0o777, Compression::none(), &mut target)
    }

    fn file(&mut self, path: &Path, stat: &Stat, content: &mut dyn io::Read) -> io::Result<()> {
        let name = path.file_name().unwrap_or_default().as_bytes();
        let level = if kind::is_compressed(name) { Compression::none() } else { Compression::fast() };
        self.write(path, stat, FILE | permissions(stat), level, content)
    }

    fn end(self) -> io::Result<Pieces> {
        self.archive.finish().map_err(failed)
    }
}

/// A path as an archive has it.
struct Name<'a> {
    path: EntryPath<'a>,
    /// The field that says what text the bytes of the path are.
    unicode: Option<Vec<u8>>,
}

impl<'a> Name<'a> {
    /// Every name keeps its bytes. Text says that it is UTF-8, in the way that
    /// most know where the library writes such names as they are, which it does
    /// not with some that only Linux knows (`12:30.log`). Of what is no text
    /// there is no way to say what it is.
    fn of(path: &[u8], end: &[u8]) -> Self {
        let path = [path, end].concat();
        let unicode = match std::str::from_utf8(&path) {
            Ok(text) if ZipFilePath::from_str(text).as_str() == text => {
                return Self { path: EntryPath::conformant(text.to_owned()), unicode: None };
            }
            Ok(text) if !text.is_ascii() => {
                let checksum = rawzip::crc32(&path).to_le_bytes();
                Some([&[1], &checksum[..], &path].concat())
            }
            _ => None,
        };
        Self { path: EntryPath::verbatim(path), unicode }
    }
}

fn modified(stat: &Stat) -> UtcDateTime {
    UtcDateTime::from_unix(stat.st_mtime)
}

fn failed(error: rawzip::Error) -> io::Error {
    match error.into_kind() {
        rawzip::ErrorKind::IO(error) => error,
        other => io::Error::other(format!("the archive cannot be written: {other:?}")),
    }
}

#[cfg(test)]
mod tests {
    use std::{path::PathBuf, time::Duration};

    use tokio::{runtime::Handle, sync::mpsc, task::spawn_blocking};

    use super::*;

    /// What is written by `write`, and how that ended.
    async fn archive(
        write: impl FnOnce(&mut Zip) -> io::Result<()> + Send + 'static,
    ) -> (tempfile::NamedTempFile, io::Result<()>) {
        let (sender, mut pieces) = mpsc::channel(4);
        let runtime = Handle::current();
        let writing = spawn_blocking(move || {
            let mut zip = Zip::new(Pieces::new(sender, runtime, Duration::from_secs(60)));
            write(&mut zip)?;
            zip.end()?.finish()
        });
        let mut all = tempfile::NamedTempFile::new().unwrap();
        while let Some(piece) = pieces.recv().await {
            all.write_all(&piece.unwrap()).unwrap();
        }
        (all, writing.await.unwrap())
    }

    fn python(archive: &tempfile::NamedTempFile, program: &str) -> String {
        let done =
            std::process::Command::new("python3").args(["-c", program]).arg(archive.path()).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        String::from_utf8(done.stdout).unwrap()
    }

    #[tokio::test]
    async fn an_archive_has_more_entries_than_the_first_zip_could_count() {
        let stat = rustix::fs::stat(".").unwrap();
        let (file, ended) = archive(move |zip| {
            (0..70_000).try_for_each(|number| zip.directory(Path::new(&format!("d/{number}")), &stat))
        })
        .await;
        ended.unwrap();
        let counted = python(
            &file,
            "import sys, zipfile; n = zipfile.ZipFile(sys.argv[1]).namelist(); print(len(n), n[-1])",
        );
        assert_eq!(counted, "70000 d/69999/\n");
    }

    #[tokio::test]
    async fn the_table_of_contents_has_a_limit() {
        let stat = rustix::fs::stat(".").unwrap();
        let long: PathBuf = std::iter::repeat_n("x".repeat(250), 40).collect();
        let (file, ended) = archive(move |zip| (0..).try_for_each(|_| zip.directory(&long, &stat))).await;
        assert!(ended.unwrap_err().to_string().contains("too many files"));
        assert!(file.as_file().metadata().unwrap().len() > (TABLE_BYTES_MAX / 2) as u64);
    }

    /// With `COCALC_FULL=1` only: to deflate so much takes a minute.
    #[tokio::test]
    async fn a_file_is_larger_than_the_first_zip_could_say() {
        if std::env::var_os("COCALC_FULL").is_none() {
            println!("reduced: 20 MB instead of more than 4 GB, without COCALC_FULL=1");
        }
        let full = std::env::var_os("COCALC_FULL").is_some();
        let length: u64 = if full { (4 << 30) + 5 } else { 20 << 20 };
        let mut stat = rustix::fs::stat(".").unwrap();
        stat.st_size = i64::try_from(length).unwrap();
        let (file, ended) = archive(move |zip| {
            // Twice, so that something begins behind what 32 bits can say.
            for name in ["d/a.gz", "d/b"] {
                zip.file(Path::new(name), &stat, &mut io::Read::take(io::repeat(7), length))?;
            }
            Ok(())
        })
        .await;
        ended.unwrap();
        let said = python(
            &file,
            "import sys, zipfile\na = zipfile.ZipFile(sys.argv[1])\nassert a.testzip() is None\n\
             print([i.file_size for i in a.infolist()])",
        );
        assert_eq!(said, format!("[{length}, {length}]\n"));
    }
}
