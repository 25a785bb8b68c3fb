//! Conditional and range requests (RFC 9110, 13 and 14).

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::{HeaderMap, HeaderName, header};

/// What tells one state of a file from another.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Version {
    /// A strong entity tag, with its quotes.
    pub(crate) tag: String,
    /// When it was modified, in whole seconds.
    pub(crate) modified: SystemTime,
}

impl Version {
    /// When it was modified, as a header field has it.
    pub(crate) fn last_modified(&self) -> String {
        httpdate::fmt_http_date(self.modified)
    }
}

/// What conditions say.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Verdict {
    /// They hold.
    Go,
    /// The client has it already.
    NotModified,
    /// One of them does not hold.
    Failed,
}

/// Weighs the conditions of a request against what is there. `reads` is for
/// GET and HEAD.
pub(crate) fn weigh(headers: &HeaderMap, current: Option<&Version>, reads: bool) -> Verdict {
    if headers.contains_key(header::IF_MATCH) {
        if !matches(headers, header::IF_MATCH, current, true) {
            return Verdict::Failed;
        }
    } else if let (Some(since), Some(current)) = (date(headers, header::IF_UNMODIFIED_SINCE), current)
        && current.modified > since
    {
        return Verdict::Failed;
    }
    if headers.contains_key(header::IF_NONE_MATCH) {
        if matches(headers, header::IF_NONE_MATCH, current, false) {
            return if reads { Verdict::NotModified } else { Verdict::Failed };
        }
    } else if reads
        && let (Some(since), Some(current)) = (date(headers, header::IF_MODIFIED_SINCE), current)
        && current.modified <= since
    {
        return Verdict::NotModified;
    }
    Verdict::Go
}

/// Whether a list of tags has the current one. A field that is no text has none.
fn matches(headers: &HeaderMap, name: HeaderName, current: Option<&Version>, strong: bool) -> bool {
    let Some(current) = current else { return false };
    headers
        .get_all(name)
        .iter()
        .filter_map(|field| field.to_str().ok())
        .flat_map(|field| field.split(','))
        .map(str::trim)
        .any(|tag| {
            let tag = if strong { tag } else { tag.strip_prefix("W/").unwrap_or(tag) };
            tag == "*" || tag == current.tag
        })
}

fn date(headers: &HeaderMap, name: HeaderName) -> Option<SystemTime> {
    let mut fields = headers.get_all(name).iter();
    let (field, None) = (fields.next()?, fields.next()) else { return None };
    httpdate::parse_http_date(field.to_str().ok()?).ok()
}

/// Which bytes are asked for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Span {
    /// All of them: no range, or one that need not be understood.
    Whole,
    /// From the first to the last, inclusive.
    Part(u64, u64),
    /// None that there are.
    Outside,
}

/// Reads `Range` for something of `length` bytes. Several ranges are answered
/// with the whole, which is allowed and can't be used to multiply work.
pub(crate) fn span(headers: &HeaderMap, version: &Version, length: u64) -> Span {
    let Some(range) = headers.get(header::RANGE).and_then(|range| range.to_str().ok()) else {
        return Span::Whole;
    };
    if let Some(condition) = headers.get(header::IF_RANGE) {
        // A date must be the very one, and tags must be strong.
        let same = condition.to_str().is_ok_and(|c| c == version.tag || c == version.last_modified());
        if !same {
            return Span::Whole;
        }
    }
    let Some((unit, set)) = range.split_once('=') else { return Span::Whole };
    let number = |text: &str| {
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        digits.then(|| text.parse().unwrap_or(u64::MAX))
    };
    let Some((first, last)) = set.trim().split_once('-') else { return Span::Whole };
    if !unit.eq_ignore_ascii_case("bytes") {
        return Span::Whole;
    }
    match (number(first), number(last)) {
        (None, Some(suffix)) if first.is_empty() => match suffix.min(length) {
            0 => Span::Outside,
            suffix => Span::Part(length - suffix, length - 1),
        },
        (Some(first), None) if last.is_empty() => {
            if first < length {
                Span::Part(first, length - 1)
            } else {
                Span::Outside
            }
        }
        (Some(first), Some(last)) if first <= last => {
            if first < length {
                Span::Part(first, last.min(length - 1))
            } else {
                Span::Outside
            }
        }
        _ => Span::Whole,
    }
}

