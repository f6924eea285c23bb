//! Checks the AMX kernels against scalar references, on a CPU or an emulator that has AMX: one line per check, and a
//! failure if any output is wrong. `docs/amx-emulation.md` says how to run it without such a CPU.
//!
//! `cargo run --release -p baton-kernels --example amx_check [seed]`
//!
//! Inputs and accumulators end where an unreadable page begins, and have exactly the rows that the kernel may touch.

#[path = "../src/amx/mod.rs"]
mod amx;

use amx::{GROUP_STEPS, PANEL_COLUMNS, ROWS_MAX, STEP_BYTES, TILE_STEPS, TileSession};
use half::bf16;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};
use std::process::ExitCode;

#[allow(dead_code)] // the test that includes this file has its own
fn main() -> ExitCode {
    let seed = std::env::args().nth(1).and_then(|a| a.parse().ok()).unwrap_or(1);
    match run(seed) {
        None => {
            println!("no AMX here");
            ExitCode::SUCCESS
        }
        Some(0) => {
            println!("all checks passed");
            ExitCode::SUCCESS
        }
        Some(failed) => {
            println!("{failed} checks FAILED");
            ExitCode::FAILURE
        }
    }
}

/// A check says what it covered or what was wrong.
type Check = fn(&mut Random) -> Result<String, String>;

/// Runs all checks and prints a line for each; how many failed, or `None` without AMX.
pub fn run(seed: u64) -> Option<usize> {
    if !amx::available() {
        return None;
    }
    let checks: [(&str, Check); 8] = [
        ("int8, every number of rows", int8_every_rows),
        ("int8, largest magnitudes", int8_extremes),
        ("int8 in groups of 32", int8_groups),
        ("bf16, every number of rows", bf16_every_rows),
        ("bf16, bits whatever the batch", bf16_invariance),
        ("bf16, subnormals are zero", bf16_subnormals),
        ("bf16, the manual's order (a note)", bf16_manual_order),
        ("threads taking turns", threads),
    ];
    let mut failed = 0;
    for (name, check) in checks {
        match check(&mut Random::new(seed)) {
            Ok(covered) => println!("ok      {name}: {covered}"),
            Err(wrong) => {
                failed += 1;
                println!("FAILED  {name}: {wrong}");
            }
        }
    }
    Some(failed)
}

fn session() -> TileSession {
    TileSession::begin().expect("amx::available() was true")
}

fn int8_every_rows(random: &mut Random) -> Result<String, String> {
    let mut session = session();
    for rows in 1..=ROWS_MAX {
        let tiles = 1 + random.below(5);
        let case = Int8::new(random, rows, tiles, |r| r.next() as u8);
        compare(&case.product(&mut session), &case.reference(0, case.k), &case.name())?;
    }
    Ok(format!("1 to {ROWS_MAX} rows, k 64 to 320, exact"))
}

fn int8_extremes(random: &mut Random) -> Result<String, String> {
    let mut session = session();
    for rows in [1, 16, 17, 32] {
        let case = Int8::new(
            random,
            rows,
            64,
            |r| if r.below(8) == 0 { r.next() as u8 } else { 0x80 },
        );
        compare(&case.product(&mut session), &case.reference(0, case.k), &case.name())?;
        let mut worst = Int8::new(random, rows, 16, |_| 0x80);
        worst.weights.fill(0xFF);
        compare(
            &worst.product(&mut session),
            &vec![-128 * 255 * worst.k as i32; rows * PANEL_COLUMNS],
            &worst.name(),
        )?;
    }
    Ok("-128 against 255, k 1024 and 4096, exact".into())
}

fn int8_groups(random: &mut Random) -> Result<String, String> {
    let mut session = session();
    for rows in 1..=ROWS_MAX {
        let tiles = 1 + random.below(3);
        let case = Int8::new(random, rows, tiles, |r| r.next() as u8);
        let (x, panel) = (Fenced::of(&case.x), Fenced::of(&case.panel()));
        let acc = Fenced::new(rows * STEP_BYTES);
        let mut sums = vec![0; rows * PANEL_COLUMNS];
        for group in 0..case.k / 32 {
            // SAFETY: the buffers have what the case says, from the group's k on.
            unsafe {
                session.tile_i8_group(
                    x.at.add(32 * group).cast(),
                    case.stride,
                    rows,
                    panel.at.add(group * GROUP_STEPS * STEP_BYTES),
                    acc.at.cast(),
                );
            }
            let got: Vec<i32> = acc.read();
            compare(
                &got,
                &case.reference(32 * group, 32 * (group + 1)),
                &format!("{}, group {group}", case.name()),
            )?;
            sums.iter_mut().zip(&got).for_each(|(sum, one)| *sum += one);
        }
        // The same session changes to whole tiles and back.
        compare(
            &case.product(&mut session),
            &sums,
            &format!("{}, against the groups' sum", case.name()),
        )?;
    }
    Ok(format!(
        "1 to {ROWS_MAX} rows, k 64 to 192, each group exact, their sum the whole product"
    ))
}

