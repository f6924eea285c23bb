//! Frequencies of the rotary position embedding: plain, linear, llama3 and YaRN scaling, from either spelling of the
//! configuration (`rope_theta` + `rope_scaling`, or the newer `rope_parameters`). Rotates nothing itself.

use crate::error::ModelError;
use crate::json::Object;
use std::f64::consts::PI;
use std::sync::Arc;

/// How frequencies are stretched for contexts longer than the model was first trained on.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// None.
    Plain,
    /// All frequencies divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1: long wavelengths divided, short ones kept, a smooth transition between.
    Llama3 {
        /// The divisor of long wavelengths.
        factor: f64,
        /// Wavelengths above `original / low` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original / high` are kept.
        high_freq_factor: f64,
        /// Context length of the first training.
        original_context: f64,
    },
    /// YaRN (arXiv 2309.00071): interpolation by number of rotations, and a temperature on the attention.
    Yarn {
        /// The divisor of slow dimensions.
        factor: f64,
        /// Dimensions with more rotations than this are kept.
        beta_fast: f64,
        /// Dimensions with fewer rotations than this are divided.
        beta_slow: f64,
        /// Context length of the first training.
        original_context: f64,
        /// Factor on cosines and sines.
        attention_factor: f64,
        /// Round the borders of the transition to whole dimensions.
        truncate: bool,
    },
    /// Each frequency divided by its own factor (how GGUF files store Llama 3.1's scaling).
    Divided {
        /// One divisor for each pair of a head's elements.
        factors: Arc<[f32]>,
    },
}

/// Rotary position embedding of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Base of the geometric series of wavelengths.
    pub theta: f64,
    /// Stretching, if any.
    pub scaling: RopeScaling,
}

impl RopeConfig {
    pub(crate) fn parse(object: &Object<'_>, context_length: usize) -> Result<Self, ModelError> {
        let scaling = match object.object("rope_parameters")? {
            Some(parameters) => Some(parameters),
            None => object.object("rope_scaling")?,
        };
        let theta_of = |o: &Object<'_>| o.number("rope_theta", 1.001, 1e12);
        let theta = match scaling.as_ref().map(theta_of).transpose()?.flatten() {
            Some(theta) => theta,
            None => theta_of(object)?.unwrap_or(10_000.0),
        };
        let Some(scaling) = scaling else {
            return Ok(RopeConfig {
                theta,
                scaling: RopeScaling::Plain,
            });
        };
        let kind = match scaling.text("rope_type")? {
            Some(kind) => kind,
            None => scaling.text("type")?.unwrap_or("default"),
        };
        let factor = scaling.number("factor", 1.0, 1e6)?;
        let need_factor = || factor.ok_or_else(|| scaling.error(format!("`factor` of {kind} rope scaling is missing")));
        let context = scaling
            .number("original_max_position_embeddings", 1.0, 1e9)?
            .unwrap_or(context_length as f64);
        let scaling = match kind {
            "default" => RopeScaling::Plain,
            "linear" => RopeScaling::Linear { factor: need_factor()? },
            "llama3" => {
                let low = scaling.number("low_freq_factor", 1e-6, 1e6)?.unwrap_or(1.0);
                let high = scaling.number("high_freq_factor", 1e-6, 1e6)?.unwrap_or(4.0);
                if high <= low {
                    return Err(scaling.error("`high_freq_factor` must be greater than `low_freq_factor`"));
                }
                RopeScaling::Llama3 {
                    factor: need_factor()?,
                    low_freq_factor: low,
                    high_freq_factor: high,
                    original_context: context,
                }
            }
            "yarn" => {
                let factor = need_factor()?;
                if scaling.get("mscale").is_some() || scaling.get("mscale_all_dim").is_some() {
                    return Err(ModelError::unsupported(
                        "its YaRN rope scaling uses `mscale`; supported is YaRN with `attention_factor` or its default",
                    ));
                }
                RopeScaling::Yarn {
                    factor,
                    beta_fast: scaling.number("beta_fast", 1e-6, 1e6)?.unwrap_or(32.0),
                    beta_slow: scaling.number("beta_slow", 1e-6, 1e6)?.unwrap_or(1.0),
                    original_context: context,
                    attention_factor: scaling
                        .number("attention_factor", 1e-6, 1e6)?
                        .unwrap_or_else(|| if factor > 1.0 { 0.1 * factor.ln() + 1.0 } else { 1.0 }),
                    truncate: scaling.flag("truncate")?.unwrap_or(true),
                }
            }
            other => {
                let shown: String = other.chars().take(40).collect();
                return Err(ModelError::unsupported(format!(
                    "its rope scaling is `{shown}`; supported are default, linear, llama3 and yarn"
                )));
            }
        };
        Ok(RopeConfig { theta, scaling })
    }

