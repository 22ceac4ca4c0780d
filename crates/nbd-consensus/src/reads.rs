//! Linearizable reads: one round of heartbeats answers for every read that was waiting when it
//! started (Raft thesis, 6.4).

use crate::input::Ticket;

/// A round on its way.
#[derive(Debug)]
struct Round {
    number: u64,
    tickets: Vec<Ticket>,
}

/// Reads waiting for the index they may be served at. All belong to one term of this leader.
#[derive(Debug, Default)]
pub(crate) struct Reads {
    /// Not yet in a round. A round that is under way cannot take them: it may have been answered
    /// before they arrived.
    waiting: Vec<Ticket>,
    round: Option<Round>,
    /// Number of the last round started; never used twice, so that a late answer is recognised.
    rounds: u64,
}

impl Reads {
    /// Number of reads without an answer.
    pub(crate) fn len(&self) -> usize {
        self.waiting.len() + self.round.as_ref().map_or(0, |round| round.tickets.len())
    }

    /// Adds a read.
    pub(crate) fn add(&mut self, ticket: Ticket) {
        self.waiting.push(ticket);
    }

    /// Starts a round if reads are waiting and none is under way; returns the context that raft-rs
    /// carries through it.
    pub(crate) fn start(&mut self) -> Option<Vec<u8>> {
        if self.round.is_some() || self.waiting.is_empty() {
            return None;
        }
        self.rounds += 1;
        let tickets = std::mem::take(&mut self.waiting);
        self.round = Some(Round { number: self.rounds, tickets });
        Some(self.rounds.to_be_bytes().to_vec())
    }

    /// Ends the round with this context and returns its reads; none if it is not under way.
    pub(crate) fn finish(&mut self, context: &[u8]) -> Vec<Ticket> {
        match self.round.take_if(|round| round.number.to_be_bytes() == context) {
            Some(round) => round.tickets,
            None => Vec::new(),
        }
    }

    /// Gives every read back: leadership is lost, and with it raft-rs's memory of the round.
    pub(crate) fn abandon(&mut self) -> impl Iterator<Item = Ticket> {
        let round = self.round.take().map_or_else(Vec::new, |round| round.tickets);
        round.into_iter().chain(std::mem::take(&mut self.waiting))
    }
}