fn bf16_every_rows(random: &mut Random) -> Result<String, String> {
    let mut session = session();
    for rows in 1..=ROWS_MAX {
        let tiles = 1 + random.below(12);
        let case = Bf16::new(random, rows, tiles);
        let got = case.product(&mut session, 0, rows);
        for (i, got) in got.iter().enumerate() {
            let (row, column) = (i / PANEL_COLUMNS, i % PANEL_COLUMNS);
            let (mut want, mut size) = (0.0, 0.0);
            for k in 0..case.k {
                let term = f64::from(case.x(row, k)) * f64::from(case.w(k, column));
                want += term;
                size += term.abs();
            }
            // Each of at most k roundings is off by at most 2^-24 of the terms' sizes.
            let allowed = case.k as f64 * size / f64::from(1 << 24);
            if (f64::from(*got) - want).abs() > allowed || got.is_nan() {
                return Err(format!(
                    "{}, row {row}, column {column}: {got}, not {want}",
                    case.name()
                ));
            }
        }
    }
    Ok(format!(
        "1 to {ROWS_MAX} rows, k 32 to 384, within k roundings of the f64 sum"
    ))
}

fn bf16_invariance(random: &mut Random) -> Result<String, String> {
    let mut session = session();
    let case = Bf16::new(random, ROWS_MAX, 16);
    let whole = case.product(&mut session, 0, ROWS_MAX);
    let mut windows = 0;
    for rows in 1..=ROWS_MAX {
        // Alone: every row. Otherwise: the first window, the last, and one between.
        let last = ROWS_MAX - rows;
        let firsts: Vec<usize> = if rows == 1 {
            (0..ROWS_MAX).collect()
        } else {
            vec![0, random.below(last + 1), last]
        };
        for first in firsts {
            let want = &whole[first * PANEL_COLUMNS..(first + rows) * PANEL_COLUMNS];
            compare(
                &bits(&case.product(&mut session, first, rows)),
                &bits(want),
                &format!("rows {first} to {} alone", first + rows),
            )?;
            windows += 1;
        }
    }
    Ok(format!(
        "{windows} windows of {ROWS_MAX} rows, k {}, bit for bit",
        case.k
    ))
}

fn bf16_subnormals(random: &mut Random) -> Result<String, String> {
    let mut session = session();
    let mut case = Bf16::new(random, 3, 2);
    // A subnormal times the largest power of two would be far from zero.
    case.x.fill(bf16::from_bits(0x007F));
    case.weights.fill(bf16::from_bits(0x7F00));
    compare(
        &bits(&case.product(&mut session, 0, 3)),
        &vec![0; 3 * PANEL_COLUMNS],
        "subnormal x",
    )?;
    // 2^-70 squared is a subnormal, and so is the sum of 64 of them.
    case.x.fill(bf16::from_f32(2f32.powi(-70)));
    case.weights.fill(bf16::from_f32(2f32.powi(-70)));
    compare(
        &bits(&case.product(&mut session, 0, 3)),
        &vec![0; 3 * PANEL_COLUMNS],
        "subnormal products",
    )?;
    Ok("as operands and as results".into())
}

/// Within a tile of `k`, even and odd `k` have a chain of multiply-adds each; their sum is added to the accumulator.
/// Not part of the kernels' contract, so no failure.
fn bf16_manual_order(random: &mut Random) -> Result<String, String> {
    let mut session = session();
    let case = Bf16::new(random, 20, 8);
    let got = case.product(&mut session, 0, 20);
    let equal = (0..got.len()).filter(|i| {
        let (row, column) = (i / PANEL_COLUMNS, i % PANEL_COLUMNS);
        let mut sum = 0f32;
        for tile in (0..case.k).step_by(2 * TILE_STEPS) {
            let mut chains = [0f32; 2];
            for k in tile..tile + 2 * TILE_STEPS {
                // The product of two bf16 is exact in f32, so this is a fused multiply-add.
                chains[k % 2] += case.x(row, k) * case.w(k, column);
            }
            sum += chains[0] + chains[1];
        }
        sum.to_bits() == got[*i].to_bits()
    });
    Ok(format!("{} of {} outputs have its bits", equal.count(), got.len()))
}

