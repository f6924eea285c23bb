//! Weights on their way to the device: from the mapped file row by row, converted or quantised on the way if they must be,
//! in pieces of some megabytes. What the device holds is `[columns][k]`, in the formats of `kernels/linear.cu`.
//!
//! Float matrices become the element type of the activations: for a model stored in one float type that is the one it is
//! stored in. Quantised ones become the integers and scales that the CPU would use, to the bit.

use crate::args::ElementType;
use crate::driver::{Address, DeviceError, Driver};
use baton_kernels::packed::{self, GROUP};
use baton_kernels::{Pool, StoredType, WeightFormat};
use baton_model::{StackedPart, Tensor};
use half::{bf16, f16};
use std::sync::{Mutex, PoisonError};

/// Bytes of f32 values that are converted at a time.
const PIECE_BYTES: usize = 16 << 20;

/// How a matrix is multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Floats, of the activations' type.
    Dense,
    /// Integers with scales.
    Quantized(WeightFormat),
}

impl Format {
    /// What a matrix of that CPU format is on the device. Models with f32 activations have no quantised kernels: their
    /// weights are decoded.
    pub fn of(format: WeightFormat, element: ElementType) -> Self {
        match format {
            WeightFormat::F32 | WeightFormat::F16 | WeightFormat::Bf16 => Format::Dense,
            _ if element == ElementType::F32 => Format::Dense,
            quantized => Format::Quantized(quantized),
        }
    }

    /// Bytes of a column, scales aside.
    pub(crate) fn row_bytes(self, k: usize, element: ElementType) -> usize {
        match self {
            Format::Dense => k * element.bytes(),
            Format::Quantized(WeightFormat::Int8 | WeightFormat::Group8) => k,
            Format::Quantized(_) => k / 2,
        }
    }
}

/// A matrix on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMatrix {
    /// How it is multiplied.
    pub format: Format,
    /// Output columns.
    pub columns: usize,
    /// Elements of a column.
    pub k: usize,
    pub(crate) weights: Address,
    /// Or 0.
    pub(crate) scales: Address,
    /// Or 0.
    pub(crate) minima: Address,
    /// Or 0.
    pub(crate) bias: Address,
}

/// A row of weights as it goes to the device: integers or floats, then scales, then minima.
#[derive(Default)]
pub(crate) struct Encoded {
    weights: Vec<u8>,
    scales: Vec<u8>,
    minima: Vec<u8>,
}

/// Allocates a matrix of stacked parts and fills it.
///
/// # Errors
/// The driver's.
pub fn upload<D: Driver>(
    driver: &mut D,
    pool: &Pool,
    parts: &[StackedPart],
    format: Format,
    element: ElementType,
) -> Result<DeviceMatrix, DeviceError> {
    let k = parts.first().map_or(0, |p| p.k.len());
    let bias: Option<Vec<f32>> = parts.iter().any(|p| p.bias.is_some()).then(|| {
        let values = |p: &StackedPart| p.bias.clone().unwrap_or_else(|| vec![0.0; p.columns.len()]);
        parts.iter().flat_map(values).collect()
    });
    let rows: Vec<(&StackedPart, usize)> = parts
        .iter()
        .flat_map(|part| part.columns.clone().map(move |row| (part, row)))
        .collect();
    let row = |n: usize| {
        let (part, row) = rows[n];
        encode(&part.weights, row, part.k.start, k, format, element)
    };
    upload_rows(driver, pool, rows.len(), k, bias.as_deref(), format, element, &row)
}

