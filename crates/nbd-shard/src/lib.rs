//! One replica of a shard as a pure step function.
