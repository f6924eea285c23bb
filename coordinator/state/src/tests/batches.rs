//! Files and batches: whole lives, repeated and stale steps, limits, time; and random steps of two members that die, against
//! what must always hold.

use super::{Bench, START};
use crate::view::{self, IdOrder};
use crate::{BATCH_KEPT_MS, BATCH_WINDOW_MS, Outcome, Refused};
use baton_proto::state::{
    AdvanceBatch, Batch, BatchAppend, BatchError, BatchOutput, BatchStatus, CancelBatch, ClaimBatch, DeleteFile,
    FailBatch, File, FileChunk, FileTotals, FinishBatch, PutBatch, PutFile, StartBatch, command::Kind,
};
use proptest::prelude::*;

const LEASE_MS: u64 = 10_000;
const DAY_MS: u64 = 86_400_000;

fn chunk(name: u8, bytes: u64) -> FileChunk {
    FileChunk {
        hash: vec![name; 32].into(),
        bytes,
    }
}

fn put_file(id: &str, owner: &str, chunks: Vec<FileChunk>, expires_unix_ms: u64) -> PutFile {
    PutFile {
        file: Some(File {
            id: id.into(),
            owner: owner.into(),
            filename: "in.jsonl".into(),
            purpose: "batch".into(),
            bytes: chunks.iter().map(|chunk| chunk.bytes).sum(),
            created_unix_ms: START,
            expires_unix_ms,
            chunks: chunks.len() as u32,
        }),
        chunks,
        owner_files_max: 3,
        owner_bytes_max: 1000,
        bytes_max: 1500,
    }
}

fn put_batch(id: &str, owner: &str, input: &str) -> Kind {
    let output = |name: &str| {
        Some(BatchOutput {
            file_id: format!("file-{name}-{id}"),
            ..BatchOutput::default()
        })
    };
    Kind::PutBatch(PutBatch {
        batch: Some(Batch {
            id: id.into(),
            owner: owner.into(),
            key_id: "k".into(),
            endpoint: "/v1/chat/completions".into(),
            input_file_id: input.into(),
            output: output("out"),
            errors_output: output("err"),
            ..Batch::default()
        }),
        owner_open_max: 2,
    })
}

fn claim(member_id: u64, claim_id: &str, lease_ms: u64) -> Kind {
    Kind::ClaimBatch(ClaimBatch {
        batch_id: "batch_1".into(),
        member_id,
        claim_id: claim_id.into(),
        lease_ms,
    })
}

fn start(claim_id: &str, total: u32) -> Kind {
    Kind::StartBatch(StartBatch {
        batch_id: "batch_1".into(),
        claim_id: claim_id.into(),
        total,
        model: "m".into(),
    })
}

fn advance(claim_id: &str, sequence: u64, lines: &[u32], output: Option<BatchAppend>) -> Kind {
    Kind::AdvanceBatch(AdvanceBatch {
        batch_id: "batch_1".into(),
        claim_id: claim_id.into(),
        sequence,
        lines: lines.to_vec(),
        completed: lines.len() as u32,
        output_tokens: 3 * lines.len() as u64,
        output,
        lease_ms: LEASE_MS,
        ..AdvanceBatch::default()
    })
}

fn append(name: u8, bytes: u64, replaces_last: bool) -> Option<BatchAppend> {
    Some(BatchAppend {
        chunk: Some(chunk(name, bytes)),
        replaces_last,
    })
}

fn finish(claim_id: &str) -> Kind {
    Kind::FinishBatch(FinishBatch {
        batch_id: "batch_1".into(),
        claim_id: claim_id.into(),
    })
}

fn cancel(owner: &str) -> Kind {
    Kind::CancelBatch(CancelBatch {
        batch_id: "batch_1".into(),
        owner: owner.into(),
    })
}

fn delete(id: &str, owner: &str) -> Kind {
    Kind::DeleteFile(DeleteFile {
        id: id.into(),
        owner: owner.into(),
    })
}

/// With an input file and a batch over it.
fn bench() -> Bench {
    let mut bench = Bench::new();
    let file = put_file("file-in", "o", vec![chunk(1, 100)], START + DAY_MS);
    bench.run(Kind::PutFile(file)).unwrap();
    bench.run(put_batch("batch_1", "o", "file-in")).unwrap();
    bench
}

fn batch(bench: &Bench) -> Batch {
    view::batch(&bench.tables, "batch_1").unwrap().unwrap()
}

fn status(bench: &Bench) -> BatchStatus {
    batch(bench).status()
}

