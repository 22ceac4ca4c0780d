//! `nbdctl health`: whether the cluster is well.

use nbd_api::{Cluster, ClusterHealth, HealthStatus};

use crate::api::{Connection, Url};
use crate::failure::{FAILED, Failure, UNAVAILABLE};
use crate::output::{Cell, Column, Output, Session, human};
use crate::shard;

/// For `--help`.
pub(crate) const HELP: &str = "\
Examples:
  nbdctl health
  nbdctl health --output json | jq -r .status
  nbdctl health > /dev/null || echo 'look at the cluster'

Exit codes: 0 all is there; 1 degraded: it serves, and a replica is missing, behind or full;
4 down: a shard does not serve, or there is no control API. Others as `nbdctl --help` has them.";

/// Prints it, and ends as the cluster is.
pub(crate) fn run(connection: &Connection) -> Result<(), Failure> {
    let mut session = Session::new(connection)?;
    let answer = session.client.get(&Url::new("/cluster/health"))?;
    let health: ClusterHealth = answer.read()?;
    if session.out.is_json() {
        session.out.answer(&answer, |_, _: &ClusterHealth| String::new())?;
    } else {
        let cluster = session.client.fetch(&Url::new("/cluster"))?;
        let text = text(&session.out, &cluster, &health);
        session.out.print(&text)?;
    }
    match health.status {
        HealthStatus::Ok => Ok(()),
        HealthStatus::Degraded => Err(Failure::silent(FAILED)),
        HealthStatus::Down => Err(Failure::silent(UNAVAILABLE)),
    }
}

fn text(out: &Output, cluster: &Cluster, health: &ClusterHealth) -> String {
    let status = out.styled(&shard::health(health.status));
    let Cluster { nodes, nodes_up, .. } = cluster;
    let shards = human::counted(cluster.shards.into(), "shard");
    let volumes = human::counted(cluster.volumes, "volume");
    let (size, taken) = (human::amount(cluster.provisioned), human::amount(cluster.allocated));
    let sessions = human::counted(cluster.sessions, "session");
    let name = human::visible(&cluster.name);
    let summary = format!(
        "{name}: {status}; {shards}, {nodes_up} of {} up, {volumes} ({size}, {taken} allocated), \
         {sessions}\n",
        human::counted((*nodes).into(), "node"),
    );
    let columns = vec![Column::right("SHARD"), Column::left("HEALTH"), Column::left("REASON")];
    let row = |of_shard: &nbd_api::ShardHealth| {
        let reason = human::visible(of_shard.reason.as_deref().unwrap_or_default());
        vec![Cell::number(of_shard.shard.into()), shard::health(of_shard.status), reason.into()]
    };
    summary + &out.table(columns, health.shards.iter().map(row).collect())
}
