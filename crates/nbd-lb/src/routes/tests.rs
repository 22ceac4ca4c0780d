use super::*;

fn id(id: u64) -> ReplicaId {
    ReplicaId::new(id).unwrap()
}

/// Replica `n` where it says it is itself.
fn place(n: u64) -> Place {
    place_at(n, &format!("n{n}:1"))
}

fn place_at(n: u64, grpc: &str) -> Place {
    let node = format!("n{n}").parse().unwrap();
    Place { replica: id(n), node, grpc: grpc.to_owned(), nbd: Some(format!("n{n}:9")) }
}

/// What replica `n` says in a term: who leads, if anybody.
fn view(n: u64, term: u64, leader: Option<u64>) -> View {
    let members = (1..=3).map(place).collect();
    View {
        replica: Some(id(n)),
        term: Term(term),
        leader: leader.map(place),
        serving: leader == Some(n),
        members,
    }
}

/// The same of one that leads and does not serve yet.
fn not_yet(n: u64, term: u64) -> View {
    View { serving: false, ..view(n, term, Some(n)) }
}

fn address(n: u64) -> String {
    format!("n{n}:1")
}

fn routes() -> Routes {
    Routes::new((1..=3).map(address))
}

/// `leader`, at the address given.
fn to(term: u64, n: u64, grpc: &str) -> Route {
    let Place { replica, node, grpc, .. } = place_at(n, grpc);
    let leader = Some(LeaderAt { replica, node, grpc, local: false });
    Route { term: Term(term), leader, serving: false }
}

fn nowhere(term: u64) -> Route {
    Route { term: Term(term), leader: None, serving: false }
}

/// One step of a story, and the route behind it.
enum Step {
    Says(u64, View),
    Lost(u64),
}
use Step::{Lost, Says};

#[track_caller]
fn play(routes: &mut Routes, steps: Vec<(Step, Route)>) {
    for (number, (step, expected)) in steps.into_iter().enumerate() {
        match step {
            Says(n, view) => routes.said(&address(n), view),
            Lost(n) => routes.lost(&address(n)),
        }
        assert_eq!(*routes.route(), expected, "behind step {number}");
    }
}

#[test]
fn nothing_is_known_at_first() {
    let mut routes = routes();
    assert_eq!(*routes.route(), Route::default());
    assert!(!routes.is_confirmed());
    play(&mut routes, vec![(Says(1, view(1, 2, None)), nowhere(2)), (Lost(1), nowhere(2))]);
}

#[test]
fn hearsay_serves_until_the_leader_speaks_for_itself() {
    let mut routes = routes();
    play(&mut routes, vec![(Says(1, view(1, 2, Some(3))), to(2, 3, "n3:1"))]);
    assert!(!routes.is_confirmed());
    // It knows better.
    play(
        &mut routes,
        vec![
            (Says(3, not_yet(3, 2)), nowhere(2)),
            (Says(2, view(2, 2, Some(3))), nowhere(2)),
            (Says(3, view(3, 2, Some(3))), to(2, 3, "n3:1")),
        ],
    );
    assert!(routes.is_confirmed());
}

#[test]
fn the_highest_term_wins_whatever_the_order() {
    let mut routes = routes();
    play(
        &mut routes,
        vec![
            (Says(1, view(1, 4, Some(1))), to(4, 1, "n1:1")),
            // The next leader is known before the old one has noticed.
            (Says(2, view(2, 5, Some(2))), to(5, 2, "n2:1")),
            (Says(3, view(3, 4, Some(1))), to(5, 2, "n2:1")),
            (Says(1, view(1, 5, Some(2))), to(5, 2, "n2:1")),
        ],
    );
    // Its own word in an old term, against hearsay in a newer one.
    let mut routes = self::routes();
    play(
        &mut routes,
        vec![
            (Says(1, view(1, 4, Some(1))), to(4, 1, "n1:1")),
            (Says(3, view(3, 5, Some(2))), to(5, 2, "n2:1")),
        ],
    );
}

#[test]
fn a_candidate_does_not_count_against_a_leader() {
    let mut routes = routes();
    play(
        &mut routes,
        vec![
            (Says(1, view(1, 4, Some(1))), to(4, 1, "n1:1")),
            (Says(2, view(2, 9, None)), to(4, 1, "n1:1")),
        ],
    );
    assert!(routes.is_confirmed());
}

