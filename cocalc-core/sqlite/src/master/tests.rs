//! The store: races, fences, joins, and the map against a model.

use std::collections::BTreeMap;

use cocalc_auth::token::LoginTag;
use cocalc_core::{
    control::{Capabilities, ProjectConfig, ProjectReport},
    router::HostAddress,
    runner::{State, Status},
};
use cocalc_ids::{
    AccountId, Epoch, HostId, KeyId, MoveId, OperationId, ProjectId, Role, SessionId, Timestamp,
};
use proptest::prelude::*;

use super::*;

const NOW: Timestamp = Timestamp::from_secs(1_800_000_000);
const ANY: [ProjectState; 3] = [ProjectState::Stopped, ProjectState::Running, ProjectState::Failed];

struct World {
    store: Store,
    dir: tempfile::TempDir,
    owner: AccountId,
    hosts: Vec<HostId>,
}

impl World {
    fn new(hosts: u8) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("db")).unwrap();
        let owner = AccountId::from_bytes([1; 16]);
        store.create_account(owner, "owner", false, NOW).unwrap();
        let hosts = (0..hosts)
            .map(|n| {
                let token = [n + 1; 32];
                store.add_join_token(&token, JoinKind::Host, NOW, NOW.plus(HOUR), None).unwrap();
                let name = format!("host{n}").parse().unwrap();
                let address = HostAddress { identity: format!("key{n}"), ..HostAddress::default() };
                let joining = Joining {
                    token: &token,
                    kind: JoinKind::Host,
                    name: &name,
                    address: &address,
                    id: [n + 1; 16],
                };
                HostId::from_bytes(store.join(&joining, NOW).unwrap())
            })
            .collect();
        Self { store, dir, owner, hosts }
    }

    fn project(&self, n: u8) -> Project {
        let config = ProjectConfig::default();
        let new = NewProject {
            id: ProjectId::from_bytes([n; 16]),
            name: "p",
            owner: self.owner,
            config: &config,
            host: self.hosts[0],
            operation: OperationId::from_bytes([n; 16]),
            job: &Job::Create,
        };
        self.store.create_project(&new, NOW).unwrap()
    }

    fn stopped(&self, n: u8) -> Project {
        let project = self.project(n);
        self.end(OperationId::from_bytes([n; 16]), ProjectState::Stopped);
        self.store.project(project.id).unwrap()
    }

    fn end(&self, operation: OperationId, state: ProjectState) {
        let ended = Ended { outcome: Outcome::Done, project: state, reason: None, report: None };
        self.store.end(operation, &ended, NOW).unwrap();
    }

    fn begin_move(&self, project: &Project, id: MoveId, to: HostId) -> Result<Operation> {
        let from = (project.host, project.epoch);
        let new = NewMove { id, project: project.id, account: self.owner, from, to, state: "{}" };
        self.store.begin_move(&new, &ANY, NOW)
    }
}

#[test]
fn leftovers_are_of_deleted_projects_until_they_are_forgotten() {
    let world = World::new(3);
    let (project, move_id) = (world.stopped(1), MoveId::random());
    world.begin_move(&project, move_id, world.hosts[1]).unwrap();
    let moves = world.store.moves_of(project.id).unwrap();
    assert_eq!(moves.iter().map(|row| row.id).collect::<Vec<_>>(), [move_id]);
    let former = [world.hosts[1], world.hosts[2], HostId::from_bytes([99; 16])];
    for _ in 0..2 {
        world.store.leave(project.id, &former).unwrap();
    }
    assert_eq!(world.store.leftover_hosts(project.id).unwrap(), former[..2]);
    assert_eq!(world.store.leftovers(world.hosts[1]).unwrap(), [], "it is not deleted yet");
    world.end(OperationId::from_bytes(*move_id.as_bytes()), ProjectState::Deleted);
    for host in &former[..2] {
        assert_eq!(world.store.leftovers(*host).unwrap(), [(project.id, project.epoch)]);
    }
    world.store.forgotten(world.hosts[1], project.id).unwrap();
    assert_eq!(world.store.leftovers(world.hosts[1]).unwrap(), []);
    assert_eq!(world.store.leftover_hosts(project.id).unwrap(), [world.hosts[2]]);
}

const HOUR: std::time::Duration = std::time::Duration::from_secs(3600);

fn report(project: ProjectId, epoch: Epoch, state: State) -> ProjectReport {
    let status = Status { project, epoch: Some(epoch), state, started: None, reason: None };
    ProjectReport { project, epoch: Some(epoch), status, phases: Vec::new() }
}

