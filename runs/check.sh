#!/usr/bin/env bash
# The quick checks, without running anything: style, types, formatting, and how much code there is. Needs `source runs/setup.sh dev`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -x .venv/bin/python ] && PATH=$PWD/.venv/bin:$PATH
[ -d "$HOME/.cargo/bin" ] && PATH=$PATH:$HOME/.cargo/bin

say() { printf '\033[1;34m[check]\033[0m %s\n' "$*"; }

say "ruff";   ruff check -q .
say "mypy";   mypy
say "rustfmt and clippy"
(cd rustbpe && cargo fmt --check && cargo clippy -q --all-targets -- -D warnings)
if [ -n "$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')" ]; then
  say "clang-format"
  git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' | xargs clang-format --dry-run --Werror
fi
if command -v shellcheck >/dev/null; then say "shellcheck"; shellcheck -x runs/*.sh .ci/run; fi

say "lines of code"
for area in nanochat kernels csrc rustbpe tests benchmarks runs; do
  printf '  %-12s %6d\n' "$area" "$(git ls-files "$area" | grep -E '\.(py|pyi|rs|cpp|h|cu|cuh|sh|html)$' | tr '\n' '\0' | xargs -0 cat 2>/dev/null | wc -l)"
done
