//! Real-process cluster, NBD test client and checkers, for tests.
