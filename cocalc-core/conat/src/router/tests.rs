//! The routing core against a naive model of it, from seeds.

use std::collections::{BTreeMap, BTreeSet};

use super::*;

const SECOND: Duration = Duration::from_secs(1);

fn listen(pattern: &str, queue: &str) -> Batch<Listen> {
    let item = Listen { pattern: pattern.to_owned(), queue: queue.to_owned() };
    Batch { items: vec![Ok(item)], many: false }
}

fn frame(subject: &str, id: &str, seq: u64, done: bool) -> Request {
    Request::Publish(Publication {
        subject: subject.to_owned(),
        id: id.to_owned(),
        seq,
        done,
        encoding: 1,
        blob: bytes::Bytes::from(vec![b'x'; 100]),
        headers: None,
    })
}

fn ask(router: &mut Router, socket: u64, request: Request, now: Duration) {
    let socket = SocketId(socket);
    router.request(Received { socket, ack: Some(1), request, at: now, auth: Duration::ZERO }, now);
}

fn effects(router: &mut Router) -> Vec<Effect> {
    std::iter::from_fn(|| router.effect()).collect()
}

fn router(sockets: u64) -> Router {
    let mut router = Router::new(7);
    for socket in 0..sockets {
        router.open(SocketId(socket), Limits::default());
    }
    router
}

/// The members that got a delivery, with its pattern and place.
fn deliveries(effects: &[Effect]) -> Vec<(u64, String, u64)> {
    let delivery = |effect: &Effect| match effect {
        Effect::Send { socket, outgoing: Outgoing::Delivery(delivery) } => {
            Some((socket.0, delivery.pattern.to_string(), delivery.publication.seq))
        }
        _ => None,
    };
    effects.iter().filter_map(delivery).collect()
}

fn replies(effects: &[Effect]) -> Vec<(u64, &Reply)> {
    let reply = |effect: &'_ Effect| match effect {
        Effect::Send { socket, outgoing: Outgoing::Reply { .. } } => Some(socket.0),
        _ => None,
    };
    effects
        .iter()
        .filter_map(|effect| match effect {
            Effect::Send { outgoing: Outgoing::Reply { reply: value, .. }, .. } => {
                Some((reply(effect)?, value))
            }
            _ => None,
        })
        .collect()
}

fn count(effects: &[Effect]) -> usize {
    match replies(effects).last() {
        Some((_, Reply::Published { count, .. })) => *count,
        other => panic!("not an answer to a publication: {other:?}"),
    }
}

/// What the core shall do, in the simplest words.
#[derive(Default)]
struct Model {
    /// Socket and pattern → group.
    listening: BTreeMap<(u64, String), String>,
}

impl Model {
    /// The groups that match, and who is in them.
    fn groups(&self, subject: &str) -> BTreeMap<(String, String), BTreeSet<u64>> {
        let mut groups: BTreeMap<_, BTreeSet<u64>> = BTreeMap::new();
        for ((socket, pattern), group) in &self.listening {
            if subject::matches(pattern, subject) {
                groups.entry((pattern.clone(), group.clone())).or_default().insert(*socket);
            }
        }
        groups
    }
}

