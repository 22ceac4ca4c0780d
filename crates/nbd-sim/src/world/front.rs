//! Front ends: they hold clients' sessions and look for the leader.

use std::collections::BTreeMap;

use bytes::Bytes;
use nbd_session::{Attachment, ClientSession, Piece, Query, QueryId, Verdict};
use nbd_store::{
    Epoch, Outcome, Owner, Rejection, SessionId, encode_close_session, encode_create_volume,
    encode_end_sessions,
};
use nbd_topology::ShardId;
use rand::Rng;

use super::server::rejection;
use super::{Letter, Planned, Refusal, World};
use crate::failure::Breach;
use crate::history::{OperationId, SECTOR_BYTES};
use crate::network::{ConnectionId, Host, Parcel, Side};
use crate::random::Draw;
use crate::time::{MILLISECOND, Nanos, SimTime};

/// How long an attempt to attach may take.
const ATTACH_TIMEOUT: Nanos = 400 * MILLISECOND;

/// How often a front end looks whether its attachment still answers.
const WATCH_INTERVAL: Nanos = 150 * MILLISECOND;

/// How long an attachment with something pending may be silent.
const SILENCE_MAX: Nanos = 500 * MILLISECOND;

/// How long a single command may take.
const CHORE_TIMEOUT: Nanos = 300 * MILLISECOND;

/// A front end.
#[derive(Debug)]
pub(super) struct Front {
    pub(super) host: Host,
    pub(super) life: u32,
    pub(super) up: bool,
    /// Where it last found the leader of each shard.
    guess: Vec<Host>,
    pub(super) chores: BTreeMap<u64, Chore>,
}

/// A command that belongs to no session's attachment.
#[derive(Debug)]
pub(super) struct Chore {
    shard: ShardId,
    command: Bytes,
    purpose: Purpose,
    connection: Option<ConnectionId>,
    /// Rises with each try that is planned: earlier ones are void.
    attempt: u32,
}

#[derive(Debug)]
pub(super) enum Purpose {
    CreateVolume(usize),
    /// It grows again afterwards.
    Shrink(usize),
    Grow(usize),
    /// Another one takes its place.
    DeleteVolume(usize),
    EndSessions,
    /// With its end, these cannot take effect any more.
    CloseSession(Vec<OperationId>),
}

/// A client's session at its front end.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) session: ClientSession<OperationId>,
    connection: Option<ConnectionId>,
    /// It was attached at least once.
    pub(super) opened: bool,
    /// When it last heard from its attachment.
    heard: SimTime,
    /// What is here of reads that are not answered yet.
    gathered: BTreeMap<OperationId, Vec<u8>>,
    /// Connections given up, and the epochs of their attachments. Only a front end that breaks the
    /// rule cares about them.
    given_up: Vec<(ConnectionId, Epoch)>,
}

impl World {
    pub(super) fn make_fronts(&mut self) {
        let hosts = self.profile.nodes + self.profile.balancers;
        for host in 0..hosts {
            let guess = vec![0; self.profile.shards as usize];
            let chores = BTreeMap::new();
            self.fronts.push(Front { host, life: 1, up: true, guess, chores });
        }
        for volume in 0..self.volumes.len() {
            let at = &self.volumes[volume];
            let size = self.profile.sectors * SECTOR_BYTES;
            let Ok(command) = encode_create_volume(&at.name, size, "") else {
                unreachable!("the names of the world's volumes are short")
            };
            let (shard, front) = (at.shard, self.profile.nodes);
            self.add_chore(front, shard, command, Purpose::CreateVolume(volume));
        }
    }

    fn owner(&self, front: usize) -> Owner {
        Owner { node: 1_000 + front as u64, incarnation: u64::from(self.fronts[front].life) }
    }

