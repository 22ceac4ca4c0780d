use super::*;
use crate::Labels;
use crate::golden;
use crate::limits::VOLUME_NAME_BYTES_MAX;
use crate::members::{ReplicaAddresses, decode_registration};

const GOLDEN: &str = include_str!("../../tests/golden/commands.txt");
const SESSION: SessionId = SessionId(0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10);
const EPOCH: Epoch = Epoch(7);
const VOLUME: VolumeId = VolumeId(0x3_0000_0001);
const OWNER: Owner = Owner { node: 0x1122_3344_5566_7788, incarnation: 5 };

fn registration() -> ReplicaRegistration {
    let addresses =
        ReplicaAddresses { nbd: "a:10809".into(), grpc: "a:7400".into(), http: String::new() };
    ReplicaRegistration { node: "nbd-1-2".parse().unwrap(), directory: 0xd1d2_d3d4, addresses }
}

fn all() -> Vec<(&'static str, Bytes)> {
    let zeroes =
        |seq, no_hole| encode_write_zeroes(SESSION, EPOCH, seq, VOLUME, 512, 1024, no_hole);
    vec![
        ("write", encode_write(SESSION, EPOCH, 9, VOLUME, 4094, b"abcdef")),
        ("trim", encode_trim(SESSION, EPOCH, 10, VOLUME, 65536, 1 << 40)),
        ("write_zeroes", zeroes(11, false)),
        ("write_zeroes_no_hole", zeroes(12, true)),
        ("open_session", encode_open_session(SESSION, EPOCH, VOLUME, OWNER)),
        ("close_session", encode_close_session(SESSION, EPOCH)),
        ("create_volume", encode_create_volume("vol-é", 1 << 30, "a disk").unwrap()),
        ("add_counter", encode_add_counter(-1)),
        ("end_sessions", encode_end_sessions(OWNER)),
        (
            "register_replica",
            encode_register_replica(&registration(), ReplicaId::new(4).unwrap()).unwrap(),
        ),
        ("new_volume", encode_new_volume(&new_volume(&labels())).unwrap()),
        ("update_volume", encode_update_volume(VOLUME, &update(&labels())).unwrap()),
        ("resize_volume", encode_resize_volume(VOLUME, None, 1 << 20, true, 0x0a0b)),
        ("delete_volume", encode_delete_volume(VOLUME, false)),
        ("delete_volume_by_force", encode_delete_volume(VOLUME, true)),
        ("cordon_node", encode_cordon_node(&"nbd-1-2".parse().unwrap(), true)),
        ("set_replacement", encode_set_replacement(replica(3), Some(replica(4)))),
        ("forget_replacement", encode_set_replacement(replica(3), None)),
    ]
}

fn replica(id: u64) -> ReplicaId {
    ReplicaId::new(id).unwrap()
}

fn labels() -> Labels {
    let label = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    [label("env", "prod"), label("app/tier", "é")].into()
}

fn new_volume(labels: &Labels) -> NewVolume<'_> {
    let key = Some(0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10);
    NewVolume { name: "vol-é", size: 1 << 30, description: "a disk", labels, key, now_ms: 0x0a0b }
}

fn update(labels: &Labels) -> VolumeUpdate<'_> {
    static REMOVED: std::sync::LazyLock<[String; 1]> = std::sync::LazyLock::new(|| ["old".into()]);
    VolumeUpdate {
        description: Some("text"),
        set_labels: Some(labels),
        remove_labels: &*REMOVED,
        now_ms: 0x0a0b,
    }
}

#[test]
fn golden_bytes() {
    for (name, command) in all() {
        assert_eq!(command[..], golden::bytes(GOLDEN, name), "{name}");
    }
}

