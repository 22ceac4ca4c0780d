//! `nbdctl node`: the processes that hold replicas.

use clap::Subcommand;
use nbd_api::{MemberRole, Node, NodeState};

use crate::api::{Connection, Extent, Url};
use crate::failure::Failure;
use crate::operation;
use crate::output::{Cell, Column, Output, Session, Style, human};
use crate::shard::{optional, role};

/// Flags of `nbdctl node`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show all nodes.
    #[command(after_help = "Example:\n  nbdctl node list")]
    List,
    /// Show a node and its replicas.
    #[command(after_help = "Example:\n  nbdctl node show nbd-1-1")]
    Show {
        /// Its name.
        node: String,
    },
    /// Cordon a node and move leadership away from it, to take it down for maintenance. Clients see
    /// a pause of some milliseconds.
    #[command(after_help = "Examples:\n  nbdctl node drain nbd-1-1 --wait\n  \
                            nbdctl node uncordon nbd-1-1                   # when it is back")]
    Drain {
        /// Its name.
        node: String,
        /// Show how it gets on until it is done.
        #[arg(long)]
        wait: bool,
    },
    /// Keep leadership and new replicas away from a node.
    #[command(after_help = "Example:\n  nbdctl node cordon nbd-1-1")]
    Cordon {
        /// Its name.
        node: String,
    },
    /// Let a node lead and take new replicas again.
    #[command(after_help = "Example:\n  nbdctl node uncordon nbd-1-1")]
    Uncordon {
        /// Its name.
        node: String,
    },
}

/// For `--help`.
pub(crate) const HELP: &str = "\
Examples:
  nbdctl node list
  nbdctl node drain nbd-1-1 --wait
  nbdctl node uncordon nbd-1-1";

fn url(node: &str) -> Url {
    Url::new("/nodes").then(node)
}

/// Runs one command.
pub(crate) fn run(args: Args, connection: &Connection) -> Result<(), Failure> {
    let mut session = Session::new(connection)?;
    match args.command {
        Command::List => list(session),
        Command::Show { node } => session.show(&url(&node), details),
        Command::Drain { node, wait } => {
            let answer = session.client.act(&url(&node).then("drain"))?;
            operation::begun(&mut session, &answer, wait)
        }
        Command::Cordon { node } => cordon(session, &node, "cordon"),
        Command::Uncordon { node } => cordon(session, &node, "uncordon"),
    }
}

fn cordon(mut session: Session, node: &str, action: &str) -> Result<(), Failure> {
    let answer = session.client.act(&url(node).then(action))?;
    session.out.answer(&answer, |_, node: &Node| {
        let not = if node.cordoned { "" } else { "not " };
        format!("{} is {not}cordoned\n", human::visible(&node.node))
    })
}

fn list(mut session: Session) -> Result<(), Failure> {
    let columns = vec![
        Column::left("NODE"),
        Column::left("STATE"),
        Column::left("VERSION"),
        Column::right("UP FOR"),
        Column::right("LEADS"),
        Column::right("REPLICAS"),
        Column::right("DISK"),
        Column::right("FREE"),
        Column::left("GRPC"),
        Column::left("REASON"),
    ];
    session.list(&Url::new("/nodes"), Extent::Whole, columns, |out, node: &Node| {
        let leads = node.shards.iter().filter(|shard| shard.role == MemberRole::Leader).count();
        let amount =
            |bytes: Option<u64>| bytes.map_or_else(Cell::none, |bytes| human::amount(bytes).into());
        let age = node.started.map(|then| human::age(out.now, then));
        vec![
            human::visible(&node.node).into(),
            state(node),
            optional(node.version.as_deref()),
            optional(age.as_deref()),
            Cell::number(leads as u64),
            Cell::number(node.shards.len() as u64),
            amount(node.disk),
            amount(node.disk_free),
            human::visible(&node.grpc).into(),
            human::visible(node.reason.as_deref().unwrap_or_default()).into(),
        ]
    })
}

fn state(node: &Node) -> Cell {
    match (node.state, node.cordoned) {
        (NodeState::Up, false) => Cell::new("up", Style::Good),
        (NodeState::Up, true) => Cell::new("up,cordoned", Style::Warn),
        (NodeState::Down, false) => Cell::new("down", Style::Bad),
        (NodeState::Down, true) => Cell::new("down,cordoned", Style::Bad),
    }
}

fn details(out: &Output, node: &Node) -> String {
    let amount = |bytes: Option<u64>| -> Vec<Cell> {
        bytes.map(|bytes| human::amount(bytes).into()).into_iter().collect()
    };
    let started = node.started.map(|then| human::moment(out.now, Some(then)).into());
    let details = out.details(&[
        ("Node", vec![human::visible(&node.node).into()]),
        ("State", vec![state(node)]),
        ("Reason", node.reason.iter().map(|reason| human::visible(reason).into()).collect()),
        ("Version", node.version.iter().map(|version| human::visible(version).into()).collect()),
        ("Started", started.into_iter().collect()),
        ("Disk", amount(node.disk)),
        ("Free", amount(node.disk_free)),
        ("Writable", amount(node.writable)),
        ("gRPC", vec![human::visible(&node.grpc).into()]),
    ]);
    let columns = vec![Column::right("SHARD"), Column::right("REPLICA"), Column::left("ROLE")];
    let row = |shard: &nbd_api::NodeShard| {
        let number = |number| Cell::number(number);
        vec![number(shard.shard.into()), number(shard.replica), role(shard.role).into()]
    };
    let shards = out.table(columns, node.shards.iter().map(row).collect());
    format!("{details}\n{shards}")
}
