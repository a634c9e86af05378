"""Outlier tokens of residual additions: their share of Σ‖y‖² against sorted norms, and what patterns they get."""

import copy
import math
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from patterns import Explainer, Moments, Network, Observer, accumulate, choose, solve, trace
from patterns.estimation import LARGEST_SHARE, TOP_TOKENS, check_convergence
from patterns.io import TensorFile, load_moments, merge_moments, save_moments
from patterns.moments import RequiredSums, moments_bytes
from patterns.moments.moments import TOKENS
from patterns.moments.token_norms import BINS, TokenNorms

WIDTH = 6


def empty() -> TokenNorms:
    return TokenNorms(torch.zeros(BINS, dtype=torch.int64), torch.zeros(BINS, dtype=torch.float64))


def histogram(*parts: Tensor) -> TokenNorms:
    norms = empty()
    for part in parts:
        norms.add(part)
    return norms


def sorted_share(squares: Tensor, top: float) -> float:
    """The share by sorting; of the last token, only a fraction belongs to the largest ones."""
    values = squares.double().sort(descending=True).values
    count = top * len(values)
    whole = int(count)
    return float((values[:whole].sum() + (count - whole) * values[whole]) / values.sum())


@given(st.integers(0, 2**32), st.floats(0.1, 4.0), st.sampled_from([0.0005, 0.001, 0.01, 0.2]), st.integers(10, 5000))
def test_share_is_at_most_an_eighth_too_small_and_never_too_large(seed: int, tail: float, top: float, n: int) -> None:
    squares = (torch.randn(n, generator=torch.Generator().manual_seed(seed)) * tail).exp()
    found, exact = histogram(squares).top_share(top), sorted_share(squares, top)
    assert exact / 1.125 - 1e-9 <= found <= exact + 1e-9


@given(st.integers(0, 2**32), st.permutations(range(4)))
def test_histograms_add_up_in_any_order(seed: int, order: list[int]) -> None:
    parts = [torch.randn(n, generator=torch.Generator().manual_seed(seed + n)).square() for n in (1, 7, 100, 3)]
    whole = histogram(torch.cat(parts))
    one, *others = [histogram(parts[i]) for i in order]
    for other in others:
        one = one + other
    assert torch.equal(one.n, whole.n)
    torch.testing.assert_close(one.yy, whole.yy, rtol=1e-12, atol=0)
    assert int(whole.n.sum()) == 111


def test_every_number_has_a_bin() -> None:
    tiny, huge = torch.finfo(torch.float32).tiny / 8, torch.finfo(torch.float32).max
    numbers = torch.tensor([0.0, tiny, 1.0, huge, math.inf, math.nan, -math.nan])
    norms = histogram(numbers)
    assert int(norms.n.sum()) == len(numbers)
    assert norms.top_share(0.001) == 1.0, "a norm that is not finite owns everything"
    assert empty().top_share(0.001) == 0.0
    assert histogram(torch.zeros(5)).top_share(0.001) == 0.0
    assert histogram(torch.ones(10)).top_share(0.001) == pytest.approx(0.001)
    assert histogram(torch.tensor([1e300, 1.0], dtype=torch.float64)).top_share(0.5) == pytest.approx(1.0)


