//! Requests made up from the OpenAPI document, carried out by real replicas: volumes come and go,
//! nodes are cordoned and drained, replicas added and removed, in no order that makes sense.

use std::net::ToSocketAddrs as _;

use crate::{cluster, control};

#[test]
fn schemathesis_finds_nothing_with_real_replicas() {
    let cluster = cluster();
    let control = control(&cluster);
    let address = control.http_address().to_socket_addrs().unwrap().next().unwrap();
    // Fewer of each kind than with replicas that are made up: each takes a cluster's time.
    nbd_testkit::schemathesis::run(address, &["--max-examples=6", "--request-timeout=20"]);
}
