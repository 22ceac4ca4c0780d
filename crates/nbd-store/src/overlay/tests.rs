use super::*;

const VOLUME: VolumeId = VolumeId(1);
const SIZE: u64 = 64 << 40;
const CHUNKS: u64 = SIZE / CHUNK_BYTES;

fn kinds(overlay: &Overlay) -> Vec<(u64, u64, ZeroKind)> {
    let volume = overlay.volume(VOLUME).unwrap();
    volume.cleared().map(|(start, range)| (start.0, range.end.0, range.kind)).collect()
}

fn zero(overlay: &mut Overlay, chunks: std::ops::Range<u64>, kind: ZeroKind) {
    let range = (chunks.start * CHUNK_BYTES, chunks.end * CHUNK_BYTES);
    overlay.write_zeroes(VOLUME, LogIndex(1), range, SIZE, kind);
}

fn write(overlay: &mut Overlay, index: u64, offset: u64, len: u64) {
    let pieces = (offset + len).div_ceil(BLOCK_BYTES) - offset / BLOCK_BYTES;
    let checksums = vec![0; 4 * to_usize(pieces)];
    let position = LogPosition(index * 1_000_000);
    overlay.write(VOLUME, LogIndex(index), (offset, len), position, &checksums);
}

#[test]
fn cleared_ranges_stay_disjoint_and_joined() {
    use ZeroKind::{Hole, Zero};
    let mut overlay = Overlay::default();
    zero(&mut overlay, 10..20, Hole);
    zero(&mut overlay, 30..40, Hole);
    zero(&mut overlay, 20..30, Hole);
    assert_eq!(kinds(&overlay), [(10, 40, Hole)]);
    zero(&mut overlay, 15..25, Zero);
    assert_eq!(kinds(&overlay), [(10, 15, Hole), (15, 25, Zero), (25, 40, Hole)]);
    assert_eq!(overlay.pending_chunks(), 10);
    zero(&mut overlay, 12..18, Hole);
    assert_eq!(kinds(&overlay), [(10, 18, Hole), (18, 25, Zero), (25, 40, Hole)]);
    zero(&mut overlay, 5..60, Zero);
    assert_eq!(kinds(&overlay), [(5, 60, Zero)]);
    zero(&mut overlay, 0..CHUNKS, Hole);
    assert_eq!(kinds(&overlay), [(0, CHUNKS, Hole)]);
    assert_eq!(overlay.pending_chunks(), 0);
}

#[test]
fn random_ranges_match_a_map() {
    let mut overlay = Overlay::default();
    let mut model = [None; 64];
    let mut state = 7_u64;
    let mut next = |bound: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) % bound
    };
    for round in 0..5000 {
        let start = next(64);
        let end = start + 1 + next((64 - start).min(9));
        let kind = if next(2) == 0 { ZeroKind::Hole } else { ZeroKind::Zero };
        if next(5) == 0 {
            write(&mut overlay, round, start * CHUNK_BYTES + 5000, 10);
        } else {
            zero(&mut overlay, start..end, kind);
            model[to_usize(start)..to_usize(end)].fill(Some(kind));
        }
        let volume = overlay.volume(VOLUME).unwrap();
        for (at, expected) in model.iter().enumerate() {
            let found = volume.cleared_at(ChunkIndex(at as u64)).map(|range| range.kind);
            assert_eq!(found, *expected);
        }
        let zeroes = model.iter().filter(|kind| **kind == Some(ZeroKind::Zero)).count();
        assert_eq!(overlay.pending_chunks(), (volume.chunks.len() + zeroes) as u64);
    }
}

#[test]
fn a_chunk_written_after_its_range_was_cleared_knows_all_of_itself() {
    let mut overlay = Overlay::default();
    zero(&mut overlay, 0..4, ZeroKind::Zero);
    write(&mut overlay, 2, CHUNK_BYTES + 100, 5000);
    let volume = overlay.volume(VOLUME).unwrap();
    let Some(Layer::Chunk(chunk)) = volume.layer(ChunkIndex(1)) else { panic!("no chunk") };
    for block in 0..BLOCKS_PER_CHUNK {
        assert_eq!(chunk.base(block), BlockBase::Cleared(ZeroKind::Zero));
        assert_eq!(chunk.fragments(block).len(), usize::from(block < 2));
    }
    let two = volume.layer(ChunkIndex(2)).unwrap();
    assert_eq!(two.base(3), BlockBase::Cleared(ZeroKind::Zero));
    // Cleared again, it needs no description of its own.
    zero(&mut overlay, 1..2, ZeroKind::Hole);
    assert!(!overlay.volume(VOLUME).unwrap().has_chunk(ChunkIndex(1)));
}