fn fenced(outcome: &Outcome) -> bool {
    matches!(outcome, Err(Refused::ClaimedByOther { .. }))
}

#[test]
fn a_batch_from_its_file_to_its_files() {
    let mut bench = bench();
    assert_eq!(batch(&bench).expires_unix_ms, START + BATCH_WINDOW_MS);
    bench.run(claim(1, "c", LEASE_MS)).unwrap();
    bench.run(start("c", 3)).unwrap();
    bench.run(advance("c", 1, &[0, 2], append(7, 50, false))).unwrap();
    assert_eq!(view::batch_done(&bench.tables, "batch_1").unwrap(), [0b101]);
    assert!(
        view::file(&bench.tables, "file-out-batch_1").unwrap().is_none(),
        "not yet"
    );
    assert!(matches!(bench.refuses(finish("c")), Refused::BatchStatus { .. }));
    bench.run(advance("c", 2, &[1], append(8, 80, true))).unwrap();
    assert_eq!(status(&bench), BatchStatus::Finalizing);
    assert!(matches!(bench.refuses(cancel("o")), Refused::BatchStatus { .. }));
    bench.run(finish("c")).unwrap();
    let over = batch(&bench);
    assert_eq!(
        (over.status(), over.completed, over.output_tokens),
        (BatchStatus::Completed, 3, 9)
    );
    let out = view::file(&bench.tables, "file-out-batch_1").unwrap().unwrap();
    assert_eq!((out.bytes, out.chunks, out.purpose.as_str()), (80, 1, "batch_output"));
    assert_eq!(
        view::chunks_after(&bench.tables, &out.id, 0, 10).unwrap(),
        [chunk(8, 80)]
    );
    assert!(
        view::file(&bench.tables, "file-err-batch_1").unwrap().is_none(),
        "nothing failed"
    );
    assert!(view::open_batches(&bench.tables).unwrap().is_empty());
    // Over is over.
    for kind in [
        claim(1, "c", LEASE_MS),
        finish("c"),
        advance("c", 3, &[], None),
        cancel("o"),
    ] {
        bench.refuses(kind);
    }
    // And in the end forgotten, the file that it wrote not.
    bench.tick(BATCH_KEPT_MS);
    bench.tick(0);
    assert!(view::batch(&bench.tables, "batch_1").unwrap().is_none());
    assert!(view::file(&bench.tables, "file-in").unwrap().is_none());
    assert!(view::file(&bench.tables, &out.id).unwrap().is_some());
    let left = FileTotals {
        files: 1,
        bytes: 80,
        batches: 0,
        open_batches: 0,
    };
    assert_eq!(view::file_totals(&bench.tables).unwrap(), left);
    bench.run(delete(&out.id, "o")).unwrap();
    assert_eq!(view::owner_totals(&bench.tables, "o").unwrap(), FileTotals::default());
    view::chunk_names(&bench.tables, &mut |chunk| panic!("{chunk:?} is still needed")).unwrap();
}

#[test]
fn a_line_is_done_once_whoever_tells_it() {
    let mut bench = bench();
    assert!(fenced(&bench.run(start("c", 20))), "nobody has claimed");
    bench.run(claim(1, "c", LEASE_MS)).unwrap();
    bench.run(start("c", 20)).unwrap();
    let step = advance("c", 1, &[3, 9], append(7, 50, false));
    bench.run(step.clone()).unwrap();
    let before = batch(&bench);
    bench.run(step).unwrap();
    assert_eq!(batch(&bench), before, "repeated");
    for (sequence, lines) in [
        (2, vec![9]),
        (2, vec![8, 8]),
        (2, vec![9, 8]),
        (2, vec![20]),
        (3, vec![8]),
        (0, vec![8]),
    ] {
        bench.refuses(advance("c", sequence, &lines, None));
    }
    let mut wrong = advance("c", 2, &[8], None);
    if let Kind::AdvanceBatch(step) = &mut wrong {
        step.failed = 1;
    }
    bench.refuses(wrong);
    // Chunks grow before there are more of them.
    for bad in [
        append(8, 49, true),
        append(8, 60, false),
        append(8, 0, true),
        append(8, 5 << 20, true),
    ] {
        bench.refuses(advance("c", 2, &[8], bad));
    }
    // Another member gets it when the lease is over, and then the first one is nobody.
    assert!(fenced(&bench.run(claim(2, "d", LEASE_MS))));
    bench.tick(LEASE_MS);
    bench.run(claim(2, "d", LEASE_MS)).unwrap();
    assert!(fenced(&bench.run(advance("c", 2, &[8], None))));
    bench.run(advance("d", 2, &[8], None)).unwrap();
    // A member that has started again does not wait for itself; one that gives up makes room at once.
    bench.run(claim(2, "e", LEASE_MS)).unwrap();
    assert!(fenced(&bench.run(advance("d", 3, &[7], None))));
    bench.run(claim(2, "e", 0)).unwrap();
    bench.run(claim(1, "f", LEASE_MS)).unwrap();
}

