from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from patterns import (
    CHOICES,
    Moments,
    Network,
    Operator,
    Solution,
    UserError,
    accumulate,
    choose,
    load,
    save,
    solve,
    trace,
)
from patterns.estimation.observer import Observer
from patterns.io.atomic import write_atomically, write_json
from patterns.io.moment_files import load_moments, merge_moments, require_moments_of, save_moments
from patterns.io.pattern_files import load_trace_options
from patterns.io.safetensors_stream import TensorFile, tensor_specs, write_tensors
from patterns.moments.moments import RequiredSums


@dataclass(frozen=True)
class Run:
    network: Network
    moments: dict[str, Moments]
    solutions: dict[str, Solution]


@pytest.fixture(scope="module")
def run() -> Run:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 2, groups=1), nn.Flatten(), nn.Linear(36, 5))
    with torch.no_grad():
        model[0].bias[1] = -1e3  # a dead neuron
    x = torch.randn(8, 2, 6, 6)
    network = trace(model, x[:2])
    moments = accumulate(network, [x])
    solutions = {name: solve(op, moments[name], tuple(CHOICES)) for name, op in network.operators.items()}
    return Run(network, moments, solutions)


@pytest.mark.full
def test_patterns_come_back_as_they_were_saved(run: Run, tmp_path: Path) -> None:
    save(tmp_path, run.solutions, "sha256:one")
    found = load(tmp_path, "sha256:one")
    assert found.keys() == run.solutions.keys()
    for operator, solution in run.solutions.items():
        assert found[operator].keys() == solution.patterns.keys()
        for name, pattern in solution.patterns.items():
            assert found[operator][name].dtype == torch.float32
            assert torch.equal(found[operator][name], pattern)


def test_saving_writes_three_files_and_nothing_else(run: Run, tmp_path: Path) -> None:
    save(tmp_path / "new" / "folder", run.solutions, "sha256:one")
    found = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert found == ["neurons.parquet", "patterns.parquet", "patterns.safetensors"]


def test_tensors_are_named_by_operator_and_estimator_and_the_digest_is_metadata(run: Run, tmp_path: Path) -> None:
    save(tmp_path, run.solutions, "sha256:one")
    with safe_open(tmp_path / "patterns.safetensors", "pt") as file:
        assert file.metadata()["weights"] == "sha256:one"
        assert {"0/linear", "0/positive", "0/negative", "2/linear", "4/linear"} <= set(file.keys())
        assert "2/positive" not in file.keys()


def test_pattern_table_has_the_pattern_of_every_neuron(run: Run, tmp_path: Path) -> None:
    save(tmp_path, run.solutions, "sha256:one")
    table = pq.read_table(tmp_path / "patterns.parquet")
    assert table.column_names == ["operator", "neuron", "estimator", "pattern"]
    found = {(r["operator"], r["estimator"], r["neuron"]): r["pattern"] for r in table.to_pylist()}
    expected = {
        (operator, name, k): row.flatten().tolist()
        for operator, solution in run.solutions.items()
        for name, pattern in solution.patterns.items()
        for k, row in enumerate(pattern)
    }
    assert len(found) == table.num_rows
    assert found == expected


def test_neuron_table_has_counts_moments_and_flags(run: Run, tmp_path: Path) -> None:
    save(tmp_path, run.solutions, "sha256:one")
    table = pq.read_table(tmp_path / "neurons.parquet")
    assert table.column_names == ["operator", "neuron", "n", "n_positive", "mean_y", "var_y", "flag"]
    expected = [
        {
            "operator": operator, "neuron": k, "n": s.n[k].item(), "n_positive": s.n_positive[k].item(),
            "mean_y": s.mean_y[k].item(), "var_y": s.var_y[k].item(), "flag": s.flags[k],
        }
        for operator, s in run.solutions.items()
        for k in range(len(s.flags))
    ]  # fmt: skip
    assert table.to_pylist() == expected
    assert table.to_pylist()[1]["flag"] == "dead"
    assert table.to_pylist()[1]["n"] == 8 * 4 * 4


