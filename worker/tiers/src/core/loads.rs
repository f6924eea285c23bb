//! How blocks come back: loads, their parts, and the reads that several loads may share.

use std::time::Duration;

use baton_proto::block_hash::{BlockHash, short};

use super::{Action, Read, Tier, Tiers};

/// Blocks of a load that are read ahead at first, and at most. Doubles with every block that comes: enough to keep a disk
/// or a store busy for as long as an engine step may take, few enough that a load which is cut short wasted little.
const WINDOW_START: usize = 32;
const WINDOW_MAX: usize = 128;
/// A load waits at least this long, and at most as long as computing would take or the second bound: a store that hangs
/// costs no more than that.
const DEADLINE_MIN: Duration = Duration::from_millis(50);
const DEADLINE_MAX: Duration = Duration::from_secs(10);
/// Where nobody knows yet how long computing takes.
const DEADLINE_UNKNOWN: Duration = Duration::from_secs(2);

/// One block of a load.
#[derive(Debug)]
pub(super) enum Part<B> {
    Unasked,
    /// In host memory, or held ahead, when it was asked for; looked up again when it is taken.
    Host,
    Reading,
    Here(Tier, B),
    Taken,
}

/// Blocks that one sequence waits for.
#[derive(Debug)]
pub(super) struct Load<B> {
    /// Short name of the block before the first.
    parent: u64,
    pub(super) names: Vec<BlockHash>,
    pub(super) parts: Vec<Part<B>>,
    /// Parts before this one are not `Unasked`.
    asked: usize,
    taken: usize,
    /// Where it ends, as far as is known.
    pub(super) end: usize,
    /// From here on nobody knew whether the store has the blocks...
    unsure_from: usize,
    /// ...and from here on they are asked for one by one.
    guess_from: usize,
    window: usize,
    /// A tier that failed under this load is not asked again by it.
    avoid: [bool; 3],
    slowest: Option<Tier>,
    started: Duration,
    deadline: Duration,
}

impl<B> Load<B> {
    fn parent(&self, index: usize) -> u64 {
        index
            .checked_sub(1)
            .map_or(self.parent, |before| short(&self.names[before]))
    }

    fn cut(&mut self, index: usize) -> usize {
        let lost = self.end.saturating_sub(index);
        self.end = self.end.min(index.max(self.taken));
        self.asked = self.asked.min(self.end);
        lost
    }

    pub(super) fn check(&self) -> Result<(), String> {
        let taken = self.parts.iter().take_while(|p| matches!(p, Part::Taken)).count();
        let unasked = self.parts[..self.asked].iter().any(|p| matches!(p, Part::Unasked));
        if taken != self.taken || self.taken > self.end || self.end > self.names.len() || unasked {
            return Err(format!(
                "{taken} parts taken, {} counted, asked {}, end {}",
                self.taken, self.asked, self.end
            ));
        }
        Ok(())
    }
}

/// A read that is queued or under way, and whom it is for.
#[derive(Debug)]
pub(super) struct Reading {
    /// Slot and generation, if it is the disk's; the slot is pinned.
    pub(super) disk: Option<(u32, u64)>,
    pub(super) waiters: Vec<(u64, usize)>,
    /// Short name of the block before it.
    parent: u64,
    /// It was begun for a hint.
    pub(super) ahead: bool,
}

impl<B: Clone> Tiers<B> {
    /// Begins a load of `names` under an id that no other load has; the first one's parent has the short name `parent`, and
    /// `compute` is what computing all of them would take. Answers how many may come: with 0 there is no load. Then [`take`](Self::take) until it is [over](Self::is_over), and
    /// [`end`](Self::end) it in any case.
    pub fn load(
        &mut self,
        id: u64,
        parent: u64,
        names: Vec<BlockHash>,
        compute: Option<Duration>,
        now: Duration,
    ) -> usize {
        self.tick(now);
        if names.is_empty() || self.loads.len() >= self.limits.loads_max || self.loads.contains_key(&id) {
            return 0;
        }
        let each = compute.map(|all| all / u32::try_from(names.len()).unwrap_or(u32::MAX));
        let mut pays: [Option<bool>; 3] = [None; 3];
        let mut sure = 0;
        let mut declined = false;
        for name in &names {
            let Some(tier) = self.locate(name) else { break };
            if !*pays[tier as usize].get_or_insert_with(|| self.rates.pays(tier, each)) {
                declined = true;
                break;
            }
            sure += 1;
        }
        let rest = names.len() - sure;
        let guess = !declined && rest > 0 && self.may_have_object(&names[sure]) && self.rates.probe_pays(rest, each);
        let end = if guess { names.len() } else { sure };
        if declined {
            self.stats.declined += rest as u64;
        } else if !guess {
            self.stats.misses += rest as u64;
        }
        if end == 0 {
            return 0;
        }
        let patience = compute.map_or(DEADLINE_UNKNOWN, |all| all.clamp(DEADLINE_MIN, DEADLINE_MAX));
        let load = Load {
            parent,
            parts: names.iter().map(|_| Part::Unasked).collect(),
            names,
            asked: 0,
            taken: 0,
            end,
            unsure_from: sure,
            guess_from: sure,
            window: WINDOW_START,
            avoid: [false; 3],
            slowest: None,
            started: self.now,
            deadline: self.now + patience,
        };
        self.loads.insert(id, load);
        self.ask_ahead();
        self.loads.get(&id).map_or(0, |load| load.end)
    }

