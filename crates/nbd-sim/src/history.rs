//! What clients asked for and what they were told.

use std::ops::Range;

/// Bytes of a sector: the unit that is one register.
pub const SECTOR_BYTES: u64 = 512;

/// Sectors of a block.
const BLOCK_SECTORS: u64 = 8;

/// The sectors that a trim of `range` turns into zeroes: those of whole blocks. The others keep
/// what they have. (Volumes end with a block.)
#[must_use]
pub const fn trimmed(range: &Range<u64>) -> Range<u64> {
    let start = range.start.next_multiple_of(BLOCK_SECTORS);
    let end = range.end / BLOCK_SECTORS * BLOCK_SECTORS;
    start..if end > start { end } else { start }
}

/// A place in the one order of everything that clients saw.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Moment(pub u64);

impl Moment {
    /// Before everything.
    pub const START: Self = Self(0);
    /// After everything.
    pub const END: Self = Self(u64::MAX);
}

/// What a sector holds: the number of the operation that wrote it, or zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Value(pub u64);

impl Value {
    /// Never written, trimmed or zeroed.
    pub const ZERO: Self = Self(0);
}

/// What a client asked for. Ranges are in sectors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Writes this operation's value to each sector.
    Write(Range<u64>),
    /// Trims or writes zeroes.
    Zero(Range<u64>),
    /// Reads; what was found is here once it was answered.
    Read(Range<u64>, Vec<Value>),
}

/// How an operation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It was answered then.
    Answered(Moment),
    /// Never answered. If it has an effect, that comes before this moment.
    Unknown(Moment),
}

/// One operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Operation {
    /// The volume, counted from 0.
    pub volume: usize,
    /// Who asked.
    pub client: u32,
    /// What for.
    pub action: Action,
    /// When.
    pub asked: Moment,
    /// How it ended.
    pub end: End,
}

/// Everything that clients asked for, in order. Operation `n` writes the value `n + 1`.
#[derive(Debug, Default)]
pub struct History {
    operations: Vec<Operation>,
    moment: u64,
}

/// Names an operation in its history.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OperationId(pub usize);

impl OperationId {
    /// The value that the operation writes.
    #[must_use]
    pub const fn value(self) -> Value {
        Value(self.0 as u64 + 1)
    }

    /// The operation that writes this value; zeroes have none of their own.
    #[must_use]
    pub fn of(value: Value) -> Option<Self> {
        Some(Self(usize::try_from(value.0.checked_sub(1)?).ok()?))
    }
}

impl History {
    /// A moment of its own.
    pub fn moment(&mut self) -> Moment {
        self.moment += 1;
        Moment(self.moment)
    }

    /// A client asks.
    pub fn ask(&mut self, client: u32, volume: usize, action: Action) -> OperationId {
        let asked = self.moment();
        let end = End::Unknown(Moment::END);
        self.operations.push(Operation { volume, client, action, asked, end });
        OperationId(self.operations.len() - 1)
    }

    /// A client is answered.
    ///
    /// # Panics
    /// If it was answered before.
    pub fn answer(&mut self, id: OperationId, found: Vec<Value>) {
        let now = self.moment();
        let operation = &mut self.operations[id.0];
        assert!(matches!(operation.end, End::Unknown(_)), "{id:?} is answered twice");
        operation.end = End::Answered(now);
        if let Action::Read(_, values) = &mut operation.action {
            *values = found;
        }
    }

    /// The end of a volume is cut off: those sectors are zeroes from this moment on.
    pub fn cut_off(&mut self, volume: usize, sectors: Range<u64>) {
        let (asked, end) = (self.moment(), End::Answered(self.moment()));
        let action = Action::Zero(sectors);
        self.operations.push(Operation { volume, client: u32::MAX, action, asked, end });
    }

    /// The log has refused a mutation: it has no effect, and never will.
    pub fn refused(&mut self, id: OperationId) {
        if let Action::Write(range) | Action::Zero(range) = &mut self.operations[id.0].action {
            *range = 0..0;
        }
    }

    /// A volume is gone: nothing that was not answered takes effect on it any more.
    pub fn deleted(&mut self, volume: usize) {
        let of = |(at, operation): (usize, &Operation)| {
            (operation.volume == volume).then_some(OperationId(at))
        };
        let all: Vec<_> = self.operations.iter().enumerate().filter_map(of).collect();
        all.into_iter().for_each(|id| self.fence(id));
    }

    /// From now on the operation, if it was never answered, cannot take effect any more.
    pub fn fence(&mut self, id: OperationId) {
        let now = self.moment();
        if let End::Unknown(end) = &mut self.operations[id.0].end {
            *end = now.min(*end);
        }
    }

    /// All operations.
    #[must_use]
    pub fn operations(&self) -> &[Operation] {
        &self.operations
    }
}
