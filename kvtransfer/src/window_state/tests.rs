//! Tests of [`super`].

use super::*;
use crate::{AbortReason, Region};
use proptest::prelude::*;
use std::sync::Arc;

const LEN: usize = 256;
const GRACE: Duration = Duration::from_secs(1);
const PUSH: u64 = 77;

fn key(slot: u16, generation: u32) -> LaneKey {
    LaneKey { slot, generation }
}

fn finish(total: u64) -> Finish {
    Finish {
        total,
        payload: Bytes::from_static(b"x"),
        notify: false,
    }
}

fn window(bytes_max: u64) -> (Arc<Region>, WindowState) {
    let region = Region::new(LEN).unwrap();
    let ranges = RangeSet::new(vec![16..64, 128..160], LEN, 8).unwrap();
    (
        region.clone(),
        WindowState::new(region.into(), ranges, bytes_max, GRACE),
    )
}

fn write(window: &mut WindowState, lane: LaneKey, range: Range<usize>) -> Result<Option<u64>, Refusal> {
    let start = window.admit(lane, range.start as u64, range.len() as u64)?;
    window.land(lane, start, &vec![1; range.len()])?;
    window.cover(lane, range)
}

fn lost() -> WindowError {
    WindowError::PeerLost {
        peer: "tester".into(),
        detail: "cut".into(),
    }
}

#[derive(Debug, Clone)]
enum Op {
    Claim {
        push: u64,
        slot: u16,
        generation: u32,
    },
    Write {
        slot: u16,
        generation: u32,
        offset: u64,
        len: u64,
    },
    LandAt {
        offset: usize,
        len: usize,
    },
    Finish {
        slot: u16,
        total: u64,
    },
    Broke {
        slot: u16,
        generation: u32,
    },
    Tick,
    Fail,
    Close,
}

fn op() -> impl Strategy<Value = Op> {
    let offset = prop_oneof![
        0u64..260,
        Just(u64::MAX),
        Just(u64::MAX - 7),
        (0u64..33).prop_map(|at| at * 8)
    ];
    let len = prop_oneof![0u64..80, Just(u64::MAX), (0u64..8).prop_map(|words| words * 8)];
    let (slot, generation) = (0u16..3, 0u32..3);
    prop_oneof![
        3 => (PUSH..PUSH + 2, slot.clone(), generation.clone())
            .prop_map(|(push, slot, generation)| Op::Claim { push, slot, generation }),
        12 => (slot.clone(), generation.clone(), offset, len)
            .prop_map(|(slot, generation, offset, len)| Op::Write { slot, generation, offset, len }),
        2 => (0usize..300, 0usize..40).prop_map(|(offset, len)| Op::LandAt { offset, len }),
        2 => (slot.clone(), 0u64..100).prop_map(|(slot, total)| Op::Finish { slot, total }),
        1 => (slot, generation).prop_map(|(slot, generation)| Op::Broke { slot, generation }),
        1 => Just(Op::Tick),
        1 => Just(Op::Fail),
        1 => Just(Op::Close),
    ]
}

