"""Every reader of a file that users bring, on damaged copies of good files: an exit code and one line, no traceback.

Each case derives from its number. The default suite runs the first cases of each reader; ``SSRCTL_FUZZ_CASES=5000`` runs
that many in all, and ``SSRCTL_FUZZ_FIRST`` is the number to start from.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import random
import shutil
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from ssrctl import tiny_reasoner
from ssrctl.cli import main
from ssrctl.io.package_data import profile_path

NUM_CASES = int(os.environ.get("SSRCTL_FUZZ_CASES", "300"))
FIRST_CASE = int(os.environ.get("SSRCTL_FUZZ_FIRST", "0"))

RECORDS = [
    {"id": "a/0", "question": "48*6-2=?", "answer": "286", "prompt": "48*6-2=?\n", "response": "48*6=288\n288-2=286\n#### 286",
     "steps": [{"start": 0, "end": 9, "kind": "step"}, {"start": 9, "end": 19, "kind": "step"},
               {"start": 19, "end": 27, "kind": "final"}]},
    {"id": "a/1", "question": "48*6-2=?", "answer": ["286", "286.0"], "response": "x",
     "steps": [{"start": 0, "end": 1, "kind": "step"}]},
    {"id": "b/0", "prompt": [{"role": "user", "content": "3+4=?"}], "completion": [{"role": "assistant", "content": "7"}],
     "reward_model": {"ground_truth": "7"}, "question": "3+4=?", "response": "7",
     "steps": [{"start": 0, "end": 1, "kind": "final"}]},
]  # fmt: skip
PROBLEMS = [
    {"question": "48*6-2=?", "answer": "286", "level": 1},
    {"id": "b", "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "3+4=?"}],
     "reward_model": {"style": "rule", "ground_truth": "7"}, "extra_info": {"index": 1}},
    {"problem": "Half of 50?", "solution": "50/2 is\n\\boxed{25}", "answer": ["25", "25.0"]},
]  # fmt: skip
LABELLED = [{"id": "a", "problem": "3+4=?", "steps": ["3+4=7", "7"], "label": -1, "final_answer_correct": True},
            {"id": "b", "problem": "3+5=?", "steps": ["3+5=9", "9"], "label": 0, "final_answer_correct": False}]  # fmt: skip
HOSTILE_JSON = [
    "null", "true", "-1", "0", "1e308", "1e999", "NaN", "9" * 5000, "9" * 30, '""', '" "', '"\\ud800"', '"\\u0000"',
    "[]", "{}", "[[]]", "[null]", '{"a": 1, "a": 2}', "[" * 3000 + "]" * 3000, '"' + "x" * 100_000 + '"', '"#### "',
    '[{"role": "user", "content": "q"}]', '[{"role": "tool"}]', '"{torn"', '"<|im_end|>"', "0.1", '"\\u202e"', '["a", "b"]',
]  # fmt: skip
HOSTILE_BYTES = [
    b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\n\n", b'"', b"\\", b"{", b"]", b",", b"\t", b": ", b"\xed\xa0\x80",
    b"&a [*a]", b"!!python/object:os.system", b"<<: ", b"- ", b"{{", b"%}", b"2024-99-99", b"1e400", b"9" * 5000, b"[" * 3000,
]  # fmt: skip
HOSTILE_YAML = ["null", "true", "-1", "1e400", "[]", "{a: 1}", "'x'", "9" * 5000, "2024-99-99", "0x", "!!binary x", "[" * 2000,
                "&a [*a]", ".nan", "'\\ud800'", '"\\ud800"', "{a: 1, a: 2}", "*b", "12:30:45", "~", "''", "- 1"]  # fmt: skip


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Return ``data`` after one to three cuts, flips, copies and insertions."""
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + rng.choice((1, 1, 2, 8, 64)))
        match rng.randrange(6):
            case 0:
                data = data[:start]
            case 1:
                data = data[:start] + data[end:]
            case 2:
                data = data[:end] + data[start:]
            case 3:
                data = data[:start] + rng.choice(HOSTILE_BYTES) + data[start:]
            case 4:
                data = data[:start] + rng.randbytes(end - start) + data[end:]
            case 5:
                data = data[:start] + rng.choice(HOSTILE_BYTES) + data[end:]
    return data


