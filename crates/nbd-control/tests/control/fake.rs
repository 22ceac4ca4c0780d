//! A cluster that says what the test wants: gRPC servers in this process, catalogues in memory.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser as _;
use metrics_exporter_prometheus::PrometheusBuilder;
use nbd_control::{Args, Config, ControlApi};
use nbd_rpc::v1::admin_server::{Admin, AdminServer};
use nbd_rpc::v1::control_server::{Control, ControlServer};
use nbd_rpc::{Refusal, incoming, server, v1};
use nbd_service::ClusterConfig;
use nbd_testkit::http::{self, Response};
use nbd_topology::ShardId;
use parking_lot::Mutex;
use prost::Message as _;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tonic::{Code, Request, Response as Answer, Status};

/// How a node, or a shard, behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Mode {
    #[default]
    Serve,
    /// UNAVAILABLE.
    NoLeader,
    /// No answer, ever.
    Hang,
    /// Does what it is asked for, and says UNAVAILABLE the first time.
    LoseAnswer,
    /// The same, the second time.
    LoseSecond,
    /// Hosts no such shard.
    Stranger,
    /// FAILED_PRECONDITION with this conflict.
    Refuse(v1::Conflict),
}

#[derive(Debug, Default)]
pub(crate) struct Shard {
    pub(crate) mode: Mode,
    pub(crate) volumes: BTreeMap<String, v1::Volume>,
    keys: BTreeMap<String, (String, u64)>,
    next_volume: u64,
    pub(crate) cordoned: BTreeSet<String>,
    pub(crate) members: Vec<v1::Member>,
    pub(crate) leader: u64,
    pub(crate) sessions: BTreeMap<u128, v1::SessionView>,
    pub(crate) replacements: Vec<v1::Replacement>,
    next_replica: u64,
}

/// What all nodes share.
#[derive(Debug, Default)]
pub(crate) struct World {
    pub(crate) shards: BTreeMap<u32, Shard>,
    pub(crate) nodes: BTreeMap<String, Mode>,
    /// Calls that arrived, by node.
    pub(crate) calls: BTreeMap<String, usize>,
}

#[derive(Debug, Clone)]
struct Node {
    name: String,
    world: Arc<Mutex<World>>,
}

/// A fake cluster and a real control API for it.
pub(crate) struct Scene {
    pub(crate) world: Arc<Mutex<World>>,
    pub(crate) runtime: Runtime,
    control: Option<ControlApi>,
    pub(crate) http: std::net::SocketAddr,
}

impl Scene {
    /// `shards` shards on the nodes a, b and c.
    pub(crate) fn new(shards: u32, flags: &[&str]) -> Self {
        let runtime = Runtime::new().unwrap();
        let world = Arc::new(Mutex::new(World::default()));
        let mut toml = "name = \"test\"\n".to_owned();
        let mut addresses = Vec::new();
        for (place, name) in ["a", "b", "c"].into_iter().enumerate() {
            let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
            let grpc = listener.local_addr().unwrap();
            let (nbd, http) = (1 + place, 11 + place);
            toml += &format!(
                "[[nodes]]\nname = \"{name}\"\nnbd = \"127.0.0.1:{nbd}\"\ngrpc = \"{grpc}\"\n\
                 http = \"127.0.0.1:{http}\"\n"
            );
            addresses.push((name.to_owned(), grpc.to_string()));
            let node = Node { name: name.to_owned(), world: Arc::clone(&world) };
            let serve = server()
                .add_service(ControlServer::new(node.clone()))
                .add_service(AdminServer::new(node))
                .serve_with_incoming(incoming(listener));
            let guard = runtime.enter();
            tokio::spawn(serve);
            drop(guard);
        }
        for shard in 0..shards {
            toml += "[[shards]]\nreplicas = [\"a\", \"b\", \"c\"]\n";
            let members = (1..).zip(&addresses).map(|(id, (node, grpc))| member(id, node, grpc));
            let members = members.collect();
            let shard_now = Shard { members, leader: 1, next_replica: 4, ..Shard::default() };
            world.lock().shards.insert(shard, shard_now);
        }
        let cluster = ClusterConfig::from_toml(&toml, Path::new("cluster.toml")).unwrap();
        // As the helper that asks calls the host.
        let always = ["nbd-control", "--http=127.0.0.1:0", "--allowed-host=test"];
        let mut args = [&always, flags].concat();
        if !flags.iter().any(|flag| flag.starts_with("--deadline")) {
            args.push("--deadline=2s");
        }
        let config = Config::new(cluster, Args::try_parse_from(args).unwrap()).unwrap();
        let metrics = PrometheusBuilder::new().build_recorder().handle();
        let control = runtime.block_on(ControlApi::start(config, metrics)).unwrap();
        let http = control.http_address();
        Self { world, runtime, control: Some(control), http }
    }

