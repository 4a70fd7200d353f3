"""The scripts under examples/ run, and do what they say."""

import importlib.util
import json
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ssrctl import KronosOpt, cli, tiny_reasoner

# TRL sets what transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated and will be removed:FutureWarning")

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def load(name: str) -> ModuleType:
    """An example as a module; its ``main`` is not run."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run_main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs an example with flags; returns what it printed."""

    def run(example: ModuleType, *flags: str) -> str:
        monkeypatch.setattr(sys, "argv", [example.__name__, *flags])
        with torch.random.fork_rng(devices=[]):
            example.main()
        return capsys.readouterr().out

    return run


# own_loop.py


@pytest.fixture(scope="module")
def own_loop() -> ModuleType:
    example = load("own_loop")
    example.NUM_HELD_OUT = 8
    return example


def test_questions_are_worked_from_left_to_right(own_loop: ModuleType) -> None:
    for seed in range(50):
        text, answer = own_loop.new_question(random.Random(seed))
        value, *rest = re.findall(r"\d+|[-+*]", text)
        for sign, operand in zip(rest[::2], rest[1::2], strict=True):
            value = str(eval(f"({value}) {sign} {operand}"))
        assert (int(value) - answer) % 100 == 0
        assert len(rest) == 8
        assert text.endswith("=?")


@pytest.mark.parametrize(
    ("step", "kind", "reward"),
    [
        ("48*6=88\n", "step", 1.0),
        ("48*6=288\n", "step", 1.0),
        ("02-9=93\n", "step", 1.0),
        ("02-9=92\n", "step", -1.0),
        ("so 3 + 4 = 7.", "step", 1.0),
        ("hence it follows", "step", None),
        ("####76", "final", 1.0),
        ("####67", "final", -1.0),
        ("the answer is none", "final", -1.0),
    ],
)
def test_step_rewards(own_loop: ModuleType, step: str, kind: str, reward: float | None) -> None:
    assert own_loop.step_reward(step, kind, 76) == reward


def test_tokens_are_read_into_their_steps(own_loop: ModuleType) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_reasoner.path())
    text = "48*6=88\n88-2=85\n####85"
    ids = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id, tokenizer.pad_token_id]
    steps, rewards = own_loop.read(tokenizer, ids, 86)
    assert steps == [0] * 8 + [1] * 8 + [2] * 7 + [-1]  # a character a token; the end token is the last step's
    assert rewards == [1.0, -1.0, -1.0]


