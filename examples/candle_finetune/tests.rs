#![allow(clippy::unwrap_used, reason = "a test may panic")]

use candle_core::{DType, Device, Tensor, Var};

use crate::adamw::AdamW;
use crate::{checkpoint, order, rate};

fn parameters() -> Vec<(String, Var)> {
    let var = |name: &str, shape: &[usize], dtype| {
        let values =
            Tensor::arange(1f32, 1.0 + shape.iter().product::<usize>() as f32, &Device::Cpu)
                .unwrap();
        let values = values.reshape(shape).unwrap().to_dtype(dtype).unwrap();
        (name.to_owned(), Var::from_tensor(&values).unwrap())
    };
    vec![
        var("q_proj.weight", &[2, 3], DType::F32),
        var("self_attn.dijiang.0.log_mix", &[], DType::F64),
    ]
}

/// Steps from `first` on down Σ x³.
fn descend(vars: &[(String, Var)], optimizer: &mut AdamW, first: usize, last: usize) {
    for step in first..last {
        let cubes =
            |var: &Var| var.powf(3.0).unwrap().sum_all().unwrap().to_dtype(DType::F64).unwrap();
        let loss = (cubes(&vars[0].1) + cubes(&vars[1].1)).unwrap();
        optimizer.step(&loss.backward().unwrap(), rate(step, 10, 0.1)).unwrap();
    }
}

fn values(vars: &[(String, Var)]) -> Vec<Vec<f64>> {
    let values =
        |var: &Var| var.flatten_all().unwrap().to_dtype(DType::F64).unwrap().to_vec1().unwrap();
    vars.iter().map(|(_, var)| values(var)).collect()
}

#[test]
fn a_resumed_run_has_the_bits_of_one_that_went_on() {
    let path =
        std::env::temp_dir().join(format!("candle_finetune_{}.safetensors", std::process::id()));
    let whole = parameters();
    descend(&whole, &mut AdamW::new(whole.clone(), 10.0).unwrap(), 0, 10);

    let begun = parameters();
    let mut optimizer = AdamW::new(begun.clone(), 10.0).unwrap();
    descend(&begun, &mut optimizer, 0, 4);
    checkpoint::save(&path, &optimizer, &[1.0, 2.0]).unwrap();

    let resumed = parameters();
    let mut optimizer = AdamW::new(resumed.clone(), 10.0).unwrap();
    let other = checkpoint::resume(&path, &mut optimizer, &[1.0, 3.0]).unwrap_err().to_string();
    assert!(other.contains("made with other options"), "{other}");
    checkpoint::resume(&path, &mut optimizer, &[1.0, 2.0]).unwrap();
    assert_eq!((optimizer.step, values(&resumed)), (4, values(&begun)));
    descend(&resumed, &mut optimizer, 4, 10);
    assert_eq!(values(&resumed), values(&whole));
    std::fs::remove_file(path).unwrap();
}

#[test]
fn steps_rise_and_fall() {
    let rates: Vec<f64> = (0..100).map(|step| rate(step, 100, 1.0)).collect();
    assert!(rates[..10].is_sorted() && rates[10..].is_sorted_by(|a, b| a >= b));
    assert_eq!((rates[0], rates[9]), (0.1, 1.0));
    assert!(rates[99] < 1e-3 && rates[99] > 0.0);
    assert!(rate(0, 1, 1.0) > 0.0);
}

#[test]
fn every_window_comes_before_one_comes_again() {
    let order = order(7, 20, 3);
    let mut first = order[..7].to_vec();
    first.sort();
    assert_eq!(first, [0, 1, 2, 3, 4, 5, 6]);
    assert!(order.len() >= 20);
    assert_ne!(order[..7], order[7..14]);
}
