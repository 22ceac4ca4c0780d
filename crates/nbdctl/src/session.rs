//! `nbdctl session`: who uses volumes.

use clap::Subcommand;
use nbd_api::Session as Client;

use crate::api::{Connection, Url};
use crate::failure::Failure;
use crate::output::{Cell, Column, Session, human};

/// Flags of `nbdctl session`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show the clients of volumes: where they are, and what they have read and written.
    #[command(after_help = LIST_HELP)]
    List {
        /// Only those of this volume.
        #[arg(long, value_name = "NAME")]
        volume: Option<String>,
        /// Only those of the volumes of this shard.
        #[arg(long, value_name = "SHARD")]
        shard: Option<u32>,
        /// At most so many. Default: all.
        #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u64).range(1..))]
        limit: Option<u64>,
    },
    /// End sessions: their clients are disconnected, and what they have under way may be lost.
    #[command(after_help = END_HELP)]
    End {
        /// Their ids, as `list` shows them.
        #[arg(required = true, value_name = "ID")]
        ids: Vec<String>,
        /// The shard of their volumes: spares asking all.
        #[arg(long, value_name = "SHARD")]
        shard: Option<u32>,
    },
}

/// For `--help`.
pub(crate) const HELP: &str = "\
Examples:
  nbdctl session list --volume vol1
  nbdctl session end 0123456789abcdef0123456789abcdef";

const LIST_HELP: &str = "\
Examples:
  nbdctl session list
  nbdctl session list --volume vol1
  nbdctl session list --output json | jq -r '.[].attachment.client'

READ and WRITTEN count from when the client's requests began to go to LEADER.";

const END_HELP: &str = "\
Examples:
  nbdctl session end 0123456789abcdef0123456789abcdef
  nbdctl session list --volume vol1 --output json | jq -r '.[].id' | xargs nbdctl session end";

/// Runs one command.
pub(crate) fn run(args: Args, connection: &Connection) -> Result<(), Failure> {
    let session = Session::new(connection)?;
    match args.command {
        Command::List { volume, shard, limit } => {
            let url = Url::new("/sessions").with_some("volume", volume).with_some("shard", shard);
            list(session, &url, limit)
        }
        Command::End { ids, shard } => end(session, &ids, shard),
    }
}

fn list(mut session: Session, url: &Url, limit: Option<u64>) -> Result<(), Failure> {
    let columns = vec![
        Column::left("SESSION"),
        Column::left("VOLUME"),
        Column::left("CLIENT"),
        Column::left("VIA"),
        Column::left("LEADER"),
        Column::right("AGE"),
        Column::right("READ"),
        Column::right("WRITTEN"),
        Column::right("PENDING"),
    ];
    session.list(url, limit.into(), columns, |out, client: &Client| {
        let mut row = vec![human::visible(&client.id).into(), human::name(&client.volume).into()];
        match &client.attachment {
            None => row.extend((0..7).map(|_| Cell::none())),
            Some(attachment) => row.extend([
                human::visible(&attachment.client).into(),
                human::visible(&attachment.via).into(),
                human::visible(&attachment.leader).into(),
                human::age(out.now, attachment.since).into(),
                human::amount(attachment.counts.read_bytes).into(),
                human::amount(attachment.counts.write_bytes).into(),
                Cell::number(attachment.pending.into()),
            ]),
        }
        row
    })
}

/// Ends one after the other, also after one that could not be.
fn end(mut session: Session, ids: &[String], shard: Option<u32>) -> Result<(), Failure> {
    Failure::of_each(ids, |id| {
        let url = Url::new("/sessions").then(id).with_some("shard", shard);
        session.client.delete(&url)?;
        session.out.tell(&format!("{} ended", human::name(id)))
    })
}
