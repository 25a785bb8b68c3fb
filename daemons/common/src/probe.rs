//! `/healthz`, `/readyz` and `/metrics`, the same at every daemon.

use std::{
    collections::BTreeMap,
    fmt::Write,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

/// Numbers for Prometheus. Names are `cocalc_<daemon>_<noun>_<unit>`; there
/// are no labels, so that no tenant's id becomes one. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Metrics(Arc<Mutex<BTreeMap<&'static str, Metric>>>, Arc<Mutex<Times>>);

type Times = BTreeMap<&'static str, (&'static str, Arc<Histogram>)>;

/// The upper ends of a histogram's buckets, in milliseconds.
const BUCKETS: [u64; 12] = [50, 100, 200, 300, 500, 750, 1000, 2000, 5000, 10_000, 30_000, 60_000];

/// How often something took how long.
#[derive(Debug, Default)]
pub struct Histogram {
    /// Not yet summed up; the last is of what took longer than any bucket.
    counts: [AtomicU64; BUCKETS.len() + 1],
    millis: AtomicU64,
}

impl Histogram {
    /// Of times from 50 milliseconds to a minute.
    pub fn seconds() -> Self {
        Self::default()
    }

    /// Something took so long.
    pub fn observe(&self, took: std::time::Duration) {
        let millis = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
        let bucket = BUCKETS.iter().position(|end| millis <= *end).unwrap_or(BUCKETS.len());
        self.counts[bucket].fetch_add(1, Ordering::Relaxed);
        self.millis.fetch_add(millis, Ordering::Relaxed);
    }

    fn render(&self, name: &str, help: &str, text: &mut String) {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} histogram");
        let mut count = 0;
        for (bucket, end) in self.counts.iter().zip(BUCKETS.iter().map(Some).chain([None])) {
            count += bucket.load(Ordering::Relaxed);
            let end =
                end.map_or_else(|| "+Inf".to_owned(), |end| format!("{}.{:03}", end / 1000, end % 1000));
            let _ = writeln!(text, "{name}_bucket{{le=\"{end}\"}} {count}");
        }
        let millis = self.millis.load(Ordering::Relaxed);
        let _ = writeln!(text, "{name}_sum {}.{:03}\n{name}_count {count}", millis / 1000, millis % 1000);
    }
}

#[derive(Debug)]
struct Metric {
    kind: &'static str,
    help: &'static str,
    value: Arc<AtomicU64>,
}

impl Metrics {
    /// A number that only grows, by its full name, which ends in `_total`.
    pub fn counter(&self, name: &'static str, help: &'static str) -> Arc<AtomicU64> {
        self.register(name, "counter", help)
    }

    /// A number that goes up and down.
    pub fn gauge(&self, name: &'static str, help: &'static str) -> Arc<AtomicU64> {
        self.register(name, "gauge", help)
    }

    /// Times, by their full name, which ends in `_seconds`.
    pub fn times(&self, name: &'static str, help: &'static str, histogram: &Arc<Histogram>) {
        let mut times = self.1.lock().unwrap_or_else(PoisonError::into_inner);
        times.insert(name, (help, Arc::clone(histogram)));
    }

    fn register(&self, name: &'static str, kind: &'static str, help: &'static str) -> Arc<AtomicU64> {
        let mut metrics = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let metric = metrics.entry(name).or_insert_with(|| Metric { kind, help, value: Arc::default() });
        Arc::clone(&metric.value)
    }

    /// The text exposition format, version 0.0.4.
    pub fn render(&self) -> String {
        let metrics = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut text = metrics.iter().fold(String::new(), |mut text, (name, metric)| {
            let value = metric.value.load(Ordering::Relaxed);
            // Writing to a String cannot fail.
            let _ = writeln!(
                text,
                "# HELP {name} {}\n# TYPE {name} {}\n{name} {value}",
                metric.help, metric.kind
            );
            text
        });
        for (name, (help, histogram)) in &*self.1.lock().unwrap_or_else(PoisonError::into_inner) {
            histogram.render(name, help, &mut text);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_counted_up_to_each_bucket() {
        let (metrics, times) = (Metrics::default(), Arc::new(Histogram::seconds()));
        metrics.times("cocalc_host_start_seconds", "Starts.", &times);
        for millis in [40, 50, 60, 1500, 100_000] {
            times.observe(std::time::Duration::from_millis(millis));
        }
        let text = metrics.render();
        for line in [
            "# TYPE cocalc_host_start_seconds histogram",
            "cocalc_host_start_seconds_bucket{le=\"0.050\"} 2",
            "cocalc_host_start_seconds_bucket{le=\"0.100\"} 3",
            "cocalc_host_start_seconds_bucket{le=\"2.000\"} 4",
            "cocalc_host_start_seconds_bucket{le=\"60.000\"} 4",
            "cocalc_host_start_seconds_bucket{le=\"+Inf\"} 5",
            "cocalc_host_start_seconds_sum 101.650",
            "cocalc_host_start_seconds_count 5",
        ] {
            assert!(text.lines().any(|other| other == line), "{line} in {text}");
        }
    }

    #[test]
    fn metrics_are_rendered_for_prometheus() {
        let metrics = Metrics::default();
        metrics.counter("cocalc_host_starts_total", "Projects started.").fetch_add(2, Ordering::Relaxed);
        metrics.counter("cocalc_host_starts_total", "Projects started.").fetch_add(1, Ordering::Relaxed);
        assert_eq!(
            metrics.render(),
            "# HELP cocalc_host_starts_total Projects started.\n# TYPE cocalc_host_starts_total counter\ncocalc_host_starts_total 3\n"
        );
    }
}
