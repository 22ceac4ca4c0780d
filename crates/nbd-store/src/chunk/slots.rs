//! Which slots of the data file are in use.
//!
//! Stored in the table `slots`, 32,768 slots (2 GiB of data) to a region: the value is a bitmap of
//! 4096 bytes, sealed as in [`super::record`]. Slot `n` is bit `n % 8` of byte `n % 32768 / 8` of
//! region `n / 32768`; set means in use. A region without a value is all free.
//!
//! In memory a slot is in one of four states: free, in use, *taken* (chosen by the transaction
//! being built: free again if that is given up) and *leaving* (in use by the last durable
//! transaction, not by the one being built). A leaving slot is free only once that transaction is
//! durable and no reader holds it: until then a crash, or a reader, still needs what lies there.

use std::collections::{BTreeMap, BTreeSet};

use super::meta::Slot;
use crate::limits::to_usize;

/// Slots of one stored bitmap.
const REGION_SLOTS: u64 = 32_768;
/// Bytes of one stored bitmap.
pub(crate) const REGION_BYTES: usize = to_usize(REGION_SLOTS / 8);
const WORDS_PER_REGION: usize = REGION_BYTES / 8;

/// The allocator. One owner: the checkpointer.
#[derive(Debug, Default)]
pub(crate) struct SlotMap {
    /// One bit a slot, set when it is not free.
    words: Vec<u64>,
    /// Slots that the data file has room for.
    len: u64,
    free: u64,
    /// No free slot below this one.
    hint: u64,
    taken: Vec<Slot>,
    leaving: Vec<Slot>,
    dirty: BTreeSet<u32>,
    /// A planted fault: what is left is free at once.
    reuses_early: bool,
}

impl SlotMap {
    /// A data file of `len` slots of which none is in use.
    pub(crate) fn new(len: u64) -> Self {
        let mut map = Self::default();
        map.grow(len);
        map
    }

    /// Plants a fault, or not: slots that are left are free at once.
    pub(crate) const fn reuse_early(&mut self, reuses_early: bool) {
        self.reuses_early = reuses_early;
    }

    /// Takes over a stored bitmap. `false` if it says that a slot past the file's end is in use.
    pub(crate) fn load(&mut self, region: u32, bitmap: &[u8; REGION_BYTES]) -> bool {
        let first = u64::from(region) * REGION_SLOTS;
        for (word_at, bytes) in bitmap.as_chunks().0.iter().enumerate() {
            let word = u64::from_le_bytes(*bytes);
            let start = first + word_at as u64 * 64;
            let room = self.len.saturating_sub(start);
            let beyond = if room >= 64 { 0 } else { u64::MAX << room };
            if word & beyond != 0 {
                return false;
            }
            if word != 0 {
                self.words[to_usize(start / 64)] |= word;
                self.free -= u64::from(word.count_ones());
            }
        }
        true
    }

    /// The data file has grown to `len` slots.
    pub(crate) fn grow(&mut self, len: u64) {
        assert!(len >= self.len, "a data file does not shrink");
        self.words.resize(to_usize(len.div_ceil(64)), 0);
        self.free += len - self.len;
        self.len = len;
    }

    /// Slots that the data file has room for.
    pub(crate) const fn len(&self) -> u64 {
        self.len
    }

    /// Slots that [`Self::take`] can give.
    pub(crate) const fn free(&self) -> u64 {
        self.free
    }

    /// Whether `slot` is in use or taken.
    pub(crate) fn is_used(&self, slot: Slot) -> bool {
        slot.0 < self.len && self.words[to_usize(slot.0 / 64)] & (1 << (slot.0 % 64)) != 0
    }

    /// The lowest free slot, for the transaction being built.
    pub(crate) fn take(&mut self) -> Option<Slot> {
        if self.free == 0 {
            return None;
        }
        let mut at = to_usize(self.hint / 64);
        while self.words[at] == u64::MAX {
            at += 1;
        }
        let slot = Slot(at as u64 * 64 + u64::from(self.words[at].trailing_ones()));
        assert!(slot.0 < self.len, "the count of free slots is right");
        self.words[at] |= 1 << (slot.0 % 64);
        self.free -= 1;
        self.hint = slot.0;
        self.taken.push(slot);
        self.mark_dirty(slot);
        Some(slot)
    }

    /// The transaction being built no longer uses `slot`.
    pub(crate) fn leave(&mut self, slot: Slot) {
        assert!(self.is_used(slot), "slot {} is left but not in use", slot.0);
        self.mark_dirty(slot);
        if self.reuses_early {
            self.release(vec![slot]);
        } else {
            self.leaving.push(slot);
        }
    }

    /// Whether the transaction being built leaves any slot.
    pub(crate) const fn leaves_any(&self) -> bool {
        !self.leaving.is_empty()
    }

