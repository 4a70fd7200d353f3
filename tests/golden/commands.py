"""The commands that are recorded.

Every flag is spelled out by its long name, so that a renamed one has to be changed here and nowhere else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

PLANTED = "planted"
_PLACE = re.compile(r"\{([\w/-]+)\}")


@dataclass(frozen=True)
class Job:
    """Commands that are run one after the other, and what is kept of them.

    Attributes:
        name: also the folder, within the working folder, that ``{out}`` stands for.
        commands: words after ``ssrctl``; ``{NAME}`` stands for the folder of another job, which is run before.
        code: exit code that the last command should have; the others should have 0.
        stdout: whether the json on stdout is kept; not where a file holds the same.
    """

    name: str
    commands: tuple[str, ...]
    code: int = 0
    stdout: bool = True

    @property
    def needs(self) -> set[str]:
        """The other jobs whose files are read."""
        return {place for command in self.commands for place in _PLACE.findall(command)} - {"out"}

    def words(self, command: str) -> list[str]:
        """One command's words, with every folder filled in."""
        return _PLACE.sub(lambda found: self.name if found[1] == "out" else found[1], command).split()


def jobs() -> list[Job]:
    """List every job, each after those that it needs."""
    return [*_first(), *_training(), *_text(), *_masks(), *_deltas(), *_diagnosis()]


# --------------------------------------------------------------------------------------------------
# what others need comes first


def _first() -> list[Job]:
    random = "mask random tiny-reasoner --density 0.02 --seed 0 --output {out}/m.safetensors --json"
    return [Job("mask/random", (random,)), _train("logged", f"--optimizer kronos {_LOGGED}"), *_whole_and_resumed()]


_SAMPLED = "--max-new-tokens 48 --seed 0"
_SMALL = f"--questions-per-step 2 --num-generations 4 {_SAMPLED} --log-masks-every 3"
_LOGGED = "--log-gradients 1 --log-masks-every 1 --log-gradient-cosine --save-steps 1"
_MASK = "{mask/random}/m.safetensors"


def _train(name: str, flags: str, *, profile: str = "flat", steps: int = 3) -> Job:
    command = f"train {_SMALL} --max-steps {steps} --budget-profile {profile} {flags} --output-dir {{out}} --json"
    return Job(f"train/{name}", (command,))


def _whole_and_resumed() -> list[Job]:
    flags = "--optimizer kronos --update-rule adam --save-steps 2"
    whole = _train("whole", flags, steps=4)
    first = _train("resumed", flags, steps=2).commands[0]
    second = _train("resumed", f"{flags} --resume-from-checkpoint latest", steps=4).commands[0]
    return [whole, Job("train/resumed", (first, second))]


def _training() -> list[Job]:
    kronos = {
        "sgd": "--update-rule sgd",
        "adam": "--update-rule adam",
        "rms": "--update-rule rms",
        "tensor": "--scope tensor",
        "overlap": "--allocation overlap",
        "pooled": "--allocation pooled",
        "shuffled": "--allocation shuffled",
        "max-units": "--max-units 3",
        "protected": f"--protect {_MASK}",
        "bounded": f"--mask {_MASK}",
        "paper": "--advantage paper",
        "hybrid": "--advantage hybrid",
        "bfloat16": "--dtype bfloat16 --update-rule adam",
        "kept-block": "--step-gradient kept --selection block",
        "truncated-reuse": "--step-gradient truncated --reuse-factor 2",
        "chunked-fused": "--step-gradient chunked --fuse-tol 0.5",
        "local-token": "--step-gradient local --importance-level token --num-iterations 2",
    }
    adamw = {
        "dense": "",
        "protected": f"--protect {_MASK} --weight-decay 0.1 --lr-scheduler-type cosine",
        "cot": "--credit cot",
        "final": "--credit final",
        "masked": f"--mask {_MASK}",
        "masked-bfloat16": f"--mask {_MASK} --dtype bfloat16 --ignore-fingerprint",
    }
    found = [_train(f"kronos-{name}", f"--optimizer kronos {flags}") for name, flags in kronos.items()]
    found.append(_train("kronos-auto", "--optimizer kronos", profile="auto"))
    found += [_train(f"adamw-{name}", f"--optimizer adamw {flags}") for name, flags in adamw.items()]
    return [*found, _train("find-lr", "--optimizer kronos --find-lr --find-lr-steps 2")]


# --------------------------------------------------------------------------------------------------
# the other stages


