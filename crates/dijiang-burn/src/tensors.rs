//! Attention by plain operations of tensors: on every backend, with gradients, in O(n).
//!
//! ```text
//! o_i = (Σ_near e^(s_ij) v_j + Σ_sinks e^(s_ij) v_j + Σ_f e^(a_if) S_f) / (the same with 1 for v)
//! ```
//!
//! Tokens are taken in chunks, all of a segment's chunks at once: the near part is a chunk's
//! product with its own keys and those of the chunks before it, S_f the running sums before them
//! ([`running`]). Every part is weighed by exponents less the largest of all three, which cancels
//! and so has no gradient. A value has a one beside it, so that sums and normaliser are one
//! product.
//!
//! Without a local window the near part is the chunk itself, where each pair's kernel is summed
//! over the features one by one: no product of two factors of it would be safe from overflow there.

use burn::tensor::{Bool, Int, Tensor, TensorData};
use dijiang::attention::Window;

use crate::maps::{FeatureMaps, Prepared, working};
use crate::scan::{FLOOR, HIDDEN, Sums, running};

/// Chunk length without a local window.
const KERNEL_CHUNK: usize = 16;

/// What every sequence of a batch leaves behind for its next tokens, for the key-value heads of one
/// window.
#[derive(Debug, Clone)]
struct GroupState {
    grid: Grid,
    /// Which heads they are, and the same for tensors if they are not all.
    members: Vec<usize>,
    heads: Option<Tensor<1, Int>>,
    /// Sums over all chunks before the tail.
    sums: Sums,
    /// The last chunks, which have not joined the sums: r whole ones and what there is of the next.
    /// Before the beginning there are hidden ones.
    tail: Keys,
    sinks: Sinks,
}

/// Keys and values of tokens one after another, B = b·h_kv sequences of them.
#[derive(Debug, Clone)]
struct Keys {
    /// Scaled keys, `[B, n, d]`.
    k: Tensor<3>,
    /// `[B, n, e + 1]`.
    v: Tensor<3>,
    /// Exponents that hide keys from near queries, `[b, n]`.
    near: Tensor<2>,
    /// Exponents that hide keys and sinks from the sums, `[b, n]`.
    far: Tensor<2>,
}

/// The first unmasked tokens of every sequence. Those that are not there yet are zeros at
/// [`NOWHERE`].
#[derive(Debug, Clone)]
struct Sinks {
    k: Tensor<3>,
    v: Tensor<3>,
    /// `[b, s]`.
    positions: Tensor<2, Int>,
    /// Unmasked tokens so far, `[b, 1]`.
    seen: Tensor<2, Int>,
}

/// A position that no query is behind.
const NOWHERE: i64 = i32::MAX as i64;

/// How the tokens are cut into chunks, and what a query sees of its own and those before.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Grid {
    chunk: usize,
    back: usize,
    /// Near pairs are softmax's, or the kernel's if there is no local window.
    exact: bool,
}

impl Grid {
    fn new(window: Option<Window>) -> Self {
        match window {
            Some(Window { chunk, back, .. }) => Self { chunk, back, exact: true },
            None => Self { chunk: KERNEL_CHUNK, back: 0, exact: false },
        }
    }
}

/// Queries `[b, h, n, d]`, keys `[b, h_kv, n, d]` and values `[b, h_kv, n, e]` of n tokens, and
/// which keys may be attended to, `[b, n]`; all if there is no mask. Queries and keys are times √σ.
#[derive(Debug, Clone)]
pub(crate) struct Tokens {
    pub(crate) q: Tensor<4>,
    pub(crate) k: Tensor<4>,
    pub(crate) v: Tensor<4>,
    pub(crate) valid: Option<Tensor<2, Bool>>,
}

impl Tokens {
    fn narrow(&self, start: usize, len: usize) -> Self {
        let cut = |x: &Tensor<4>| x.clone().narrow(2, start, len);
        let valid = self.valid.clone().map(|valid| valid.narrow(1, start, len));
        Self { q: cut(&self.q), k: cut(&self.k), v: cut(&self.v), valid }
    }
}

