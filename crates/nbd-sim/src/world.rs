//! The whole cluster, its clients and what befalls them, under one schedule.
//!
//! ```text
//!   clients ──▶ front ends ──connections──▶ server side ──▶ ShardReplica ◀──Raft messages──▶ peers
//!  (workload)  (ClientSession)             (attachments)         │
//!      │                                                    log, checkpoints on a MemoryDisk
//!      ▼
//!   history ──▶ linear                     ledger ◀── what replicas log and commit
//! ```
//!
//! - `node`: a node and its life. `log`: its log thread and checkpoints. `server`: what it does for
//!   front ends. `resync`: bringing a replica up to date.
//! - `front`: sessions and the way to the leader. `clients`: what is asked for.
//! - `catalogue`: volumes that change and go.
//! - `nemesis`: what goes wrong. `ending`: healing, and the last checks.

mod catalogue;
mod clients;
mod ending;
mod front;
mod log;
mod nemesis;
mod node;
mod resync;
mod server;

use std::collections::BTreeMap;

use bytes::Bytes;
use nbd_consensus::{Role, Timestamp};
use nbd_session::{Query, QueryId};
use nbd_shard::{Actions, Answer, Event, FetchPlan, InstallPlan, LogTail};
use nbd_store::{EntryPlace, Epoch, Outcome, Owner, Rejection, SessionId, SpaceGrant, VolumeId};
use nbd_topology::{ReplicaId, ShardId};
use rand::rngs::StdRng;

use self::clients::{Client, Workload};
use self::ending::Phase;
use self::front::Front;
use self::nemesis::Nemesis;
use self::node::Node;
use crate::failure::{Breach, Failure};
use crate::history::{History, OperationId};
use crate::ledger::Ledger;
use crate::network::{ConnectionId, Host, Network, Parcel, Side};
use crate::plant::Plant;
use crate::profile::{FaultKind, Profile};
use crate::random::{Draw, Purpose, Streams};
use crate::schedule::Schedule;
use crate::time::{Nanos, SimTime};
use crate::trace::Trace;

/// How long a world may last at most. It ends long before.
const END: SimTime = SimTime(120 * crate::time::SECOND);

/// Within how long a host takes up what has gathered while it stood still.
const PAUSE_JITTER: Nanos = 200_000;

/// A piece of a read on its way through a leader.
#[derive(Debug, Clone)]
struct ReadJob {
    connection: ConnectionId,
    id: QueryId,
    shard: ShardId,
    volume: VolumeId,
    offset: u64,
    len: u64,
    /// Where the read ends; behind this piece there are others if that is not its end.
    end: u64,
    /// It was begun under the lease, which must still hold at its end.
    leased: bool,
}

/// Names a mutation as one attachment sent it.
#[derive(Debug, Clone, Copy)]
struct MutationKey {
    connection: ConnectionId,
    shard: ShardId,
    session: SessionId,
    epoch: Epoch,
    seq: u64,
}

/// Whom a replica's answer is for.
#[derive(Debug)]
enum Reply {
    /// The opening of an attachment.
    Open(ConnectionId),
    /// A mutation over an attachment; the room that it was granted is held until then.
    Mutation { of: MutationKey, _grant: Option<SpaceGrant> },
    /// A read waiting for its barrier.
    Barrier(ReadJob),
    /// A command that belongs to no attachment.
    Run(ConnectionId),
    /// A step of taking a wiped node in again.
    Member { node: usize },
}

/// What travels over connections. `Found` is the next piece of a read; without bytes, the read has
/// failed.
#[derive(Debug)]
enum Letter {
    Hello { shard: ShardId, session: SessionId, epoch: Epoch, volume: VolumeId, owner: Owner },
    Mutation { seq: u64, command: Bytes },
    Query { id: QueryId, query: Query },
    Run { shard: ShardId, command: Bytes },
    Attached,
    Refused(Refusal),
    Answer { seq: u64, outcome: Outcome },
    NoSpace { seq: u64 },
    Found { id: QueryId, bytes: Option<Bytes> },
    Ran(Outcome),
}

/// Why a front end is turned away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Refusal {
    /// Ask this host instead, if any is known.
    NotLeader(Option<Host>),
    /// It may or may not have happened.
    Lost,
    /// The log says no.
    Rejected(u8),
}

