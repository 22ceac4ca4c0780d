//! Volumes that come, change and go: what becomes of them, of what they held, and of who was
//! attached, with a crash at any point, and on a replica that was away.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test may panic, and its numbers are small"
)]

mod common;

use std::collections::BTreeMap;

use bytes::Bytes;
use common::{BLOCK, CHUNK, Failure, MIB, Model, Node, OWNER, SHARD};
use nbd_log::io::{CrashStyle, MemoryDisk};
use nbd_store::{
    CheckpointError, Epoch, Labels, ListPosition, ListQuery, NewVolume, Outcome, ReadError,
    Rejection, SessionId, VolumeId, VolumeInfo, VolumeOrder, VolumeUpdate, encode_cordon_node,
    encode_delete_volume, encode_new_volume, encode_open_session, encode_resize_volume,
    encode_set_replacement, encode_update_volume, encode_write, encode_write_zeroes,
};
use nbd_topology::{LogIndex, ReplicaId};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const SIZE: u64 = 6 * CHUNK as u64 + 512;

fn label(name: &str, value: &str) -> (String, String) {
    (name.to_owned(), value.to_owned())
}

fn new_volume<'a>(name: &'a str, size: u64, labels: &'a Labels) -> NewVolume<'a> {
    NewVolume { name, size, description: "", labels, key: None, now_ms: 1000 }
}

fn propose(node: &mut Node, command: Bytes) -> Outcome {
    let mut outcomes = node.propose(command).unwrap();
    assert_eq!(outcomes.len(), 1);
    outcomes.remove(0)
}

fn create(node: &mut Node, new: &NewVolume<'_>) -> VolumeInfo {
    match propose(node, encode_new_volume(new).unwrap()) {
        Outcome::VolumeCreated(info) => info,
        other => panic!("{other:?}"),
    }
}

const fn rejected(rejection: Rejection) -> Outcome {
    Outcome::Rejected(rejection)
}

/// The session that a test holds on a volume.
const fn session_of(volume: VolumeId) -> SessionId {
    SessionId(volume.0 as u128)
}

fn attach(node: &mut Node, volume: VolumeId) {
    let open = encode_open_session(session_of(volume), Epoch(1), volume, OWNER);
    assert_eq!(propose(node, open), Outcome::SessionOpened);
}

fn reopen(node: Node, disk: &MemoryDisk) -> Node {
    drop(node);
    Node::open(disk).unwrap()
}

/// Chunks at home, of whatever volume.
fn at_home(node: &Node) -> Vec<(VolumeId, u64)> {
    let page = node.reader.manifest(LogIndex::ZERO, None, usize::MAX).unwrap();
    assert_eq!(page.next, None);
    page.present.iter().map(|run| (run.volume, run.end.0 - run.start.0)).collect()
}

#[test]
fn a_volume_is_created_once_by_one_key() {
    let disk = MemoryDisk::new(1);
    let mut node = Node::open(&disk).unwrap();
    let labels = [label("env", "prod")].into();
    let new = NewVolume { key: Some(7), description: "text", ..new_volume("a", SIZE, &labels) };
    let info = create(&mut node, &new);
    assert_eq!((info.created_ms, info.modified_ms), (1000, 1000));
    assert_eq!((&*info.labels, &*info.description), (&labels, "text"));
    for again in [false, true] {
        if again {
            node.checkpoint().unwrap();
            node = reopen(node, &disk);
        }
        let command = |new: &NewVolume<'_>| encode_new_volume(new).unwrap();
        let repeated = propose(&mut node, command(&NewVolume { now_ms: 2000, ..new }));
        assert_eq!(repeated, Outcome::VolumeRepeated(info.clone()));
        for other in [
            NewVolume { size: SIZE + 512, ..new },
            NewVolume { description: "other", ..new },
            NewVolume { labels: &Labels::new(), ..new },
            NewVolume { name: "b", ..new },
        ] {
            assert_eq!(propose(&mut node, command(&other)), rejected(Rejection::KeyReused));
        }
        for key in [None, Some(8)] {
            let exists = propose(&mut node, command(&NewVolume { key, ..new }));
            assert_eq!(exists, Outcome::VolumeExists(info.clone()));
        }
    }
    assert_eq!((node.reader.volume_count(), node.reader.provisioned_bytes()), (1, SIZE));
    let deleted = propose(&mut node, encode_delete_volume(info.id, false));
    assert_eq!(deleted, Outcome::VolumeDeleted { sessions_ended: 0 });
    assert_eq!((node.reader.volume_count(), node.reader.provisioned_bytes()), (0, 0));
    let next = create(&mut node, &new);
    assert_eq!(next.id.0, info.id.0 + 1, "ids are never given twice");
}

