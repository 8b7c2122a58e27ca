#!/usr/bin/env bash
# clang-tidy over the control plane, by the rules of csrc/.clang-tidy; any finding is an error.
# usage: scripts/lint_cpp.sh [file ...]      without files: csrc/*.cc and the headers that they include
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- csrc/*.cc
printf '%s\0' "$@" |
    xargs -0 -P 2 -I FILE .venv/bin/clang-tidy --quiet --config-file=csrc/.clang-tidy FILE -- -std=c++20 -Icsrc
