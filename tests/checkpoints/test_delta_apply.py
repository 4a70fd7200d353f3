"""A base with a delta put in: bit for bit the tuned model, in the base's layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssrctl.checkpoints import delta, tensor_files
from ssrctl.checkpoints.delta import Delta, DeltaFile, changed_indices, save_delta
from ssrctl.checkpoints.delta_apply import AppliedCheckpoint, write_applied
from ssrctl.checkpoints.delta_diff import write_difference
from ssrctl.checkpoints.fingerprint import fingerprint
from ssrctl.checkpoints.model_folder import copy_companions, set_config_dtype, whole_folder
from ssrctl.checkpoints.reader import TensorReader, check_weights
from ssrctl.errors import UserError
from ssrctl.io import packed_numbers
from ssrctl.io.artifacts import ModelIdentity

Weights = dict[str, Tensor]
EMBEDDING, UP, NORM, HEAD = (
    "model.embed_tokens.weight",
    "model.layers.0.up.weight",
    "model.norm.weight",
    "lm_head.weight",
)
SHAPES: dict[str, tuple[int, ...]] = {EMBEDDING: (11, 4), UP: (6, 4), NORM: (4,)}
INTEGER = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def weights(dtype: torch.dtype = torch.float32, seed: int = 0) -> Weights:
    """Any finite or other bits, all but the NaNs (which float conversions do not keep)."""
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    made[UP].view(-1)[:3] = torch.tensor([-0.0, float("inf"), 1e-40]).to(dtype)
    return made


def moved(base: Weights, share: float = 0.3, seed: int = 1) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.where(torch.rand(one.shape, generator=generator) < share, torch.randn(one.shape, generator=generator).to(one.dtype), one)
        for name, one in base.items()
    }  # fmt: skip


def save(folder: Path, tensors: Weights, num_files: int = 1, config: dict[str, object] | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config or {}))
    if num_files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {name: f"part/model-{i % num_files}.safetensors" for i, name in enumerate(tensors)}
    (folder / "part").mkdir()
    for file in set(weight_map.values()):
        save_file({name: tensor for name, tensor in tensors.items() if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def run_delta(path: Path, base: Weights, tuned: Weights, started_from: Weights | None = None) -> Path:
    """A delta as ``ssrctl train`` writes it: no word on the dtypes of what did not change."""
    changes = {}
    for name, tensor in tuned.items():
        indices = changed_indices(base[name].to(tensor.dtype), tensor)
        if indices.numel():
            changes[name] = (indices, tensor.flatten()[indices])
    identity = ModelIdentity(name="base", revision=None, fingerprint=fingerprint((started_from or base).items()))
    save_delta(path, Delta(identity, {name: tuple(tensor.shape) for name, tensor in base.items()}, changes))
    return path


def apply(base: Path, delta_path: Path, folder: Path) -> str:
    """What the stage does, without the files around the weights."""
    file = DeltaFile(delta_path)
    with TensorReader(base) as reader:
        reader.align(file.shapes)
        load_dtype = check_weights(delta_path, file.base, file.shapes, reader)
        made = AppliedCheckpoint(reader, file, load_dtype)
        with whole_folder(folder) as temporary:
            written: list[str] = []
            found = write_applied(made, temporary, {"format": "pt"}, written.append)
            assert sorted(written) == sorted(name for one in reader.files for name in reader.stored_in(one))
    return found


def read(folder: Path) -> Weights:
    """All tensors of a folder, by the library."""
    return {name: one for file in folder.rglob("*.safetensors") for name, one in load_file(file).items()}


def assert_same(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        integer = INTEGER[tensor.dtype]
        assert torch.equal(found[name].view(integer), tensor.view(integer)), name


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from(list(INTEGER)),
    files=st.integers(1, 3),
    sizes=st.sampled_from([(1, 1), (5, 2), (3, 7), (2**20, 2**21)]),
    share=st.sampled_from([0.0, 0.1, 1.0]),
    small=st.booleans(),
)
def test_diff_then_apply_gives_every_bit_back(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    dtype: torch.dtype,
    files: int,
    sizes: tuple[int, int],
    share: float,
    small: bool,
) -> None:
    tmp_path = tmp_path_factory.mktemp("apply")
    generator = torch.Generator().manual_seed(seed)
    width = torch.iinfo(INTEGER[dtype])
    # any bits at all: NaNs with payloads, infinities, denormals
    base, other = (
        {n: torch.randint(width.min, width.max, s, generator=generator).to(INTEGER[dtype]).view(dtype) for n, s in SHAPES.items()}
        for _ in range(2)
    )  # fmt: skip
    tuned = {n: torch.where(torch.rand(t.shape, generator=generator) < share, other[n], t) for n, t in base.items()}
    folder = save(tmp_path / "base", base, files)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_files, "PIECE_ELEMENTS", sizes[0])
        patch.setattr(delta, "BLOCK_ENTRIES", sizes[1])
        patch.setattr(packed_numbers, "BLOCK", sizes[1])
        with TensorReader(folder) as one, TensorReader(save(tmp_path / "tuned", tuned)) as two:
            names = one.in_file_order(list(one.shapes))
            write_difference(tmp_path / "d.st", one, two, names, settings={}, small=small)
        found = apply(folder, tmp_path / "d.st", tmp_path / "out")
    assert found == fingerprint(tuned.items())
    assert_same(read(tmp_path / "out"), tuned)
    index = "model.safetensors.index.json"
    assert (tmp_path / "out" / index).exists() == (files > 1)
    if files > 1:
        made, before = (json.loads((tmp_path / one / index).read_text()) for one in ("out", "base"))
        assert made["weight_map"] == before["weight_map"]
        assert made["metadata"]["total_size"] == sum(one.nbytes for one in tuned.values())
    assert sorted(one.name for one in tmp_path.iterdir()) == ["base", "d.st", "out", "tuned"]


def test_a_float32_run_on_a_bfloat16_base_gives_float32_weights(tmp_path: Path) -> None:
    base = weights(torch.bfloat16)
    tuned = {name: one.float() for name, one in base.items()}
    tuned[UP][2, 1] += 1e-4  # lost in bfloat16
    folder = save(tmp_path / "base", base | {HEAD: base[EMBEDDING].clone()})
    apply(folder, run_delta(tmp_path / "d.st", base, tuned), tmp_path / "out")
    # unchanged tensors and the tied copy too
    assert_same(read(tmp_path / "out"), tuned | {HEAD: tuned[EMBEDDING]})


def test_a_run_that_rounded_its_base_as_it_loaded_it(tmp_path: Path) -> None:
    stored, started = weights(), {name: one.bfloat16() for name, one in weights().items()}
    tuned = {name: one.float() for name, one in started.items()}
    tuned[EMBEDDING][3, 3] = 0.12345
    folder = save(tmp_path / "base", stored, config={"dtype": "bfloat16"})
    # what did not change is the rounded base, not the stored one
    run_delta(tmp_path / "d.st", started, tuned, started)
    apply(folder, tmp_path / "d.st", tmp_path / "out")
    assert_same(read(tmp_path / "out"), tuned)
    # a run that changed nothing: the base as it was loaded
    run_delta(tmp_path / "none.st", started, started)
    apply(folder, tmp_path / "none.st", tmp_path / "none")
    assert_same(read(tmp_path / "none"), started)


def test_mixed_dtypes_stay_mixed_between_two_checkpoints(tmp_path: Path) -> None:
    base = weights(torch.bfloat16)
    base[NORM] = base[NORM].float()
    tuned = dict(moved(base), **{NORM: base[NORM]})
    with TensorReader(save(tmp_path / "base", base)) as one, TensorReader(save(tmp_path / "tuned", tuned)) as two:
        write_difference(tmp_path / "d.st", one, two, list(base), settings={})
        assert AppliedCheckpoint(one, DeltaFile(tmp_path / "d.st"), None).uniform_dtype is None
    apply(tmp_path / "base", tmp_path / "d.st", tmp_path / "out")
    assert_same(read(tmp_path / "out"), tuned)


@pytest.mark.parametrize("dtype", list(INTEGER), ids=str)
def test_a_stored_copy_of_the_embedding_follows_it(tmp_path: Path, dtype: torch.dtype) -> None:
    base = weights(dtype)
    tuned = moved(base)
    folder = save(tmp_path / "base", base | {HEAD: base[EMBEDDING].clone(), "rope.inv_freq": torch.ones(2)}, 2)
    apply(folder, run_delta(tmp_path / "d.st", base, tuned), tmp_path / "out")
    assert_same(read(tmp_path / "out"), tuned | {HEAD: tuned[EMBEDDING], "rope.inv_freq": torch.ones(2)})


def test_a_head_of_its_own_stays_what_it_is(tmp_path: Path) -> None:
    base = weights()
    head = base[EMBEDDING].clone()
    head[2, 2] += 1  # no copy: a file may hold a head that the model does not use
    folder = save(tmp_path / "base", base | {HEAD: head})
    tuned = moved(base)
    apply(folder, run_delta(tmp_path / "d.st", base, tuned), tmp_path / "out")
    assert_same(read(tmp_path / "out"), tuned | {HEAD: head})


def test_names_stay_as_the_base_stores_them(tmp_path: Path) -> None:
    short = {"wte.weight": torch.randn(9, 4), "ln_f.bias": torch.randn(4)}
    long = {f"transformer.{name}": one for name, one in short.items()}
    tuned = moved(long)
    apply(save(tmp_path / "base", short), run_delta(tmp_path / "d.st", long, tuned), tmp_path / "out")
    assert_same(read(tmp_path / "out"), {name.removeprefix("transformer."): one for name, one in tuned.items()})


def test_another_base_is_refused(tmp_path: Path) -> None:
    base = weights()
    path = run_delta(tmp_path / "d.st", base, moved(base))
    other = weights()
    other[NORM][1] += 1e-6
    with pytest.raises(UserError, match=r"d\.st belongs to base xxh3:\w+, other has xxh3:"):
        apply(save(tmp_path / "other", other), path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_codes_and_numbers_do_not_mix(tmp_path: Path) -> None:
    base = weights()
    path = run_delta(tmp_path / "d.st", base, moved(base))
    with (
        TensorReader(save(tmp_path / "q", {name: one.to(torch.int8) for name, one in base.items()})) as reader,
        pytest.raises(UserError, match="holds float32, q stores int8"),
    ):
        AppliedCheckpoint(reader, DeltaFile(path), None)


@pytest.mark.parametrize("bad", [24, 2**31 - 1], ids=["one beyond", "far beyond"])
def test_an_index_out_of_range_leaves_nothing(tmp_path: Path, bad: int) -> None:
    base = weights()
    path = run_delta(tmp_path / "d.st", base, moved(base))
    edit(path, f"{UP}.indices", lambda indices: indices.index_fill(0, torch.tensor([len(indices) - 1]), bad))
    with pytest.raises(UserError, match=rf"{UP}: indices are not ascending within 0\.\.23"):
        apply(save(tmp_path / "base", base, 2), path, tmp_path / "out")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["base", "d.st"]


def test_entries_of_an_empty_tensor_are_out_of_range(tmp_path: Path) -> None:
    base = {"w": torch.zeros(0, 3), "v": torch.zeros(2)}
    identity = ModelIdentity(name="b", revision=None, fingerprint=fingerprint(base.items()))
    save_delta(tmp_path / "d.st", Delta(identity, {"w": (0, 3), "v": (2,)}, {"w": (torch.tensor([0]), torch.ones(1))}))
    with pytest.raises(UserError, match=r"w: indices are not ascending within 0\.\.-1"):
        apply(save(tmp_path / "base", base), tmp_path / "d.st", tmp_path / "out")


def edit(path: Path, name: str, change: object) -> None:
    """Change one tensor of a delta."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    tensors[name] = change(tensors[name])  # type: ignore[operator]
    save_file(tensors, path, metadata=metadata)


