//! Who is next: a queue per tenant, and between tenants start-time fair queueing over tokens.
//!
//! - **Between tenants** of one class the one with the smallest *counter* is next. A counter grows by what a request is
//!   expected to cost divided by the tenant's weight when it is granted, and is corrected by what it did cost when it ends
//!   (the virtual token counter of Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024; its ancestor is
//!   start-time fair queueing, Goyal et al., SIGCOMM 1996). A tenant that begins to wait is lifted to the smallest counter
//!   of those that wait, or to that of the last grant: what was not used is not saved up.
//! - **Classes** go first to last by priority: of a tenant, that of its first request, at most what the tenant may claim, and
//!   one more for every `aging` since the tenant was last served. So priority is obeyed, and nobody starves; and a
//!   flood, which is served all the time, does not age.
//! - **Within a tenant** requests are ordered by arrival, where a step of priority is worth `aging` of it. The order of two
//!   never changes, and how often one is passed is bounded.
//!
//! Invariants (`check`): every waiting ticket is in exactly one flow; sums are sums; a flow that waits has a head.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use crate::ask::{PRIORITY_MAX, Ticket};
use crate::config::Tenant;
use crate::estimate::Habits;

/// Counters are in this part of a token, so that weights divide without loss worth mentioning.
const SCALE: u128 = 1 << 16;
/// Tenants remembered. Idle ones beyond it are forgotten, which costs them nothing: their counter is lifted anyway.
pub(crate) const TENANTS_MAX: usize = 4096;

/// Order within a tenant: virtual arrival in microseconds, then age.
type Key = (i64, Ticket);

#[derive(Debug)]
pub(crate) struct Entry {
    pub priority: i32,
    pub cost: u64,
}

#[derive(Debug)]
pub(crate) struct Flow {
    pub tenant: Tenant,
    pub habits: Habits,
    /// Granted and not ended.
    pub running: usize,
    counter: u128,
    queue: BTreeMap<Key, Entry>,
    cost: u64,
    /// When it was last served, or began to wait.
    since: Duration,
}

impl Flow {
    fn class(&self, aging: Duration, now: Duration) -> Option<i64> {
        let (_, head) = self.queue.first_key_value()?;
        let aged = now.saturating_sub(self.since).as_micros() / aging.as_micros().max(1);
        let claimed = i64::from(head.priority.min(self.tenant.priority_max));
        Some(claimed.saturating_add(i64::try_from(aged).unwrap_or(i64::MAX)))
    }

    pub fn waiting(&self) -> usize {
        self.queue.len()
    }
}

#[derive(Debug)]
pub(crate) struct FairQueue {
    aging: Duration,
    flows: BTreeMap<Arc<str>, Flow>,
    keys: HashMap<Ticket, (Arc<str>, Key)>,
    /// Start tag of the last grant.
    virtual_time: u128,
    cost: u64,
}

impl FairQueue {
    pub fn new(aging: Duration) -> Self {
        Self {
            aging,
            flows: BTreeMap::new(),
            keys: HashMap::new(),
            virtual_time: 0,
            cost: 0,
        }
    }

    pub fn len(&self) -> usize {
        self.keys.len()
    }

    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// The flow of a tenant, made if there is room for one more. `None` if there are too many busy tenants.
    pub fn flow_or_new(&mut self, name: &Arc<str>, habits: impl FnOnce() -> Habits) -> Option<&mut Flow> {
        if !self.flows.contains_key(name) {
            if self.flows.len() >= TENANTS_MAX {
                self.flows.retain(|_, flow| flow.running > 0 || !flow.queue.is_empty());
            }
            if self.flows.len() >= TENANTS_MAX {
                return None;
            }
            let flow = Flow {
                tenant: Tenant::default(),
                habits: habits(),
                running: 0,
                counter: self.virtual_time,
                queue: BTreeMap::new(),
                cost: 0,
                since: Duration::ZERO,
            };
            self.flows.insert(name.clone(), flow);
        }
        self.flows.get_mut(name)
    }

