//! Rows of the table: what was seen, its median, the ratio to the peer's, and
//! whether that is what was aimed at.

use serde::Serialize;

use crate::Result;

/// The whole table.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Table {
    rows: Vec<Row>,
    numbers: Vec<Number>,
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
    goal: Option<Goal>,
    /// Whether the ratio reaches the goal.
    met: Option<bool>,
    ours_samples: Vec<f64>,
    peer_samples: Vec<f64>,
}

/// What has no peer, or is to be seen by itself.
#[derive(Debug, Serialize)]
struct Number {
    what: String,
    unit: &'static str,
    median: f64,
    goal: Option<Goal>,
    met: Option<bool>,
    samples: Vec<f64>,
}

/// What a ratio, or a number without a peer, is to reach.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Goal {
    AtLeast(f64),
    AtMost(f64),
}

impl Goal {
    /// Nothing measured reaches no goal.
    fn met_by(self, value: f64) -> bool {
        match self {
            Self::AtLeast(least) => value >= least,
            Self::AtMost(most) => value <= most,
        }
    }

    fn text(goal: Option<Self>, met: Option<bool>) -> String {
        let met = if met == Some(true) { "met" } else { "missed" };
        match goal {
            Some(Self::AtLeast(least)) => format!("≥ {least} {met}"),
            Some(Self::AtMost(most)) => format!("≤ {most} {met}"),
            None => String::new(),
        }
    }
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
        self.compare(what, peer, (unit, better), ours, peers, None);
    }

    /// Adds a comparison whose ratio is to reach something, and says it.
    pub(crate) fn compare(
        &mut self,
        what: impl Into<String>,
        peer: impl Into<String>,
        (unit, better): (&'static str, Better),
        ours: &[f64],
        peers: &[f64],
        goal: Option<Goal>,
    ) {
        let (ours_median, peer_median) = (median(ours), median(peers));
        let ratio = ours_median / peer_median;
        let row = Row {
            what: what.into(),
            peer: peer.into(),
            unit,
            better,
            ours_median,
            peer_median,
            ratio,
            goal,
            met: goal.map(|goal| goal.met_by(ratio)),
            ours_samples: ours.to_vec(),
            peer_samples: peers.to_vec(),
        };
        let goal = Goal::text(row.goal, row.met);
        eprintln!(
            "{}: {ours_median:.3} against {}: {peer_median:.3} {unit}, {ratio:.2} {goal}",
            row.what, row.peer
        );
        self.rows.push(row);
    }

    /// Adds a number without a peer, and says it.
    pub(crate) fn number(
        &mut self,
        what: impl Into<String>,
        unit: &'static str,
        samples: &[f64],
        goal: Option<Goal>,
    ) {
        let median = median(samples);
        let met = goal.map(|goal| goal.met_by(median));
        let number = Number { what: what.into(), unit, median, goal, met, samples: samples.to_vec() };
        eprintln!("{}: {median:.3} {unit} {}", number.what, Goal::text(goal, met));
        self.numbers.push(number);
    }

    /// Adds what helps to read the rows.
    pub(crate) fn note(&mut self, note: impl Into<String>) {
        let note = note.into();
        eprintln!("{note}");
        self.notes.push(note);
    }

    /// Prints it as Markdown.
    pub(crate) fn print(&self) {
        self.print_rows();
        if !self.numbers.is_empty() {
            println!("| what | seen | unit | goal | range | runs |");
            println!("|---|---:|---|---|---|---:|");
        }
        for number in &self.numbers {
            println!(
                "| {} | {} | {} | {} | {} | {} |",
                number.what,
                self::number(number.median),
                number.unit,
                Goal::text(number.goal, number.met),
                range(&number.samples),
                number.samples.len(),
            );
        }
        println!();
        for note in &self.notes {
            println!("- {note}");
        }
    }

    fn print_rows(&self) {
        if self.rows.is_empty() {
            return;
        }
        println!("| what | ours | peer | unit | ratio | goal | better | ours, range | peer, range | runs |");
        println!("|---|---:|---:|---|---:|---|---|---|---|---:|");
        for row in &self.rows {
            println!(
                "| {} / {} | {} | {} | {} | **{:.2}** | {} | {} | {} | {} | {} |",
                row.what,
                row.peer,
                number(row.ours_median),
                number(row.peer_median),
                row.unit,
                row.ratio,
                Goal::text(row.goal, row.met),
                if row.better == Better::Less { "less" } else { "more" },
                range(&row.ours_samples),
                range(&row.peer_samples),
                row.ours_samples.len(),
            );
        }
        println!();
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
    use super::{Goal, median, quantile};

    #[test]
    fn what_was_not_measured_reaches_no_goal() {
        assert!(Goal::AtMost(1.15).met_by(1.15) && !Goal::AtMost(1.15).met_by(1.16));
        assert!(Goal::AtLeast(0.9).met_by(0.9) && !Goal::AtLeast(0.9).met_by(0.89));
        assert!(!Goal::AtMost(1.0).met_by(median(&[])) && !Goal::AtLeast(1.0).met_by(median(&[])));
        assert_eq!(Goal::text(Some(Goal::AtMost(1.15)), Some(false)), "≤ 1.15 missed");
    }

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