    /// Begins a session for a client, at its front end.
    pub(super) fn begin_session(&mut self, client: usize) {
        let id = SessionId(self.workload.rng.random());
        let session = ClientSession::new(id).with_fault(self.plant.session());
        let heard = self.schedule.now();
        let link = Link {
            session,
            connection: None,
            opened: false,
            heard,
            gathered: BTreeMap::new(),
            given_up: Vec::new(),
        };
        let at = &mut self.clients[client];
        at.generation += 1;
        at.link = Some(link);
        let generation = at.generation;
        self.schedule.after(0, Planned::Attach { client, generation });
        self.schedule.after(WATCH_INTERVAL, Planned::Watch { client, generation });
    }

    fn is_current(&self, client: usize, generation: u32) -> bool {
        let at = &self.clients[client];
        at.generation == generation && at.link.is_some()
    }

    pub(super) fn on_attach(&mut self, client: usize, generation: u32) {
        if !self.is_current(client, generation) {
            return;
        }
        let (front, volume) = (self.clients[client].front, self.clients[client].volume);
        let (shard, id) = (self.volumes[volume].shard, self.volumes[volume].id);
        let Some(volume) = id else {
            self.schedule.after(5 * MILLISECOND, Planned::Attach { client, generation });
            return;
        };
        self.hang_up(client);
        let (owner, host) = (self.owner(front), self.fronts[front].host);
        let target = self.fronts[front].guess[shard.0 as usize];
        let connection = self.network.open(host, target);
        let Some(link) = &mut self.clients[client].link else { return };
        let epoch = link.session.begin_attach();
        link.connection = Some(connection);
        let session = link.session.id();
        let hello = Letter::Hello { shard, session, epoch, volume, owner };
        self.post(connection, Side::Server, Parcel::Message(hello));
        let timeout = Planned::AttachTimeout { client, generation, epoch };
        self.schedule.after(ATTACH_TIMEOUT, timeout);
    }

    /// Gives up a client's connection to the leader.
    pub(super) fn hang_up(&mut self, client: usize) {
        let forwards = self.plant.forwards_stale_replies();
        let Some(link) = &mut self.clients[client].link else { return };
        let Some(connection) = link.connection.take() else { return };
        if forwards {
            link.given_up.push((connection, link.session.epoch()));
        }
        self.post(connection, Side::Server, Parcel::Closed);
        if self.rng.chance(300_000) {
            // What is still on its way comes late, when the session may be attached anew.
            let wait = self.rng.span(10 * MILLISECOND, 400 * MILLISECOND);
            self.network.hold(connection, self.schedule.now().0 + wait);
        }
        if !forwards {
            self.network.leave(connection, Side::Client);
        }
    }

    /// Tries again to attach, soon.
    fn attach_again(&mut self, client: usize, hint: Option<Host>) {
        let at = &self.clients[client];
        let (front, generation) = (at.front, at.generation);
        let shard = self.volumes[at.volume].shard;
        let nodes = self.nodes.len();
        let guess = &mut self.fronts[front].guess[shard.0 as usize];
        *guess = hint.unwrap_or_else(|| self.rng.random_range(0..nodes));
        let wait = self.rng.span(MILLISECOND, 20 * MILLISECOND);
        self.schedule.after(wait, Planned::Attach { client, generation });
    }

    pub(super) fn on_attach_timeout(&mut self, client: usize, generation: u32, epoch: Epoch) {
        if !self.is_current(client, generation) {
            return;
        }
        let Some(link) = &mut self.clients[client].link else { return };
        if link.session.attachment() == Attachment::Attaching(epoch) {
            link.session.attach_failed(epoch, None);
            self.attach_again(client, None);
        }
    }

    /// Gives up an attachment that owes answers and is silent.
    pub(super) fn on_watch(&mut self, client: usize, generation: u32) {
        if !self.is_current(client, generation) {
            return;
        }
        let now = self.schedule.now();
        let Some(link) = &mut self.clients[client].link else { return };
        let silent = now.0 - link.heard.0 > SILENCE_MAX && !link.session.is_idle();
        if let Attachment::Attached(epoch) = link.session.attachment()
            && silent
        {
            link.session.detached(epoch);
            self.attach_again(client, None);
        }
        self.schedule.after(WATCH_INTERVAL, Planned::Watch { client, generation });
    }

