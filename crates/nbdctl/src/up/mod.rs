//! `nbdctl up`: a whole cluster on this machine, for trying, developing and small set-ups: a load
//! balancer, a control API, and for each shard its replicas, in one process or in a process each.
//!
//! - `shape`: how many shards and replicas, their names and ports. `directory`: where that is
//!   written down, with the data. `ports`: whether they are free. `plan`: all of it, checked.
//! - `threads`, `processes`: the two ways to run it. `crew`: what is running, and the order of its
//!   end. `welcome`: what a person is told.

mod crew;
mod directory;
mod plan;
mod ports;
mod processes;
mod shape;
mod threads;
mod welcome;

use std::io::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use nbd_replica::Tuning;
use nbd_service::{Failure, HostPort, LogFormat, shutdown, telemetry};
use tokio::time::{Instant, sleep_until};

use self::crew::{BALANCER, CONTROL, Crew, Event, State};
use self::plan::Plan;
use self::shape::Wishes;

/// What is logged unless the user says otherwise: the output is for a person at a terminal.
const LOG_FILTER: &str = "warn";

/// How long replicas that are not ready keep back the welcome when volumes can be used already.
const READY_GRACE: Duration = Duration::from_secs(3);

/// Time after which a person is told what is waited for.
const WAITING_AFTER: Duration = Duration::from_secs(10);

/// Flags of `nbdctl up`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Where the cluster keeps its data, one directory a node, and its description, cluster.toml.
    /// Created if missing.
    #[arg(long, default_value = "./data", value_name = "DIR")]
    data_dir: PathBuf,

    /// Where NBD clients attach: the load balancer.
    #[arg(long, default_value = "127.0.0.1:10809", value_name = "ADDR")]
    nbd: HostPort,

    /// Where the load balancer serves health and metrics.
    #[arg(long, default_value = "127.0.0.1:8080", value_name = "ADDR")]
    http: HostPort,

    /// Where the control API is served, which `nbdctl volume` and the like talk to. Anybody who
    /// reaches it may do everything.
    #[arg(long, default_value = "127.0.0.1:8090", value_name = "ADDR")]
    api: HostPort,

    #[command(flatten)]
    wishes: Wishes,

    /// Run each service as a process of its own, and print their ids: kill one and watch.
    #[arg(long)]
    processes: bool,

    /// Start a process again when it has ended. Without it, the command that does so is printed.
    #[arg(long, requires = "processes")]
    restart: bool,

    /// Log lines as text or as JSON. They go to standard error; RUST_LOG sets the level.
    #[arg(long, default_value = "text", value_name = "text|json")]
    log_format: LogFormat,

    #[command(flatten)]
    tuning: Tuning,
}

/// Runs the cluster until it is told to stop.
pub(crate) fn run(args: Args) -> Result<(), Failure> {
    let is_set = std::env::var_os("RUST_LOG").is_some_and(|filter| !filter.is_empty());
    let filter = (!is_set).then_some(LOG_FILTER);
    telemetry::init_logging_by_thread(args.log_format, filter)?;
    nbd_service::open_files::raise_limit();
    let (processes, restart) = (args.processes, args.restart);
    if processes {
        processes::programs()?;
    }
    let (plan, _directory) = plan::make(args)?;
    // Of this thread alone: it only looks after the services.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let signal = async { shutdown::wait_for_signal().await.context("watch for signals") };
        tokio::pin!(signal);
        let mut crew = match processes {
            true => processes::start(&plan, restart)?,
            false => threads::start(&plan)?,
        };
        let ended = tokio::select! {
            signal = signal => signal.map(|_| ()).map_err(Failure::from),
            failure = watch(&mut crew, &plan, processes, restart) => Err(failure),
        };
        if ended.is_ok() {
            say("\nStopping.\n");
        }
        tokio::select! {
            reasons = crew.stop() => ended.and_then(|()| stopped(&plan, &reasons)),
            // Nothing acknowledged is lost by it.
            again = shutdown::wait_for_signal() => {
                again.context("watch for signals")?;
                ended
            }
        }
    })
}

