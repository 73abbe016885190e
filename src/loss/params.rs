//! Parameters of losses as clients and configurations give them.

use super::{LossError, Param};
use std::collections::BTreeMap;

/// Takes the parameters of a loss one by one.
pub(super) struct Params<'a> {
    loss: &'static str,
    given: &'a BTreeMap<String, Param>,
    known: Vec<&'static str>,
}

impl<'a> Params<'a> {
    pub fn new(loss: &'static str, given: &'a BTreeMap<String, Param>) -> Self {
        Self { loss, given, known: Vec::new() }
    }

    fn take(&mut self, param: &'static str) -> Option<&'a Param> {
        self.known.push(param);
        self.given.get(param)
    }

    fn wrong(&self, param: &'static str, expected: impl Into<String>, found: &Param) -> LossError {
        LossError::Param { loss: self.loss, param, expected: expected.into(), found: found.to_string() }
    }

    /// A finite number of at least `least`.
    pub fn number(&mut self, param: &'static str, default: f64, least: f64) -> Result<f64, LossError> {
        match self.take(param) {
            None => Ok(default),
            Some(&Param::Number(number)) if number.is_finite() && number >= least => Ok(number),
            Some(other) => Err(self.wrong(param, format!("a number of at least {least}"), other)),
        }
    }

    /// A finite number above 1.
    pub fn above_one(&mut self, param: &'static str) -> Result<Option<f64>, LossError> {
        match self.take(param) {
            None => Ok(None),
            Some(&Param::Number(number)) if number.is_finite() && number > 1.0 => Ok(Some(number)),
            Some(other) => Err(self.wrong(param, "a number above 1", other)),
        }
    }

    /// A finite number above 0.
    pub fn positive(&mut self, param: &'static str, default: f64) -> Result<f64, LossError> {
        match self.take(param) {
            None => Ok(default),
            Some(&Param::Number(number)) if number.is_finite() && number > 0.0 => Ok(number),
            Some(other) => Err(self.wrong(param, "a number above 0", other)),
        }
    }

    /// A number of at least 0 and below ½, by default 0.
    pub fn below_half(&mut self, param: &'static str) -> Result<f64, LossError> {
        match self.take(param) {
            None => Ok(0.0),
            Some(&Param::Number(number)) if (0.0..0.5).contains(&number) => Ok(number),
            Some(other) => Err(self.wrong(param, "a number of at least 0 and below 0.5", other)),
        }
    }

    /// Thresholds `low` and `high`, not in the wrong order.
    pub fn range(
        &mut self,
        [low, high]: [&'static str; 2],
        defaults: [f64; 2],
    ) -> Result<[f64; 2], LossError> {
        let range = [self.number(low, defaults[0], 0.0)?, self.number(high, defaults[1], 0.0)?];
        if range[0] > range[1] {
            let expected = format!("at most {high}, {}", range[1]);
            return Err(self.wrong(low, expected, &Param::Number(range[0])));
        }
        Ok(range)
    }

    pub fn flag(&mut self, param: &'static str) -> Result<bool, LossError> {
        match self.take(param) {
            None => Ok(false),
            Some(Param::Number(number)) if [0.0, 1.0].contains(number) => Ok(*number == 1.0),
            Some(other) => Err(self.wrong(param, "true or false", other)),
        }
    }

    /// One of the named `choices`, by default the first.
    pub fn choice<T: Copy>(
        &mut self,
        param: &'static str,
        first: (&str, T),
        others: &[(&str, T)],
    ) -> Result<T, LossError> {
        let Some(given) = self.take(param) else { return Ok(first.1) };
        let mut choices = std::iter::once(&first).chain(others);
        let found = match given {
            Param::Text(text) => choices.clone().find(|(name, _)| name == text),
            Param::Number(_) => None,
        };
        let Some(&(_, value)) = found else {
            let names = choices.by_ref().map(|(name, _)| *name).collect::<Vec<_>>().join(" | ");
            return Err(self.wrong(param, names, given));
        };
        Ok(value)
    }

    /// A switch of another trainer's that has one value here.
    pub fn neutral(&mut self, param: &'static str, value: f64) -> Result<(), LossError> {
        match self.take(param) {
            None => Ok(()),
            Some(Param::Number(number)) if *number == value => Ok(()),
            Some(other) => Err(self.wrong(param, format!("{value}, as others are not built"), other)),
        }
    }

    /// All parameters were taken.
    ///
    /// # Errors
    /// There is one that the loss does not have.
    pub fn end(self) -> Result<(), LossError> {
        match self.given.keys().find(|name| !self.known.contains(&name.as_str())) {
            None => Ok(()),
            Some(param) => {
                let known = match &self.known[..] {
                    [] => "it has none".to_owned(),
                    known => format!("it has {}", known.join(", ")),
                };
                Err(LossError::UnknownParam { loss: self.loss, param: param.clone(), known })
            }
        }
    }
}
