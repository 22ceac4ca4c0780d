//! Which appends are on their way to stable storage.

use std::collections::VecDeque;

use crate::input::ReadyNumber;

/// Numbers of raft-rs's readys that became an append and are not yet persisted. A ready without
/// anything to write or hold back rides behind its predecessors without an append.
#[derive(Debug, Default)]
pub(crate) struct Readies {
    /// In ascending order.
    outstanding: VecDeque<u64>,
    /// Number of the last ready, `>=` everything outstanding.
    issued: u64,
    /// Ready numbers of raft-rs count from here: it was set up anew behind a snapshot.
    base: u64,
    /// The last outstanding append with a new term or vote.
    vote: Option<u64>,
}

impl Readies {
    /// Notes the next ready of raft-rs, by its number there.
    pub(crate) fn issue(&mut self, number: u64) {
        let number = self.base + number;
        assert!(number > self.issued, "ready {number} after {}", self.issued);
        self.issued = number;
    }

    /// The last ready became an append; `vote` tells whether it holds a new term or vote.
    pub(crate) fn append(&mut self, vote: bool) -> ReadyNumber {
        self.outstanding.push_back(self.issued);
        if vote {
            self.vote = Some(self.issued);
        }
        ReadyNumber(self.issued)
    }

    /// raft-rs starts over, with nothing to be persisted.
    pub(crate) const fn start_over(&mut self) {
        self.base = self.issued;
    }

    /// Notes that appends up to `number` are durable, and returns raft-rs's number of the ready up
    /// to which it may take that for granted: it includes those that only rode behind. 0 if that
    /// was before raft-rs started over.
    ///
    /// # Panics
    ///
    /// If no append of that number is outstanding.
    pub(crate) fn persisted(&mut self, number: ReadyNumber) -> u64 {
        let place = self.outstanding.binary_search(&number.0);
        let Ok(place) = place else {
            panic!("ready {} is not outstanding: it was repeated or never issued", number.0);
        };
        self.outstanding.drain(..=place);
        self.vote = self.vote.filter(|vote| *vote > number.0);
        let through = self.outstanding.front().map_or(self.issued, |next| next - 1);
        through.saturating_sub(self.base)
    }

    /// raft-rs's number of the last ready.
    pub(crate) const fn issued(&self) -> u64 {
        self.issued - self.base
    }

    /// Number of outstanding appends.
    pub(crate) fn len(&self) -> usize {
        self.outstanding.len()
    }

    /// Whether a new term or vote is not yet durable.
    pub(crate) const fn vote_outstanding(&self) -> bool {
        self.vote.is_some()
    }

    /// Whether the numbers are in order.
    pub(crate) fn is_ordered(&self) -> bool {
        self.outstanding.back().is_none_or(|back| *back <= self.issued)
            && self.outstanding.front() <= self.outstanding.back()
    }
}
