//! Rows of the table: what was seen, its median, and the ratio to the peer's.

use serde::Serialize;

use crate::Result;

/// The whole table.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Table {
    rows: Vec<Row>,
    notes: Vec<String>,
}

/// One comparison.
#[derive(Debug, Serialize)]
struct Row {
    what: String,
    peer: String,
    unit: &'static str,
    better: Better,
    ours_median: f64,
    peer_median: f64,
    /// Ours divided by the peer's.
    ratio: f64,
    ours_samples: Vec<f64>,
    peer_samples: Vec<f64>,
}

/// Which way is better.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Better {
    Less,
    More,
}

impl Table {
    /// Adds a comparison, and says it.
    pub(crate) fn add(
        &mut self,
        what: impl Into<String>,
        peer: impl Into<String>,
        (unit, better): (&'static str, Better),
        ours: &[f64],
        peers: &[f64],
    ) {
        let (ours_median, peer_median) = (median(ours), median(peers));
        let row = Row {
            what: what.into(),
            peer: peer.into(),
            unit,
            better,
            ours_median,
            peer_median,
            ratio: ours_median / peer_median,
            ours_samples: ours.to_vec(),
            peer_samples: peers.to_vec(),
        };
        eprintln!("{}: {:.3} against {}: {:.3} {unit}", row.what, ours_median, row.peer, peer_median);
        self.rows.push(row);
    }

    /// Adds what helps to read the rows.
    pub(crate) fn note(&mut self, note: impl Into<String>) {
        let note = note.into();
        eprintln!("{note}");
        self.notes.push(note);
    }

    /// Prints it as Markdown.
    pub(crate) fn print(&self) {
        if self.rows.is_empty() {
            return;
        }
        println!("| what | ours | peer | unit | ratio | better | ours, range | peer, range | runs |");
        println!("|---|---:|---:|---|---:|---|---|---|---:|");
        for row in &self.rows {
            println!(
                "| {} / {} | {} | {} | {} | **{:.2}** | {} | {} | {} | {} |",
                row.what,
                row.peer,
                number(row.ours_median),
                number(row.peer_median),
                row.unit,
                row.ratio,
                if row.better == Better::Less { "less" } else { "more" },
                range(&row.ours_samples),
                range(&row.peer_samples),
                row.ours_samples.len(),
            );
        }
        println!();
        for note in &self.notes {
            println!("- {note}");
        }
    }

    /// The same for programs, with every sample.
    pub(crate) fn json(&self) -> Result<String> {
        Ok(serde_json::to_string_pretty(self)?)
    }
}

/// The middle one, or the mean of the two in the middle.
pub(crate) fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    match (sorted.len(), sorted.get(sorted.len() / 2)) {
        (count, Some(upper)) if count % 2 == 0 => f64::midpoint(sorted[count / 2 - 1], *upper),
        (_, Some(middle)) => *middle,
        _ => f64::NAN,
    }
}

/// The sample below which `part` of them are.
pub(crate) fn quantile(samples: &[f64], part: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().saturating_sub(1);
    sorted.get((last as f64 * part).round() as usize).copied().unwrap_or(f64::NAN)
}

fn range(samples: &[f64]) -> String {
    let least = samples.iter().copied().fold(f64::INFINITY, f64::min);
    let most = samples.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    format!("{}–{}", number(least), number(most))
}

/// Three digits that count.
fn number(value: f64) -> String {
    if value >= 100.0 {
        format!("{value:.0}")
    } else if value >= 10.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.2}")
    }
}

#[cfg(test)]
mod tests {
    use super::{median, quantile};

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
        let samples: Vec<f64> = (0..=100).map(f64::from).collect();
        assert_eq!((quantile(&samples, 0.99), quantile(&samples, 0.5)), (99.0, 50.0));
        assert!(quantile(&[], 0.5).is_nan());
    }
}
