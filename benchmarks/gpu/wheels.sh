#!/usr/bin/env bash
# Fetches what check.sh needs beside CPython 3.12, torch and numpy into benchmarks/gpu/wheels, which git ignores: 7 MB.
# scipy, matplotlib, pyarrow and flwr are left out: statistics, pictures, Parquet and deployment are not checked there.
# To be run where there is a network, by any Python with pip.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
rm -rf "$here/wheels"
"${PYTHON:-python3}" -m pip download --quiet --dest "$here/wheels" --constraint "$here/../../constraints.txt" \
    --python-version 3.12 --implementation cp --platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64 \
    --only-binary=:all: pydantic safetensors typer rich pytest hypothesis
du -sh "$here/wheels"