def hostile_json(value: Any, rng: random.Random, choices: list[str]) -> str:
    """Return ``value`` as json text with one of its parts replaced, removed or doubled."""
    places: list[tuple[Any, Any]] = []

    def collect(part: Any) -> None:
        keys = list(part) if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else ()
        for key in keys:
            places.append((part, key))
            collect(part[key])

    value = json.loads(json.dumps(value))
    collect(value)
    mark = "\x01mark"
    if places:
        part, key = rng.choice(places)
        if rng.random() < 0.2:
            del part[key]
        else:
            part[key] = mark
    return json.dumps(value).replace(json.dumps(mark), rng.choice(choices))


def damaged_json(value: Any, rng: random.Random, choices: list[str] = HOSTILE_JSON) -> bytes:
    text = hostile_json(value, rng, choices).encode()
    return damaged(text, rng) if rng.random() < 0.3 else text


def damaged_lines(rows: list[Any], rng: random.Random) -> bytes:
    lines = [json.dumps(row).encode() for row in rows]
    place = rng.randrange(len(lines))
    lines[place] = damaged_json(rows[place], rng)
    data = b"\n".join(lines) + rng.choice((b"", b"\n"))
    data = damaged(data, rng) if rng.random() < 0.3 else data
    return gzip.compress(data, mtime=0) if rng.random() < 0.1 else data


def damaged_header(data: bytes, rng: random.Random) -> bytes:
    """Return a safetensors file with a damaged header, whose length is right, or damaged anywhere."""
    if rng.random() < 0.4:
        return damaged(data[:2000], rng) + data[2000:]
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if metadata := header.get("__metadata__"):  # whose values are json in text
        name = rng.choice(list(metadata))
        with contextlib.suppress(ValueError):
            metadata[name] = hostile_json({"x": json.loads(metadata[name])}, rng, HOSTILE_JSON)[6:-1]
    text = json.dumps(header) if rng.random() < 0.6 else hostile_json(header, rng, HOSTILE_JSON)
    text = text.encode("utf-8", "surrogatepass")  # type: ignore[assignment]
    return len(text).to_bytes(8, "little") + text + data[8 + length :]  # type: ignore[operator]


@dataclass(frozen=True)
class Good:
    """Good files of each kind, made once."""

    folder: Path

    def __getitem__(self, name: str) -> Path:
        return self.folder / name

    def data(self, name: str) -> bytes:
        return self[name].read_bytes()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    made = Good(tmp_path_factory.mktemp("good"))
    made["records.jsonl"].write_text("".join(json.dumps(row) + "\n" for row in RECORDS))
    made["problems.jsonl"].write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))
    tiny = tiny_reasoner.path()
    shutil.copytree(tiny, made["model"])
    shutil.copytree(tiny, made["tuned"])
    weights = bytearray((tiny / "model.safetensors").read_bytes())
    for place in range(len(weights) - 4000, len(weights), 40):
        weights[place] ^= 1
    (made["tuned"] / "model.safetensors").write_bytes(weights)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        assert main(["mask", "random", "--model", str(tiny), "--density", "0.01", "-o", str(made["mask"])]) == 0
        assert main(["delta", "diff", str(tiny), str(made["tuned"]), "-o", str(made["delta"])]) == 0
    return made


