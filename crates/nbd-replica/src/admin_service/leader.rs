//! Calls about members, at the shard's leader.

use std::collections::BTreeSet;
use std::time::Duration;

use nbd_consensus::{RejectReason, Status};
use nbd_front::{LeaderAt, Route, RunError};
use nbd_rpc::v1;
use nbd_shard::Answer;
use nbd_store::{
    Formation, Outcome, Rejection, ReplicaInfo, ReplicaRegistration, encode_register_replica,
    encode_set_replacement,
};
use nbd_topology::{LogIndex, MembershipChange, ReplicaId};
use tonic::Status as Refused;
use tracing::info;

use super::rules::{
    Denied, Promotion, Removal, avoided, may_join, may_lead, promotion, removal, successor,
};
use crate::formation::info_to_wire;
use crate::group_task::GroupHandle;

/// Time that a call waits for a leader to be known: an election or two.
const LEADER_WAIT: Duration = Duration::from_secs(3);

/// Changes that one promotion makes: each dead predecessor, then the promotion.
const CHANGES_MAX: usize = 8;

/// A call that waits for the group tries again this often ...
const BUSY_ATTEMPTS: usize = 20;

/// ... and waits this long in between: a change is committed within milliseconds, if at all.
const BUSY_WAIT: Duration = Duration::from_millis(50);

/// The leader's end of a shard.
#[derive(Debug, Clone)]
pub(crate) struct Leader {
    pub(super) group: GroupHandle,
}

/// What notes a replacement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Replaced {
    /// The old replica is no member any more.
    Already,
    /// Whoever leads removes the old one once the new one votes.
    Noted,
}

fn stopped() -> Refused {
    Refused::unavailable("the node is stopping")
}

impl Leader {
    pub(crate) fn new(group: &GroupHandle) -> Self {
        Self { group: group.clone() }
    }

    /// The members on cordoned nodes.
    pub(crate) fn avoided(&self) -> BTreeSet<ReplicaId> {
        let reader = self.group.reader();
        avoided(&reader.replicas(), &reader.cordoned())
    }

    fn me(&self) -> Result<Formation, Refused> {
        let formed = self.group.reader().formation();
        formed.ok_or_else(|| Refused::unavailable("the shard is not formed here yet"))
    }

    async fn status(&self) -> Result<Status, Refused> {
        self.group.details().await.map_err(|_| stopped())
    }

    /// Carries a change out; again, for a moment, while another one is under way.
    async fn change(&self, change: MembershipChange) -> Result<(), Refused> {
        let shard = self.group.shard();
        for _ in 0..BUSY_ATTEMPTS {
            let answer = self.group.change_membership(change).await.map_err(|_| stopped())?;
            match answer {
                Answer::Changed => {
                    info!(%shard, %change, "membership changed");
                    return Ok(());
                }
                // It is so already.
                Answer::Refused(RejectReason::NoEffect) => return Ok(()),
                Answer::Refused(RejectReason::MembershipBusy | RejectReason::Transferring) => {
                    tokio::time::sleep(BUSY_WAIT).await;
                }
                Answer::Refused(reason) => return Err(Denied::Rejected(reason).into_status()),
                Answer::NotLeader(_) => return Err(not_leader()),
                Answer::Lost | Answer::Outcome(_) | Answer::Ready => {
                    return Err(Refused::unavailable("leadership was lost meanwhile: ask again"));
                }
            }
        }
        Err(Denied::Rejected(RejectReason::MembershipBusy).into_status())
    }

    /// Makes a node a learner with an id of its own; finds the id if it is one.
    pub(super) async fn join(&self, new: ReplicaRegistration) -> Result<Formation, Refused> {
        let me = self.me()?.replica;
        let status = self.status().await?;
        let replicas = self.group.reader().replicas();
        let cordoned = self.group.reader().cordoned();
        may_join(&status, &replicas, me, &new, &cordoned).map_err(Denied::into_status)?;
        let next = ReplicaId::new(self.me()?.next_replica)
            .ok_or_else(|| Refused::internal("there is no id left"))?;
        let command = encode_register_replica(&new, next)
            .map_err(|error| Refused::invalid_argument(error.to_string()))?;
        let info = match self.group.run(command).await {
            Ok(Outcome::ReplicaRegistered(info)) => info,
            // Another node was given the id meanwhile.
            Ok(Outcome::Rejected(Rejection::BadCommand)) => {
                return Err(Refused::unavailable("another node is joining: ask again"));
            }
            Ok(Outcome::Rejected(reason)) => {
                return Err(Refused::failed_precondition(reason.to_string()));
            }
            Ok(other) => {
                return Err(Refused::internal(format!("registering a replica gave {other:?}")));
            }
            Err(RunError::NotLeader) => return Err(not_leader()),
            Err(error) => return Err(Refused::unavailable(error.to_string())),
        };
        if !self.group.reader().membership().contains(info.id) {
            self.change(MembershipChange::AddLearner(info.id)).await?;
        }
        Ok(Formation { replica: info.id, ..self.me()? })
    }

    /// Gives a learner its vote.
    pub(super) async fn promote(&self, replica: ReplicaId) -> Result<(), Refused> {
        let me = self.me()?.replica;
        for _ in 0..CHANGES_MAX {
            let status = self.status().await?;
            let replicas = self.group.reader().replicas();
            let next = promotion(&status, &replicas, me, replica).map_err(Denied::into_status)?;
            match next {
                Promotion::Done => return Ok(()),
                Promotion::Remove(old) => self.change(MembershipChange::Remove(old)).await?,
                Promotion::Promote => self.change(MembershipChange::AddVoter(replica)).await?,
            }
        }
        Err(Refused::unavailable("the members keep changing: ask again"))
    }

