//! What the cluster as a whole has committed, and what that must have come to.
//!
//! Replicas tell what they log and how far it is committed; here it is compared, and applied once
//! more to a model that is too simple to be wrong.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use bytes::Bytes;
use nbd_consensus::{EntryKind, HardState, Role};
use nbd_shard::{LogWrite, ShardReplica};
use nbd_store::command::CreateVolumeBody;
use nbd_store::{CommandHeader, CommandKind, Epoch, Owner, RaftRecovered, SessionId, VolumeId};
use nbd_topology::{LogIndex, ReplicaId, ShardId, Term};

use crate::content;
use crate::failure::Breach;
use crate::history::{self, SECTOR_BYTES, Value};

/// A committed entry.
#[derive(Debug, Clone)]
struct Entry {
    term: Term,
    kind: EntryKind,
    data: Bytes,
}

/// What one replica has in its log, as far as it said so.
#[derive(Debug, Default)]
pub struct Mirror {
    /// Entries by index; those found at a start have no data unless their fate was open.
    entries: BTreeMap<u64, (Term, EntryKind, Option<Bytes>)>,
    /// Compared up to here.
    compared: u64,
    /// The newest hard state that is on stable storage.
    durable_state: HardState,
    /// Entries on stable storage: index and term.
    durable: BTreeMap<u64, Term>,
    /// Appends not yet on stable storage, oldest first.
    under_way: Vec<UnderWay>,
}

/// An append: its number, the hard state and the entries in it.
type UnderWay = (u64, Option<HardState>, Vec<(u64, Term)>);

impl Mirror {
    /// The log of a replica that starts with what its store found.
    #[must_use]
    pub fn of(raft: &RaftRecovered) -> Self {
        let mut mirror = Self { compared: raft.compacted.0.0, ..Self::default() };
        for place in &raft.kept {
            let kind = nbd_shard::raft_kind(place.kind);
            mirror.entries.insert(place.index.0, (place.term, kind, None));
            mirror.durable.insert(place.index.0, place.term);
        }
        for entry in &raft.tail {
            let kind = nbd_shard::raft_kind(entry.kind);
            mirror.entries.insert(entry.index.0, (entry.term, kind, Some(entry.data.clone())));
        }
        mirror.durable_state = HardState {
            term: raft.hard_state.term,
            vote: ReplicaId::new(raft.hard_state.vote),
            commit: raft.hard_state.commit,
        };
        mirror
    }

    /// The replica hands a log write out.
    pub fn write(&mut self, write: &LogWrite) {
        // Copies change nothing.
        let Some(ready) = write.ready else { return };
        if let Some(first) = write.entries.first() {
            self.entries.split_off(&first.index.0);
        }
        let mut places = Vec::new();
        for entry in &write.entries {
            let known = (entry.term, entry.kind, Some(entry.data.clone()));
            self.entries.insert(entry.index.0, known);
            places.push((entry.index.0, entry.term));
        }
        self.under_way.push((ready.0, write.hard_state, places));
    }

    /// Everything up to this log write is on stable storage.
    pub fn persisted(&mut self, ready: u64) {
        while self.under_way.first().is_some_and(|(number, ..)| *number <= ready) {
            let (_, hard_state, places) = self.under_way.remove(0);
            self.durable_state = hard_state.unwrap_or(self.durable_state);
            if let Some((first, _)) = places.first() {
                self.durable.split_off(first);
            }
            self.durable.extend(places);
        }
    }

    /// The replica's log was replaced by a snapshot.
    pub fn installed(&mut self, index: LogIndex) {
        *self = Self { compared: index.0, durable_state: self.durable_state, ..Self::default() };
    }

    /// Compares what a replica finds at its start with what it had on stable storage at its end.
    ///
    /// # Errors
    /// A vote or an entry that was promised is not there.
    pub fn check_kept(&self, found: &RaftRecovered) -> Result<(), Breach> {
        let state = found.hard_state;
        let before = self.durable_state;
        if state.term < before.term
            || (state.term == before.term
                && before.vote.is_some()
                && ReplicaId::new(state.vote) != before.vote)
        {
            return Err(Breach::VoteLost { before, found: state.term });
        }
        let (compacted, _) = found.compacted;
        let last = compacted.0 + found.terms.len() as u64;
        for (&index, &term) in self.durable.range(compacted.0 + 1..) {
            let at = usize::try_from(index - compacted.0 - 1).unwrap_or(usize::MAX);
            // What was being written over it may be there instead.
            let replaced = self
                .under_way
                .iter()
                .any(|(_, _, places)| places.first().is_some_and(|(first, _)| *first <= index));
            if !replaced && (index > last || found.terms.get(at) != Some(&term)) {
                return Err(Breach::EntryLost { index: LogIndex(index), term });
            }
        }
        Ok(())
    }
}

/// A session as the model has it.
#[derive(Debug, Clone)]
struct Session {
    epoch: Epoch,
    volume: VolumeId,
    owner: Owner,
    /// Numbers of its mutations, and whether they were done or refused.
    applied: BTreeMap<u64, bool>,
}

