//! gRPC between nodes: types, clients and services generated from `/proto`.

/// Version 1 of the protocol between nodes, as generated.
#[allow(
    missing_docs,
    unreachable_pub,
    unused_qualifications,
    unnameable_types,
    clippy::all,
    clippy::pedantic,
    reason = "generated"
)]
pub mod v1 {
    tonic::include_proto!("cinderblock.v1");
}
