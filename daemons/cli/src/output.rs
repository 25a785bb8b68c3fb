//! Results as a table for people, or as the API's JSON for programs.

use std::io::Write;

use serde_json::Value;

use crate::args::Output;

/// Prints one value: with `columns` as a table (one row per element of a
/// list), or whole as JSON.
pub(crate) fn print(output: Output, value: &Value, columns: &[&str]) {
    let text = match output {
        Output::Json => serde_json::to_string_pretty(value).unwrap_or_default() + "\n",
        Output::Table => table(value, columns),
    };
    // A closed pipe (`cocalc … | head`) is not an error of ours.
    let _ = std::io::stdout().write_all(text.as_bytes());
}

fn table(value: &Value, columns: &[&str]) -> String {
    let one = std::slice::from_ref(value);
    let rows: &[Value] = value.as_array().map_or(one, Vec::as_slice);
    let mut lines =
        vec![columns.iter().map(|c| c.rsplit('.').next().unwrap_or(c).to_uppercase()).collect::<Vec<_>>()];
    lines.extend(rows.iter().map(|row| columns.iter().map(|column| cell(row, column)).collect()));
    let widths: Vec<usize> = (0..columns.len())
        .map(|i| lines.iter().map(|line| line[i].chars().count()).max().unwrap_or(0))
        .collect();
    let mut text = String::new();
    for line in lines {
        let cells: Vec<String> = line.iter().zip(&widths).map(|(c, w)| format!("{c:<w$}")).collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// The text of a dotted path in `row`. Control characters and marks of direction
/// in names that others chose don't reach the terminal.
fn cell(row: &Value, column: &str) -> String {
    let value = column.split('.').fold(row, |value, key| &value[key]);
    let text = match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let acts = |c: char| {
        c.is_control()
            || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    text.chars().map(|c| if acts(c) { '\u{fffd}' } else { c }).collect()
}

/// Unwraps `{"<name>": […]}`, as list answers have it.
pub(crate) fn items<'a>(value: &'a Value, name: &str) -> &'a Value {
    value.get(name).unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn tables_are_aligned_and_tame() {
        let value = json!([{"name": "a\u{1b}[2J", "host": {"id": 1}}, {"name": "long name"}]);
        let text = table(&value, &["name", "host.id"]);
        assert_eq!(text, "NAME       ID\na\u{fffd}[2J      1\nlong name  -\n");
    }
}
