//! What a shard remembers of a session: enough to apply each of its mutations once.
//!
//! Record in the metadata database, little-endian, sealed as in [`crate::chunk::record`]:
//!
//! ```text
//! 0          4              8            16         24            40                72
//! +----------+--------------+------------+----------+-------------+-----------------+
//! | epoch u32| rejected u32 | volume u64 | low u64  | owner 2xu64 | applied: 256 b. | ...
//! +----------+--------------+------------+----------+-------------+-----------------+
//! 72: rejected x 16 bytes
//! ```
//!
//! Bit `seq % 256` of `applied` (byte `n / 8`, bit `n % 8`) stands for `seq` in `[low, low + 256)`.
//! A rejected mutation counts as applied and is listed as `seq u64 | code u8 | 7 x 0`.

use crate::ids::{Epoch, Owner, SessionId, VolumeId};
use crate::limits::{SESSION_WINDOW, to_usize};
use crate::outcome::{Outcome, Rejection, SessionInfo};

const WORDS: usize = to_usize(SESSION_WINDOW / 64);
const APPLIED_AT: usize = 40;
const FIXED_BYTES: usize = APPLIED_AT + 8 * WORDS;
const REJECTED_BYTES: usize = 16;

/// One open session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Session {
    /// Newest generation seen.
    pub(crate) epoch: Epoch,
    /// The volume it is attached to.
    pub(crate) volume: VolumeId,
    /// Who opened it, or resumed it last.
    pub(crate) owner: Owner,
    /// First sequence number of the window.
    low: u64,
    applied: [u64; WORDS],
    /// Those of the window that were refused.
    rejected: Vec<(u64, Rejection)>,
}

/// What the window says of a sequence number.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    /// Not applied before.
    New,
    /// Applied before, with this outcome.
    Before(Outcome),
    /// So old that the window does not tell.
    Behind,
}

impl Session {
    /// A session that has applied nothing.
    pub(crate) const fn new(epoch: Epoch, volume: VolumeId, owner: Owner) -> Self {
        Self { epoch, volume, owner, low: 0, applied: [0; WORDS], rejected: Vec::new() }
    }

    /// What others are told of it.
    pub(crate) const fn info(&self, id: SessionId) -> SessionInfo {
        SessionInfo { id, epoch: self.epoch, volume: self.volume, owner: self.owner }
    }

    const fn place(seq: u64) -> (usize, u64) {
        let at = seq % SESSION_WINDOW;
        (to_usize(at / 64), 1 << (at % 64))
    }

    /// Whether `seq` was applied.
    pub(crate) fn look(&self, seq: u64) -> Seen {
        if seq < self.low {
            return Seen::Behind;
        }
        let (word, bit) = Self::place(seq);
        if seq - self.low >= SESSION_WINDOW || self.applied[word] & bit == 0 {
            return Seen::New;
        }
        let rejection = self.rejected.iter().find(|(rejected, _)| *rejected == seq);
        Seen::Before(match rejection {
            Some((_, rejection)) => Outcome::Rejected(*rejection),
            None => Outcome::Done,
        })
    }

    /// Notes that `seq`, which was new, has been dealt with.
    pub(crate) fn record(&mut self, seq: u64, rejection: Option<Rejection>) {
        debug_assert_eq!(self.look(seq), Seen::New);
        if seq - self.low >= SESSION_WINDOW {
            self.slide(seq - (SESSION_WINDOW - 1));
        }
        let (word, bit) = Self::place(seq);
        self.applied[word] |= bit;
        if let Some(rejection) = rejection {
            self.rejected.push((seq, rejection));
        }
    }

    fn slide(&mut self, low: u64) {
        if low - self.low >= SESSION_WINDOW {
            self.applied = [0; WORDS];
        } else {
            for seq in self.low..low {
                let (word, bit) = Self::place(seq);
                self.applied[word] &= !bit;
            }
        }
        self.low = low;
        self.rejected.retain(|(seq, _)| *seq >= low);
    }

