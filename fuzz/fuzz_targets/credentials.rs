//! Cookies, `Authorization` and query, from users and from apps: no credential
//! of ours reaches an app, and no cookie of an app leaves its project.
#![no_main]

use cocalc_http::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (&[u8], &[u8], &str, bool, bool)| {
    let (first, second, text, a, b) = input;
    fuzzing::request(first, second, text, a, b);
    fuzzing::set_cookie(first, a);
    fuzzing::session(text, a, b);
});
