//! The contract suite of `cocalc_core::bus`.

use std::{future::Future, sync::Arc, time::Duration};

use bytes::Bytes;
use cocalc_core::bus::{Bus, Error, Message, Payload, Subscription};

/// How long anything may take before the suite gives up.
const LIMIT: Duration = Duration::from_secs(20);

/// A bus with nobody on it, and three clients.
#[derive(Debug)]
pub struct Fixture {
    /// A client that may do everything below `open.`.
    pub one: Arc<dyn Bus>,
    /// Another one.
    pub two: Arc<dyn Bus>,
    /// A client that may publish and subscribe below `open.`, and nothing
    /// else; in particular not below `closed.`.
    pub limited: Arc<dyn Bus>,
    /// More than any subscription queues, in bytes, wherever along the way.
    pub overflow: usize,
}

/// Runs every promise of the bus against fresh fixtures.
///
/// # Panics
///
/// With the broken promise.
pub async fn bus<F: Future<Output = Fixture>>(make: impl Fn() -> F) {
    messages_arrive_as_sent(&make().await).await;
    order_is_kept(&make().await).await;
    wildcards_select(&make().await).await;
    one_of_each_group_receives(&make().await).await;
    one_client_may_be_in_several_groups(&make().await).await;
    a_tap_on_everything_is_not_counted(&make().await).await;
    requests_are_answered(&make().await).await;
    requests_fail_in_their_own_ways(&make().await).await;
    interest_is_awaited(&make().await).await;
    dropping_unsubscribes(&make().await).await;
    malformed_subjects_are_refused(&make().await).await;
    what_is_not_permitted_is_denied(&make().await).await;
    large_messages_arrive_whole(&make().await).await;
    a_slow_reader_loses_its_subscription(&make().await).await;
}

async fn messages_arrive_as_sent(Fixture { one, two, .. }: &Fixture) {
    let mut reader = two.subscribe("open.a", None).await.unwrap();
    let mut sent = text("hello");
    sent.headers.insert("Name".to_owned(), serde_json::json!({ "nested": [1, "ü", null] }));
    assert_eq!(one.publish("open.a", sent.clone()).await.unwrap(), 1, "one group listens");
    let got = next(&mut reader).await;
    assert_eq!(got, Message { subject: "open.a".to_owned(), payload: sent, reply: None });

    let empty = Payload::default();
    assert_eq!(one.publish("open.a", empty.clone()).await.unwrap(), 1);
    assert_eq!(next(&mut reader).await.payload, empty, "an empty message is a message");
    assert_eq!(one.publish("open.nobody", text("x")).await.unwrap(), 0, "nobody listens");
}

async fn order_is_kept(Fixture { one, two, .. }: &Fixture) {
    let mut reader = two.subscribe("open.>", None).await.unwrap();
    for i in 0..500 {
        let subject = if i % 2 == 0 { "open.even" } else { "open.odd" };
        one.publish(subject, text(&i.to_string())).await.unwrap();
    }
    for i in 0..500 {
        assert_eq!(
            body(&next(&mut reader).await),
            i.to_string(),
            "messages of one publisher keep their order"
        );
    }
}

async fn wildcards_select(Fixture { one, two, .. }: &Fixture) {
    let mut star = two.subscribe("open.*.c", None).await.unwrap();
    let mut tail = two.subscribe("open.b.>", None).await.unwrap();
    assert_eq!(one.publish("open.b.c", text("both")).await.unwrap(), 2);
    assert_eq!(one.publish("open.b", text("neither")).await.unwrap(), 0, "`>` is at least one token");
    assert_eq!(one.publish("open.b.x.c", text("tail")).await.unwrap(), 1, "`*` is one token");
    assert_eq!(one.publish("open.x.c", text("star")).await.unwrap(), 1);
    assert_eq!(body(&next(&mut star).await), "both");
    assert_eq!(body(&next(&mut star).await), "star");
    assert_eq!(body(&next(&mut tail).await), "both");
    assert_eq!(body(&next(&mut tail).await), "tail");
}

async fn one_of_each_group_receives(Fixture { one, two, limited, .. }: &Fixture) {
    let mut work_one = one.subscribe("open.job", Some("work")).await.unwrap();
    let mut work_two = two.subscribe("open.job", Some("work")).await.unwrap();
    let mut audit = limited.subscribe("open.job", Some("audit")).await.unwrap();
    let sent: Vec<_> = (0..60).map(|i| i.to_string()).collect();
    for job in &sent {
        assert_eq!(one.publish("open.job", text(job)).await.unwrap(), 2, "two groups listen");
    }
    let mut done = Vec::new();
    for job in &sent {
        assert_eq!(&body(&next(&mut audit).await), job, "a group of one receives all");
        tokio::select! {
            job = next(&mut work_one) => done.push(body(&job)),
            job = next(&mut work_two) => done.push(body(&job)),
        }
    }
    done.sort_by_key(|job| job.parse::<u32>().unwrap());
    assert_eq!(done, sent, "each job is done once");
    nothing_comes(&mut work_one).await;
    nothing_comes(&mut work_two).await;
}

