#!/usr/bin/env bash
# Installs what is needed, then serves engines behind the Shepherd Model Gateway on http://127.0.0.1:30000. Arguments go to
# `python -m tokenspeed serve`: scripts/smg.sh --workers 2 --model /path/to/model -- --api-key KEY
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/install.sh smg
exec .venv/bin/python -m tokenspeed serve "$@"
