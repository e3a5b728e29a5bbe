#!/bin/sh
# Make a virtual environment with this package: scripts/install.sh FOLDER [EXTRAS]
# On Linux without an NVIDIA GPU the CPU build of torch is taken, so that no CUDA packages are downloaded.
set -e
venv=$1
package=".${2:+[$2]}"
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: PYTHON=python3.12 make …")' || exit 1
"$python" -m venv "$venv"
pip="$venv/bin/pip --disable-pip-version-check -qq install"
echo "installing into $venv; this takes a minute or two" >&2
constraints=
if [ "$(uname)" = Linux ] && ! nvidia-smi -L >/dev/null 2>&1; then
    constraints="-c constraints-cpu.txt"
    $pip $constraints torch 2>/dev/null || $pip $constraints --index-url https://download.pytorch.org/whl/cpu torch
fi
$pip $constraints -e "$package"
touch "$venv/ready"