    /// The record's body.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let rejected = u32::try_from(self.rejected.len()).expect("at most the window's length");
        let mut out = Vec::with_capacity(FIXED_BYTES + REJECTED_BYTES * self.rejected.len() + 4);
        out.extend(self.epoch.0.to_le_bytes());
        out.extend(rejected.to_le_bytes());
        out.extend(self.volume.0.to_le_bytes());
        out.extend(self.low.to_le_bytes());
        out.extend(self.owner.node.to_le_bytes());
        out.extend(self.owner.incarnation.to_le_bytes());
        for word in self.applied {
            out.extend(word.to_le_bytes());
        }
        for (seq, rejection) in &self.rejected {
            out.extend(seq.to_le_bytes());
            out.extend([*rejection as u8, 0, 0, 0, 0, 0, 0, 0]);
        }
        out
    }

    /// The session in a record's body, or `None` if it is not one.
    pub(crate) fn decode(body: &[u8]) -> Option<Self> {
        let (fixed, rejected) = body.split_at_checked(FIXED_BYTES)?;
        let u32_at = |at: usize| u32::from_le_bytes(fixed[at..at + 4].try_into().expect("4 bytes"));
        let u64_at = |at: usize| u64::from_le_bytes(fixed[at..at + 8].try_into().expect("8 bytes"));
        let count = u32_at(4) as usize;
        if count as u64 > SESSION_WINDOW || rejected.len() != count * REJECTED_BYTES {
            return None;
        }
        let owner = Owner { node: u64_at(24), incarnation: u64_at(32) };
        let mut session = Self::new(Epoch(u32_at(0)), VolumeId(u64_at(8)), owner);
        session.low = u64_at(16);
        for (word, at) in session.applied.iter_mut().zip((APPLIED_AT..).step_by(8)) {
            *word = u64_at(at);
        }
        for entry in rejected.as_chunks::<REJECTED_BYTES>().0 {
            let seq = u64::from_le_bytes(entry[..8].try_into().expect("8 bytes"));
            session.rejected.push((seq, Rejection::from_u8(entry[8])?));
        }
        Some(session)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWNER: Owner = Owner { node: 0x1122_3344_5566_7788, incarnation: 5 };

    #[test]
    fn a_number_counts_once() {
        let mut session = Session::new(Epoch(1), VolumeId(1), OWNER);
        for seq in [5, 1, 300, 299] {
            assert_eq!(session.look(seq), Seen::New);
            session.record(seq, None);
            assert_eq!(session.look(seq), Seen::Before(Outcome::Done));
        }
        assert_eq!(session.low, 45);
        assert_eq!(session.look(5), Seen::Behind);
        assert_eq!(session.look(45), Seen::New);
        assert_eq!(session.look(301), Seen::New, "bit 45 of the ring must have been cleared");
    }

    #[test]
    fn any_order_within_the_window() {
        let mut session = Session::new(Epoch(1), VolumeId(1), OWNER);
        let mut done = std::collections::BTreeSet::new();
        let mut state = 12345_u64;
        for base in 0..2000_u64 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let seq = base + (state >> 33) % 200;
            match session.look(seq) {
                Seen::New => {
                    assert!(done.insert(seq));
                    session.record(seq, None);
                }
                Seen::Before(outcome) => {
                    assert_eq!(outcome, Outcome::Done);
                    assert!(done.contains(&seq));
                }
                Seen::Behind => assert!(seq + SESSION_WINDOW <= *done.last().unwrap()),
            }
        }
    }

    #[test]
    fn golden_bytes() {
        let mut session = Session::new(Epoch(7), VolumeId(0x3_0000_0001), OWNER);
        (1..299).for_each(|seq| session.record(seq, None));
        session.record(300, Some(Rejection::PastEnd));
        let mut key = 3_u32.to_le_bytes().to_vec();
        key.extend(0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10_u128.to_le_bytes());
        let sealed = crate::chunk::record::seal(&key, session.encode());
        let golden = include_str!("../../tests/golden/records.txt");
        assert_eq!(sealed, crate::golden::bytes(golden, "session"));
    }

    #[test]
    fn rejections_are_remembered_and_stored() {
        let mut session = Session::new(Epoch(3), VolumeId(9), OWNER);
        session.record(1, None);
        session.record(2, Some(Rejection::PastEnd));
        assert_eq!(session.look(2), Seen::Before(Outcome::Rejected(Rejection::PastEnd)));
        let record = session.encode();
        assert_eq!(Session::decode(&record), Some(session));
        for len in 0..record.len() {
            assert_eq!(Session::decode(&record[..len]), None);
        }
    }
}
