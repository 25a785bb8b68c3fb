//! Which images a host keeps, and which may go. Pure.

mod garbage;
mod reference;

pub use garbage::{Kept, Policy, surplus};
pub use reference::{ImageName, ParseNameError, Reference, Refused};