#[test]
fn the_core_does_what_the_model_says() {
    const SOCKETS: u64 = 6;
    let patterns = ["a", "a.b", "a.*", "*.b", "a.>", ">", "*", "a.b.c", "*.*.c", "a.*.>", "b"];
    let subjects = ["a", "b", "a.b", "a.c", "b.b", "a.b.c", "a.x.c", "z.z.z.z"];
    for seed in 0..200 {
        let mut random = Random::new(seed);
        let mut core = Router::new(seed);
        let mut model = Model::default();
        let mut open = BTreeSet::new();
        for step in 0..300_u64 {
            let now = SECOND * u32::try_from(step).unwrap();
            let socket = random.below(usize::try_from(SOCKETS).unwrap()) as u64;
            let pattern = patterns[random.below(patterns.len())];
            match random.below(10) {
                0 if open.insert(socket) => core.open(SocketId(socket), Limits::default()),
                1 if random.below(5) == 0 => {
                    open.remove(&socket);
                    core.close(SocketId(socket));
                    model.listening.retain(|(owner, _), _| *owner != socket);
                }
                2..=4 if open.contains(&socket) => {
                    let group = ["p", "q"][random.below(2)];
                    ask(&mut core, socket, Request::Subscribe(listen(pattern, group)), now);
                    let effects = effects(&mut core);
                    let key = (socket, pattern.to_owned());
                    let new = !model.listening.contains_key(&key);
                    let [(_, Reply::Subscribed { items, many: false })] = replies(&effects)[..] else {
                        panic!("seed {seed}: {effects:?}")
                    };
                    assert_eq!(items[..], [Ok(new)], "seed {seed}");
                    model.listening.entry(key).or_insert_with(|| group.to_owned());
                }
                5 if open.contains(&socket) => {
                    let batch = Batch { items: vec![Ok(pattern.to_owned())], many: false };
                    ask(&mut core, socket, Request::Unsubscribe(batch), now);
                    model.listening.remove(&(socket, pattern.to_owned()));
                }
                _ if open.contains(&socket) => {
                    let subject = subjects[random.below(subjects.len())];
                    ask(&mut core, socket, frame(subject, "id", 0, true), now);
                    let effects = effects(&mut core);
                    let groups = model.groups(subject);
                    let counted = groups.keys().filter(|(pattern, _)| pattern != ">").count();
                    assert_eq!(count(&effects), counted, "seed {seed}: {subject}");
                    // Each group got it once, at one of its members.
                    let mut missing = groups;
                    for (member, pattern, _) in deliveries(&effects) {
                        let group = missing
                            .iter()
                            .find(|((of, _), members)| *of == pattern && members.contains(&member))
                            .map(|(group, _)| group.clone())
                            .unwrap_or_else(|| panic!("seed {seed}: {member} got {pattern} for nothing"));
                        missing.remove(&group);
                    }
                    assert!(missing.is_empty(), "seed {seed}: {missing:?} got nothing");
                }
                _ => {}
            }
            for socket in &open {
                core.wrote(SocketId(*socket), usize::MAX);
            }
            effects(&mut core);
        }
        for socket in open {
            core.close(SocketId(socket));
        }
        assert!(
            core.topics.is_empty() && core.timers.is_empty() && core.sockets.is_empty(),
            "nothing is left"
        );
    }
}

#[test]
fn the_same_seed_does_the_same() {
    let run = || {
        let mut core = router(5);
        for socket in 1..5 {
            ask(&mut core, socket, Request::Subscribe(listen("a.*", "g")), SECOND);
        }
        for _ in 0..50 {
            ask(&mut core, 0, frame("a.b", "id", 0, true), SECOND);
        }
        deliveries(&effects(&mut core))
    };
    let first = run();
    assert_eq!(first.len(), 50);
    assert_eq!(first, run());
    let members: BTreeSet<_> = first.iter().map(|(member, ..)| *member).collect();
    assert_eq!(members.len(), 4, "the work is spread");
}

#[test]
fn chunks_stay_with_their_member() {
    let mut core = router(5);
    for socket in 1..5 {
        ask(&mut core, socket, Request::Subscribe(listen("a", "g")), SECOND);
    }
    effects(&mut core);
    for id in 0..20 {
        let id = id.to_string();
        for seq in 0..4 {
            ask(&mut core, 0, frame("a", &id, seq, seq == 3), SECOND);
        }
        let effects = effects(&mut core);
        let got = deliveries(&effects);
        assert_eq!(got.iter().map(|(.., seq)| *seq).collect::<Vec<_>>(), [0, 1, 2, 3]);
        assert!(got.iter().all(|(member, ..)| *member == got[0].0), "{got:?}");
    }
    assert!(core.timers.is_empty(), "nothing is kept of messages that are complete");
}

