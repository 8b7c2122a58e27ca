#!/usr/bin/env bash
# Compiles everything that is C++ for 64-bit ARM, with the compiler in the package ziglang (clang), and runs nothing: the portable
# kernels are what such a machine takes. usage: scripts/compile_aarch64.sh (after scripts/install.sh)
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --disable-pip-version-check -q install ziglang==0.17.1
headers=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("include"))')
compile() { # compile FILE FLAGS...
    "$folder/venv/bin/python" -m ziglang c++ -target aarch64-linux-gnu -std=c++20 -O1 -Wall -Wextra -Werror=unused-result \
        -Icsrc -Ikernels/cpu -isystem "$headers" -c "$1" -o "$folder/object" "${@:2}"
}
for file in csrc/*.cc kernels/cpu/*.cc; do compile "$file" -Werror; done
for module in tokenspeed/_core/scheduler tokenspeed/kernels/cpu/_ops; do
    .venv/bin/python -m cython -3 --cplus "$module.pyx" -o "$folder/module.cpp"
    compile "$folder/module.cpp" -w
done
echo "compiled for aarch64: $(ls csrc/*.cc kernels/cpu/*.cc | wc -l) files and 2 modules"
