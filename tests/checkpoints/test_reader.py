"""Checkpoints of every form are read as what they hold, and damaged ones give one clear error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ssrctl.checkpoints.delta import Delta, changed_indices, save_delta
from ssrctl.checkpoints.fingerprint import fingerprint
from ssrctl.checkpoints.names import NameMap
from ssrctl.checkpoints.parameter_names import matching_names, tied_copies
from ssrctl.checkpoints.reader import TensorReader, delta_meant_by, open_delta
from ssrctl.checkpoints.run_dir import newest_checkpoint
from ssrctl.errors import UserError
from ssrctl.io.artifacts import ModelIdentity

Weights = dict[str, Tensor]
INDEX = "model.safetensors.index.json"


def weights(dtype: torch.dtype = torch.float32) -> Weights:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "model.embed_tokens.weight": (11, 4),
        "model.layers.0.mlp.up_proj.weight": (6, 4),
        "model.norm.weight": (4,),
    }
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def save_folder(folder: Path, tensors: Weights, config: dict[str, object] | None = None) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    return folder


def save_shards(folder: Path, tensors: Weights, **replaced: str) -> Path:
    """One shard per tensor; ``replaced`` names other shards in the index."""
    folder.mkdir(parents=True)
    weight_map = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        shard = f"model-{number}.safetensors"
        save_file({name: tensor}, folder / shard)
        weight_map[name] = replaced.get(f"shard{number}", shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def delta_of(base: Weights, tuned: Weights, started_from: Weights | None = None) -> Delta:
    """What turns ``base`` into ``tuned``; the fingerprint is that of ``started_from`` (default: base)."""
    changes = {}
    for name, tensor in tuned.items():
        indices = changed_indices(base[name].to(tensor.dtype), tensor)
        if indices.numel():
            changes[name] = (indices, tensor.flatten()[indices])
    identity = ModelIdentity(name="base", revision=None, fingerprint=fingerprint((started_from or base).items()))
    return Delta(identity, {name: tuple(tensor.shape) for name, tensor in base.items()}, changes)


def assert_holds(reader: object, expected: Weights) -> None:
    assert list(reader.shapes) == sorted(expected)  # type: ignore[attr-defined]
    for name, tensor in expected.items():
        found = reader.tensor(name)  # type: ignore[attr-defined]
        assert found.dtype == reader.dtypes[name] == tensor.dtype and torch.equal(found, tensor)  # type: ignore[attr-defined]
        assert reader.shapes[name] == tuple(tensor.shape)  # type: ignore[attr-defined]
        for start, stop in ((0, None), (0, 3), (3, tensor.numel()), (2, 7)):
            part = torch.cat(list(reader.pieces(name, start, stop)))  # type: ignore[attr-defined]
            assert part.dtype == tensor.dtype and torch.equal(part, tensor.flatten()[start:stop])


def test_file_folder_and_shards_hold_the_same(tmp_path: Path) -> None:
    tensors = weights(torch.bfloat16)
    folder = save_folder(tmp_path / "whole", tensors)
    for path in (folder, folder / "model.safetensors", save_shards(tmp_path / "shards", tensors)):
        with TensorReader(path) as reader:
            assert reader.label == path.name
            assert_holds(reader, tensors)


def test_the_bundled_model_is_known_by_its_name() -> None:
    with TensorReader("tiny-reasoner") as reader:
        assert reader.label == "tiny-reasoner"
        assert "model.embed_tokens.weight" in reader.shapes


def opening(path: Path) -> str:
    with pytest.raises(UserError) as caught, TensorReader(path):
        pass
    assert caught.value.remedy
    return str(caught.value)


def test_what_is_not_there(tmp_path: Path) -> None:
    assert "checkpoint not found" in opening(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "neither model.safetensors nor" in opening(tmp_path / "empty")
    (tmp_path / "empty" / "pytorch_model.bin").write_bytes(b"x")
    assert "but pytorch_model.bin" in (message := opening(tmp_path / "empty")) and "save_pretrained" in message
    assert "is a pickle" in opening(tmp_path / "empty" / "pytorch_model.bin")
    assert "checkpoint not found" in opening(tmp_path / ("x" * 300))
    save_file({}, tmp_path / "none.safetensors")
    assert "no tensors in it" in opening(tmp_path / "none.safetensors")


def test_missing_shard_is_named(tmp_path: Path) -> None:
    folder = save_shards(tmp_path / "m", weights())
    (folder / "model-1.safetensors").unlink()
    assert "shard model-1.safetensors is missing (1 of 3 shards are)" in opening(folder)
    (folder / "model-0.safetensors").unlink()
    assert "shard model-0.safetensors is missing (2 of 3 shards are)" in opening(folder)


@pytest.mark.parametrize("shard", ["", ".", "a\0b", "x" * 5000, "\ud800", "\x1b[31m.safetensors"])
def test_index_that_names_what_is_no_file(tmp_path: Path, shard: str) -> None:
    message = opening(save_shards(tmp_path / "m", weights(), shard1=shard))
    assert "is missing (1 of 3 shards are)" in message and len(message) < 600 and "\x1b" not in message


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "elsewhere.safetensors")
    folder = save_shards(tmp_path / "m", weights())
    for name in ("model-1.safetensors", INDEX):
        kept = (folder / name).read_bytes()
        (folder / name).unlink()
        (tmp_path / name).write_bytes(kept)
        (folder / name).symlink_to(tmp_path / name)
        assert f"{name} is a link that leads out of the model's folder" in opening(folder)
        (folder / name).unlink()
        (folder / name).write_bytes(kept)
    single = tmp_path / "single"
    single.mkdir()
    (single / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    assert "leads out" in opening(single)
    with TensorReader(single / "model.safetensors") as reader:  # named itself: the user's choice
        assert_holds(reader, weights())
    (single / "model.safetensors").unlink()
    (single / "model.safetensors").symlink_to(single / "model.safetensors")
    assert "not found" in opening(single)


def test_links_within_the_folder_and_in_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "m", weights())
    (folder / "model.safetensors").rename(folder / "real")
    (folder / "model.safetensors").symlink_to("real")
    blobs = tmp_path / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    snapshot = save_folder(blobs.parent / "snapshots" / "abc", weights())
    (snapshot / "model.safetensors").rename(blobs / "0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    for place in (folder, snapshot):
        with TensorReader(place) as reader:
            assert_holds(reader, weights())


def test_a_model_of_the_hubs_cache_is_called_what_the_hub_calls_it(tmp_path: Path) -> None:
    snapshot = save_folder(tmp_path / "models--Qwen--Qwen3-0.6B" / "snapshots" / "c1899de", weights())
    for place in (snapshot, snapshot / "model.safetensors"):
        with TensorReader(place) as reader:
            assert reader.identity("xxh3:0") == ModelIdentity(
                name="Qwen/Qwen3-0.6B", revision="c1899de", fingerprint="xxh3:0"
            )
    with TensorReader(save_folder(tmp_path / "mine", weights())) as reader:
        assert reader.identity("xxh3:0") == ModelIdentity(name="mine", revision=None, fingerprint="xxh3:0")


def test_names_go_both_ways() -> None:
    stored = ["wte.weight", "h.0.attn.bias", "ln_f.bias", "lm_head.weight"]
    names = NameMap.between(stored, ["transformer.wte.weight", "transformer.ln_f.bias", "lm_head.weight", "other.x"])
    assert names.prefix == "transformer."
    renamed = ["transformer.wte.weight", "h.0.attn.bias", "transformer.ln_f.bias", "lm_head.weight"]
    assert [names.to_parameter(name) for name in stored] == renamed
    assert [names.to_file(name) for name in renamed] == stored
    for others in (["ln_f.bias", "transformer.wte.weight"], ["model.x"], []):  # one name agrees as it is, or none does
        assert NameMap.between(stored, others) == NameMap()


def test_a_head_is_compared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = weights()["model.embed_tokens.weight"].clone()
    compared: list[str] = []
    real = TensorReader.pieces
    monkeypatch.setattr(
        TensorReader, "pieces", lambda self, name, **more: compared.append(name) or real(self, name, **more)
    )
    with TensorReader(save_folder(tmp_path / "m", weights() | {"lm_head.weight": head})) as reader:
        for _ in range(2):
            assert tied_copies(reader, weights()) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert compared == ["model.embed_tokens.weight", "lm_head.weight"]


def test_adapter_file_named_itself(tmp_path: Path) -> None:
    names = [f"base_model.model.layers.0.q_proj.lora_{side}.weight" for side in "AB"]
    save_file({name: torch.ones(2, 2) for name in names}, tmp_path / "adapter_model.safetensors")
    message = opening(tmp_path / "adapter_model.safetensors")
    assert "is a LoRA adapter" in message and "2 tensors like" in message and "merge_and_unload" in message


@pytest.mark.parametrize(
    "shard", ["../other.safetensors", "/etc/passwd", "sub/../../other.safetensors", "C:\\x", "..\\x"]
)
def test_shard_outside_the_folder_is_refused(tmp_path: Path, shard: str) -> None:
    save_file(weights(), tmp_path / "other.safetensors")  # it exists, and is still not read
    message = opening(save_shards(tmp_path / "m", weights(), shard1=shard))
    assert "lies outside of the model's folder" in message and repr(shard) in message


def test_index_that_does_not_fit_its_shards(tmp_path: Path) -> None:
    folder = save_shards(tmp_path / "m", weights(), shard1="model-0.safetensors")
    assert "says that it holds model.layers.0.mlp.up_proj.weight, but it does not" in opening(folder)
    deep = '{"weight_map": ' + "[" * 100_000
    for text in ("{", "[]", '{"weight_map": 3}', "{}", "\xff", '{"weight_map": {"a": {}}}', deep):
        (folder / INDEX).write_text(text, encoding="latin-1")
        assert "not an index of shards" in opening(folder)


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_torn_file(tmp_path: Path, kept: int) -> None:
    file = save_folder(tmp_path / "m", weights()) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    message = opening(tmp_path / "m")
    assert "not a readable safetensors file" in message and "truncated" in message


def test_lora_adapter_is_told_apart(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "adapter", weights())
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    message = opening(folder)
    assert "is a LoRA adapter" in message and "merge_and_unload" in message


def match(tmp_path: Path, base: Weights, tuned: Weights, strict: bool = True) -> tuple[list[str], list[str]]:
    folders = [save_folder(tmp_path / side, one) for side, one in (("base", base), ("tuned", tuned))]
    with TensorReader(folders[0]) as one, TensorReader(folders[1]) as other:
        names, notes = matching_names(one, other, strict=strict)
        for reader, tensors in ((one, base), (other, tuned)):
            for name in names:
                assert torch.equal(reader.tensor(name), tensors[reader.name_map.to_file(name)])
        return names, notes


def test_different_shapes_and_names_are_listed(tmp_path: Path) -> None:
    tuned = weights() | {"model.norm.weight": torch.ones(5), "extra": torch.ones(2)}
    del tuned["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(UserError) as caught:
        match(tmp_path, weights(), tuned)
    message = str(caught.value)
    assert "base and tuned are not the same architecture, 3 tensors differ" in message
    assert "(1 only in BASE, 1 only in TUNED, 1 of another shape), of 4" in message
    assert "model.norm.weight is [4] in BASE, [5] in TUNED" in message
    assert "extra only in TUNED" in message and "model.layers.0.mlp.up_proj.weight only in BASE" in message


def test_only_the_first_differences_are_listed(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        match(tmp_path, weights(), weights() | {f"extra{i}": torch.ones(1) for i in range(9)})
    assert "9 tensors differ (9 only in TUNED), of 12" in str(caught.value)
    assert str(caught.value).count("extra") == 3


@pytest.mark.parametrize("holders", ["both", "BASE", "TUNED"])
def test_tied_head_counts_once(tmp_path: Path, holders: str) -> None:
    tied = {"lm_head.weight": weights()["model.embed_tokens.weight"].clone()}
    moved = weights()
    moved["model.embed_tokens.weight"] += 1
    moved_head = {"lm_head.weight": moved["model.embed_tokens.weight"].clone()}
    names, notes = match(
        tmp_path,
        weights() | (tied if holders in ("both", "BASE") else {}),
        moved | (moved_head if holders in ("both", "TUNED") else {}),
    )
    assert names == sorted(weights())
    assert len(notes) == 1 and f"lm_head.weight is stored in {holders} as a copy" in notes[0]


def test_head_of_its_own_is_compared(tmp_path: Path) -> None:
    # one entry apart from the embedding is enough to be a matrix of its own
    head = {"lm_head.weight": weights()["model.embed_tokens.weight"].clone()}
    head["lm_head.weight"][3, 2] += 1
    names, notes = match(tmp_path / "a", weights() | head, weights() | head)
    assert "lm_head.weight" in names and notes == []
    # tied in BASE alone: the head became a matrix of its own, which must not be passed over
    tied = {"lm_head.weight": weights()["model.embed_tokens.weight"].clone()}
    assert "lm_head.weight" in match(tmp_path / "b", weights() | tied, weights() | head)[0]
    with pytest.raises(UserError, match=r"lm_head\.weight only in TUNED"):
        match(tmp_path / "c", weights(), weights() | head)


def gpt2() -> Weights:
    return {"wte.weight": torch.randn(9, 4), "h.0.attn.c_attn.weight": torch.randn(4, 12), "ln_f.bias": torch.randn(4)}


@pytest.mark.parametrize("longer", ["BASE", "TUNED"])
def test_missing_model_prefix_is_put_before_the_names(tmp_path: Path, longer: str) -> None:
    short = gpt2() | {"h.0.attn.bias": torch.ones(1, 1, 8, 8)}
    long = {f"transformer.{name}": tensor + 1 for name, tensor in gpt2().items()}
    names, notes = match(tmp_path, *((long, short) if longer == "BASE" else (short, long)))
    assert names == sorted(long)
    other = {"BASE": "TUNED", "TUNED": "BASE"}[longer]
    assert f"names in {other} lack the prefix 'transformer.'" in notes[0]
    assert f"only {other} stores" in notes[1] and "1 in all, first h.0.attn.bias" in notes[1]


def test_unrelated_names_stay_a_difference(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="6 tensors differ"):
        match(tmp_path, weights(), gpt2())


def tuned_weights(dtype: torch.dtype = torch.float32) -> Weights:
    tuned = weights(dtype)
    tuned["model.layers.0.mlp.up_proj.weight"].view(-1)[[0, 7, 23]] += 0.5
    return tuned


def test_delta_on_its_base_is_the_tuned_model(tmp_path: Path) -> None:
    base = save_folder(tmp_path / "base", weights() | {"lm_head.weight": torch.ones(11, 4)})  # a head: no parameter
    save_delta(tmp_path / "d.safetensors", delta_of(weights(), tuned_weights()))
    with TensorReader(base) as reader:
        delta = open_delta(tmp_path / "d.safetensors", reader)
        assert delta.label == "d.safetensors"
        assert_holds(delta, tuned_weights())
        for name, tensor in weights().items():
            assert torch.equal(delta.base_tensor(name), tensor)


def test_delta_of_a_run_that_loaded_in_the_dtype_of_the_config(tmp_path: Path) -> None:
    # fp32 weights whose config asks for bf16 are loaded in bf16, and that is what the run's fingerprint is of
    started = weights(torch.bfloat16)
    base = save_folder(tmp_path / "base", weights(), {"dtype": "bfloat16"})
    save_delta(tmp_path / "d.safetensors", delta_of(weights(), tuned_weights(torch.bfloat16), started))
    with TensorReader(base) as reader:
        delta = open_delta(tmp_path / "d.safetensors", reader)
        assert delta.load_dtype == torch.bfloat16
        changed = "model.layers.0.mlp.up_proj.weight"
        assert torch.equal(delta.tensor(changed), tuned_weights(torch.bfloat16)[changed])
        assert torch.equal(delta.base_tensor(changed), started[changed])
    (base / "config.json").write_text("{}")
    with TensorReader(base) as reader, pytest.raises(UserError, match="belongs to base xxh3:"):
        open_delta(tmp_path / "d.safetensors", reader)


def test_delta_of_a_model_whose_file_lacks_the_prefix(tmp_path: Path) -> None:
    torch.manual_seed(0)
    short = gpt2()
    long = {f"transformer.{name}": tensor for name, tensor in short.items()}
    tuned = long | {"transformer.ln_f.bias": long["transformer.ln_f.bias"] + 1}
    save_delta(tmp_path / "d.safetensors", delta_of(long, tuned))
    with TensorReader(save_folder(tmp_path / "gpt2", short)) as reader:
        assert_holds(open_delta(tmp_path / "d.safetensors", reader), tuned)


def test_delta_on_another_base_is_refused(tmp_path: Path) -> None:
    save_delta(tmp_path / "d.safetensors", delta_of(weights(), tuned_weights()))
    other = weights()
    other["model.norm.weight"][0] += 1
    for name, tensors, match in (
        ("weights", other, r"d\.safetensors belongs to base xxh3:\w+, weights has xxh3:"),
        ("shapes", weights() | {"model.norm.weight": torch.ones(5)}, r"model\.norm\.weight: \[4\] in the delta, \[5\] in"),
        ("names", {"x": torch.ones(2)}, r"3 tensors differ, .* absent in the base"),
    ):  # fmt: skip
        with (
            TensorReader(save_folder(tmp_path / name, tensors)) as reader,
            pytest.raises(UserError, match=match) as caught,
        ):
            open_delta(tmp_path / "d.safetensors", reader)
        assert caught.value.remedy is not None and "the run started from" in caught.value.remedy


def checkpoint(run: Path, step: int, complete: bool = True) -> Path:
    folder = run / "checkpoints" / f"{step:06d}"
    save_delta(folder / "delta.safetensors", delta_of(weights(), tuned_weights()))
    if complete:
        (folder / "COMPLETE").touch()
    return folder


def test_which_delta_a_path_means(tmp_path: Path) -> None:
    run = tmp_path / "run"
    old, new = checkpoint(run, 9), checkpoint(run, 1000000)
    torn = checkpoint(run, 2000000, complete=False)
    assert newest_checkpoint(run) == new  # by number, where text would put 000009 behind 1000000
    assert delta_meant_by(run) == new / "delta.safetensors"
    assert delta_meant_by(old) == old / "delta.safetensors"
    assert delta_meant_by(torn / "delta.safetensors") == torn / "delta.safetensors"  # named itself: the user's choice
    with pytest.raises(UserError, match="not a complete checkpoint"):
        delta_meant_by(torn)
    model = save_folder(tmp_path / "model", weights())
    assert delta_meant_by(model) is None and delta_meant_by(model / "model.safetensors") is None
    assert delta_meant_by(tmp_path / "nothing") is None
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "config.yaml").touch()
    with pytest.raises(UserError, match="no complete checkpoint"):
        delta_meant_by(tmp_path / "young")


def test_label_of_a_delta_publishes_no_more_than_the_run(tmp_path: Path) -> None:
    checkpoint(tmp_path / "run", 20)
    bare = tmp_path / "someone" / "kept"
    bare.mkdir(parents=True)
    delta = checkpoint(tmp_path / "other", 1) / "delta.safetensors"
    (bare / "delta.safetensors").write_bytes(delta.read_bytes())
    with TensorReader(save_folder(tmp_path / "base", weights())) as reader:
        assert open_delta(delta_meant_by(tmp_path / "run"), reader).label == "run/checkpoints/000020"  # type: ignore[arg-type]
        assert open_delta(bare / "delta.safetensors", reader).label == "kept/delta.safetensors"
