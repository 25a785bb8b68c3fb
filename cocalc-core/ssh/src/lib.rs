//! SSH ingress of CoCalc.
