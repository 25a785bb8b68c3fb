//! Looking inside a project: apps, logs, what it uses.

use cocalc_core::{
    control::{CommandError, ErrorCode, HostReply, InsideCommand, InsideReply},
    ids::{Epoch, ProjectId},
    moves::host::runner_error,
    runner,
};

use super::Lifecycle;
use crate::{apps::Apps, secrets::Secrets};

/// The most lines of a log, and the most bytes: they have to fit a frame.
const LINES_MAX: usize = 10_000;
const LOG_BYTES_MAX: usize = 128 << 10;

/// What looks inside projects.
#[derive(Clone, Debug)]
pub(crate) struct Inside {
    pub(crate) apps: Option<Apps>,
    pub(crate) secrets: Option<Secrets>,
}

impl Lifecycle {
    pub(super) async fn look_inside(
        &self,
        project: ProjectId,
        epoch: Epoch,
        what: InsideCommand,
    ) -> Result<HostReply, CommandError> {
        self.ledger.permit(project, epoch)?;
        let answer = self.find_inside(project, what).await?;
        Ok(HostReply::Inside { project, answer })
    }

    fn apps(&self) -> Result<&Apps, CommandError> {
        let apps = self.inside.as_ref().and_then(|inside| inside.apps.as_ref());
        apps.ok_or_else(|| CommandError {
            code: ErrorCode::Unavailable,
            message: "this host's runner supervises no apps".to_owned(),
        })
    }

    async fn find_inside(
        &self,
        project: ProjectId,
        what: InsideCommand,
    ) -> Result<InsideReply, CommandError> {
        let no_app = |name| CommandError {
            code: ErrorCode::NotFound,
            message: format!("project {project} does not run, or declares no app {name}"),
        };
        Ok(match what {
            InsideCommand::Apps => {
                let (apps, complaint) = self.apps()?.list(project);
                InsideReply::Apps { apps, complaint }
            }
            InsideCommand::AppOutput { name, offset } => {
                let found = self.apps()?.output(project, &name, offset).await.map_err(runner_error)?;
                let output = found.ok_or_else(|| no_app(&name))?;
                let next = output.offset.saturating_add(u64::try_from(output.bytes.len()).unwrap_or(0));
                let text = String::from_utf8_lossy(&output.bytes).into_owned();
                InsideReply::AppOutput { offset: output.offset, text, next }
            }
            InsideCommand::RestartApp { name } => {
                match self.apps()?.restart(project, &name).await.map_err(runner_error)? {
                    true => InsideReply::Restarted,
                    false => return Err(no_app(&name)),
                }
            }
            InsideCommand::Logs { lines } => {
                let mut text = self.runner.logs(project, lines.min(LINES_MAX)).await.map_err(runner_error)?;
                let mut from = text.len().saturating_sub(LOG_BYTES_MAX);
                while !text.is_char_boundary(from) {
                    from += 1;
                }
                InsideReply::Logs { text: text.split_off(from) }
            }
            InsideCommand::Stats => {
                let stats = match self.runner.stats(project).await {
                    Ok(stats) => Some(stats),
                    Err(runner::Error::NotRunning { .. }) => None,
                    Err(error) => return Err(runner_error(error)),
                };
                InsideReply::Stats { stats, usage: self.storage.usage(project).await.ok() }
            }
        })
    }
}
