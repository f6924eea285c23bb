//! The group-wise formats: quantisation of 32 elements to a scale, maybe a minimum, and small integers.
//!
//! Scales are rounded to f16 first and the integers chosen for the rounded scale. The symmetric formats choose them as
//! ggml does for Q8_0 and Q4_0 (largest magnitude to 127, or the signed largest to -8), so that packing a dequantised
//! GGUF tensor of the same type gives back its integers and scales exactly.

use super::{GROUP, PANEL, WeightFormat};
use half::f16;

/// One quantised group: `value = scale * (integer - bias) + minimum`; the bias is 128 of 8 bits, 8 of 4, and 0 with a
/// minimum.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct QuantizedGroup {
    /// Scale.
    pub scale: f16,
    /// Minimum; zero in the symmetric formats.
    pub minimum: f16,
    /// Biased to be unsigned.
    pub integers: [u8; GROUP],
}

/// Quantises a group, as packing does: for other devices' layouts. `format` is a group-wise one.
pub fn quantize(format: WeightFormat, values: &[f32; GROUP]) -> QuantizedGroup {
    match format {
        WeightFormat::Group8 => eight(values),
        WeightFormat::Group4 => four(values),
        _ => four_with_minimum(values),
    }
}

/// `rows` is `[PANEL][k]`, `k` a multiple of [`GROUP`].
pub(super) fn pack(format: WeightFormat, rows: &[f32], k: usize, panel: &mut [u8]) {
    let bytes = format.group_bytes();
    for (g, group) in panel.chunks_exact_mut(bytes).take(k / GROUP).enumerate() {
        for n in 0..PANEL {
            let mut values = [0f32; GROUP];
            values.copy_from_slice(&rows[n * k + g * GROUP..][..GROUP]);
            write(format, group, n, &quantize(format, &values));
        }
    }
}

fn write(format: WeightFormat, group: &mut [u8], n: usize, q: &QuantizedGroup) {
    let scales = if format == WeightFormat::Group8 {
        for (at, q) in q.integers.iter().enumerate() {
            group[(at / 4 * PANEL + n) * 4 + at % 4] = *q;
        }
        GROUP * PANEL
    } else {
        for at in 0..GROUP / 2 {
            group[(at / 4 * PANEL + n) * 4 + at % 4] = q.integers[at] | q.integers[at + GROUP / 2] << 4;
        }
        GROUP / 2 * PANEL
    };
    group[scales + n * 2..][..2].copy_from_slice(&q.scale.to_le_bytes());
    if format == WeightFormat::Group4Min {
        group[scales + PANEL * 2 + n * 2..][..2].copy_from_slice(&q.minimum.to_le_bytes());
    }
}

/// Element `k` of `column` of a packed panel.
pub(super) fn dequantized(format: WeightFormat, panel: &[u8], column: usize, k: usize) -> f32 {
    let group = &panel[k / GROUP * format.group_bytes()..][..format.group_bytes()];
    let half_at = |at: usize| f16::from_le_bytes([group[at], group[at + 1]]).to_f32();
    let at = k % GROUP;
    if format == WeightFormat::Group8 {
        let byte = group[(at / 4 * PANEL + column) * 4 + at % 4];
        return (i32::from(byte) - 128) as f32 * half_at(GROUP * PANEL + column * 2);
    }
    let byte = group[(at % 16 / 4 * PANEL + column) * 4 + at % 4];
    let nibble = i32::from(if at < 16 { byte & 15 } else { byte >> 4 });
    let scale = half_at(GROUP / 2 * PANEL + column * 2);
    match format {
        WeightFormat::Group4Min => nibble as f32 * scale + half_at(GROUP / 2 * PANEL + PANEL * 2 + column * 2),
        _ => (nibble - 8) as f32 * scale,
    }
}

fn inverse(scale: f16) -> f32 {
    let scale = scale.to_f32();
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

fn eight(values: &[f32; GROUP]) -> QuantizedGroup {
    let largest = values.iter().fold(0f32, |a, v| a.max(v.abs()));
    let scale = f16::from_f32(largest / 127.0);
    let inverse = inverse(scale);
    let integers = values.map(|v| ((v * inverse).round_ties_even().clamp(-127.0, 127.0) as i32 + 128) as u8);
    QuantizedGroup {
        scale,
        minimum: f16::ZERO,
        integers,
    }
}

fn four(values: &[f32; GROUP]) -> QuantizedGroup {
    let signed_largest = values.iter().fold(0f32, |a, v| if v.abs() > a.abs() { *v } else { a });
    let scale = f16::from_f32(signed_largest / -8.0);
    let inverse = inverse(scale);
    let integers = values.map(|v| ((v * inverse).round_ties_even().clamp(-8.0, 7.0) as i32 + 8) as u8);
    QuantizedGroup {
        scale,
        minimum: f16::ZERO,
        integers,
    }
}

fn four_with_minimum(values: &[f32; GROUP]) -> QuantizedGroup {
    let mut sorted = *values;
    sorted.sort_unstable_by(f32::total_cmp);
    let (low, high) = (sorted[0], sorted[GROUP - 1]);
    let steps = grid_steps(&sorted).unwrap_or(15.0);
    let scale = f16::from_f32((high - low) / steps);
    let minimum = f16::from_f32(low);
    let inverse = inverse(scale);
    let integers = values.map(|v| ((v - minimum.to_f32()) * inverse).round_ties_even().clamp(0.0, 15.0) as u8);
    QuantizedGroup {
        scale,
        minimum,
        integers,
    }
}

/// If the values already lie on a grid of at most 16 levels (a dequantised 4-bit group), how many steps of it lie between
/// the lowest and the highest: quantising to that grid again adds only the rounding of its scale and minimum to f16.
fn grid_steps(sorted: &[f32; GROUP]) -> Option<f32> {
    let (low, range) = (sorted[0], sorted[GROUP - 1] - sorted[0]);
    // Differences below this are rounding errors of equal levels.
    let noise = range * 1e-4;
    let gaps = sorted.windows(2).map(|w| w[1] - w[0]).filter(|gap| *gap > noise);
    let ratio = range / gaps.fold(f32::INFINITY, f32::min);
    // The smallest gap may be several steps wide.
    let candidates = (1..=15).map(|width| (ratio * width as f32).round());
    candidates
        .take_while(|steps| (1.0..=15.0).contains(steps))
        .find(|steps| {
            let on_grid = |v: &f32| {
                let level = (v - low) / range * steps;
                (level - level.round()).abs() < 0.01
            };
            sorted.iter().all(on_grid)
        })
}