    /// The next block of a load, in order, if it is here.
    pub fn take(&mut self, id: u64) -> Option<B> {
        let load = self.loads.get_mut(&id)?;
        let index = load.taken;
        if index >= load.end {
            return None;
        }
        let (tier, from, block) = match std::mem::replace(&mut load.parts[index], Part::Unasked) {
            Part::Here(tier, block) => {
                self.here -= 1;
                (tier, tier, block)
            }
            Part::Host => match self.take_host(id, index) {
                // Whatever tier it came from: it was in memory, and says nothing of how quick that tier is.
                Some((from, block)) => (Tier::Host, from, block),
                // It has left since. Look elsewhere.
                None => {
                    self.ask_again(id, index);
                    self.ask_ahead();
                    return None;
                }
            },
            other => {
                load.parts[index] = other;
                return None;
            }
        };
        let load = self.loads.get_mut(&id)?;
        load.parts[index] = Part::Taken;
        load.taken += 1;
        load.asked = load.asked.max(load.taken);
        load.slowest = load.slowest.max(Some(tier));
        self.usage(from).hits += 1;
        self.ask_ahead();
        Some(block)
    }

    /// A block that is in memory, and the tier it came from.
    fn take_host(&mut self, id: u64, index: usize) -> Option<(Tier, B)> {
        let name = self.loads.get(&id)?.names.get(index)?;
        if let Some(held) = self.ahead.take(name) {
            self.stats.ahead.hits += 1;
            if let Some(slot) = self.disk.get(name) {
                self.disk.touch(slot);
            }
            return Some(held);
        }
        let slot = self.host.get(name)?;
        self.host.touch(slot);
        Some((Tier::Host, self.host_bytes[slot as usize].clone()?))
    }

    /// Whether all blocks that will come were taken.
    pub fn is_over(&self, id: u64) -> bool {
        self.loads.get(&id).is_none_or(|load| load.taken >= load.end)
    }

    /// Ends a load, over or not. Answers how many blocks were taken.
    pub fn end(&mut self, id: u64, now: Duration) -> usize {
        self.tick(now);
        let Some(load) = self.loads.remove(&id) else { return 0 };
        self.here -= load.parts.iter().filter(|p| matches!(p, Part::Here(..))).count();
        let took = self.now - load.started;
        let expired = load.taken < load.end && self.now >= load.deadline;
        if expired && matches!(load.parts[load.taken], Part::Reading) {
            let disk = self
                .reads
                .get(&load.names[load.taken])
                .is_some_and(|read| read.disk.is_some());
            let breaker = if disk {
                &mut self.disk_breaker
            } else {
                &mut self.object_breaker
            };
            breaker.observe(false, self.now);
        }
        self.stats.expired += u64::from(expired);
        if load.slowest > Some(Tier::Host) || load.taken == 0 {
            self.stats.loads += 1;
            self.stats.load_time += took;
        }
        match load.slowest {
            Some(tier) => self.rates.observe(tier, load.taken, took),
            // A look into the store for nothing: that is what such a look costs.
            None if load.unsure_from == 0 => self.rates.observe_look(took),
            None => {}
        }
        self.ask_ahead();
        load.taken
    }

    /// Loads whose deadline has passed; end them.
    pub fn expired(&self, now: Duration) -> Vec<u64> {
        let late = self.loads.iter().filter(|(_, load)| load.deadline <= now);
        late.map(|(id, _)| *id).collect()
    }

    /// When a load has to end at the latest.
    pub fn deadline(&self, id: u64) -> Option<Duration> {
        self.loads.get(&id).map(|load| load.deadline)
    }

    /// Asks for parts while windows and bounds allow, the oldest loads first.
    pub(super) fn ask_ahead(&mut self) {
        let ids: Vec<u64> = self.loads.keys().copied().collect();
        for id in ids {
            while let Some(load) = self.loads.get_mut(&id) {
                let index = load.asked;
                // Guesses go one by one until one is right.
                let ahead = if index >= load.guess_from { 1 } else { load.window };
                if index >= load.end || index >= load.taken + ahead {
                    break;
                }
                if !matches!(load.parts[index], Part::Unasked) {
                    load.asked += 1;
                    continue;
                }
                if !self.ask(id, index) {
                    break;
                }
            }
        }
    }

