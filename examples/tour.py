# %% [markdown]
# # A tour
#
# From a model to a smaller one, one step at a time, with everything that is found on the way. The
# model is SmolLM2-135M with small samples, so that the tour takes a few minutes on a laptop; use
# your own model and more text for anything but a look around.

# %%
import os
import tempfile
from pathlib import Path

import numpy as np

import isingcut
from isingcut import constraints

model = os.environ.get("TOUR_MODEL", "smollm2")
text = os.environ.get("TOUR_TEXT", "wiki")
place = Path(tempfile.mkdtemp())

# %% [markdown]
# ## Measure, solve, rank
#
# `prune` measures an energy, solves for the lowest states of three removed blocks, and measures
# those beside random states on other text. The energy `pairwise`, of all blocks and pairs, serves
# every size; left to itself, `prune` also searches near the size asked for. No checkpoint is
# written yet.

# %%
run = isingcut.prune(
    model,
    remove=3,
    energy="pairwise",
    calibration=text,
    samples=2,
    length=64,
    rank_samples=8,
    patch="linear",
    out=place / "run",
)
print(run)

# %% [markdown]
# ## The energy
#
# Own terms are the loss when one block goes; couplings are what a pair costs beyond the sum of
# both.

# %%
energy = run.hamiltonian
cheap = np.argsort(energy.h)[:5]
print("the five cheapest blocks alone:")
for i in cheap:
    print(f"  block {i:2d}  {energy.h[i]:.4f} {energy.unit}")
i, j = np.unravel_index(np.argmax(energy.J), energy.J.shape)
print(f"the worst pair: {i} and {j}, {energy.J[i, j]:+.3f} beyond {energy.h[i] + energy.h[j]:.3f}")

# %% [markdown]
# ## The spectrum
#
# The lowest states, ranked; `·` is a removed block.

# %%
spectrum = run.spectrum
print("proven lowest" if spectrum.proven else "best found")
for place_, value in enumerate(spectrum.energies[:8]):
    row = "".join("·" if gone else "#" for gone in spectrum.states[place_])
    print(f"{place_}  {value:.4f}  {row}  {spectrum.removed(place_)}")

# %% [markdown]
# ## The choice
#
# All of them were measured on text the energy has not seen. The rank correlation says how far to
# trust the energy.

# %%
print(f"chosen: {list(run.chosen.removed)}, place {run.chosen.position} in the spectrum")
print(f"measured KL {run.chosen.kl:.4f} nats/token, energy {run.chosen.energy:.4f}")
f = run.fidelity
interval = f"{f['spearman_low']:.2f} to {f['spearman_high']:.2f}"
print(f"Spearman {f['spearman']:.2f} ({interval}), n = {f['n']}")
for warning in run.warnings:
    print("warning:", warning)

# %% [markdown]
# ## Other sizes and constraints
#
# The energy is measured once. Another size is solved in a moment, and so is any set of linear
# constraints.

# %%
for m in (1, 2, 4, 5):
    other = run.at(m).spectrum
    print(f"{m} blocks: {other.removed()}, energy {other.energies[0]:.4f}")

problem = isingcut.Problem(
    energy, [constraints.count(energy.n, 3), *constraints.drop(energy.n, [int(cheap[-1])])]
)
print(f"3 blocks, {cheap[-1]} among them:", isingcut.solve(problem, k=1).removed())

# %% [markdown]
# ## The smaller model
#
# Written as an ordinary checkpoint, proven against the original with the same blocks skipped,
# patched, and loaded with plain transformers. `patch="linear"` above leaves out the tuning of the
# patch, which is on by default, wins more and takes minutes.

# %%
saved = run.save(place / "smaller")
before = run.blocks

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

small = AutoModelForCausalLM.from_pretrained(saved)
tokenizer = AutoTokenizer.from_pretrained(saved)
print(f"{before} blocks before, {small.config.num_hidden_layers} after")
ids = tokenizer("The sky is blue because", return_tensors="pt")
out = small.generate(**ids, max_new_tokens=20, do_sample=False, pad_token_id=0)
print(tokenizer.decode(out[0], skip_special_tokens=True))
