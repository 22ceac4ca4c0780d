//! Seeds of random tests.

/// The seed in `CINDERBLOCK_SEED`, or one drawn at random. Printed before anything else, so that a
/// failure can be repeated.
///
/// # Panics
/// If the variable does not hold a number.
pub fn seed() -> u64 {
    let seed = match std::env::var("CINDERBLOCK_SEED") {
        Ok(seed) => seed.parse().expect("CINDERBLOCK_SEED is a number"),
        Err(_) => rand::random(),
    };
    println!("CINDERBLOCK_SEED={seed}");
    seed
}
