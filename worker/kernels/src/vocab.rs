//! Passes over one row of logits, for a sampler: the largest, the weights, who reaches a bound.
//!
//! All are elementwise or reduce in an order fixed here, with IEEE operations that no instruction set fuses or reorders:
//! wider registers make them faster and change no bit, on any machine. So the widest this CPU has is used without asking.
//!
//! A NaN or -inf logit is no candidate (weight 0); +inf counts as the largest finite number. Which token to take is the
//! sampler's business.

/// Logits per entry of the block sums.
pub const BLOCK: usize = 256;

/// Below this `exp` is 0 here.
pub const EXPONENT_MIN: f32 = -87.0;

/// Lanes of the reductions: a multiple of every register.
const LANES: usize = 32;

/// Compiles a body for several instruction sets and takes the widest that the CPU has.
macro_rules! widest {
    ($(#[$doc:meta])* pub fn $name:ident($($arg:ident : $ty:ty),*) $(-> $ret:ty)? = $body:ident) => {
        $(#[$doc])*
        pub fn $name($($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
                fn avx512($($arg: $ty),*) $(-> $ret)? {
                    $body($($arg),*)
                }
                #[target_feature(enable = "avx2")]
                fn avx2($($arg: $ty),*) $(-> $ret)? {
                    $body($($arg),*)
                }
                if is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                {
                    // SAFETY: the features were just detected; "avx512bw" implies "avx512f".
                    return unsafe { avx512($($arg),*) };
                }
                if is_x86_feature_detected!("avx2") {
                    // SAFETY: the feature was just detected.
                    return unsafe { avx2($($arg),*) };
                }
            }
            $body($($arg),*)
        }
    };
}

widest! {
    /// The largest candidate, -inf when there is none.
    pub fn largest(logits: &[f32]) -> f32 = largest_body
}

#[inline(always)]
fn largest_body(logits: &[f32]) -> f32 {
    let mut best = [f32::NEG_INFINITY; LANES];
    let (rows, rest) = logits.as_chunks::<LANES>();
    for row in rows {
        for (best, &logit) in best.iter_mut().zip(row) {
            // False for NaN.
            *best = if logit > *best { logit } else { *best };
        }
    }
    let all = best.iter().chain(rest);
    all.fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a })
        .min(f32::MAX)
}

widest! {
    /// Index of the first value that is at least `bound`.
    pub fn first_at_least(values: &[f32], bound: f32) -> Option<usize> = first_at_least_body
}

#[inline(always)]
fn first_at_least_body(values: &[f32], bound: f32) -> Option<usize> {
    let (rows, rest) = values.as_chunks::<LANES>();
    let row = rows.iter().position(|row| any(row, |v| v >= bound));
    let start = row.unwrap_or(rows.len()) * LANES;
    let tail = if row.is_some() {
        &values[start..start + LANES]
    } else {
        rest
    };
    tail.iter().position(|v| *v >= bound).map(|at| start + at)
}

/// Whether any value passes; the whole row is looked at, so that it vectorises.
#[inline(always)]
fn any(row: &[f32; LANES], passes: impl Fn(f32) -> bool) -> bool {
    row.iter().fold(0u32, |found, v| found | u32::from(passes(*v))) != 0
}

/// What [`weigh`] writes, kept to be used again.
#[derive(Debug, Default)]
pub struct Weighed {
    /// `(logit - max) / temperature`, at most 0; -inf for what is no candidate.
    pub exponents: Vec<f32>,
    /// `exp` of these, in `0..=1`.
    pub weights: Vec<f32>,
    /// Sums of the weights of each [`BLOCK`].
    pub block_sums: Vec<f64>,
}

widest! {
    /// Weighs a row against its `max`, which is [`largest`] of it.
    pub fn weigh(logits: &[f32], max: f32, temperature: f32, out: &mut Weighed) = weigh_body
}

#[inline(always)]
fn weigh_body(logits: &[f32], max: f32, temperature: f32, out: &mut Weighed) {
    out.exponents.resize(logits.len(), 0.0);
    out.weights.resize(logits.len(), 0.0);
    out.block_sums.clear();
    let outputs = out.exponents.chunks_mut(BLOCK).zip(out.weights.chunks_mut(BLOCK));
    for (logits, (exponents, weights)) in logits.chunks(BLOCK).zip(outputs) {
        for ((&logit, exponent), weight) in logits.iter().zip(exponents).zip(weights.iter_mut()) {
            let finite = if logit > f32::MAX { f32::MAX } else { logit };
            let x = (finite - max) / temperature;
            *exponent = if x.is_nan() { f32::NEG_INFINITY } else { x };
            *weight = exp_nonpositive(x);
        }
        let mut sums = [0.0f64; LANES];
        let (rows, rest) = weights.as_chunks::<LANES>();
        for row in rows {
            for (sum, &weight) in sums.iter_mut().zip(row) {
                *sum += f64::from(weight);
            }
        }
        let rest: f64 = rest.iter().map(|&w| f64::from(w)).sum();
        out.block_sums.push(sums.iter().sum::<f64>() + rest);
    }
}

