//! Gradients through sequence-parallel attention.
//!
//! ```text
//! keys ── states ── own outputs ── gradients of sums ── later readers of own keys ── tokens
//! ```
//!
//! A rank's keys are read by its own queries and, through the state behind its piece, by those of
//! later ranks. What these find of the sums before their piece is scanned from the last rank to the
//! first; what they find of single tokens, sinks and those of the window before their piece, is
//! gathered.

use std::ops::AddAssign;

use dijiang::Real;
use dijiang::attention::{
    AttentionGradients, CausalState, LinearAttention, Operator, Qkv, StateGradients,
};
use dijiang::kernel::{DctGradients, DifferentiableMap, FeatureMap};
use ndarray::{Array1, Array2, ArrayRef3, s};

use crate::attention::{States, check, check_shape, valid};
use crate::error::Result;
use crate::fingerprint::Fingerprint;
use crate::ranks::{Opening, Ranks, attempt};
use crate::scan::{Carrier, End};

/// Of one operator's inputs and maps.
type Gradients<T> = AttentionGradients<T, DctGradients>;

impl Ranks {
    /// Gradients through [`prefill`](Self::prefill), from its gradient with respect to this rank's
    /// outputs: what [`prefill_backward`](LinearAttention::prefill_backward) gives for all pieces
    /// at once, up to rounding. Collective.
    ///
    /// Those of maps and decays are this rank's share: added up over all ranks they are the
    /// gradients, as those of a model's other parameters are. On rank 0 come those with respect to
    /// `state`, the one the sequence goes on from; the others return none, and their `state` is not
    /// looked at.
    ///
    /// # Shapes
    /// - `qkv` as for [`prefill`](Self::prefill), n tokens; `grad_out`: `[h, n, e]`.
    ///
    /// # Cost
    /// The backward pass of the piece, and its keys' part twice more: once for the state before,
    /// once for later readers. Bytes sent do not depend on the number of tokens.
    ///
    /// # Errors
    /// The same on all ranks, as [`prefill`](Self::prefill), and for windows with kept keys.
    pub fn backward<T: Real, M: DifferentiableMap<T, Gradients = DctGradients>>(
        &self,
        attention: &LinearAttention<T, M>,
        state: &CausalState<T>,
        qkv: Qkv<'_, T>,
        grad_out: &ArrayRef3<T>,
    ) -> Result<(Gradients<T>, Vec<StateGradients<T>>)> {
        let [_, k, v] = qkv.arrays();
        let tokens = k.shape()[1];
        let place = self.open(attempt(|| {
            attention.check_state(state)?;
            check(attention, qkv)?;
            // A rank knows the tokens that later ones see as they are by their places.
            if attention.windows().iter().any(|window| window.kept > 0) {
                let (argument, other) = ("window kept", "the backward pass over ranks");
                return Err(dijiang::Error::Conflict { argument, other });
            }
            let shape = [attention.heads(), tokens, attention.value_dim()];
            check_shape("grad_out", &grad_out.view(), shape)?;
            let fingerprint = Fingerprint::new("backward", self.scan(), attention)?;
            let valid = valid(tokens, qkv.mask());
            Ok(Opening { tokens, valid, position: state.position(), fingerprint })
        }))?;
        let own = self.agree(attempt(|| {
            self.absorb(attention, state, place, qkv, &mut attention.workspace())
        }))?;
        let before = self.exclusive(&mut States::of(attention), &own);
        let (before, mut gradients, mut of_state) = self.agree(before.and_then(|before| {
            attempt(|| {
                let before = before.unwrap_or_else(|| state.clone());
                let (gradients, of_state) = match tokens {
                    0 => (nothing(attention)?, attention.new_state_gradients(&before)?),
                    _ => attention.prefill_backward(&before, qkv, grad_out, None)?,
                };
                Ok((before, gradients, of_state))
            })
        }))?;
        let after = self.exclusive(&mut Later { attention }, &of_state);
        let rows = self.agree(after.and_then(|after| {
            attempt(|| {
                match after {
                    Some(after) if tokens == 0 => {
                        of_state = Later { attention }.join(after, &of_state)?;
                    }
                    Some(after) => {
                        let kv = (&*k, &*v);
                        let (later, through) =
                            attention.extend_backward(&before, kv, qkv.mask(), &after)?;
                        add(&mut gradients, &later);
                        for (own, through) in of_state.iter_mut().zip(&through) {
                            own.sums += &through.sums;
                            own.norm += &through.norm;
                            own.keys += &through.keys;
                            own.values += &through.values;
                        }
                    }
                    None => {}
                }
                Ok(write_tokens(attention, &of_state))
            })
        }))?;
        for bytes in self.all_gather(&rows).iter().skip(self.rank() + 1) {
            read_tokens(attention, bytes, |h, position, key, value| {
                if let Some(token) = position.checked_sub(place.start) {
                    if token < tokens {
                        gradients.k.slice_mut(s![h, token, ..]).add_assign(&key);
                        gradients.v.slice_mut(s![h, token, ..]).add_assign(&value);
                    }
                } else if self.rank() == 0 {
                    let own = &mut of_state[h];
                    if let Some(row) = own.positions.iter().position(|&own| own == position) {
                        own.keys.row_mut(row).add_assign(&key);
                        own.values.row_mut(row).add_assign(&value);
                    }
                }
            });
        }
        if self.rank() > 0 {
            of_state.clear();
        }
        Ok((gradients, of_state))
    }
}

