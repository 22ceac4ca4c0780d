//! What makes a shard less than well.

use nbd_api::{Member, MemberRole};
use nbd_topology::ShardId;

use super::Overview;
use crate::limits::{LAG_MAX, WRITABLE_MIN};

impl Overview {
    /// Why a shard that serves is not well; `None` if it is.
    pub(super) fn complaint(&self, shard: ShardId, members: &[Member]) -> Option<String> {
        let voters = members.iter().filter(|member| member.role != MemberRole::Learner);
        let mut complaints: Vec<String> = voters.clone().filter_map(of_member).collect();
        let (voters, wanted) = (voters.count(), self.configured.get(&shard).map_or(0, Vec::len));
        if voters < wanted {
            complaints.push(format!("{voters} replicas vote, and {wanted} are configured"));
        }
        (!complaints.is_empty()).then(|| complaints.join("; "))
    }
}

fn of_member(member: &Member) -> Option<String> {
    let Member { replica, node, alive, lag, writable, resync, .. } = member;
    let who = format!("replica {replica} on {node}");
    if !alive {
        return Some(format!("{who} is not heard of"));
    }
    if resync.is_some() {
        return Some(format!("{who} fetches data from the others"));
    }
    if *lag > LAG_MAX {
        return Some(format!("{who} is {lag} entries behind"));
    }
    match writable {
        None => Some(format!("node {node} does not answer the control API")),
        Some(bytes) if *bytes < WRITABLE_MIN => {
            Some(format!("{who} has {bytes} bytes left to write to"))
        }
        Some(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn voter() -> Member {
        Member {
            replica: 2,
            node: "n2".to_owned(),
            role: MemberRole::Voter,
            alive: true,
            lag: 0,
            writable: Some(1 << 40),
            resync: None,
        }
    }

    #[test]
    fn complaints_name_who_and_what() {
        let overview = Overview {
            configured: [(ShardId(0), vec!["n2".to_owned(), "n3".to_owned()])].into(),
            ..Overview::default()
        };
        let complaint = |members: &[Member]| overview.complaint(ShardId(0), members);
        assert_eq!(complaint(&[voter(), voter()]), None);
        let learner = Member { role: MemberRole::Learner, alive: false, ..voter() };
        assert_eq!(complaint(&[voter(), voter(), learner]), None, "learners are extra");
        let few = complaint(&[voter()]).unwrap();
        assert_eq!(few, "1 replicas vote, and 2 are configured");
        let gone = complaint(&[voter(), Member { alive: false, ..voter() }]).unwrap();
        assert_eq!(gone, "replica 2 on n2 is not heard of");
        let full = complaint(&[voter(), Member { writable: Some(4096), ..voter() }]).unwrap();
        assert_eq!(full, "replica 2 on n2 has 4096 bytes left to write to");
    }
}
