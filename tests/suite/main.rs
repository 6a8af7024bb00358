//! Every test of the library but those that need a program of their own: of allocation, of candle's
//! tensors, and of random cases (`fuzz`).
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod attention;
mod backward;
mod calibrate;
mod checkpoint;
mod checkpoint_config;
mod checkpoint_keys;
mod errors;
mod faulty_maps;
mod hostile;
mod kernel;
mod layer;
mod layer_backward;
mod packed;
mod plan;
mod published;
mod saving;
mod segments;
mod serde;
mod serving;
mod sharing;
mod stability;
mod state;
mod state_bytes;
mod values;

#[test]
fn every_file_is_a_module() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/suite");
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap();
        let module = format!("\nmod {name};");
        assert!(name == "main" || include_str!("main.rs").contains(&module), "{name}");
    }
}
