//! The command line's grammar. Grown, never renamed: scripts depend on it.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Federated collaborative computing.
#[derive(Debug, Parser)]
#[command(name = "cocalc", version, propagate_version = true)]
pub(crate) struct Arguments {
    /// The master's address.
    #[arg(long, global = true, env = "COCALC_URL")]
    pub(crate) url: Option<String>,
    /// An API token.
    #[arg(long, global = true, env = "COCALC_TOKEN", hide_env_values = true)]
    pub(crate) token: Option<String>,
    /// How results are printed.
    #[arg(long, global = true, value_enum, default_value_t = Output::Table)]
    pub(crate) output: Output,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// How results are printed.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum Output {
    /// For people.
    Table,
    /// For programs: the API's own JSON.
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a whole federation on this machine.
    Up(UpOptions),
    /// Clean up after `cocalc up`, however it ended.
    Down(DirOption),
    /// Say what this machine can and cannot do, and what would mend it.
    Doctor(DirOption),
    /// Remember a master and a token.
    Login {
        /// The master's address.
        #[arg(long)]
        url: String,
        /// An API token.
        #[arg(long, required_unless_present_any = ["name", "oidc"])]
        token: Option<String>,
        /// Log in with this name; the password is the first line of standard
        /// input, or COCALC_PASSWORD.
        #[arg(long, conflicts_with = "token")]
        name: Option<String>,
        /// Log in with this OpenID provider, in a browser on this machine.
        #[arg(long, conflicts_with_all = ["token", "name"])]
        oidc: Option<String>,
        #[command(flatten)]
        browser: BrowserOptions,
    },
    /// End the log-in, with what was opened under it everywhere, and forget it.
    Logout {
        #[command(flatten)]
        wait: WaitOptions,
    },
    /// Projects.
    #[command(subcommand)]
    Project(Project),
    /// Snapshots of a project.
    #[command(subcommand)]
    Snapshot(Snapshot),
    /// Images: the root file systems that projects are made from.
    #[command(subcommand)]
    Image(Image),
    /// Backups of a project.
    #[command(subcommand)]
    Backup(Backup),
    /// Project-hosts.
    #[command(subcommand)]
    Host(Host),
    /// Who may use a project.
    #[command(subcommand)]
    Collaborator(Collaborator),
    /// SSH keys of an account.
    #[command(subcommand)]
    Key(Key),
    /// Long-running work.
    #[command(subcommand)]
    Operation(Operation),
    /// Accounts, for administrators.
    #[command(subcommand)]
    Account(Account),
    /// The keys that sign connect tokens and SSH certificates, for
    /// administrators.
    #[command(subcommand)]
    Keys(Keys),
    /// Print lines for ~/.ssh/known_hosts, after which ssh asks nobody about a
    /// fingerprint of this federation.
    SshKnownHosts {
        /// The names that the lines are for, as known_hosts has patterns, for
        /// instance `*.example.com`; otherwise those of the hosts and proxies
        /// that there are now.
        #[arg(long, value_delimiter = ',')]
        pattern: Vec<String>,
    },
    /// Print a host entry of ~/.ssh/config for each of your projects, by its id
    /// and its name. Through a proxy, if there is one, and end to end: the
    /// proxy passes the connection on and reads none of it.
    SshConfig {
        /// Lead directly to the hosts.
        #[arg(long)]
        direct: bool,
        /// The private key to use; otherwise ssh's own choice.
        #[arg(long)]
        identity: Option<std::path::PathBuf>,
    },
    /// Show where a revocation is in force.
    Receipt {
        id: String,
        #[command(flatten)]
        wait: WaitOptions,
    },
    /// The record of who was let in and who was not, and of who changed what, in
    /// the data directory of a host, a proxy or the master.
    #[command(subcommand)]
    Audit(Audit),
    /// Print a completion script for a shell.
    Completion {
        /// Which shell.
        shell: clap_complete::Shell,
    },
}