#[test]
fn descriptions_and_labels_change() {
    let disk = MemoryDisk::new(1);
    let mut node = Node::open(&disk).unwrap();
    let labels = [label("a", "1"), label("b", "2")].into();
    let info = create(&mut node, &new_volume("v", SIZE, &labels));
    node.checkpoint().unwrap();
    let set = [label("b", "3"), label("c", "4")].into();
    let removed = ["a".to_owned(), "none".to_owned()];
    let update = VolumeUpdate {
        description: Some("new"),
        set_labels: Some(&set),
        remove_labels: &removed,
        now_ms: 5,
    };
    let changed = propose(&mut node, encode_update_volume(info.id, &update).unwrap());
    let expected = VolumeInfo {
        description: "new".into(),
        labels: std::sync::Arc::new([label("b", "3"), label("c", "4")].into()),
        modified_ms: 5,
        ..info.clone()
    };
    assert_eq!(changed, Outcome::VolumeChanged(expected.clone()));
    for checkpoint in [false, true] {
        if checkpoint {
            node.checkpoint().unwrap();
        }
        node = reopen(node, &disk);
        assert_eq!(node.reader.volume_by_name("v"), Some(expected.clone()));
    }
    let many: Labels = (0..63).map(|n| label(&n.to_string(), "")).collect();
    let update = VolumeUpdate { set_labels: Some(&many), ..VolumeUpdate::default() };
    let full = propose(&mut node, encode_update_volume(info.id, &update).unwrap());
    assert_eq!(full, rejected(Rejection::LimitReached), "65 of them");
    assert_eq!(node.reader.volume(info.id), Some(expected));
    let unknown = encode_update_volume(VolumeId(99), &VolumeUpdate::default()).unwrap();
    assert_eq!(propose(&mut node, unknown), rejected(Rejection::UnknownVolume));
}

