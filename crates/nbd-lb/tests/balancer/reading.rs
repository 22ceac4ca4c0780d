//! Large reads: they are passed on in pieces, and outlive the leader that began them.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::FileExt as _;
use std::thread;
use std::time::{Duration, Instant};

use nbd_proto::{Command, NbdError, ReplyStyle};
use nbd_testkit::{Cluster, ConnectOptions, NbdClient, Reply};

use crate::support::{Balancer, cluster, start, toml, wait_until};

const MIB: usize = 1 << 20;

/// The largest read there is.
const LARGEST: usize = 32 * MIB;

/// Shorter than any failover, far longer than the rest of a read takes that nobody disturbs.
const INTERRUPTED_MIN: Duration = Duration::from_millis(250);

/// Bytes that differ from place to place.
fn pattern(len: usize) -> Vec<u8> {
    (0..len as u64).map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

fn connect(balancer: &Balancer, replies: ReplyStyle) -> NbdClient {
    let export = "v".to_owned();
    let options = ConnectOptions { export, replies, ..ConnectOptions::default() };
    NbdClient::connect_with(balancer.target().address(), &options).unwrap()
}

fn fill(client: &mut NbdClient, bytes: &[u8]) {
    for (number, part) in bytes.chunks(4 * MIB).enumerate() {
        client.write((number * 4 * MIB) as u64, part).unwrap();
    }
}

fn read(len: usize) -> Command {
    Command::Read { offset: 0, len: len as u64, dont_fragment: false }
}

/// Waits until the first bytes of a reply are there.
fn await_bytes(client: &mut NbdClient) {
    loop {
        match client.stream().peek(&mut [0]) {
            // By a signal, which says nothing of the server: see `nbd_testkit::read_some`.
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            seen => {
                assert_eq!(seen.unwrap(), 1);
                return;
            }
        }
    }
}

// Goal: a read that a leader has begun to answer is finished by the next, with the right bytes; the
// client sees no more than a pause.
// Method: leaders are frozen while a read of the largest size is under way: with replies in chunks
// as soon as the first bytes are there, with simple ones, which begin when all is there, at once.
#[test]
fn a_read_is_finished_by_the_next_leader() {
    let mut cluster = cluster();
    let balancer = Balancer::of(&toml(&cluster));
    let bytes = pattern(LARGEST);
    fill(&mut connect(&balancer, ReplyStyle::Extended), &bytes);
    for replies in [ReplyStyle::Extended, ReplyStyle::Structured, ReplyStyle::Simple] {
        let mut client = connect(&balancer, replies);
        let mut interrupted = false;
        for _ in 0..10 {
            let leader = cluster.wait_leader();
            balancer.wait_leader(cluster.at(leader));
            let cookie = client.send(&read(LARGEST), &[]).unwrap();
            if replies == ReplyStyle::Simple {
                thread::sleep(Duration::from_millis(5));
            } else {
                await_bytes(&mut client);
            }
            cluster.at_mut(leader).pause();
            let paused = Instant::now();
            let (of, outcome) = client.receive().unwrap();
            let Ok(Reply::Data(found)) = outcome else { panic!("{replies:?}: {outcome:?}") };
            assert!(of == cookie && found == bytes, "{replies:?}: wrong bytes");
            interrupted = paused.elapsed() > INTERRUPTED_MIN;
            cluster.at_mut(leader).resume();
            cluster.wait_until_serving();
            if interrupted {
                break;
            }
        }
        assert!(interrupted, "{replies:?}: every read was over before its leader was frozen");
    }
    balancer.stop();
}

/// Flips a bit of the block at `offset` in the one replica's data file, and makes it read from
/// there.
fn damage(cluster: &mut Cluster, bytes: &[u8], offset: usize) {
    let file = cluster.node().data_directory().join("data");
    let home = || {
        let content = fs::read(&file).unwrap();
        content.chunks_exact(4096).position(|block| *block == bytes[offset..offset + 4096])
    };
    wait_until("the data to come home", || home().is_some());
    cluster.node_mut().restart();
    cluster.wait_until_serving();
    let place = home().unwrap() as u64 * 4096 + 100;
    let data = File::options().read(true).write(true).open(&file).unwrap();
    let mut byte = [0];
    data.read_exact_at(&mut byte, place).unwrap();
    data.write_all_at(&[byte[0] ^ 0x10], place).unwrap();
    data.sync_all().unwrap();
}

// Goal: a read that fails in the middle fails as the protocol demands, and alone.
// Method: the only copy of a block in the third MiB is damaged.
#[test]
fn a_read_that_fails_behind_its_first_pieces_says_where() {
    let mut cluster = start(Cluster::builder());
    let balancer = Balancer::of(&toml(&cluster));
    let bytes = pattern(16 * MIB);
    let mut client = connect(&balancer, ReplyStyle::Extended);
    fill(&mut client, &bytes);
    damage(&mut cluster, &bytes, 2 * MIB + 8 * 4096);
    for (replies, offset) in [
        (ReplyStyle::Extended, Some(2 * MIB as u64)),
        (ReplyStyle::Structured, Some(2 * MIB as u64)),
        (ReplyStyle::Simple, None),
    ] {
        let mut client = connect(&balancer, replies);
        client.send(&read(4 * MIB), &[]).unwrap();
        let (_, outcome) = client.receive().unwrap();
        let error = outcome.unwrap_err();
        assert_eq!((error.error, error.offset), (NbdError::Io, offset), "{replies:?}");
        assert_eq!(client.read(0, 2 * MIB).unwrap(), bytes[..2 * MIB], "the connection goes on");
        if replies != ReplyStyle::Simple {
            // Nothing was passed on of a read that must come in one chunk.
            let whole = Command::Read { offset: 0, len: 4 * MIB as u64, dont_fragment: true };
            client.send(&whole, &[]).unwrap();
            let error = client.receive().unwrap().1.unwrap_err();
            assert_eq!((error.error, error.offset), (NbdError::Io, None), "{replies:?}");
        }
    }
    balancer.stop();
}
