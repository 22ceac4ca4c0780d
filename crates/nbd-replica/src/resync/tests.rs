//! Two nodes' stores on disks in memory, the source's behind its service on the loopback device.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use nbd_log::checksum::crc32c;
use nbd_log::io::MemoryDisk;
use nbd_log::log::{EntryKind, EntryRecord, HardState, LogPosition, LogWriter, Record};
use nbd_rpc::v1;
use nbd_rpc::v1::chunks_server::ChunksServer;
use nbd_rpc::v1::snapshot_reply::Part;
use nbd_store::{
    Applied, DamagedChunk, Epoch, Formation, NodeStore, Outcome, Owner, ReplicaAddresses,
    SessionId, ShardWriter, StoreOptions, VolumeId, encode_create_volume, encode_open_session,
    encode_trim, encode_write,
};
use nbd_topology::{LogIndex, Membership, ReplicaId, ShardId, Term};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_util::sync::CancellationToken;
use tonic::Code;

use super::driver::Ended;
use super::source::{SourceError, receive_snapshot};
use super::*;
use crate::checkpoint_thread::{CheckpointHandle, CheckpointThread, DAMAGED_MAX};
use crate::chunk_service::snapshot::{
    BODY_BYTES_MAX, PIECE_BYTES_MAX, SESSION_RECORD_BYTES_MAX, SnapshotMessages,
    VOLUME_RECORD_BYTES_MAX,
};
use crate::chunk_service::{ChunkService, ChunkServiceParts};
use crate::failure::Failure;
use crate::repair::{RepairParts, Repairer};
use crate::scrub::Comparer;

const SHARD: ShardId = ShardId(0);
const SESSION: SessionId = SessionId(7);
const TERM: Term = Term(2);
const CHUNK: u64 = 65536;
const MIB: u64 = 1 << 20;
const VOLUME_BYTES: u64 = 64 * MIB;

fn id(id: u64) -> ReplicaId {
    ReplicaId::new(id).unwrap()
}

fn info(n: u64, grpc: &str) -> ReplicaInfo {
    let addresses = ReplicaAddresses { grpc: grpc.to_owned(), ..Default::default() };
    let node = format!("n{n}").parse().unwrap();
    ReplicaInfo { id: id(n), node, directory: u128::from(n), addresses }
}

/// A node without Raft: whatever it is told is committed.
struct Node {
    disk: MemoryDisk,
    log: LogWriter,
    writer: ShardWriter,
    reader: ShardReader,
    checkpoints: CheckpointHandle,
    thread: Option<JoinHandle<()>>,
    damaged: (mpsc::Sender<DamagedChunk>, Option<mpsc::Receiver<DamagedChunk>>),
    failure: Failure,
    end: LogPosition,
    seq: u64,
    _lock: Box<dyn nbd_log::io::DiskLock>,
}

impl Node {
    /// The node of this replica, in a group of the replicas 1, 2 and 3.
    fn new(n: u64) -> Self {
        let disk = MemoryDisk::new(n);
        let options = StoreOptions {
            cluster: "test".parse().unwrap(),
            node: format!("n{n}").parse().unwrap(),
            shards: vec![SHARD],
            segment_bytes: 4 * MIB,
            log_bytes_max: 256 * MIB,
            log_cache_bytes: 1 << 20,
            checkpoint_log_bytes: 128 * MIB,
            meta_cache_bytes: 1 << 20,
            space_reserve_bytes: 0,
            decode_change: nbd_consensus::decode_change,
            fault: None,
            rng_seed: [n.to_le_bytes()[0]; 32],
        };
        let store = NodeStore::open(Arc::new(disk.clone()), options).unwrap();
        let NodeStore { log, segments, mut checkpointer, mut shards, space, lock, .. } = store;
        let shard = shards.remove(0);
        let replicas: Vec<_> = (1..=3).map(|n| info(n, "")).collect();
        let membership = Membership::of_voters(replicas.iter().map(|replica| replica.id));
        let formation = Formation { replica: id(n), membership, replicas, next_replica: 4 };
        checkpointer.form(SHARD, &formation).unwrap();
        let (checkpoints, failure) = (CheckpointHandle::new(), Failure::default());
        let (sender, receiver) = mpsc::channel(DAMAGED_MAX);
        let thread = CheckpointThread {
            checkpointer,
            segments,
            space,
            groups: Vec::new(),
            handle: checkpoints.clone(),
            damaged: sender.clone(),
            failure: failure.clone(),
        };
        Self {
            disk,
            log,
            writer: shard.writer,
            reader: shard.reader,
            thread: Some(thread.spawn(&"node".parse().unwrap()).unwrap()),
            checkpoints,
            damaged: (sender, Some(receiver)),
            failure,
            end: LogPosition(0),
            seq: 0,
            _lock: lock,
        }
    }

