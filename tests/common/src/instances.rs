//! What most tests call for the stand-ins, compiled here for both element types, so that tests need
//! not compile it again, without optimisation.

use dijiang::Real;
use dijiang::attention::{KeyMask, Qkv};
use ndarray::Array2;

use crate::linear::Setup;
use crate::stream::Stream;
use crate::{Inputs, assert_close, assert_same_bits, to_f64};

/// Nobody calls these; that they are kept is what has them compiled.
#[used]
static INSTANCES: [fn(); 2] = [everything::<f32>, everything::<f64>];

fn everything<T: Real>() {
    let setup = Setup::new(0);
    let (linear, exact) = (setup.build::<T>(), setup.build_exact::<T>());
    let inputs = setup.inputs(1, 1).cast::<T>();
    operator(&linear, &inputs);
    operator(&exact, &inputs);
}

fn operator<T: Real, O: Stream<T>>(operator: &O, inputs: &Inputs<T>) {
    let (mut state, mut workspace) = (operator.new_state(), operator.workspace());
    let [q, k, v] = inputs.token(0);
    let mut out = Array2::zeros((1, 1));
    operator.step(&mut state, Qkv::token(&q, &k, &v), &mut out, &mut workspace).unwrap();
    operator.steps(&mut state, inputs);
    operator.prefill_of(&mut state, inputs, KeyMask::All).unwrap();
    operator.causal_of(inputs, KeyMask::All).unwrap();
    let out = operator.full_of(inputs, KeyMask::All).unwrap();
    assert_close("", &out, &to_f64(&out), 0.0);
    assert_same_bits("", &out, &out);
}
