//! FlashAttention-2 (Dao, 2023) on the CPU: tiles of scores that stay in the CPU's cache, fp32 sums, no work above the
//! diagonal, beyond a window or across documents.
//!
//! One task computes the query heads of one key-value head in one document, whose keys and values it packs once.

use super::{Documents, Heads};
use crate::ops::cpu::{
    Element, LANES, Real, Rows,
    lanes::{maximum, total},
    pool,
    scratch::{Memory, Scratch, words},
    tile::{Left, MicroKernel},
};
use pulp::NullaryFnOnce;
use std::ops::Range;

/// Queries and keys of a tile of scores.
pub(super) const TILE: usize = 64;

/// A document's tokens and one of its key-value heads.
struct Task {
    tokens: Range<usize>,
    head: usize,
}

/// Sizes that all tasks share.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    query: usize,
    pub key_value: usize,
    /// Width of a head of q and k.
    pub dim: usize,
    /// Width of a head of v and of the output.
    pub value_dim: usize,
    pub window: usize,
    pub scale: f64,
}

impl Shape {
    pub fn new(heads: Heads) -> Self {
        Self {
            query: heads.query as usize,
            key_value: heads.key_value as usize,
            dim: heads.dim as usize,
            value_dim: heads.value_dim as usize,
            window: heads.window.map_or(usize::MAX, |window| window as usize),
            scale: heads.scale,
        }
    }

    fn tasks(&self, documents: &Documents) -> Vec<Task> {
        let heads =
            |tokens: Range<usize>| (0..self.key_value).map(move |head| Task { tokens: tokens.clone(), head });
        let mut tasks: Vec<Task> = documents.ranges().flat_map(heads).collect();
        // Longest first, so that no thread starts a long task when the others have finished.
        tasks.sort_by_key(|task| std::cmp::Reverse(task.tokens.len()));
        tasks
    }

    /// Query heads that attend to key-value head `head`.
    pub fn group(&self, head: usize) -> Range<usize> {
        let size = self.query / self.key_value;
        head * size..(head + 1) * size
    }

    /// Columns of query head `head` in fused q|k|v.
    pub fn columns(&self, head: usize) -> Range<usize> {
        head * self.dim..(head + 1) * self.dim
    }

    /// Columns of query head `head` in the output.
    pub fn output_columns(&self, head: usize) -> Range<usize> {
        head * self.value_dim..(head + 1) * self.value_dim
    }

    /// Columns of the keys and values of key-value head `head` in fused q|k|v.
    pub fn key_value_columns(&self, head: usize) -> [Range<usize>; 2] {
        let first_value = (self.query + self.key_value) * self.dim + head * self.value_dim;
        [self.columns(self.query + head), first_value..first_value + self.value_dim]
    }

    /// The tiles of keys that queries `queries` of a document see.
    pub fn tiles(&self, queries: &Range<usize>) -> Range<usize> {
        let first = (queries.start + 1).saturating_sub(self.window);
        first / TILE..queries.end.div_ceil(TILE)
    }

    /// The range that query `i` sees of the keys of a tile that starts at `first`.
    pub fn seen(&self, i: usize, first: usize) -> Range<usize> {
        let end = (i + 1).saturating_sub(first).min(TILE);
        (i + 1).saturating_sub(self.window).saturating_sub(first).min(end)..end
    }
}

/// Writes o `[tokens, query·value_dim]` and L (see [`super::forward`]) of q|k|v, of the queries from `first` on of each
/// document. Rows of the tile of queries before `first` are written too.
pub fn forward<M: MicroKernel>(
    machine: M,
    qkv: Rows<M::Stored>,
    heads: Heads,
    (documents, first): (&Documents, usize),
    out: Rows<M::Stored>,
    lse: Rows<M::Number>,
) {
    let shape = &Shape::new(heads);
    let tasks = shape.tasks(documents);
    pool::tasks(tasks.len(), |i| {
        machine.run(Forward::<M> { machine, shape, task: &tasks[i], first, qkv, out, lse })
    });
}