/// A point in time from what the kernel says, in whole seconds.
pub(crate) fn seconds(secs: i64) -> SystemTime {
    // What a tenant set to before 1970, or past all calendars, is 1970.
    let secs = u64::try_from(secs).ok().filter(|secs| *secs < 253_402_300_800).unwrap_or(0);
    UNIX_EPOCH + Duration::from_secs(secs)
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn headers(fields: &[(&'static str, &str)]) -> HeaderMap {
        let field = |(name, value): &(&'static str, &str)| {
            (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap())
        };
        fields.iter().map(field).collect()
    }

    fn version() -> Version {
        Version { tag: "\"a-1\"".to_owned(), modified: seconds(1_700_000_000) }
    }

    #[test]
    fn conditions_are_weighed_in_the_order_of_the_rfc() {
        use Verdict::{Failed, Go, NotModified};
        let (then, later) = ("Tue, 14 Nov 2023 22:13:20 GMT", "Tue, 14 Nov 2023 22:13:21 GMT");
        let earlier = "Tue, 14 Nov 2023 22:13:19 GMT";
        for (fields, reading, writing, absent) in [
            (vec![], Go, Go, Go),
            (vec![("if-match", "*")], Go, Go, Failed),
            (vec![("if-match", "\"x\", \"a-1\"")], Go, Go, Failed),
            (vec![("if-match", "W/\"a-1\"")], Failed, Failed, Failed),
            (vec![("if-none-match", "*")], NotModified, Failed, Go),
            (vec![("if-none-match", "\"x\",W/\"a-1\"")], NotModified, Failed, Go),
            (vec![("if-none-match", "\"x\""), ("if-modified-since", then)], Go, Go, Go),
            (vec![("if-modified-since", then)], NotModified, Go, Go),
            (vec![("if-modified-since", later)], NotModified, Go, Go),
            (vec![("if-modified-since", earlier)], Go, Go, Go),
            (vec![("if-modified-since", "yesterday")], Go, Go, Go),
            (vec![("if-unmodified-since", earlier)], Failed, Failed, Go),
            (vec![("if-unmodified-since", then)], Go, Go, Go),
            (vec![("if-match", "\"a-1\""), ("if-unmodified-since", earlier)], Go, Go, Failed),
        ] {
            let fields_ = headers(&fields);
            let version = version();
            assert_eq!(weigh(&fields_, Some(&version), true), reading, "GET {fields:?}");
            assert_eq!(weigh(&fields_, Some(&version), false), writing, "PUT {fields:?}");
            assert_eq!(weigh(&fields_, None, false), absent, "PUT of what is not there: {fields:?}");
        }
    }

    #[test]
    fn ranges_never_leave_the_file() {
        use Span::{Outside, Part, Whole};
        let huge = format!("bytes={}9-", u64::MAX);
        for (range, expected) in [
            ("bytes=0-0", Part(0, 0)),
            ("bytes=2-5", Part(2, 5)),
            ("BYTES=2-", Part(2, 9)),
            ("bytes=-3", Part(7, 9)),
            ("bytes=-30", Part(0, 9)),
            ("bytes=5-900", Part(5, 9)),
            ("bytes=10-", Outside),
            ("bytes=-0", Outside),
            (&huge, Outside),
            ("bytes=5-4", Whole),
            ("bytes=0-1,3-4", Whole),
            ("bytes=--1", Whole),
            ("bytes=+1-2", Whole),
            ("bytes", Whole),
            ("lines=0-1", Whole),
        ] {
            assert_eq!(span(&headers(&[("range", range)]), &version(), 10), expected, "{range}");
        }
        assert_eq!(span(&headers(&[("range", "bytes=0-")]), &version(), 0), Outside);
        for (condition, expected) in [
            ("\"a-1\"", Part(0, 0)),
            ("Tue, 14 Nov 2023 22:13:20 GMT", Part(0, 0)),
            ("W/\"a-1\"", Whole),
            ("\"b\"", Whole),
            ("Tue, 14 Nov 2023 22:13:21 GMT", Whole),
        ] {
            let fields = headers(&[("range", "bytes=0-0"), ("if-range", condition)]);
            assert_eq!(span(&fields, &version(), 10), expected, "{condition}");
        }
    }
}
