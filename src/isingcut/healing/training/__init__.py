"""Distillation.

`train` on transformers' Trainer, `student` what is trained, `rounds` forward and loss, `kl` the
loss in pieces, `targets` kept top-k answers.
"""