@pytest.mark.parametrize("path_type", [str, Path])
def test_patterns_of_other_weights_are_rejected_with_both_digests(run: Run, tmp_path: Path, path_type: type) -> None:
    save(path_type(tmp_path), run.solutions, "sha256:one")
    assert (
        load(path_type(tmp_path), "sha256:one").keys() == load(path_type(tmp_path), None).keys() == run.solutions.keys()
    )
    with pytest.raises(UserError) as caught:
        load(path_type(tmp_path), "sha256:two")
    assert caught.value.where == str(tmp_path / "patterns.safetensors")
    assert "sha256:one" in caught.value.what
    assert "sha256:two" in caught.value.what


def test_a_folder_without_patterns_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file") as caught:
        load(tmp_path, "sha256:one")
    assert caught.value.where == str(tmp_path / "patterns.safetensors")
    with pytest.raises(UserError, match="no such file") as caught:
        load_trace_options(tmp_path)
    assert caught.value.where == str(tmp_path / "patterns.safetensors")


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 60, 0.5, -1])
def test_a_truncated_file_is_rejected(run: Run, tmp_path: Path, keep: float) -> None:
    save(tmp_path, run.solutions, "sha256:one")
    path = tmp_path / "patterns.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(UserError, match="not a complete safetensors file") as caught:
        load(tmp_path, "sha256:one")
    assert caught.value.where == str(path)


def test_a_file_in_another_format_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "patterns.safetensors").write_text("patterns " * 100)
    with pytest.raises(UserError, match="not a complete safetensors file"):
        load(tmp_path, "sha256:one")


def test_a_choice_of_patterns_uses_the_estimator_of_each_operator(run: Run) -> None:
    patterns = {name: solution.patterns for name, solution in run.solutions.items()}
    chosen = {"paper": ("positive", "linear"), "own-mean": ("positive-own-mean", "linear"), "filter": ("filter",) * 2}
    for choice, (gated, ungated) in {**chosen, "0=linear,filter": ("linear", "filter")}.items():
        found = choose(run.network, patterns, choice)
        assert torch.equal(found["0"], patterns["0"][gated])
        assert torch.equal(found["4"], patterns["4"][ungated])
    default = choose(run.network, patterns)
    assert torch.equal(default["0"], patterns["0"]["positive-own-mean"])
    assert default["4"] is None


def test_runs_without_the_patterns_of_the_default_preset_use_those_of_the_paper(run: Run) -> None:
    rows = "positive", "negative", "linear"
    patterns = {name: {row: s.patterns[row] for row in rows if row in s.patterns} for name, s in run.solutions.items()}
    found = choose(run.network, patterns)
    assert torch.equal(found["0"], patterns["0"]["positive"])
    assert torch.equal(found["4"], patterns["4"]["linear"])


def test_a_choice_that_was_not_fitted_is_rejected_by_operator_and_estimator(run: Run) -> None:
    patterns = {name: {"linear": s.patterns["linear"]} for name, s in run.solutions.items()}
    with pytest.raises(UserError, match="'positive'") as caught:
        choose(run.network, patterns, "default")
    assert (caught.value.where, caught.value.parameter) == ("0", "estimator")


def flat(moments: dict[str, Moments]) -> dict[str, Tensor]:
    return {f"{name}/{field}": t for name, m in moments.items() for field, t in m.tensors().items()}


def saved(path: Path, moments: dict[str, Moments]) -> Path:
    save_moments(path, flat(moments), {"shards": "a b"})
    return path


def test_moments_come_back_as_they_were_saved_and_the_safetensors_library_reads_them(run: Run, tmp_path: Path) -> None:
    path = saved(tmp_path / "part", run.moments)
    with TensorFile(path) as part, safe_open(path, "pt") as library:
        assert part.metadata["shards"] == library.metadata()["shards"] == "a b"
        for name, moments in run.moments.items():
            expected, found = moments.tensors(), load_moments([part], name).tensors()
            assert found.keys() == expected.keys()
            for field, value in expected.items():
                assert found[field].dtype == value.dtype
                assert torch.equal(found[field], value)
                assert torch.equal(library.get_tensor(f"{name}/{field}"), value)


def test_files_of_the_safetensors_library_are_read_tensor_by_tensor(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor(7), "none": torch.zeros(0, 4), "c": torch.ones(1)}
    save_file(tensors, tmp_path / "file", {"from": "the library"})
    with TensorFile(tmp_path / "file") as file:
        assert file.metadata == {"from": "the library"}
        assert file.specs.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(file.get(name), tensor)