def test_the_loss_of_a_step_is_its_cross_entropy_weighted_by_advantage(
    own_loop: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against transformers' own loss, one response and step at a time; the responses differ in length."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_reasoner.path())
    model = AutoModelForCausalLM.from_pretrained(tiny_reasoner.path())
    question, answer = "48*6-2=?", 86
    texts = ["48*6=88\n88-2=86\n####86", "48*6=87\n87-2=85\n####85", "48*6=88\n####88", "88"]
    rewards = [[1.0, 1.0, 1.0], [-1.0, 1.0, -1.0], [1.0, -1.0], [None]]
    prompt = tokenizer(f"<bos>{question}\n", add_special_tokens=False).input_ids
    responses = [tokenizer(f"{text}<eos>", add_special_tokens=False).input_ids for text in texts]
    width = max(map(len, responses))
    rows = torch.tensor([prompt + ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids in responses])
    monkeypatch.setattr(own_loop, "sample", lambda *_: (rows, len(prompt)))
    units = own_loop.step_losses(model, tokenizer, question, answer)

    known = torch.tensor([reward for row in rewards for reward in row if reward is not None], dtype=torch.float64)
    pieces = [re.findall(r"[^\n]+\n?", f"{text}_") for text in texts]  # one more character for the end token
    expected = []
    for step in range(3):
        terms = []
        for row, row_rewards in enumerate(rewards):
            if step < len(row_rewards) and row_rewards[step] is not None:
                start = len(prompt) + sum(map(len, pieces[row][:step]))
                labels = torch.full_like(rows[row], -100)
                labels[start : start + len(pieces[row][step])] = rows[row, start : start + len(pieces[row][step])]
                entropy = model(rows[row : row + 1], labels=labels.unsqueeze(0)).loss
                terms.append(
                    entropy.item() * (row_rewards[step] - float(known.mean())) / float(known.std(correction=0))
                )
        expected.append(sum(terms) / len(terms))
    assert [num_responses for _, num_responses in units] == [3, 3, 2]
    # float32 sums in another order
    assert [loss.item() for loss, _ in units] == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_own_loop_learns(run_main: Callable[..., str]) -> None:
    before, *_, after = [float(line.split()[-1]) for line in run_main(load("own_loop")).splitlines() if "mean" in line]
    assert after > before + 0.03


def test_own_loop_trains_the_bundled_reasoner_the_same_way_every_time(
    own_loop: ModuleType, run_main: Callable[..., str]
) -> None:
    printed = run_main(own_loop, "--steps", "1")
    before, step, after = printed.splitlines()
    assert -1.0 <= float(before.removeprefix("mean step reward before: ")) <= 1.0
    assert -1.0 <= float(after.removeprefix("mean step reward after: ")) <= 1.0
    updated = int(re.fullmatch(r"step 1: gradient norm [\d.]+, (\d+) coordinates updated", step)[1])
    # Four questions that claim at most 5% of the 421,248 coordinates each.
    assert 4_000 < updated <= 4 * 0.05 * 421_248
    assert run_main(own_loop, "--steps", "1") == printed


def test_own_loop_takes_any_small_causal_model(
    own_loop: ModuleType, run_main: Callable[..., str], tiny_model, bpe_tokenizer, tmp_path: Path
) -> None:
    """Random weights and a tokenizer without a chat template: no step can be scored, so nothing is updated."""
    tiny_model.save_pretrained(tmp_path)
    bpe_tokenizer.save_pretrained(tmp_path)
    printed = run_main(own_loop, "--model", str(tmp_path), "--steps", "1")
    assert "step 1: gradient norm 0.000, 0 coordinates updated" in printed


# own_critic.py and own_reward.py


def test_own_parts_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.setattr(sys, "path", list(sys.path))
    words = [
        "--critic",
        "own_critic:OneEquation",
        "--reward",
        "own_reward:right_and_short",
        "-o",
        str(tmp_path / "run"),
    ]
    small = ["--max-steps", "1", "--questions-per-step", "1", "--num-generations", "4", "--max-new-tokens", "80"]
    assert cli.main(["train", *words, *small]) == 0
    for row in map(json.loads, (tmp_path / "run/rollouts/000001.jsonl").read_text().splitlines()):
        texts = [row["response"][span["start"] : span["end"]] for span in row["steps"]]
        *steps, final = [score["reward"] for score in row["scores"]]
        assert steps == [1.0 if text.count("=") == 1 else -1.0 for text in texts[:-1]]
        too_long = max(0, len(row["response"]) + 1 - 64)  # a character a token, and the end
        assert final == pytest.approx(row["final"]["correct"] - 0.01 * too_long, abs=0.011)


# trl_grpo.py


@pytest.fixture
def trl_grpo() -> Iterator[ModuleType]:
    pytest.importorskip("trl", reason="TRL is no dependency of ssrctl; pip install trl to run its example")
    from accelerate.state import AcceleratorState, GradientState

    yield load("trl_grpo")
    # A trainer fixes the device of the whole process, for the tests that come after too.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_trl_example_changes_only_what_its_steps_may(trl_grpo: ModuleType, run_main: Callable[..., str]) -> None:
    printed = run_main(trl_grpo, "--max-steps", "2")
    changed, total = map(int, re.search(r"changed weights: (\d+) of (\d+)", printed).groups())
    num_protected, num_broken = map(int, re.search(r"among the (\d+) protected ones: (\d+)", printed).groups())
    assert total == 421_248
    assert num_protected == int(0.005 * total)
    assert num_broken == 0
    # 1% of the unprotected coordinates in each of two optimizer steps, of four micro-batches each.
    k = int(0.01 * (total - num_protected))
    assert k < changed <= 2 * k
    logged = [float(share) for share in re.findall(r"'bit_changed_frac': '?([\d.e-]+)", printed)]
    assert len(logged) == 2 and changed <= sum(logged) * total * 1.001  # the log rounds to four digits
    assert all(share == pytest.approx(k / total, rel=0.01) for share in logged)  # float32 loses little


class Trained:
    """The bundled reasoner in bfloat16 after a GRPOTrainer's run with KronosOpt; ``settings`` go to GRPOConfig."""

    def __init__(self, example: ModuleType, folder: Path, resume: Path | None = None, **settings: object) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        defaults = {
            "max_steps": 2,
            "max_grad_norm": 0.0,
            "learning_rate": 1.0,  # of the optimizer that is not made; ours has its own
            "num_generations": 4,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "max_completion_length": 48,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "seed": 0,
        }
        self.model = AutoModelForCausalLM.from_pretrained(tiny_reasoner.path(), dtype=torch.bfloat16)
        self.before = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.optimizer = KronosOpt(self.model.named_parameters(), lr=1e-3, update_rule="adam")
        self.trainer = example.GRPOTrainer(
            model=self.model,
            reward_funcs=example.right_answer,
            args=example.GRPOConfig(output_dir=str(folder), **(defaults | settings)),
            train_dataset=example.sums(16),
            processing_class=AutoTokenizer.from_pretrained(tiny_reasoner.path(), padding_side="left"),
            optimizers=(self.optimizer, None),
        )
        with torch.random.fork_rng(devices=[]):
            self.trainer.train(resume_from_checkpoint=resume and str(resume))

    def num_changed(self) -> int:
        return sum(int((p != self.before[name]).sum()) for name, p in self.model.named_parameters())


def test_a_trainer_resumed_from_its_checkpoint_ends_bit_for_bit_as_if_never_stopped(
    trl_grpo: ModuleType, tmp_path: Path
) -> None:
    whole = Trained(trl_grpo, tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    resumed = Trained(trl_grpo, tmp_path / "again", tmp_path / "checkpoint-2", max_steps=4)
    assert resumed.trainer.state.global_step == 4
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, dict(resumed.model.named_parameters())[name]), name
    assert whole.num_changed() > 0
    ours, theirs = whole.optimizer.state_dict(), resumed.optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    assert {field for state in ours["state"].values() for field in state} == {
        "bits", "exp_avg", "exp_avg_sq", "remainder",
    }  # fmt: skip
    for number, state in ours["state"].items():
        for field, values in state.items():
            assert torch.equal(values, theirs["state"][number][field]), (number, field)


def test_the_trainers_schedule_sets_our_learning_rate(trl_grpo: ModuleType, tmp_path: Path) -> None:
    warming = Trained(trl_grpo, tmp_path, max_steps=1, lr_scheduler_type="constant_with_warmup", warmup_steps=2)
    # The first of two warm-up steps has rate 0: coordinates were selected, none moved.
    assert sum(int(values.sum()) for values in warming.optimizer.touched.values()) > 0
    assert warming.num_changed() == 0
    assert warming.optimizer.param_groups[0]["lr"] == pytest.approx(0.5e-3)


def test_the_trainers_clip_sees_the_dense_gradient_and_ours_the_kept_one(
    trl_grpo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []
    step = KronosOpt.step
    monkeypatch.setattr(KronosOpt, "step", lambda self, closure=None: done.append(step(self, closure)))
    for clip in (0.0, 1e-3):
        Trained(trl_grpo, tmp_path, max_steps=1, max_grad_norm=clip)
    unclipped, clipped = done
    assert unclipped.grad_norm > 1e-2
    assert 0.0 < clipped.grad_norm < 1e-3  # the kept part of a dense gradient of norm 1e-3
