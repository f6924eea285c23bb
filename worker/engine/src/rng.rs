//! The counter-based random number behind sampling: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy
//! as 1, 2, 3", 2011) keyed by a request's seed and counted by the absolute position of the token being sampled.
//!
//! There is no state, so a replayed, preempted or migrated request draws the same numbers (promise P1).

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;

/// One Philox4x32-10 block.
pub fn philox4x32(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let (mut c, mut k) = (counter, key);
    for round in 0..ROUNDS {
        if round > 0 {
            k = [k[0].wrapping_add(WEYL[0]), k[1].wrapping_add(WEYL[1])];
        }
        let p0 = u64::from(MULTIPLIERS[0]) * u64::from(c[0]);
        let p1 = u64::from(MULTIPLIERS[1]) * u64::from(c[2]);
        c = [
            (p1 >> 32) as u32 ^ c[1] ^ k[0],
            p1 as u32,
            (p0 >> 32) as u32 ^ c[3] ^ k[1],
            p0 as u32,
        ];
    }
    c
}

/// A number in `[0, 1)` with 53 random bits, a pure function of its arguments.
pub fn uniform(seed: u64, position: u64) -> f64 {
    let block = philox4x32(
        [position as u32, (position >> 32) as u32, 0, 0],
        [seed as u32, (seed >> 32) as u32],
    );
    let bits = u64::from(block[0]) << 32 | u64::from(block[1]);
    (bits >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers published with the Random123 library.
    #[test]
    fn known_answers() {
        assert_eq!(
            philox4x32([0; 4], [0; 2]),
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]
        );
        assert_eq!(
            philox4x32([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox4x32(
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0]
            ),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn uniform_is_uniform_over_positions_and_over_seeds() {
        for by_seed in [false, true] {
            let mut buckets = [0u32; 16];
            for i in 0..32_000u64 {
                let u = if by_seed { uniform(i, 5) } else { uniform(5, i) };
                assert!((0.0..1.0).contains(&u));
                buckets[(u * 16.0) as usize] += 1;
            }
            // Mean 2000, standard deviation 43: five of them.
            assert!(buckets.iter().all(|&n| n.abs_diff(2000) < 220), "{buckets:?}");
        }
    }
}