/// What a batch of sequences leaves behind for its next tokens, at constant size.
#[derive(Debug, Clone)]
pub(crate) struct State {
    groups: Vec<GroupState>,
    pub(crate) position: usize,
}

impl State {
    /// That of `batch` new sequences. `windows` is empty or has one for each head.
    pub(crate) fn new(maps: &FeatureMaps, windows: &[Window], sinks: usize, batch: usize) -> Self {
        let (heads, m, d) = (maps.heads(), maps.features(), maps.dim());
        let like = working(maps.log_mix.val()).detach();
        let (device, dtype) = (like.device(), like.dtype());
        let mut grids: Vec<(Grid, Vec<usize>)> = Vec::new();
        for head in 0..heads {
            let grid = Grid::new(windows.get(head).copied());
            match grids.iter_mut().find(|(other, _)| *other == grid) {
                Some((_, of_grid)) => of_grid.push(head),
                None => grids.push((grid, vec![head])),
            }
        }
        let groups = grids.into_iter().map(|(grid, of_grid)| {
            let rows = batch * of_grid.len();
            let zeros = |tokens, width| Tensor::<3>::zeros([rows, tokens, width], (&device, dtype));
            let tokens = grid.back * grid.chunk;
            let hidden = Tensor::<2>::full([batch, tokens], HIDDEN, (&device, dtype));
            GroupState {
                grid,
                heads: (of_grid.len() < heads).then(|| head_list(&of_grid, &like)),
                members: of_grid,
                sums: Sums {
                    values: Tensor::zeros([rows, 1, m, d + 1], (&device, dtype)),
                    top: Tensor::full([rows, 1, m], FLOOR, (&device, dtype)),
                },
                tail: Keys {
                    k: zeros(tokens, d),
                    v: zeros(tokens, d + 1),
                    near: hidden.clone(),
                    far: hidden,
                },
                sinks: Sinks {
                    k: zeros(sinks, d),
                    v: zeros(sinks, d + 1),
                    positions: Tensor::full([batch, sinks], NOWHERE, &device),
                    seen: Tensor::zeros([batch, 1], &device),
                },
            }
        });
        Self { groups: groups.collect(), position: 0 }
    }

    /// Bytes of all tensors.
    pub(crate) fn bytes(&self) -> usize {
        let of = |group: &GroupState| {
            let Sums { values, top } = &group.sums;
            let floats = [
                values.shape().num_elements() + top.shape().num_elements(),
                group.tail.k.shape().num_elements() + group.tail.v.shape().num_elements(),
                2 * group.tail.near.shape().num_elements(),
                group.sinks.k.shape().num_elements() + group.sinks.v.shape().num_elements(),
            ];
            let integers = group.sinks.positions.shape().num_elements()
                + group.sinks.seen.shape().num_elements();
            floats.iter().sum::<usize>() * values.dtype().size()
                + integers * group.sinks.seen.dtype().size()
        };
        self.groups.iter().map(of).sum()
    }

