//! Calls about members, at the shard's leader.

use std::time::Duration;

use nbd_consensus::{RejectReason, Status};
use nbd_front::RunError;
use nbd_rpc::v1;
use nbd_shard::Answer;
use nbd_store::{
    Formation, Outcome, Rejection, ReplicaInfo, ReplicaRegistration, encode_register_replica,
};
use nbd_topology::{LogIndex, MembershipChange, ReplicaId};
use tonic::Status as Refused;
use tracing::info;

use super::rules::{Denied, Promotion, Removal, may_join, may_lead, promotion, removal, successor};
use crate::formation::info_to_wire;
use crate::group_task::GroupHandle;

/// Changes that one promotion makes: each dead predecessor, then the promotion.
const CHANGES_MAX: usize = 8;

/// A call that waits for the group tries again this often ...
const BUSY_ATTEMPTS: usize = 20;

/// ... and waits this long in between: a change is committed within milliseconds, if at all.
const BUSY_WAIT: Duration = Duration::from_millis(50);

/// The leader's end of a shard.
#[derive(Debug, Clone)]
pub(super) struct Leader {
    pub(super) group: GroupHandle,
}

fn stopped() -> Refused {
    Refused::unavailable("the node is stopping")
}

impl Leader {
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
        may_join(&status, &replicas, me, &new).map_err(Denied::into_status)?;
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

    /// Removes a replica.
    pub(super) async fn remove(&self, replica: ReplicaId) -> Result<(), Refused> {
        let (Formation { replica: me, next_replica, .. }, status) =
            (self.me()?, self.status().await?);
        match removal(&status, me, replica, next_replica).map_err(Denied::into_status)? {
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
        let to = match to {
            Some(to) if to == me => return Ok(to),
            Some(to) => may_lead(&status, to).map(|()| to),
            None => successor(&status),
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

pub(super) fn not_leader() -> Refused {
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
