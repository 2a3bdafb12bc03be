"""Read and write checkpoints, and describe the models in them; nothing here runs a model.

`sources`: resolve a model name to a folder; `gguf_files`, `safetensors_files`: read files by their
headers; `fp8`: dequantise; `checkpoints`: check that tensors and configuration match;
`architectures/`: blocks, their kinds, legal states, per-layer fields; `cutting/`: write smaller
checkpoints and GGUF files; `libraries`: errors and warnings of libraries that load files;
`transformers_private`: uses of private parts of transformers.
"""
