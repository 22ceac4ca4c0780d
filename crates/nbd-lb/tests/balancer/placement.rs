//! Which shard a volume is on, whoever carries its client there.

use std::collections::BTreeSet;
use std::num::NonZeroU32;

use nbd_testkit::{Cluster, NbdClient, list_exports};
use nbd_topology::shard_of;

use crate::support::{Balancer, start, toml};

/// Volumes whose names tell nothing but apart, one a rather long one, and the default one.
const VOLUMES: usize = 200;

/// Bytes that each volume holds, at its start.
const BYTES: usize = 512;

fn names() -> Vec<String> {
    let named = (0..VOLUMES - 2).map(|number| format!("volume-{number}"));
    named.chain(["with spaces, ünïcode and ".repeat(8), String::new()]).collect()
}

/// What is written to a volume: its name, over and over.
fn content(name: &str) -> Vec<u8> {
    format!("<{name}>").bytes().cycle().take(BYTES).collect()
}

fn attach(balancer: &Balancer, name: &str) -> NbdClient {
    NbdClient::connect(balancer.target().address(), name).unwrap()
}

// Goal: whichever load balancer a client comes to, its volume is the same.
// Method: each volume is made and written through one, and read and found through the other. Two
// shards with a replica each tell as much of that as if there were more; the replicas themselves
// then say which shard holds a volume.
#[test]
fn every_name_is_on_the_same_shard_from_both_load_balancers() {
    let cluster = start(Cluster::builder().shards(&[&["nbd-1-1"], &["nbd-2-1"]]));
    let balancers = [(); 2].map(|()| Balancer::of(&toml(&cluster)));
    let names = names();
    for (number, name) in names.iter().enumerate() {
        let (one, other) = (&balancers[number % 2], &balancers[(number + 1) % 2]);
        attach(one, name).write(0, &content(name)).unwrap();
        let mut other = attach(other, name);
        assert!(other.read(0, BYTES).unwrap() == content(name), "{name}");
    }

    let shards = NonZeroU32::new(2).unwrap();
    let mut expected = [BTreeSet::new(), BTreeSet::new()];
    for name in names {
        let shard = usize::try_from(shard_of(name.as_bytes(), shards).0).unwrap();
        let name = if name.is_empty() { "default".to_owned() } else { name };
        expected[shard].insert(name);
    }
    let held = [0, 1].map(|place| {
        let listed = list_exports(cluster.at(place).nbd_address()).unwrap();
        listed.into_iter().collect::<BTreeSet<_>>()
    });
    assert_eq!(held, expected);
    // Three standard deviations of 200 tosses of a coin.
    let counts = held.each_ref().map(BTreeSet::len);
    assert!(counts.iter().all(|count| (79..=121).contains(count)), "{counts:?}");

    let [one, other] = held;
    let all: Vec<String> = one.union(&other).cloned().collect();
    for balancer in &balancers {
        assert_eq!(list_exports(balancer.target().address()).unwrap(), all);
    }
}