def case_jsonl(good: Good, at: Path, rng: random.Random) -> list[Any]:
    file = at / "in.jsonl"
    match rng.randrange(6):
        case 0:
            file.write_bytes(damaged_lines(LABELLED, rng))
            return ["critic", "--critic", "rule", "--calibrate", file]
        case 1:
            file.write_bytes(damaged_lines([{"text": f"The harbour {i}"} for i in range(6)], rng))
            return ["superweights", "--prompts", file, "-o", at / "out", "--dry-run"]
    file.write_bytes(damaged_lines(RECORDS, rng))
    command = rng.choice((["segment", file], ["critic", file, "--critic", "rule"], ["eval", "--responses", file]))
    return [*command, "-o", at / "out", *(["--dry-run"] if rng.random() < 0.2 else [])]


def case_table(good: Good, at: Path, rng: random.Random) -> list[Any]:
    name = rng.choice(("d.jsonl", "d.json", "d.csv", "d.tsv", "d.csv.gz", "d.ndjson", "d.json.gz"))
    if "json" in name:
        data = (
            damaged_json(PROBLEMS, rng)
            if name.startswith("d.json.") or name == "d.json"
            else damaged_lines(PROBLEMS, rng)
        )
    else:
        comma = "\t" if "tsv" in name else ","
        rows = [
            ["question", "answer", "reward_model"],
            ['"48*6, -2=?"', "286", ""],
            ["a", "7", '"{""ground_truth"": 7}"'],
        ]
        data = damaged("\n".join(comma.join(cells) for cells in rows).encode(), rng)
    (at / name).write_bytes(gzip.compress(data, mtime=0) if name.endswith("gz") else data)
    return ["eval", "--responses", good["records.jsonl"], "--dataset", at / name, "-o", at / "out"]


def case_yaml(good: Good, at: Path, rng: random.Random) -> list[Any]:
    settings = {"max_segments": 9, "segment_style": "auto", "tokenizer": None, "output": str(at / "out"), "json": True}
    if train := rng.random() < 0.2:
        settings = {
            "learning_rate": 0.1,
            "stop": ["x"],
            "chat_template_kwargs": {"a": 1},
            "max_steps": 2,
            "budget": 0.1,
        }
    lines = [f"{key}: {json.dumps(value)}" for key, value in settings.items()]
    place = rng.randrange(len(lines))
    lines[place] = lines[place].split(":")[0] + ": " + rng.choice(HOSTILE_YAML)
    data = "\n".join(lines).encode("utf-8", "surrogatepass")
    (at / "run.yaml").write_bytes(damaged(data, rng) if rng.random() < 0.5 else data)
    if train:
        return ["train", "--dry-run", "--config", at / "run.yaml"]
    return [
        "segment",
        good["records.jsonl"],
        "--config",
        at / "run.yaml",
        *(["--dry-run"] if rng.random() < 0.5 else []),
    ]


def case_mask(good: Good, at: Path, rng: random.Random) -> list[Any]:
    (at / "m.safetensors").write_bytes(damaged_header(good.data("mask"), rng))
    words = rng.choice((["info"], ["union", good["mask"], "-o", at / "out"], ["complement", "-o", at / "out"]))
    return ["mask", words[0], at / "m.safetensors", *words[1:]]


def case_delta(good: Good, at: Path, rng: random.Random) -> list[Any]:
    (at / "d.safetensors").write_bytes(damaged_header(good.data("delta"), rng))
    if rng.random() < 0.5:
        return ["delta", "info", at / "d.safetensors"]
    return ["delta", "apply", good["model"], at / "d.safetensors", "-o", at / "out"]


def case_profile(good: Good, at: Path, rng: random.Random) -> list[Any]:
    profile = json.loads(profile_path("budgets", "tiny-reasoner", ".json").read_text(encoding="utf-8"))
    (at / "b.json").write_bytes(damaged_json(profile, rng))
    return ["train", "--dry-run", "--budget-profile", at / "b.json", "--limit", "4"]


def case_template(good: Good, at: Path, rng: random.Random) -> list[Any]:
    template = b"{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add %}A:{% endif %}"
    (at / "t.jinja").write_bytes(damaged(template, rng))
    return [
        "eval",
        "--dry-run",
        "--dataset",
        good["problems.jsonl"],
        "--chat-template",
        at / "t.jinja",
        "-o",
        at / "out",
    ]


