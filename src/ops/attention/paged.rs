//! Attention of new tokens over the keys and values of their sequences, which lie in pages, for generation.
//!
//! On the CPU every token gets the bits that it would get in a pass over its whole document, whatever the part that it
//! comes in. Single tokens read the pages in place, the query heads of a group together; longer parts go through the
//! kernel of whole documents on a copy. On devices libtorch computes on copies of the pages.

use super::{
    Documents, Heads, Kernel, accum_kind, continued,
    cpu::{Queries, Shape, TILE, pack_keys, pack_values, units, width},
    on_cpu,
};
use crate::{
    device::has_kernels,
    ops::{
        Buffer,
        cpu::{
            Real, Rows, pool,
            scratch::{Memory, words},
            tile::MicroKernel,
        },
    },
};
use pulp::NullaryFnOnce;
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// Neighbouring tokens of one sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Their rows.
    pub rows: Range<usize>,
    /// Position of the first of them.
    pub first: usize,
    /// The pages of the sequence, up to the last of them.
    pub pages: Vec<u32>,
}

impl Part {
    /// Tokens of the sequence, up to the last of the part.
    fn length(&self) -> usize {
        self.first + self.rows.len()
    }

    /// The place of the token at `position`.
    #[inline(always)]
    fn place(&self, position: usize, page: usize) -> usize {
        self.pages[position / page] as usize * page + position % page
    }

    /// The places of its own tokens.
    pub fn places(&self, page: usize) -> impl Iterator<Item = usize> {
        (self.first..self.length()).map(move |position| self.place(position, page))
    }
}

/// Parts of sequences, each of one token or more, for tensors on a device.
pub struct Paged {
    /// Tokens of a page.
    page: usize,
    /// Parts of one token.
    singles: Vec<Part>,
    /// Other parts, where kernels of ours compute.
    longer: Vec<Part>,
    /// The parts as libtorch computes them; empty where it does not.
    groups: Vec<Group>,
}

/// Parts with as many tokens each.
struct Group {
    /// `[parts·tokens]` i64
    rows: Tensor,
    /// `[parts·longest]` i64: the place of each position.
    places: Tensor,
    /// `[parts, tokens, longest]` i64: positions from a key to a query, negative for a key behind it.
    age: Tensor,
}

impl Group {
    fn new(parts: &[Part], page: usize, device: Device) -> Self {
        let longest = parts.iter().map(Part::length).max().unwrap_or(0);
        let rows: Vec<i64> = parts.iter().flat_map(|part| part.rows.clone()).map(|row| row as i64).collect();
        // Behind the end of a sequence its first place stands, which no query sees there.
        let place = |part: &Part, at: usize| part.place(if at < part.length() { at } else { 0 }, page) as i64;
        let places: Vec<i64> =
            parts.iter().flat_map(|part| (0..longest).map(move |at| place(part, at))).collect();
        let positions: Vec<i64> =
            parts.iter().flat_map(|part| part.first..part.length()).map(|at| at as i64).collect();
        let tensor = |values: &[i64]| Tensor::from_slice(values).to_device(device);
        let positions = tensor(&positions).view([parts.len() as i64, -1, 1]);
        let age = positions - Tensor::arange(longest as i64, (Kind::Int64, device));
        Self { rows: tensor(&rows), places: tensor(&places), age }
    }