/// Writes the gradient of q|k|v from that of o.
pub fn backward<M: MicroKernel>(
    machine: M,
    [d_out, qkv, out]: [Rows<M::Stored>; 3],
    lse: Rows<M::Number>,
    heads: Heads,
    documents: &Documents,
    d_qkv: Rows<M::Stored>,
) {
    let shape = &Shape::new(heads);
    let tasks = shape.tasks(documents);
    pool::tasks(tasks.len(), |i| {
        machine.run(Backward::<M> { machine, shape, task: &tasks[i], d_out, qkv, out, lse, d_qkv });
    });
}

struct Forward<'a, M: MicroKernel> {
    machine: M,
    shape: &'a Shape,
    task: &'a Task,
    first: usize,
    qkv: Rows<'a, M::Stored>,
    out: Rows<'a, M::Stored>,
    lse: Rows<'a, M::Number>,
}

impl<M: MicroKernel> NullaryFnOnce for Forward<'_, M> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { machine, shape, task, first: first_query, qkv, out, lse } = self;
        let (length, width) = (task.tokens.len(), width::<M>(shape.value_dim));
        let units = units::<M>(shape.dim);
        let padded = length.next_multiple_of(TILE);
        let need = words::<M::Unit>(units * padded)
            + words::<M::Unit>(padded / M::GROUP * width)
            + Queries::<M>::words(units, width);
        let mut memory = Memory::take(need);
        let mut scratch = memory.scratch();
        let [key_columns, value_columns] = shape.key_value_columns(task.head);
        let keys = Source { rows: qkv, tokens: task.tokens.clone(), columns: key_columns };
        let values = Source { columns: value_columns, ..keys.clone() };
        let keys = keys.along_dim::<M>(&mut scratch, units);
        let values = values.along_tokens::<M>(&mut scratch, padded, width);
        let mut state = Queries::<M>::cut(&mut scratch, units, width);
        let scale = M::Number::of(shape.scale);

        for head in shape.group(task.head) {
            let source = Source { rows: qkv, tokens: task.tokens.clone(), columns: shape.columns(head) };
            for first in (first_query / TILE * TILE..length).step_by(TILE) {
                let queries = first..length.min(first + TILE);
                state.start(queries.len(), |r| source.row(first + r));
                for tile in shape.tiles(&queries) {
                    let per_tile = TILE / M::GROUP * width;
                    let key_tile = &keys[tile * TILE * units..(tile + 1) * TILE * units];
                    let value_tile = &values[tile * per_tile..(tile + 1) * per_tile];
                    state.see(machine, scale, [key_tile, value_tile], |r| shape.seen(first + r, tile * TILE));
                }
                for (r, i) in queries.enumerate() {
                    // SAFETY: a document and key-value head have one task, which alone writes the columns of its query
                    // heads.
                    let out = unsafe { out.part_mut(task.tokens.start + i, shape.output_columns(head)) };
                    let l = state.end(r, scale, out);
                    let at = lse_index(shape, task, head, i);
                    // SAFETY: each element of L belongs to one head of one document, so to one task.
                    let lse = unsafe { lse.part_mut(0, at..at + 1) };
                    lse[0] = l;
                }
            }
        }
    }
}

/// Up to [`TILE`] queries, each a row, and what they have seen so far.
pub(super) struct Queries<'s, M: MicroKernel> {
    /// Queries at work.
    count: usize,
    /// Columns of a row of `sums`.
    width: usize,
    /// `[TILE, units]`
    query: &'s mut [M::Unit],
    /// `[TILE, TILE]`
    scores: &'s mut [M::Number],
    /// Exponentials of the scores, rounded as the product with the values needs them.
    weights: &'s mut [M::Unit],
    /// Σ p·v: `[TILE, width]`
    sums: &'s mut [M::Number],
    /// Σ p of each row, by lane.
    totals: &'s mut [[M::Number; LANES]],
    maxima: &'s mut [M::Number],
    latest: &'s mut [M::Number],
    shrinks: &'s mut [M::Number],
}

