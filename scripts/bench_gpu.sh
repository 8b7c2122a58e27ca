#!/usr/bin/env bash
# On a GPU host: build, check the executor and its kernels there, then measure. usage: [PYTHON=python3] scripts/bench_gpu.sh [PART...]
#   check    tests of the executor, the sampler, whole models, and the numerics suite on the GPU
#   sanitize compute-sanitizer's memcheck over the fused kernels
#   kernels  what is registered and chosen, numerics as a table, kernels alone against the limits, measured selection
#   llama    decode rates of Llama-8B's shape, random weights
#   v2l      decode rates of V2L's shape (DeepSeek-V2-Lite), random weights
#   prefill  kernels of long prompts: numerics, alone, then first tokens of V2L's shape, cold and warm (150 s behind the build)
#   start    V2L's shape from a checkpoint of 31 GB: the first start and a second one; needs 35 GB of disk
#   ranks    (asked for by name, 2 GPUs) collectives, decode steps of V2L's shape over ranks beside what is predicted, then served
#   groups   (asked for by name, 2 GPUs) ranks that attend to requests of their own: tests, then as `ranks` with experts cut and dealt
#   four     (asked for by name, 4 GPUs) all of the following; each by itself ends within 10 minutes
#     four-same   tests of ranks that meet, greedy tokens in float32; collectives of four ranks
#     four-v2l, four-k2         decode steps beside what is predicted: attention and experts cut; experts dealt; own tokens, experts dealt
#     four-cut, four-dealt, four-own    sessions of agents, V2L's shape, in each of these
#     four-plot   the best layout at 70, 100 and 200 tok/s a user, and a plot, of what FIGURES has
#   alone    (asked for by name) what one of four ranks computes, collectives left out: both shapes below in each layout
#   steps    steps with prompts: what the host enqueues and what the device needs, alone and beside streams, then by kind in turns of 8 and 12 sessions
#   agentic  first tokens of cold prompts, then turns of 1 to 12 sessions (from the same checkpoint if `start` ran)
# Without a part: all. BANDWIDTH: bytes a second of a read-only stream on this GPU, for the limits. PROFILE=FILE: kernels, three steps and the loop's
# thread of every decode row, into that file. FIGURES: a folder for what `four` finds, from one call to the
# next; without it OUT, or /tmp/four-figures. Peers are as measured on an H100 80 GB.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python} bandwidth=${BANDWIDTH:-3150e9}
figures=${FIGURES:-${OUT:-/tmp/four-figures}}
parts=" ${*:-check sanitize kernels llama v2l prefill start steps agentic} "
[[ $parts == *" four "* ]] && parts+="four-same four-v2l four-k2 four-cut four-dealt four-own four-plot "
"$python" setup.py -q build_ext --inplace
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
[[ $parts == *" four"* ]] && mkdir -p "$figures"