    /// The bitmaps that changed, as they are once the transaction is durable.
    pub(crate) fn dirty_regions(&self) -> Vec<(u32, [u8; REGION_BYTES])> {
        let bitmap = |region: u32| {
            let start = region as usize * WORDS_PER_REGION;
            let end = (start + WORDS_PER_REGION).min(self.words.len());
            let mut out = [0; REGION_BYTES];
            for (out, word) in out.as_chunks_mut().0.iter_mut().zip(&self.words[start..end]) {
                *out = word.to_le_bytes();
            }
            out
        };
        let mut bitmaps: BTreeMap<_, _> =
            self.dirty.iter().map(|&region| (region, bitmap(region))).collect();
        for slot in &self.leaving {
            let region = u32::try_from(slot.0 / REGION_SLOTS).expect("bounded by SLOTS_MAX");
            let at = slot.0 % REGION_SLOTS;
            let out = bitmaps.get_mut(&region).expect("leaving a slot marks its region");
            out[to_usize(at / 8)] &= !(1 << (at % 8));
        }
        bitmaps.into_iter().collect()
    }

    /// The transaction is durable. The slots it left are the caller's until no reader holds them;
    /// then they go to [`Self::release`].
    #[must_use]
    pub(crate) fn committed(&mut self) -> Vec<Slot> {
        self.taken.clear();
        self.dirty.clear();
        std::mem::take(&mut self.leaving)
    }

    /// The transaction is given up.
    pub(crate) fn aborted(&mut self) {
        self.leaving.clear();
        self.dirty.clear();
        let taken = std::mem::take(&mut self.taken);
        self.release(taken);
    }

    /// These slots are free from now on.
    pub(crate) fn release(&mut self, slots: Vec<Slot>) {
        for slot in slots {
            assert!(self.is_used(slot), "slot {} is freed twice", slot.0);
            self.words[to_usize(slot.0 / 64)] &= !(1 << (slot.0 % 64));
            self.free += 1;
            self.hint = self.hint.min(slot.0);
        }
    }

    fn mark_dirty(&mut self, slot: Slot) {
        let region = u32::try_from(slot.0 / REGION_SLOTS).expect("bounded by SLOTS_MAX");
        self.dirty.insert(region);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_left_slot_is_not_taken_before_its_release() {
        let mut map = SlotMap::new(2);
        let (a, b) = (map.take().unwrap(), map.take().unwrap());
        assert_eq!((a, b, map.take()), (Slot(0), Slot(1), None));
        assert!(map.committed().is_empty());
        map.leave(a);
        assert_eq!(map.take(), None, "the last durable transaction still refers to it");
        assert_eq!(map.dirty_regions()[0].1[0], 0b10);
        let left = map.committed();
        assert_eq!(map.take(), None, "a reader may still be looking at it");
        map.release(left);
        assert_eq!(map.take(), Some(a));
    }

    #[test]
    fn giving_up_restores_both_kinds() {
        let mut map = SlotMap::new(3);
        let a = map.take().unwrap();
        assert!(map.committed().is_empty());
        map.leave(a);
        let b = map.take().unwrap();
        map.aborted();
        assert!(map.is_used(a) && !map.is_used(b));
        assert_eq!(map.free(), 2);
        assert!(map.dirty_regions().is_empty());
    }

    #[test]
    fn golden_bytes() {
        let mut map = SlotMap::new(REGION_SLOTS);
        for _ in 0..REGION_SLOTS {
            map.take().unwrap();
        }
        let in_use = [0, 1, 9, REGION_SLOTS - 1];
        (0..REGION_SLOTS).filter(|slot| !in_use.contains(slot)).for_each(|at| map.leave(Slot(at)));
        let (region, bitmap) = map.dirty_regions()[0];
        let stored = super::super::record::seal(&region.to_le_bytes(), bitmap.to_vec());
        let golden = include_str!("../../tests/golden/records.txt");
        assert_eq!(stored, crate::golden::bytes(golden, "slots"));
    }

    #[test]
    fn regions_survive_storing() {
        let slots = REGION_SLOTS + 100;
        let mut map = SlotMap::new(slots);
        for _ in 0..slots {
            map.take().unwrap();
        }
        assert_eq!(map.take(), None);
        let stored = map.dirty_regions();
        assert_eq!(stored.len(), 2);
        let mut loaded = SlotMap::new(slots);
        for (region, bitmap) in &stored {
            assert!(loaded.load(*region, bitmap));
        }
        assert_eq!(loaded.free(), 0);
        let mut short = SlotMap::new(slots - 1);
        assert!(short.load(0, &stored[0].1));
        assert!(!short.load(1, &stored[1].1), "a slot in use past the end is damage");
    }
}
