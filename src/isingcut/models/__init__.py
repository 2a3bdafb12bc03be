"""Models: find, load, run block by block, and cut.

`sources`: resolve a model name to a folder; `gguf_files`, `safetensors_files`: read files by their
headers; `architectures/`: blocks, their kinds, legal states; `fit`: check that tensors and
configuration match; `inspect`: blocks and legal states without weights; `load`, `loading`, `fp8`:
load a frozen model; `placement`: several devices; `device`: device, dtype and memory;
`transformers_private`: uses of private parts of transformers; `replay`: run block i on any hidden
states; `processes`: several processes with the same model; `compute/`: head, losses, micro-batch;
`cutting/`: smaller checkpoints and their verification; `streaming/`: models larger than memory.
"""
