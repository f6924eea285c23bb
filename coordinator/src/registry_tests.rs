//! The registry under virtual time.

use super::*;
use proptest::prelude::*;

const CONFIG: RegistryConfig = RegistryConfig {
    heartbeat_interval_ms: 500,
    lost_after_ms: 2000,
};

fn register(id: &str) -> Register {
    Register {
        worker_id: id.into(),
        role: Role::Decode.into(),
        addr: "127.0.0.1:1".into(),
        total_blocks: 10,
        ..Register::default()
    }
}

fn state(registry: &Registry, id: &str, now_ms: u64) -> Option<State> {
    let found = registry
        .workers(now_ms)
        .find(|(worker, _)| worker.register.worker_id == id);
    found.map(|(_, state)| state)
}

fn is_lost(effects: &[Effect], id: &str, at_epoch: u64) -> bool {
    matches!(effects, [Effect::Lost { worker_id, epoch, .. }] if worker_id == id && *epoch == at_epoch)
}

/// A registry with worker "w" of epoch 1, attached at time 0.
fn with_ready() -> Registry {
    let mut registry = Registry::new(CONFIG);
    assert_eq!(registry.registered(register("w"), 1, 0), (true, vec![]));
    assert_eq!(state(&registry, "w", 0), Some(State::Joining));
    let effects = registry.heartbeat("w", 1, Heartbeat::default(), 0);
    assert!(matches!(&effects[..], [Effect::Connect { epoch: 1, .. }]));
    assert!(registry.link_up("w", 1));
    assert_eq!(state(&registry, "w", 0), Some(State::Ready));
    registry
}

#[test]
fn silence_makes_suspect_and_then_lost() {
    let mut registry = with_ready();
    assert_eq!(registry.tick(1000), []);
    assert_eq!(state(&registry, "w", 1000), Some(State::Ready));
    assert_eq!(registry.tick(1900), []);
    assert_eq!(state(&registry, "w", 1900), Some(State::Suspect));
    registry.heartbeat("w", 1, Heartbeat::default(), 1950);
    assert_eq!(state(&registry, "w", 1950), Some(State::Ready));
    assert_eq!(registry.tick(2900), []);
    assert_eq!(registry.tick(3900), []);
    assert!(is_lost(&registry.tick(3950), "w", 1));
    assert_eq!(state(&registry, "w", 3950), Some(State::Lost));
    // Once only; a late heartbeat of the lost life changes nothing.
    assert_eq!(registry.tick(4000), []);
    assert_eq!(registry.heartbeat("w", 1, Heartbeat::default(), 4000), []);
    assert!(!registry.link_up("w", 1));
    assert_eq!(state(&registry, "w", 4000), Some(State::Lost));
    for now_ms in (5000..4950 + LOST_KEPT_MS).step_by(500) {
        registry.tick(now_ms);
    }
    assert_eq!(
        state(&registry, "w", 65_000),
        Some(State::Lost),
        "the state still has it"
    );
    assert_eq!(registry.removed("w", 1, 65_000), []);
    registry.tick(65_000);
    assert_eq!(state(&registry, "w", 65_000), None);
}

#[test]
fn a_lost_worker_that_the_group_still_has_goes_on_where_it_was() {
    let mut registry = with_ready();
    registry.join_closed("w", 1, 10);
    assert!(is_lost(&registry.link_down("w", 1, 20), "w", 1));
    assert!(!registry.rejoined("w", 2, 30), "an epoch that is not its own");
    assert!(registry.rejoined("w", 1, 30));
    assert_eq!(state(&registry, "w", 30), Some(State::Joining));
    let effects = registry.heartbeat("w", 1, Heartbeat::default(), 40);
    assert!(
        matches!(&effects[..], [Effect::Connect { epoch: 1, .. }]),
        "its link is made anew"
    );
    assert!(registry.link_up("w", 1));
    assert_eq!(state(&registry, "w", 40), Some(State::Ready));

    // Over for the group is over here, heard or not, once.
    assert!(is_lost(&registry.removed("w", 1, 50), "w", 1));
    assert_eq!(registry.removed("w", 1, 50), []);
    assert!(!registry.rejoined("w", 1, 60));
    assert_eq!(registry.known(register("w"), 1, 60), [], "and not new");
    assert_eq!(state(&registry, "w", 60), Some(State::Lost));
    // Its next registration, made elsewhere, is.
    assert_eq!(registry.known(register("w"), 2, 70), []);
    assert_eq!(state(&registry, "w", 70), Some(State::Joining));
    assert!(registry.rejoined("w", 2, 80));
}

