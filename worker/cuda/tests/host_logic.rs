//! The backend's logic on the host, on a driver that records: what is launched, when steps run, what is replayed, and what
//! an error does.

mod common;

use baton_cuda::{KvMemory, OpsOptions};
use baton_model::{ModelError, Quantization};
use common::emulated::{EmulatedDriver, Event, lock};
use common::{Shape, cuda, options, prompt};
use safetensors::tensor::Dtype;

fn model() -> (tempfile::TempDir, Shape) {
    let shape = Shape::small(Dtype::BF16);
    let dir = tempfile::tempdir().unwrap();
    shape.write(dir.path(), 3);
    (dir, shape)
}

#[test]
fn a_decode_step_runs_in_one_piece_and_is_replayed_when_it_comes_again() {
    let (dir, shape) = model();
    let (mut runner, record) = cuda(
        dir.path(),
        options(Quantization::None),
        64,
        KvMemory::Device,
        EmulatedDriver::recording(),
    );
    let seqs: Vec<usize> = (0..3).map(|_| runner.start()).collect();
    let tokens = prompt(8, shape.vocab, 1);
    let prompts: Vec<(usize, &[u32])> = seqs.iter().map(|s| (*s, &tokens[..])).collect();
    runner.step(&prompts);
    lock(&record).events.clear();
    let decode: Vec<(usize, &[u32])> = seqs.iter().map(|s| (*s, &tokens[..1])).collect();
    for step in 0..4 {
        assert_eq!(runner.step(&decode).len(), 3);
        let events = std::mem::take(&mut lock(&record).events);
        let launches = events.iter().filter(|e| matches!(e, Event::Launch(_))).count();
        let replays = events.iter().filter(|e| matches!(e, Event::Replay(_))).count();
        let captures = events.iter().filter(|e| matches!(e, Event::Capture(_))).count();
        match step {
            0 => assert!(launches > 20 && replays == 0),
            1 => assert_eq!((launches, captures, replays), (0, 1, 1)),
            _ => assert_eq!((launches, captures, replays), (0, 0, 1)),
        }
        // Nothing waits within a step: inputs go up, the step runs, logits come down.
        let waits = |e: &&Event| matches!(e, Event::Download(_) | Event::Synchronize);
        assert_eq!(events.iter().filter(waits).count(), 1);
        assert!(matches!(events.last(), Some(Event::Download(bytes)) if *bytes == 3 * shape.vocab * 4));
        let first_launch = events
            .iter()
            .position(|e| matches!(e, Event::Launch(_) | Event::Replay(_)));
        let last_upload = events.iter().rposition(|e| matches!(e, Event::Upload(_)));
        assert!(last_upload < first_launch);
    }
    // Four sequences have the bucket of three: another number of rows, the same launches.
    let more = runner.start();
    runner.step(&[(more, &tokens[..])]);
    lock(&record).events.clear();
    let mut four = decode.clone();
    four.push((more, &tokens[..1]));
    runner.step(&four);
    assert!(lock(&record).events.iter().any(|e| matches!(e, Event::Replay(_))));
}

#[test]
fn a_step_without_logits_runs_all_the_same() {
    let (dir, shape) = model();
    let fresh = EmulatedDriver::recording();
    let (mut runner, record) = cuda(dir.path(), options(Quantization::None), 64, KvMemory::Device, fresh);
    let seq = runner.start();
    lock(&record).events.clear();
    let rows = runner.try_step(&[(seq, &prompt(20, shape.vocab, 1))], false).unwrap();
    assert!(rows.is_empty());
    let events = &lock(&record).events;
    let last = events.iter().rev().find(|e| matches!(e, Event::Launch(_)));
    assert_eq!(last, Some(&Event::Launch("rope_kv_write")), "the last layer's K and V");
}

#[test]
fn on_the_host_every_layer_is_waited_for() {
    let (dir, shape) = model();
    let fresh = EmulatedDriver::recording();
    let (mut runner, record) = cuda(dir.path(), options(Quantization::None), 64, KvMemory::Host, fresh);
    assert_eq!(lock(&record).events.iter().filter(|e| **e == Event::MapHost).count(), 1);
    let seq = runner.start();
    lock(&record).events.clear();
    runner.step(&[(seq, &prompt(20, shape.vocab, 1))]);
    let events = &lock(&record).events;
    let waits: Vec<usize> = (0..events.len()).filter(|i| events[*i] == Event::Synchronize).collect();
    assert_eq!(waits.len(), shape.layers);
    for wait in waits {
        assert_eq!(events[wait - 1], Event::Launch("rope_kv_write"));
    }
}

