//! The state of one session as its client sees it.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use bytes::Bytes;
use nbd_store::limits::{SESSION_WINDOW, VOLUME_SIZE_MULTIPLE};
use nbd_store::{Epoch, Outcome, Rejection, SessionId};

use crate::command::with_epoch;
use crate::fault::{Fault, Faults};

/// The unit of consistency: the bytes of a sector come from one moment.
const SECTOR_BYTES: u64 = VOLUME_SIZE_MULTIPLE;

/// Where a session stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attachment {
    /// Nobody is being asked. What is pending waits for the next attempt.
    Detached,
    /// An attempt with this epoch is under way.
    Attaching(Epoch),
    /// A leader has opened or resumed the session with this epoch.
    Attached(Epoch),
    /// The log does not know the session: it was ended, and what is pending may or may not have
    /// taken effect. (Before the first attachment nothing was sent; start over with another id.)
    Gone,
}

/// Something that is asked of the shard and changes nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Query {
    /// The bytes of a range.
    Read {
        /// First byte.
        offset: u64,
        /// Bytes wanted.
        len: u64,
        /// Whether runs of zeroes may be told instead of sent.
        holes: bool,
    },
    /// Which parts of a range are allocated.
    BlockStatus {
        /// First byte.
        offset: u64,
        /// Bytes asked about.
        len: u64,
        /// Extents wanted at most.
        extents_max: u32,
    },
}

impl Query {
    /// What is left to be asked when the first `done` bytes of a read are here. Of a block status
    /// nothing ever is: it is answered in one piece.
    const fn rest(self, done: u64) -> Self {
        match self {
            Self::Read { offset, len, holes } => {
                Self::Read { offset: offset + done, len: len - done, holes }
            }
            Self::BlockStatus { .. } => self,
        }
    }
}

/// Number of a query in its session. Never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QueryId(pub u64);

/// What came of a mutation's answer.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict<T> {
    /// Of an attachment that was given up, or a repetition: to be forgotten.
    Ignored,
    /// The mutation is done with.
    Answered(T, Outcome),
    /// The answer says that the attachment is dead: the session is detached, and the mutation stays
    /// pending.
    Detached,
    /// The answer says that the session was ended: [`Attachment::Gone`].
    Gone,
}

/// What came of a piece of a read. A place is told in bytes from the read's first.
#[derive(Debug, PartialEq, Eq)]
pub enum Piece<'a, T> {
    /// Of an attachment that was given up, or of a read that is not pending: to be forgotten.
    Ignored,
    /// It cannot be a piece of what was asked for: the session is detached, and the read stays
    /// pending.
    Detached,
    /// More is to come.
    Part {
        /// The piece's place.
        at: u64,
        /// Of the read, which stays pending.
        token: &'a T,
    },
    /// It was the last: the read is done with.
    Last {
        /// The piece's place.
        at: u64,
        /// Of the read.
        token: T,
    },
}

/// What a new attachment has to send, in this order, before anything else.
#[derive(Debug)]
pub struct Resend {
    /// Sequence numbers and commands, with the attachment's epoch, lowest first.
    pub mutations: Vec<(u64, Bytes)>,
    /// Queries, oldest first, of reads what is not here yet. Between them and the mutations there
    /// is no order.
    pub queries: Vec<(QueryId, Query)>,
    /// How many of the queries go on where an earlier attachment has left them.
    pub continued: usize,
}

#[derive(Debug)]
struct Mutation<T> {
    /// As it was sent last; the epoch may be an older one.
    command: Bytes,
    token: T,
}

#[derive(Debug)]
struct Asked<T> {
    /// As the owner asked it.
    query: Query,
    /// Bytes of a read that are here, from its first on. Less than its length.
    done: u64,
    token: T,
}

impl<T> Asked<T> {
    /// Bytes of a read that are not here yet; 0 of a block status, which has none.
    const fn rest(&self) -> u64 {
        match self.query {
            Query::Read { len, .. } => len - self.done,
            Query::BlockStatus { .. } => 0,
        }
    }

    /// Whether the next `len` bytes may come as one piece.
    const fn takes(&self, len: u64) -> bool {
        let rest = self.rest();
        let Query::Read { offset, .. } = self.query else { return false };
        let is_within = 0 < len && len <= rest;
        is_within && (len == rest || (offset + self.done + len).is_multiple_of(SECTOR_BYTES))
    }
}

