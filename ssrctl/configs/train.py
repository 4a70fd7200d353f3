"""Settings of training."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ssrctl.configs.building import output, require
from ssrctl.configs.common import CommonConfig, DatasetConfig, ModelConfig, SamplingConfig, check_limit, check_sampling
from ssrctl.configs.text import CriticOptions, check_critic
from ssrctl.errors import UserError


@dataclass(kw_only=True)
class TrainConfig(ModelConfig, SamplingConfig, DatasetConfig, CriticOptions, CommonConfig):
    """Train with step-wise reinforcement learning and masked updates (SSR section 2.3)."""

    output_dir: Path | None = output(None)
    """Run directory; by default a new one under runs/."""

    optimizer: Literal["kronos", "adamw"] | None = None
    """kronos: per-step, disjoint, sparse updates; adamw: dense updates in the same loop, or with --mask updates
    and state for the masked weights alone. By default kronos, with --mask adamw."""

    update_rule: Literal["sgd", "adam", "rms"] = "sgd"
    """Kronos: what the kept gradient becomes. sgd: itself; adam: moments for the weights that were ever selected;
    rms: each step's, divided by its root mean square."""

    learning_rate: float | None = None
    """Step size; by default 3e-2 for kronos with sgd, 1e-5 with rms, and 1e-4 for everything else. It does not
    carry over between optimizers, rules or models."""

    find_lr: bool = False
    """Instead of training, try a few steps at six learning rates around --learning-rate, from the same weights and on
    the same questions, and print what each did."""

    find_lr_steps: int = 8
    """Training steps at each rate of --find-lr."""

    adam_beta1: float = 0.9
    """Decay of the first moment."""

    adam_beta2: float | None = None
    """Decay of the second moment; by default 0.95 for kronos, whose coordinates are selected now and then, and
    0.999 for adamw."""

    adam_epsilon: float = 1e-8
    """Added to the denominator of adam, adamw and rms."""

    lr_scheduler_type: Literal["constant", "linear", "cosine", "constant_with_warmup"] = "constant"
    """Learning-rate schedule over --max-steps."""

    warmup_steps: int = 0
    """Steps of linear warm-up, for the schedules that have one."""

    weight_decay: float = 0.0
    """Decoupled weight decay of adamw."""

    max_grad_norm: float = 1.0
    """Clip on the gradient's norm; for kronos that of the kept sparse gradient. 0 is off."""

    max_steps: int = 120
    """Training steps (batches of questions)."""

    questions_per_step: int = 4
    """Questions in one training step."""

    num_generations: int = 8
    """Responses per question: the group."""

    num_iterations: int = 1
    """Updates on each batch of responses; above 1 the clipped importance ratio matters."""

    credit: Literal["step", "final", "cot"] = "step"
    """step: each step its advantage (SSR); final, cot: one advantage per response from the final answer or
    from the mean step reward (the GSPO baselines)."""

    advantage: Literal["paper", "group", "hybrid"] = "group"
    """paper is eq. 9, whose advantages sum to zero within every response, good or bad; group is eq. 6 alone;
    hybrid adds the response's standing in its group to eq. 9."""

    importance_level: Literal["token", "step", "sequence"] = "sequence"
    """Level of the importance ratio; sequence is the length-normalised ratio of GSPO."""

    clip_epsilon: float = 0.2
    """The importance ratio is clipped to 1 - epsilon, 1 + epsilon."""

    protect: Path | None = None
    """Superweight mask whose coordinates never change."""

    mask: Path | None = None
    """Train only the coordinates of this mask; budgets are shares of these then."""

    ignore_fingerprint: bool = False
    """Use a mask that was made for other weights of the same shapes."""

    budget_profile: str = "auto"
    """Budget profile: a file from `ssrctl profile-budget`, a name in profiles/budgets, flat for equal
    budgets, or auto."""

    budget: float = 0.05
    """Share B of the unprotected coordinates that one question may claim."""

    max_step_budget: float = 0.01
    """Largest share that one step may claim, k_max."""

    fuse_tol: float = 0.0
    """Neighbouring steps whose advantages over the group differ by less are updated as one; 0 is off."""

    max_units: int | None = None
    """Join the most similar neighbouring steps until a question has at most so many updates, which bounds the cost
    of long responses."""

    scope: Literal["global", "tensor"] = "global"
    """global: one threshold over all weights; tensor: the same share of each tensor, whose gradient is dropped
    at once."""

    allocation: Literal["disjoint", "overlap", "pooled", "shuffled"] = "disjoint"
    """disjoint: no two steps of a question update the same weight. Controls: overlap, every step its own largest;
    pooled, the largest of all steps' gradients together; shuffled, each step gets the set of the step before."""

    selection: Literal["exact", "block"] = "exact"
    """exact: the largest gradients; block: the paper's tile-wise approximation, whose recall is logged."""

    reuse_factor: float | None = None
    """A step may take a claimed weight whose gradient is so many times the smallest free one's; off by default."""

    master_weights: bool = True
    """With bfloat16 or float16 weights, keep the exact float32 value of those that kronos (or adamw with
    --mask) updates."""

    step_gradient: Literal["auto", "kept", "truncated", "chunked", "local"] = "auto"
    """How each step's gradient is computed. kept, truncated and chunked are exact and differ in cost; auto takes the
    cheapest (with --scope tensor not chunked, which adds up whole gradients); local ignores what a step does to
    earlier steps' keys and values."""

    segment_style: Literal["auto", "newline", "paragraph"] = "auto"
    """How responses are cut into steps, as in `ssrctl segment --style`."""

    max_segments: int = 64
    """Most reasoning steps per response; the shortest neighbours are merged."""

    save_steps: int = 50
    """Write a checkpoint every so many steps, and at the end."""

    save_total_limit: int | None = None
    """Keep only the newest so many checkpoints."""

    resume_from_checkpoint: str | None = None
    """A checkpoint folder, or latest to continue the run in --output-dir."""

    logging_steps: int = 10
    """When the output is no terminal, print a line every so many steps."""

    log_masks_every: int = 10
    """Store every step's selected coordinates each so many training steps; 0 is off."""

    log_gradient_cosine: bool = False
    """With the masks, store the cosine between the per-step gradients before masking, and where their signs conflict
    (costs memory: one dense gradient per step)."""

    log_gradients: int = 0
    """Store a sketch of each batch's gradient every so many steps, for `ssrctl diagnose RUN`; 0 is off."""

    log_gradients_size: int = 65_536
    """Numbers in a stored sketch: inner products are off by sqrt(2 / size) of the product of the norms at most, in the
    mean square. A model with fewer weights is stored exactly."""

    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Also send metrics to this tracker."""

    def __post_init__(self) -> None:
        check_sampling(self)
        check_limit(self)
        check_critic(self)
        for name in (
            "max_steps",
            "questions_per_step",
            "num_iterations",
            "save_steps",
            "logging_steps",
            "max_segments",
            "find_lr_steps",
        ):
            require(getattr(self, name) >= 1, "--" + name.replace("_", "-"), "at least 1", getattr(self, name))
        require(self.num_generations >= 2, "--num-generations", "at least 2", self.num_generations)
        require(self.learning_rate is None or self.learning_rate > 0, "--learning-rate", "above 0", self.learning_rate)
        require(self.warmup_steps >= 0, "--warmup-steps", "0 or more", self.warmup_steps)
        require(self.weight_decay >= 0, "--weight-decay", "0 or more", self.weight_decay)
        require(self.max_grad_norm >= 0, "--max-grad-norm", "0 or more", self.max_grad_norm)
        require(0 < self.clip_epsilon < 1, "--clip-epsilon", "between 0 and 1", self.clip_epsilon)
        require(0 < self.budget <= 1, "--budget", "in (0, 1]", self.budget)
        require(0 < self.max_step_budget <= 1, "--max-step-budget", "in (0, 1]", self.max_step_budget)
        require(self.fuse_tol >= 0, "--fuse-tol", "0 or more", self.fuse_tol)
        require(self.log_masks_every >= 0, "--log-masks-every", "0 or more", self.log_masks_every)
        require(self.log_gradients >= 0, "--log-gradients", "0 or more", self.log_gradients)
        require(self.log_gradients_size >= 64, "--log-gradients-size", "at least 64", self.log_gradients_size)
        require(
            self.save_total_limit is None or self.save_total_limit >= 1,
            "--save-total-limit",
            "at least 1",
            self.save_total_limit,
        )
        require(0 <= self.adam_beta1 < 1, "--adam-beta1", "in [0, 1)", self.adam_beta1)
        require(self.adam_beta2 is None or 0 <= self.adam_beta2 < 1, "--adam-beta2", "in [0, 1)", self.adam_beta2)
        require(self.adam_epsilon > 0, "--adam-epsilon", "above 0", self.adam_epsilon)
        require(self.max_units is None or self.max_units >= 1, "--max-units", "at least 1", self.max_units)
        require(self.reuse_factor is None or self.reuse_factor >= 1, "--reuse-factor", "at least 1", self.reuse_factor)
        if self.optimizer is None:
            self.optimizer = "kronos" if self.mask is None else "adamw"
        if self.find_lr and self.resume_from_checkpoint is not None:
            raise UserError("--find-lr starts from the model's weights", "leave out --resume-from-checkpoint")
        self._check_optimizer()

    def _check_optimizer(self) -> None:
        """Settings that the optimizer would ignore are errors."""
        if self.optimizer == "kronos":
            if self.weight_decay > 0:
                raise UserError(
                    "--weight-decay has no meaning for kronos, whose updates are sparse", "use --optimizer adamw"
                )
            if self.scope == "tensor" and self.allocation == "shuffled":
                raise UserError(
                    "--allocation shuffled needs whole gradients, which --scope tensor drops at once",
                    "use --scope global",
                )
            if self.scope == "tensor" and self.log_gradient_cosine:
                raise UserError(
                    "--log-gradient-cosine needs whole gradients, which --scope tensor drops at once",
                    "use --scope global",
                )
            if self.reuse_factor is not None and self.allocation != "disjoint":
                raise UserError(
                    f"--reuse-factor loosens the disjoint allocation; it has no meaning with {self.allocation}"
                )
            return
        defaults = {spec.name: spec.default for spec in dataclasses.fields(self)}
        kronos_only = (
            "update_rule", "scope", "allocation", "selection", "reuse_factor", "max_units", "log_gradient_cosine",
        )  # fmt: skip
        if odd := [name for name in kronos_only if getattr(self, name) != defaults[name]]:
            flags = ", ".join("--" + name.replace("_", "-") for name in odd)
            raise UserError(f"{flags} has no meaning for adamw", "use --optimizer kronos")

    @property
    def resolved_learning_rate(self) -> float:
        """The learning rate in force."""
        if self.learning_rate is not None:
            return self.learning_rate
        return {"sgd": 3e-2, "rms": 1e-5, "adam": 1e-4}[self.update_rule if self.optimizer == "kronos" else "adam"]

    @property
    def step_gradient_method(self) -> str:
        """The way in force: with scope tensor, auto takes one that needs no whole gradient."""
        return "piecemeal" if self.step_gradient == "auto" and self.scope == "tensor" else self.step_gradient

    @property
    def betas(self) -> tuple[float, float]:
        """Decays of the two moments in force."""
        second = self.adam_beta2
        if second is None:
            second = 0.95 if self.optimizer == "kronos" else 0.999
        return self.adam_beta1, second
