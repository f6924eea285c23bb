//! The decoders of ggml's blocks against candle's independent ones: on random bytes (every bit pattern, NaN and
//! infinite scales included) and on rows that candle quantised.

use baton_kernels::{StoredType, dequantize};
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{Device, Tensor};
use rand::{Rng, SeedableRng, rngs::StdRng};

const QUANTISED: [(StoredType, GgmlDType, f32); 10] = [
    // With the largest error that quantising values in -1..1 may make: half a step of the coarsest scale.
    (StoredType::Q4_0, GgmlDType::Q4_0, 0.14),
    (StoredType::Q4_1, GgmlDType::Q4_1, 0.08),
    (StoredType::Q5_0, GgmlDType::Q5_0, 0.07),
    (StoredType::Q5_1, GgmlDType::Q5_1, 0.04),
    (StoredType::Q8_0, GgmlDType::Q8_0, 0.005),
    (StoredType::Q2K, GgmlDType::Q2K, 0.7),
    (StoredType::Q3K, GgmlDType::Q3K, 0.4),
    (StoredType::Q4K, GgmlDType::Q4K, 0.2),
    (StoredType::Q5K, GgmlDType::Q5K, 0.1),
    (StoredType::Q6K, GgmlDType::Q6K, 0.06),
];

fn ours(kind: StoredType, bytes: &[u8]) -> Vec<f32> {
    let mut out = vec![f32::NAN; bytes.len() / kind.block_bytes() * kind.block_elements()];
    dequantize(kind, bytes, &mut out);
    out
}

fn candles(kind: GgmlDType, bytes: &[u8]) -> Vec<f32> {
    let elements = bytes.len() / kind.type_size() * kind.block_size();
    let storage = QStorage::from_data(bytes.into(), &Device::Cpu, kind).unwrap();
    let tensor = QTensor::new(storage, elements).unwrap();
    tensor.dequantize(&Device::Cpu).unwrap().to_vec1().unwrap()
}

#[test]
fn sizes_are_ggmls() {
    for (kind, candle, _) in QUANTISED {
        assert_eq!(kind.block_elements(), candle.block_size(), "{kind}");
        assert_eq!(kind.block_bytes(), candle.type_size(), "{kind}");
        assert_eq!(kind.bytes_for(3 * candle.block_size()), Some(3 * candle.type_size()));
        assert_eq!(kind.bytes_for(candle.block_size() + 1), None);
        assert_eq!(kind.bytes_for(0), Some(0));
    }
    assert_eq!(StoredType::F32.bytes_for(usize::MAX), None);
}

#[test]
fn random_bytes_decode_to_the_same_bits() {
    let mut rng = StdRng::seed_from_u64(7);
    for (kind, candle, _) in QUANTISED {
        for blocks in [1, 2, 200] {
            let bytes: Vec<u8> = (0..blocks * kind.block_bytes()).map(|_| rng.random()).collect();
            for (i, (a, b)) in ours(kind, &bytes).iter().zip(candles(candle, &bytes)).enumerate() {
                assert!(
                    a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()),
                    "{kind} element {i}: {a} and {b}"
                );
            }
        }
    }
}

#[test]
fn quantised_rows_decode_to_the_same_bits_and_near_the_original() {
    let mut rng = StdRng::seed_from_u64(8);
    let row: Vec<f32> = (0..2048).map(|_| rng.random_range(-1.0..1.0)).collect();
    let tensor = Tensor::new(&row[..], &Device::Cpu).unwrap();
    for (kind, candle, error) in QUANTISED {
        let quantised = QTensor::quantize(&tensor, candle).unwrap();
        let bytes = quantised.data().unwrap();
        let decoded = ours(kind, &bytes);
        assert_eq!(decoded, candles(candle, &bytes), "{kind}");
        let worst = decoded.iter().zip(&row).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < error, "{kind}: {worst}");
    }
}

#[test]
fn float_types_are_blocks_of_one() {
    let values = [0.5f32, -2.0, 3.25, 0.0];
    let f32s: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let bf16s: Vec<u8> = values
        .iter()
        .flat_map(|v| half::bf16::from_f32(*v).to_le_bytes())
        .collect();
    let f16s: Vec<u8> = values
        .iter()
        .flat_map(|v| half::f16::from_f32(*v).to_le_bytes())
        .collect();
    assert_eq!(ours(StoredType::F32, &f32s), values);
    assert_eq!(ours(StoredType::Bf16, &bf16s), values);
    assert_eq!(ours(StoredType::F16, &f16s), values);
    // No alignment is asked for.
    let shifted = [&[0], &f32s[..]].concat();
    assert_eq!(ours(StoredType::F32, &shifted[1..]), values);
}

#[test]
#[should_panic(expected = "are not")]
fn a_wrong_length_is_refused() {
    dequantize(StoredType::Q4K, &[0; 144], &mut [0.0; 255]);
}