def test_merged_files_contain_the_sums_of_their_moments(run: Run, tmp_path: Path) -> None:
    twice = {name: moments + moments for name, moments in run.moments.items()}
    paths = [saved(tmp_path / "one", run.moments), saved(tmp_path / "two", twice)]
    with TensorFile(paths[0]) as one, TensorFile(paths[1]) as two:
        merge_moments(tmp_path / "merged", [one, two], {"shards": "all"})
    with TensorFile(tmp_path / "merged") as merged:
        assert merged.metadata["shards"] == "all"
        for name, moments in run.moments.items():
            expected = (moments + moments + moments).tensors()
            for field, value in load_moments([merged], name).tensors().items():
                torch.testing.assert_close(value, expected[field], rtol=1e-15, atol=0)


def test_moments_of_version_0_2_with_a_further_sum_are_read_and_merged_with_others(run: Run, tmp_path: Path) -> None:
    tensors = Observer(run.network).tensors()
    name = next(iter(run.network.operators))
    save_moments(tmp_path / "old", {**tensors, f"{name}/outer": torch.ones(1, 2, 2).double()}, {})
    save_moments(tmp_path / "new", tensors, {})
    for order in (("old", "new"), ("new", "old")):
        with ExitStack() as stack:
            files = [stack.enter_context(TensorFile(tmp_path / part)) for part in order]
            merge_moments(tmp_path / "merged", files, {})
            assert load_moments(files, name).tensors().keys() == load_moments(files[:1], name).tensors().keys()
        with TensorFile(tmp_path / "merged") as merged:
            assert merged.specs.keys() == tensors.keys()


def test_moments_of_other_operators_are_not_merged(run: Run, tmp_path: Path) -> None:
    few = {name: moments for name, moments in run.moments.items() if name != "0"}
    paths = [saved(tmp_path / "a", run.moments), saved(tmp_path / "b", few)]
    with TensorFile(paths[0]) as a, TensorFile(paths[1]) as b, pytest.raises(ValueError, match="different operators"):
        merge_moments(tmp_path / "merged", [a, b], {})
    assert not (tmp_path / "merged").exists()


ONE = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("tensors", "phrase"),
    [([ONE.double()], "announced"), ([ONE.T], "announced"), ([ONE, ONE], "longer"), ([], "shorter")],
    ids=["dtype", "shape", "more", "fewer"],
)
def test_tensors_other_than_announced_are_not_written(tmp_path: Path, tensors: list[Tensor], phrase: str) -> None:
    with pytest.raises(ValueError, match=phrase):
        write_tensors(tmp_path / "file", tensor_specs({"one": ONE}), tensors, {})


def test_moments_without_their_large_sums_come_back_without_them(run: Run, tmp_path: Path) -> None:
    observer = Observer(run.network, lambda operator: RequiredSums(total=False, open=True))
    observer.update(torch.randn(2, 2, 6, 6))
    save_moments(tmp_path / "part", observer.tensors(), {})
    with TensorFile(tmp_path / "part") as part:
        found = load_moments([part], "0")
    assert found.total.x is None
    assert found.open is not None
    assert found.tensors().keys() == observer.moments()["0"].tensors().keys()


def test_operators_whose_names_start_alike_keep_their_own_moments(run: Run, tmp_path: Path) -> None:
    one = run.moments["0"]
    alike = {"layer": one, "layer.0": one + one, "a/layer": one + one + one}
    with TensorFile(saved(tmp_path / "part", alike)) as part:
        for name, moments in alike.items():
            assert torch.equal(load_moments([part], name).total.n, moments.total.n)


def test_moments_that_a_file_lacks_are_rejected_by_name(run: Run, tmp_path: Path) -> None:
    path = saved(tmp_path / "part", run.moments)
    with TensorFile(path) as part, pytest.raises(UserError, match=r"features\.7") as caught:
        load_moments([part], "features.7")
    assert caught.value.where == str(path)
    with pytest.raises(UserError, match="no such file") as caught:
        TensorFile(tmp_path / "missing")
    assert caught.value.where == str(tmp_path / "missing")