/// Something that befell a volume as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// It became smaller.
    CutOff {
        /// The volume.
        volume: VolumeId,
        /// What it has no more.
        sectors: Range<u64>,
    },
    /// It is gone.
    Deleted(VolumeId),
}

/// What applying every committed entry once comes to.
#[derive(Debug, Default)]
struct Model {
    sessions: BTreeMap<SessionId, Session>,
    /// Numbers of every mutation that had an effect, of sessions that are gone as well.
    effects: BTreeSet<(SessionId, u64)>,
    sectors: BTreeMap<(VolumeId, u64), Value>,
    /// Volumes that there are: their names, and their sizes in sectors.
    volumes: BTreeMap<VolumeId, (String, u64)>,
    /// How many there ever were.
    created: u64,
    /// What nobody was told yet.
    changes: Vec<Change>,
    /// Every mutation whose verdict is that it is done, by the epoch it was sent in.
    done: BTreeSet<(SessionId, Epoch, u64)>,
}

/// One shard.
#[derive(Debug, Default)]
struct Shard {
    committed: Vec<Entry>,
    leaders: BTreeMap<Term, ReplicaId>,
    model: Model,
}

/// All shards.
#[derive(Debug, Default)]
pub struct Ledger {
    shards: BTreeMap<ShardId, Shard>,
}

impl Ledger {
    /// Looks at a replica after a step.
    ///
    /// # Errors
    /// Two leaders of one term, or committed entries that differ.
    pub fn observe<R>(
        &mut self,
        id: ReplicaId,
        replica: &ShardReplica<R>,
        mirror: &mut Mirror,
    ) -> Result<(), Breach> {
        let brief = replica.brief();
        let number = replica.shard();
        let shard = self.shards.entry(number).or_default();
        if brief.role == Role::Leader {
            let leader = *shard.leaders.entry(brief.term).or_insert(id);
            if leader != id {
                return Err(Breach::TwoLeaders { term: brief.term, leaders: [leader, id] });
            }
        }
        while mirror.compared < brief.committed.0 {
            let index = mirror.compared + 1;
            shard.compare(number, id, index, mirror.entries.get(&index))?;
            mirror.compared = index;
        }
        Ok(())
    }

    /// The term of a committed entry.
    #[must_use]
    pub fn term(&self, shard: ShardId, index: LogIndex) -> Term {
        let at = usize::try_from(index.0).ok().and_then(|index| index.checked_sub(1));
        let entries = self.shards.get(&shard).map(|shard| &shard.committed);
        at.zip(entries).and_then(|(at, entries)| entries.get(at)).map_or(Term::ZERO, |e| e.term)
    }

    /// The last committed entry that anybody knows of.
    #[must_use]
    pub fn last(&self, shard: ShardId) -> LogIndex {
        LogIndex(self.shards.get(&shard).map_or(0, |shard| shard.committed.len() as u64))
    }

    /// Whether a mutation has taken effect.
    #[must_use]
    pub fn has_effect(&self, shard: ShardId, session: SessionId, seq: u64) -> bool {
        let shard = self.shards.get(&shard);
        shard.is_some_and(|shard| shard.model.effects.contains(&(session, seq)))
    }

    /// Whether the log says that a mutation sent in this epoch is done.
    #[must_use]
    pub fn is_done(&self, shard: ShardId, session: SessionId, epoch: Epoch, seq: u64) -> bool {
        let shard = self.shards.get(&shard);
        shard.is_some_and(|shard| shard.model.done.contains(&(session, epoch, seq)))
    }

    /// The volumes that there must be once everything committed is applied: their names, and their
    /// sizes in sectors.
    #[must_use]
    pub fn volumes(&self, shard: ShardId) -> BTreeMap<VolumeId, (String, u64)> {
        self.shards.get(&shard).map(|shard| shard.model.volumes.clone()).unwrap_or_default()
    }

    /// What befell volumes since this was asked last.
    pub fn take_changes(&mut self) -> Vec<Change> {
        let models = self.shards.values_mut().map(|shard| &mut shard.model);
        models.flat_map(|model| std::mem::take(&mut model.changes)).collect()
    }

    /// What a volume's sectors must hold once everything committed is applied.
    #[must_use]
    pub fn content(&self, shard: ShardId, volume: VolumeId, sectors: u64) -> Vec<Value> {
        let known = self.shards.get(&shard).map(|shard| &shard.model.sectors);
        let value = |sector| known.and_then(|known| known.get(&(volume, sector)).copied());
        (0..sectors).map(|sector| value(sector).unwrap_or(Value::ZERO)).collect()
    }
}

impl Shard {
    fn compare(
        &mut self,
        number: ShardId,
        id: ReplicaId,
        index: u64,
        entry: Option<&(Term, EntryKind, Option<Bytes>)>,
    ) -> Result<(), Breach> {
        let differ = || Breach::CommittedDiffer { replica: id, index: LogIndex(index) };
        let (term, kind, data) = entry.ok_or_else(differ)?;
        let at = usize::try_from(index - 1).expect("a world is small");
        match self.committed.get(at) {
            Some(known) => {
                let same_data = data.as_ref().is_none_or(|data| *data == known.data);
                if known.term != *term || known.kind != *kind || !same_data {
                    return Err(differ());
                }
            }
            None => {
                let data = data.clone().ok_or_else(differ)?;
                if at != self.committed.len() {
                    return Err(differ());
                }
                if *kind == EntryKind::Command {
                    self.model.apply(number, &data);
                }
                self.committed.push(Entry { term: *term, kind: *kind, data });
            }
        }
        Ok(())
    }
}