    /// The flow of a tenant.
    pub fn flow(&mut self, name: &str) -> Option<&mut Flow> {
        self.flows.get_mut(name)
    }

    /// Queues a ticket of a tenant that has a flow.
    pub fn push(&mut self, name: &Arc<str>, ticket: Ticket, priority: i32, cost: u64, now: Duration) {
        let waiting = self.flows.values().filter(|flow| !flow.queue.is_empty());
        let floor = waiting.map(|flow| flow.counter).min().unwrap_or(self.virtual_time);
        let Some(flow) = self.flows.get_mut(name) else { return };
        if flow.queue.is_empty() {
            flow.counter = flow.counter.max(floor);
            flow.since = now;
        }
        let priority = priority.clamp(-PRIORITY_MAX, PRIORITY_MAX);
        let step = i64::try_from(self.aging.as_micros()).unwrap_or(i64::MAX);
        let arrival = i64::try_from(now.as_micros()).unwrap_or(i64::MAX);
        let key = (arrival.saturating_sub(step.saturating_mul(priority.into())), ticket);
        flow.queue.insert(key, Entry { priority, cost });
        flow.cost = flow.cost.saturating_add(cost);
        self.cost = self.cost.saturating_add(cost);
        self.keys.insert(ticket, (name.clone(), key));
    }

    /// The ticket that is next.
    pub fn first(&self, now: Duration) -> Option<Ticket> {
        let waiting = self.flows.values().filter_map(|flow| {
            let class = flow.class(self.aging, now)?;
            let (key, _) = flow.queue.first_key_value()?;
            Some(((std::cmp::Reverse(class), flow.counter, *key), key.1))
        });
        waiting.min().map(|(_, ticket)| ticket)
    }

    /// Takes a ticket out, to be granted or not.
    pub fn remove(&mut self, ticket: Ticket) -> Option<(Arc<str>, Entry)> {
        let (name, key) = self.keys.remove(&ticket)?;
        let flow = self.flows.get_mut(&name)?;
        let entry = flow.queue.remove(&key)?;
        flow.cost -= entry.cost;
        self.cost -= entry.cost;
        Some((name, entry))
    }

    /// A request of the tenant is granted now.
    pub fn charge(&mut self, name: &str, cost: u64, now: Duration) {
        if let Some(flow) = self.flows.get_mut(name) {
            self.virtual_time = self.virtual_time.max(flow.counter);
            flow.counter = flow.counter.saturating_add(scaled(cost, flow.tenant.weight));
            flow.since = now;
            flow.running += 1;
        }
    }

    /// A granted request has ended: it was charged `charged` and cost `used`.
    pub fn settle(&mut self, name: &str, charged: u64, used: u64) {
        if let Some(flow) = self.flows.get_mut(name) {
            let (charged, used) = (scaled(charged, flow.tenant.weight), scaled(used, flow.tenant.weight));
            flow.counter = flow.counter.saturating_add(used).saturating_sub(charged);
            flow.running = flow.running.saturating_sub(1);
        }
    }

    /// What will be granted before a further request of this tenant and priority 0 is, roughly: all of its own, and of
    /// the others as much as their weights allow meanwhile.
    pub fn cost_ahead(&self, name: &str) -> u64 {
        let Some(flow) = self.flows.get(name) else {
            return self.cost;
        };
        let others = self.flows.iter().filter(|(other, _)| other.as_ref() != name);
        let shares = others.map(|(_, other)| {
            let scaled =
                flow.cost.saturating_add(1).saturating_mul(other.tenant.weight.into()) / u64::from(flow.tenant.weight);
            other.cost.min(scaled)
        });
        shares.fold(flow.cost, u64::saturating_add)
    }

