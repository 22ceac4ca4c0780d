//! Account of what each sector of one thread's region may hold.
//!
//! A thread has at most one write of a sector under way that it awaits. Others may have been lost
//! with their connection: such a write takes effect at any later time, or never, but at most once.
//! So a read may find what was there when it was sent, whatever came to be there while it was under
//! way, and any lost value that nobody has yet seen.

use std::collections::HashMap;
use std::ops::Range;

/// Unit of consistency of a volume.
pub(super) const SECTOR: usize = 512;

/// Value of a sector that is all zeroes: never written, trimmed or zeroed. Unlike others it does
/// not tell which of several writes left it.
pub(super) const ZERO: u64 = 0;

/// Repeated over a sector: where it belongs, and its value.
const STAMP_BYTES: usize = 16;

/// Keeps the place in a stamp from looking like anything else.
const PLACE_MARK: u64 = 0x5ec7_0000_0000_0000;

/// A sector's content when it holds `value`. `place` is the sector's number in the volume.
pub(super) fn content(place: usize, value: u64, into: &mut Vec<u8>) {
    if value == ZERO {
        into.resize(into.len() + SECTOR, 0);
        return;
    }
    let stamp = stamp(place, value);
    for _ in 0..SECTOR / STAMP_BYTES {
        into.extend_from_slice(&stamp);
    }
}

fn stamp(place: usize, value: u64) -> [u8; STAMP_BYTES] {
    let mut stamp = [0; STAMP_BYTES];
    stamp[..8].copy_from_slice(&(place as u64 ^ PLACE_MARK).to_le_bytes());
    stamp[8..].copy_from_slice(&value.to_le_bytes());
    stamp
}

/// The value that a sector's content shows.
///
/// # Errors
/// Content that nobody ever wrote there: torn, or of another place.
pub(super) fn value_in(place: usize, content: &[u8]) -> Result<u64, String> {
    if content.iter().all(|byte| *byte == 0) {
        return Ok(ZERO);
    }
    let mut value = [0; 8];
    value.copy_from_slice(&content[8..STAMP_BYTES]);
    let value = u64::from_le_bytes(value);
    let expected = stamp(place, value);
    if content.chunks_exact(STAMP_BYTES).all(|piece| piece == expected) {
        return Ok(value);
    }
    let shown = |piece: &[u8]| piece.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let (first, last) = (&content[..STAMP_BYTES], &content[SECTOR - STAMP_BYTES..]);
    Err(format!("sector {place} is torn or foreign: {} ... {}", shown(first), shown(last)))
}

/// A read under way, and what its sectors held at some time since it was sent and no longer do.
#[derive(Debug)]
pub(super) struct ReadFlight {
    pub(super) sectors: Range<usize>,
    former: HashMap<usize, Vec<u64>>,
}

impl ReadFlight {
    pub(super) fn new(sectors: Range<usize>) -> Self {
        Self { sectors, former: HashMap::new() }
    }
}

#[derive(Debug, Clone)]
struct Sector {
    /// What it may hold: one value, or several once a read met a lost write.
    now: Vec<u64>,
    /// Values that may come to be there at any time.
    lost: Vec<u64>,
    /// The value of the write under way.
    writing: Option<u64>,
}

/// The region and its account. Sectors are numbered from the region's first.
#[derive(Debug)]
pub(super) struct Region {
    /// Number of the first sector in the volume.
    first: usize,
    sectors: Vec<Sector>,
}

impl Region {
    /// A region of `len` sectors that are all zeroes.
    pub(super) fn new(first: usize, len: usize) -> Self {
        let sector = Sector { now: vec![ZERO], lost: Vec::new(), writing: None };
        Self { first, sectors: vec![sector; len] }
    }

    pub(super) fn len(&self) -> usize {
        self.sectors.len()
    }

    /// Its first byte in the volume.
    pub(super) fn offset(&self) -> usize {
        self.first * SECTOR
    }

    /// The byte behind its last.
    pub(super) fn end(&self) -> usize {
        (self.first + self.sectors.len()) * SECTOR
    }

    /// Number in the volume of one of its sectors.
    pub(super) fn place(&self, sector: usize) -> usize {
        self.first + sector
    }

    /// Whether a write of some of the sectors is under way.
    pub(super) fn is_busy(&self, sectors: Range<usize>) -> bool {
        self.sectors[sectors].iter().any(|sector| sector.writing.is_some())
    }

    /// A write, trim or write-zeroes of these sectors is sent.
    pub(super) fn begin(&mut self, sectors: Range<usize>, value: u64) {
        for sector in &mut self.sectors[sectors] {
            sector.writing = Some(value);
        }
    }

