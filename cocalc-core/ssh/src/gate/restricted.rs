//! Sessions of a key or certificate that says what they may do.

use std::sync::Arc;

use async_trait::async_trait;
use cocalc_core::{
    ids::{Ports, ProjectId, Restrictions},
    runner::{Command, Error, ExecRequest, ListenAt, Process, Tool},
    stream::BoxStream,
    wake::Awake,
};

use crate::{Sessions, environment};

/// Where a forced command finds what was asked for.
const ORIGINAL_COMMAND: &str = "SSH_ORIGINAL_COMMAND";

const NOT_FORWARDED: &str = "this key or certificate does not permit that forwarding";

/// What OpenSSH calls sftp where it is built into the server.
const INTERNAL_SFTP: &str = "internal-sftp";

/// Sessions within restrictions. It is the host's, so that a proxy that passes
/// over them gains nothing.
#[derive(Debug)]
pub(crate) struct Restricted {
    sessions: Arc<dyn Sessions>,
    restrictions: Restrictions,
}

impl Restricted {
    /// Restricts `sessions`, where there is something to restrict.
    pub(crate) fn wrap(sessions: Arc<dyn Sessions>, restrictions: &Restrictions) -> Arc<dyn Sessions> {
        if restrictions.are_none() {
            return sessions;
        }
        Arc::new(Self { sessions, restrictions: restrictions.clone() })
    }

    fn permits(&self, tool: &Tool) -> bool {
        let Restrictions { ports, listen, agent, x11, .. } = &self.restrictions;
        match tool {
            Tool::Listen { place: ListenAt::Tcp(port), .. } if *port != 0 => listen.contain(*port),
            Tool::Listen { place: ListenAt::Agent, .. } => *agent,
            Tool::Listen { place: ListenAt::X11, .. } => *x11,
            Tool::Listen { .. } => *listen == Ports::All,
            // Of a listener that was permitted: nobody else knows its ticket.
            Tool::Take { .. } => true,
            _ => *ports == Ports::All,
        }
    }

    fn request(&self, mut request: ExecRequest) -> Result<ExecRequest, &'static str> {
        if request.pty.is_some() && !self.restrictions.pty {
            return Err("this key or certificate permits no terminal");
        }
        if let Command::Tool(tool) = &request.command {
            return if self.permits(tool) { Ok(request) } else { Err(NOT_FORWARDED) };
        }
        if self.restrictions.command.is_some() {
            request.env.retain(|name, _| environment::is_cosmetic(name));
        }
        // What the key's owner has set goes before what the client asks for.
        request.env.extend(self.restrictions.environment.clone());
        if let Some(forced) = &self.restrictions.command {
            match request.command {
                Command::Shell => request.env.remove(ORIGINAL_COMMAND),
                Command::Line(line) => request.env.insert(ORIGINAL_COMMAND.to_owned(), line),
                Command::Sftp => request.env.insert(ORIGINAL_COMMAND.to_owned(), INTERNAL_SFTP.to_owned()),
                _ => return Err("this key or certificate permits one command only"),
            };
            request.command = match forced.as_str() {
                INTERNAL_SFTP => Command::Sftp,
                line => Command::Line(line.to_owned()),
            };
        }
        Ok(request)
    }
}

#[async_trait]
impl Sessions for Restricted {
    async fn wake(&self, project: ProjectId) -> Awake {
        self.sessions.wake(project).await
    }

    async fn exec(&self, project: ProjectId, request: ExecRequest) -> Result<Process, Error> {
        match self.request(request) {
            Ok(request) => self.sessions.exec(project, request).await,
            Err(why) => Err(refused(project, "run a command in", why)),
        }
    }

    async fn dial(&self, project: ProjectId, port: u16) -> Result<BoxStream, Error> {
        if !self.restrictions.ports.contain(port) {
            let why = "this key or certificate does not open that port";
            return Err(refused(project, "connect to a port of", why));
        }
        self.sessions.dial(project, port).await
    }
}

fn refused(project: ProjectId, operation: &'static str, why: &'static str) -> Error {
    Error::Backend { backend: "the SSH server", operation, project, source: why.into() }
}

#[cfg(test)]
mod tests {
    use cocalc_core::runner::{Pty, WindowSize};

    use super::*;

    /// Runs nothing.
    #[derive(Debug)]
    struct Nowhere;

    #[async_trait]
    impl Sessions for Nowhere {
        async fn wake(&self, _: ProjectId) -> Awake {
            Awake::Running
        }

