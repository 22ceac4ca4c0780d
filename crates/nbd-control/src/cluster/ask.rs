//! Asking a shard, through whichever of its replicas answers.

use std::error::Error as _;
use std::future::Future;
use std::time::Duration;

use nbd_rpc::reason;
use nbd_topology::ShardId;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::Cluster;
use super::error::{CallError, Service};
use crate::limits::{ATTEMPT, HEDGE, PAUSE};

/// How often a call may be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sending {
    /// Changes nothing: a contact that is slow is not waited for alone.
    Look,
    /// Changes something, and comes to the same if it is made again at once. Contacts are asked one
    /// at a time, the next one only once the attempt before has failed for good or has had its
    /// time, so that none overtakes another.
    Change,
    /// Must not be made again by anybody but who asked for it: it ends with the first attempt that
    /// may have been carried out.
    Once,
}

/// A whole call: the attempts under way, and whom to ask next.
struct Attempts<T> {
    contacts: Vec<String>,
    under_way: JoinSet<(usize, Instant, Result<T, Status>)>,
    /// Whether the contact at this place is being asked.
    busy: Vec<bool>,
    /// Place of the contact to ask next, if it is not busy.
    next: usize,
    /// Attempts have failed that may have been carried out all the same.
    uncertain: bool,
    /// No further attempt is made before this.
    not_before: Option<Instant>,
    /// Contacts that could not answer since the last pause.
    failed: usize,
    /// What was last heard of each contact.
    heard: Vec<Option<String>>,
}

impl Cluster {
    /// Asks the shard: its contacts one after the other until one answers, the next as soon as one
    /// fails. What only looks is also asked of the next if the one before takes long; what changes
    /// something is not (see [`Sending`]). So but for [`Sending::Once`] a call may reach the shard
    /// more than once, and must be one that may. Waits out elections, for `within` at most.
    ///
    /// Each attempt tells its contact the time that it has, and contacts drop what they have not
    /// answered by then. What a contact had already handed to its shard's log may still be made.
    ///
    /// # Errors
    /// See [`CallError`].
    pub(crate) async fn ask<T, F, C>(
        &self,
        (service, sending): (Service, Sending),
        shard: ShardId,
        within: Duration,
        call: F,
    ) -> Result<T, CallError>
    where
        T: Send + 'static,
        F: Fn(Channel, Duration) -> C,
        C: Future<Output = Result<T, Status>> + Send + 'static,
    {
        let deadline = Instant::now() + within;
        let mut attempts = Attempts::new(self.contacts(shard));
        loop {
            let now = Instant::now();
            let left = deadline.saturating_duration_since(now).min(ATTEMPT);
            let alone = sending != Sending::Look;
            let held = attempts.not_before.filter(|until| *until > now);
            if held.is_none() && !(alone && attempts.has_busy()) {
                let limit = now + left;
                attempts.start_next(left, limit, |contact| match self.inner.channels.to(contact) {
                    Ok(channel) => Ok(call(channel, left)),
                    Err(error) => Err(error.to_string()),
                });
            }
            let more = !alone && attempts.has_idle();
            let failed_at_once = alone && held.is_none() && !attempts.has_busy();
            tokio::select! {
                Some(ended) = attempts.under_way.join_next() => {
                    let (place, limit, result) = match ended {
                        Ok(ended) => ended,
                        // A defect: the panic has been reported where it happened.
                        Err(error) => return Err(unavailable(shard, error.to_string())),
                    };
                    attempts.busy[place] = false;
                    let status = match result {
                        Ok(answer) => {
                            self.answered(shard, &attempts.contacts[place]);
                            return Ok(answer);
                        }
                        Err(status) => status,
                    };
                    let repeated = attempts.uncertain || attempts.has_busy();
                    if let Some(error) = CallError::verdict(service, shard, &status, repeated) {
                        self.answered(shard, &attempts.contacts[place]);
                        return Err(error);
                    }
                    attempts.note(place, reason(&status));
                    let may_be_done = may_be_done(shard, &status);
                    attempts.uncertain |= may_be_done;
                    if may_be_done && sending == Sending::Once {
                        let mut said = attempts.describe();
                        said.push_str(". It may have been done: look before asking again");
                        return Err(unavailable(shard, said));
                    }
                    // It broke off: what is left of it has ended by then.
                    let broke_off = may_be_done && status.code() != Code::Unavailable;
                    attempts.not_before = (alone && broke_off).then_some(limit);
                }
                () = std::future::ready(()), if failed_at_once => {}
                () = sleep(HEDGE), if more => {}
                () = sleep_until(held.unwrap_or(deadline)), if held.is_some() => {}
                () = sleep_until(deadline) => return Err(unavailable(shard, attempts.describe())),
            }
            if attempts.failed >= attempts.contacts.len() {
                attempts.failed = 0;
                tokio::select! {
                    () = sleep(PAUSE) => {}
                    () = sleep_until(deadline) => {
                        return Err(unavailable(shard, attempts.describe()));
                    }
                }
            }
        }
    }
}

