//! The NBD wire protocol, both directions, sans-IO.
