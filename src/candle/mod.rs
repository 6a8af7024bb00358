//! Attention on [candle](candle_core)'s CPU tensors: functions with gradients, and a module.
//! Feature `candle`.
//!
//! [`causal`] and [`full`] take q, k, v as candle's models lay them out and are operations of its
//! graph: their backward pass is this crate's, in O(n), for q, k, v and every parameter of the
//! maps.
//!
//! ```
//! use candle_core::{Device, Tensor, Var};
//! use dijiang::attention::Window;
//! use dijiang::candle::{AttentionOptions, MapTensors, causal};
//! use dijiang::kernel::DctMapConfig;
//!
//! // Two sequences of 100 tokens, four query heads that share two key-value heads of dimension 16.
//! let q = Var::randn(0f32, 1.0, (2, 4, 100, 16), &Device::Cpu)?;
//! let [k, v] = [(); 2].map(|()| Tensor::randn(0f32, 1.0, (2, 2, 100, 16), &Device::Cpu));
//! let (k, v) = (k?, v?);
//! let maps = (0..2).map(|h| MapTensors::new(&DctMapConfig::new().with_seed(h).params(16)?, 0.0));
//! let maps = maps.collect::<Result<Vec<_>, _>>()?;
//!
//! let options = AttentionOptions::new().with_windows(&[Window::new(16, 1)], 4);
//! let out = causal(&q, &k, &v, &maps, &options)?;
//! assert_eq!(out.dims(), [2, 4, 100, 16]);
//! let gradients = out.sqr()?.sum_all()?.backward()?;
//! assert_eq!(gradients.get(&q).expect("q is a variable").dims(), q.dims());
//! # Ok::<(), candle_core::Error>(())
//! ```
//!
//! # Why a feature, and not a crate of its own
//!
//! candle brings about a hundred crates and minutes of compiling; with the feature off none of it
//! is there, and neither tests nor examples of the rest need it. As a feature it reaches into q, k
//! and v where they lie, by what the crate does not show to others, and there is one version to
//! choose instead of two that have to fit. It is bound to one minor version of candle, as a crate
//! would be.

mod maps;
mod module;
mod ops;
mod rotate;
mod state;
mod tensors;

pub use maps::{MapTensors, ProjectionTensors, SideTensors};
pub use module::CandleAttention;
pub use ops::{AttentionOptions, causal, full};
pub use state::CandleState;
pub use tensors::HeadLayout;
