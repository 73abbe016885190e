//! Reads the rotary embedding, in the spellings of transformers v4 (`rope_theta`, `rope_scaling`) and v5
//! (`rope_parameters`), with the precedence of v5: `rope_scaling` replaces `rope_parameters`; θ inside comes before θ
//! beside; `original_max_position_embeddings` beside comes before that inside. Where the loser says something else than
//! the winner, both are named and refused.

use super::{ConfigError, Fields, is_same};
use crate::model::rope::{LongRope, RopeScaling, RopeSpec, Yarn};
use serde_json::{Map, Value};
use std::sync::Arc;

const ORIGINAL: &str = "original_max_position_embeddings";

/// Keys of each rope type besides the [`COMMON`] ones.
const KINDS: &[(&str, &[&str])] = &[
    ("default", &[]),
    ("linear", &["factor"]),
    ("dynamic", &["factor"]),
    ("llama3", &["factor", "low_freq_factor", "high_freq_factor", ORIGINAL]),
    (
        "yarn",
        &[
            "factor",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
            ORIGINAL,
        ],
    ),
    ("longrope", &["factor", "attention_factor", "short_factor", "long_factor", ORIGINAL]),
];

/// Keys of every rope type.
const COMMON: &[&str] = &["rope_type", "type", "rope_theta", "partial_rotary_factor"];

/// The object that describes the rotary embedding, or none.
struct Table<'a> {
    fields: &'a Fields,
    name: &'static str,
    map: Option<&'a Map<String, Value>>,
}

impl Fields {
    /// The rotary embedding of heads of `dim` columns.
    pub fn rope(&self, dim: usize) -> Result<RopeSpec, ConfigError> {
        let (scaling, parameters) = (self.table("rope_scaling")?, self.table("rope_parameters")?);
        let (table, replaced) =
            if scaling.map.is_some() { (scaling, parameters.map) } else { (parameters, None) };
        let kind = table.kind()?;
        table.check_keys(kind)?;
        table.agrees_with_fields_beside()?;
        let theta = table.theta()?;
        if let Some(replaced) = replaced {
            table.agrees_with_replaced(replaced, theta)?;
        }
        Ok(RopeSpec { theta, scaling: table.scaling(kind, dim)?, dim })
    }

    /// The object `name`; an empty one is as good as none.
    fn table(&self, name: &'static str) -> Result<Table<'_>, ConfigError> {
        let map = match self.get(name) {
            None => None,
            Some(value) => Some(value.as_object().ok_or_else(|| self.fault(name, "an object", value))?),
        };
        Ok(Table { fields: self, name, map: map.filter(|map| !map.is_empty()) })
    }
}

impl<'a> Table<'a> {
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.map?.get(key).filter(|value| !value.is_null())
    }

    fn path_of(&self, key: &str) -> String {
        format!("{}.{key}", self.name)
    }

    fn fault(&self, key: &str, expected: impl Into<String>, found: &Value) -> ConfigError {
        self.fields.fault(&self.path_of(key), expected, found)
    }

    fn disagree(&self, (a, a_value): (&str, &Value), (b, b_value): (&str, &Value)) -> ConfigError {
        ConfigError::disagree(self.fields.path(), (a, a_value), (b, b_value))
    }