/// Says how the cluster gets on, until it cannot.
async fn watch(crew: &mut Crew, plan: &Plan, processes: bool, restart: bool) -> Failure {
    let began = Instant::now();
    let (mut welcomed, mut told_waiting, mut usable) = (false, false, None);
    loop {
        if !welcomed && is_up(crew, usable) {
            welcomed = true;
            say(&welcome::text(plan, crew));
        }
        let look = if welcomed {
            None
        } else {
            let waiting = (!told_waiting).then_some(began + WAITING_AFTER);
            usable.map(|at: Instant| at + READY_GRACE).into_iter().chain(waiting).min()
        };
        let (place, event) = tokio::select! {
            told = crew.next() => told,
            () = sleep_until(look.unwrap_or(began)), if look.is_some() => {
                if !told_waiting && began.elapsed() >= WAITING_AFTER {
                    told_waiting = true;
                    say(&format!("{}\n", waiting(crew, plan)));
                }
                continue;
            }
        };
        let name = plan.name_of(place);
        match event {
            Event::Ready if place == BALANCER => usable = Some(Instant::now()),
            Event::Started(Some(pid)) if welcomed => {
                say(&format!("{name} runs as process {pid}.\n"));
            }
            Event::Ended(ended) => {
                let reason = ended.err().unwrap_or_else(|| "it has ended".to_owned());
                // Processes come back by themselves, or are started by hand, as a person was told
                // how to: that some have ended says nothing of those that run.
                let comes_back = welcomed && (processes || restart);
                if !comes_back && !can_go_on(crew, plan, place, welcomed) {
                    return anyhow::anyhow!("{name}: {reason}").into();
                }
                complain(&format!("{name}: {reason}"));
            }
            Event::Started(_) | Event::Ready | Event::Drained => {}
        }
    }
}

/// Tells a person something. If nobody listens any more (the reader of a pipe was stopped by the
/// same Ctrl-C, say), the cluster goes on, and stops, as if somebody did.
fn say(text: &str) {
    let mut stdout = std::io::stdout();
    let _ = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
}

/// The same for a line about what went wrong.
fn complain(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Whether volumes can be used, and nothing is worth waiting for any longer.
fn is_up(crew: &Crew, usable: Option<Instant>) -> bool {
    let mut others = crew.replicas().chain([CONTROL]);
    let all = others.all(|place| crew.state(place) != State::Starting);
    usable.is_some_and(|since| all || since.elapsed() >= READY_GRACE)
}

/// Whether the cluster is of use without the service at `place`, which has ended.
fn can_go_on(crew: &Crew, plan: &Plan, place: usize, welcomed: bool) -> bool {
    if welcomed {
        return crew.replicas().any(|place| crew.state(place) != State::Ended);
    }
    if place == BALANCER || place == CONTROL || plan.is_new {
        return false;
    }
    let lives = |node: &&nbd_topology::NodeName| {
        plan.place_of(node).is_some_and(|place| crew.state(place) != State::Ended)
    };
    let has_majority =
        |nodes: &[nbd_topology::NodeName]| nodes.iter().filter(lives).count() * 2 > nodes.len();
    plan.cluster.shard_map().shards().all(|(_, nodes)| has_majority(nodes))
}

fn waiting(crew: &Crew, plan: &Plan) -> String {
    let places = [BALANCER, CONTROL].into_iter().chain(crew.replicas());
    let starting = places.filter(|place| crew.state(*place) == State::Starting);
    let starting: Vec<&str> = starting.map(|place| plan.name_of(place)).collect();
    let (starting, http) = (starting.join(", "), &plan.http);
    format!("Still waiting for {starting}. To see why: curl http://{http}/health")
}

/// How a stop that was asked for went.
fn stopped(plan: &Plan, reasons: &[(usize, String)]) -> Result<(), Failure> {
    match reasons {
        [] => Ok(()),
        reasons => {
            let reasons = reasons.iter().map(|(at, why)| format!("{}: {why}", plan.name_of(*at)));
            Err(anyhow::anyhow!(reasons.collect::<Vec<_>>().join("; ")).into())
        }
    }
}
