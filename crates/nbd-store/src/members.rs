//! The replicas of a shard: who they are, where they are reached, and who of them is a member.
//!
//! Record in the metadata database, little-endian, sealed as in `chunk::record`; snapshots
//! carry the same body:
//!
//! ```text
//! 0                 8            12             16              20
//! +-----------------+------------+--------------+---------------+
//! | next replica u64| voters u32 | learners u32 | replicas u32  | ...
//! +-----------------+------------+--------------+---------------+
//! 20: voters x u64, learners x u64, then each replica:
//! +--------+----------------+----------------+-----------+-----------+-----------+-----------+
//! | id u64 | directory u128 | lengths 4 x u16| node name | NBD addr. | gRPC addr.| HTTP addr.|
//! +--------+----------------+----------------+-----------+-----------+-----------+-----------+
//! then, unless both are none: cordoned u32, replacements u32,
//!     each cordoned node: | length u16 | name |   each replacement: | old u64 | new u64 |
//! ```

use std::collections::{BTreeMap, BTreeSet};

use nbd_topology::{Membership, MembershipChange, NodeName, ReplicaId};

use crate::limits::{ADDRESS_BYTES_MAX, CORDONED_MAX, REPLICAS_KNOWN_MAX};
use crate::outcome::Rejection;

/// Where a replica's node is reached, as `host:port` each; empty where it is not.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ReplicaAddresses {
    /// NBD clients and load balancers.
    pub nbd: String,
    /// Other nodes.
    pub grpc: String,
    /// Health and metrics.
    pub http: String,
}

/// A replica that asks to be known: everything of [`ReplicaInfo`] but the id, which applying the
/// command gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplicaRegistration {
    /// Its node.
    pub node: NodeName,
    /// Its data directory, see [`crate::Identity::directory`].
    pub directory: u128,
    /// Where it is reached.
    pub addresses: ReplicaAddresses,
}

/// A replica that is or was about to be a member of a shard's group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplicaInfo {
    /// Its id in this shard.
    pub id: ReplicaId,
    /// Its node.
    pub node: NodeName,
    /// Its data directory: a node whose disk was wiped is another replica.
    pub directory: u128,
    /// Where it is reached.
    pub addresses: ReplicaAddresses,
}

/// What a replica must know before its group may start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Formation {
    /// This replica's own id. It need not be a member (yet).
    pub replica: ReplicaId,
    /// The group's members.
    pub membership: Membership,
    /// All replicas known.
    pub replicas: Vec<ReplicaInfo>,
    /// Id that the next replica to register gets; above all others.
    pub next_replica: u64,
}

/// Everything of a shard's state that is about replicas.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Members {
    pub(crate) membership: Membership,
    pub(crate) replicas: BTreeMap<ReplicaId, ReplicaInfo>,
    /// Never goes back.
    pub(crate) next_replica: u64,
    /// Nodes that are to lead nothing and to take on no replica.
    pub(crate) cordoned: BTreeSet<NodeName>,
    /// By which replica a member is to be replaced.
    pub(crate) replacements: BTreeMap<ReplicaId, ReplicaId>,
}

impl Default for Members {
    /// Those of a shard that was not formed.
    fn default() -> Self {
        Self {
            membership: Membership::default(),
            replicas: BTreeMap::new(),
            next_replica: 1,
            cordoned: BTreeSet::new(),
            replacements: BTreeMap::new(),
        }
    }
}

impl ReplicaInfo {
    fn is_bounded(&self) -> bool {
        self.addresses.is_bounded()
    }
}

impl ReplicaAddresses {
    /// Whether each address is short enough to be stored.
    #[must_use]
    pub fn is_bounded(&self) -> bool {
        [&self.nbd, &self.grpc, &self.http].iter().all(|text| text.len() <= ADDRESS_BYTES_MAX)
    }
}

impl Members {
    /// The members in a formation, or `None` if it contradicts itself or is too large.
    pub(crate) fn of_formation(formation: &Formation) -> Option<Self> {
        let replicas: BTreeMap<_, _> =
            formation.replicas.iter().map(|info| (info.id, info.clone())).collect();
        let whole = replicas.len() == formation.replicas.len();
        let members = Self {
            membership: formation.membership.clone(),
            replicas,
            next_replica: formation.next_replica,
            ..Self::default()
        };
        let own_is_known = formation.replica.get() < formation.next_replica;
        (whole && own_is_known && members.is_valid()).then_some(members)
    }

    /// The formation that says this of `replica`.
    pub(crate) fn formation(&self, replica: ReplicaId) -> Formation {
        Formation {
            replica,
            membership: self.membership.clone(),
            replicas: self.replicas.values().cloned().collect(),
            next_replica: self.next_replica,
        }
    }

