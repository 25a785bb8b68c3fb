//! A runner whose processes and connections are metered.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use async_trait::async_trait;
use cocalc_ids::ProjectId;
use tokio::{
    io::{AsyncRead, ReadBuf},
    sync::watch,
};

use super::{Meter, Meters, Source, Tap, Use, Warning};
use crate::{
    runner::{
        Applied, Capabilities, ExecRequest, Limits, Process, ProjectSpec, Result, Runner, Stats, Status,
    },
    stream::{BoxRead, BoxStream, Notice, Noticed},
};

/// Wraps a runner for an ingress whose users work with processes: SSH,
/// terminals. What they send is work; what they receive is work, too, but for a
/// terminal, which shows things to nobody as well. Who sits before a terminal is
/// warned in it before the project is stopped.
#[derive(Clone, Debug)]
pub struct Metered {
    runner: Arc<dyn Runner>,
    meters: Meters,
    source: Source,
}

impl Metered {
    /// Notes on `meters` what passes through this, as `source`.
    pub fn new(runner: Arc<dyn Runner>, meters: Meters, source: Source) -> Self {
        Self { runner, meters, source }
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl Runner for Metered {
    fn capabilities(&self) -> Capabilities {
        self.runner.capabilities()
    }

    async fn prepare(&self, spec: &ProjectSpec) -> Result<()> {
        self.runner.prepare(spec).await
    }

    async fn start(&self, spec: &ProjectSpec) -> Result<Status> {
        self.runner.start(spec).await
    }

    fn start_phases(&self, project: ProjectId) -> Vec<(String, u64)> {
        self.runner.start_phases(project)
    }

    async fn stop(&self, project: ProjectId, grace: Duration) -> Result<Status> {
        self.runner.stop(project, grace).await
    }

    async fn remove(&self, project: ProjectId) -> Result<()> {
        self.runner.remove(project).await
    }

    async fn set_limits(&self, project: ProjectId, limits: &Limits) -> Result<Applied> {
        self.runner.set_limits(project, limits).await
    }

    async fn status(&self, project: ProjectId) -> Result<Status> {
        self.runner.status(project).await
    }

    async fn list(&self) -> Result<Vec<Status>> {
        self.runner.list().await
    }

    async fn exec(&self, project: ProjectId, request: ExecRequest) -> Result<Process> {
        let terminal = request.pty.is_some();
        let process = self.runner.exec(project, request).await?;
        let (meter, source) = (self.meters.meter(project), self.source);
        meter.worked(source);
        let shown = if terminal { Use::Presence } else { Use::Work };
        let read = |inner: BoxRead| -> BoxRead {
            let warnings = terminal.then(|| Warnings::new(meter.clone()));
            Box::pin(MeteredRead { inner, tap: meter.tap(source, shown), warnings })
        };
        Ok(Process {
            stdin: Box::pin(Noticed::new(process.stdin, meter.tap(source, Use::Work))),
            stdout: read(process.stdout),
            stderr: process.stderr.map(read),
            handle: process.handle,
        })
    }

    async fn dial(&self, project: ProjectId, port: u16) -> Result<BoxStream> {
        let inner = self.runner.dial(project, port).await?;
        let meter = self.meters.meter(project);
        meter.worked(self.source);
        Ok(Box::pin(Noticed::new(inner, meter.tap(self.source, Use::Work))))
    }

    async fn stats(&self, project: ProjectId) -> Result<Stats> {
        self.runner.stats(project).await
    }

    async fn logs(&self, project: ProjectId, lines: usize) -> Result<String> {
        self.runner.logs(project, lines).await
    }
}

/// Each byte, either way, is use.
impl Notice for Tap {
    fn read(&mut self, _bytes: &[u8]) {
        self.moved();
    }

    fn written(&mut self, _count: usize) {
        self.moved();
    }
}

/// The warnings that a terminal shows, and what of one is still to be shown.
struct Warnings {
    meter: Meter,
    next: Pin<Box<dyn Future<Output = Option<Vec<u8>>> + Send>>,
    text: Vec<u8>,
}

impl Warnings {
    fn new(meter: Meter) -> Self {
        let next = Box::pin(next(meter.warnings(), None));
        Self { meter, next, text: Vec::new() }
    }

    /// What is to be shown now.
    fn poll(&mut self, cx: &mut Context<'_>) -> &mut Vec<u8> {
        if self.text.is_empty()
            && let Poll::Ready(shown) = self.next.as_mut().poll(cx)
        {
            let receiver = self.meter.warnings();
            let seen = receiver.borrow().clone();
            self.text = shown.unwrap_or_default();
            self.next = Box::pin(next(receiver, seen));
            // Registers for the one after.
            let _ = self.next.as_mut().poll(cx).is_ready();
        }
        &mut self.text
    }
}

/// Waits for a change of the warning that its users see, and says what they are
/// to be told. Times that only moved are not told again.
async fn next(mut warnings: watch::Receiver<Option<Warning>>, seen: Option<Warning>) -> Option<Vec<u8>> {
    let changed = warnings.wait_for(|now| now.is_some() != seen.is_some()).await;
    let Ok(now) = changed.map(|now| now.clone()) else {
        // The host is going down.
        return std::future::pending().await;
    };
    let text = match now {
        Some(warning) => format!("\r\ncocalc: {}\r\n", warning.text),
        None => "\r\ncocalc: this project goes on.\r\n".to_owned(),
    };
    Some(text.into_bytes())
}

struct MeteredRead {
    inner: BoxRead,
    tap: Tap,
    warnings: Option<Warnings>,
}

impl AsyncRead for MeteredRead {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if let Some(warnings) = &mut this.warnings {
            let text = warnings.poll(cx);
            let count = text.len().min(buffer.remaining());
            if count > 0 {
                buffer.put_slice(&text[..count]);
                text.drain(..count);
                return Poll::Ready(Ok(()));
            }
        }
        let before = buffer.filled().len();
        let read = ready!(this.inner.as_mut().poll_read(cx, buffer));
        if buffer.filled().len() > before {
            this.tap.moved();
        }
        Poll::Ready(read)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::{
        clock::SystemClock,
        memory::runner::MemoryRunner,
        runner::{Command, Pty, WindowSize},
    };

    async fn world() -> (Metered, Meters, ProjectId) {
        let clock = Arc::new(SystemClock);
        let runner = Arc::new(MemoryRunner::new(clock.clone()));
        let spec = ProjectSpec {
            project: ProjectId::random(),
            epoch: cocalc_ids::Epoch::FIRST,
            volume: "/nowhere".into(),
            image: None,
            slot: 0,
            limits: crate::runner::Limits::default(),
            env: std::collections::BTreeMap::new(),
            isolation: Default::default(),
        };
        runner.start(&spec).await.unwrap();
        let meters = Meters::new(clock);
        (Metered::new(runner, meters.clone(), Source::Ssh), meters, spec.project)
    }

    #[tokio::test]
    async fn typing_is_work_and_a_terminal_is_warned() {
        let (metered, meters, project) = world().await;
        let pty = Pty::new("xterm", WindowSize { cols: 80, rows: 24 });
        let request = ExecRequest { command: Command::Shell, pty: Some(pty), ..ExecRequest::default() };
        let mut process = metered.exec(project, request).await.unwrap();
        meters.take(project);
        process.stdin.write_all(b"echo hello\n").await.unwrap();
        process.stdin.flush().await.unwrap();
        assert_eq!(meters.take(project).work.len(), 1);
        let mut text = String::new();
        while !text.contains("hello\n") && !text.contains("hello\r\n") {
            let mut buffer = [0; 256];
            let count = process.stdout.read(&mut buffer).await.unwrap();
            assert!(count > 0, "{text}");
            text.push_str(&String::from_utf8_lossy(&buffer[..count]));
        }
        let noted = meters.take(project);
        assert!(noted.work.is_empty(), "what it shows is no work: {noted:?}");
        assert_eq!(noted.presence.len(), 1);

        // It waits for its shell, and is woken by the warning.
        let meters_too = meters.clone();
        tokio::spawn(async move {
            tokio::task::yield_now().await;
            let warning = Warning { at: Duration::from_secs(1), text: "stops soon".into() };
            meters_too.warn(project, Some(warning.clone()));
            meters_too.warn(project, Some(Warning { at: Duration::from_secs(2), ..warning }));
        });
        let mut buffer = [0; 9];
        let read = async {
            let mut text = String::new();
            while !text.contains("soon\r\n") {
                let count = process.stdout.read(&mut buffer).await.unwrap();
                text.push_str(&String::from_utf8_lossy(&buffer[..count]));
            }
            text
        };
        let text = tokio::time::timeout(Duration::from_secs(20), read).await.unwrap();
        assert!(text.contains("\r\ncocalc: stops soon\r\n"), "{text:?}");
        meters.warn(project, None);
        let mut all = Vec::new();
        while !all.ends_with(b"goes on.\r\n") {
            let count = process.stdout.read(&mut buffer).await.unwrap();
            all.extend_from_slice(&buffer[..count]);
        }
        assert!(!String::from_utf8_lossy(&all).contains("stops"), "told once");
    }

    #[tokio::test]
    async fn what_a_command_prints_is_work_and_stays_as_it_is() {
        let (metered, meters, project) = world().await;
        let command = Command::Line("echo data".into());
        let mut process =
            metered.exec(project, ExecRequest { command, ..ExecRequest::default() }).await.unwrap();
        meters.take(project);
        meters.warn(project, Some(Warning { at: Duration::ZERO, text: "stops soon".into() }));
        let mut text = String::new();
        process.stdout.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "data\n");
        assert_eq!(meters.take(project).work.len(), 1);
    }
}
