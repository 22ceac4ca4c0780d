use super::*;

fn id(id: u64) -> ReplicaId {
    ReplicaId::new(id).unwrap()
}

/// The node of this first id, with this directory.
fn node(id: u64, directory: u128) -> ReplicaRegistration {
    ReplicaRegistration {
        node: format!("n{id}").parse().unwrap(),
        directory,
        addresses: ReplicaAddresses { grpc: format!("n{id}:7400"), ..Default::default() },
    }
}

fn formed(replica: u64, directories: &[(u64, u128)]) -> Formation {
    let replicas: Vec<_> =
        directories.iter().map(|&(n, directory)| with_id(id(n), node(n, directory))).collect();
    let membership = Membership::of_voters(replicas.iter().map(|replica| replica.id));
    let next_replica = replicas.iter().map(|replica| replica.id.get()).max().unwrap() + 1;
    Formation { replica: id(replica), membership, replicas, next_replica }
}

fn fresh(n: u64, directory: u128) -> (ReplicaId, Heard) {
    (id(n), Heard::Fresh(node(n, directory)))
}

fn has_formed(n: u64, directories: &[(u64, u128)]) -> (ReplicaId, Heard) {
    (id(n), Heard::Formed(formed(n, directories)))
}

/// The decision of the first of three nodes, whose directory is 100.
fn decide_first(last: &[(ReplicaId, Heard)], now: &[(ReplicaId, Heard)]) -> Decision {
    let answers = |heard: &[(ReplicaId, Heard)]| heard.iter().cloned().collect();
    decide(id(1), &node(1, 100), &[id(2), id(3)], &answers(last), &answers(now))
}

const ALL: [(u64, u128); 3] = [(1, 100), (2, 200), (3, 300)];

#[test]
fn all_fresh_twice_form_a_new_group_and_all_the_same() {
    let round = [fresh(2, 200), fresh(3, 300)];
    assert_eq!(decide_first(&[], &round), Decision::AskAgain);
    assert_eq!(decide_first(&round, &round), Decision::Form(formed(1, &ALL)));
    let others: Answers = [fresh(1, 100), fresh(3, 300)].into();
    let second = decide(id(2), &node(2, 200), &[id(1), id(3)], &others, &others);
    assert_eq!(second, Decision::Form(formed(2, &ALL)));
}

#[test]
fn one_that_is_silent_is_waited_for() {
    let round = [fresh(2, 200)];
    assert_eq!(decide_first(&round, &round), Decision::AskAgain);
    assert_eq!(decide_first(&[], &[]), Decision::AskAgain);
}

#[test]
fn a_directory_that_changed_between_two_rounds_is_asked_again() {
    let (before, after) = ([fresh(2, 200), fresh(3, 300)], [fresh(2, 201), fresh(3, 300)]);
    assert_eq!(decide_first(&before, &after), Decision::AskAgain);
}

#[test]
fn one_formed_peer_that_knows_this_directory_is_enough() {
    let expected = Decision::Form(formed(1, &ALL));
    assert_eq!(decide_first(&[], &[has_formed(3, &ALL)]), expected);
    assert_eq!(decide_first(&[], &[fresh(2, 200), has_formed(3, &ALL)]), expected);
}

#[test]
fn a_wiped_disk_joins_whatever_others_say() {
    let wiped = [(1, 99), (2, 200), (3, 300)];
    assert_eq!(decide_first(&[], &[has_formed(3, &wiped)]), Decision::Join);
    assert_eq!(decide_first(&[], &[has_formed(2, &ALL), has_formed(3, &wiped)]), Decision::Join);
    // Removed, or never a member.
    assert_eq!(decide_first(&[], &[has_formed(3, &ALL[1..])]), Decision::Join);
    // Joined before, under a later id, and has not stored it: joining again gives the same id.
    let joined = [(2, 200), (3, 300), (4, 100)];
    assert_eq!(decide_first(&[], &[has_formed(2, &joined)]), Decision::Join);
}

#[test]
fn a_single_node_forms_at_once() {
    let alone = decide(id(1), &node(1, 100), &[], &Answers::new(), &Answers::new());
    assert_eq!(alone, Decision::Form(formed(1, &ALL[..1])));
}

#[test]
fn an_answer_arrives_as_it_left() {
    let oneself = Oneself {
        cluster: "demo".parse().unwrap(),
        node: "n2".parse().unwrap(),
        directory: 200,
        addresses: node(2, 200).addresses,
    };
    let name = "n2".parse().unwrap();
    let formation = formed(2, &ALL);
    let reply = formation_reply(&oneself, Some(&formation));
    assert_eq!(heard(&name, reply), Ok(Heard::Formed(formation)));
    let reply = formation_reply(&oneself, None);
    assert_eq!(heard(&name, reply.clone()), Ok(Heard::Fresh(node(2, 200))));
    // An address that leads to another node.
    assert!(heard(&"n3".parse().unwrap(), reply).is_err());
}

#[test]
fn nodes_that_are_configured_differently_do_not_form_together() {
    let founders = |names: &[&str]| Founders {
        nodes: names.iter().map(|name| (name.parse().unwrap(), format!("{name}:7400"))).collect(),
    };
    let names = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
    let mine = founders(&["n1", "n2", "n3"]);
    assert!(check_founders(&names(&["n1", "n2", "n3"]), &mine).is_ok());
    for other in [&["n1", "n2"][..], &["n2", "n1", "n3"], &["n1", "n2", "n3", "n4"]] {
        let refused = check_founders(&names(other), &mine).unwrap_err();
        assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
    }
}

mod loopback {
    use std::collections::HashMap;
    use std::sync::Arc;