wanted() { [[ $parts == *" $1 "* ]] && echo "== $1"; }
decode() { # decode SHAPE FLAGS...
    "$python" scripts/make_checkpoint.py "$1" "$folder/$1-config" --config-only
    "$python" -m tokenspeed.bench decode --model "$folder/$1-config" --load-format dummy --bandwidth "$bandwidth" \
        ${PROFILE:+--profile "$PROFILE"} "${@:2}"
}
ranks() { "$python" -m tokenspeed.parallel "$@"; }
layout_of() { # layout_of cut|dealt|own, over four ranks
    case $1 in
        cut) ;;
        dealt) echo "--moe-ep-size 4" ;;
        own) echo "--attn-dp-size 4 --moe-ep-size 4" ;;
    esac
}
four_steps() { # four_steps SHAPE FLAGS... decode steps of v2l's shape or 13 layers of k2's, 1, 8 and 32 rows in all
    local wrong=0 name layout rows slice=() config
    [[ $1 == k2 ]] && slice=(--layers 13) # what four GPUs of 141 GB hold (make_checkpoint.py)
    config=$(mktemp -d -p "$folder")
    "$python" scripts/make_checkpoint.py "$1" "$config" --config-only "${slice[@]}"
    for name in cut dealt own; do
        layout=$(layout_of "$name") rows="1 8 32"
        [[ $name == own ]] && rows="1 2 8" # of each group; with 1 they are 4 in all
        echo "-- $1 --world 4 $layout"
        # shellcheck disable=SC2086 # layout and rows are several words
        timeout 180 "$python" -m tokenspeed.parallel decode --model "$config" --world 4 $layout \
            --batch $rows --context 1024 50000 ${BANDWIDTH:+--bandwidth "$BANDWIDTH"} "${@:2}" || wrong=1
    done
    return "$wrong"
}
links() { [[ -e $figures/links.json ]] && echo "--links $figures/links.json"; } # of four ranks, if four-same has run
four_agents() { # four_agents cut|dealt|own
    local config
    config=$(mktemp -d -p "$folder")
    "$python" scripts/make_checkpoint.py v2l "$config" --config-only
    # shellcheck disable=SC2046 # a layout is several words
    "$python" -m tokenspeed.bench agentic --model "$config" --load-format dummy --concurrency 1 2 4 8 16 \
        -tp 4 $(layout_of "$1") --json "$figures/$1.json"
}
serve_layout() { # serve_layout FLAGS... decode rates of the engine, 1, 8 and 32 streams of 1,024 tokens
    "$python" -m tokenspeed.entrypoints.api --model "$folder/v2l-config" --load-format dummy --port 8399 "$@" & local server=$!
    until curl -sf http://127.0.0.1:8399/ready > /dev/null; do
        kill -0 "$server" || return 1
        sleep 0.2
    done
    "$python" -m tokenspeed.bench serve --url http://127.0.0.1:8399 --concurrency 1,8,32 --input-len 1024 --output-len 256
    kill "$server" && wait "$server"
}
measured_layout() { # measured_layout "LAYOUT" DECODE_FLAGS... decode steps without an engine, then the engine's
    # shellcheck disable=SC2086 # a layout is several words
    ranks decode --model "$folder/v2l-config" $1 --context 1024 "${@:2}"
    # shellcheck disable=SC2086
    serve_layout ${1/--world/--tensor-parallel-size}
}
ready() { # seconds from the command to a server that is ready; SIGTERM ends it
    local begun=$EPOCHREALTIME wrong=0
    "$python" -m tokenspeed.entrypoints.api --model "$1" --port 8399 & local server=$!
    until curl -sf http://127.0.0.1:8399/ready > /dev/null; do
        kill -0 "$server" || return 1
        sleep 0.1
    done
    curl -sf http://127.0.0.1:8399/health_generate > /dev/null
    echo "first token $(awk "BEGIN { print $EPOCHREALTIME - $begun }") s after the command"
    nvidia-smi --query-gpu=memory.used,memory.total --format=csv,noheader
    "$python" - <<'PYTHON' || wrong=1
import asyncio, openai, time

async def stream(client, number):
    asked = [{"role": "user", "content": f"Stream {number}: tell a long story."}]
    chunks = await client.chat.completions.create(
        model=(await client.models.list()).data[0].id, messages=asked, stream=True, max_tokens=200,
        stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
    )
    return [chunk.usage async for chunk in chunks][-1].completion_tokens

async def main():
    async with openai.AsyncOpenAI(base_url="http://127.0.0.1:8399/v1", api_key="none") as client:
        start = time.perf_counter()
        counts = await asyncio.gather(*(stream(client, number) for number in range(8)))
        print("8 streams of the openai client:", counts, f"{sum(counts) / (time.perf_counter() - start):.0f} tok/s")

asyncio.run(main())
PYTHON
    kill "$server" && wait "$server"
    ((wrong == 0))
}

if wanted check; then
    "$python" -m pytest -q -p no:cacheprovider tests/executor/test_on_gpu.py tests/executor/test_device_sampler.py \
        tests/e2e/test_same_tokens.py tests/e2e/test_sampling.py --durations=5
    time "$python" -m pytest -q -p no:cacheprovider tests/kernels/test_numerics.py -k cuda
fi
if wanted sanitize; then
    # Some cases of the fused kernels, twice: the first run compiles, which under the sanitizer takes minutes.
    cases=(-q -p no:cacheprovider tests/kernels/test_numerics.py
        -k "cuda and bfloat16 and (triton or hopper) and (mla_block_decode or moe_block_decode or mla_decode or lm_head)")
    "$python" -m pytest "${cases[@]}"
    compute-sanitizer --tool memcheck --error-exitcode 9 "$python" -m pytest "${cases[@]}"
fi
if wanted kernels; then
    kernels() { "$python" -m tokenspeed.kernels "$@"; }
    kernels list
    kernels explain mla_decode --device cuda
    time kernels numerics --device cuda
    kernels bench mla_decode rows=1,8 context=1024,50000 --device cuda
    kernels bench moe_experts tokens=1,8 --device cuda
    kernels bench linear tokens=1,8,128 --device cuda
    kernels bench lm_head rows=1,8,128 --device cuda
    TOKENSPEED_KERNELS_CACHE="$folder/winners" kernels tune mla_decode --device cuda
fi
if wanted llama; then
    # A step reads every weight but the embedding's table, and K and V of 32 layers × 8 heads × 128 for each token.
    decode llama-8b --shape 1x1024 8x1024 32x1024 128x1024 --peer 150 1151 3860 9108 \
        --weight-bytes 15.01e9 --kv-bytes 131072
fi
if wanted v2l; then
    # Of 64 experts a layer's tokens choose 64 (1 − (58/64)^n) in expectation: 6, 11.4, 20.8, 34.9, 50.8, 61.3, 63.9, 64
    # at 1, 2, 4 … 128 tokens, 58 at 24; each takes 0.45 GB over the layers.
    decode v2l --num-tokens 100 --kv-bytes 31104 \
        --shape 1x1024 2x1024 4x1024 8x1024 16x1024 32x1024 64x1024 128x1024 \
        1x50000 2x50000 4x50000 8x50000 16x50000 24x50000 \
        --peer 250 0 0 933 0 2474 0 8272 204 0 0 625 0 0 \
        --weight-bytes 4.91e9 7.35e9 11.58e9 17.9e9 25.04e9 29.77e9 30.95e9 31.0e9 \
        4.91e9 7.35e9 11.58e9 17.9e9 25.04e9 28.29e9