    /// It is answered, while `reads` are under way.
    pub(super) fn finish<'a>(
        &mut self,
        sectors: Range<usize>,
        reads: impl Iterator<Item = &'a mut ReadFlight>,
    ) {
        let mut reads: Vec<_> = reads.filter(|read| overlap(&read.sectors, &sectors)).collect();
        for place in sectors {
            let sector = &mut self.sectors[place];
            if let Some(value) = sector.writing.take() {
                let before = std::mem::replace(&mut sector.now, vec![value]);
                note_former(&mut reads, place, &before);
            }
        }
    }

    /// It will not be answered, since its connection is lost.
    pub(super) fn lose(&mut self, sectors: Range<usize>) {
        for sector in &mut self.sectors[sectors] {
            sector.lost.extend(sector.writing.take());
        }
    }

    /// A read is answered with `content`, while `reads`, the others, are under way.
    ///
    /// # Errors
    /// A sector that cannot have held this.
    pub(super) fn check<'a>(
        &mut self,
        read: &ReadFlight,
        content: &[u8],
        reads: impl Iterator<Item = &'a mut ReadFlight>,
    ) -> Result<(), String> {
        let others = reads.filter(|other| overlap(&other.sectors, &read.sectors));
        let mut others: Vec<_> = others.collect();
        for (place, content) in read.sectors.clone().zip(content.chunks_exact(SECTOR)) {
            let value = value_in(self.first + place, content)?;
            let former = read.former.get(&place).map_or(&[][..], Vec::as_slice);
            let sector = &mut self.sectors[place];
            let known = sector.now.contains(&value)
                || sector.writing == Some(value)
                || former.contains(&value);
            if !known && !sector.lost.contains(&value) {
                let place = self.first + place;
                return Err(format!(
                    "sector {place} holds {value:#x}: not {sector:x?}, {former:x?}"
                ));
            }
            // Content that only a lost write can have left: it has happened, and will not again.
            if !known {
                let at = sector.lost.iter().position(|lost| *lost == value);
                at.map(|at| sector.lost.swap_remove(at));
                sector.now.push(value);
            }
            // Nothing else came or went since the read was sent: this is what is there.
            if former.is_empty() && sector.writing.is_none() && sector.now.len() > 1 {
                let before = std::mem::replace(&mut sector.now, vec![value]);
                note_former(&mut others, place, &before);
            }
        }
        Ok(())
    }

    /// As [`check`](Self::check) of whole sectors from `offset` of the volume, with nothing under
    /// way.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub(super) fn check_all(&mut self, offset: usize, content: &[u8]) -> Result<(), String> {
        let start = offset / SECTOR - self.first;
        let read = ReadFlight::new(start..start + content.len() / SECTOR);
        self.check(&read, content, std::iter::empty())
    }
}

fn overlap(one: &Range<usize>, other: &Range<usize>) -> bool {
    one.start < other.end && other.start < one.end
}

/// Reads under way may yet find what a sector held until now.
fn note_former(reads: &mut [&mut ReadFlight], place: usize, before: &[u64]) {
    for read in reads.iter_mut().filter(|read| read.sectors.contains(&place)) {
        read.former.entry(place).or_default().extend_from_slice(before);
    }
}

#[cfg(test)]
mod tests {
    use std::iter::empty;

    use super::*;

    fn sector(value: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        content(10, value, &mut bytes);
        bytes
    }

    fn reads(region: &mut Region, value: u64) -> bool {
        region.check(&ReadFlight::new(0..1), &sector(value), empty()).is_ok()
    }

    fn region() -> Region {
        Region::new(10, 1)
    }

    fn written(value: u64) -> Region {
        let mut region = region();
        region.begin(0..1, value);
        region.finish(0..1, empty());
        region
    }

    #[test]
    fn what_was_acknowledged_is_there_and_nothing_else() {
        let mut region = written(7);
        assert!(reads(&mut region, 7) && !reads(&mut region, ZERO) && !reads(&mut region, 8));
        region.begin(0..1, 8);
        assert!(reads(&mut region, 7) && reads(&mut region, 8) && !reads(&mut region, ZERO));
        region.finish(0..1, empty());
        assert!(!reads(&mut region, 7) && reads(&mut region, 8));
    }

    #[test]
    fn torn_and_foreign_content_is_refused() {
        let mut torn = sector(7);
        torn[SECTOR - 1] ^= 1;
        assert!(value_in(10, &torn).is_err());
        assert!(value_in(11, &sector(7)).is_err());
        assert_eq!(value_in(10, &sector(7)), Ok(7));
        assert_eq!(value_in(10, &sector(ZERO)), Ok(ZERO));
    }

    #[test]
    fn a_lost_write_happens_late_once_or_never() {
        let mut region = written(7);
        region.begin(0..1, 8);
        region.lose(0..1);
        assert!(reads(&mut region, 7));
        region.begin(0..1, 9);
        region.finish(0..1, empty());
        assert!(reads(&mut region, 9) && !reads(&mut region, 7));
        // Late, over what came after it; then what it covered is gone.
        assert!(reads(&mut region, 8) && !reads(&mut region, 9));
        region.begin(0..1, 10);
        region.finish(0..1, empty());
        assert!(reads(&mut region, 10) && !reads(&mut region, 8));
    }

    #[test]
    fn a_read_may_find_what_was_there_while_it_was_under_way() {
        let mut region = written(7);
        let mut read = ReadFlight::new(0..1);
        for value in [8, 9] {
            region.begin(0..1, value);
            region.finish(0..1, std::iter::once(&mut read));
        }
        for value in [7, 8, 9] {
            assert!(region.check(&read, &sector(value), empty()).is_ok(), "{value}");
        }
        assert!(region.check(&read, &sector(ZERO), empty()).is_err());
        assert!(!reads(&mut region, 8));
    }

    #[test]
    fn what_one_read_settles_another_under_way_may_not_have_seen() {
        let mut region = written(7);
        region.begin(0..1, 8);
        region.lose(0..1);
        let mut other = ReadFlight::new(0..1);
        let read = ReadFlight::new(0..1);
        region.check(&read, &sector(8), std::iter::once(&mut other)).unwrap();
        assert!(region.check(&other, &sector(7), empty()).is_ok());
        assert!(!reads(&mut region, 7));
    }
}
