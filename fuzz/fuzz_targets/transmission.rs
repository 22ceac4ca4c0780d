//! A hostile client against the server's transmission phase.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| nbd_proto::fuzzing::transmission(data));
