//! Finds the leader of every shard, and keeps at it.
//!
//! ```text
//!  node ══ShardView══▶ follower (one an address) ─┐
//!  node ══ShardView══▶ follower ──────────────────┼─Heard─▶ shard task ──Route───▶ watch
//!  node ══ShardView══▶ follower ──────────────────┘          (Routes)  ──servers─▶ watch
//!                                                                      ──status──▶ watch
//!
//!  task         ends when                                then
//!  shard task   it is told to stop                       its followers end
//!  follower     its shard task ends, or forgets it       its stream is closed
//! ```
//!
//! A follower opens a stream, passes on what comes, and opens it again when it is lost. What all of
//! it means is decided in [`routes`](crate::routes).

use std::collections::HashMap;
use std::time::Duration;

use nbd_front::{Links, NbdAt, Route};
use nbd_rpc::identity::{node_name, replica_id};
use nbd_rpc::{InvalidAddress, Refusal, is_refusal, reason, v1};
use nbd_service::ClusterConfig;
use nbd_topology::{ClusterName, ShardId, Term};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tonic::Status;
use tracing::{debug, info, warn};

use crate::metrics::ShardMetrics;
use crate::routes::{ConfiguredNode, Place, Routes, View};

/// First wait before a stream that was lost, or did not come about, is opened again; doubled each
/// time up to [`BACKOFF_MAX`], and shortened by up to a half at random.
pub const BACKOFF_MIN: Duration = Duration::from_millis(20);

/// Longest wait between attempts: how late a node that comes back is noticed.
pub const BACKOFF_MAX: Duration = Duration::from_secs(1);

/// Time for a node to accept a stream and to say what it knows. A node that lives does so within
/// milliseconds; one that took the connection and is frozen is given up by HTTP/2 pings before.
const FIRST_VIEW_MAX: Duration = Duration::from_secs(3);

/// What followers have heard and their shard's task has not taken in. Followers wait when there is
/// more.
const HEARD_MAX: usize = 64;

/// The routes to all shards of a cluster, as they change.
#[derive(Debug, Clone)]
pub struct Finder {
    /// By number.
    shards: Vec<ShardFinder>,
}

#[derive(Debug, Clone)]
struct ShardFinder {
    route: watch::Receiver<Route>,
    servers: watch::Receiver<Vec<NbdAt>>,
    status: watch::Receiver<ShardStatus>,
}

/// How the search for one shard's leader stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardStatus {
    /// The shard.
    pub shard: ShardId,
    /// What is published. A leader that it names may be one that was lost a while ago.
    pub route: Route,
    /// The leader itself says that it can be asked, over a stream that lasts.
    pub reached: bool,
    /// Addresses at which nodes of the shard are looked for.
    pub contacts: usize,
    /// Of them, those that a stream is open from.
    pub streams: usize,
}

impl Finder {
    /// Starts to look for the leaders of `cluster`, until `stop` is cancelled: not before the last
    /// session has ended, for a session is closed by its leader.
    pub fn start(cluster: &ClusterConfig, stop: &CancellationToken) -> Self {
        // Not those of sessions: news of a leader must not wait behind data.
        let links = Links::default();
        let shards = cluster.shard_map().shards();
        let shards = shards.map(|(shard, nodes)| {
            let nodes = nodes.iter().filter_map(|name| cluster.node(name));
            let nodes = nodes.map(|node| ConfiguredNode {
                node: node.name.clone(),
                grpc: node.addresses.grpc.to_string(),
                nbd: node.addresses.nbd.to_string(),
            });
            let nodes = nodes.collect();
            let (task, finder) = ShardTask::new(cluster.name(), shard, nodes, links.clone());
            tokio::spawn(task.run(stop.clone()));
            finder
        });
        Self { shards: shards.collect() }
    }

    /// The way to the shard's leader, now and as it changes. `None` if there is no such shard.
    #[must_use]
    pub fn route(&self, shard: ShardId) -> Option<watch::Receiver<Route>> {
        Some(self.shard(shard)?.route.clone())
    }

