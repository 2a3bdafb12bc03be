"""Distillation. `train`: training with transformers' Trainer, and the trained checkpoint;
`student`: the trained model and its loss; `batches`: micro-batches and memory planning.
"""
