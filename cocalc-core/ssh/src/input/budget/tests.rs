use std::collections::BTreeMap;

use super::*;

const MIB: usize = 1024 * 1024;

impl Budget {
    fn used(&self) -> usize {
        self.lock().used
    }
}

fn queue(budget: &Arc<Budget>, project: u8) -> (InputSender, InputReceiver, CancellationToken) {
    let overflow = CancellationToken::new();
    let (sender, receiver) =
        input(budget, Holder::Project(ProjectId::from_bytes([project; 16])), &overflow, &Arc::default());
    (sender, receiver, overflow)
}

#[tokio::test]
async fn a_queue_knows_its_level_and_its_end() {
    let budget = Budget::new(usize::MAX);
    let (sender, mut receiver, overflow) = queue(&budget, 1);
    assert!(sender.push(&[0; 1000]));
    assert_eq!(sender.queued(), 1000 + ENTRY_BYTES);
    assert_eq!(receiver.next().await.unwrap().len(), 1000);
    assert_eq!(sender.queued(), 1000 + ENTRY_BYTES, "what is being written is still held");
    assert!(sender.push(b"x"));
    receiver.next().await.unwrap();
    assert_eq!(sender.queued(), 1 + ENTRY_BYTES);
    assert_eq!(budget.used(), 1 + ENTRY_BYTES);
    let big = vec![0; MIB];
    let taken = (0..100).take_while(|_| sender.push(&big)).count();
    assert!(taken < 33, "{taken} MiB were queued");
    assert!(overflow.is_cancelled());
    assert_eq!(budget.used(), 0, "what is given up is free at once");
    // The end of what was given up is not the end of the input.
    drop(sender);
    let next = tokio::time::timeout(Duration::from_millis(20), receiver.next());
    assert!(next.await.is_err(), "a part was taken for the whole");
    drop(receiver);
    assert_eq!(budget.used(), 0);
    assert!(budget.lock().holders.is_empty());

    let (sender, receiver, _) = queue(&budget, 1);
    assert!(sender.push(&big));
    drop(receiver);
    assert!(sender.push(&big), "what nobody wants is dropped, not an error");
    assert_eq!((sender.queued(), budget.used()), (0, 0));

    // What was sent before the end arrives, and who waits learns of the end.
    let (sender, mut receiver, _) = queue(&budget, 1);
    assert!(sender.push(b"last"));
    let rest = tokio::spawn(async move {
        let first = receiver.next().await;
        (first, receiver.next().await)
    });
    tokio::task::yield_now().await;
    drop(sender);
    assert_eq!(rest.await.unwrap(), (Some(Bytes::from_static(b"last")), None));
}

#[test]
fn who_has_most_gives_up_first() {
    let budget = Budget::new(8 << 20);
    let chunk = Bytes::from(vec![0; 512 * 1024]);
    let start = Instant::now();
    // One project has three queues that do not read, another has one, and a
    // third one reads.
    let mut greedy: Vec<_> = (0..3).map(|_| queue(&budget, 1)).collect();
    let mut modest = queue(&budget, 2);
    for (_, receiver, _) in greedy.iter_mut().chain([&mut modest]) {
        assert!(matches!(receiver.take_at(start), Next::Wait));
    }
    for _ in 0..3 {
        for (sender, ..) in greedy.iter().chain([&modest]) {
            assert!(sender.push_at(chunk.clone(), start));
        }
    }
    let (sender, mut receiver, overflow) = queue(&budget, 3);
    let mut reads = |at: Instant| {
        for _ in 0..6 {
            assert!(sender.push_at(chunk.clone(), at));
        }
        greedy.retain(|(.., overflow)| !overflow.is_cancelled());
        for _ in 0..6 {
            assert!(matches!(receiver.take_at(at), Next::Piece(_)));
        }
        assert!(matches!(receiver.take_at(at), Next::Wait));
        greedy.len()
    };
    assert!((0..100).all(|_| reads(start) == 2), "one was enough");
    // Above three quarters who does not read may stay for a while, until
    // its project has no more than others.
    assert_eq!(reads(start + PATIENCE - Duration::from_millis(1)), 2);
    assert!((0..100).all(|_| reads(start + PATIENCE + LOOK_AGAIN) == 1));
    assert!(!modest.2.is_cancelled() && !overflow.is_cancelled());
    drop((greedy, modest, receiver));
    assert_eq!(budget.used(), 0);
}

#[test]
fn many_small_queues_are_bounded_as_well() {
    let budget = Budget::new(MIB);
    let piece = Bytes::from(vec![0; 1000]);
    let queues: Vec<_> = (0..100).map(|number| queue(&budget, number % 7)).collect();
    for _ in 0..1000 {
        for (sender, ..) in &queues {
            sender.push_at(piece.clone(), Instant::now());
            assert!(budget.used() <= MIB);
        }
    }
    assert!(queues.iter().any(|(.., overflow)| overflow.is_cancelled()));
}