    /// Asks for one part, or cuts the load short there. False if no read can be had now.
    fn ask(&mut self, id: u64, index: usize) -> bool {
        let Some(load) = self.loads.get(&id) else { return true };
        let (name, avoid, guess) = (load.names[index], load.avoid, index >= load.unsure_from);
        let parent = load.parent(index);
        let tier = self.locate(&name).filter(|tier| !avoid[*tier as usize]).or_else(|| {
            let maybe = !avoid[Tier::Object as usize] && self.may_have_object(&name);
            (maybe && (guess || self.objects.get(&name).is_some())).then_some(Tier::Object)
        });
        let part = match tier {
            None => {
                if let Some(load) = self.loads.get_mut(&id) {
                    self.stats.misses += load.cut(index) as u64;
                }
                return true;
            }
            Some(Tier::Host) => Part::Host,
            Some(tier) => {
                if let Some(read) = self.reads.get_mut(&name) {
                    read.waiters.push((id, index));
                } else if !self.has_room() {
                    return false;
                } else {
                    self.begin_read(tier, name, parent, Some((id, index)));
                }
                Part::Reading
            }
        };
        if let Some(load) = self.loads.get_mut(&id) {
            load.parts[index] = part;
            load.asked = load.asked.max(index + 1);
        }
        true
    }

    /// Whether one more block may be read for loads.
    fn has_room(&self) -> bool {
        self.reads.len() - self.ahead.reading + self.here < self.limits.reads_max
    }

    /// Begins to read a block, for a part of a load or, without one, for a hint.
    pub(super) fn begin_read(&mut self, tier: Tier, name: BlockHash, parent: u64, waiter: Option<(u64, usize)>) {
        let disk = self.disk.get(&name).filter(|_| tier == Tier::Disk);
        let disk = disk.map(|slot| (slot, self.disk.pin(slot)));
        let ahead = waiter.is_none();
        let queue = match ahead {
            true => &mut self.ahead_queue,
            false => &mut self.read_queue,
        };
        queue.push_back(match disk {
            Some((slot, generation)) => Action::ReadDisk {
                slot,
                generation,
                name,
                ahead,
            },
            None => Action::GetObject { name, ahead },
        });
        let reading = Reading {
            disk,
            waiters: waiter.into_iter().collect(),
            parent,
            ahead,
        };
        self.reads.insert(name, reading);
    }

    fn ask_again(&mut self, id: u64, index: usize) {
        if let Some(load) = self.loads.get_mut(&id) {
            load.parts[index] = Part::Unasked;
            load.asked = load.asked.min(index);
        }
    }

    pub(super) fn did_read_disk(&mut self, slot: u32, generation: u64, name: BlockHash, read: Read<B>) {
        // A disk answers `Missing` where a slot was wiped: as little of use as a broken one.
        let keep = matches!(read, Read::Found(_) | Read::Failed);
        if !self.disk.unpin(slot, generation, keep) {
            return;
        }
        self.disk_breaker.observe(!matches!(read, Read::Failed), self.now);
        let asked_for = self.reads.get(&name).is_some_and(|read| !read.waiters.is_empty());
        if asked_for && matches!(read, Read::Found(_)) {
            self.disk.touch(slot);
        }
        self.stats.disk.broken += u64::from(!keep);
        self.settle(Tier::Disk, name, read);
    }

    pub(super) fn got_object(&mut self, name: BlockHash, read: Read<B>) {
        self.object_breaker.observe(!matches!(read, Read::Failed), self.now);
        match read {
            Read::Found(_) => {
                let parent = self.reads.get(&name).map_or(0, |read| read.parent);
                self.know_object(name, parent);
            }
            Read::Broken | Read::Missing => self.miss_object(name),
            Read::Failed => {}
        }
        self.stats.object.broken += u64::from(matches!(read, Read::Broken | Read::Failed));
        self.settle(Tier::Object, name, read);
    }

    /// Hands a read to whoever still waits for it.
    fn settle(&mut self, tier: Tier, name: BlockHash, read: Read<B>) {
        let Some(reading) = self.reads.remove(&name) else {
            return;
        };
        if reading.ahead {
            self.ahead.reading -= 1;
            if let Read::Found(block) = &read {
                self.stats.ahead.read += 1;
                self.ahead.hold(name, tier, block.clone(), self.now);
            }
        }
        for (id, index) in reading.waiters {
            let Some(load) = self.loads.get_mut(&id) else { continue };
            if index >= load.end || load.names[index] != name || !matches!(load.parts[index], Part::Reading) {
                continue;
            }
            match &read {
                // One buffer may be here for several loads; it is counted for each, which errs on the safe side, so
                // only as many take it as there is room for.
                // The first one takes it from there, at the latest.
                Read::Found(_) if reading.ahead => {
                    load.window = (load.window * 2).min(WINDOW_MAX);
                    self.ask_again(id, index);
                }
                Read::Found(block) if self.reads.len() - self.ahead.reading + self.here < self.limits.reads_max => {
                    load.parts[index] = Part::Here(tier, block.clone());
                    load.window = (load.window * 2).min(WINDOW_MAX);
                    if index >= load.guess_from {
                        // What was put in one go is found in one go.
                        load.guess_from = load.names.len().min(index + 1 + load.window);
                    }
                    self.here += 1;
                }
                Read::Found(_) => self.ask_again(id, index),
                Read::Failed => {
                    load.avoid[tier as usize] = true;
                    self.ask_again(id, index);
                }
                Read::Broken | Read::Missing => self.ask_again(id, index),
            }
        }
    }
}