/// `exp(x)` for `x <= 0` within 3 ulp, 0 below [`EXPONENT_MIN`] and for NaN: range reduction to `2^n * 2^f` and a
/// polynomial for `2^f`. Only IEEE adds and multiplies, in a fixed order, so every machine agrees to the bit.
#[inline(always)]
fn exp_nonpositive(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    // ln 2 in two parts, so that `x - n * ln 2` keeps its low bits.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let clamped = if x > EXPONENT_MIN { x } else { EXPONENT_MIN };
    let y = clamped * LOG2_E + 0.5;
    // SAFETY: `y` is no NaN and lies in -126..=0.5.
    let truncated: i32 = unsafe { y.to_int_unchecked() };
    let n = truncated - i32::from(truncated as f32 > y);
    let r = clamped - n as f32 * LN2_HIGH - n as f32 * LN2_LOW;
    // Taylor coefficients suffice on |r| <= ln 2 / 2.
    let p = 1.0
        + r * (1.0
            + r * (0.5
                + r * (0.166_666_67
                    + r * (0.041_666_668 + r * (8.333_334e-3 + r * (1.388_888_9e-3 + r * 1.984_127e-4))))));
    let scale = f32::from_bits(((n + 127) as u32) << 23);
    if x >= EXPONENT_MIN { p * scale } else { 0.0 }
}

/// What [`head`] found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Head {
    /// Exponents that reach the bound.
    pub count: usize,
    /// Their weights' sum.
    pub weight: f64,
    /// The least of them; 0 if there is none.
    pub lowest: f32,
}

widest! {
    /// Counts and weighs the exponents that are at least `bound`.
    pub fn head(weighed: &Weighed, bound: f32) -> Head = head_body
}

#[inline(always)]
fn head_body(weighed: &Weighed, bound: f32) -> Head {
    let mut counts = [0u32; LANES];
    let mut sums = [0.0f64; LANES];
    let mut lows = [0.0f32; LANES];
    // One simple loop per array, so that each vectorises.
    let mut take = |exponents: &[f32], weights: &[f32]| {
        for (count, &x) in counts.iter_mut().zip(exponents) {
            *count += u32::from(x >= bound);
        }
        for ((sum, &x), &weight) in sums.iter_mut().zip(exponents).zip(weights) {
            *sum += f64::from(if x >= bound { weight } else { 0.0 });
        }
        for (low, &x) in lows.iter_mut().zip(exponents) {
            let reaching = if x >= bound { x } else { 0.0 };
            *low = if reaching < *low { reaching } else { *low };
        }
    };
    let (exponents, exponents_rest) = weighed.exponents.as_chunks::<LANES>();
    let (weights, weights_rest) = weighed.weights.as_chunks::<LANES>();
    for (exponents, weights) in exponents.iter().zip(weights) {
        take(exponents, weights);
    }
    take(exponents_rest, weights_rest);
    Head {
        count: counts.iter().map(|c| *c as usize).sum(),
        weight: sums.iter().sum(),
        lowest: lows.iter().fold(0.0, |a, &b| if b < a { b } else { a }),
    }
}

widest! {
    /// Appends the indices, in order, of the values that are at least `bound`.
    pub fn at_least(values: &[f32], bound: f32, out: &mut Vec<u32>) = at_least_body
}

#[inline(always)]
fn at_least_body(values: &[f32], bound: f32, out: &mut Vec<u32>) {
    collect(values, |v| v >= bound, out);
}

/// The bin of an exponent: 0 next to 0, rising by one every `1 / per_unit` below. A larger exponent never has a larger bin.
#[inline(always)]
pub fn bin_of(exponent: f32, per_unit: f32) -> u32 {
    // Saturates, so -inf has a bin as well.
    (-exponent * per_unit) as u32
}

widest! {
    /// Appends the indices, in order, of the exponents in that bin, which is below 2^24.
    pub fn in_bin(exponents: &[f32], per_unit: f32, bin: u32, out: &mut Vec<u32>) = in_bin_body
}

#[inline(always)]
fn in_bin_body(exponents: &[f32], per_unit: f32, bin: u32, out: &mut Vec<u32>) {
    // As `bin_of`, without the conversion: bins a float cannot tell apart do not occur.
    let (from, to) = (bin as f32, (bin + 1) as f32);
    collect(exponents, |x| -x * per_unit >= from && -x * per_unit < to, out);
}