#[test]
fn ends_before_its_end() {
    let mut failed = bench();
    failed.run(claim(1, "c", LEASE_MS)).unwrap();
    let error = BatchError {
        code: "invalid_json_line".into(),
        line: 2,
        ..BatchError::default()
    };
    let fail = Kind::FailBatch(FailBatch {
        batch_id: "batch_1".into(),
        claim_id: "c".into(),
        errors: vec![error; 3],
    });
    failed.run(fail.clone()).unwrap();
    assert_eq!((status(&failed), batch(&failed).errors.len()), (BatchStatus::Failed, 3));
    failed.refuses(fail);

    let mut cancelled = bench();
    cancelled.run(claim(1, "c", LEASE_MS)).unwrap();
    cancelled.run(start("c", 2)).unwrap();
    assert!(matches!(cancelled.refuses(cancel("other")), Refused::Unknown { .. }));
    cancelled.run(cancel("o")).unwrap();
    cancelled.run(cancel("o")).unwrap();
    cancelled.run(advance("c", 1, &[0], append(7, 50, false))).unwrap();
    cancelled.run(finish("c")).unwrap();
    assert_eq!(status(&cancelled), BatchStatus::Cancelled);
    assert_eq!(
        view::file(&cancelled.tables, "file-out-batch_1")
            .unwrap()
            .unwrap()
            .bytes,
        50
    );

    let mut late = bench();
    late.tick(BATCH_WINDOW_MS);
    assert!(
        view::file(&late.tables, "file-in").unwrap().is_some(),
        "kept for its batch"
    );
    late.run(claim(1, "c", LEASE_MS)).unwrap();
    late.run(finish("c")).unwrap();
    assert_eq!(status(&late), BatchStatus::Expired);
}

#[test]
fn limits_and_owners() {
    let mut bench = bench();
    let chunks = |bytes| vec![chunk(2, bytes)];
    let refused = |bench: &mut Bench, file| matches!(bench.refuses(Kind::PutFile(file)), Refused::TooMany { .. });
    assert!(
        refused(&mut bench, put_file("file-2", "o", chunks(901), 0)),
        "bytes of the owner"
    );
    bench
        .run(Kind::PutFile(put_file("file-2", "o", chunks(900), 0)))
        .unwrap();
    assert!(
        refused(&mut bench, put_file("file-3", "p", chunks(501), 0)),
        "bytes of all"
    );
    bench
        .run(Kind::PutFile(put_file("file-3", "o", Vec::new(), 0)))
        .unwrap();
    assert!(
        refused(&mut bench, put_file("file-4", "o", Vec::new(), 0)),
        "files of the owner"
    );
    // Again is no change, and another content no file.
    bench
        .run(Kind::PutFile(put_file("file-2", "o", chunks(900), 0)))
        .unwrap();
    bench.refuses(Kind::PutFile(put_file("file-2", "o", chunks(1), 0)));
    let mut lies = put_file("file-5", "p", chunks(5), 0);
    lies.chunks[0].bytes = 4;
    bench.refuses(Kind::PutFile(lies));

    let ids = |bench: &Bench, after: &str, order| view::file_ids_of(&bench.tables, "o", after, order, 2).unwrap();
    assert_eq!(ids(&bench, "", IdOrder::Descending), ["file-in", "file-3"]);
    assert_eq!(ids(&bench, "file-3", IdOrder::Descending), ["file-2"]);
    assert_eq!(ids(&bench, "file-2", IdOrder::Ascending), ["file-3", "file-in"]);

    assert!(matches!(
        bench.refuses(put_batch("batch_2", "p", "file-in")),
        Refused::Unknown { .. }
    ));
    bench.run(put_batch("batch_2", "o", "file-2")).unwrap();
    assert!(matches!(
        bench.refuses(put_batch("batch_3", "o", "file-2")),
        Refused::TooMany { .. }
    ));
    assert!(matches!(
        bench.refuses(delete("file-2", "o")),
        Refused::FileInUse { .. }
    ));
    let before = bench.contents();
    bench.run(delete("file-3", "p")).unwrap();
    assert_eq!(bench.contents(), before, "another's");
    bench.run(delete("file-3", "o")).unwrap();
    let newest_first: Vec<String> = view::batches_of(&bench.tables, "o", "", 9)
        .unwrap()
        .into_iter()
        .map(|batch| batch.id)
        .collect();
    assert_eq!(newest_first, ["batch_2", "batch_1"]);
}

