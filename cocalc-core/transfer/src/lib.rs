//! The authenticated channel between CoCalc hosts and proxies.