#[test]
fn a_join_token_is_good_once_and_repeatable_by_the_same_peer() {
    let world = World::new(0);
    let (token, name) = ([7; 32], "alpha".parse().unwrap());
    world.store.add_join_token(&token, JoinKind::Host, NOW, NOW.plus(HOUR), None).unwrap();
    let address = HostAddress { identity: "mine".into(), ..HostAddress::default() };
    let mut joining =
        Joining { token: &token, kind: JoinKind::Proxy, name: &name, address: &address, id: [5; 16] };
    assert!(matches!(world.store.join(&joining, NOW), Err(Error::BadToken)), "of the other kind");
    joining.kind = JoinKind::Host;
    let late = NOW.plus(HOUR);
    assert!(matches!(world.store.join(&joining, late), Err(Error::BadToken)), "expired");
    let id = world.store.join(&joining, NOW).unwrap();
    joining.id = [6; 16];
    assert_eq!(world.store.join(&joining, NOW).unwrap(), id, "the same peer asks again");
    let other = HostAddress { identity: "theirs".into(), ..HostAddress::default() };
    joining.address = &other;
    assert!(matches!(world.store.join(&joining, NOW), Err(Error::BadToken)), "somebody else");
    // Another token, but a name and a key that are taken.
    let second = [8; 32];
    world.store.add_join_token(&second, JoinKind::Host, NOW, NOW.plus(HOUR), None).unwrap();
    joining.token = &second;
    assert!(matches!(world.store.join(&joining, NOW), Err(Error::Exists { .. })), "the name");
    let beta = "beta".parse().unwrap();
    (joining.name, joining.address) = (&beta, &address);
    assert!(matches!(world.store.join(&joining, NOW), Err(Error::Exists { .. })), "the key");
}

#[test]
fn one_operation_at_a_time_and_a_repeated_one_is_the_same() {
    let world = World::new(1);
    let project = world.stopped(1);
    assert!(project.made);
    let [first, second] = [OperationId::random(), OperationId::random()];
    let begin = |id, allowed: &[_]| world.store.begin(id, project.id, world.owner, &Job::Start, allowed, NOW);
    begin(first, &ANY).unwrap();
    assert_eq!(begin(first, &ANY).unwrap().id, first);
    assert!(matches!(begin(second, &ANY), Err(Error::Busy { operation }) if operation == first));
    assert_eq!(world.store.project(project.id).unwrap().state, ProjectState::Starting);
    world.end(first, ProjectState::Running);
    // It has ended: the repeated call does not begin it again.
    assert_eq!(begin(first, &ANY).unwrap().state, OperationState::Done);
    assert!(matches!(begin(second, &[ProjectState::Stopped]), Err(Error::WrongState { .. })));
    // A late second end changes nothing.
    world.end(first, ProjectState::Failed);
    let now = world.store.project(project.id).unwrap();
    assert_eq!((now.state, now.fence), (ProjectState::Running, None));
}

#[test]
fn an_operation_that_tells_of_itself_for_hours_stays_small() {
    let world = World::new(1);
    let (project, id) = (world.stopped(1), OperationId::random());
    world.store.begin(id, project.id, world.owner, &Job::Start, &ANY, NOW).unwrap();
    let tell = |phase: &str, n: u64| world.store.progress(id, phase, &n.into(), NOW).unwrap();
    (0..1000).for_each(|n| tell("sending", n));
    tell("ending", 1);
    let events = world.store.events(id, 0).unwrap();
    assert!(events.len() < 210, "{}", events.len());
    let last: Vec<_> =
        events.iter().rev().take(2).map(|event| (&*event.phase, event.progress.clone())).collect();
    assert_eq!(last, [("ending", 1.into()), ("sending", 999.into())], "the newest of each");
    // Who follows misses nothing of what is there.
    let after = events[events.len() - 2].seq - 1;
    assert_eq!(world.store.events(id, after).unwrap().len(), 2);
}

#[test]
fn a_host_is_believed_only_of_its_own_epoch_and_never_over_a_fence() {
    let world = World::new(2);
    let project = world.stopped(1);
    let next = project.epoch.next();
    let observe =
        |host, epoch| world.store.observe(host, &report(project.id, epoch, State::Running)).unwrap();
    assert!(!observe(world.hosts[1], project.epoch), "another host");
    assert!(!observe(world.hosts[0], next), "another epoch");
    world.store.begin(OperationId::random(), project.id, world.owner, &Job::Start, &ANY, NOW).unwrap();
    assert!(!observe(world.hosts[0], project.epoch), "fenced");
    let project = world.stopped(2);
    assert!(world.store.observe(world.hosts[0], &report(project.id, project.epoch, State::Running)).unwrap());
    assert_eq!(world.store.project(project.id).unwrap().state, ProjectState::Running);
}

