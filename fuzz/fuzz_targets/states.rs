//! The cases of `states` on a fuzzer's bytes.
#![no_main]

use dijiang_testing::cases;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    cases::states::run(&mut cases::Source::of_bytes(bytes), &mut cases::Tally::default())
});
