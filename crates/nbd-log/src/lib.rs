//! Disk access and the node log.
