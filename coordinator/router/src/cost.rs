//! What a worker would cost a request, in seconds, from measured rates.
//!
//! Time to the first token on one worker is
//!
//! ```text
//! wait   prompt tokens ahead of it / prefill rate
//! own    prompt tokens not cached / prefill rate  +  bytes in lower tiers / their load rate
//! step   one decode step, in which the first token leaves
//! ```
//!
//! With a prefill worker, `wait` and the computed part of `own` are that worker's, and the transfer of what the decode
//! worker lacks overlaps the compute: the longer of the two counts, and the hand-over itself, which is measured
//! ([`crate::calibration`]).
//!
//! The cost by which workers are compared adds what others pay:
//!
//! - *duplicate work*: `own` counts [`Policy::stay`] times more. Computing again what another worker has cached takes
//!   that time from every later request and evicts something else. This is the limit up to which a request stays with
//!   its warm worker: it goes elsewhere when the wait there is longer than here by more than (1 + `stay`) times what the
//!   cache saves. It is measured in seconds of this worker, not a number of tokens.
//! - *streams*: each stream on the worker makes one decode step's time dearer, [`Policy::stream`] times.
//! - *no room*: blocks that are missing must be given back by running streams first.
//!
//! A rate that was not measured is taken as the mean of those measured on other candidates; if there is none, as the
//! priors below. Priors order candidates; whether a prefill goes remote they do not decide ([`mod@crate::choose`]).

use crate::calibration::Overheads;
use crate::index::Tier;
use crate::mode::Mode;

/// Prompt tokens per second before any worker has measured: a small model on a few CPU cores.
pub const PREFILL_TOKENS_PER_S_PRIOR: f64 = 2000.0;
/// Decode step before any was measured, in seconds.
pub const DECODE_STEP_S_PRIOR: f64 = 0.01;
/// Bytes per second loaded from host memory, disk and object store before any worker has measured: memory, a common SSD, a
/// store behind a common network.
pub const LOAD_BYTES_PER_S_PRIOR: [f64; Tier::LOWER] = [2e9, 3e8, 5e7];
/// Time for a missing block to become free, in seconds, per stream that would have to end: streams last seconds.
const MISSING_BLOCKS_S: f64 = 1.0;
/// Longest time that a cost counts, in seconds: keeps nonsense (a rate of almost nothing) finite.
const SECONDS_MAX: f64 = 1e6;

/// What a worker is for. Policy only: every worker can do everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Computes prompts for others.
    Prefill,
    /// Streams.
    Decode,
    /// Both.
    Combined,
}

/// How the router weighs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Policy {
    /// By what the worker that streams is chosen; what follows weighs only in [`Mode::CacheAware`], and in predictions.
    pub mode: Mode,
    /// Uncached suffixes longer than this go to a prefill worker while rates are not measured. 0: all go, always.
    pub prefill_threshold_tokens: usize,
    /// How many times its own prefill work a request is charged on top, for work that a cache would have saved the cluster.
    pub stay: f64,
    /// Weight of a stream, in decode steps.
    pub stream: f64,
    /// Share by which a hand-over may be slower than a decode worker's own prefill: what keeping it free for streams to
    /// come is worth.
    pub remote_margin: f64,
    /// Harm of local prefill to each running stream, as a share of the prefill's time.
    pub harm_per_stream: f64,
    /// Predicted time to first token, in seconds, from which on workers of the right role are busy, and those of another
    /// role are considered as their equals.
    pub busy_s: f64,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            mode: Mode::default(),
            prefill_threshold_tokens: 256,
            stay: 1.0,
            stream: 1.0,
            remote_margin: 0.25,
            harm_per_stream: 0.1,
            busy_s: 5.0,
        }
    }
}

/// How much of a prompt a worker has cached, from its beginning.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Prefix {
    /// Leading blocks in any tier.
    pub blocks: u32,
    /// Of these, blocks that would have to be loaded from host memory, disk and object store.
    pub lower: [u32; Tier::LOWER],
    /// Of `blocks`, those that are a guess: they were sent there a moment ago.
    pub recent_blocks: u32,
}

/// Rates that a worker has measured; 0 where it has not.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Rates {
    /// Prompt tokens computed per second of prefill.
    pub prefill_tokens_per_s: f32,
    /// Time of a decode step at its present batch, in microseconds.
    pub decode_step_us: u32,
    /// Bytes per second of a push to a peer.
    pub transfer_bytes_per_s: f32,
    /// Bytes per second loaded from host memory, disk and object store.
    pub load_bytes_per_s: [f32; Tier::LOWER],
}