    fn is_valid(&self) -> bool {
        let replacing = self.replacements.iter().flat_map(|(old, new)| [*old, *new]);
        let ids = self.membership.all().chain(self.replicas.keys().copied()).chain(replacing);
        self.cordoned.len() <= CORDONED_MAX
            && self.replacements.len() <= REPLICAS_KNOWN_MAX
            && self.replicas.len() <= REPLICAS_KNOWN_MAX
            && self.membership.all().count() <= REPLICAS_KNOWN_MAX
            && self.replicas.values().all(ReplicaInfo::is_bounded)
            && ids.max().is_none_or(|highest| highest.get() < self.next_replica)
    }

    /// Applies a change of the membership. A replica that leaves is forgotten.
    pub(crate) fn change(&mut self, change: MembershipChange) {
        if let Some(next) = self.membership.after(change) {
            self.membership = next;
            if let MembershipChange::Remove(replica) = change {
                self.forget(replica);
            }
        }
    }

    fn forget(&mut self, replica: ReplicaId) {
        self.replicas.remove(&replica);
        self.replacements.retain(|old, new| *old != replica && *new != replica);
    }

    /// Cordons a node, or lets it be.
    pub(crate) fn cordon(&mut self, node: NodeName, cordoned: bool) -> Result<(), Rejection> {
        if !cordoned {
            self.cordoned.remove(&node);
            return Ok(());
        }
        if self.cordoned.len() >= CORDONED_MAX && !self.cordoned.contains(&node) {
            return Err(Rejection::LimitReached);
        }
        self.cordoned.insert(node);
        Ok(())
    }

    /// Notes that `new` is to take the place of the member `old`, or that nobody is.
    pub(crate) fn replace(
        &mut self,
        old: ReplicaId,
        new: Option<ReplicaId>,
    ) -> Result<(), Rejection> {
        let Some(new) = new else {
            self.replacements.remove(&old);
            return Ok(());
        };
        if old == new || !self.membership.contains(old) || !self.replicas.contains_key(&new) {
            return Err(Rejection::BadCommand);
        }
        self.replacements.insert(old, new);
        Ok(())
    }

    /// Makes a replica known by `id`, or finds the id that its directory has; the addresses are
    /// those given in any case. An id below the next one was given before: nothing changes then.
    pub(crate) fn register(
        &mut self,
        id: ReplicaId,
        new: ReplicaRegistration,
    ) -> Result<ReplicaInfo, Rejection> {
        let ReplicaRegistration { node, directory, addresses } = new;
        let known = self.replicas.values_mut().find(|info| info.directory == directory);
        if let Some(info) = known {
            (info.node, info.addresses) = (node, addresses);
            return Ok(info.clone());
        }
        if id.get() < self.next_replica {
            return Err(Rejection::BadCommand);
        }
        let next_replica = id.get().checked_add(1).ok_or(Rejection::BadCommand)?;
        if self.replicas.len() >= REPLICAS_KNOWN_MAX {
            // One that registered and never became a member, as after a disk that kept being wiped.
            let is_stranger = |id: &ReplicaId| {
                !self.membership.contains(*id) && !self.replacements.values().any(|new| new == id)
            };
            let stranger = self.replicas.keys().copied().find(is_stranger);
            self.forget(stranger.ok_or(Rejection::LimitReached)?);
        }
        let info = ReplicaInfo { id, node, directory, addresses };
        self.replicas.insert(id, info.clone());
        self.next_replica = next_replica;
        Ok(info)
    }

