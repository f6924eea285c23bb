//! A deterministic simulation of a group of coordinators. Everything between the queue of inputs and the disk's writes is the
//! code that runs in production: [`Runner::turn`](crate::runner::Runner::turn), raft-rs, redb, the state machine, the purses
//! of gateways. Time, network, disks and clients are made up from one number, the seed; `docs/simulation.md` has the world,
//! the invariants, the planted bugs and how to run it.
//!
//! Deliberately not here: the transport (gRPC, TLS), threads, and a member that lies on purpose.

mod admin;
mod answers;
mod backups;
mod books;
mod clients;
mod commands;
mod digest;
mod disk;
mod faults;
mod invariants;
mod member;
mod network;
mod oracle;
mod power;
mod tests;
mod world;

use crate::planted::{self, Bug};
use disk::Loss;
use oracle::{Checked, violation};
use power::Point;
use std::cell::Cell;
use std::collections::BTreeSet;
use std::sync::Once;
use world::World;

/// How long things go wrong, in milliseconds of virtual time.
const TROUBLE_MS: u64 = 9_000;
/// By then everybody must have come back and every client must have its answer.
const PATIENCE_MS: u64 = 40_000;

/// What a run came to.
#[derive(Debug, Default)]
struct Report {
    violation: Option<String>,
    trace: Vec<String>,
    entries: u64,
    answers: u64,
    reads: u64,
    rows: u64,
    changes: u64,
    snapshots: u64,
    restored: u64,
    /// Where members lost their power.
    points: BTreeSet<Point>,
}

thread_local! {
    static RUNNING: Cell<bool> = const { Cell::new(false) };
}

/// Panics of members are expected: a disk that broke its word, a planted bug. Those of runs without a trace are not printed.
fn hush_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !RUNNING.get() {
                hook(panic);
            }
        }));
    });
}

/// Runs one seed.
fn run(seed: u64, bug: Option<Bug>, trace: bool) -> Report {
    hush_panics();
    RUNNING.set(!trace);
    planted::plant(bug);
    let mut world = World::new(seed, trace);
    let result = live(&mut world);
    if let Err(violation) = &result {
        world.log(|| format!("VIOLATION: {}", violation.0));
    }
    planted::plant(None);
    RUNNING.set(false);
    Report {
        violation: result.err().map(|violation| violation.0),
        entries: world.oracle.last,
        answers: world.clients.answers,
        reads: world.clients.reads,
        rows: world.clients.feed.len() as u64,
        changes: world.operator.made,
        snapshots: world.installed,
        restored: world.restored,
        points: world.points,
        trace: world.trace.unwrap_or_default(),
    }
}

fn live(world: &mut World) -> Checked {
    world.plan();
    world.run_until(TROUBLE_MS)?;
    world.clients.closing = true;
    world.be_calm();
    settle_down(world)?;
    // What was answered survives that all lose their power at once.
    lose_all_power(world)?;
    world.back_up_at_last()?;
    betray(world)?;
    world.oracle.check_state()?;
    all_there(world)
}

/// Until all members that are left have applied the same, and no client waits.
fn settle_down(world: &mut World) -> Checked {
    let end_ms = world.now_ms + PATIENCE_MS;
    loop {
        let next_ms = world.now_ms + 250;
        world.run_until(next_ms)?;
        let last = world.oracle.last;
        let group = world.leader().and_then(|id| world.members[&id].life.as_ref());
        let group = group.map(|life| life.runner.node.members().clone()).unwrap_or_default();
        let together = world.members.iter().all(|(id, member)| {
            // One that was removed while it was away is told by nobody.
            let left = member.removed || member.gone || !group.contains(*id);
            left || member.life.as_ref().is_some_and(|life| {
                let members = life.runner.node.members();
                // One that was never taken in waits for ever.
                life.runner.node.applied() == last || members.voters.is_empty()
            })
        });
        if together && world.clients.idle() && world.leader().is_some() {
            break;
        }
        if world.now_ms > end_ms {
            let applied: Vec<_> = world
                .members
                .iter()
                .map(|(id, member)| (*id, member.life.as_ref().map(|life| life.runner.node.applied())))
                .collect();
            return violation(format!(
                "no peace: leader {:?}, last {last}, applied {applied:?}, waiting {:?}",
                world.leader(),
                world.clients.open()
            ));
        }
    }
    for id in world.up_members() {
        world.look_at(id, true)?;
    }
    Ok(())
}

fn lose_all_power(world: &mut World) -> Checked {
    let last = world.oracle.last;
    for id in world.up_members() {
        world.crash(id, Loss::All);
    }
    settle_down(world)?;
    if world.oracle.last < last {
        return violation("entries are lost");
    }
    Ok(())
}

/// One member's disk breaks its word, while all others have everything: it must notice, or it must not matter.
fn betray(world: &mut World) -> Checked {
    let up = world.up_members();
    let kind = world.random.range(0, 3);
    if up.len() < 3 || kind == 2 {
        return Ok(());
    }
    let Some(victim) = world.random.pick(&up) else {
        return Ok(());
    };
    if kind == 0 {
        world.log(|| format!("the disk of member {victim} lies"));
        if let Some(member) = world.members.get_mut(&victim) {
            member.betrayed = true;
            member.disk.set_lies();
        }
        for _ in 0..3 {
            world.clients.want(clients::What::Tick);
        }
        settle_down(world)?;
        world.crash(victim, Loss::All);
    } else {
        world.stop(victim, Loss::All);
        world.flip_bit(victim);
        world.later(200, world::Event::Start(victim));
    }
    world.clients.want(clients::What::Tick);
    settle_down(world)
}

/// Everything that was answered is in the ledger, under the number that was answered.
fn all_there(world: &World) -> Checked {
    for (id, sequence) in &world.clients.acked {
        let row = baton_state::view::row(world.oracle.tables(), *sequence)?;
        let found = row.and_then(|row| row.body).map(|body| match body {
            baton_proto::state::ledger_row::Body::Usage(record) => format!("request {}", record.request_id),
            baton_proto::state::ledger_row::Body::Correction(correction) => {
                format!("correction {}", correction.correction_id)
            }
        });
        if found.as_ref() != Some(id) {
            return violation(format!("row {sequence} was answered for {id}, and is of {found:?}"));
        }
    }
    Ok(())
}
