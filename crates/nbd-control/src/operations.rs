//! Operations: ways to look at the cluster, by an id that says what to look for. Nothing here is
//! remembered, so that every control API gives the same answer.

use std::fmt;
use std::str::FromStr;

use nbd_api::operation::ProgressUnit;
use nbd_api::{Operation, OperationKind, OperationState, Progress};
use nbd_rpc::v1;
use nbd_topology::ShardId;

use crate::cluster::CallError;
use crate::overview::{Overview, leader, member, members, node_of};

/// What an operation is called by.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum OperationId {
    /// `add-{shard}-{replica}`
    Add { shard: ShardId, replica: u64 },
    /// `replace-{shard}-{old}-{new}`
    Replace { shard: ShardId, old: u64, new: u64 },
    /// `resync-{shard}-{replica}`
    Resync { shard: ShardId, replica: u64 },
    /// `drain-{node}`
    Drain { node: String },
}

impl fmt::Display for OperationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Add { shard, replica } => write!(f, "add-{shard}-{replica}"),
            Self::Replace { shard, old, new } => write!(f, "replace-{shard}-{old}-{new}"),
            Self::Resync { shard, replica } => write!(f, "resync-{shard}-{replica}"),
            Self::Drain { node } => write!(f, "drain-{node}"),
        }
    }
}

/// An id that no operation has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NoSuchId;

impl FromStr for OperationId {
    type Err = NoSuchId;

    fn from_str(id: &str) -> Result<Self, NoSuchId> {
        let (kind, rest) = id.split_once('-').ok_or(NoSuchId)?;
        if kind == "drain" && !rest.is_empty() {
            return Ok(Self::Drain { node: rest.to_owned() });
        }
        let numbers: Result<Vec<u64>, _> = rest.split('-').map(str::parse).collect();
        let numbers = numbers.map_err(|_| NoSuchId)?;
        let shard = |number: u64| u32::try_from(number).map(ShardId).map_err(|_| NoSuchId);
        let parsed = match (kind, numbers.as_slice()) {
            ("add", &[at, replica]) => Self::Add { shard: shard(at)?, replica },
            ("replace", &[at, old, new]) => Self::Replace { shard: shard(at)?, old, new },
            ("resync", &[at, replica]) => Self::Resync { shard: shard(at)?, replica },
            _ => return Err(NoSuchId),
        };
        // `add-00-+1` is another spelling, and would be another resource.
        if parsed.to_string() == id { Ok(parsed) } else { Err(NoSuchId) }
    }
}

impl OperationId {
    /// The shard it is about, if one.
    pub(crate) const fn shard(&self) -> Option<ShardId> {
        match self {
            Self::Add { shard, .. } | Self::Replace { shard, .. } | Self::Resync { shard, .. } => {
                Some(*shard)
            }
            Self::Drain { .. } => None,
        }
    }
}

impl Overview {
    /// How an operation stands. `None`: there is no such shard or node, and never was.
    ///
    /// # Errors
    /// The shard it is about does not answer.
    pub(crate) fn operation(&self, id: &OperationId) -> Result<Option<Operation>, CallError> {
        if let OperationId::Drain { node } = id {
            return Ok(self.nodes.contains_key(node).then(|| self.drain(node)));
        }
        let Some((shard, reply)) = id.shard().and_then(|shard| self.shards.get_key_value(&shard))
        else {
            return Ok(None);
        };
        let reply = reply.as_ref().map_err(Clone::clone)?;
        Ok(Some(match *id {
            OperationId::Add { replica, .. } => self.add(*shard, reply, replica),
            OperationId::Replace { old, new, .. } => self.replace(*shard, reply, old, new),
            OperationId::Resync { replica, .. } => self.fetching(*shard, reply, replica),
            OperationId::Drain { .. } => return Ok(None),
        }))
    }

    /// Those under way, of the shards that answer.
    pub(crate) fn running(&self) -> Vec<Operation> {
        let mut ids = Vec::new();
        for (shard, reply) in self.answering() {
            let replacements = &reply.replacements;
            ids.extend(replacements.iter().map(|replacement| {
                let v1::Replacement { old, new } = *replacement;
                OperationId::Replace { shard, old, new }
            }));
            for member in members(reply) {
                let replica = member.replica.as_ref().map_or(0, |replica| replica.id);
                if member.voter {
                    ids.push(OperationId::Resync { shard, replica });
                } else if replacements.iter().all(|replacement| replacement.new != replica) {
                    ids.push(OperationId::Add { shard, replica });
                }
            }
        }
        ids.extend(self.nodes.keys().map(|node| OperationId::Drain { node: node.clone() }));
        ids.sort();
        let operations = ids.iter().filter_map(|id| self.operation(id).ok()?);
        operations.filter(|operation| operation.state == OperationState::Running).collect()
    }

