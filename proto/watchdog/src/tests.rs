//! The watchdog under virtual time: a worker is simulated as what it sends, and when.

use super::*;
use proptest::prelude::*;

fn pulse(steps: u64, taken: u64) -> Pulse {
    Pulse {
        steps_total: steps,
        step_us_max: 40_000,
        taken,
        ..Pulse::default()
    }
}

/// Looks from `from_ms` on as the shell does; `at` says what the worker does at each look. When the watch gives up.
fn found(
    vitals: &mut Vitals,
    watch: &mut Watch,
    from_ms: u64,
    until_ms: u64,
    mut at: impl FnMut(&mut Vitals, &mut Watch, u64),
) -> Option<(u64, Hang)> {
    for now_ms in (from_ms..until_ms).step_by(LOOK_EVERY_MS as usize) {
        at(vitals, watch, now_ms);
        vitals.look(now_ms);
        if let Some(hang) = watch.check(vitals, now_ms) {
            return Some((now_ms, hang));
        }
    }
    None
}

fn attempt() -> (Vitals, Watch) {
    let vitals = Vitals::new(PULSE_INTERVAL_MS, 0);
    let watch = Watch::new(&vitals, 7, 100, 0);
    (vitals, watch)
}

#[test]
fn a_stopped_worker_is_found_within_a_second_and_a_bit() {
    let (mut vitals, mut watch) = attempt();
    // Tokens and pulses until 5 s, then nothing.
    let end = found(&mut vitals, &mut watch, 0, 60_000, |vitals, watch, now_ms| {
        if now_ms <= 5_000 {
            vitals.pulse(pulse(now_ms, 7), now_ms);
            watch.got(vitals, now_ms);
        }
    });
    assert_eq!(end, Some((6_000, Hang::Silent { ms: 1_000 })));
    assert!(vitals.is_silent(6_000));
    vitals.heard(6_050);
    assert!(!vitals.is_silent(6_050), "it is back");
}

#[test]
fn tokens_are_a_sign_of_life_where_pulses_are_lost() {
    let (mut vitals, mut watch) = attempt();
    let end = found(&mut vitals, &mut watch, 0, 20_000, |vitals, watch, now_ms| {
        if now_ms == 0 {
            vitals.pulse(pulse(1, 7), now_ms);
        }
        if now_ms.is_multiple_of(900) {
            watch.got(vitals, now_ms);
        }
    });
    assert_eq!(end, None);
}

#[test]
fn an_overloaded_worker_that_steps_is_not_given_up_before_the_maximum() {
    let (mut vitals, mut watch) = attempt();
    let slow = |vitals: &mut Vitals, _: &mut Watch, now_ms: u64| {
        // A step of 2.4 s, again and again, for others.
        if now_ms.is_multiple_of(300) {
            vitals.pulse(pulse(1 + now_ms / 2_400, 7), now_ms);
        }
    };
    let end = found(&mut vitals, &mut watch, 0, 700_000, slow);
    assert!(
        matches!(end, Some((FIRST_MAX, Hang::Overdue { .. })) if FIRST_MAX == FIRST_MS.1),
        "{end:?}"
    );
    const FIRST_MAX: u64 = 600_000;

    // With a token before, the limit is that of the next one.
    let (mut vitals, mut watch) = attempt();
    watch.got(&vitals, 0);
    let end = found(&mut vitals, &mut watch, 0, 700_000, slow);
    assert!(matches!(end, Some((40_000, Hang::Overdue { .. }))), "{end:?}");
}

#[test]
fn the_first_token_is_due_by_queue_prompt_and_rate() {
    let (mut vitals, mut watch) = attempt();
    let end = found(&mut vitals, &mut watch, 0, 700_000, |vitals, _, now_ms| {
        let queue = Pulse {
            pending_prompt_tokens: 9_900,
            prefill_tokens_per_s: 1_000.0,
            ..pulse(1 + now_ms, 7)
        };
        vitals.pulse(queue, now_ms);
    });
    // Twenty times (9,900 + 100) tokens at 1,000 a second.
    assert!(matches!(end, Some((200_000, Hang::Overdue { .. }))), "{end:?}");
}

