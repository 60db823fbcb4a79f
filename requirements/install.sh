#!/usr/bin/env bash
# Install everything into a virtual environment, pinned by hash, and say what is done: install.sh VENV TORCH_INDEX
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1 torch_index=$2
stages=4 number=0

# What pip says of places that its own configuration names in vain is no news; everything else is shown.
pip() { "$venv/bin/pip" "$@" 2> >(grep -v "is ignored: it is neither" >&2); }

stage() { # words command...
  local words=$1 started=$SECONDS
  number=$((number + 1))
  shift
  echo "[$number/$stages] $words ..."
  "$@"
  echo "[$number/$stages] done in $((SECONDS - started)) s, $venv holds $(du -sm "$venv" | cut -f1) MB"
}

# Reads the same hashes several times faster than pip, and none of pip's configuration: where that is needed, pip takes over.
pinned() {
  "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --no-deps --require-hashes -r requirements/all.txt && return
  echo "uv could not; pip installs the same files, which takes minutes"
  pip install --no-deps --require-hashes -r requirements/all.txt
}

stage "uv, the installer (20 MB)" pip install -q --no-deps --require-hashes -r requirements/installer.txt
# torch first and alone: its CPU build comes from its own index, and --no-deps keeps the CUDA build out for good.
stage "torch for CPU (190 MB to download, 700 MB on disk)" \
  pip install --no-deps --retries 0 "torch==2.13.0+cpu" --extra-index-url "$torch_index"
stage "everything else, pinned (700 MB to download, 2.1 GB on disk)" pinned
stage "Turnout itself" pip install -q --no-deps --no-build-isolation -e .
