"""Distillation. `train`: training with transformers' Trainer, up to a checkpoint; `student`: the
trained model and its loss; `batches`: micro-batches and memory planning.
"""
