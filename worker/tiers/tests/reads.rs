//! Reads that several ask for, and reads that nobody asks for yet: loads that share one, hints, and loads after hints.

mod common;

use std::time::Duration;

use baton_proto::block_hash::BlockHash;
use baton_tiers::{Action, Block, Done, Found, Limits, Pool, Read, Tier, Tiers};
use common::{BYTES, bytes, name, parent};

/// Blocks that two loads want are read once.
#[test]
fn one_read_for_two_loads() {
    let limits = Limits {
        host_blocks: 0,
        disk_blocks: 8,
        object: false,
        writes_queued_max: 4,
        writes_in_flight_max: 4,
        reads_max: 8,
        loads_max: 4,
        ahead_max: 0,
    };
    let pool = Pool::new(BYTES, limits.buffers());
    let mut tiers = Tiers::new(limits);
    let now = Duration::ZERO;
    tiers.stored(name(1), parent(1), || bytes(&pool, &name(1)));
    let Some(Action::WriteDisk { slot, generation, .. }) = tiers.poll(now) else {
        panic!("a write")
    };
    let written = true;
    tiers.done(
        Done::WroteDisk {
            slot,
            generation,
            written,
        },
        now,
    );
    assert_eq!(tiers.load(1, parent(1), vec![name(1), name(2)], None, now), 1);
    assert_eq!(tiers.load(2, parent(1), vec![name(1)], None, now), 1);
    let Some(Action::ReadDisk {
        slot,
        generation,
        name: read,
        ..
    }) = tiers.poll(now)
    else {
        panic!("a read")
    };
    assert!(read == name(1) && tiers.poll(now).is_none(), "one read for both");
    let block = bytes(&pool, &read).expect("room");
    let read = Read::Found(block);
    tiers.done(
        Done::ReadDisk {
            slot,
            generation,
            name: name(1),
            read,
        },
        now,
    );
    for id in [1, 2] {
        assert!(tiers.take(id).is_some() && tiers.is_over(id));
        assert_eq!(tiers.end(id, now), 1);
    }
    assert!(tiers.is_idle());
}

/// A disk whose blocks 1 to 6 were written.
fn disk_of_six(ahead_max: usize) -> (Tiers<Block>, Pool) {
    let limits = Limits {
        host_blocks: 0,
        disk_blocks: 8,
        object: false,
        writes_queued_max: 8,
        writes_in_flight_max: 8,
        reads_max: 8,
        loads_max: 4,
        ahead_max,
    };
    let mut tiers = Tiers::new(limits);
    tiers.restore_disk((1..7).map(|n| Found {
        slot: n,
        name: name(n),
        parent: parent(n),
    }));
    (tiers, Pool::new(BYTES, limits.buffers()))
}

/// Carries out the reads that are due, all of which find what they want; answers which, and whether for a hint.
fn read_all(tiers: &mut Tiers<Block>, pool: &Pool, now: Duration) -> Vec<(BlockHash, bool)> {
    let mut reads = Vec::new();
    while let Some(action) = tiers.poll(now) {
        let Action::ReadDisk {
            slot,
            generation,
            name,
            ahead,
        } = action
        else {
            panic!("only reads are due")
        };
        reads.push((name, ahead));
        let read = Read::Found(bytes(pool, &name).expect("the promised number of buffers suffices"));
        tiers.done(
            Done::ReadDisk {
                slot,
                generation,
                name,
                read,
            },
            now,
        );
        tiers.check().expect("invariants");
    }
    reads
}

/// What a hint brought into memory is there at once when a sequence asks; what is in the pool, or behind a hole, is not read, and
/// what finds no room is refused without taking anybody's place.
#[test]
fn a_hint_is_read_once_and_taken_without_waiting() {
    let (mut tiers, pool) = disk_of_six(3);
    let now = Duration::ZERO;
    let names: Vec<BlockHash> = (1..7).map(name).collect();
    tiers.read_ahead(
        parent(1),
        &[&names[..2], &[name(50)], &names[2..]].concat(),
        |n| *n == name(1),
        now,
    );
    assert_eq!(
        read_all(&mut tiers, &pool, now),
        [(name(2), true)],
        "1 is in the pool, and nobody has 50"
    );
    tiers.read_ahead(parent(2), &names[1..], |_| false, now);
    assert_eq!(read_all(&mut tiers, &pool, now), [(name(3), true), (name(4), true)]);
    let stats = tiers.stats().ahead;
    assert_eq!((stats.held, stats.read, stats.refused), (3, 3, 2));
    tiers.read_ahead(parent(5), &names[4..], |_| false, now);
    assert!(
        tiers.poll(now).is_none() && tiers.stats().ahead.held == 3,
        "nobody makes way"
    );

    assert_eq!(tiers.load(1, parent(2), names[1..4].to_vec(), None, now), 3);
    assert!(tiers.poll(now).is_none(), "nothing is left to read");
    for _ in 0..3 {
        assert!(tiers.take(1).is_some());
    }
    assert_eq!((tiers.is_over(1), tiers.end(1, now)), (true, 3));
    let stats = tiers.stats();
    assert_eq!((stats.ahead.hits, stats.ahead.held, stats.ahead.wasted), (3, 0, 0));
    assert_eq!(
        (stats.disk.hits, stats.loads),
        (3, 0),
        "from the disk, and nobody waited"
    );
    assert_eq!(
        tiers.block_time(Tier::Disk),
        None,
        "what was in memory says nothing of the disk"
    );
}

/// A load joins a hint's read; what nobody takes is dropped in time.
#[test]
fn a_load_joins_a_hint_and_what_nobody_takes_is_dropped() {
    let (mut tiers, pool) = disk_of_six(4);
    let mut now = Duration::ZERO;
    let names: Vec<BlockHash> = (1..5).map(name).collect();
    tiers.read_ahead(parent(1), &names, |_| false, now);
    assert_eq!(tiers.load(1, parent(1), vec![name(1), name(2), name(5)], None, now), 3);
    let reads = read_all(&mut tiers, &pool, now);
    assert_eq!(reads.len(), 5);
    assert_eq!(reads[0], (name(5), false), "what somebody waits for goes first");
    for _ in 0..3 {
        assert!(tiers.take(1).is_some());
    }
    assert_eq!(tiers.end(1, now), 3);
    assert_eq!(tiers.stats().ahead.held, 2);
    now += Duration::from_secs(31);
    assert!(tiers.poll(now).is_none() && tiers.is_idle());
    let stats = tiers.stats().ahead;
    assert_eq!((stats.read, stats.hits, stats.wasted, stats.held), (4, 2, 2, 0));
    assert_eq!(pool.available(), tiers.limits().buffers());
    tiers.check().expect("invariants");
}
