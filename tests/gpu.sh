#!/usr/bin/env bash
# All checks and measurements that need a GPU, in eight minutes; --cpu: in miniature (tests/gpu.py).
cd "$(dirname "$0")/.." && exec "${PYTHON:-python3}" tests/gpu.py "$@"
