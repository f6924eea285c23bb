//! Measures the sampler: milliseconds per row of logits over a vocabulary of 151,936.
//!
//! `cargo run --release -p baton-engine --example sampling`

use std::time::Instant;

use baton_engine::{Sampler, SamplingParams, rng};

const VOCAB: usize = 151_936;
const ROUNDS: u64 = 40;

fn main() {
    // Sums of four uniforms are near enough to normal. "peaked": as a trained model answers; "flat": random weights.
    let row = |seed: u64, spread: f32, heads: usize| -> Vec<f32> {
        let uniform = |i: u64| rng::uniform(seed, i) as f32 - 0.5;
        let mut row: Vec<f32> = (0..VOCAB as u64)
            .map(|i| spread * (0..4).map(|j| uniform(4 * i + j)).sum::<f32>())
            .collect();
        for head in 0..heads {
            row[(head * 7919 + seed as usize * 31) % VOCAB] +=
                12.0 - 6.0 * (head as f32 + 1.0).ln() / (heads as f32).ln();
        }
        row
    };
    let kinds = [("peaked", 5.0, 40), ("flat", 2.0, 0)];
    let params = [
        ("greedy", 0.0, 0, 1.0),
        ("temperature 0.8", 0.8, 0, 1.0),
        ("temperature 0.8, top_p 0.95", 0.8, 0, 0.95),
        ("temperature 0.8, top_k 40", 0.8, 40, 1.0),
        ("temperature 0.8, top_k 40, top_p 0.95", 0.8, 40, 0.95),
        ("temperature 1, top_k 50000, top_p 0.9", 1.0, 50_000, 0.9),
    ];
    for (kind, spread, heads) in kinds {
        let rows: Vec<Vec<f32>> = (0..8).map(|seed| row(seed, spread, heads)).collect();
        for (name, temperature, top_k, top_p) in params {
            let params = SamplingParams::new(temperature, top_k, top_p, 1).expect("in range");
            let mut sampler = Sampler::new();
            let mut digest = 0u64;
            let mut times: Vec<f64> = (0..ROUNDS)
                .map(|round| {
                    let row = &rows[round as usize % rows.len()];
                    let start = Instant::now();
                    let token = sampler.sample(row, &params, round);
                    let took = start.elapsed().as_secs_f64() * 1e3;
                    digest = digest.rotate_left(5) ^ u64::from(token.unwrap_or(u32::MAX));
                    took
                })
                .collect();
            times.sort_unstable_by(f64::total_cmp);
            let (median, worst) = (times[times.len() / 2], times[times.len() - 1]);
            println!("{kind:6} {name:38} {median:7.3} ms, at most {worst:7.3}   tokens {digest:016x}");
        }
    }
}