/// What a member believes: its claim, and how far it is. It dies and begins anew.
#[derive(Debug, Clone)]
enum Step {
    Time(u64),
    Claim(u64),
    Restart(u64),
    Start(u64),
    /// Lines by number, of which those that were done before make it a stale step.
    Advance(u64, Vec<u32>, u8),
    Finish(u64),
    Cancel,
    Again,
}

fn step() -> impl Strategy<Value = Step> {
    let member = 1..3u64;
    prop_oneof![
        3 => prop::sample::select(vec![1, LEASE_MS / 2, LEASE_MS]).prop_map(Step::Time),
        4 => member.clone().prop_map(Step::Claim),
        1 => member.clone().prop_map(Step::Restart),
        3 => member.clone().prop_map(Step::Start),
        12 => (member.clone(), prop::collection::btree_set(0..12u32, 0..5), 1..80u8)
            .prop_map(|(member, lines, bytes)| Step::Advance(member, lines.into_iter().collect(), bytes)),
        2 => member.prop_map(Step::Finish),
        1 => Just(Step::Cancel),
        2 => Just(Step::Again),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Two members do to a batch what they like, in any order, stale and repeated: no line is done twice, what was done stays
    /// done, the files are what was told, and what is over stays.
    #[test]
    fn whatever_two_members_do(steps in prop::collection::vec(step(), 1..60)) {
        let mut bench = bench();
        let mut lives = [0u32; 3];
        let claim_id = |lives: &[u32; 3], member: u64| format!("m{member}-{}", lives[member as usize]);
        let (mut told, mut bytes, mut last) = (Vec::new(), Vec::<u64>::new(), None);
        for step in steps {
            let before = batch(&bench);
            let next = before.advances + 1;
            let kind = match step {
                Step::Time(ms) => { bench.tick(ms); continue }
                Step::Restart(member) => { lives[member as usize] += 1; continue }
                Step::Claim(member) => claim(member, &claim_id(&lives, member), LEASE_MS),
                Step::Start(member) => start(&claim_id(&lives, member), 12),
                Step::Advance(member, lines, more) => {
                    let merged = bytes.last().copied().unwrap_or(0) + u64::from(more);
                    let append = append(more, merged, !bytes.is_empty());
                    advance(&claim_id(&lives, member), next, &lines, append)
                }
                Step::Finish(member) => finish(&claim_id(&lives, member)),
                Step::Cancel => cancel("o"),
                Step::Again => match last.clone() { Some(kind) => kind, None => continue },
            };
            let outcome = bench.run(kind.clone());
            let after = batch(&bench);
            if after.advances > before.advances {
                let Kind::AdvanceBatch(step) = &kind else { panic!("{kind:?} is no step") };
                prop_assert_eq!(&before.runner.as_ref().unwrap().claim_id, &step.claim_id);
                for line in &step.lines {
                    prop_assert!(!told.contains(line), "line {} twice", line);
                    told.push(*line);
                }
                bytes = vec![step.output.as_ref().unwrap().chunk.as_ref().unwrap().bytes];
            } else if outcome.is_err() {
                prop_assert_eq!(&before, &after);
            }
            if before.ended_unix_ms != 0 {
                prop_assert_eq!(&before, &after);
            }
            prop_assert_eq!((after.completed + after.failed) as usize, told.len());
            prop_assert_eq!(after.output_tokens, 3 * told.len() as u64);
            let chunks = view::chunks_after(&bench.tables, "file-out-batch_1", 0, 100).unwrap();
            prop_assert_eq!(chunks.iter().map(|chunk| chunk.bytes).sum::<u64>(), bytes.iter().sum::<u64>());
            let open = u64::from(after.ended_unix_ms == 0);
            prop_assert_eq!(view::file_totals(&bench.tables).unwrap().open_batches, open);
            prop_assert_eq!(view::open_batches(&bench.tables).unwrap().len() as u64, open);
            if after.status() == BatchStatus::Completed {
                prop_assert_eq!(told.len(), 12);
            }
            last = Some(kind);
        }
    }
}
