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
pub struct Metrics(Arc<Mutex<BTreeMap<&'static str, Metric>>>);

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

    fn register(&self, name: &'static str, kind: &'static str, help: &'static str) -> Arc<AtomicU64> {
        let mut metrics = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let metric = metrics.entry(name).or_insert_with(|| Metric { kind, help, value: Arc::default() });
        Arc::clone(&metric.value)
    }

    /// The text exposition format, version 0.0.4.
    pub fn render(&self) -> String {
        let metrics = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        metrics.iter().fold(String::new(), |mut text, (name, metric)| {
            let value = metric.value.load(Ordering::Relaxed);
            // Writing to a String cannot fail.
            let _ = writeln!(
                text,
                "# HELP {name} {}\n# TYPE {name} {}\n{name} {value}",
                metric.help, metric.kind
            );
            text
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