/// Allocates a matrix of `columns` rows of `k` elements, which `row` encodes, and fills it.
#[allow(clippy::too_many_arguments)]
pub(crate) fn upload_rows<D: Driver>(
    driver: &mut D,
    pool: &Pool,
    columns: usize,
    k: usize,
    bias: Option<&[f32]>,
    format: Format,
    element: ElementType,
    row: &(dyn Fn(usize) -> Encoded + Sync),
) -> Result<DeviceMatrix, DeviceError> {
    let row_bytes = format.row_bytes(k, element);
    let (scale_bytes, minimum_bytes) = match format {
        Format::Dense => (0, 0),
        Format::Quantized(WeightFormat::Int8) => (4, 0),
        Format::Quantized(WeightFormat::Group4Min) => (k.div_ceil(GROUP) * 2, k.div_ceil(GROUP) * 2),
        Format::Quantized(_) => (k.div_ceil(GROUP) * 2, 0),
    };
    let mut place = |bytes: usize| match bytes {
        0 => Ok(0),
        _ => driver.allocate(bytes),
    };
    let matrix = DeviceMatrix {
        format,
        columns,
        k,
        weights: place(columns * row_bytes)?,
        scales: place(columns * scale_bytes)?,
        minima: place(columns * minimum_bytes)?,
        bias: place(bias.map_or(0, |b| b.len() * 4))?,
    };
    if let Some(bias) = bias {
        driver.upload(matrix.bias, &floats(bias, ElementType::F32))?;
    }
    let piece = (PIECE_BYTES / (k.max(1) * 4)).max(1);
    for first in (0..columns).step_by(piece) {
        let count = piece.min(columns - first);
        let encoded: Vec<Mutex<Encoded>> = (0..count).map(|_| Mutex::default()).collect();
        pool.run(count, &|_, index| {
            *encoded[index].lock().unwrap_or_else(PoisonError::into_inner) = row(first + index);
        });
        let mut all = Encoded::default();
        for row in encoded {
            let row = row.into_inner().unwrap_or_else(PoisonError::into_inner);
            all.weights.extend(row.weights);
            all.scales.extend(row.scales);
            all.minima.extend(row.minima);
        }
        for (base, bytes, size) in [
            (matrix.weights, &all.weights, row_bytes),
            (matrix.scales, &all.scales, scale_bytes),
            (matrix.minima, &all.minima, minimum_bytes),
        ] {
            if !bytes.is_empty() {
                driver.upload(base + (first * size) as u64, bytes)?;
            }
        }
    }
    Ok(matrix)
}

/// Elements of a tensor's row from `start` on, also where that cuts a quantised block.
fn read(tensor: &Tensor, row: usize, start: usize, k: usize) -> Vec<f32> {
    let cut = start % tensor.kind().block_elements();
    let mut values = vec![0.0; cut + k];
    tensor.read_row(row, start - cut, &mut values);
    values.drain(..cut);
    values
}

fn encode(tensor: &Tensor, row: usize, start: usize, k: usize, format: Format, element: ElementType) -> Encoded {
    let stored = match tensor.kind() {
        StoredType::F32 => Some(ElementType::F32),
        StoredType::F16 => Some(ElementType::F16),
        StoredType::Bf16 => Some(ElementType::Bf16),
        _ => None,
    };
    if format == Format::Dense && stored == Some(element) {
        let bytes = element.bytes();
        return Encoded {
            weights: tensor.row_bytes(row)[start * bytes..(start + k) * bytes].to_vec(),
            ..Encoded::default()
        };
    }
    encode_values(&read(tensor, row, start, k), format, element)
}

/// A row of values in a format.
pub(crate) fn encode_values(values: &[f32], format: Format, element: ElementType) -> Encoded {
    let mut out = Encoded::default();
    match format {
        Format::Dense => out.weights = floats(values, element),
        Format::Quantized(WeightFormat::Int8) => {
            let scale = values.iter().fold(0f32, |a, v| a.max(v.abs())) / 127.0;
            let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
            let integer = |v: &f32| (v * inverse).round_ties_even().clamp(-127.0, 127.0) as i8 as u8;
            out.weights = values.iter().map(integer).collect();
            out.scales = scale.to_le_bytes().to_vec();
        }
        Format::Quantized(format) => {
            for group in values.chunks(GROUP) {
                let mut padded = [0.0; GROUP];
                padded[..group.len()].copy_from_slice(group);
                let q = packed::quantize(format, &padded);
                out.scales.extend(q.scale.to_le_bytes());
                let integers = &q.integers[..group.len()];
                match format {
                    WeightFormat::Group8 => out.weights.extend(integers.iter().map(|i| i.wrapping_sub(128))),
                    _ => out
                        .weights
                        .extend(integers.chunks(2).map(|pair| pair[0] | pair[1] << 4)),
                }
                if format == WeightFormat::Group4Min {
                    out.minima.extend(q.minimum.to_le_bytes());
                }
            }
        }
    }
    out
}

/// Values as the device's elements.
pub(crate) fn floats(values: &[f32], element: ElementType) -> Vec<u8> {
    match element {
        ElementType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        ElementType::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
        ElementType::Bf16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
    }
}