#[test]
fn what_is_being_written_to_who_does_not_read_costs_nobody_else_a_channel() {
    let budget = Budget::new(8 << 20);
    let start = Instant::now();
    let packet = Bytes::from(vec![0; 256 * 1024]);
    // All of it is in the hands of tasks that write to processes that do not read.
    let mut greedy: Vec<_> = (0..31).map(|_| queue(&budget, 1)).collect();
    for (sender, receiver, _) in &mut greedy {
        assert!(sender.push_at(packet.clone(), start));
        assert!(matches!(receiver.take_at(start), Next::Piece(_)));
    }
    let others: Vec<_> = (2..100).map(|project| queue(&budget, project)).collect();
    for second in 0..20 {
        for (sender, ..) in &others {
            assert!(sender.push_at(Bytes::from(vec![0; 1000]), start + Duration::from_secs(second)));
            assert!(budget.used() <= 8 << 20);
        }
    }
    assert!(greedy.iter().any(|(.., overflow)| overflow.is_cancelled()));
    // Who was given up gets nothing more, and counts for nothing.
    for (_, receiver, overflow) in &mut greedy {
        let given_up = matches!(receiver.take_at(start), Next::Never);
        assert_eq!(given_up, overflow.is_cancelled());
    }
    drop(greedy);
    drop(others);
    assert_eq!(budget.used(), 0);
}

#[test]
fn the_places_of_small_pieces_are_given_back() {
    let budget = Budget::new(usize::MAX);
    let (sender, mut receiver, _) = queue(&budget, 1);
    for _ in 0..100_000 {
        assert!(sender.push_at(Bytes::from_static(b"x"), Instant::now()));
    }
    for _ in 0..99_990 {
        assert!(matches!(receiver.take_at(Instant::now()), Next::Piece(_)));
    }
    let place = &sender.place;
    let capacity = budget.lock().queue(place.holder, place.number).unwrap().pieces.capacity();
    assert!(capacity < 100, "{capacity} places for ten pieces");
}

#[test]
fn who_was_left_alone_for_long_goes_before_who_reads_also_with_little() {
    let budget = Budget::new(8 << 20);
    let start = Instant::now();
    let piece = Bytes::from(vec![0; 900_000]);
    let mut parked: Vec<_> = (0..8).map(|_| queue(&budget, 1)).collect();
    let mut typed = queue(&budget, 1);
    for (sender, receiver, _) in parked.iter_mut().chain([&mut typed]) {
        assert!(matches!(receiver.take_at(start), Next::Wait));
        let piece = if sender.place.number == 9 { Bytes::from_static(b"ls") } else { piece.clone() };
        assert!(sender.push_at(piece, start));
    }
    // One that waits for its project to start, with more than they have.
    let starting = queue(&budget, 1);
    let later = start + Duration::from_secs(3600);
    for _ in 0..2 {
        assert!(starting.0.push_at(piece.clone(), later));
    }
    let parked = parked.iter().filter(|(.., overflow)| !overflow.is_cancelled()).count();
    assert!((4..8).contains(&parked), "{parked}");
    assert!(!typed.2.is_cancelled() && !starting.2.is_cancelled());
}

struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}

/// A channel of the simulation, as its author knows it.
struct Channel {
    project: u8,
    sender: InputSender,
    receiver: InputReceiver,
    overflow: CancellationToken,
    /// Whether it reads; how often, in milliseconds, and how many pieces.
    reads: Option<(u64, u64)>,
    read_at: u64,
    /// Since when it has had something to read, and not read.
    waits_since: Option<u64>,
    /// Whether it has fallen behind.
    stalled: bool,
    /// How much it has read, in bytes.
    taken: usize,
}