/// One session: its pending requests and its attachment. `T` is whatever the owner needs to answer
/// a request.
///
/// **Invariants.** Epochs only rise. Every sequence number is reserved once; of those pending, the
/// highest is less than [`SESSION_WINDOW`] above the lowest, so that the log always knows a
/// mutation that it has applied from a new one. Every token given in comes out once, or is left
/// when the session is [`Attachment::Gone`].
///
/// **Reads in pieces.** The attachment sends the bytes of a read in order, in pieces; one that is
/// lost in the middle leaves the read partly answered, and the next is asked for the rest only. So
/// every byte comes once, from one attachment, in its place: the present attachment was asked for
/// what follows the bytes that were here when it was made, and pieces of others are ignored. That
/// keeps each sector linearizable, whatever happened between two pieces. The attachment's leader
/// answers a piece with what the sectors hold at some moment between its being asked, which is
/// after the read was submitted, and the piece's arrival, which is before the read is answered. A
/// sector is read at one such moment, for pieces end with one ([`Self::read_piece`] takes no
/// others). Sectors of one read may be of different moments, as they may within one attachment:
/// sectors, not requests, are the unit of consistency.
#[derive(Debug)]
pub struct ClientSession<T> {
    id: SessionId,
    attachment: Attachment,
    /// Of the newest attempt; 0 before the first.
    epoch: Epoch,
    next_seq: u64,
    mutations: BTreeMap<u64, Mutation<T>>,
    next_query: u64,
    queries: BTreeMap<QueryId, Asked<T>>,
    faults: Faults,
}

impl<T> ClientSession<T> {
    /// A session that the log does not know yet. `id` is 128 random bits, never used before.
    #[must_use]
    pub const fn new(id: SessionId) -> Self {
        Self {
            id,
            attachment: Attachment::Detached,
            epoch: Epoch(0),
            next_seq: 1,
            mutations: BTreeMap::new(),
            next_query: 1,
            queries: BTreeMap::new(),
            faults: Faults(None),
        }
    }

    /// A session that was attached elsewhere, up to `epoch`, and goes on here: whoever had it had
    /// nothing pending, has reserved all numbers below `next_seq`, and will not use it again. The
    /// next attempt has a higher epoch, so that whatever of it is still on its way is fenced off.
    #[must_use]
    pub const fn resumed(id: SessionId, epoch: Epoch, next_seq: u64) -> Self {
        let mut session = Self::new(id);
        session.epoch = epoch;
        session.next_seq = next_seq;
        session
    }

    /// The same with a bug in it.
    #[must_use]
    pub const fn with_fault(mut self, fault: Option<Fault>) -> Self {
        self.faults = Faults(fault);
        self
    }

    /// Its identity.
    #[must_use]
    pub const fn id(&self) -> SessionId {
        self.id
    }

    /// Where it stands.
    #[must_use]
    pub const fn attachment(&self) -> Attachment {
        self.attachment
    }