#[test]
fn a_message_whose_member_left_is_not_continued_elsewhere() {
    let mut core = router(4);
    for socket in 1..3 {
        ask(&mut core, socket, Request::Subscribe(listen("a", "g")), SECOND);
    }
    ask(&mut core, 3, Request::Subscribe(listen("a", "other")), SECOND);
    effects(&mut core);
    ask(&mut core, 0, frame("a", "m", 0, false), SECOND);
    let first = deliveries(&effects(&mut core));
    let member = first.iter().find(|(member, ..)| *member != 3).unwrap().0;
    core.close(SocketId(member));
    ask(&mut core, 0, frame("a", "m", 1, true), SECOND);
    let effects = effects(&mut core);
    assert_eq!(deliveries(&effects), [(3, "a".to_owned(), 1)]);
    assert_eq!(count(&effects), 1);
}

#[test]
fn chunks_out_of_place_reach_nobody() {
    let mut core = router(2);
    ask(&mut core, 1, Request::Subscribe(listen(">", "t")), SECOND);
    ask(&mut core, 1, Request::Subscribe(listen("*", "g")), SECOND);
    effects(&mut core);
    let reached = |core: &mut Router, request, now| {
        ask(core, 0, request, now);
        deliveries(&effects(core)).len()
    };
    assert_eq!(reached(&mut core, frame("a", "m", 1, true), SECOND), 0, "no first chunk");
    assert_eq!(reached(&mut core, frame("a", "m", 0, false), SECOND), 2);
    assert_eq!(reached(&mut core, frame("a", "m", 2, true), SECOND), 0, "a gap");
    assert_eq!(reached(&mut core, frame("a", "m", 0, false), SECOND), 2);
    assert_eq!(reached(&mut core, frame("b", "m", 1, true), SECOND), 0, "another subject");
    assert_eq!(reached(&mut core, frame("a", "m", 0, false), SECOND), 2);
    let late = SECOND + PIN_IDLE;
    core.expire(late);
    assert_eq!(reached(&mut core, frame("a", "m", 1, true), late), 0, "too late");
    assert!(core.timers.is_empty());
}

#[test]
fn a_message_is_bounded_over_all_its_chunks() {
    let mut core = Router::new(1);
    core.open(SocketId(0), Limits { message_bytes_max: 250, ..Limits::default() });
    ask(&mut core, 0, frame("a", "m", 0, false), SECOND);
    ask(&mut core, 0, frame("a", "m", 1, false), SECOND);
    ask(&mut core, 0, frame("a", "m", 2, false), SECOND);
    let effects = effects(&mut core);
    let codes: Vec<_> = replies(&effects)
        .iter()
        .map(|(_, reply)| if let Reply::Failed(failure) = reply { failure.code } else { 0 })
        .collect();
    assert_eq!(codes, [0, 0, 413]);
    assert!(core.timers.is_empty());
}

#[test]
fn who_is_too_far_behind_is_closed_and_another_member_takes_over() {
    let mut core = Router::new(3);
    core.open(SocketId(0), Limits::default());
    for socket in [1, 2] {
        core.open(SocketId(socket), Limits { queue_bytes_max: 10_000, ..Limits::default() });
        ask(&mut core, socket, Request::Subscribe(listen("a", "g")), SECOND);
    }
    effects(&mut core);
    let mut closed = Vec::new();
    for _ in 0..1000 {
        ask(&mut core, 0, frame("a", "m", 0, true), SECOND);
        let effects = effects(&mut core);
        closed.extend(effects.iter().filter_map(|effect| match effect {
            Effect::Close { socket, reason } => Some((socket.0, *reason)),
            Effect::Send { .. } => None,
        }));
        if closed.is_empty() {
            assert_eq!(count(&effects), 1);
        } else if let [(slow, _)] = closed[..] {
            let other = 3 - slow;
            assert_eq!(deliveries(&effects).iter().map(|(member, ..)| *member).collect::<Vec<_>>(), [other]);
            core.wrote(SocketId(other), usize::MAX);
        }
        core.wrote(SocketId(0), usize::MAX);
    }
    assert_eq!(closed.len(), 1, "only who does not read is closed");
    assert_eq!(closed[0].1, Closed::Slow);
}

