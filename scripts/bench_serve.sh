#!/usr/bin/env bash
# The server on the embedded model, measured on this machine: time to ready, memory and processor time at
# rest, the load generator at several concurrencies, and the time of a step spent outside the model.
# usage: scripts/bench_serve.sh [server flags]
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/install.sh
python=.venv/bin/python port=${PORT:-8123} log=$(mktemp)
trap 'kill "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true; rm -f "$log"' EXIT

began=$(date +%s.%N)
"$python" -m tokenspeed.entrypoints.api --port "$port" "$@" > "$log" 2>&1 &
server=$!
until curl -sf "http://127.0.0.1:$port/ready" > /dev/null; do
    kill -0 "$server" || { cat "$log"; exit 1; }
    sleep 0.1
done
echo "ready after $(awk "BEGIN {printf \"%.1f\", $(date +%s.%N) - $began}") s; load average $(cut -d' ' -f1-3 /proc/loadavg)"
grep -E "KV cache of" "$log" || true

"$python" - "$server" <<'PY'
import sys, time, psutil
server = psutil.Process(int(sys.argv[1]))
everyone = [server, *server.children()]
def busy() -> float:
    return sum(p.cpu_times().user + p.cpu_times().system for p in everyone)
time.sleep(3)
before = busy()
time.sleep(20)
print(f"at rest: {(busy() - before) / 20:.2%} of a core")
for p, name in zip(everyone, ("front end", "engine"), strict=True):
    print(f"at rest: {name} {p.memory_info().rss / 2**20:.0f} MiB resident")
PY

for concurrency in 1 4 16 64; do
    "$python" -m tokenspeed.bench serve --url "http://127.0.0.1:$port" --concurrency "$concurrency" \
        --num-requests $((concurrency < 8 ? 8 : concurrency * 2)) --input-len "${INPUT:-256}" --output-len "${OUTPUT:-64}"
    sleep 11  # the engine's timing line comes every 10 s
    echo "engine: $(grep "outside the model" "$log" | tail -n "$((concurrency == 1 ? 2 : 1))" | head -n 1 | cut -d' ' -f4-)"
done