#[test]
fn a_leader_whose_stream_is_lost_is_kept_until_there_is_better() {
    let mut routes = routes();
    play(
        &mut routes,
        vec![
            (Says(1, view(1, 4, Some(1))), to(4, 1, "n1:1")),
            (Says(2, view(2, 4, Some(1))), to(4, 1, "n1:1")),
            (Says(3, view(3, 4, Some(1))), to(4, 1, "n1:1")),
            (Lost(1), to(4, 1, "n1:1")),
        ],
    );
    assert!(!routes.is_confirmed());
    play(
        &mut routes,
        vec![
            (Says(2, view(2, 5, None)), to(4, 1, "n1:1")),
            (Says(3, view(3, 5, None)), to(4, 1, "n1:1")),
            (Says(3, not_yet(3, 5)), to(4, 1, "n1:1")),
            (Says(3, view(3, 5, Some(3))), to(5, 3, "n3:1")),
        ],
    );
}

#[test]
fn a_leader_that_is_back_and_does_not_lead_is_not_routed_to() {
    let mut routes = routes();
    play(
        &mut routes,
        vec![
            (Says(1, view(1, 4, Some(1))), to(4, 1, "n1:1")),
            (Lost(1), to(4, 1, "n1:1")),
            (Says(1, view(1, 4, None)), nowhere(4)),
            // Others have not noticed; it knows better.
            (Says(2, view(2, 4, Some(1))), nowhere(4)),
            // Its stream is lost again: what others say is the best there is.
            (Lost(1), to(4, 1, "n1:1")),
        ],
    );
}

#[test]
fn a_leader_that_steps_down_is_not_routed_to() {
    let mut routes = routes();
    play(
        &mut routes,
        vec![
            (Says(1, view(1, 4, Some(1))), to(4, 1, "n1:1")),
            (Says(2, view(2, 4, Some(1))), to(4, 1, "n1:1")),
            (Says(1, view(1, 4, None)), nowhere(4)),
        ],
    );
}

#[test]
fn a_straggler_does_not_take_the_route_back() {
    let mut routes = routes();
    play(
        &mut routes,
        vec![
            (Says(2, view(2, 5, Some(2))), to(5, 2, "n2:1")),
            (Says(3, view(3, 5, Some(2))), to(5, 2, "n2:1")),
            (Lost(2), to(5, 2, "n2:1")),
            // It is cut off from the others, and leads them no more.
            (Says(1, view(1, 4, Some(1))), to(5, 2, "n2:1")),
        ],
    );
}

#[test]
fn a_cluster_made_anew_is_followed_though_its_terms_are_lower() {
    let mut routes = routes();
    play(
        &mut routes,
        vec![
            (Says(2, view(2, 50, Some(2))), to(50, 2, "n2:1")),
            (Lost(2), to(50, 2, "n2:1")),
            (Says(3, view(3, 1, None)), to(50, 2, "n2:1")),
            (Says(3, view(3, 1, Some(1))), to(50, 2, "n2:1")),
            (Says(1, view(1, 1, Some(1))), to(1, 1, "n1:1")),
        ],
    );
}

#[test]
fn members_are_learnt_and_forgotten() {
    let mut routes = Routes::new(["old:1".to_owned(), "n1:1".to_owned()]);
    let known = |routes: &Routes| routes.contacts().map(str::to_owned).collect::<Vec<_>>();
    routes.said("n1:1", view(1, 2, Some(2)));
    assert_eq!(known(&routes), ["n1:1", "n2:1", "n3:1", "old:1"]);
    // The one that is configured rightly dies: the others are known by now.
    routes.said("n2:1", view(2, 2, Some(2)));
    routes.lost("n1:1");
    assert_eq!(known(&routes), ["n1:1", "n2:1", "n3:1", "old:1"]);
    assert_eq!(*routes.route(), to(2, 2, "n2:1"));
    // All streams are lost at once: nothing is forgotten.
    routes.lost("n2:1");
    assert_eq!(known(&routes), ["n1:1", "n2:1", "n3:1", "old:1"]);
    // Replica 3 was replaced by 4. Configured addresses stay.
    let members = [1, 2, 4].map(place).to_vec();
    routes.said("n2:1", View { members, ..view(2, 2, Some(2)) });
    assert_eq!(known(&routes), ["n1:1", "n2:1", "n4:1", "old:1"]);
    // Who is told nothing of is kept while its stream lasts.
    let members = [1, 2].map(place).to_vec();
    routes.said("n4:1", view(4, 2, Some(2)));
    for at in ["n2:1", "n4:1"] {
        let n = if at == "n2:1" { 2 } else { 4 };
        routes.said(at, View { members: members.clone(), ..view(n, 2, Some(2)) });
    }
    assert_eq!(known(&routes), ["n1:1", "n2:1", "n4:1", "old:1"]);
    routes.lost("n4:1");
    assert_eq!(known(&routes), ["n1:1", "n2:1", "old:1"]);
    // What such a one still has to say is nobody's.
    routes.said("n4:1", view(4, 9, Some(4)));
    assert_eq!(*routes.route(), to(2, 2, "n2:1"));
}

