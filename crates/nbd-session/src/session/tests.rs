//! The rules one by one, and a session against a shard that moves, loses, delays and repeats.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;

use nbd_store::{VolumeId, encode_trim};
use proptest::prelude::*;

use super::*;

const ID: SessionId = SessionId(7);
const STALE: Outcome = Outcome::Rejected(Rejection::StaleEpoch);
const READ: Query = Query::Read { offset: 0, len: 4096, holes: true };

/// Each trims a block of its own, by which it is known whatever its number becomes.
fn trim(epoch: Epoch, seq: u64) -> Bytes {
    encode_trim(ID, epoch, seq, VolumeId(1), seq * 4096, 4096)
}

fn epoch_of(command: &Bytes) -> Epoch {
    nbd_store::decode_all(command).next().unwrap().unwrap().header.epoch
}

fn attach<T>(session: &mut ClientSession<T>) -> (Epoch, Resend) {
    let epoch = session.begin_attach();
    (epoch, session.attached(epoch).unwrap())
}

fn submit(session: &mut ClientSession<char>, token: char) -> (u64, Option<Bytes>) {
    let seq = session.reserve(1);
    (seq, session.submit(seq, trim(session.epoch(), seq), token))
}

#[test]
fn what_comes_while_nobody_is_attached_is_sent_by_the_attachment_in_order() {
    let mut session = ClientSession::new(ID);
    let first = session.reserve(2);
    for (seq, token) in [(first + 1, 'b'), (first, 'a')] {
        assert_eq!(session.submit(seq, trim(Epoch(0), seq), token), None);
    }
    let (id, now) = session.query(READ, 'q');
    assert!(!now);
    let (epoch, resend) = attach(&mut session);
    assert_eq!(epoch, Epoch(1), "the first attempt opens the session");
    let seqs: Vec<_> = resend.mutations.iter().map(|(seq, _)| *seq).collect();
    assert_eq!(seqs, [first, first + 1]);
    assert!(resend.mutations.iter().all(|(_, command)| epoch_of(command) == epoch));
    assert_eq!((resend.queries, resend.continued), (vec![(id, READ)], 0));
}

#[test]
fn a_later_attachment_sends_what_is_not_answered_with_its_own_epoch() {
    let mut session = ClientSession::new(ID);
    let (first, _) = attach(&mut session);
    let (a, sent) = submit(&mut session, 'a');
    assert_eq!(epoch_of(&sent.unwrap()), first);
    let (b, _) = submit(&mut session, 'b');
    assert_eq!(
        session.mutation_answered(first, a, Outcome::Done),
        Verdict::Answered('a', Outcome::Done)
    );
    session.detached(first);
    assert_eq!(session.attachment(), Attachment::Detached);
    let (second, resend) = attach(&mut session);
    assert!(second > first);
    let [(seq, command)] = &resend.mutations[..] else { panic!("{resend:?}") };
    assert_eq!((*seq, epoch_of(command)), (b, second));
}

#[test]
fn answers_count_only_from_the_present_attachment_and_once() {
    let mut session = ClientSession::new(ID);
    let (first, _) = attach(&mut session);
    let (seq, _) = submit(&mut session, 'a');
    let (id, now) = session.query(READ, 'q');
    assert!(now);
    let second = session.begin_attach();
    for epoch in [first, second] {
        assert_eq!(session.mutation_answered(epoch, seq, Outcome::Done), Verdict::Ignored);
        assert_eq!(session.query_answered(epoch, id), None);
        assert_eq!(session.mutation_refused(epoch, seq), None);
    }
    session.attached(second).unwrap();
    assert_eq!(session.mutation_answered(first, seq, Outcome::Done), Verdict::Ignored);
    let answered = Verdict::Answered('a', Outcome::Done);
    assert_eq!(session.mutation_answered(second, seq, Outcome::Done), answered);
    assert_eq!(session.mutation_answered(second, seq, Outcome::Done), Verdict::Ignored);
    assert_eq!(session.query_answered(second, id), Some(('q', 0)));
    assert_eq!(session.query_answered(second, id), None);
    assert!(session.is_idle());
}