#[test]
fn what_is_encoded_is_decoded() {
    let commands = all();
    let entry: Vec<u8> = commands.iter().flat_map(|(_, command)| command.to_vec()).collect();
    let decoded: Vec<_> = decode_all(&entry).map(Result::unwrap).collect();
    assert_eq!(decoded.len(), commands.len());
    let write = &decoded[0];
    assert_eq!(entry[write.payload.clone()], *b"abcdef");
    assert_eq!(write.checksums, 64..72);
    let expected = CommandHeader {
        kind: CommandKind::Write,
        no_hole: false,
        force: false,
        session: SESSION,
        epoch: EPOCH,
        seq: 9,
        volume: VOLUME,
        offset: 4094,
        length: 6,
    };
    assert_eq!(write.header, expected);
    assert!(!decoded[2].header.no_hole && decoded[3].header.no_hole);
    let body = CreateVolumeBody::decode(&entry[decoded[6].payload.clone()]).unwrap();
    assert_eq!((body.name, body.description), ("vol-é", "a disk"));
    assert_eq!((body.now_ms, body.key, body.labels), (0, 0, Labels::new()));
    assert_eq!(decoded[7].header.length.cast_signed(), -1);
    for owned in [&decoded[4], &decoded[8]] {
        assert_eq!((owned.header.offset, owned.header.length), (OWNER.node, OWNER.incarnation));
    }
    let found = decode_registration(&entry[decoded[9].payload.clone()]);
    assert_eq!(found, Some(registration()));
    let labels = labels();
    let body = CreateVolumeBody::decode(&entry[decoded[10].payload.clone()]).unwrap();
    let new = new_volume(&labels);
    assert_eq!((body.name, body.description), ("vol-é", "a disk"));
    assert_eq!((body.now_ms, body.key), (0x0a0b, new.key.unwrap()));
    assert_eq!((body.fingerprint, &body.labels), (new.fingerprint(), &labels));
    let body = UpdateVolumeBody::decode(&entry[decoded[11].payload.clone()]).unwrap();
    assert_eq!((body.description, &body.set_labels), (Some("text"), &labels));
    assert_eq!(body.remove_labels, ["old"]);
    let resize = &decoded[12].header;
    assert_eq!((resize.length, resize.offset, resize.force), (1 << 20, 0x0a0b, true));
    assert!(!decoded[13].header.force && decoded[14].header.force);
    assert_eq!(entry[decoded[15].payload.clone()], *b"nbd-1-2");
    assert_eq!((decoded[16].header.offset, decoded[16].header.length), (3, 4));
    assert_eq!((decoded[17].header.offset, decoded[17].header.length), (3, 0));
}

#[test]
fn bodies_about_volumes_are_whole_or_refused() {
    let labels = labels();
    let create = encode_new_volume(&new_volume(&labels)).unwrap();
    let body = &create[COMMAND_HEADER_BYTES..];
    let without_tail = 4 + "vol-é".len() + "a disk".len();
    for len in 0..body.len() {
        assert_eq!(CreateVolumeBody::decode(&body[..len]).is_ok(), len == without_tail, "{len}");
    }
    let longer = [body, &[0]].concat();
    assert_eq!(CreateVolumeBody::decode(&longer), Err(CommandError::BadLength));
    let update = encode_update_volume(VOLUME, &update(&labels)).unwrap();
    let body = &update[COMMAND_HEADER_BYTES..];
    for len in 0..body.len() {
        assert!(UpdateVolumeBody::decode(&body[..len]).is_err(), "{len}");
    }
    let nothing = encode_update_volume(VOLUME, &VolumeUpdate::default()).unwrap();
    let nothing = UpdateVolumeBody::decode(&nothing[COMMAND_HEADER_BYTES..]).unwrap();
    assert_eq!((nothing.description, nothing.set_labels.len()), (None, 0));
    let bad = Labels::from([("a b".to_owned(), String::new())]);
    assert_eq!(encode_new_volume(&new_volume(&bad)), Err(CommandError::BadLabels));
    let removed = ["a b".to_owned()];
    let bad = VolumeUpdate { remove_labels: &removed, ..VolumeUpdate::default() };
    assert_eq!(encode_update_volume(VOLUME, &bad), Err(CommandError::BadLabels));
}

#[test]
fn fingerprints_tell_what_was_asked_for() {
    let (some, none) = (labels(), Labels::new());
    let new = new_volume(&some);
    let same = NewVolume { key: None, now_ms: 9, ..new };
    assert_eq!(same.fingerprint(), new.fingerprint(), "whoever asks, and whenever");
    let others = [
        NewVolume { name: "vol", ..new },
        NewVolume { size: 4096, ..new },
        NewVolume { description: "a dis", ..new },
        NewVolume { labels: &none, ..new },
    ];
    assert!(others.iter().all(|other| other.fingerprint() != new.fingerprint()));
}

#[test]
fn truncations_are_errors() {
    for (name, command) in all() {
        for len in 1..command.len() {
            let result: Vec<_> = decode_all(&command[..len]).collect();
            assert_eq!(result, [Err(CommandError::Truncated)], "{name} cut at {len}");
        }
    }
}

