//! One client with connections through several load balancers, as `CAN_MULTI_CONN` allows: they
//! must be as one.

use nbd_proto::Command;
use nbd_testkit::load::{Load, LoadOptions};
use nbd_testkit::{Cluster, NbdClient, require_tools, seed};

use crate::command::tool;
use crate::support::{Balancer, cluster, toml};

/// Bytes of each request.
const BLOCK: usize = 8192;

/// Requests under way on each connection.
const DEPTH: u64 = 64;

fn two(cluster: &Cluster) -> [Balancer; 2] {
    [(); 2].map(|()| Balancer::of(&toml(cluster)))
}

fn uri(balancer: &Balancer) -> String {
    let (host, port) = balancer.target().address();
    format!("nbd://{host}:{port}/volume")
}

fn connect(balancer: &Balancer) -> NbdClient {
    NbdClient::connect(balancer.target().address(), "volume").unwrap()
}

fn offset(number: u64) -> u64 {
    number * BLOCK as u64
}

/// A block that tells which one it is, and in which round it was written.
fn block(number: u64, round: u64) -> Vec<u8> {
    ((number << 32) | (round + 1)).to_le_bytes().repeat(BLOCK / 8)
}

#[test]
fn clients_are_told_that_they_may_have_several_connections() {
    require_tools!["nbdinfo"];
    let cluster = cluster();
    for balancer in &two(&cluster) {
        // It says so by its exit status.
        tool("nbdinfo").args(["--can", "multi-conn", &uri(balancer)]).run();
    }
}

#[test]
fn what_one_connection_wrote_the_other_reads_at_once() {
    let cluster = cluster();
    let balancers = two(&cluster);
    let [mut one, mut other] = balancers.each_ref().map(connect);
    for round in 0..200 {
        let (offset, data) = (round * 7777 % (4 << 20), block(round, round));
        one.write(offset, &data).unwrap();
        assert!(other.read(offset, data.len()).unwrap() == data, "round {round}");
        std::mem::swap(&mut one, &mut other);
    }
    one.trim(0, 4 << 20).unwrap();
    assert!(other.read(0, 4 << 20).unwrap().iter().all(|byte| *byte == 0));
}

// Goal: the same with many requests under way on both connections.
// Method: each writes every other block, all at once; as soon as a block is answered, the other
// connection reads it, behind whatever else it has under way.
#[test]
fn what_is_answered_over_one_connection_is_there_for_the_other() {
    let cluster = cluster();
    let balancers = two(&cluster);
    let mut clients = balancers.each_ref().map(connect);
    for round in 0..4 {
        let mut blocks = [Vec::new(), Vec::new()];
        for number in 0..2 * DEPTH {
            let place = usize::from(number % 2 == 1);
            let write = Command::Write { offset: offset(number), len: BLOCK as u64 };
            let cookie = clients[place].send(&write, &block(number, round)).unwrap();
            blocks[place].push((cookie, number));
        }
        for _ in 0..DEPTH {
            for place in [0, 1] {
                let (cookie, outcome) = clients[place].receive().unwrap();
                outcome.unwrap();
                let written = blocks[place].iter().find(|(sent, _)| *sent == cookie);
                let number = written.unwrap().1;
                let read = clients[1 - place].read(offset(number), BLOCK).unwrap();
                assert!(read == block(number, round), "block {number} in round {round}");
            }
        }
    }
}

#[test]
fn what_fio_wrote_over_one_it_verifies_over_the_other() {
    require_tools!["fio"];
    let cluster = cluster();
    let balancers = two(&cluster);
    let [one, other] = balancers.each_ref().map(uri);
    let fio = |uri: &str, arguments: &[&str]| {
        let common = ["--name=verify", "--ioengine=nbd", "--iodepth=16", "--rw=randwrite"];
        let content = ["--bs=4k", "--size=4m", "--numjobs=2", "--offset_increment=4m"];
        let verify = ["--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"];
        let fio = tool("fio").directory(cluster.directory()).args(common);
        fio.arg(format!("--uri={uri}")).args(content).args(verify).args(arguments).run();
    };
    fio(&one, &["--do_verify=0"]);
    fio(&other, &["--verify_only"]);
}

// Goal: the same while leaders are lost.
// Method: connections through both write and read one region, each of whose sectors must have been
// linearizable over all of them.
#[test]
fn connections_through_two_stay_consistent_while_leaders_are_killed() {
    let mut cluster = cluster();
    let balancers = two(&cluster);
    let options =
        LoadOptions { threads: 4, region_bytes: 512 << 10, seed: seed(), ..Default::default() };
    let load = Load::start(&balancers.each_ref().map(Balancer::target), options);
    let wait =
        |answers| load.wait_for_answers(answers).unwrap_or_else(|failure| panic!("{failure}"));
    wait(100);
    for _ in 0..3 {
        let leader = cluster.wait_leader();
        cluster.at_mut(leader).kill_9();
        wait(100);
        cluster.at_mut(leader).start();
        cluster.wait_until_serving();
    }
    let mut finished = load.stop().unwrap_or_else(|failure| panic!("{failure}"));
    assert_eq!((finished.reconnects, finished.lost), (0, 0));
    for balancer in &balancers {
        finished.verify(&balancer.target()).unwrap_or_else(|failure| panic!("{failure}"));
    }
    let checked = finished.check_history().unwrap_or_else(|failure| panic!("{failure}"));
    assert!(checked >= 500, "{checked} operations are too few to show anything");
    cluster.wait_until_equal();
}