/// Whether an attempt that ended like this may have been carried out, or may yet be.
fn may_be_done(shard: ShardId, status: &Status) -> bool {
    match status.code() {
        // A contact of another cluster or shard, or one that does not know the call.
        Code::NotFound | Code::FailedPrecondition | Code::Unimplemented => false,
        Code::Unavailable => {
            let message = status.message();
            let not_led = [
                format!("shard {shard} has no leader"),
                format!("shard {shard} is led by "),
                "this replica no longer leads the shard".to_owned(),
            ];
            !never_sent(status) && !not_led.iter().any(|text| message.starts_with(text))
        }
        _ => true,
    }
}

/// Whether there was no connection to send it over.
fn never_sent(status: &Status) -> bool {
    let mut cause = status.source();
    while let Some(error) = cause {
        if error.is::<tonic::ConnectError>() {
            return true;
        }
        cause = error.source();
    }
    false
}

fn unavailable(shard: ShardId, reason: String) -> CallError {
    CallError::Unavailable { shard, reason }
}

impl<T: Send + 'static> Attempts<T> {
    fn new(contacts: Vec<String>) -> Self {
        let (busy, heard) = (vec![false; contacts.len()], vec![None; contacts.len()]);
        let under_way = JoinSet::new();
        let (uncertain, not_before) = (false, None);
        Self { contacts, under_way, busy, next: 0, uncertain, not_before, failed: 0, heard }
    }

    fn has_busy(&self) -> bool {
        self.busy.contains(&true)
    }

    fn has_idle(&self) -> bool {
        self.busy.contains(&false)
    }

    /// Asks the next contact that is not being asked, if there is one; `limit` is when `within` is
    /// over.
    fn start_next<C>(
        &mut self,
        within: Duration,
        limit: Instant,
        call: impl Fn(&str) -> Result<C, String>,
    ) where
        C: Future<Output = Result<T, Status>> + Send + 'static,
    {
        let count = self.contacts.len();
        let places = (0..count).map(|step| (self.next + step) % count);
        let Some(place) = places.into_iter().find(|place| !self.busy[*place]) else { return };
        self.next = (place + 1) % count;
        match call(&self.contacts[place]) {
            Ok(call) => {
                self.busy[place] = true;
                self.under_way.spawn(async move {
                    let late = |_| Err(Status::deadline_exceeded("it does not answer in time"));
                    (place, limit, timeout(within, call).await.unwrap_or_else(late))
                });
            }
            Err(reason) => self.note(place, reason),
        }
    }

    /// The contact at `place` could not answer.
    fn note(&mut self, place: usize, reason: String) {
        self.failed += 1;
        self.heard[place] = Some(reason);
    }

    /// What is known of why nobody answered.
    fn describe(&self) -> String {
        let each = self.contacts.iter().zip(&self.heard).map(|(contact, heard)| {
            format!("{contact}: {}", heard.as_deref().unwrap_or("no answer"))
        });
        each.collect::<Vec<_>>().join("; ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_turned_away_is_told_from_what_may_be_done() {
        let may = |code: Code, text: &str| may_be_done(ShardId(1), &Status::new(code, text));
        assert!(!may(Code::NotFound, "shard 1 is not hosted here"));
        assert!(!may(Code::FailedPrecondition, "the caller is of the cluster"));
        assert!(!may(Code::Unavailable, "shard 1 has no leader just now"));
        assert!(!may(Code::Unavailable, "this replica no longer leads the shard: ask again"));
        assert!(may(Code::Unavailable, "leadership was lost meanwhile: ask again"));
        for code in [Code::DeadlineExceeded, Code::Unknown, Code::Internal, Code::Cancelled] {
            assert!(may(code, "transport error"), "{code}");
        }
    }

    #[test]
    fn what_found_no_connection_was_not_sent() {
        let mut status = Status::unavailable("tcp connect error");
        assert!(!never_sent(&status));
        let cause = tonic::ConnectError("refused".into());
        status.set_source(std::sync::Arc::new(cause));
        assert!(never_sent(&status) && !may_be_done(ShardId(1), &status));
    }
}
