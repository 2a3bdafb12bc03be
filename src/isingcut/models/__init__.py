"""Models: found, read, run one block at a time, cut.

`sources` what a user gives -> a folder; `gguf_files` `safetensors_files` files by their headers;
`architectures/` blocks, kinds, legality; `fit` do tensors and configuration belong together;
`inspect` all that is known without weights; `load` `loading` `fp8` a frozen model; `device` where,
in which dtype and in how much memory; `transformers_private` what is used of transformers and not
public; `replay` run block i on any hidden states; `processes` that hold the same model; `compute/`
head, losses, tuning; `cutting/` the smaller checkpoint and its proof; `streaming/` a model larger
than memory.
"""
