//! Candidates best-first, sorted only where somebody looks.
//!
//! `top_k`, `top_p` and the draw each ask for one place in the best-first order: the k-th, the one at which the weight
//! reaches a share, the one at which it passes a random number. So candidates are only counted and weighed by bins of equal
//! width of the exponent, and of a bin that holds a place asked for its members are picked out and sorted. A
//! distribution with a small head (a trained model's) is one sorted bin; a flat one costs one more pass, not a sort.
//!
//! Bins order as logits do, so the order is exactly that of the semantics: logit descending, id ascending.

use baton_kernels::vocab::{self, Weighed};

/// Where a head may end, tried in turn: a trained model's nucleus and a flat row's best forty lie above the first bounds,
/// and what lies below the last is never drawn.
const HEAD_EXPONENTS: [f32; 3] = [-3.0, -10.0, vocab::EXPONENT_MIN];
/// A head of no more candidates than this is sorted as a whole.
const SORTED_MAX: usize = 2048;
/// Bins of a larger one: a normal distribution over 150,000 tokens then has a few hundred in its fullest.
const BINS: usize = 2048;

#[derive(Clone, Copy, Default)]
struct Bin {
    count: u32,
    weight: f64,
}

#[derive(Clone, Copy)]
struct Candidate {
    logit: f32,
    weight: f32,
    id: u32,
}

/// A place in the order: the first `members` of `bin` and all bins before. `weight` is theirs.
#[derive(Clone, Copy)]
struct Place {
    bin: usize,
    members: usize,
    weight: f64,
}

/// Scratch memory, see the module.
#[derive(Default)]
pub(super) struct Ranking {
    ids: Vec<u32>,
    bins: Vec<Bin>,
    /// Width of the bins; `None`: there is one, and it is sorted.
    per_unit: Option<f32>,
    /// The members of `sorted_bin`, best first.
    sorted: Vec<Candidate>,
    sorted_bin: Option<usize>,
}

impl Ranking {
    /// Draws from the `top_k` best of a row, cut to `top_p` of their weight, with `u` in `[0, 1)`.
    pub(super) fn draw(&mut self, logits: &[f32], weighed: &Weighed, top_k: usize, top_p: f32, u: f64) -> Option<u32> {
        let limited = top_k < logits.len();
        let total: f64 = weighed.block_sums.iter().sum();
        // Only what can be asked for: with `top_k` that many, without it the share of `top_p`.
        let least = if limited { 0.0 } else { f64::from(top_p) * total };
        self.collect(logits, weighed, if limited { top_k } else { 0 }, least);
        let mut row = Row {
            ranking: self,
            logits,
            weighed,
        };
        let mut end = row.end();
        let mut enough = least;
        if limited {
            end = row.nth(top_k).unwrap_or(end);
            enough = f64::from(top_p) * end.weight;
        }
        if top_p < 1.0 {
            // Rounding can leave the whole a hair under its own total.
            end = row.reach(end, |weight| weight >= enough).unwrap_or(end);
        }
        let target = u * end.weight;
        let drawn = row.reach(end, |weight| weight > target).unwrap_or(end);
        row.last_of(drawn)
    }

    /// Bins the smallest head of the row that has `count` candidates and weighs `weight`; all of it if none does.
    fn collect(&mut self, logits: &[f32], weighed: &Weighed, count: usize, weight: f64) {
        let mut bound = vocab::EXPONENT_MIN;
        let mut head = vocab::head(weighed, f32::INFINITY);
        for next in HEAD_EXPONENTS {
            (bound, head) = (next, vocab::head(weighed, next));
            if head.count >= count && head.weight >= weight {
                break;
            }
        }
        self.bins.clear();
        self.sorted_bin = None;
        if head.count <= SORTED_MAX {
            self.bins.push(Bin {
                count: head.count as u32,
                weight: head.weight,
            });
            self.ids.clear();
            vocab::at_least(&weighed.exponents, bound, &mut self.ids);
            self.per_unit = None;
            self.sort(0, logits, weighed);
            return;
        }
        let per_unit = match head.lowest {
            lowest if lowest < 0.0 => ((BINS - 1) as f32 / -lowest).min(f32::MAX),
            // All equal: any width does, and the ids are in order already.
            _ => 1.0,
        };
        self.bins.resize(BINS, Bin::default());
        for (&exponent, &weight) in weighed.exponents.iter().zip(&weighed.weights) {
            if exponent >= bound {
                let bin = &mut self.bins[(vocab::bin_of(exponent, per_unit) as usize).min(BINS - 1)];
                bin.count += 1;
                bin.weight += f64::from(weight);
            }
        }
        self.per_unit = Some(per_unit);
    }

