# %% [markdown]
# # A tour
#
# This tour makes a model smaller, one step at a time, and shows every result on the way. The model
# is SmolLM2-135M with small samples, so the tour takes a few minutes on a laptop. For real work use
# your own model and more text.

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
# `prune` measures an energy and solves for the lowest states of three removed blocks. Then it
# measures those states and random ones on other text. The energy `pairwise` consists of all blocks
# and pairs and serves every size. By default, `prune` also searches near the size that you give. It
# writes no checkpoint yet.

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
# The own term of a block is the loss when that block is removed. The coupling of a pair is what the
# pair costs beyond the sum of both.

# %%
energy = run.hamiltonian
cheap = np.argsort(energy.h)[:5]
print("the five cheapest blocks alone:")
for i in cheap:
    print(f"  block {i:2d}  {energy.h[i]:.4f} {energy.unit}")
i, j = np.unravel_index(np.argmax(energy.J), energy.J.shape)
print(
    f"the worst pair: {i} and {j}, {energy.J[i, j]:+.3f} beyond {energy.h[i] + energy.h[j]:.3f}"
)

# %% [markdown]
# ## The spectrum
#
# These are the lowest states, ranked. `·` is a removed block.

# %%
spectrum = run.spectrum
print("proven lowest" if spectrum.proven else "best found")
for place_, value in enumerate(spectrum.energies[:8]):
    row = "".join("·" if gone else "#" for gone in spectrum.states[place_])
    print(f"{place_}  {value:.4f}  {row}  {spectrum.removed(place_)}")

# %% [markdown]
# ## The choice
#
# All of them were measured on text that the energy has not seen. The rank correlation says how far
# you can trust the energy.

# %%
print(
    f"chosen: {list(run.chosen.removed)}, place {run.chosen.position} in the spectrum"
)
print(f"measured KL {run.chosen.kl:.4f} nats/token, energy {run.chosen.energy:.4f}")
f = run.fidelity
interval = f"{f['spearman_low']:.2f} to {f['spearman_high']:.2f}"
print(f"Spearman {f['spearman']:.2f} ({interval}), n = {f['n']}")
for warning in run.warnings:
    print("warning:", warning)

# %% [markdown]
# ## Other sizes and constraints
#
# You measure the energy once. Solving for another size, or with other linear constraints, takes a
# moment.

# %%
for m in (1, 2, 4, 5):
    other = run.at(m).spectrum
    print(f"{m} blocks: {other.removed()}, energy {other.energies[0]:.4f}")

problem = isingcut.Problem(
    energy,
    [constraints.count(energy.n, 3), *constraints.drop(energy.n, [int(cheap[-1])])],
)
print(f"3 blocks, {cheap[-1]} among them:", isingcut.solve(problem, k=1).removed())

# %% [markdown]
# ## The smaller model
#
# `save` writes an ordinary checkpoint, verifies it against the original with the same blocks
# skipped, and patches it. Plain transformers loads it. `patch="linear"` above leaves out the tuning
# of the patch. The tuning is on by default, wins back more and takes minutes.

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