/// Channels that read, more or less, and channels that do not, of few or of
/// many projects, open, send in bursts, and stop to read. Gives how many were
/// given up, and how often one that reads stayed beside.
fn simulate(seed: u64) -> (usize, usize) {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let max = MIB * (4 + random.below(28) as usize);
    let budget = Budget::new(max);
    let start = Instant::now();
    let piece = Bytes::from(vec![0; 32 * 1024]);
    let projects = 1 + random.below(5);
    let mut channels: BTreeMap<u64, Channel> = BTreeMap::new();
    let (mut given_up, mut spared) = (0, 0);
    let mut now = 0;
    for step in 0..3000_u64 {
        now += random.below(8);
        let at = start + Duration::from_millis(now);
        if channels.len() < 16 && random.below(10) == 0 {
            let project = random.below(projects) as u8;
            let (sender, mut receiver, overflow) = queue(&budget, project);
            assert!(matches!(receiver.take_at(at), Next::Wait));
            let reads = (random.below(2) == 0).then(|| (1 + random.below(1500), 1 + random.below(200)));
            let channel = Channel {
                project,
                sender,
                receiver,
                overflow,
                reads,
                read_at: now,
                waits_since: None,
                stalled: false,
                taken: 0,
            };
            channels.insert(step, channel);
        }
        for channel in channels.values_mut() {
            let Some((every, pieces)) = channel.reads else { continue };
            if random.below(4000) == 0 {
                channel.reads = None;
                continue;
            }
            if now < channel.read_at + every {
                continue;
            }
            channel.read_at = now;
            for _ in 0..pieces {
                match channel.receiver.take_at(at) {
                    Next::Piece(piece) => {
                        channel.waits_since = Some(now);
                        channel.taken += piece.len();
                    }
                    _ => channel.waits_since = None,
                }
                if channel.sender.queued() < READING_BYTES {
                    channel.stalled = false;
                }
            }
        }
        let Some(pushing) = channels.keys().nth(random.below(16) as usize).copied() else { continue };
        // What a client may send to who does not read, and a whole burst.
        let full = channels[&pushing].sender.queued() > 3 * MIB && random.below(20) > 0;
        let pieces = if full { 1 } else { random.below(64) };
        for _ in 0..pieces {
            let used_before = budget.used();
            let extra = cost(&piece);
            let own = channels[&pushing].sender.queued() + extra > CHANNEL_BYTES_MAX;
            // Seldom, since it takes most of the time of this test.
            let tight = own || used_before + extra > max - max / 4;
            let queued = |(number, channel): (&u64, &Channel)| (*number, channel.sender.queued());
            let before: BTreeMap<u64, usize> =
                if tight { channels.iter().map(queued).collect() } else { BTreeMap::new() };
            let channel = channels.get_mut(&pushing).unwrap();
            channel.waits_since.get_or_insert(now);
            if channel.sender.queued() + extra > STALLED_BYTES {
                channel.stalled = true;
            }
            let fits = channel.sender.push_at(piece.clone(), at);
            assert_eq!(fits, !channel.overflow.is_cancelled());
            // Always bounded, and counted rightly.
            let used = budget.used();
            assert!(used <= max, "seed {seed}: {used} of {max}");
            if !tight {
                assert!(fits, "seed {seed}: nothing had to go");
                continue;
            }
            let held: usize = channels.values().map(|channel| channel.sender.queued()).sum();
            assert_eq!(held, used, "seed {seed}");
            let mut gone: Vec<u64> = channels
                .iter()
                .filter(|(_, channel)| channel.overflow.is_cancelled())
                .map(|(number, _)| *number)
                .collect();
            if gone.is_empty() {
                continue;
            }
            given_up += gone.len();
            // No more than was needed: without the last of them it was too much.
            let largest = gone.iter().map(|number| before[number] + extra).max().unwrap();
            let wanted = used_before + extra;
            if !own {
                assert!(wanted > max - max / 4, "seed {seed}: nothing had to go");
                assert!(used + largest > max - max / 4, "seed {seed}: too much went");
            }
            gone.sort_unstable();
            for number in &gone {
                let victim = &channels[number];
                if own && *number == pushing {
                    continue;
                }
                let waits = |channel: &Channel| channel.waits_since.map_or(0, |since| now - since);
                for (other, channel) in &channels {
                    if channel.project != victim.project || gone.contains(other) {
                        continue;
                    }
                    let bytes = |number: &u64| before[number] + if *number == pushing { extra } else { 0 };
                    if bytes(other) == 0 {
                        continue;
                    }
                    let reads = |channel: &Channel| channel.taken > PROBATION_BYTES;
                    spared += usize::from(channel.stalled && reads(channel));
                    let class = |number: &u64, channel: &Channel| match channel.stalled {
                        _ if waits(channel) >= 3000 && bytes(number) >= WORTH_BYTES => 0,
                        stalled => 3 - usize::from(stalled) - usize::from(stalled && !reads(channel)),
                    };
                    let (its, the_others) = (class(number, victim), class(other, channel));
                    let before_it = match its {
                        3 => bytes(other) > bytes(number),
                        _ => waits(channel) > waits(victim),
                    };
                    assert!(
                        its < the_others || (its == the_others && !before_it),
                        "seed {seed}: not who reads least"
                    );
                }
                // It had its time, or there was no more room at all.
                assert!(wanted > max || waits(victim) >= 3000, "seed {seed}: no patience");
                // Nobody else had more at that moment: since then both have
                // only given back.
                let has = |project: u8| {
                    let its = channels.values().filter(|channel| channel.project == project);
                    its.map(|channel| channel.sender.queued()).sum::<usize>()
                };
                let gave = gone.iter().filter(|other| channels[other].project == victim.project);
                let had = has(victim.project) + gave.map(|other| before[other] + extra).sum::<usize>();
                for project in 0..projects as u8 {
                    assert!(had >= has(project), "seed {seed}: another project has more");
                }
            }
            for number in gone {
                channels.remove(&number);
            }
            if !channels.contains_key(&pushing) {
                break;
            }
        }
    }
    drop(channels);
    assert_eq!(budget.used(), 0);
    assert!(budget.lock().holders.is_empty());
    (given_up, spared)
}

#[test]
fn who_reads_is_never_given_up_for_who_does_not() {
    let seeds = if std::env::var_os("COCALC_FULL").is_some() { 500 } else { 5 };
    let (mut given_up, mut spared) = (0, 0);
    for seed in 0..seeds {
        let (all, readers) = simulate(seed);
        given_up += all;
        spared += readers;
    }
    // Otherwise nothing was shown.
    assert!(given_up > 100 * seeds as usize && spared > 20 * seeds as usize, "{given_up}, {spared}");
}
