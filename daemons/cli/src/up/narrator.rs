//! Says each step and its time.

use std::{
    fmt::Display,
    time::{Duration, Instant},
};

use crate::failure::Failure;

/// Tells a person what is being done, step by step.
#[derive(Debug)]
pub(crate) struct Narrator {
    started: Instant,
}

impl Narrator {
    pub(crate) fn new() -> Self {
        Self { started: Instant::now() }
    }

    /// Does a step, and says how long it took. What it returns is said too.
    pub(crate) fn step<T>(
        &self,
        name: impl Display,
        step: impl FnOnce() -> Result<Told<T>, Failure>,
    ) -> Result<T, Failure> {
        let begun = Instant::now();
        match step() {
            Ok(told) => {
                let dots = if told.said.is_empty() { "" } else { ": " };
                println!("[{}] {name}{dots}{}", seconds(begun.elapsed()), told.said);
                Ok(told.value)
            }
            Err(failure) => {
                println!("[{}] {name}: FAILED", seconds(begun.elapsed()));
                Err(Failure::new(failure.exit, format!("{name}: {failure}")))
            }
        }
    }

    /// A heading.
    pub(crate) fn heading(&self, text: impl Display) {
        println!("\n== {text}");
    }

    /// Since the first step.
    pub(crate) fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }
}

/// What a step found, and what to say of it.
#[derive(Debug)]
pub(crate) struct Told<T> {
    value: T,
    said: String,
}

/// A step's value, and what to say of it.
pub(crate) fn told<T>(value: T, said: impl Into<String>) -> Result<Told<T>, Failure> {
    Ok(Told { value, said: said.into() })
}

/// A step of which there is nothing more to say.
pub(crate) fn done() -> Result<Told<()>, Failure> {
    told((), "")
}

fn seconds(time: Duration) -> String {
    format!("{:>6.2} s", time.as_secs_f64())
}

/// Waits until `look` finds something.
///
/// # Errors
///
/// After `limit`, saying `what` was waited for; and whatever `look` says.
pub(crate) fn wait_for<T>(
    what: impl Display,
    limit: Duration,
    mut look: impl FnMut() -> Result<Option<T>, Failure>,
) -> Result<T, Failure> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if Instant::now() >= deadline {
            return Err(Failure::new(
                crate::failure::Exit::TimedOut,
                format!("waited {} s for {what}", limit.as_secs()),
            ));
        }
        std::thread::sleep(Duration::from_millis(25));
    }
}