    pub(crate) fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> Response {
        let mut headers = headers.to_vec();
        if !body.is_empty() && !headers.iter().any(|(name, _)| *name == "content-type") {
            headers.push(("content-type", "application/json"));
        }
        http::request(self.http, method, path, &headers, body.as_bytes()).unwrap()
    }

    pub(crate) fn get(&self, path: &str) -> Response {
        self.send("GET", path, &[], "")
    }

    pub(crate) fn post(&self, path: &str, body: &str) -> Response {
        self.send("POST", path, &[], body)
    }

    /// Calls that have arrived.
    pub(crate) fn calls(&self) -> usize {
        self.world.lock().calls.values().sum()
    }

    /// Sends bytes as they are, over a connection of its own.
    pub(crate) fn raw(&self, request: &str) -> std::net::TcpStream {
        use std::io::Write as _;
        let mut stream = std::net::TcpStream::connect(self.http).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        stream
    }

    pub(crate) fn shard_mode(&self, shard: u32, mode: Mode) {
        self.world.lock().shards.get_mut(&shard).unwrap().mode = mode;
    }

    pub(crate) fn node_mode(&self, node: &str, mode: Mode) {
        self.world.lock().nodes.insert(node.to_owned(), mode);
    }

    /// Stops the control API as SIGTERM does.
    pub(crate) fn stop(&mut self) {
        if let Some(control) = self.control.take() {
            self.runtime.block_on(control.stop());
        }
    }
}

fn member(id: u64, node: &str, grpc: &str) -> v1::Member {
    let grpc = grpc.to_owned();
    let addresses = Some(v1::NodeAddresses { grpc, ..v1::NodeAddresses::default() });
    let node = node.to_owned();
    let replica = v1::ReplicaInfo { id, node, addresses, ..v1::ReplicaInfo::default() };
    v1::Member { replica: Some(replica), voter: true, active: true, ..v1::Member::default() }
}

fn refused(conflict: v1::Conflict, volume: Option<v1::Volume>) -> Status {
    let sessions = 2;
    let detail = v1::ConflictDetail { conflict: conflict.into(), volume, sessions };
    let text = format!("refused: {}", conflict.as_str_name());
    Status::with_details(Code::FailedPrecondition, text, detail.encode_to_vec().into())
}

impl Node {
    /// Does something with the shard as a leader would, or what the mode says instead.
    async fn at<T>(
        &self,
        shard: u32,
        act: impl FnOnce(&mut Shard) -> Result<T, Status>,
    ) -> Result<Answer<T>, Status> {
        let mode = {
            let mut world = self.world.lock();
            *world.calls.entry(self.name.clone()).or_default() += 1;
            let node = world.nodes.get(&self.name).copied().unwrap_or_default();
            let Some(shard_now) = world.shards.get_mut(&shard) else {
                return Err(Refusal::Shard(ShardId(shard)).into());
            };
            match (node, shard_now.mode) {
                (Mode::Serve, Mode::Serve) => return act(shard_now).map(Answer::new),
                (Mode::Serve, Mode::LoseSecond) => {
                    shard_now.mode = Mode::LoseAnswer;
                    return act(shard_now).map(Answer::new);
                }
                (Mode::Serve, Mode::LoseAnswer) => {
                    shard_now.mode = Mode::Serve;
                    act(shard_now)?;
                    Mode::NoLeader
                }
                (Mode::Serve, mode) | (mode, _) => mode,
            }
        };
        match mode {
            Mode::Hang => std::future::pending().await,
            Mode::Refuse(conflict) => Err(refused(conflict, None)),
            Mode::Stranger => Err(Refusal::Shard(ShardId(shard)).into()),
            _ => Err(Status::unavailable("no leader that can commit")),
        }
    }
}

fn target(target: Option<v1::ShardTarget>) -> Result<u32, Status> {
    let target = target.ok_or_else(|| Status::invalid_argument("no target"))?;
    assert_eq!(target.cluster, "test");
    Ok(target.shard)
}

fn address(to: Option<v1::ShardAddress>) -> Result<u32, Status> {
    Ok(to.ok_or_else(|| Status::invalid_argument("no address"))?.shard)
}

fn by_id(shard: &mut Shard, id: u64) -> Result<&mut v1::Volume, Status> {
    let found = shard.volumes.values_mut().find(|volume| volume.id == id);
    found.ok_or_else(|| Status::not_found("no such volume"))
}

