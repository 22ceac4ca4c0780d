//! The bytes on disk, as drawn in `nbd_log::log::format`.

use bytes::Bytes;
use nbd_log::io::MemoryDisk;
use nbd_log::log::EntryKind;
use nbd_log::log::format::{BatchHeader, ParsedSegmentHeader, SegmentHeader};
use nbd_topology::{LogIndex, ShardId, Term};

use crate::support::{BLOCK, IDENTITY, Kept, SEGMENT, hard_state, open, read_file};

fn hex(bytes: &[u8]) -> String {
    let used = bytes.len() - bytes.iter().rev().take_while(|&&b| b == 0).count();
    let line = |line: &[u8]| line.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" ");
    bytes[..used.next_multiple_of(16)].chunks(16).map(|l| line(l) + "\n").collect()
}

// Goal: the format does not change by accident.
// Method: the first two blocks of a log with one batch, without trailing zeroes, against files that
// were checked with an independent program.
#[test]
fn segment_header_and_batch() {
    let disk = MemoryDisk::new(0);
    let mut log = open(&disk, 7);
    let entry = Kept::Entry {
        shard: ShardId(3),
        index: LogIndex(0x0a0b),
        term: Term(5),
        kind: EntryKind::ConfChangeV2,
        data: Bytes::from_static(b"cinderblock"),
    };
    let positions = log.append(&[hard_state(3, 5, 2, 0x0a0a), entry]).unwrap();
    let start = SEGMENT + BLOCK + 68;
    assert_eq!(positions.iter().map(|p| p.0).collect::<Vec<_>>(), [start, start + 2 * 32]);

    let header = read_file(&disk, "log/000000.seg", 0, 4096);
    assert_eq!(hex(&header), include_str!("../golden/segment_header.hex"));
    let batch = read_file(&disk, "log/000000.seg", BLOCK, 4096);
    assert_eq!(hex(&batch), include_str!("../golden/batch.hex"));
}

#[test]
fn headers_round_trip_and_refuse_every_flipped_bit() {
    let segment = SegmentHeader {
        seq: 1,
        nonce: 2,
        first_batch: 3,
        oldest_live: 1,
        identity: IDENTITY.0,
        segment_bytes: SEGMENT,
    };
    let batch = BatchHeader {
        nonce: 2,
        segment_seq: 1,
        number: 9,
        synced_through: 8,
        oldest_live: 1,
        block: 77,
        records: 2,
        body_bytes: 100,
        body_crc: 5,
    };
    let (mut one, mut two) = (segment.encode(), batch.encode());
    assert_eq!(SegmentHeader::parse(&one), ParsedSegmentHeader::Valid(segment));
    assert_eq!(BatchHeader::parse(&two), Some(batch));
    for bit in 0..68 * 8 {
        one[bit / 8] ^= 1 << (bit % 8);
        two[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(SegmentHeader::parse(&one), ParsedSegmentHeader::Invalid);
        assert_eq!(BatchHeader::parse(&two), None);
        one[bit / 8] ^= 1 << (bit % 8);
        two[bit / 8] ^= 1 << (bit % 8);
    }
    for len in 0..68 {
        assert_eq!(SegmentHeader::parse(&one[..len]), ParsedSegmentHeader::Invalid);
        assert_eq!(BatchHeader::parse(&two[..len]), None);
    }
}
