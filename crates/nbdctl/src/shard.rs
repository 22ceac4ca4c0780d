//! `nbdctl shard`: the shards, and which nodes hold them.

use clap::Subcommand;
use nbd_api::{
    AddMember, HealthStatus, Member, MemberRole, ReplaceMember, Shard, TransferLeadership,
};
use nbd_service::HostPort;

use crate::api::{Connection, Extent, Url};
use crate::failure::Failure;
use crate::operation;
use crate::output::{Cell, Column, Output, Session, Style, human, terminal};

/// Flags of `nbdctl shard`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show all shards.
    #[command(after_help = "Example:\n  nbdctl shard list")]
    List,
    /// Show a shard and its replicas.
    #[command(after_help = "Example:\n  nbdctl shard show 0")]
    Show {
        /// Its number.
        shard: u32,
    },
    /// Hand leadership to another node. Clients see a pause of some milliseconds.
    #[command(after_help = "Examples:\n  nbdctl shard transfer 0\n  \
                            nbdctl shard transfer 0 nbd-1-2")]
    Transfer {
        /// The shard's number.
        shard: u32,
        /// The node. Default: the most advanced one that is not cordoned.
        node: Option<String>,
    },
    /// Add a replica on a node that runs with an empty data directory and lists the shard.
    #[command(after_help = ADD_HELP)]
    Add {
        /// The shard's number.
        shard: u32,
        /// The node.
        node: String,
        /// Its gRPC address. Default: as the control API's configuration has it.
        #[arg(long, value_name = "ADDR")]
        grpc: Option<HostPort>,
        /// Show how it gets on until it votes.
        #[arg(long)]
        wait: bool,
    },
    /// Remove a replica for good. At a terminal, it asks first.
    #[command(after_help = "Example:\n  nbdctl shard remove 0 3\n\n\
                            A replica that the majority needs is a conflict (exit code 3).")]
    Remove {
        /// The shard's number.
        shard: u32,
        /// The replica's id, as `show` has it.
        replica: u64,
        /// Do not ask.
        #[arg(long, short)]
        yes: bool,
    },
    /// Have another node take over from a replica, dead or alive: the old one is removed once the
    /// new one votes.
    #[command(after_help = REPLACE_HELP)]
    Replace {
        /// The shard's number.
        shard: u32,
        /// The id of the replica that goes, as `show` has it.
        replica: u64,
        /// The node that takes over.
        node: String,
        /// Its gRPC address. Default: as the control API's configuration has it.
        #[arg(long, value_name = "ADDR")]
        grpc: Option<HostPort>,
        /// Show how it gets on until it is done.
        #[arg(long)]
        wait: bool,
    },
}

/// For `--help`.
pub(crate) const HELP: &str = "\
Examples:
  nbdctl shard list
  nbdctl shard show 0
  nbdctl shard replace 0 2 nbd-1-4 --wait";

const ADD_HELP: &str = "\
Examples:
  nbdctl shard add 0 nbd-1-4 --wait
  nbdctl shard add 0 nbd-1-4 --grpc 10.0.0.4:7400";

const REPLACE_HELP: &str = "\
Examples:
  nbdctl shard replace 0 2 nbd-1-4 --wait
  nbdctl shard replace 0 2 nbd-1-4 --grpc 10.0.0.4:7400
  nbdctl operation cancel replace-0-2-4";

fn url(shard: u32) -> Url {
    Url::new("/shards").then(shard)
}

/// Runs one command.
pub(crate) fn run(args: Args, connection: &Connection) -> Result<(), Failure> {
    let mut session = Session::new(connection)?;
    match args.command {
        Command::List => list(session),
        Command::Show { shard } => session.show(&url(shard), details),
        Command::Transfer { shard, node } => {
            let url = url(shard).then("transfer");
            let answer = session.client.post(&url, &TransferLeadership { node })?;
            session.out.answer(&answer, |_, shard: &Shard| match &shard.leader {
                Some(leader) => format!("shard {} is led by {leader}\n", shard.shard),
                None => format!("shard {} elects its leader\n", shard.shard),
            })
        }
        Command::Add { shard, node, grpc, wait } => {
            let grpc = grpc.map(|grpc| grpc.to_string());
            let url = url(shard).then("members");
            let answer = session.client.post(&url, &AddMember { node, grpc })?;
            operation::begun(&mut session, &answer, wait)
        }
        Command::Remove { shard, replica, yes } => {
            let question = format!("Remove replica {replica} of shard {shard}, with its copy?");
            terminal::confirm(&question, yes)?;
            session.client.delete(&url(shard).then("members").then(replica))?;
            session.out.tell(&format!("replica {replica} of shard {shard} removed"))
        }
        Command::Replace { shard, replica, node, grpc, wait } => {
            let grpc = grpc.map(|grpc| grpc.to_string());
            let url = url(shard).then("members").then(replica).then("replace");
            let answer = session.client.post(&url, &ReplaceMember { node, grpc })?;
            operation::begun(&mut session, &answer, wait)
        }
    }
}