    /// The next tokens of every sequence; `[b, h, n, e]`. At most `segment` tokens at a time, in
    /// whole chunks.
    pub(crate) fn extend(
        &mut self,
        maps: &FeatureMaps,
        tokens: &Tokens,
        segment: usize,
    ) -> Tensor<4> {
        let [_, kv_heads, n, _] = tokens.k.dims();
        let position = self.position;
        self.position += n;
        let mut outputs = Vec::new();
        for group in &mut self.groups {
            let prepared = maps.prepare(group.heads.as_ref());
            let tokens = match &group.heads {
                None => tokens.clone(),
                Some(list) => Tokens {
                    q: select_groups(tokens.q.clone(), kv_heads, list),
                    k: tokens.k.clone().select(1, list.clone()),
                    v: tokens.v.clone().select(1, list.clone()),
                    valid: tokens.valid.clone(),
                },
            };
            // A segment ends where a chunk does.
            let step = (segment / group.grid.chunk).max(1) * group.grid.chunk;
            let (mut start, mut parts) = (0, Vec::new());
            while start < n {
                let len = (step - (position + start) % group.grid.chunk).min(n - start);
                let part = if len == n { tokens.clone() } else { tokens.narrow(start, len) };
                parts.push(group.extend(&prepared, part, position + start));
                start += len;
            }
            outputs.push(if parts.len() == 1 { parts.remove(0) } else { Tensor::cat(parts, 2) });
        }
        if outputs.len() == 1 {
            return outputs.remove(0);
        }
        // Back to the order of the heads.
        let mut places = vec![0; kv_heads];
        let order = self.groups.iter().flat_map(|group| &group.members);
        for (place, &head) in order.enumerate() {
            places[head] = place;
        }
        let output = Tensor::cat(outputs, 1);
        let list = head_list(&places, &output);
        select_groups(output, kv_heads, &list)
    }
}

fn head_list<const D: usize>(heads: &[usize], like: &Tensor<D>) -> Tensor<1, Int> {
    let list: Vec<i64> = heads.iter().map(|&head| head as i64).collect();
    Tensor::from_data(TensorData::new(list, [heads.len()]), &like.device())
}

/// The query heads `[b, h, n, d]` of some key-value heads.
fn select_groups(q: Tensor<4>, kv_heads: usize, list: &Tensor<1, Int>) -> Tensor<4> {
    let [batch, heads, n, d] = q.dims();
    let group = heads / kv_heads;
    q.reshape([batch, kv_heads, group * n, d]).select(1, list.clone()).reshape([
        batch,
        list.dims()[0] * group,
        n,
        d,
    ])
}

/// One more column, of ones.
fn with_ones(v: Tensor<3>) -> Tensor<3> {
    let [rows, n, _] = v.dims();
    let ones = Tensor::ones([rows, n, 1], (&v.device(), v.dtype()));
    Tensor::cat(vec![v, ones], 2)
}

/// `[b, …]` as `[b·h_kv, …]`, the same for every head.
fn for_heads(x: Tensor<2>, heads: usize) -> Tensor<2> {
    let [batch, n] = x.dims();
    x.reshape([batch, 1, n]).repeat_dim(1, heads).reshape([batch * heads, n])
}

/// Sums `[…, e + 1]` over their normaliser; zeros where there is no key.
fn normalised(sums: Tensor<4>) -> Tensor<4> {
    let [.., width] = sums.dims();
    let total = sums.clone().narrow(3, width - 1, 1);
    let total = total.clone().mask_fill(total.equal_scalar(0.0), 1.0);
    sums.narrow(3, 0, width - 1) / total
}

/// Some of the tokens, or none.
fn cut<const D: usize>(x: &Tensor<D>, start: usize, len: usize) -> Tensor<D> {
    if len > 0 {
        return x.clone().narrow(1, start, len);
    }
    let mut shape = x.dims();
    shape[1] = 0;
    Tensor::zeros(shape, (&x.device(), x.dtype()))
}

impl Keys {
    fn narrow(&self, start: usize, len: usize) -> Self {
        Self {
            k: cut(&self.k, start, len),
            v: cut(&self.v, start, len),
            near: cut(&self.near, start, len),
            far: cut(&self.far, start, len),
        }
    }

    /// These, `next`, and as many hidden ones as make it `len` in all.
    fn join(&self, next: Self, len: usize) -> Self {
        let [rows, tokens, _] = self.k.dims();
        let fill = len - tokens - next.k.dims()[1];
        let (device, dtype) = (self.k.device(), self.k.dtype());
        let join = |a: &Tensor<3>, b: Tensor<3>| {
            let zeros = Tensor::zeros([rows, fill, a.dims()[2]], (&device, dtype));
            Tensor::cat(vec![a.clone(), b, zeros], 1)
        };
        let join_exponents = |a: &Tensor<2>, b: Tensor<2>| {
            let hidden = Tensor::full([a.dims()[0], fill], HIDDEN, (&device, dtype));
            Tensor::cat(vec![a.clone(), b, hidden], 1)
        };
        Self {
            k: join(&self.k, next.k),
            v: join(&self.v, next.v),
            near: join_exponents(&self.near, next.near),
            far: join_exponents(&self.far, next.far),
        }
    }
}