fn threads(random: &mut Random) -> Result<String, String> {
    let seeds: Vec<u64> = (0..4).map(|_| random.next()).collect();
    let work = |seed: u64| -> Result<(), String> {
        let mut random = Random::new(seed);
        let mut session = session();
        for _ in 0..24 {
            let rows = 1 + random.below(ROWS_MAX);
            let case = Int8::new(&mut random, rows, 8, |r| r.next() as u8);
            let got = case.product(&mut session);
            // The session's configuration has to survive what other threads do meanwhile.
            std::thread::yield_now();
            compare(&got, &case.reference(0, case.k), &case.name())?;
            compare(&case.product(&mut session), &got, "again after a switch")?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let running: Vec<_> = seeds.iter().map(|seed| scope.spawn(move || work(*seed))).collect();
        running
            .into_iter()
            .try_for_each(|thread| thread.join().expect("no panic"))
    })?;
    Ok("4 threads of 24 products, each session across switches".into())
}

/// Operands of an int8 product.
struct Int8 {
    rows: usize,
    k: usize,
    stride: usize,
    /// `rows` rows of `k`, `stride` apart; what lies between them is never zero.
    x: Vec<i8>,
    /// `[k][64]`.
    weights: Vec<u8>,
}

impl Int8 {
    fn new(random: &mut Random, rows: usize, tiles: usize, mut x: impl FnMut(&mut Random) -> u8) -> Self {
        let k = 4 * TILE_STEPS * tiles;
        let stride = k + random.below(130);
        let mut values: Vec<i8> = (0..(rows - 1) * stride + k).map(|_| x(random) as i8).collect();
        for row in 0..rows - 1 {
            values[row * stride + k..(row + 1) * stride].fill(77);
        }
        let weights = (0..k * PANEL_COLUMNS).map(|_| random.next() as u8).collect();
        Int8 {
            rows,
            k,
            stride,
            x: values,
            weights,
        }
    }

    fn name(&self) -> String {
        format!("{} rows {} apart, k {}", self.rows, self.stride, self.k)
    }

    /// `[k / 4][64][4]`.
    fn panel(&self) -> Vec<u8> {
        pack(&self.weights, 4)
    }

    fn product(&self, session: &mut TileSession) -> Vec<i32> {
        let (x, panel) = (Fenced::of(&self.x), Fenced::of(&self.panel()));
        let acc = Fenced::new(self.rows * STEP_BYTES);
        // SAFETY: the buffers have what the case says; the accumulator has the rows that are written.
        unsafe { session.tile_i8(x.at.cast(), self.stride, self.rows, panel.at, self.k / 4, acc.at.cast()) };
        acc.read()
    }

    /// The sums over `from..to` of `k`.
    fn reference(&self, from: usize, to: usize) -> Vec<i32> {
        let mut sums = vec![0; self.rows * PANEL_COLUMNS];
        for (row, sums) in sums.chunks_exact_mut(PANEL_COLUMNS).enumerate() {
            for k in from..to {
                let x = i32::from(self.x[row * self.stride + k]);
                let weights = &self.weights[k * PANEL_COLUMNS..(k + 1) * PANEL_COLUMNS];
                sums.iter_mut()
                    .zip(weights)
                    .for_each(|(sum, w)| *sum += x * i32::from(*w));
            }
        }
        sums
    }
}

/// Operands of a bf16 product.
struct Bf16 {
    rows: usize,
    k: usize,
    stride: usize,
    x: Vec<bf16>,
    weights: Vec<bf16>,
}

impl Bf16 {
    fn new(random: &mut Random, rows: usize, tiles: usize) -> Self {
        let k = 2 * TILE_STEPS * tiles;
        let stride = k + random.below(70);
        let mut value = |_| bf16::from_f32((random.next() >> 32) as f32 / (1u64 << 23) as f32 - 1.0);
        let mut x: Vec<bf16> = (0..(rows - 1) * stride + k).map(&mut value).collect();
        let weights = (0..k * PANEL_COLUMNS).map(&mut value).collect();
        for row in 0..rows - 1 {
            x[row * stride + k..(row + 1) * stride].fill(bf16::NAN);
        }
        Bf16 {
            rows,
            k,
            stride,
            x,
            weights,
        }
    }

