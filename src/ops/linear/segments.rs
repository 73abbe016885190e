//! Segments of rows: which rows go through which base weight and which adapter.

use crate::{device::has_grouped_gemm, ops::cpu::values};
use std::{cell::OnceCell, ops::Range, rc::Rc};
use tch::{Device, Tensor};

/// Rows `offsets[i]..offsets[i + 1]` are segment i. Every row is in one. Segments are sorted by base weight; each base
/// has the same sequence of adapters, the pattern: segment i has base i / P and adapter `pattern[i % P]`.
#[derive(Debug)]
pub struct RowSegments {
    /// `[segments + 1]`; computed on demand where a device made them.
    offsets: OnceCell<Vec<i64>>,
    pattern: Pattern,
    on_device: Option<OnDevice>,
    /// Keys of the rows: `[rows]`.
    keys: Option<Rc<[u64]>>,
}

/// Rows that go through one base weight and one adapter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Index of the base weight: an expert, 0 in dense layers.
    pub base: usize,
    /// Index into the pass's adapters.
    pub adapter: Option<usize>,
    pub rows: Range<i64>,
}

/// Segments as tensors of a device.
#[derive(Debug)]
pub(super) struct OnDevice {
    /// End of each segment: `[segments]` i32.
    pub ends: Tensor,
    /// End of each base's rows: `[bases]` i32.
    pub base_ends: Tensor,
    /// True for a segment without rows: `[segments, 1, 1]` bool.
    pub is_empty: Tensor,
    /// True if the device computes all segments in one grouped GEMM.
    at_once: bool,
}

impl OnDevice {
    fn share(&self) -> Self {
        let [ends, base_ends, is_empty] =
            [&self.ends, &self.base_ends, &self.is_empty].map(Tensor::shallow_clone);
        Self { ends, base_ends, is_empty, at_once: self.at_once }
    }
}

/// Lengths `[segments]` of segments that end at `ends` `[segments]`.
pub fn sizes(ends: &Tensor) -> Tensor {
    ends.diff(1, 0, Some(ends.narrow(0, 0, 1).zeros_like()), None)
}

/// The adapters of a base's segments, in order: indices into the pass's adapters, `None` for rows without one.
pub type Pattern = Rc<[Option<usize>]>;

/// The pattern of a pass in which all rows have the first adapter.
pub fn one_adapter() -> Pattern {
    Rc::new([Some(0)])
}

impl RowSegments {
    /// `rows` rows of the first adapter on one base.
    pub fn one(rows: i64) -> Self {
        Self::new(vec![0, rows], one_adapter())
    }

    /// Segments of host tensors. `offsets` `[segments + 1]` has a whole number of patterns.
    pub fn new(offsets: Vec<i64>, pattern: Pattern) -> Self {
        debug_assert!((offsets.len() - 1).is_multiple_of(pattern.len()));
        Self { offsets: offsets.into(), pattern, on_device: None, keys: None }
    }

    /// Segments of tensors on `device`, which gets a copy of the offsets.
    pub fn of_device(offsets: &[i64], pattern: Pattern, device: Device) -> Self {
        if device == Device::Cpu {
            return Self::new(offsets.to_vec(), pattern);
        }
        let ends: Vec<i32> = offsets[1..].iter().map(|&end| end as i32).collect();
        let ends = Tensor::from_slice(&ends).to_device(device);
        Self { offsets: offsets.to_vec().into(), ..Self::on_device(&ends, &sizes(&ends), pattern) }
    }

    /// Segments that a device has computed: their ends and [`sizes`], `[segments]` i32. The host copies them on demand.
    pub fn on_device(ends: &Tensor, sizes: &Tensor, pattern: Pattern) -> Self {
        let at_once = ends.device() != Device::Cpu && has_grouped_gemm();
        let every = pattern.len() as i64;
        let base_ends = ends.slice(0, every - 1, None, every).contiguous();
        let (ends, is_empty) = (ends.shallow_clone(), sizes.eq(0).view([-1, 1, 1]));
        let on_device = OnDevice { ends, base_ends, is_empty, at_once };
        Self { offsets: OnceCell::new(), pattern, on_device: Some(on_device), keys: None }
    }

    /// Segments for the device's backend, on the CPU.
    #[cfg(test)]
    pub(super) fn at_once(offsets: &[i64], pattern: Pattern) -> Self {
        let ends = Tensor::from_slice(&offsets[1..]).to_kind(tch::Kind::Int);
        let mut segments = Self::on_device(&ends, &sizes(&ends), pattern);
        segments.on_device.iter_mut().for_each(|segments| segments.at_once = true);
        segments
    }

    /// A second owner of the same segments.
    pub fn share(&self) -> Self {
        let (offsets, pattern) = (self.offsets.clone(), self.pattern.clone());
        let (on_device, keys) = (self.on_device.as_ref().map(OnDevice::share), self.keys.clone());
        Self { offsets, pattern, on_device, keys }
    }

    /// The segments with keys of their rows `[rows]`, by which adapters with dropout make their masks. Without keys
    /// there is no dropout.
    pub fn with_keys(self, keys: Rc<[u64]>) -> Self {
        Self { keys: Some(keys), ..self }
    }

    pub(super) fn keys(&self) -> Option<&Rc<[u64]>> {
        self.keys.as_ref()
    }

    /// `[segments + 1]`. Waits for a device that made them.
    pub fn offsets(&self) -> &[i64] {
        self.offsets.get_or_init(|| {
            let ends = self
                .on_device
                .iter()
                .flat_map(|segments| values::<i64>(&segments.ends.to_device(Device::Cpu)));
            std::iter::once(0).chain(ends).collect()
        })
    }

    /// The adapters of each base's segments, in order.
    pub fn pattern(&self) -> &Pattern {
        &self.pattern
    }

    /// Number of bases, with rows or without.
    fn bases(&self) -> usize {
        (self.offsets().len() - 1) / self.pattern.len()
    }

    /// The segments that have rows.
    pub fn iter(&self) -> impl Iterator<Item = Segment> {
        (0..self.bases()).flat_map(|base| self.of_base(base))
    }

    /// The segments of `base` that have rows.
    pub fn of_base(&self, base: usize) -> impl Iterator<Item = Segment> {
        let offsets = &self.offsets()[base * self.pattern.len()..];
        let all = self.pattern.iter().zip(offsets.windows(2));
        all.filter(|(_, pair)| pair[0] < pair[1]).map(move |(&adapter, pair)| Segment {
            base,
            adapter,
            rows: pair[0]..pair[1],
        })
    }

    /// Each base that has rows, with them.
    pub fn base_runs(&self) -> impl Iterator<Item = (usize, Range<i64>)> {
        let (offsets, every) = (self.offsets(), self.pattern.len());
        let bases =
            (0..self.bases()).map(move |base| (base, offsets[base * every]..offsets[(base + 1) * every]));
        bases.filter(|(_, rows)| !rows.is_empty())
    }

    /// Runs of neighbouring rows with the same adapter, over the borders of bases.
    pub fn adapter_runs(&self) -> impl Iterator<Item = (Option<usize>, Range<i64>)> {
        let mut segments = self.iter().peekable();
        std::iter::from_fn(move || {
            let Segment { adapter, mut rows, .. } = segments.next()?;
            while let Some(next) = segments.next_if(|next| next.adapter == adapter) {
                rows.end = next.rows.end;
            }
            Some((adapter, rows))
        })
    }

    /// The device's view, where it computes all segments in one grouped GEMM.
    pub(super) fn computed_at_once(&self) -> Option<&OnDevice> {
        self.on_device.as_ref().filter(|segments| segments.at_once)
    }
}