#[test]
fn an_attached_volume_is_deleted_by_force_only() {
    let disk = MemoryDisk::new(1);
    let mut node = Node::open(&disk).unwrap();
    let none = Labels::new();
    let (a, b) = (create(&mut node, &new_volume("a", SIZE, &none)).id, {
        create(&mut node, &new_volume("b", SIZE, &none)).id
    });
    for (session, volume) in [(1, a), (2, b), (3, a)] {
        let open = encode_open_session(SessionId(session), Epoch(1), volume, OWNER);
        assert_eq!(propose(&mut node, open), Outcome::SessionOpened);
    }
    let write = |session, seq, volume| {
        encode_write(SessionId(session), Epoch(1), seq, volume, 0, &[session as u8; CHUNK])
    };
    for (session, volume) in [(1, a), (2, b)] {
        assert_eq!(propose(&mut node, write(session, 1, volume)), Outcome::Done);
    }
    node.checkpoint().unwrap();
    assert_eq!(at_home(&node), [(a, 1), (b, 1)]);
    assert_eq!((node.reader.sessions_of(a), node.reader.sessions_of(b)), (2, 1));
    let (page, more) = node.reader.sessions_after(Some(a), SessionId(1), 5);
    assert_eq!((page.len(), page[0].id, more), (1, SessionId(3), false));
    assert_eq!(propose(&mut node, encode_delete_volume(a, false)), rejected(Rejection::Attached));
    let deleted = propose(&mut node, encode_delete_volume(a, true));
    assert_eq!(deleted, Outcome::VolumeDeleted { sessions_ended: 2 });

    let again = create(&mut node, &new_volume("a", SIZE, &none)).id;
    for round in 0..4 {
        // Nothing of the volume is left, and nothing of its sessions counts any more.
        assert_eq!(node.reader.volume(a), None);
        assert!(matches!(node.reader.resolve(a, 0, 512), Err(ReadError::UnknownVolume)));
        let late = propose(&mut node, write(1, 2, a));
        assert_eq!(late, rejected(Rejection::UnknownSession));
        let late = propose(&mut node, write(1, 2, again));
        assert_eq!(late, rejected(Rejection::UnknownSession));
        let resumed = encode_open_session(SessionId(1), Epoch(2), a, OWNER);
        assert_eq!(propose(&mut node, resumed), rejected(Rejection::UnknownSession));
        let opened = encode_open_session(SessionId(9), Epoch(1), a, OWNER);
        assert_eq!(propose(&mut node, opened), rejected(Rejection::UnknownVolume));
        assert_eq!(node.read(again, 0, CHUNK).unwrap(), vec![0; CHUNK]);
        assert_eq!(node.read(b, 0, CHUNK).unwrap(), vec![2; CHUNK]);
        match round {
            0 => node = reopen(node, &disk),
            1 => {
                node.checkpoint().unwrap();
                assert_eq!(at_home(&node), [(b, 1)]);
            }
            _ => node = reopen(node, &disk),
        }
    }
    let twice = propose(&mut node, encode_delete_volume(a, true));
    assert_eq!(twice, rejected(Rejection::UnknownVolume));
}

// Bug: a forced shrink that was held up on its way, and sent again meanwhile, could be applied once
// more behind the growth that followed it, and take what was written then.
#[test]
fn a_resize_from_another_size_changes_nothing() {
    let disk = MemoryDisk::new(1);
    let mut node = Node::open(&disk).unwrap();
    let info = create(&mut node, &new_volume("v", SIZE, &Labels::new()));
    let shrink = || encode_resize_volume(info.id, Some(SIZE), 4096, true, 1);
    let grow = || encode_resize_volume(info.id, Some(4096), 2 * SIZE, false, 2);
    let size = |outcome: Outcome| match outcome {
        Outcome::VolumeChanged(info) => info.size,
        other => panic!("{other:?}"),
    };
    assert_eq!(size(propose(&mut node, shrink())), 4096);
    assert_eq!(size(propose(&mut node, shrink())), 4096, "it is so already");
    assert_eq!(size(propose(&mut node, grow())), 2 * SIZE);
    assert_eq!(propose(&mut node, shrink()), rejected(Rejection::Changed));
    assert_eq!(size(propose(&mut node, grow())), 2 * SIZE);
}