    use nbd_log::io::MemoryDisk;
    use nbd_rpc::v1::admin_server::AdminServer;
    use nbd_store::{NodeStore, StoreOptions};
    use tokio::net::TcpListener;

    use super::*;
    use crate::admin_service::{AdminParts, AdminService, AdminShard};
    use crate::checkpoint_thread::{CheckpointThread, DAMAGED_MAX};
    use crate::failure::Failure;
    use crate::group_task::{self, GroupKeeper, GroupMailbox};
    use crate::join::RemovedShards;
    use crate::scrub::ScrubState;
    use crate::steward::Nudge;

    const SHARD: ShardId = ShardId(0);

    /// A node whose group is not started: it can only form.
    struct Node {
        former: Former,
        reader: ShardReader,
        checkpoints: CheckpointHandle,
        thread: Option<std::thread::JoinHandle<()>>,
        _group: (GroupKeeper, GroupMailbox),
        _lock: Box<dyn nbd_log::io::DiskLock>,
    }

    impl Node {
        fn start(disk: &MemoryDisk, n: u64, founders: &Founders, listener: TcpListener) -> Self {
            let grpc = listener.local_addr().unwrap().to_string();
            let options = StoreOptions {
                cluster: "demo".parse().unwrap(),
                node: format!("n{n}").parse().unwrap(),
                shards: vec![SHARD],
                segment_bytes: 1 << 20,
                log_bytes_max: 8 << 20,
                log_cache_bytes: 1 << 16,
                checkpoint_log_bytes: 2 << 20,
                meta_cache_bytes: 1 << 16,
                space_reserve_bytes: 0,
                decode_change: nbd_consensus::decode_change,
                fault: None,
                rng_seed: rand::random(),
            };
            let store = NodeStore::open(Arc::new(disk.clone()), options).unwrap();
            let NodeStore { segments, checkpointer, mut shards, space, identity, lock, .. } = store;
            let reader = shards.remove(0).reader;
            let (group, keeper, mailbox) = group_task::mailbox(reader.clone());
            let checkpoints = CheckpointHandle::new();
            let thread = CheckpointThread {
                checkpointer,
                segments,
                space,
                groups: Vec::new(),
                handle: checkpoints.clone(),
                damaged: tokio::sync::mpsc::channel(DAMAGED_MAX).0,
                failure: Failure::default(),
            };
            let (peers, stop) = (Arc::new(AdminPeers::default()), CancellationToken::new());
            let oneself = Arc::new(Oneself {
                cluster: identity.cluster.clone(),
                node: identity.node.clone(),
                directory: identity.directory,
                addresses: ReplicaAddresses { grpc, ..Default::default() },
            });
            let resync = tokio::sync::watch::channel(None).1;
            let (founders, steward) = (founders.clone(), Nudge::default());
            let shard = AdminShard { group, founders, resync, steward };
            let service = AdminService::new(AdminParts {
                oneself: Arc::clone(&oneself),
                shards: HashMap::from([(SHARD, shard)]),
                peers: Arc::clone(&peers),
                removed: RemovedShards::default(),
                scrub: ScrubState::default(),
            });
            let server = nbd_rpc::server().add_service(AdminServer::new(service));
            tokio::spawn(server.serve_with_incoming(nbd_rpc::incoming(listener)));
            let former = Former { oneself, peers, checkpoints: checkpoints.clone(), stop };
            Self {
                former,
                reader,
                checkpoints,
                thread: Some(thread.spawn(&"node".parse().unwrap()).unwrap()),
                _group: (keeper, mailbox),
                _lock: lock,
            }
        }

        async fn form(&self, founders: &Founders) -> Formation {
            let formed = self.former.form(&self.reader, founders);
            tokio::time::timeout(Duration::from_secs(20), formed).await.unwrap().unwrap()
        }
    }

    impl Drop for Node {
        fn drop(&mut self) {
            self.former.stop.cancel();
            self.checkpoints.stop();
            if let Some(thread) = self.thread.take() {
                let _ = thread.join();
            }
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn three_nodes_that_start_one_after_the_other_form_one_group() {
        let mut listeners = Vec::new();
        for _ in 0..3 {
            listeners.push(TcpListener::bind("127.0.0.1:0").await.unwrap());
        }
        let at = |n: usize| listeners[n].local_addr().unwrap().to_string();
        let nodes = (0..3).map(|n| (format!("n{}", n + 1).parse().unwrap(), at(n)));
        let founders = Founders { nodes: nodes.collect() };
        let mut rest = listeners.into_iter();
        let disks: Vec<_> = (1..=3).map(MemoryDisk::new).collect();

        let first = Node::start(&disks[0], 1, &founders, rest.next().unwrap());
        let second = Node::start(&disks[1], 2, &founders, rest.next().unwrap());
        let waiting = first.former.form(&first.reader, &founders);
        let waited = tokio::time::timeout(Duration::from_millis(500), waiting).await;
        assert!(waited.is_err(), "a node that was not heard must not be formed without");
        assert_eq!(first.reader.formation(), None);

        let third = Node::start(&disks[2], 3, &founders, rest.next().unwrap());
        let (one, two) = tokio::join!(first.form(&founders), second.form(&founders));
        // By now the others have formed: it does as they did.
        let three = third.form(&founders).await;
        for (n, formation) in (1..).zip([&one, &two, &three]) {
            assert_eq!(formation.replica, id(n));
            assert_eq!(formation.membership, Membership::of_voters((1..=3).map(id)));
            assert_eq!((&formation.replicas, formation.next_replica), (&one.replicas, 4));
        }
        assert_eq!(third.reader.formation(), Some(three), "it is stored");
        // Formed nodes know themselves, whatever others say.
        assert_eq!(first.form(&founders).await, one);
    }
}
