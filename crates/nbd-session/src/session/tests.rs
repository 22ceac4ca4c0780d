//! The rules one by one, and a session against a shard that moves, loses, delays and repeats.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use nbd_store::{VolumeId, encode_trim};
use proptest::prelude::*;

use super::*;

const ID: SessionId = SessionId(7);
const STALE: Outcome = Outcome::Rejected(Rejection::StaleEpoch);
const READ: Query = Query::Read { offset: 0, len: 4096, holes: true };

fn trim(epoch: Epoch, seq: u64) -> Bytes {
    encode_trim(ID, epoch, seq, VolumeId(1), 0, 4096)
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
    assert_eq!(resend.queries, [(id, READ)]);
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
    assert_eq!(session.query_answered(second, id), Some('q'));
    assert_eq!(session.query_answered(second, id), None);
    assert!(session.is_idle());
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

/// A shard as a session sees it: its log, and one attachment at a time that answers.
#[derive(Default)]
struct Shard {
    /// Of the session; `None` before it is opened.
    epoch: Option<Epoch>,
    /// What the window remembers.
    window: BTreeSet<u64>,
    /// Mutations in the order in which they took effect.
    applied: Vec<u64>,
    /// Commands on their way, by the epoch of the attachment that carries them.
    incoming: BTreeMap<Epoch, VecDeque<(u64, Bytes)>>,
    /// Answers on their way, of any attachment.
    outgoing: Vec<(Epoch, u64, Outcome)>,
}

impl Shard {
    fn open(&mut self, epoch: Epoch) -> bool {
        if self.epoch.is_some_and(|now| epoch < now) {
            return false;
        }
        self.epoch = Some(epoch);
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
        let outcome = if Some(header.epoch) < self.epoch {
            STALE
        } else {
            let newest = self.window.last().copied().unwrap_or(0);
            assert!(seq + SESSION_WINDOW > newest, "{seq} fell out of the window of {newest}");
            if self.window.insert(seq) {
                self.applied.push(seq);
            }
            Outcome::Done
        };
        self.outgoing.push((epoch, seq, outcome));
    }
}

#[derive(Debug, Clone, Copy)]
enum Step {
    /// The client asks for something.
    Submit,
    /// An attempt to attach, that succeeds or is lost before or behind the log.
    Attach { logged: bool, answered: bool },
    /// The attachment is noticed to be dead.
    Detach,
    /// Some attachment's next command reaches the log.
    Apply(u8),
    /// A command on its way is lost, and with it all behind it: the stream broke.
    Break(u8),
    /// Some answer arrives.
    Answer(u8),
    /// Some answer arrives and is repeated later.
    Repeat(u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => Just(Step::Submit),
        2 => any::<(bool, bool)>().prop_map(|(logged, answered)| Step::Attach { logged, answered }),
        1 => Just(Step::Attach { logged: true, answered: true }),
        1 => Just(Step::Detach),
        8 => any::<u8>().prop_map(Step::Apply),
        1 => any::<u8>().prop_map(Step::Break),
        6 => any::<u8>().prop_map(Step::Answer),
        1 => any::<u8>().prop_map(Step::Repeat),
    ]
}

/// A session, its shard, and what the client has seen.
struct World {
    session: ClientSession<u64>,
    shard: Shard,
    /// Answered, in order, with the number of mutations that had taken effect by then.
    answered: Vec<(u64, Outcome)>,
    submitted: u64,
}

impl World {
    fn new(fault: Option<Fault>) -> Self {
        let session = ClientSession::new(ID).with_fault(fault);
        Self { session, shard: Shard::default(), answered: Vec::new(), submitted: 0 }
    }

    fn some_epoch(&self, pick: u8) -> Option<Epoch> {
        let with_work = self.shard.incoming.iter().filter(|(_, queue)| !queue.is_empty());
        let epochs: Vec<_> = with_work.map(|(epoch, _)| *epoch).collect();
        (!epochs.is_empty()).then(|| epochs[pick as usize % epochs.len()])
    }

    fn send(&mut self, epoch: Epoch, seq: u64, command: Bytes) {
        self.shard.incoming.entry(epoch).or_default().push_back((seq, command));
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
            Step::Attach { logged, answered } => {
                let epoch = self.session.begin_attach();
                // The first attempt must reach the log: else the owner takes another id.
                let logged = logged || epoch == Epoch(1);
                if logged && self.shard.open(epoch) && answered {
                    let resend = self.session.attached(epoch).unwrap();
                    for (seq, command) in resend.mutations {
                        self.send(epoch, seq, command);
                    }
                } else {
                    self.session.attach_failed(epoch, None);
                }
            }
            Step::Detach => self.session.detached(self.session.epoch()),
            Step::Apply(pick) => {
                if let Some(epoch) = self.some_epoch(pick) {
                    self.shard.apply(epoch);
                }
            }
            Step::Break(pick) => {
                if let Some(epoch) = self.some_epoch(pick) {
                    self.shard.incoming.remove(&epoch);
                    self.session.detached(epoch);
                }
            }
            Step::Answer(pick) => self.answer(pick, true),
            Step::Repeat(pick) => self.answer(pick, false),
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
            Verdict::Answered(token, outcome) => {
                assert_eq!(token, seq);
                self.answered.push((token, outcome));
            }
            Verdict::Ignored | Verdict::Detached => {}
            Verdict::Gone => panic!("nobody ended the session"),
        }
    }

    /// Lets everything come to its end over a last, good attachment.
    fn settle(&mut self) {
        self.step(Step::Attach { logged: true, answered: true });
        while self.some_epoch(0).is_some() {
            self.step(Step::Apply(0));
        }
        while !self.shard.outgoing.is_empty() {
            self.answer(0, true);
        }
    }

    /// What must hold once all is settled.
    fn check(&self) -> Result<(), String> {
        let answered: BTreeSet<_> = self.answered.iter().map(|(seq, _)| *seq).collect();
        let applied: BTreeSet<_> = self.shard.applied.iter().copied().collect();
        let all: BTreeSet<_> = (1..=self.submitted).collect();
        if answered.len() != self.answered.len() || answered != all {
            return Err(format!("not each answered once: {:?}", self.answered));
        }
        if applied.len() != self.shard.applied.len() || applied != all {
            return Err(format!("not each applied once: {:?}", self.shard.applied));
        }
        match self.answered.iter().find(|(_, outcome)| *outcome != Outcome::Done) {
            Some(wrong) => Err(format!("a wrong answer: {wrong:?}")),
            None => Ok(()),
        }
    }
}

proptest! {
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

/// The check above would see it if answers of attachments that were given up were handed on.
#[cfg(feature = "planted-faults")]
#[test]
fn a_stale_reply_that_is_forwarded_is_found() {
    let good = Step::Attach { logged: true, answered: true };
    let steps = [good, Step::Submit, good, Step::Apply(0), Step::Answer(0)];
    for (fault, found) in [(None, false), (Some(Fault::ForwardStaleReply), true)] {
        let mut world = World::new(fault);
        steps.into_iter().for_each(|step| world.step(step));
        world.settle();
        assert_eq!(world.check().is_err(), found, "{fault:?}");
    }
}