    fn apply(&mut self, data: &Bytes) -> Vec<Outcome> {
        let index = self.reader.applied().next();
        let state = HardState { term: TERM, vote: 1, commit: LogIndex(index.0 - 1) };
        let entry = EntryRecord { shard: SHARD, index, term: TERM, kind: EntryKind::Command, data };
        let records = [Record::HardState(SHARD, state), Record::Entry(entry)];
        let positions = self.log.append(&records).unwrap();
        self.end = positions[1].plus(data.len() as u64);
        self.writer.apply(index, TERM, Applied::Command(data), positions[1])
    }

    fn create_volume(&mut self) -> VolumeId {
        let outcomes = self.apply(&encode_create_volume("v", VOLUME_BYTES, "").unwrap());
        let [Outcome::VolumeCreated(volume)] = &outcomes[..] else { panic!("{outcomes:?}") };
        let owner = Owner { node: 1, incarnation: 1 };
        let opened = self.apply(&encode_open_session(SESSION, Epoch::FIRST, volume.id, owner));
        assert_eq!(opened, [Outcome::SessionOpened]);
        volume.id
    }

    /// Fills chunks with a byte each that follows from `seed`.
    fn write(&mut self, volume: VolumeId, chunks: std::ops::Range<u64>, seed: u64) {
        for chunk in chunks {
            self.seq += 1;
            let payload = vec![(chunk + seed).to_le_bytes()[0] | 1; 65536];
            let (offset, seq) = (chunk * CHUNK, self.seq);
            self.apply(&encode_write(SESSION, Epoch::FIRST, seq, volume, offset, &payload));
        }
    }

    fn trim(&mut self, volume: VolumeId, chunks: std::ops::Range<u64>) {
        self.seq += 1;
        let (offset, len) = (chunks.start * CHUNK, (chunks.end - chunks.start) * CHUNK);
        self.apply(&encode_trim(SESSION, Epoch::FIRST, self.seq, volume, offset, len));
    }

    fn content(&self, volume: VolumeId) -> Vec<u8> {
        let mut plan = self.reader.resolve(volume, 0, VOLUME_BYTES).unwrap();
        let mut bytes = vec![0; usize::try_from(VOLUME_BYTES).unwrap()];
        plan.read_blocking(&mut bytes).unwrap();
        for (range, segment) in plan.segments() {
            if segment == nbd_store::Segment::Zero {
                bytes[range].fill(0);
            }
        }
        bytes
    }

