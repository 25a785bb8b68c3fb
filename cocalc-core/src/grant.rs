//! What a host may run: grants, freezes and the highest epoch it has seen.