class Residual(nn.Module):
    """A residual addition of tokens (N, T, WIDTH), whose branch is huge where the first channel exceeds a limit."""

    def __init__(self, limit: float = math.inf, positions_behind: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.limit, self.behind = limit, positions_behind
        layers = [nn.Conv1d(WIDTH, WIDTH, 1, bias=False) if self.behind else nn.Linear(WIDTH, WIDTH, bias=False)] * 2
        self.embed, self.branch = (copy.deepcopy(layer) for layer in layers)
        self.embed.weight.data = torch.eye(WIDTH).view_as(self.embed.weight)
        self.out = nn.Linear(WIDTH, 3, bias=False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        first = x[:, :1] if self.behind else x[..., :1]
        huge = 1 + 1e5 * torch.sigmoid(1e3 * (first - self.limit)) if math.isfinite(self.limit) else 1.0
        y = x + self.branch(x * huge)
        return self.out(y.mean(2 if self.behind else 1))


X = torch.randn(40, 50, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
LIMIT = float(X[..., 0].max()) - 1e-2  # one of 2000 tokens exceeds it


def traced(limit: float = math.inf, behind: bool = False) -> Network:
    return trace(Residual(limit, behind).eval(), X[:2].mT if behind else X[:2])


def take(network: Network, behind: bool = False, positions: int | None = None, batch: int = 7) -> Moments:
    observer = Observer(network, positions=positions)
    for part in X.split(batch):
        observer.update(part.mT if behind else part)
    return observer.moments()["addition.0"]


@pytest.mark.parametrize("behind", [False, True], ids=["tokens", "images"])
def test_moments_of_an_addition_have_the_norms_of_its_tokens(behind: bool) -> None:
    network = traced(behind=behind)
    model = Residual(positions_behind=behind)
    squares = (X + (model.branch(X.mT).mT if behind else model.branch(X))).square().sum(-1).detach().flatten()
    expected = histogram(squares)
    for batch in (1, 7, 40):
        found = take(network, behind, batch=batch).tokens
        assert found is not None
        assert torch.equal(found.n, expected.n)
        torch.testing.assert_close(found.yy, expected.yy, rtol=1e-10, atol=0)
    sampled = take(network, behind, positions=8)
    assert sampled.tokens is not None
    assert int(sampled.tokens.n.sum()) == 8 * len(X) == int(sampled.total.n[0])
    torch.testing.assert_close(sampled.tokens.yy.sum(), sampled.total.yy.sum(), rtol=1e-10, atol=0)
    others = {name: m for name, m in accumulate(network, [X.mT if behind else X]).items() if name != "addition.0"}
    assert all(moments.tokens is None for moments in others.values())
    operator = network.operators["addition.0"]
    assert moments_bytes(operator, RequiredSums()) == take(network, behind).nbytes


def test_addition_without_positions_has_no_tokens() -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 2 * x.relu()

    assert accumulate(trace(Sum(), X[:2, 0]), [X[:, 0]])["addition.0"].tokens is None


def test_outlier_token_owns_the_patterns_of_an_addition_and_the_rule_takes_them_from_it() -> None:
    network = traced(LIMIT)
    moments = take(network)
    operator = network.operators["addition.0"]
    owned = solve(operator, replace(moments, tokens=None), "linear")
    assert owned.top_share is None
    assert owned.flags == ["ok"] * WIDTH
    assert float(owned.patterns["linear"][:, 1].min()) > 0.99, "the branch of the outlier gets everything"
    found = solve(operator, moments, "linear,two-component,filter,random")
    assert found.has_outliers
    assert found.top_share is not None
    assert found.top_share > 0.9
    assert found.flags == ["outliers"] * WIDTH
    half = torch.full((WIDTH, 2), 0.5, dtype=torch.float64)
    assert torch.equal(found.patterns["linear"], half)
    assert torch.equal(found.patterns["filter"], half)
    assert not torch.equal(found.patterns["random"], half)


def test_few_tokens_without_outliers_leave_every_digit() -> None:
    for count in (1, 2, 40):
        network = traced()
        moments = accumulate(network, [X[:count]])["addition.0"]
        operator = network.operators["addition.0"]
        found, expected = (solve(operator, m, "linear,filter") for m in (moments, replace(moments, tokens=None)))
        assert found.top_share is not None
        assert TOP_TOKENS < found.top_share < LARGEST_SHARE
        assert all(torch.equal(found.patterns[row], a) for row, a in expected.patterns.items())
        assert found.flags == expected.flags


def test_attribution_conserves_at_an_addition_with_outliers() -> None:
    network = traced(LIMIT)
    moments = {**accumulate(network, [X]), "addition.0": take(network)}
    solved = {name: solve(op, moments[name], "linear") for name, op in network.operators.items()}
    chosen = choose(network, {name: s.patterns for name, s in solved.items()}, "linear")
    found = Explainer(network, chosen, ["patternattribution"])(X[:5])
    assert solved["addition.0"].has_outliers
    relevance = found.maps["patternattribution"].flatten(1).sum(1)
    torch.testing.assert_close(relevance, found.scores.max(1).values, rtol=1e-10, atol=0)


def test_moments_without_norms_are_read_and_merged_as_before(tmp_path: Path) -> None:
    network = traced(LIMIT)
    operator, moments = network.operators["addition.0"], take(network)
    tensors = {f"addition.0/{name}": t for name, t in moments.tensors().items()}
    save_moments(tmp_path / "new", tensors, {})
    save_moments(tmp_path / "old", {n: t for n, t in tensors.items() if not n.endswith(TOKENS)}, {})
    for order in (("old", "new"), ("new", "old"), ("old", "old")):
        with ExitStack() as stack:
            files = [stack.enter_context(TensorFile(tmp_path / name)) for name in order]
            both = load_moments(files, "addition.0")
            merge_moments(tmp_path / "merged", files, {})
            files.append(stack.enter_context(TensorFile(tmp_path / "merged")))
            assert load_moments(files[2:], "addition.0").tensors().keys() == both.tensors().keys()
        assert both.tokens is None
        assert solve(operator, both, "linear").top_share is None
    with TensorFile(tmp_path / "new") as one, TensorFile(tmp_path / "new") as other:
        twice = load_moments([one, other], "addition.0").tokens
    assert twice is not None
    assert moments.tokens is not None
    assert torch.equal(twice.n, 2 * moments.tokens.n)
    assert (moments + replace(moments, tokens=None)).tokens is None


def test_convergence_of_an_addition_with_outliers_is_immediate() -> None:
    network = traced(LIMIT)
    operator = network.operators["addition.0"]
    parts = [accumulate(network, [x])["addition.0"] for x in X[torch.randperm(40)].split(5)]
    check = check_convergence(operator, [lambda m=m: m for m in parts], "linear")  # type: ignore[misc]
    assert check.solution.has_outliers
    mixed = [lambda m=m, i=i: replace(m, tokens=None) if i else m for i, m in enumerate(parts)]  # type: ignore[misc]
    assert check_convergence(operator, mixed, "linear").solution.top_share is None