def test_moments_of_other_neurons_or_another_gate_are_rejected(run: Run, tmp_path: Path) -> None:
    operator, moments = run.network.operators["0"], run.moments["0"]
    first = slice(operator.neurons - 1)
    save_moments(tmp_path / "fewer", flat({"0": moments.select_neurons(first)}), {})
    save_moments(tmp_path / "open", {f"0/{k}": t for k, t in moments.tensors().items() if "open" not in k}, {})
    with TensorFile(saved(tmp_path / "part", run.moments)) as part:
        require_moments_of(part, run.network.operators)
        load_moments([part], "0", Moments, operator)
        for name, phrase in (("fewer", "the model now has"), ("open", "another gate")):
            with TensorFile(tmp_path / name) as file, pytest.raises(UserError, match=phrase) as caught:
                require_moments_of(file, run.network.operators)
            assert caught.value.where == str(tmp_path / name)
        with TensorFile(tmp_path / "fewer") as file:
            with pytest.raises(UserError, match="the model now has"):
                load_moments([part, file], "0", Moments, operator)
            with pytest.raises(UserError, match="cannot be added"):
                load_moments([part, file], "0")


@pytest.mark.parametrize("kept", [0, 4, 8, 60, -8, -1])
def test_truncated_moments_are_rejected(run: Run, tmp_path: Path, kept: int) -> None:
    path = saved(tmp_path / "part", run.moments)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match="not a complete file of tensors") as caught:
        TensorFile(path)
    assert caught.value.where == str(path)


@given(st.integers(0, 2**32), st.integers(1, 255))
def test_a_file_with_a_damaged_header_is_rejected_or_read_within_its_bounds(
    tmp_path_factory: pytest.TempPathFactory, where: int, by: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged"
    whole = {"x": torch.arange(4.0), "y": torch.arange(3)}
    save_file(whole, path)
    data = bytearray(path.read_bytes())
    data[where % (len(data) - 40)] ^= by  # 40 bytes of tensors
    path.write_bytes(data)
    with suppress(UserError), TensorFile(path) as file:
        for name, (dtype, shape) in file.specs.items():
            found = file.get(name)
            assert (found.dtype, tuple(found.shape)) == (dtype, shape)
            assert found.nbytes <= 40


@pytest.mark.parametrize("crash", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("old", [b"the old", None])
def test_a_crash_while_writing_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, crash: type[BaseException], old: bytes | None
) -> None:
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)

    def write(temporary: Path) -> None:
        temporary.write_bytes(b"half of the ne")
        raise crash("the power went")

    with pytest.raises(crash, match="the power went"):
        write_atomically(path, write)
    assert [p.name for p in tmp_path.iterdir()] == ([] if old is None else ["file"])
    assert old is None or path.read_bytes() == old


def test_a_file_is_not_visible_before_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("new")
        assert temporary.parent == path.parent  # renaming is atomic within one file system only
        assert path.read_text() == "old"

    write_atomically(path, write)
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_crash_while_saving_again_leaves_patterns_that_still_load(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, run.solutions, "sha256:one")

    def broken(path: Path, *_: object) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("patterns.io.pattern_files.write_tensors", broken)
    with pytest.raises(OSError, match="no space left"):
        save(tmp_path, run.solutions, "sha256:two")
    assert torch.equal(load(tmp_path, "sha256:one")["0"]["linear"], run.solutions["0"].patterns["linear"])
    assert len(list(tmp_path.iterdir())) == 3


def test_json_is_readable_and_ends_with_a_line(tmp_path: Path) -> None:
    write_json(tmp_path / "it.json", {"a": [1, 2]})
    assert (tmp_path / "it.json").read_text() == '{\n "a": [\n  1,\n  2\n ]\n}\n'


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_patterns_are_stored_in_float32_at_least(dtype: torch.dtype, run: Run, tmp_path: Path) -> None:
    source = run.network.operators["0"]
    narrow = Operator("0", source.operator_type, source.weight.to(dtype), None, (), (), "", source.gate)
    solution = solve(narrow, run.moments["0"])
    save(tmp_path, {"0": solution}, "sha256:one")
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert load(tmp_path, "sha256:one")["0"]["positive"].dtype == expected
