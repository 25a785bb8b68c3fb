//! Brings projects up again when the host is back.

use std::time::Instant;

use cocalc_core::{
    admission::{Wave, WaveSettings},
    ids::ProjectId,
};
use tokio::task::JoinSet;

/// Starts projects in a [`Wave`]; `start` says whether one has come up.
/// Dropping it ends it; what is being started goes on.
pub(crate) async fn run<F>(projects: Vec<ProjectId>, settings: WaveSettings, start: impl Fn(ProjectId) -> F)
where
    F: Future<Output = bool> + Send + 'static,
{
    let begun = Instant::now();
    let mut wave = Wave::new(projects, settings);
    let mut going = JoinSet::new();
    while !wave.is_over() {
        for project in wave.next(begun.elapsed()) {
            let starting = start(project);
            going.spawn(async move { (project, starting.await) });
        }
        match going.join_next().await {
            Some(Ok((project, well))) => wave.ended(project, well, begun.elapsed()),
            // It panicked, and nobody knows which: that is no way to go on.
            Some(Err(error)) => {
                tracing::error!(%error, "bringing projects up broke off");
                return;
            }
            None => match wave.wakes() {
                Some(at) => tokio::time::sleep(at.saturating_sub(begun.elapsed())).await,
                None => return,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{
            Arc, Mutex,
            atomic::{AtomicUsize, Ordering},
        },
        time::Duration,
    };

    use super::*;

    #[tokio::test]
    async fn one_first_then_a_few_at_a_time_and_all_in_the_end() {
        let projects: Vec<_> = (0..30).map(|id| ProjectId::from_bytes([id; 16])).collect();
        let (going, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let done: Arc<Mutex<Vec<ProjectId>>> = Arc::default();
        let settings = WaveSettings { pause: Duration::from_millis(1), ..WaveSettings::default() };
        let start = |project: ProjectId| {
            let (going, most, done) = (Arc::clone(&going), Arc::clone(&most), Arc::clone(&done));
            async move {
                let now = going.fetch_add(1, Ordering::SeqCst) + 1;
                if done.lock().unwrap().iter().all(|other| other.as_bytes()[0] < 2) {
                    assert_eq!(now, 1, "nothing beside a canary");
                }
                most.fetch_max(now, Ordering::SeqCst);
                tokio::time::sleep(Duration::from_millis(5)).await;
                going.fetch_sub(1, Ordering::SeqCst);
                done.lock().unwrap().push(project);
                // The first two canaries die.
                project.as_bytes()[0] >= 2
            }
        };
        run(projects.clone(), settings, start).await;
        let mut done = done.lock().unwrap().clone();
        done.sort();
        assert_eq!(done, projects);
        assert!((2..=4).contains(&most.load(Ordering::SeqCst)));
    }
}
