"""Distillation.

`train` on transformers' Trainer, `watch` what goes on around its steps, `budget` how many there
is time for, `tune` the layers beside each cut, `student` what is trained,
`rounds` forward and loss, `kl` the loss in pieces, `targets` kept top-k answers.
"""