#[test]
fn who_said_goodbye_does_not_come_back() {
    let mut registry = with_ready();
    assert!(is_lost(&registry.left("w", 1, "stop", 5), "w", 1));
    assert!(!registry.rejoined("w", 1, 6));
}

#[test]
fn both_connections_gone_is_lost_at_once_and_one_is_not() {
    let mut registry = with_ready();
    assert_eq!(registry.join_closed("w", 1, 10), []);
    assert_eq!(state(&registry, "w", 10), Some(State::Suspect));
    assert!(is_lost(&registry.link_down("w", 1, 20), "w", 1));

    let mut registry = with_ready();
    assert_eq!(registry.link_down("w", 1, 10), []);
    assert_eq!(state(&registry, "w", 10), Some(State::Joining));
    assert!(registry.link_up("w", 1));
    assert_eq!(state(&registry, "w", 11), Some(State::Ready));
    assert_eq!(registry.link_down("w", 1, 20), []);
    assert!(is_lost(&registry.join_closed("w", 1, 30), "w", 1));
}

#[test]
fn a_goodbye_is_at_once() {
    let mut registry = with_ready();
    assert!(is_lost(&registry.left("w", 1, "stop", 5), "w", 1));
    assert_eq!(registry.join_closed("w", 1, 6), []);
}

#[test]
fn an_old_life_cannot_speak_for_a_new_one() {
    let mut registry = with_ready();
    let (taken, effects) = registry.registered(register("w"), 2, 100);
    let replaced = Effect::Replaced {
        worker_id: "w".into(),
        epoch: 1,
    };
    assert_eq!((taken, effects), (true, vec![replaced]));
    assert_eq!(registry.join_closed("w", 1, 110), []);
    assert_eq!(registry.link_down("w", 1, 110), []);
    assert_eq!(registry.left("w", 1, "zombie", 110), []);
    assert!(!registry.link_up("w", 1));
    assert_eq!(registry.heartbeat("w", 1, Heartbeat::default(), 110), []);
    assert_eq!(state(&registry, "w", 110), Some(State::Joining));
    // A registration that was committed earlier and is told later is over already.
    assert_eq!(registry.registered(register("w"), 1, 120), (false, vec![]));
}

#[test]
fn a_pause_of_this_process_is_not_the_workers_silence() {
    let mut registry = with_ready();
    registry.tick(500);
    // Stopped for a minute; the heartbeats are still in the sockets.
    assert_eq!(registry.tick(60_500), []);
    registry.heartbeat("w", 1, Heartbeat::default(), 60_510);
    assert_eq!(state(&registry, "w", 60_510), Some(State::Ready));
}

#[test]
fn a_recovered_worker_has_the_usual_time_to_come_back() {
    let mut registry = Registry::new(CONFIG);
    assert_eq!(registry.known(register("w"), 7, 0), []);
    assert_eq!(registry.known(register("v"), 8, 0), []);
    assert!(registry.registered(register("w"), 9, 500).0);
    assert_eq!(registry.tick(900), []);
    assert_eq!(registry.tick(1800), []);
    assert!(is_lost(&registry.tick(2000), "v", 8));
}

#[test]
fn load_is_counted_per_life() {
    let mut registry = with_ready();
    registry.assigned("w", 1, false);
    registry.assigned("w", 1, true);
    registry.registered(register("w"), 2, 10);
    registry.released("w", 1, false);
    registry.assigned("w", 2, false);
    registry.released("w", 1, false);
    let (worker, _) = registry.workers(10).next().unwrap();
    assert_eq!((worker.assigned, worker.prefilling), (1, 0));
}

#[test]
fn a_worker_drains_once_whoever_says_so() {
    let drain = Effect::Drain {
        worker_id: "w".into(),
        epoch: 1,
    };
    let draining = Heartbeat {
        draining: true,
        ..Heartbeat::default()
    };
    let mut registry = with_ready();
    assert_eq!(registry.drain("w"), Some((1, vec![drain.clone()])));
    assert_eq!(state(&registry, "w", 0), Some(State::Draining));
    assert!(registry.is_draining("w", 1) && !registry.is_draining("w", 2));
    assert_eq!(registry.drain("w"), Some((1, vec![])));
    assert_eq!(registry.heartbeat("w", 1, draining, 10), []);
    assert_eq!(registry.drain("nobody"), None);

    // By its own word, which stands even if a heartbeat on the way says otherwise.
    let mut registry = with_ready();
    assert_eq!(registry.heartbeat("w", 1, draining, 10), [drain]);
    assert_eq!(registry.heartbeat("w", 1, Heartbeat::default(), 20), []);
    assert_eq!(state(&registry, "w", 20), Some(State::Draining));
    // Its next life takes work again.
    registry.registered(register("w"), 2, 30);
    assert!(!registry.is_draining("w", 2));
    assert!(is_lost(&registry.left("w", 2, "drained", 40), "w", 2));
    assert_eq!(registry.drain("w"), None);
}

