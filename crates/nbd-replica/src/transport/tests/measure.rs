//! Measurements, printed. Run with `--ignored --nocapture`.

use std::time::Instant;

use super::*;

/// CPU time of this process so far.
fn cpu() -> Duration {
    let mut nanos = 0;
    for task in std::fs::read_dir("/proc/self/task").unwrap() {
        let stat = std::fs::read_to_string(task.unwrap().path().join("schedstat"));
        nanos += stat.unwrap_or_default().split(' ').next().map_or(0, |n| n.parse().unwrap_or(0));
    }
    Duration::from_nanos(nanos)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn cost_of_messages() {
    // On a worker, as the groups are.
    tokio::spawn(measure()).await.unwrap();
}

async fn measure() {
    // What waking up alone costs here: to be taken off the figure for heartbeats.
    let used = cpu();
    for _ in 0..120 {
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    println!("a timer alone: {:.1} us of CPU", (cpu() - used).as_secs_f64() * 1e6 / 120.0);
    let (one, mut two) = pair().await;
    for (name, lane, len, burst, rounds, pause) in [
        ("heartbeats, 40 a second", Lane::Control, 60, 1, 120, 25),
        ("4 KiB one at a time", Lane::Bulk, 4200, 1, 3000, 0),
        ("4 KiB, 16 at a time", Lane::Bulk, 4200, 16, 1000, 0),
        ("128 KiB, 8 at a time", Lane::Bulk, 128 << 10, 8, 200, 0),
        ("256 KiB, 16 at a time", Lane::Bulk, 256 << 10, 16, 100, 0),
    ] {
        let message = OutMessage {
            to: replica(2),
            bulk: lane == Lane::Bulk,
            bytes: Bytes::from(vec![7; len]),
        };
        let (begun, used) = (Instant::now(), cpu());
        let mut waited = Duration::ZERO;
        for _ in 0..rounds {
            let sent = Instant::now();
            one.handle.send(SHARD, replica(1), vec![message.clone(); burst]);
            for _ in 0..burst {
                two.message().await;
            }
            waited += sent.elapsed();
            if pause > 0 {
                tokio::time::sleep(Duration::from_millis(pause)).await;
            }
        }
        let count = f64::from(rounds) * burst as f64;
        let each = |time: Duration| time.as_secs_f64() * 1e6 / count;
        println!(
            "{name}: {:.0} messages/s, {:.0} MB/s, {:.1} us CPU a message (both), {:.1} us wait",
            count / begun.elapsed().as_secs_f64(),
            count * len as f64 / 1e6 / begun.elapsed().as_secs_f64(),
            each(cpu() - used),
            each(waited),
        );
    }
    let (begun, used) = (Instant::now(), cpu());
    tokio::time::sleep(Duration::from_secs(5)).await;
    let share = (cpu() - used).as_secs_f64() / begun.elapsed().as_secs_f64();
    println!("idle, two nodes, four connections: {:.3} ms of CPU a second", share * 1e3);
}
