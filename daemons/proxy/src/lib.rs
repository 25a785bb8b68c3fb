//! The CoCalc proxy daemon, embeddable.
