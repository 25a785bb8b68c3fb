//! Subjects of the bus, and the patterns that select them.

/// The longest subject or pattern, in bytes.
pub const SUBJECT_BYTES_MAX: usize = 2048;

/// What a bus is asked to permit.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Access {
    /// Sending to a subject, or asking whether somebody listens on it.
    Publish,
    /// Receiving what matches a pattern.
    Subscribe,
}

/// Whether `subject` can be published to: dot-separated tokens without white
/// space, none of them empty, and no wildcard.
pub fn is_subject(subject: &str) -> bool {
    is_text(subject) && !subject.contains('*') && !subject.ends_with('>') && tokens_are(subject, |_| true)
}

/// Whether `pattern` can be subscribed to: like a subject, but a whole token
/// may be `*`, and the last one `>`.
pub fn is_pattern(pattern: &str) -> bool {
    let Some(last) = pattern.rsplit('.').next() else { return false };
    is_text(pattern)
        && (last == ">" || !last.ends_with('>'))
        && tokens_are(pattern, |token| token == "*" || !token.contains('*'))
}

/// Whether `pattern` selects `subject`. Both have to be well formed.
pub fn matches(pattern: &str, subject: &str) -> bool {
    let mut tokens = subject.split('.');
    for wanted in pattern.split('.') {
        match (wanted, tokens.next()) {
            (">", Some(_)) => return true,
            ("*", Some(_)) => {}
            (wanted, Some(token)) if wanted == token => {}
            _ => return false,
        }
    }
    tokens.next().is_none()
}

/// Whether everything that `narrow` selects is also selected by `wide`, which
/// is what an authorizer asks about a subscription. A subject is a pattern
/// that selects itself.
pub fn covers(wide: &str, narrow: &str) -> bool {
    let mut tokens = narrow.split('.');
    for wanted in wide.split('.') {
        match (wanted, tokens.next()) {
            (">", Some(_)) => return true,
            ("*", Some(token)) if token != ">" => {}
            (wanted, Some(token)) if wanted == token => {}
            _ => return false,
        }
    }
    tokens.next().is_none()
}

fn is_text(subject: &str) -> bool {
    !subject.is_empty()
        && subject.len() <= SUBJECT_BYTES_MAX
        // JavaScript, which the other clients are written in, counts U+FEFF.
        && !subject.contains(|c: char| c.is_whitespace() || c == '\u{feff}')
}

fn tokens_are(subject: &str, good: impl Fn(&str) -> bool) -> bool {
    let mut tokens = subject.split('.').peekable();
    while let Some(token) = tokens.next() {
        if token.is_empty() || !good(token) || (token == ">" && tokens.peek().is_some()) {
            return false;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subjects_have_no_wildcards() {
        for good in ["a", "a.b.c", "ü.x-1", "a>.b", "a.-"] {
            assert!(is_subject(good), "{good}");
        }
        for bad in ["", ".", "a.", ".a", "a..b", "a b", "a.\u{feff}", "a.*", "a*", "a.>", ">", "x>", "a.>.b"]
        {
            assert!(!is_subject(bad), "{bad}");
        }
        assert!(!is_subject(&"a".repeat(SUBJECT_BYTES_MAX + 1)));
    }

    #[test]
    fn patterns_have_whole_wildcards() {
        for good in ["a", "*", ">", "a.*.b", "a.>", "*.>", "*.*"] {
            assert!(is_pattern(good), "{good}");
        }
        for bad in ["", "a.", "a..>", ">.a", "a.>.b", "a*", "*a.b", "a>", "a.b>", "a b"] {
            assert!(!is_pattern(bad), "{bad}");
        }
    }

    #[test]
    fn patterns_select() {
        for (pattern, subject) in
            [("a", "a"), ("*", "a"), (">", "a"), (">", "a.b"), ("a.>", "a.b.c"), ("a.*.c", "a.b.c")]
        {
            assert!(matches(pattern, subject), "{pattern} {subject}");
        }
        for (pattern, subject) in
            [("a", "b"), ("*", "a.b"), ("a.>", "a"), ("a.*", "a"), ("a.b", "a"), ("a", "a.b")]
        {
            assert!(!matches(pattern, subject), "{pattern} {subject}");
        }
    }

    #[test]
    fn a_pattern_covers_what_is_narrower() {
        for (wide, narrow) in
            [(">", "*"), ("a.>", "a.>"), ("a.>", "a.*.>"), ("a.*", "a.b"), ("*", "*"), (">", ">")]
        {
            assert!(covers(wide, narrow), "{wide} {narrow}");
        }
        for (wide, narrow) in
            [("*", ">"), ("a.b", "a.*"), ("a.>", "*.>"), ("a.>", ">"), ("a.*", "a.>"), ("a.>", "a")]
        {
            assert!(!covers(wide, narrow), "{wide} {narrow}");
        }
    }
}