impl Model {
    fn apply(&mut self, shard: ShardId, data: &Bytes) {
        for command in nbd_store::decode_all(data) {
            let Ok(command) = command else { return };
            let header = command.header;
            let owner = Owner { node: header.offset, incarnation: header.length };
            match header.kind {
                CommandKind::Write | CommandKind::Trim | CommandKind::WriteZeroes => {
                    self.mutate(&header, &data[command.payload.clone()]);
                }
                CommandKind::OpenSession => self.open(&header, owner),
                CommandKind::CloseSession => {
                    let known = self.sessions.get(&header.session);
                    if known.is_some_and(|session| header.epoch >= session.epoch) {
                        self.sessions.remove(&header.session);
                    }
                }
                CommandKind::EndSessions => self.sessions.retain(|_, session| {
                    let of = session.owner;
                    of.node != owner.node || of.incarnation >= owner.incarnation
                }),
                CommandKind::CreateVolume | CommandKind::NewVolume => {
                    self.create(shard, &header, &data[command.payload.clone()]);
                }
                CommandKind::ResizeVolume => self.resize(&header),
                CommandKind::DeleteVolume => self.delete(&header),
                CommandKind::AddCounter
                | CommandKind::RegisterReplica
                | CommandKind::UpdateVolume
                | CommandKind::CordonNode
                | CommandKind::SetReplacement => {}
            }
        }
    }

    fn open(&mut self, header: &CommandHeader, owner: Owner) {
        if let Some(session) = self.sessions.get_mut(&header.session) {
            let taken = header.epoch == session.epoch && owner != session.owner;
            if header.epoch >= session.epoch && !taken && header.volume == session.volume {
                (session.epoch, session.owner) = (header.epoch, owner);
            }
        } else if header.epoch == Epoch::FIRST && self.volumes.contains_key(&header.volume) {
            let (epoch, volume) = (header.epoch, header.volume);
            let session = Session { epoch, volume, owner, applied: BTreeMap::new() };
            self.sessions.insert(header.session, session);
        }
    }

    /// No world reaches a limit, and none names a key twice.
    fn create(&mut self, shard: ShardId, header: &CommandHeader, body: &[u8]) {
        let Ok(body) = CreateVolumeBody::decode(body) else { return };
        if self.volumes.values().any(|(name, _)| name == body.name) {
            return;
        }
        self.created += 1;
        let id = VolumeId(u64::from(shard.0) << 32 | self.created);
        self.volumes.insert(id, (body.name.to_owned(), header.length / SECTOR_BYTES));
    }

    fn resize(&mut self, header: &CommandHeader) {
        let volume = header.volume;
        let Some((_, size)) = self.volumes.get_mut(&volume) else { return };
        let old = std::mem::replace(size, header.length / SECTOR_BYTES);
        if *size < old {
            let sectors = *size..old;
            for sector in sectors.clone() {
                self.sectors.insert((volume, sector), Value::ZERO);
            }
            self.changes.push(Change::CutOff { volume, sectors });
        }
    }

    fn delete(&mut self, header: &CommandHeader) {
        if self.volumes.remove(&header.volume).is_some() {
            self.sessions.retain(|_, session| session.volume != header.volume);
            self.changes.push(Change::Deleted(header.volume));
        }
    }

    fn mutate(&mut self, header: &CommandHeader, payload: &[u8]) {
        let Some(session) = self.sessions.get_mut(&header.session) else { return };
        if header.epoch != session.epoch || header.volume != session.volume {
            return;
        }
        let before = session.applied.get(&header.seq).copied();
        let size =
            self.volumes.get(&header.volume).map_or(0, |(_, sectors)| sectors * SECTOR_BYTES);
        let is_done = before.unwrap_or(header.offset + header.length <= size);
        session.applied.insert(header.seq, is_done);
        if is_done {
            self.done.insert((header.session, header.epoch, header.seq));
        }
        if before.is_some() || !is_done {
            return;
        }
        self.effects.insert((header.session, header.seq));
        let first = header.offset / SECTOR_BYTES;
        let end = (header.offset + header.length) / SECTOR_BYTES;
        let written = match header.kind {
            CommandKind::Write => content::values(payload, header.volume, first),
            _ => Ok(vec![Value::ZERO; payload.len()]),
        };
        let written = written.unwrap_or_default();
        let range = match header.kind {
            CommandKind::Trim => history::trimmed(&(first..end)),
            _ => first..end,
        };
        for (at, sector) in range.enumerate() {
            let value = written.get(at).copied().unwrap_or(Value::ZERO);
            self.sectors.insert((header.volume, sector), value);
        }
    }
}