    /// A connection between two hosts broke, for whatever reason.
    pub(super) fn on_broken(&mut self, connection: ConnectionId, side: Side) {
        match side {
            Side::Client => self.on_reply(connection, Parcel::Closed),
            Side::Server => self.on_request(connection, Parcel::Closed),
        }
    }

    pub(super) fn on_reply(&mut self, connection: ConnectionId, parcel: Parcel<Letter>) {
        let holds = |link: &Link| link.connection == Some(connection);
        let found = (0..self.clients.len())
            .find(|client| self.clients[*client].link.as_ref().is_some_and(holds));
        match found {
            Some(client) => self.on_attachment_reply(client, parcel),
            None => self.on_other_reply(connection, parcel),
        }
    }

    fn on_attachment_reply(&mut self, client: usize, parcel: Parcel<Letter>) {
        let now = self.schedule.now();
        let Some(link) = &mut self.clients[client].link else { return };
        let epoch = link.session.epoch();
        link.heard = now;
        match parcel {
            Parcel::Closed => {
                link.session.detached(epoch);
                link.session.attach_failed(epoch, None);
                if link.session.attachment() == Attachment::Detached {
                    self.hang_up(client);
                    self.attach_again(client, None);
                }
            }
            Parcel::Message(Letter::Attached) => self.on_attached(client, epoch),
            Parcel::Message(Letter::Refused(refusal)) => self.on_refused(client, epoch, refusal),
            Parcel::Message(letter) => self.on_session_answer(client, epoch, letter),
        }
    }

    fn on_attached(&mut self, client: usize, epoch: Epoch) {
        let Some(link) = &mut self.clients[client].link else { return };
        let Some(resend) = link.session.attached(epoch) else { return };
        let first = !std::mem::replace(&mut link.opened, true);
        let (resent, continued) = (resend.mutations.len() as u64, resend.continued as u64);
        *self.tally.entry("mutations sent again").or_default() += resent;
        *self.tally.entry("reads continued").or_default() += continued;
        let Some(connection) = link.connection else { return };
        self.count("sessions attached");
        for (seq, command) in resend.mutations {
            let letter = Letter::Mutation { seq, command };
            self.post(connection, Side::Server, Parcel::Message(letter));
        }
        for (id, query) in resend.queries {
            self.post(connection, Side::Server, Parcel::Message(Letter::Query { id, query }));
        }
        if first {
            let generation = self.clients[client].generation;
            self.schedule.after(0, Planned::Think { client, generation });
        }
    }

    fn on_refused(&mut self, client: usize, epoch: Epoch, refusal: Refusal) {
        let gone = Refusal::Rejected(Rejection::UnknownVolume as u8);
        if refusal == gone && self.is_on_deleted(client) {
            self.leave_deleted(client);
            return;
        }
        let Some(link) = &mut self.clients[client].link else { return };
        let (verdict, hint) = match refusal {
            Refusal::NotLeader(hint) => (None, hint),
            Refusal::Lost => (None, None),
            Refusal::Rejected(code) => (Some(rejection(code)), None),
        };
        if link.session.attach_failed(epoch, verdict) {
            self.on_gone(client);
        } else {
            self.hang_up(client);
            self.attach_again(client, hint);
        }
    }

    /// The log does not know the session. If it never did, nothing was sent and another takes its
    /// place; else somebody ended it who must not.
    fn on_gone(&mut self, client: usize) {
        if self.is_on_deleted(client) {
            self.leave_deleted(client);
            return;
        }
        self.hang_up(client);
        let link = self.clients[client].link.take();
        if link.is_some_and(|link| link.opened) {
            self.fail(Breach::SessionLost(u32::try_from(client).unwrap_or_default()));
            return;
        }
        self.begin_session(client);
    }