#[test]
fn a_state_that_is_unknown_lies_over_the_last_that_was_known() {
    let world = World::new(2);
    let project = world.stopped(1);
    let host = world.hosts[0];
    let found = || world.store.project(project.id).unwrap();
    let mut doubt = report(project.id, project.epoch, State::Unknown);
    doubt.status.reason = Some("podman hangs".to_owned());
    assert!(!world.store.observe(world.hosts[1], &doubt).unwrap(), "another host");
    assert!(world.store.observe(host, &doubt).unwrap() && !world.store.observe(host, &doubt).unwrap());
    let now = found();
    assert_eq!((now.state, now.known), (ProjectState::Unknown, ProjectState::Stopped));
    assert_eq!(now.reason.as_deref(), Some("podman hangs"));
    let listed = world.store.projects(None, None, 10).unwrap();
    assert_eq!(listed.iter().map(|one| one.state).collect::<Vec<_>>(), [ProjectState::Unknown]);
    // What needs to know it is refused; what does not, leaves it as it is.
    let begin = |n: u8, job: &Job, allowed: &[ProjectState]| {
        world.store.begin(OperationId::from_bytes([n; 16]), project.id, world.owner, job, allowed, NOW)
    };
    let refused = begin(9, &Job::Start, &ANY).unwrap_err();
    assert!(matches!(refused, Error::WrongState { state: ProjectState::Unknown }), "{refused}");
    let job = Job::Snapshot { name: "s".parse().unwrap() };
    begin(10, &job, &[ProjectState::Unknown]).unwrap();
    assert_eq!(found().state, ProjectState::Stopped, "while the operation is under way");
    let ended = Ended {
        outcome: Outcome::Done,
        project: ProjectState::Unknown,
        reason: Some("podman hangs".to_owned()),
        report: None,
    };
    world.store.end(OperationId::from_bytes([10; 16]), &ended, NOW).unwrap();
    assert_eq!((found().state, found().known), (ProjectState::Unknown, ProjectState::Stopped));
    // An operation that ends in not knowing.
    assert!(world.store.observe(host, &report(project.id, project.epoch, State::Stopped)).unwrap());
    assert_eq!((found().state, found().reason), (ProjectState::Stopped, None));
    begin(11, &Job::Start, &ANY).unwrap();
    world.store.end(OperationId::from_bytes([11; 16]), &ended, NOW).unwrap();
    assert_eq!((found().state, found().known), (ProjectState::Unknown, ProjectState::Failed));
    assert!(world.store.observe(host, &report(project.id, project.epoch, State::Running)).unwrap());
    assert_eq!((found().state, found().known), (ProjectState::Running, ProjectState::Running));
    // And one that found out ends it.
    assert!(world.store.observe(host, &doubt).unwrap());
    begin(12, &Job::Stop { grace_ms: 0 }, &[ProjectState::Unknown]).unwrap();
    world.end(OperationId::from_bytes([12; 16]), ProjectState::Stopped);
    assert_eq!((found().state, found().reason), (ProjectState::Stopped, None));
}

#[test]
fn commit_and_abort_exclude_each_other() {
    let world = World::new(2);
    let project = world.stopped(1);
    let (id, to) = (MoveId::random(), world.hosts[1]);
    world.begin_move(&project, id, to).unwrap();
    assert!(matches!(world.begin_move(&project, MoveId::random(), to), Err(Error::Busy { .. })));
    let commit = MoveChange::Owner { from: project.epoch, to: project.epoch.next(), owner: Some(to) };
    let abort = MoveChange::Owner { from: project.epoch, to: project.epoch.next(), owner: None };
    assert_eq!(world.store.save_move(id, 1, "[1]", commit).unwrap(), MoveSaved::Yes);
    assert_eq!(world.store.save_move(id, 1, "[2]", abort).unwrap(), MoveSaved::Superseded);
    // Even with the right revision the epoch is not what the abort believes.
    assert_eq!(world.store.save_move(id, 2, "[3]", abort).unwrap(), MoveSaved::Lost);
    let row = world.store.move_row(id).unwrap();
    assert_eq!((row.revision, row.state.as_str()), (2, "[1]"));
    assert_eq!(world.store.ownership(project.id).unwrap(), Some((to, project.epoch.next(), false)));
    let release = MoveChange::Release { state: ProjectState::Running };
    assert_eq!(world.store.save_move(id, 2, "[4]", release).unwrap(), MoveSaved::Yes);
    assert_eq!(world.store.save_move(id, 3, "[5]", release).unwrap(), MoveSaved::Lost, "the fence is gone");
    let after = world.store.project(project.id).unwrap();
    assert_eq!((after.fence, after.state), (None, ProjectState::Running));
    // An epoch that would not grow is refused as well.
    let id = MoveId::random();
    world.begin_move(&after, id, world.hosts[0]).unwrap();
    let back = MoveChange::Owner { from: after.epoch, to: after.epoch, owner: None };
    assert_eq!(world.store.save_move(id, 1, "[]", back).unwrap(), MoveSaved::Lost);
}

#[test]
fn a_move_begins_only_from_the_owner_it_was_planned_for() {
    let world = World::new(2);
    let project = world.stopped(1);
    let stale = Project { epoch: project.epoch.next(), ..project.clone() };
    assert!(matches!(world.begin_move(&stale, MoveId::random(), world.hosts[1]), Err(Error::Stale { .. })));
    // Nothing of the refused one is left, not even the fence.
    assert_eq!(world.store.project(project.id).unwrap().fence, None);
}

#[test]
fn every_change_of_rights_is_a_new_version() {
    let world = World::new(1);
    let project = world.stopped(1).id;
    let guest = AccountId::random();
    assert!(matches!(world.store.add_member(project, guest, Role::Viewer), Err(Error::NotFound { .. })));
    world.store.create_account(guest, "guest", false, NOW).unwrap();
    let first = world.store.add_member(project, guest, Role::Viewer).unwrap();
    assert_eq!(world.store.add_member(project, guest, Role::Viewer).unwrap(), first, "nothing changed");
    assert_eq!(world.store.add_member(project, guest, Role::Collaborator).unwrap(), first + 1);
    let key = StoredSshKey {
        id: KeyId::random(),
        account: guest,
        project: Some(project),
        key: "ssh-ed25519 AAAA".into(),
        options: String::new(),
        comment: String::new(),
        created: NOW,
    };
    world.store.add_ssh_key(&key).unwrap();
    let acl = world.store.project_acl(project).unwrap();
    assert_eq!((acl.version, acl.keys.len(), acl.members.len()), (first + 2, 1, 2));
    // The key that the guest left in the project goes with the membership.
    assert_eq!(world.store.remove_member(project, guest).unwrap(), first + 3);
    assert!(world.store.project_acl(project).unwrap().keys.is_empty());
    assert_eq!(world.store.remove_member(project, guest).unwrap(), first + 3);
    assert!(matches!(world.store.remove_member(project, world.owner), Err(Error::Owner)));
    assert!(matches!(world.store.add_ssh_key(&key), Err(Error::NotFound { .. })), "no member any more");
}