    /// Where the shard's volumes are served over NBD, best first, now and as that changes. `None`
    /// if there is no such shard.
    #[must_use]
    pub fn servers(&self, shard: ShardId) -> Option<watch::Receiver<Vec<NbdAt>>> {
        Some(self.shard(shard)?.servers.clone())
    }

    /// How the search for the shard's leader stands, now and as it changes.
    #[must_use]
    pub fn status(&self, shard: ShardId) -> Option<watch::Receiver<ShardStatus>> {
        Some(self.shard(shard)?.status.clone())
    }

    /// How the search stands for every shard, by number.
    pub fn statuses(&self) -> impl Iterator<Item = watch::Receiver<ShardStatus>> {
        self.shards.iter().map(|shard| shard.status.clone())
    }

    fn shard(&self, shard: ShardId) -> Option<&ShardFinder> {
        self.shards.get(usize::try_from(shard.0).ok()?)
    }
}

/// What a follower tells its shard's task.
enum Heard {
    /// A node says so.
    Said(View),
    /// The stream was lost, or none came about.
    Lost,
}

/// Owner of what is known of one shard.
struct ShardTask {
    cluster: ClusterName,
    shard: ShardId,
    /// The shard's nodes as they are configured.
    configured: Vec<ConfiguredNode>,
    routes: Routes,
    links: Links,
    /// By address; the same addresses as the contacts of `routes`.
    followers: HashMap<String, AbortOnDropHandle<()>>,
    heard_tx: mpsc::Sender<(String, Heard)>,
    heard: mpsc::Receiver<(String, Heard)>,
    route: watch::Sender<Route>,
    servers: watch::Sender<Vec<NbdAt>>,
    status: watch::Sender<ShardStatus>,
    metrics: ShardMetrics,
}

impl ShardTask {
    fn new(
        cluster: &ClusterName,
        shard: ShardId,
        configured: Vec<ConfiguredNode>,
        links: Links,
    ) -> (Self, ShardFinder) {
        let (heard_tx, heard) = mpsc::channel(HEARD_MAX);
        let routes = Routes::new(configured.iter().map(|node| node.grpc.clone()));
        let route = watch::Sender::new(routes.route().clone());
        let status = watch::Sender::new(status(shard, &routes));
        let servers = watch::Sender::new(Vec::new());
        let finder = ShardFinder {
            route: route.subscribe(),
            servers: servers.subscribe(),
            status: status.subscribe(),
        };
        let task = Self {
            cluster: cluster.clone(),
            shard,
            configured,
            routes,
            links,
            followers: HashMap::new(),
            heard_tx,
            heard,
            route,
            servers,
            status,
            metrics: ShardMetrics::new(shard),
        };
        (task, finder)
    }

    async fn run(mut self, stop: CancellationToken) {
        self.settle();
        loop {
            let heard = tokio::select! {
                () = stop.cancelled() => return,
                heard = self.heard.recv() => heard,
            };
            // Never: this task holds a sender itself.
            let Some((address, heard)) = heard else { return };
            match heard {
                Heard::Said(view) => self.routes.said(&address, view),
                Heard::Lost => self.routes.lost(&address),
            }
            self.settle();
        }
    }

    /// Makes known what is known, and follows whom there is to follow.
    fn settle(&mut self) {
        let now = self.routes.route();
        let moved = self.route.send_if_modified(|route| {
            let changed = route != now;
            route.clone_from(now);
            changed
        });
        if moved {
            self.tell_move();
        }
        send_changed(&self.servers, self.routes.servers(&self.configured));
        let status = status(self.shard, &self.routes);
        self.metrics.status(&status);
        send_changed(&self.status, status);
        self.followers.retain(|address, _| self.routes.is_contact(address));
        for address in self.routes.contacts() {
            if !self.followers.contains_key(address) {
                let follower = self.follower(address);
                self.followers.insert(address.to_owned(), follower);
            }
        }
    }