#[test]
fn nonsense_is_refused() {
    let write = encode_write(SESSION, EPOCH, 9, VOLUME, 4094, b"abcdef");
    let trim = encode_trim(SESSION, EPOCH, 10, VOLUME, 0, 4096);
    let change = |command: &Bytes, at: usize, byte: u8| {
        let mut bytes = command.to_vec();
        bytes[at] = byte;
        decode_all(&bytes).next().unwrap()
    };
    assert_eq!(change(&write, 4, 0), Err(CommandError::UnknownKind(0)));
    assert_eq!(change(&write, 4, 99), Err(CommandError::UnknownKind(99)));
    assert_eq!(change(&write, 5, 1), Err(CommandError::ReservedBits));
    assert_eq!(change(&trim, 5, 2), Err(CommandError::ReservedBits));
    assert_eq!(change(&trim, 28, 1), Err(CommandError::ReservedBits));
    assert_eq!(change(&write, 6, 3), Err(CommandError::BadLength));
    assert_eq!(change(&trim, 6, 1), Err(CommandError::BadLength));
    assert_eq!(change(&write, 56, 7), Err(CommandError::BadLength));
    assert_eq!(change(&write, 48, 0), Err(CommandError::BadLength), "one fragment less");
    assert_eq!(change(&write, 56, 0), Err(CommandError::BadRange));
    assert_eq!(change(&write, 59, 1), Err(CommandError::BadRange), "longer than a mutation");
    assert_eq!(change(&trim, 57, 0), Err(CommandError::BadRange));
    let wrapping = encode_trim(SESSION, EPOCH, 10, VOLUME, u64::MAX, 1);
    assert_eq!(decode_all(&wrapping).next(), Some(Err(CommandError::BadRange)));
    assert_eq!(encode_create_volume("", 4096, ""), Err(CommandError::BadName));
    let long = "x".repeat(VOLUME_NAME_BYTES_MAX + 1);
    assert_eq!(encode_create_volume(&long, 4096, ""), Err(CommandError::BadName));
    assert_eq!(encode_create_volume("x", 4096, &long), Err(CommandError::BadName));
    assert_eq!(CreateVolumeBody::decode(b"\x01\0\0\0\xff"), Err(CommandError::BadName));
    assert_eq!(CreateVolumeBody::decode(b"\x02\0\0\0x"), Err(CommandError::BadLength));
    assert_eq!(CreateVolumeBody::decode(b"\x02\0"), Err(CommandError::Truncated));
}

#[test]
fn checksums_are_those_of_the_pieces() {
    let payload: Vec<u8> = (0..=255).cycle().take(20_000).collect();
    for (offset, len) in [(0, 4096), (1, 4096), (4095, 2), (100, 10), (8000, 20_000)] {
        let payload = &payload[..len];
        let command = encode_write(SESSION, EPOCH, 1, VOLUME, offset, payload);
        let decoded = decode_all(&command).next().unwrap().unwrap();
        assert_eq!(decoded.payload.start, write_command_prefix_len(offset, len as u64));
        let mut at = 0;
        for checksum in command[decoded.checksums].chunks(4) {
            let place = to_usize(offset) + at;
            let end = (at + 4096 - place % 4096).min(len);
            assert_eq!(*checksum, crc32c(&payload[at..end]).to_le_bytes());
            at = end;
        }
        assert_eq!(at, len);
    }
}

#[test]
fn registrations_are_bounded() {
    let mut long = registration();
    long.addresses.http = "x".repeat(crate::limits::ADDRESS_BYTES_MAX + 1);
    assert_eq!(
        encode_register_replica(&long, ReplicaId::new(4).unwrap()),
        Err(CommandError::BadName)
    );
    let command = encode_register_replica(&registration(), ReplicaId::new(4).unwrap()).unwrap();
    let body = &command[COMMAND_HEADER_BYTES..];
    for len in 0..body.len() {
        assert_eq!(decode_registration(&body[..len]), None, "{len}");
    }
}

#[test]
fn a_flipped_bit_in_a_payload_is_not_sound() {
    let write = encode_write(SessionId(1), Epoch(1), 1, VolumeId(1), 4000, &[7; 9000]);
    let trim = encode_trim(SessionId(1), Epoch(1), 2, VolumeId(1), 0, 8192);
    let entry = [&write[..], &trim[..]].concat();
    assert!(is_sound(&entry) && is_sound(&[]));
    let payload = write.len() - 9000;
    for at in [payload, payload + 95, payload + 96, payload + 4192, write.len() - 1] {
        let mut bad = entry.clone();
        bad[at] ^= 1;
        assert!(!is_sound(&bad), "byte {at}");
    }
    assert!(!is_sound(&entry[..entry.len() - 1]));
}
