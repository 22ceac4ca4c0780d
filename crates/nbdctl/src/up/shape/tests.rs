use super::*;

fn any(_: u16) -> bool {
    true
}

fn wish(shards: u16, replicas: u16) -> Wishes {
    Wishes { shards: Some(shards), replicas: Some(replicas), ..Wishes::default() }
}

fn created(shards: u16, replicas: u16) -> ClusterConfig {
    create(&wish(shards, replicas), &any).unwrap().cluster
}

fn names(cluster: &ClusterConfig, shard: u32) -> Vec<&str> {
    cluster.replicas(ShardId(shard)).iter().map(NodeName::as_str).collect()
}

fn addresses(cluster: &ClusterConfig, node: &str) -> [String; 3] {
    let node = cluster.node(&node.parse().unwrap()).unwrap();
    let NodeAddresses { nbd, grpc, http } = &node.addresses;
    [nbd, grpc, http].map(ToString::to_string)
}

fn refusal(existing: &ClusterConfig, wishes: &Wishes) -> String {
    follow(existing, wishes, &any).unwrap_err().to_string()
}

#[test]
fn a_new_cluster_has_one_shard_of_three_replicas() {
    let shape = create(&Wishes::default(), &any).unwrap();
    assert_eq!(shape.added, []);
    let cluster = shape.cluster;
    assert_eq!((cluster.name().as_str(), cluster.shard_count().get()), ("cinderblock", 1));
    assert_eq!(names(&cluster, 0), ["nbd-1-1", "nbd-1-2", "nbd-1-3"]);
    let expected = ["127.0.0.1:11121", "127.0.0.1:11122", "127.0.0.1:11123"];
    assert_eq!(addresses(&cluster, "nbd-1-2"), expected);
    assert!(cluster.volumes().auto_create);
}

#[test]
fn each_shard_has_nodes_and_ports_of_its_own() {
    let wishes = Wishes { ports: Some(20_000), ..wish(9, 7) };
    let cluster = create(&wishes, &any).unwrap().cluster;
    assert_eq!(cluster.nodes().len(), 63);
    assert_eq!(names(&cluster, 8)[6], "nbd-9-7");
    assert_eq!(addresses(&cluster, "nbd-9-7")[2], "127.0.0.1:20973");
    let highest = Wishes { ports: Some(u16::try_from(PORTS_MAX).unwrap()), ..wish(9, 7) };
    assert!(create(&highest, &any).is_ok());
}

#[test]
fn ports_in_use_are_passed_over() {
    let shape = create(&wish(1, 1), &|port| port != 11_112 && port != 12_113).unwrap();
    assert_eq!(addresses(&shape.cluster, "nbd-1-1")[0], "127.0.0.1:13111");
    let error = create(&wish(1, 1), &|_| false).unwrap_err();
    assert!(error.to_string().contains("--ports"), "{error}");
}

#[test]
fn what_is_not_asked_for_stays() {
    let existing = created(2, 3);
    for wishes in [Wishes::default(), wish(2, 3)] {
        let shape = follow(&existing, &wishes, &|_| false).unwrap();
        assert_eq!(shape, Shape { cluster: existing.clone(), added: Vec::new() });
    }
}

#[test]
fn a_shape_that_would_lose_data_is_refused() {
    let existing = created(2, 3);
    let shards = refusal(&existing, &wish(3, 3));
    assert!(shards.contains("has 2 shards, not 3"), "{shards}");
    let fewer = refusal(&existing, &wish(2, 1));
    assert!(fewer.contains("shard 0 of the cluster there has 3 replicas, not 1"), "{fewer}");
    let renamed = Wishes { name: Some("other".parse().unwrap()), ..Wishes::default() };
    let renamed = refusal(&existing, &renamed);
    assert_eq!(renamed, "the cluster there is named cinderblock, not other");
    let moved = Wishes { ports: Some(15_000), ..Wishes::default() };
    let moved = refusal(&existing, &moved);
    assert!(moved.contains("nbd-1-1 has 127.0.0.1:11111"), "{moved}");
}

// Goal: the lists of replicas keep their order, which ids follow from, and grow at their ends.
#[test]
fn replicas_are_added_at_the_end_of_each_shard() {
    let existing = created(2, 1);
    let shape = follow(&existing, &wish(2, 3), &any).unwrap();
    assert_eq!(names(&shape.cluster, 0), ["nbd-1-1", "nbd-1-2", "nbd-1-3"]);
    assert_eq!(names(&shape.cluster, 1), ["nbd-2-1", "nbd-2-2", "nbd-2-3"]);
    let added: Vec<_> = shape.added.iter().map(NodeName::as_str).collect();
    assert_eq!(added, ["nbd-1-2", "nbd-1-3", "nbd-2-2", "nbd-2-3"]);
    for node in existing.nodes() {
        assert_eq!(shape.cluster.node(&node.name), Some(node));
    }
    // Not at a port of a node that is there, though it does not run.
    let mut nodes = existing.nodes().to_vec();
    nodes[1].addresses.nbd = "127.0.0.1:11121".parse().unwrap();
    let lists = existing.shard_map().shards().map(|(_, list)| list.to_vec()).collect();
    let edited = ClusterConfig::new(existing.name().clone(), nodes, lists, existing.volumes());
    let shape = follow(&edited.unwrap(), &wish(2, 2), &any).unwrap();
    assert_eq!(addresses(&shape.cluster, "nbd-1-2")[0], "127.0.0.1:12121");
}

#[test]
fn sizes_are_those_of_volumes_to_come() {
    let existing = created(1, 3);
    let wishes = Wishes { size: Some(ByteSize::new(1 << 20)), ..Wishes::default() };
    let shape = follow(&existing, &wishes, &any).unwrap();
    assert_eq!(shape.cluster.volumes().default_size, ByteSize::new(1 << 20));
    let wishes = Wishes { size: Some(ByteSize::new(1)), ..Wishes::default() };
    assert!(refusal(&existing, &wishes).contains("default_size"));
}