    /// Serves the node's chunks until the token is cancelled.
    async fn serve(&self) -> (SocketAddr, CancellationToken) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, stop) = (listener.local_addr().unwrap(), CancellationToken::new());
        let service = ChunkService::new(ChunkServiceParts {
            cluster: "test".parse().unwrap(),
            readers: HashMap::from([(SHARD, self.reader.clone())]),
            checkpoints: self.checkpoints.clone(),
            damaged: self.damaged.0.clone(),
        });
        let server =
            nbd_rpc::server().add_service(ChunksServer::new(service)).serve_with_incoming_shutdown(
                nbd_rpc::incoming(listener),
                stop.clone().cancelled_owned(),
            );
        tokio::spawn(server);
        (address, stop)
    }

    /// A driver that fetches at this rate; 0: as fast as it can.
    fn driver(&self, bytes_per_second: u64) -> (Arc<ResyncDriver<FakeGroup>>, ResyncHandle) {
        let (handle, inbox) = inbox();
        let parts = ResyncParts {
            group: FakeGroup { reader: self.reader.clone(), resync: handle.clone() },
            checkpoints: self.checkpoints.clone(),
            peers: peers(),
            throttle: Arc::new(Throttle::new(bytes_per_second)),
            failure: self.failure.clone(),
            stop: CancellationToken::new(),
        };
        (Arc::new(ResyncDriver::new(parts, inbox)), handle)
    }

    async fn offer(&self, n: u64, address: SocketAddr) -> Offer {
        self.checkpoints.attempt().await;
        let at = self.reader.snapshot().unwrap();
        let snapshot = SnapshotOffer { from: id(n), index: at.applied, term: at.applied_term };
        Offer { snapshot, source: info(n, &address.to_string()) }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.checkpoints.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn peers() -> Arc<ChunkPeers> {
    Arc::new(ChunkPeers::new("test".parse().unwrap()))
}

/// A group that wants every snapshot.
struct FakeGroup {
    reader: ShardReader,
    resync: ResyncHandle,
}

impl ResyncGroup for FakeGroup {
    fn reader(&self) -> &ShardReader {
        &self.reader
    }

    async fn resync_ready(&self, snapshot: ShardSnapshot) -> Result<(), GroupStopped> {
        let hard_state = HardState { term: TERM, vote: 0, commit: snapshot.applied };
        self.resync.install(InstallPlan { snapshot, hard_state });
        Ok(())
    }

    async fn installed(&self) -> Result<(), GroupStopped> {
        Ok(())
    }
}

/// Runs a resync to its end; gives the bytes fetched.
async fn resync(driver: &ResyncDriver<FakeGroup>, offer: Offer) -> u64 {
    driver.meter.begin();
    let ended = tokio::time::timeout(Duration::from_secs(60), driver.resync(offer)).await;
    assert_eq!(ended.unwrap(), Ended::Installed);
    driver.meter.end().received
}

// Goal: chunks are fetched as they are by now. As of the source's last checkpoint they would be
// fetched once more after its next one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_source_has_not_brought_home_yet_is_fetched_once() {
    let (mut source, receiver) = (Node::new(1), Node::new(2));
    let volume = source.create_volume();
    source.write(volume, 0..80, 0);
    let (address, _stop) = source.serve().await;
    let offer = source.offer(1, address).await;
    source.write(volume, 0..80, 100);
    let (driver, _) = receiver.driver(0);
    assert_eq!(resync(&driver, offer).await, 80 * CHUNK);
    assert_eq!(receiver.reader.applied(), source.reader.applied());
    assert!(receiver.content(volume) == source.content(volume));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_replica_gets_everything_and_later_only_what_changed() {
    let (mut source, receiver) = (Node::new(1), Node::new(2));
    let volume = source.create_volume();
    source.write(volume, 0..80, 0);
    source.trim(volume, 10..20);
    let (address, _stop) = source.serve().await;
    let (driver, _) = receiver.driver(0);
    let received = resync(&driver, source.offer(1, address).await).await;
    assert_eq!(received, 70 * CHUNK);
    assert_eq!(receiver.reader.applied(), source.reader.applied());
    assert!(receiver.content(volume) == source.content(volume));

    source.write(volume, 3..6, 100);
    source.write(volume, 500..501, 100);
    source.trim(volume, 30..40);
    let (driver, _) = receiver.driver(0);
    let received = resync(&driver, source.offer(1, address).await).await;
    assert_eq!(received, 4 * CHUNK, "three chunks were overwritten and one is new");
    assert!(receiver.content(volume) == source.content(volume));

    let comparer = Comparer { peers: peers(), checkpoints: receiver.checkpoints.clone() };
    let differing = comparer.make_equal(&receiver.reader, id(1), &address.to_string()).await;
    assert_eq!(differing.unwrap(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interrupted_resync_goes_on_from_another_source_with_what_is_there() {
    let (mut source, receiver) = (Node::new(1), Node::new(2));
    let volume = source.create_volume();
    source.write(volume, 0..400, 0);
    let (first, stop_first) = source.serve().await;
    let (driver, _) = receiver.driver(16 * MIB);
    let offer = source.offer(1, first).await;
    driver.meter.begin();
    let mut shown = driver.progress();
    let interrupted = tokio::spawn({
        let (driver, offer) = (Arc::clone(&driver), offer.clone());
        async move { driver.resync(offer).await }
    });
    let half = shown.wait_for(|now| now.is_some_and(|now| now.bytes_done >= 10 * MIB)).await;
    assert_eq!(half.unwrap().unwrap().bytes_total, 400 * CHUNK);
    interrupted.abort();
    let _ = interrupted.await;
    let before = driver.meter.end().received;
    assert!(before < 400 * CHUNK, "it was interrupted in time");
    // The first leader is gone: the node of another one serves the same.
    stop_first.cancel();
    let mut moved = source.offer(1, source.serve().await.0).await;
    moved.source.id = id(1);
    let (driver, _) = receiver.driver(0);
    let after = resync(&driver, moved).await;
    assert!(before + after <= 400 * CHUNK * 12 / 10, "{before} + {after}");
    assert!(after < 400 * CHUNK, "what was there is not fetched again");
    assert!(receiver.content(volume) == source.content(volume));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_offer_of_another_leader_takes_over_at_once() {
    let (mut source, receiver) = (Node::new(1), Node::new(2));
    let volume = source.create_volume();
    source.write(volume, 0..100, 0);
    // Somebody listens there, and never answers.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, _stop) = source.serve().await;
    let mut dead_end = source.offer(3, silent.local_addr().unwrap()).await;
    dead_end.source.id = id(3);
    let (driver, handle) = receiver.driver(0);
    let offer = source.offer(1, address).await;
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(200)).await;
        handle.offered(offer.snapshot, offer.source);
    });
    assert_eq!(resync(&driver, dead_end).await, 100 * CHUNK);
    assert!(receiver.content(volume) == source.content(volume));
}

/// A volume whose record is as large as one can be.
fn largest_volume(n: u64) -> Bytes {
    let label = |at: usize| (format!("{at:0>63}"), "v".repeat(255));
    let volume = nbd_store::NewVolume {
        name: &format!("{n:0>4096}"),
        size: CHUNK,
        description: &"d".repeat(4096),
        labels: &(0..64).map(label).collect(),
        key: Some(1 + u128::from(n)),
        now_ms: 5,
    };
    nbd_store::encode_new_volume(&volume).unwrap()
}

// Goal: the body of a snapshot may be larger than any message between nodes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_catalogue_larger_than_a_message_arrives() {
    let (mut source, receiver) = (Node::new(1), Node::new(2));
    let volume = source.create_volume();
    for n in 0..200 {
        let outcomes = source.apply(&largest_volume(n));
        assert!(matches!(&outcomes[..], [Outcome::VolumeCreated(_)]), "{outcomes:?}");
    }
    source.write(volume, 0..3, 0);
    let (address, _stop) = source.serve().await;
    let offer = source.offer(1, address).await;
    assert!(source.reader.snapshot().unwrap().body.len() > nbd_rpc::MESSAGE_BYTES_MAX);
    let (driver, _) = receiver.driver(0);
    assert_eq!(resync(&driver, offer).await, 3 * CHUNK);
    assert_eq!(receiver.reader.volumes(), source.reader.volumes());
    assert_eq!(receiver.reader.volumes().len(), 201);
    assert!(receiver.content(volume) == source.content(volume));
}

// Goal: the bound that a receiver keeps is no smaller than what a shard can come to.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_bound_of_a_snapshot_is_that_of_a_shard() {
    let mut node = Node::new(1);
    let body_bytes = async |node: &Node| {
        node.checkpoints.attempt().await;
        node.reader.snapshot().unwrap().body.len()
    };
    let volume = node.create_volume();
    let with_one = body_bytes(&node).await;
    node.apply(&largest_volume(0));
    let with_two = body_bytes(&node).await;
    assert_eq!(with_two - with_one, VOLUME_RECORD_BYTES_MAX);
    for _ in 0..256 {
        node.seq += 1;
        let trim = encode_trim(SESSION, Epoch::FIRST, node.seq, volume, VOLUME_BYTES, CHUNK);
        assert!(matches!(node.apply(&trim)[..], [Outcome::Rejected(_)]));
    }
    let rejections = body_bytes(&node).await - with_two;
    assert_eq!(rejections + SESSION_EMPTY_BYTES, SESSION_RECORD_BYTES_MAX);
}

