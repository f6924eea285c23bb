//! The published crate's indexes, each driven through its own public interface.

use crate::{PROMPT_BLOCKS, Report, mix, names, runs, timed};
use dynamo_kv_router::indexer::WorkerTask;
use dynamo_kv_router::protocols::{
    ExternalSequenceBlockHash, KvCacheEvent, KvCacheEventData, KvCacheStoreData, KvCacheStoredBlockData,
    LocalBlockHash, OverlapScores, RouterEvent, compute_seq_hash_for_block,
};
use dynamo_kv_router::{ConcurrentRadixTreeCompressed, PositionalIndexer, RadixTree, SyncIndexer};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A worker's events, as its engine would have published them.
fn events(worker: u64, workers: u64, blocks: u64, event_blocks: u64) -> (Vec<RouterEvent>, u64) {
    let mut pairs = 0;
    // Names are chained by the crate's own hash, which the positional index checks.
    let mut chained: (u64, Vec<u64>) = (u64::MAX, Vec::new());
    let events = runs(worker, workers, blocks, event_blocks)
        .enumerate()
        .map(|(id, (conversation, from, to))| {
            pairs += to - from;
            if chained.0 != conversation {
                let all: Vec<LocalBlockHash> = names(conversation, 0, PROMPT_BLOCKS).map(local).collect();
                chained = (conversation, compute_seq_hash_for_block(&all));
            }
            let chain = &chained.1;
            let parent = from.checked_sub(1).map(|before| chain[before as usize]);
            let stored = names(conversation, from, to)
                .zip(&chain[from as usize..])
                .map(|(name, chained)| KvCacheStoredBlockData {
                    block_hash: ExternalSequenceBlockHash(*chained),
                    tokens_hash: local(name),
                    mm_extra_info: None,
                });
            let data = KvCacheStoreData {
                parent_hash: parent.map(ExternalSequenceBlockHash),
                start_position: None,
                blocks: stored.collect(),
            };
            let event = KvCacheEvent {
                event_id: id as u64,
                data: KvCacheEventData::Stored(data),
                dp_rank: 0,
            };
            RouterEvent::new(worker, event)
        });
    let events = events.collect();
    (events, pairs)
}

/// The hash of a block's tokens alone.
fn local(name: u64) -> LocalBlockHash {
    LocalBlockHash(mix(name ^ 0xa5a5))
}

fn deepest(scores: &OverlapScores) -> u64 {
    u64::from(scores.scores.values().copied().max().unwrap_or(0))
}

/// Takes every worker's events in.
fn ingest(workers: u64, blocks: u64, event_blocks: u64, mut apply: impl FnMut(Vec<RouterEvent>)) -> Report {
    let (mut took, mut pairs, mut count) = (Duration::ZERO, 0, 0);
    for worker in 0..workers {
        let (batch, stored) = events(worker, workers, blocks, event_blocks);
        pairs += stored;
        count += batch.len() as u64;
        let started = Instant::now();
        apply(batch);
        took += started.elapsed();
    }
    Report {
        ingest: took,
        pairs,
        events: count,
        checksum: 0,
        times: Vec::new(),
    }
}

fn queried(
    mut report: Report,
    workers: u64,
    blocks: u64,
    find: impl Fn(Vec<LocalBlockHash>) -> OverlapScores,
) -> Report {
    // Making the argument is not part of the match, so it is made from the names before: `timed` cannot, hence the table.
    let mut prepared: Vec<Vec<LocalBlockHash>> = (0..crate::QUERIES as u64)
        .rev()
        .map(|n| crate::query(n, workers, blocks).into_iter().map(local).collect())
        .collect();
    let (times, checksum) = timed(workers, blocks, |_| {
        deepest(&find(prepared.pop().expect("one per query")))
    });
    report.checksum = checksum;
    report.times = vec![("match", times)];
    report
}

pub fn radix(workers: u64, blocks: u64, event_blocks: u64, full: &mut dyn FnMut()) -> Report {
    let mut tree = RadixTree::new();
    let report = ingest(workers, blocks, event_blocks, |batch| {
        for event in batch {
            tree.apply_event(event).expect("a valid event");
        }
    });
    full();
    queried(report, workers, blocks, |sequence| tree.find_matches(sequence, false))
}

pub fn positional(workers: u64, blocks: u64, event_blocks: u64, full: &mut dyn FnMut()) -> Report {
    // The jump that its documentation proposes.
    let index = PositionalIndexer::new(32);
    let mut lookup = Default::default();
    let report = ingest(workers, blocks, event_blocks, |batch| {
        for event in batch {
            index.apply_event(&mut lookup, event, None).expect("a valid event");
        }
    });
    full();
    queried(report, workers, blocks, |sequence| index.find_matches(&sequence, false))
}

/// It takes events only through a thread of its own: the time until all of a worker's are taken in, on that one thread.
pub fn compressed(workers: u64, blocks: u64, event_blocks: u64, full: &mut dyn FnMut()) -> Report {
    let tree = Arc::new(ConcurrentRadixTreeCompressed::new());
    let (sender, receiver) = flume::unbounded();
    let taking = tree.clone();
    let thread = std::thread::spawn(move || taking.worker(receiver, None));
    let report = ingest(workers, blocks, event_blocks, |batch| {
        for event in batch {
            sender.send(WorkerTask::Event(event)).expect("the thread runs");
        }
        while !sender.is_empty() {
            std::thread::sleep(Duration::from_micros(200));
        }
    });
    std::thread::sleep(Duration::from_millis(50));
    full();
    let report = queried(report, workers, blocks, |sequence| tree.find_matches(&sequence, false));
    drop(sender);
    let _ = thread.join();
    report
}
