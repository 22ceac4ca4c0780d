//! A cluster under attack, with a good client that is served all the while.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nbd_testkit::{Cluster, ClusterBuilder, ConnectOptions, NbdClient, NodeProcess};
use rand::rngs::StdRng;
use rand::{Rng as _, RngCore as _, SeedableRng as _};

/// The longest that any request of a good client may take. Far above what is normal (a
/// millisecond), so that a busy machine is not taken for a fault; far below what a client that
/// waits behind a hostile one would see (10 s handshakes, 30 s payloads, 60 s replies).
const LATENCY_MAX: Duration = Duration::from_secs(5);

/// Blocks of the good client's volume that it uses.
const BLOCKS: usize = 512;
const BLOCK_BYTES: usize = 4096;

/// What the good client does at least, however short the attack.
const OPERATIONS_MIN: u64 = 50;

/// A cluster of one node and a good client on a volume of its own. [`finish`](Self::finish) checks
/// what must hold after every scenario.
pub(crate) struct Scene {
    bystander: Option<Bystander>,
    cluster: Cluster,
}

impl Scene {
    /// Starts a node as described, and the good client on it.
    pub(crate) fn start(builder: ClusterBuilder) -> Self {
        let cluster = builder.start();
        let bystander = Some(Bystander::start(cluster.node()));
        Self { bystander, cluster }
    }

    pub(crate) fn node(&self) -> &NodeProcess {
        self.cluster.node()
    }

    /// The good client saw right answers in good time; a new client is served; the node lives and
    /// has nothing to complain of but its clients.
    pub(crate) fn finish(mut self) {
        assert!(self.cluster.node_mut().is_running(), "the node has ended");
        fresh_client_is_served(self.node());
        let bystander = self.bystander.take().expect("a scene is finished once");
        let (operations, worst) = bystander.stop();
        println!("good client: {operations} operations, the slowest took {worst:?}");
        assert!(worst < LATENCY_MAX, "an operation of the good client took {worst:?}");
        let log = self.node().stderr();
        let bad = log.lines().find(|line| line.contains(" ERROR ") || line.contains("panicked"));
        assert_eq!(bad, None, "the node logged an error");
    }
}

/// A client that comes now attaches, writes and reads.
pub(crate) fn fresh_client_is_served(node: &NodeProcess) {
    let began = Instant::now();
    let mut client = connect(node, "fresh");
    let mut data = vec![0; 1 << 20];
    StdRng::seed_from_u64(began.elapsed().subsec_nanos().into()).fill_bytes(&mut data);
    client.write(12_345, &data).expect("write as a fresh client");
    assert!(client.read(12_345, data.len()).expect("read as a fresh client") == data);
    client.disconnect().expect("disconnect a fresh client");
    assert!(began.elapsed() < LATENCY_MAX, "a fresh client needed {:?}", began.elapsed());
}

fn connect(node: &NodeProcess, export: &str) -> NbdClient {
    let export = export.to_owned();
    let options = ConnectOptions { export, timeout: 4 * LATENCY_MAX, ..ConnectOptions::default() };
    NbdClient::connect_with(node.nbd_address(), &options).expect("attach as a good client")
}

/// A client that writes and reads its own volume until it is stopped, and checks every byte.
struct Bystander {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<(u64, Duration)>,
}

impl Bystander {
    fn start(node: &NodeProcess) -> Self {
        let client = connect(node, "bystander");
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let thread = thread::spawn(move || stand_by(client, &told));
        Self { stop, thread }
    }

    /// How many operations were answered, and how long the slowest took.
    fn stop(self) -> (u64, Duration) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the good client was not served")
    }
}

fn stand_by(mut client: NbdClient, stop: &AtomicBool) -> (u64, Duration) {
    let mut random = StdRng::seed_from_u64(1);
    let mut model = vec![0_u8; BLOCKS * BLOCK_BYTES];
    let (mut operations, mut worst) = (0, Duration::ZERO);
    while operations < OPERATIONS_MIN || !stop.load(Ordering::Relaxed) {
        let began = Instant::now();
        let count = random.random_range(1..=4);
        let first = random.random_range(0..=BLOCKS - count);
        let range = first * BLOCK_BYTES..(first + count) * BLOCK_BYTES;
        let offset = range.start as u64;
        if random.random_bool(0.5) {
            random.fill_bytes(&mut model[range.clone()]);
            client.write(offset, &model[range]).expect("write as the good client");
        } else {
            let data = client.read(offset, range.len()).expect("read as the good client");
            assert!(data == model[range], "the good client read other bytes than it wrote");
        }
        operations += 1;
        worst = worst.max(began.elapsed());
        // A load that is always there, and leaves the machine to the others.
        thread::sleep(Duration::from_millis(2));
    }
    let data = client.read(0, model.len()).expect("read all as the good client");
    assert!(data == model, "the good client's volume holds other bytes than it wrote");
    (operations, worst)
}