    /// The stored form.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let count =
            |count: usize| u32::try_from(count).expect("replicas are bounded").to_le_bytes();
        let (voters, learners) = (self.membership.voters(), self.membership.learners());
        let mut out = Vec::new();
        out.extend(self.next_replica.to_le_bytes());
        out.extend(count(voters.len()));
        out.extend(count(learners.len()));
        out.extend(count(self.replicas.len()));
        for id in voters.iter().chain(learners) {
            out.extend(id.get().to_le_bytes());
        }
        for ReplicaInfo { id, node, directory, addresses } in self.replicas.values() {
            out.extend(id.get().to_le_bytes());
            out.extend(directory.to_le_bytes());
            put_texts(&mut out, node, addresses);
        }
        if self.cordoned.is_empty() && self.replacements.is_empty() {
            return out;
        }
        out.extend(count(self.cordoned.len()));
        out.extend(count(self.replacements.len()));
        for node in &self.cordoned {
            let len = u16::try_from(node.as_str().len()).expect("names are bounded");
            out.extend(len.to_le_bytes());
            out.extend(node.as_str().as_bytes());
        }
        for (old, new) in &self.replacements {
            out.extend(old.get().to_le_bytes());
            out.extend(new.get().to_le_bytes());
        }
        out
    }

    /// The members in a stored body, or `None` if it is not one. Safe for bytes of a peer.
    pub(crate) fn decode(body: &[u8]) -> Option<Self> {
        let mut rest = Input(body);
        let next_replica = rest.u64()?;
        let counts = [rest.u32()?, rest.u32()?, rest.u32()?];
        if counts.iter().any(|count| *count as usize > REPLICAS_KNOWN_MAX) {
            return None;
        }
        let [voters, learners, replicas] = counts;
        let mut ids = |count: u32| -> Option<Vec<ReplicaId>> {
            (0..count).map(|_| ReplicaId::new(rest.u64()?)).collect()
        };
        let (voters, learners) = (ids(voters)?, ids(learners)?);
        let mut membership = Membership::of_voters(voters);
        for learner in learners {
            membership = membership.after(MembershipChange::AddLearner(learner))?;
        }
        let mut infos = BTreeMap::new();
        for _ in 0..replicas {
            let (id, directory) = (ReplicaId::new(rest.u64()?)?, rest.u128()?);
            let (node, addresses) = take_texts(&mut rest)?;
            infos.insert(id, ReplicaInfo { id, node, directory, addresses });
        }
        let (cordoned, replacements) =
            if rest.0.is_empty() { Default::default() } else { take_plans(&mut rest)? };
        let members = Self { membership, replicas: infos, next_replica, cordoned, replacements };
        // Whatever was repeated or out of order is not what would have been written.
        (rest.0.is_empty() && members.is_valid() && members.encode() == body).then_some(members)
    }
}

/// The cordoned nodes and the replacements in a stored body.
fn take_plans(
    rest: &mut Input<'_>,
) -> Option<(BTreeSet<NodeName>, BTreeMap<ReplicaId, ReplicaId>)> {
    let counts = [rest.u32()? as usize, rest.u32()? as usize];
    if counts[0] > CORDONED_MAX || counts[1] > REPLICAS_KNOWN_MAX {
        return None;
    }
    let mut cordoned = BTreeSet::new();
    for _ in 0..counts[0] {
        let len = usize::from(rest.u16()?);
        cordoned.insert(decode_node(rest.take(len)?)?);
    }
    let mut replacements = BTreeMap::new();
    for _ in 0..counts[1] {
        replacements.insert(ReplicaId::new(rest.u64()?)?, ReplicaId::new(rest.u64()?)?);
    }
    Some((cordoned, replacements))
}

/// The name of a node, or `None` if it is not one.
pub(crate) fn decode_node(name: &[u8]) -> Option<NodeName> {
    std::str::from_utf8(name).ok()?.parse().ok()
}

/// The body of a command that registers a replica: the directory, then as in the record.
pub(crate) fn encode_registration(new: &ReplicaRegistration) -> Vec<u8> {
    let mut out = new.directory.to_le_bytes().to_vec();
    put_texts(&mut out, &new.node, &new.addresses);
    out
}

/// The registration in a command's body, or `None` if it is not one.
pub(crate) fn decode_registration(body: &[u8]) -> Option<ReplicaRegistration> {
    let mut rest = Input(body);
    let directory = rest.u128()?;
    let (node, addresses) = take_texts(&mut rest)?;
    rest.0.is_empty().then_some(ReplicaRegistration { node, directory, addresses })
}

fn put_texts(out: &mut Vec<u8>, node: &NodeName, addresses: &ReplicaAddresses) {
    let texts = [node.as_str(), &addresses.nbd, &addresses.grpc, &addresses.http];
    for text in texts {
        out.extend(u16::try_from(text.len()).expect("addresses are bounded").to_le_bytes());
    }
    for text in texts {
        out.extend(text.as_bytes());
    }
}

fn take_texts(rest: &mut Input<'_>) -> Option<(NodeName, ReplicaAddresses)> {
    let lengths = [rest.u16()?, rest.u16()?, rest.u16()?, rest.u16()?];
    let mut text = |len: u16| std::str::from_utf8(rest.take(usize::from(len))?).ok();
    let [node, nbd, grpc, http] =
        [text(lengths[0])?, text(lengths[1])?, text(lengths[2])?, text(lengths[3])?];
    let addresses = ReplicaAddresses { nbd: nbd.into(), grpc: grpc.into(), http: http.into() };
    addresses.is_bounded().then_some((node.parse().ok()?, addresses))
}

/// Bytes that are taken off the front one by one.
pub(crate) struct Input<'a>(pub(crate) &'a [u8]);

impl<'a> Input<'a> {
    pub(crate) fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    pub(crate) fn u8(&mut self) -> Option<u8> {
        self.array().map(u8::from_le_bytes)
    }

    pub(crate) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    pub(crate) fn u128(&mut self) -> Option<u128> {
        self.array().map(u128::from_le_bytes)
    }
}

#[cfg(test)]
mod tests;