/// What is to happen. Events of an earlier life of a host are void.
#[derive(Debug)]
enum Planned {
    Tick { node: usize, life: u32 },
    Turn { node: usize, life: u32, shard: ShardId },
    LogDone { node: usize, life: u32 },
    Checkpoint { node: usize, life: u32 },
    Restart { node: usize },
    Raft { node: usize, shard: ShardId, to: ReplicaId, bytes: Bytes },
    ConnectionLost { node: usize, life: u32, peer: Host },
    Fetched { node: usize, life: u32, shard: ShardId, plan: FetchPlan },
    ReadBack { node: usize, life: u32, shard: ShardId, places: Vec<EntryPlace> },
    Read { node: usize, life: u32, job: ReadJob },
    ReadDone { node: usize, life: u32, job: ReadJob, bytes: Option<Bytes> },
    Resync { node: usize, life: u32, shard: ShardId, nth: u64, progress: Box<resync::Progress> },
    Asked { node: usize, asker: resync::Asker, question: Box<resync::Question> },
    Install { node: usize, life: u32, shard: ShardId, plan: Box<InstallPlan> },
    Arrive { connection: ConnectionId, side: Side },
    Attach { client: usize, generation: u32 },
    AttachTimeout { client: usize, generation: u32, epoch: Epoch },
    Watch { client: usize, generation: u32 },
    Think { client: usize, generation: u32 },
    FrontUp { front: usize },
    Chore { front: usize, life: u32, chore: u64, attempt: u32 },
    Strike(FaultKind),
    Relief(nemesis::Relief),
    Join { node: usize, life: u32 },
    Look,
}

/// What the trace tells of an event.
#[derive(Debug, Hash)]
enum Told {
    Event { kind: u8, a: u64, b: u64 },
    Role { node: usize, shard: u32, role: u8, term: u64 },
    Committed { node: usize, shard: u32, index: u64 },
    Ask { client: usize, operation: usize },
    Answer { operation: usize, what: u64 },
    Strike { kind: FaultKind, host: usize },
    Life { node: usize, life: u32, up: bool },
}

/// A volume of the world.
#[derive(Debug)]
struct Volume {
    shard: ShardId,
    name: String,
    /// Known once it was created.
    id: Option<VolumeId>,
    /// Something is being done to it as a whole.
    busy: bool,
    /// Its size has changed before.
    resized: bool,
    /// It is gone.
    deleted: bool,
    /// What was created in its place.
    successor: Option<usize>,
}

/// How often what happened: shows whether worlds come to the places that matter.
pub type Tally = BTreeMap<&'static str, u64>;

/// A whole cluster.
#[derive(Debug)]
pub struct World {
    profile: Profile,
    plant: Plant,
    schedule: Schedule<Planned>,
    network: Network<Letter>,
    nodes: Vec<Node>,
    fronts: Vec<Front>,
    clients: Vec<Client>,
    workload: Workload,
    volumes: Vec<Volume>,
    /// Where each replica lives. Ids are never reused.
    places: BTreeMap<(ShardId, ReplicaId), usize>,
    /// Until when each host stands still.
    paused: Vec<SimTime>,
    history: History,
    ledger: Ledger,
    nemesis: Nemesis,
    rng: StdRng,
    disks: StdRng,
    phase: Phase,
    trace: Trace,
    failure: Option<Failure>,
    /// How often what happened.
    tally: Tally,
    /// Mutations of sessions whose end is not confirmed yet, and which front end, in which of its
    /// lives, held them.
    unfenced: Vec<(usize, u32, ShardId, OperationId)>,
}