#[test]
fn what_is_cut_off_reads_as_zero_when_it_comes_back() {
    let end = |chunks: u64, bytes: u64| chunks * CHUNK as u64 + bytes;
    for (seed, small) in [end(3, 0), end(3, 512), end(2, 8192), end(5, 4096 + 512), end(6, 0), 4096]
        .iter()
        .enumerate()
    {
        for checkpoint in 0..8_u8 {
            let disk = MemoryDisk::new(seed as u64);
            let mut node = Node::open(&disk).unwrap();
            let info = create(&mut node, &new_volume("v", SIZE, &Labels::new()));
            attach(&mut node, info.id);
            let whole = vec![0xab; SIZE as usize];
            let write = encode_write(session_of(info.id), Epoch(1), 1, info.id, 0, &whole);
            assert_eq!(propose(&mut node, write), Outcome::Done);
            let mut model = Model::new(SIZE as usize);
            model.bytes.fill(0xab);
            model.status.fill(nbd_store::BlockStatus::DATA);
            let maybe = |node: &mut Node, bit: u8| {
                if checkpoint & 1 << bit != 0 {
                    node.checkpoint().unwrap();
                }
            };
            maybe(&mut node, 0);
            let shrink = |force| encode_resize_volume(info.id, None, *small, force, 7);
            assert_eq!(propose(&mut node, shrink(false)), rejected(Rejection::Shrinks));
            let shrunk = propose(&mut node, shrink(true));
            let expected = VolumeInfo { size: *small, modified_ms: 7, ..info.clone() };
            assert_eq!(shrunk, Outcome::VolumeChanged(expected));
            model.resize(*small as usize);
            model.check(&node, info.id).unwrap();
            let past = encode_write(session_of(info.id), Epoch(1), 2, info.id, *small, &[1; 512]);
            assert_eq!(propose(&mut node, past), rejected(Rejection::PastEnd));
            assert!(matches!(node.reader.resolve(info.id, *small, 512), Err(ReadError::PastEnd)));
            maybe(&mut node, 1);
            let grow = encode_resize_volume(info.id, None, SIZE, false, 8);
            assert!(matches!(propose(&mut node, grow), Outcome::VolumeChanged(_)));
            model.resize(SIZE as usize);
            model.check(&node, info.id).unwrap();
            maybe(&mut node, 2);
            node = reopen(node, &disk);
            model.check(&node, info.id).unwrap();
            node.checkpoint().unwrap();
            model.check(&node, info.id).unwrap();
        }
    }
}

#[test]
fn sizes_are_judged() {
    let mut node = Node::open(&MemoryDisk::new(1)).unwrap();
    let info = create(&mut node, &new_volume("v", SIZE, &Labels::new()));
    for size in [0, 512, 4095, SIZE + 1, (64 << 40) + 512, u64::MAX] {
        let resized = propose(&mut node, encode_resize_volume(info.id, None, size, true, 0));
        assert_eq!(resized, rejected(Rejection::BadCommand), "{size}");
    }
    let same = propose(&mut node, encode_resize_volume(info.id, None, SIZE, false, 99));
    assert_eq!(same, Outcome::VolumeChanged(info.clone()), "nothing changed, and nobody did it");
    let largest = propose(&mut node, encode_resize_volume(info.id, None, 64 << 40, false, 99));
    assert!(matches!(largest, Outcome::VolumeChanged(info) if info.size == 64 << 40));
    assert_eq!(node.reader.provisioned_bytes(), 64 << 40);
    let unknown = propose(&mut node, encode_resize_volume(VolumeId(9), None, SIZE, false, 0));
    assert_eq!(unknown, rejected(Rejection::UnknownVolume));
}

#[test]
fn cordoned_nodes_and_replacements_are_kept() {
    let disk = MemoryDisk::new(1);
    let mut node = Node::open(&disk).unwrap();
    let name = "nbd-1-2".parse().unwrap();
    assert_eq!(propose(&mut node, encode_cordon_node(&name, true)), Outcome::Done);
    // Nobody is a member here, so nobody can be replaced.
    let (old, new) = (ReplicaId::new(1).unwrap(), ReplicaId::new(2));
    let bad = propose(&mut node, encode_set_replacement(old, new));
    assert_eq!(bad, rejected(Rejection::BadCommand));
    assert_eq!(propose(&mut node, encode_set_replacement(old, None)), Outcome::Done);
    for _ in 0..2 {
        node = reopen(node, &disk);
        assert!(node.reader.is_cordoned(&name) && node.reader.cordoned().len() == 1);
        node.checkpoint().unwrap();
    }
    assert_eq!(propose(&mut node, encode_cordon_node(&name, false)), Outcome::Done);
    assert!(node.reader.cordoned().is_empty() && node.reader.replacements().is_empty());
}