#[tonic::async_trait]
impl Control for Node {
    async fn create_volume(
        &self,
        request: Request<v1::CreateVolumeRequest>,
    ) -> Result<Answer<v1::CreateVolumeReply>, Status> {
        let v1::CreateVolumeRequest { target: to, name, size, description, labels, key, now_ms } =
            request.into_inner();
        self.at(target(to)?, |shard| {
            assert!(!key.is_empty(), "every creation can be repeated");
            if let Some(volume) = shard.volumes.get(&name) {
                return match shard.keys.get(&name) {
                    Some((known, _)) if *known != key => {
                        Err(refused(v1::Conflict::VolumeExists, Some(volume.clone())))
                    }
                    Some((_, first)) if *first != size => {
                        Err(refused(v1::Conflict::KeyReused, Some(volume.clone())))
                    }
                    _ => Ok(v1::CreateVolumeReply { volume: Some(volume.clone()), repeated: true }),
                };
            }
            shard.next_volume += 1;
            let id = shard.next_volume;
            let (created_ms, modified_ms) = (now_ms, now_ms);
            let volume =
                v1::Volume { id, name, size, description, labels, created_ms, modified_ms };
            shard.keys.insert(volume.name.clone(), (key, size));
            shard.volumes.insert(volume.name.clone(), volume.clone());
            Ok(v1::CreateVolumeReply { volume: Some(volume), repeated: false })
        })
        .await
    }

    async fn get_volume(
        &self,
        request: Request<v1::GetVolumeRequest>,
    ) -> Result<Answer<v1::GetVolumeReply>, Status> {
        let v1::GetVolumeRequest { target: to, name } = request.into_inner();
        self.at(target(to)?, |shard| {
            let volume = shard.volumes.get(&name).cloned();
            let volume = Some(volume.ok_or_else(|| Status::not_found("no such volume"))?);
            Ok(v1::GetVolumeReply { volume, allocated: 65536, sessions: 0 })
        })
        .await
    }

    async fn list_volumes(
        &self,
        request: Request<v1::ListVolumesRequest>,
    ) -> Result<Answer<v1::ListVolumesReply>, Status> {
        let request = request.into_inner();
        let (order, limit) = (request.order(), request.limit as usize);
        let value = |volume: &v1::Volume| match order {
            v1::VolumeOrder::Size => volume.size,
            v1::VolumeOrder::Created => volume.created_ms,
            v1::VolumeOrder::Modified => volume.modified_ms,
            v1::VolumeOrder::Name | v1::VolumeOrder::Unspecified => 0,
        };
        let (prefix, labels) = (request.prefix, request.labels);
        let (after, descending) = (request.after, request.descending);
        self.at(target(request.target)?, |shard| {
            let wanted = |volume: &&v1::Volume| {
                volume.name.starts_with(&prefix)
                    && labels.iter().all(|(name, value)| volume.labels.get(name) == Some(value))
            };
            let place = |volume: &v1::Volume| (value(volume), volume.name.clone());
            let mut volumes: Vec<_> = shard.volumes.values().filter(wanted).cloned().collect();
            volumes.sort_by_key(place);
            if descending {
                volumes.reverse();
            }
            if let Some(after) = after {
                let after = (after.value, after.name);
                volumes.retain(|volume| {
                    (place(volume) < after) == descending && place(volume) != after
                });
            }
            let more = volumes.len() > limit;
            volumes.truncate(limit);
            Ok(v1::ListVolumesReply { volumes, more, total: 0, total_bytes: 0 })
        })
        .await
    }

    async fn update_volume(
        &self,
        request: Request<v1::UpdateVolumeRequest>,
    ) -> Result<Answer<v1::UpdateVolumeReply>, Status> {
        let request = request.into_inner();
        self.at(target(request.target)?, |shard| {
            let volume = by_id(shard, request.volume)?;
            volume.description = request.description.unwrap_or_else(|| volume.description.clone());
            volume.labels.extend(request.set_labels);
            request.remove_labels.iter().for_each(|name| _ = volume.labels.remove(name));
            Ok(v1::UpdateVolumeReply { volume: Some(volume.clone()) })
        })
        .await
    }

    async fn resize_volume(
        &self,
        request: Request<v1::ResizeVolumeRequest>,
    ) -> Result<Answer<v1::ResizeVolumeReply>, Status> {
        let request = request.into_inner();
        self.at(target(request.target)?, |shard| {
            let volume = by_id(shard, request.volume)?;
            if request.size < volume.size && !request.force {
                return Err(refused(v1::Conflict::Shrinks, Some(volume.clone())));
            }
            volume.size = request.size;
            Ok(v1::ResizeVolumeReply { volume: Some(volume.clone()) })
        })
        .await
    }

