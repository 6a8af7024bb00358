//! The cases of `states` on a fuzzer's bytes.
#![no_main]
#![allow(dead_code, reason = "every target uses its own part of the cases")]

#[path = "../../tests/fuzz/cases/mod.rs"]
mod cases;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    cases::states::run(&mut cases::Source::of_bytes(bytes), &mut cases::Tally::default())
});