    /// The newest epoch asked for: what a command made now should carry. 0 before the first
    /// attempt.
    #[must_use]
    pub const fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Whether nothing is pending.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.mutations.is_empty() && self.queries.is_empty()
    }

    /// Begins an attempt to attach, and gives up whatever attachment or attempt there was: its
    /// answers are ignored from now on. The caller asks the leader to open the session with the
    /// epoch returned.
    ///
    /// # Panics
    /// If the session is gone, or was resumed 2^32 times.
    pub fn begin_attach(&mut self) -> Epoch {
        assert!(self.attachment != Attachment::Gone, "a session that is gone stays so");
        if self.faults.begins_anew() && self.epoch != Epoch(0) {
            (self.id, self.epoch) = (SessionId(self.id.0.wrapping_add(1)), Epoch(0));
        }
        self.epoch = Epoch(self.epoch.0.checked_add(1).expect("epochs last for decades"));
        self.attachment = Attachment::Attaching(self.epoch);
        self.epoch
    }

    /// The log has opened the session with `epoch`. Gives everything pending, to be sent now;
    /// `None` if that attempt was given up.
    pub fn attached(&mut self, epoch: Epoch) -> Option<Resend> {
        if self.attachment != Attachment::Attaching(epoch) {
            return None;
        }
        self.attachment = Attachment::Attached(epoch);
        if self.faults.reorders_replay() {
            let seqs: Vec<u64> = self.mutations.keys().copied().collect();
            let pending = std::mem::take(&mut self.mutations).into_values();
            self.mutations = seqs.into_iter().zip(pending.rev()).collect();
        }
        let (id, faults) = (self.id, self.faults);
        let mutations = self.mutations.iter_mut().map(|(seq, mutation)| {
            let command = with_epoch(std::mem::take(&mut mutation.command), epoch);
            mutation.command = faults.stamped(command, id, *seq);
            (*seq, mutation.command.clone())
        });
        let mutations = mutations.collect();
        let queries = self.queries.iter().map(|(id, asked)| {
            let done = if faults.restarts_reads() { 0 } else { asked.done };
            (*id, asked.query.rest(done))
        });
        let queries = queries.collect();
        let continued = self.queries.values().filter(|asked| asked.done > 0).count();
        Some(Resend { mutations, queries, continued })
    }

    /// The attempt with `epoch` came to nothing: no leader, no connection, no answer in time, or a
    /// verdict of the log. Says whether the session is gone by that.
    pub fn attach_failed(&mut self, epoch: Epoch, verdict: Option<Rejection>) -> bool {
        if self.attachment == Attachment::Attaching(epoch) {
            let gone = verdict == Some(Rejection::UnknownSession);
            self.attachment = if gone { Attachment::Gone } else { Attachment::Detached };
        }
        self.attachment == Attachment::Gone
    }

    /// The attachment with `epoch` is dead: its leader is not any more, or the connection broke.
    pub fn detached(&mut self, epoch: Epoch) {
        if self.attachment == Attachment::Attached(epoch) {
            self.attachment = Attachment::Detached;
        }
    }

    /// The attachment with `epoch` says that the log has ended the session. Says whether the
    /// session is gone by that.
    pub fn ended(&mut self, epoch: Epoch) -> bool {
        if self.attachment == Attachment::Attached(epoch) {
            self.attachment = Attachment::Gone;
        }
        self.attachment == Attachment::Gone
    }

    /// Whether `count` more mutations may be reserved beside the pending ones, of which the lowest
    /// reserved one is `oldest`.
    #[must_use]
    pub const fn has_room(&self, oldest: Option<u64>, count: u64) -> bool {
        let oldest = match oldest {
            Some(oldest) => oldest,
            None => self.next_seq,
        };
        (self.next_seq - oldest).saturating_add(count) <= SESSION_WINDOW
    }

    /// The sequence number that is reserved next.
    #[must_use]
    pub const fn next_seq(&self) -> u64 {
        self.next_seq
    }

    /// Reserves `count` sequence numbers and gives the first. Numbers that are never submitted
    /// leave a gap, which harms nobody. The caller holds to [`has_room`](Self::has_room).
    pub const fn reserve(&mut self, count: u64) -> u64 {
        let first = self.next_seq;
        self.next_seq += count;
        first
    }

    /// Takes a mutation in. Gives the command if it is to be sent now, over the attachment there
    /// is; else it is sent once there is one.
    ///
    /// # Panics
    /// If `seq` was not reserved, was submitted before, or is out of the window.
    pub fn submit(&mut self, seq: u64, command: Bytes, token: T) -> Option<Bytes> {
        assert!(seq < self.next_seq, "sequence number {seq} was not reserved");
        if let (Some((first, _)), Some((last, _))) =
            (self.mutations.first_key_value(), self.mutations.last_key_value())
        {
            let (first, last) = (seq.min(*first), seq.max(*last));
            assert!(last - first < SESSION_WINDOW, "{first} and {last} are not in one window");
        }
        let (command, now) = match self.attachment {
            Attachment::Attached(epoch) => {
                let command = self.faults.stamped(with_epoch(command, epoch), self.id, seq);
                (command.clone(), Some(command))
            }
            _ => (command, None),
        };
        let before = self.mutations.insert(seq, Mutation { command, token });
        assert!(before.is_none(), "sequence number {seq} was submitted twice");
        now
    }

    /// The token of a pending mutation.
    #[must_use]
    pub fn token(&self, seq: u64) -> Option<&T> {
        self.mutations.get(&seq).map(|mutation| &mutation.token)
    }

    /// The token of a pending query.
    #[must_use]
    pub fn query_token(&self, id: QueryId) -> Option<&T> {
        self.queries.get(&id).map(|asked| &asked.token)
    }

    /// A query that is pending, as it was asked.
    #[must_use]
    pub fn pending_query(&self, id: QueryId) -> Option<Query> {
        self.queries.get(&id).map(|asked| asked.query)
    }

    /// The attachment with `epoch` has answered a mutation.
    pub fn mutation_answered(&mut self, epoch: Epoch, seq: u64, outcome: Outcome) -> Verdict<T> {
        if !self.is_current(epoch) {
            return Verdict::Ignored;
        }
        let current = self.attachment == Attachment::Attached(epoch);
        match outcome {
            Outcome::Rejected(Rejection::StaleEpoch) if current => {
                self.attachment = Attachment::Detached;
                return Verdict::Detached;
            }
            Outcome::Rejected(Rejection::UnknownSession) if current => {
                self.attachment = Attachment::Gone;
                return Verdict::Gone;
            }
            _ => {}
        }
        match self.mutations.remove(&seq) {
            Some(mutation) => Verdict::Answered(mutation.token, outcome),
            None => Verdict::Ignored,
        }
    }

    /// The attachment with `epoch` has refused a mutation and not put it into the log. It is not
    /// sent again; give its token the error. (An earlier attachment may have applied it: as with
    /// every write that fails, its effect is open.)
    pub fn mutation_refused(&mut self, epoch: Epoch, seq: u64) -> Option<T> {
        if !self.is_current(epoch) {
            return None;
        }
        self.mutations.remove(&seq).map(|mutation| mutation.token)
    }

    /// Takes a query in. The flag says whether to send it now.
    pub fn query(&mut self, query: Query, token: T) -> (QueryId, bool) {
        let id = QueryId(self.next_query);
        self.next_query += 1;
        self.queries.insert(id, Asked { query, done: 0, token });
        (id, matches!(self.attachment, Attachment::Attached(_)))
    }

    /// The attachment with `epoch` has sent the next `len` bytes of a read: the first of what it
    /// was asked for, or those behind the ones it has sent before. A piece has at least a byte,
    /// stays within the read and ends with it or with a sector; whoever sends another is given up.
    pub fn read_piece(&mut self, epoch: Epoch, id: QueryId, len: u64) -> Piece<'_, T> {
        if !self.is_current(epoch) {
            return Piece::Ignored;
        }
        let Entry::Occupied(mut asked) = self.queries.entry(id) else { return Piece::Ignored };
        if !asked.get().takes(len) {
            self.attachment = Attachment::Detached;
            return Piece::Detached;
        }
        let at = asked.get().done;
        asked.get_mut().done += len;
        if asked.get().rest() == 0 {
            return Piece::Last { at, token: asked.remove().token };
        }
        Piece::Part { at, token: &asked.into_mut().token }
    }

    /// The attachment with `epoch` has answered a block status, or a query badly: it is done with.
    /// Gives its token, and how many bytes of a read had come by then. `None`: to be forgotten.
    pub fn query_answered(&mut self, epoch: Epoch, id: QueryId) -> Option<(T, u64)> {
        if !self.is_current(epoch) {
            return None;
        }
        self.queries.remove(&id).map(|asked| (asked.token, asked.done))
    }

    /// Gives up everything pending, mutations first, oldest first: the owner is leaving.
    pub fn abandon(&mut self) -> Vec<T> {
        let mutations = std::mem::take(&mut self.mutations).into_values().map(|m| m.token);
        let queries = std::mem::take(&mut self.queries).into_values().map(|asked| asked.token);
        mutations.chain(queries).collect()
    }

    fn is_current(&self, epoch: Epoch) -> bool {
        let stale = epoch < self.epoch && self.faults.forwards_stale_replies();
        stale || self.attachment == Attachment::Attached(epoch)
    }
}

#[cfg(test)]
mod tests;
