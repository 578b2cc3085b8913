//! Does one piece of work once, for `benches/instructions.sh`, which counts the instructions of [`measured`].

#![allow(clippy::print_stdout, reason = "the list is what a caller without a name asked for")]

mod scenarios;

use scenarios::{Left, SCENARIOS, Work};

/// Found by its name; must not become part of its caller.
#[inline(never)]
fn measured(work: Work) -> Left {
    std::hint::black_box(work())
}

fn main() {
    // Cargo says `--bench` to what it runs itself.
    let name = std::env::args().skip(1).find(|argument| argument != "--bench");
    for scenario in SCENARIOS {
        match &name {
            None => println!("{} {}", scenario.name, scenario.records),
            Some(name) if name == scenario.name => drop(measured((scenario.prepare)())),
            Some(_) => {}
        }
    }
}
