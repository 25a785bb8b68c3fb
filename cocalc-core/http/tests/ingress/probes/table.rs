//! The probes: what is sent, what comes back, what an app gets, and why.

/// One row.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Probe {
    pub(crate) name: &'static str,
    /// Where the rule comes from.
    pub(crate) source: &'static str,
    /// What is sent. `{p}` is the app's path, `{id}` the project, `{a}` a good
    /// credential, `{h}` that and a `Host`, `{c}` `Connection: close`, `{s}` a
    /// request to `/smuggled`, `{w}` the fields of a WebSocket.
    pub(crate) bytes: &'static str,
    /// The statuses of what comes back, with our codes. Where hyper itself
    /// refuses, there is none.
    pub(crate) answers: &'static [(u16, &'static str)],
    /// The requests that an app gets, whole: method, target, bytes of the body.
    pub(crate) forwarded: &'static [(&'static str, &'static str, usize)],
}

const fn refused(name: &'static str, source: &'static str, bytes: &'static str) -> Probe {
    Probe { name, source, bytes, answers: &[(400, "bad_request")], forwarded: &[] }
}

/// Refused with another status.
const fn answered(
    name: &'static str,
    source: &'static str,
    bytes: &'static str,
    answers: &'static [(u16, &'static str)],
) -> Probe {
    Probe { name, source, bytes, answers, forwarded: &[] }
}

const fn passed(
    name: &'static str,
    source: &'static str,
    bytes: &'static str,
    forwarded: &'static [(&'static str, &'static str, usize)],
) -> Probe {
    Probe { name, source, bytes, answers: &[(200, "")], forwarded }
}

/// What is malformed after a head that was good, or is not HTTP at all: it ends in
/// some error, or without an answer, and no app gets it whole.
const fn broken(name: &'static str, source: &'static str, bytes: &'static str) -> Probe {
    Probe { name, source, bytes, answers: &[], forwarded: &[] }
}

const CL_TE: &str = "RFC 9112, 6.1; hyper #4123";
const LENGTH: &str = "RFC 9112, 6.3; RFC 9110, 8.6";
const CODING: &str = "RFC 9112, 6.1";
const CHUNK: &str = "RFC 9112, 7.1";
const FIELD: &str = "RFC 9112, 5.1";
const FOLD: &str = "RFC 9112, 5.2";
const LINES: &str = "RFC 9112, 2.2";
const VALUE: &str = "RFC 9110, 5.5";
const HOST: &str = "RFC 9112, 3.2";
const TARGET: &str = "RFC 9112, 3.2.2";
const LINE: &str = "RFC 9112, 3";
const PREFIX: &str = "notes: path confusion; CVE-2021-41773";
const PORT: &str = "CVE-2025-47269";
const SPOOF: &str = "CVE-2025-48865, CVE-2025-64484";
const UPGRADE: &str = "RFC 6455, 4.2.1; RUSTSEC-2026-0033";
const SIZE: &str = "RFC 9112, 3 and 5; RFC 6585, 5";

