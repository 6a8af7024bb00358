//! Causal linear attention with a local window: the last chunks of keys as they are, everything
//! older through the sums.

use std::ops::Range;

use ndarray::{ArrayViewMut3, Axis};

use crate::Real;
use crate::attention::linear::absorb::retire;
use crate::attention::linear::head::Head;
use crate::attention::linear::state::{HeadState, Outputs, Ring, Single};
use crate::attention::qkv::HeadQkv;
use crate::attention::rows::OutOfRange;
use crate::attention::scratch::{BLOCK, FeatureScratch, SEGMENT, Scratch};
use crate::low::mat::{Accum, MatMut, MatRef};
use crate::low::simd::{Ahead, LANES, Ops, padded};

/// The next tokens of one key-value head and its group of query heads.
///
/// Elements are looked at as they are read; after an error the state holds anything.
pub(crate) fn prefill<T: Real>(
    head: &Head<'_, T>,
    state: &mut HeadState<T>,
    qkv: HeadQkv<'_, T>,
    mut out: ArrayViewMut3<'_, T>,
    scratch: &mut Scratch<T>,
) -> Result<(), OutOfRange> {
    let n = qkv.k.nrows();
    scratch.features.ahead = Ahead::of(
        [qkv.k, qkv.v].into_iter().chain(qkv.q.outer_iter()).chain(out.view().outer_iter()),
    );
    let mut start = 0;
    while start < n {
        let end = keys(head, state, &qkv, start, scratch)?;
        scratch.features.ahead.aim(end, BLOCK);
        queries(head, state, &qkv, start..end, out.view_mut(), scratch)?;
        start = end;
    }
    Ok(())
}

/// The block of keys and values at `start` goes to the ring, after the oldest chunk has left it for
/// the sums, if it must; returns where the block ends.
fn keys<T: Real>(
    head: &Head<'_, T>,
    state: &mut HeadState<T>,
    qkv: &HeadQkv<'_, T>,
    start: usize,
    scratch: &mut Scratch<T>,
) -> Result<usize, OutOfRange> {
    let (n, position) = (qkv.k.nrows(), qkv.position + start);
    let length = state.ring.as_ref().map_or(1, Ring::chunk);
    let (chunk, within) = (position / length, position % length);
    let end = n.min(start + BLOCK.min(length - within).min(SEGMENT - start % SEGMENT));
    if within == 0 {
        retire(head, state, chunk, scratch);
    }
    if !qkv.any_valid(start..end) {
        // The slot is clear there.
        return Ok(end);
    }
    let HeadState { ring: Some(ring), sinks, .. } = state else { return Ok(n) };
    let slot = ring.slot_mut(chunk);
    let values = &mut slot.values[within * head.value_stride..];
    qkv.key_rows(start..end).gather(head.ops, head.scale, &mut scratch.y, &scratch.zeros)?;
    qkv.value_rows(start..end).copy(head.ops, values)?;
    let (tokens, stride) = (end - start, padded(length));
    let panel = scratch.y.chunks_exact(padded(tokens));
    for (keys, y) in slot.keys.chunks_exact_mut(stride).zip(panel) {
        keys[within..within + tokens].copy_from_slice(&y[..tokens]);
    }
    for j in start..end {
        let at = within + j - start;
        slot.valid[at] = qkv.is_valid(j);
        if slot.valid[at] && sinks.wants_more() {
            let panel = MatRef::packed(&slot.keys, head.dim, stride);
            let value = &slot.values[at * head.value_stride..][..head.value_stride];
            sinks.push(qkv.position + j, panel, at, value);
        }
    }
    Ok(end)
}

/// Outputs of a block's queries over the window's keys and the sums.
fn queries<T: Real>(
    head: &Head<'_, T>,
    state: &HeadState<T>,
    qkv: &HeadQkv<'_, T>,
    block: Range<usize>,
    mut out: ArrayViewMut3<'_, T>,
    scratch: &mut Scratch<T>,
) -> Result<(), OutOfRange> {
    for h in 0..qkv.q.shape()[0] {
        let Scratch { x, zeros, .. } = scratch;
        qkv.query_rows(h, block.clone()).gather(head.ops, head.scale, x, zeros)?;
        weigh(head, state, qkv.position + block.start, block.len(), scratch);
        head.put_outputs(scratch, block.clone(), out.index_axis_mut(Axis(0), h))?;
    }
    Ok(())
}

/// The tokens that a block of queries sees as they are, and how their scores lie: a row per query,
/// a column group for the sinks that have left the window, one for the kept tokens and one per
/// chunk, the oldest chunk first. The oldest chunks without a key that may be attended to are left
/// out.
struct Seen<'r, T> {
    ring: &'r Ring<T>,
    single: Single<'r, T>,
    /// Columns of their scores.
    single_width: usize,
    /// The queries' own chunk, and the first query's place in it.
    chunk: usize,
    within: usize,
    /// Chunks, the own one included.
    chunks: usize,
    tokens: usize,
    /// Columns of a chunk, and of all.
    slot_width: usize,
    stride: usize,
}

impl<'r, T: Real> Seen<'r, T> {
    fn new(ring: &'r Ring<T>, single: Single<'r, T>, position: usize, tokens: usize) -> Self {
        let (chunk, within) = (position / ring.chunk(), position % ring.chunk());
        let back = (ring.slots() - 1).min(chunk);
        let (single_width, slot_width) = (single.width(), padded(ring.chunk()));
        let seen = |age: &usize| ring.slot(chunk - age).valid.contains(&true);
        let chunks = (0..=back).rev().find(seen).map_or(0, |oldest| oldest + 1);
        let stride = single_width + chunks * slot_width;
        Self { ring, single, single_width, chunk, within, chunks, tokens, slot_width, stride }
    }

