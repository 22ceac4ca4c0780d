//! Ports of 127.0.0.1 for the processes of a cluster.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::sync::{LazyLock, Mutex, PoisonError};

use rand::Rng as _;
use rustix::net::sockopt::set_socket_reuseaddr;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with};

/// The ports of one node, on 127.0.0.1; the same for all its runs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ports {
    pub(crate) nbd: u16,
    pub(crate) grpc: u16,
    pub(crate) http: u16,
}

/// Ports as [`free_port`] gives them.
pub(crate) fn free_ports() -> Ports {
    Ports { nbd: free_port(), grpc: free_port(), http: free_port() }
}

/// A port that nobody listens on, and that nobody else is given as long as this process lives: not
/// by it, nor by other tests that run at the same time.
///
/// It lies below the range from which the kernel takes ports for outgoing connections, so that none
/// of those sits on it while its node is down.
pub fn free_port() -> u16 {
    free_ports_at(&[0])
}

/// A number to which each of `offsets`, which are below 1000, can be added to get such a port.
pub fn free_ports_at(offsets: &[u16]) -> u16 {
    static GIVEN: LazyLock<Mutex<HashMap<u16, UnixListener>>> = LazyLock::new(Mutex::default);
    let mut given = GIVEN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut random = rand::rng();
    for _ in 0..1000 {
        let first = random.random_range(12_000..31_000);
        let ports = offsets.iter().map(|offset| first + offset);
        // A port that was given before is claimed already.
        let claims: Option<Vec<_>> = ports.map(|port| Some((port, claim(port)?))).collect();
        if let Some(claims) = claims {
            given.extend(claims);
            return first;
        }
    }
    panic!("no free port on 127.0.0.1 between 12000 and 32000")
}

/// Claims a port that nobody listens on, by a socket whose name tells the port: the kernel gives
/// such a name once, and takes it back when the process ends, however it does.
fn claim(port: u16) -> Option<UnixListener> {
    let name = format!("cinderblock-test-port-{port}");
    let claim = UnixListener::bind_addr(&SocketAddr::from_abstract_name(name).ok()?).ok()?;
    is_free(port).then_some(claim)
}

/// Whether nobody listens on a port.
///
/// Found out by a socket that does not listen: a process that is being started has a copy of it for
/// a moment, and one that listens would keep the port from whom it was given to.
fn is_free(port: u16) -> bool {
    let bound = || {
        let socket =
            socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        set_socket_reuseaddr(&socket, true)?;
        bind(&socket, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, port))
    };
    bound().is_ok()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::net::TcpListener;
    use std::process::Command;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    use super::*;

    struct SetOnDrop<'a>(&'a AtomicBool);

    impl Drop for SetOnDrop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    #[test]
    fn ports_are_given_out_once() {
        let ports: HashSet<u16> = (0..50).map(|_| free_port()).collect();
        assert_eq!(ports.len(), 50);
        assert!(ports.into_iter().all(|port| claim(port).is_none()), "nor to others");
    }

    #[test]
    fn a_port_that_is_listened_on_is_not_given() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        assert!(claim(listener.local_addr().unwrap().port()).is_none());
    }

    // A process that is being started has, for a moment, all that its parent had open.
    #[test]
    fn a_port_can_be_listened_on_at_once_while_processes_are_started() {
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let _stop = SetOnDrop(&stop);
            for _ in 0..4 {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        Command::new("true").status().unwrap();
                    }
                });
            }
            for _ in 0..3000 {
                TcpListener::bind(("127.0.0.1", free_port())).unwrap();
            }
        });
    }
}