#[test]
fn a_read_goes_on_where_the_last_attachment_has_left_it() {
    let read = |offset, len| Query::Read { offset, len, holes: true };
    let mut session = ClientSession::new(ID);
    let (first, _) = attach(&mut session);
    let (id, _) = session.query(read(1000, 5000), 'r');
    let (other, _) = session.query(READ, 'o');
    assert_eq!(session.read_piece(first, id, 24), Piece::Part { at: 0, token: &'r' });
    assert_eq!(session.read_piece(first, id, 3072), Piece::Part { at: 24, token: &'r' });
    let second = session.begin_attach();
    assert_eq!(session.read_piece(first, id, 1024), Piece::Ignored, "it comes late");
    assert_eq!(session.read_piece(second, id, 1024), Piece::Ignored, "it comes early");
    let resend = session.attached(second).unwrap();
    assert_eq!(resend.queries, [(id, read(4096, 1904)), (other, READ)]);
    assert_eq!(resend.continued, 1);
    assert_eq!(session.pending_query(id), Some(read(1000, 5000)));
    assert_eq!(session.read_piece(first, id, 1024), Piece::Ignored);
    assert_eq!(session.read_piece(second, id, 1904), Piece::Last { at: 3096, token: 'r' });
    assert_eq!(session.read_piece(second, id, 512), Piece::Ignored);
    // One that fails tells how far it got.
    assert_eq!(session.read_piece(second, other, 512), Piece::Part { at: 0, token: &'o' });
    assert_eq!(session.query_answered(second, other), Some(('o', 512)));
    assert!(session.is_idle());
}

#[test]
fn a_piece_that_cannot_be_one_ends_its_attachment_and_nothing_else() {
    // Nothing; more than is left; a sector that would be read at two moments.
    for len in [0, 4097, u64::MAX, 100, 4095] {
        let mut session = ClientSession::new(ID);
        let (epoch, _) = attach(&mut session);
        let (id, _) = session.query(READ, 'r');
        assert_eq!(session.read_piece(epoch, id, len), Piece::Detached, "{len}");
        assert_eq!(session.attachment(), Attachment::Detached);
        assert_eq!(session.read_piece(epoch, id, 4096), Piece::Ignored);
        let (epoch, resend) = attach(&mut session);
        assert_eq!(resend.queries, [(id, READ)]);
        assert_eq!(session.read_piece(epoch, id, 4096), Piece::Last { at: 0, token: 'r' });
    }
    let mut session = ClientSession::new(ID);
    let (epoch, _) = attach(&mut session);
    let status = Query::BlockStatus { offset: 0, len: 4096, extents_max: 1 };
    let (id, _) = session.query(status, 's');
    assert_eq!(session.read_piece(epoch, id, 4096), Piece::Detached);
    assert_eq!(session.pending_query(id), Some(status));
}

#[test]
fn an_attempt_that_was_given_up_attaches_nothing() {
    let mut session = ClientSession::<char>::new(ID);
    let first = session.begin_attach();
    let second = session.begin_attach();
    assert!(session.attached(first).is_none());
    assert!(!session.attach_failed(first, Some(Rejection::UnknownSession)));
    assert_eq!(session.attachment(), Attachment::Attaching(second));
    assert!(!session.attach_failed(second, None));
    assert_eq!(session.attachment(), Attachment::Detached);
}

#[test]
fn a_stale_epoch_detaches_and_keeps_the_mutation() {
    let mut session = ClientSession::new(ID);
    let (epoch, _) = attach(&mut session);
    let (seq, _) = submit(&mut session, 'a');
    assert_eq!(session.mutation_answered(epoch, seq, STALE), Verdict::Detached);
    let (_, resend) = attach(&mut session);
    assert_eq!(resend.mutations.len(), 1);
}

