//! Raft log, block map, checkpoints and chunk store.