    /// The tenant whose last waiting request should make room for one of `name`: the one with most waiting for its weight,
    /// if that stays more than `name` would have.
    pub fn displaced_by(&self, name: &str) -> Option<Ticket> {
        let per_weight = |flow: &Flow, more: usize| scaled((flow.queue.len() + more) as u64, flow.tenant.weight);
        let own = per_weight(self.flows.get(name)?, 1);
        let (_, largest) = self
            .flows
            .iter()
            .filter(|(other, _)| other.as_ref() != name)
            .max_by_key(|(_, flow)| per_weight(flow, 0))?;
        (per_weight(largest, 0) > own).then(|| largest.queue.last_key_value().map(|(key, _)| key.1))?
    }

    pub fn check(&self) -> Result<(), String> {
        let (mut waiting, mut cost) = (0, 0);
        for (name, flow) in &self.flows {
            let sum: u64 = flow.queue.values().map(|entry| entry.cost).sum();
            if sum != flow.cost {
                return Err(format!("{name} waits with {sum}, counted {}", flow.cost));
            }
            for key in flow.queue.keys() {
                if self.keys.get(&key.1) != Some(&(name.clone(), *key)) {
                    return Err(format!("{:?} of {name} is not known by its key", key.1));
                }
            }
            waiting += flow.queue.len();
            cost += sum;
        }
        if (waiting, cost) != (self.keys.len(), self.cost) {
            return Err(format!(
                "{waiting} wait with {cost}, counted {} with {}",
                self.keys.len(),
                self.cost
            ));
        }
        if self.flows.len() > TENANTS_MAX {
            return Err(format!("{} tenants are remembered", self.flows.len()));
        }
        Ok(())
    }

    #[cfg(test)]
    fn counter(&self, name: &str) -> u128 {
        self.flows[name].counter / SCALE
    }
}