impl World {
    /// A world at its beginning: every disk is empty, every node is about to start.
    #[must_use]
    pub fn new(seed: u64, profile: Profile, plant: Plant, with_text: bool) -> Self {
        let streams = Streams::new(seed);
        let hosts = profile.nodes + profile.balancers;
        let network = Network::new(hosts, profile.network.clone(), streams.of(Purpose::Network));
        let mut world = Self {
            plant,
            schedule: Schedule::default(),
            network,
            nodes: Vec::new(),
            fronts: Vec::new(),
            clients: Vec::new(),
            workload: Workload::new(streams.of(Purpose::Workload), profile.operations),
            volumes: Vec::new(),
            places: BTreeMap::new(),
            paused: vec![SimTime::default(); hosts],
            history: History::default(),
            ledger: Ledger::default(),
            nemesis: Nemesis::new(streams.of(Purpose::Nemesis)),
            rng: streams.of(Purpose::Nodes),
            disks: streams.of(Purpose::Disks),
            phase: Phase::Busy,
            trace: Trace::new(with_text),
            failure: None,
            tally: Tally::default(),
            unfenced: Vec::new(),
            profile,
        };
        world.make_nodes();
        world.make_volumes();
        world.make_fronts();
        world.make_clients();
        world.plan_faults();
        world.schedule.after(ending::LOOK, Planned::Look);
        world
    }

    /// Lives through all of it. Returns what broke, if anything.
    pub fn run(&mut self) -> Option<Failure> {
        while self.failure.is_none() && self.phase != Phase::Over {
            let Some(planned) = self.schedule.next_before(END) else {
                self.fail(Breach::Stuck("the world does not come to an end".into()));
                break;
            };
            let now = self.schedule.now();
            if let Some(until) = self.host_of(&planned).map(|host| self.paused[host])
                && until > now
            {
                // What has gathered by then is taken up in any order.
                let wait = until.0 - now.0 + self.rng.span(0, PAUSE_JITTER);
                self.schedule.after(wait, planned);
                continue;
            }
            self.happen(planned);
        }
        self.failure.clone()
    }

    /// What happened.
    #[must_use]
    pub const fn trace(&self) -> &Trace {
        &self.trace
    }

    /// What clients saw.
    #[must_use]
    pub const fn history(&self) -> &History {
        &self.history
    }

    /// How long it lasted.
    #[must_use]
    pub const fn now(&self) -> SimTime {
        self.schedule.now()
    }

    /// How often what happened.
    #[must_use]
    pub const fn tally(&self) -> &Tally {
        &self.tally
    }

    fn count(&mut self, what: &'static str) {
        *self.tally.entry(what).or_default() += 1;
    }

    fn tell(&mut self, told: &Told) {
        self.trace.note(self.schedule.now(), told);
    }

    fn fail(&mut self, breach: Breach) {
        let at = self.schedule.now();
        self.failure.get_or_insert(Failure { at, breach });
    }

    /// The host that an event concerns: it waits while that host stands still.
    fn host_of(&self, planned: &Planned) -> Option<Host> {
        match planned {
            Planned::Tick { node, .. }
            | Planned::Turn { node, .. }
            | Planned::LogDone { node, .. }
            | Planned::Checkpoint { node, .. }
            | Planned::Raft { node, .. }
            | Planned::ConnectionLost { node, .. }
            | Planned::Fetched { node, .. }
            | Planned::ReadBack { node, .. }
            | Planned::Read { node, .. }
            | Planned::ReadDone { node, .. }
            | Planned::Resync { node, .. }
            | Planned::Asked { node, .. }
            | Planned::Install { node, .. }
            | Planned::Join { node, .. } => Some(*node),
            Planned::Arrive { connection, side } => self.network.host(*connection, *side),
            Planned::Attach { client, .. }
            | Planned::AttachTimeout { client, .. }
            | Planned::Watch { client, .. }
            | Planned::Think { client, .. } => Some(self.fronts[self.clients[*client].front].host),
            Planned::Chore { front, .. } => Some(self.fronts[*front].host),
            Planned::Restart { .. }
            | Planned::FrontUp { .. }
            | Planned::Strike(_)
            | Planned::Relief(_)
            | Planned::Look => None,
        }
    }