/// Silence that no test meets unless it means to.
const STALL: Duration = Duration::from_secs(10);

/// A session that has seen nothing, in a snapshot.
const SESSION_EMPTY_BYTES: usize = 92;

/// The messages that a source sends for a body like this.
fn snapshot_messages(body: Bytes) -> Vec<v1::SnapshotReply> {
    let snapshot = ShardSnapshot {
        applied: LogIndex(5),
        applied_term: TERM,
        membership: Membership::new([id(1), id(2)], [id(4)]).unwrap(),
        body,
    };
    SnapshotMessages::new(snapshot, (3, 4), None).map(Result::unwrap).collect()
}

async fn received(
    messages: impl IntoIterator<Item = v1::SnapshotReply>,
) -> Result<(ShardSnapshot, u64), SourceError> {
    let messages: Vec<_> = messages.into_iter().map(Ok).collect();
    receive_snapshot(tokio_stream::iter(messages), STALL).await
}

fn piece(bytes: impl Into<Bytes>) -> v1::SnapshotReply {
    v1::SnapshotReply { part: Some(Part::Piece(bytes.into())) }
}

#[tokio::test]
async fn a_snapshot_arrives_as_it_left() {
    for len in [0, 1, PIECE_BYTES_MAX, PIECE_BYTES_MAX + 1, 5 * PIECE_BYTES_MAX] {
        let body: Bytes = (0..len).map(|at| at.to_le_bytes()[0]).collect();
        let messages = snapshot_messages(body.clone());
        assert_eq!(messages.len(), 1 + len.div_ceil(PIECE_BYTES_MAX));
        let (snapshot, delta) = received(messages).await.unwrap();
        assert!(snapshot.body == body && delta == 4);
        let at = (snapshot.applied, snapshot.applied_term);
        assert_eq!(at, (LogIndex(5), TERM));
        assert_eq!(snapshot.membership, Membership::new([id(1), id(2)], [id(4)]).unwrap());
    }
}

