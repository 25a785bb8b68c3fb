# Everything a newcomer needs: `make demo`, `make test`. See README.md.

CARGO ?= cargo
ARGS ?=
DEMO_DIR ?= ./cocalc-data
SEEDS ?= 2000
SEED ?=

.PHONY: demo build test test-full simulate check advisories bench fuzz mutants clean

# Runs a federation on this machine; `make demo ARGS=--once` exercises it and
# tears it down.
demo: build
	./target/debug/cocalc up --dir $(DEMO_DIR) $(ARGS)

build:
	@.ci/setup.sh demo
	$(CARGO) build --workspace --bins

# The tests that belong to every change.
test:
	@.ci/setup.sh demo
	@.ci/setup.sh test
	.ci/test.sh

# The same, with simulated moves and days of access by the thousand, a
# revocation among a thousand WebSockets, and storage with 10,000 snapshots, 5,000
# projects, a million files, and the power cut at forty moments. Takes hours.
test-full:
	@.ci/setup.sh demo
	@.ci/setup.sh test
	COCALC_SIM_SEEDS=2500 COCALC_AUTH_SEEDS=2000 COCALC_REVOCATION_FULL=1 COCALC_FULL=1 .ci/test.sh

# Simulated days of tokens, streams and revocation; docs/auth.md says what they
# check. `make simulate SEEDS=2000` for many, `make simulate SEED=7` for one.
simulate:
	COCALC_AUTH_SEEDS=$(SEEDS) $(if $(SEED),COCALC_AUTH_SEED=$(SEED)) \
	  $(CARGO) test -p cocalc-testkit --test auth_sim in_a_ -- --nocapture

# Format, lints, licences, documentation, dependency guards.
check:
	.ci/check.sh

# Needs the advisory database from the network.
advisories:
	cargo deny check advisories

# The performance table, as ratios to a peer in the same run.
bench:
	@.ci/setup.sh demo
	@.ci/setup.sh bench
	$(CARGO) build --release --workspace --bins
	.ci/bench.sh

# Each fuzz target for FUZZ_SECS seconds.
fuzz:
	.ci/fuzz.sh $(or $(FUZZ_SECS),300)

# Every change that cargo-mutants knows to the verifier of tokens, against its
# tests; docs/auth.md says what survived. Needs `cargo install cargo-mutants`.
mutants:
	$(CARGO) mutants -p cocalc-auth -f cocalc-auth/src/token.rs -f cocalc-auth/src/compact.rs \
	  -f cocalc-auth/src/public_key.rs -o target/mutants --timeout 120 -- --lib --test token

clean:
	-./target/debug/cocalc down --dir $(DEMO_DIR)
	$(CARGO) clean
