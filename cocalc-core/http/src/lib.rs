//! HTTP and WebSocket ingress of CoCalc.