/// How a browser is asked to open an address.
#[derive(Clone, Debug, Args)]
pub(crate) struct BrowserOptions {
    /// Only print the address to open.
    #[arg(long)]
    pub(crate) no_browser: bool,
    /// Give up after so many seconds.
    #[arg(long, default_value_t = 600)]
    pub(crate) browser_timeout: u64,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct DirOption {
    /// Where the federation keeps everything.
    #[arg(long, default_value = "./cocalc-data")]
    pub(crate) dir: PathBuf,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct UpOptions {
    #[command(flatten)]
    pub(crate) dir: DirOption,
    /// Exercise everything end to end, say what was done, tear down.
    #[arg(long)]
    pub(crate) once: bool,
    /// The master's port; the others follow from it.
    #[arg(long, default_value_t = 7800, value_parser = clap::value_parser!(u16).range(1024..=65000))]
    pub(crate) base_port: u16,
    /// How many hosts.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=20))]
    pub(crate) hosts: u16,
    /// Where projects' files are kept.
    #[arg(long, value_enum, default_value_t = StorageKind::Auto)]
    pub(crate) storage: StorageKind,
    /// What runs projects.
    #[arg(long, value_enum, default_value_t = RunnerKind::Auto)]
    pub(crate) runner: RunnerKind,
}

/// Where projects' files are kept.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum StorageKind {
    /// A loopback Btrfs volume per host.
    Btrfs,
    /// A plain directory per host: no quotas, no delta moves.
    Directory,
    /// Btrfs where it can be had.
    Auto,
}

/// What runs projects.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum RunnerKind {
    /// Containers.
    Podman,
    /// Plain processes: no isolation.
    Process,
    /// Podman where it can be had.
    Auto,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Project {
    /// Create a project.
    Create {
        /// Its title.
        name: String,
        /// On this host; otherwise the master chooses.
        #[arg(long)]
        host: Option<String>,
        /// With this image, by name or digest; otherwise the host's default.
        #[arg(long)]
        image: Option<String>,
        /// Start it, too.
        #[arg(long)]
        start: bool,
    },
    /// List the projects you may use.
    List,
    /// Show one.
    Show { id: String },
    /// Start it and wait until it runs.
    Start { id: String },
    /// Stop it and wait until it has stopped.
    Stop { id: String },
    /// Delete it, with its snapshots.
    Delete { id: String },
    /// Give it a name under which `ssh NAME@...` reaches it besides its id.
    Alias {
        id: String,
        /// 3 to 32 of a-z, 0-9 and -, beginning with a letter; no other project
        /// has it.
        #[arg(required_unless_present = "remove")]
        name: Option<String>,
        /// It has no such name any more.
        #[arg(long, conflicts_with = "name")]
        remove: bool,
    },
    /// Run a command in it; exits with the command's status.
    Exec {
        id: String,
        /// Through the proxy rather than directly at the host.
        #[arg(long)]
        via_proxy: bool,
        /// The command and its arguments.
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Open a shell in it, or run a command line; no key needed: one that lives
    /// in memory is certified for five minutes.
    Ssh {
        id: String,
        /// Through the proxy rather than directly at the host.
        #[arg(long)]
        via_proxy: bool,
        /// A command line; otherwise a shell.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Have a public SSH key certified for it, for a few minutes, and write the
    /// certificate beside it, where ssh finds it: FILE-cert.pub.
    SshCertificate {
        id: String,
        /// The public key, such as ~/.ssh/id_ed25519.pub.
        file: PathBuf,
        /// How long it lasts, in seconds, at most 3600; otherwise 300.
        #[arg(long)]
        ttl: Option<u32>,
        /// The addresses and networks from which it is good; otherwise all.
        #[arg(long)]
        source_address: Option<String>,
        /// The only command that it runs; otherwise any.
        #[arg(long)]
        force_command: Option<String>,
        /// Without terminals.
        #[arg(long)]
        no_pty: bool,
        /// Without connections to its ports.
        #[arg(long)]
        no_port_forwarding: bool,
    },
    /// Print an address that opens one of its ports in a browser.
    Open {
        id: String,
        /// The port that the app listens on.
        #[arg(long)]
        port: Option<u16>,
        /// Through the proxy rather than directly at the host.
        #[arg(long)]
        via_proxy: bool,
    },
    /// Print a connect token.
    Token {
        id: String,
        /// Only these scopes.
        #[arg(long, value_delimiter = ',')]
        scopes: Vec<String>,
        /// How long it lasts, in seconds, at most 300.
        #[arg(long)]
        ttl: Option<u32>,
        /// Good for one use.
        #[arg(long)]
        once: bool,
    },
    /// Move it to another host.
    Move {
        id: String,
        /// The host, by name or id.
        #[arg(long)]
        to: String,
    },
    /// Say why it runs, or why not, and when it will be stopped.
    Why { id: String },
    /// List the apps that it declares in ~/.cocalc/apps.toml, or end one so that
    /// it is started anew.
    Apps {
        id: String,
        /// Start this one anew.
        #[arg(long)]
        restart: Option<String>,
    },
    /// Print what its first process, or one of its apps, has written.
    Logs {
        id: String,
        /// Of this app.
        #[arg(long)]
        app: Option<String>,
        /// Go on until interrupted.
        #[arg(long)]
        follow: bool,
        /// At most so many of the last lines; not of an app.
        #[arg(long, default_value_t = 1000)]
        lines: u32,
    },
    /// Say what it uses: processor, memory, disks and network.
    Stats { id: String },
    /// Environment variables of its processes, which every member reads.
    #[command(subcommand)]
    Env(Variable),
    /// Secrets: files in memory at /run/secrets, whose values nobody is shown.
    #[command(subcommand)]
    Secret(Variable),
    /// Have it run on, whether it is used or not.
    Keep {
        id: String,
        /// For how long from now, for instance 90m, 2h or 1d; 0 takes it back.
        #[arg(long = "for", default_value = "2h", value_name = "TIME")]
        time: String,
    },
    /// Show or change when it is stopped for being idle.
    Idle {
        id: String,
        /// After how long without use, for instance 30m; `never`, or `default`
        /// for what its plan or host does.
        #[arg(long)]
        timeout: Option<String>,
        /// The longest that its plan permits; for administrators.
        #[arg(long)]
        plan: Option<String>,
    },
    /// Show or change how it may be reached.
    Access {
        id: String,
        /// The ports whose apps viewers may see, and no others; `none` for none.
        #[arg(long, value_delimiter = ',')]
        viewable_ports: Option<Vec<String>>,
        /// How long its host lets people in without the master, after the
        /// lease, in seconds; `default` for the federation's.
        #[arg(long)]
        grace: Option<String>,
        /// Whether a proxy may attest SSH keys for it.
        #[arg(long)]
        proxy_ssh: Option<bool>,
        /// Whether the keys in its own ~/.ssh/authorized_keys open it: whoever
        /// writes there lets in whom they like.
        #[arg(long)]
        authorized_keys: Option<bool>,
        #[command(flatten)]
        wait: WaitOptions,
    },
    /// Show or change what it may use; a running project has it at once.
    Limits(crate::verbs::Limits),
    /// Show or change how it is kept apart: sudo, and what it reaches outside.
    Isolation(crate::verbs::Isolation),
    /// Copy a file or directory from one project to another on the same host.
    Copy {
        /// ID:PATH, the path as `snapshot diff` writes it, for instance
        /// `…:home/data`.
        source: String,
        /// ID:PATH; a path that ends in / is a directory to copy into.
        destination: String,
        /// From this snapshot of the source, rather than its present state.
        #[arg(long)]
        snapshot: Option<String>,
        /// Replace what is there.
        #[arg(long)]
        replace: bool,
    },
    /// Make a new project of yours that is a copy of this one, on its host.
    Clone {
        id: String,
        /// The new one's title; otherwise the same.
        #[arg(long)]
        name: Option<String>,
        /// Of this snapshot, rather than of the present state.
        #[arg(long)]
        snapshot: Option<String>,
    },
    /// Show its image, or give it another. Its home stays; what was installed
    /// on the former image is there again when it goes back to that.
    Image {
        id: String,
        /// The image, by name or digest.
        #[arg(long)]
        set: Option<String>,
        /// Stop and start it for that if it runs.
        #[arg(long, requires = "set")]
        restart: bool,
    },
    /// Say what it takes, and what it may.
    Usage {
        id: String,
        /// Count its files, too: what is its own, and what is shared.
        #[arg(long)]
        du: bool,
    },
}

/// A named value of a project.
#[derive(Debug, Subcommand)]
pub(crate) enum Variable {
    /// Set one.
    Set {
        id: String,
        name: String,
        /// Its value; otherwise it is read from standard input, and is not seen
        /// by others on this machine.
        value: Option<String>,
    },
    /// Remove one.
    Unset { id: String, name: String },
    /// List them.
    List { id: String },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Image {
    /// List them, and on how many hosts they are.
    List,
    /// Have a host pull one from a registry.
    Pull {
        /// With its registry, for instance docker.io/library/debian:12.
        reference: String,
        /// What it is called here.
        #[arg(long)]
        name: Option<String>,
        /// On this host; otherwise the master chooses.
        #[arg(long)]
        host: Option<String>,
    },
    /// Have a host build one from Debian packages.
    Build {
        /// The recipe: TOML with suite, packages, mirror and run.
        recipe: PathBuf,
        /// What it is called here.
        #[arg(long)]
        name: Option<String>,
        /// On this host; otherwise the master chooses.
        #[arg(long)]
        host: Option<String>,
    },
    /// Have a host import an archive from its directory for images.
    Import {
        /// The file's name there: a root file system as tar, or what
        /// `podman save` or `docker save` wrote.
        file: String,
        /// What it is called here.
        #[arg(long)]
        name: Option<String>,
        /// The host; otherwise the master chooses.
        #[arg(long)]
        host: Option<String>,
    },
    /// Have a host fetch one from another host now, rather than when a project
    /// needs it.
    Fetch {
        /// By name or digest.
        image: String,
        /// Which host.
        #[arg(long)]
        host: String,
    },
    /// Keep one, used or not.
    Pin {
        /// By name or digest.
        image: String,
        /// On this host only.
        #[arg(long)]
        host: Option<String>,
    },
    /// Keep one no longer than it is used.
    Unpin {
        /// By name or digest.
        image: String,
        /// On this host only.
        #[arg(long)]
        host: Option<String>,
    },
    /// Give one a name, which another loses.
    Name {
        /// By name or digest.
        image: String,
        /// The name.
        name: String,
    },
    /// Delete those that nobody uses and nobody has pinned.
    Prune {
        /// For how many days nobody has used them; otherwise 30.
        #[arg(long)]
        unused_days: Option<u32>,
        /// Only say which would go.
        #[arg(long)]
        dry_run: bool,
        /// On this host only.
        #[arg(long)]
        host: Option<String>,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Snapshot {
    /// Take one.
    Create {
        project: String,
        /// Its name; otherwise the time.
        #[arg(long)]
        name: Option<String>,
    },
    /// List them.
    List { project: String },
    /// Delete one.
    Delete { project: String, name: String },
    /// Go back to one, keeping the present state as another; the project must
    /// be stopped, unless only one path is brought back.
    Restore {
        project: String,
        name: String,
        /// Only this file or directory, as `snapshot diff` writes it.
        #[arg(long)]
        path: Option<String>,
    },
    /// Say what is different from one.
    Diff {
        project: String,
        name: String,
        /// To this one, rather than to the present state.
        #[arg(long)]
        to: Option<String>,
    },
    /// Show how automatic ones are kept, or change it.
    Policy(Policy),
}

#[derive(Debug, Args)]
pub(crate) struct Policy {
    pub(crate) project: String,
    /// Do as its host does.
    #[arg(long)]
    pub(crate) reset: bool,
    #[command(flatten)]
    pub(crate) fields: PolicyFields,
}

/// What a policy says; what is left out stays.
#[derive(Clone, Debug, Default, Args, serde::Serialize)]
pub(crate) struct PolicyFields {
    /// Whether any are taken.
    #[arg(long, conflicts_with = "reset")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) enabled: Option<bool>,
    /// How often one is taken, if anything has changed.
    #[arg(long, conflicts_with = "reset")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) interval_secs: Option<u32>,
    /// Of how many of the last intervals one is kept.
    #[arg(long, conflicts_with = "reset")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) frequent: Option<u16>,
    /// Of how many hours.
    #[arg(long, conflicts_with = "reset")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) hourly: Option<u16>,
    /// Of how many days.
    #[arg(long, conflicts_with = "reset")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) daily: Option<u16>,
    /// Of how many weeks.
    #[arg(long, conflicts_with = "reset")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) weekly: Option<u16>,
    /// Of how many months.
    #[arg(long, conflicts_with = "reset")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) monthly: Option<u16>,
    /// What they may take beyond the plan, in percent of it.
    #[arg(long, conflicts_with = "reset")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) allowance_percent: Option<u16>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Backup {
    /// Back up its present state, and wait until that is done.
    Create { project: String },
    /// List them.
    List { project: String },
    /// Show what is in a directory of one.
    Ls {
        project: String,
        /// Its id, the beginning of it, or `latest`.
        backup: String,
        /// Which directory, for instance `home/data`; otherwise the root.
        path: Option<String>,
    },
    /// Find what in one has a name that contains a text, in either case.
    Find {
        project: String,
        /// Its id, the beginning of it, or `latest`.
        backup: String,
        text: String,
    },
    /// Say what is different now from one.
    Diff {
        project: String,
        /// Its id, the beginning of it, or `latest`.
        backup: String,
        /// Only below this directory.
        #[arg(long)]
        path: Option<String>,
    },
    /// Restore one, or all that a host had which is lost.
    Restore(Restore),
    /// Take one off the list; its space returns with a later `prune`.
    Delete {
        project: String,
        /// Its id, or the beginning of it.
        backup: String,
    },
    /// Forget those that the policy does not keep, and delete what nothing needs.
    Prune { project: String },
    /// Look for damage; fails if there is any.
    Check {
        project: String,
        /// Read and verify all data, not only what leads to it.
        #[arg(long)]
        read_data: bool,
    },
    /// Try out whether the newest backup can be restored, for administrators.
    Drill {
        /// Of this project; otherwise of one by chance.
        project: Option<String>,
        /// Of one on this host.
        #[arg(long)]
        host: Option<String>,
    },
    /// Show when a project is backed up and which are kept, or change it.
    Policy(BackupPolicy),
    /// Print what restores a project's backups without this federation, with
    /// restic or rustic, for administrators. Keep it secret.
    Escrow {
        project: String,
        /// Write it to this new file, which only you may read, rather than
        /// print it.
        #[arg(long)]
        file: Option<PathBuf>,
    },
    /// Delete all backups of a project at once, for administrators.
    Erase {
        project: String,
        /// Do not ask.
        #[arg(long)]
        yes: bool,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Restore {
    /// The project whose backup it is.
    #[arg(required_unless_present = "all_of")]
    pub(crate) project: Option<String>,
    /// The backup's id, the beginning of it, or `latest`.
    #[arg(default_value = "latest")]
    pub(crate) backup: String,
    /// Only this file or directory, as `backup ls` writes it; otherwise all, in
    /// the place of what is there, which is kept as a snapshot.
    #[arg(long, conflicts_with_all = ["new", "all_of"])]
    pub(crate) path: Option<String>,
    /// Put it there; otherwise where it was.
    #[arg(long, requires = "path")]
    pub(crate) target: Option<String>,
    /// Replace what is there.
    #[arg(long, requires = "path")]
    pub(crate) replace: bool,
    /// As a new project of yours, with this title.
    #[arg(long, value_name = "NAME", conflicts_with = "all_of")]
    pub(crate) new: Option<String>,
    /// The new project's host.
    #[arg(long, requires = "new")]
    pub(crate) host: Option<String>,
    /// Bring the projects of this host up elsewhere, each from its newest
    /// backup; the host must be fenced. For administrators.
    #[arg(long, value_name = "HOST", conflicts_with = "project")]
    pub(crate) all_of: Option<String>,
    /// To these hosts; otherwise wherever there is room.
    #[arg(long, requires = "all_of", value_delimiter = ',', num_args = 1..)]
    pub(crate) to: Vec<String>,
    /// Do not ask before all files of a project are replaced.
    #[arg(long)]
    pub(crate) yes: bool,
    /// Do not wait until it is done.
    #[arg(long)]
    pub(crate) no_wait: bool,
}

#[derive(Debug, Args)]
pub(crate) struct BackupPolicy {
    pub(crate) project: String,
    /// Do as the master's configuration says.
    #[arg(long)]
    pub(crate) reset: bool,
    #[command(flatten)]
    pub(crate) fields: BackupPolicyFields,
}

/// What a policy says; what is left out stays.
#[derive(Clone, Debug, Default, Args, serde::Serialize)]
pub(crate) struct BackupPolicyFields {
    /// Whether it is backed up by itself, and old backups go by themselves.
    #[arg(long, conflicts_with = "reset")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) enabled: Option<bool>,
    /// How long after a change it is backed up at the latest: 300 to 604800.
    #[arg(long, conflicts_with = "reset")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) rpo_secs: Option<u32>,
    /// Of how many hours one is kept.
    #[arg(long, conflicts_with = "reset")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) hourly: Option<u16>,
    /// Of how many days.
    #[arg(long, conflicts_with = "reset")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) daily: Option<u16>,
    /// Of how many weeks.
    #[arg(long, conflicts_with = "reset")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) weekly: Option<u16>,
    /// Of how many months.
    #[arg(long, conflicts_with = "reset")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) monthly: Option<u16>,
    /// How many of those that people asked for are kept besides.
    #[arg(long, conflicts_with = "reset")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) manual: Option<u16>,
    /// What is left out: a pattern as in .gitignore; may be given several
    /// times, and empty for nothing.
    #[arg(long, conflicts_with = "reset", value_name = "PATTERN")]
    #[serde(skip)]
    pub(crate) exclude: Vec<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Host {
    /// List them.
    List,
    /// Show one.
    Show { id: String },
    /// Print a one-use token with which a host or proxy joins.
    JoinToken {
        /// For a proxy rather than a host.
        #[arg(long)]
        proxy: bool,
        /// How long it lasts, in seconds.
        #[arg(long, default_value_t = 3600)]
        ttl: u32,
    },
    /// Place nothing new on it.
    Cordon { id: String },
    /// Place on it again.
    Uncordon { id: String },
    /// Say that it is dead: it gets no lease, and what it had may be restored
    /// elsewhere, by `backup restore --all-of`. If it comes back it keeps aside
    /// what others have by then.
    Fence {
        id: String,
        /// What shows that it is dead; kept, and audited.
        #[arg(long)]
        reason: String,
        /// Attest it here, rather than by typing the host's name when asked.
        #[arg(long)]
        attest: bool,
    },
    /// Take that back.
    Unfence { id: String },
    /// Print a one-use token with which it comes with another identity key.
    RotateKey {
        id: String,
        /// A proxy rather than a host.
        #[arg(long)]
        proxy: bool,
        /// How long the token lasts, in seconds.
        #[arg(long, default_value_t = 3600)]
        ttl: u32,
    },
    /// Let it in no more, and close its connections.
    Withdraw {
        id: String,
        /// A proxy rather than a host.
        #[arg(long)]
        proxy: bool,
        /// Even if it owns projects, which nobody can reach then.
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        wait: WaitOptions,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Collaborator {
    /// Let an account use a project.
    Add {
        project: String,
        account: String,
        /// As what: viewer, collaborator or owner.
        #[arg(long, default_value = "collaborator")]
        role: String,
    },
    /// End an account's use of a project, open connections included.
    Remove {
        project: String,
        account: String,
        #[command(flatten)]
        wait: WaitOptions,
    },
    /// List who may use a project.
    List { project: String },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Key {
    /// Add a public key.
    Add {
        /// A file such as ~/.ssh/id_ed25519.pub. Options in front of the key
        /// (`from=`, `command=`, `no-pty`, …) are honoured, or the key refused.
        file: PathBuf,
        /// For one project only.
        #[arg(long)]
        project: Option<String>,
    },
    /// List them.
    List,
    /// Remove one.
    Remove { id: String },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Operation {
    /// List recent ones.
    List,
    /// Show one.
    Show { id: String },
    /// Wait until it ends.
    Wait {
        id: String,
        /// Give up waiting after so many seconds.
        #[arg(long, default_value_t = 600)]
        timeout: u64,
    },
    /// Ask for its end.
    Cancel { id: String },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Account {
    /// Create an account and print a token for it.
    Create { name: String },
    /// List accounts.
    List,
    /// End every session of an account, everywhere.
    SignOut {
        id: String,
        #[command(flatten)]
        wait: WaitOptions,
    },
    /// Forbid an account everything.
    Ban {
        id: String,
        #[command(flatten)]
        wait: WaitOptions,
    },
    /// Allow a banned account again.
    Unban { id: String },
    /// Keys for programs that call the master.
    #[command(subcommand)]
    ApiKey(ApiKey),
    /// OpenID providers with which the account logs in.
    #[command(subcommand)]
    Identity(Identity),
    /// Set the name and password to log in with; the password is the first line
    /// of standard input, or COCALC_PASSWORD. The one of before, if there is
    /// one, is COCALC_CURRENT_PASSWORD; administrators need not know it.
    Password {
        /// The name to log in with.
        #[arg(long)]
        login: String,
        /// Of this account; otherwise your own.
        #[arg(long)]
        account: Option<String>,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Keys {
    /// Sign with the next key, and publish a new next one.
    Rotate {
        /// Even if the next key was published less than a day ago.
        #[arg(long)]
        force: bool,
        /// Of the keys that sign SSH certificates: `user` or `host`.
        #[arg(long, value_name = "KIND")]
        ssh_ca: Option<SshCaKind>,
        #[command(flatten)]
        wait: WaitOptions,
    },
    /// List them.
    List {
        /// Those that sign SSH certificates.
        #[arg(long)]
        ssh_ca: bool,
    },
    /// Refuse everything signed with this key, at once.
    Withdraw {
        /// Its name; of a key that signs SSH certificates, its fingerprint
        /// (`SHA256:…`).
        kid: String,
        #[command(flatten)]
        wait: WaitOptions,
    },
}

/// What a key of the SSH authority signs.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum SshCaKind {
    /// Users' certificates.
    User,
    /// Certificates of hosts and proxies.
    Host,
}

/// Whether to wait until a revocation is in force.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct WaitOptions {
    /// Wait until every holder has acknowledged, or its lease and grace ran out.
    #[arg(long)]
    pub(crate) wait: bool,
    /// Give up waiting after so many seconds; what is under way goes on.
    #[arg(long, default_value_t = 90_000)]
    pub(crate) timeout: u64,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Audit {
    /// Check that a log is as it was written. Needs no master, unless it is
    /// compared.
    Verify {
        /// The `audit` folder of a host, a proxy or the master.
        folder: PathBuf,
        /// Compare it, too, with every head that this host has signed for the
        /// master.
        #[arg(long, conflicts_with_all = ["proxy", "against_master"])]
        host: Option<String>,
        /// The same for a proxy.
        #[arg(long, conflicts_with = "against_master")]
        proxy: Option<String>,
        /// The same for the host or proxy whose data directory the folder is in.
        #[arg(long)]
        against_master: bool,
    },
    /// Show where a host's log was, day by day, as it has signed for the master.
    Heads {
        /// The host, by name or id.
        id: String,
        /// A proxy rather than a host.
        #[arg(long)]
        proxy: bool,
    },
    /// Show events of a log, each verified. Needs no master.
    Query {
        /// The `audit` folder of a host, a proxy or the master.
        folder: PathBuf,
        /// About this project.
        #[arg(long)]
        project: Option<String>,
        /// About this account.
        #[arg(long)]
        account: Option<String>,
        /// At this time or later, as 2026-01-31T12:00:00Z.
        #[arg(long)]
        since: Option<String>,
        /// Before this time.
        #[arg(long)]
        until: Option<String>,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum ApiKey {
    /// Make one, and print it: it is shown this once.
    Create {
        /// What to call it.
        #[arg(long, default_value = "")]
        name: String,
        /// Of this account; otherwise your own.
        #[arg(long)]
        account: Option<String>,
        /// Only for these projects.
        #[arg(long, value_delimiter = ',')]
        projects: Vec<String>,
        /// Only for this: read, connect, operate, manage, create, account.
        #[arg(long, value_delimiter = ',')]
        verbs: Vec<String>,
        /// How long it lasts, in seconds; otherwise for ever.
        #[arg(long)]
        ttl: Option<u64>,
    },
    /// List them, without the keys themselves.
    List {
        /// Of this account; otherwise your own.
        #[arg(long)]
        account: Option<String>,
    },
    /// End one.
    Revoke {
        id: String,
        /// Of this account; otherwise your own.
        #[arg(long)]
        account: Option<String>,
        #[command(flatten)]
        wait: WaitOptions,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Identity {
    /// List them.
    List {
        /// Of this account; otherwise your own.
        #[arg(long)]
        account: Option<String>,
    },
    /// Log in with this provider, too, from now on: shown in a browser on this
    /// machine.
    Link {
        /// The provider's name.
        #[arg(long)]
        oidc: String,
        #[command(flatten)]
        browser: BrowserOptions,
    },
    /// Log in with it no more.
    Unlink {
        id: String,
        /// Of this account; otherwise your own.
        #[arg(long)]
        account: Option<String>,
    },
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_grammar_is_consistent() {
        super::Arguments::command().debug_assert();
    }
}
