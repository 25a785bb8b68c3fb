//! How many projects start at once: what waits for its turn, and in which order
//! projects come up again after a reboot.

mod gate;
mod queue;
mod wave;

pub use gate::{Admitted, Gate};
pub use queue::{Full, Queue, QueueLimits, Ticket, Urgency};
pub use wave::{Wave, WaveSettings};
