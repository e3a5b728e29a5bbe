#!/bin/sh
# The tests of the CPU kernels with AddressSanitizer: scripts/asan.sh [options of pytest]
# PYTHON names the interpreter; the compiler is g++.
set -eu
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
printf '#!/bin/sh\nexec g++ -fsanitize=address -fno-omit-frame-pointer "$@" -O1\n' > "$folder/g++"
chmod +x "$folder/g++"
preload="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"
# Python frees nothing at its end, so that leaks say nothing; torch's allocations are watched too
export CXX="$folder/g++" PYTHONMALLOC=malloc
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:verify_asan_link_order=0
"${PYTHON:-python}" -c 'import sys; sys.path.insert(0, "kernels")
from compressor_kernels.cpu.build import find_or_compile
print(find_or_compile().path)'
LD_PRELOAD="$preload" "${PYTHON:-python}" -m pytest tests/test_cpu_kernels.py "$@"
