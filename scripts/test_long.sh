#!/usr/bin/env bash
# What is too long for every change: packages built and installed from scratch, and long fuzzing.
# usage: scripts/test_long.sh [fuzz operations a seed, default 50000] [seeds, default 20] [C++ operations a seed, default 200000]
# (the mutation run is apart, because it takes most of an hour: .venv/bin/python -m tests.core.mutate --count 250;
# and so are coding agents at work, which are 2.7 GB to install: scripts/agents.sh FOLDER)
set -euo pipefail
cd "$(dirname "$0")/.."
ops=${1:-50000} seeds=${2:-20} drives=${3:-200000}
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
import tokenspeed, tokenspeed._core.scheduler, tokenspeed.engine.lane, tokenspeed.kernels.cpu._ops, tokenspeed.kernels.ops
from tokenspeed import LLM, SamplingParams
assert "site-packages" in tokenspeed.__file__, tokenspeed.__file__
with LLM(in_process=True) as llm:
    out = llm.generate("The capital of France is", SamplingParams(max_tokens=4, temperature=0.0))
print("from the wheel:", repr(out[0][0].text))
PY
)

echo "== the Triton kernels in Triton's interpreter, on what is too large for every change"
TRITON_INTERPRET=1 OMP_NUM_THREADS=1 nice "$python" -W ignore::RuntimeWarning -m tests.kernels.test_interpreted 1500000 > "$work/kernels.log" ||
    { grep WRONG "$work/kernels.log" || tail -20 "$work/kernels.log"; exit 1; }

echo "== what the official clients can do, calls in every format"
for format in hermes qwen3_coder deepseek_v3 deepseek_v31 kimi_k2 llama3_json; do
    "$python" -m tests.scripted.features "$format"
done

echo "== random texts that nobody has drawn before"
for _ in 1 2 3; do "$python" -m pytest -q --hypothesis-profile=fresh tests/text tests/core/test_door_hostile.py; done

echo "== the embedded model against transformers"
"$python" -m pytest -q tests/long

echo "== control plane, a recount after each call: 72 seeds of $drives operations, 13 small ones of 50 times as many"
g++ -std=c++20 -O2 -DTOKENSPEED_COUNT_TRANSITIONS -Icsrc tests/core/drive.cc csrc/*.cc -o "$work/drive"
nice "$work/drive" "$drives" 1000 72
for seed in 1004 1019 1021 1024 1027 1037 1041 1045 1050 1051 1053 1065 1067; do
    nice "$work/drive" "$((50 * drives))" "$seed" 1 | head -1
done

echo "== control-plane fuzz against the oracle: $seeds seeds of $ops operations"
nice "$python" -m tests.core.fuzz --ops "$ops" --seeds "$seeds"

echo "== C++ for 64-bit ARM, compiled"
scripts/compile_aarch64.sh
