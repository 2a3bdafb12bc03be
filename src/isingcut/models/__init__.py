"""Models: find, load, run block by block, and cut.

`sources`: resolve a model's name to a folder; `gguf_files`, `safetensors_files`: files by their
headers; `architectures/`: blocks, kinds, legality; `fit`: check that tensors and configuration
belong together; `inspect`: blocks and legal states without weights; `load`, `loading`, `fp8`: load
a frozen model; `device`: device, dtype and memory; `transformers_private`: private parts of
transformers in use; `replay`: run block i on any hidden states; `processes`: processes with the
same model; `compute/`: head, losses, micro-batch; `cutting/`: the smaller checkpoint and its
verification; `streaming/`: models larger than memory.
"""
