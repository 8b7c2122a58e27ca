#!/usr/bin/env bash
# Everything that needs no GPU: set-up, lint, types, and the tests in groups with the time of each.
# usage: scripts/test.sh [pytest arguments]       with arguments only pytest runs, on those
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} HF_HUB_OFFLINE=1 TOKENSPEED_DEBUG=1
# Kernels are chosen by priority, whatever this user has measured: there is no such folder.
export TOKENSPEED_KERNELS_CACHE=$PWD/.venv/nothing-measured
started=$SECONDS
report=()

group() { # group NAME COMMAND...
    local name=$1 began=$SECONDS
    shift
    echo "== $name"
    "$@"
    report+=("$(printf '%5d s  %s' $((SECONDS - began)) "$name")")
}

group "install" scripts/install.sh test
if [ $# -gt 0 ]; then exec .venv/bin/python -m pytest "$@"; fi

group "ruff" .venv/bin/ruff check .
group "mypy" .venv/bin/mypy
group "clang-tidy" scripts/lint_cpp.sh
group "the house, tiny model" .venv/bin/python -m pytest -q tests/test_tiny.py tests/test_deploy.py tests/house
group "control plane, benchmarks" .venv/bin/python -m pytest -q tests/core tests/simulate tests/bench
group "kernels" .venv/bin/python -m pytest -q tests/kernels
group "models, checkpoints" .venv/bin/python -m pytest -q tests/parallel tests/layers tests/models tests/checkpoint
group "executor" .venv/bin/python -m pytest -q tests/executor
group "text" .venv/bin/python -m pytest -q tests/text
group "engine" .venv/bin/python -m pytest -q tests/engine
group "HTTP" .venv/bin/python -m pytest -q tests/entrypoints
group "end to end" .venv/bin/python -m pytest -q tests/scripted tests/e2e

printf '%s\n' "${report[@]}" "$(printf '%5d s  in all' $((SECONDS - started)))"
