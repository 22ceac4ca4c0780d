//! What a node does for front ends: attachments, mutations, reads.

use std::ops::Range;

use bytes::{Bytes, BytesMut};
use nbd_consensus::Role;
use nbd_session::{Query, QueryId};
use nbd_shard::{Answer, Event};
use nbd_store::{
    Admission, AdmissionKind, CommandKind, Epoch, Outcome, Owner, ReadError, Rejection, SessionId,
    SpaceGrant, VolumeId, encode_open_session,
};
use nbd_topology::{ReplicaId, ShardId};

use super::{Letter, MutationKey, Planned, ReadJob, Refusal, Reply, World, code};
use crate::failure::Breach;
use crate::history::SECTOR_BYTES;
use crate::network::{ConnectionId, Parcel, Side};

/// A session's connection to this node.
#[derive(Debug)]
pub(super) struct Attachment {
    shard: ShardId,
    volume: VolumeId,
    session: SessionId,
    epoch: Epoch,
    /// The log has opened it.
    open: bool,
}

impl World {
    pub(super) fn on_request(&mut self, connection: ConnectionId, parcel: Parcel<Letter>) {
        let Some(n) = self.network.host(connection, Side::Server) else { return };
        if self.nodes.get(n).is_none_or(|node| node.running.is_none()) {
            // Nobody listens on that port.
            self.close_server_side(n, connection);
            return;
        }
        let letter = match parcel {
            Parcel::Message(letter) => letter,
            Parcel::Closed => {
                self.close_server_side(n, connection);
                return;
            }
        };
        match letter {
            Letter::Hello { shard, session, epoch, volume, owner } => {
                self.on_hello(n, connection, shard, (session, epoch), volume, owner);
            }
            Letter::Mutation { seq, command } => self.on_mutation(n, connection, seq, command),
            Letter::Query { id, query } => self.on_query(n, connection, id, query),
            Letter::Run { shard, command } => {
                self.propose(n, shard, command, Reply::Run(connection));
            }
            _ => unreachable!("front ends do not answer"),
        }
    }

    pub(super) fn close_server_side(&mut self, n: usize, connection: ConnectionId) {
        if let Some(running) = self.nodes.get_mut(n).and_then(|node| node.running.as_mut()) {
            running.attachments.remove(&connection);
        }
        self.post(connection, Side::Client, Parcel::Closed);
        self.network.leave(connection, Side::Server);
    }

    fn on_hello(
        &mut self,
        n: usize,
        connection: ConnectionId,
        shard: ShardId,
        (session, epoch): (SessionId, Epoch),
        volume: VolumeId,
        owner: Owner,
    ) {
        let Some(running) = &mut self.nodes[n].running else { return };
        let attachment = Attachment { shard, volume, session, epoch, open: false };
        running.attachments.insert(connection, attachment);
        let command = encode_open_session(session, epoch, volume, owner);
        if running.groups.contains_key(&shard) {
            self.propose(n, shard, command, Reply::Open(connection));
        } else {
            self.refuse(n, connection, Refusal::NotLeader(None));
        }
    }

    pub(super) fn on_opened(&mut self, n: usize, connection: ConnectionId, answer: Answer) {
        match answer {
            Answer::Outcome(Outcome::SessionOpened) => {
                let running = self.nodes[n].running.as_mut();
                let Some(attachment) = running.and_then(|r| r.attachments.get_mut(&connection))
                else {
                    return;
                };
                attachment.open = true;
                self.post(connection, Side::Client, Parcel::Message(Letter::Attached));
            }
            Answer::Outcome(Outcome::Rejected(rejection)) => {
                self.refuse(n, connection, Refusal::Rejected(code(rejection)));
            }
            Answer::NotLeader(leader) => self.refuse_not_leading(n, connection, leader),
            _ => self.refuse(n, connection, Refusal::Lost),
        }
    }

    fn refuse_not_leading(
        &mut self,
        n: usize,
        connection: ConnectionId,
        leader: Option<ReplicaId>,
    ) {
        let running = self.nodes[n].running.as_ref();
        let shard = running.and_then(|r| r.attachments.get(&connection)).map(|a| a.shard);
        // Of an attachment that is not there any more, the shard does not matter.
        let shard = shard.unwrap_or(ShardId(0));
        let host = leader.and_then(|id| self.places.get(&(shard, id)).copied());
        self.refuse(n, connection, Refusal::NotLeader(host));
    }

