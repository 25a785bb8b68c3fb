//! Brings the secrets of projects from the master into the memory of projects.
//!
//! They come sealed to this host's key, are opened here and written, by a process
//! of the project's ordinary user, to the memory file system at `/run/secrets`.
//! They are on no disk of this host, in no environment, and not known to podman.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use cocalc_auth_sealed::{Opener, Purpose, Sealed};
use cocalc_core::{
    bus::{Bus, Payload},
    connector::Peer,
    control::{PeerReply, PeerRequest, SECRETS_PURPOSE, api_subject},
    grant::Ledger,
    ids::{Epoch, HostId, ProjectId},
    runner::{Command, ExecRequest, Exit, Runner},
};
use tokio::io::AsyncWriteExt;
use zeroize::Zeroizing;

use crate::startup::BeforeStartup;

/// How long the master may take, and how long writing one file may.
const MASTER_LIMIT: Duration = Duration::from_secs(5);
const WRITE_LIMIT: Duration = Duration::from_secs(15);
/// How often a master that does not answer is asked again, and for how long.
const AGAIN: Duration = Duration::from_secs(10);
const TRIES: u32 = 360;

/// Writes the one argument's file anew from standard input, whole or not at all.
const WRITE: &str = "umask 077; t=/run/secrets/.$1.new; cat >\"$t\" && mv -f -- \"$t\" \"/run/secrets/$1\"";
/// Removes what is not among the arguments.
const TIDY: &str = "cd /run/secrets || exit 0; for f in * .[!.]*; do k=0; for n in \"$@\"; do \
    [ \"$f\" = \"$n\" ] && k=1; done; [ $k = 1 ] || rm -f -- \"$f\"; done";

/// Why secrets did not get where they belong.
#[derive(Debug, thiserror::Error)]
enum SecretsError {
    #[error("the master does not answer")]
    Away,
    #[error("the master refused: {0}")]
    Refused(String),
    #[error("they are not sealed for this host, project and epoch")]
    Sealed(#[from] cocalc_auth_sealed::OpenError),
    #[error("they make no sense")]
    Format,
    #[error("they could not be written in the project")]
    Runner(#[from] cocalc_core::runner::Error),
    #[error("the project did not take them: {0}")]
    NotTaken(String),
}

/// Brings secrets. Clones share it.
#[derive(Clone)]
pub(crate) struct Secrets(Arc<Inner>);

pub(crate) struct Inner {
    pub(crate) host: HostId,
    pub(crate) opener: Opener,
    pub(crate) bus: Arc<dyn Bus>,
    pub(crate) ledger: Ledger,
    pub(crate) runner: Arc<dyn Runner>,
    /// One at a time for each project, and what came last, still sealed: for a
    /// start while the master is away.
    turns: Mutex<BTreeMap<ProjectId, Turn>>,
}

type Turn = Arc<tokio::sync::Mutex<Option<(Epoch, Sealed)>>>;

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Secrets").field("host", &self.0.host).finish_non_exhaustive()
    }
}

impl Secrets {
    pub(crate) fn new(
        host: HostId,
        opener: Opener,
        bus: Arc<dyn Bus>,
        ledger: Ledger,
        runner: Arc<dyn Runner>,
    ) -> Self {
        Self(Arc::new(Inner { host, opener, bus, ledger, runner, turns: Mutex::default() }))
    }

    /// Brings a project that runs what it is to have now, in the background, for as
    /// long as it takes the master to answer.
    pub(crate) fn refresh(&self, project: ProjectId) {
        let secrets = self.clone();
        tokio::spawn(async move {
            for _ in 0..TRIES {
                match secrets.bring(project, false).await {
                    Err(SecretsError::Away) => tokio::time::sleep(AGAIN).await,
                    outcome => return tell(project, outcome),
                }
            }
        });
    }

