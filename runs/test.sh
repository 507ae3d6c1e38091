#!/usr/bin/env bash
# Sets up everything and passes the tests: `bash runs/test.sh`. --long adds the slow tier; other arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tier=(-m "not long")
if [ "${1:-}" = --long ]; then tier=(); shift; fi

source runs/setup.sh dev
bash runs/check.sh
cargo test -q --manifest-path rustbpe/Cargo.toml
# one thread and one core per worker (tests/conftest.py); worksteal keeps them busy to the end
pytest -q -n logical --maxprocesses 8 --dist worksteal ${tier[@]+"${tier[@]}"} "$@"
