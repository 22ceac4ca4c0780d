//! A hostile server against the client's handshake and reply decoder.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| nbd_proto::fuzzing::client(data));