#[test]
fn a_session_that_the_log_does_not_know_is_gone() {
    let unknown = Rejection::UnknownSession;
    let mut session = ClientSession::new(ID);
    let (epoch, _) = attach(&mut session);
    let (seq, _) = submit(&mut session, 'a');
    assert_eq!(session.mutation_answered(epoch, seq, Outcome::Rejected(unknown)), Verdict::Gone);
    assert_eq!(session.attachment(), Attachment::Gone);
    assert_eq!(session.abandon(), ['a'], "its outcome is unknown");

    let mut session = ClientSession::<char>::new(ID);
    attach(&mut session);
    let epoch = session.begin_attach();
    assert!(session.attach_failed(epoch, Some(unknown)));
}

#[test]
fn a_refused_mutation_is_not_sent_again() {
    let mut session = ClientSession::new(ID);
    let (epoch, _) = attach(&mut session);
    let (seq, _) = submit(&mut session, 'a');
    assert_eq!(session.mutation_refused(epoch, seq), Some('a'));
    let (_, resend) = attach(&mut session);
    assert!(resend.mutations.is_empty());
}

#[test]
fn the_window_counts_from_the_oldest_mutation_under_way() {
    let mut session = ClientSession::<char>::new(ID);
    assert!(session.has_room(None, SESSION_WINDOW));
    assert!(!session.has_room(None, SESSION_WINDOW + 1));
    let oldest = session.reserve(SESSION_WINDOW - 1);
    assert!(session.has_room(Some(oldest), 1));
    assert!(!session.has_room(Some(oldest), 2));
    assert!(session.has_room(Some(oldest + 1), 2));
}

/// What a shard's log knows of a session.
#[derive(Default)]
struct Known {
    epoch: Epoch,
    /// What the window remembers.
    window: BTreeSet<u64>,
}

/// A shard as a session sees it: its log, and one attachment at a time that answers.
#[derive(Default)]
struct Shard {
    sessions: BTreeMap<SessionId, Known>,
    /// Mutations in the order in which they took effect, by the numbers that they first had.
    applied: Vec<u64>,
    /// Commands on their way, by the epoch of the attachment that carries them.
    incoming: BTreeMap<Epoch, VecDeque<(u64, Bytes)>>,
    /// Answers on their way, of any attachment.
    outgoing: Vec<(Epoch, u64, Outcome)>,
    /// What is still to be read for the reads of each attachment.
    reading: BTreeMap<Epoch, VecDeque<(QueryId, Range<u64>)>>,
    /// Pieces on their way, in the order of each attachment: whose they are, and which bytes.
    pieces: BTreeMap<Epoch, VecDeque<(QueryId, Range<u64>)>>,
}

impl Shard {
    fn open(&mut self, id: SessionId, epoch: Epoch) -> bool {
        let known = self.sessions.entry(id).or_default();
        if epoch < known.epoch {
            return false;
        }
        known.epoch = epoch;
        true
    }

    /// Takes in the next command of some attachment, present or past.
    fn apply(&mut self, epoch: Epoch) {
        let Some((seq, command)) = self.incoming.get_mut(&epoch).and_then(VecDeque::pop_front)
        else {
            return;
        };
        let header = nbd_store::decode_all(&command).next().unwrap().unwrap().header;
        assert_eq!((header.epoch, header.seq), (epoch, seq));
        let known = self.sessions.get_mut(&header.session).unwrap();
        let outcome = if header.epoch < known.epoch {
            STALE
        } else {
            let newest = known.window.last().copied().unwrap_or(0);
            assert!(seq + SESSION_WINDOW > newest, "{seq} fell out of the window of {newest}");
            if known.window.insert(seq) {
                self.applied.push(header.offset / 4096);
            }
            Outcome::Done
        };
        self.outgoing.push((epoch, seq, outcome));
    }

    /// Reads the next piece for some attachment, of one to four sectors.
    fn read(&mut self, epoch: Epoch, sectors: u64) {
        let Some(reads) = self.reading.get_mut(&epoch) else { return };
        let Some((id, rest)) = reads.front_mut() else { return };
        let end = ((rest.start / SECTOR_BYTES + sectors) * SECTOR_BYTES).min(rest.end);
        let piece = (*id, rest.start..end);
        rest.start = end;
        if rest.is_empty() {
            reads.pop_front();
        }
        self.pieces.entry(epoch).or_default().push_back(piece);
    }
}

