//! Tests of [`super`].

use super::*;
use crate::limits::PAYLOAD_BYTES_MAX;
use crate::{AbortReason, Refusal};
use proptest::prelude::*;

fn state(descriptors_max: usize, memory_len: usize) -> PushState {
    PushState::new(
        memory_len,
        PushLimits {
            descriptors_max,
            payload_max: PAYLOAD_BYTES_MAX,
            retries_max: 2,
            backoff: Duration::from_millis(10),
            grace: Duration::from_secs(1),
        },
    )
}

fn lost() -> PushError {
    PushError::PeerLost {
        peer: "127.0.0.1:1".parse().unwrap(),
        detail: "cut".into(),
    }
}

fn drain(push: &mut PushState, key: LaneKey) -> (Vec<Descriptor>, After) {
    let (mut all, mut batch) = (Vec::new(), Vec::new());
    loop {
        let after = push.take_batch(key, &mut batch);
        let idle = batch.is_empty();
        all.append(&mut batch);
        if after != After::More && (after != After::Mark || idle) {
            return (all, after);
        }
    }
}

fn finish(total: u64) -> After {
    After::Finish {
        total,
        payload: Bytes::new(),
        notify: false,
    }
}

#[test]
fn misuse_is_a_typed_error() {
    let now = Instant::now();
    let mut push = state(2, 1024);
    assert!(matches!(
        push.write(8..8, 0, now),
        Err(PushError::EmptyWrite { local: 8 })
    ));
    #[allow(clippy::reversed_empty_ranges)]
    let reversed = push.write(16..8, 0, now);
    assert!(matches!(reversed, Err(PushError::OutOfRange { .. })));
    assert!(matches!(push.write(0..1032, 0, now), Err(PushError::OutOfRange { .. })));
    assert!(matches!(
        push.write(0..8, usize::MAX - 7, now),
        Err(PushError::OutOfRange { .. })
    ));
    assert!(matches!(push.write(0..12, 0, now), Err(PushError::Misaligned { .. })));
    assert!(matches!(push.write(0..8, 4, now), Err(PushError::Misaligned { .. })));
    push.write(0..8, 0, now).unwrap();
    push.write(8..16, 64, now).unwrap();
    assert!(matches!(
        push.write(16..24, 128, now),
        Err(PushError::QueueFull { max: 2 })
    ));
    push.write(16..24, 72, now)
        .expect("an adjacent write merges even into a full queue");
    let long = Bytes::from(vec![0; PAYLOAD_BYTES_MAX + 1]);
    assert!(matches!(
        push.finish(long, false, now),
        Err(PushError::PayloadTooLong { .. })
    ));
    push.finish(Bytes::new(), false, now).unwrap();
    assert_eq!(push.write(0..8, 0, now), Err(PushError::Finished));
    assert_eq!(push.finish(Bytes::new(), false, now), Err(PushError::Finished));
    assert_eq!(push.open(LANES_MAX), None);
}

#[test]
fn a_push_settles_once_and_only_on_an_exact_acknowledgement() {
    let now = Instant::now();
    let mut push = state(8, 1024);
    let lane = push.open(0).unwrap();
    assert_eq!(push.open(0), None, "the slot is in use");
    push.write(0..64, 0, now).unwrap();
    assert!(push.reply(lane, Reply::Done(0), now).is_err(), "not finished yet");
    assert!(push.reply(lane, Reply::Landed(64), now).is_err(), "not sent yet");
    assert_eq!(push.take_batch(lane, &mut Vec::new()), After::Mark);
    assert_eq!(push.take_batch(lane, &mut Vec::new()), After::Idle);
    push.reply(lane, Reply::Landed(64), now).unwrap();
    assert!(push.reply(lane, Reply::Landed(8), now).is_err(), "going backwards");
    push.finish(Bytes::new(), false, now).unwrap();
    assert!(push.reply(lane, Reply::Done(64), now).is_err(), "FINISH has not left");
    assert_eq!(drain(&mut push, lane), (vec![], finish(64)));
    assert!(push.reply(lane, Reply::Done(63), now).is_err());
    push.reply(lane, Reply::Done(64), now).unwrap();
    assert!(matches!(push.settled(), Some(Ok(report)) if report.bytes == 64 && report.frames == 1));
    assert!(!push.fail(PushError::AgentClosed));
    assert_eq!(drain(&mut push, lane), (vec![], After::Over));
}

#[test]
fn a_failed_push_sends_nothing_more_and_tells_the_writer() {
    let now = Instant::now();
    let mut push = state(8, 1024);
    let lane = push.open(0).unwrap();
    push.write(0..64, 0, now).unwrap();
    let refused = PushError::Refused(Refusal::WindowClosed);
    assert!(push.fail(refused.clone()));
    assert!(!push.fail(PushError::Aborted(AbortReason::Dropped)));
    assert_eq!(drain(&mut push, lane), (vec![], After::Over));
    assert_eq!(push.write(0..8, 0, now), Err(refused.clone()));
    assert_eq!(push.finish(Bytes::new(), false, now), Err(refused));
    assert_eq!(push.open(1), None);
}

