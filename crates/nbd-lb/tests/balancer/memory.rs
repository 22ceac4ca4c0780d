//! What clients cost that do nothing.

use nbd_testkit::NbdClient;

use crate::support::cluster;

/// Clients, each with a volume of its own.
const CLIENTS: u64 = 500;

/// Resident memory that 2,000 of them may add to a load balancer.
const BYTES_OF_2000: u64 = 100 << 20;

#[test]
fn idle_clients_take_little_memory_and_are_served_afterwards() {
    let cluster = cluster();
    let balancer = cluster.balancer();
    let attach = |name: String| {
        let mut client = balancer.connect(&name).unwrap();
        client.write(0, &[1; 4096]).unwrap();
        client
    };
    // So that what is made once is there.
    drop(attach("first".to_owned()));
    let before = balancer.rss_bytes();
    let mut clients: Vec<NbdClient> =
        (0..CLIENTS).map(|number| attach(format!("idle-{number}"))).collect();
    let grown = balancer.rss_bytes().saturating_sub(before);
    let bound = BYTES_OF_2000 * CLIENTS / 2000;
    assert!(grown < bound, "{CLIENTS} clients take {} KiB", grown >> 10);
    for client in &mut clients {
        assert_eq!(client.read(0, 4096).unwrap(), [1; 4096]);
    }
}
