//! All services in this process: each has threads of its own, which its metrics and log lines
//! are told apart by.
//!
//! A replica that fails is given up with its threads, as if its process had ended. The others go
//! on.

use std::panic::{self, AssertUnwindSafe};
use std::thread;

use anyhow::Context as _;
use nbd_control::ControlApi;
use nbd_lb::LoadBalancer;
use nbd_replica::Replica;
use nbd_service::Failure;
use nbd_service::telemetry::ThreadRecorder;
use tokio::runtime::Runtime;

use super::crew::{self, Crew, Event, Phase, Post, READY_POLL};
use super::plan::{BALANCER_NAME, CONTROL_NAME, Plan};

/// Most threads of one service that run its tasks. A laptop's share: several services run.
const WORKERS_MAX: usize = 4;

/// What a member of the crew is to run.
enum Service {
    Balancer(Box<nbd_lb::Config>),
    Control(Box<nbd_control::Config>),
    Replica(Box<nbd_replica::Config>),
}

/// Starts all.
///
/// # Errors
/// The system refuses threads, or the like.
pub(super) fn start(plan: &Plan) -> Result<Crew, Failure> {
    let mut services = vec![
        (BALANCER_NAME.to_owned(), Service::Balancer(Box::new(plan.balancer()?))),
        (CONTROL_NAME.to_owned(), Service::Control(Box::new(plan.control()?))),
    ];
    for node in plan.cluster.nodes() {
        let config = Box::new(plan.replica(node.name.clone())?);
        services.push((node.name.to_string(), Service::Replica(config)));
    }
    let (crew, posts) = crew::muster(services.len());
    for ((name, service), post) in services.into_iter().zip(posts) {
        let recorder = ThreadRecorder::new()?;
        let runtime = runtime(&name, recorder).context("start the threads of a service")?;
        let member = move || run(service, recorder, runtime, post);
        thread::Builder::new().name(name).spawn(member).context("start a thread")?;
    }
    Ok(crew)
}

/// Threads that are named after the service and count for it.
fn runtime(name: &str, recorder: ThreadRecorder) -> std::io::Result<Runtime> {
    let cores = thread::available_parallelism().map_or(1, std::num::NonZero::get);
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(cores.min(WORKERS_MAX))
        .thread_name(name)
        .on_thread_start(move || recorder.enter())
        .enable_all()
        .build()
}

/// The life of a member, on a thread of its own.
fn run(service: Service, recorder: ThreadRecorder, runtime: Runtime, mut post: Post) {
    recorder.enter();
    let live = || {
        runtime.block_on(async {
            post.tell(Event::Started(None)).await;
            match service {
                Service::Balancer(config) => balance(*config, recorder, &mut post).await,
                Service::Control(config) => control(*config, recorder, &mut post).await,
                Service::Replica(config) => replicate(*config, recorder, &mut post).await,
            }
        })
    };
    let ended = panic::catch_unwind(AssertUnwindSafe(live));
    let ended = ended.unwrap_or_else(|_| Err("a panic, see above".to_owned()));
    // Not waiting for reads that a failed disk may never finish.
    runtime.shutdown_background();
    post.tell_blocking(Event::Ended(ended));
}

async fn balance(
    config: nbd_lb::Config,
    recorder: ThreadRecorder,
    post: &mut Post,
) -> Result<(), String> {
    let started = LoadBalancer::start(config, recorder.handle()).await;
    let balancer = started.map_err(|error| in_one_line(error.into()))?;
    let mut over = post.clone();
    tokio::select! {
        () = tell_ready(post, || balancer.is_ready()) => {}
        () = over.until(Phase::Drain) => {}
    }
    over.until(Phase::Drain).await;
    balancer.stop().await;
    Ok(())
}

async fn control(
    config: nbd_control::Config,
    recorder: ThreadRecorder,
    post: &mut Post,
) -> Result<(), String> {
    let started = ControlApi::start(config, recorder.handle()).await;
    let control = started.map_err(|error| in_one_line(error.into()))?;
    post.tell(Event::Ready).await;
    post.until(Phase::Drain).await;
    control.stop().await;
    Ok(())
}

async fn replicate(
    config: nbd_replica::Config,
    recorder: ThreadRecorder,
    post: &mut Post,
) -> Result<(), String> {
    let mut over = post.clone();
    let replica = tokio::select! {
        started = Replica::start(config, recorder.handle()) => {
            started.map_err(|error| in_one_line(error.into()))?
        }
        () = over.until(Phase::Drain) => return Ok(()),
    };
    let ready = async {
        tell_ready(post, || replica.is_ready()).await;
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = over.until(Phase::Drain) => {}
        reason = replica.failed() => {
            replica.abandon();
            return Err(reason);
        }
        () = ready => unreachable!("waits for ever once it has told"),
    }
    replica.drain().await;
    post.tell(Event::Drained).await;
    post.until(Phase::Stop).await;
    replica.finish().await
}

async fn tell_ready(post: &Post, is_ready: impl Fn() -> bool) {
    while !is_ready() {
        tokio::time::sleep(READY_POLL).await;
    }
    post.tell(Event::Ready).await;
}

fn in_one_line(error: anyhow::Error) -> String {
    format!("{error:#}")
}