fn list(mut session: Session) -> Result<(), Failure> {
    let columns = vec![
        Column::right("SHARD"),
        Column::left("HEALTH"),
        Column::left("LEADER"),
        Column::right("REPLICAS"),
        Column::right("LAG"),
        Column::right("VOLUMES"),
        Column::right("PROVISIONED"),
        Column::right("ALLOCATED"),
        Column::right("FREE"),
        Column::right("SESSIONS"),
        Column::left("REASON"),
    ];
    session.list(&Url::new("/shards"), Extent::Whole, columns, |_, shard: &Shard| {
        let alive = shard.members.iter().filter(|member| member.alive).count();
        let lag = shard.members.iter().filter(|m| m.alive).map(|member| member.lag).max();
        vec![
            Cell::number(shard.shard.into()),
            health(shard.health),
            optional(shard.leader.as_deref()),
            format!("{alive}/{}", shard.members.len()).into(),
            lag.map_or_else(Cell::none, Cell::number),
            Cell::number(shard.volumes),
            human::amount(shard.provisioned).into(),
            human::amount(shard.allocated).into(),
            shard.writable.map_or_else(Cell::none, |bytes| human::amount(bytes).into()),
            Cell::number(shard.sessions.into()),
            human::visible(shard.reason.as_deref().unwrap_or_default()).into(),
        ]
    })
}

/// How something is, in its colour.
pub(crate) fn health(status: HealthStatus) -> Cell {
    match status {
        HealthStatus::Ok => Cell::new("ok", Style::Good),
        HealthStatus::Degraded => Cell::new("degraded", Style::Warn),
        HealthStatus::Down => Cell::new("down", Style::Bad),
    }
}

pub(crate) fn role(role: MemberRole) -> &'static str {
    match role {
        MemberRole::Leader => "leader",
        MemberRole::Voter => "voter",
        MemberRole::Learner => "learner",
    }
}

pub(crate) fn optional(text: Option<&str>) -> Cell {
    text.map_or_else(Cell::none, |text| human::visible(text).into())
}

fn details(out: &Output, shard: &Shard) -> String {
    let reason = shard.reason.iter().map(|reason| human::visible(reason).into());
    let writable = shard.writable.map_or_else(Cell::none, |bytes| human::amount(bytes).into());
    let details = out.details(&[
        ("Shard", vec![Cell::number(shard.shard.into())]),
        ("Health", vec![health(shard.health)]),
        ("Reason", reason.collect()),
        ("Leader", vec![optional(shard.leader.as_deref())]),
        ("Term", vec![Cell::number(shard.term)]),
        ("Committed", vec![Cell::number(shard.committed)]),
        ("Volumes", vec![Cell::number(shard.volumes)]),
        ("Provisioned", vec![human::amount(shard.provisioned).into()]),
        ("Allocated", vec![human::amount(shard.allocated).into()]),
        ("Free", vec![writable]),
        ("Sessions", vec![Cell::number(shard.sessions.into())]),
    ]);
    let columns = vec![
        Column::right("REPLICA"),
        Column::left("NODE"),
        Column::left("ROLE"),
        Column::left("ALIVE"),
        Column::right("LAG"),
        Column::right("FREE"),
        Column::left("RESYNC"),
    ];
    let members = out.table(columns, shard.members.iter().map(member).collect());
    format!("{details}\n{members}")
}

fn member(member: &Member) -> Vec<Cell> {
    let alive = if member.alive { "yes".into() } else { Cell::new("no", Style::Bad) };
    let resync = member.resync.map(|resync| {
        let (done, total) = (human::amount(resync.bytes_done), human::amount(resync.bytes_total));
        let left = resync.seconds_left.map(|left| format!(", {} left", human::seconds(left)));
        format!("{done} of {total}{}", left.unwrap_or_default())
    });
    vec![
        Cell::number(member.replica),
        human::visible(&member.node).into(),
        role(member.role).into(),
        alive,
        Cell::number(member.lag),
        member.writable.map_or_else(Cell::none, |bytes| human::amount(bytes).into()),
        optional(resync.as_deref()),
    ]
}