async fn one_client_may_be_in_several_groups(Fixture { one, two, .. }: &Fixture) {
    let mut alone = two.subscribe("open.x", None).await.unwrap();
    let mut also_alone = two.subscribe("open.x", None).await.unwrap();
    let mut grouped = two.subscribe("open.x", Some("g")).await.unwrap();
    let mut same_group = two.subscribe("open.x", Some("g")).await.unwrap();
    assert_eq!(one.publish("open.x", text("m")).await.unwrap(), 3);
    assert_eq!(body(&next(&mut alone).await), "m");
    assert_eq!(body(&next(&mut also_alone).await), "m");
    let got = tokio::select! {
        got = next(&mut grouped) => got,
        got = next(&mut same_group) => got,
    };
    assert_eq!(body(&got), "m");
    nothing_comes(&mut grouped).await;
    nothing_comes(&mut same_group).await;
}

async fn a_tap_on_everything_is_not_counted(Fixture { one, two, .. }: &Fixture) {
    // Not every client may listen to everything; who may is not counted.
    let Ok(mut tap) = two.subscribe(">", None).await else { return };
    assert_eq!(one.publish("open.tapped", text("m")).await.unwrap(), 0);
    assert_eq!(body(&next(&mut tap).await), "m");
    assert!(!one.wait_for_interest("open.tapped", Duration::ZERO).await.unwrap());
}

async fn requests_are_answered(Fixture { one, two, .. }: &Fixture) {
    let mut service = two.subscribe("open.service", Some("0")).await.unwrap();
    let served = async {
        for _ in 0..2 {
            let request = next(&mut service).await;
            let reply = request.reply.clone().expect("a request says where to reply");
            assert_eq!(request.payload.headers["CN-Reply"], reply.as_str());
            let answer = text(&format!("re: {}", body(&request)));
            assert_eq!(two.publish(&reply, answer.clone()).await.unwrap(), 1, "the caller listens");
            // A second answer is nobody's; it must not be taken for the next.
            two.publish(&reply, text("again")).await.unwrap();
        }
    };
    let called = async {
        for question in ["a", "b"] {
            let reply = one.request("open.service", text(question), LIMIT).await.unwrap();
            assert_eq!(body(&reply), format!("re: {question}"));
        }
    };
    tokio::join!(served, called);
}

async fn requests_fail_in_their_own_ways(Fixture { one, two, .. }: &Fixture) {
    let error = one.request("open.nobody", text("x"), LIMIT).await.unwrap_err();
    assert!(matches!(&error, Error::NoInterest { subject } if subject == "open.nobody"), "{error:?}");
    let _silent = two.subscribe("open.silent", None).await.unwrap();
    let limit = Duration::from_millis(50);
    let error = one.request("open.silent", text("x"), limit).await.unwrap_err();
    assert!(matches!(&error, Error::TimedOut { .. }), "{error:?}");
}

async fn interest_is_awaited(Fixture { one, two, .. }: &Fixture) {
    assert!(!one.wait_for_interest("open.late", Duration::ZERO).await.unwrap());
    assert!(!one.wait_for_interest("open.late", Duration::from_millis(20)).await.unwrap());
    let (found, mut reader) = tokio::join!(one.wait_for_interest("open.late", LIMIT), async {
        two.subscribe("open.*", None).await.unwrap()
    });
    assert!(found.unwrap());
    assert_eq!(one.publish("open.late", text("m")).await.unwrap(), 1, "interest means that messages arrive");
    assert_eq!(body(&next(&mut reader).await), "m");
    assert!(one.wait_for_interest("open.late", Duration::ZERO).await.unwrap());
}

