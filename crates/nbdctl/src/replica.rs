//! `nbdctl replica`: who holds a shard, and changing that.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::Context;
use clap::Subcommand;
use nbd_rpc::v1;
use nbd_rpc::v1::admin_client::AdminClient;
use nbd_rpc::v1::status_reply::Role;
use nbd_service::cluster::GRPC_PORT;
use nbd_service::{Failure, HostPort};
use tonic::transport::Channel;
use tonic::{Code, Status};

/// Times that a call is made when the shard is busy electing a leader or changing its members, ...
const ATTEMPTS: usize = 20;

/// ... and the wait in between.
const WAIT: Duration = Duration::from_millis(500);

/// Flags of `nbdctl replica`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// gRPC address of any replica of the shard; calls are passed on to the leader. Default:
    /// 127.0.0.1:7400.
    #[arg(long, env = "NBD_GRPC", global = true, value_name = "ADDR")]
    grpc: Option<HostPort>,

    /// Name of the cluster.
    #[arg(
        long,
        env = "NBD_CLUSTER",
        default_value = "cinderblock",
        global = true,
        value_name = "NAME"
    )]
    cluster: nbd_topology::ClusterName,

    /// The shard.
    #[arg(long, default_value_t = 0, global = true, value_name = "N")]
    shard: u32,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show the members of the shard's group, as its leader sees them.
    List,
    /// Show how the replica at the address given stands.
    Status,
    /// Add a replica on a node that runs with an empty data directory and lists the shard.
    Add {
        /// The node's name.
        node: String,
        /// Where its gRPC is, as host:port.
        at: HostPort,
    },
    /// Remove a replica for good.
    Remove {
        /// The replica's id, as `list` shows it.
        replica: u64,
    },
    /// Add a replica on another node and remove an old one, dead or alive, once the new one votes.
    Replace {
        /// The id of the replica to be replaced.
        replica: u64,
        /// The node that takes over.
        node: String,
        /// Where its gRPC is, as host:port.
        at: HostPort,
    },
    /// Hand leadership to another replica.
    Transfer {
        /// Its id; by default the most advanced one.
        replica: Option<u64>,
    },
}

/// Makes the call and prints what came of it.
pub(crate) fn run(args: Args) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let text = runtime.block_on(call(&args))?;
    print!("{text}");
    Ok(())
}

async fn call(args: &Args) -> anyhow::Result<String> {
    let grpc = match &args.grpc {
        Some(grpc) => grpc.to_string(),
        None => HostPort::of_node(&"127.0.0.1".parse()?, GRPC_PORT).to_string(),
    };
    let client = AdminClient::new(nbd_rpc::channel(&grpc)?.connect_lazy());
    let cluster = args.cluster.to_string();
    let to = Some(v1::ShardAddress { cluster, shard: args.shard, forwarded: false });
    let mut attempt = 1;
    loop {
        match make(client.clone(), &args.command, to.clone()).await {
            Err(status) if status.code() == Code::Unavailable && attempt < ATTEMPTS => {
                attempt += 1;
                tokio::time::sleep(WAIT).await;
            }
            done => {
                let refused = |status: Status| anyhow::anyhow!(nbd_rpc::reason(&status));
                return done.map_err(refused).with_context(|| format!("ask the replica at {grpc}"));
            }
        }
    }
}

async fn make(
    mut client: AdminClient<Channel>,
    command: &Command,
    to: Option<v1::ShardAddress>,
) -> Result<String, Status> {
    Ok(match command {
        Command::List => {
            let reply = client.members(v1::MembersRequest { to }).await?.into_inner();
            members(&reply)
        }
        Command::Status => status(&client.status(v1::StatusRequest { to }).await?.into_inner()),
        Command::Add { node, at } => {
            let (node, grpc) = (node.clone(), at.to_string());
            let request = v1::AddReplicaRequest { to, node, grpc };
            let id = client.add_replica(request).await?.into_inner().replica;
            format!("replica {id} is catching up; it votes once it has\n")
        }
        Command::Remove { replica } => {
            let replica = *replica;
            client.remove_replica(v1::RemoveReplicaRequest { to, replica }).await?;
            format!("replica {replica} is removed\n")
        }
        Command::Replace { replica, node, at } => {
            let (replica, node, grpc) = (*replica, node.clone(), at.to_string());
            let request = v1::ReplaceReplicaRequest { to, replica, node, grpc };
            let new = client.replace_replica(request).await?.into_inner().replica;
            format!("replica {new} is catching up; replica {replica} is removed once it votes\n")
        }
        Command::Transfer { replica } => {
            let replica = replica.unwrap_or(0);
            let request = v1::TransferLeadershipRequest { to, replica };
            let new = client.transfer_leadership(request).await?.into_inner().replica;
            format!("replica {new} is asked to lead\n")
        }
    })
}

