"""Perplexity, KL and their errors against plain formulas; speed and memory by their contracts."""

import itertools

import numpy as np
import pytest
import torch

from isingcut.data import generation
from isingcut.data.generation import decode_tokens, generate_rows, prompt_ids
from isingcut.evaluation import prompts
from isingcut.evaluation import quality as evaluation
from isingcut.evaluation import speed as timing
from isingcut.evaluation.metrics import registry
from isingcut.models.compute import divergence, head
from isingcut.report.rows import answer_rows
from shared import ModelError, module_fixture, parametrize, refuses
from tiny import (
    Work,
    load_tiny,
    plain_sums,
    random_tokens,
    tiny_checkpoint,
    tiny_model,
    tiny_tokenizer,
)

END = 2


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
    # Readings last 0.25, 0.49 and 0.73 s of the first model, 0.37, 0.61 and 0.85 s of the other.
    # A median of three has 1.2533 / sqrt(3) of the deviation, 0.24 s, as its standard error.
    for name, speed, error in (("a", 40.816327, 14.465834), ("b", 32.786885, 9.334176)):
        assert found[name] == pytest.approx(
            {
                "prefill_tokens_per_second": speed,
                "prefill_tokens_per_second_se": error,
                "decode_tokens_per_second": 100,
                "decode_tokens_per_second_se": 0,
            },
            rel=1e-5,
            abs=1e-9,
        )


def test_a_step_of_decoding_is_timed_block_by_block(pair, tokens, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(ticks))
    blocks = list(pair[0].model.layers)
    # The clock advances with each reading: twice a block, and once for the model.
    assert timing.time_decoding(pair[0], blocks, 12, new_tokens=3) == ([1] * 6, 13)
    assert not any(b._forward_hooks or b._forward_pre_hooks for b in blocks)


def test_a_speed_test_ends_in_time_and_decodes_after_a_text(monkeypatch, tokens):
    monkeypatch.setattr(timing, "_SECONDS", 0.0)
    model = tiny_model("llama")
    lengths = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]),
        with_kwargs=True,
    )
    timing.speed({"a": model}, tokens.select([2]), 50, new_tokens=2)
    timing.speed({"a": model}, tokens.select([2]), new_tokens=2)
    assert lengths == [20, 50, 50, 1, 1, 20, 16, 16, 1, 1]


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


def test_text_goes_through_the_chat_template(pair):
    tokenizer = tiny_tokenizer()
    chat = tokenizer.decode(prompt_ids(tokenizer, "hello")[0])
    assert chat.replace(" ", "") == "<|user|>hello</s><|assistant|>"
    tokenizer.chat_template = None
    plain = tokenizer.decode(prompt_ids(tokenizer, "hello")[0])
    assert plain.replace(" ", "").endswith("hello")
    assert "<|user|>" not in plain


@parametrize("family", ["llama", "gpt2", "mamba2"])
def test_answers_of_a_batch_are_those_of_single_prompts_up_to_their_end(
    family, monkeypatch
):
    model = tiny_model(family)
    tokenizer = tiny_tokenizer()
    prompts = [prompt_ids(tokenizer, text) for text in ("hi", "a longer prompt", "x")]
    alone = [decode_tokens(model, prompt, 8)[0].tolist() for prompt in prompts]
    model.generation_config.eos_token_id = [alone[1][3]]
    rows = generate_rows(model, tokenizer, prompts, 8)
    for (row, end), expected in zip(rows, alone, strict=True):
        ends = [t for t in range(8) if expected[t] == alone[1][3]]
        assert row == expected[: ends[0] if ends else 8]
        assert end == [alone[1][3]] * bool(ends)
    assert rows[1][1]
    model.generation_config.eos_token_id = tokenizer.eos_token = None
    rows = generate_rows(model, tokenizer, prompts, 8)
    assert rows == [(row, []) for row in alone]
    monkeypatch.setattr(generation, "_STEP", 2)
    rows = generate_rows(
        model, tokenizer, prompts, 8, leave=lambda row: row == alone[0][:4]
    )
    assert rows == [(alone[0][:4], []), *((row, []) for row in alone[1:])]


def test_answers_are_described_and_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "PROMPTS", ("hello", "hi", "how are you?", "a" * 500))
    monkeypatch.setattr(prompts, "PLAIN", 8)
    monkeypatch.setattr(prompts, "NEW_TOKENS", 30)
    first, second = (
        load_tiny(tiny_checkpoint("llama", tmp_path / name, seed=seed))
        for name, seed in (("first", 0), ("second", 1))
    )
    given = []

    def generate(model, tokenizer, some, most, leave):
        given.append((len(some), most))
        assert leave([9, 5] * 4)
        assert not leave([*range(20)])
        if model is second.model:
            return [([1] * 8, [])] * len(some)
        # By length: the original's answer to the first takes more tokens.
        return [([*range(20, 32)], [END]), *[([9, 5] * 4, [END])] * 2]

    monkeypatch.setattr(prompts, "generate_rows", generate)
    found = prompts.compare_answers(first, second, Work())
    # The fourth prompt is longer than the positions.
    assert given == [(3, 30), (3, 16)]
    assert found.limit == 16
    assert [pair.prompt for pair in found.pairs] == ["hello", "hi", "how are you?"]
    assert [pair.before.tokens for pair in found.pairs] == [8, 8, 12]
    assert [pair.before.repeated for pair in found.pairs[:2]] == [0.6, 0.6]
    assert {pair.after.repeated for pair in found.pairs} == {0.8}
    assert found.lost == 1.0, "no answer ends"
    rows = {row.key: row for row in answer_rows(found, "cut")}
    assert rows["answers_ended"].way == "100 → 0"
    assert rows["answers_ended"].change == "-100 ± 0"
    monkeypatch.setattr(prompts, "PROMPTS", ("a" * 500,))
    assert prompts.compare_answers(first, second, Work()) is None


def test_evaluate_fills_the_whole_document(tmp_path, tokens, monkeypatch):
    monkeypatch.setattr(registry, "_registered", {"means": Means})
    big, cut = (
        load_tiny(tiny_checkpoint("llama", tmp_path / name, num_hidden_layers=n))
        for name, n in (("big", 6), ("cut", 4))
    )
    monkeypatch.setattr(prompts, "NEW_TOKENS", 4)
    found = evaluation.before_and_after(big, cut, tokens)
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
    assert found.answers.limit == 4
    assert found.answers.pairs[0].prompt == prompts.PROMPTS[0]