#[derive(Debug, Clone, Copy)]
enum Step {
    /// The client asks for a mutation.
    Submit,
    /// The client asks for a read.
    Ask { offset: u64, len: u64 },
    /// An attempt to attach, that succeeds or is lost before or behind the log.
    Attach { logged: bool, answered: bool },
    /// The attachment is noticed to be dead.
    Detach,
    /// Some attachment's next command reaches the log.
    Apply(u8),
    /// Some attachment reads a piece of so many sectors.
    Read(u8, u64),
    /// What is on its way to the shard is lost with its stream.
    Break(u8),
    /// Some answer arrives.
    Answer(u8),
    /// Some answer arrives and is repeated later.
    Repeat(u8),
    /// Some attachment's next piece arrives.
    Piece(u8),
    /// Another client of the session carries it on, if nothing is pending. What the one before it
    /// had on its way still is.
    HandOver,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => Just(Step::Submit),
        2 => (0..5000_u64, 1..8000_u64).prop_map(|(offset, len)| Step::Ask { offset, len }),
        2 => any::<(bool, bool)>().prop_map(|(logged, answered)| Step::Attach { logged, answered }),
        1 => Just(Step::Attach { logged: true, answered: true }),
        1 => Just(Step::Detach),
        8 => any::<u8>().prop_map(Step::Apply),
        8 => (any::<u8>(), 1..=4_u64).prop_map(|(pick, sectors)| Step::Read(pick, sectors)),
        1 => any::<u8>().prop_map(Step::Break),
        6 => any::<u8>().prop_map(Step::Answer),
        1 => any::<u8>().prop_map(Step::Repeat),
        8 => any::<u8>().prop_map(Step::Piece),
        2 => Just(Step::HandOver),
    ]
}

/// A read of the client, and which of its bytes are here. Its token is its place among all reads.
#[derive(Debug)]
struct ClientRead {
    asked: Range<u64>,
    /// Up to here, from the first on.
    here: u64,
    answered: bool,
}

/// A session, its shard, and what the client has seen.
struct World {
    session: ClientSession<u64>,
    shard: Shard,
    /// Answered, in order.
    answered: Vec<(u64, Outcome)>,
    submitted: u64,
    reads: Vec<ClientRead>,
    /// What came that must not.
    wrong: Option<String>,
}

/// One of those that have something to do.
fn some<T>(queues: &BTreeMap<Epoch, VecDeque<T>>, pick: u8) -> Option<Epoch> {
    let with_work = queues.iter().filter(|(_, queue)| !queue.is_empty());
    let epochs: Vec<_> = with_work.map(|(epoch, _)| *epoch).collect();
    (!epochs.is_empty()).then(|| epochs[pick as usize % epochs.len()])
}

impl World {
    fn new(fault: Option<Fault>) -> Self {
        let session = ClientSession::new(ID).with_fault(fault);
        let (shard, answered, reads) = (Shard::default(), Vec::new(), Vec::new());
        Self { session, shard, answered, submitted: 0, reads, wrong: None }
    }

    fn send(&mut self, epoch: Epoch, seq: u64, command: Bytes) {
        self.shard.incoming.entry(epoch).or_default().push_back((seq, command));
    }

