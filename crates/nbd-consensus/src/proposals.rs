//! Proposals whose outcome is open.

use std::collections::VecDeque;

use crate::effect::RejectReason;
use crate::input::Ticket;

#[derive(Debug, Clone, Copy)]
struct Open {
    index: u64,
    term: u64,
    ticket: Ticket,
}

/// Tickets by the place their entry was given, in order of (index, term).
///
/// A ticket is decided by what is *committed*: its own entry, another at its index, or anything of
/// a later term. (Every later leader has that entry of the later term, and terms do not go back
/// along a log, so nothing of the earlier term can follow it.) Neither losing leadership nor seeing
/// the entry cut from the local log decides anything: another replica may still hold the entry, win
/// an election and commit it. That is also why one index can be open for several terms.
#[derive(Debug, Default)]
pub(crate) struct Proposals {
    open: VecDeque<Open>,
    /// Term of the last committed entry seen here; no open ticket is of an earlier one.
    term: u64,
}

impl Proposals {
    /// Notes that `ticket` was logged at `index` in `term`.
    pub(crate) fn logged(&mut self, index: u64, term: u64, ticket: Ticket) {
        let place = self.open.partition_point(|open| (open.index, open.term) < (index, term));
        self.open.insert(place, Open { index, term, ticket });
    }

    /// The entry (`index`, `term`) is committed: returns its ticket, and gives every ticket that
    /// this rules out to `superseded`.
    pub(crate) fn committed(
        &mut self,
        index: u64,
        term: u64,
        mut superseded: impl FnMut(Ticket),
    ) -> Option<Ticket> {
        assert!(self.term <= term, "committed terms went back");
        if self.term < term {
            self.term = term;
            self.open.retain(|open| {
                if open.term < term {
                    superseded(open.ticket);
                }
                open.term >= term
            });
        }
        let mut own = None;
        while let Some(open) = self.open.pop_front_if(|open| open.index <= index) {
            assert_eq!(open.index, index, "an index was passed over");
            if open.term == term {
                assert!(own.is_none(), "one entry has two tickets");
                own = Some(open.ticket);
            } else {
                superseded(open.ticket);
            }
        }
        own
    }

    /// A snapshot that ends with the entry (`index`, `term`) is in place of the log: what it covers
    /// is committed, but not what it was. Gives every ticket that it covers or rules out to
    /// `ended`.
    pub(crate) fn covered(
        &mut self,
        index: u64,
        term: u64,
        mut ended: impl FnMut(Ticket, RejectReason),
    ) {
        assert!(self.term <= term, "committed terms went back");
        self.term = term;
        self.open.retain(|open| {
            if open.index <= index {
                ended(open.ticket, RejectReason::Unknown);
            } else if open.term < term {
                ended(open.ticket, RejectReason::Superseded);
            }
            open.index > index && open.term >= term
        });
    }

    /// Lowest index with an open ticket.
    pub(crate) fn lowest(&self) -> Option<u64> {
        self.open.front().map(|open| open.index)
    }

    /// Highest index with an open ticket, and the term it was logged in.
    pub(crate) fn highest(&self) -> Option<(u64, u64)> {
        self.open.back().map(|open| (open.index, open.term))
    }

    /// Number of open tickets.
    pub(crate) fn len(&self) -> usize {
        self.open.len()
    }

    /// Every open ticket.
    pub(crate) fn into_tickets(self) -> impl Iterator<Item = Ticket> {
        self.open.into_iter().map(|open| open.ticket)
    }
}
