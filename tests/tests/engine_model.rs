//! The engine against the reference model; see `felucca_tests::engine_model`. `FELUCCA_MODEL_CASES` sets how many seeds are
//! run, `FELUCCA_MODEL_SEED` the first one, `FELUCCA_MODEL_TURNS` the length of each.

use felucca_tests::engine_model;

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| value.parse().expect("a number"))
}

#[test]
fn the_engine_does_what_the_model_says() {
    let first = setting("FELUCCA_MODEL_SEED", 1);
    let cases = setting("FELUCCA_MODEL_CASES", 400);
    let turns = setting("FELUCCA_MODEL_TURNS", 150);
    for seed in first..first + cases {
        if let Err(report) = engine_model::run(seed, turns) {
            panic!("{report}");
        }
    }
}
