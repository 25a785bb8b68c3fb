//! A container of podman's with the same app.

use std::{
    net::SocketAddr,
    process::Command,
    time::{Duration, Instant},
};

use super::LIMIT;
use crate::{
    Result,
    container::{self, Image},
    federation::Federation,
    tool::{first_byte, run},
};

/// How it is started.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Kind {
    /// Made and started.
    Run,
    /// Made before.
    Start,
}

/// It goes with the value.
#[derive(Debug)]
pub(super) struct Peer<'a> {
    image: &'a Image,
    kind: Kind,
    number: u32,
    address: SocketAddr,
}

impl<'a> Peer<'a> {
    pub(super) fn new(federation: &Federation, image: &'a Image, kind: Kind, number: u32) -> Result<Self> {
        let address = container::published(federation, number)?;
        let peer = Self { image, kind, number, address };
        container::remove(number)?;
        if kind == Kind::Start {
            run(&mut image.with_app(image.podman(&["create"], number), address), LIMIT)?;
        }
        Ok(peer)
    }

    pub(super) fn what(&self) -> &'static str {
        match self.kind {
            Kind::Run => "podman run, published port",
            Kind::Start => "podman start, published port",
        }
    }

    /// Until the first byte of the app.
    pub(super) fn start(&self) -> Result<Duration> {
        let mut podman = match self.kind {
            Kind::Run => {
                self.image.with_app(self.image.podman(&["run", "--detach"], self.number), self.address)
            }
            Kind::Start => self.podman(&["start"]),
        };
        let begun = Instant::now();
        let started =
            std::thread::spawn(move || run(&mut podman, LIMIT).map(drop).map_err(|error| error.to_string()));
        let answered = first_byte(self.address, "/", None, LIMIT);
        let took = begun.elapsed();
        started.join().map_err(|_| "a thread failed")??;
        answered?;
        Ok(took)
    }

    /// Until it has ended.
    pub(super) fn stop(&self) -> Result<Duration> {
        let begun = Instant::now();
        run(&mut self.podman(&["stop", "--time", "10"]), LIMIT)?;
        let took = begun.elapsed();
        if self.kind == Kind::Run {
            container::remove(self.number)?;
        }
        Ok(took)
    }

    /// Its name for podman.
    pub(super) fn name(&self) -> String {
        container::name(self.number)
    }

    fn podman(&self, verb: &[&str]) -> Command {
        let mut podman = Command::new("podman");
        podman.args(["--runtime", "runc", "--log-level", "error"]).args(verb).arg(self.name());
        podman
    }
}

impl Drop for Peer<'_> {
    fn drop(&mut self) {
        if let Err(error) = container::remove(self.number) {
            eprintln!("{error}");
        }
    }
}