#[test]
fn answers_are_remembered_per_account_key_and_request() {
    let world = World::new(0);
    let recall = |request: u8, now| world.store.recall(world.owner, "k", &[request; 32], now).unwrap();
    assert_eq!(recall(1, NOW), Remembered::New);
    assert_eq!(recall(1, NOW), Remembered::UnderWay);
    assert_eq!(recall(2, NOW), Remembered::Other);
    world.store.remember(world.owner, "k", 202, b"x").unwrap();
    assert_eq!(recall(1, NOW), Remembered::Answered { status: 202, body: b"x".to_vec() });
    world.store.forget_unanswered().unwrap();
    assert!(matches!(recall(1, NOW), Remembered::Answered { .. }));
    assert_eq!(recall(1, NOW.plus(HOUR * 25)), Remembered::New, "a day later");
    world.store.forget_unanswered().unwrap();
    assert_eq!(recall(1, NOW.plus(HOUR * 25)), Remembered::New, "the process that was asked is gone");
}

#[test]
fn streams_grow_even_if_the_database_is_an_older_one() {
    let world = World::new(0);
    let first = world.store.next_stream(NOW).unwrap();
    assert_eq!(world.store.next_stream(NOW).unwrap(), first + 1);
    // A fresh database, a moment later.
    let other = World::new(0);
    assert!(other.store.next_stream(NOW.plus(HOUR)).unwrap() > first + 1);
}

#[test]
fn the_first_administrator_is_made_once() {
    let world = World::new(0);
    let token =
        ApiToken { id: KeyId::random(), name: String::new(), limits: None, created: NOW, expires: None };
    assert!(!world.store.has_admin().unwrap());
    let admin = AccountId::random();
    assert!(world.store.create_first_admin(admin, &[1; 32], &token).unwrap());
    assert!(!world.store.create_first_admin(AccountId::random(), &[2; 32], &token).unwrap());
    assert_eq!(world.store.bearer(&[1; 32], NOW).unwrap().account.id, admin);
    assert!(matches!(world.store.bearer(&[2; 32], NOW), Err(Error::BadToken)));
}

