"""The sampler against transformers' processors, and against itself: candidates decide as all logits do."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from coordinator import sampler
from coordinator.request import Sampling
from coordinator.sampler import MAX_CANDIDATES, candidates_wanted, choose, draw, penalize, report, shards_temperature
from coordinator.scores import RowScores, from_logits, merge_candidates


def shard_answers(logits: torch.Tensor, num_shards: int, count: int, temperature: float) -> RowScores:
    """What shards of these logits would say, merged; as `shardworker` answers: best first, equal ones by lower id."""
    ids, values, sums, complete = [], [], [], []
    start = 0
    for part in torch.tensor_split(logits, num_shards):
        ordered, order = torch.sort(part, descending=True, stable=True)
        ids.append((order[:count] + start).to(torch.int32).unsqueeze(0))
        values.append(ordered[:count].unsqueeze(0))
        wide = part.double()
        sums.append(torch.stack([torch.logsumexp(wide, 0), torch.logsumexp(wide / temperature, 0)]).unsqueeze(0))
        complete.append(count >= len(part))
        start += len(part)
    return merge_candidates(ids, values, sums, complete)[0]


def random_logits(seed: int, vocabulary: int, ties: int, spread: float) -> torch.Tensor:
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed)) * spread
    # As of a head in a coarse dtype: many equal values.
    return (logits * ties).round() / ties if ties else logits


SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.05, 0.3, 0.7, 1.0, 1.7, 5.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 40, 200]),
    top_p=st.sampled_from([1.0, 0.01, 0.5, 0.9, 0.999]),
    min_p=st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
)


def margin(logits: torch.Tensor, sampling: Sampling, uniform: float) -> float:
    """How far the draw is from a border between tokens, as probability."""
    if sampling.greedy:
        return math.inf
    probabilities, _ = sampler._kept(from_logits(logits, sampling.temperature), sampling)
    return float((torch.cumsum(probabilities, 0) - uniform).abs().min())


@settings(max_examples=400, deadline=None)
@given(
    sampling=SAMPLINGS,
    seed=st.integers(0, 2**31),
    vocabulary=st.integers(5, 700),
    ties=st.sampled_from([0, 0, 1, 4]),
    spread=st.sampled_from([0.01, 1.0, 6.0]),
    num_shards=st.integers(1, 5),
    num_top=st.sampled_from([None, 0, 1, 20]),
)
def test_candidates_decide_as_all_logits_do(  # noqa: PLR0917  # hypothesis passes names
    sampling: Sampling, seed: int, vocabulary: int, ties: int, spread: float, num_shards: int, num_top: int | None
) -> None:
    logits = random_logits(seed, vocabulary, ties, spread)
    count = candidates_wanted(sampling, num_top)
    assert count is not None
    listed = shard_answers(logits, num_shards, count, shards_temperature(sampling))
    whole = from_logits(logits, sampling.temperature)
    assert listed.ids.tolist() == whole.ids[: len(listed.ids)].tolist()
    for index in range(6):
        uniform = draw(seed, index)
        token = choose(listed, sampling, uniform)
        if token is None or margin(logits, sampling, uniform) < 1e-12:
            continue  # asked again with all logits; or float64 sums may differ in the last digits
        assert token == choose(whole, sampling, uniform)
        if num_top is not None and (short := report(listed, token, num_top)):
            exact = report(whole, token, num_top)
            assert exact is not None
            assert short.logprob == pytest.approx(exact.logprob, abs=1e-12)
            assert [one for one, _ in short.top] == [one for one, _ in exact.top]
            assert [value for _, value in short.top] == pytest.approx([value for _, value in exact.top], abs=1e-12)


@pytest.mark.parametrize("num_shards", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.8),
        Sampling(temperature=0.8, top_k=40),
        Sampling(temperature=0.8, top_p=0.9),
        Sampling(temperature=0.8, min_p=0.05),
        Sampling(temperature=1.0, top_k=50, top_p=0.9, min_p=0.02),
    ],
    ids=str,
)
def test_candidates_nearly_always_suffice_for_a_peaked_distribution(sampling: Sampling, num_shards: int) -> None:
    decided = 0
    for seed in range(50):
        logits = random_logits(seed, 2000, 0, 4.0)
        count = candidates_wanted(sampling, None)
        assert count is not None
        listed = shard_answers(logits, num_shards, count, shards_temperature(sampling))
        decided += choose(listed, sampling, draw(1, seed)) is not None
    assert decided >= 45


def test_ties_beyond_the_listed_are_not_cut_by_guess() -> None:
    # One clear winner, then hundreds of equals: top_k = 4 keeps three of them, but only some are listed.
    logits = torch.zeros(300)
    logits[250] = 3.0
    sampling = Sampling(temperature=1.0, top_k=4, top_p=0.9)
    count = candidates_wanted(sampling, None)
    assert count is not None
    listed = shard_answers(logits, 2, count, 1.0)
    assert listed.ids.tolist() == [250]
    assert choose(listed, sampling, 0.1) is None
    whole = from_logits(logits, 1.0)
    assert {choose(whole, sampling, draw(0, index)) for index in range(200)} == {250, 0}


def oracle(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Probabilities of the whole vocabulary by transformers, in its own order: temperature, top-k, top-p, min-p."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    changed: torch.Tensor = warpers(torch.zeros(1, 1, dtype=torch.long), logits.double().unsqueeze(0))
    return changed.softmax(-1)[0]


@settings(max_examples=200, deadline=None)
@given(sampling=SAMPLINGS.filter(lambda one: not one.greedy), seed=st.integers(0, 2**31), vocabulary=st.integers(5, 300))
def test_distribution_is_that_of_transformers(sampling: Sampling, seed: int, vocabulary: int) -> None:
    logits = random_logits(seed, vocabulary, 0, 2.0)
    scores = from_logits(logits, sampling.temperature)
    kept, closed = sampler._kept(scores, sampling)
    assert closed
    ours = torch.zeros(vocabulary, dtype=torch.float64)
    ours[scores.ids[: len(kept)]] = kept
    assert torch.allclose(ours, oracle(logits, sampling), atol=1e-9)
    assert bool(((ours > 0) == (oracle(logits, sampling) > 0)).all())


def test_draws_follow_the_distribution() -> None:
    logits, sampling = random_logits(3, 30, 0, 1.5), Sampling(temperature=0.9, top_k=12, top_p=0.95)
    scores, wanted = from_logits(logits, 0.9), oracle(logits, sampling)
    counts = Counter(choose(scores, sampling, draw(5, index)) for index in range(8000))
    for token, probability in enumerate(wanted.tolist()):
        deviation = math.sqrt(8000 * probability * (1 - probability))
        assert abs(counts[token] - 8000 * probability) <= 4.5 * deviation


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 1000),
    repetition=st.sampled_from([1.0, 0.5, 1.3, 2.0]),
    presence=st.sampled_from([0.0, -2.0, 0.7]),
    frequency=st.sampled_from([0.0, -0.3, 2.0]),
    generated=st.lists(st.integers(0, 19), max_size=12),
)
def test_penalties_are_the_formula(seed: int, repetition: float, presence: float, frequency: float, generated: list[int]) -> None:
    prompt = [1, 5, 5, 19]
    logits = random_logits(seed, 20, 0, 3.0)
    before = logits.clone()
    sampling = Sampling(repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency)
    found = penalize(logits, sampling, prompt, generated)
    assert torch.equal(logits, before)
    processor = RepetitionPenaltyLogitsProcessor(repetition)
    wanted = processor(torch.tensor([[*prompt, *generated]]), logits.double().unsqueeze(0))[0]
    for token in set(generated):
        wanted[token] -= presence + frequency * generated.count(token)
    assert torch.allclose(found, wanted, atol=1e-12)


def test_greedy_takes_the_lowest_of_equal_tokens() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0, 2.0, 2.0])
    assert choose(from_logits(logits, 0.0), Sampling(), 0.99) == 1
    for num_shards in range(1, 6):
        assert choose(shard_answers(logits, num_shards, 1, 1.0), Sampling(), 0.99) == 1


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-40, 9e-6])
def test_tiny_temperature_is_greedy(temperature: float) -> None:
    logits, sampling = random_logits(1, 50, 0, 30.0), Sampling(temperature=temperature)
    assert sampling.greedy
    assert choose(from_logits(logits, temperature), sampling, 0.999) == int(logits.argmax())
    assert shards_temperature(sampling) == 1


@pytest.mark.parametrize("temperature", [1e-5, 0.001, 0.049, 101.0, 1e39, 1e300])
def test_candidates_decide_at_every_temperature(temperature: float) -> None:
    sampling, logits = Sampling(temperature=temperature), random_logits(1, 150, 0, 30.0)
    assert candidates_wanted(sampling, None) == 65
    listed, whole = shard_answers(logits, 2, 65, shards_temperature(sampling)), from_logits(logits, temperature)
    decided = [token for index in range(50) if (token := choose(listed, sampling, draw(1, index))) is not None]
    assert len(decided) > 30
    assert decided == [choose(whole, sampling, draw(1, index)) for index in range(50) if choose(listed, sampling, draw(1, index))]
    # With top-k the shards' sums are not used.
    assert shards_temperature(Sampling(temperature=temperature, top_k=5)) == 1


@pytest.mark.parametrize(
    ("sampling", "num_top", "wanted"),
    [
        (Sampling(), None, 1),
        (Sampling(), 20, 21),
        (Sampling(top_k=500), None, 1),
        (Sampling(temperature=1.0), None, 65),
        (Sampling(temperature=1.0, top_k=5), None, 6),
        (Sampling(temperature=1.0, top_k=5), 20, 21),
        (Sampling(temperature=1.0, top_k=1023), None, 1024),
        (Sampling(temperature=1.0, top_k=1024), None, None),
        (Sampling(temperature=1.0, top_k=2**32 - 1), None, None),
        (Sampling(presence_penalty=0.1), None, None),
        (Sampling(repetition_penalty=1.1, temperature=1.0), None, None),
    ],
    ids=str,
)
def test_candidates_wanted_is_one_more_than_the_cut_keeps(sampling: Sampling, num_top: int | None, wanted: int | None) -> None:
    assert candidates_wanted(sampling, num_top) == wanted
    assert wanted is None or 1 <= wanted <= MAX_CANDIDATES


def test_draw_is_a_function_and_uniform() -> None:
    values = [draw(seed, index) for seed in (0, 1, 2**64 - 1) for index in range(2000)]
    assert values == [draw(seed, index) for seed in (0, 1, 2**64 - 1) for index in range(2000)]
    assert len(set(values)) == 6000
    assert all(0 <= value < 1 for value in values)
    tenths = Counter(int(value * 10) for value in values)
    assert all(abs(tenths[tenth] - 600) < 5 * math.sqrt(600 * 0.9) for tenth in range(10))


def test_draw_at_the_very_end_takes_the_last_kept_token() -> None:
    scores = from_logits(torch.tensor([3.0, 2.0, 1.0]), 1.0)
    assert choose(scores, Sampling(temperature=1.0, top_k=2), 1 - 2**-53) == 1
    assert choose(scores, Sampling(temperature=1.0), 0.0) == 0


def test_report_needs_the_token_and_enough_others() -> None:
    listed = shard_answers(torch.arange(10.0), 2, 3, 1.0)
    assert report(listed, 0, 0) is None
    assert report(listed, 9, 5) is None
    choice = report(listed, 9, 2)
    assert choice is not None
    total = math.log(sum(math.exp(value) for value in range(10)))
    assert choice.logprob == pytest.approx(9 - total, abs=1e-6)
    assert [token for token, _ in choice.top] == [9, 8]
    everything = report(from_logits(torch.arange(3.0), 0.0), 1, 20)
    assert everything is not None
    assert (everything.token, [token for token, _ in everything.top]) == (1, [2, 1, 0])
    assert sum(math.exp(value) for _, value in everything.top) == pytest.approx(1)
