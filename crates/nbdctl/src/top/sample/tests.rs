use std::time::Duration;

use nbd_api::VolumeActivity;

use super::*;

fn counts(reads: u64, writes: u64) -> IoCounts {
    IoCounts {
        reads,
        read_bytes: reads * 4096,
        writes,
        write_bytes: writes * 8192,
        read_us: reads * 100,
        write_us: writes * 1500,
    }
}

fn sample(at: Instant, origin: &str, volumes: &[(&str, IoCounts)]) -> Sample {
    let volumes = volumes.iter().map(|(name, counts)| VolumeActivity {
        name: (*name).to_owned(),
        counts: *counts,
        sessions: 1,
    });
    let volumes: Vec<VolumeActivity> = volumes.collect();
    let total = volumes.iter().fold(IoCounts::default(), |sum, volume| IoCounts {
        reads: sum.reads + volume.counts.reads,
        ..sum
    });
    let activity = Activity { shard: 0, origin: origin.to_owned(), lag: 3, total, volumes };
    Sample { at, activities: vec![activity], shards: Vec::new() }
}

#[test]
fn rates_are_what_happened_by_second() {
    let start = Instant::now();
    let old = sample(start, "a", &[("v", counts(10, 10))]);
    let end = start + Duration::from_secs(2);
    let new = sample(end, "a", &[("v", counts(30, 10)), ("late", counts(0, 4))]);
    let rates = Rates::between(&old, &new);
    let rate = rates.volumes[0].rate.unwrap();
    assert_eq!((rate.read.iops, rate.read.bandwidth), (10.0, 40_960.0));
    assert_eq!(rate.read.latency_us, Some(100.0));
    assert_eq!((rate.write.iops, rate.write.latency_us), (0.0, None));
    let late = rates.volumes[1].rate.unwrap();
    assert_eq!((late.write.iops, late.write.latency_us), (2.0, Some(1500.0)));
}

#[test]
fn counts_that_began_anew_tell_no_rate() {
    let start = Instant::now();
    let old = sample(start, "a", &[("v", counts(1000, 0))]);
    let new = sample(start + Duration::from_secs(1), "b", &[("v", counts(3, 0))]);
    assert_eq!(Rates::between(&old, &new).volumes[0].rate, None);
    // Nor does no time at all.
    assert_eq!(Rates::between(&old, &old).volumes[0].rate, None);
}

#[test]
fn volumes_are_sorted_largest_first_and_by_name() {
    let start = Instant::now();
    let old = sample(start, "a", &[]);
    let volumes = [("b", counts(1, 0)), ("c", counts(0, 9)), ("a", counts(1, 0))];
    let new = sample(start + Duration::from_secs(1), "a", &volumes);
    let mut rates = Rates::between(&old, &new);
    let mut order = |by, reverse| {
        rates.sort(by, reverse);
        rates.volumes.iter().map(|volume| volume.name.as_str()).collect::<String>()
    };
    assert_eq!(order(VolumeSort::Iops, false), "cab");
    assert_eq!(order(VolumeSort::Iops, true), "abc");
    assert_eq!(order(VolumeSort::Latency, false), "cab");
    assert_eq!(order(VolumeSort::Name, false), "abc");
    assert_eq!(order(VolumeSort::Name, true), "cba");
}