    fn tell_move(&self) {
        self.metrics.moved();
        let Route { term, leader, .. } = self.routes.route();
        match leader {
            Some(leader) => info!(shard = %self.shard, %term, leader = %leader.node,
                                  at = leader.grpc, "route"),
            None => info!(shard = %self.shard, %term, "no leader is known"),
        }
    }

    fn follower(&self, address: &str) -> AbortOnDropHandle<()> {
        debug!(shard = %self.shard, address, "a node to follow");
        let follower = Follower {
            cluster: self.cluster.clone(),
            shard: self.shard,
            address: address.to_owned(),
            links: self.links.clone(),
            heard: self.heard_tx.clone(),
        };
        AbortOnDropHandle::new(tokio::spawn(follower.run()))
    }
}

/// Makes something known if it is news.
fn send_changed<T: PartialEq>(sender: &watch::Sender<T>, now: T) {
    sender.send_if_modified(|before| {
        let changed = *before != now;
        *before = now;
        changed
    });
}

fn status(shard: ShardId, routes: &Routes) -> ShardStatus {
    ShardStatus {
        shard,
        route: routes.route().clone(),
        reached: routes.is_confirmed(),
        contacts: routes.contacts().count(),
        streams: routes.open_count(),
    }
}

/// Keeps a stream open from one address.
struct Follower {
    cluster: ClusterName,
    shard: ShardId,
    address: String,
    links: Links,
    heard: mpsc::Sender<(String, Heard)>,
}