#[tokio::test]
async fn a_snapshot_that_is_not_as_announced_is_refused() {
    let body = Bytes::from(vec![7; 2 * PIECE_BYTES_MAX + 9]);
    let whole = snapshot_messages(body.clone());
    let refusal = async |messages: Vec<v1::SnapshotReply>| match received(messages).await {
        Err(SourceError::Answer(refusal)) => refusal.to_string(),
        other => panic!("{other:?}"),
    };
    let with_head = |change: fn(&mut v1::SnapshotHead)| {
        let mut messages = whole.clone();
        let Some(Part::Head(head)) = &mut messages[0].part else { panic!("no head") };
        change(head);
        messages
    };

    let huge = with_head(|head| head.body_bytes = BODY_BYTES_MAX as u64 + 1);
    assert!(refusal(huge).await.contains("larger than any shard's"));
    // Nothing is set aside on the source's word, which is all there is here.
    let boast = with_head(|head| head.body_bytes = BODY_BYTES_MAX as u64);
    assert!(refusal(boast).await.contains("shorter than announced"));
    assert!(refusal(whole[..3].to_vec()).await.contains("shorter than announced"));
    let more = [&whole[..], &[piece("x")]].concat();
    assert!(refusal(more).await.contains("longer than announced"));
    let fewer = with_head(|head| head.body_bytes -= 1);
    assert!(refusal(fewer).await.contains("longer than announced"));

    assert!(refusal(Vec::new()).await.contains("without a head"));
    assert!(refusal(whole[1..].to_vec()).await.contains("does not begin"));
    let twice = [&whole[..1], &whole[..1]].concat();
    assert!(refusal(twice).await.contains("no piece"));
    let nothing = [&whole[..1], &[piece("")]].concat();
    assert!(refusal(nothing).await.contains("1 byte to 1 MiB"));
    let long = [&whole[..1], &[piece(body.slice(..=PIECE_BYTES_MAX))]].concat();
    assert!(refusal(long).await.contains("1 byte to 1 MiB"));
    let damaged = [&whole[..3], &[piece("damaged !")]].concat();
    assert!(refusal(damaged).await.contains("damaged on the way"));
    let both = with_head(|head| head.learners = vec![1]);
    assert!(refusal(both).await.contains("voter and learner"));
}