        async fn exec(&self, project: ProjectId, _: ExecRequest) -> Result<Process, Error> {
            Err(Error::NotRunning { project })
        }

        async fn dial(&self, project: ProjectId, _: u16) -> Result<BoxStream, Error> {
            Err(Error::NotRunning { project })
        }
    }

    fn restricted(restrictions: Restrictions) -> Restricted {
        Restricted { sessions: Arc::new(Nowhere), restrictions }
    }

    #[test]
    fn a_forced_command_is_run_instead() {
        let restrictions = Restrictions {
            command: Some("report".into()),
            environment: [("A".into(), "1".into())].into(),
            ..Restrictions::default()
        };
        let restricted = restricted(restrictions);
        for (command, original) in [
            (Command::Shell, None),
            (Command::Line("rm -rf /".into()), Some("rm -rf /")),
            (Command::Sftp, Some("internal-sftp")),
        ] {
            let env = [
                ("A".into(), "2".into()),
                (ORIGINAL_COMMAND.into(), "forged".into()),
                ("LC_ALL".into(), "C".into()),
                ("GIT_CONFIG_COUNT".into(), "1".into()),
                ("PERL5OPT".into(), "-Mevil".into()),
            ]
            .into();
            let request = ExecRequest { command, env, ..ExecRequest::default() };
            let request = restricted.request(request).unwrap();
            assert_eq!(request.command, Command::Line("report".into()));
            assert_eq!(request.env.get(ORIGINAL_COMMAND).map(String::as_str), original);
            assert_eq!(request.env["A"], "1");
            assert_eq!(request.env["LC_ALL"], "C");
            for name in ["GIT_CONFIG_COUNT", "PERL5OPT"] {
                assert!(!request.env.contains_key(name), "{name} would change what the command does");
            }
        }
        let sftp = Restrictions { command: Some("internal-sftp".into()), ..Restrictions::default() };
        let sftp = self::restricted(sftp).request(ExecRequest::default()).unwrap();
        assert_eq!(sftp.command, Command::Sftp);
        let argv = ExecRequest { command: Command::Argv(vec!["sh".into()]), ..ExecRequest::default() };
        assert!(restricted.request(argv).is_err());
    }

    #[tokio::test]
    async fn terminals_and_ports_are_refused() {
        let project = ProjectId::from_bytes([1; 16]);
        let restrictions =
            Restrictions { pty: false, ports: Ports::Only([80].into()), ..Restrictions::default() };
        let restricted = restricted(restrictions);
        let pty = Pty::new("xterm", WindowSize { cols: 80, rows: 24 });
        let request = ExecRequest { pty: Some(pty), ..ExecRequest::default() };
        assert!(matches!(restricted.exec(project, request).await, Err(Error::Backend { .. })));
        let plain = restricted.exec(project, ExecRequest::default()).await;
        assert!(matches!(plain, Err(Error::NotRunning { .. })));
        assert!(matches!(restricted.dial(project, 22).await, Err(Error::Backend { .. })));
        assert!(matches!(restricted.dial(project, 80).await, Err(Error::NotRunning { .. })));
    }

    #[test]
    fn forwarding_is_refused_where_it_is_not_permitted() {
        let listen = |place| Tool::Listen { place, ticket: "x".into() };
        let every = [
            listen(ListenAt::Tcp(80)),
            listen(ListenAt::Tcp(0)),
            listen(ListenAt::Unix("/x".into())),
            listen(ListenAt::Agent),
            listen(ListenAt::X11),
            Tool::ConnectUnix { path: "/x".into() },
            Tool::ConnectTcp { host: "x".into(), port: 1 },
        ];
        let permitted = |restrictions: Restrictions| {
            let restricted = restricted(restrictions);
            let allowed = |tool: &Tool| {
                let command = Command::Tool(tool.clone());
                restricted.request(ExecRequest { command, ..ExecRequest::default() }).is_ok()
            };
            every.iter().map(allowed).collect::<Vec<_>>()
        };
        assert_eq!(permitted(Restrictions::all()), [false; 7]);
        // A forced command says nothing about forwarding.
        let forced = Restrictions { command: Some("x".into()), ..Restrictions::default() };
        assert_eq!(permitted(forced), [true; 7]);
        let some = Restrictions { listen: Ports::Only([80].into()), agent: true, ..Restrictions::all() };
        assert_eq!(permitted(some), [true, false, false, true, false, false, false]);
    }
}