#[test]
fn an_engine_that_hangs_in_a_living_process_is_found() {
    let (mut vitals, mut watch) = attempt();
    let end = found(&mut vitals, &mut watch, 0, 100_000, |vitals, _, now_ms| {
        vitals.pulse(pulse(now_ms.min(2_000), 7), now_ms);
    });
    assert_eq!(end, Some((5_000, Hang::Stalled { ms: 3_000 })));

    // Its steps take a second, so it may take eight.
    let (mut vitals, mut watch) = attempt();
    let end = found(&mut vitals, &mut watch, 0, 100_000, |vitals, _, now_ms| {
        let slow = Pulse {
            step_us_max: 1_000_000,
            ..pulse(now_ms.min(2_000), 7)
        };
        vitals.pulse(slow, now_ms);
    });
    assert_eq!(end, Some((10_000, Hang::Stalled { ms: 8_000 })));

    // It waits for a transfer, on which it has a watch of its own.
    let (mut vitals, mut watch) = attempt();
    let end = found(&mut vitals, &mut watch, 0, 100_000, |vitals, _, now_ms| {
        let filling = Pulse {
            transferring: 1,
            ..pulse(1, 7)
        };
        vitals.pulse(filling, now_ms);
    });
    assert_eq!(end, None);
}

#[test]
fn a_request_that_is_not_taken_is_found_unless_the_worker_is_busy() {
    let (mut vitals, mut watch) = attempt();
    let end = found(&mut vitals, &mut watch, 0, 100_000, |vitals, _, now_ms| {
        vitals.pulse(pulse(1, 6), now_ms);
    });
    assert!(matches!(end, Some((3_000, Hang::NotTaken { .. }))), "{end:?}");
    let (mut vitals, mut watch) = attempt();
    let end = found(&mut vitals, &mut watch, 0, 100_000, |vitals, _, now_ms| {
        vitals.pulse(pulse(now_ms, 6), now_ms);
    });
    assert_eq!(end, None);
}

#[test]
fn our_own_pause_is_not_the_workers_silence() {
    let (mut vitals, watch) = attempt();
    vitals.pulse(pulse(1, 7), 100);
    vitals.look(100);
    // Stopped for an hour; what the worker sent is still in the socket.
    vitals.look(3_600_100);
    assert_eq!(watch.check(&vitals, 3_600_100), None);
    vitals.pulse(pulse(2, 7), 3_600_110);
    vitals.look(3_600_200);
    assert_eq!(watch.check(&vitals, 3_600_200), None);
    // And if it did hang, it is found a second after.
    let mut watch = watch;
    let end = found(&mut vitals, &mut watch, 3_600_300, 3_700_000, |_, _, _| {});
    assert!(
        matches!(end, Some((3_601_100..3_601_300, Hang::Silent { .. }))),
        "{end:?}"
    );
}

#[test]
fn a_worker_that_does_not_pulse_is_left_to_its_connection() {
    let mut vitals = Vitals::new(0, 0);
    let mut watch = Watch::new(&vitals, 1, 10, 0);
    assert_eq!(found(&mut vitals, &mut watch, 0, 1_000_000, |_, _, _| {}), None);
}

proptest! {
    /// A worker that pulses at least every 700 ms and ends a step at least every 2 s is never given up before the limits
    /// of a living worker, however irregular it is; and one that goes silent is found in 1 to 1.2 s.
    #[test]
    fn slowness_is_no_hang_and_silence_is(
        gaps in prop::collection::vec((1u64..700, 0u64..3), 1..200),
    ) {
        let (mut vitals, mut watch) = attempt();
        let (mut now_ms, mut steps, mut stepped_ms) = (0, 1, 0);
        vitals.pulse(pulse(steps, 7), 0);
        let mut due = gaps.into_iter();
        let mut next = due.next();
        let mut last_ms = 0;
        loop {
            now_ms += LOOK_EVERY_MS;
            while let Some((at, kind)) = next {
                if at > now_ms {
                    break;
                }
                last_ms = at;
                if kind == 0 || at - stepped_ms > 1_200 {
                    steps += 1;
                    stepped_ms = at;
                }
                vitals.pulse(pulse(steps, 7), at);
                if kind == 2 {
                    watch.got(&vitals, at);
                }
                next = due.next().map(|(gap, kind)| (at + gap, kind));
            }
            vitals.look(now_ms);
            let hang = watch.check(&vitals, now_ms);
            if next.is_some() {
                prop_assert_eq!(hang, None);
            } else if let Some(hang) = hang {
                prop_assert!(matches!(hang, Hang::Silent { .. }), "{hang:?}");
                prop_assert!((1_000..=1_200).contains(&(now_ms - last_ms)), "{now_ms} {last_ms}");
                break;
            } else {
                prop_assert!(now_ms - last_ms < 1_200, "not found");
            }
        }
    }
}