impl<'s, M: MicroKernel> Queries<'s, M> {
    /// Words of scratch memory, for heads of `units` and values of `width` columns.
    pub fn words(units: usize, width: usize) -> usize {
        words::<M::Unit>(TILE * units)
            + words::<M::Unit>(TILE * TILE / M::GROUP)
            + words::<M::Number>(TILE * TILE)
            + words::<M::Number>(TILE * width)
            + 3 * words::<M::Number>(TILE)
            + words::<M::Number>(TILE * LANES)
    }

    #[inline(always)]
    pub fn cut(scratch: &mut Scratch<'s>, units: usize, width: usize) -> Self {
        Self {
            count: 0,
            width,
            query: scratch.cut(TILE * units),
            scores: scratch.cut(TILE * TILE),
            weights: scratch.cut(TILE * TILE / M::GROUP),
            sums: scratch.cut(TILE * width),
            totals: scratch.cut::<M::Number>(TILE * LANES).as_chunks_mut().0,
            maxima: scratch.cut(TILE),
            latest: scratch.cut(TILE),
            shrinks: scratch.cut(TILE),
        }
    }

    /// Rows that are computed: those behind the queries are of zeros.
    #[inline(always)]
    fn rows(&self) -> usize {
        self.count.next_multiple_of(M::ROWS)
    }

    /// Starts with `count` queries, which have seen nothing yet.
    #[inline(always)]
    pub fn start<'a>(&mut self, count: usize, query: impl Fn(usize) -> &'a [M::Stored]) {
        self.count = count;
        let (rows, units) = (self.rows(), self.query.len() / TILE);
        pack_rows::<M>(0..count, query, &mut self.query[..rows * units], units);
        self.sums[..rows * self.width].fill(M::Number::ZERO);
        self.maxima[..count].fill(M::Number::NEG_INFINITY);
        self.totals[..count].fill([M::Number::ZERO; LANES]);
    }

    /// Adds a tile of keys and values, of which row `r` sees the range `seen(r)`.
    #[inline(always)]
    pub fn see(
        &mut self,
        machine: M,
        scale: M::Number,
        [keys, values]: [&[M::Unit]; 2],
        seen: impl Fn(usize) -> Range<usize>,
    ) {
        let (count, rows, width, units) = (self.count, self.rows(), self.width, self.query.len() / TILE);
        let Self { query, scores, weights, sums, totals, maxima, latest, shrinks, .. } = self;
        let left = Left { units: query, row: units, unit: 1 };
        machine.multiply(left, keys, &mut scores[..rows * TILE], TILE, false);
        // Rows are independent: one loop over all of them has no dependent chain, unlike a chain of steps by row.
        for r in 0..count {
            let row = &mut scores[r * TILE..(r + 1) * TILE];
            hide(row, &seen(r), M::Number::NEG_INFINITY);
            latest[r] = maximum(row).max(maxima[r]);
        }
        for ((shrink, latest), maximum) in
            shrinks.iter_mut().zip(&mut **latest).zip(&mut **maxima).take(count)
        {
            // A row that has seen no key yet gets weights of zero, not NaN.
            let base = if *latest == M::Number::NEG_INFINITY { M::Number::ZERO } else { *latest };
            *shrink = ((*maximum - base) * scale).exp();
            (*maximum, *latest) = (*latest, base);
        }
        for r in 0..count {
            let row = &mut scores[r * TILE..(r + 1) * TILE];
            exponentials(row, latest[r], scale, shrinks[r], &mut totals[r]);
            if shrinks[r] != M::Number::ONE {
                for sum in &mut sums[r * width..(r + 1) * width] {
                    *sum = *sum * shrinks[r];
                }
            }
            M::pack(row, &mut weights[r * TILE / M::GROUP..(r + 1) * TILE / M::GROUP]);
        }
        weights[count * TILE / M::GROUP..rows * TILE / M::GROUP].fill(bytemuck::Zeroable::zeroed());
        let left = Left { units: weights, row: TILE / M::GROUP, unit: 1 };
        machine.multiply(left, values, &mut sums[..rows * width], width, true);
    }

    /// Writes o of row `r`, and gives its L.
    #[inline(always)]
    pub fn end(&self, r: usize, scale: M::Number, out: &mut [M::Stored]) -> M::Number {
        let total = total(self.totals[r]);
        let inverse = M::Number::ONE / total;
        for (out, &sum) in out.iter_mut().zip(&self.sums[r * self.width..]) {
            *out = M::Stored::narrow(sum * inverse);
        }
        self.maxima[r].mul_add(scale, total.ln())
    }
}