// Goal: giving back what a large volume held takes several transactions, each of a bounded size,
// and a crash between any two of them loses nothing and leaves nothing behind.
#[test]
fn a_large_volume_goes_in_several_transactions() {
    const CHUNKS: u64 = 1500;
    let disk = MemoryDisk::new(1);
    let mut node = Node::open(&disk).unwrap();
    let none = Labels::new();
    let large = create(&mut node, &new_volume("large", CHUNKS * CHUNK as u64, &none)).id;
    let other = create(&mut node, &new_volume("other", SIZE, &none)).id;
    for volume in [large, other] {
        attach(&mut node, volume);
    }
    let zeroes =
        |volume, len| encode_write_zeroes(session_of(volume), Epoch(1), 1, volume, 0, len, true);
    assert_eq!(propose(&mut node, zeroes(large, CHUNKS * CHUNK as u64)), Outcome::Done);
    let whole = vec![0xcd; SIZE as usize];
    let write = encode_write(session_of(other), Epoch(1), 1, other, 0, &whole);
    assert_eq!(propose(&mut node, write), Outcome::Done);
    assert_eq!(node.reader.allocated_bytes(large).unwrap(), CHUNKS * CHUNK as u64);
    node.checkpoint().unwrap();
    assert_eq!(at_home(&node), [(large, CHUNKS), (other, 7)]);
    assert_eq!(node.reader.allocated_bytes(large).unwrap(), CHUNKS * CHUNK as u64);
    assert_eq!(node.reader.allocated_total().unwrap(), (CHUNKS + 7) * CHUNK as u64);
    propose(&mut node, encode_delete_volume(large, true));
    drop(node);

    // So little room is left that a transaction may change a few hundred chunks.
    let full = |disk: &MemoryDisk| {
        let available = nbd_log::io::Disk::space_available(disk).unwrap();
        disk.set_capacity((1 << 50) - available + 5 * MIB);
    };
    let (mut partly, mut runs) = (0, 0);
    for n in 1.. {
        let copy = disk.after_crash_as(CrashStyle::Kept, n);
        full(&copy);
        let mut node = Node::open(&copy).unwrap();
        copy.crash_at(copy.sync_points() + n);
        let done = node.checkpoint();
        let crashed = copy.crashed();
        drop(node);
        let copy = copy.after_crash(n);
        let mut node = Node::open(&copy).unwrap();
        let left = at_home(&node).iter().find(|(volume, _)| *volume == large).map_or(0, |l| l.1);
        partly += u32::from(left > 0 && left < CHUNKS);
        assert_eq!(node.reader.volume(large), None);
        assert_eq!(node.read(other, 0, SIZE as usize).unwrap(), whole);
        node.checkpoint().unwrap();
        assert_eq!(at_home(&node), [(other, 7)], "after a crash at {n}");
        assert_eq!(node.reader.allocated_bytes(large).unwrap(), 0);
        assert_eq!(node.reader.allocated_total().unwrap(), 7 * CHUNK as u64);
        assert_eq!(node.reader.scrub(None, 100).unwrap().damaged, []);
        runs += 1;
        if !crashed {
            done.unwrap();
            break;
        }
    }
    assert!(partly > 2 && runs > 8, "{partly} of {runs} crashes came in the middle");
}

/// What is done to a handful of volumes.
#[derive(Debug, Clone)]
enum Step {
    Create { name: u8, size: u64 },
    Delete { name: u8 },
    Resize { name: u8, size: u64 },
    Relabel { name: u8, value: u8 },
    Write { name: u8, offset: u64, len: u64, fill: u8 },
    Checkpoint,
    Reopen,
}