    fn send_query(&mut self, epoch: Epoch, id: QueryId, query: Query) {
        let Query::Read { offset, len, .. } = query else { unreachable!("only reads are asked") };
        self.shard.reading.entry(epoch).or_default().push_back((id, offset..offset + len));
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Submit => {
                let oldest = self.session.mutations.first_key_value().map(|(seq, _)| *seq);
                if !self.session.has_room(oldest, 1) {
                    return;
                }
                let seq = self.session.reserve(1);
                let command = trim(self.session.epoch(), seq);
                self.submitted += 1;
                if let Some(command) = self.session.submit(seq, command, seq) {
                    self.send(self.session.epoch(), seq, command);
                }
            }
            Step::Ask { offset, len } => {
                let query = Query::Read { offset, len, holes: false };
                let (id, now) = self.session.query(query, self.reads.len() as u64);
                let asked = offset..offset + len;
                self.reads.push(ClientRead { asked, here: offset, answered: false });
                if now {
                    self.send_query(self.session.epoch(), id, query);
                }
            }
            Step::Attach { logged, answered } => self.attach(logged, answered),
            Step::Detach => self.session.detached(self.session.epoch()),
            Step::Apply(pick) => {
                if let Some(epoch) = some(&self.shard.incoming, pick) {
                    self.shard.apply(epoch);
                }
            }
            Step::Read(pick, sectors) => {
                if let Some(epoch) = some(&self.shard.reading, pick) {
                    self.shard.read(epoch, sectors);
                }
            }
            Step::Break(pick) => {
                if let Some(epoch) = some(&self.shard.incoming, pick) {
                    self.shard.incoming.remove(&epoch);
                    self.shard.reading.remove(&epoch);
                    self.session.detached(epoch);
                }
            }
            Step::Answer(pick) => self.answer(pick, true),
            Step::Repeat(pick) => self.answer(pick, false),
            Step::Piece(pick) => self.take_piece(pick),
            Step::HandOver => {
                let before = &self.session;
                if before.is_idle() && self.shard.sessions.contains_key(&before.id()) {
                    let (epoch, next_seq) = (before.epoch(), before.next_seq());
                    self.session = ClientSession::resumed(before.id(), epoch, next_seq);
                }
            }
        }
    }

    fn attach(&mut self, logged: bool, answered: bool) {
        let epoch = self.session.begin_attach();
        // The first attempt must reach the log: else the owner takes another id.
        let logged = logged || epoch == Epoch(1);
        if !(logged && self.shard.open(self.session.id(), epoch) && answered) {
            self.session.attach_failed(epoch, None);
            return;
        }
        let resend = self.session.attached(epoch).unwrap();
        for (seq, command) in resend.mutations {
            self.send(epoch, seq, command);
        }
        for (id, query) in resend.queries {
            self.send_query(epoch, id, query);
        }
    }

    fn answer(&mut self, pick: u8, last: bool) {
        if self.shard.outgoing.is_empty() {
            return;
        }
        let at = pick as usize % self.shard.outgoing.len();
        let (epoch, seq, outcome) = self.shard.outgoing[at].clone();
        if last {
            self.shard.outgoing.remove(at);
        }
        match self.session.mutation_answered(epoch, seq, outcome) {
            Verdict::Answered(token, outcome) => self.answered.push((token, outcome)),
            Verdict::Ignored | Verdict::Detached => {}
            Verdict::Gone => panic!("nobody ended the session"),
        }
    }

    fn take_piece(&mut self, pick: u8) {
        let Some(epoch) = some(&self.shard.pieces, pick) else { return };
        let next = self.shard.pieces.get_mut(&epoch).and_then(VecDeque::pop_front);
        let Some((id, bytes)) = next else { return };
        let (at, token, last) = match self.session.read_piece(epoch, id, bytes.end - bytes.start) {
            Piece::Ignored => return,
            Piece::Detached => {
                self.wrong = Some(format!("bytes {bytes:?} do not fit"));
                return;
            }
            Piece::Part { at, token } => (at, *token, false),
            Piece::Last { at, token } => (at, token, true),
        };
        let read = &mut self.reads[usize::try_from(token).unwrap()];
        let place = read.asked.start + at;
        if place != bytes.start || place != read.here || read.answered {
            self.wrong = Some(format!("bytes {bytes:?} at {place} of {read:?}"));
        }
        (read.here, read.answered) = (bytes.end, last);
    }

    /// Lets everything come to its end over a last, good attachment.
    fn settle(&mut self) {
        self.step(Step::Attach { logged: true, answered: true });
        while some(&self.shard.incoming, 0).is_some() {
            self.step(Step::Apply(0));
        }
        while !self.shard.outgoing.is_empty() {
            self.answer(0, true);
        }
        while some(&self.shard.reading, 0).is_some() {
            self.step(Step::Read(0, 3));
        }
        while some(&self.shard.pieces, 0).is_some() {
            self.step(Step::Piece(0));
        }
    }

    /// What must hold once all is settled.
    fn check(&self) -> Result<(), String> {
        if let Some(wrong) = &self.wrong {
            return Err(wrong.clone());
        }
        let answered: BTreeSet<_> = self.answered.iter().map(|(seq, _)| *seq).collect();
        let applied: BTreeSet<_> = self.shard.applied.iter().copied().collect();
        let all: BTreeSet<_> = (1..=self.submitted).collect();
        if answered.len() != self.answered.len() || answered != all {
            return Err(format!("not each answered once: {:?}", self.answered));
        }
        if applied.len() != self.shard.applied.len() || applied != all {
            return Err(format!("not each applied once: {:?}", self.shard.applied));
        }
        if let Some(wrong) = self.answered.iter().find(|(_, outcome)| *outcome != Outcome::Done) {
            return Err(format!("a wrong answer: {wrong:?}"));
        }
        match self.reads.iter().find(|read| !read.answered || read.here != read.asked.end) {
            Some(read) => Err(format!("not all there: {read:?}")),
            None => Ok(()),
        }
    }
}

