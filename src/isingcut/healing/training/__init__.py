"""Distillation: `distill` from a budget to a checkpoint, `train` on transformers' Trainer,
`student` what is trained, `loss` its objective, `batches` what is computed together, `memory` how
much of it at a time.
"""