async fn dropping_unsubscribes(Fixture { one, two, .. }: &Fixture) {
    let reader = two.subscribe("open.gone", None).await.unwrap();
    assert_eq!(one.publish("open.gone", text("x")).await.unwrap(), 1);
    drop(reader);
    let deadline = tokio::time::Instant::now() + LIMIT;
    while one.publish("open.gone", text("x")).await.unwrap() != 0 {
        assert!(tokio::time::Instant::now() < deadline, "a dropped subscription still counts");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let mut again = two.subscribe("open.gone", None).await.unwrap();
    assert_eq!(one.publish("open.gone", text("new")).await.unwrap(), 1);
    assert_eq!(body(&next(&mut again).await), "new", "nothing old is left over");
}

async fn malformed_subjects_are_refused(Fixture { one, .. }: &Fixture) {
    for subject in ["", "open.", ".open", "open..a", "open.*", "open.>", "open. a"] {
        let errors = [
            one.publish(subject, text("x")).await.err(),
            one.request(subject, text("x"), LIMIT).await.err(),
            one.wait_for_interest(subject, LIMIT).await.err(),
        ];
        for error in errors {
            assert!(matches!(error, Some(Error::InvalidSubject { .. })), "{subject:?}: {error:?}");
        }
    }
    for pattern in ["", "open.", "open..a", "open.>.a", "open.a*", "open.\ta"] {
        let error = one.subscribe(pattern, None).await.err();
        assert!(matches!(error, Some(Error::InvalidSubject { .. })), "{pattern:?}: {error:?}");
    }
}

async fn what_is_not_permitted_is_denied(Fixture { one, two, limited, .. }: &Fixture) {
    let mut reader = two.subscribe("open.ok", None).await.unwrap();
    let errors = [
        limited.publish("closed.a", text("x")).await.err(),
        limited.subscribe("closed.a", None).await.err(),
        limited.subscribe("*.a", None).await.err(),
        limited.subscribe(">", None).await.err(),
        limited.request("closed.a", text("x"), LIMIT).await.err(),
        limited.wait_for_interest("closed.a", LIMIT).await.err(),
    ];
    for (place, error) in errors.iter().enumerate() {
        assert!(matches!(error, Some(Error::Denied { .. })), "{place}: {error:?}");
    }
    assert_eq!(limited.publish("open.ok", text("m")).await.unwrap(), 1, "what is permitted goes on");
    assert_eq!(body(&next(&mut reader).await), "m");
    // An answer to whoever asked is always permitted.
    let mut service = limited.subscribe("open.service", None).await.unwrap();
    let (reply, ()) = tokio::join!(one.request("open.service", text("q"), LIMIT), async {
        let request = next(&mut service).await;
        limited.publish(&request.reply.unwrap(), text("a")).await.unwrap();
    });
    assert_eq!(body(&reply.unwrap()), "a");
}

async fn large_messages_arrive_whole(Fixture { one, two, overflow, .. }: &Fixture) {
    let size = (*overflow / 8).min(20 * 1024 * 1024);
    let body: Vec<u8> = (0..size).map(|i| u8::try_from(i % 251).unwrap()).collect();
    let sent = Payload { data: Bytes::from(body), headers: [("H".to_owned(), 1.into())].into() };
    let mut reader = two.subscribe("open.large", None).await.unwrap();
    assert_eq!(one.publish("open.large", sent.clone()).await.unwrap(), 1);
    let got = next(&mut reader).await;
    assert!(got.payload == sent, "a large message arrives unchanged");
}

async fn a_slow_reader_loses_its_subscription(Fixture { one, two, limited, overflow }: &Fixture) {
    let mut slow = two.subscribe("open.flood", None).await.unwrap();
    let mut other = limited.subscribe("open.flood", None).await.unwrap();
    let size = 64 * 1024;
    let count = overflow.div_ceil(size);
    for i in 0..count {
        let mut body = i.to_string().into_bytes();
        body.resize(size, b' ');
        one.publish("open.flood", Payload { data: body.into(), ..Payload::default() }).await.unwrap();
        // Whoever reads is not affected by who doesn't.
        assert_eq!(body_number(&next(&mut other).await), i);
    }
    // What it had is there, without a gap; then it ends.
    let mut read = 0;
    while let Some(message) =
        tokio::time::timeout(LIMIT, slow.next()).await.expect("a slow subscription ends")
    {
        assert_eq!(body_number(&message), read, "there is no gap");
        read += 1;
    }
    assert!(read < count, "the queue is bounded");
    assert_eq!(one.publish("open.flood", text("after")).await.unwrap(), 1, "it is gone from the bus");
    let mut again = two.subscribe("open.flood", None).await.unwrap();
    assert_eq!(one.publish("open.flood", text("new")).await.unwrap(), 2);
    assert_eq!(body(&next(&mut again).await), "new", "the client can subscribe again");
}

fn text(text: &str) -> Payload {
    Payload { data: Bytes::copy_from_slice(text.as_bytes()), ..Payload::default() }
}

fn body(message: &Message) -> String {
    String::from_utf8(message.payload.data.to_vec()).unwrap()
}

fn body_number(message: &Message) -> usize {
    body(message).trim_end().parse().unwrap()
}

async fn next(subscription: &mut Subscription) -> Message {
    tokio::time::timeout(LIMIT, subscription.next())
        .await
        .expect("a message arrives in time")
        .expect("the subscription goes on")
}

/// Checks that nothing is queued, once everything else has been delivered.
async fn nothing_comes(subscription: &mut Subscription) {
    let none = tokio::time::timeout(Duration::from_millis(20), subscription.next()).await;
    assert!(none.is_err(), "an extra message: {none:?}");
}