#[test]
fn a_write_is_cut_at_blocks() {
    let mut overlay = Overlay::default();
    let offset = CHUNK_BYTES - 100;
    let checksums: Vec<u8> = [1_u32, 2, 3].iter().flat_map(|crc| crc.to_le_bytes()).collect();
    let position = LogPosition(5000);
    overlay.write(VOLUME, LogIndex(9), (offset, 100 + 4096 + 50), position, &checksums);
    let volume = overlay.volume(VOLUME).unwrap();
    let (first, second) = (&volume.chunks[&ChunkIndex(0)], &volume.chunks[&ChunkIndex(1)]);
    let source = |position, crc| FragmentSource::Log { position: LogPosition(position), crc };
    let head = Fragment { start: 3996, end: 4096, source: source(5000, 1) };
    assert_eq!(first.fragments(15), [head]);
    let whole = LogBlock { position: LogPosition(5100), crc: 2 };
    assert_eq!(second.base(0), BlockBase::Log(whole));
    let tail = Fragment { start: 0, end: 50, source: source(9196, 3) };
    assert_eq!(second.fragments(1), [tail]);
    assert_eq!(second.last_index(), LogIndex(9));
}

#[test]
fn the_end_of_the_volume_rounds_up() {
    let (size, mut overlay) = (3 * BLOCK_BYTES + 512, Overlay::default());
    overlay.trim(VOLUME, LogIndex(1), (100, size), size);
    let chunk = &overlay.volume(VOLUME).unwrap().chunks[&ChunkIndex(0)];
    assert_eq!(chunk.base(0), BlockBase::Below);
    for block in 1..4 {
        assert_eq!(chunk.base(block), BlockBase::Cleared(ZeroKind::Hole));
    }
    assert_eq!(chunk.base(4), BlockBase::Below);
    let mut overlay = Overlay::default();
    overlay.trim(VOLUME, LogIndex(1), (100, 4095), size);
    assert!(overlay.volume(VOLUME).is_none(), "no whole block");
}

#[test]
fn absorbing_is_applying_later() {
    let mut state = 3_u64;
    let mut next = |bound: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) % bound
    };
    for _ in 0..200 {
        let (mut older, mut newer, mut both) =
            (Overlay::default(), Overlay::default(), Overlay::default());
        for index in 0..20 {
            let mut targets = [if index < 10 { &mut older } else { &mut newer }, &mut both];
            let start = next(6 * CHUNK_BYTES);
            let len = 1 + next(2 * CHUNK_BYTES);
            let (align, kind) = (next(3), next(4));
            let unit = [1, BLOCK_BYTES, CHUNK_BYTES][to_usize(align)];
            let (start, len) = (start / unit * unit, len.div_ceil(unit) * unit);
            for target in &mut targets {
                let (at, range) = (LogIndex(index), (start, start + len));
                match kind {
                    0 => target.trim(VOLUME, at, range, SIZE),
                    1 => target.write_zeroes(VOLUME, at, range, SIZE, ZeroKind::Zero),
                    _ => write(target, index, start, len),
                }
            }
        }
        older.absorb(&newer);
        let (Some(found), Some(expected)) = (older.volume(VOLUME), both.volume(VOLUME)) else {
            continue;
        };
        assert_eq!(older.pending_chunks(), both.pending_chunks());
        let zeroes = |of: &VolumeOverlay| {
            let zeroes = of.cleared().filter(|(_, range)| range.kind == ZeroKind::Zero);
            let of_each = |(start, range): (ChunkIndex, ClearedRange)| {
                (start.0..range.end.0).map(move |chunk| (chunk, range.last_index))
            };
            zeroes.flat_map(of_each).collect::<Vec<_>>()
        };
        assert_eq!(zeroes(found), zeroes(expected), "each with the entry that cleared it last");
        for chunk in (0..9).map(ChunkIndex) {
            let (found, expected) = (found.layer(chunk), expected.layer(chunk));
            assert_eq!(found.is_some(), expected.is_some());
            let (Some(found), Some(expected)) = (found, expected) else { continue };
            if let (Layer::Chunk(found), Layer::Chunk(expected)) = (found, expected) {
                assert_eq!(found.last_index(), expected.last_index());
            }
            for block in 0..BLOCKS_PER_CHUNK {
                assert_eq!(found.base(block), expected.base(block));
                assert_eq!(found.fragments(block), expected.fragments(block));
            }
        }
    }
}