#[test]
fn what_a_broken_lane_carried_is_sent_again() {
    let now = Instant::now();
    let mut push = state(8, 1024);
    let (one, two) = (push.open(0).unwrap(), push.open(1).unwrap());
    let mut batch = Vec::new();
    push.write(0..64, 0, now).unwrap();
    assert_eq!(push.take_batch(one, &mut batch), After::Mark);
    push.write(64..128, 512, now).unwrap();
    assert_eq!(push.take_batch(one, &mut batch), After::Mark);
    push.reply(one, Reply::Landed(72), now).unwrap();
    assert_eq!(push.broke(one, lost(), now), Some(Duration::from_millis(10)));
    assert_eq!(push.broke(one, lost(), now), None, "told once");
    push.finish(Bytes::new(), false, now).unwrap();
    let rest = Descriptor {
        local: 72,
        remote: 520,
        len: 56,
    };
    assert_eq!(drain(&mut push, two), (vec![rest], finish(128)));
    assert_eq!(push.take_batch(one, &mut batch), After::Idle);
    let again = push.open(0).unwrap();
    assert_eq!(again.generation, 1);
    assert_eq!(push.take_batch(one, &mut batch), After::Over, "its place is taken");
    assert_eq!(
        push.reply(one, Reply::Done(1), now),
        Ok(()),
        "late replies of it are nothing"
    );
    assert_eq!(drain(&mut push, again), (vec![], finish(128)));
    push.reply(again, Reply::Done(128), now).unwrap();
    assert!(matches!(push.settled(), Some(Ok(_))));
}

#[test]
fn retries_are_bounded_and_name_the_first_cause() {
    let now = Instant::now();
    let mut push = state(8, 1024);
    push.write(0..64, 0, now).unwrap();
    let unreachable = PushError::Unreachable {
        peer: "127.0.0.1:1".parse().unwrap(),
        detail: "nobody".into(),
    };
    let lane = push.open(0).unwrap();
    assert_eq!(push.broke(lane, lost(), now), Some(Duration::from_millis(10)));
    let lane = push.open(0).unwrap();
    assert_eq!(
        push.broke(lane, unreachable.clone(), now),
        Some(Duration::from_millis(20))
    );
    let lane = push.open(0).unwrap();
    assert_eq!(push.broke(lane, unreachable.clone(), now), None);
    assert_eq!(push.settled(), Some(&Err(lost())));

    let mut slow = state(8, 1024);
    let lane = slow.open(0).unwrap();
    assert!(slow.broke(lane, lost(), now).is_some());
    let lane = slow.open(0).unwrap();
    assert_eq!(
        slow.broke(lane, unreachable.clone(), now + Duration::from_secs(1)),
        None
    );
    assert_eq!(
        slow.settled(),
        Some(&Err(lost())),
        "the receiver's window does not wait longer"
    );

    let mut never = state(8, 1024);
    let lane = never.open(0).unwrap();
    assert_eq!(never.broke(lane, unreachable.clone(), now), None);
    assert_eq!(never.settled(), Some(&Err(unreachable)), "a first dial is not repeated");
}

#[test]
fn a_lane_waits_when_too_much_is_in_flight() {
    let now = Instant::now();
    let mut push = state(usize::MAX, LANE_DESCRIPTORS_MAX * 32);
    let lane = push.open(0).unwrap();
    for at in 0..LANE_DESCRIPTORS_MAX + 10 {
        push.write(at * 16..at * 16 + 8, at * 16, now).unwrap();
    }
    let (sent, after) = drain(&mut push, lane);
    assert_eq!((sent.len(), after), (LANE_DESCRIPTORS_MAX, After::Idle));
    push.reply(lane, Reply::Landed(80), now).unwrap();
    assert_eq!(drain(&mut push, lane).0.len(), 10);
    assert_eq!(push.progress(), 80);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// What leaves on all lanes together is what was written, whenever lanes come, break and acknowledge.
    #[test]
    fn lanes_carry_exactly_the_writes(
        writes in prop::collection::vec((0usize..64, 1usize..20_000, any::<bool>(), 0u16..3, 0u8..4), 1..40),
    ) {
        let now = Instant::now();
        let mut push = state(64, 1 << 20);
        let mut lanes = [push.open(0).unwrap(), push.open(1).unwrap(), push.open(2).unwrap()];
        let mut sent = [vec![], vec![], vec![]];
        let (mut expected, mut landed) = (std::collections::BTreeMap::new(), std::collections::BTreeMap::new());
        let (mut batch, mut end) = (Vec::new(), 0);
        let words = |d: &Descriptor| (d.local..d.local + d.len).step_by(8).zip((d.remote..).step_by(8));
        for (local, count, joined, slot, what) in writes {
            let start = if joined { end } else { local * 8 };
            let range = start..start + count * 8;
            // One place in the region has one place at the receiver, as with blocks.
            if push.write(range.clone(), range.start + 4096, now).is_ok() {
                end = range.end;
                expected.extend(range.step_by(8).map(|at| (at + 4096, at)));
            }
            let at = slot as usize;
            match what {
                0 | 1 => {
                    push.take_batch(lanes[at], &mut batch);
                    prop_assert!(batch.iter().all(|piece| piece.len <= SEND_CHUNK_BYTES));
                    sent[at].append(&mut batch);
                }
                2 => {
                    let bytes = sent[at].iter().map(|piece: &Descriptor| piece.len as u64).sum();
                    push.reply(lanes[at], Reply::Landed(bytes), now).unwrap();
                    landed.extend(sent[at].iter().flat_map(words).map(|(local, remote)| (remote, local)));
                }
                _ => if lanes[at].generation < 2 && push.broke(lanes[at], lost(), now).is_some() {
                    sent[at].clear();
                    lanes[at] = push.open(slot).unwrap();
                },
            }
        }
        push.finish(Bytes::new(), false, now).unwrap();
        for at in 0..3 {
            let (rest, after) = drain(&mut push, lanes[at]);
            sent[at].extend(rest);
            landed.extend(sent[at].iter().flat_map(words).map(|(local, remote)| (remote, local)));
            prop_assert_eq!(after, finish(expected.len() as u64 * 8));
        }
        prop_assert_eq!(&landed, &expected);
        push.reply(lanes[0], Reply::Done(expected.len() as u64 * 8), now).unwrap();
    }
}