    /// Attention by libtorch's operations; see [`over_pages`].
    fn attend(&self, qkv: &Tensor, kv: &Tensor, heads: Heads, out: &Tensor) {
        let [parts, tokens, longest]: [i64; 3] = std::array::from_fn(|i| self.age.size()[i]);
        let [q, k, v] = heads.widths();
        let queries = qkv.narrow(1, 0, q).index_select(0, &self.rows);
        let keys_values = kv.index_select(0, &self.places).view([parts, longest, k + v]);
        let part = |first, columns, dim| {
            keys_values.narrow(2, first, columns).unflatten(2, [heads.key_value, dim]).transpose(1, 2)
        };
        let (keys, values) = (part(0, k, heads.dim), part(k, v, heads.value_dim));
        let mut hidden = self.age.lt(0);
        if let Some(window) = heads.window {
            hidden = hidden.logical_or(&self.age.ge(window));
        }
        let mask = Tensor::zeros([parts, tokens, longest], (qkv.kind(), qkv.device()));
        let mask = mask.masked_fill(&hidden, f64::NEG_INFINITY).unsqueeze(1);
        let queries = queries.view([parts, tokens, heads.query, heads.dim]).transpose(1, 2);
        // libtorch's kernel takes heads of one width.
        let o = if has_kernels(qkv) && heads.dim == heads.value_dim {
            let (mask, scale) = (Some(&mask), Some(heads.scale));
            Tensor::internal_scaled_dot_product_flash_attention_for_cpu(
                &queries, &keys, &values, 0.0, false, mask, scale,
            )
            .0
        } else {
            // Rounded scores would be wrong by their own size. The query heads of a group side by side:
            // [parts, key_value, group, tokens, dim].
            let wide = accum_kind(qkv.kind());
            let [queries, keys, values] = [queries, keys, values].map(|tensor| tensor.to_kind(wide));
            let queries = queries.unflatten(1, [heads.key_value, heads.query / heads.key_value]);
            let scores = queries.matmul(&keys.unsqueeze(2).transpose(-1, -2)) * heads.scale;
            let weights = (scores + mask.unsqueeze(2)).softmax(-1, wide);
            weights.matmul(&values.unsqueeze(2)).flatten(1, 2).to_kind(qkv.kind())
        };
        let o = o.transpose(1, 2).reshape([parts * tokens, heads.output()]);
        let _ = out.shallow_clone().index_copy_(0, &self.rows, &o);
    }
}

impl Paged {
    /// `parts` in pages of `page` tokens, for tensors on the device of `like`.
    pub fn new(parts: Vec<Part>, page: usize, like: &Tensor) -> Self {
        let is_single = |part: &Part| part.rows.len() == 1;
        let (singles, longer): (Vec<_>, Vec<_>) = parts.into_iter().partition(is_single);
        if has_kernels(like) {
            return Self { page, singles, longer, groups: Vec::new() };
        }
        let device = like.device();
        let mut groups: Vec<Group> =
            longer.iter().map(|part| Group::new(std::slice::from_ref(part), page, device)).collect();
        if !singles.is_empty() {
            groups.push(Group::new(&singles, page, device));
        }
        Self { page, singles, longer: Vec::new(), groups }
    }
}

/// Writes o to the parts' rows of `out` `[tokens, query·value_dim]`, from their q in q|k|v `[tokens, Σ widths]` and the
/// k|v of their sequences in `kv` `[places, key_value·(dim + value_dim)]`, their own included. A token sees those
/// before it and itself.
pub fn over_pages(qkv: &Tensor, kv: &Tensor, paged: &Paged, heads: Heads, out: &Tensor) {
    let _span = crate::trace::operation("attention.over_pages");
    for group in &paged.groups {
        group.attend(qkv, kv, heads, out);
    }
    for part in &paged.longer {
        continue_document(part, paged.page, qkv, kv, heads, out);
    }
    if has_kernels(qkv) && !paged.singles.is_empty() {
        on_cpu(qkv.kind(), Singles { shape: &Shape::new(heads), paged, qkv, kv, out });
    }
}

/// Attention of a part on the host, by the kernel of whole documents on a copy of the sequence.
fn continue_document(part: &Part, page: usize, qkv: &Tensor, kv: &Tensor, heads: Heads, out: &Tensor) {
    let [q, k, v] = heads.widths();
    let (first, length) = (part.first as i64, part.length() as i64);
    let own = |t: &Tensor| t.narrow(0, part.rows.start as i64, length - first);
    let places = (0..part.length()).map(|at| part.place(at, page) as i64);
    let places = Tensor::from_slice(&places.collect::<Vec<_>>());
    let whole = Buffer::empty(&[length, q + k + v], qkv.kind(), qkv.device());
    whole.narrow(1, q, k + v).copy_(&kv.index_select(0, &places));
    whole.narrow(0, first, length - first).narrow(1, 0, q).copy_(&own(qkv).narrow(1, 0, q));
    // Queries of a tile are read together.
    let _ = whole.narrow(0, 0, first).narrow(1, 0, q).zero_();
    let o = continued(&whole, heads, &Documents::new(&[part.length()], qkv.device()), part.first);
    own(out).copy_(&o.narrow(0, first, length - first));
}

