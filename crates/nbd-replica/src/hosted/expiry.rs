//! Sessions whose front end never comes back.
//!
//! A session is part of the shard's replicated state until its front end closes it, or the next
//! life of the front end's node ends it. A front end that is gone for good does neither. So the
//! leader closes, through the log, each session that nobody has been attached to for long. Should
//! its front end come back all the same, it finds the session closed and disconnects its client:
//! what was in flight is never applied late or twice.

use std::collections::HashMap;
use std::time::Duration;

use metrics::{counter, gauge};
use nbd_store::{Epoch, Outcome, SessionId, SessionInfo, encode_close_session};
use tokio::time::{Instant, MissedTickBehavior};
use tracing::{info, warn};

use super::HostedShard;

/// Longest time between two looks at a shard's sessions.
const LOOK_MAX: Duration = Duration::from_secs(60);

/// Looks within the time after which a session expires.
const LOOKS: u32 = 8;

/// Since when sessions have been seen without an attachment, and at which epoch.
#[derive(Debug, Default)]
struct Absent {
    since: HashMap<SessionId, (Epoch, Instant)>,
}

impl Absent {
    /// Looks at all sessions that are open now. Returns those that were absent for `expiry`.
    fn look(
        &mut self,
        now: Instant,
        expiry: Duration,
        open: &[SessionInfo],
        is_attached: impl Fn(SessionId) -> bool,
    ) -> Vec<(SessionId, Epoch)> {
        let mut since = HashMap::with_capacity(self.since.len());
        for session in open.iter().filter(|session| !is_attached(session.id)) {
            let known = self.since.get(&session.id).filter(|(epoch, _)| *epoch == session.epoch);
            since.insert(session.id, known.copied().unwrap_or((session.epoch, now)));
        }
        self.since = since;
        let is_due = |(_, (_, since)): &(&SessionId, &(Epoch, Instant))| now - *since >= expiry;
        self.since.iter().filter(is_due).map(|(id, (epoch, _))| (*id, *epoch)).collect()
    }
}

/// Closes sessions that nobody was attached to for `expiry` while this node led the shard. Runs
/// until the node stops.
pub(crate) async fn expire_sessions(shard: HostedShard, expiry: Duration) {
    let stopping = shard.hosting.shutdown.token();
    let label = shard.group.shard().to_string();
    let open_sessions = gauge!("shard_sessions", "shard" => label.clone());
    let expired = counter!("shard_sessions_expired_total", "shard" => label);
    let route = shard.group.route();
    let pause = (expiry / LOOKS).min(LOOK_MAX);
    let mut looks = tokio::time::interval(pause);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut absent, mut last) = (Absent::default(), Instant::now());
    loop {
        let now = tokio::select! {
            () = stopping.cancelled() => return,
            now = looks.tick() => now,
        };
        let open = shard.group.reader().sessions();
        #[expect(clippy::cast_precision_loss, reason = "gauges are floats; 2^53 is far away")]
        open_sessions.set(open.len() as f64);
        // Of a time that this process slept through it knows nothing.
        if !route.borrow().serving || now - last > 2 * pause {
            absent = Absent::default();
        }
        last = now;
        if !route.borrow().serving {
            continue;
        }
        for (session, epoch) in absent.look(now, expiry, &open, |id| shard.attached.contains(id)) {
            // The epoch it was seen with: should it be resumed just now, it stays.
            match shard.group.run(encode_close_session(session, epoch)).await {
                Ok(Outcome::SessionClosed) => {
                    expired.increment(1);
                    info!(shard = %shard.group.shard(), %session, "a session has expired");
                }
                Ok(outcome) => info!(%session, ?outcome, "a session has not expired after all"),
                // Whoever leads now begins to look anew.
                Err(error) => {
                    warn!(%session, %error, "cannot close a session that has expired");
                    break;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use nbd_store::{Owner, VolumeId};

    use super::*;

    const EXPIRY: Duration = Duration::from_secs(80);

    fn session(id: u128, epoch: u32) -> SessionInfo {
        let owner = Owner { node: 1, incarnation: 1 };
        SessionInfo { id: SessionId(id), epoch: Epoch(epoch), volume: VolumeId(1), owner }
    }

    #[test]
    fn only_what_was_absent_all_the_time_expires() {
        let (mut absent, start) = (Absent::default(), Instant::now());
        let open = [session(1, 1), session(2, 1)];
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(absent.look(at(0), EXPIRY, &open, |_| false), []);
        assert_eq!(absent.look(at(79), EXPIRY, &open, |id| id == SessionId(2)), []);
        // The second one was there meanwhile.
        assert_eq!(absent.look(at(80), EXPIRY, &open, |_| false), [(SessionId(1), Epoch(1))]);
        assert_eq!(absent.look(at(159), EXPIRY, &open[1..], |_| false), []);
        assert_eq!(absent.look(at(160), EXPIRY, &open[1..], |_| false), [(SessionId(2), Epoch(1))]);
    }

    #[test]
    fn a_session_that_was_resumed_between_looks_counts_from_then() {
        let (mut absent, start) = (Absent::default(), Instant::now());
        assert_eq!(absent.look(start, EXPIRY, &[session(1, 1)], |_| false), []);
        assert_eq!(absent.look(start + EXPIRY, EXPIRY, &[session(1, 2)], |_| false), []);
        let due = absent.look(start + 2 * EXPIRY, EXPIRY, &[session(1, 2)], |_| false);
        assert_eq!(due, [(SessionId(1), Epoch(2))]);
    }
}