    /// First column of the chunk of this age.
    fn column(&self, age: usize) -> usize {
        self.single_width + (self.chunks - 1 - age) * self.slot_width
    }

    /// Where the scores of query `i` lie, up to the last one that any query of its band sees: the
    /// own chunk comes last.
    fn scores(&self, i: usize) -> Range<usize> {
        let band_end = self.tokens.min(i / LANES * LANES + LANES);
        let end = match self.chunks {
            0 => self.single_width,
            _ => self.column(0) + padded(self.within + band_end),
        };
        i * self.stride..i * self.stride + end
    }

    /// Scores of the single tokens and the older chunks, then of the queries' own up to the
    /// diagonal; −∞ where no key may be looked at.
    fn score(&self, ops: &Ops<T>, x: MatRef<'_, T>, p: &mut [T], ahead: &mut Ahead<T>) {
        let (length, stride, slot_width) = (self.ring.chunk(), self.stride, self.slot_width);
        let rows = x.cols(0..self.tokens).t();
        self.single.score(ops, rows, (&mut *p, stride), Some(&mut *ahead));
        for age in (0..self.chunks).rev() {
            let slot = self.ring.slot(self.chunk - age);
            let at = self.column(age);
            let last = if age == 0 { self.within + self.tokens } else { length };
            let masked = slot.valid[..last].contains(&false);
            for band in (0..self.tokens).step_by(LANES) {
                let rows = LANES.min(self.tokens - band);
                let columns = if age == 0 { padded(self.within + band + rows) } else { slot_width };
                (ops.matmul_ahead)(
                    MatMut::new(&mut p[band * stride + at..], rows, columns, stride),
                    Accum::Replace,
                    x.cols(band..band + rows).t(),
                    MatRef::packed(&slot.keys, x.rows, slot_width).cols(0..columns),
                    Some(ahead),
                );
                for i in band..band + rows {
                    let row = &mut p[i * stride + at..][..slot_width];
                    let end = if age == 0 { self.within + i + 1 } else { length };
                    row[end..columns].fill(T::NEG_INFINITY);
                    if masked {
                        for (score, _) in
                            row.iter_mut().zip(&slot.valid).filter(|(_, valid)| !**valid)
                        {
                            *score = T::NEG_INFINITY;
                        }
                    }
                }
            }
        }
    }

    /// Adds the values, weighted by `p`, to `o` `[tokens, e_padded]`.
    fn add_values(&self, ops: &Ops<T>, p: &[T], o: &mut [T], ahead: &mut Ahead<T>) {
        let length = self.ring.chunk();
        self.single.add_values(ops, (p, self.tokens, self.stride), o, Some(&mut *ahead));
        for age in (0..self.chunks).rev() {
            let slot = self.ring.slot(self.chunk - age);
            let (at, e) = (self.column(age), slot.values.len() / length);
            for band in (0..self.tokens).step_by(LANES) {
                let rows = LANES.min(self.tokens - band);
                let keys = if age == 0 { self.within + band + rows } else { length };
                (ops.matmul_ahead)(
                    MatMut::packed(&mut o[band * e..], rows, e),
                    Accum::Add,
                    MatRef::new(&p[band * self.stride + at..], rows, keys, self.stride),
                    MatRef::packed(&slot.values, keys, e),
                    Some(ahead),
                );
            }
        }
    }
}

/// Sums and normalisers of the queries `x`, the first at `position`, over what the state remembers,
/// into `o` and `total`.
fn weigh<T: Real>(
    head: &Head<'_, T>,
    state: &HeadState<T>,
    position: usize,
    tokens: usize,
    scratch: &mut Scratch<T>,
) {
    let HeadState { sums, ring: Some(ring), .. } = state else { return };
    let Scratch { x, p, o, total, features, .. } = scratch;
    let FeatureScratch { a, column, top, map, ahead, .. } = features;
    let width = padded(tokens);
    let x = &x[..head.dim * width];
    let (column, top, total) = (&mut column[..width], &mut top[..width], &mut total[..width]);
    let seen = Seen::new(ring, state.single(ring.first_seen(position)), position, tokens);
    seen.score(head.ops, MatRef::packed(x, head.dim, width), p, ahead);
    for (i, top) in top.iter_mut().enumerate() {
        *top = if i < tokens { (head.ops.slice_max)(&p[seen.scores(i)]) } else { T::zero() };
    }

    // The sums share the row's largest exponent with the window.
    if sums.started {
        let a = &mut a[..head.features * width];
        head.map.query_panel(width, x, a, map);
        (head.ops.column_max)(a, &sums.reference, column);
        for (i, (shift, top)) in column.iter_mut().zip(top.iter_mut()).enumerate() {
            let decay = sums.decay(head.log_decay, position + i);
            let far = *shift + decay;
            *top = top.max(far);
            // decay − top, so that nothing of a strong decay's rounding is left where far keys are
            // all there is.
            *shift = (far - *top) - *shift;
        }
        let out = Outputs { tokens, numerator: o, total: &mut *total };
        sums.read(head.ops, a, column, out, ahead);
    } else {
        total.fill(T::zero());
        o[..tokens * head.value_stride].fill(T::zero());
    }
    for i in 0..tokens {
        let row = &mut p[seen.scores(i)];
        if top[i] > T::NEG_INFINITY {
            total[i] += (head.ops.exp_sum)(row, -top[i]);
        } else {
            row.fill(T::zero());
        }
    }
    seen.add_values(head.ops, p, o, ahead);
}