fn scaled(cost: u64, weight: u32) -> u128 {
    u128::from(cost) * SCALE / u128::from(weight.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fixture {
        queue: FairQueue,
        next: u64,
    }

    impl Fixture {
        fn new() -> Self {
            Self {
                queue: FairQueue::new(Duration::from_secs(2)),
                next: 0,
            }
        }

        fn push(&mut self, name: &str, tenant: Tenant, priority: i32, cost: u64, at_s: u64) -> Ticket {
            let name: Arc<str> = name.into();
            let flow = self.queue.flow_or_new(&name, || Habits::new(1)).expect("room");
            flow.tenant = tenant;
            self.next += 1;
            let ticket = Ticket(self.next);
            self.queue
                .push(&name, ticket, priority, cost, Duration::from_secs(at_s));
            self.queue.check().unwrap();
            ticket
        }

        fn push_many(&mut self, count: usize, name: &str, tenant: Tenant, priority: i32, cost: u64, at_s: u64) {
            for _ in 0..count {
                self.push(name, tenant, priority, cost, at_s);
            }
        }

        fn pop(&mut self, at_s: u64) -> Option<(String, Ticket)> {
            let now = Duration::from_secs(at_s);
            let ticket = self.queue.first(now)?;
            let (name, entry) = self.queue.remove(ticket)?;
            self.queue.charge(&name, entry.cost, now);
            self.queue.check().unwrap();
            Some((name.to_string(), ticket))
        }

        fn order(&mut self, at_s: u64) -> String {
            std::iter::from_fn(|| self.pop(at_s)).map(|(name, _)| name).collect()
        }
    }

    fn weight(weight: u32) -> Tenant {
        Tenant {
            weight,
            ..Tenant::default()
        }
    }

    #[test]
    fn tenants_take_turns_by_cost_and_weight() {
        let mut f = Fixture::new();
        f.push_many(6, "a", weight(1), 0, 10, 0);
        f.push_many(3, "b", weight(1), 0, 20, 0);
        assert_eq!(f.order(0), "abaabaaba");
        let mut f = Fixture::new();
        f.push_many(6, "a", weight(3), 0, 10, 0);
        f.push_many(2, "b", weight(1), 0, 10, 0);
        let order = f.order(0);
        assert_eq!(order.matches('a').count(), 6);
        assert_eq!(order[..4].matches('a').count(), 3, "{order}");
    }

    #[test]
    fn idleness_is_not_saved_up_and_use_alone_is_not_held_against_anyone() {
        let mut f = Fixture::new();
        f.push_many(50, "a", weight(1), 0, 10, 0);
        (0..40).for_each(|_| assert_eq!(f.pop(0).unwrap().0, "a"));
        f.push_many(10, "b", weight(1), 0, 10, 0);
        let order = f.order(0);
        assert_eq!(order[..8].matches('b').count(), 4, "{order}");
        // b is known by now; it idles while a is served, and comes back.
        f.push_many(60, "a", weight(1), 0, 10, 0);
        (0..50).for_each(|_| assert_eq!(f.pop(0).unwrap().0, "a"));
        f.push_many(10, "b", weight(1), 0, 10, 0);
        let order = f.order(0);
        assert!((4..=5).contains(&order[..9].matches('b').count()), "{order}");
        // b was served alone; c and b are equals now.
        f.push_many(20, "b", weight(1), 0, 10, 0);
        (0..16).for_each(|_| assert!(f.pop(0).is_some()));
        f.push_many(4, "c", weight(1), 0, 10, 0);
        let order = f.order(0);
        assert!((2..=3).contains(&order[..5].matches('c').count()), "{order}");
    }

    #[test]
    fn priority_goes_first_as_far_as_the_tenant_may_claim_it() {
        let mut f = Fixture::new();
        f.push("a", weight(1), 5, 10, 0);
        f.push(
            "b",
            Tenant {
                weight: 1,
                priority_max: 3,
            },
            9,
            10,
            0,
        );
        f.push("c", weight(1), -1, 10, 0);
        assert_eq!(f.order(0), "bac");
    }

    #[test]
    fn a_low_priority_ages_and_a_flood_does_not() {
        let mut f = Fixture::new();
        let low = f.push("low", weight(1), -3, 10, 0);
        let mut served = None;
        for second in 0..30 {
            f.push_many(4, "flood", weight(1), 0, 10, second);
            for _ in 0..2 {
                if f.pop(second).unwrap().1 == low {
                    served.get_or_insert(second);
                }
            }
        }
        assert_eq!(served, Some(6), "three steps of two seconds");
    }

    #[test]
    fn within_a_tenant_a_step_of_priority_is_worth_a_wait() {
        let mut f = Fixture::new();
        let first = f.push("a", weight(1), 0, 1, 0);
        let second = f.push("a", weight(1), 1, 1, 1);
        let late = f.push("a", weight(1), 1, 1, 3);
        let order: Vec<Ticket> = std::iter::from_fn(|| f.pop(9)).map(|(_, ticket)| ticket).collect();
        assert_eq!(order, [second, first, late]);
    }

    #[test]
    fn what_was_used_corrects_what_was_charged() {
        let mut f = Fixture::new();
        f.push("a", weight(2), 0, 100, 0);
        f.pop(0);
        assert_eq!(f.queue.counter("a"), 50);
        f.queue.settle("a", 100, 40);
        assert_eq!(f.queue.counter("a"), 20);
        f.queue.settle("a", 0, 1000);
        assert_eq!(f.queue.counter("a"), 520);
    }

    #[test]
    fn who_has_most_makes_room() {
        let mut f = Fixture::new();
        f.push_many(4, "a", weight(1), 0, 1, 0);
        let last = f.push("a", weight(1), -1, 1, 0);
        f.push("b", weight(1), 0, 1, 0);
        assert_eq!(f.queue.displaced_by("b"), Some(last));
        assert_eq!(f.queue.displaced_by("a"), None);
        f.push_many(3, "b", weight(1), 0, 1, 0);
        assert_eq!(
            f.queue.displaced_by("b"),
            None,
            "four and one more are not fewer than five"
        );
    }
}