#[tokio::test]
async fn a_snapshot_that_breaks_off_or_stalls_is_given_up() {
    let mut messages: Vec<_> =
        snapshot_messages(Bytes::from(vec![7; PIECE_BYTES_MAX + 1])).into_iter().map(Ok).collect();
    messages[2] = Err(tonic::Status::unavailable("gone"));
    let broken = receive_snapshot(tokio_stream::iter(messages.clone()), STALL).await.unwrap_err();
    assert!(matches!(broken, SourceError::Call(status) if status.code() == Code::Unavailable));
    messages.pop();
    let silent = tokio_stream::iter(messages).chain(tokio_stream::pending());
    let stalled = receive_snapshot(silent, Duration::from_millis(20)).await.unwrap_err();
    assert!(
        matches!(stalled, SourceError::Call(status) if status.code() == Code::DeadlineExceeded)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_are_refused() {
    let source = Node::new(1);
    let address = source.serve().await.0.to_string();
    let ask = async |cluster: &str, shard: u32, from: u64, to: u64| {
        let peers = ChunkPeers::new(cluster.parse().unwrap());
        let source = peers.source(ShardId(shard), id(from), id(to), &address).unwrap();
        match source.digests(None).await {
            Ok(_) => None,
            Err(SourceError::Call(status)) => Some(status.code()),
            Err(error) => panic!("{error}"),
        }
    };
    assert_eq!(ask("test", 0, 2, 1).await, None);
    assert_eq!(ask("other", 0, 2, 1).await, Some(Code::FailedPrecondition));
    assert_eq!(ask("test", 1, 2, 1).await, Some(Code::NotFound));
    assert_eq!(ask("test", 0, 9, 1).await, Some(Code::FailedPrecondition));
    assert_eq!(ask("test", 0, 2, 3).await, Some(Code::FailedPrecondition));
}

/// A repairer whose peers are reached at this address.
fn repairer(node: &Node) -> Repairer {
    Repairer::new(RepairParts {
        readers: HashMap::from([(SHARD, node.reader.clone())]),
        peers: peers(),
        checkpoints: node.checkpoints.clone(),
        damaged: node.damaged.0.clone(),
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damage_at_home_is_made_good_from_a_peer() {
    let (mut source, mut node) = (Node::new(1), Node::new(2));
    for node in [&mut source, &mut node] {
        let volume = node.create_volume();
        node.write(volume, 0..4, 0);
        node.checkpoints.attempt().await;
    }
    let volume = node.reader.volumes()[0].id;
    let (address, _stop) = source.serve().await;
    // The registration tells where the peer is.
    let registration = nbd_store::ReplicaRegistration {
        node: "n1".parse().unwrap(),
        directory: 1,
        addresses: info(1, &address.to_string()).addresses,
    };
    node.apply(&nbd_store::encode_register_replica(&registration, id(4)).unwrap());

    // One bit in each slot, so that whichever holds the chunk is damaged.
    for slot in 0..16 {
        node.disk.flip_bit("data", slot * CHUNK + 5);
    }
    let page = node.reader.scrub(None, 100).unwrap();
    assert_eq!(page.damaged.len(), 4);
    let repairer = repairer(&node);
    let block = vec![3; 4096];
    let found = repairer.fetch(SHARD, volume, 2 * 16, crc32c(&block)).await;
    assert_eq!(found.as_deref(), Some(&block[..]));
    assert_eq!(repairer.fetch(SHARD, volume, 2 * 16, 1).await, None, "nobody has such a block");

    let mut reported = node.damaged.1.take().unwrap();
    let scheduled = tokio::time::timeout(Duration::from_secs(10), reported.recv()).await;
    assert_eq!(scheduled.unwrap().unwrap().chunk, nbd_store::ChunkIndex(2));
    for damaged in page.damaged {
        assert!(repairer.repair(damaged).await);
    }
    assert!(node.reader.scrub(None, 100).unwrap().damaged.is_empty());
    assert!(node.content(volume) == source.content(volume));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_given_after_the_end_are_turned_down() {
    let node = Node::new(1);
    let checkpoints = node.checkpoints.clone();
    drop(node);
    let refused = checkpoints.write_chunks(SHARD, LogIndex::ZERO, Vec::new()).await;
    assert!(matches!(refused, Err(crate::checkpoint_thread::JobError::Stopped)));
}
