//! `nbdctl top`: volumes and shards at work.
//!
//! - `sample`: what the control API tells at a moment, and what that means for the time between two
//!   of them. `view`: the lines of the screen, and what keys do to it; both pure.
//! - `screen`: the terminal while it is ours, and how it gets back whatever happens.

mod sample;
mod screen;
mod view;

use std::io::{IsTerminal as _, stdin, stdout};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use nbd_api::{Activity, Shard};
use nbd_service::HumanDuration;

use self::sample::{Rates, Sample, VolumeSort};
use self::screen::{Event, Screen};
use self::view::{Change, View};
use crate::api::{Client, Connection, Extent, Url};
use crate::failure::Failure;
use crate::output::{Session, is_whole};

/// Shortest time between two looks.
const INTERVAL_MIN: Duration = Duration::from_millis(100);

/// Flags of `nbdctl top`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Time between two looks, from 100ms.
    #[arg(long, short, default_value = "1s", value_name = "TIME", value_parser = interval)]
    interval: HumanDuration,

    /// What volumes are sorted by, the largest first.
    #[arg(long, default_value = "iops", value_name = "ORDER")]
    sort: VolumeSort,

    /// Print one table, of what happens in one interval, and end. So it is without a terminal.
    #[arg(long)]
    once: bool,
}

/// For `--help`.
pub(crate) const HELP: &str = "\
Examples:
  nbdctl top
  nbdctl top --sort latency --interval 5s
  nbdctl top --once --output json > activity.json    # counts, not rates

Keys: i, b, l, s, n  sort by IOPS, bandwidth, latency, sessions, name
      r              turn the order round
      up, down, page up, page down, home, end  scroll
      + -            look less or more often
      p              pause
      q, Ctrl-C      end

IOPS are requests a second, read and written; latency is the time that a request takes at the
leader, on average, with what its shard waits for; LAG is how many entries of the log the slowest
live replica has yet to get.";

fn interval(text: &str) -> Result<HumanDuration, String> {
    let interval: HumanDuration = text.parse().map_err(|error| format!("{error}"))?;
    match interval.get() >= INTERVAL_MIN {
        true => Ok(interval),
        false => Err("100ms is the shortest".to_owned()),
    }
}

/// Shows the table once, or until a key ends it.
pub(crate) fn run(args: &Args, connection: &Connection) -> Result<(), Failure> {
    let session = Session::new(connection)?;
    if session.out.is_json() {
        return activity(session);
    }
    if args.once || !stdout().is_terminal() || !stdin().is_terminal() {
        return once(args, session);
    }
    live(args, session)
}

fn activity(mut session: Session) -> Result<(), Failure> {
    session.list(&Url::new("/activity"), Extent::Whole, Vec::new(), |_, _: &Activity| Vec::new())
}

fn once(args: &Args, mut session: Session) -> Result<(), Failure> {
    let (first, _) = look(&session.client)?;
    let next = first.at + args.interval.get();
    thread::sleep(next.saturating_duration_since(Instant::now()));
    let (second, missing) = look(&session.client)?;
    let mut rates = Rates::between(&first, &second);
    rates.sort(args.sort, false);
    let (shards, volumes) = view::tables(&rates);
    let [shards, volumes] =
        [shards, volumes].map(|(columns, rows)| session.out.table(columns, rows));
    session.out.print(&format!("{shards}\n{volumes}"))?;
    is_whole(&missing)
}

/// What the cluster does now, and the shards that do not say.
fn look(client: &Client) -> Result<(Sample, Vec<u32>), Failure> {
    let (mut activities, mut shards): (Vec<Activity>, Vec<Shard>) = (Vec::new(), Vec::new());
    let mut missing = client.pages(&Url::new("/activity"), Extent::Whole, |items| {
        activities.extend(items);
        Ok(())
    })?;
    let at = Instant::now();
    missing.extend(client.pages(&Url::new("/shards"), Extent::Whole, |items| {
        shards.extend(items);
        Ok(())
    })?);
    missing.sort_unstable();
    missing.dedup();
    Ok((Sample { at, activities, shards }, missing))
}

fn live(args: &Args, session: Session) -> Result<(), Failure> {
    let mut view = View::new(session.client.settings().server.to_string(), args.sort);
    view.interval = args.interval.get();
    // The first look is made before the screen is taken: what fails at once is said in one line.
    let (mut last, _) = look(&session.client)?;
    view.shards_only(&last);
    let screen = Screen::take()?;
    let (ask, asked) = mpsc::sync_channel::<()>(1);
    let events = screen.events();
    let client = session.client;
    // Answers may take long; keys must not.
    thread::Builder::new().name("look".to_owned()).spawn(move || {
        for () in asked {
            if events.send(Event::Looked(Box::new(look(&client)))).is_err() {
                break;
            }
        }
    })?;
    let mut next = last.at + view.interval;
    let mut waiting = false;
    screen.draw(&mut view)?;
    loop {
        let now = Instant::now();
        if now >= next && !waiting && !view.paused {
            waiting = ask.try_send(()).is_ok();
            next = now + view.interval;
        }
        let pause = next.saturating_duration_since(now).max(INTERVAL_MIN / 10);
        match screen.next(pause) {
            Ok(Event::Looked(looked)) => {
                waiting = false;
                match *looked {
                    Ok((sample, missing)) => {
                        view.update(Rates::between(&last, &sample), &missing);
                        last = sample;
                    }
                    Err(failure) => view.fail(failure.lines().next().unwrap_or_default()),
                }
            }
            Ok(Event::Key(key)) => match view.press(key) {
                Change::Shown => {}
                Change::Rhythm => next = Instant::now() + view.interval,
                Change::Nothing => continue,
                Change::End => return screen.give_back(),
                Change::Suspend => screen.suspend()?,
            },
            Ok(Event::Resized) => {}
            Ok(Event::Signal(number)) => {
                screen.give_back()?;
                // As a shell tells of a process that a signal has ended.
                return Err(Failure::silent(128 + number));
            }
            Err(RecvTimeoutError::Timeout) => continue,
            Err(RecvTimeoutError::Disconnected) => return screen.give_back(),
        }
        screen.draw(&mut view)?;
    }
}