fn steps() -> impl Strategy<Value = Step> {
    let size = || (8..SIZE / 512 + 1).prop_map(|sectors| sectors * 512);
    let name = || 0..3_u8;
    prop_oneof![
        3 => (name(), size()).prop_map(|(name, size)| Step::Create { name, size }),
        2 => name().prop_map(|name| Step::Delete { name }),
        4 => (name(), size()).prop_map(|(name, size)| Step::Resize { name, size }),
        1 => (name(), any::<u8>()).prop_map(|(name, value)| Step::Relabel { name, value }),
        8 => (name(), 0..SIZE, 1..SIZE, 1..255_u8).prop_map(|(name, offset, len, fill)| {
            Step::Write { name, offset, len, fill }
        }),
        3 => Just(Step::Checkpoint),
        1 => Just(Step::Reopen),
    ]
}

/// The volumes as they ought to be.
#[derive(Clone, Default)]
struct Catalogue {
    volumes: BTreeMap<u8, (VolumeInfo, Model)>,
    attached: BTreeMap<u8, u64>,
}

impl Catalogue {
    /// The command of a step, if it has one, and its effect.
    fn step(&mut self, step: &Step, created: u64) -> Option<Bytes> {
        match *step {
            Step::Create { name, size } => {
                if self.volumes.contains_key(&name) {
                    return None;
                }
                let text = name.to_string();
                let id = VolumeId(u64::from(SHARD.0) << 32 | (created + 1));
                let mut info = VolumeInfo::new(id, &text, size, "");
                (info.created_ms, info.modified_ms) = (1000, 1000);
                self.volumes.insert(name, (info, Model::new(size as usize)));
                Some(encode_new_volume(&new_volume(&text, size, &Labels::new())).unwrap())
            }
            Step::Delete { name } => {
                let (info, _) = self.volumes.remove(&name)?;
                self.attached.remove(&name);
                Some(encode_delete_volume(info.id, true))
            }
            Step::Resize { name, size } => {
                let (info, model) = self.volumes.get_mut(&name)?;
                if info.size != size {
                    (info.size, info.modified_ms) = (size, 3000);
                }
                model.resize(size as usize);
                Some(encode_resize_volume(info.id, None, size, true, 3000))
            }
            Step::Relabel { name, value } => {
                let (info, _) = self.volumes.get_mut(&name)?;
                let labels: Labels = [label("l", &value.to_string())].into();
                let update =
                    VolumeUpdate { set_labels: Some(&labels), now_ms: 2000, ..Default::default() };
                let command = encode_update_volume(info.id, &update).unwrap();
                (info.labels, info.modified_ms) = (std::sync::Arc::new(labels), 2000);
                Some(command)
            }
            Step::Write { name, offset, len, fill } => {
                let (info, model) = self.volumes.get_mut(&name)?;
                let Some(seq) = self.attached.get_mut(&name) else {
                    self.attached.insert(name, 0);
                    let id = info.id;
                    return Some(encode_open_session(session_of(id), Epoch(1), id, OWNER));
                };
                *seq += 1;
                let offset = offset % info.size;
                let len = len.min(info.size - offset);
                let (from, to) = (offset as usize, (offset + len) as usize);
                model.bytes[from..to].fill(fill);
                let blocks = from / BLOCK..to.div_ceil(BLOCK);
                model.status[blocks].fill(nbd_store::BlockStatus::DATA);
                let bytes = vec![fill; len as usize];
                let id = info.id;
                Some(encode_write(session_of(id), Epoch(1), *seq, id, offset, &bytes))
            }
            Step::Checkpoint | Step::Reopen => None,
        }
    }

    fn check(&self, node: &Node) -> Result<(), String> {
        let mut expected: Vec<_> = self.volumes.values().map(|(info, _)| info.clone()).collect();
        expected.sort_by_key(|info| info.id);
        let found = node.reader.volumes();
        if found != expected {
            return Err(format!("{found:?}, not {expected:?}"));
        }
        let bytes: u64 = expected.iter().map(|info| info.size).sum();
        if node.reader.provisioned_bytes() != bytes {
            return Err("the sum of sizes is wrong".into());
        }
        for (name, (info, model)) in &self.volumes {
            model.check(node, info.id).map_err(|what| format!("volume {name}: {what}"))?;
            if node.reader.sessions_of(info.id) != usize::from(self.attached.contains_key(name)) {
                return Err(format!("volume {name} has other sessions"));
            }
            let page = node.reader.allocated_bytes(info.id).map_err(|error| error.to_string())?;
            if page > info.size.next_multiple_of(CHUNK as u64) + SIZE + CHUNK as u64 {
                return Err(format!("volume {name} takes up {page} bytes"));
            }
        }
        if node.reader.session_count() != self.attached.len() {
            return Err("there are sessions of no volume".into());
        }
        Ok(())
    }

