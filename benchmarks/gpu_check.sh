#!/usr/bin/env bash
# Builds the package without a network and runs everything that only a GPU can show, in 5 minutes:
#   bash benchmarks/gpu_check.sh [arguments of gpu/check.py]    build (or take the finished build in WORK) and check
#   bash benchmarks/gpu_check.sh --build                        build alone, for a machine to which WORK is carried
#   bash benchmarks/gpu_check.sh --missing                      packages that are not installed, one a line; 1 if any
# Environment: PYTHON, the interpreter. WHEELS, a folder of wheels to install first (benchmarks/gpu/wheels.sh fills
# one). WORK, a folder that keeps the build. CTS_FAST_CUDA_ARCHITECTURES, what to build for ("90"). REVISION, the
# revision's name where there is no .git. FORMS, what gpu/forms.py built, for --only forms.
# Results: DIR/<device>-<date>.json and .txt and the tests' log, where --out DIR says, else in benchmarks/results.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if [ -n "${WORK:-}" ]; then
    mkdir -p "$WORK"
    work=$(cd "$WORK" && pwd)
else
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
fi
if [ -n "${FORMS:-}" ]; then
    FORMS=$(cd "$FORMS" && pwd) || exit 1
    export FORMS
fi
package=$work/package
export PYTHONUNBUFFERED=1 CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-32}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$work/triton}
export PYTHONPATH=$package:$work/wheels${PYTHONPATH:+:$PYTHONPATH}
export PATH=$work/wheels/bin:$PATH

if [ -n "${WHEELS:-}" ] && [ -n "$(ls "$WHEELS"/*.whl 2>/dev/null)" ]; then
    options=(--quiet --no-index --no-deps --no-compile --upgrade --target "$work/wheels")
    "$python" -m pip install "${options[@]}" "$WHEELS"/*.whl || { echo "FAILED: wheels"; exit 1; }
fi
missing=$("$python" - <<'END'
import importlib.metadata, importlib.util
build = ("torch", "triton", "setuptools", "pybind11", "ninja")
needed = (*build, "torchvision", "pytest", "hypothesis", "safetensors", "tqdm", "matplotlib", "scipy")
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if "setuptools" not in missing and int(importlib.metadata.version("setuptools").partition(".")[0]) < 77:
    missing.append("setuptools>=77")
print("\n".join(missing))
END
)
if [ "${1:-}" = --missing ]; then
    [ -z "$missing" ] && exit 0
    echo "$missing"
    exit 1
fi

sources=$(find csrc cts_fast kernels setup.py pyproject.toml -type f ! -name '*.so*' ! -path '*/__pycache__/*' |
    LC_ALL=C sort | xargs sha256sum | sha256sum)
if [ "$(cat "$work/built" 2>/dev/null)" = "$sources" ] &&
    (cd "$work" && "$python" -c 'import cts_fast._cuda') 2>/dev/null; then
    echo "== build: that of these sources in $WORK"
else
    if [ -n "$missing" ]; then
        echo "FAILED: not installed: $(echo $missing); give them as wheels: WHEELS=FOLDER bash benchmarks/gpu_check.sh"
        exit 1
    fi
    echo "== build"
    began=$SECONDS
    rm -rf "$package" "$work/source" "$work/built"
    mkdir -p "$work/source"
    cp -rP csrc cts_fast kernels setup.py pyproject.toml LICENSE README.md MANIFEST.in "$work/source/"
    rm -f "$work/source"/cts_fast/*.so*
    mode=${CTS_FAST_BUILD:-cuda}
    install=("$python" -m pip install --no-build-isolation --no-deps --target "$package" . -v)
    if ! (cd "$work/source" && CTS_FAST_BUILD=$mode "${install[@]}") >"$work/build.log" 2>&1; then
        tail -60 "$work/build.log"
        echo "FAILED: build"
        exit 1
    fi
    rm -rf "$work/source"
    echo "built in $((SECONDS - began)) s" | tee -a "$work/build.log"
    echo "$sources" >"$work/built"
fi
[ "${1:-}" = --build ] && exit 0
(cd "$work" && "$python" -m cts_fast.info)

"$python" benchmarks/gpu/check.py --build-log "$work/build.log" --seconds $((300 - SECONDS)) "$@"
