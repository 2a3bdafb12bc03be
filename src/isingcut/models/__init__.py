"""Models: found, read, run one block at a time, cut.

`sources` a name -> a folder, `from_gguf` GGUF files converted; `checkpoint/` files by their
headers; `architectures/` blocks, kinds, legality; `fit` do tensors and configuration belong
together; `inspect` all that is known without weights; `load` `loading` `fp8` `handed_over` a frozen
model; `not_finite` one that computes NaN; `device` where and in which dtype;
`transformers_private` what is used of transformers and
not public; `text_alone` what of a model is given text; `replay` run block i on any hidden states;
`parts` what a sweep over a model opens; `processes` that hold the same model; `compute/` head,
losses, attention, tuning; `cutting/` the smaller checkpoint and its proof; `streaming/` a model
larger than memory.
"""
