"""The proof of a cut: what it notices, what it cannot be fooled by, and what it says."""

import math
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from image_models import image_model
from isingcut.errors import VerificationError
from isingcut.models.cutting.checkpoint import excise
from isingcut.models.cutting.verify import check_generation, relative_difference, verify
from isingcut.testing.architectures import check_family
from tiny import tiny_model

LOWEST = torch.finfo(torch.float32).min


def cut_of(model: PreTrainedModel, removed: list[int], folder: Path) -> Path:
    """The checkpoint of a model without some blocks."""
    model.save_pretrained(folder / "source")
    excise(folder / "source", removed, folder / "cut")
    return folder / "cut"


@pytest.mark.parametrize("mask", [LOWEST, -math.inf, -1e4])
def test_masked_logits_are_no_scale(mask):
    logits = torch.randn((2, 5, 40), generator=torch.Generator().manual_seed(0))
    logits[..., 10:35] = mask
    other = logits.clone()
    other[0, 3, 2] += 0.1
    assert relative_difference(logits, logits.clone()) == 0.0
    assert 0.05 < relative_difference(logits, other) < 0.2
    other[..., 20] = 0.0
    assert relative_difference(logits, other) >= 1.0


def test_few_huge_entries_are_no_scale():
    logits = torch.randn((2, 5, 40), generator=torch.Generator().manual_seed(0))
    logits[..., :19] *= 1e9
    other = logits.clone()
    other[0, 3, 30] += 0.1
    assert relative_difference(logits, other) > 0.01
    other = logits * (1 + 1e-6)
    assert relative_difference(logits, other) == pytest.approx(1e-6, rel=0.1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_on_one_side_is_infinitely_far(bad):
    logits = torch.randn((2, 5, 40), generator=torch.Generator().manual_seed(0))
    broken = logits.clone()
    broken[1, 2, 3] = bad
    assert relative_difference(logits, broken) == math.inf
    assert relative_difference(broken, logits) == math.inf
    assert relative_difference(broken, -broken) == math.inf
    assert relative_difference(logits, logits[..., 1:]) == math.inf


def test_no_number_proves_nothing():
    nothing = torch.full((1, 3, 4), math.nan)
    assert relative_difference(nothing, nothing.clone()) == math.inf


def test_a_wrong_cut_of_chameleon_is_noticed(tmp_path):
    """Its logits of image tokens hold the smallest float."""
    model = image_model("chameleon")
    cut = cut_of(model, [1], tmp_path)
    proof = verify(model, [1], cut)
    assert proof.difference == 0.0
    assert proof.told
    assert proof.wrong > 0.1
    with pytest.raises(VerificationError, match="does not compute"):
        verify(model, [2], cut)


def test_generation_is_compared_beside_masked_logits(tmp_path):
    model = image_model("chameleon")
    model.model.layers[2].self_attn.layer_idx = 0
    with pytest.raises(VerificationError, match="another token"):
        check_generation(model, torch.arange(12)[None] + 20, 8, "the model")


def test_a_proof_names_the_wrong_state_it_would_have_noticed(tmp_path):
    model = tiny_model("llama")
    proof = verify(model, [2, 3], cut_of(model, [2, 3], tmp_path))
    assert proof.instead == (1, 3)
    assert proof.wrong > 0.1
    assert proof.remarks == ()


def idle(model, blocks):
    """Let blocks add nothing to the residual stream."""
    with torch.no_grad():
        for i in blocks:
            model.model.layers[i].self_attn.o_proj.weight.zero_()
            model.model.layers[i].mlp.down_proj.weight.zero_()


def test_one_idle_neighbour_leaves_others_to_tell(tmp_path):
    model = tiny_model("llama")
    idle(model, [1, 2])
    proof = verify(model, [2], cut_of(model, [2], tmp_path))
    assert proof.instead == (3,)
    assert proof.told


def test_idle_blocks_are_told_of_and_fail_the_conformance_kit(tmp_path, monkeypatch):
    model = tiny_model("llama")
    idle(model, range(6))
    proof = verify(model, [2], cut_of(model, [2], tmp_path))
    assert proof.difference == 0.0
    assert not proof.told
    (remark,) = proof.remarks
    assert "cannot tell this cut from others: without blocks 4 instead" in remark

    monkeypatch.setattr(
        "isingcut.testing.architectures.conformance.tiny_model", lambda *a, **k: model
    )
    monkeypatch.setattr(
        "isingcut.testing.architectures.conformance.tiny_checkpoint",
        lambda family, folder, **k: model.save_pretrained(folder) or folder,
    )
    for name, stand_in in {
        "tiny_model": lambda *a, **k: model,
        "tiny_checkpoint": lambda family, folder, **k: model.save_pretrained(folder),
        "check_gates": lambda *a: True,
    }.items():
        monkeypatch.setattr(f"isingcut.testing.architectures.conformance.{name}", stand_in)
    report = check_family("llama", tmp_path / "kit", states=1)
    assert report.outcome == "failed"
    assert "cannot tell this cut from others" in report.reason
