use super::*;
use crate::golden;

fn sample() -> Identity {
    Identity {
        cluster: "prod".parse().unwrap(),
        node: "nbd-1-2".parse().unwrap(),
        directory: 0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10,
        segment_bytes: 64 << 20,
    }
}

#[test]
fn golden_bytes() {
    let expected = golden::bytes(include_str!("../../tests/golden/identity.txt"), "identity");
    assert_eq!(sample().encode()[..], expected);
    assert_eq!(Identity::decode(&sample().encode()).unwrap(), sample());
}

#[test]
fn damage_is_noticed() {
    let good = sample().encode();
    for at in 0..172 {
        let mut bad = good;
        bad[at] ^= 0x10;
        assert!(matches!(Identity::decode(&bad), Err(IdentityError::Damaged)), "byte {at}");
    }
}

#[test]
fn longest_names_fit() {
    let name = "n".repeat(NAME_BYTES_MAX);
    let identity =
        Identity { cluster: name.parse().unwrap(), node: name.parse().unwrap(), ..sample() };
    assert_eq!(Identity::decode(&identity.encode()).unwrap(), identity);
}
