"""Checkpoints: files that torch's strict load accepts are loaded, and for others an error says what they are."""

import argparse
import gzip
import io
import json
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save as safetensors
from safetensors.torch import save_model
from torch import Tensor, nn

from patterns import UserError
from ray_jobs.models.checkpoints import load_weights

State = dict[str, Any]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x)).mean((2, 3)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.two.weight = self.three.weight = self.one.weight


class Renamed(Net):
    """A network that accepts names of an earlier version, like torchvision's DenseNet."""

    def _load_from_state_dict(self, state: State, prefix: str, *args: Any) -> None:  # type: ignore[override]
        for key in [key for key in state if key.startswith(f"{prefix}old_")]:
            state[prefix + key.removeprefix(f"{prefix}old_")] = state.pop(key)
        super()._load_from_state_dict(state, prefix, *args)


class Extra(Net):
    def __init__(self) -> None:
        super().__init__()
        self.epoch = 3

    def get_extra_state(self) -> object:
        return {"epoch": self.epoch}

    def set_extra_state(self, state: Any) -> None:
        self.epoch = state["epoch"]


def values() -> State:
    """Return a state dict that differs from the initial weights of every Net."""
    torch.manual_seed(5)
    return {k: torch.rand_like(v) if v.is_floating_point() else v + 7 for k, v in Net().state_dict().items()}


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def saved(obj: object, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(obj, buffer, **options)
    return buffer.getvalue()


def wrapped(wrap: Callable[[nn.Module], nn.Module]) -> State:
    net = Net()
    net.load_state_dict(values())
    return wrap(net).state_dict()


def load(content: bytes, tmp_path: Path, model: nn.Module | None = None) -> nn.Module:
    file = tmp_path / "weights"
    file.write_bytes(content)
    model = Net() if model is None else model
    load_weights(model, str(file), "m.py:net")
    return model


VALID: dict[str, Callable[[], bytes]] = {
    "plain": lambda: saved(values()),
    "before torch 1.6": lambda: saved(values(), _use_new_zipfile_serialization=False),
    "safetensors": lambda: safetensors(values()),
    "compiled": lambda: saved(wrapped(torch.compile)),  # type: ignore[arg-type]
    "parallel": lambda: saved(wrapped(nn.DataParallel)),
    "averaged": lambda: saved(wrapped(torch.optim.swa_utils.AveragedModel)),
    "compiled and parallel": lambda: saved(wrapped(lambda net: nn.DataParallel(torch.compile(net)))),  # type: ignore[arg-type]
    "a compiled submodule": lambda: saved({k.replace("conv.", "conv._orig_mod."): v for k, v in values().items()}),
    "lightning": lambda: saved({"state_dict": prefixed("model.", values()), "epoch": 3, "hyper_parameters": {"lr": 1}}),
    "lightning, compiled": lambda: saved({"state_dict": prefixed("model._orig_mod.", values())}),
    "safetensors of a wrapper": lambda: safetensors(prefixed("module.", values())),
    "imagenet example": lambda: saved({"state_dict": prefixed("module.", values()), "best_acc1": torch.tensor(3.0)}),
    "torchvision": lambda: saved(
        {"model": values(), "optimizer": {"state": {0: {"a": torch.ones(1)}}}, "args": argparse.Namespace(lr=1)}
    ),
    "another key": lambda: saved({"model_state_dict": values(), "loss": 0.5, "optimizer": {"a": torch.ones(1)}}),
    "two keys deep": lambda: saved({"state": {"net": values()}}),
    "with averaged weights": lambda: saved({"state_dict": values(), "state_dict_ema": prefixed("x", values())}),
    "averaged weights only": lambda: saved({"model_ema": values(), "epoch": 3}),
    "half": lambda: saved({k: v.half() if v.is_floating_point() else v for k, v in values().items()}),
}


@pytest.mark.parametrize("content", VALID.values(), ids=VALID)
def test_checkpoint_with_one_state_dict_is_loaded(content: Callable[[], bytes], tmp_path: Path) -> None:
    for name, value in load(content(), tmp_path).state_dict().items():
        torch.testing.assert_close(value, values()[name], rtol=1e-3, atol=1e-3)  # the case `half` is rounded


def test_old_names_that_the_model_converts_are_loaded(tmp_path: Path) -> None:
    old = OrderedDict((k, v) for k, v in values().items() if "num_batches" not in k)  # as before torch 0.4.1
    Net().load_state_dict(old)
    torch.testing.assert_close(load(saved(old), tmp_path).state_dict()["conv.weight"], old["conv.weight"])
    load(saved(prefixed("module.", old)), tmp_path)
    renamed = load(saved(prefixed("old_", values())), tmp_path, Renamed())
    torch.testing.assert_close(renamed.state_dict()["fc.weight"], values()["fc.weight"])


def test_tied_weights_of_safetensors_are_loaded(tmp_path: Path) -> None:
    one = Tied()
    save_model(one, str(tmp_path / "tied.safetensors"))
    other = load((tmp_path / "tied.safetensors").read_bytes(), tmp_path, Tied())
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_extra_state_is_loaded(tmp_path: Path) -> None:
    state = Extra().state_dict()
    state["_extra_state"] = {"epoch": 8}
    model = load(saved(state), tmp_path, Extra())
    assert isinstance(model, Extra)
    assert model.epoch == 8


def scripted() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(Net()), buffer)
    return buffer.getvalue()


def exported() -> bytes:
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(Net().eval(), (torch.zeros(2, 3, 8, 8),)), buffer)
    return buffer.getvalue()


