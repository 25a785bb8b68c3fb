//! Conat's events: what clients ask for, and what they are answered.

use std::{fmt::Write as _, time::Duration};

use serde::Deserialize;
use serde_json::value::RawValue;

use super::{
    packet::{self, Event, Frame},
    raw::{PLACEHOLDER, is_placeholder, push_string},
};
use crate::router::{Batch, Call, CallKind, Failure, Listen, Publication, RawMessage, Reply, Request, Times};

/// How long a client may wait for interest; JavaScript clients cap it there.
const INTEREST_WAIT_MAX: Duration = Duration::from_secs(90);

/// How long a call of a service may take.
const CALL_MAX: Duration = Duration::from_secs(600);

/// How long a call may take that does not say.
const CALL_DEFAULT: Duration = Duration::from_secs(30);

/// Reads an event of a client. `None` for those that ask for nothing.
pub(crate) fn request(event: Event) -> Option<Request> {
    let argument = event.argument.as_deref().map_or("null", RawValue::get);
    let parsed = match event.name.as_str() {
        "publish" => publish(argument, event.blob).map(Request::Publish),
        "subscribe" => batch(argument, listen).map(Request::Subscribe),
        "unsubscribe" => batch(argument, pattern).map(Request::Unsubscribe),
        "rpc-service" => batch(argument, listen).map(Request::Serve),
        "rpc-service-close" => batch(argument, pattern).map(Request::StopServing),
        "subscriptions" => Some(Request::Subscriptions),
        "wait-for-interest" => wait(argument),
        "fast-rpc" => call(argument, CallKind::Fast, event.blob).map(Request::Call),
        "rpc" => call(argument, CallKind::Plain, event.blob).map(Request::Call),
        "rpc-raw" => raw_call(argument, event.blob).map(Request::Call),
        "rpc-raw-response" => {
            let answer = raw_response(argument)?;
            Some(Request::Answer {
                id: answer,
                value: RawMessage { json: event.argument?, blob: event.blob },
            })
        }
        // One node, which the client is talking to already.
        "cluster" => serde_json::from_str("[]").ok().map(Request::Echo),
        "stats" => return None,
        // Silence would make the caller wait for its own timeout.
        _ => return Some(Request::Refuse(Failure { code: 404, message: "unknown event".to_owned() })),
    };
    Some(parsed.unwrap_or_else(|| Request::Refuse(Failure::invalid("malformed request"))))
}

fn publish(argument: &str, blob: Option<bytes::Bytes>) -> Option<Publication> {
    let parts: Vec<&RawValue> = serde_json::from_str(argument).ok()?;
    let [subject, id, seq, done, encoding, place, rest @ ..] = parts.as_slice() else { return None };
    if !is_placeholder(place) {
        return None;
    }
    let headers = rest.first().filter(|headers| headers.get() != "null");
    if headers.is_some_and(|headers| !headers.get().starts_with('{')) {
        return None;
    }
    let id: String = serde_json::from_str(id.get()).ok()?;
    if id.len() > 64 {
        return None;
    }
    Some(Publication {
        subject: serde_json::from_str(subject.get()).ok()?,
        id,
        seq: serde_json::from_str(seq.get()).ok()?,
        done: match done.get() {
            "true" | "1" => true,
            "false" | "0" => false,
            _ => return None,
        },
        encoding: serde_json::from_str(encoding.get()).ok()?,
        blob: blob?,
        headers: headers.map(|headers| RawValue::to_owned(headers)),
    })
}

fn batch<T>(argument: &str, one: fn(Item) -> T) -> Option<Batch<T>> {
    let (items, many) = if argument.starts_with('[') {
        (serde_json::from_str::<Vec<Item>>(argument).ok()?, true)
    } else {
        (vec![serde_json::from_str::<Item>(argument).ok()?], false)
    };
    Some(Batch { items: items.into_iter().map(|item| Ok(one(item))).collect(), many })
}

#[derive(Deserialize)]
struct Item {
    subject: String,
    #[serde(default)]
    queue: Option<String>,
}

fn listen(item: Item) -> Listen {
    Listen { pattern: item.subject, queue: item.queue.unwrap_or_else(|| "0".to_owned()) }
}

fn pattern(item: Item) -> String {
    item.subject
}

