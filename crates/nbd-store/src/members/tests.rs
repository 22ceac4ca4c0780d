use super::*;
use crate::golden;

fn id(id: u64) -> ReplicaId {
    ReplicaId::new(id).unwrap()
}

fn registration(node: &str, directory: u128) -> ReplicaRegistration {
    let addresses = ReplicaAddresses {
        nbd: format!("{node}:10809"),
        grpc: format!("{node}:7400"),
        http: String::new(),
    };
    ReplicaRegistration { node: node.parse().unwrap(), directory, addresses }
}

/// Registers a replica under the next id.
fn register(members: &mut Members, new: ReplicaRegistration) -> Result<ReplicaInfo, Rejection> {
    members.register(id(members.next_replica), new)
}

fn three() -> Members {
    let mut members = Members::default();
    for (node, directory) in [("a", 0xa0), ("b", 0xb0), ("c", 0xc0)] {
        register(&mut members, registration(node, directory)).unwrap();
    }
    members.membership = Membership::of_voters([id(1), id(2), id(3)]);
    members
}

#[test]
fn golden_bytes() {
    let mut members = Members::default();
    register(&mut members, registration("nbd-1-2", 0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10))
        .unwrap();
    register(&mut members, registration("b", 0xb0)).unwrap();
    members.membership = Membership::of_voters([id(1)]);
    members.change(MembershipChange::AddLearner(id(2)));
    let sealed = crate::chunk::record::seal(&3_u32.to_le_bytes(), members.encode());
    let golden = include_str!("../../tests/golden/records.txt");
    assert_eq!(sealed, golden::bytes(golden, "members"));
    members.cordon("nbd-1-2".parse().unwrap(), true).unwrap();
    members.replace(id(1), Some(id(2))).unwrap();
    let sealed = crate::chunk::record::seal(&3_u32.to_le_bytes(), members.encode());
    assert_eq!(sealed, golden::bytes(golden, "members_with_plans"));
    let body = members.encode();
    assert_eq!(Members::decode(&body), Some(members));
    // Without its last part it is a record of the version before.
    let before = body.len() - (8 + 2 + 7 + 16);
    for len in 0..body.len() {
        assert_eq!(Members::decode(&body[..len]).is_some(), len == before, "{len}");
    }
}

#[test]
fn cordoned_nodes_are_bounded() {
    let mut members = three();
    let name = |n: usize| format!("node-{n}").parse().unwrap();
    (0..CORDONED_MAX).for_each(|n| members.cordon(name(n), true).unwrap());
    assert_eq!(members.cordon(name(CORDONED_MAX), true), Err(Rejection::LimitReached));
    members.cordon(name(0), true).unwrap();
    members.cordon(name(0), false).unwrap();
    members.cordon(name(CORDONED_MAX), true).unwrap();
    assert_eq!(members.cordoned.len(), CORDONED_MAX);
}

#[test]
fn replacements_end_with_either_replica() {
    let mut members = three();
    let new = register(&mut members, registration("d", 0xd0)).unwrap().id;
    for (old, new) in [(id(1), id(1)), (id(9), new), (new, id(1)), (id(1), id(9))] {
        assert_eq!(members.replace(old, Some(new)), Err(Rejection::BadCommand), "{old} {new}");
    }
    members.replace(id(1), Some(new)).unwrap();
    members.replace(id(1), None).unwrap();
    assert!(members.replacements.is_empty());
    for leaves in [id(1), new] {
        let mut members = members.clone();
        members.change(MembershipChange::AddLearner(new));
        members.replace(id(1), Some(new)).unwrap();
        members.replace(id(2), Some(id(3))).unwrap();
        members.change(MembershipChange::Remove(leaves));
        assert_eq!(members.replacements, [(id(2), id(3))].into());
    }
    // Who is to replace somebody is not forgotten for want of room.
    members.replace(id(1), Some(new)).unwrap();
    for n in 0..2 * REPLICAS_KNOWN_MAX as u128 {
        register(&mut members, registration("wiped", 0x1000 + n)).unwrap();
    }
    assert!(members.replicas.contains_key(&new));
    assert_eq!(members.replacements, [(id(1), new)].into());
}