    async fn trace_volume(
        &self,
        request: Request<v1::TraceVolumeRequest>,
    ) -> Result<Answer<v1::TraceVolumeReply>, Status> {
        let request = request.into_inner();
        self.at(target(request.target)?, |shard| {
            let volume = shard.volumes.get(&request.name).map(|volume| volume.id);
            let volume = volume.ok_or_else(|| Status::not_found("there is no such volume"))?;
            let of_volume = shard.sessions.values().filter(|session| session.name == request.name);
            let sessions = u32::try_from(of_volume.count()).unwrap();
            Ok(v1::TraceVolumeReply { volume, sessions })
        })
        .await
    }

    async fn delete_volume(
        &self,
        request: Request<v1::DeleteVolumeRequest>,
    ) -> Result<Answer<v1::DeleteVolumeReply>, Status> {
        let request = request.into_inner();
        self.at(target(request.target)?, |shard| {
            let name = by_id(shard, request.volume)?.name.clone();
            let attached = shard.sessions.values().any(|session| session.name == name);
            if attached && !request.force {
                return Err(refused(v1::Conflict::Attached, None));
            }
            shard.volumes.remove(&name);
            Ok(v1::DeleteVolumeReply { sessions_ended: 0 })
        })
        .await
    }

    async fn list_sessions(
        &self,
        request: Request<v1::ListSessionsRequest>,
    ) -> Result<Answer<v1::ListSessionsReply>, Status> {
        let request = request.into_inner();
        self.at(target(request.target)?, |shard| {
            let after = request.after.as_ref().try_into().map(u128::from_be_bytes).ok();
            let wanted = |(id, session): &(&u128, &v1::SessionView)| {
                after.is_none_or(|after| **id > after)
                    && (request.volume == 0 || session.volume == request.volume)
            };
            let mut sessions: Vec<_> =
                shard.sessions.iter().filter(wanted).map(|(_, s)| s.clone()).collect();
            let more = sessions.len() > request.limit as usize;
            sessions.truncate(request.limit as usize);
            Ok(v1::ListSessionsReply { sessions, more })
        })
        .await
    }

    async fn end_session(
        &self,
        request: Request<v1::EndSessionRequest>,
    ) -> Result<Answer<v1::EndSessionReply>, Status> {
        let request = request.into_inner();
        self.at(target(request.target)?, |shard| {
            let id = u128::from_be_bytes(request.session.as_ref().try_into().unwrap());
            let ended = shard.sessions.remove(&id);
            ended.ok_or_else(|| Status::not_found("no such session"))?;
            Ok(v1::EndSessionReply {})
        })
        .await
    }

    async fn activity(
        &self,
        request: Request<v1::ActivityRequest>,
    ) -> Result<Answer<v1::ActivityReply>, Status> {
        self.at(target(request.into_inner().target)?, |_| {
            Ok(v1::ActivityReply { incarnation: 7, ..v1::ActivityReply::default() })
        })
        .await
    }

    async fn get_shard(
        &self,
        request: Request<v1::GetShardRequest>,
    ) -> Result<Answer<v1::GetShardReply>, Status> {
        self.at(target(request.into_inner().target)?, |shard| {
            let (members, leader) = (shard.members.clone(), shard.leader);
            let members = v1::MembersReply { members, leader, term: 3, committed: 9 };
            Ok(v1::GetShardReply {
                members: Some(members),
                volumes: shard.volumes.len() as u64,
                provisioned: shard.volumes.values().map(|volume| volume.size).sum(),
                allocated: 0,
                sessions: u32::try_from(shard.sessions.len()).unwrap(),
                cordoned: shard.cordoned.iter().cloned().collect(),
                replacements: shard.replacements.clone(),
            })
        })
        .await
    }

    async fn cordon_node(
        &self,
        request: Request<v1::CordonNodeRequest>,
    ) -> Result<Answer<v1::CordonNodeReply>, Status> {
        let request = request.into_inner();
        self.at(target(request.target)?, |shard| {
            if request.cordoned {
                shard.cordoned.insert(request.node);
            } else {
                shard.cordoned.remove(&request.node);
            }
            Ok(v1::CordonNodeReply {})
        })
        .await
    }