    /// Makes `sorted` the members of that bin.
    fn sort(&mut self, bin: usize, logits: &[f32], weighed: &Weighed) {
        if self.sorted_bin.replace(bin) == Some(bin) {
            return;
        }
        if let Some(per_unit) = self.per_unit {
            self.ids.clear();
            // In the last bin this may also find what lies below the head; it sorts last and is not counted.
            vocab::in_bin(&weighed.exponents, per_unit, bin as u32, &mut self.ids);
        }
        self.sorted.clear();
        self.sorted.extend(self.ids.iter().map(|&id| Candidate {
            logit: logits[id as usize].min(f32::MAX),
            weight: weighed.weights[id as usize],
            id,
        }));
        self.sorted
            .sort_unstable_by(|a, b| b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id)));
    }
}

/// A ranking with the row it is of.
struct Row<'a> {
    ranking: &'a mut Ranking,
    logits: &'a [f32],
    weighed: &'a Weighed,
}

impl Row<'_> {
    fn members(&mut self, bin: usize) -> &[Candidate] {
        self.ranking.sort(bin, self.logits, self.weighed);
        &self.ranking.sorted
    }

    /// Everything.
    fn end(&self) -> Place {
        Place {
            bin: self.ranking.bins.len(),
            members: 0,
            weight: self.ranking.bins.iter().map(|b| b.weight).sum(),
        }
    }

    /// The place of the best `count`, if there are more.
    fn nth(&mut self, count: usize) -> Option<Place> {
        let (mut before, mut weight) = (0, 0.0);
        for bin in 0..self.ranking.bins.len() {
            let Bin {
                count: members,
                weight: its,
            } = self.ranking.bins[bin];
            if before + members as usize >= count {
                let members = count - before;
                let kept = self.members(bin).iter().take(members);
                let weight = kept.fold(weight, |sum, c| sum + f64::from(c.weight));
                return Some(Place { bin, members, weight });
            }
            before += members as usize;
            weight += its;
        }
        None
    }

    /// The first place up to `end` whose weight is `enough`.
    fn reach(&mut self, end: Place, enough: impl Fn(f64) -> bool) -> Option<Place> {
        let mut weight = 0.0;
        for bin in 0..self.ranking.bins.len().min(end.bin + 1) {
            let Bin { count, weight: its } = self.ranking.bins[bin];
            let last = bin == end.bin;
            if last || enough(weight + its) {
                let members = if last { end.members } else { count as usize };
                for (index, candidate) in self.members(bin).iter().take(members).enumerate() {
                    weight += f64::from(candidate.weight);
                    if enough(weight) {
                        let members = index + 1;
                        return Some(Place { bin, members, weight });
                    }
                }
                // Added one by one it can be a hair less than the bin's own sum: then its last is the place.
                return (members > 0 && !last).then_some(Place { bin, members, weight });
            }
            weight += its;
        }
        None
    }

    /// The last candidate up to `place` that weighs anything.
    fn last_of(&mut self, place: Place) -> Option<u32> {
        let mut bin = place.bin;
        let mut members = place.members;
        loop {
            if members > 0 {
                let found = self.members(bin).iter().take(members).rfind(|c| c.weight > 0.0);
                if let Some(candidate) = found {
                    return Some(candidate.id);
                }
            }
            bin = bin.checked_sub(1)?;
            members = self.ranking.bins[bin].count as usize;
        }
    }
}
