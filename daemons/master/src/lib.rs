//! The CoCalc master daemon, embeddable.
