#!/usr/bin/env bash
# Compile the hash-pinned requirements. torch's wheels are found through UV_FIND_LINKS or the CPU index.
set -euo pipefail
cd "$(dirname "$0")/.."
skip=()
for name in torch triton torchvision torchaudio torchcodec llm llama-cpp-python; do skip+=(--no-emit-package "$name"); done
common=(--universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links --no-header --quiet)
.venv/bin/uv pip compile pyproject.toml --all-extras "${common[@]}" "${skip[@]}" \
  --override requirements/overrides.txt --extra-index-url https://download.pytorch.org/whl/cpu --index-strategy unsafe-best-match -o requirements/all.txt
.venv/bin/uv pip compile pyproject.toml "${common[@]}" --constraint requirements/all.txt -o requirements/gateway.txt
echo uv | .venv/bin/uv pip compile - "${common[@]}" --no-annotate --constraint requirements/all.txt -o requirements/installer.txt