    fn on_session_answer(&mut self, client: usize, epoch: Epoch, letter: Letter) {
        let Some(link) = &mut self.clients[client].link else { return };
        match letter {
            Letter::Answer { seq, outcome } => {
                let id = link.session.id();
                match link.session.mutation_answered(epoch, seq, outcome) {
                    Verdict::Answered(operation, outcome) => {
                        self.on_mutation_done(client, operation, (id, seq), &outcome);
                    }
                    Verdict::Detached => {
                        self.hang_up(client);
                        self.attach_again(client, None);
                    }
                    Verdict::Gone => self.on_gone(client),
                    Verdict::Ignored => {}
                }
            }
            Letter::NoSpace { seq } => {
                if let Some(operation) = link.session.mutation_refused(epoch, seq) {
                    self.on_operation_failed(client, operation);
                }
            }
            Letter::Found { id, bytes: Some(bytes) } => self.on_piece(client, epoch, id, &bytes),
            Letter::Found { id, bytes: None } => {
                if let Some((operation, _)) = link.session.query_answered(epoch, id) {
                    link.gathered.remove(&operation);
                    self.on_read_answer(client, operation, None);
                }
            }
            _ => {}
        }
    }

    fn on_piece(&mut self, client: usize, epoch: Epoch, id: QueryId, bytes: &Bytes) {
        let Some(link) = &mut self.clients[client].link else { return };
        let len = bytes.len() as u64;
        let (at, operation, is_last) = match link.session.read_piece(epoch, id, len) {
            Piece::Ignored => return,
            Piece::Detached => {
                self.hang_up(client);
                self.attach_again(client, None);
                return;
            }
            Piece::Part { at, token } => (at, *token, false),
            Piece::Last { at, token } => (at, token, true),
        };
        let gathered = link.gathered.entry(operation).or_default();
        assert_eq!(gathered.len() as u64, at, "a piece in another place than the next");
        gathered.extend_from_slice(bytes);
        if is_last {
            let whole = link.gathered.remove(&operation).unwrap_or_default();
            self.on_read_answer(client, operation, Some(whole.into()));
        }
    }

    /// Sends what the session takes at once.
    pub(super) fn send_mutation(&mut self, client: usize, seq: u64, command: Bytes) {
        let link = self.clients[client].link.as_ref();
        if let Some(connection) = link.and_then(|link| link.connection) {
            let letter = Letter::Mutation { seq, command };
            self.post(connection, Side::Server, Parcel::Message(letter));
        }
    }

    /// As [`Self::send_mutation`].
    pub(super) fn send_query(&mut self, client: usize, id: QueryId, query: Query) {
        let link = self.clients[client].link.as_ref();
        if let Some(connection) = link.and_then(|link| link.connection) {
            self.post(connection, Side::Server, Parcel::Message(Letter::Query { id, query }));
        }
    }

    /// A client's connection to its front end is gone: the front end ends the session.
    pub(super) fn drop_client(&mut self, client: usize, front_lives: bool) {
        self.hang_up(client);
        let at = &mut self.clients[client];
        at.generation += 1;
        at.outstanding.clear();
        let Some(mut link) = at.link.take() else { return };
        let (front, shard) = (at.front, self.volumes[at.volume].shard);
        let (id, epoch) = (link.session.id(), link.session.epoch());
        let pending = link.session.abandon();
        if front_lives && link.opened {
            let command = encode_close_session(id, epoch);
            self.add_chore(front, shard, command, Purpose::CloseSession(pending));
        } else {
            let life = self.fronts[front].life;
            self.unfenced.extend(pending.into_iter().map(|id| (front, life, shard, id)));
        }
    }

    pub(super) fn add_chore(
        &mut self,
        front: usize,
        shard: ShardId,
        command: Bytes,
        purpose: Purpose,
    ) {
        let id = self.workload.number();
        let chore = Chore { shard, command, purpose, connection: None, attempt: 0 };
        self.fronts[front].chores.insert(id, chore);
        self.plan_chore(front, id, 0);
    }