#[test]
fn what_is_encoded_is_decoded_and_nothing_else() {
    let mut members = three();
    members.change(MembershipChange::AddLearner(id(4)));
    assert_eq!(Members::decode(&members.encode()), None, "a member whose id was never given");
    register(&mut members, registration("d", 0xd0)).unwrap();
    let body = members.encode();
    assert_eq!(Members::decode(&body), Some(members));
    for len in 0..body.len() {
        assert_eq!(Members::decode(&body[..len]), None);
    }
    assert_eq!(Members::decode(&[&body[..], &[0]].concat()), None);
    for at in [8, 12, 16] {
        let mut large = body.clone();
        large[at..at + 4].fill(0xff);
        assert_eq!(Members::decode(&large), None, "no count is taken on trust");
    }
    let empty = Members::default();
    assert_eq!(Members::decode(&empty.encode()), Some(empty));
}

#[test]
fn a_directory_has_one_id_and_ids_are_never_given_twice() {
    let mut members = three();
    let again = register(&mut members, registration("b2", 0xb0)).unwrap();
    assert_eq!((again.id, again.node.as_str()), (id(2), "b2"));
    assert_eq!(again.addresses.nbd, "b2:10809", "where it is now");
    // The node's disk was wiped.
    assert_eq!(register(&mut members, registration("b2", 0xb1)).unwrap().id, id(4));
    members.change(MembershipChange::Remove(id(2)));
    assert!(!members.replicas.contains_key(&id(2)));
    assert_eq!(register(&mut members, registration("b2", 0xb0)).unwrap().id, id(5));
    // Without effect, it removes nothing.
    members.change(MembershipChange::Remove(id(4)));
    assert!(members.replicas.contains_key(&id(4)));
}

#[test]
fn old_registrations_change_nothing_in_a_later_state() {
    // The history: node b is wiped twice, and its second directory is forgotten.
    let history = |members: &mut Members| {
        let _ = members.register(id(4), registration("b", 0xb1));
        members.change(MembershipChange::AddLearner(id(4)));
        members.change(MembershipChange::Remove(id(2)));
        members.change(MembershipChange::AddVoter(id(4)));
        let _ = members.register(id(5), registration("b", 0xb2));
        members.change(MembershipChange::AddLearner(id(5)));
        members.change(MembershipChange::Remove(id(4)));
        members.change(MembershipChange::AddVoter(id(5)));
        let _ = members.register(id(6), registration("b", 0xb3));
        members.change(MembershipChange::AddLearner(id(6)));
    };
    let mut members = three();
    history(&mut members);
    // The third directory's replica starts from what its leader knows, and is sent the whole log.
    let mut joined = members.clone();
    history(&mut joined);
    assert_eq!(joined, members);
}

#[test]
fn replicas_that_never_became_members_do_not_pile_up() {
    let mut members = three();
    for directory in 0x1000..0x1100 {
        register(&mut members, registration("d", directory)).unwrap();
    }
    assert_eq!(members.replicas.len(), REPLICAS_KNOWN_MAX);
    assert!(members.membership.all().all(|id| members.replicas.contains_key(&id)));
    assert_eq!(members.next_replica, 4 + 0x100);
}

#[test]
fn formations_that_contradict_themselves_are_refused() {
    let members = three();
    let formation = members.formation(id(2));
    assert_eq!(Members::of_formation(&formation), Some(members));
    let refused = |formation: Formation| assert_eq!(Members::of_formation(&formation), None);
    refused(Formation { replica: id(4), ..formation.clone() });
    refused(Formation { next_replica: 3, ..formation.clone() });
    let mut twice = formation.clone();
    twice.replicas.push(twice.replicas[0].clone());
    refused(twice);
    let mut long = formation;
    long.replicas[0].addresses.grpc = "x".repeat(ADDRESS_BYTES_MAX + 1);
    refused(long);
}