    fn add(&self, shard: ShardId, reply: &v1::GetShardReply, replica: u64) -> Operation {
        let found = member(reply, replica);
        let (state, message) = match found {
            Some(member) if member.voter => {
                (OperationState::Done, format!("replica {replica} votes"))
            }
            Some(_) => (OperationState::Running, format!("replica {replica} is catching up")),
            None => not_member(shard, replica),
        };
        let id = OperationId::Add { shard, replica };
        self.about_replica(&id, OperationKind::Add, state, message, found)
    }

    fn replace(&self, shard: ShardId, reply: &v1::GetShardReply, old: u64, new: u64) -> Operation {
        let found = member(reply, new);
        let under_way = reply.replacements.iter().any(|is| is.old == old && is.new == new);
        let (state, message) = match found {
            _ if under_way => {
                let text = format!("replica {new} is catching up, to take the place of {old}");
                (OperationState::Running, text)
            }
            Some(member) if member.voter && self::member(reply, old).is_none() => {
                (OperationState::Done, format!("replica {new} has taken the place of {old}"))
            }
            Some(_) => {
                (OperationState::Ended, format!("replica {old} is not being replaced by {new}"))
            }
            None => not_member(shard, new),
        };
        let id = OperationId::Replace { shard, old, new };
        self.about_replica(&id, OperationKind::Replace, state, message, found)
    }

    fn fetching(&self, shard: ShardId, reply: &v1::GetShardReply, replica: u64) -> Operation {
        let found = member(reply, replica);
        let (state, message) = match found {
            Some(member) if member.resyncing || self.resync(node_of(member), shard).is_some() => {
                (OperationState::Running, format!("replica {replica} fetches what it lacks"))
            }
            Some(_) => (OperationState::Done, format!("replica {replica} has what it lacked")),
            None => not_member(shard, replica),
        };
        let id = OperationId::Resync { shard, replica };
        self.about_replica(&id, OperationKind::Resync, state, message, found)
    }

    fn about_replica(
        &self,
        id: &OperationId,
        kind: OperationKind,
        state: OperationState,
        message: String,
        found: Option<&v1::Member>,
    ) -> Operation {
        let running = state == OperationState::Running;
        let node = found.map(|member| node_of(member).to_owned());
        let resync = id.shard().and_then(|shard| self.resync(node.as_deref()?, shard));
        let progress = resync.filter(|_| running).map(|resync| Progress {
            done: resync.bytes_done,
            total: resync.bytes_total,
            unit: ProgressUnit::Bytes,
            seconds_left: resync.seconds_left,
        });
        Operation {
            id: id.to_string(),
            kind,
            state,
            message,
            shard: id.shard().map(|shard| shard.0),
            node,
            progress,
            cancellable: running && kind != OperationKind::Resync,
        }
    }

    fn drain(&self, node: &str) -> Operation {
        let shards = self.shards_of(node);
        // What a shard that does not answer will do is not known, so it is still to be done.
        let open: Vec<String> =
            shards.iter().filter_map(|shard| self.still_on(node, *shard)).collect();
        let cordoned_somewhere =
            self.answering().any(|(_, reply)| reply.cordoned.iter().any(|name| name == node));
        let (state, message) = if !cordoned_somewhere {
            (OperationState::Ended, format!("node {node} is not cordoned"))
        } else if open.is_empty() {
            (OperationState::Done, format!("node {node} leads no shard"))
        } else {
            (OperationState::Running, open.join("; "))
        };
        let running = state == OperationState::Running;
        let progress = running.then(|| Progress {
            done: (shards.len() - open.len()) as u64,
            total: shards.len() as u64,
            unit: ProgressUnit::Shards,
            seconds_left: None,
        });
        Operation {
            id: OperationId::Drain { node: node.to_owned() }.to_string(),
            kind: OperationKind::Drain,
            state,
            message,
            shard: None,
            node: Some(node.to_owned()),
            progress,
            cancellable: running,
        }
    }

    /// Why the node is not drained of the shard yet; `None` if it is.
    fn still_on(&self, node: &str, shard: ShardId) -> Option<String> {
        match self.shards.get(&shard)? {
            Err(_) => Some(format!("shard {shard} does not answer")),
            Ok(reply) if !reply.cordoned.iter().any(|name| name == node) => {
                Some(format!("node {node} is not cordoned for shard {shard}"))
            }
            Ok(reply) if leader(reply).as_deref() == Some(node) => {
                Some(format!("shard {shard} waits for another replica that can lead it"))
            }
            Ok(_) => None,
        }
    }
}

fn not_member(shard: ShardId, replica: u64) -> (OperationState, String) {
    (OperationState::Ended, format!("replica {replica} is no member of shard {shard}"))
}

#[cfg(test)]
mod tests;
