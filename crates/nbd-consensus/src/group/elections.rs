//! Time: heartbeats and leases of a leader, and when a follower stands for election.

use nbd_topology::{LogIndex, ReplicaId};
use raft::StateRole;
use raft::eraftpb::MessageType;

use super::Group;
use crate::config::ReadMode;
use crate::effect::{Effects, RejectReason};
use crate::fault::Fault;
use crate::input::Ticket;
use crate::limits::{READS_WAITING_MAX, SNAPSHOT_OFFER_TICKS, STEP_DOWN_ELECTIONS};

impl Group {
    pub(super) fn tick(&mut self) {
        self.ticks += 1;
        self.watch.tick();
        if self.is_leader() {
            self.count_heard();
            self.raw.tick();
            // raft-rs's own heartbeats would double ours, which carry a round each.
            self.raw.raft.msgs.retain(|message| message.msg_type != MessageType::MsgHeartbeat);
            if self.is_leader() {
                self.beat();
                self.offer_all_again();
            }
            return;
        }
        let raft = &self.raw.raft;
        let due = raft.election_elapsed + 1 >= raft.randomized_election_timeout();
        // Where it would not stand, raft-rs may count on: its count also decides about votes.
        if !due || !raft.promotable() || self.may_stand() {
            self.raw.tick();
        }
        self.follow_hint();
    }

    /// Before raft-rs looks whether a majority was heard from since it last looked, has it count
    /// those as well that were within [`STEP_DOWN_ELECTIONS`], or could not yet be.
    fn count_heard(&mut self) {
        let raft = &mut self.raw.raft;
        if raft.election_elapsed + 1 < raft.election_timeout() {
            return;
        }
        let since = STEP_DOWN_ELECTIONS * u64::from(self.config.election_ticks);
        for peer in self.members.current().all() {
            let heard = self.heard.get(&peer).copied().unwrap_or(self.led_since);
            if let Some(progress) = raft.mut_prs().get_mut(peer.get())
                && self.ticks - heard <= since
            {
                progress.recent_active = true;
            }
        }
    }

    pub(super) fn campaign(&mut self) {
        if !self.is_leader() && self.may_stand() {
            let hup = self.raw.campaign();
            assert!(hup.is_ok(), "standing for election does not fail");
        }
    }

    /// Whether an election may begin. To stand is to vote for oneself, so that whatever forbids a
    /// vote forbids this as well, but for the only voter, which nobody else can have been elected
    /// without. It wins in the same step, which raft-rs allows only with a log that is durable to
    /// its end.
    fn may_stand(&self) -> bool {
        let free = if self.is_only_voter() {
            self.is_log_persisted()
        } else {
            !self.watch.holds_votes() && !self.watch.in_lease()
        };
        free && self.raw.raft.promotable() && !self.log_held
    }

    pub(super) fn leader_lost(&mut self) {
        let raft = &mut self.raw.raft;
        if !matches!(raft.state, StateRole::Follower | StateRole::PreCandidate) {
            return;
        }
        let known = ReplicaId::new(raft.leader_id);
        let Some(lost) = known.or_else(|| self.watch.leader().and_then(ReplicaId::new)) else {
            return;
        };
        let careless = self.config.makes(Fault::VoteInsideLease);
        if self.config.read_mode == ReadMode::Quorum || careless {
            if known.is_some() {
                // Without a leader raft-rs grants votes again.
                raft.become_follower(raft.term, raft::INVALID_ID);
            }
            self.watch.forget();
        }
        let others = self.members.current().voters().iter().filter(|voter| **voter != lost);
        let before = others.take_while(|voter| **voter < self.config.replica);
        self.watch.hint(u32::try_from(before.count()).unwrap_or(u32::MAX));
        self.follow_hint();
    }

    /// Stands for election if a hint says that it is time. Peers that still hear from the leader
    /// refuse, and nothing comes of it.
    fn follow_hint(&mut self) {
        let idle = matches!(self.raw.raft.state, StateRole::Follower | StateRole::PreCandidate);
        if idle && self.watch.take_attempt() {
            self.campaign();
        }
    }

    pub(super) fn transfer_leader(&mut self, to: ReplicaId) {
        // As a follower raft-rs would pass the request on to the leader.
        if !self.is_leader() {
            return;
        }
        self.raw.transfer_leader(to.get());
        if self.raw.raft.lead_transferee.is_some() {
            self.lease.give_up();
        }
    }

    pub(super) fn read(&mut self, tickets: Vec<Ticket>, effects: &mut Effects) {
        let leader = self.current_leadership().leader;
        for ticket in tickets {
            if !self.is_leader() {
                effects.rejected.push((ticket, RejectReason::NotLeader { leader }));
            } else if self.reads.len() >= READS_WAITING_MAX {
                effects.rejected.push((ticket, RejectReason::Full));
            } else {
                self.reads.add(ticket);
            }
        }
    }

    /// Sends the heartbeat if it is time. It is a round for reads whether or not any wait, so that
    /// its answers renew the lease; an earlier round that got lost ends with it.
    fn beat(&mut self) {
        self.beat_elapsed += 1;
        if self.beat_elapsed < self.config.heartbeat_ticks {
            return;
        }
        self.beat_elapsed = 0;
        // raft-rs would drop a round asked for before this leader committed in its own term
        // without a word, and answer the only voter's without telling its learners.
        if self.raw.raft.commit_to_current_term() && !self.raw.raft.prs().is_singleton() {
            let context = self.reads.start(self.now);
            self.raw.read_index(context);
        } else {
            self.raw.ping();
        }
    }

    /// Starts a round if none is under way and something waits for one: reads, or a leader without
    /// a lease. Whether it did.
    pub(super) fn start_round(&mut self) -> bool {
        if !self.is_leader()
            || !self.reads.is_idle()
            || !self.raw.raft.commit_to_current_term()
            || !(self.reads.is_waiting() || self.wants_lease())
        {
            return false;
        }
        let context = self.reads.start(self.now);
        self.raw.read_index(context);
        true
    }

    fn wants_lease(&self) -> bool {
        self.config.read_mode == ReadMode::Lease
            && !self.lease.is_given_up()
            && self.lease.until().is_none()
            && !self.is_only_voter()
    }

    /// A majority answered the round with this context, when everything up to `index` was
    /// committed.
    pub(super) fn round_answered(&mut self, context: &[u8], index: u64, effects: &mut Effects) {
        let Some(round) = self.reads.finish(context) else { return };
        let tickets = round.tickets.into_iter();
        effects.reads_ready.extend(tickets.map(|ticket| (ticket, LogIndex(index))));
        let overlong = self.config.makes(Fault::LeaseOverlong);
        self.lease.renew(round.number, if overlong { self.now } else { round.sent });
    }

    /// Whether this leader heard from the peer within the last election timeout.
    pub(super) fn is_active(&self, peer: ReplicaId) -> bool {
        let heard = self.heard.get(&peer);
        heard.is_some_and(|heard| self.ticks - heard <= u64::from(self.config.election_ticks))
    }

    /// Offers snapshots again that were not taken up.
    fn offer_all_again(&mut self) {
        self.offer_elapsed += 1;
        if self.offer_elapsed < SNAPSHOT_OFFER_TICKS {
            return;
        }
        self.offer_elapsed = 0;
        let members: Vec<_> = self.members.current().all().collect();
        for member in members {
            self.offer_again(member);
        }
    }
}
