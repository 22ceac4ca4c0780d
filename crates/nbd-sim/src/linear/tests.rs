use super::*;

/// Builds histories of one sector by hand: times are given, not counted.
#[derive(Default)]
struct Story(Vec<Operation>);

impl Story {
    fn add(mut self, action: Action, asked: u64, end: End) -> Self {
        self.0.push(Operation { volume: 0, client: 0, action, asked: Moment(asked), end });
        self
    }

    /// The n-th operation, if a write, writes `n + 1`.
    fn write(self, asked: u64, end: u64) -> Self {
        self.add(Action::Write(0..1), asked, End::Answered(Moment(end)))
    }

    fn lost_write(self, asked: u64) -> Self {
        self.add(Action::Write(0..1), asked, End::Unknown(Moment::END))
    }

    fn fenced_write(self, asked: u64, fence: u64) -> Self {
        self.add(Action::Write(0..1), asked, End::Unknown(Moment(fence)))
    }

    fn zero(self, asked: u64, end: u64) -> Self {
        self.add(Action::Zero(0..1), asked, End::Answered(Moment(end)))
    }

    fn lost_zero(self, asked: u64) -> Self {
        self.add(Action::Zero(0..1), asked, End::Unknown(Moment::END))
    }

    fn read(self, value: u64, asked: u64, end: u64) -> Self {
        let action = Action::Read(0..1, vec![Value(value)]);
        self.add(action, asked, End::Answered(Moment(end)))
    }

    fn good(self) {
        assert_eq!(check(&self.0), Verdict::Linearizable);
        self.search_agrees(true);
    }

    fn bad(self) {
        assert!(matches!(check(&self.0), Verdict::Violation(_)), "{:?}", check(&self.0));
        self.search_agrees(false);
    }

    /// The search knows no special case: it must come to the same verdict whatever decided first.
    fn search_agrees(&self, linearizable: bool) {
        let register = registers(&self.0).remove(&(0, 0)).unwrap_or_default();
        let found = search::check(&register);
        assert_eq!(found.ok(), linearizable.then_some(true), "{found:?}");
    }
}

fn story() -> Story {
    Story::default()
}

#[test]
fn what_follows_in_time_must_be_seen() {
    story().read(0, 1, 2).good();
    story().write(1, 2).read(1, 3, 4).good();
    story().write(1, 2).write(3, 4).read(2, 5, 6).good();
    story().write(1, 2).write(3, 4).read(1, 5, 6).bad();
    story().write(1, 2).read(0, 3, 4).bad();
}

#[test]
fn a_read_during_a_write_may_see_either() {
    story().write(1, 5).read(0, 2, 3).good();
    story().write(1, 5).read(1, 2, 3).good();
    story().write(1, 9).read(1, 2, 3).read(0, 4, 5).bad();
    story().write(1, 9).read(0, 2, 3).read(1, 4, 5).good();
}

#[test]
fn concurrent_writes_have_one_order_for_all() {
    story().write(1, 9).write(2, 8).read(1, 10, 11).read(1, 12, 13).good();
    story().write(1, 9).write(2, 8).read(1, 10, 11).read(2, 12, 13).bad();
    story().write(1, 9).write(2, 8).read(2, 3, 4).read(1, 5, 6).read(1, 10, 11).good();
}

#[test]
fn values_do_not_come_from_nowhere_or_from_the_future() {
    story().read(7, 1, 2).bad();
    story().read(2, 1, 2).write(3, 4).bad();
    story().read(2, 1, 5).write(3, 4).good();
}

#[test]
fn a_lost_write_may_happen_late_or_never_but_only_once() {
    story().lost_write(1).read(0, 2, 3).good();
    story().lost_write(1).read(0, 2, 3).read(1, 4, 5).good();
    story().lost_write(1).write(2, 3).read(2, 4, 5).read(1, 6, 7).good();
    story().lost_write(1).read(1, 2, 3).read(0, 4, 5).bad();
    story().lost_write(1).read(1, 2, 3).write(4, 5).read(1, 6, 7).bad();
}