/// A table of the members.
fn members(reply: &v1::MembersReply) -> String {
    let mut text = format!(
        "{:>7}  {:<16} {:<8} {:<7} {:>12} {:>9}  {}\n",
        "REPLICA", "NODE", "ROLE", "ALIVE", "MATCHED", "LAG", "GRPC"
    );
    for member in &reply.members {
        let info = member.replica.clone().unwrap_or_default();
        let role = match (info.id == reply.leader, member.voter) {
            (true, _) => "leader",
            (false, true) => "voter",
            (false, false) => "learner",
        };
        let alive = match (member.active, member.resyncing) {
            (true, true) => "resync",
            (true, false) => "yes",
            (false, _) => "no",
        };
        let grpc = info.addresses.unwrap_or_default().grpc;
        let (id, node, matched, lag) = (info.id, info.node, member.matched, member.lag);
        let line = writeln!(
            text,
            "{id:>7}  {node:<16} {role:<8} {alive:<7} {matched:>12} {lag:>9}  {grpc}"
        );
        debug_assert!(line.is_ok(), "a String takes everything");
    }
    text
}

/// One replica's standing in a few lines.
fn status(reply: &v1::StatusReply) -> String {
    let me = reply.me.clone().unwrap_or_default();
    let role = match reply.role() {
        Role::Unspecified => "unknown",
        Role::Leader => "leader",
        Role::Follower => "follower",
        Role::Candidate => "candidate",
        Role::Learner => "learner",
        Role::Forming => "not formed yet",
        Role::Removed => "removed from its group",
    };
    let (id, node, term) = (me.id, me.node, reply.term);
    let (applied, committed) = (reply.applied, reply.committed);
    let leader = match reply.leader {
        0 => "none known".to_owned(),
        leader => leader.to_string(),
    };
    let mut text = format!(
        "replica {id} on {node}: {role}, term {term}, leader {leader}, applied {applied} of \
         {committed}\n"
    );
    if let Some(resync) = &reply.resync {
        let (done, total, eta) = (resync.bytes_done, resync.bytes_total, resync.eta_ms / 1000);
        text += &format!("resync: {done} of {total} bytes, about {eta} s to go\n");
    }
    if let Some(scrub) = &reply.scrub {
        let running = if scrub.running { ", one is running" } else { "" };
        let (passes, found, repaired) = (scrub.passes, scrub.mismatches, scrub.repaired);
        text += &format!("scrub: {passes} passes{running}; {found} found, {repaired} repaired\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_is_shown_with_its_role_and_whether_it_lives() {
        let member = |id, voter, active, resyncing| v1::Member {
            replica: Some(v1::ReplicaInfo { id, node: format!("n{id}"), ..Default::default() }),
            voter,
            active,
            resyncing,
            matched: 90 + id,
            lag: 10 - id,
        };
        let table = members(&v1::MembersReply {
            leader: 1,
            members: vec![
                member(1, true, true, false),
                member(2, true, false, false),
                member(4, false, true, true),
            ],
            ..Default::default()
        });
        let rows: Vec<Vec<&str>> =
            table.lines().skip(1).map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(rows[0], ["1", "n1", "leader", "yes", "91", "9"]);
        assert_eq!(rows[1], ["2", "n2", "voter", "no", "92", "8"]);
        assert_eq!(rows[2], ["4", "n4", "learner", "resync", "94", "6"]);
    }

    #[test]
    fn a_status_tells_what_is_under_way() {
        let mut reply = v1::StatusReply {
            me: Some(v1::ReplicaInfo { id: 4, node: "n2".to_owned(), ..Default::default() }),
            term: 7,
            applied: 5,
            committed: 9,
            resync: Some(v1::ResyncStatus { bytes_done: 10, bytes_total: 40, eta_ms: 3000 }),
            ..Default::default()
        };
        reply.set_role(Role::Learner);
        assert_eq!(
            status(&reply),
            "replica 4 on n2: learner, term 7, leader none known, applied 5 of 9\n\
             resync: 10 of 40 bytes, about 3 s to go\n"
        );
    }
}
