//! `nbdctl volume`: making volumes, looking at them, growing and deleting them.

use std::collections::BTreeMap;
use std::str::FromStr;

use clap::{Subcommand, ValueEnum};
use nbd_api::{
    CreateVolume, Labels, ResizeVolume, TraceVolume, Traced, UpdateVolume, Volume, VolumeDetails,
};
use nbd_service::ByteSize;

use crate::api::{Connection, Url};
use crate::failure::{FAILED, Failure};
use crate::output::{Cell, Column, Output, Session, human, terminal};

/// Flags of `nbdctl volume`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a volume.
    #[command(after_help = CREATE_HELP)]
    Create {
        /// Its name: what clients attach to.
        name: String,
        /// Its size, as in 10GiB. Default: as configured for the cluster.
        #[arg(long, value_name = "SIZE")]
        size: Option<ByteSize>,
        /// Free text.
        #[arg(long, default_value = "", hide_default_value = true, value_name = "TEXT")]
        description: String,
        /// A label to find it by; as often as needed.
        #[arg(long = "label", value_name = "KEY=VALUE")]
        labels: Vec<Label>,
        /// Any word that is used for this creation only: with it the command can be repeated, and
        /// makes the volume once.
        #[arg(long, value_name = "WORD", value_parser = key)]
        key: Option<String>,
    },
    /// Show volumes, by name or otherwise sorted.
    #[command(after_help = LIST_HELP)]
    List {
        /// Only those whose names begin so.
        #[arg(long, value_name = "TEXT")]
        prefix: Option<String>,
        /// Only those with this label; if given more than once, with all of them.
        #[arg(long = "label", value_name = "KEY=VALUE")]
        labels: Vec<Label>,
        /// What to sort by.
        #[arg(long, default_value = "name", value_name = "ORDER")]
        sort: Sort,
        /// The largest, or latest, or last first.
        #[arg(long)]
        reverse: bool,
        /// At most so many. Default: all.
        #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u64).range(1..))]
        limit: Option<u64>,
    },
    /// Show all about a volume.
    #[command(after_help = "Examples:\n  nbdctl volume show vol1\n  \
                            nbdctl volume show vol1 --output json | jq .allocated")]
    Show {
        /// Its name.
        name: String,
    },
    /// Make a volume larger. Clients see the new size when they attach next.
    #[command(after_help = GROW_HELP)]
    Grow {
        /// Its name.
        name: String,
        /// Its new size, as in 20GiB; or by how much it grows, as in +5GiB.
        size: NewSize,
        /// Allow a smaller size: what lies behind the new end is lost.
        #[arg(long)]
        shrink_and_lose_data: bool,
    },
    /// Change a volume's description and labels.
    #[command(after_help = SET_HELP)]
    Set {
        /// Its name.
        name: String,
        /// Free text.
        #[arg(long, value_name = "TEXT", required_unless_present_any = ["labels", "unlabel"])]
        description: Option<String>,
        /// A label to set; as often as needed.
        #[arg(long = "label", value_name = "KEY=VALUE")]
        labels: Vec<Label>,
        /// A label to take away; as often as needed.
        #[arg(long, value_name = "KEY")]
        unlabel: Vec<String>,
    },
    /// Trace the next requests of a volume, from its clients to every replica.
    #[command(after_help = TRACE_HELP)]
    Trace {
        /// Its name.
        name: String,
        /// How many requests of each attached client.
        #[arg(long, default_value_t = 10, value_name = "COUNT",
              value_parser = clap::value_parser!(u32).range(1..=1000))]
        requests: u32,
    },
    /// Delete volumes, with all that is on them. At a terminal, it asks first.
    #[command(after_help = RM_HELP)]
    Rm {
        /// Their names.
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
        /// Also while clients are attached, who are disconnected.
        #[arg(long)]
        force: bool,
        /// Do not ask.
        #[arg(long, short)]
        yes: bool,
    },
}

/// For `--help`.
pub(crate) const HELP: &str = "\
Examples:
  nbdctl volume create vol1 --size 10GiB --label team=a
  nbdctl volume list --label team=a
  nbdctl volume grow vol1 +5GiB
  nbdctl volume rm vol1";

const CREATE_HELP: &str = "\
Examples:
  nbdctl volume create vol1 --size 10GiB
  nbdctl volume create db/main --size 1TiB --description 'the shop' --label team=a --label tier=gold
  nbdctl volume create vol2 --key order-4711     # may be repeated if no answer came

A name that is taken is a conflict (exit code 3).";

const LIST_HELP: &str = "\
Examples:
  nbdctl volume list
  nbdctl volume list --prefix db/ --label tier=gold
  nbdctl volume list --sort size --reverse --limit 10
  nbdctl volume list --output json | jq -r '.[].name'

