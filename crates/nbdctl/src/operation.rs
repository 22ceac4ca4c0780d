//! `nbdctl operation`: what takes long.

use clap::Subcommand;
use nbd_api::{Operation, OperationState};

use crate::api::{Answer, Connection, Extent, News, Url};
use crate::failure::{FAILED, Failure};
use crate::output::{Cell, Column, Output, ProgressLine, Session, Style, human, progress_counts};

/// Flags of `nbdctl operation`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show the operations that are under way.
    #[command(after_help = "Example:\n  nbdctl operation list")]
    List,
    /// Show how an operation stands.
    #[command(after_help = "Example:\n  nbdctl operation show replace-0-2-4")]
    Show {
        /// Its id.
        id: String,
    },
    /// Show how an operation gets on, until it is over. With --output json, one line for each
    /// change.
    #[command(after_help = "Example:\n  nbdctl operation watch replace-0-2-4\n\n\
                            An operation that is cancelled, or cannot succeed, ends with 1.")]
    Watch {
        /// Its id.
        id: String,
    },
    /// Cancel an operation.
    #[command(after_help = "Example:\n  nbdctl operation cancel drain-nbd-1-1\n\n\
                            One that cannot be cancelled is a conflict (exit code 3).")]
    Cancel {
        /// Its id.
        id: String,
    },
}

/// For `--help`.
pub(crate) const HELP: &str = "\
Examples:
  nbdctl operation list
  nbdctl operation watch resync-0-3
  nbdctl operation cancel drain-nbd-1-1";

/// Runs one command.
pub(crate) fn run(args: Args, connection: &Connection) -> Result<(), Failure> {
    let mut session = Session::new(connection)?;
    let url = |id: &str| Url::new("/operations").then(id);
    match args.command {
        Command::List => list(session),
        Command::Show { id } => session.show(&url(&id), details),
        Command::Watch { id } => {
            let json = session.out.is_json();
            watch(&mut session, &id, json)
        }
        Command::Cancel { id } => {
            let answer = session.client.delete(&url(&id))?;
            session.out.answer(&answer, |_, operation: &Operation| line(operation))
        }
    }
}

fn list(mut session: Session) -> Result<(), Failure> {
    let columns = vec![
        Column::left("OPERATION"),
        Column::left("STATE"),
        Column::left("PROGRESS"),
        Column::left("MESSAGE"),
    ];
    session.list(&Url::new("/operations"), Extent::Whole, columns, |_, operation: &Operation| {
        let progress = operation.progress.as_ref().map(progress_counts);
        vec![
            human::visible(&operation.id).into(),
            state(operation.state),
            progress.map_or_else(Cell::none, Cell::from),
            human::visible(&operation.message).into(),
        ]
    })
}

fn state(state: OperationState) -> Cell {
    match state {
        OperationState::Running => "running".into(),
        OperationState::Done => Cell::new("done", Style::Good),
        OperationState::Ended => Cell::new("ended", Style::Warn),
    }
}

fn details(out: &Output, operation: &Operation) -> String {
    let Operation { id, message, shard, node, progress, cancellable, .. } = operation;
    let shard = shard.map(|shard| Cell::number(shard.into()));
    let node = node.as_ref().map(|node| human::visible(node).into());
    let progress = progress.as_ref().map(|progress| progress_counts(progress).into());
    out.details(&[
        ("Operation", vec![human::visible(id).into()]),
        ("State", vec![state(operation.state)]),
        ("Message", vec![human::visible(message).into()]),
        ("Shard", shard.into_iter().collect()),
        ("Node", node.into_iter().collect()),
        ("Progress", progress.into_iter().collect()),
        ("Cancellable", vec![if *cancellable { "yes" } else { "no" }.into()]),
    ])
}

fn line(operation: &Operation) -> String {
    let (id, message) = (human::visible(&operation.id), human::visible(&operation.message));
    format!("{id} {}: {message}\n", state(operation.state).text)
}

/// What to do with an operation that was begun: print it, or, with `wait`, see it through.
pub(crate) fn begun(session: &mut Session, answer: &Answer, wait: bool) -> Result<(), Failure> {
    if wait {
        let operation: Operation = answer.read()?;
        return watch(session, &operation.id, false);
    }
    session.out.answer(answer, |_, operation: &Operation| {
        let id = human::visible(&operation.id);
        format!("{}To watch it: nbdctl operation watch {id}\n", line(operation))
    })
}

/// Shows how an operation gets on until it is over, and then how it ended. With `each`, as JSON,
/// each change.
fn watch(session: &mut Session, id: &str, each: bool) -> Result<(), Failure> {
    let Session { client, out } = session;
    let mut progress = (!each).then(ProgressLine::new);
    let mut last = String::new();
    let operation = client.watch(id, &mut |news| {
        match (news, &mut progress) {
            (News::Changed(operation, _), Some(progress))
                if operation.state == OperationState::Running =>
            {
                progress.show(operation);
            }
            (News::Changed(_, json), Some(_)) => json.clone_into(&mut last),
            (News::Changed(_, json), None) => out.print(&format!("{json}\n"))?,
            (News::Unknown(failure), Some(progress)) => {
                progress.say(&format!("{}: {failure}; still watching", human::visible(id)));
            }
            (News::Unknown(failure), None) => {
                eprintln!("{}: {failure}; still watching", human::visible(id));
            }
        }
        Ok(())
    })?;
    drop(progress);
    if !each {
        let answer = Answer { status: 200, text: last };
        out.answer(&answer, |_, operation: &Operation| line(operation))?;
    }
    match operation.state {
        OperationState::Ended => Err(Failure::silent(FAILED)),
        OperationState::Running | OperationState::Done => Ok(()),
    }
}
