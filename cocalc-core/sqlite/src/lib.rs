//! SQLite stores of CoCalc: the master's, and a host's.