    /// Angle per position of each pair of a head's elements, and the factor on cosines and sines.
    pub fn frequencies(&self, head_dim: usize) -> (Vec<f32>, f32) {
        let dim = head_dim as f64;
        let plain = |i: usize| self.theta.powf(-2.0 * i as f64 / dim);
        let mut scale = 1.0;
        let scaled = |i: usize| match self.scaling {
            RopeScaling::Plain => plain(i),
            RopeScaling::Divided { ref factors } => plain(i) / factors.get(i).copied().map_or(1.0, f64::from),
            RopeScaling::Linear { factor } => plain(i) / factor,
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_context,
            } => {
                let frequency = plain(i);
                let turns = original_context * frequency / (2.0 * PI);
                let kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                kept * frequency + (1.0 - kept) * frequency / factor
            }
            RopeScaling::Yarn {
                factor,
                beta_fast,
                beta_slow,
                original_context,
                truncate,
                ..
            } => {
                // The (fractional) dimension that turns `turns` times within the original context.
                let dimension =
                    |turns: f64| dim * (original_context / (turns * 2.0 * PI)).ln() / (2.0 * self.theta.ln());
                let (mut low, mut high) = (dimension(beta_fast), dimension(beta_slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                (low, high) = (low.max(0.0), high.min(dim - 1.0));
                if low == high {
                    high += 0.001;
                }
                let divided = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                (1.0 - divided) * plain(i) + divided * plain(i) / factor
            }
        };
        if let RopeScaling::Yarn { attention_factor, .. } = self.scaling {
            scale = attention_factor as f32;
        }
        ((0..head_dim / 2).map(|i| scaled(i) as f32).collect(), scale)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frequencies(scaling: RopeScaling) -> Vec<f32> {
        RopeConfig {
            theta: 10_000.0,
            scaling,
        }
        .frequencies(64)
        .0
    }

    #[test]
    fn linear_divides_everything() {
        let (plain, linear) = (
            frequencies(RopeScaling::Plain),
            frequencies(RopeScaling::Linear { factor: 4.0 }),
        );
        assert_eq!(plain[0], 1.0);
        assert!(plain.iter().zip(&linear).all(|(p, l)| (p / l - 4.0).abs() < 1e-5));
    }

    #[test]
    fn llama3_keeps_fast_and_divides_slow_dimensions() {
        let plain = frequencies(RopeScaling::Plain);
        let scaled = frequencies(RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 8192.0,
        });
        assert_eq!(scaled[0], plain[0]);
        assert!((plain[31] / scaled[31] - 8.0).abs() < 1e-4);
        assert!(plain.iter().zip(&scaled).all(|(p, s)| s <= p && *s >= p / 8.0 * 0.999));
    }

    #[test]
    fn yarn_interpolates_between_the_correction_dimensions() {
        let plain = frequencies(RopeScaling::Plain);
        let yarn = RopeScaling::Yarn {
            factor: 4.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            original_context: 32_768.0,
            attention_factor: 0.1 * 4f64.ln() + 1.0,
            truncate: true,
        };
        let (scaled, scale) = RopeConfig {
            theta: 10_000.0,
            scaling: yarn,
        }
        .frequencies(64);
        // 64 ln(32768 / (32 * 2 pi)) / (2 ln 10000) = 17.69, and with one rotation 29.73: from 17 to 30.
        assert_eq!(scaled[..18], plain[..18]);
        assert!((30..32).all(|i| (plain[i] / scaled[i] - 4.0).abs() < 1e-4));
        let middle = 24;
        let divided = (24.0 - 17.0) / 13.0;
        assert!((scaled[middle] / plain[middle] - (1.0 - divided + divided / 4.0)).abs() < 1e-5);
        assert!((scale - 1.138_629_4).abs() < 1e-6);
    }
}