proptest! {
    /// Whatever a peer does: no byte outside of the ranges changes, none at all outside of Receiving or from a lane
    /// that is not the slot's newest, each lane's bound holds, completion means the named coverage, and final
    /// states stay.
    #[test]
    fn no_byte_lands_where_it_must_not(ops in prop::collection::vec(op(), 0..60), bytes_max in 0u64..200) {
        let (region, mut window) = window(bytes_max);
        let mut now = Instant::now();
        prop_assert!(window.claim(PUSH, key(0, 0)).is_ok());
        let (mut model, mut covered) = (vec![0u8; LEN], vec![false; LEN]);
        let mut newest = [Some(0), None, None];
        for (step, op) in ops.into_iter().enumerate() {
            let fill = step as u8 + 1;
            let before = window.phase().clone();
            let receiving = before == Phase::Receiving;
            match op {
                Op::Claim { push, slot, generation } => {
                    let newer = newest[slot as usize].is_none_or(|have| generation > have);
                    let taken = window.claim(push, key(slot, generation)).is_ok();
                    let open = receiving || matches!(before, Phase::Completed(_));
                    prop_assert_eq!(taken, open && push == PUSH && newer);
                    if taken {
                        newest[slot as usize] = Some(generation);
                    }
                }
                Op::Write { slot, generation, offset, len } => {
                    let lane = key(slot, generation);
                    if let Ok(start) = window.admit(lane, offset, len) {
                        prop_assert!(newest[slot as usize] == Some(generation) && len > 0 && len <= bytes_max);
                        let bytes = vec![fill; len as usize];
                        window.land(lane, start, &bytes).unwrap();
                        if receiving {
                            model[start..start + bytes.len()].copy_from_slice(&bytes);
                            covered[start..start + bytes.len()].fill(true);
                        }
                        let _ = window.cover(lane, start..start + bytes.len());
                    }
                }
                Op::LandAt { offset, len } => {
                    let bytes = vec![fill; len];
                    if window.land(key(0, newest[0].unwrap_or(0)), offset, &bytes).is_ok() && receiving {
                        model[offset..offset + len].copy_from_slice(&bytes);
                    }
                }
                Op::Finish { slot, total } => {
                    let lane = key(slot, newest[slot as usize].unwrap_or(9));
                    let _ = window.finish(lane, finish(total));
                }
                Op::Broke { slot, generation } => window.lane_broke(key(slot, generation), lost(), now),
                Op::Tick => {
                    now += GRACE;
                    let due = window.deadline().is_some_and(|at| at <= now);
                    prop_assert_eq!(window.expire(now), due);
                }
                Op::Fail => {
                    prop_assert_eq!(window.fail(WindowError::Aborted(AbortReason::Dropped)), receiving);
                }
                Op::Close => prop_assert_eq!(window.close(), receiving),
            }
            if !receiving {
                prop_assert_eq!(window.phase(), &before);
            }
            prop_assert_eq!(window.landed(), covered.iter().filter(|on| **on).count() as u64);
            if matches!(window.phase(), Phase::Completed(_)) {
                prop_assert_eq!(window.finish.as_ref().map(|finish| finish.total), Some(window.landed()));
            }
            let mut memory = vec![0u8; LEN];
            prop_assert!(region.copy_out(0, &mut memory));
            prop_assert_eq!(&memory, &model);
            prop_assert!(memory[..16].iter().chain(&memory[64..128]).chain(&memory[160..]).all(|&byte| byte == 0));
        }
    }
}

#[test]
fn each_misuse_has_its_refusal() {
    let (_, mut window) = window(48);
    let lane = key(0, 0);
    assert_eq!(
        window.admit(lane, 16, 8),
        Err(Refusal::WindowClosed),
        "nothing lands before a push names it"
    );
    window.claim(PUSH, lane).unwrap();
    assert_eq!(window.claim(PUSH + 1, lane), Err(Refusal::WindowTaken));
    assert_eq!(window.claim(PUSH, lane), Err(Refusal::Superseded));
    assert!(matches!(
        window.claim(PUSH, key(LANES_MAX, 0)),
        Err(Refusal::TooManyLanes { .. })
    ));
    assert_eq!(window.admit(lane, 16, 0), Err(Refusal::EmptyWrite { offset: 16 }));
    assert!(matches!(window.admit(lane, 12, 8), Err(Refusal::Misaligned { .. })));
    assert!(matches!(window.admit(lane, 16, 12), Err(Refusal::Misaligned { .. })));
    assert!(matches!(window.admit(lane, 56, 16), Err(Refusal::OutOfRange { .. })));
    assert!(matches!(
        window.admit(lane, u64::MAX - 7, 16),
        Err(Refusal::OutOfRange { .. })
    ));
    assert_eq!(window.admit(lane, 16, 48), Ok(16));
    assert_eq!(window.admit(lane, 16, 8), Err(Refusal::TooManyBytes { max: 48 }));
    assert_eq!(
        window.finish(lane, finish(48)),
        Ok(None),
        "the rest may come on another lane"
    );
    assert!(matches!(
        window.finish(lane, finish(40)),
        Err(Refusal::WrongTotal { .. })
    ));
    assert!(window.close());
    assert_eq!(window.claim(PUSH, key(0, 1)), Err(Refusal::WindowClosed));
    assert_eq!(window.land(lane, 16, &[1]), Err(Refusal::WindowClosed));
}