fn wait(argument: &str) -> Option<Request> {
    #[derive(Deserialize)]
    struct Wait {
        subject: String,
        timeout: Option<f64>,
    }
    let wait: Wait = serde_json::from_str(argument).ok()?;
    let limit = wait.timeout.map_or(INTEREST_WAIT_MAX, millis).min(INTEREST_WAIT_MAX);
    Some(Request::WaitForInterest { subject: wait.subject, limit })
}

#[derive(Deserialize)]
struct CallArgument {
    #[serde(rename = "requestId")]
    request_id: Option<String>,
    subject: String,
    timeout: Option<f64>,
    payload: Option<Box<RawValue>>,
    encoding: Option<Box<RawValue>>,
    raw: Option<Box<RawValue>>,
    headers: Option<Box<RawValue>>,
}

fn call(argument: &str, kind: CallKind, blob: Option<bytes::Bytes>) -> Option<Call> {
    let argument: CallArgument = serde_json::from_str(argument).ok()?;
    let members = [
        ("payload", argument.payload),
        ("encoding", argument.encoding),
        ("raw", argument.raw),
        ("headers", argument.headers),
    ];
    let members: Vec<_> = members.into_iter().filter_map(|(name, value)| Some((name, value?))).collect();
    // The place of the attachment has to be in what is passed on.
    let places = members.iter().map(|(_, value)| super::raw::placeholders(value)).sum::<Option<usize>>()?;
    if places != usize::from(blob.is_some()) {
        return None;
    }
    let limit = argument.timeout.map_or(CALL_DEFAULT, millis).min(CALL_MAX);
    Some(Call { subject: argument.subject, kind, members, blob, limit })
}

fn raw_call(argument: &str, blob: Option<bytes::Bytes>) -> Option<Call> {
    let id = serde_json::from_str::<CallArgument>(argument).ok()?.request_id.filter(|id| id.len() <= 64)?;
    call(argument, CallKind::Raw(id), blob)
}

/// The core's number of the call that a raw answer is for.
fn raw_response(argument: &str) -> Option<u64> {
    #[derive(Deserialize)]
    struct Response {
        #[serde(rename = "requestId")]
        request_id: String,
    }
    let response: Response = serde_json::from_str(argument).ok()?;
    response.request_id.rsplit_once(':')?.1.parse().ok()
}

/// Milliseconds from JavaScript: fractions are normal, anything else is zero.
fn millis(value: f64) -> Duration {
    // What doesn't fit is too large, negative or not a number; only the first
    // means long.
    let otherwise = if value > 0.0 { Duration::MAX } else { Duration::ZERO };
    Duration::try_from_secs_f64(value / 1000.0).unwrap_or(otherwise)
}

/// A publication for the subscribers of `pattern`.
pub(crate) fn delivery(pattern: &str, publication: &Publication) -> Frame {
    let mut argument = String::with_capacity(publication.subject.len() + 96);
    argument.push_str("{\"subject\":");
    push_string(&mut argument, &publication.subject);
    argument.push_str(",\"data\":");
    push_publication(&mut argument, publication, None);
    argument.push('}');
    packet::event(pattern, &argument, None, Some(publication.blob.clone()))
}

/// A publication, as a client sends it.
pub(crate) fn publication(publication: &Publication, ack: u64) -> Frame {
    let mut argument = String::with_capacity(publication.subject.len() + 96);
    push_publication(&mut argument, publication, Some(&publication.subject));
    packet::event("publish", &argument, Some(ack), Some(publication.blob.clone()))
}

fn push_publication(text: &mut String, publication: &Publication, subject: Option<&str>) {
    text.push('[');
    if let Some(subject) = subject {
        push_string(text, subject);
        text.push(',');
    }
    push_string(text, &publication.id);
    let Publication { seq, done, encoding, .. } = publication;
    // Writing to a String cannot fail.
    let _ = write!(text, ",{seq},{},{encoding},{PLACEHOLDER}", u8::from(*done));
    if let Some(headers) = &publication.headers {
        text.push(',');
        text.push_str(headers.get());
    }
    text.push(']');
}