#[inline(always)]
fn collect(values: &[f32], passes: impl Fn(f32) -> bool, out: &mut Vec<u32>) {
    let (rows, rest) = values.as_chunks::<LANES>();
    for (start, row) in (0u32..).step_by(LANES).zip(rows) {
        if any(row, &passes) {
            out.extend((start..).zip(row).filter(|(_, v)| passes(**v)).map(|(i, _)| i));
        }
    }
    let start = (rows.len() * LANES) as u32;
    out.extend((start..).zip(rest).filter(|(_, v)| passes(**v)).map(|(i, _)| i));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn exp_is_close_to_libm_and_monotonic() {
        let mut last = 0.0;
        for i in 0..400_000 {
            let x = -90.0 + i as f32 * (90.0 / 400_000.0);
            let (ours, exact) = (exp_nonpositive(x), f64::from(x).exp());
            if x > EXPONENT_MIN {
                assert!(
                    (f64::from(ours) / exact - 1.0).abs() < 4e-7,
                    "{x}: {ours} against {exact}"
                );
            }
            assert!(ours >= last * 0.999_999 && ours <= 1.0);
            last = ours;
        }
        assert_eq!(exp_nonpositive(0.0), 1.0);
        assert_eq!(exp_nonpositive(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp_nonpositive(f32::NAN), 0.0);
    }

    prop_compose! {
        fn rows()(row in prop::collection::vec(prop_oneof![
            12 => -30f32..30.0, 2 => Just(2.5), 1 => Just(f32::NAN), 1 => Just(f32::NEG_INFINITY), 1 => Just(f32::INFINITY),
        ], 0..900)) -> Vec<f32> { row }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// The compiled variants agree with the plain bodies to the bit, and those with one-line references.
        #[test]
        fn passes_agree_with_their_definitions(row in rows(), temperature in 0.01f32..5.0, bound in -30f32..30.0, bin in 0u32..40) {
            let candidates = || row.iter().copied().filter(|l| *l > f32::NEG_INFINITY).map(|l| l.min(f32::MAX));
            let max = largest(&row);
            prop_assert_eq!(max, candidates().fold(f32::NEG_INFINITY, f32::max));
            prop_assert_eq!(first_at_least(&row, bound), row.iter().position(|l| *l >= bound));
            let reaching = |passes: &dyn Fn(f32) -> bool, of: &[f32]| -> Vec<u32> {
                (0u32..).zip(of).filter(|(_, l)| passes(**l)).map(|(i, _)| i).collect()
            };
            let mut found = vec![7];
            at_least(&row, bound, &mut found);
            prop_assert_eq!(&found[1..], &reaching(&|l| l >= bound, &row)[..]);
            let (mut wide, mut plain) = (Weighed::default(), Weighed::default());
            weigh(&[1.0; 1000], 1.0, 1.0, &mut wide);
            weigh(&row, max, temperature, &mut wide);
            weigh_body(&row, max, temperature, &mut plain);
            let bits = |w: &Weighed| -> (Vec<u32>, Vec<u64>) {
                (w.exponents.iter().chain(&w.weights).map(|x| x.to_bits()).collect(), w.block_sums.iter().map(|x| x.to_bits()).collect())
            };
            prop_assert_eq!(bits(&wide), bits(&plain));
            for (index, &logit) in row.iter().enumerate() {
                let exact = if logit > f32::NEG_INFINITY { (f64::from(logit.min(f32::MAX) - max) / f64::from(temperature)).exp() } else { 0.0 };
                prop_assert!((f64::from(wide.weights[index]) - exact).abs() <= 2e-5 * exact + 1e-37);
            }
            let total: f64 = wide.weights.iter().map(|w| f64::from(*w)).sum();
            prop_assert!((wide.block_sums.iter().sum::<f64>() - total).abs() <= 1e-12 * total);
            let reaching_exponents = reaching(&|x| x >= -bound.abs(), &wide.exponents);
            let Head { count, weight, lowest } = head(&wide, -bound.abs());
            let sum: f64 = reaching_exponents.iter().map(|i| f64::from(wide.weights[*i as usize])).sum();
            prop_assert!(count == reaching_exponents.len() && (weight - sum).abs() <= 1e-12 * sum);
            prop_assert_eq!(lowest, reaching_exponents.iter().map(|i| wide.exponents[*i as usize]).fold(0.0, f32::min));
            let mut found = Vec::new();
            in_bin(&wide.exponents, 3.0, bin, &mut found);
            prop_assert_eq!(found, reaching(&|x| bin_of(x, 3.0) == bin, &wide.exponents));
        }
    }
}
