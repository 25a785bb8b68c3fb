//! Calls of services: requests that the broker itself takes to one socket,
//! and whose answer it brings back.

use std::time::Duration;

use cocalc_core::subject;

use super::{Call, CallKind, Failure, Outgoing, RawMessage, Reply, Router, SocketId, Timer, Times};
use crate::wire::event;

/// A call that was passed on, and not yet answered.
#[derive(Debug)]
pub(super) struct PendingCall {
    caller: SocketId,
    target: SocketId,
    ack: Option<u64>,
    kind: CallKind,
    times: Times,
    sent: Duration,
    timer: (Duration, u64),
}

impl Router {
    pub(super) fn call(
        &mut self,
        caller: SocketId,
        ack: Option<u64>,
        call: Call,
        times: Times,
        now: Duration,
    ) -> Option<Reply> {
        match self.pass_on(caller, ack, &call, times, now) {
            Ok(()) => None,
            // A raw call has no acknowledgement; its failure is an event too.
            Err(failure) => match call.kind {
                CallKind::Raw(id) => {
                    self.send(caller, Outgoing::Frame(event::raw_failure(&id, &failure)));
                    None
                }
                CallKind::Plain | CallKind::Fast => Some(Reply::Failed(failure)),
            },
        }
    }

    fn pass_on(
        &mut self,
        caller: SocketId,
        ack: Option<u64>,
        call: &Call,
        times: Times,
        now: Duration,
    ) -> Result<(), Failure> {
        if !subject::is_subject(&call.subject) {
            return Err(Failure::subject());
        }
        let mut found = Vec::new();
        self.services.visit(&call.subject, &mut |entry| {
            found.extend(entry.groups.keys().map(|group| (entry.pattern.clone(), group.clone())));
        });
        let choice = self.random.below(found.len());
        let target = found.get(choice).and_then(|(pattern, group)| {
            let member = self.services.entry(pattern)?.pick(group, &mut self.random)?;
            Some((pattern.clone(), member))
        });
        let Some((pattern, target)) = target else {
            // Clients look for these words to fall back to a plain request.
            let message = format!("no services matching '{}'", call.subject);
            return Err(Failure { code: 503, message });
        };
        let Some(state) = self.sockets.get_mut(&caller) else { return Ok(()) };
        if state.calling >= state.limits.pending_max {
            return Err(Failure { code: 429, message: "too many calls are waiting".to_owned() });
        }
        state.calling += 1;
        self.next += 1;
        let id = self.next;
        let timer = (now.saturating_add(call.limit), id);
        let kind = call.kind.clone();
        self.timers.insert(timer, Timer::Call(id));
        self.calls.insert(id, PendingCall { caller, target, ack, kind, times, sent: now, timer });
        // If the target is too slow, this closes it, and the call fails there.
        self.send(target, Outgoing::Frame(event::called(id, &pattern, call)));
        Ok(())
    }

    pub(super) fn answer(&mut self, from: SocketId, id: u64, value: RawMessage, now: Duration) {
        // Only who was asked may answer.
        if self.calls.get(&id).is_some_and(|call| call.target == from) {
            self.finish_call(id, Ok((value, now)));
        }
    }

    pub(super) fn call_timed_out(&mut self, id: u64) {
        self.finish_call(id, Err(Failure { code: 408, message: "timeout".to_owned() }));
    }

    /// Forgets the calls that `socket` made, and fails those it was given.
    pub(super) fn forget_calls_of(&mut self, socket: SocketId) {
        let ids: Vec<_> = self
            .calls
            .iter()
            .filter(|(_, call)| call.caller == socket || call.target == socket)
            .map(|(id, _)| *id)
            .collect();
        for id in ids {
            self.finish_call(id, Err(Failure { code: 503, message: "service disconnected".to_owned() }));
        }
    }

    fn finish_call(&mut self, id: u64, outcome: Result<(RawMessage, Duration), Failure>) {
        let Some(call) = self.calls.remove(&id) else { return };
        self.timers.remove(&call.timer);
        if let Some(caller) = self.sockets.get_mut(&call.caller) {
            caller.calling = caller.calling.saturating_sub(1);
        }
        let outgoing = match (call.kind, call.ack, outcome) {
            (CallKind::Raw(id), _, Ok((value, _))) => Outgoing::Frame(event::raw_answer(&id, &value)),
            (CallKind::Raw(id), _, Err(failure)) => Outgoing::Frame(event::raw_failure(&id, &failure)),
            (_, None, _) => return,
            (_, Some(ack), Ok((value, now))) => {
                let times = Times { target: Some(now.saturating_sub(call.sent)), ..call.times };
                Outgoing::Reply { ack, reply: Reply::Answered { value, times } }
            }
            (_, Some(ack), Err(failure)) => Outgoing::Reply { ack, reply: Reply::Failed(failure) },
        };
        self.send(call.caller, outgoing);
    }
}