    fn happen(&mut self, planned: Planned) {
        self.tell_event(&planned);
        match planned {
            Planned::Tick { node, life } => self.on_tick(node, life),
            Planned::Turn { node, life, shard } => self.on_turn(node, life, shard),
            Planned::LogDone { node, life } => self.on_log_done(node, life),
            Planned::Checkpoint { node, life } => self.on_checkpoint(node, life),
            Planned::Restart { node } => self.start_node(node),
            Planned::Raft { node, shard, to, bytes } => {
                if self.nodes[node].replica_id(shard) == Some(to) {
                    self.step(node, shard, Event::Message(bytes));
                }
            }
            Planned::ConnectionLost { node, life, peer } => {
                self.on_connection_lost(node, life, peer);
            }
            Planned::Fetched { node, life, shard, plan } => {
                self.on_fetched(node, life, shard, &plan);
            }
            Planned::ReadBack { node, life, shard, places } => {
                self.on_read_back(node, life, shard, &places);
            }
            Planned::Read { node, life, job } => self.on_read(node, life, job),
            Planned::ReadDone { node, life, job, bytes } => {
                self.on_read_done(node, life, job, bytes);
            }
            Planned::Resync { node, life, shard, nth, progress } => {
                self.on_resync(node, life, (shard, nth), *progress);
            }
            Planned::Asked { node, asker, question } => self.on_asked(node, asker, &question),
            Planned::Install { node, life, shard, plan } => {
                self.on_install(node, life, shard, &plan);
            }
            Planned::Arrive { connection, side } => self.on_arrive(connection, side),
            Planned::Attach { client, generation } => self.on_attach(client, generation),
            Planned::AttachTimeout { client, generation, epoch } => {
                self.on_attach_timeout(client, generation, epoch);
            }
            Planned::Watch { client, generation } => self.on_watch(client, generation),
            Planned::Think { client, generation } => self.on_think(client, generation),
            Planned::FrontUp { front } => self.on_front_up(front),
            Planned::Chore { front, life, chore, attempt } => {
                self.on_chore(front, life, chore, attempt);
            }
            Planned::Strike(kind) => self.on_strike(kind),
            Planned::Relief(relief) => self.on_relief(relief),
            Planned::Join { node, life } => self.on_join(node, life),
            Planned::Look => self.on_look(),
        }
    }

    fn tell_event(&mut self, planned: &Planned) {
        let (kind, a, b) = match planned {
            Planned::Tick { node, .. } => (1, *node as u64, 0),
            Planned::Turn { node, .. } => (2, *node as u64, 0),
            Planned::LogDone { node, .. } => (3, *node as u64, 0),
            Planned::Checkpoint { node, .. } => (4, *node as u64, 0),
            Planned::Restart { node } => (5, *node as u64, 0),
            Planned::Raft { to, bytes, .. } => (6, to.get(), bytes.len() as u64),
            Planned::ConnectionLost { node, peer, .. } => (7, *node as u64, *peer as u64),
            Planned::Fetched { node, plan, .. } => (8, *node as u64, plan.first.0),
            Planned::Read { node, job, .. } => (9, *node as u64, job.id.0),
            Planned::ReadDone { node, job, .. } => (10, *node as u64, job.id.0),
            Planned::Resync { node, nth, .. } => (11, *node as u64, *nth),
            Planned::Asked { node, .. } => (22, *node as u64, 0),
            Planned::Install { node, .. } => (23, *node as u64, 0),
            Planned::Arrive { connection, side } => (12, connection.0, *side as u64),
            Planned::Attach { client, .. } => (13, *client as u64, 0),
            Planned::AttachTimeout { client, .. } => (14, *client as u64, 0),
            Planned::Watch { client, .. } => (15, *client as u64, 0),
            Planned::Think { client, .. } => (16, *client as u64, 0),
            Planned::FrontUp { front } => (17, *front as u64, 0),
            Planned::Chore { front, chore, .. } => (18, *front as u64, *chore),
            Planned::Strike(_) => (19, 0, 0),
            Planned::Relief(_) => (20, 0, 0),
            Planned::Join { node, .. } => (21, *node as u64, 0),
            Planned::ReadBack { node, places, .. } => (22, *node as u64, places.len() as u64),
            Planned::Look => return,
        };
        self.tell(&Told::Event { kind, a, b });
    }