fi
if wanted prefill; then
    wrong=0
    "$python" -m tokenspeed.kernels numerics moe_experts mla_prefill --device cuda --dtype bfloat16 || wrong=1
    for backend in library triton; do # without the references, which would take minutes and all of the memory
        export TOKENSPEED_KERNELS="moe_experts=$backend,mla_prefill=$backend"
        "$python" -m tokenspeed.kernels bench moe_experts tokens=256,512,1312,2048,8192 --device cuda
        "$python" -m tokenspeed.kernels bench mla_prefill new=1312,8192 context=8192,50000 --device cuda
    done
    unset TOKENSPEED_KERNELS
    "$python" scripts/make_checkpoint.py v2l "$folder/v2l-config" --config-only
    turns() {
        "$python" -m tokenspeed.bench agentic --model "$folder/v2l-config" --load-format dummy --concurrency 1 --output 1 "$@"
    }
    turns --turns 2 --first 50000 --more 1295 --repeats 3 # 1,312 tokens behind 49,984 cached ones
    turns --turns 1 --first 1024 --repeats 5
    ((wrong == 0))
fi
if wanted ranks; then
    "$python" scripts/make_checkpoint.py v2l "$folder/v2l-config" --config-only
    "$python" -m tokenspeed.kernels numerics all_reduce_norm --device cuda
    ranks measure --world 2 --links "$folder/links.json"
    for layout in "--world 1" "--world 2" "--world 2 --moe-ep-size 2" "--world 2 --attn-copies 2"; do
        measured_layout "$layout" --batch 1 8 32 --links "$folder/links.json"
    done
fi
if wanted groups; then
    wrong=0
    "$python" -m pytest -q -p no:cacheprovider tests/engine/test_groups.py tests/executor/test_joint.py -k "llama or joint" || wrong=1
    "$python" scripts/make_checkpoint.py v2l "$folder/v2l-config" --config-only
    for layout in "--world 2 --attn-dp-size 2" "--world 2 --attn-dp-size 2 --moe-ep-size 2"; do
        measured_layout "$layout" --batch 1 4 16 # rows of each group
    done
    ((wrong == 0))
fi
failed=0 # what fails among four GPUs, or in one layout, does not keep the rest from being measured
if wanted four-same; then
    "$python" -m tokenspeed.kernels numerics all_reduce_norm --device cuda || failed=1
    timeout 240 "$python" -m pytest -q -p no:cacheprovider tests/engine/test_four_ranks.py --durations=4 || failed=1
    ranks measure --world 4 --links "$figures/links.json" || failed=1
fi
for shape in v2l k2; do
    # shellcheck disable=SC2046 # a flag and its value, or nothing
    if wanted "four-$shape"; then four_steps "$shape" $(links) || failed=1; fi
done
for name in cut dealt own; do
    if wanted "four-$name"; then four_agents "$name" || failed=1; fi
done
if wanted four-plot; then
    curves=()
    for name in cut dealt own; do
        if [[ -s $figures/$name.json ]]; then curves+=("$figures/$name.json"); else echo "four-plot: nothing of four-$name"; fi
    done
    "$python" -m tokenspeed.bench pareto "${curves[@]}" --svg "$figures/pareto.svg" || failed=1
fi
if wanted alone; then
    "$python" -m tokenspeed.kernels numerics moe_experts moe_block_decode --device cuda --dtype bfloat16 || failed=1
    for shape in v2l k2; do
        four_steps "$shape" --alone | tee -a "$folder/alone.txt" || failed=1
    done
    echo "== alone: one rank of four, ALL COLLECTIVES LEFT OUT"
    grep -E '^(--|  )' "$folder/alone.txt" || failed=1
fi
((failed == 0))
model=(--model "$folder/v2l-config" --load-format dummy)
if wanted start; then
    time "$python" scripts/make_checkpoint.py v2l "$folder/v2l"
    ready "$folder/v2l"
    ready "$folder/v2l"
    model=(--model "$folder/v2l")
fi
if wanted steps; then
    "$python" scripts/make_checkpoint.py v2l "$folder/v2l-config" --config-only
    "$python" -m tokenspeed.bench steps "${model[@]}" --new 64 128 256 512 816 2048 --beside 0 8 --sessions 8 12 \
        ${PROFILE:+--profile "$PROFILE"}
fi
if wanted agentic; then
    "$python" scripts/make_checkpoint.py v2l "$folder/v2l-config" --config-only
    agentic() { "$python" -m tokenspeed.bench agentic "${model[@]}" "$@"; }
    agentic --first 1024 --output 1 --turns 1 --concurrency 1 --repeats 5
    agentic --output 1 --turns 2 --concurrency 1 --repeats 3
    agentic --concurrency 1 2 4 8 12 --peer-user 200 149 97 61 45 --peer-output 169 251 331 411 449
fi