impl Sinks {
    /// Takes those of the next tokens that are sinks, by one-hot rows: `[b, n]` of ones says which.
    fn take(&mut self, keys: &Keys, valid: &Tensor<2, Int>, position: usize) -> Tensor<2, Int> {
        let ([batch, sinks], [_, n]) = (self.positions.dims(), valid.dims());
        let device = valid.device();
        let rank = self.seen.clone() + valid.clone().cumsum(1);
        self.seen = rank.clone().narrow(1, n - 1, 1);
        let is_sink = rank.clone().lower_equal_scalar(sinks as i64).int() * valid.clone();
        if sinks == 0 {
            return is_sink;
        }
        let heads = keys.k.dims()[0] / batch;
        let slots = Tensor::<1, Int>::arange(1..sinks as i64 + 1, &device).reshape([1, sinks, 1]);
        let picked = (rank * is_sink.clone())
            .reshape([batch, 1, n])
            .repeat_dim(1, sinks)
            .equal(slots.repeat_dim(0, batch).repeat_dim(2, n))
            .int();
        let positions = Tensor::<1, Int>::arange(0..n as i64, &device) + position as i64 - NOWHERE;
        let positions = (picked.clone() * positions.reshape([1, 1, n])).sum_dim(2);
        self.positions = self.positions.clone() + positions.reshape([batch, sinks]);
        let rows =
            for_heads(picked.float().cast(keys.k.dtype()).reshape([batch, sinks * n]), heads)
                .reshape([batch * heads, sinks, n]);
        self.k = self.k.clone() + rows.clone().matmul(keys.k.clone());
        self.v = self.v.clone() + rows.matmul(keys.v.clone());
        is_sink
    }
}

impl GroupState {
    /// The outputs of the next tokens, the first of them at `position`; `[b, h, n, e]`.
    fn extend(&mut self, maps: &Prepared, tokens: Tokens, position: usize) -> Tensor<4> {
        let Grid { chunk, back, .. } = self.grid;
        let ([batch, heads, n, d], [_, kv_heads, _, e]) = (tokens.q.dims(), tokens.v.dims());
        let (rows, group) = (batch * kv_heads, heads / kv_heads);
        let (device, dtype) = (tokens.q.device(), tokens.q.dtype());

        let valid = match tokens.valid {
            Some(valid) => valid.int(),
            None => Tensor::ones([batch, n], &device),
        };
        let hide = |valid: Tensor<2, Int>| valid.equal_scalar(0).float().cast(dtype) * HIDDEN;
        let near = hide(valid.clone());
        // What is hidden must not be looked at, NaN or not.
        let clear = |x: Tensor<4>, width: usize| {
            let hidden = for_heads(near.clone(), kv_heads).reshape([rows, n, 1]);
            let hidden = hidden.lower_scalar(0.0).expand([rows, n, width]);
            x.reshape([rows, n, width]).mask_fill(hidden, 0.0)
        };
        let new = Keys {
            k: clear(tokens.k, d),
            v: with_ones(clear(tokens.v, e)),
            near: near.clone(),
            far: near,
        };
        let is_sink = self.sinks.take(&new, &valid, position);
        let new = Keys { far: hide(valid - is_sink), ..new };

        // The chunks of the queries, and what lies before the first of them in its chunk.
        let offset = position % chunk;
        let chunks = (offset + n).div_ceil(chunk);
        let keys = self.tail.join(new, (back + chunks) * chunk);
        let whole = (offset + n) / chunk;
        let sums = self.absorb(maps, &keys.narrow(0, whole * chunk), kv_heads);
        let before = Sums {
            values: sums.values.clone().narrow(1, 0, chunks),
            top: sums.top.clone().narrow(1, 0, chunks),
        };

        // Queries of one chunk alone need no others beside them.
        let (first, per_chunk) = if chunks == 1 { (offset, n) } else { (0, chunk) };
        let q = tokens.q.reshape([rows, group, n, d]);
        let fill = |tokens| Tensor::zeros([rows, group, tokens, d], (&device, dtype));
        let q = if chunks * per_chunk == n {
            q
        } else {
            Tensor::cat(vec![fill(offset), q, fill(chunks * chunk - offset - n)], 2)
        };
        // [B, chunks, group·per_chunk, d]
        let q = q.reshape([rows, group, chunks, per_chunk, d]).swap_dims(1, 2).reshape([
            rows,
            chunks,
            group * per_chunk,
            d,
        ]);
        let block = Block { q, group, first, per_chunk, kv_heads, start: position / chunk };
        let out = self.outputs(maps, &block, &keys, before);

        self.sums =
            Sums { values: sums.values.narrow(1, whole, 1), top: sums.top.narrow(1, whole, 1) };
        self.tail = keys.narrow(whole * chunk, back * chunk + (offset + n) % chunk);
        let out = out.reshape([rows, chunks, group, per_chunk, e]).swap_dims(1, 2).reshape([
            batch,
            heads,
            chunks * per_chunk,
            e,
        ]);
        if chunks * per_chunk == n { out } else { out.narrow(2, offset, n) }
    }