struct Backward<'a, M: MicroKernel> {
    machine: M,
    shape: &'a Shape,
    task: &'a Task,
    d_out: Rows<'a, M::Stored>,
    qkv: Rows<'a, M::Stored>,
    out: Rows<'a, M::Stored>,
    lse: Rows<'a, M::Number>,
    d_qkv: Rows<'a, M::Stored>,
}

impl<M: MicroKernel> NullaryFnOnce for Backward<'_, M> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { machine, shape, task, d_out, qkv, out, lse, d_qkv } = self;
        let length = task.tokens.len();
        let (width, value_width) = (width::<M>(shape.dim), width::<M>(shape.value_dim));
        let (units, value_units) = (units::<M>(shape.dim), units::<M>(shape.value_dim));
        let padded = length.next_multiple_of(TILE);
        let tile_units = TILE * TILE / M::GROUP;
        let need = [units, value_units].map(|units| words::<M::Unit>(units * padded)).iter().sum::<usize>()
            + words::<M::Unit>(padded / M::GROUP * width)
            + [units, value_units].map(|units| words::<M::Unit>(TILE * units)).iter().sum::<usize>()
            + [width, value_width]
                .map(|width| words::<M::Unit>(TILE / M::GROUP * width))
                .iter()
                .sum::<usize>()
            + 3 * words::<M::Unit>(tile_units)
            + 2 * words::<M::Number>(TILE * TILE)
            + [width, value_width].map(|width| words::<M::Number>(padded * width)).iter().sum::<usize>()
            + words::<M::Number>(TILE * width);
        let mut memory = Memory::take(need);
        let mut scratch = memory.scratch();
        let of = |rows, columns| Source { rows, tokens: task.tokens.clone(), columns };
        let [key_columns, value_columns] = shape.key_value_columns(task.head);
        let (key, value) = (of(qkv, key_columns.clone()), of(qkv, value_columns.clone()));
        let keys_along_dim = key.along_dim::<M>(&mut scratch, units);
        let values_along_dim = value.along_dim::<M>(&mut scratch, value_units);
        let keys_along_tokens = key.along_tokens::<M>(&mut scratch, padded, width);
        let [query, d_o]: [&mut [M::Unit]; 2] = [scratch.cut(TILE * units), scratch.cut(TILE * value_units)];
        let d_scores_rows: &mut [M::Unit] = scratch.cut(tile_units);
        let [weights, d_scores_across]: [&mut [M::Unit]; 2] =
            [scratch.cut(tile_units), scratch.cut(tile_units)];
        let [scores, d_weights]: [&mut [M::Number]; 2] = [scratch.cut(TILE * TILE), scratch.cut(TILE * TILE)];
        let [d_keys, d_values]: [&mut [M::Number]; 2] =
            [scratch.cut(padded * width), scratch.cut(padded * value_width)];
        let d_query: &mut [M::Number] = scratch.cut(TILE * width);
        let across: [&mut [M::Unit]; 2] =
            [scratch.cut(TILE / M::GROUP * width), scratch.cut(TILE / M::GROUP * value_width)];
        d_keys.fill(M::Number::ZERO);
        d_values.fill(M::Number::ZERO);
        let scale = M::Number::of(shape.scale);

        for head in shape.group(task.head) {
            let q = of(qkv, shape.columns(head));
            let [d, o] = [d_out, out].map(|rows| of(rows, shape.output_columns(head)));
            for first in (0..length).step_by(TILE) {
                let queries = first..length.min(first + TILE);
                let rows = queries.len().next_multiple_of(M::ROWS);
                q.rows_of::<M>(&queries, query, units);
                d.rows_of::<M>(&queries, d_o, value_units);
                q.pairs_of::<M>(&queries, across[0], width);
                d.pairs_of::<M>(&queries, across[1], value_width);
                let mut dots = [M::Number::ZERO; TILE];
                let mut lses = [M::Number::ZERO; TILE];
                for (r, i) in queries.clone().enumerate() {
                    dots[r] = dot(d.row(i), o.row(i));
                    let at = lse_index(shape, task, head, i);
                    // SAFETY: L is an input of backward: no task writes to it.
                    lses[r] = unsafe { lse.part(0, at..at + 1) }[0];
                }
                d_query.fill(M::Number::ZERO);
                for tile in shape.tiles(&queries) {
                    machine.multiply(
                        Left { units: query, row: units, unit: 1 },
                        &keys_along_dim[tile * TILE * units..(tile + 1) * TILE * units],
                        &mut scores[..rows * TILE],
                        TILE,
                        false,
                    );
                    machine.multiply(
                        Left { units: d_o, row: value_units, unit: 1 },
                        &values_along_dim[tile * TILE * value_units..(tile + 1) * TILE * value_units],
                        &mut d_weights[..rows * TILE],
                        TILE,
                        false,
                    );
                    for (r, i) in queries.clone().enumerate() {
                        let row = r * TILE..(r + 1) * TILE;
                        let seen = shape.seen(i, tile * TILE);
                        let (p, d) = (&mut scores[row.clone()], &mut d_weights[row]);
                        for (p, d) in p.iter_mut().zip(&mut *d) {
                            *p = p.mul_add(scale, -lses[r]).exp();
                            *d = (*d - dots[r]) * *p;
                        }
                        hide(p, &seen, M::Number::ZERO);
                        hide(d, &seen, M::Number::ZERO);
                        M::pack(d, &mut d_scores_rows[r * TILE / M::GROUP..(r + 1) * TILE / M::GROUP]);
                    }
                    // Rows behind the last query must add nothing.
                    scores[queries.len() * TILE..].fill(M::Number::ZERO);
                    d_weights[queries.len() * TILE..].fill(M::Number::ZERO);
                    d_scores_rows[queries.len() * TILE / M::GROUP..].fill(bytemuck::Zeroable::zeroed());

                    machine.multiply(
                        machine.transposed(scores, TILE, weights),
                        across[1],
                        &mut d_values[tile * TILE * value_width..(tile + 1) * TILE * value_width],
                        value_width,
                        true,
                    );
                    machine.multiply(
                        machine.transposed(d_weights, TILE, d_scores_across),
                        across[0],
                        &mut d_keys[tile * TILE * width..(tile + 1) * TILE * width],
                        width,
                        true,
                    );
                    let left = Left { units: d_scores_rows, row: TILE / M::GROUP, unit: 1 };
                    let per_tile = TILE / M::GROUP * width;
                    let key_tile = &keys_along_tokens[tile * per_tile..(tile + 1) * per_tile];
                    machine.multiply(left, key_tile, &mut d_query[..rows * width], width, true);
                }
                for (r, i) in queries.enumerate() {
                    // SAFETY: a document and key-value head have one task, which alone writes the columns of its query
                    // heads.
                    let target = unsafe { d_qkv.part_mut(task.tokens.start + i, shape.columns(head)) };
                    for (target, &d) in target.iter_mut().zip(&d_query[r * width..]) {
                        *target = M::Stored::narrow(d * scale);
                    }
                }
            }
        }
        for i in 0..length {
            let parts = [
                (key_columns.clone(), &d_keys[i * width..], scale),
                (value_columns.clone(), &d_values[i * value_width..], M::Number::ONE),
            ];
            for (columns, d, scale) in parts {
                // SAFETY: a document and key-value head have one task, which alone writes the head's columns.
                let target = unsafe { d_qkv.part_mut(task.tokens.start + i, columns) };
                for (target, &d) in target.iter_mut().zip(d) {
                    *target = M::Stored::narrow(d * scale);
                }
            }
        }
    }
}