/// A worker that could take work now.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate<'a> {
    /// Its id, the last tie-break.
    pub id: &'a str,
    /// What it is for.
    pub role: Role,
    /// Its KV compatibility digest: only equals exchange blocks.
    pub kv_digest: &'a [u8],
    /// What it has of the prompt.
    pub prefix: Prefix,
    /// Sequences it has, running and waiting.
    pub streams: u32,
    /// Prompts it computes for others, of those in `streams` or still on their way.
    pub prefilling: u32,
    /// Uncached prompt tokens that it has yet to compute.
    pub pending_prompt_tokens: u64,
    /// Blocks it can give out: free ones and cached ones that nobody holds.
    pub available_blocks: u32,
    /// Blocks it has in all.
    pub total_blocks: u32,
    /// Tokens per block.
    pub block_size: u32,
    /// Bytes per block.
    pub kv_bytes_per_block: u64,
    /// What it has measured.
    pub rates: Rates,
    /// It takes no more requests.
    pub full: bool,
    /// Better not: it is suspect, or has failed this very request before.
    pub doubtful: bool,
}

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ask {
    /// Length of the prompt.
    pub prompt_tokens: usize,
    /// Most tokens to be generated.
    pub max_tokens: usize,
}

/// What is predicted of a placement.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Estimate {
    /// Time to the first token, in seconds.
    pub ttft_s: f64,
    /// The same by the model alone, without what earlier predictions were wrong by: what
    /// [`Router::first_token`](crate::Router::first_token) wants to be told.
    pub modelled_s: f64,
    /// Prompt tokens that the worker that computes takes from its cache.
    pub cached_tokens: usize,
    /// Prompt tokens that it computes.
    pub uncached_tokens: usize,
    /// Prompt tokens that the decode worker has, so that they are not sent.
    pub decode_cached_tokens: usize,
    /// Of the blocks with these, those that it would have to read from its disk or the object store.
    pub read_blocks: u32,
    /// Whether something is ahead of the request on the decode worker, or goes on beside it: it may not begin at once.
    pub waits: bool,
}

/// Means of what candidates have measured.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Means {
    /// Of prefill, in tokens per second; whether any was measured.
    prefill: f64,
    pub(crate) prefill_measured: bool,
    /// Of a decode step, in seconds.
    step_s: f64,
    /// Of transfers, in bytes per second, if any was measured.
    pub(crate) transfer: Option<f64>,
    /// Of loads from each lower tier, in bytes per second.
    load: [f64; Tier::LOWER],
}

fn positive(rate: f32) -> Option<f64> {
    (rate.is_finite() && rate > 0.0).then_some(f64::from(rate))
}

fn mean(rates: impl Iterator<Item = f64>) -> Option<f64> {
    let (count, sum) = rates.fold((0u32, 0.0), |(count, sum), rate| (count + 1, sum + rate));
    (count > 0).then(|| sum / f64::from(count))
}

impl Means {
    pub(crate) fn of(candidates: &[Candidate<'_>]) -> Self {
        let rates = || candidates.iter().map(|candidate| &candidate.rates);
        let prefill = mean(rates().filter_map(|rates| positive(rates.prefill_tokens_per_s)));
        let steps = rates().filter(|rates| rates.decode_step_us > 0);
        Self {
            prefill: prefill.unwrap_or(PREFILL_TOKENS_PER_S_PRIOR),
            prefill_measured: prefill.is_some(),
            step_s: mean(steps.map(|rates| f64::from(rates.decode_step_us) * 1e-6)).unwrap_or(DECODE_STEP_S_PRIOR),
            transfer: mean(rates().filter_map(|rates| positive(rates.transfer_bytes_per_s))),
            load: std::array::from_fn(|tier| {
                let measured = mean(rates().filter_map(|rates| positive(rates.load_bytes_per_s[tier])));
                measured.unwrap_or(LOAD_BYTES_PER_S_PRIOR[tier])
            }),
        }
    }
}

/// Time of a prefill somewhere.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Work {
    /// Before it begins.
    pub(crate) wait_s: f64,
    /// Of its own.
    pub(crate) own_s: f64,
}

impl Work {
    pub(crate) fn total_s(self) -> f64 {
        self.wait_s + self.own_s
    }
}

