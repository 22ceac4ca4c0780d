use crate::overview::NodeView;

use super::*;

fn replica(id: u64) -> v1::Member {
    let node = format!("n{id}");
    let replica = v1::ReplicaInfo { id, node, ..v1::ReplicaInfo::default() };
    v1::Member { replica: Some(replica), voter: true, active: true, ..v1::Member::default() }
}

fn learner(id: u64) -> v1::Member {
    v1::Member { voter: false, ..replica(id) }
}

fn shard(members: Vec<v1::Member>) -> v1::GetShardReply {
    let members = v1::MembersReply { leader: 1, members, ..v1::MembersReply::default() };
    v1::GetShardReply { members: Some(members), ..v1::GetShardReply::default() }
}

/// A cluster of these shards, whose nodes do not answer.
fn overview(shards: Vec<v1::GetShardReply>) -> Overview {
    let nodes = shards.iter().flat_map(members).map(|member| node_of(member).to_owned());
    let down = NodeView { grpc: "x:1".to_owned(), answer: Err("down".to_owned()) };
    let nodes = nodes.map(|node| (node, down.clone())).collect();
    let shards = (0..).map(ShardId).zip(shards.into_iter().map(Ok)).collect();
    Overview { shards, nodes, ..Overview::default() }
}

fn state(overview: &Overview, id: &str) -> OperationState {
    let operation = overview.operation(&id.parse().unwrap()).unwrap().unwrap();
    assert_eq!(operation.id, id);
    operation.state
}

#[test]
fn ids_parse_in_one_spelling_only() {
    for id in ["add-0-4", "replace-65535-2-4", "resync-1-3", "drain-nbd-1-1"] {
        assert_eq!(id.parse::<OperationId>().unwrap().to_string(), id);
    }
    for id in [
        "",
        "add",
        "add-0",
        "add-0-1-2",
        "add-00-1",
        "add-+0-1",
        "drain-",
        "move-0-1",
        "add-4294967296-1",
        "replace-0-1",
    ] {
        assert_eq!(id.parse::<OperationId>(), Err(NoSuchId), "{id}");
    }
}

#[test]
fn a_replica_is_added_until_it_votes_or_is_gone() {
    let cluster = overview(vec![shard(vec![replica(1), learner(2)])]);
    assert_eq!(state(&cluster, "add-0-2"), OperationState::Running);
    assert_eq!(state(&cluster, "add-0-1"), OperationState::Done);
    assert_eq!(state(&cluster, "add-0-3"), OperationState::Ended);
    assert_eq!(cluster.operation(&"add-1-1".parse().unwrap()), Ok(None), "no such shard");
    let running: Vec<_> = cluster.running().into_iter().map(|running| running.id).collect();
    assert_eq!(running, ["add-0-2"]);
}

#[test]
fn a_replacement_is_one_operation() {
    let mut under_way = shard(vec![replica(1), replica(2), learner(3)]);
    under_way.replacements.push(v1::Replacement { old: 2, new: 3 });
    let cluster = overview(vec![under_way]);
    assert_eq!(state(&cluster, "replace-0-2-3"), OperationState::Running);
    let running: Vec<_> = cluster.running().into_iter().map(|running| running.id).collect();
    assert_eq!(running, ["replace-0-2-3"], "and not also one that adds");
    let done = overview(vec![shard(vec![replica(1), replica(3)])]);
    assert_eq!(state(&done, "replace-0-2-3"), OperationState::Done);
    let cancelled = overview(vec![shard(vec![replica(1), replica(2)])]);
    assert_eq!(state(&cancelled, "replace-0-2-3"), OperationState::Ended);
}

#[test]
fn a_resync_cannot_be_cancelled() {
    let fetching = v1::Member { resyncing: true, ..replica(2) };
    let cluster = overview(vec![shard(vec![replica(1), fetching])]);
    let [resync] = cluster.running().try_into().unwrap();
    assert_eq!((resync.id.as_str(), resync.cancellable), ("resync-0-2", false));
    assert_eq!(state(&cluster, "resync-0-1"), OperationState::Done);
}

#[test]
fn a_drain_ends_when_the_node_leads_nothing() {
    let mut led = shard(vec![replica(1), replica(2)]);
    let mut cluster = overview(vec![led.clone(), shard(vec![replica(1), replica(2)])]);
    assert_eq!(state(&cluster, "drain-n1"), OperationState::Ended, "not cordoned");
    led.cordoned.push("n1".to_owned());
    cluster.shards.insert(ShardId(0), Ok(led.clone()));
    assert_eq!(state(&cluster, "drain-n1"), OperationState::Running, "cordoned for one of two");
    if let Some(members) = &mut led.members {
        members.leader = 2;
    }
    cluster.shards.insert(ShardId(0), Ok(led.clone()));
    cluster.shards.insert(ShardId(1), Ok(led));
    assert_eq!(state(&cluster, "drain-n1"), OperationState::Done);
    let silent = CallError::Unavailable { shard: ShardId(1), reason: String::new() };
    cluster.shards.insert(ShardId(1), Err(silent));
    cluster.configured.insert(ShardId(1), vec!["n1".to_owned()]);
    let drain = cluster.operation(&"drain-n1".parse().unwrap()).unwrap().unwrap();
    assert_eq!(drain.state, OperationState::Running, "what is not known is not done");
    assert_eq!(drain.progress.map(|progress| (progress.done, progress.total)), Some((1, 2)));
    assert_eq!(drain.message, "shard 1 does not answer");
}