    /// Once everything is home: no chunk is there that no volume has, and the books are right.
    fn check_home(&self, node: &Node) {
        let mut counted = BTreeMap::new();
        for (volume, chunks) in at_home(node) {
            *counted.entry(volume).or_insert(0) += chunks;
        }
        let mut total = 0;
        for (info, model) in self.volumes.values() {
            let hole = nbd_store::BlockStatus::HOLE;
            let used = |blocks: &[_]| blocks.iter().any(|status| *status != hole);
            let expected = model.status.chunks(16).filter(|blocks| used(blocks)).count() as u64;
            assert_eq!(counted.remove(&info.id).unwrap_or(0), expected);
            let bytes = node.reader.allocated_bytes(info.id).unwrap();
            assert_eq!(bytes, expected * CHUNK as u64);
            total += bytes;
        }
        assert!(counted.is_empty(), "chunks of volumes that are gone: {counted:?}");
        assert_eq!(node.reader.allocated_total().unwrap(), total);
    }
}

fn run(steps: &[Step]) -> Result<(), TestCaseError> {
    let disk = MemoryDisk::new(1);
    let mut node = Node::open(&disk).unwrap();
    let (mut catalogue, mut created) = (Catalogue::default(), 0);
    for step in steps {
        let creates = matches!(step, Step::Create { .. });
        let command = catalogue.step(step, created);
        created += u64::from(creates && command.is_some());
        if let Some(command) = command {
            let outcome = propose(&mut node, command);
            prop_assert!(!matches!(outcome, Outcome::Rejected(_)), "{step:?}: {outcome:?}");
        }
        match step {
            Step::Checkpoint => node.checkpoint().unwrap(),
            Step::Reopen => node = reopen(node, &disk),
            _ => {}
        }
        let checked = catalogue.check(&node);
        prop_assert!(checked.is_ok(), "after {:?}: {:?}", step, checked);
    }
    node.checkpoint().unwrap();
    catalogue.check_home(&node);
    let node = reopen(node, &disk);
    catalogue.check_home(&node);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]
    #[test]
    fn volumes_come_change_and_go(steps in prop::collection::vec(steps(), 1..60)) {
        run(&steps)?;
    }
}

fn random_step(rng: &mut StdRng) -> Step {
    let name = rng.random_range(0..3);
    let size = rng.random_range(8..=SIZE / 512) * 512;
    match rng.random_range(0..16) {
        0..2 => Step::Create { name, size },
        2 => Step::Delete { name },
        3..6 => Step::Resize { name, size },
        6 => Step::Relabel { name, value: rng.random() },
        7..9 => Step::Checkpoint,
        _ => Step::Write {
            name,
            offset: rng.random_range(0..SIZE),
            len: rng.random_range(1..SIZE / 3),
            fill: rng.random_range(1..255),
        },
    }
}

fn is_crash(failure: &Failure) -> bool {
    !matches!(failure, Failure::Checkpoint(CheckpointError::NoSpace))
}