    /// Plans the next try, in place of any planned before.
    fn plan_chore(&mut self, front: usize, id: u64, wait: Nanos) {
        let at = &mut self.fronts[front];
        let (life, Some(chore)) = (at.life, at.chores.get_mut(&id)) else { return };
        chore.attempt += 1;
        let attempt = chore.attempt;
        self.schedule.after(wait, Planned::Chore { front, life, chore: id, attempt });
    }

    /// Sends a chore's command, again if it was sent before.
    pub(super) fn on_chore(&mut self, front: usize, life: u32, id: u64, attempt: u32) {
        if self.fronts[front].life != life {
            return;
        }
        let at = &self.fronts[front];
        let (host, guess) = (at.host, &at.guess);
        let Some(chore) = at.chores.get(&id).filter(|chore| chore.attempt == attempt) else {
            return;
        };
        let (shard, command) = (chore.shard, chore.command.clone());
        let target = guess[shard.0 as usize];
        self.forget_chore_connection(front, id);
        let connection = self.network.open(host, target);
        if let Some(chore) = self.fronts[front].chores.get_mut(&id) {
            chore.connection = Some(connection);
        }
        let letter = Letter::Run { shard, command };
        self.post(connection, Side::Server, Parcel::Message(letter));
        self.plan_chore(front, id, CHORE_TIMEOUT);
        // Should it time out, somebody else is asked.
        let other = self.rng.random_range(0..self.nodes.len());
        self.fronts[front].guess[shard.0 as usize] = other;
    }

    fn forget_chore_connection(&mut self, front: usize, id: u64) {
        let chore = self.fronts[front].chores.get_mut(&id);
        if let Some(connection) = chore.and_then(|chore| chore.connection.take()) {
            self.post(connection, Side::Server, Parcel::Closed);
            self.network.leave(connection, Side::Client);
        }
    }

    /// An answer to a chore, or to an attachment that was given up.
    fn on_other_reply(&mut self, connection: ConnectionId, parcel: Parcel<Letter>) {
        let found = self.fronts.iter().enumerate().find_map(|(front, at)| {
            let mine = |chore: &Chore| chore.connection == Some(connection);
            at.chores.iter().find(|(_, chore)| mine(chore)).map(|(id, _)| (front, *id))
        });
        let Some((front, id)) = found else {
            self.on_stale_reply(connection, parcel);
            return;
        };
        match parcel {
            Parcel::Message(Letter::Ran(outcome)) => {
                self.forget_chore_connection(front, id);
                let host = self.network.host(connection, Side::Server);
                let Some(chore) = self.fronts[front].chores.remove(&id) else { return };
                if let Some(host) = host {
                    self.fronts[front].guess[chore.shard.0 as usize] = host;
                }
                self.on_chore_done(front, chore, outcome);
            }
            Parcel::Message(Letter::Refused(Refusal::NotLeader(Some(hint)))) => {
                let shard = self.fronts[front].chores[&id].shard;
                self.fronts[front].guess[shard.0 as usize] = hint;
                self.plan_chore_again(front, id);
            }
            _ => self.plan_chore_again(front, id),
        }
    }

    fn plan_chore_again(&mut self, front: usize, id: u64) {
        self.forget_chore_connection(front, id);
        let wait = self.rng.span(MILLISECOND, 50 * MILLISECOND);
        self.plan_chore(front, id, wait);
    }

