#!/usr/bin/env bash
# Runs the native CPU tests on a module built with GCC's AddressSanitizer and UndefinedBehaviorSanitizer. Its plain
# kernel takes vectors as wide as AVX-512's, emulated, so that this width is tested on machines without it. Needs the
# test requirements; some minutes.
set -euo pipefail
checkout=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

mkdir "$work/source"
cp -r "$checkout"/{csrc,kernels,cts_fast,setup.py,pyproject.toml,LICENSE,README.md} "$work/source"
rm -f "$work"/source/cts_fast/*.so*
sanitizers="-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all"
CXX=${CXX:-g++} CTS_FAST_BUILD=cpu CXXFLAGS="$sanitizers -O1 -DCTS_PLAIN_VECTOR_BYTES=64" LDFLAGS="$sanitizers" \
    pip install --quiet --no-deps --target "$work/package" "$work/source"

cd "$work/package" # away from the checkout's own module
export LD_PRELOAD="$("${CXX:-g++}" -print-file-name=libasan.so) $("${CXX:-g++}" -print-file-name=libstdc++.so.6)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
export OMP_NUM_THREADS=2 CTS_FAST_EXAMPLES=${CTS_FAST_EXAMPLES:-10}
python -c 'import cts_fast._cpu as module, os; assert module.__file__.startswith(os.getcwd()), module.__file__'
python -m pytest -q -p no:cacheprovider -c "$checkout/pyproject.toml" "$@" \
    "$checkout"/tests/engine/test_{cpu_backend,method_ops,native}.py
python -m pytest -q -p no:cacheprovider -c "$checkout/pyproject.toml" -k cpu-cpu "$checkout"/tests/engine/test_step_in_halves.py
# groups popped, parameters exchanged, state moved: no address of what is gone is read
python -m pytest -q -p no:cacheprovider -c "$checkout/pyproject.toml" -k "cpu or not (torch or triton or reference)" \
    "$checkout"/tests/engine/test_outside_{state,parameters,memory,orders}.py