pub(crate) const PROBES: &[Probe] = &[
    // What is fine.
    passed("plain", LINE, "GET {p}/x HTTP/1.1\r\n{h}{c}\r\n", &[("GET", "/x", 0)]),
    passed("HTTP/1.0 with a host", LINE, "GET {p}/x HTTP/1.0\r\n{h}\r\n", &[("GET", "/x", 0)]),
    passed("empty line first", LINES, "\r\nGET {p}/x HTTP/1.1\r\n{h}{c}\r\n", &[("GET", "/x", 0)]),
    passed("absolute form", TARGET, "GET http://localhost{p}/x HTTP/1.1\r\n{h}{c}\r\n", &[("GET", "/x", 0)]),
    passed(
        "length",
        LENGTH,
        "POST {p}/x HTTP/1.1\r\n{h}{c}Content-Length: 5\r\n\r\nhello",
        &[("POST", "/x", 5)],
    ),
    passed(
        "length with zeros",
        LENGTH,
        "POST {p}/x HTTP/1.1\r\n{h}{c}Content-Length: 005\r\n\r\nhello",
        &[("POST", "/x", 5)],
    ),
    passed(
        "chunked",
        CHUNK,
        "POST {p}/x HTTP/1.1\r\n{h}{c}Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        &[("POST", "/x", 3)],
    ),
    passed(
        "chunked in capitals",
        CODING,
        "POST {p}/x HTTP/1.1\r\n{h}{c}TRANSFER-ENCODING: CHUNKED\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        &[("POST", "/x", 3)],
    ),
    passed(
        "chunked GET",
        "RFC 9110, 9.3.1",
        "GET {p}/x HTTP/1.1\r\n{h}{c}Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        &[("GET", "/x", 3)],
    ),
    passed(
        "chunk sizes with zeros, extensions and trailers",
        "RFC 9112, 7.1.1 and 7.1.2",
        "POST {p}/x HTTP/1.1\r\n{h}{c}Transfer-Encoding: chunked\r\n\r\n00A;a=b;c\r\n0123456789\r\n0;x\r\nContent-Length: 9\r\nX: y\r\n\r\n",
        &[("POST", "/x", 10)],
    ),
    Probe {
        name: "two at once",
        source: "RFC 9112, 9.3.2",
        bytes: "POST {p}/1 HTTP/1.1\r\n{h}Content-Length: 5\r\n\r\nhelloGET {p}/2 HTTP/1.1\r\n{h}{c}\r\n",
        answers: &[(200, ""), (200, "")],
        forwarded: &[("POST", "/1", 5), ("GET", "/2", 0)],
    },
    Probe {
        name: "a bad one after a good one",
        source: CL_TE,
        bytes: "POST {p}/1 HTTP/1.1\r\n{h}Content-Length: 5\r\n\r\nhelloPOST {p}/2 HTTP/1.1\r\n{h}Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n{s}",
        answers: &[(200, ""), (400, "bad_request")],
        forwarded: &[("POST", "/1", 5)],
    },
    passed(
        "unknown expectation",
        "RFC 9110, 10.1.1",
        "GET {p}/x HTTP/1.1\r\n{h}{c}Expect: wonders\r\n\r\n",
        &[("GET", "/x", 0)],
    ),
    // Where a body ends.
    refused(
        "length, then coding",
        CL_TE,
        "POST {p}/x HTTP/1.1\r\n{h}{c}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{s}",
    ),
    refused(
        "coding, then length",
        CL_TE,
        "POST {p}/x HTTP/1.1\r\n{h}{c}Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n{s}",
    ),
    refused(
        "two lengths",
        LENGTH,
        "POST {p}/x HTTP/1.1\r\n{h}{c}Content-Length: 0\r\nContent-Length: 44\r\n\r\n{s}",
    ),
    refused(
        "equal lengths",
        LENGTH,
        "POST {p}/x HTTP/1.1\r\n{h}{c}Content-Length: 1\r\nContent-Length: 1\r\n\r\nx",
    ),
    refused("signed length", LENGTH, "POST {p}/x HTTP/1.1\r\n{h}{c}Content-Length: +5\r\n\r\nhello{s}"),
    refused("negative length", LENGTH, "POST {p}/x HTTP/1.1\r\n{h}{c}Content-Length: -5\r\n\r\nhello{s}"),
    refused("list of lengths", LENGTH, "POST {p}/x HTTP/1.1\r\n{h}{c}Content-Length: 5, 5\r\n\r\nhello{s}"),
    refused("hexadecimal length", LENGTH, "POST {p}/x HTTP/1.1\r\n{h}{c}Content-Length: 0x5\r\n\r\nhello{s}"),
    refused("empty length", LENGTH, "POST {p}/x HTTP/1.1\r\n{h}{c}Content-Length:\r\n\r\n{s}"),
    refused(
        "length in two words",
        LENGTH,
        "POST {p}/x HTTP/1.1\r\n{h}{c}Content-Length: 5 5\r\n\r\nhello{s}",
    ),
    refused(
        "length beyond 64 bits",
        LENGTH,
        "POST {p}/x HTTP/1.1\r\n{h}{c}Content-Length: 18446744073709551621\r\n\r\nhello{s}",
    ),
    refused(
        "coding list",
        CODING,
        "POST {p}/x HTTP/1.1\r\n{h}{c}Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n{s}",
    ),
    refused(
        "chunked not last",
        CODING,
        "POST {p}/x HTTP/1.1\r\n{h}{c}Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n{s}",
    ),
    refused(
        "unknown coding",
        CODING,
        "POST {p}/x HTTP/1.1\r\n{h}{c}Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n{s}",
    ),
    refused(
        "identity",
        CODING,
        "POST {p}/x HTTP/1.1\r\n{h}{c}Transfer-Encoding: identity\r\nContent-Length: 5\r\n\r\nhello{s}",
    ),
    refused(
        "coding twice",
        CODING,
        "POST {p}/x HTTP/1.1\r\n{h}{c}Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{s}",
    ),
    refused(
        "coding in quotes",
        CODING,
        "POST {p}/x HTTP/1.1\r\n{h}{c}Transfer-Encoding: \"chunked\"\r\n\r\n0\r\n\r\n{s}",
    ),
    refused(
        "vertical tab before the coding",
        VALUE,
        "POST {p}/x HTTP/1.1\r\n{h}{c}Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n{s}",
    ),
    refused(
        "coding with HTTP/1.0",
        CODING,
        "POST {p}/x HTTP/1.0\r\n{h}Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n{s}",
    ),
    refused(
        "coding on a folded line",
        FOLD,
        "POST {p}/x HTTP/1.1\r\n{h}{c}Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n{s}",
    ),
    refused(
        "space before the colon",
        FIELD,
        "POST {p}/x HTTP/1.1\r\n{h}{c}Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n{s}",
    ),
    refused(
        "tab before the colon",
        FIELD,
        "POST {p}/x HTTP/1.1\r\n{h}{c}Transfer-Encoding\t: chunked\r\n\r\n0\r\n\r\n{s}",
    ),
    refused(
        "imitated coding",
        SPOOF,
        "POST {p}/x HTTP/1.1\r\n{h}{c}Transfer_Encoding: chunked\r\nContent-Length: 5\r\n\r\nhello",
    ),
    refused("imitated length", SPOOF, "POST {p}/x HTTP/1.1\r\n{h}{c}Content_Length: 5\r\n\r\n"),
    refused(
        "length to be removed",
        "RFC 9110, 7.6.1",
        "POST {p}/x HTTP/1.1\r\n{h}Connection: close, Content-Length\r\nContent-Length: 5\r\n\r\nhello",
    ),
    // Chunks.
    broken(
        "chunk size of letters",
        CHUNK,
        "POST {p}/x HTTP/1.1\r\n{h}{c}Transfer-Encoding: chunked\r\n\r\nxyz\r\nabc\r\n0\r\n\r\n{s}",
    ),
    broken(
        "chunk size with a prefix",
        CHUNK,
        "POST {p}/x HTTP/1.1\r\n{h}{c}Transfer-Encoding: chunked\r\n\r\n0x3\r\nabc\r\n0\r\n\r\n{s}",
    ),
    broken(
        "signed chunk size",
        CHUNK,
        "POST {p}/x HTTP/1.1\r\n{h}{c}Transfer-Encoding: chunked\r\n\r\n+3\r\nabc\r\n0\r\n\r\n{s}",
    ),
    broken(
        "space after the chunk size",
        CHUNK,
        "POST {p}/x HTTP/1.1\r\n{h}{c}Transfer-Encoding: chunked\r\n\r\n3 \r\nabc\r\n0\r\n\r\n{s}",
    ),
    broken(
        "empty chunk size",
        CHUNK,
        "POST {p}/x HTTP/1.1\r\n{h}{c}Transfer-Encoding: chunked\r\n\r\n\r\nabc\r\n0\r\n\r\n{s}",
    ),
    broken(
        "chunk size beyond 64 bits",
        CHUNK,
        "POST {p}/x HTTP/1.1\r\n{h}{c}Transfer-Encoding: chunked\r\n\r\n10000000000000003\r\nabc\r\n0\r\n\r\n{s}",
    ),
    broken(
        "line feed ends the chunk size",
        "RFC 9112, 7.1; CVE-2025-22871",
        "POST {p}/x HTTP/1.1\r\n{h}{c}Transfer-Encoding: chunked\r\n\r\n3\nabc\r\n0\r\n\r\n{s}",
    ),
    broken(
        "line feed in a chunk extension",
        "RFC 9112, 7.1.1; CVE-2025-22871",
        "POST {p}/x HTTP/1.1\r\n{h}{c}Transfer-Encoding: chunked\r\n\r\n3;\nabc\r\n0\r\n\r\n{s}",
    ),
    broken(
        "carriage return in a chunk extension",
        "RFC 9112, 7.1.1",
        "POST {p}/x HTTP/1.1\r\n{h}{c}Transfer-Encoding: chunked\r\n\r\n3;a\rb\r\nabc\r\n0\r\n\r\n{s}",
    ),
    broken(
        "chunk longer than it says",
        CHUNK,
        "POST {p}/x HTTP/1.1\r\n{h}{c}Transfer-Encoding: chunked\r\n\r\n3\r\nabcdef\r\n0\r\n\r\n{s}",
    ),
    broken(
        "line feed after a chunk",
        CHUNK,
        "POST {p}/x HTTP/1.1\r\n{h}{c}Transfer-Encoding: chunked\r\n\r\n3\r\nabc\n0\r\n\r\n{s}",
    ),
    broken(
        "line feed ends the body",
        CHUNK,
        "POST {p}/x HTTP/1.1\r\n{h}{c}Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\n{s}",
    ),
    // Lines and fields.
    refused("folded field", FOLD, "GET {p}/x HTTP/1.1\r\n{h}{c}X-A: b\r\n c\r\n\r\n"),
    refused("folded first field", LINES, "GET {p}/x HTTP/1.1\r\n X-A: b\r\n{h}{c}\r\n"),
    refused("line feed ends a field", LINES, "GET {p}/x HTTP/1.1\r\n{h}{c}X-A: b\nX-B: c\r\n\r\n"),
    refused("line feed ends the request line", LINES, "GET {p}/x HTTP/1.1\n{h}{c}\r\n"),
    refused("line feed ends the head", LINES, "GET {p}/x HTTP/1.1\r\n{h}{c}\n"),
    refused("line feed first", LINES, "\nGET {p}/x HTTP/1.1\r\n{h}{c}\r\n"),
    refused("NUL in a field", VALUE, "GET {p}/x HTTP/1.1\r\n{h}{c}X-A: b\0c\r\n\r\n"),
    refused("carriage return in a field", VALUE, "GET {p}/x HTTP/1.1\r\n{h}{c}X-A: b\rc\r\n\r\n"),
    refused("control byte in a field", VALUE, "GET {p}/x HTTP/1.1\r\n{h}{c}X-A: b\x01c\r\n\r\n"),
    refused("space in a name", FIELD, "GET {p}/x HTTP/1.1\r\n{h}{c}X A: b\r\n\r\n"),
    refused("parenthesis in a name", FIELD, "GET {p}/x HTTP/1.1\r\n{h}{c}X(A: b\r\n\r\n"),
    refused("no name", FIELD, "GET {p}/x HTTP/1.1\r\n{h}{c}: b\r\n\r\n"),
    refused("no colon", FIELD, "GET {p}/x HTTP/1.1\r\n{h}{c}X-A\r\n\r\n"),
    answered("many fields", SIZE, "{many}", &[(431, "")]),
    answered("one giant field", SIZE, "{giant}", &[(431, "")]),
    // The request line.
    refused("two spaces", LINE, "GET  {p}/x HTTP/1.1\r\n{h}{c}\r\n"),
    refused("a tab for a space", LINE, "GET\t{p}/x HTTP/1.1\r\n{h}{c}\r\n"),
    refused("words after the version", LINE, "GET {p}/x HTTP/1.1 x\r\n{h}{c}\r\n"),
    refused("space in the target", LINE, "GET {p}/x y HTTP/1.1\r\n{h}{c}\r\n"),
    refused("HTTP/0.9", "RFC 9112, 2.3", "GET {p}/x\r\n\r\n"),
    refused("HTTP/1.2", "RFC 9110, 2.5", "GET {p}/x HTTP/1.2\r\n{h}{c}\r\n"),
    broken("HTTP/2 without TLS", "RFC 9113, 3.3", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    answered(
        "CONNECT",
        "RFC 9110, 9.3.6; notes: CONNECT refused",
        "CONNECT localhost:22 HTTP/1.1\r\n{h}{c}\r\n",
        &[(405, "method_not_allowed")],
    ),
    answered("asterisk", "RFC 9112, 3.2.4", "OPTIONS * HTTP/1.1\r\n{h}{c}\r\n", &[(404, "not_found")]),
    // Who is asked.
    refused("two hosts", HOST, "GET {p}/x HTTP/1.1\r\n{h}{c}Host: evil.example\r\n\r\n"),
    refused("the same host twice", HOST, "GET {p}/x HTTP/1.1\r\n{h}{c}Host: localhost\r\n\r\n"),
    refused("no host", HOST, "GET {p}/x HTTP/1.1\r\n{a}{c}\r\n"),
    refused("no host with HTTP/1.0", "notes: Host in exact served set", "GET {p}/x HTTP/1.0\r\n{a}\r\n"),
    refused("empty host", HOST, "GET {p}/x HTTP/1.1\r\nHost: \r\n{a}{c}\r\n"),
    refused("user in the host", HOST, "GET {p}/x HTTP/1.1\r\nHost: localhost@evil.example\r\n{a}{c}\r\n"),
    refused("path in the host", HOST, "GET {p}/x HTTP/1.1\r\nHost: localhost/evil\r\n{a}{c}\r\n"),
    refused("list of hosts", HOST, "GET {p}/x HTTP/1.1\r\nHost: localhost, evil.example\r\n{a}{c}\r\n"),
    answered(
        "unknown host",
        "notes: DNS rebinding",
        "GET {p}/x HTTP/1.1\r\nHost: evil.example\r\n{a}{c}\r\n",
        &[(421, "unknown_host")],
    ),
    refused("another authority", TARGET, "GET http://evil.example{p}/x HTTP/1.1\r\n{h}{c}\r\n"),
    refused("user in the authority", TARGET, "GET http://evil@localhost{p}/x HTTP/1.1\r\n{h}{c}\r\n"),
    refused("another scheme", TARGET, "GET ftp://localhost{p}/x HTTP/1.1\r\n{h}{c}\r\n"),
    // Which project and port.
    answered(
        "encoded slash before the project",
        PREFIX,
        "GET /x%2f..{p}/x HTTP/1.1\r\n{h}{c}\r\n",
        &[(404, "not_found")],
    ),
    answered(
        "dot segment before the project",
        PREFIX,
        "GET /x/..{p}/x HTTP/1.1\r\n{h}{c}\r\n",
        &[(404, "not_found")],
    ),
    answered(
        "encoded dot segment before the project",
        PREFIX,
        "GET /%2e%2e{p}/x HTTP/1.1\r\n{h}{c}\r\n",
        &[(404, "not_found")],
    ),
    answered("double slash", PREFIX, "GET /{p}/x HTTP/1.1\r\n{h}{c}\r\n", &[(404, "not_found")]),
    answered("backslash", PREFIX, "GET /\\{p}/x HTTP/1.1\r\n{h}{c}\r\n", &[(404, "not_found")]),
    answered(
        "parameter of the project",
        PREFIX,
        "GET {b}/{id};x/proxy/80/x HTTP/1.1\r\n{h}{c}\r\n",
        &[(404, "not_found")],
    ),
    answered(
        "project in capitals",
        PREFIX,
        "GET {b}/{ID}/proxy/80/x HTTP/1.1\r\n{h}{c}\r\n",
        &[(404, "not_found")],
    ),
    answered(
        "project that is too long",
        PREFIX,
        "GET {b}/{id}0/proxy/80/x HTTP/1.1\r\n{h}{c}\r\n",
        &[(404, "not_found")],
    ),
    answered(
        "dot segment to another project",
        PREFIX,
        "GET {b}/{id}/../00000000-0000-4000-8000-000000000000/proxy/80/x HTTP/1.1\r\n{h}{c}\r\n",
        &[(404, "not_found")],
    ),
    answered(
        "port with a host",
        PORT,
        "GET {b}/{id}/proxy/80@evil.example/x HTTP/1.1\r\n{h}{c}\r\n",
        &[(404, "not_found")],
    ),
    answered(
        "port with a zero",
        PORT,
        "GET {b}/{id}/proxy/080/x HTTP/1.1\r\n{h}{c}\r\n",
        &[(404, "not_found")],
    ),
    answered("port 0", PORT, "GET {b}/{id}/proxy/0/x HTTP/1.1\r\n{h}{c}\r\n", &[(404, "not_found")]),
    answered("port 65536", PORT, "GET {b}/{id}/proxy/65536/x HTTP/1.1\r\n{h}{c}\r\n", &[(404, "not_found")]),
    passed(
        "the rest is the app's, to the byte",
        "notes: forward the rest byte-exact",
        "GET {p}/a//b/../%2e%2E/%2f;c?d=/../&e HTTP/1.1\r\n{h}{c}\r\n",
        &[("GET", "/a//b/../%2e%2E/%2f;c?d=/../&e", 0)],
    ),
    // What pretends to come from us.
    refused("imitated forwarding", SPOOF, "GET {p}/x HTTP/1.1\r\n{h}{c}X_Forwarded_For: 1.2.3.4\r\n\r\n"),
    refused("imitated field of ours", SPOOF, "GET {p}/x HTTP/1.1\r\n{h}{c}cocalc_code: x\r\n\r\n"),
    refused("cookie to be removed", SPOOF, "GET {p}/x HTTP/1.1\r\n{h}Connection: Cookie\r\n\r\n"),
    refused("credential to be removed", SPOOF, "GET {p}/x HTTP/1.1\r\n{h}Connection: Authorization\r\n\r\n"),
    refused(
        "forwarding to be removed",
        SPOOF,
        "GET {p}/x HTTP/1.1\r\n{h}Connection: X-Forwarded-For\r\n\r\n",
    ),
    passed(
        "fields that only we set",
        SPOOF,
        "GET {p}/x HTTP/1.1\r\n{h}{c}X-Forwarded-For: 6.6.6.6\r\nForwarded: for=6.6.6.6\r\nX-Real-IP: 6.6.6.6\r\nVia: 6.6.6.6\r\nCocalc-Code: 6.6.6.6\r\nProxy: 6.6.6.6\r\nProxy-Connection: 6.6.6.6\r\nKeep-Alive: 6.6.6.6\r\n\r\n",
        &[("GET", "/x", 0)],
    ),
    // Other protocols.
    passed(
        "h2c",
        "RFC 9113, 3.1; h2c smuggling (2020)",
        "GET {p}/x HTTP/1.1\r\n{h}Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n\r\n",
        &[("GET", "/x", 0)],
    ),
    passed(
        "WebSocket or h2c",
        UPGRADE,
        "GET {p}/x HTTP/1.1\r\n{h}{w}Upgrade: h2c\r\n\r\n",
        &[("GET", "/x", 0)],
    ),
    passed("bytes before the switch", UPGRADE, "GET {p}/x HTTP/1.1\r\n{h}{w}\r\n{s}", &[("GET", "/x", 0)]),
    refused("WebSocket by POST", UPGRADE, "POST {p}/x HTTP/1.1\r\n{h}{w}Content-Length: 0\r\n\r\n"),
    refused("WebSocket with a body", UPGRADE, "GET {p}/x HTTP/1.1\r\n{h}{w}Content-Length: 3\r\n\r\nabc"),
    answered(
        "WebSocket of version 8",
        "RFC 6455, 4.4",
        "GET {p}/x HTTP/1.1\r\n{h}Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 8\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        &[(426, "websocket_version")],
    ),
    refused(
        "WebSocket without a key",
        UPGRADE,
        "GET {p}/x HTTP/1.1\r\n{h}Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\r\n",
    ),
    refused(
        "WebSocket with a short key",
        UPGRADE,
        "GET {p}/x HTTP/1.1\r\n{h}Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: c2hvcnQ=\r\n\r\n",
    ),
];
