//! When apps are started, stopped and tried again. Pure.

use std::{collections::BTreeMap, time::Duration};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{App, AppName, Backoff, Restart, Service};
use crate::runner::Exit;

/// Decides about the apps of one run of a project.
#[derive(Clone, Debug, Default)]
pub struct Supervisor {
    declared: BTreeMap<AppName, App>,
    known: BTreeMap<AppName, Known>,
}

#[derive(Clone, Debug, Default)]
struct Known {
    backoff: Backoff,
    /// The last start whose end was seen.
    ended: Option<(String, u64)>,
    /// What was seen last.
    seen: Option<Service>,
    ready: bool,
}

/// What is to be done.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Action {
    /// Start an app as a service of this name.
    Start {
        /// The service's name.
        service: String,
        /// The app.
        name: AppName,
        /// The line to run.
        command: String,
    },
    /// Stop a service that is not wanted, or not as it is.
    Stop {
        /// The service's name.
        service: String,
    },
    /// Find out whether an app answers.
    Probe {
        /// The app.
        name: AppName,
        /// Its port.
        port: u16,
        /// The path that answers when it is ready.
        path: Option<String>,
    },
}

/// The state of an app.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum AppState {
    /// It is about to be started, or does not answer yet.
    Starting,
    /// It runs, and answers where it says so.
    Ready,
    /// It has failed, and is tried again.
    Waiting,
    /// It has ended for good.
    Ended,
}

/// What is known of an app.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct AppStatus {
    /// Its name.
    pub name: AppName,
    /// What it declares.
    pub app: App,
    /// Its state.
    pub state: AppState,
    /// How its last run ended.
    pub exit: Option<Exit>,
    /// How often it was started.
    pub starts: u64,
    /// How often it has failed in a row.
    pub failures: u32,
    /// For how many milliseconds it has run.
    pub ran_ms: u64,
    /// In how many milliseconds it is tried again.
    pub again_in_ms: Option<u64>,
}

impl Supervisor {
    /// What is declared from now on.
    pub fn declare(&mut self, apps: BTreeMap<AppName, App>) {
        self.known.retain(|name, _| apps.contains_key(name));
        self.declared = apps;
    }

    /// Whether there is anything to watch.
    pub fn is_empty(&self) -> bool {
        self.declared.is_empty() && self.known.is_empty()
    }

    /// The service's name of an app as it is declared now.
    pub fn service(&self, name: &AppName) -> Option<String> {
        self.declared.get(name).map(|app| service(name, app))
    }

    /// Tries an app at once that waits, or has ended.
    pub fn retry(&mut self, name: &AppName) {
        self.known.remove(name);
    }

    /// Whether an app answered.
    pub fn probed(&mut self, name: &AppName, ready: bool) {
        if let Some(known) = self.known.get_mut(name) {
            known.ready = ready;
        }
    }

    /// What is to be done about what runs.
    pub fn step(&mut self, running: &[Service], now: Duration) -> Vec<Action> {
        let mut actions = Vec::new();
        let wanted: BTreeMap<String, &AppName> =
            self.declared.iter().map(|(name, app)| (service(name, app), name)).collect();
        for service in running.iter().filter(|service| !wanted.contains_key(&service.name)) {
            // Services that are none of ours have other names.
            if service.name.starts_with(PREFIX) {
                actions.push(Action::Stop { service: service.name.clone() });
            }
        }
        for (service, name) in &wanted {
            let Some(app) = self.declared.get(*name) else { continue };
            let known = self.known.entry((*name).clone()).or_default();
            let seen = running.iter().find(|one| one.name == *service).cloned();
            let start = || Action::Start {
                service: service.clone(),
                name: (*name).clone(),
                command: app.command.clone(),
            };
            match &seen {
                None => actions.extend(known.backoff.wait(now).is_none().then(start)),
                Some(Service { exit: None, .. }) => {
                    if let Some(port) = app.port.filter(|_| !known.ready) {
                        actions.push(Action::Probe { name: (*name).clone(), port, path: app.ready.clone() });
                    }
                }
                Some(Service { exit: Some(exit), run, ran, .. }) => {
                    let this = (service.clone(), *run);
                    known.ready = false;
                    if known.ended.as_ref() != Some(&this) {
                        known.ended = Some(this);
                        known.backoff.failed(*ran, now);
                    }
                    let again = restarts(app.restart, exit) && known.backoff.wait(now).is_none();
                    actions.extend(again.then(start));
                }
            }
            known.seen = seen;
        }
        actions
    }

    /// The apps, in the order of their names.
    pub fn statuses(&self, now: Duration) -> Vec<AppStatus> {
        let status = |(name, app): (&AppName, &App)| {
            let known = self.known.get(name).cloned().unwrap_or_default();
            let seen = known.seen.as_ref();
            let exit = seen.and_then(|seen| seen.exit.clone());
            let state = match (seen, &exit) {
                (None, _) => AppState::Starting,
                (Some(_), None) if known.ready || app.port.is_none() => AppState::Ready,
                (Some(_), None) => AppState::Starting,
                (Some(_), Some(exit)) if restarts(app.restart, exit) => AppState::Waiting,
                (Some(_), Some(_)) => AppState::Ended,
            };
            let waits = state == AppState::Waiting;
            AppStatus {
                name: name.clone(),
                app: app.clone(),
                state,
                exit,
                starts: seen.map_or(0, |seen| seen.run),
                failures: known.backoff.failures(),
                ran_ms: seen.map_or(0, |seen| millis(seen.ran)),
                again_in_ms: waits.then(|| millis(known.backoff.wait(now).unwrap_or_default())),
            }
        };
        self.declared.iter().map(status).collect()
    }
}

