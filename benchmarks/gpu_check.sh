#!/usr/bin/env bash
# Builds the package without a network and runs everything that only a GPU can show, in under 10 minutes:
#   bash benchmarks/gpu_check.sh [arguments of gpu_check.py]
# Needs nvcc, a C++ compiler, torch, triton, setuptools, pybind11, ninja, torchvision, pytest and hypothesis, installed or as wheels in the folder
# that the environment variable WHEELS names. Results: benchmarks/results/<device>-<date>.json and .txt. PYTHON: the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONUNBUFFERED=1 CUDA_DEVICE_MAX_CONNECTIONS=32
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$work/triton}

mkdir "$work/package"
export PYTHONPATH=$work/package${PYTHONPATH:+:$PYTHONPATH}
export PATH=$work/package/bin:$PATH
if [ -n "${WHEELS:-}" ]; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$work/package" "$WHEELS"/*.whl || { echo "FAILED: wheels"; exit 1; }
fi
missing=$("$python" - <<'END'
import importlib.metadata, importlib.util
needed = ("torch", "triton", "setuptools", "pybind11", "ninja", "torchvision", "pytest", "hypothesis")
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if "setuptools" not in missing and int(importlib.metadata.version("setuptools").partition(".")[0]) < 77:
    missing.append("setuptools>=77")
print(*missing)
END
)
if [ -n "$missing" ]; then
    echo "FAILED: not installed: $missing; give them as wheels: WHEELS=FOLDER bash benchmarks/gpu_check.sh"
    exit 1
fi

echo "== build"
began=$SECONDS
cp -r csrc cts_fast kernels setup.py pyproject.toml LICENSE README.md MANIFEST.in "$work/" 2>/dev/null
rm -rf "$work"/cts_fast/*.so
if ! (cd "$work" && CTS_FAST_BUILD=${CTS_FAST_BUILD:-cuda} "$python" -m pip install --no-build-isolation --no-deps --upgrade --target "$work/package" . -v) >"$work/build.log" 2>&1
then
    tail -60 "$work/build.log"
    echo "FAILED: build"
    exit 1
fi
echo "built in $((SECONDS - began)) s" | tee -a "$work/build.log"
(cd "$work/package" && "$python" -m cts_fast.info)

"$python" benchmarks/gpu_check.py --build-log "$work/build.log" --seconds $((580 - SECONDS)) "$@"
