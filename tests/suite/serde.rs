//! States and configs through serde: JSON stands for any format.

use dijiang::attention::Operator;
use dijiang::attention::{CausalState, KeyMask, LinearConfig, SoftmaxConfig, Storage, Window};
use dijiang::calibrate::CalibrateOptions;
use dijiang::kernel::{DctMapConfig, FavorConfig, Mixing};
use dijiang::layer::{AttentionConfig, Causality, DijiangOptions, Padding, Rotary, RotaryScaling};
use dijiang_testing::linear::Setup;
use dijiang_testing::stream::Stream;
use serde::de::value::{BytesDeserializer, Error as ValueError};
use serde::de::{Deserialize, DeserializeOwned};
use serde::ser::Serialize;
use std::fmt::Debug;

fn state(setup: &Setup) -> CausalState<f32> {
    let attention = setup.build::<f32>();
    let mut state = attention.new_state();
    attention.prefill_of(&mut state, &setup.inputs(30, 30).cast(), KeyMask::All).unwrap();
    state
}

#[test]
fn a_state_comes_back() {
    for setup in [Setup::new(1), Setup::new(2).window(4, 1)] {
        let state = state(&setup);
        let json = serde_json::to_string(&state).unwrap();
        assert!(serde_json::from_str::<CausalState<f32>>(&json).unwrap() == state);
        let bytes = state.to_bytes(Storage::Exact);
        let read = CausalState::deserialize(BytesDeserializer::<ValueError>::new(&bytes)).unwrap();
        assert!(state == read);
    }
}

#[test]
fn an_unsound_state_does_not() {
    let mut bytes = state(&Setup::new(1)).to_bytes(Storage::Exact);
    bytes[100] ^= 4;
    let json = serde_json::to_string(&bytes).unwrap();
    let error = serde_json::from_str::<CausalState<f32>>(&json).unwrap_err();
    assert!(error.to_string().contains("checksum"), "{error}");
    for json in ["[]", "[1, 2, 300]", "[1.5]", "{}", "\"dijiang\"", "null"] {
        assert!(serde_json::from_str::<CausalState<f32>>(json).is_err(), "{json}");
    }
    let f64s = serde_json::to_string(&state(&Setup::new(1))).unwrap();
    assert!(serde_json::from_str::<CausalState<f64>>(&f64s).is_err());
}

#[test]
fn configs_come_back() {
    fn check<C: Serialize + DeserializeOwned + PartialEq + Debug>(config: C) {
        let json = serde_json::to_value(&config).unwrap();
        assert_eq!(serde_json::from_value::<C>(json.clone()).unwrap(), config);
        if let serde_json::Value::Object(mut fields) = json {
            fields.insert("misspelt".into(), 1.into());
            assert!(
                serde_json::from_value::<C>(fields.into()).is_err(),
                "{config:?}: an unknown field"
            );
        }
    }
    let scaling = RotaryScaling::Linear { factor: 2.0 };
    let rotary = Rotary::new(5e5).with_scaling(scaling).with_dims(8);
    check(
        AttentionConfig::new(64, 4)
            .with_kv_heads(2)
            .with_rotary(rotary)
            .with_causality(Causality::Bidirectional),
    );
    check(DijiangOptions::new().with_map(
        DctMapConfig::new().with_blocks(3).with_mixing(Mixing::Mixed).with_seed(u64::MAX),
    ));
    check(LinearConfig::new().with_window(Window::new(5, 1)).with_log_decay(vec![-0.1, 0.0]));
    check(SoftmaxConfig::new(4, 16));
    check(DctMapConfig::new().with_blocks(2));
    check(FavorConfig::new(16, 32));
    check(CalibrateOptions::new());
    check(Padding::Left);
    check(Storage::Bf16);
}

/// Hand-written files name what they change.
#[test]
fn options_have_their_defaults() {
    let options: DijiangOptions =
        serde_json::from_str(r#"{ "map": { "blocks": 2 }, "windows": [] }"#).unwrap();
    assert_eq!(
        options,
        DijiangOptions::new().with_map(DctMapConfig::new().with_blocks(2)).with_window(None)
    );
    assert_eq!(serde_json::from_str::<LinearConfig>("{}").unwrap(), LinearConfig::new());
}
