//! Rotary embeddings of a model: frequencies and attention scaling of each rope type, as transformers computes them.
//!
//! Two types depend on the length of the document: dynamic NTK on every length beyond the model's, longrope on the
//! side of the original length. A document gets what transformers gives it alone, whatever else is in its batch.

use std::{f64::consts::TAU, sync::Arc};

/// Rotary embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeSpec {
    pub theta: f64,
    pub scaling: RopeScaling,
    /// Columns of a head that are rotated, an even number.
    pub dim: usize,
}

/// Scaling of rotary frequencies for longer contexts.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    None,
    /// All frequencies divided by `factor`.
    Linear {
        factor: f64,
    },
    /// Dynamic NTK: θ grows with a document that is longer than `max_position_embeddings`.
    Dynamic {
        factor: f64,
        max_position_embeddings: usize,
    },
    /// Llama 3.1: low frequencies divided by `factor`, a smooth ramp between the two wavelengths.
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_position_embeddings: f64,
    },
    Yarn(Yarn),
    LongRope(LongRope),
}

/// YaRN (Peng et al., 2023): frequencies that turn rarely are divided by `factor`, a linear ramp between.
#[derive(Clone, Debug, PartialEq)]
pub struct Yarn {
    pub factor: f64,
    /// Factor of cos and sin.
    pub attention_factor: f64,
    /// Turns over the original length at which the ramp begins.
    pub beta_fast: f64,
    /// Turns over the original length at which the ramp ends.
    pub beta_slow: f64,
    /// Rounds the ends of the ramp to whole pairs.
    pub truncate: bool,
    pub original_max_position_embeddings: f64,
}

/// LongRoPE (Ding et al., 2024): a divisor for each pair, other ones beyond the original length.
#[derive(Clone, Debug, PartialEq)]
pub struct LongRope {
    /// `[dim / 2]`
    pub short_factor: Arc<[f64]>,
    /// `[dim / 2]`
    pub long_factor: Arc<[f64]>,
    /// Factor of cos and sin.
    pub attention_factor: f64,
    pub original_max_position_embeddings: usize,
}

impl RopeSpec {
    /// Length at which a document of `length` tokens has its frequencies: 0 where they do not depend on it. Documents
    /// of equal lengths in this sense share a table.
    pub fn scaled_length(&self, length: usize) -> usize {
        match &self.scaling {
            RopeScaling::Dynamic { max_position_embeddings, .. } => length.max(*max_position_embeddings),
            RopeScaling::LongRope(rope) if length > rope.original_max_position_embeddings => {
                rope.original_max_position_embeddings + 1
            }
            _ => 0,
        }
    }

    /// Radians per position of each pair in a document of `length` tokens: `[dim / 2]`.
    pub fn inv_freq(&self, length: usize) -> Vec<f32> {
        let theta = self.theta;
        let frequencies = match &self.scaling {
            RopeScaling::None => self.frequencies(theta),
            RopeScaling::Linear { factor } => self.each(|_, frequency| frequency / factor),
            RopeScaling::Dynamic { factor, max_position_embeddings } => {
                let stretch = self.scaled_length(length) as f64 / *max_position_embeddings as f64;
                let dim = self.dim as f64;
                self.frequencies(theta * (factor * stretch - (factor - 1.0)).powf(dim / (dim - 2.0)))
            }
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => self.each(|_, frequency| {
                let turns = original_max_position_embeddings * frequency / TAU;
                let smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                mixed(frequency / factor, frequency, smooth.clamp(0.0, 1.0))
            }),
            RopeScaling::Yarn(yarn) => {
                let ramp = yarn.ramp(theta, self.dim);
                self.each(|pair, frequency| mixed(frequency, frequency / yarn.factor, ramp(pair)))
            }
            RopeScaling::LongRope(rope) => {
                let is_long = length > rope.original_max_position_embeddings;
                let factors = if is_long { &rope.long_factor } else { &rope.short_factor };
                self.each(|pair, frequency| frequency / factors[pair])
            }
        };
        frequencies.into_iter().map(|frequency| frequency as f32).collect()
    }

    /// Factor of cos and sin.
    pub fn attention_factor(&self) -> f64 {
        match &self.scaling {
            RopeScaling::Yarn(yarn) => yarn.attention_factor,
            RopeScaling::LongRope(rope) => rope.attention_factor,
            _ => 1.0,
        }
    }

    /// θ^(−2i/dim) of each pair i.
    fn frequencies(&self, theta: f64) -> Vec<f64> {
        (0..self.dim / 2).map(|pair| theta.powf(-2.0 * pair as f64 / self.dim as f64)).collect()
    }

    fn each(&self, scaled: impl Fn(usize, f64) -> f64) -> Vec<f64> {
        let plain = self.frequencies(self.theta).into_iter().enumerate();
        plain.map(|(pair, frequency)| scaled(pair, frequency)).collect()
    }
}

/// `from` at 0, `to` at 1.
fn mixed(from: f64, to: f64, at: f64) -> f64 {
    from * (1.0 - at) + to * at
}

impl Yarn {
    /// Attention factor for a context `factor` times as long. With both of `mscale` and `mscale_all_dim`, the ratio of
    /// theirs.
    pub fn attention_factor_of(factor: f64, scales: Option<(f64, f64)>) -> f64 {
        let of = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 };
        scales.map_or_else(|| of(1.0), |(mscale, all_dim)| of(mscale) / of(all_dim))
    }

    /// Share of the divided frequency of each pair.
    fn ramp(&self, theta: f64, dim: usize) -> impl Fn(usize) -> f64 + use<> {
        let dim = dim as f64;
        // The pair that makes this many turns over the original length.
        let pair_of = |turns: f64| {
            dim * (self.original_max_position_embeddings / (turns * TAU)).ln() / (2.0 * theta.ln())
        };
        let (mut low, mut high) = (pair_of(self.beta_fast), pair_of(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, high) = (low.max(0.0), high.min(dim - 1.0));
        let width = if low == high { 0.001 } else { high - low };
        move |pair| ((pair as f64 - low) / width).clamp(0.0, 1.0)
    }
}

impl LongRope {
    /// Attention factor for a context `factor` times the original length.
    pub fn attention_factor_of(factor: f64, original_max_position_embeddings: usize) -> f64 {
        let original = original_max_position_embeddings as f64;
        if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / original.ln()).sqrt() }
    }
}
