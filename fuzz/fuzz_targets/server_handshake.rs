//! A hostile client against the server's handshake.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| nbd_proto::fuzzing::handshake(data));
