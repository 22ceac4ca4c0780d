//! Clients that say nothing: those that are there, and those that are not any more.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use nbd_proto::Command as Request;
use nbd_testkit::{NbdClient, require_tools, tools};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::succession::Place;
use crate::support::{cluster, wait_until};

/// Within this a client whose host is gone is noticed: keepalive after 30 s, then three times 10 s.
const DEAD_AFTER: Duration = Duration::from_secs(60);

/// What a busy machine may add to that.
const MARGIN: Duration = Duration::from_secs(20);

/// The client's address on the wire as it is known to the server's end, ...
const KNOWN: &str = "02:00:00:00:00:02";

/// ... and another, at which nobody looks for it.
const UNKNOWN: &str = "02:00:00:00:00:03";

/// A network namespace, and a wire to it. Removed when dropped.
struct Wire {
    namespace: String,
    /// This end of the wire.
    interface: String,
    server: String,
}

fn ip(arguments: &str) -> bool {
    let status = Command::new(tools::tool("ip").unwrap()).args(arguments.split(' ')).status();
    status.unwrap().success()
}

impl Wire {
    /// `None` if this user may not lay any.
    fn lay() -> Option<Self> {
        let id = std::process::id();
        let namespace = format!("cinderblock-{id}");
        if !ip(&format!("netns add {namespace}")) {
            return None;
        }
        // Of the range for tests between networks (RFC 2544); others may be at it, too.
        let net = format!("198.{}.{}", 18 + (id >> 14 & 1), id >> 6 & 255);
        let host = |number: u32| format!("{net}.{}", (id & 63) * 4 + number);
        let (server, client) = (host(1), host(2));
        let wire = Self { namespace, interface: format!("cb{id}"), server };
        let Self { namespace, interface, server } = &wire;
        let peer = format!("peer name wire address {KNOWN} netns {namespace}");
        let steps = [
            format!("link add {interface} type veth {peer}"),
            format!("address add {server}/30 dev {interface}"),
            format!("link set {interface} up"),
            format!("-n {namespace} address add {client}/30 dev wire"),
            format!("-n {namespace} link set wire up"),
            format!("neighbour replace {client} lladdr {KNOWN} dev {interface} nud permanent"),
        ];
        assert!(steps.iter().all(|step| ip(step)));
        Some(wire)
    }

    /// Does something at the other end: sockets that it makes are there.
    fn far<T: Send>(&self, act: impl FnOnce(&str) -> T + Send) -> T {
        let act = || {
            let namespace = File::open(format!("/run/netns/{}", self.namespace)).unwrap();
            let network = Some(LinkNameSpaceType::Network);
            move_into_link_name_space(namespace.as_fd(), network).unwrap();
            act(&self.server)
        };
        thread::scope(|scope| scope.spawn(act).join().unwrap())
    }

    /// From now on packets to the other end are lost, and nobody is told.
    fn lose_everything(&self) {
        assert!(ip(&format!("-n {} link set wire address {UNKNOWN}", self.namespace)));
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        // The wire goes with the namespace.
        ip(&format!("netns delete {}", self.namespace));
    }
}

// Goal: a client whose host vanishes is noticed within a minute, whether or not it had anything
// under way; one that is merely idle stays for longer than that.
// Method: the packets of two clients in a network namespace of their own get lost.
#[test]
fn clients_whose_host_is_gone_are_let_go_and_idle_ones_are_kept() {
    require_tools!["ip"];
    let Some(wire) = Wire::lay() else {
        return tools::skip(file!(), "needs the right to make network namespaces");
    };
    let cluster = cluster();
    let place = Place::on("0.0.0.0");
    let _balancer = place.start(&cluster, &[]);
    let mut idle = place.connect("idle");
    let port = place.nbd;
    let [mut gone, mut busy] = wire.far(|server| {
        ["gone", "busy"].map(|export| NbdClient::connect((server, port), export).unwrap())
    });
    for client in [&mut idle, &mut gone, &mut busy] {
        client.write(0, &[1; 4096]).unwrap();
    }
    let clients = || place.metric("nbd_connections");
    assert_eq!(clients(), Some(3.0));
    wire.lose_everything();
    let lost = Instant::now();
    // It arrives, and its answer does not.
    busy.send(&Request::Read { offset: 0, len: 4096, dont_fragment: false }, &[]).unwrap();
    thread::sleep(Duration::from_secs(25).saturating_sub(lost.elapsed()));
    assert_eq!(clients(), Some(3.0), "given up after {:?}", lost.elapsed());
    wait_until("both to be gone", || {
        let (clients, after) = (clients(), lost.elapsed());
        assert!(after < DEAD_AFTER + MARGIN, "{clients:?} after {after:?}");
        clients == Some(1.0)
    });
    thread::sleep((DEAD_AFTER + MARGIN).saturating_sub(lost.elapsed()));
    assert_eq!(clients(), Some(1.0));
    assert_eq!(idle.read(0, 4096).unwrap(), [1; 4096]);
}