#[derive(Debug, Clone)]
enum Event {
    Register(u8),
    Heartbeat(u8, bool),
    JoinClosed(u8, bool),
    Left(u8, bool),
    LinkUp(u8, bool),
    LinkDown(u8, bool),
    Drain(u8),
    Pass(u64),
}

fn event() -> impl Strategy<Value = Event> {
    let id = 0u8..3;
    prop_oneof![
        3 => id.clone().prop_map(Event::Register),
        8 => (id.clone(), any::<bool>()).prop_map(|(id, old)| Event::Heartbeat(id, old)),
        1 => (id.clone(), any::<bool>()).prop_map(|(id, old)| Event::JoinClosed(id, old)),
        1 => (id.clone(), any::<bool>()).prop_map(|(id, old)| Event::Left(id, old)),
        4 => (id.clone(), any::<bool>()).prop_map(|(id, old)| Event::LinkUp(id, old)),
        1 => (id.clone(), any::<bool>()).prop_map(|(id, old)| Event::LinkDown(id, old)),
        1 => id.prop_map(Event::Drain),
        6 => (0u64..900).prop_map(Event::Pass),
    ]
}

proptest! {
    /// Whatever happens: every life ends at most once and is never heard of again; only the newest epoch of an id
    /// speaks; and nobody who was silent for the limit is ready.
    #[test]
    fn lives_end_once(events in prop::collection::vec(event(), 1..120)) {
        let mut registry = Registry::new(CONFIG);
        let mut now_ms = 0;
        let mut next_epoch = 1;
        let mut newest = [0u64; 3];
        let mut heard = std::collections::HashMap::new();
        let mut ended = std::collections::HashSet::new();
        let epoch_of = |newest: &[u64; 3], id: u8, old: bool| newest[usize::from(id)].saturating_sub(u64::from(old));
        for event in events {
            let effects = match &event {
                Event::Register(id) => {
                    let epoch = next_epoch;
                    next_epoch += 1;
                    newest[usize::from(*id)] = epoch;
                    heard.insert(epoch, now_ms);
                    let (taken, effects) = registry.registered(register(&format!("w{id}")), epoch, now_ms);
                    prop_assert!(taken);
                    effects
                }
                Event::Heartbeat(id, old) => {
                    let epoch = epoch_of(&newest, *id, *old);
                    heard.insert(epoch, now_ms);
                    registry.heartbeat(&format!("w{id}"), epoch, Heartbeat::default(), now_ms)
                }
                Event::JoinClosed(id, old) => registry.join_closed(&format!("w{id}"), epoch_of(&newest, *id, *old), now_ms),
                Event::Left(id, old) => registry.left(&format!("w{id}"), epoch_of(&newest, *id, *old), "bye", now_ms),
                Event::LinkUp(id, old) => {
                    let epoch = epoch_of(&newest, *id, *old);
                    let up = registry.link_up(&format!("w{id}"), epoch);
                    prop_assert!(!up || !ended.contains(&epoch));
                    vec![]
                }
                Event::LinkDown(id, old) => registry.link_down(&format!("w{id}"), epoch_of(&newest, *id, *old), now_ms),
                Event::Drain(id) => registry.drain(&format!("w{id}")).map(|(_, effects)| effects).unwrap_or_default(),
                Event::Pass(ms) => {
                    now_ms += ms;
                    registry.tick(now_ms)
                }
            };
            for effect in effects {
                match effect {
                    Effect::Connect { epoch, .. } | Effect::Drain { epoch, .. } => prop_assert!(!ended.contains(&epoch)),
                    Effect::Replaced { epoch, .. } | Effect::Lost { epoch, .. } => prop_assert!(ended.insert(epoch)),
                }
            }
            registry.tick(now_ms).into_iter().for_each(|effect| {
                if let Effect::Lost { epoch, .. } = effect {
                    assert!(ended.insert(epoch));
                }
            });
            for (worker, state) in registry.workers(now_ms) {
                let id: usize = worker.register.worker_id[1..].parse().unwrap();
                prop_assert_eq!(worker.epoch, newest[id]);
                prop_assert_eq!(state == State::Lost, ended.contains(&worker.epoch));
                if state == State::Ready {
                    prop_assert!(now_ms - heard[&worker.epoch] < CONFIG.lost_after_ms);
                }
            }
        }
    }
}