proptest! {
    /// The bytes of reads likewise: each comes once, in its place.
    #[test]
    fn each_mutation_is_applied_once_and_answered_once(
        steps in prop::collection::vec(step(), 1..400),
    ) {
        let mut world = World::new(None);
        let mut done = 0;
        for step in steps {
            world.step(step);
            // What was acknowledged has taken effect by then.
            for (seq, outcome) in &world.answered[done..] {
                prop_assert_eq!(outcome, &Outcome::Done);
                prop_assert!(world.shard.applied.contains(seq), "{} was answered early", seq);
            }
            done = world.answered.len();
        }
        world.settle();
        prop_assert_eq!(world.check(), Ok(()));
    }
}

/// The check above would see it if one of the session's rules were broken.
#[cfg(feature = "planted-faults")]
#[test]
fn every_planted_fault_is_found() {
    let good = Step::Attach { logged: true, answered: true };
    let ask = Step::Ask { offset: 700, len: 4000 };
    let late = [good, Step::Submit, good, Step::Apply(0), Step::Answer(0)];
    let (one, other) = (Step::Read(0, 2), Step::Read(1, 1));
    let late_piece = [good, ask, one, good, other, Step::Piece(0), Step::Piece(0)];
    let lost_answer = [good, Step::Submit, Step::Submit, Step::Apply(0), Step::Break(0)];
    let lost_piece = [good, ask, Step::Read(0, 2), Step::Piece(0), Step::Detach];
    for (fault, steps) in [
        (Fault::ForwardStaleReply, &late[..]),
        (Fault::ForwardStaleReply, &late_piece),
        (Fault::ReplayWithoutResume, &lost_answer),
        (Fault::ReplayReordered, &lost_answer),
        (Fault::PartialReadRestarted, &lost_piece),
    ] {
        for (planted, found) in [(None, false), (Some(fault), true)] {
            let mut world = World::new(planted);
            steps.iter().for_each(|step| world.step(*step));
            world.settle();
            assert_eq!(world.check().is_err(), found, "{planted:?}: {:?}", world.check());
        }
    }
}

// Goal: a session that is carried on by another client of it neither repeats a number nor an epoch.
#[test]
fn a_session_goes_on_elsewhere_where_it_was_left() {
    let mut left = ClientSession::new(ID);
    let (first, _) = attach(&mut left);
    let (a, _) = submit(&mut left, 'a');
    assert!(!left.is_idle());
    left.mutation_answered(first, a, Outcome::Done);
    assert!(left.is_idle());
    // An attempt under way when it is left counts: the log may yet see it.
    let newest = left.begin_attach();
    let mut session = ClientSession::resumed(left.id(), left.epoch(), left.next_seq());
    assert_eq!(session.attachment(), Attachment::Detached);
    let (b, sent) = submit(&mut session, 'b');
    assert_eq!((b, sent), (a + 1, None), "what comes before the attachment waits for it");
    let (epoch, resend) = attach(&mut session);
    assert!(epoch > newest);
    assert_eq!(resend.mutations.len(), 1);
    assert_eq!(epoch_of(&resend.mutations[0].1), epoch);
}
