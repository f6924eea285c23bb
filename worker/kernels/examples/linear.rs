//! Measures the linear kernel alone: GFLOP/s of many token rows, GB/s of weights of one.
//!
//! `cargo run --release -p baton-kernels --example linear [threads]`

use baton_kernels::{Elements, Kernels, MatrixPart};
use half::bf16;
use std::time::Instant;

fn main() {
    let threads = std::env::args().nth(1).and_then(|a| a.parse().ok()).unwrap_or(1);
    let kernels = Kernels::new(threads);
    println!("{} threads, {}", kernels.threads(), kernels.isa());
    let weights: Vec<bf16> = (0..4864 * 4864)
        .map(|i| bf16::from_f32((i % 251) as f32 / 251.0 - 0.5))
        .collect();
    for (k, columns) in [(896, 4864), (4864, 896)] {
        let part = MatrixPart {
            weights: Elements::Bf16(&weights[..k * columns]),
            bias: None,
            columns,
        };
        for rows in [1, 4, 16, 256] {
            let x: Vec<f32> = (0..rows * k).map(|i| (i % 127) as f32 / 127.0 - 0.5).collect();
            let mut out = vec![0.0; rows * columns];
            let rounds = 1 + 256 / rows;
            let start = Instant::now();
            for _ in 0..rounds {
                kernels.linear(&x, rows, k, &[part], &mut out);
            }
            let seconds = start.elapsed().as_secs_f64() / rounds as f64;
            let (flops, bytes) = (2.0 * (rows * k * columns) as f64, 2.0 * (k * columns) as f64);
            println!(
                "k {k:4}, columns {columns:4}, rows {rows:3}: {:7.1} GFLOP/s, {:6.2} GB/s of weights",
                flops / seconds / 1e9,
                bytes / seconds / 1e9
            );
        }
    }
}