    /// The rope type; `type` is its old name.
    fn kind(&self) -> Result<&'static str, ConfigError> {
        let (new, old) = (self.get("rope_type"), self.get("type"));
        if let (Some(new), Some(old)) = (new, old)
            && new != old
        {
            return Err(self.disagree((&self.path_of("rope_type"), new), (&self.path_of("type"), old)));
        }
        let Some(named) = new.or(old) else { return Ok("default") };
        let kinds = || KINDS.iter().map(|(kind, _)| *kind);
        let kind = kinds().find(|kind| named.as_str() == Some(kind));
        let built = || kinds().collect::<Vec<_>>().join(", ");
        kind.ok_or_else(|| self.fault("rope_type", format!("one of {}", built()), named))
    }

    /// Refuses keys that the rope type `kind` does not have.
    fn check_keys(&self, kind: &str) -> Result<(), ConfigError> {
        let own = KINDS.iter().find(|(name, _)| *name == kind).map_or(&[][..], |(_, keys)| keys);
        let unknown = self.map.into_iter().flat_map(Map::keys);
        let unknown: Vec<String> = unknown
            .filter(|key| !own.contains(&key.as_str()) && !COMMON.contains(&key.as_str()))
            .map(|key| self.path_of(key))
            .collect();
        let names = unknown.iter().map(String::as_str).collect();
        ConfigError::unknown(self.fields.path(), &format!("rope type {kind}"), names)?;
        match self.get("partial_rotary_factor") {
            Some(partial) if partial.as_f64() != Some(1.0) => {
                Err(self.fault("partial_rotary_factor", "1.0 (anything else is not built)", partial))
            }
            _ => Ok(()),
        }
    }

    /// Refuses settings that stand in the table and, with another value, beside it.
    fn agrees_with_fields_beside(&self) -> Result<(), ConfigError> {
        for key in ["rope_theta", ORIGINAL] {
            let (Some(inside), Some(beside)) = (self.get(key), self.fields.get(key)) else { continue };
            if !is_same(inside, beside) {
                return Err(self.disagree((&self.path_of(key), inside), (key, beside)));
            }
        }
        Ok(())
    }

    /// Refuses settings of the `replaced` rope_parameters that the table, with `theta`, does not repeat. A default type
    /// says nothing that could get lost.
    fn agrees_with_replaced(&self, replaced: &Map<String, Value>, theta: f64) -> Result<(), ConfigError> {
        for (key, value) in replaced {
            let is_type = ["rope_type", "type"].contains(&key.as_str());
            if value.is_null() || is_type && value == "default" {
                continue;
            }
            let found = match key.as_str() {
                "rope_theta" => Value::from(theta),
                "rope_type" | "type" => Value::from(self.kind()?),
                _ => self.get(key).cloned().unwrap_or(Value::Null),
            };
            if !is_same(&found, value) {
                let replaced = format!("rope_parameters.{key}");
                return Err(self.disagree((&self.path_of(key), &found), (&replaced, value)));
            }
        }
        tracing::warn!(
            "{}: rope_scaling is used, and rope_parameters beside it is not, as in transformers",
            self.fields.path().display()
        );
        Ok(())
    }

    fn theta(&self) -> Result<f64, ConfigError> {
        let inside = self.optional("rope_theta")?;
        let beside = self.fields.optional_positive("rope_theta")?;
        Ok(inside.or(beside).unwrap_or(self.fields.family().rope_theta))
    }

    /// A positive number, or `None` when absent or null.
    fn optional(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_f64().filter(|&x| x > 0.0 && x.is_finite());
        number.map(Some).ok_or_else(|| self.fault(key, "a positive number", value))
    }

    fn number(&self, key: &str) -> Result<f64, ConfigError> {
        self.optional(key)?.ok_or_else(|| self.fields.missing(&self.path_of(key)))
    }

    /// The context of pre-training: that beside the table, that inside, or the whole context.
    fn original(&self) -> Result<usize, ConfigError> {
        if let Some(beside) = self.fields.optional_size(ORIGINAL)? {
            return Ok(beside);
        }
        match self.get(ORIGINAL) {
            None => self.fields.size("max_position_embeddings"),
            Some(value) => {
                let size = value.as_u64().filter(|&n| n > 0).map(|n| n as usize);
                size.ok_or_else(|| self.fault(ORIGINAL, "a positive integer", value))
            }
        }
    }

    /// The factor, or the ratio of the two contexts.
    fn factor_or_ratio(&self, original: usize) -> Result<f64, ConfigError> {
        let whole = self.fields.size("max_position_embeddings")?;
        Ok(self.optional("factor")?.unwrap_or(whole as f64 / original as f64))
    }

    fn scaling(&self, kind: &str, dim: usize) -> Result<RopeScaling, ConfigError> {
        match kind {
            "linear" => Ok(RopeScaling::Linear { factor: self.number("factor")? }),
            "dynamic" => self.dynamic(dim),
            "llama3" => self.llama3(),
            "yarn" => self.yarn(),
            "longrope" => self.long_rope(dim),
            _ => Ok(RopeScaling::None),
        }
    }

    fn dynamic(&self, dim: usize) -> Result<RopeScaling, ConfigError> {
        if dim <= 2 {
            return Err(self.fault("rope_type", "another type with heads of 2 columns", &"dynamic".into()));
        }
        let max_position_embeddings = self.fields.size("max_position_embeddings")?;
        Ok(RopeScaling::Dynamic { factor: self.number("factor")?, max_position_embeddings })
    }

    fn llama3(&self) -> Result<RopeScaling, ConfigError> {
        let (low_freq_factor, high_freq_factor) =
            (self.number("low_freq_factor")?, self.number("high_freq_factor")?);
        if high_freq_factor <= low_freq_factor {
            let expected = format!("more than low_freq_factor {low_freq_factor}");
            return Err(self.fault("high_freq_factor", expected, &high_freq_factor.into()));
        }
        Ok(RopeScaling::Llama3 {
            factor: self.number("factor")?,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings: self.original()? as f64,
        })
    }

    fn yarn(&self) -> Result<RopeScaling, ConfigError> {
        // transformers takes the ratio for a factor of null, and refuses one that is absent.
        if !self.map.is_some_and(|map| map.contains_key("factor")) {
            return Err(self.fields.missing(&self.path_of("factor")));
        }
        let original = self.original()?;
        let factor = self.factor_or_ratio(original)?;
        let scales = self.scale("mscale")?.zip(self.scale("mscale_all_dim")?);
        let attention_factor = self.optional("attention_factor")?;
        let truncate = match self.get("truncate") {
            None => true,
            Some(value) => value.as_bool().ok_or_else(|| self.fault("truncate", "true or false", value))?,
        };
        Ok(RopeScaling::Yarn(Yarn {
            factor,
            attention_factor: attention_factor.unwrap_or_else(|| Yarn::attention_factor_of(factor, scales)),
            beta_fast: self.scale("beta_fast")?.unwrap_or(32.0),
            beta_slow: self.scale("beta_slow")?.unwrap_or(1.0),
            truncate,
            original_max_position_embeddings: original as f64,
        }))
    }

    /// A positive number; transformers takes 0 as absent.
    fn scale(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        if self.get(key).and_then(Value::as_f64) == Some(0.0) { Ok(None) } else { self.optional(key) }
    }

    fn long_rope(&self, dim: usize) -> Result<RopeScaling, ConfigError> {
        let original = self.original()?;
        let factor = self.factor_or_ratio(original)?;
        let attention_factor = self.optional("attention_factor")?;
        Ok(RopeScaling::LongRope(LongRope {
            short_factor: self.factors("short_factor", dim / 2)?,
            long_factor: self.factors("long_factor", dim / 2)?,
            attention_factor: attention_factor
                .unwrap_or_else(|| LongRope::attention_factor_of(factor, original)),
            original_max_position_embeddings: original,
        }))
    }

    /// A list of `count` positive numbers.
    fn factors(&self, key: &str, count: usize) -> Result<Arc<[f64]>, ConfigError> {
        let value = self.get(key).ok_or_else(|| self.fields.missing(&self.path_of(key)))?;
        let positive = |value: &Value| value.as_f64().filter(|&x| x > 0.0 && x.is_finite());
        let numbers: Option<Arc<[f64]>> =
            value.as_array().and_then(|values| values.iter().map(positive).collect());
        let numbers = numbers.filter(|numbers| numbers.len() == count);
        numbers.ok_or_else(|| self.fault(key, format!("a list of {count} positive numbers"), value))
    }
}
