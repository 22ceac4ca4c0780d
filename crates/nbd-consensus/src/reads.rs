//! Linearizable reads: one round of heartbeats answers for every read that was waiting when it
//! started (Raft thesis, 6.4). Rounds also go out with no read waiting, as the group's heartbeat:
//! each renews the leader's lease.

use std::collections::VecDeque;

use crate::input::{Ticket, Timestamp};

/// A round on its way.
#[derive(Debug)]
struct Round {
    number: u64,
    sent: Timestamp,
    tickets: Vec<Ticket>,
}

/// A round that a majority has answered.
#[derive(Debug)]
pub(crate) struct Answered {
    /// Its number.
    pub(crate) number: u64,
    /// When it was sent.
    pub(crate) sent: Timestamp,
    /// The reads that were waiting then.
    pub(crate) tickets: Vec<Ticket>,
}

/// Reads waiting for the index they may be served at. All belong to one term of this leader.
#[derive(Debug, Default)]
pub(crate) struct Reads {
    /// Not yet in a round. One that is under way cannot take them: it may have been answered
    /// before they arrived.
    waiting: Vec<Ticket>,
    /// In the order they were sent. A leader that nobody answers resigns within two election
    /// timeouts, which bounds their number.
    rounds: VecDeque<Round>,
    /// Number of the last round started; never used twice, so that a late answer is recognised.
    number: u64,
}

impl Reads {
    /// Number of reads without an answer.
    pub(crate) fn len(&self) -> usize {
        let under_way = self.rounds.iter().map(|round| round.tickets.len());
        self.waiting.len() + under_way.sum::<usize>()
    }

    /// Whether reads wait for a round to start.
    pub(crate) const fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Whether no round is under way.
    pub(crate) fn is_idle(&self) -> bool {
        self.rounds.is_empty()
    }

    /// Number of the last round.
    pub(crate) const fn last(&self) -> u64 {
        self.number
    }

    /// Adds a read.
    pub(crate) fn add(&mut self, ticket: Ticket) {
        self.waiting.push(ticket);
    }

    /// Starts a round with every read that is waiting; returns the context that raft-rs carries
    /// through it.
    pub(crate) fn start(&mut self, now: Timestamp) -> Vec<u8> {
        self.number += 1;
        let tickets = std::mem::take(&mut self.waiting);
        self.rounds.push_back(Round { number: self.number, sent: now, tickets });
        self.number.to_be_bytes().to_vec()
    }

    /// Ends the round with this context; `None` if it is not under way. raft-rs reports rounds in
    /// the order they were sent, those that were overtaken included.
    pub(crate) fn finish(&mut self, context: &[u8]) -> Option<Answered> {
        let front = self.rounds.pop_front_if(|round| round.number.to_be_bytes() == context);
        front.map(|Round { number, sent, tickets }| Answered { number, sent, tickets })
    }

    /// Gives every read back: leadership is lost, and with it raft-rs's memory of the rounds.
    pub(crate) fn abandon(&mut self) -> impl Iterator<Item = Ticket> {
        let under_way = std::mem::take(&mut self.rounds).into_iter();
        under_way.flat_map(|round| round.tickets).chain(std::mem::take(&mut self.waiting))
    }
}