def case_model(good: Good, at: Path, rng: random.Random) -> list[Any]:
    folder = at / "model"
    shutil.copytree(good["model"], folder)
    file = folder / rng.choice(
        sorted(path.name for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    )
    if file.suffix == ".safetensors":
        file.write_bytes(damaged_header(file.read_bytes(), rng))
    else:
        # a size of 5000 digits, or 10^30 layers, is a program that would run for ever, and not a damaged file
        choices = [text for text in HOSTILE_JSON if not text.strip("9").isdigit() and "9" * 30 not in text]
        file.write_bytes(damaged_json(json.loads(file.read_text(encoding="utf-8")), rng, choices))
    return rng.choice((
        ["eval", "--dry-run", "--model", folder, "--limit", "2", "-o", at / "out"],
        ["diagnose", folder, good["tuned"], "-o", at / "out", "--dry-run"],
        ["mask", "low-magnitude", "--model", folder, "-o", at / "out"],
        ["segment", good["records.jsonl"], "--tokenizer", folder, "-o", at / "out"],
    ))  # fmt: skip


# Cases that load a model take a tenth of a second, and the others a hundredth.
READERS: dict[Callable[[Good, Path, random.Random], list[Any]], int] = {
    case_jsonl: 75, case_table: 75, case_yaml: 45, case_mask: 30, case_delta: 30, case_profile: 6, case_template: 12,
    case_model: 21,
}  # fmt: skip
BATCHES = [(reader, part) for reader in READERS for part in range(3)]


@pytest.mark.parametrize(("reader", "part"), BATCHES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_damaged_files_are_user_errors(
    reader: Callable[[Good, Path, random.Random], list[Any]],
    part: int,
    good: Good,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    wanted = round(READERS[reader] * NUM_CASES / sum(READERS.values()))
    failures = []
    for number in range(FIRST_CASE + part, FIRST_CASE + wanted, 3):
        at = tmp_path / str(number)
        at.mkdir()
        words = [str(word) for word in reader(good, at, random.Random(f"{reader.__name__} {number}"))]
        if problem := failure(words):
            failures.append(f"case {number}: ssrctl {' '.join(words)}\n{problem}")
        else:
            shutil.rmtree(at)
    assert not failures, "\n\n".join(failures)


def failure(words: list[str]) -> str | None:
    """Run a command; return what is wrong with its end: a traceback, an exit code, an error of several lines."""
    out, err = (
        io.TextIOWrapper(io.BytesIO(), encoding="utf-8"),
        io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace"),
    )
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = main(words)
    except BaseException:  # a panic in a library written in Rust is not an Exception
        return traceback.format_exc()
    err.flush()
    said = err.buffer.getvalue().decode()  # type: ignore[attr-defined]
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if code not in (0, 2) or (code == 2) != (len(errors) == 1) or "Traceback" in said:
        return f"exit code {code}\n{said}"
    if errors and len(errors[0]) > 1500:
        return f"an error of {len(errors[0])} characters: {errors[0][:300]}"
    return None


def test_undamaged_files_are_read(good: Good, tmp_path: Path) -> None:
    """The cases above fail for their damage and nothing else."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"max_segments": 9}))
    for words in (
        ["eval", "--responses", good["records.jsonl"], "-o", tmp_path / "eval"],
        ["eval", "--dry-run", "--limit", "1"],
        ["segment", good["records.jsonl"], "--config", tmp_path / "run.yaml", "-o", tmp_path / "s"],
        ["critic", good["records.jsonl"], "--critic", "rule", "-o", tmp_path / "c"],
        ["mask", "info", good["mask"]],
        ["delta", "apply", good["model"], good["delta"], "-o", tmp_path / "applied"],
    ):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
            assert main([str(word) for word in words]) == 0, err.getvalue()