// Goal: whatever power fails in the middle of, all that was acknowledged of volumes is there, what
// was not acknowledged is there wholly or not at all, and nothing is left of what was deleted.
#[test]
fn power_loss_anywhere_leaves_volumes_whole() {
    let mut runs = 0;
    for seed in 0..3 {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut steps: Vec<_> = (0..3).map(|name| Step::Create { name, size: SIZE }).collect();
        steps.extend((0..60).map(|_| random_step(&mut rng)));
        for n in 1.. {
            let disk = MemoryDisk::new(seed * 1000 + n);
            let mut node = Node::open(&disk).unwrap();
            disk.crash_at(disk.sync_points() + n);
            let (mut certain, mut created, mut in_doubt) = (Catalogue::default(), 0, None);
            for step in &steps {
                let mut next = certain.clone();
                let command = next.step(step, created);
                let result = match (step, command) {
                    (Step::Checkpoint, _) => node.checkpoint(),
                    (_, None) => Ok(()),
                    (_, Some(command)) => {
                        created += u64::from(matches!(step, Step::Create { .. }));
                        node.propose(command).map(|_| ())
                    }
                };
                match result {
                    Ok(()) => certain = next,
                    Err(failure) => {
                        assert!(is_crash(&failure), "{failure:?}");
                        in_doubt = Some(next);
                        break;
                    }
                }
            }
            let crashed = disk.crashed();
            drop(node);
            let disk = disk.after_crash(seed + n);
            let mut node = Node::open(&disk).unwrap();
            let before = certain.check(&node);
            if before.is_err() {
                let after = in_doubt.as_ref().map(|catalogue| catalogue.check(&node));
                assert!(matches!(after, Some(Ok(()))), "{n}: neither {before:?} nor {after:?}");
                certain = in_doubt.unwrap();
            }
            node.checkpoint().unwrap();
            certain.check(&node).unwrap();
            certain.check_home(&node);
            runs += 1;
            if !crashed {
                break;
            }
        }
    }
    assert!(runs > 150, "{runs} runs");
}

// Goal: pages put together are what sorting all of it at once gives, in each order.
#[test]
fn volumes_are_listed_page_by_page() {
    let mut node = Node::open(&MemoryDisk::new(1)).unwrap();
    let mut rng = StdRng::seed_from_u64(7);
    let mut all = Vec::new();
    for n in 0..1300_u64 {
        let prefix = ["a", "vol-", "vol/é", "z"][rng.random_range(0..4)];
        let name = format!("{prefix}{}", n.wrapping_mul(7919) % 10_007);
        let labels = [label("m", &(n % 3).to_string()), label("n", "")].into();
        let size = 4096 * rng.random_range(1..20);
        let new = NewVolume { now_ms: n / 7, ..new_volume(&name, size, &labels) };
        all.push(create(&mut node, &new));
    }
    let orders =
        [VolumeOrder::Name, VolumeOrder::Size, VolumeOrder::Created, VolumeOrder::Modified];
    for order in orders {
        for descending in [false, true] {
            for (prefix, labels) in [
                ("", Labels::new()),
                ("vol", [label("m", "1")].into()),
                ("vol/é", Labels::new()),
                ("none", Labels::new()),
            ] {
                let is_wanted = |volume: &&VolumeInfo| {
                    volume.name.starts_with(prefix)
                        && labels.iter().all(|(name, value)| volume.labels.get(name) == Some(value))
                };
                let mut expected: Vec<_> = all.iter().filter(is_wanted).cloned().collect();
                expected.sort_by_key(|volume| (order.value(volume), volume.name.clone()));
                if descending {
                    expected.reverse();
                }
                let mut query = ListQuery {
                    prefix: prefix.into(),
                    labels: labels.clone(),
                    order,
                    descending,
                    after: None,
                    limit: 97,
                };
                let mut found = Vec::new();
                loop {
                    let (page, more) = node.reader.list(&query);
                    assert!(page.len() == 97 || !more);
                    found.extend(page);
                    if !more {
                        break;
                    }
                    let last = found.last().unwrap();
                    let (name, value) = (last.name.to_string(), order.value(last));
                    query.after = Some(ListPosition { name, value });
                }
                assert!(found == expected, "{order:?} {descending} {prefix:?}");
            }
        }
    }
    let all_by_id = node.reader.volumes();
    assert!(all_by_id == all);
}