/// Columns of a tile that holds a head of `dim` columns.
pub(super) fn width<M: MicroKernel>(dim: usize) -> usize {
    dim.next_multiple_of(M::WIDTH)
}

/// Units of a row of a head of `dim` columns, the zeros behind it included.
pub(super) fn units<M: MicroKernel>(dim: usize) -> usize {
    dim.div_ceil(M::GROUP).next_multiple_of(M::UNITS)
}

/// Index in L of query `i` of a document and head `head`: L is ordered by document, head, token.
#[inline(always)]
fn lse_index(shape: &Shape, task: &Task, head: usize, i: usize) -> usize {
    task.tokens.start * shape.query + head * task.tokens.len() + i
}

/// One head of a document: `columns` of the rows `tokens` of a tensor that is only read.
#[derive(Clone)]
struct Source<'a, E> {
    rows: Rows<'a, E>,
    tokens: Range<usize>,
    columns: Range<usize>,
}

impl<'a, E: Element> Source<'a, E> {
    #[inline(always)]
    fn row(&self, i: usize) -> &'a [E] {
        // SAFETY: a source is an input of the kernel; tasks write to other tensors only.
        unsafe { self.rows.part(self.tokens.start + i, self.columns.clone()) }
    }

    /// Tiles of units along the head's dimension, `[tiles][units][TILE]`, as [`pack_keys`] has each.
    #[inline(always)]
    fn along_dim<'s, M: MicroKernel<Stored = E>>(
        &self,
        scratch: &mut Scratch<'s>,
        units: usize,
    ) -> &'s [M::Unit] {
        let length = self.tokens.len();
        let packed: &mut [M::Unit] = scratch.cut(units * length.next_multiple_of(TILE));
        for (tile, packed) in packed.chunks_exact_mut(units * TILE).enumerate() {
            let keys = tile * TILE..length.min((tile + 1) * TILE);
            pack_keys::<M>(keys, |i| self.row(i), packed, units);
        }
        packed
    }

    /// Units along the tokens, `[padded / GROUP, width]`, as [`pack_values`] has them.
    #[inline(always)]
    fn along_tokens<'s, M: MicroKernel<Stored = E>>(
        &self,
        scratch: &mut Scratch<'s>,
        padded: usize,
        width: usize,
    ) -> &'s [M::Unit] {
        let packed: &mut [M::Unit] = scratch.cut(padded / M::GROUP * width);
        pack_values::<M>(0..self.tokens.len(), |i| self.row(i), packed, width);
        packed
    }

    /// As [`pack_rows`].
    #[inline(always)]
    fn rows_of<M: MicroKernel<Stored = E>>(
        &self,
        range: &Range<usize>,
        packed: &mut [M::Unit],
        units: usize,
    ) {
        pack_rows::<M>(range.clone(), |i| self.row(i), packed, units);
    }

    /// As [`pack_values`].
    #[inline(always)]
    fn pairs_of<M: MicroKernel<Stored = E>>(
        &self,
        range: &Range<usize>,
        packed: &mut [M::Unit],
        width: usize,
    ) {
        pack_values::<M>(range.clone(), |i| self.row(i), packed, width);
    }
}