    fn on_chore_done(&mut self, front: usize, chore: Chore, outcome: Outcome) {
        match (chore.purpose, outcome) {
            (
                Purpose::CreateVolume(volume),
                Outcome::VolumeCreated(info)
                | Outcome::VolumeExists(info)
                | Outcome::VolumeRepeated(info),
            ) => {
                let at = &mut self.volumes[volume];
                (at.id, at.busy) = (Some(info.id), false);
            }
            (Purpose::Shrink(volume), Outcome::VolumeChanged(_)) => self.grow(volume),
            (Purpose::Grow(volume), Outcome::VolumeChanged(_)) => self.volumes[volume].busy = false,
            (
                Purpose::DeleteVolume(volume),
                Outcome::VolumeDeleted { .. } | Outcome::Rejected(Rejection::UnknownVolume),
            ) => self.create_successor(volume),
            (
                Purpose::CloseSession(operations),
                Outcome::SessionClosed | Outcome::Rejected(Rejection::UnknownSession),
            ) => {
                for operation in operations {
                    self.history.fence(operation);
                }
            }
            (Purpose::EndSessions, Outcome::SessionsEnded(count)) => {
                *self.tally.entry("sessions ended by another life").or_default() +=
                    u64::from(count);
                let life = self.fronts[front].life;
                let ended = |of: &(usize, u32, ShardId, OperationId)| {
                    of.0 == front && of.1 < life && of.2 == chore.shard
                };
                for (.., operation) in self.unfenced.extract_if(.., |of| ended(of)) {
                    self.history.fence(operation);
                }
            }
            (purpose, outcome) => {
                let what = format!("{purpose:?} came to {outcome:?}");
                self.fail(Breach::Panicked(what));
            }
        }
    }

    /// A front end that has given up a connection takes nothing more from it. One that breaks that
    /// rule hands answers on to the session they are for.
    fn on_stale_reply(&mut self, connection: ConnectionId, parcel: Parcel<Letter>) {
        if !self.plant.forwards_stale_replies() {
            return;
        }
        let Parcel::Message(letter @ (Letter::Answer { .. } | Letter::Found { .. })) = parcel
        else {
            return;
        };
        let found = self.clients.iter().enumerate().find_map(|(client, at)| {
            let given_up = &at.link.as_ref()?.given_up;
            let (_, epoch) = given_up.iter().find(|(id, _)| *id == connection)?;
            Some((client, *epoch))
        });
        if let Some((client, epoch)) = found {
            self.on_session_answer(client, epoch, letter);
        }
    }

    /// A node's front end comes up with it.
    pub(super) fn front_of_node_comes_up(&mut self, n: usize) {
        if self.fronts.len() > n && !self.fronts[n].up {
            self.on_front_up(n);
        }
    }

    pub(super) fn front_of_node_dies(&mut self, n: usize) {
        self.kill_front(n);
    }

    /// A front end dies with its clients' connections.
    pub(super) fn kill_front(&mut self, front: usize) {
        let Some(at) = self.fronts.get(front) else { return };
        if !at.up {
            return;
        }
        for client in 0..self.clients.len() {
            if self.clients[client].front == front && self.clients[client].link.is_some() {
                self.drop_client(client, false);
                self.plan_reconnect(client);
            }
        }
        let ids: Vec<u64> = self.fronts[front].chores.keys().copied().collect();
        let life = self.fronts[front].life;
        for id in ids {
            self.forget_chore_connection(front, id);
            let purpose = &self.fronts[front].chores[&id].purpose;
            if !matches!(purpose, Purpose::EndSessions | Purpose::CloseSession(_)) {
                continue;
            }
            let Some(chore) = self.fronts[front].chores.remove(&id) else { continue };
            if let Purpose::CloseSession(operations) = chore.purpose {
                let lost = operations.into_iter().map(|id| (front, life, chore.shard, id));
                self.unfenced.extend(lost);
            }
        }
        let at = &mut self.fronts[front];
        at.up = false;
        at.life += 1;
    }

    /// A front end comes up in a new life, and ends the sessions of earlier ones.
    pub(super) fn on_front_up(&mut self, front: usize) {
        if self.fronts[front].up {
            return;
        }
        self.fronts[front].up = true;
        let owner = self.owner(front);
        let chores: Vec<u64> = self.fronts[front].chores.keys().copied().collect();
        for chore in chores {
            self.plan_chore(front, chore, 0);
        }
        for shard in 0..self.profile.shards {
            let command = encode_end_sessions(owner);
            self.add_chore(front, ShardId(shard), command, Purpose::EndSessions);
        }
    }
}