    fn refuse(&mut self, n: usize, connection: ConnectionId, refusal: Refusal) {
        self.post(connection, Side::Client, Parcel::Message(Letter::Refused(refusal)));
        self.close_server_side(n, connection);
    }

    fn on_mutation(&mut self, n: usize, connection: ConnectionId, seq: u64, command: Bytes) {
        let Some(running) = &self.nodes[n].running else { return };
        let Some(attachment) = running.attachments.get(&connection) else { return };
        if !attachment.open {
            return;
        }
        let Attachment { shard, session, epoch, .. } = *attachment;
        match self.admit(n, shard, &command) {
            Some(grant) => {
                let of = MutationKey { connection, shard, session, epoch, seq };
                let reply = Reply::Mutation { of, _grant: Some(grant) };
                self.propose(n, shard, command, reply);
            }
            None => {
                self.post(connection, Side::Client, Parcel::Message(Letter::NoSpace { seq }));
            }
        }
    }

    /// Looks for room for a mutation.
    fn admit(&mut self, n: usize, shard: ShardId, command: &Bytes) -> Option<SpaceGrant> {
        let Some(Ok(decoded)) = nbd_store::decode_all(command).next() else {
            unreachable!("front ends send commands")
        };
        let header = decoded.header;
        let kind = match header.kind {
            CommandKind::Write => AdmissionKind::Write,
            CommandKind::WriteZeroes => AdmissionKind::WriteZeroes { no_hole: header.no_hole },
            _ => AdmissionKind::Trim,
        };
        for is_last in [false, true] {
            let running = self.nodes[n].running.as_ref()?;
            let reader = running.groups.get(&shard)?.reader.clone();
            match reader.admit(header.volume, header.offset, header.length, kind) {
                Ok(Admission::Granted(grant)) => return Some(grant),
                Ok(Admission::NeedCheckpoint) if !is_last => self.checkpoint(n),
                Ok(_) | Err(_) => return None,
            }
        }
        None
    }

    pub(super) fn on_mutated(&mut self, n: usize, of: MutationKey, answer: Answer) {
        let MutationKey { connection, shard, session, epoch, seq } = of;
        if answer == Answer::Outcome(Outcome::Done)
            && !self.ledger.is_done(shard, session, epoch, seq)
        {
            self.fail(Breach::WrongVerdict { session, epoch, seq });
            return;
        }
        match answer {
            Answer::Outcome(outcome) => {
                let letter = Letter::Answer { seq, outcome };
                self.post(connection, Side::Client, Parcel::Message(letter));
            }
            // Whatever else it has under way has the same fate.
            _ => self.close_server_side(n, connection),
        }
    }

    fn on_query(&mut self, n: usize, connection: ConnectionId, id: QueryId, query: Query) {
        let Query::Read { offset, len, .. } = query else { return };
        self.read_piece(n, connection, id, offset..offset + len);
    }

    /// Begins the first piece of a read, or of what is left of it.
    fn read_piece(&mut self, n: usize, connection: ConnectionId, id: QueryId, rest: Range<u64>) {
        let Some(running) = &self.nodes[n].running else { return };
        let Some(attachment) = running.attachments.get(&connection) else { return };
        if !attachment.open {
            return;
        }
        let (shard, volume) = (attachment.shard, attachment.volume);
        let Some(group) = running.groups.get(&shard) else { return };
        let Range { start: offset, end } = rest;
        let piece = self.profile.piece_sectors * SECTOR_BYTES;
        let len = (piece - offset % piece).min(end - offset);
        let job = ReadJob { connection, id, shard, volume, offset, len, end, leased: true };
        // The time of the last tick will do: the lease is looked at again at the end.
        if group.replica.read_lease().is_some_and(|until| running.coarse < until) {
            self.count("reads under a lease");
            self.begin_read(n, job);
        } else {
            self.count("reads behind a barrier");
            let job = ReadJob { leased: false, ..job };
            self.step(n, shard, Event::Barrier(Reply::Barrier(job)));
        }
    }

