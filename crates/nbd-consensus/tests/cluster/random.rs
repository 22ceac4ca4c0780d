//! Long random runs.

use nbd_consensus::{GroupConfig, Input, ReadMode};
use nbd_topology::{MembershipChange, ReplicaId};

use crate::harness::Cluster;

/// Replicas ever made in one run.
const REPLICAS_MAX: usize = 20;

/// What a run is like.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kind {
    pub(crate) replicas: usize,
    /// Whether members come and go, and logs are forgotten before everyone has them.
    pub(crate) moving: bool,
    pub(crate) read_mode: ReadMode,
}

/// What came of a run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Sum {
    committed: usize,
    elections: usize,
    reads: usize,
    installed: usize,
    changed: usize,
    leases: usize,
}

/// Any change, sensible or not. A new learner may be one that was to be added before, and never
/// heard of it; one that was removed does not come back.
fn change_members(cluster: &mut Cluster, at: usize) {
    let members = cluster.group(at).status().membership;
    let any = cluster.random.below(cluster.nodes.len());
    let fresh = (0..cluster.nodes.len()).find(|at| cluster.is_fresh(*at));
    let change = match cluster.random.below(5) {
        0 | 1 => {
            let learner = members.learners().first().copied();
            MembershipChange::AddVoter(learner.unwrap_or_else(|| cluster.id(any)))
        }
        2 if members.voters().len() > 1 => MembershipChange::Remove(cluster.id(any)),
        3 | 4 if members.learners().is_empty() => {
            let newcomer = match fresh {
                Some(fresh) => cluster.id(fresh),
                None if cluster.nodes.len() < REPLICAS_MAX => cluster.newcomer(),
                None => return,
            };
            MembershipChange::AddLearner(newcomer)
        }
        _ => return,
    };
    cluster.change(at, change);
}

/// One random event.
fn stir(cluster: &mut Cluster, moving: bool) {
    let at = cluster.random.below(cluster.nodes.len());
    match cluster.random.below(1000) {
        // As many as there are replicas to send any, so that no backlog grows.
        0..280 => (0..cluster.nodes.len()).for_each(|_| _ = cluster.deliver(true)),
        280..500 => {
            let count = cluster.random.below(20);
            (0..count).for_each(|_| _ = cluster.persist(at));
        }
        500..600 => {
            let count = cluster.random.below(40);
            (0..count).for_each(|_| _ = cluster.apply(at));
        }
        600..750 => {
            let nanoseconds = 1_000_000 * (1 + cluster.random.below(16)) as u64;
            cluster.pass(nanoseconds);
        }
        750..850 => {
            let at = cluster.leader().unwrap_or(at);
            let count = 1 + cluster.random.below(4) as u64;
            cluster.propose(at, count);
        }
        850..900 => {
            let at = cluster.leader().unwrap_or(at);
            cluster.read(at);
        }
        900..930 => _ = cluster.resync(at),
        930..950 if moving => {
            let at = cluster.leader().unwrap_or(at);
            change_members(cluster, at);
        }
        950..978 => cluster.checkpoint(at),
        978..979 => cluster.crash(at),
        979..981 => cluster.isolate(at),
        981..984 => cluster.cut.clear(),
        984..986 => {
            let to = 1 + cluster.random.below(cluster.nodes.len()) as u64;
            let to = ReplicaId::new(to).expect("at least 1");
            cluster.step(at, Input::TransferLeader(to));
        }
        986..990 => {
            // The stream between two replicas breaks.
            let other = cluster.random.below(cluster.nodes.len());
            let (one, two) = (cluster.id(at), cluster.id(other));
            for (at, peer) in [(at, two), (other, one)] {
                let status = cluster.group(at).status();
                if status.leader == Some(peer) {
                    cluster.step(at, Input::LeaderLost);
                }
                cluster.step(at, Input::PeerUnreachable(peer));
            }
        }
        990..993 => cluster.step(at, Input::LeaderLost),
        _ => cluster.step(at, Input::Campaign),
    }
}

// Goal: under loss, repetition, reordering, partitions, crashes, slow disks, late appliers and
// clocks that run apart, with members that come and go and logs that are forgotten, no two replicas
// disagree on a committed entry, nothing promised is undone, reads are linearizable, at most one
// leader holds a lease, and each proposal ends once and as reported.
// Method: random events from a seed, every effect checked; then heal and compare.
pub(crate) fn random_run(
    kind: Kind,
    seed: u64,
    change: impl Fn(&mut GroupConfig) + 'static,
) -> Sum {
    println!("{kind:?}, seed {seed}");
    let mut cluster = Cluster::new(kind.replicas, seed, move |config| {
        config.cache_bytes_max = 4000;
        config.read_mode = kind.read_mode;
        change(config);
    });
    cluster.forgetful = kind.moving;
    cluster.skew();
    for _ in 0..10_000 {
        stir(&mut cluster, kind.moving);
    }
    cluster.check_end();
    Sum {
        committed: cluster.committed.len(),
        elections: cluster.elections,
        reads: cluster.reads_served,
        installed: cluster.installed,
        changed: cluster.changed,
        leases: cluster.leases,
    }
}

fn kind(replicas: usize, moving: bool, read_mode: ReadMode) -> Kind {
    Kind { replicas, moving, read_mode }
}

fn sum(runs: &[Sum], of: fn(&Sum) -> usize) -> usize {
    runs.iter().map(of).sum()
}

#[test]
fn three_that_stay() {
    let three = kind(3, false, ReadMode::Lease);
    let runs: Vec<_> = (0..40).map(|seed| random_run(three, seed, |_| ())).collect();
    // The runs are worth something only if much happens in them.
    assert!(sum(&runs, |run| run.committed) > 1000, "{runs:?}");
    assert!(sum(&runs, |run| run.elections) > 40, "{runs:?}");
    assert!(sum(&runs, |run| run.reads) > 100, "{runs:?}");
    assert!(sum(&runs, |run| run.leases) > 1000, "{runs:?}");
    assert_eq!(random_run(three, 7, |_| ()), runs[7], "a seed gives the same run again");
}

#[test]
fn members_that_come_and_go() {
    let mut runs = Vec::new();
    for (seed, replicas) in (200..260).zip((1..=4).cycle()) {
        let mode = if seed % 3 == 0 { ReadMode::Quorum } else { ReadMode::Lease };
        runs.push(random_run(kind(replicas, true, mode), seed, |_| ()));
    }
    assert!(sum(&runs, |run| run.changed) > 1000, "{runs:?}");
    assert!(sum(&runs, |run| run.installed) > 200, "{runs:?}");
    assert!(sum(&runs, |run| run.leases) > 1000, "{runs:?}");
    assert!(sum(&runs, |run| run.elections) > 150, "{runs:?}");
}

#[test]
fn one_and_five_that_stay() {
    for seed in 100..115 {
        random_run(kind(5, false, ReadMode::Quorum), seed, |_| ());
        random_run(kind(1, false, ReadMode::Lease), seed, |_| ());
    }
}