def _text() -> list[Job]:
    sampled = f"eval --limit 8 --num-samples 4 {_SAMPLED} --output-dir {{out}} --json"
    profile = f"profile-budget {_SAMPLED} --num-problems 2 --num-generations 4 --output {{out}}/b.json --json"
    samples, steps, scored = "{eval/base}/samples.jsonl", "{segment/samples}/steps.jsonl", "{critic/rule}/scored.jsonl"
    found = [
        Job("superweights/gradient", ("superweights --seed 0 --output {out}/g.safetensors --json",), stdout=False),
        Job(
            "superweights/both",
            ("superweights --method both --minimal --spike-threshold 2 --seed 0 --output {out}/g.safetensors --json",),
            stdout=False,
        ),
        Job("eval/base", (sampled,)),
        Job("eval/trained", (f"{sampled} --checkpoint {{train/whole}} --baseline {{eval/base}}",)),
        Job("eval/graded", (f"eval --responses {samples} --output-dir {{out}} --json",)),
        Job("segment/samples", (f"segment {samples} --output {{out}}/steps.jsonl --json",)),
        Job("critic/rule", (f"critic {steps} --critic rule --output {{out}}/scored.jsonl --json",)),
        Job(
            "critic/rollout",
            (
                f"critic {steps} --critic rollout --critic-rollouts 2 --limit 4 {_SAMPLED} "
                "--output {out}/scored.jsonl --json",
            ),
        ),
        Job("critic/calibrate", ("critic --calibrate {planted}/labelled.jsonl --critic rule --json",)),
        Job("profile-budget/sampled", (profile,), stdout=False),
        Job("profile-budget/traces", (f"{profile} --traces {scored} --protect {_MASK}",), stdout=False),
    ]
    styles = {
        "auto": "",
        "newline": "--segment-style newline",
        "paragraph": "--segment-style paragraph --max-segments 2",
    }
    return found + [
        Job(f"segment/{name}", (f"segment {{planted}}/prose.jsonl {flags} --output {{out}}/steps.jsonl --json",))
        for name, flags in styles.items()
    ]


def _masks() -> list[Job]:
    other = "{mask/low-magnitude}/m.safetensors"
    made = {
        "frozen": "random --model {planted}/base --density 0.05 --seed 0 --include *layers.1*",
        "principal": "principal --model tiny-reasoner --rank 0.1 --density 0.3 --exclude *embed*",
        "low-magnitude": "low-magnitude --model tiny-reasoner --density 0.3",
        "layers": "layers --model tiny-reasoner --layers 1",
        "diff-bits": "diff {planted}/base {planted}/tuned1 --changed-by bits",
        "diff-atol": "diff {planted}/base {planted}/tuned1 --changed-by atol",
        "diff-bf16": "diff {planted}/base {planted}/tuned2 --changed-by bf16",
        "diff-run": "diff tiny-reasoner {train/logged}",
        "union": f"union {_MASK} {other}",
        "intersect": f"intersect {_MASK} {other}",
        "minus": f"minus {_MASK} {other}",
        "complement": f"complement {_MASK}",
    }
    found = [
        Job(f"mask/{name}", (f"mask {words} --output {{out}}/m.safetensors --json",)) for name, words in made.items()
    ]
    return [*found, Job("mask/info", ("mask info {mask/union}/m.safetensors --json",))]


def _deltas() -> list[Job]:
    return [
        Job("delta/diff", ("delta diff {planted}/base {planted}/tuned3 --output {out}/d.safetensors --json",)),
        Job(
            "delta/diff-bf16",
            ("delta diff {planted}/base-bf16 {planted}/tuned2-bf16 --output {out}/d.safetensors --json",),
        ),
        Job("delta/apply", ("delta apply {planted}/base {delta/diff}/d.safetensors --output {out}/model --json",)),
        Job("delta/apply-run", ("delta apply tiny-reasoner {train/whole} --output {out}/model --json",)),
        Job("delta/info", ("delta info {train/whole} --json",)),
    ]


def _diagnosis() -> list[Job]:
    pair, everything = "{planted}/base {planted}/tuned", "--measures sparsity,size,rank,spectrum,landing"
    three = "{planted}/base {planted}/tuned1 {planted}/tuned2 {planted}/tuned3"
    frozen = "{mask/frozen}/m.safetensors"
    found = {
        "pair": f"{pair}1 {everything}",
        "pair-low-rank": f"{pair}2 {everything} --layers 1 --num-directions 4 --principal-rank 0.2 --mask-density 0.3",
        "pair-bf16": "{planted}/base-bf16 {planted}/tuned3-bf16 " + everything,
        "pair-default": f"{pair}3",
        "pair-run": "tiny-reasoner {train/whole}",
        "several": f"{three}",
        "several-all": f"{three} {everything},overlap",
        "pairs": "--pairs {planted}/base:{planted}/tuned1 {planted}/base-bf16:{planted}/tuned2-bf16",
        "series": f"{three} --series",
        "run": "{train/whole}",
        "function": "tiny-reasoner {train/whole} --measures function,prune",
        "run-gradients": "{train/logged} --measures time,gradients,sparsity,size",
        "jaccard": "--jaccard {train/logged}",
        "jaccard-overlap": "--jaccard {train/kronos-overlap}",
        "rule-atol": f"{three} --changed-by atol --atol 0.001",
        "rule-bf16": f"{three} --changed-by bf16 --bf16-rtol 0.01",
        "protect": f"{pair}2 --protect {frozen} --measures size",
        "frozen-kept": f"{pair}1 --assert-frozen {frozen} --measures size",
        "rotate": "{planted}/base-bf16 --intervene rotate",
        "permute-heads": "{planted}/base --intervene permute-heads --layers 1",
        "rotate-reasoner": "tiny-reasoner --intervene rotate",
    }
    broken = {
        "frozen-broken": f"{pair}2 --assert-frozen {frozen} --measures size",
        "moved-broken": f"{pair}1 --assert-moved *layers.1* --measures size",
    }
    kept = [_diagnose(name, words) for name, words in found.items()]
    return kept + [_diagnose(name, words, code=4) for name, words in broken.items()]


def _diagnose(name: str, words: str, code: int = 0) -> Job:
    flags = "--seed 0 --output-dir {out} --json"
    return Job(f"diagnose/{name}", (f"diagnose {words} {flags}",), code=code, stdout=False)
