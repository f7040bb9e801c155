#!/usr/bin/env bash
# Checks and measures the program on one CUDA machine in at most six minutes; see README.md here.
#     tests/gpu/run.sh [--out FILE] [--parts script,step] [--device cpu --quick]
set -euo pipefail
cd "$(dirname "$0")/../.."
exec "${PYTHON:-python3}" tests/gpu/bench.py "$@"
