//! Integers of up to 128 bits as bytes: sums of nano-units outgrow 64. Seven bits a byte, least first, the eighth says
//! that more follow; signed ones zigzag, so that small numbers stay short.

use crate::tables::TablesError;

pub(crate) fn put_unsigned(out: &mut Vec<u8>, mut value: u128) {
    while value >= 0x80 {
        out.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

pub(crate) fn put_signed(out: &mut Vec<u8>, value: i128) {
    put_unsigned(out, ((value << 1) ^ (value >> 127)).cast_unsigned());
}

/// Takes numbers off the front of `bytes`.
pub(crate) fn take_unsigned(bytes: &mut &[u8]) -> Result<u128, TablesError> {
    // Nearly all are below 2^63; arithmetic on 64 bits is several times as fast.
    let mut short = 0u64;
    for (at, byte) in bytes.iter().take(9).enumerate() {
        short |= u64::from(byte & 0x7f) << (7 * at);
        if byte & 0x80 == 0 {
            *bytes = &bytes[at + 1..];
            return Ok(short.into());
        }
    }
    take_long(bytes)
}

fn take_long(bytes: &mut &[u8]) -> Result<u128, TablesError> {
    let mut value = 0u128;
    for shift in (0..128).step_by(7) {
        let (byte, rest) = bytes.split_first().ok_or_else(damaged)?;
        *bytes = rest;
        let bits = u128::from(byte & 0x7f);
        // Bits beyond the 128th would be lost.
        if (bits << shift) >> shift != bits {
            return Err(damaged());
        }
        value |= bits << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(damaged())
}

pub(crate) fn take_signed(bytes: &mut &[u8]) -> Result<i128, TablesError> {
    let value = take_unsigned(bytes)?;
    Ok((value >> 1).cast_signed() ^ -((value & 1).cast_signed()))
}

fn damaged() -> TablesError {
    TablesError::Corrupt("a stored number cannot be read".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_written_is_read(a in any::<i128>(), b in any::<u128>(), small in -70i128..70) {
            let mut bytes = Vec::new();
            put_signed(&mut bytes, a);
            put_unsigned(&mut bytes, b);
            put_signed(&mut bytes, small);
            let mut rest = bytes.as_slice();
            prop_assert_eq!(take_signed(&mut rest).unwrap(), a);
            prop_assert_eq!(take_unsigned(&mut rest).unwrap(), b);
            prop_assert_eq!(take_signed(&mut rest).unwrap(), small);
            prop_assert!(rest.is_empty());
        }

        #[test]
        fn nothing_panics(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            let _ = take_signed(&mut bytes.as_slice());
        }
    }

    #[test]
    fn extremes() {
        for value in [i128::MIN, -1, 0, 1, i128::MAX] {
            let mut bytes = Vec::new();
            put_signed(&mut bytes, value);
            assert_eq!(take_signed(&mut bytes.as_slice()).unwrap(), value);
        }
        assert!(take_unsigned(&mut [0xff; 19].as_slice()).is_err());
    }
}
