"""Perplexity, KL and their errors against plain formulas; speed and memory by their contracts."""

import itertools

import numpy as np
import pytest
import torch

from isingcut.data.generation import decode_tokens, generate_text, prompt_ids
from isingcut.evaluation import quality as evaluation
from isingcut.evaluation import speed as timing
from isingcut.evaluation.metrics import registry
from isingcut.models.compute import divergence, head
from shared import ModelError, module_fixture, refuses
from tiny import (
    Work,
    load_tiny,
    plain_sums,
    random_tokens,
    tiny_checkpoint,
    tiny_model,
    tiny_tokenizer,
)


class Means:
    unit = "nats"
    form = ".2f"

    def measure(self, sums, counts):
        return (sums.sum(1) / counts.sum())[1:].tolist()


@module_fixture
def pair():
    return tiny_model("llama"), tiny_model("llama", seed=1)


@module_fixture
def tokens():
    return random_tokens((12, 5, 20, 12, 3, 9))


def test_quality_agrees_with_one_sample_at_a_time(pair, tokens):
    found = evaluation.quality(*pair, tokens, Work(30))
    sums = plain_sums(*pair, tokens)
    counts = np.array([11, 4, 19, 11, 2, 8])
    means = sums.sum(1) / counts.sum()
    residuals = sums - means[:, None] * counts
    errors = np.sqrt((residuals**2).sum(1) * 6 / 5) / counts.sum()
    for figures, mean, error in zip(
        (found.before, found.after), means, errors, strict=False
    ):
        perplexity = np.exp(mean)
        assert figures.nll == pytest.approx(mean, rel=1e-5)
        assert figures.nll_se == pytest.approx(error, rel=1e-3)
        assert figures.perplexity == pytest.approx(perplexity, rel=1e-5)
        assert figures.perplexity_se == pytest.approx(perplexity * error, rel=1e-3)
    assert found.kl == pytest.approx(means[2], rel=1e-4)
    assert found.kl_se == pytest.approx(errors[2], rel=1e-3)
    alone = evaluation.quality(*pair, tokens.select([2]))
    assert (alone.kl_se, alone.before.perplexity_se) == (None, None)


def test_few_float32_logits_exist_at_once(tokens, spy, stub):
    pair = [tiny_model("llama", seed=seed).half() for seed in range(2)]
    whole = evaluation.quality(*pair, tokens)
    stub(head, "piece_elements", 4 * 262)
    sizes = spy(divergence, "widen", lambda found, x: x.numel())
    assert evaluation.quality(*pair, tokens).kl == pytest.approx(whole.kl, rel=1e-5)
    assert max(sizes) <= 4 * 262
    # The original's logits are read twice.
    assert sum(sizes) == 3 * 262 * tokens.tokens


def test_speed_takes_turns_and_reports_medians(pair, tokens):
    """The clock advances only when the loop reads it, so that every reading is known."""
    ticks = itertools.count()
    order = []
    models = dict(zip(("a", "b"), pair, strict=True))
    for name, model in models.items():
        model.register_forward_pre_hook(lambda *_, n=name: order.append(n))
    clock = lambda: next(ticks) ** 2 / 100  # noqa: E731
    found = timing.speed(
        models, tokens.select([2]), new_tokens=4, repeats=3, clock=clock
    )
    assert [name for name, _ in itertools.groupby(order)] == ["a", "b"] * 4
    # Round r, model m: readings start at tick 12 r + 6 m; a reading from tick t lasts 2 t + 1.
    for m, speeds in enumerate(found.values()):
        readings = [(2 * (12 * r + 6 * m) + 1) / 100 for r in (1, 2, 3)]
        speed = 20 / np.median(readings)
        # Speed and seconds have the same relative standard error, that of the median.
        error = speed**2 / 20 * 1.2533 * np.std(readings, ddof=1) / np.sqrt(3)
        assert speeds == pytest.approx(
            {
                "prefill_tokens_per_second": speed,
                "prefill_tokens_per_second_se": error,
                "decode_tokens_per_second": 4 / 0.04,
                "decode_tokens_per_second_se": 0,
            },
            abs=1e-9,
        )


def test_a_speed_that_no_clock_can_tell_is_refused(pair, tokens):
    with refuses(r"prefill_tokens_per_second of .*20 tokens in 0 s", ModelError):
        timing.speed(
            {"a": pair[0]}, tokens.select([2]), new_tokens=2, clock=lambda: 1.0
        )


def test_a_loss_without_a_finite_perplexity_is_refused(tokens):
    model = tiny_model("llama")
    loud = tiny_model("llama")
    with torch.no_grad():
        loud.lm_head.weight *= 1e4
    for both in ((model, loud), (loud, model)):
        with refuses(r"^the perplexity of \S+ is NaN or infinite on the", ModelError):
            evaluation.quality(*both, tokens)


def test_decoding_never_stops_early_and_matches_uncached(pair):
    model = pair[0]
    own = pair[0].generation_config
    prompt = ids = torch.tensor([[7, 8, 9]])
    out = decode_tokens(model, prompt, 12)
    assert out.shape == (1, 12)
    assert model.generation_config is own
    for _ in range(12):
        with torch.no_grad():
            ids = torch.cat(
                [ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1
            )
    assert torch.equal(out, ids[:, 3:])


def test_text_goes_through_the_chat_template_and_stops_at_the_end_token(pair, spy):
    tokenizer = tiny_tokenizer()
    seen = spy(
        pair[0], "generate", lambda *given, **rest: tokenizer.decode(given[1][0])
    )
    prompt = prompt_ids(tokenizer, "hello")
    chat = generate_text(pair[0], tokenizer, prompt, 5)
    assert generate_text(pair[0], tokenizer, prompt, 5) == chat
    tokenizer.chat_template = None
    generate_text(pair[0], tokenizer, prompt_ids(tokenizer, "hello"), 5)
    assert seen[0].replace(" ", "") == "<|user|>hello</s><|assistant|>"
    assert seen[2].replace(" ", "").endswith("hello")
    assert "<|user|>" not in seen[2]


def test_evaluate_fills_the_whole_document(tmp_path, tokens, monkeypatch):
    monkeypatch.setattr(registry, "_registered", {"means": Means})
    big, cut = (
        load_tiny(tiny_checkpoint("llama", tmp_path / name, num_hidden_layers=n))
        for name, n in (("big", 6), ("cut", 4))
    )
    found = evaluation.before_and_after(big, cut, tokens, new_tokens=4)
    assert (found.before.blocks, found.after.blocks) == (6, 4)
    assert (found.samples, found.tokens) == (6, tokens.tokens)
    for side, loaded in ((found.before, big), (found.after, cut)):
        assert side.parameters == loaded.model.num_parameters()
        assert side.bytes == (loaded.folder / "model.safetensors").stat().st_size
    assert found.before.model_fields_set == found.after.model_fields_set
    # The metric `means` has the mean NLL of a model as its figure, the mean KL as its error.
    for side, kl in ((found.before, 0.0), (found.after, found.kl)):
        assert (side.means, side.means_se) == pytest.approx((side.nll, kl))
    assert found.metrics["means"].unit == "nats"
    assert found.generation is not None