    /// The running sums before each of the whole chunks `keys`, of which there may be none, and
    /// after the last.
    fn absorb(&self, maps: &Prepared, keys: &Keys, kv_heads: usize) -> Sums {
        let chunk = self.grid.chunk;
        let [rows, n, d] = keys.k.dims();
        let chunks = n / chunk;
        if chunks == 0 {
            return self.sums.clone();
        }
        let (batch, width) = (rows / kv_heads, keys.v.dims()[2]);
        let features = maps.key_features(keys.k.clone().reshape([batch, kv_heads, n, d]));
        let m = features.dims()[3];
        let decay = decay_of(maps, batch);
        // What a key has lost at the end of its chunk.
        let lost = steps(&(0..chunk).map(|j| chunk - j).collect::<Vec<_>>(), &decay);
        let hidden = for_heads(keys.far.clone(), kv_heads).reshape([rows, chunks, chunk, 1]);
        let exponents = features.reshape([rows, chunks, chunk, m]) + hidden + lost;
        let top = exponents.clone().detach().max_dim(2).clamp_min(FLOOR);
        let weights = (exponents - top.clone()).exp();
        let values = keys.v.clone().reshape([rows, chunks, chunk, width]);
        let chunks = Sums {
            values: weights.swap_dims(2, 3).matmul(values),
            top: top.reshape([rows, chunks, m]),
        };
        running(chunks, self.sums.clone(), &(decay.reshape([rows, 1, 1]) * chunk as f64))
    }

