#!/usr/bin/env bash
# Installs what is needed, then serves. Without arguments: the embedded SmolLM2-135M-Instruct on
# http://127.0.0.1:8000. Arguments go to the server: scripts/serve.sh --model /path/to/model --port 9000
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/install.sh
exec .venv/bin/python -m tokenspeed.entrypoints.api "$@"
