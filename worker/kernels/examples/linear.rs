//! Measures the linear kernels alone: operations per second of many token rows, bytes of weights per second of few.
//!
//! `cargo run --release -p baton-kernels --example linear [threads] [format]`

use baton_kernels::{Kernels, WeightFormat};
use std::time::Instant;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let threads = std::env::args().nth(1).map_or(Ok(1), |a| a.parse())?;
    let only = std::env::args().nth(2);
    let kernels = Kernels::new(threads);
    println!("{} threads, {}", kernels.threads(), kernels.isa());
    for format in WeightFormat::ALL {
        if only.as_ref().is_some_and(|only| !format.to_string().starts_with(only)) {
            continue;
        }
        println!("{format}");
        for (k, columns) in [(896, 9728), (4864, 896)] {
            // Many copies, so that decoding reads memory and not cache.
            let copies = (512 << 20) / format.bytes(columns, k).ok_or("too large")?;
            let row = |n: usize, out: &mut [f32]| {
                for (i, v) in out.iter_mut().enumerate() {
                    *v = ((i * 7 + n * 13) % 251) as f32 / 251.0 - 0.5;
                }
            };
            let packed = (0..copies)
                .map(|_| kernels.pack(format, columns, k, None, &row))
                .collect::<Result<Vec<_>, _>>()?;
            for rows in [1, 4, 16, 32, 512] {
                let x: Vec<f32> = (0..rows * k).map(|i| (i % 127) as f32 / 127.0 - 0.5).collect();
                let mut out = vec![0.0; rows * columns];
                let rounds = if rows < 64 { copies } else { 10 };
                let mut best = f64::INFINITY;
                for _ in 0..3 {
                    let start = Instant::now();
                    for round in 0..rounds {
                        kernels.linear(&x, rows, &packed[round % copies], &mut out);
                    }
                    best = best.min(start.elapsed().as_secs_f64() / rounds as f64);
                }
                println!(
                    "  k {k:4}, columns {columns:4}, rows {rows:3}: {:7.1} GOP/s, {:6.2} GB/s of weights",
                    2.0 * (rows * k * columns) as f64 / best / 1e9,
                    packed[0].bytes() as f64 / best / 1e9
                );
            }
        }
    }
    Ok(())
}