#[test]
fn lanes_finish_in_any_order_and_repeat_without_harm() {
    let (_, mut window) = window(u64::MAX);
    let (one, two) = (key(0, 0), key(1, 0));
    window.claim(PUSH, two).unwrap();
    window.claim(PUSH, one).unwrap();
    assert_eq!(window.finish(two, finish(48)), Ok(None));
    assert_eq!(write(&mut window, one, 16..40), Ok(None));
    assert_eq!(write(&mut window, one, 16..40), Ok(None), "a repetition counts once");
    assert_eq!(write(&mut window, one, 40..64), Ok(Some(48)));
    assert_eq!(window.completed(), Some((PUSH, 48)));
    assert_eq!(
        write(&mut window, one, 16..40),
        Ok(None),
        "late repetitions are no breach"
    );
    assert_eq!(window.finish(one, finish(48)), Ok(Some(48)));
    assert_eq!(window.claim(PUSH, key(1, 1)), Ok(()), "a retry is told, not refused");
    assert_eq!(window.finish(key(1, 1), finish(48)), Ok(Some(48)));
}

#[test]
fn a_newer_generation_fences_the_older() {
    let (region, mut window) = window(u64::MAX);
    window.claim(PUSH, key(0, 0)).unwrap();
    assert_eq!(window.admit(key(0, 0), 16, 8), Ok(16));
    window.claim(PUSH, key(0, 1)).unwrap();
    assert_eq!(window.land(key(0, 0), 16, &[9; 8]), Err(Refusal::Superseded));
    assert_eq!(window.cover(key(0, 0), 16..24), Err(Refusal::Superseded));
    assert_eq!(window.finish(key(0, 0), finish(0)), Err(Refusal::Superseded));
    let mut memory = [1; 8];
    assert!(region.copy_out(16, &mut memory));
    assert_eq!(memory, [0; 8]);
}

#[test]
fn the_last_lane_leaves_a_grace() {
    let (_, mut window) = window(u64::MAX);
    let now = Instant::now();
    window.claim(PUSH, key(0, 0)).unwrap();
    window.claim(PUSH, key(1, 0)).unwrap();
    window.lane_broke(key(0, 0), lost(), now);
    assert_eq!(window.deadline(), None, "another lane lives");
    window.lane_broke(key(1, 0), lost(), now);
    assert_eq!(window.deadline(), Some(now + GRACE));
    window.claim(PUSH, key(0, 1)).unwrap();
    assert!(!window.expire(now + GRACE), "rescued");
    window.lane_broke(key(1, 0), lost(), now);
    window.lane_broke(key(0, 1), lost(), now);
    assert!(!window.expire(now + GRACE / 2));
    assert!(window.expire(now + GRACE));
    assert_eq!(window.phase(), &Phase::Failed(lost()));
    assert_eq!(window.claim(PUSH, key(0, 2)), Err(Refusal::WindowClosed));
    assert_eq!(window.claim(PUSH + 1, key(0, 0)), Err(Refusal::WindowTaken));
}

#[test]
fn only_live_windows_of_the_same_region_conflict() {
    let (region, mut one) = window(48);
    let memory = Memory::from(region);
    let overlapping = RangeSet::new(vec![56..72], LEN, 8).unwrap();
    let beside = RangeSet::new(vec![64..72], LEN, 8).unwrap();
    assert_eq!(one.conflict(&memory, &overlapping), Some(56..64));
    assert_eq!(one.conflict(&memory, &beside), None);
    assert_eq!(one.conflict(&Region::new(LEN).unwrap().into(), &overlapping), None);
    one.close();
    assert_eq!(one.conflict(&memory, &overlapping), None);
}
