//! tikv raft as a pure step function.