    /// Steps a replica and carries out what it wants done.
    fn step(&mut self, node: usize, shard: ShardId, event: Event<Reply>) {
        let now = self.schedule.now();
        let at = &mut self.nodes[node];
        let local = Timestamp(at.clock.read(now));
        let Some(running) = &mut at.running else { return };
        let Some(group) = running.groups.get_mut(&shard) else { return };
        let before = group.replica.brief();
        let mut actions = Actions::default();
        group.replica.step(local, event, &mut actions);
        for write in &actions.log_writes {
            group.mirror.write(write);
        }
        let after = group.replica.brief();
        let seen = self.ledger.observe(group.id, &group.replica, &mut group.mirror);
        if let Err(breach) = seen {
            self.fail(breach);
            return;
        }
        self.volumes_changed();
        if (before.role, before.term) != (after.role, after.term) {
            let (role, term) = (after.role as u8, after.term.0);
            self.tell(&Told::Role { node, shard: shard.0, role, term });
            if after.role == Role::Leader {
                self.count("elections won");
            }
        }
        if before.committed != after.committed {
            let index = after.committed.0;
            self.tell(&Told::Committed { node, shard: shard.0, index });
        }
        self.carry_out(node, shard, actions);
    }

    fn carry_out(&mut self, node: usize, shard: ShardId, actions: Actions<Reply>) {
        let life = self.nodes[node].life;
        for message in actions.send {
            self.send_raft(node, shard, message.to, message.bytes);
        }
        self.queue_writes(node, shard, actions.log_writes);
        for plan in actions.fetch {
            let wait = self.read_delay();
            self.schedule.after(wait, Planned::Fetched { node, life, shard, plan });
        }
        if let Some(places) = actions.read_back {
            let wait = self.read_delay();
            self.schedule.after(wait, Planned::ReadBack { node, life, shard, places });
        }
        if let Some(LogTail { applied, from }) = actions.log_tail
            && let Some(running) = &self.nodes[node].running
        {
            running.segments.tail_begins(shard, applied, from);
        }
        if let Some(above) = actions.keep_above
            && let Some(running) = &self.nodes[node].running
        {
            running.segments.retain(shard, above);
        }
        for (reply, answer) in actions.answers {
            self.answer(node, reply, answer);
        }
        if let Some(offer) = actions.snapshot_offered {
            self.on_snapshot_offered(node, shard, offer);
        }
        if actions.resync_dropped {
            self.drop_resync(node, shard);
        }
        if let Some(plan) = actions.install {
            self.plan_install(node, shard, plan);
        }
    }

    fn send_raft(&mut self, from: usize, shard: ShardId, to: ReplicaId, bytes: Bytes) {
        let Some(&node) = self.places.get(&(shard, to)) else { return };
        for wait in self.network.send(from, node).into_iter().flatten() {
            let bytes = bytes.clone();
            self.schedule.after(wait, Planned::Raft { node, shard, to, bytes });
        }
    }

    fn answer(&mut self, node: usize, reply: Reply, answer: Answer) {
        match reply {
            Reply::Open(connection) => self.on_opened(node, connection, answer),
            Reply::Mutation { of, .. } => self.on_mutated(node, of, answer),
            Reply::Barrier(job) => self.on_barrier(node, job, answer),
            Reply::Run(connection) => self.on_ran(node, connection, answer),
            Reply::Member { node } => self.on_member_answer(node, answer),
        }
    }

    /// Puts a letter on its way.
    fn post(&mut self, connection: ConnectionId, to: Side, parcel: Parcel<Letter>) {
        let now = self.schedule.now().0;
        if let Some(wait) = self.network.transmit(connection, to, parcel, now) {
            self.schedule.after(wait, Planned::Arrive { connection, side: to });
        }
    }

    fn on_arrive(&mut self, connection: ConnectionId, side: Side) {
        if self.network.is_refused(connection, side) {
            self.network.leave(connection, side);
            self.on_broken(connection, side.other());
            return;
        }
        if self.network.is_stuck(connection, side, self.schedule.now().0) {
            // It is sent again below, until it gets through.
            let wait: Nanos = 40 * crate::time::MILLISECOND;
            self.schedule.after(wait, Planned::Arrive { connection, side });
            return;
        }
        let Some(parcel) = self.network.take(connection, side) else { return };
        match side {
            Side::Server => self.on_request(connection, parcel),
            Side::Client => self.on_reply(connection, parcel),
        }
    }
}

/// The code of a rejection, to be told.
const fn code(rejection: Rejection) -> u8 {
    rejection as u8
}