#[test]
fn one_message_of_any_size_may_wait_alone() {
    let mut core = Router::new(3);
    core.open(SocketId(0), Limits { queue_bytes_max: 1, ..Limits::default() });
    ask(&mut core, 0, Request::Subscriptions, SECOND);
    assert!(matches!(effects(&mut core)[..], [Effect::Send { .. }]));
    ask(&mut core, 0, Request::Subscriptions, SECOND);
    assert!(matches!(effects(&mut core)[..], [Effect::Close { reason: Closed::Slow, .. }]));
    assert!(core.sockets.is_empty());
}

#[test]
fn interest_is_answered_once() {
    let mut core = router(3);
    let wait = |limit| Request::WaitForInterest { subject: "a.b".to_owned(), limit };
    ask(&mut core, 0, wait(Duration::ZERO), SECOND);
    assert!(matches!(replies(&effects(&mut core))[..], [(0, Reply::Interest(false))]));
    ask(&mut core, 0, wait(5 * SECOND), SECOND);
    ask(&mut core, 1, wait(9 * SECOND), SECOND);
    assert!(effects(&mut core).is_empty());
    assert_eq!(core.deadline(), Some(6 * SECOND));
    core.expire(6 * SECOND);
    assert!(matches!(replies(&effects(&mut core))[..], [(0, Reply::Interest(false))]));
    // A tap on everything is nobody's interest.
    ask(&mut core, 2, Request::Subscribe(listen(">", "t")), 7 * SECOND);
    assert_eq!(replies(&effects(&mut core)).len(), 1);
    ask(&mut core, 2, Request::Subscribe(listen("a.*", "g")), 7 * SECOND);
    let found = effects(&mut core);
    assert!(matches!(replies(&found)[0], (1, Reply::Interest(true))), "{found:?}");
    assert_eq!(core.deadline(), None);
    ask(&mut core, 0, wait(5 * SECOND), 8 * SECOND);
    core.close(SocketId(0));
    assert_eq!(core.deadline(), None, "who left waits no longer");
}

#[test]
fn a_call_is_answered_by_who_was_asked() {
    let mut core = router(3);
    let call = || {
        Request::Call(Call {
            subject: "svc.a".to_owned(),
            kind: CallKind::Fast,
            members: Vec::new(),
            blob: None,
            limit: 5 * SECOND,
        })
    };
    let failed = |effects: &[Effect]| match replies(effects)[..] {
        [(0, Reply::Failed(failure))] => failure.code,
        _ => panic!("{effects:?}"),
    };
    ask(&mut core, 0, call(), SECOND);
    assert_eq!(failed(&effects(&mut core)), 503);
    ask(&mut core, 1, Request::Serve(listen("svc.*", "0")), SECOND);
    effects(&mut core);
    let pending = |core: &mut Router| {
        ask(core, 0, call(), SECOND);
        assert!(matches!(effects(core)[..], [Effect::Send { socket: SocketId(1), .. }]));
        *core.calls.keys().next().unwrap()
    };
    let answer = |id| {
        let json = serde_json::from_str("{}").unwrap();
        Request::Answer { id, value: RawMessage { json, blob: None } }
    };
    let id = pending(&mut core);
    ask(&mut core, 2, answer(id), SECOND);
    assert!(effects(&mut core).is_empty(), "somebody else's answer");
    ask(&mut core, 1, answer(id), 2 * SECOND);
    let answered = effects(&mut core);
    let [(0, Reply::Answered { times, .. })] = replies(&answered)[..] else { panic!("{answered:?}") };
    assert_eq!(times.target, Some(SECOND));
    ask(&mut core, 1, answer(id), 2 * SECOND);
    assert!(effects(&mut core).is_empty(), "a second answer");
    pending(&mut core);
    core.expire(6 * SECOND);
    assert_eq!(failed(&effects(&mut core)), 408);
    pending(&mut core);
    core.close(SocketId(1));
    assert_eq!(failed(&effects(&mut core)), 503);
    assert!(core.calls.is_empty() && core.timers.is_empty());
    assert!(core.services.is_empty());
}