#[test]
fn learning_is_bounded() {
    let mut routes = routes();
    let members = (1..=1000).map(place).collect();
    routes.said(&address(1), View { members, ..view(1, 2, None) });
    assert_eq!(routes.contacts().count(), CONTACTS_MAX);
}

#[test]
fn the_address_that_works_from_here_is_preferred() {
    // Seen from node 1, node 2 is elsewhere.
    let mut routes = routes();
    let from_one = || View { leader: Some(place_at(2, "proxy:9")), ..view(1, 2, None) };
    play(
        &mut routes,
        vec![
            (Says(1, from_one()), to(2, 2, "proxy:9")),
            (Says(2, view(2, 2, Some(2))), to(2, 2, "n2:1")),
            (Lost(2), to(2, 2, "n2:1")),
            (Says(1, from_one()), to(2, 2, "n2:1")),
        ],
    );
    // Two addresses of one leader do not take turns.
    routes.said("proxy:9", view(2, 2, Some(2)));
    assert_eq!(routes.route().leader.as_ref().unwrap().grpc, "proxy:9");
    routes.said("n2:1", view(2, 2, Some(2)));
    assert_eq!(routes.route().leader.as_ref().unwrap().grpc, "proxy:9");
    assert!(routes.is_confirmed());
    // One of them is lost, and then the other.
    routes.lost("proxy:9");
    assert_eq!(routes.route().leader.as_ref().unwrap().grpc, "n2:1");
    assert!(routes.is_confirmed());
}

#[test]
fn a_node_without_a_replica_is_heard() {
    let mut routes = routes();
    let forming = View { replica: None, members: Vec::new(), ..view(1, 0, None) };
    play(
        &mut routes,
        vec![(Says(1, forming), nowhere(0)), (Says(2, view(2, 1, Some(2))), to(1, 2, "n2:1"))],
    );
    assert_eq!(routes.open_count(), 2);
    assert!(routes.is_open("n1:1") && !routes.is_open("n3:1") && !routes.is_open("x"));
}

fn configured(n: u64, grpc: &str, nbd: &str) -> ConfiguredNode {
    let node = format!("n{n}").parse().unwrap();
    ConfiguredNode { node, grpc: grpc.to_owned(), nbd: nbd.to_owned() }
}

#[track_caller]
fn assert_servers(routes: &Routes, configured: &[ConfiguredNode], expected: &[&str]) {
    let servers = routes.servers(configured);
    let servers: Vec<_> = servers.iter().map(|at| format!("{} {}", at.node, at.nbd)).collect();
    assert_eq!(servers, expected);
}

#[test]
fn the_leader_serves_first_and_any_member_does() {
    let mut routes = routes();
    assert_servers(&routes, &[], &[]);
    routes.said(&address(2), view(2, 4, Some(3)));
    assert_servers(&routes, &[], &["n3 n3:9", "n1 n1:9", "n2 n2:9"]);
    routes.said(&address(1), view(1, 5, Some(1)));
    assert_servers(&routes, &[], &["n1 n1:9", "n2 n2:9", "n3 n3:9"]);
    // While nobody is heard of, what was heard last is the best there is.
    routes.lost(&address(1));
    routes.lost(&address(2));
    assert_servers(&routes, &[], &["n1 n1:9", "n2 n2:9", "n3 n3:9"]);
}

#[test]
fn what_is_configured_counts_where_the_node_was_met() {
    let mut routes = Routes::new(["n1:1".to_owned(), "old2:1".to_owned()]);
    let known = [configured(1, "n1:1", "here1:9"), configured(2, "old2:1", "old2:9")];
    routes.said("n1:1", view(1, 4, Some(1)));
    // The second is known from the first alone: at its configured address nobody was met.
    assert_servers(&routes, &known, &["n1 here1:9", "n1 n1:9", "n2 n2:9", "n3 n3:9"]);
    // Somebody else was.
    routes.said("old2:1", view(3, 4, Some(1)));
    assert_servers(&routes, &known, &["n1 here1:9", "n1 n1:9", "n2 n2:9", "n3 n3:9"]);
    routes.said("old2:1", view(2, 4, Some(1)));
    let expected = ["n1 here1:9", "n1 n1:9", "n2 old2:9", "n2 n2:9", "n3 n3:9"];
    assert_servers(&routes, &known, &expected);
}

#[test]
fn a_node_knows_best_where_it_is() {
    let mut routes = routes();
    routes.said(&address(1), view(1, 4, Some(1)));
    let mut moved = view(2, 3, None);
    moved.members[1].nbd = Some("new2:9".to_owned());
    moved.members[2].nbd = None;
    routes.said(&address(2), moved);
    assert_servers(&routes, &[], &["n1 n1:9", "n2 new2:9", "n2 n2:9", "n3 n3:9"]);
}
