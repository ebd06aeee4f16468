#!/bin/sh
# Compiles csrc/cuda/shifting_step.cu for the CPU with address and undefined-behaviour sanitizers:
# build_shim.sh FOLDER → FOLDER/_cuda.so
set -e
csrc=$(cd "$(dirname "$0")/../../csrc" && pwd)
includes=$(
  ${PYTHON:-python3} - <<'END'
import pybind11, sysconfig
print("-I" + pybind11.get_include(), "-I" + sysconfig.get_path("include"))
END
)
flags="-std=c++17 -O0 -fPIC -ffp-contract=off -fno-strict-aliasing
       -fsanitize=address,undefined -fno-sanitize-recover=undefined
       -Wall -Wextra -Wno-unknown-pragmas -Wno-maybe-uninitialized
       -DCTS_HOST_SHIM -include $csrc/cuda/host_shim.h -I$csrc $includes -x c++"
cd "$1"
for dtype in float32 float64 bfloat16 float16; do
  g++ $flags -DCTS_DTYPE=$dtype -c "$csrc/cuda/shifting_step.cu" -o $dtype.o &
done
g++ $flags -c "$csrc/cuda/launch.cpp" -o launch.o
g++ $flags -c "$csrc/python/cuda_bindings.cpp" -o bindings.o
wait
g++ -shared -fsanitize=address,undefined ./*.o -o _cuda.so
