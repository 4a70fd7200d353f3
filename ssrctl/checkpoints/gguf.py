"""Reading a GGUF file as the tuned side of a comparison, tensor by tensor.

Names, and the order of rows that llama.cpp changes, are converted by the ``gguf`` package and by transformers. Weights
in F32, F16 and BF16 keep their stored values. Quantised weights are refused: rounding to a few bits moves nearly every
weight, so that nothing could be said about training.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssrctl.checkpoints.names import NameMap
from ssrctl.checkpoints.reader import TensorReader
from ssrctl.checkpoints.tensor_files import PIECE_ELEMENTS, StoredTensor
from ssrctl.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".gguf"
_FLOATS = ("F32", "F16", "BF16")
# Rotary frequencies, which Hugging Face checkpoints compute instead of storing them.
_CONSTANTS = ("rope_freqs", "rope_factors_long", "rope_factors_short")
# Those of transformers' conversions that keep one tensor one tensor; the others merge, split or exponentiate.
_SIMPLE = ("llama", "nemotron", "gemma2", "gemma3", "lfm2")
_SHIFTED = ("nemotron", "gemma2", "gemma3")


class GgufReader(TensorReader):
    """An open GGUF file with the names and shapes of a Hugging Face checkpoint.

    Attributes:
        notes: sentences that a reader of a comparison needs.
    """

    def __init__(self, path: Path, names: Collection[str]) -> None:
        """Open ``path`` and give its tensors those of ``names`` that they stand for.

        Raises:
            UserError: the ``gguf`` package is missing, or the file is damaged, quantised or of an architecture that is
                not read.
        """
        self._wanted = names
        self.notes: list[str] = []
        self._read = functools.lru_cache(maxsize=2)(self._values)  # a tensor is read in ranges by a few threads
        super().__init__(path)

    def reopened(self, names: Collection[str]) -> GgufReader:
        return GgufReader(self.path, names)

    def _locate(self, location: Path) -> dict[str, Path]:
        return {"": location}

    def _read_headers(self) -> None:
        (file,) = self.files
        self._places.clear()
        gguf = _package(file)
        try:
            reader: Any = gguf.GGUFReader(file)
            architecture = str(reader.get_field("general.architecture").contents())
            count = int(reader.get_field(f"{architecture}.block_count").contents())
        except (ValueError, KeyError, IndexError, AttributeError, OSError) as error:
            raise UserError(f"{file} is not a readable GGUF file: {error}", "copy it again") from error
        self._tensors = {one.name: one for one in reader.tensors if one.name.partition(".")[0] not in _CONSTANTS}
        self._refuse_quantised(file)
        self._processor = _processor(file, architecture, reader)
        self._stored[file] = {name: self._place(tensor) for name, tensor in self._tensors.items()}
        for name, stored in sorted(self._stored[file].items()):
            assert stored.dtype is not None
            self.shapes[name], self.dtypes[name] = stored.shape, stored.dtype
        self._places = dict.fromkeys(self.shapes, file)
        self._file_of_stored = dict(self._places)
        if architecture in _SHIFTED:
            self.notes.append(
                f"{self.label} stores the norms of {architecture} plus one, in float32: differences up to the rounding "
                "of that sum, 6e-8, are no changes."
            )
        arch = next((key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture), None)
        if arch is None:
            raise UserError(f"{file}: the gguf package does not know {architecture}", "pip install --upgrade gguf")
        known = gguf.get_tensor_name_map(arch, count)
        theirs = {known.get_name(name, (".weight", ".bias")): name for name in sorted(self._wanted)}
        self._rename(NameMap("", {name: theirs[name] for name in self._tensors if name in theirs}))

    def _refuse_quantised(self, file: Path) -> None:
        kinds = {name: str(tensor.tensor_type.name) for name, tensor in self._tensors.items()}
        if others := {name: kind for name, kind in kinds.items() if kind not in _FLOATS}:
            counted = ", ".join(f"{number} in {kind}" for kind, number in collections.Counter(others.values()).items())
            raise UserError(
                f"{file} is quantised: of {len(kinds)} tensors {counted}, first {min(others)}; rounding to a few bits moves "
                "nearly every weight, which hides what training changed",
                "compare the GGUF file in F32, F16 or BF16",
            )

    def _place(self, tensor: Any) -> StoredTensor:
        """Return the place of a tensor with its shape as Hugging Face stores it."""
        import numpy as np

        raw = tuple(map(int, reversed(tensor.shape)))
        shape = self._processor.process(weights=np.broadcast_to(np.int8(0), raw), name=tensor.name).weights.shape
        return StoredTensor(tensor.tensor_type.name, tuple(shape), int(tensor.data_offset), int(tensor.n_bytes))

    def _values(self, name: str) -> Tensor:
        """Return a stored tensor, by its name in the file."""
        import numpy as np
        import torch

        tensor = self._tensors[name]
        raw = (
            np.asarray(tensor.data)
            .reshape(-1)
            .view({"F32": "<f4", "F16": "<f2", "BF16": "<i2"}[tensor.tensor_type.name])
        )
        shaped = raw.reshape(tuple(map(int, reversed(tensor.shape))))
        made = torch.from_numpy(np.array(self._processor.process(weights=shaped, name=name).weights))
        return made.view(torch.bfloat16) if tensor.tensor_type.name == "BF16" else made

    def tensor(self, name: str) -> Tensor:
        """Read one tensor, as stored."""
        if name in self.name_map.joined:
            return super().tensor(name)
        whole = self._read(self.name_map.to_file(name))
        return whole[: self.shapes[name][0]] if name in self._cropped else whole

    def _stored_pieces(self, name: str, start: int, stop: int | None, *, reuse: bool = False) -> Iterator[Tensor]:
        flat = self._read(name).flatten()[start:stop]
        yield from flat.split(PIECE_ELEMENTS) if len(flat) else ()


def _package(file: Path) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise UserError(f"reading {file} needs the gguf package", "pip install 'ssrctl[gguf]'") from error
    return gguf


def _processor(file: Path, architecture: str, reader: Any) -> Any:
    """Return transformers' conversion of an architecture's tensors."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    found = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
    if found is not TensorProcessor and architecture not in _SIMPLE:
        raise UserError(
            f"{file}: GGUF files of {architecture} are not read, whose tensors are merged or transformed",
            "convert it: from_pretrained(FOLDER, gguf_file=NAME), then save_pretrained writes safetensors",
        )
    heads = {}
    for key, field in (("num_attention_heads", "head_count"), ("num_key_value_heads", "head_count_kv")):
        if (number := reader.get_field(f"{architecture}.attention.{field}")) is not None:
            heads[key] = int(number.contents())
    return found(config=heads)
