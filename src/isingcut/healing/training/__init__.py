"""Distillation.

`train` on transformers' Trainer, `tune` the layers beside each cut, `student` what is trained,
`rounds` forward and loss, `kl` the loss in pieces, `targets` kept top-k answers.
"""
