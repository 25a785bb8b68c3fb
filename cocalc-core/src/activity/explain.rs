//! Why a project runs, and until when, in a sentence.

use std::time::Duration;

use cocalc_ids::{ProjectId, Timestamp};
use serde::{Deserialize, Serialize};

use super::Source;

/// What a host knows of the use of a project, as it tells the master: ages and
/// remaining times, in milliseconds.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct IdleReport {
    /// Which project.
    pub project: ProjectId,
    /// Whether it runs.
    pub running: bool,
    /// When it was started, as its runner says.
    pub started: Option<Timestamp>,
    /// After how long without work it is stopped; `None`: never.
    pub timeout_ms: Option<u64>,
    /// How long ago each kind of work was last seen.
    pub work: Vec<(Source, u64)>,
    /// The same of presence.
    pub presence: Option<(Source, u64)>,
    /// For how long it is kept.
    pub keep_ms: Option<u64>,
    /// The jobs that it declares, and for how long they count.
    pub jobs: Vec<(String, u64)>,
    /// What must not be cut off now.
    pub busy: Option<String>,
    /// In how long it is stopped, unless it is used; `None`: never.
    pub stops_in_ms: Option<u64>,
    /// Whether its users are being warned.
    pub warned: bool,
    /// Why it does not run.
    pub reason: Option<String>,
    /// How many of its processes the kernel has killed since its start because
    /// its memory was used up, and how long ago that was last seen.
    #[serde(default)]
    pub oom_kills: Option<(u64, u64)>,
}

/// A report in absolute times and words.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Explained {
    /// In one sentence, for people.
    pub sentence: String,
    /// When it was last used.
    pub last_used: Option<Timestamp>,
    /// When it is stopped, unless it is used.
    pub stops_at: Option<Timestamp>,
    /// Until when it is kept.
    pub keep_until: Option<Timestamp>,
}

/// Says what a report means at `now`.
pub fn explain(report: &IdleReport, now: Timestamp) -> Explained {
    let before = |ago: u64| {
        Timestamp::from_millis(now.millis().saturating_sub(i64::try_from(ago).unwrap_or(i64::MAX)))
    };
    let after = |left: u64| now.plus(Duration::from_millis(left));
    let last = report.work.iter().min_by_key(|(_, ago)| *ago).map(|(source, ago)| (*source, before(*ago)));
    let stops_at = report.stops_in_ms.map(after).filter(|_| report.running);
    let keep_until = report.keep_ms.map(after);
    let explained =
        |sentence| Explained { sentence, last_used: last.map(|(_, at)| at), stops_at, keep_until };
    if !report.running {
        let reason = report.reason.clone().unwrap_or_else(|| "it was not started".to_owned());
        return explained(format!("it does not run: {reason}"));
    }
    let mut sentence = match report.started {
        Some(at) => format!("it runs since {}", time(at)),
        None => "it runs".to_owned(),
    };
    match last {
        Some((Source::Start, _)) | None => sentence.push_str(", has not been used since"),
        Some((source, at)) => {
            sentence.push_str(&format!(", was last used at {} by {}", time(at), source.words()))
        }
    }
    if let Some((source, ago)) = report.presence
        && last.is_none_or(|(_, at)| before(ago) > at)
    {
        let what = match source {
            Source::Ssh => "a terminal",
            _ => "a page",
        };
        sentence.push_str(&format!(" ({what} is open, untouched, seen at {})", time(before(ago))));
    }
    if let Some((job, left)) = report.jobs.iter().max_by_key(|(_, left)| *left) {
        let more = report.jobs.len() - 1;
        let others = if more > 0 { format!(" and {more} more") } else { String::new() };
        sentence
            .push_str(&format!(", declares the job {job:?}{others} until {} at most", time(after(*left))));
    }
    if let Some(until) = keep_until {
        sentence.push_str(&format!(", is kept until {}", time(until)));
    }
    match (stops_at, &report.busy) {
        (Some(at), Some(busy)) => {
            sentence.push_str(&format!(
                ", and is stopped at {} unless it is used, but not during {busy}",
                time(at)
            ));
        }
        (Some(at), None) => sentence.push_str(&format!(", and is stopped at {} unless it is used", time(at))),
        (None, _) => sentence.push_str(", and is not stopped for being idle"),
    }
    if let Some((count, ago)) = report.oom_kills {
        let processes = if count == 1 { "process was" } else { "processes were" };
        let at = time(before(ago));
        sentence
            .push_str(&format!("; {count} {processes} killed because its memory was used up, last at {at}"));
    }
    explained(sentence)
}

/// A time in RFC 3339, in whole seconds.
pub fn time(at: Timestamp) -> String {
    jiff::Timestamp::from_second(at.secs()).map_or_else(|_| at.to_string(), |at| at.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> IdleReport {
        IdleReport {
            project: ProjectId::random(),
            running: true,
            started: Some(Timestamp::from_secs(1_800_000_000)),
            timeout_ms: Some(1_800_000),
            work: vec![(Source::Start, 3_600_000), (Source::Ssh, 60_000)],
            presence: None,
            keep_ms: None,
            jobs: Vec::new(),
            busy: None,
            stops_in_ms: Some(1_740_000),
            warned: false,
            reason: None,
            oom_kills: None,
        }
    }

    #[test]
    fn sentences_have_times() {
        let now = Timestamp::from_secs(1_800_003_600);
        let said = |report: &IdleReport| explain(report, now).sentence;
        assert_eq!(
            said(&report()),
            "it runs since 2027-01-15T08:00:00Z, was last used at 2027-01-15T08:59:00Z by SSH or a terminal, \
             and is stopped at 2027-01-15T09:29:00Z unless it is used"
        );
        let idle = IdleReport {
            work: vec![(Source::Start, 3_600_000)],
            presence: Some((Source::Http, 5_000)),
            keep_ms: Some(7_200_000),
            stops_in_ms: Some(7_200_000),
            busy: Some("a backup".into()),
            ..report()
        };
        assert_eq!(
            said(&idle),
            "it runs since 2027-01-15T08:00:00Z, has not been used since (a page is open, untouched, seen at \
             2027-01-15T08:59:55Z), is kept until 2027-01-15T11:00:00Z, and is stopped at 2027-01-15T11:00:00Z \
             unless it is used, but not during a backup"
        );
        let killed = IdleReport { oom_kills: Some((2, 1000)), ..report() };
        assert!(said(&killed).ends_with(
            "; 2 processes were killed because its memory was used up, last at 2027-01-15T08:59:59Z"
        ));
        let never = IdleReport { stops_in_ms: None, jobs: vec![("train".into(), 1000)], ..report() };
        assert!(said(&never).ends_with(
            "declares the job \"train\" until 2027-01-15T09:00:01Z at most, and is not stopped for being idle"
        ));
        let reason = "stopped at 2027-01-15T08:30:00Z because it was idle".to_owned();
        let stopped = IdleReport { running: false, reason: Some(reason.clone()), ..report() };
        assert_eq!(said(&stopped), format!("it does not run: {reason}"));
        assert_eq!(explain(&stopped, now).stops_at, None);
    }
}
