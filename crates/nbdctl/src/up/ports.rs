//! Whether the addresses of a cluster can be listened on, found out before anything is started.

use std::net::TcpListener;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use nbd_service::HostPort;

/// How long an address may stay taken: processes of an `nbdctl up` that was killed end a moment
/// after it.
const PATIENCE: Duration = Duration::from_secs(1);

/// Wait between two attempts.
const RETRY: Duration = Duration::from_millis(50);

/// An address, and what for: `NBD of nbd-1-1`.
pub(super) type Wanted = (String, HostPort);

/// Whether a port of 127.0.0.1 is free.
pub(super) fn is_free(port: u16) -> bool {
    TcpListener::bind(("127.0.0.1", port)).is_ok()
}

/// The address with a port that is free, if it has port 0.
pub(super) fn settle(address: &HostPort) -> anyhow::Result<HostPort> {
    if address.port() != 0 {
        return Ok(address.clone());
    }
    let found = listen(address).and_then(|listener| listener.local_addr());
    let found = found.with_context(|| format!("find a free port at {}", address.host()))?;
    Ok(format!("{}:{}", address.host(), found.port()).parse()?)
}

/// Whether all can be listened on at the same time.
///
/// # Errors
/// The first that cannot, and what it was wanted for.
pub(super) fn check(wanted: &[Wanted]) -> anyhow::Result<()> {
    let began = Instant::now();
    let mut held = Vec::with_capacity(wanted.len());
    for (what, address) in wanted {
        held.push(loop {
            match listen(address) {
                Ok(listener) => break listener,
                Err(_) if began.elapsed() < PATIENCE => thread::sleep(RETRY),
                Err(error) => {
                    let refused = || format!("cannot listen on {address} for {what}");
                    return Err(error).with_context(refused);
                }
            }
        });
    }
    Ok(())
}

fn listen(address: &HostPort) -> std::io::Result<TcpListener> {
    TcpListener::bind(address.to_string())
}