    /// Refuses to replace a replica that never was one.
    pub(super) async fn may_replace(&self, old: ReplicaId) -> Result<(), Refused> {
        let Formation { replica: me, next_replica, .. } = self.me()?;
        let status = self.status().await?;
        match removal(&status, me, old, next_replica, &self.avoided()) {
            // Another one is about to be there.
            Ok(_) | Err(Denied::LastVoter(_) | Denied::NoSuccessor) => Ok(()),
            Err(denied) => Err(denied.into_status()),
        }
    }

    /// Notes in the log that `new` takes the place of `old`.
    pub(super) async fn replace(
        &self,
        old: ReplicaId,
        new: ReplicaId,
    ) -> Result<Replaced, Refused> {
        if !self.group.reader().membership().contains(old) {
            return Ok(Replaced::Already);
        }
        match self.group.run(encode_set_replacement(old, Some(new))).await {
            Ok(Outcome::Done) => Ok(Replaced::Noted),
            Ok(Outcome::Rejected(_)) if !self.group.reader().membership().contains(old) => {
                Ok(Replaced::Already)
            }
            Ok(other) => Err(Refused::internal(format!("noting a replacement gave {other:?}"))),
            Err(RunError::NotLeader) => Err(not_leader()),
            Err(error) => Err(Refused::unavailable(error.to_string())),
        }
    }

    /// Removes a replica.
    pub(crate) async fn remove(&self, replica: ReplicaId) -> Result<(), Refused> {
        let (Formation { replica: me, next_replica, .. }, status) =
            (self.me()?, self.status().await?);
        match removal(&status, me, replica, next_replica, &self.avoided())
            .map_err(Denied::into_status)?
        {
            Removal::Done => Ok(()),
            Removal::Remove => self.change(MembershipChange::Remove(replica)).await,
            Removal::HandOver(to) => {
                self.group.transfer(to).await.map_err(|_| stopped())?;
                let text = format!("replica {replica} leads and hands over to {to}: ask again");
                Err(Refused::unavailable(text))
            }
        }
    }

    /// Hands leadership over.
    pub(super) async fn transfer(&self, to: Option<ReplicaId>) -> Result<ReplicaId, Refused> {
        let (me, status) = (self.me()?.replica, self.status().await?);
        let avoided = self.avoided();
        let to = match to {
            Some(to) if to == me => return Ok(to),
            Some(to) => {
                may_lead(&status, &self.group.reader().replicas(), &avoided, to).map(|()| to)
            }
            None => successor(&status, &avoided),
        };
        let to = to.map_err(Denied::into_status)?;
        self.group.transfer(to).await.map_err(|_| stopped())?;
        Ok(to)
    }

    /// Who belongs to the group. Waits until this replica is known to lead still: a deposed leader
    /// must not tell a new member that it is none.
    pub(super) async fn members(&self) -> Result<v1::MembersReply, Refused> {
        match self.group.barrier().await {
            Ok(()) => {}
            Err(RunError::NotLeader) => return Err(not_leader()),
            Err(error) => return Err(Refused::unavailable(error.to_string())),
        }
        let (me, status) = (self.me()?.replica, self.status().await?);
        Ok(members_reply(&status, &self.group.reader().replicas(), me))
    }
}

/// Who leads a shard: waits for an election or two if nobody is known to, or if this replica does
/// and cannot be asked yet.
pub(crate) async fn find_leader(group: &GroupHandle) -> Result<LeaderAt, Refused> {
    let mut route = group.route();
    let known = |route: &Route| route.usable().is_some();
    match tokio::time::timeout(LEADER_WAIT, route.wait_for(known)).await {
        Ok(Ok(route)) => route.usable().cloned(),
        Ok(Err(_)) => return Err(stopped()),
        Err(_) => None,
    }
    .ok_or_else(|| Refused::unavailable(format!("shard {} has no leader just now", group.shard())))
}

pub(crate) fn not_leader() -> Refused {
    Refused::unavailable("this replica no longer leads the shard: ask again")
}

/// The members as their leader sees them.
fn members_reply(status: &Status, replicas: &[ReplicaInfo], me: ReplicaId) -> v1::MembersReply {
    let member = |info: &ReplicaInfo| {
        let peer = status.peers.iter().find(|peer| peer.replica == info.id);
        let own = (info.id == me).then_some(status.persisted);
        let matched = own.or_else(|| peer.map(|peer| peer.matched)).unwrap_or(LogIndex::ZERO);
        v1::Member {
            replica: Some(info_to_wire(info)),
            voter: status.membership.is_voter(info.id),
            active: info.id == me || peer.is_some_and(|peer| peer.active),
            matched: matched.0,
            lag: status.committed.0.saturating_sub(matched.0),
            resyncing: peer.is_some_and(|peer| peer.snapshot),
        }
    };
    let members = replicas.iter().filter(|info| status.membership.contains(info.id));
    v1::MembersReply {
        term: status.term.0,
        leader: status.leader.map_or(0, ReplicaId::get),
        committed: status.committed.0,
        members: members.map(member).collect(),
    }
}