/// The parts of one token.
struct Singles<'a> {
    shape: &'a Shape,
    paged: &'a Paged,
    qkv: &'a Tensor,
    kv: &'a Tensor,
    out: &'a Tensor,
}

impl Kernel for Singles<'_> {
    fn run<M: MicroKernel>(self, machine: M) {
        let Self { shape, paged: &Paged { page, ref singles, .. }, qkv, kv, out } = self;
        let [qkv, kv, out] = [qkv, kv, out].map(Rows::<M::Stored>::of);
        pool::tasks(singles.len() * shape.key_value, |task| {
            let (part, head) = (&singles[task / shape.key_value], task % shape.key_value);
            machine.run(Single { machine, shape, part, page, head, qkv, kv, out });
        });
    }
}

/// One token of a sequence and the query heads of one key-value head, which see the same keys.
struct Single<'a, M: MicroKernel> {
    machine: M,
    shape: &'a Shape,
    part: &'a Part,
    page: usize,
    head: usize,
    qkv: Rows<'a, M::Stored>,
    kv: Rows<'a, M::Stored>,
    out: Rows<'a, M::Stored>,
}

impl<M: MicroKernel> NullaryFnOnce for Single<'_, M> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { machine, shape, part, page, head, qkv, kv, out } = self;
        let &Shape { dim, value_dim, .. } = shape;
        let (group, length, token) = (shape.group(head), part.length(), part.rows.start);
        let (units, width) = (units::<M>(dim), width::<M>(value_dim));
        let need = words::<M::Unit>(TILE * units) + words::<M::Unit>(TILE / M::GROUP * width);
        let mut memory = Memory::take(need + Queries::<M>::words(units, width));
        let mut scratch = memory.scratch();
        let keys: &mut [M::Unit] = scratch.cut(TILE * units);
        let values: &mut [M::Unit] = scratch.cut(TILE / M::GROUP * width);
        let mut state = Queries::<M>::cut(&mut scratch, units, width);
        let scale = M::Number::of(shape.scale);
        let (key, value) = (head * dim, shape.key_value * dim + head * value_dim);
        // SAFETY: the cache is only read.
        let cached = |at, first, columns| unsafe { kv.part(part.place(at, page), first..first + columns) };
        for heads in group.clone().step_by(TILE).map(|first| first..group.end.min(first + TILE)) {
            // SAFETY: q|k|v is only read.
            state.start(heads.len(), |r| unsafe { qkv.part(token, shape.columns(heads.start + r)) });
            for first in shape.tiles(&(length - 1..length)).map(|tile| tile * TILE) {
                let seen = first..length.min(first + TILE);
                pack_keys::<M>(seen.clone(), |at| cached(at, key, dim), keys, units);
                pack_values::<M>(seen, |at| cached(at, value, value_dim), values, width);
                state.see(machine, scale, [&*keys, &*values], |_| shape.seen(length - 1, first));
            }
            for (r, head) in heads.enumerate() {
                // SAFETY: a token and query head have one task, which alone writes these columns.
                let out = unsafe { out.part_mut(token, shape.output_columns(head)) };
                state.end(r, scale, out);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::tests::reference, *};
    use crate::ops::testing::{KINDS, distance, everywhere};

    const PAGE: usize = 4;

    /// Sequences whose first tokens are in the cache: (tokens in it, tokens that come).
    const SEQUENCES: [(usize, usize); 5] = [(9, 1), (3, 4), (70, 1), (1, 1), (6, 3)];

    #[test]
    fn pages_continue_documents_of_different_lengths() {
        let lengths = SEQUENCES.map(|(before, new)| before + new);
        let heads = |query, key_value, dim| Heads::new(query, key_value, dim);
        for heads in [
            heads(4, 2, 8),
            Heads { window: Some(3), ..heads(3, 1, 64) },
            Heads { value_dim: 5, scale: 0.7, ..heads(2, 2, 20) },
            Heads { value_dim: 24, window: Some(66), ..heads(4, 1, 6) },
        ] {
            let widths = heads.widths();
            let total = lengths.iter().sum::<usize>() as i64;
            let all = Tensor::randn([total, widths.iter().sum()], (Kind::Double, Device::Cpu));
            // Pages are dealt to the sequences in turn, so that those of one do not lie side by side.
            let mut pages = vec![Vec::new(); lengths.len()];
            let mut next = 0;
            for at in 0..20 {
                for (pages, length) in pages.iter_mut().zip(lengths).filter(|(_, length)| at * PAGE < *length)
                {
                    debug_assert!(pages.len() * PAGE < length);
                    pages.push(next);
                    next += 1;
                }
            }
            let (mut parts, mut rows, mut start, mut own) = (Vec::new(), Vec::new(), 0, 0);
            // What no sequence has there must not count.
            let shape = [i64::from(next) * PAGE as i64, widths[1] + widths[2]];
            let cache = Tensor::full(shape, 7.0, (Kind::Double, Device::Cpu));
            for ((first, new), pages) in SEQUENCES.into_iter().zip(pages) {
                let part = Part { rows: own..own + new, first, pages };
                for position in 0..part.length() {
                    let place = part.place(position, PAGE) as i64;
                    let row = all.get((start + position) as i64).narrow(0, widths[0], widths[1] + widths[2]);
                    cache.get(place).copy_(&row);
                }
                rows.extend((first..first + new).map(|at| (start + at) as i64));
                (start, own) = (start + first + new, own + new);
                parts.push(part);
            }
            let rows = Tensor::from_slice(&rows);
            everywhere(|| {
                for (kind, tolerance) in KINDS {
                    let [all, cache] = [&all, &cache].map(|t| t.to_kind(kind));
                    let exact = reference(&all.to_kind(Kind::Double), heads, &lengths).index_select(0, &rows);
                    let qkv = all.index_select(0, &rows);
                    let out = Tensor::zeros([qkv.size()[0], heads.output()], (kind, Device::Cpu));
                    let check = |paged: &Paged, what: &str| {
                        over_pages(&qkv, &cache, paged, heads, &out);
                        let off = distance(&out, &exact);
                        assert!(off <= 4.0 * tolerance, "{what} {kind:?} {heads:?}: {off}");
                    };
                    check(&Paged::new(parts.clone(), PAGE, &qkv), "kernel");
                    // As on other devices.
                    let groups =
                        parts.iter().map(|part| Group::new(std::slice::from_ref(part), PAGE, Device::Cpu));
                    let groups = groups.collect();
                    let paged = Paged { page: PAGE, singles: Vec::new(), longer: Vec::new(), groups };
                    check(&paged, "libtorch");
                    let singles: Vec<Part> =
                        parts.iter().filter(|part| part.rows.len() == 1).cloned().collect();
                    Group::new(&singles, PAGE, Device::Cpu).attend(&qkv, &cache, heads, &out);
                    assert!(distance(&out, &exact) <= 4.0 * tolerance, "side by side {kind:?} {heads:?}");
                }
            });
        }
    }

    #[test]
    fn a_part_has_the_bits_of_the_whole() {
        const LENGTH: usize = 150;
        everywhere(|| {
            for (kind, _) in KINDS {
                for window in [None, Some(5), Some(70)] {
                    let heads = Heads { window, ..Heads::new(4, 2, 24) };
                    let [q, k, v] = heads.widths();
                    let all =
                        Tensor::randn([LENGTH as i64, q + k + v], (Kind::Float, Device::Cpu)).to_kind(kind);
                    let documents = Documents::new(&[LENGTH], Device::Cpu);
                    let (whole, _) = super::super::forward(&all, heads, &documents);
                    let pages: Vec<u32> = (0..LENGTH.div_ceil(PAGE) as u32).rev().collect();
                    let cache = Tensor::zeros([(pages.len() * PAGE) as i64, k + v], (kind, Device::Cpu));
                    let part = |first, rows: usize| Part { rows: 0..rows, first, pages: pages.clone() };
                    for (at, place) in part(0, LENGTH).places(PAGE).enumerate() {
                        cache.get(place as i64).copy_(&all.get(at as i64).narrow(0, q, k + v));
                    }
                    for (first, rows) in [(1, 1), (63, 2), (64, 64), (100, 50), (149, 1)] {
                        let own = |t: &Tensor| t.narrow(0, first as i64, rows as i64);
                        let paged = Paged::new(vec![part(first, rows)], PAGE, &all);
                        let out = Tensor::empty([rows as i64, heads.output()], (kind, Device::Cpu));
                        over_pages(&own(&all), &cache, &paged, heads, &out);
                        assert_eq!(out, own(&whole), "{kind:?} {window:?} {first} {rows}");
                    }
                }
            }
        });
    }
}
