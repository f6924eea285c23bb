//! A tier below the pool for simulations: keeps what it is told of (most of it), answers loads at once, later, in part or
//! not at all, and scribbles over blocks that it was lent until it gives them back. What it was given a hint of it has at once.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use baton_engine::{BlockEvent, KvTiers, LoadRequest, LoadStart, Scheduler, SeqId};
use baton_kvtransfer::Region;
use baton_model::KvGeometry;
use baton_proto::block_hash::BlockHash;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

struct Load {
    names: Vec<BlockHash>,
    blocks: Vec<u32>,
    due: u64,
}

pub struct SimTiers {
    region: Arc<Region>,
    geometry: KvGeometry,
    rng: SmallRng,
    kept: HashMap<BlockHash, Vec<u8>>,
    /// Names of hints, until somebody asks for them.
    hinted: HashSet<BlockHash>,
    loads: BTreeMap<SeqId, Load>,
    pub clock: u64,
    /// Blocks loaded, and loads that gave less than they promised.
    pub loaded: usize,
    pub broken: usize,
    /// Loads that were in place at once thanks to a hint.
    pub ahead: usize,
}

impl SimTiers {
    pub fn new(region: Arc<Region>, geometry: KvGeometry, seed: u64) -> Self {
        SimTiers {
            region,
            geometry,
            rng: SmallRng::seed_from_u64(seed),
            kept: HashMap::new(),
            hinted: HashSet::new(),
            loads: BTreeMap::new(),
            clock: 0,
            loaded: 0,
            broken: 0,
            ahead: 0,
        }
    }

    pub fn is_idle(&self) -> bool {
        self.loads.is_empty()
    }

    pub fn count(&self) -> usize {
        self.loads.len()
    }

    pub fn cancel(&mut self, seq: SeqId) {
        self.loads.remove(&seq);
    }

    /// Somebody who waits, or nobody, will ask for these blocks, of which the pool has none that `in_pool` names.
    pub fn read_ahead(&mut self, names: &[BlockHash], in_pool: impl Fn(&BlockHash) -> bool) {
        let wanted = names.iter().filter(|name| !in_pool(name));
        self.hinted
            .extend(wanted.take_while(|name| self.kept.contains_key(*name)));
    }

    fn write(&self, block: u32, bytes: &[u8]) {
        assert!(self.region.copy_in(self.geometry.block_range(block).start, bytes));
    }

    /// Loads go on, and end when they are due.
    pub fn turn(&mut self, scheduler: &mut Scheduler) {
        if !self.kept.is_empty() && self.rng.random_bool(0.05) {
            let lost = self.rng.random_range(0..self.kept.len());
            let mut names: Vec<BlockHash> = self.kept.keys().copied().collect();
            names.sort_unstable();
            self.kept.remove(&names[lost]);
        }
        let due: Vec<SeqId> = self
            .loads
            .iter()
            .filter(|l| l.1.due <= self.clock)
            .map(|l| *l.0)
            .collect();
        let garbage = vec![self.rng.random(); self.geometry.block_bytes()];
        for load in self.loads.values() {
            load.blocks.iter().for_each(|block| self.write(*block, &garbage));
        }
        for id in due {
            let load = self.loads.remove(&id).expect("listed");
            let asked = self.rng.random_range(0..=load.names.len());
            let have = load.names[..asked]
                .iter()
                .take_while(|n| self.kept.contains_key(*n))
                .count();
            for (name, block) in load.names.iter().zip(&load.blocks).take(have) {
                self.write(*block, &self.kept[name]);
            }
            self.loaded += have;
            self.broken += usize::from(have < load.names.len());
            assert!(scheduler.load_ended(id, have));
            assert!(!scheduler.load_ended(id, have), "ends once");
        }
    }
}

impl KvTiers for SimTiers {
    fn observe(&mut self, event: &BlockEvent) {
        let (BlockEvent::Stored { hash, block, .. } | BlockEvent::Evicted { hash, block, .. }) = event;
        let mut bytes = vec![0; self.geometry.block_bytes()];
        assert!(
            self.region
                .copy_out(self.geometry.block_range(*block).start, &mut bytes)
        );
        match self.kept.get(hash) {
            Some(kept) => assert_eq!(
                *kept, bytes,
                "a named block changed, or was overwritten before its event"
            ),
            None if self.rng.random_bool(0.8) => drop(self.kept.insert(*hash, bytes)),
            None => {}
        }
    }

    fn load(&mut self, request: &LoadRequest) -> LoadStart {
        assert_eq!(request.names.len(), request.blocks.len());
        let have = request.names.iter().take_while(|n| self.kept.contains_key(*n)).count();
        let ahead = request.names[..have]
            .iter()
            .take_while(|name| self.hinted.remove(*name))
            .count();
        self.ahead += usize::from(ahead > 0);
        let now = match self.rng.random_range(0..3) {
            _ if ahead > 0 => ahead,
            0 => 0,
            1 => self.rng.random_range(0..=have),
            _ => have,
        };
        for (name, block) in request.names.iter().zip(&request.blocks).take(now) {
            self.write(*block, &self.kept[name]);
        }
        self.loaded += now;
        let pending = now < request.names.len() && self.rng.random_bool(0.6);
        if pending {
            let load = Load {
                names: request.names[now..].to_vec(),
                blocks: request.blocks[now..].to_vec(),
                due: self.clock + self.rng.random_range(0..12),
            };
            assert!(self.loads.insert(request.seq, load).is_none());
        }
        LoadStart { now, pending }
    }
}