/// Why there is no stream.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error(transparent)]
    Address(#[from] InvalidAddress),
    #[error("{}", reason(.0))]
    Status(#[from] Status),
    #[error(transparent)]
    Malformed(#[from] Refusal),
    #[error("it says nothing for {FIRST_VIEW_MAX:?}")]
    Silent,
    #[error("the node has ended it")]
    Closed,
}

impl Ended {
    /// Whether the node is alive and turns this process away: somebody must look.
    fn is_refusal(&self) -> bool {
        match self {
            Self::Status(status) => is_refusal(status),
            Self::Address(_) | Self::Malformed(_) => true,
            Self::Silent | Self::Closed => false,
        }
    }
}

impl Follower {
    async fn run(self) {
        let mut backoff = Backoff::new();
        // What was logged last, so that the same is not logged at each attempt.
        let mut logged = String::new();
        loop {
            let mut views = 0_u64;
            let Err(ended) = self.follow(&mut views).await;
            if self.heard.send((self.address.clone(), Heard::Lost)).await.is_err() {
                return;
            }
            if views > 0 {
                backoff = Backoff::new();
                logged.clear();
            }
            let why = ended.to_string();
            if why != logged {
                let (shard, address) = (self.shard, &self.address);
                if ended.is_refusal() {
                    warn!(%shard, address, why, "a node refuses to be followed");
                } else {
                    info!(%shard, address, why, "a node cannot be followed now");
                }
                logged = why;
            }
            tokio::time::sleep(backoff.next(rand::random())).await;
        }
    }

    /// Opens a stream and passes on what comes, to its end.
    async fn follow(&self, views: &mut u64) -> Result<std::convert::Infallible, Ended> {
        let mut client = self.links.client(&self.address)?;
        let target = v1::ShardTarget { cluster: self.cluster.to_string(), shard: self.shard.0 };
        let request = v1::WatchRequest { target: Some(target) };
        let open = async {
            let mut stream = client.watch(request).await?.into_inner();
            let first = stream.message().await?;
            Ok::<_, Status>((stream, first))
        };
        let opened = tokio::time::timeout(FIRST_VIEW_MAX, open).await;
        let (mut stream, mut next) = opened.map_err(|_| Ended::Silent)??;
        while let Some(view) = next {
            *views += 1;
            let heard = Heard::Said(view_from(view)?);
            if self.heard.send((self.address.clone(), heard)).await.is_err() {
                // The shard's task has ended, and takes this one along.
                return Err(Ended::Closed);
            }
            next = stream.message().await?;
        }
        Err(Ended::Closed)
    }
}

/// What a node says, checked.
fn view_from(view: v1::ShardView) -> Result<View, Refusal> {
    let replica = match view.replica {
        0 => None,
        id => Some(replica_id(id)?),
    };
    let leader = view.leader.map(place_from).transpose()?;
    let itself = leader.as_ref().is_some_and(|leader| Some(leader.replica) == replica);
    if view.serving && !itself {
        return Err(Refusal::Malformed("a node serves and does not lead"));
    }
    let member = |member: v1::ShardMember| {
        place_from(member.at.ok_or(Refusal::Malformed("a member without an address"))?)
    };
    let members = view.members.into_iter().map(member).collect::<Result<_, _>>()?;
    Ok(View { replica, term: Term(view.term), leader, serving: view.serving, members })
}

fn place_from(at: v1::ReplicaAddress) -> Result<Place, Refusal> {
    let (replica, node) = (replica_id(at.replica)?, node_name(&at.node)?);
    let nbd = Some(at.nbd).filter(|nbd| !nbd.is_empty());
    for address in [Some(&at.grpc), nbd.as_ref()].into_iter().flatten() {
        if address.parse::<nbd_service::HostPort>().is_err() {
            return Err(Refusal::Malformed("an address that is not host:port"));
        }
    }
    Ok(Place { replica, node, grpc: at.grpc, nbd })
}

/// The wait between attempts.
#[derive(Debug)]
struct Backoff(Duration);

impl Backoff {
    const fn new() -> Self {
        Self(BACKOFF_MIN)
    }

    /// The next wait; `random` is from 0 to 1.
    fn next(&mut self, random: f64) -> Duration {
        let wait = self.0.mul_f64(1.0 - random / 2.0);
        self.0 = (self.0 * 2).min(BACKOFF_MAX);
        wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_a_bound_and_are_shortened_by_half_at_most() {
        let mut backoff = Backoff::new();
        let waits: Vec<_> = (0..8).map(|_| backoff.next(0.0).as_millis()).collect();
        assert_eq!(waits, [20, 40, 80, 160, 320, 640, 1000, 1000]);
        assert_eq!(backoff.next(1.0).as_millis(), 500);
    }

    fn wire() -> v1::ShardView {
        let at = |replica, grpc: &str| v1::ReplicaAddress {
            replica,
            node: format!("n{replica}"),
            grpc: grpc.to_owned(),
            nbd: String::new(),
        };
        v1::ShardView {
            replica: 2,
            term: 7,
            leader: Some(at(2, "n2:1")),
            serving: true,
            members: vec![
                v1::ShardMember { at: Some(at(1, "n1:1")), voter: true },
                v1::ShardMember { at: Some(at(2, "n2:1")), voter: true },
            ],
        }
    }

    #[test]
    fn what_a_node_says_is_checked() {
        let view = view_from(wire()).unwrap();
        assert_eq!(view.replica.map(nbd_topology::ReplicaId::get), Some(2));
        assert_eq!((view.term, view.serving, view.members.len()), (Term(7), true, 2));
        let fresh = v1::ShardView { replica: 0, leader: None, serving: false, ..wire() };
        assert_eq!(view_from(fresh).unwrap().replica, None);

        let mut bad = Vec::new();
        bad.push(v1::ShardView { replica: 1, ..wire() });
        bad.push(v1::ShardView { leader: None, ..wire() });
        bad.push(v1::ShardView { members: vec![v1::ShardMember::default()], ..wire() });
        for break_it in [
            |at: &mut v1::ReplicaAddress| at.replica = 0,
            |at: &mut v1::ReplicaAddress| at.node = "no name".to_owned(),
            |at: &mut v1::ReplicaAddress| at.grpc = "nowhere".to_owned(),
            |at: &mut v1::ReplicaAddress| at.nbd = "nowhere".to_owned(),
        ] {
            let mut view = wire();
            break_it(view.members[0].at.as_mut().unwrap());
            bad.push(view);
        }
        for view in bad {
            assert!(view_from(view.clone()).is_err(), "{view:?}");
        }
    }
}