    /// Brings them once. With `kept`, those of the last time will do.
    async fn bring(&self, project: ProjectId, kept: bool) -> Result<(), SecretsError> {
        // Elsewhere there is no memory that is a project's alone.
        if !self.0.runner.capabilities().isolation {
            return Ok(());
        }
        let Some(epoch) = self.0.ledger.entry(project).and_then(|entry| entry.may_run()) else {
            return Ok(());
        };
        let turn =
            self.0.turns.lock().unwrap_or_else(PoisonError::into_inner).entry(project).or_default().clone();
        let mut last = turn.lock().await;
        let sealed = match (self.fetch(project, epoch).await, &*last) {
            (Err(SecretsError::Away), Some((of, sealed))) if kept && *of == epoch => sealed.clone(),
            (fetched, _) => fetched?,
        };
        let purpose = Purpose { what: SECRETS_PURPOSE, host: self.0.host, project, epoch };
        let opened = self.0.opener.open(&purpose, &sealed)?;
        *last = Some((epoch, sealed));
        let secrets: BTreeMap<String, Zeroizing<String>> =
            serde_json::from_slice::<BTreeMap<String, String>>(&opened)
                .map_err(|_| SecretsError::Format)?
                .into_iter()
                .map(|(name, value)| (name, Zeroizing::new(value)))
                .collect();
        if secrets.keys().any(|name| !cocalc_core::control::is_secret_name(name)) {
            return Err(SecretsError::Format);
        }
        for (name, value) in &secrets {
            self.run(project, WRITE, &[name], value.as_bytes()).await?;
        }
        let names: Vec<&str> = secrets.keys().map(String::as_str).collect();
        self.run(project, TIDY, &names, b"").await
    }

    async fn fetch(&self, project: ProjectId, epoch: Epoch) -> Result<Sealed, SecretsError> {
        let request = PeerRequest::Secrets { project, epoch };
        let payload = Payload::json(&request).map_err(|_| SecretsError::Format)?;
        let subject = api_subject(Peer::Host(self.0.host));
        let answer = self.0.bus.request(&subject, payload, MASTER_LIMIT).await;
        match answer.map_err(|_| SecretsError::Away)?.payload.parse() {
            Ok(PeerReply::Secrets { sealed }) => {
                serde_json::from_value(sealed.into()).map_err(|_| SecretsError::Format)
            }
            Ok(PeerReply::Error { message }) => Err(SecretsError::Refused(message)),
            _ => Err(SecretsError::Format),
        }
    }

    /// Runs a script of ours as the project's user.
    async fn run(
        &self,
        project: ProjectId,
        script: &str,
        arguments: &[&str],
        input: &[u8],
    ) -> Result<(), SecretsError> {
        let argv = [&["/bin/sh", "-c", script, "sh"], arguments].concat();
        let argv = argv.into_iter().map(str::to_owned).collect();
        let request = ExecRequest { command: Command::Argv(argv), ..ExecRequest::default() };
        let work = async {
            let mut process = self.0.runner.exec(project, request).await?;
            // A process that does not read says so by its end.
            let _ = process.stdin.write_all(input).await;
            let _ = process.stdin.shutdown().await;
            drop(process.stdin);
            match process.handle.wait().await? {
                Exit::Code(0) => Ok(()),
                exit => Err(SecretsError::NotTaken(format!("{exit:?}"))),
            }
        };
        tokio::time::timeout(WRITE_LIMIT, work)
            .await
            .unwrap_or_else(|_| Err(SecretsError::NotTaken("it took too long".to_owned())))
    }
}

fn tell(project: ProjectId, outcome: Result<(), SecretsError>) {
    match outcome {
        // There was nothing to bring them to.
        Ok(()) | Err(SecretsError::Runner(cocalc_core::runner::Error::NotRunning { .. })) => {}
        Err(error) => {
            tracing::warn!(%project, error = %cocalc_core::chain(&error), "its secrets are not all there");
        }
    }
}

#[async_trait]
impl BeforeStartup for Secrets {
    async fn before_startup(&self, project: ProjectId) {
        match self.bring(project, true).await {
            Err(SecretsError::Away) => self.refresh(project),
            outcome => tell(project, outcome),
        }
    }
}