/// What happens to the map in a random history.
#[derive(Clone, Debug)]
enum Act {
    Begin { move_id: u8, to: usize },
    Commit { move_id: u8, revision: u64, epoch: u64 },
    Abort { move_id: u8, revision: u64, epoch: u64 },
    Release { move_id: u8, revision: u64 },
    Reopen,
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        (1u8..4, 0usize..3).prop_map(|(move_id, to)| Act::Begin { move_id, to }),
        (1u8..4, 1u64..4, 1u64..4).prop_map(|(move_id, revision, epoch)| Act::Commit {
            move_id,
            revision,
            epoch
        }),
        (1u8..4, 1u64..4, 1u64..4).prop_map(|(move_id, revision, epoch)| Act::Abort {
            move_id,
            revision,
            epoch
        }),
        (1u8..4, 1u64..4).prop_map(|(move_id, revision)| Act::Release { move_id, revision }),
        Just(Act::Reopen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Many controllers with stale beliefs: owner, epoch, fence and revisions
    /// are always those of a model in which only matching beliefs act.
    #[test]
    fn the_map_is_as_its_model(acts in proptest::collection::vec(act(), 1..40)) {
        let mut world = World::new(3);
        let project = world.stopped(9);
        let (mut host, mut epoch) = (world.hosts[0], 1u64);
        let mut fence: Option<u8> = None;
        let mut moves: BTreeMap<u8, (u64, HostId)> = BTreeMap::new();
        let id = |n: u8| MoveId::from_bytes([n + 100; 16]);
        for act in acts {
            match act {
                Act::Begin { move_id, to } => {
                    let to = world.hosts[to];
                    let now = world.store.project(project.id).unwrap();
                    let fresh = fence.is_none() && !moves.contains_key(&move_id);
                    let begun = world.begin_move(&now, id(move_id), to);
                    if fresh {
                        prop_assert!(begun.is_ok());
                        fence = Some(move_id);
                        moves.insert(move_id, (1, to));
                    } else if fence.is_some() && fence != Some(move_id) {
                        let busy = matches!(begun, Err(Error::Busy { .. }));
                        prop_assert!(busy);
                    } else {
                        prop_assert!(begun.is_ok(), "a known move is returned as it is");
                    }
                }
                Act::Commit { move_id, revision, epoch: believed } | Act::Abort { move_id, revision, epoch: believed } => {
                    let owner = match act {
                        Act::Commit { .. } => moves.get(&move_id).map(|(_, to)| *to),
                        _ => None,
                    };
                    let (from, to) = (Epoch::new(believed).unwrap(), Epoch::new(believed + 1).unwrap());
                    let change = MoveChange::Owner { from, to, owner };
                    let saved = world.store.save_move(id(move_id), revision, "{}", change).unwrap();
                    let known = moves.get(&move_id).is_some_and(|(at, _)| *at == revision);
                    let expected = match (known, fence == Some(move_id) && epoch == believed) {
                        (false, _) => MoveSaved::Superseded,
                        (true, false) => MoveSaved::Lost,
                        (true, true) => MoveSaved::Yes,
                    };
                    prop_assert_eq!(saved, expected);
                    if saved == MoveSaved::Yes {
                        epoch += 1;
                        host = owner.unwrap_or(host);
                        moves.entry(move_id).and_modify(|(at, _)| *at += 1);
                    }
                }
                Act::Release { move_id, revision } => {
                    let change = MoveChange::Release { state: ProjectState::Stopped };
                    let saved = world.store.save_move(id(move_id), revision, "{}", change).unwrap();
                    let known = moves.get(&move_id).is_some_and(|(at, _)| *at == revision);
                    let expected = match (known, fence == Some(move_id)) {
                        (false, _) => MoveSaved::Superseded,
                        (true, false) => MoveSaved::Lost,
                        (true, true) => MoveSaved::Yes,
                    };
                    prop_assert_eq!(saved, expected);
                    if saved == MoveSaved::Yes {
                        fence = None;
                        moves.entry(move_id).and_modify(|(at, _)| *at += 1);
                    }
                }
                Act::Reopen => {
                    let path = world.dir.path().join("db");
                    world.store = Store::open(&path).unwrap();
                }
            }
            let now = world.store.project(project.id).unwrap();
            prop_assert_eq!((now.host, now.epoch.number()), (host, epoch));
            prop_assert_eq!(now.fence, fence.map(|n| OperationId::from_bytes(*id(n).as_bytes())));
        }
    }
}

#[test]
fn free_space_is_what_the_host_said_last() {
    let world = World::new(1);
    let id = world.hosts[0];
    // Before it has registered there is nothing to place by.
    world.store.set_free_bytes(id, 1).unwrap();
    assert_eq!(world.store.host(id).unwrap().capabilities, None);
    let can = Capabilities {
        storage: cocalc_core::storage::Capabilities {
            backend: "btrfs".into(),
            deltas: true,
            quotas: true,
            ..Default::default()
        },
        runner: cocalc_core::runner::Capabilities {
            backend: "podman".into(),
            isolation: true,
            limits: true,
            weaknesses: vec![],
            unenforced: vec![],
        },
        images: vec![],
        sealing_key: None,
        free_bytes: 5,
    };
    let registration = Registration {
        session: SessionId::random(),
        boot_id: "boot",
        address: &HostAddress::default(),
        ssh_host_keys: &[],
        capabilities: Some(&can),
    };
    world.store.register(*id.as_bytes(), &registration, NOW).unwrap();
    world.store.set_free_bytes(id, 7 << 40).unwrap();
    let after = world.store.host(id).unwrap().capabilities.unwrap();
    assert_eq!(after, Capabilities { free_bytes: 7 << 40, ..can });
}

#[test]
fn an_identity_is_one_accounts_and_the_last_way_in_stays() {
    let world = World::new(0);
    let store = &world.store;
    let (google, uni) = ("https://accounts.google.com", "https://id.example.edu");
    let usable = [google.to_owned(), uni.to_owned()];
    let [ada, eve] = ["ada", "eve"].map(|name| {
        let make = Some((AccountId::random(), name));
        store.account_of_identity(google, &format!("{name}-1"), make, NOW).unwrap().id
    });
    let subjects = |account| {
        let found = store.identities(account).unwrap().into_iter();
        found.map(|identity| (identity.provider, identity.subject)).collect::<Vec<_>>()
    };
    let unlink = |provider: &str, subject: &str| store.unlink_identity(ada, provider, subject, &usable);
    // The same subject of another provider is somebody else.
    assert!(matches!(store.account_of_identity(uni, "ada-1", None, NOW), Err(Error::NotFound { .. })));
    assert!(matches!(store.link_identity(eve, google, "ada-1", NOW), Err(Error::Exists { .. })));
    assert!(matches!(unlink(google, "ada-1"), Err(Error::LastWayIn)));
    assert_eq!(subjects(ada), [(google.to_owned(), "ada-1".to_owned())], "what was refused is undone");
    for _ in 0..2 {
        store.link_identity(ada, uni, "u17", NOW).unwrap();
    }
    assert_eq!(store.account_of_identity(uni, "u17", None, NOW).unwrap().id, ada);
    assert!(matches!(unlink(google, "eve-1"), Err(Error::NotFound { .. })), "another's");
    // A provider that nobody can log in with is no way in.
    let only = [google.to_owned()];
    assert!(matches!(store.unlink_identity(ada, google, "ada-1", &only), Err(Error::LastWayIn)));
    unlink(google, "ada-1").unwrap();
    assert!(matches!(unlink(uni, "u17"), Err(Error::LastWayIn)));
    store.set_password(ada, "ada", "hash", NOW).unwrap();
    unlink(uni, "u17").unwrap();
    assert_eq!(subjects(ada), []);
    for n in 0..20 {
        store.link_identity(ada, uni, &n.to_string(), NOW).unwrap();
    }
    assert!(matches!(store.link_identity(ada, uni, "20", NOW), Err(Error::TooMany { .. })));
    let nobody = AccountId::random();
    assert!(matches!(store.link_identity(nobody, uni, "x", NOW), Err(Error::NotFound { .. })));
}

#[test]
fn a_session_epoch_is_never_given_twice_even_by_a_restored_database() {
    let world = World::new(0);
    let began = u64::try_from(Timestamp::now().secs()).unwrap();
    let first = world.store.sign_out(world.owner).unwrap().session_epoch;
    assert!(first >= began, "not below the time, whatever the database remembers");
    let second = world.store.ban(world.owner, true).unwrap().session_epoch;
    assert!(second > first);
    assert_eq!(world.store.ban(world.owner, false).unwrap().session_epoch, second);
}

#[test]
fn an_ended_log_in_is_told_as_long_as_anything_opened_under_it_may_live() {
    let world = World::new(0);
    let (store, owner) = (&world.store, world.owner);
    let state = || store.account_state(owner).unwrap();
    let epoch = state().session_epoch;
    let log_in = |n: u16| {
        let mut id = [3; 16];
        id[..2].copy_from_slice(&n.to_be_bytes());
        let token = ApiToken {
            id: KeyId::from_bytes(id),
            name: String::new(),
            limits: None,
            created: NOW,
            expires: None,
        };
        let mut hash = [4; 32];
        hash[..2].copy_from_slice(&n.to_be_bytes());
        store.add_api_token(&hash, owner, &token).unwrap();
        token.id
    };
    let (first, second) = (log_in(0), log_in(1));
    store.remove_api_token(owner, first, NOW).unwrap();
    assert!(matches!(store.remove_api_token(owner, first, NOW), Err(Error::NotFound { .. })), "once");
    assert_eq!(state().ended_logins, [LoginTag::of(first)]);
    let month = NOW.plus(HOUR * 24 * 31);
    store.remove_api_token(owner, second, month).unwrap();
    assert_eq!(state().ended_logins, [LoginTag::of(first), LoginTag::of(second)]);
    let third = log_in(2);
    store.remove_api_token(owner, third, month.plus(HOUR)).unwrap();
    assert_eq!(state().ended_logins, [LoginTag::of(second), LoginTag::of(third)]);
    // More than anybody remembers: all of them end.
    for n in 3..258 {
        assert_eq!(state().session_epoch, epoch, "after {n}");
        store.remove_api_token(owner, log_in(n), month.plus(HOUR)).unwrap();
    }
    assert!(state().session_epoch > epoch && state().ended_logins.is_empty());
}

#[test]
fn what_a_dead_host_had_gets_another_owner_once() {
    let world = World::new(2);
    let (dead, other) = (world.hosts[0], world.hosts[1]);
    let (project, unlucky) = (world.stopped(1), world.stopped(2));
    let (id, recovery) = (OperationId::from_bytes([9; 16]), OperationId::from_bytes([8; 16]));
    let begin = || world.store.begin_recover(id, project.id, world.owner, dead, other, "b1", &ANY, NOW);
    // Not without somebody's word.
    assert!(matches!(begin(), Err(Error::NotFenced)));
    let refused = world.store.begin_recovery(recovery, dead, world.owner, &[], NOW);
    assert!(matches!(refused, Err(Error::NotFenced)));
    let fence = Fence { at: NOW, by: world.owner, reason: "it burned".to_owned(), heard: None };
    world.store.fence(dead, &fence).unwrap();
    let second = Fence { reason: "really".to_owned(), at: NOW.plus(HOUR), ..fence.clone() };
    assert_eq!(world.store.fence(dead, &second).unwrap().fenced, Some(fence), "the first word counts");
    assert_eq!(world.store.fenced_hosts().unwrap(), [dead]);

    let begun = world.store.begin_recovery(recovery, dead, world.owner, &[other], NOW).unwrap();
    assert_eq!(world.store.begin_recovery(recovery, dead, world.owner, &[], NOW).unwrap(), begun);
    let another = OperationId::from_bytes([7; 16]);
    let busy = world.store.begin_recovery(another, dead, world.owner, &[], NOW);
    assert!(matches!(busy, Err(Error::Busy { operation }) if operation == recovery));
    let (_, projects) = world.store.recovery(recovery).unwrap();
    let waiting = |project| RecoveredProject {
        project,
        outcome: RecoveryOutcome::Waiting,
        operation: None,
        details: serde_json::json!({}),
    };
    assert_eq!(projects, [waiting(project.id), waiting(unlucky.id)]);

    let operation = begin().unwrap();
    assert_eq!(begin().unwrap(), operation, "a repeated call finds it");
    let epoch = project.epoch;
    let job =
        Job::Recover { from: dead, epoch, to: other, backup: "b1".to_owned(), was: ProjectState::Stopped };
    assert_eq!(operation.job, job);
    let commit = |id| world.store.recover_project(id, project.id, (dead, epoch), other).unwrap();
    assert_eq!(commit(another), None, "another's fence");
    world.store.unfence(dead).unwrap();
    assert_eq!(commit(id), None, "the host is back");
    world.store.fence(dead, &second).unwrap();
    assert_eq!(commit(id), Some(epoch.next()));
    assert_eq!(commit(id), None, "once");
    let now = world.store.project(project.id).unwrap();
    assert_eq!((now.host, now.epoch, now.fence), (other, epoch.next(), Some(id)));

    let restored = RecoveredProject {
        outcome: RecoveryOutcome::Restored,
        operation: Some(id),
        details: serde_json::json!({ "backup_id": "b1" }),
        ..waiting(project.id)
    };
    world.store.note_recovered(recovery, &restored, NOW).unwrap();
    world.store.cancel_recovery(recovery, NOW).unwrap();
    world.store.end_recovery(recovery, OperationState::Cancelled, NOW).unwrap();
    let (ended, projects) = world.store.recovery(recovery).unwrap();
    assert_eq!((ended.state, ended.cancel, &projects[0]), (OperationState::Cancelled, true, &restored));
    assert!(world.store.recoveries_running().unwrap().is_empty());
    assert!(matches!(world.store.cancel_recovery(recovery, NOW), Err(Error::Stale { .. })));
}

#[test]
fn repositories_have_keys_turns_and_an_end() {
    let world = World::new(1);
    let (one, two) = (world.stopped(1).id, world.stopped(2).id);
    let store = &world.store;
    assert_eq!(store.backup_repository(one).unwrap(), None);
    for project in [one, two, one] {
        store.make_backup_repository(project, None, NOW).unwrap();
    }
    let (row, key) = store.backup_repository(one).unwrap().unwrap();
    assert_eq!((row.name, key.wrapped.as_str()), (one.to_string(), ""));
    assert!(store.rewrap_backup_key(&key, "first").unwrap());
    assert!(!store.rewrap_backup_key(&key, "second").unwrap(), "somebody was first");
    let keys = store.backup_keys("", 10).unwrap();
    assert_eq!(keys, [BackupKey { name: one.to_string(), wrapped: "first".into() }]);

    // Only what is used is tended, the longest ago first.
    let due = |tending, at| -> Vec<ProjectId> {
        store.backup_repositories_due(tending, at, 10).unwrap().iter().map(|row| row.project).collect()
    };
    assert_eq!(due(Tending::Pruned, NOW.plus(HOUR)), []);
    store.use_backup_repository(one).unwrap();
    store.use_backup_repository(two).unwrap();
    assert_eq!(due(Tending::Pruned, NOW), []);
    assert_eq!(due(Tending::Pruned, NOW.plus(HOUR)), [one, two]);
    store.tended_backups(one, Tending::Pruned, NOW.plus(HOUR)).unwrap();
    assert_eq!(due(Tending::Pruned, NOW.plus(HOUR)), [two]);
    assert_eq!(due(Tending::Pruned, NOW.plus(2 * HOUR)), [two, one]);
    assert_eq!(due(Tending::Checked, NOW.plus(HOUR)), [one, two]);
    let damage = ["a pack is short".to_owned()];
    store.set_backup_damage(one, Some(&damage)).unwrap();
    assert_eq!(store.count_backup_repositories().unwrap(), (2, 1));
    assert_eq!(store.damaged_backups(9).unwrap()[0].damage.as_deref(), Some(&damage[..]));
    store.set_backup_damage(one, None).unwrap();
    assert_eq!(store.damaged_backups(9).unwrap(), []);

    // Erased some time after the project is deleted, and not before.
    assert_eq!(store.schedule_erasures(None, NOW.plus(HOUR)).unwrap(), 0);
    let delete = OperationId::random();
    store.begin(delete, one, world.owner, &Job::Delete, &ANY, NOW).unwrap();
    world.end(delete, ProjectState::Deleted);
    assert_eq!(store.schedule_erasures(Some(two), NOW.plus(HOUR)).unwrap(), 0);
    assert_eq!(store.schedule_erasures(Some(one), NOW.plus(HOUR)).unwrap(), 1);
    assert_eq!(store.schedule_erasures(None, NOW.plus(9 * HOUR)).unwrap(), 0, "it was said already");
    assert_eq!(store.erasures_due(NOW, 10).unwrap(), []);
    assert_eq!(store.erasures_due(NOW.plus(HOUR), 10).unwrap()[0].project, one);
    assert_eq!(due(Tending::Pruned, NOW.plus(9 * HOUR)), [two], "nothing else is done to it");
    assert_eq!(store.owner_ever(one).unwrap(), world.owner);
    store.forget_backup_repository(one).unwrap();
    store.forget_backup_repository(one).unwrap();
    assert_eq!(store.backup_repository(one).unwrap(), None);
    assert_eq!(store.backup_keys("", 10).unwrap(), []);
}

#[test]
fn shards_are_sealed_and_their_keys_outlive_their_projects() {
    let world = World::new(1);
    let projects: Vec<ProjectId> = (1..=5).map(|n| world.stopped(n).id).collect();
    let name = |project| world.store.backup_repository(project).unwrap().unwrap().0.name;
    for project in &projects[..4] {
        world.store.make_backup_repository(*project, Some(2), NOW).unwrap();
    }
    let names: Vec<String> = projects[..4].iter().map(|project| name(*project)).collect();
    assert_eq!(names, ["shard-0", "shard-0", "shard-1", "shard-1"]);
    let (_, key) = world.store.backup_repository(projects[0]).unwrap().unwrap();
    world.store.rewrap_backup_key(&key, "wrapped").unwrap();
    world.store.forget_backup_repository(projects[0]).unwrap();
    world.store.forget_backup_repository(projects[1]).unwrap();
    assert_eq!(world.store.backup_keys("", 9).unwrap()[0].name, "shard-0", "it may hold what is marked");
    world.store.make_backup_repository(projects[4], Some(2), NOW).unwrap();
    assert_eq!(name(projects[4]), "shard-2", "a sealed one stays sealed");
}

#[test]
fn operations_beside_fence_nothing_and_exclude_their_own_kind() {
    let world = World::new(2);
    let project = world.stopped(1);
    let id = |n: u8| OperationId::from_bytes([n; 16]);
    let beside = |n, job: Job| world.store.begin_beside(id(n), project.id, world.owner, &job, NOW);
    beside(10, Job::BackUp).unwrap();
    assert_eq!(beside(10, Job::BackUp).unwrap().id, id(10), "a repeated call is the same");
    assert!(matches!(beside(11, Job::BackUp), Err(Error::Busy { operation }) if operation == id(10)));
    beside(12, Job::PruneBackups).unwrap();
    assert!(matches!(beside(13, Job::EraseBackups), Err(Error::Busy { .. })));
    assert!(!world.store.erases_backups(project.id).unwrap());
    // The project is free, and stays as it is.
    world.store.begin(id(20), project.id, world.owner, &Job::Start, &ANY, NOW).unwrap();
    assert_eq!(world.store.project(project.id).unwrap().state, ProjectState::Starting);
    let failed = Ended { outcome: Outcome::Done, project: ProjectState::Failed, reason: None, report: None };
    for n in [10, 12] {
        world.store.end(id(n), &failed, NOW).unwrap();
    }
    let found = world.store.project(project.id).unwrap();
    assert_eq!((found.state, found.fence), (ProjectState::Starting, Some(id(20))));
    world.end(id(20), ProjectState::Running);
    beside(14, Job::EraseBackups).unwrap();
    assert!(world.store.erases_backups(project.id).unwrap());
    assert!(matches!(beside(15, Job::BackUp), Err(Error::Busy { .. })));
    world.store.end(id(14), &failed, NOW).unwrap();
    // Also of a project that is deleted, and of none that never was.
    world.store.begin(id(30), project.id, world.owner, &Job::Delete, &ANY, NOW).unwrap();
    world.end(id(30), ProjectState::Deleted);
    beside(16, Job::EraseBackups).unwrap();
    let nobody = world.store.begin_beside(id(17), ProjectId::random(), world.owner, &Job::EraseBackups, NOW);
    assert!(matches!(nobody, Err(Error::NotFound { .. })));
}

#[test]
fn a_host_is_believed_of_its_own_projects_backups_only() {
    use cocalc_core::backups::Status as Backups;
    let world = World::new(2);
    let project = world.stopped(1);
    let mut status = Backups::new(project.id, project.epoch);
    status.pending_since = Some(NOW);
    assert!(!world.store.set_backup_status(world.hosts[1], &status).unwrap());
    let other = Backups { epoch: project.epoch.next(), ..status.clone() };
    assert!(!world.store.set_backup_status(world.hosts[0], &other).unwrap());
    assert_eq!(world.store.project(project.id).unwrap().backup, None);
    assert!(world.store.set_backup_status(world.hosts[0], &status).unwrap());
    assert_eq!(world.store.project(project.id).unwrap().backup, Some(status));
    assert_eq!(world.store.count_pending_backups().unwrap(), (1, 0));
}

#[test]
fn a_name_means_the_image_that_was_said_last() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(&directory.path().join("master.db")).unwrap();
    let (one, two) =
        (cocalc_ids::ImageDigest::from_bytes([1; 32]), cocalc_ids::ImageDigest::from_bytes([2; 32]));
    let account = AccountId::random();
    assert_eq!(store.image_named("debian").unwrap(), None);
    for (name, digest) in [("debian", one), ("r", one), ("debian", two)] {
        store.name_image(name, digest, account, Timestamp::from_secs(1)).unwrap();
    }
    assert_eq!(store.image_named("debian").unwrap(), Some(two));
    let all: Vec<_> = store.image_names().unwrap().into_iter().collect();
    assert_eq!(all, [("debian".to_owned(), two), ("r".to_owned(), one)]);
}

