//! What gradients are taken of: a problem with all that attention is computed from, random or
//! golden.

use dijiang::Real;
use dijiang::attention::{
    AttentionGradients, Causality, KeyMask, LinearAttention, LinearConfig, Operator, Qkv, Window,
};
use dijiang::kernel::{DctGradients, DctMap, DctParams, Envelope, Pairing, Projection};
use ndarray::{Array3, Axis};

use crate::{Golden, Inputs, cast};

/// Everything a gradient is taken with respect to, and what it is not.
#[derive(Debug, Clone)]
pub struct Problem {
    pub maps: Vec<DctParams>,
    pub heads: usize,
    pub windows: Vec<Window>,
    pub sinks: usize,
    pub log_decay: Vec<f64>,
    pub causal: bool,
    pub valid: Option<Vec<bool>>,
    pub inputs: Inputs<f64>,
    pub cotangent: Array3<f64>,
}

/// What [`Problem::gradients`] gives.
pub type Gradients<T> = AttentionGradients<T, DctGradients>;

impl Problem {
    pub fn attention<T: Real>(&self) -> LinearAttention<T, DctMap<T>> {
        let mut config =
            LinearConfig::new().with_heads(self.heads).with_value_dim(self.inputs.v.shape()[2]);
        config = config.with_log_decay(self.log_decay.clone());
        (config.windows, config.sinks) = (self.windows.clone(), self.sinks);
        config
            .build(self.maps.iter().map(|map| DctMap::from_params(map.clone()).unwrap()).collect())
            .unwrap()
    }

    pub fn mask(&self) -> KeyMask<'_> {
        self.valid.as_deref().map_or(KeyMask::All, KeyMask::Valid)
    }

    /// Σ output · cotangent.
    pub fn loss(&self) -> f64 {
        let (attention, Inputs { q, k, v }) = (self.attention::<f64>(), &self.inputs);
        let out = if self.causal {
            attention.forward(Qkv::new(q, k, v).with_mask(self.mask()))
        } else {
            attention
                .clone()
                .with_causality(Causality::Bidirectional)
                .unwrap()
                .forward(Qkv::new(q, k, v).with_mask(self.mask()))
        };
        (out.unwrap() * &self.cotangent).sum()
    }

    pub fn gradients<T: Real>(&self) -> Gradients<T> {
        let (attention, Inputs { q, k, v }, grad) =
            (self.attention::<T>(), self.inputs.cast(), cast(&self.cotangent));
        let gradients = if self.causal {
            attention.backward(Qkv::new(&q, &k, &v).with_mask(self.mask()), &grad)
        } else {
            attention
                .clone()
                .with_causality(Causality::Bidirectional)
                .unwrap()
                .backward(Qkv::new(&q, &k, &v).with_mask(self.mask()), &grad)
        };
        gradients.unwrap()
    }

    /// The tensors of head `h` that a gradient is taken with respect to, by name.
    pub fn tensors(&mut self, h: usize) -> Vec<(&'static str, &mut [f64])> {
        let map = &mut self.maps[h];
        let (of_query, of_key): (&mut [f64], &mut [f64]) = match &mut map.projection {
            Projection::Dense { query, key } | Projection::Deep { query, key } => (query, key),
            Projection::Dct | Projection::Mixed { .. } => (&mut [], &mut []),
        };
        vec![
            ("q", self.inputs.q.as_slice_mut().unwrap()),
            ("k", self.inputs.k.as_slice_mut().unwrap()),
            ("v", self.inputs.v.as_slice_mut().unwrap()),
            ("query_center", &mut map.query.center),
            ("key_center", &mut map.key.center),
            ("query_scale", &mut map.query.scale),
            ("key_scale", &mut map.key.scale),
            ("query_radii", &mut map.query.radii),
            ("key_radii", &mut map.key.radii),
            ("query_projection", of_query),
            ("key_projection", of_key),
            ("log_weight", &mut map.log_weight),
            ("log_mix", std::slice::from_mut(&mut map.log_mix)),
            ("log_decay", std::slice::from_mut(&mut self.log_decay[h])),
        ]
    }
}

/// A case of `attention_f64.safetensors`.
pub fn golden_problem(golden: &Golden, tag: &str, case: &str) -> Problem {
    let name = |what: &str| format!("{tag}.{what}");
    let one_head = |name: &str| golden.array2(name).insert_axis(Axis(0));
    let inputs = Inputs { q: one_head("q"), k: one_head("k"), v: one_head("v") };
    let flat = |name: &str| golden.array::<ndarray::IxDyn>(name).into_iter().collect::<Vec<f64>>();
    let mut map = DctParams::new(inputs.q.shape()[2]);
    for (side, prefix) in [(&mut map.query, "query"), (&mut map.key, "key")] {
        side.center = flat(&name(&format!("{prefix}_center")));
        side.scale = flat(&name(&format!("{prefix}_scale")));
        side.radii = flat(&name(&format!("{prefix}_radii")));
    }
    map.log_weight = flat(&name("log_weight"));
    map.log_mix = golden.scalar(&name("log_mix"));
    map.pairing = if tag == "b2a" { Pairing::Antithetic } else { Pairing::Single };
    map.envelope = if case == "causal_gaussian" { Envelope::Gaussian } else { Envelope::None };
    let n = inputs.tokens();
    Problem {
        maps: vec![map],
        heads: 1,
        sinks: match case {
            "local_sinks" | "local_sinks_masked" => 4,
            "local_sinks_decay" | "local_kept_decay" => 3,
            _ => 0,
        },
        windows: match case {
            "local" | "local_decay" | "local_sinks" => vec![Window::new(16, 1)],
            "local0" | "local_sinks_decay" => vec![Window::new(8, 0)],
            "local_sinks_masked" => vec![Window::new(8, 1)],
            "local_kept" => vec![Window::new(8, 1).with_kept(10)],
            "local_kept_decay" => vec![Window::new(8, 0).with_kept(7)],
            "local_kept_masked" => vec![Window::new(4, 1).with_kept(5)],
            _ => Vec::new(),
        },
        log_decay: vec![if case.ends_with("decay") { -0.05 } else { 0.0 }],
        causal: !case.starts_with("full"),
        valid: match case {
            "full_masked" => Some((0..n).map(|j| j % 5 != 2).collect()),
            "causal_masked" => Some((0..n).map(|j| j % 5 != 2 || j == 0).collect()),
            "local_sinks_masked" | "local_kept_masked" => {
                Some((0..n).map(|j| j % 5 != 2 && j > 8).collect())
            }
            _ => None,
        },
        inputs,
        cotangent: one_head("cotangent"),
    }
}

/// The cases that the file has gradients of.
pub const CASES: [&str; 15] = [
    "full",
    "causal",
    "causal_gaussian",
    "decay",
    "local",
    "local0",
    "local_decay",
    "full_masked",
    "causal_masked",
    "local_sinks",
    "local_sinks_decay",
    "local_sinks_masked",
    "local_kept",
    "local_kept_decay",
    "local_kept_masked",
];