If a shard does not answer, the rest is shown, and the exit code is 4.";

const GROW_HELP: &str = "\
Examples:
  nbdctl volume grow vol1 20GiB
  nbdctl volume grow vol1 +5GiB
  nbdctl volume grow vol1 1GiB --shrink-and-lose-data";

const SET_HELP: &str = "\
Examples:
  nbdctl volume set vol1 --description 'backups'
  nbdctl volume set vol1 --label tier=gold --unlabel team";

const TRACE_HELP: &str = "\
Examples:
  nbdctl volume trace vol1
  nbdctl volume trace vol1 --requests 100 --output json | jq -r .search

Traces go to the collector that the processes were started with (OTEL_EXPORTER_OTLP_ENDPOINT or
JAEGER_AGENT_HOST). Where they can be seen is told if the control API knows (--jaeger-ui).";

const RM_HELP: &str = "\
Examples:
  nbdctl volume rm vol1
  nbdctl volume rm scratch1 scratch2 --yes
  nbdctl volume rm vol1 --force                  # disconnects its clients

Without --force, a volume with clients is a conflict (exit code 3). Its space comes back soon
after it is gone.";

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Sort {
    Name,
    Size,
    Created,
    Modified,
}

/// A label, as `key=value`.
#[derive(Debug, Clone)]
struct Label {
    key: String,
    value: String,
}

impl FromStr for Label {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((key, value)) if !key.is_empty() => {
                Ok(Self { key: key.to_owned(), value: value.to_owned() })
            }
            _ => Err("write KEY=VALUE".to_owned()),
        }
    }
}

/// A size, or a difference to the present one.
#[derive(Debug, Clone, Copy)]
enum NewSize {
    To(u64),
    By(u64),
}

impl FromStr for NewSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let size =
            |text: &str| text.parse().map(ByteSize::bytes).map_err(|error| error.to_string());
        match text.strip_prefix('+') {
            Some(more) => size(more).map(Self::By),
            None => size(text).map(Self::To),
        }
    }
}

/// A word that can be in a header.
fn key(text: &str) -> Result<String, String> {
    let fits = (1..=255).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic());
    if fits { Ok(text.to_owned()) } else { Err("1 to 255 visible ASCII characters".to_owned()) }
}

fn url(name: &str) -> Url {
    Url::new("/volumes").then(name)
}

/// Runs one command.
pub(crate) fn run(args: Args, connection: &Connection) -> Result<(), Failure> {
    let session = Session::new(connection)?;
    match args.command {
        Command::Create { name, size, description, labels, key } => {
            let labels = labels.into_iter().map(|label| (label.key, label.value)).collect();
            let size = size.map(ByteSize::bytes);
            let volume = CreateVolume { name, size, description, labels };
            create(session, &volume, key.as_deref())
        }
        Command::List { prefix, labels, sort, reverse, limit } => {
            let minus = if reverse { "-" } else { "" };
            let sort = sort.to_possible_value().map(|sort| format!("{minus}{}", sort.get_name()));
            let mut url = Url::new("/volumes").with_some("prefix", prefix).with_some("sort", sort);
            for Label { key, value } in labels {
                url = url.with("label", format!("{key}={value}"));
            }
            list(session, &url, limit)
        }
        Command::Show { name } => show(session, &name),
        Command::Grow { name, size, shrink_and_lose_data: force } => {
            grow(session, &name, size, force)
        }
        Command::Set { name, description, labels, unlabel } => {
            let mut changes: BTreeMap<String, Option<String>> =
                unlabel.into_iter().map(|key| (key, None)).collect();
            changes.extend(labels.into_iter().map(|label| (label.key, Some(label.value))));
            set(session, &name, &UpdateVolume { description, labels: changes })
        }
        Command::Trace { name, requests } => trace(session, &name, requests),
        Command::Rm { names, force, yes } => remove(session, &names, force, yes),
    }
}

fn create(mut session: Session, volume: &CreateVolume, key: Option<&str>) -> Result<(), Failure> {
    let answer = session.client.create(&Url::new("/volumes"), volume, key)?;
    let verb = if answer.status == 200 { "was there already" } else { "created" };
    session.out.answer(&answer, |_, volume: &Volume| {
        let (name, size) = (human::name(&volume.name), human::size(volume.size));
        format!("{name} {verb}: {size}, on shard {}\n", volume.shard)
    })
}