#[test]
fn whatever_call_the_device_is_lost_at_the_engine_is_lost_and_asks_it_nothing_more() {
    let (dir, shape) = model();
    let tokens = prompt(12, shape.vocab, 1);
    let run = |lost_after: usize| {
        let fresh = EmulatedDriver::recording();
        let (mut runner, record) = cuda(dir.path(), options(Quantization::None), 64, KvMemory::Device, fresh);
        let seq = runner.start();
        let before = lock(&record).events.len();
        lock(&record).lost_at = Some(before + lost_after);
        let mut result = Ok(Vec::new());
        for part in [&tokens[..10], &tokens[10..11], &tokens[11..]] {
            result = runner.try_step(&[(seq, part)], true);
            if result.is_err() {
                break;
            }
        }
        let asked = lock(&record).events.len() - before;
        if let Err(error) = &result {
            assert!(
                matches!(error, ModelError::Device(reason) if reason.contains("Xid 79")),
                "{error}"
            );
            lock(&record).lost_at = None;
            let again = runner.try_step(&[(seq, &tokens[..1])], true);
            assert!(matches!(again, Err(ModelError::Device(_))), "lost for good");
            assert_eq!(
                lock(&record).events.len(),
                before + asked,
                "nothing more is asked of it"
            );
        }
        (result.is_ok(), asked)
    };
    let (ok, total) = run(usize::MAX >> 1);
    assert!(ok && total > 60);
    for at in 0..total {
        assert!(!run(at).0, "call {at}");
    }
}

#[test]
fn a_lack_of_memory_says_what_to_do_and_loads_nothing() {
    let (dir, _) = model();
    let config = baton_model::ModelConfig::from_dir(dir.path()).unwrap();
    let files = baton_model::ModelFiles::open(dir.path()).unwrap();
    let (driver, record) = EmulatedDriver::recording();
    lock(&record).free = 100_000;
    let ops = baton_cuda::CudaOps::new(driver, &config, options(Quantization::None)).unwrap();
    let error = baton_model::Decoder::with_ops(ops, &files, config, &())
        .err()
        .expect("too little");
    assert!(
        matches!(&error, ModelError::DoesNotFit(reason) if reason.contains("smaller")),
        "{error}"
    );
}

#[test]
fn a_step_beyond_what_was_prepared_is_refused_before_anything_is_asked() {
    let (dir, shape) = model();
    let prepared = OpsOptions {
        rows_max: 16,
        ..options(Quantization::None)
    };
    let (mut runner, record) = cuda(dir.path(), prepared, 64, KvMemory::Device, EmulatedDriver::recording());
    let seq = runner.start();
    let before = lock(&record).events.len();
    let error = runner
        .try_step(&[(seq, &prompt(17, shape.vocab, 1))], true)
        .unwrap_err();
    assert!(matches!(error, ModelError::Batch(_)), "{error}");
    assert_eq!(lock(&record).events.len(), before);
}

#[test]
fn steps_move_no_buffer_once_the_largest_was_seen() {
    let (dir, shape) = model();
    let fresh = EmulatedDriver::recording();
    let (mut runner, record) = cuda(dir.path(), options(Quantization::None), 128, KvMemory::Device, fresh);
    let seqs: Vec<usize> = (0..4).map(|_| runner.start()).collect();
    let tokens = prompt(300, shape.vocab, 1);
    let parts: Vec<(usize, &[u32])> = seqs.iter().map(|s| (*s, &tokens[..64])).collect();
    runner.step(&parts);
    runner.step(&[(seqs[0], &tokens[..])]);
    let decode: Vec<(usize, &[u32])> = seqs.iter().map(|s| (*s, &tokens[..1])).collect();
    runner.step(&decode);
    let used = lock(&record).used;
    lock(&record).events.clear();
    for _ in 0..20 {
        runner.step(&decode);
    }
    let record = lock(&record);
    assert!(
        !record
            .events
            .iter()
            .any(|e| matches!(e, Event::Allocate(_) | Event::Free(_)))
    );
    assert_eq!(record.used, used);
}