    async fn get_node(
        &self,
        _: Request<v1::GetNodeRequest>,
    ) -> Result<Answer<v1::GetNodeReply>, Status> {
        let mode = self.world.lock().nodes.get(&self.name).copied().unwrap_or_default();
        match mode {
            Mode::Serve => Ok(Answer::new(v1::GetNodeReply {
                node: self.name.clone(),
                version: "0.1.0".to_owned(),
                started_ms: 1,
                disk_bytes: 1 << 40,
                disk_free_bytes: 1 << 39,
                writable_bytes: 1 << 38,
                shards: Vec::new(),
            })),
            Mode::Hang => std::future::pending().await,
            _ => Err(Status::unavailable("away")),
        }
    }
}

/// What the control API does not ask for.
fn not_here<T>() -> Result<Answer<T>, Status> {
    Err(Status::unimplemented("not in tests"))
}

impl Node {
    async fn add(&self, shard: u32, node: String, old: Option<u64>) -> Result<u64, Status> {
        let at = self.at(shard, |shard| {
            if !node.starts_with('n') {
                return Err(Status::failed_precondition(format!("cannot reach node {node}")));
            }
            let id = shard.next_replica;
            shard.next_replica += 1;
            let learner = v1::Member { voter: false, ..member(id, &node, "127.0.0.1:1") };
            shard.members.push(learner);
            shard.replacements.extend(old.map(|old| v1::Replacement { old, new: id }));
            Ok(id)
        });
        Ok(at.await?.into_inner())
    }
}

#[tonic::async_trait]
impl Admin for Node {
    async fn add_replica(
        &self,
        request: Request<v1::AddReplicaRequest>,
    ) -> Result<Answer<v1::AddReplicaReply>, Status> {
        let request = request.into_inner();
        let replica = self.add(address(request.to)?, request.node, None).await?;
        Ok(Answer::new(v1::AddReplicaReply { replica }))
    }

    async fn replace_replica(
        &self,
        request: Request<v1::ReplaceReplicaRequest>,
    ) -> Result<Answer<v1::ReplaceReplicaReply>, Status> {
        let request = request.into_inner();
        let replica = self.add(address(request.to)?, request.node, Some(request.replica)).await?;
        Ok(Answer::new(v1::ReplaceReplicaReply { replica }))
    }

    async fn remove_replica(
        &self,
        request: Request<v1::RemoveReplicaRequest>,
    ) -> Result<Answer<v1::RemoveReplicaReply>, Status> {
        let request = request.into_inner();
        self.at(address(request.to)?, |shard| {
            let id = |member: &v1::Member| member.replica.as_ref().unwrap().id;
            let voters = shard.members.iter().filter(|member| member.voter);
            if voters.filter(|member| id(member) != request.replica).count() < 2 {
                return Err(Status::failed_precondition("no majority would be left"));
            }
            shard.members.retain(|member| id(member) != request.replica);
            shard.replacements.retain(|replacement| replacement.new != request.replica);
            if shard.leader == request.replica {
                shard.leader = id(&shard.members[0]);
            }
            Ok(v1::RemoveReplicaReply {})
        })
        .await
    }

    async fn transfer_leadership(
        &self,
        request: Request<v1::TransferLeadershipRequest>,
    ) -> Result<Answer<v1::TransferLeadershipReply>, Status> {
        let request = request.into_inner();
        self.at(address(request.to)?, |shard| {
            let id = |member: &v1::Member| member.replica.as_ref().unwrap().id;
            let others = shard.members.iter().map(id).filter(|id| *id != shard.leader);
            let best = others.min().unwrap_or(shard.leader);
            shard.leader = if request.replica == 0 { best } else { request.replica };
            Ok(v1::TransferLeadershipReply { replica: shard.leader })
        })
        .await
    }

    async fn formation(
        &self,
        _: Request<v1::FormationRequest>,
    ) -> Result<Answer<v1::FormationReply>, Status> {
        not_here()
    }

    async fn join(&self, _: Request<v1::JoinRequest>) -> Result<Answer<v1::JoinReply>, Status> {
        not_here()
    }

    async fn promote(
        &self,
        _: Request<v1::PromoteRequest>,
    ) -> Result<Answer<v1::PromoteReply>, Status> {
        not_here()
    }

    async fn members(
        &self,
        _: Request<v1::MembersRequest>,
    ) -> Result<Answer<v1::MembersReply>, Status> {
        not_here()
    }

    async fn status(
        &self,
        _: Request<v1::StatusRequest>,
    ) -> Result<Answer<v1::StatusReply>, Status> {
        not_here()
    }
}

/// Asks until it is so.
pub(crate) fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let started = std::time::Instant::now();
    while !is_so() {
        assert!(started.elapsed() < Duration::from_secs(30), "waited for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