    /// `[B, chunks, group·per_chunk, e]`.
    fn outputs(&self, maps: &Prepared, block: &Block, keys: &Keys, before: Sums) -> Tensor<4> {
        let Grid { chunk, back, exact } = self.grid;
        let [rows, chunks, queries, d] = block.q.dims();
        let (batch, kv_heads) = (rows / block.kv_heads, block.kv_heads);
        let (device, dtype) = (block.q.device(), block.q.dtype());
        let decay = decay_of(maps, batch);

        let a =
            maps.query_features(block.q.clone().reshape([batch, kv_heads, chunks * queries, d]));
        let m = a.dims()[3];
        let a = a.reshape([rows, chunks, queries, m]);

        // Near keys: each chunk's own and those of the chunks before it.
        let span = (back + 1) * chunk;
        let windows = |x: Tensor<4>| {
            let parts = (0..=back).map(|j| x.clone().narrow(1, j, chunks)).collect::<Vec<_>>();
            if back == 0 { x } else { Tensor::cat(parts, 2) }
        };
        let by_chunk = |x: Tensor<3>| {
            let [rows, _, width] = x.dims();
            windows(x.reshape([rows, back + chunks, chunk, width]))
        };
        let k = by_chunk(keys.k.clone());
        let hidden =
            for_heads(keys.near.clone(), kv_heads).reshape([rows, (back + chunks) * chunk, 1]);
        let hidden = by_chunk(hidden).swap_dims(2, 3);
        let later = block.later(back * chunk, span);
        let later =
            Tensor::<4>::from_data(TensorData::new(later, [1, 1, queries, span]), (&device, dtype));
        let scores = if exact {
            block.q.clone().matmul(k.swap_dims(2, 3))
        } else {
            let b = maps.key_features(k.reshape([batch, kv_heads, chunks * span, d]));
            let b = b.reshape([rows, chunks, 1, span, m]);
            let pairs = a.clone().reshape([rows, chunks, queries, 1, m]) + b;
            let top = pairs.clone().detach().max_dim(4);
            let sums = (pairs - top.clone()).exp().sum_dim(4);
            let lost = block.distances(span);
            let lost = Tensor::<4>::from_data(
                TensorData::new(lost, [1, 1, queries, span]),
                (&device, dtype),
            );
            (sums.log() + top).reshape([rows, chunks, queries, span])
                + lost * decay.clone().reshape([rows, 1, 1, 1])
        };
        let scores = scores + hidden + later;

        // Far keys: what their sums have lost since the end of the last chunk in them.
        let since: Vec<usize> = block.rows().map(|row| back * chunk + row).collect();
        let far = a + before.top.reshape([rows, chunks, 1, m]) + steps(&since, &decay);

        let mut top = scores.clone().detach().max_dim(3).max_pair(far.clone().detach().max_dim(3));
        let sinks = (self.sinks.positions.dims()[1] > 0).then(|| {
            let count = self.sinks.positions.dims()[1];
            let flat = block.q.clone().reshape([rows, chunks * queries, d]);
            let scores = flat.matmul(self.sinks.k.clone().swap_dims(1, 2));
            let outside = self.outside(block, chunks, (&device, dtype));
            scores.reshape([rows, chunks, queries, count])
                + for_heads(outside, kv_heads).reshape([rows, chunks, 1, count])
        });
        if let Some(scores) = &sinks {
            top = top.max_pair(scores.clone().detach().max_dim(3));
        }
        let top = top.clamp_min(FLOOR);

        let near = (scores - top.clone()).exp().matmul(by_chunk(keys.v.clone()));
        let far = (far - top.clone()).exp().matmul(before.values);
        let mut total = near + far;
        if let Some(scores) = sinks {
            let [.., count] = scores.dims();
            let weights = (scores - top).exp().reshape([rows, chunks * queries, count]);
            let width = total.dims()[3];
            total = total
                + weights.matmul(self.sinks.v.clone()).reshape([rows, chunks, queries, width]);
        }
        normalised(total)
    }

    /// Exponents that hide the sinks which are in a chunk's window, or not there yet:
    /// `[b, chunks·s]`.
    fn outside(
        &self,
        block: &Block,
        chunks: usize,
        (device, dtype): (&burn::tensor::Device, burn::tensor::DType),
    ) -> Tensor<2> {
        let [batch, sinks] = self.sinks.positions.dims();
        let begin = (0..chunks).map(|i| {
            (block.start + i).saturating_sub(self.grid.back) as i64 * self.grid.chunk as i64
        });
        let begin = Tensor::<1, Int>::from_data(
            TensorData::new(begin.collect::<Vec<i64>>(), [chunks]),
            device,
        );
        let inside = self
            .sinks
            .positions
            .clone()
            .reshape([batch, 1, sinks])
            .repeat_dim(1, chunks)
            .greater_equal(begin.reshape([1, chunks, 1]).repeat_dim(0, batch).repeat_dim(2, sinks));
        (inside.float().cast(dtype) * HIDDEN).reshape([batch, chunks * sinks])
    }
}