/// The answer to a request.
pub(crate) fn reply(ack: u64, reply: &Reply) -> Frame {
    let mut text = String::new();
    let mut blob = None;
    match reply {
        Reply::Published { count, times } => {
            let _ = write!(text, "{{\"count\":{count}");
            push_times(&mut text, times);
        }
        Reply::Subscribed { items, many } => {
            let items = items.iter().map(|item| match item {
                Ok(true) => r#"{"status":"added"}"#.to_owned(),
                Ok(false) => r#"{"status":"already-added"}"#.to_owned(),
                Err(failure) => failure_json(failure),
            });
            push_list(&mut text, items, *many);
        }
        Reply::Unsubscribed { items, many } => {
            push_list(&mut text, std::iter::repeat_n("null".to_owned(), *items), *many);
        }
        Reply::Subscriptions(patterns) => {
            let patterns = patterns.iter().map(|pattern| {
                let mut text = String::new();
                push_string(&mut text, pattern);
                text
            });
            push_list(&mut text, patterns, true);
        }
        Reply::Interest(found) => text.push_str(if *found { "true" } else { "false" }),
        Reply::Answered { value, times } => {
            // Spliced, not parsed: what the service said passes through.
            match value.json.get().strip_suffix('}') {
                Some("{") => text.push_str("{\"count\":1"),
                Some(open) => {
                    text.push_str(open);
                    text.push_str(",\"count\":1");
                }
                None => {
                    text.push_str("{\"value\":");
                    text.push_str(value.json.get());
                    text.push_str(",\"count\":1");
                }
            }
            push_times(&mut text, times);
            blob.clone_from(&value.blob);
        }
        Reply::Failed(failure) => text = failure_json(failure),
        Reply::Echo(value) => text.push_str(value.get()),
    }
    packet::ack(ack, &text, blob)
}

fn push_times(text: &mut String, times: &Times) {
    let millis = |time: Duration| time.as_secs_f64() * 1000.0;
    let handler = times.auth + times.route + times.target.unwrap_or_default();
    let _ = write!(
        text,
        ",\"serverAuthMs\":{},\"serverRouteMs\":{},\"serverHandlerMs\":{}",
        millis(times.auth),
        millis(times.route),
        millis(handler)
    );
    if let Some(target) = times.target {
        let _ = write!(text, ",\"serverTargetAckMs\":{}", millis(target));
    }
    text.push('}');
}

fn push_list(text: &mut String, items: impl Iterator<Item = String>, many: bool) {
    let joined = items.collect::<Vec<_>>().join(",");
    if many {
        let _ = write!(text, "[{joined}]");
    } else {
        text.push_str(&joined);
    }
}

/// A failure as JavaScript would print it.
pub(crate) fn failure_json(failure: &Failure) -> String {
    let mut text = String::from("{\"error\":");
    push_string(&mut text, &format!("Error: {}", failure.message));
    let _ = write!(text, ",\"code\":{}}}", failure.code);
    text
}

/// A call, for the service that shall answer it.
pub(crate) fn called(id: u64, pattern: &str, call: &Call) -> Frame {
    let (name, ack) = match call.kind {
        CallKind::Plain => ("rpc-request", Some(id)),
        CallKind::Fast => ("fast-rpc-request", Some(id)),
        CallKind::Raw(_) => ("rpc-raw-request", None),
    };
    let mut text = String::from("{\"subject\":");
    push_string(&mut text, &call.subject);
    text.push_str(",\"pattern\":");
    push_string(&mut text, pattern);
    if ack.is_none() {
        let _ = write!(text, ",\"requestId\":\"conat:{id}\"");
    }
    for (name, value) in &call.members {
        let _ = write!(text, ",\"{name}\":{}", value.get());
    }
    text.push('}');
    packet::event(name, &text, ack, call.blob.clone())
}

/// The answer to a raw call, for the caller, under the caller's own id.
pub(crate) fn raw_answer(id: &str, value: &RawMessage) -> Frame {
    // Of two members with one name JavaScript takes the last.
    let mut text = value.json.get().strip_suffix('}').unwrap_or("{").to_owned();
    if text.len() > 1 {
        text.push(',');
    }
    text.push_str("\"requestId\":");
    push_string(&mut text, id);
    text.push_str(",\"count\":1}");
    packet::event("rpc-raw-response", &text, None, value.blob.clone())
}

/// The failure of a raw call, for the caller.
pub(crate) fn raw_failure(id: &str, failure: &Failure) -> Frame {
    let mut text = String::from("{\"requestId\":");
    push_string(&mut text, id);
    text.push(',');
    text.push_str(failure_json(failure).trim_start_matches('{'));
    packet::event("rpc-raw-response", &text, None, None)
}
