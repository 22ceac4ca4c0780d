use super::*;
use crate::ids::{Epoch, Owner};

const SHARD: ShardId = ShardId(3);

fn contents() -> Contents {
    let volume = VolumeId::new(SHARD, 2);
    let info = VolumeInfo::new(volume, "vol-é", 8192, "text");
    let record = ShardRecord {
        applied: LogIndex(77),
        applied_term: Term(5),
        counter: -3,
        volumes_created: 2,
        ..ShardRecord::empty()
    };
    let session = Session::new(Epoch(4), volume, Owner { node: 1, incarnation: 2 });
    Contents {
        shards: vec![(SHARD, record)],
        members: vec![(SHARD, Members::default())],
        volumes: vec![info],
        sessions: vec![(SHARD, SessionId(9), session)],
    }
}

fn resealed(body: &[u8], change: impl FnOnce(&mut Vec<u8>)) -> Bytes {
    let mut body = body[..body.len() - 4].to_vec();
    change(&mut body);
    let crc = crc32c(&body);
    body.extend(crc.to_le_bytes());
    body.into()
}

#[test]
fn what_is_encoded_is_decoded() {
    let contents = contents();
    let snapshot = encode(&contents).unwrap();
    assert_eq!((snapshot.applied, snapshot.applied_term), (LogIndex(77), Term(5)));
    let metadata = decode(SHARD, &snapshot).unwrap();
    assert_eq!(metadata.counter, -3);
    assert_eq!(metadata.volumes.by_name("vol-é"), Some(&contents.volumes[0]));
    assert_eq!(metadata.sessions.get(SessionId(9)), Some(&contents.sessions[0].2));
    assert!(decode(ShardId(4), &snapshot).is_none(), "another shard's");
}

#[test]
fn a_snapshot_of_the_version_before_is_read() {
    let contents = contents();
    let snapshot = encode(&contents).unwrap();
    let of_version = |version: u8| {
        let body = resealed(&snapshot.body, |body| body[0] = version);
        decode(SHARD, &ShardSnapshot { body, ..snapshot.clone() })
    };
    assert_eq!(of_version(1).unwrap().volumes.by_name("vol-é"), Some(&contents.volumes[0]));
    assert!(of_version(0).is_none() && of_version(3).is_none());
}

#[test]
fn no_bytes_of_a_peer_are_taken_on_trust() {
    let snapshot = encode(&contents()).unwrap();
    for at in 0..snapshot.body.len() {
        let mut bad = snapshot.body.to_vec();
        bad[at] ^= 1;
        let damaged = ShardSnapshot { body: bad.into(), ..snapshot.clone() };
        assert!(decode(SHARD, &damaged).is_none(), "byte {at}");
        let body = resealed(&snapshot.body, |body| body.truncate(at));
        let is_cut = body.len() < snapshot.body.len();
        let found = decode(SHARD, &ShardSnapshot { body, ..snapshot.clone() });
        assert_eq!(found.is_none(), is_cut, "cut at {at}");
        // Whatever they say under a right checksum, they bring nothing down.
        let body = resealed(&snapshot.body, |body| {
            if let Some(byte) = body.get_mut(at) {
                *byte = 0xff;
            }
        });
        _ = decode(SHARD, &ShardSnapshot { body, ..snapshot.clone() });
    }
    let older = ShardSnapshot { applied: LogIndex(76), ..snapshot.clone() };
    assert!(decode(SHARD, &older).is_none(), "not what it says of itself");
    let twice =
        Contents { volumes: [contents().volumes, contents().volumes].concat(), ..contents() };
    assert!(decode(SHARD, &encode(&twice).unwrap()).is_none());
    let mut foreign = contents();
    foreign.volumes[0].id = VolumeId::new(SHARD, 3);
    assert!(decode(SHARD, &encode(&foreign).unwrap()).is_none(), "a volume never created");
}
