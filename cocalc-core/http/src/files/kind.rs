//! What kind of content a file's name promises.

/// Content types by extension. What is not here is bytes, and saved rather than
/// shown; nothing is guessed from content, which the tenant chooses.
const KINDS: [(&str, &str); 44] = [
    ("avif", "image/avif"),
    ("bmp", "image/bmp"),
    ("c", "text/plain; charset=utf-8"),
    ("conf", "text/plain; charset=utf-8"),
    ("css", "text/css; charset=utf-8"),
    ("csv", "text/csv; charset=utf-8"),
    ("flac", "audio/flac"),
    ("gif", "image/gif"),
    ("h", "text/plain; charset=utf-8"),
    ("htm", "text/html; charset=utf-8"),
    ("html", "text/html; charset=utf-8"),
    ("ico", "image/vnd.microsoft.icon"),
    ("ipynb", "application/json"),
    ("jpeg", "image/jpeg"),
    ("jpg", "image/jpeg"),
    ("js", "text/javascript; charset=utf-8"),
    ("json", "application/json"),
    ("jl", "text/plain; charset=utf-8"),
    ("log", "text/plain; charset=utf-8"),
    ("m4a", "audio/mp4"),
    ("md", "text/markdown; charset=utf-8"),
    ("mjs", "text/javascript; charset=utf-8"),
    ("mp3", "audio/mpeg"),
    ("mp4", "video/mp4"),
    ("ogg", "audio/ogg"),
    ("opus", "audio/ogg"),
    ("pdf", "application/pdf"),
    ("png", "image/png"),
    ("py", "text/plain; charset=utf-8"),
    ("r", "text/plain; charset=utf-8"),
    ("rs", "text/plain; charset=utf-8"),
    ("sh", "text/plain; charset=utf-8"),
    ("svg", "image/svg+xml"),
    ("tex", "text/plain; charset=utf-8"),
    ("toml", "text/plain; charset=utf-8"),
    ("tsv", "text/tab-separated-values; charset=utf-8"),
    ("txt", "text/plain; charset=utf-8"),
    ("wasm", "application/wasm"),
    ("wav", "audio/wav"),
    ("webm", "video/webm"),
    ("webp", "image/webp"),
    ("xml", "application/xml"),
    ("yaml", "text/plain; charset=utf-8"),
    ("yml", "text/plain; charset=utf-8"),
];

const BYTES: &str = "application/octet-stream";

const COMPRESSED: [&str; 36] = [
    "7z", "aac", "apk", "avif", "br", "bz2", "deb", "docx", "epub", "flac", "gif", "gz", "jar", "jpeg",
    "jpg", "lz4", "m4a", "mkv", "mov", "mp3", "mp4", "npz", "ods", "odt", "ogg", "opus", "png", "pptx",
    "rar", "tgz", "webm", "webp", "whl", "xlsx", "xz", "zip",
];

/// The content type of a file of this name.
pub(crate) fn of(name: &[u8]) -> &'static str {
    let Some(dot) = name.iter().rposition(|b| *b == b'.').filter(|dot| *dot > 0) else { return BYTES };
    let extension = name[dot + 1..].to_ascii_lowercase();
    let known = KINDS.iter().find(|(known, _)| known.as_bytes() == extension);
    known.map_or(BYTES, |(_, kind)| kind)
}

/// Whether a file of this name is as good as sure to be compressed already, so
/// that doing it again costs time and gains nothing.
pub(crate) fn is_compressed(name: &[u8]) -> bool {
    let Some(dot) = name.iter().rposition(|b| *b == b'.') else { return false };
    let extension = name.get(dot + 1..).unwrap_or_default().to_ascii_lowercase();
    COMPRESSED.iter().any(|known| known.as_bytes() == extension)
}

/// Whether a browser shows it, rather than saves it.
pub(crate) fn is_shown(kind: &str) -> bool {
    kind != BYTES && kind != "application/wasm"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_known_is_shown() {
        for (name, kind) in [
            (&b"a.PNG"[..], "image/png"),
            (b"x.tar.gz", BYTES),
            (b"html", BYTES),
            (b".html", BYTES),
            (b"a.html.", BYTES),
            (b"\xff.html", "text/html; charset=utf-8"),
        ] {
            assert_eq!(of(name), kind, "{name:?}");
        }
        assert!(is_compressed(b"a.tar.GZ") && !is_compressed(b"gz") && !is_compressed(b"a.csv"));
        assert!(!is_shown(BYTES) && is_shown("text/html; charset=utf-8"));
    }
}
