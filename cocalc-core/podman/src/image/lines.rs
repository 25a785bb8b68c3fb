//! What programs say, line by line, in bounded memory: what a registry or an archive
//! has them say can be as long as it likes.

use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};

/// How much of a line counts.
const LINE_BYTES_MAX: usize = 500;

/// The lines of a stream; the end of a longer one is left out.
#[derive(Debug)]
pub(super) struct Lines<R> {
    reader: BufReader<R>,
    line: Vec<u8>,
}

impl<R: AsyncRead + Unpin> Lines<R> {
    pub(super) fn new(stream: R) -> Self {
        Self { reader: BufReader::new(stream), line: Vec::new() }
    }

    /// The next one; `None` at the end, also of what cannot be read to its end.
    ///
    /// # Cancel safety
    ///
    /// Nothing is lost.
    pub(super) async fn next(&mut self) -> Option<String> {
        loop {
            let chunk = self.reader.fill_buf().await.unwrap_or_default();
            let at = chunk.iter().position(|byte| *byte == b'\n');
            let (length, over) = (at.unwrap_or(chunk.len()), chunk.is_empty());
            let room = LINE_BYTES_MAX.saturating_sub(self.line.len());
            self.line.extend_from_slice(&chunk[..length.min(room)]);
            self.reader.consume(length + usize::from(at.is_some()));
            if at.is_some() || (over && !self.line.is_empty()) {
                return Some(String::from_utf8_lossy(&std::mem::take(&mut self.line)).trim_end().to_owned());
            }
            if over {
                return None;
            }
        }
    }
}

/// The last lines that were said, for people.
#[derive(Debug)]
pub(super) struct Last {
    lines: std::collections::VecDeque<String>,
    most: usize,
    before: u64,
}

impl Last {
    pub(super) fn new(most: usize) -> Self {
        Self { lines: std::collections::VecDeque::new(), most, before: 0 }
    }

    pub(super) fn push(&mut self, line: String) {
        self.lines.push_back(line);
        if self.lines.len() > self.most {
            self.lines.pop_front();
            self.before += 1;
        }
    }

    /// All of them, and how many there were before.
    pub(super) fn text(self) -> String {
        let mut text = Vec::from(self.lines).join("\n");
        if self.before > 0 {
            text.push_str(&format!("\n(and {} lines before)", self.before));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lines_and_how_many_there_are_fill_no_memory() {
        let mut said = b"one\r\n\n\xff\xfe\n".to_vec();
        said.extend(vec![b'x'; 3_000_000]);
        said.extend(b"\nlast");
        let mut lines = Lines::new(&said[..]);
        let mut last = Last::new(2);
        let mut lengths = Vec::new();
        while let Some(line) = lines.next().await {
            lengths.push(line.chars().count());
            last.push(line);
        }
        assert_eq!(lengths, [3, 0, 2, LINE_BYTES_MAX, 4]);
        assert!(last.text().ends_with("x\nlast\n(and 3 lines before)"));
        assert_eq!(lines.next().await, None);
    }
}