fn list(mut session: Session, url: &Url, limit: Option<u64>) -> Result<(), Failure> {
    let columns = vec![
        Column::left("NAME"),
        Column::right("SIZE"),
        Column::right("SHARD"),
        Column::right("AGE"),
        Column::left("LABELS"),
    ];
    session.list(url, limit.into(), columns, |out, volume: &Volume| {
        let age = volume.created.map_or_else(Cell::none, |then| human::age(out.now, then).into());
        vec![
            human::name(&volume.name).into(),
            human::size(volume.size).into(),
            Cell::number(volume.shard.into()),
            age,
            labels(&volume.labels).join(",").into(),
        ]
    })
}

/// Each as `key=value`.
fn labels(labels: &Labels) -> Vec<String> {
    let pair = |(key, value): (&String, &String)| {
        format!("{}={}", human::visible(key), human::visible(value))
    };
    labels.iter().map(pair).collect()
}

fn show(mut session: Session, name: &str) -> Result<(), Failure> {
    session.show(&url(name), |out, details: &VolumeDetails| details_of(out, details))
}

fn details_of(out: &Output, details: &VolumeDetails) -> String {
    let VolumeDetails { volume, allocated, sessions, leader } = details;
    let leader = match leader {
        Some(leader) => format!("led by {leader}"),
        None => "without a leader".to_owned(),
    };
    out.details(&[
        ("Name", vec![human::name(&volume.name).into()]),
        ("Size", vec![human::size(volume.size).into()]),
        ("Allocated", vec![human::amount(*allocated).into()]),
        ("Shard", vec![format!("{}, {leader}", volume.shard).into()]),
        ("Sessions", vec![Cell::number((*sessions).into())]),
        ("Created", vec![human::moment(out.now, volume.created).into()]),
        ("Modified", vec![human::moment(out.now, volume.modified).into()]),
        ("Id", vec![human::visible(&volume.id).into()]),
        ("Description", volume.description.lines().map(|l| human::visible(l).into()).collect()),
        ("Labels", labels(&volume.labels).into_iter().map(Into::into).collect()),
    ])
}

fn grow(mut session: Session, name: &str, size: NewSize, force: bool) -> Result<(), Failure> {
    let (size, force) = match size {
        NewSize::To(size) => (size, force),
        NewSize::By(more) => {
            let now = session.client.fetch::<Volume>(&url(name))?.size;
            let too_large = || Failure::new(FAILED, "that is more than can be counted");
            // Never less than there is, even if another has made it larger in between.
            (now.checked_add(more).ok_or_else(too_large)?, false)
        }
    };
    let answer = session.client.post(&url(name).then("resize"), &ResizeVolume { size, force })?;
    session.out.answer(&answer, |_, volume: &Volume| {
        format!("{} has {}\n", human::name(&volume.name), human::size(volume.size))
    })
}

fn set(mut session: Session, name: &str, update: &UpdateVolume) -> Result<(), Failure> {
    let answer = session.client.patch(&url(name), update)?;
    session.out.answer(&answer, |_, volume: &Volume| {
        let labels = labels(&volume.labels);
        let labels = if labels.is_empty() { "none".to_owned() } else { labels.join(",") };
        format!("{} changed; its labels: {labels}\n", human::name(&volume.name))
    })
}

fn trace(mut session: Session, name: &str, requests: u32) -> Result<(), Failure> {
    let answer = session.client.post(&url(name).then("trace"), &TraceVolume { requests })?;
    session.out.answer(&answer, |_, traced: &Traced| {
        let (name, Traced { requests, sessions, search }) = (human::name(name), traced);
        let (what, whose) = match (requests, sessions) {
            (_, 0) => {
                return format!("no client is attached to {name}: there is nothing to trace\n");
            }
            (1, 1) => ("the next request".to_owned(), "of its client".to_owned()),
            (_, 1) => (format!("the next {requests} requests"), "of its client".to_owned()),
            _ => {
                (format!("the next {requests} requests"), format!("of each of {sessions} clients"))
            }
        };
        let search = search.as_deref().map_or_else(String::new, |url| human::visible(url) + "\n");
        format!("{name}: {what} {whose} will be traced\n{search}")
    })
}

/// Deletes one after the other, also after one that could not be.
fn remove(mut session: Session, names: &[String], force: bool, yes: bool) -> Result<(), Failure> {
    let shown: Vec<String> = names.iter().map(|name| human::name(name)).collect();
    let question = match shown.as_slice() {
        [one] => format!("Delete {one} and all that is on it?"),
        many => {
            format!("Delete {} volumes and all that is on them: {}?", many.len(), many.join(" "))
        }
    };
    terminal::confirm(&question, yes)?;
    Failure::of_each(names, |name| {
        let url = url(name).with_some("force", force.then_some(true));
        session.client.delete(&url)?;
        session.out.tell(&format!("{} deleted", human::name(name)))
    })
}