#[test]
fn a_fenced_write_does_not_come_after_its_fence() {
    story().fenced_write(1, 4).read(0, 5, 6).good();
    story().fenced_write(1, 4).read(1, 5, 6).good();
    story().fenced_write(1, 4).read(0, 5, 6).read(1, 7, 8).bad();
}

#[test]
fn an_answered_write_applied_twice_is_seen_to_come_back() {
    story().write(1, 2).write(3, 4).read(2, 5, 6).read(1, 7, 8).bad();
    story().write(1, 2).zero(3, 4).read(0, 5, 6).read(1, 7, 8).bad();
}

#[test]
fn zeroes_may_be_of_any_origin() {
    story().write(1, 2).zero(3, 4).read(0, 5, 6).good();
    story().write(1, 2).zero(3, 4).read(1, 5, 6).bad();
    story().zero(1, 2).write(3, 4).read(0, 5, 6).bad();
    story().read(0, 1, 2).write(3, 4).read(2, 5, 6).zero(7, 8).read(0, 9, 10).good();
    story().read(0, 1, 2).write(3, 4).zero(5, 6).write(7, 8).read(0, 9, 10).bad();
    story().write(1, 2).lost_zero(3).read(1, 4, 5).read(0, 6, 7).write(8, 9).read(5, 10, 11).good();
    story().write(1, 2).lost_zero(3).read(0, 4, 5).write(6, 7).read(0, 8, 9).bad();
    let two = || story().write(1, 2).lost_zero(3).lost_zero(4).read(0, 5, 6).write(7, 8);
    two().read(5, 9, 10).read(0, 11, 12).good();
    two().read(0, 9, 10).write(11, 12).read(0, 13, 14).bad();
}

#[test]
fn a_range_is_checked_sector_by_sector() {
    let write = |range: std::ops::Range<u64>, asked, end| Operation {
        volume: 0,
        client: 1,
        action: Action::Write(range),
        asked: Moment(asked),
        end: End::Answered(Moment(end)),
    };
    let mut operations = vec![write(0..4, 1, 2), write(2..3, 3, 4)];
    let found = [1, 1, 2, 1].map(Value).to_vec();
    let read = |found| Operation { action: Action::Read(0..4, found), ..write(0..0, 5, 6) };
    operations.push(read(found));
    assert_eq!(check(&operations), Verdict::Linearizable);
    operations[2] = read([1, 1, 1, 1].map(Value).to_vec());
    let Verdict::Violation(violation) = check(&operations) else { panic!("a lost write") };
    assert_eq!((violation.volume, violation.sector), (0, 2));
    assert_eq!(violation.operations.len(), 3);
}

/// Both methods judge random small histories alike.
#[test]
fn zones_and_search_agree() {
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};
    let (mut good, mut bad) = (0, 0);
    for seed in 0..20_000 {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut story = story();
        let mut at: Vec<u64> = (1..100).collect();
        let count = rng.random_range(2..7_u64);
        for _ in 0..count {
            let a = at.remove(rng.random_range(0..at.len().min(20)));
            let b = at.remove(rng.random_range(0..at.len().min(20)));
            let (asked, end) = (a.min(b), a.max(b));
            story = match rng.random_range(0..5) {
                0 | 1 => story.write(asked, end),
                2 if seed % 2 == 0 => story.lost_write(asked),
                2 => story.fenced_write(asked, end),
                _ => story.read(rng.random_range(0..=count), asked, end),
            };
        }
        match check(&story.0) {
            Verdict::Linearizable => {
                good += 1;
                story.search_agrees(true);
            }
            _ if registers(&story.0)[&(0, 0)].check_origins() => {
                bad += 1;
                story.search_agrees(false);
            }
            _ => {}
        }
    }
    assert!(good > 1_000 && bad > 1_000, "{good} good and {bad} bad histories");
}

impl Register {
    /// Whether every value read was written at all: the search takes that for granted.
    fn check_origins(&self) -> bool {
        self.reads.iter().all(|read| {
            read.value == Value::ZERO || self.writes.iter().any(|w| w.value == read.value)
        })
    }
}