/// The queries of some chunks.
struct Block {
    /// `[B, chunks, group·per_chunk, d]`.
    q: Tensor<4>,
    group: usize,
    /// Place of the first query in its chunk.
    first: usize,
    per_chunk: usize,
    kv_heads: usize,
    /// Which chunk of the sequence the first one is.
    start: usize,
}

impl Block {
    /// Places of the queries in their chunk, head after head.
    fn rows(&self) -> impl Iterator<Item = usize> {
        let rows = self.first..self.first + self.per_chunk;
        (0..self.group).flat_map(move |_| rows.clone())
    }

    /// Exponents that hide later keys of a query's own chunk, which begins at `own` of `span`.
    fn later(&self, own: usize, span: usize) -> Vec<f64> {
        let of_row = |row| (0..span).map(move |key| if key > own + row { HIDDEN } else { 0.0 });
        self.rows().flat_map(of_row).collect()
    }

    /// Tokens from each key of the chunk to each query behind it.
    fn distances(&self, span: usize) -> Vec<f64> {
        let of_row = |row: usize| (0..span).map(move |key| row.saturating_sub(key) as f64);
        self.rows().flat_map(of_row).collect()
    }
}

/// log γ ≤ 0 for every row of a batch, `[B, 1, 1, 1]`.
fn decay_of(maps: &Prepared, batch: usize) -> Tensor<4> {
    let [kv_heads] = maps.log_decay.dims();
    let decay = maps.log_decay.clone().reshape([1, kv_heads]).repeat_dim(0, batch);
    decay.reshape([batch * kv_heads, 1, 1, 1])
}

/// `decay` over so many tokens, `[B, 1, len, 1]`.
fn steps(tokens: &[usize], decay: &Tensor<4>) -> Tensor<4> {
    let values: Vec<f64> = tokens.iter().map(|&tokens| tokens as f64).collect();
    let data = TensorData::new(values, [1, 1, tokens.len(), 1]);
    Tensor::<4>::from_data(data, (&decay.device(), decay.dtype())) * decay.clone()
}

/// Full attention, every query over every key: `[b, h, n, e]`.
pub(crate) fn full(maps: &FeatureMaps, tokens: Tokens) -> Tensor<4> {
    let ([batch, heads, n, d], [_, kv_heads, _, e]) = (tokens.q.dims(), tokens.v.dims());
    let (rows, dtype) = (batch * kv_heads, tokens.q.dtype());
    let prepared = maps.prepare(None);
    let mut keys = (tokens.k, tokens.v);
    let mut exponents = None;
    if let Some(valid) = tokens.valid {
        let hidden = valid.bool_not().reshape([batch, 1, n, 1]);
        keys.0 = keys.0.mask_fill(hidden.clone().expand([batch, kv_heads, n, d]), 0.0);
        keys.1 = keys.1.mask_fill(hidden.clone().expand([batch, kv_heads, n, e]), 0.0);
        exponents = Some(hidden.float().cast(dtype) * HIDDEN);
    }
    let (k, v) = keys;
    let b = prepared.key_features(k);
    let b = match exponents {
        Some(exponents) => b + exponents,
        None => b,
    };
    let m = b.dims()[3];
    let frame = b.clone().detach().max_dim(2).clamp_min(FLOOR);
    let weights = (b - frame.clone()).exp().swap_dims(2, 3).reshape([rows, 1, m, n]);
    let sums = weights.matmul(with_ones(v.reshape([rows, n, e])).unsqueeze_dim(1));

    let q = tokens.q.reshape([batch, kv_heads, heads / kv_heads * n, d]);
    let a = prepared.query_features(q) + frame;
    let top = a.clone().detach().max_dim(3).clamp_min(FLOOR);
    let weights = (a - top).exp().reshape([rows, 1, heads / kv_heads * n, m]);
    normalised(weights.matmul(sums)).reshape([batch, heads, n, e])
}
