"""Distillation: `train` trains to a checkpoint with transformers' Trainer, `student` is the trained
model and its loss, `batches` makes micro-batches and plans the memory.
"""