    fn begin_read(&mut self, n: usize, job: ReadJob) {
        let (life, wait) = (self.nodes[n].life, self.read_delay());
        self.schedule.after(wait, Planned::Read { node: n, life, job });
    }

    pub(super) fn on_barrier(&mut self, n: usize, job: ReadJob, answer: Answer) {
        match answer {
            Answer::Ready => self.begin_read(n, job),
            _ => self.close_server_side(n, job.connection),
        }
    }

    pub(super) fn on_read(&mut self, n: usize, life: u32, job: ReadJob) {
        if self.nodes[n].life != life {
            return;
        }
        let Some(running) = &self.nodes[n].running else { return };
        let Some(group) = running.groups.get(&job.shard) else { return };
        let mut buffer = BytesMut::zeroed(usize::try_from(job.len).unwrap_or_default());
        let reader = group.reader.clone();
        let read = reader.resolve(job.volume, job.offset, job.len);
        let bytes = match read.and_then(|mut plan| plan.read_blocking(&mut buffer)) {
            Ok(()) => Some(buffer.freeze()),
            Err(error @ ReadError::Corrupt { volume, block, .. }) => {
                self.note_damage(n, &error);
                self.count("damaged blocks met");
                self.repair_block(n, job.shard, volume, block);
                None
            }
            Err(_) => None,
        };
        let wait = self.read_delay();
        self.schedule.after(wait, Planned::ReadDone { node: n, life, job, bytes });
    }

    pub(super) fn on_read_done(&mut self, n: usize, life: u32, job: ReadJob, bytes: Option<Bytes>) {
        if self.nodes[n].life != life {
            return;
        }
        let now = self.schedule.now();
        let local = self.nodes[n].clock.read(now);
        let Some(running) = &self.nodes[n].running else { return };
        let Some(group) = running.groups.get(&job.shard) else { return };
        let lease = group.replica.read_lease();
        let holds = lease.is_some_and(|until| local < until.0) || self.plant.skips_second_look();
        if job.leased && !holds {
            self.count("leases lost during a read");
            let shard = job.shard;
            let job = ReadJob { leased: false, ..job };
            self.step(n, shard, Event::Barrier(Reply::Barrier(job)));
            return;
        }
        let ReadJob { connection, id, offset, len, end, .. } = job;
        let rest = offset + len..end;
        let more = bytes.is_some() && !rest.is_empty();
        self.post(connection, Side::Client, Parcel::Message(Letter::Found { id, bytes }));
        if more {
            self.read_piece(n, connection, id, rest);
        }
    }

    pub(super) fn on_ran(&mut self, n: usize, connection: ConnectionId, answer: Answer) {
        let letter = match answer {
            Answer::Outcome(outcome) => Letter::Ran(outcome),
            Answer::NotLeader(leader) => {
                let places = &self.places;
                // One-shot connections do not tell their shard; any shard's answer is a hint.
                let host = leader.and_then(|id| {
                    places.iter().find(|((_, of), _)| *of == id).map(|(_, node)| *node)
                });
                Letter::Refused(Refusal::NotLeader(host))
            }
            _ => Letter::Refused(Refusal::Lost),
        };
        self.post(connection, Side::Client, Parcel::Message(letter));
        self.close_server_side(n, connection);
    }

    /// The node that leads a shard and serves, if any does. An older leader may not know yet that
    /// it was deposed.
    pub(super) fn leader_of(&self, shard: ShardId) -> Option<usize> {
        let leads = |n: &usize| {
            let running = self.nodes[*n].running.as_ref()?;
            let brief = running.groups.get(&shard)?.replica.brief();
            (brief.role == Role::Leader && brief.serving).then_some(brief.term)
        };
        (0..self.nodes.len()).filter(|n| leads(n).is_some()).max_by_key(leads)
    }
}

/// The rejection with this code, for a report.
pub(super) const fn rejection(code: u8) -> Rejection {
    match Rejection::from_u8(code) {
        Some(rejection) => rejection,
        None => Rejection::BadCommand,
    }
}
