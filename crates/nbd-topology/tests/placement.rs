//! The placement of export names, held by vectors that another implementation computed.

use std::num::NonZeroU32;

use nbd_topology::{DEFAULT_VOLUME_NAME, ShardId, shard_of};

/// Shard counts of the vectors, in the order of the file's columns.
const COUNTS: [u32; 6] = [1, 2, 3, 64, 65_536, u32::MAX];

// Goal: no build, version or machine places a name elsewhere than the cluster's other processes.
// Method: compare with vectors from the reference implementation of XXH3.
#[test]
fn placement_matches_the_golden_vectors() {
    let from_hex = |text: &str| -> Vec<u8> {
        let byte = |at| u8::from_str_radix(&text[at..at + 2], 16).unwrap();
        (0..text.len()).step_by(2).map(byte).collect()
    };
    let mut lengths = Vec::new();
    for line in include_str!("golden/placement.txt").lines().filter(|line| !line.starts_with('#')) {
        let fields: Vec<&str> = line.split(' ').collect();
        assert_eq!(fields.len(), 2 + COUNTS.len(), "{line}");
        let name = if fields[0] == "-" { Vec::new() } else { from_hex(fields[0]) };
        let hash = u64::from_str_radix(fields[1], 16).unwrap();
        for (count, shard) in COUNTS.into_iter().zip(&fields[2..]) {
            let expected = shard.parse().unwrap();
            assert_eq!(hash % u64::from(count), u64::from(expected), "the file is inconsistent");
            let shard = shard_of(&name, NonZeroU32::new(count).unwrap());
            assert_eq!(shard, ShardId(expected), "{name:?} of {count}");
        }
        lengths.push(name.len());
    }
    assert!(lengths.len() >= 40);
    assert!(lengths.contains(&0) && lengths.contains(&4096));
}

#[test]
fn the_empty_name_means_the_default_volume() {
    for count in COUNTS {
        let count = NonZeroU32::new(count).unwrap();
        assert_eq!(shard_of(b"", count), shard_of(DEFAULT_VOLUME_NAME.as_bytes(), count));
    }
}

proptest::proptest! {
    #[test]
    fn every_name_has_a_shard_below_the_count(
        name in proptest::collection::vec(proptest::num::u8::ANY, 0..300),
        count in 1..=u32::MAX,
    ) {
        let shard = shard_of(&name, NonZeroU32::new(count).unwrap());
        proptest::prop_assert!(shard.0 < count);
    }
}
