//! The CoCalc host daemon, embeddable.
