//! Projects of a bench, which go with it.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::{
    Result,
    federation::{Federation, field},
    tool::each,
};

/// So many are made or deleted at a time.
const AT_ONCE: usize = 8;

/// Deletes what was made, whatever happens.
pub(crate) struct Projects<'a> {
    federation: &'a Federation,
    made: Vec<String>,
}

impl<'a> Projects<'a> {
    pub(crate) fn none(federation: &'a Federation) -> Self {
        Self { federation, made: Vec::new() }
    }

    /// A copy of the sample project, with its app, running.
    pub(crate) fn copy(&mut self, name: &str) -> Result<String> {
        let sample = self.federation.project();
        let body = json!({ "name": name });
        let begun = self.federation.api(&format!("/projects/{sample}/clone"), Some(body))?;
        let id = field(&begun["project"], "id")?;
        self.made.push(id.clone());
        self.federation.wait(&begun)?;
        self.federation.change(&id, "start")?;
        Ok(id)
    }

    /// A new one with this body of its creation, stopped.
    pub(crate) fn make(&mut self, body: serde_json::Value) -> Result<String> {
        let begun = self.federation.api("/projects", Some(body))?;
        let id = field(&begun["project"], "id")?;
        self.made.push(id.clone());
        self.federation.wait(&begun)?;
        Ok(id)
    }

    /// So many new ones on a host, stopped.
    pub(crate) fn many(&mut self, count: u32, host: &str) -> Result<()> {
        let numbers: Vec<u32> = (0..count).collect();
        let since = Instant::now();
        for some in numbers.chunks(100) {
            let made = each(AT_ONCE, some, |number| {
                let body = json!({ "name": format!("stopped {number}"), "host": host });
                let begun = self.federation.api("/projects", Some(body))?;
                let id = field(&begun["project"], "id")?;
                self.federation.wait(&begun)?;
                Ok(id)
            })?;
            self.made.extend(made);
            eprintln!("{} projects after {:.0} s", self.made.len(), since.elapsed().as_secs_f64());
        }
        Ok(())
    }

    /// Deletes them, and waits until they are gone.
    pub(crate) fn end(&mut self) -> Result<()> {
        let made = std::mem::take(&mut self.made);
        each(AT_ONCE, &made, |id| self.federation.delete(id))?;
        // Their files are freed in the background.
        std::thread::sleep(Duration::from_secs(1));
        Ok(())
    }
}

impl Projects<'_> {
    /// Leaves them to the end of the federation, which takes all together.
    pub(crate) fn leave(mut self) {
        self.made.clear();
    }
}

impl Drop for Projects<'_> {
    fn drop(&mut self) {
        for id in &self.made {
            if let Err(error) = self.federation.delete(id) {
                eprintln!("could not delete project {id}: {error}");
            }
        }
    }
}