def arrays() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3))
    return buffer.getvalue()


INVALID: dict[str, tuple[Callable[[], bytes], str]] = {
    "a whole model": (lambda: saved(Net()), "a whole model, tests.ray_jobs.test_checkpoints.Net"),
    "a whole model of torch's": (
        lambda: saved(nn.Sequential(nn.ReLU())),
        "a whole model, torch.nn.modules.container.Sequential",
    ),
    "other objects": (lambda: saved({"model": values(), "path": Path("x")}), "athlib"),
    "other objects before torch 1.6": (
        lambda: saved({"path": Path("x")}, _use_new_zipfile_serialization=False),
        "athlib",
    ),
    "numpy": (lambda: saved({"model": np.zeros(3)}), "numpy"),
    "a pickle": (lambda: pickle.dumps({"a": 1}), "a pickle that torch.save did not write"),
    "TorchScript": (scripted, "TorchScript"),
    "an exported program": (exported, "torch.export"),
    "npz": (arrays, "a.npy"),
    "empty": (lambda: b"", "empty"),
    "LFS": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 12\n", "LFS"),
    "HTML": (lambda: b"\n<!DOCTYPE html><html>404</html>", "HTML"),
    "text": (lambda: b'{"weight_map": {}}', "text"),
    "gzip": (lambda: gzip.compress(saved(values())), "gzip"),
    "noise": (lambda: bytes(range(200, 256)) * 9, "not a torch or safetensors file"),
    "truncated": (lambda: saved(values())[:-200], "truncated"),
    "truncated, before torch 1.6": (lambda: saved(values(), _use_new_zipfile_serialization=False)[:-20], "truncated"),
    "truncated safetensors": (lambda: safetensors(values())[:-20], "truncated"),
    "a list": (lambda: saved([torch.ones(1)]), "type list"),
    "a tensor": (lambda: saved(torch.ones(1)), "type Tensor"),
    "an empty dictionary": (lambda: saved({}), "an empty state dict"),
    "values among tensors": (lambda: saved({**values(), "epoch": 3}), "epoch"),
    "two state dicts": (lambda: saved({"generator": values(), "critic": values()}), "generator, critic"),
    "a prefix and others": (lambda: saved({**prefixed("model.", values()), "loss.weight": torch.ones(1)}), "'model.'"),
    "too few": (lambda: saved({k: v for k, v in values().items() if k != "fc.bias"}), "fc.bias"),
    "too many": (lambda: saved({**values(), "head.bias": torch.ones(1)}), "head.bias"),
    "another shape": (lambda: saved({**values(), "fc.bias": torch.ones(7)}), "(7,), but (3,) in the model"),
    "two names for one": (lambda: saved({**values(), **prefixed("module.", values())}), "not in the model"),
}


