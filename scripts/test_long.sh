#!/usr/bin/env bash
# What is too long for every change: packages built and installed from scratch, and long fuzzing.
# usage: scripts/test_long.sh [fuzz operations a seed, default 200000] [seeds, default 20]
set -euo pipefail
cd "$(dirname "$0")/.."
ops=${1:-200000} seeds=${2:-20}
scripts/install.sh test
python=$PWD/.venv/bin/python

echo "== sdist and wheel, built and installed apart from this folder"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m build --no-isolation --outdir "$work/dist" . > "$work/build.log" 2>&1 || { tail -20 "$work/build.log"; exit 1; }
"$python" -m venv --system-site-packages "$work/venv"
# The packages of .venv serve this environment too; only tokenspeed itself comes from the wheel.
site=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
echo "$site" > "$(echo "$work"/venv/lib/python*/site-packages)/deps.pth"
"$work/venv/bin/python" -m pip install --quiet --no-deps --force-reinstall "$work"/dist/*.whl
(cd "$work" && "$work/venv/bin/python" - <<'PY'
import tokenspeed, tokenspeed._core.scheduler, tokenspeed.kernels.cpu._ops, tokenspeed.kernels.ops
from tokenspeed import LLM, SamplingParams
assert "site-packages" in tokenspeed.__file__, tokenspeed.__file__
with LLM(in_process=True) as llm:
    out = llm.generate("The capital of France is", SamplingParams(max_tokens=4, temperature=0.0))
print("from the wheel:", repr(out[0][0].text))
PY
)

echo "== the embedded model against transformers"
"$python" -m pytest -q tests/long

echo "== control-plane fuzz: $seeds seeds of $ops operations"
nice "$python" -m tests.core.fuzz --ops "$ops" --seeds "$seeds"