#[test]
fn an_alias_is_one_projects_until_that_is_deleted() {
    let world = World::new(1);
    let (one, two) = (world.stopped(1), world.stopped(2));
    let alias = |text: &str| Some(text.parse::<cocalc_ids::ProjectAlias>().unwrap());
    let named = world.store.set_alias(one.id, alias("thesis")).unwrap();
    assert_eq!(named.config.alias, alias("thesis"));
    assert_eq!(world.store.project_of_alias(&alias("thesis").unwrap()).unwrap(), Some(one.id));
    let taken = world.store.set_alias(two.id, alias("thesis"));
    assert!(matches!(taken, Err(Error::Exists { .. })), "{taken:?}");
    assert_eq!(world.store.project(two.id).unwrap().config.alias, None, "nothing half done");
    // Another one in its place frees the first.
    world.store.set_alias(one.id, alias("paper")).unwrap();
    world.store.set_alias(two.id, alias("thesis")).unwrap();
    world.store.set_alias(two.id, None).unwrap();
    assert_eq!(world.store.project_of_alias(&alias("thesis").unwrap()).unwrap(), None);
    // With its project it goes.
    let delete = OperationId::from_bytes([9; 16]);
    world.store.begin(delete, one.id, world.owner, &Job::Delete, &ANY, NOW).unwrap();
    world.end(delete, ProjectState::Deleted);
    assert_eq!(world.store.project_of_alias(&alias("paper").unwrap()).unwrap(), None);
    world.store.set_alias(two.id, alias("paper")).unwrap();
}