impl Candidate<'_> {
    /// Prompt tokens it has cached: whole blocks, and never the last token, which is always computed.
    pub(crate) fn cached_tokens(&self, ask: &Ask) -> usize {
        let cached = self.prefix.blocks as usize * self.block_size as usize;
        let block = (self.block_size as usize).max(1);
        cached.min(ask.prompt_tokens.saturating_sub(1) / block * block)
    }

    pub(crate) fn uncached_tokens(&self, ask: &Ask) -> usize {
        ask.prompt_tokens - self.cached_tokens(ask)
    }

    fn prefill_rate(&self, means: &Means) -> f64 {
        positive(self.rates.prefill_tokens_per_s).unwrap_or(means.prefill)
    }

    pub(crate) fn step_s(&self, means: &Means) -> f64 {
        match self.rates.decode_step_us {
            0 => means.step_s,
            us => f64::from(us) * 1e-6,
        }
    }

    fn bytes_per_token(&self) -> f64 {
        self.kv_bytes_per_block as f64 / f64::from(self.block_size.max(1))
    }

    /// What is ahead of a prompt here.
    fn wait_s(&self, means: &Means) -> f64 {
        (self.pending_prompt_tokens as f64 / self.prefill_rate(means)).min(SECONDS_MAX)
    }

    /// Loading the cached blocks that are in lower tiers; no longer than computing them would take, which is what the worker
    /// does then.
    fn load_s(&self, means: &Means) -> f64 {
        if self.prefix.lower == [0; Tier::LOWER] {
            return 0.0;
        }
        let block = |count: u32| f64::from(count);
        let compute_s = f64::from(self.block_size) / self.prefill_rate(means);
        let rates = self.rates.load_bytes_per_s.iter().zip(means.load);
        let tiers = self.prefix.lower.iter().zip(rates);
        tiers
            .map(|(count, (own, mean))| {
                let load_s = self.kv_bytes_per_block as f64 / positive(*own).unwrap_or(mean);
                block(*count) * load_s.min(compute_s)
            })
            .sum()
    }

    /// The whole prompt computed here.
    pub(crate) fn local(&self, ask: &Ask, means: &Means) -> Work {
        let own_s = self.uncached_tokens(ask) as f64 / self.prefill_rate(means) + self.load_s(means);
        Work {
            wait_s: self.wait_s(means),
            own_s: own_s.min(SECONDS_MAX),
        }
    }

    /// The prompt computed here and pushed to a decode worker that has `cached_there` tokens of it.
    pub(crate) fn remote(&self, ask: &Ask, cached_there: usize, means: &Means, overheads: &Overheads) -> Work {
        let local = self.local(ask, means);
        let bytes = ask.prompt_tokens.saturating_sub(cached_there) as f64 * self.bytes_per_token();
        let rate = positive(self.rates.transfer_bytes_per_s).or(means.transfer);
        let transfer_s = rate.map_or(0.0, |rate| bytes / rate);
        Work {
            wait_s: local.wait_s,
            own_s: (local.own_s.max(transfer_s) + overheads.hand_over_s()).min(SECONDS_MAX),
        }
    }

    /// Blocks that the request needs beyond those cached in the arena, and that are not to be had now.
    pub(crate) fn missing_blocks(&self, ask: &Ask) -> u32 {
        let there = self.prefix.blocks.saturating_sub(self.prefix.lower.iter().sum());
        self.blocks_of(ask.prompt_tokens + 1)
            .saturating_sub(there)
            .saturating_sub(self.available_blocks)
    }

    /// Whether a request may have to wait here before it begins.
    pub(crate) fn is_busy(&self, ask: &Ask) -> bool {
        self.streams > 0 || self.pending_prompt_tokens > 0 || self.missing_blocks(ask) > 0
    }

    /// Whether the prompt can ever run here.
    pub(crate) fn fits(&self, ask: &Ask) -> bool {
        self.blocks_of(ask.prompt_tokens) <= self.total_blocks
    }

    fn blocks_of(&self, tokens: usize) -> u32 {
        let block = (self.block_size as usize).max(1);
        u32::try_from(tokens.div_ceil(block)).unwrap_or(u32::MAX)
    }

    /// Waiting for running streams to give blocks back.
    pub(crate) fn room_s(&self, ask: &Ask) -> f64 {
        let missing = f64::from(self.missing_blocks(ask));
        let held = f64::from(self.total_blocks.saturating_sub(self.available_blocks).max(1));
        match missing > 0.0 {
            // The share of what is held, in streams that have to end.
            true => MISSING_BLOCKS_S * (1.0 + missing / held * f64::from(self.streams)),
            false => 0.0,
        }
    }

    /// What the worker costs, in microseconds, if its prompt takes `work` and [`room_s`](Self::room_s) is as given: see the
    /// module. Whole numbers, so that what is equal for all purposes is a tie.
    pub(crate) fn cost_us(&self, work: Work, room_s: f64, means: &Means, policy: &Policy) -> u64 {
        let streams_s = policy.stream * f64::from(self.streams) * self.step_s(means);
        let cost_s = work.wait_s + (1.0 + policy.stay) * work.own_s + streams_s + room_s;
        // A float beyond the range saturates.
        (cost_s * 1e6) as u64
    }
}
