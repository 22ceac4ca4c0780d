//! A disk that changes what it holds: what is damaged is never served, and is made good from the
//! other copies.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use nbd_testkit::{Cluster, NodeProcess};

use crate::{MIB, cluster, expect, fill, pattern, wait_until};

/// Offset in a node's data file where the block at `offset` of the volume lies.
fn home_of(file: &Path, offset: u64) -> Option<u64> {
    let block = &pattern(offset, 3)[..4096];
    let content = fs::read(file).unwrap();
    let place = content.chunks_exact(4096).position(|place| place == block)?;
    Some(place as u64 * 4096)
}

/// Flips a byte in several blocks of the volume on a node's disk. All that is read from then on
/// comes from there: the node has checkpointed and was started anew.
fn damage(cluster: &mut Cluster, at: usize, offsets: &[u64]) {
    let file = cluster.at(at).data_directory().join("data");
    wait_until("the data to come home", || home_of(&file, 0).is_some());
    // The log and what is cached of it are no longer needed for these blocks.
    cluster.at_mut(at).restart();
    cluster.wait_until_serving();
    let data = File::options().read(true).write(true).open(&file).unwrap();
    for offset in offsets {
        let home = home_of(&file, *offset).expect("a block has its home") + 100;
        let mut byte = [0];
        data.read_exact_at(&mut byte, home).unwrap();
        data.write_all_at(&[byte[0] ^ 0x10], home).unwrap();
    }
    data.sync_all().unwrap();
}

fn corrupt_reads(node: &NodeProcess) -> f64 {
    node.metric("store_corrupt_reads_total").unwrap_or_default()
}

#[test]
fn damaged_blocks_are_read_whole_and_repaired() {
    let mut cluster = cluster();
    let at = cluster.followers()[0];
    let mut client = cluster.at(at).connect("volume").unwrap();
    fill(&mut client, 0, 16 * MIB, 3);
    drop(client);
    let offsets = [0, 4096, 5 * MIB, 9 * MIB + 64 * 1024];
    damage(&mut cluster, at, &offsets);
    // The leader reads from its own copy: make the damaged one the leader's.
    while cluster.wait_leader() != at {
        let leader = cluster.wait_leader();
        cluster.at_mut(leader).restart();
        cluster.wait_until_serving();
    }
    let mut client = cluster.at(at).connect("volume").unwrap();
    expect(&mut client, 0, 16 * MIB, 3);
    let found = corrupt_reads(cluster.at(at));
    assert!(found >= 1.0, "the damage was not where reads go");
    wait_until("the repair", || {
        let before = corrupt_reads(cluster.at(at));
        expect(&mut client, 0, 16 * MIB, 3);
        corrupt_reads(cluster.at(at)) == before
    });
    // Its disk is good again by itself: nothing is asked of the others after a start.
    cluster.at_mut(at).restart();
    cluster.wait_until_serving();
    cluster.wait_until_equal();
}
