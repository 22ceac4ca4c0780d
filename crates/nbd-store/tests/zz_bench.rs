#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]
mod common;
use common::*;
use std::sync::Arc;
use std::time::Instant;
use nbd_log::io::FileDisk;
use nbd_store::*;
use rand::{Rng, SeedableRng, rngs::StdRng};
#[test]
#[ignore]
fn bench() {
    let dir = tempfile::tempdir_in("/work").unwrap();
    let disk = Arc::new(FileDisk::open(dir.path()).unwrap());
    let o = StoreOptions { segment_bytes: 64*MIB, log_bytes_max: 1024*MIB, log_cache_bytes: 64<<20, checkpoint_log_bytes: 256*MIB, meta_cache_bytes: 64<<20, ..options() };
    let mut node = Node::open_with(&disk, o.clone()).unwrap();
    let size = 1u64<<30;
    let v = node.prepare("v", size).unwrap();
    let mut rng = StdRng::seed_from_u64(1);
    // fill 256 MiB
    let mut seq = 0;
    for i in 0..256u64 { seq+=1; let mut w = WriteBuilder::new(SESSION, Epoch(1), seq, v, i<<20, 1<<20); w.payload_mut().fill(i as u8 +1); node.propose(w.finish()).unwrap(); }
    let t=Instant::now(); let r = node.checkpointer.run().unwrap(); println!("checkpoint seq 256MiB {:?} {r:?}", t.elapsed());
    let n=200_000;
    let mut buf = vec![0u8;4096];
    for _ in 0..2 {
    let t=Instant::now(); let mut hit=0;
    for _ in 0..n { let off = rng.random_range(0..65536u64)*4096; let mut p = node.reader.resolve(v, off, 4096).unwrap(); if p.try_read_cached(&mut buf).unwrap() {hit+=1} else { p.read_blocking(&mut buf).unwrap(); } }
    println!("read 4K home: {:?} each, hit {hit}/{n}", t.elapsed()/n);
    }
    let t=Instant::now(); 
    for _ in 0..n { let off = rng.random_range(0..65536u64)*4096; std::hint::black_box(node.reader.resolve(v, off, 4096).unwrap()); }
    println!("resolve only: {:?}", t.elapsed()/n);
    // random writes: build, append, apply separately
    let m = 40_000u32;
    let (mut tb, mut ta, mut tl) = (std::time::Duration::ZERO, std::time::Duration::ZERO, std::time::Duration::ZERO);
    let mut batch = vec![];
    for i in 0..m { seq+=1; let off = rng.random_range(0..65536u64)*4096; let t=Instant::now(); let mut w = WriteBuilder::new(SESSION, Epoch(1), seq, v, off, 4096); w.payload_mut().fill(i as u8); let b = w.finish(); tb+=t.elapsed(); batch.push(b);
      if batch.len()==64 {
        use nbd_log::log::*; use nbd_topology::*;
        let t=Instant::now();
        let recs: Vec<Record> = batch.iter().enumerate().map(|(k,b)| Record::Entry(EntryRecord{shard:SHARD,index:LogIndex(node.index.0+1+k as u64),term:node.term,kind:EntryKind::Command,data:b})).collect();
        let pos = node.log.append(&recs).unwrap(); tl+=t.elapsed();
        let t=Instant::now();
        for (k,b) in batch.iter().enumerate() { std::hint::black_box(node.writer.apply(LogIndex(node.index.0+1+k as u64), node.term, b, pos[k])); }
        ta+=t.elapsed(); node.index = LogIndex(node.index.0+64); batch.clear();
      } }
    println!("build {:?} append {:?} apply {:?} each", tb/m, tl/m, ta/m);
    let t=Instant::now(); let mut hit=0;
    for _ in 0..n { let off = rng.random_range(0..65536u64)*4096; let mut p = node.reader.resolve(v, off, 4096).unwrap(); if p.try_read_cached(&mut buf).unwrap() {hit+=1} else { p.read_blocking(&mut buf).unwrap(); } }
    println!("read 4K mixed: {:?} each, hit {hit}/{n}", t.elapsed()/n);
    let mut big = vec![0u8;1<<20];
    let t=Instant::now(); for i in 0..256u64 { let mut p = node.reader.resolve(v, i<<20, 1<<20).unwrap(); if !p.try_read_cached(&mut big).unwrap() { p.read_blocking(&mut big).unwrap(); } }
    println!("read 1M mixed: {:?} each", t.elapsed()/256);
    let t=Instant::now(); let r = node.checkpointer.run().unwrap(); println!("checkpoint rand 40k {:?} {r:?}", t.elapsed());
    let t=Instant::now(); for i in 0..256u64 { let mut p = node.reader.resolve(v, i<<20, 1<<20).unwrap(); if !p.try_read_cached(&mut big).unwrap() { p.read_blocking(&mut big).unwrap(); } }
    println!("read 1M home (cold for overwritten): {:?} each", t.elapsed()/256);
    let t=Instant::now(); for i in 0..256u64 { let mut p = node.reader.resolve(v, i<<20, 1<<20).unwrap(); if !p.try_read_cached(&mut big).unwrap() { p.read_blocking(&mut big).unwrap(); } }
    println!("read 1M home warm: {:?} each", t.elapsed()/256);
    let t=Instant::now(); for _ in 0..1000000 { std::hint::black_box(node.space.admit_fast(0,4096,AdmissionKind::Write)); } println!("admit_fast {:?}", t.elapsed()/1000000);
    drop(node); let t=Instant::now(); let _n = Node::open_with(&disk, o).unwrap(); println!("open {:?}", t.elapsed());
}