/// Packs the keys `range` of a tile in units along the head's dimension, `[units, TILE]`, zero behind them: a right
/// factor of TILE columns.
#[inline(always)]
pub(super) fn pack_keys<'a, M: MicroKernel>(
    range: Range<usize>,
    row: impl Fn(usize) -> &'a [M::Stored],
    packed: &mut [M::Unit],
    units: usize,
) {
    for token in 0..TILE {
        let row = if token < range.len() { row(range.start + token) } else { &[] };
        units_of::<M>(row, |k, unit| packed[k * TILE + token] = unit);
        (row.len().div_ceil(M::GROUP)..units)
            .for_each(|k| packed[k * TILE + token] = bytemuck::Zeroable::zeroed());
    }
}

/// Packs the rows `range` in units along the head's dimension, `[.., units]`, zero behind them: a left factor.
#[inline(always)]
fn pack_rows<'a, M: MicroKernel>(
    range: Range<usize>,
    row: impl Fn(usize) -> &'a [M::Stored],
    packed: &mut [M::Unit],
    units: usize,
) {
    for (i, packed) in range.clone().zip(packed.chunks_exact_mut(units)) {
        let row = row(i);
        units_of::<M>(row, |k, unit| packed[k] = unit);
        packed[row.len().div_ceil(M::GROUP)..].fill(bytemuck::Zeroable::zeroed());
    }
    packed[range.len() * units..].fill(bytemuck::Zeroable::zeroed());
}

