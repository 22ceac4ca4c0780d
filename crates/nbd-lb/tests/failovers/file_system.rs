//! A file system on a volume, mounted through the load balancer and at work while leaders are lost.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nbd_testkit::{Cluster, Ext4Image};

use crate::command::tool;
use crate::content::{assert_same_tree, ext4_image};
use crate::files::Work;
use crate::leaders::{Way, lose_leader};
use crate::mount::{MountedVolume, require_mounts};
use crate::{MIB, SetOnDrop, cluster};

/// Leaders that are lost.
const FAILOVERS: usize = 20;

/// Time for a round of work. Far above what one takes, with a leader lost in it.
const ROUND_MAX: Duration = Duration::from_secs(30);

fn mount(cluster: &Cluster) -> MountedVolume {
    MountedVolume::mount(&cluster.front().uri("volume"), &cluster.directory().join("mounts"))
}

// Goal: a file system never learns that a leader was lost.
// Method: the same work is done in a directory of this machine, to compare with in the end, after
// the volume was mounted anew and so is read from the replicas.
#[test]
fn an_ext4_at_work_outlives_twenty_leaders() {
    require_mounts!();
    let mut cluster = cluster();
    let image = ext4_image(cluster.directory(), 64 * MIB);
    tool("nbdcopy").arg(image.path()).arg(cluster.front().uri("volume")).run();
    let expected = cluster.directory().join("tree");

    let mounted = mount(&cluster);
    let mut work = Work::new([mounted.root(), &expected]);
    let (stop, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        let worker = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                work.round();
                rounds.fetch_add(1, Ordering::Relaxed);
            }
        });
        let _stop = SetOnDrop(&stop);
        for way in Way::ALL.into_iter().cycle().take(FAILOVERS) {
            let (before, started) = (rounds.load(Ordering::Relaxed), Instant::now());
            lose_leader(&mut cluster, way);
            // Something was done with the new leader.
            while rounds.load(Ordering::Relaxed) < before + 2 {
                assert!(!worker.is_finished(), "the work has failed");
                assert!(started.elapsed() < 2 * ROUND_MAX, "the file system stands still");
                thread::sleep(Duration::from_millis(10));
            }
        }
    });
    println!("{} rounds of work", rounds.into_inner());
    assert_same_tree(mounted.root(), &expected);
    mounted.unmount();

    let copy = cluster.directory().join("copy");
    tool("nbdcopy").arg(cluster.front().uri("volume")).arg(&copy).run();
    Ext4Image::at(&copy).check();
    let mounted = mount(&cluster);
    assert_same_tree(mounted.root(), &expected);
    mounted.unmount();
    cluster.wait_until_equal();
}
