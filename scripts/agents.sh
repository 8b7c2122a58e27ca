#!/usr/bin/env bash
# Coding agents, installed from their package registries, at work against this server with a scripted model.
# usage: scripts/agents.sh FOLDER [--format FORMAT | --demo] [NAME ...]
# FOLDER keeps what is installed (2.7 GB) for the next time. Needs node and npm. As root the agents run without a
# network but the loopback, so that whatever they try to tell anybody stays here.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || { sed -n 2,5p "$0"; exit 2; }
mkdir -p "$1"
folder=$(cd "$1" && pwd)
shift
scripts/install.sh test

npm_packages=(@openai/codex@0.171.0 @anthropic-ai/claude-code@2.1.332 opencode-ai@1.18.33 @qwen-code/qwen-code@0.24.4)
if [ ! -f "$folder/npm/installed" ]; then
    npm install --prefix "$folder/npm" --no-audit --no-fund "${npm_packages[@]}"
    # Newer releases of npm ask before a package's own script puts its binary in place.
    (cd "$folder/npm" && npm install-scripts approve --all 2> /dev/null && npm rebuild) || true
    touch "$folder/npm/installed"
fi
for package in aider-chat==0.86.2 mini-swe-agent==2.4.6; do
    name=${package%%==*}
    if [ ! -f "$folder/$name/installed" ]; then
        .venv/bin/python -m venv "$folder/$name"
        "$folder/$name/bin/pip" install --quiet "$package"
        touch "$folder/$name/installed"
    fi
done

export PATH=$folder/npm/node_modules/.bin:$folder/aider-chat/bin:$folder/mini-swe-agent/bin:$PATH
run=(.venv/bin/python -m tests.agents.run "$@")
if unshare --net ip link set lo up 2> /dev/null; then
    exec unshare --net sh -c 'ip link set lo up && exec "$@"' agents "${run[@]}"
fi
echo "the agents run with the network of this machine"
exec "${run[@]}"