def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    base = weights()
    folder, path = save(tmp_path / "base", base, 2), run_delta(tmp_path / "d.st", base, moved(base))

    def interrupted(name: str) -> None:
        if name == UP:
            raise KeyboardInterrupt

    with TensorReader(folder) as reader, pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "out") as temporary:
        assert temporary.is_dir()
        write_applied(AppliedCheckpoint(reader, DeltaFile(path), None), temporary, {}, interrupted)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["base", "d.st"]


# --------------------------------------------------------------------------------------------------
# the folder around the weights


def test_a_folder_takes_the_place_of_an_empty_one_alone(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    for folder in (tmp_path / "empty", plain):
        folder.mkdir()
    for name in ("empty", "new/deep"):
        with whole_folder(tmp_path / name) as folder:
            (folder / "x").write_text("1")
        assert (tmp_path / name / "x").read_text() == "1"
        assert (tmp_path / name).stat().st_mode == plain.stat().st_mode
    with pytest.raises(UserError, match="empty is not empty"), whole_folder(tmp_path / "empty"):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not a folder"), whole_folder(tmp_path / "file"):
        pass
    assert (tmp_path / "empty" / "x").read_text() == "1"


def test_what_is_copied_beside_the_weights(tmp_path: Path) -> None:
    cache, target = tmp_path / "models--me--tiny", tmp_path / "target"
    source, blobs = cache / "snapshots" / "0123", cache / "blobs"
    for folder in (source / "additional_chat_templates", target, blobs, source / "runs"):
        folder.mkdir(parents=True)
    (blobs / "abc").write_text("tokens")
    (source / "tokenizer.json").symlink_to(blobs / "abc")  # as the hub's cache has it
    kept = ["config.json", "generation_config.json", "merges.txt", "tokenizer.model", "chat_template.jinja",
            "LICENSE", "modeling_x.py", "additional_chat_templates/tool.jinja"]  # fmt: skip
    left = ["README.md", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", ".secret.json",
            "pytorch_model.bin.index.json", "runs/log.json"]  # fmt: skip
    for name in (*kept, *left):
        (source / name).write_text(name)
    assert copy_companions(source, target) == sorted([*kept, "tokenizer.json"])
    assert sorted(one.relative_to(target).as_posix() for one in target.rglob("*") if one.is_file()) == sorted(
        [*kept, "tokenizer.json"]
    )
    assert (target / "tokenizer.json").read_text() == "tokens" and not (target / "tokenizer.json").is_symlink()
    for name in ("NOTICE", "additional_chat_templates/other.jinja"):
        (source / name).symlink_to("/etc/hostname")
        with pytest.raises(UserError, match=f"{name} is a link that leads out"):
            copy_companions(source, tmp_path / "target")
        (source / name).unlink()


def test_the_config_asks_for_the_dtype_of_the_weights(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for before, changed, after in (
        ({"dtype": "bfloat16", "x": "ü"}, True, {"dtype": "float32", "x": "ü"}),
        ({"torch_dtype": "bfloat16"}, True, {"torch_dtype": "float32"}),
        ({"dtype": "float32"}, False, {"dtype": "float32"}),
        ({"dtype": None}, False, {"dtype": None}),
        ({}, False, {}),
    ):
        path.write_text(json.dumps(before))
        assert set_config_dtype(tmp_path, torch.float32) is changed
        assert json.loads(path.read_text()) == after
    path.write_text("[]")
    with pytest.raises(UserError, match="not a json object"):
        set_config_dtype(tmp_path, torch.float32)