/// Packs the rows `range` in units along the tokens, `[.. / GROUP, width]`, zero behind and beside them: a right factor
/// of `width` columns.
#[inline(always)]
pub(super) fn pack_values<'a, M: MicroKernel>(
    range: Range<usize>,
    row: impl Fn(usize) -> &'a [M::Stored],
    packed: &mut [M::Unit],
    width: usize,
) {
    let zero = M::Stored::narrow(M::Number::ZERO);
    for (n, packed) in packed.chunks_exact_mut(width).enumerate() {
        let i = range.start + n * M::GROUP;
        if i >= range.end {
            packed.fill(bytemuck::Zeroable::zeroed());
            continue;
        }
        let first = row(i);
        if M::GROUP == 2 && i + 1 < range.end {
            for ((unit, &a), &b) in packed.iter_mut().zip(first).zip(row(i + 1)) {
                *unit = M::stored(a, b);
            }
        } else {
            for (unit, &a) in packed.iter_mut().zip(first) {
                *unit = M::stored(a, zero);
            }
        }
        packed[first.len()..].fill(bytemuck::Zeroable::zeroed());
    }
}

/// Calls `put(k, unit)` for the units of a row.
#[inline(always)]
fn units_of<M: MicroKernel>(row: &[M::Stored], mut put: impl FnMut(usize, M::Unit)) {
    let whole = row.chunks_exact(M::GROUP);
    let zero = M::Stored::narrow(M::Number::ZERO);
    if let &[last] = whole.remainder() {
        put(row.len() / M::GROUP, M::stored(last, zero));
    }
    for (k, unit) in whole.enumerate() {
        put(k, M::stored(unit[0], unit[M::GROUP - 1]));
    }
}

/// Sets the columns outside `seen` to `value`.
#[inline(always)]
fn hide<R: Real>(row: &mut [R], seen: &Range<usize>, value: R) {
    row[..seen.start].fill(value);
    row[seen.end..].fill(value);
}

/// x ← exp((x − base)·scale) in place; sums ← sums·shrink + Σ x, by lane.
#[inline(always)]
fn exponentials<R: Real>(row: &mut [R], base: R, scale: R, shrink: R, sums: &mut [R; LANES]) {
    let mut lanes = *sums;
    for lane in &mut lanes {
        *lane = *lane * shrink;
    }
    for chunk in row.as_chunks_mut::<LANES>().0 {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *x = ((*x - base) * scale).exp();
            *lane += *x;
        }
    }
    *sums = lanes;
}

#[inline(always)]
fn dot<E: Element>(a: &[E], b: &[E]) -> E::Accum {
    let mut lanes = [E::Accum::ZERO; LANES];
    for (a, b) in a.chunks(LANES).zip(b.chunks(LANES)) {
        for ((lane, &a), &b) in lanes.iter_mut().zip(a).zip(b) {
            *lane = a.to_accum().mul_add(b.to_accum(), *lane);
        }
    }
    total(lanes)
}
