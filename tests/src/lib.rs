//! Tests of the whole: what needs more than one room, or the real program.

pub mod fuzz;
pub mod kill;
