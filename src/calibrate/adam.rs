//! Adam on the numbers of one head's map.
//!
//! ```text
//! m ← β₁m + (1 − β₁)ġ     v ← β₂v + (1 − β₂)ġ²     θ ← θ − η (m/(1 − β₁ᵏ)) / (√(v/(1 − β₂ᵏ)) + ε)
//! ```
//! [Kingma, Ba 2015]
//!
//! θ: scales and radii of both sides (of one, if they are tied), log-weights, the numbers of a deep
//! or dense projection, and by choice the mix g, the centres, and ρ with log γ = −e^ρ.

use super::objective::{HeadGradient, HeadParams};
use crate::kernel::{DctGradients, DctParams, Sides};

const BETA: (f64, f64) = (0.9, 0.999);
/// Far below any gradient of an error of about 1 that matters.
const EPSILON: f64 = 1e-12;
/// log γ from which a head without decay starts to learn one.
const SLIGHT: f64 = -1e-4;

/// Which of the numbers move that do not always.
#[derive(Debug, Clone, Copy)]
pub(super) struct Moved {
    pub(super) mix: bool,
    pub(super) centers: bool,
    pub(super) decay: bool,
}

/// One head on its way down.
#[derive(Debug, Clone)]
pub(super) struct Adam {
    pub(super) head: HeadParams,
    moved: Moved,
    mean: Vec<f64>,
    square: Vec<f64>,
    steps: i32,
    /// Whether it left the numbers that make a map: it stays where it is then.
    lost: bool,
}

impl Adam {
    pub(super) fn new(head: HeadParams, moved: Moved) -> Self {
        let mut head = head;
        if moved.decay && head.log_decay == 0.0 {
            head.log_decay = SLIGHT;
        }
        Self { head, moved, mean: Vec::new(), square: Vec::new(), steps: 0, lost: false }
    }

    pub(super) fn step(&mut self, gradient: Option<&HeadGradient>, rate: f64) {
        let gradient = gradient
            .map(|gradient| self.gradient(gradient))
            .filter(|gradient| gradient.iter().all(|x| x.is_finite()));
        let Some(gradient) = gradient.filter(|_| !self.lost) else {
            self.lost = true;
            return;
        };
        self.steps += 1;
        self.mean.resize(gradient.len(), 0.0);
        self.square.resize(gradient.len(), 0.0);
        let (first, second) = (1.0 - BETA.0.powi(self.steps), 1.0 - BETA.1.powi(self.steps));
        let Moved { mix, centers, decay } = self.moved;
        let mut rho = [if decay { (-self.head.log_decay).ln() } else { 0.0 }];
        let numbers = numbers(&mut self.head.params, mix, centers).into_iter().flatten();
        let moments = self.mean.iter_mut().zip(&mut self.square);
        for ((number, (mean, square)), gradient) in
            numbers.chain(&mut rho).zip(moments).zip(&gradient)
        {
            *mean += (1.0 - BETA.0) * (gradient - *mean);
            *square += (1.0 - BETA.1) * (gradient * gradient - *square);
            *number -= rate * (*mean / first) / ((*square / second).sqrt() + EPSILON);
        }
        if decay {
            self.head.log_decay = -rho[0].exp();
        }
        let DctParams { sides, query, key, projection, .. } = &mut self.head.params;
        if *sides == Sides::Tied {
            key.scale.clone_from(&query.scale);
            key.radii.clone_from(&query.radii);
            let (query, key) = projection.sides_mut();
            key.copy_from_slice(query);
        }
    }

    /// The gradient in the order of [`numbers`], and that of ρ, if it is moved.
    fn gradient(&self, gradient: &HeadGradient) -> Vec<f64> {
        let Moved { mix, centers, decay } = self.moved;
        let DctGradients { query, key, log_weight, log_mix, .. } = &gradient.params;
        let mut all = Vec::new();
        for (query, key) in [
            (&query.scale, &key.scale),
            (&query.radii, &key.radii),
            (&query.projection, &key.projection),
        ] {
            match self.head.params.sides {
                Sides::Tied => all.extend(query.iter().zip(key).map(|(a, b)| a + b)),
                Sides::Untied => all.extend(query.iter().chain(key)),
            }
        }
        all.extend(log_weight);
        all.extend(mix.then_some(log_mix));
        if centers {
            all.extend(query.center.iter().chain(&key.center));
        }
        if decay {
            all.push(gradient.log_decay * self.head.log_decay);
        }
        all
    }
}

/// The numbers that move, but for decay.
fn numbers(params: &mut DctParams, mix: bool, centers: bool) -> Vec<&mut [f64]> {
    let DctParams { projection, sides, query, key, log_weight, log_mix, .. } = params;
    let mut all: Vec<&mut [f64]> = Vec::new();
    for (query, key) in [
        (&mut query.scale[..], &mut key.scale[..]),
        (&mut query.radii[..], &mut key.radii[..]),
        projection.sides_mut(),
    ] {
        all.push(query);
        if *sides == Sides::Untied {
            all.push(key);
        }
    }
    all.push(log_weight);
    if mix {
        all.push(std::slice::from_mut(log_mix));
    }
    if centers {
        all.push(&mut query.center);
        all.push(&mut key.center);
    }
    all
}
