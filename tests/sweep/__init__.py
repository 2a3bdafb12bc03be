"""The sweep: every decoder of transformers cut, reloaded and compared, as a tiny random model.

    PYTHONPATH=tests python -m sweep            every decoder that transformers has, and every
                                                family of `isingcut.testing.tiny`
    PYTHONPATH=tests python -m sweep qwen3_vl   only these model types

For each architecture the blocks are found (also on the meta device), replayed blocks reproduce
a forward pass, and gate gradients agree with autograd and with finite differences. Several random
legal states, with the first and the last block among them, are cut at the checkpoint, reloaded
with plain transformers and compared with the original with those blocks skipped. Then layers are
split, and a mixer and an MLP are removed, or this is refused with the reason. Each architecture
runs in a process of its own with a limit of memory and time.

    conformance   the entries of transformers, the checks of one architecture, and its report
    gates         gate gradients against autograd and finite differences
    shrink        a tiny configuration of any configuration class, by rule
    images        two prompts with an image each, made by rule
"""