@pytest.mark.parametrize(("content", "phrase"), INVALID.values(), ids=INVALID)
def test_invalid_file_is_an_error_that_says_what_it_is(
    content: Callable[[], bytes], phrase: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        load(content(), tmp_path)
    assert phrase in caught.value.what
    assert caught.value.where == f"--weights {tmp_path / 'weights'}"
    for unwanted in ("\x1b", "\n"):
        assert unwanted not in str(caught.value)
    # torch's own advice, to load anything, is given for whole models only, which cannot be converted otherwise.
    assert ("weights_only" in str(caught.value)) == ("a whole model" in caught.value.what)


def test_missing_prefix_is_named(tmp_path: Path) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = Net()

    with pytest.raises(UserError, match=r"'backbone\.'"):
        load(saved(values()), tmp_path, Outer())


def test_pickle_is_never_executed(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "executed",)

    for options in ({}, {"_use_new_zipfile_serialization": False}):
        with pytest.raises(UserError, match="pickle"):
            load(saved({"model": Harm()}, **options), tmp_path)
    with pytest.raises(UserError, match="pickle"):
        load(pickle.dumps(Harm()), tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["Default", "pretrained", "none"])
def test_word_that_is_no_file_is_answered_by_the_names_of_weights(name: str) -> None:
    with pytest.raises(UserError, match="default, random") as caught:
        load_weights(Net(), name, "m.py:net")
    assert caught.value.where == f"--weights {name}"


def write_index(folder: Path, state: State, files: dict[str, list[str]], listed: dict[str, str] | None = None) -> Path:
    """Write safetensors files of some tensors each, and their index."""
    folder.mkdir(exist_ok=True)
    for file, names in files.items():
        (folder / file).write_bytes(safetensors({name: state[name] for name in names}))
    names = listed or {name: file for file, names in files.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder / "model.safetensors.index.json"


def test_weights_in_several_files_are_found_by_their_index(tmp_path: Path) -> None:
    state, model = values(), Net()
    names = list(state)
    load_weights(
        model, str(write_index(tmp_path, state, {"a.safetensors": names[:4], "b.safetensors": names[4:]})), "net"
    )
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("files", "listed", "what"),
    [
        ({"a.safetensors": ["fc.bias"]}, {"fc.bias": "a.safetensors", "x": "b.safetensors"}, "b.safetensors"),
        ({"a.safetensors": ["fc.bias"]}, {"fc.bias": "a.safetensors", "x": "a.safetensors"}, "the first is x"),
        ({"a.safetensors": ["fc.bias"]}, {"fc.bias": "../a.safetensors"}, "another folder"),
    ],
)
def test_index_without_its_files_is_an_error(
    tmp_path: Path, files: dict[str, list[str]], listed: dict[str, str], what: str
) -> None:
    with pytest.raises(UserError) as caught:
        load_weights(Net(), str(write_index(tmp_path / "m", values(), files, listed)), "net")
    assert what in f"{caught.value.where} {caught.value.what}"


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"weight_map": [1]}', b"[" * 100_000])
def test_file_that_is_no_index_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.index.json").write_bytes(content)
    with pytest.raises(UserError, match="not an index"):
        load_weights(Net(), str(tmp_path / "m.index.json"), "net")


@pytest.mark.parametrize(
    ("wrap", "note"),
    [
        (lambda state: state, None),
        (lambda state: {"state_dict": state, "epoch": 3}, "weights from the key 'state_dict' of the file"),
        (lambda state: prefixed("module.", state), "weights from names such as module.conv.weight for conv.weight"),
        (
            lambda state: {"model_ema": prefixed("module.", state)},
            "weights from the key 'model_ema' of the file, with names such as module.conv.weight for conv.weight",
        ),
    ],
)
def test_note_says_where_the_weights_were_found(
    tmp_path: Path, wrap: Callable[[State], State], note: str | None
) -> None:
    torch.save(wrap(values()), tmp_path / "w.pt")
    assert load_weights(Net(), str(tmp_path / "w.pt"), "net") == note
