#!/usr/bin/env bash
# Collects wheels for a GPU machine without a network: bash benchmarks/gpu/wheels.sh FOLDER NAME...
# NAME: what `bash benchmarks/gpu_check.sh --missing` prints there, without what those need themselves.
# PYTHON_VERSION: that machine's Python.
set -euo pipefail
folder=$1
shift
platforms=()
for glibc in 2_39 2_35 2_34 2_31 2_28 2_27 2_24 2_17; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
python=(--python-version "${PYTHON_VERSION:-3.12}" --implementation cp)
python3 -m pip download --no-deps --only-binary=:all: "${python[@]}" "${platforms[@]}" -d "$folder" "$@"