    fn name(&self) -> String {
        format!("{} rows {} apart, k {}", self.rows, self.stride, self.k)
    }

    fn x(&self, row: usize, k: usize) -> f32 {
        self.x[row * self.stride + k].to_f32()
    }

    fn w(&self, k: usize, column: usize) -> f32 {
        self.weights[k * PANEL_COLUMNS + column].to_f32()
    }

    /// For `rows` rows from `first` on.
    fn product(&self, session: &mut TileSession, first: usize, rows: usize) -> Vec<f32> {
        let x = Fenced::of(&self.x[first * self.stride..(first + rows - 1) * self.stride + self.k]);
        let panel = Fenced::of(&pack(&self.weights, 2));
        let acc = Fenced::new(rows * STEP_BYTES);
        // SAFETY: as for int8.
        unsafe {
            session.tile_bf16(
                x.at.cast(),
                self.stride,
                rows,
                panel.at.cast(),
                self.k / 2,
                acc.at.cast(),
            )
        };
        acc.read()
    }
}

/// `[k][64]` to `[k / step][64][step]`.
fn pack<T: Copy>(weights: &[T], step: usize) -> Vec<T> {
    let k_steps = weights.len() / PANEL_COLUMNS / step;
    let at = |i: usize| (i / (PANEL_COLUMNS * step) * step + i % step, i / step % PANEL_COLUMNS);
    (0..k_steps * PANEL_COLUMNS * step)
        .map(|i| weights[at(i).0 * PANEL_COLUMNS + at(i).1])
        .collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

fn compare<T: PartialEq + std::fmt::Debug>(got: &[T], want: &[T], what: &str) -> Result<(), String> {
    assert_eq!(got.len(), want.len());
    match (0..got.len()).find(|i| got[*i] != want[*i]) {
        None => Ok(()),
        Some(i) => Err(format!(
            "{what}: row {}, column {} is {:?}, not {:?}",
            i / PANEL_COLUMNS,
            i % PANEL_COLUMNS,
            got[i],
            want[i]
        )),
    }
}

/// A multiple of every page size.
const FENCE_BYTES: usize = 64 << 10;

/// Bytes that end where a page begins that can be neither read nor written.
struct Fenced {
    at: *mut u8,
    bytes: usize,
    map: *mut std::ffi::c_void,
    mapped: usize,
}

impl Fenced {
    /// Filled with ones: a NaN or -1, whatever is read from it unwritten.
    fn new(bytes: usize) -> Self {
        let usable = bytes.next_multiple_of(FENCE_BYTES);
        let mapped = usable + FENCE_BYTES;
        // SAFETY: a fresh mapping; the fence and the `bytes` before it lie inside.
        unsafe {
            let map = mmap_anonymous(
                std::ptr::null_mut(),
                mapped,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
            .expect("memory");
            mprotect(map.byte_add(usable), FENCE_BYTES, MprotectFlags::empty()).expect("a fence");
            let at = map.cast::<u8>().add(usable - bytes);
            at.write_bytes(0xFF, bytes);
            Fenced { at, bytes, map, mapped }
        }
    }

    /// A copy.
    fn of<T: Copy>(values: &[T]) -> Self {
        let fenced = Fenced::new(size_of_val(values));
        // SAFETY: as many bytes as `new` was asked for; plain numbers.
        unsafe { fenced.at.copy_from_nonoverlapping(values.as_ptr().cast(), fenced.bytes) };
        fenced
    }

    /// All of it as numbers of four bytes.
    fn read<T: Copy>(&self) -> Vec<T> {
        assert_eq!(size_of::<T>(), 4);
        // SAFETY: `i32` and `f32` are the types asked for; every bit pattern is one.
        (0..self.bytes / 4)
            .map(|i| unsafe { self.at.cast::<T>().add(i).read_unaligned() })
            .collect()
    }
}

impl Drop for Fenced {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and nobody has the pointer any more.
        unsafe { munmap(self.map, self.mapped).expect("unmapping what was mapped") };
    }
}

/// A small deterministic generator (xorshift).
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// 56 random bits (xorshift64*, without its weakest low ones).
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 8
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }
}
