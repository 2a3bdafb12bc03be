"""Distillation: `train` from a budget to a checkpoint on transformers' Trainer, `student` what is
trained and its loss, `batches` what is computed together, and how much at a time.
"""