/// The gradients of no tokens.
fn nothing<T: Real, M: DifferentiableMap<T, Gradients = DctGradients>>(
    attention: &LinearAttention<T, M>,
) -> dijiang::Result<Gradients<T>> {
    let mut gradients = attention.new_gradients(0, 0)?;
    gradients.maps = attention.maps().iter().map(|map| map.gradients(&map.new_sums())).collect();
    gradients.log_decay = vec![0.0; attention.maps().len()];
    Ok(gradients)
}

/// Of keys, values, maps and decays.
fn add<T: Real>(gradients: &mut Gradients<T>, later: &Gradients<T>) {
    gradients.k += &later.k;
    gradients.v += &later.v;
    gradients.maps.iter_mut().zip(&later.maps).for_each(|(sum, map)| sum.add(map));
    let decays = gradients.log_decay.iter_mut().zip(&later.log_decay);
    decays.for_each(|(sum, decay)| *sum += decay);
}

/// What later readers find of the sums.
struct Later<'a, T: Real, M> {
    attention: &'a LinearAttention<T, M>,
}

impl<T: Real, M: FeatureMap<T>> Carrier for Later<'_, T, M> {
    type Item = Vec<StateGradients<T>>;

    const FROM: End = End::Last;

    /// Per head: whether there is a frame, its position, c, and the gradients of z and S.
    fn write(&self, heads: &Self::Item) -> Vec<u8> {
        let mut words = Words::default();
        for head in heads {
            let (reference, position) = match &head.frame {
                Some((reference, position)) => (reference.clone(), Some(*position)),
                None => (Array1::zeros(head.norm.len()), None),
            };
            words.put(position.map_or(0, |position| 1 + position as u64));
            reference.iter().chain(&head.norm).chain(&head.sums).for_each(|x| words.number(x));
        }
        words.0
    }

    fn read(&self, bytes: &[u8]) -> dijiang::Result<Self::Item> {
        let words = &mut words(bytes);
        let heads = self.attention.maps().iter().map(|map| {
            let (m, d, e) = (map.features(), map.dim(), self.attention.value_dim());
            let position = words.next().unwrap_or(0).checked_sub(1);
            let reference: Array1<T> = numbers(words, m);
            let norm = numbers(words, m);
            let sums: Array1<T> = numbers(words, m * e);
            StateGradients {
                sums: Array2::from_shape_fn((m, e), |(f, i)| sums[f * e + i]),
                norm,
                frame: position.map(|position| (reference, position as usize)),
                positions: Vec::new(),
                keys: Array2::zeros((0, d)),
                values: Array2::zeros((0, e)),
            }
        });
        Ok(heads.collect())
    }

    fn join(&mut self, far: Self::Item, near: &Self::Item) -> dijiang::Result<Self::Item> {
        let mut near = near.clone();
        for ((near, far), &decay) in near.iter_mut().zip(&far).zip(self.attention.log_decay()) {
            near.add_later(far, decay)?;
        }
        Ok(near)
    }
}

/// Gradients of the tokens that a state remembers, room for all it can: per head and token the
/// position and one more, 0 without a token, and gradients of key and value.
fn write_tokens<T: Real, M: FeatureMap<T>>(
    attention: &LinearAttention<T, M>,
    heads: &[StateGradients<T>],
) -> Vec<u8> {
    let mut words = Words::default();
    for (h, head) in heads.iter().enumerate() {
        let (d, e) = (head.keys.ncols(), head.values.ncols());
        for row in 0..room(attention, h) {
            match head.positions.get(row) {
                Some(&position) => {
                    words.put(1 + position as u64);
                    let numbers = head.keys.row(row);
                    numbers.iter().chain(head.values.row(row)).for_each(|x| words.number(x));
                }
                None => (0..1 + d + e).for_each(|_| words.put(0)),
            }
        }
    }
    words.0
}

/// What [`write_tokens`] wrote: head, position, and gradients of key and value.
fn read_tokens<T: Real, M: FeatureMap<T>>(
    attention: &LinearAttention<T, M>,
    bytes: &[u8],
    mut visit: impl FnMut(usize, usize, Array1<T>, Array1<T>),
) {
    let words = &mut words(bytes);
    for (h, map) in attention.maps().iter().enumerate() {
        for _ in 0..room(attention, h) {
            let position = words.next().unwrap_or(0).checked_sub(1);
            let key = numbers(words, map.dim());
            let value = numbers(words, attention.value_dim());
            if let Some(position) = position {
                visit(h, position as usize, key, value);
            }
        }
    }
}

/// Tokens that the state of head `h` remembers, at most.
fn room<T: Real, M: FeatureMap<T>>(attention: &LinearAttention<T, M>, h: usize) -> usize {
    let window = attention.windows().get(h);
    window.map_or(0, |window| window.chunk * (window.back + 1) + attention.sinks())
}

/// Words as bytes.
#[derive(Default)]
struct Words(Vec<u8>);

impl Words {
    fn put(&mut self, word: u64) {
        self.0.extend_from_slice(&word.to_le_bytes());
    }

    fn number<T: Real>(&mut self, x: &T) {
        self.put(x.to_f64().to_bits());
    }
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.as_chunks().0.iter().map(|&word| u64::from_le_bytes(word))
}

/// The next `n` numbers.
fn numbers<T: Real>(words: &mut impl Iterator<Item = u64>, n: usize) -> Array1<T> {
    words.take(n).map(|word| T::from_f64(f64::from_bits(word))).collect()
}