/// What the names of our services begin with.
const PREFIX: &str = "app:";

/// An app that is declared otherwise is another service.
fn service(name: &AppName, app: &App) -> String {
    let hash = Sha256::digest(format!("{}\n{:?}", app.command, app.port));
    let hash: String = hash.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    format!("{PREFIX}{name}.{hash}")
}

fn restarts(restart: Restart, exit: &Exit) -> bool {
    match restart {
        Restart::Always => true,
        Restart::OnFailure => *exit != Exit::Code(0),
        Restart::Never => false,
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn app(command: &str, port: Option<u16>, restart: Restart) -> App {
        App { command: command.into(), port, ready: None, restart, viewable: false }
    }

    fn name(text: &str) -> AppName {
        text.parse().unwrap()
    }

    fn seen(service: &str, run: u64, exit: Option<Exit>, ran: u64) -> Service {
        Service { name: service.into(), exit, run, ran: Duration::from_secs(ran) }
    }

    #[test]
    fn an_app_is_started_probed_and_tried_again_with_longer_pauses() {
        let mut supervisor = Supervisor::default();
        let web = name("web");
        supervisor.declare([(web.clone(), app("serve", Some(80), Restart::Always))].into());
        let mut now = Duration::from_secs(100);
        let actions = supervisor.step(&[], now);
        let [Action::Start { service, command, .. }] = &actions[..] else { panic!("{actions:?}") };
        assert_eq!(command, "serve");
        let up = [seen(service, 1, None, 1)];
        assert!(matches!(&supervisor.step(&up, now)[..], [Action::Probe { port: 80, .. }]));
        assert_eq!(supervisor.statuses(now)[0].state, AppState::Starting);
        supervisor.probed(&web, true);
        assert!(supervisor.step(&up, now).is_empty());
        assert_eq!(supervisor.statuses(now)[0].state, AppState::Ready);

        for (run, pause) in [(1, 1), (2, 2), (3, 4)] {
            let down = [seen(service, run, Some(Exit::Code(1)), 0)];
            assert!(supervisor.step(&down, now).is_empty(), "not at once");
            assert_eq!(supervisor.statuses(now)[0].state, AppState::Waiting);
            now += Duration::from_secs(pause);
            assert!(matches!(&supervisor.step(&down, now)[..], [Action::Start { .. }]));
        }
        assert_eq!(supervisor.statuses(now)[0].failures, 3);
        let down = [seen(service, 4, Some(Exit::Signal("SEGV".into())), 0)];
        supervisor.step(&down, now);
        supervisor.retry(&web);
        supervisor.step(&down, now);
        assert_eq!(supervisor.statuses(now)[0].failures, 1, "somebody said so");
    }

    #[test]
    fn what_is_no_longer_declared_or_otherwise_is_stopped() {
        let mut supervisor = Supervisor::default();
        let now = Duration::from_secs(100);
        supervisor.declare([(name("a"), app("one", None, Restart::Always))].into());
        let service = supervisor.service(&name("a")).unwrap();
        let others = [seen(&service, 1, None, 5), seen("somebody's", 1, None, 5)];
        assert!(supervisor.step(&others, now).is_empty());
        supervisor.declare([(name("a"), app("two", None, Restart::Always))].into());
        let actions = supervisor.step(&others, now);
        assert_eq!(actions.len(), 2, "{actions:?}");
        assert_eq!(actions[0], Action::Stop { service: service.clone() });
        supervisor.declare(BTreeMap::new());
        assert_eq!(supervisor.step(&others, now), [Action::Stop { service }]);
    }

    #[test]
    fn policies_of_restart() {
        let now = Duration::from_secs(100);
        let ends = |restart, exit: Exit| {
            let mut supervisor = Supervisor::default();
            supervisor.declare([(name("a"), app("x", None, restart))].into());
            let service = supervisor.service(&name("a")).unwrap();
            supervisor.step(&[seen(&service, 1, Some(exit), 3)], now);
            supervisor.statuses(now)[0].state == AppState::Ended
        };
        assert!(!ends(Restart::Always, Exit::Code(0)));
        assert!(ends(Restart::OnFailure, Exit::Code(0)));
        assert!(!ends(Restart::OnFailure, Exit::Code(1)));
        assert!(!ends(Restart::OnFailure, Exit::Signal("KILL".into())));
        assert!(ends(Restart::Never, Exit::Code(1)));
    }

    #[test]
    fn names_are_plain() {
        for good in ["a", "web-1", "0"] {
            assert!(good.parse::<AppName>().is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a.b", "a b", "a/b", "ä", &"a".repeat(33)] {
            assert!(bad.parse::<AppName>().is_err(), "{bad}");
        }
    }

    proptest! {
        /// Against a project that lies: no panic, at most one action for each
        /// service, and no more starts than the pauses permit.
        #[test]
        fn whatever_a_project_claims_starts_are_bounded(
            claims in prop::collection::vec((0_u64..3000, prop::option::of(any::<u8>()), any::<u64>(), 0_u64..200), 1..60),
        ) {
            let mut supervisor = Supervisor::default();
            supervisor.declare([(name("a"), app("x", Some(1), Restart::Always))].into());
            let service = supervisor.service(&name("a")).unwrap();
            let mut now = Duration::ZERO;
            for (gap, code, run, ran) in claims {
                now += Duration::from_millis(gap);
                let claim = seen(&service, run, code.map(Exit::Code), ran);
                let actions = supervisor.step(&[claim.clone(), claim], now);
                prop_assert!(actions.len() <= 2);
                supervisor.statuses(now);
            }
        }
    }
}
