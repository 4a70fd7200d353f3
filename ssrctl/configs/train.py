"""Settings of training."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge

from ssrctl.configs.building import (
    AtLeastOne,
    Config,
    Decay,
    Fraction,
    NotNegative,
    Positive,
    Share,
    ZeroOrMore,
    default_of,
    output,
)
from ssrctl.configs.common import (
    DatasetConfig,
    GradientOptions,
    HubOptions,
    ModelConfig,
    PageOptions,
    ProcessOptions,
    SamplingConfig,
)
from ssrctl.configs.critic import CriticOptions
from ssrctl.configs.engines import EngineOptions
from ssrctl.configs.names import flag
from ssrctl.configs.own_code import REWARDS, check_name, names_code
from ssrctl.configs.segment import SegmentOptions
from ssrctl.errors import UserError
from ssrctl.process_rank import num_launched

TRACKERS = ("trackio", "tensorboard", "wandb")


@dataclass(kw_only=True)
class MethodOptions(Config):
    """Settings of the method: groups, advantages, budgets and allocation."""

    panel = "Method"

    max_steps: AtLeastOne = 120
    """Training steps (batches of questions)."""

    questions_per_step: AtLeastOne = 4
    """Questions in one training step."""

    num_generations: Annotated[int, Ge(2)] = 8
    """Responses per question: the group."""

    num_iterations: AtLeastOne = 1
    """Updates on each batch of responses; above 1 the clipped importance ratio matters."""

    credit: Literal["step", "final", "cot"] = "step"
    """step: each step its advantage (SSR); final, cot: one advantage per response from the final answer or
    from the mean step reward (the GSPO baselines)."""

    reward: list[str] = names_code(default_factory=list)
    """Reward of a response in place of the score of its final answer: module:function of your own, with the signature of
    TRL's reward_funcs (docs/critics.md). Give it again for several, which are added."""

    advantage: Literal["paper", "group", "hybrid"] = "group"
    """paper is eq. 9, whose advantages sum to zero within every response, good or bad; group is eq. 6 alone;
    hybrid adds the response's standing in its group to eq. 9."""

    advantage_sign: Literal["both", "positive", "negative"] = "both"
    """Learn from advantages of one sign only: positive reinforces what was better than the mean, negative suppresses what
    was worse. The others become 0 after the normalisation."""

    importance_level: Literal["token", "step", "sequence"] = "sequence"
    """Level of the importance ratio; sequence is the length-normalised ratio of GSPO."""

    clip_epsilon: Fraction = 0.2
    """The importance ratio is clipped to 1 - epsilon, 1 + epsilon."""

    epsilon_high: NotNegative | None = None
    """The upper clip is at 1 + this instead (DAPO)."""

    loss_type: Literal["step", "grpo", "dapo", "dr_grpo"] = "step"
    """Mean of the loss. step: over a step's tokens, then over the responses that have it; as in TRL, grpo: over a response's
    tokens, then over responses; dapo: over all tokens of the batch; dr_grpo: over responses times --max-new-tokens."""

    beta: NotNegative = 0.0
    """Weight of the KL divergence from the start model (estimator k3); above 0 a copy of its weights is kept."""

    mask_truncated: bool = False
    """Responses that are cut off by the limit give no gradient; they still count in the mean of their group."""

    resample_without_signal: ZeroOrMore = 0
    """Sample a question again, at most N times in a step, while all advantages of its group are 0."""

    protect: Path | None = None
    """Superweight mask whose coordinates never change: a file, or a name on the hub."""

    mask: Path | None = None
    """Train only the coordinates of this mask, a file or a name on the hub; budgets are shares of these then."""

    ignore_fingerprint: bool = False
    """Use a mask that was made for other weights of the same shapes."""

    budget: Share = 0.05
    """Share B of the unprotected coordinates that one question may claim."""

    max_step_budget: Share = 0.01
    """Largest share that one step may claim, k_max."""

    budget_rule: Literal["share", "paper"] = "share"
    """Rule that divides B among a question's steps. share: by the share of each step's gradient energy that is still
    unclaimed; what the cap k_max cuts off goes to the other steps. paper: by magnitude mass relative to the first step
    (SSR section 2.3.3); what the cap cuts off is lost."""

    budget_profile: str = "auto"
    """Budget profile: a file from `ssrctl profile-budget`, a name in profiles/budgets or on the hub, flat for equal
    budgets, or auto: the profile that ships for weights with this fingerprint, flat if there is none."""

    allocation: Literal["disjoint", "overlap", "pooled", "shuffled"] = "disjoint"
    """disjoint: no two steps of a question update the same weight. Controls: overlap, every step its own largest;
    pooled, the largest of all steps' gradients together; shuffled, each step gets the set of the step before."""

    scope: Literal["global", "tensor"] = "global"
    """global: one threshold over all weights; tensor: the same share of each tensor, whose gradient is dropped
    at once."""

    selection: Literal["exact", "block"] = "exact"
    """exact: the largest gradients; block: the paper's tile-wise approximation, whose recall is logged."""

    fuse_tol: NotNegative = 0.0
    """Neighbouring steps whose advantages over the group differ by less are updated as one; 0 is off."""

    max_units: AtLeastOne | None = None
    """Join the most similar neighbouring steps until a question has at most this many updates, which bounds the cost
    of long responses."""

    reuse_factor: Annotated[float, Ge(1)] | None = None
    """A step may take a claimed weight whose gradient is at least this many times the smallest free one's; off by
    default."""

    step_gradient: Literal["auto", "kept", "truncated", "chunked", "recomputed", "local"] = "auto"
    """Method of each step's gradient. kept, truncated, chunked and recomputed are exact and differ in cost and memory;
    auto takes the cheapest within --memory-limit (with --scope tensor kept or truncated: the others add up whole
    gradients); local ignores the effect of a step on earlier steps' keys and values."""

    units_at_once: AtLeastOne | None = None
    """Recomputed: steps that share a second forward pass. Each costs the memory of a gradient; auto plans it, else 1."""

    gradient_chunk_tokens: AtLeastOne | None = None
    """Recomputed: most tokens that go through the model together the second time; auto plans it, else 1,024, on CUDA 4,096."""

    logit_chunk_tokens: AtLeastOne = 128
    """Tokens whose logits over the whole vocabulary may exist at once."""


@dataclass(kw_only=True)
class OptimizerOptions(Config):
    """Settings of the optimizer."""

    panel = "Optimizer"

    optimizer: Literal["kronos", "adamw"] | None = None
    """kronos: per-step, disjoint, sparse updates; adamw: dense updates in the same loop, or with --mask updates
    and state for the masked weights only. By default kronos, with --mask adamw."""

    learning_rate: Positive | None = None
    """Step size; by default 3e-2 for kronos with sgd, 1e-5 with rms, 1e-3 for LoRA, and 1e-4 for everything else. It does
    not carry over between optimizers, rules or models."""

    update_rule: Literal["sgd", "adam", "rms"] = "sgd"
    """Kronos: update made of the kept gradient. sgd: the gradient itself; adam: moments for the weights that were ever
    selected; rms: each step's gradient, divided by its root mean square."""

    find_lr: bool = False
    """Instead of training, try a few steps at six learning rates around --learning-rate, from the same weights and on
    the same questions, and print the outcome of each."""

    find_lr_steps: AtLeastOne = 8
    """Training steps at each rate of --find-lr."""

    lr_scheduler_type: Literal["constant", "linear", "cosine", "constant_with_warmup"] = "constant"
    """Learning-rate schedule over --max-steps."""

    warmup_steps: ZeroOrMore = 0
    """Steps of linear warm-up, for the schedules that have one."""

    max_grad_norm: NotNegative = 1.0
    """Clip on the gradient's norm; for kronos that of the kept sparse gradient. 0 is off."""

    weight_decay: NotNegative = 0.0
    """Decoupled weight decay of adamw."""

    adam_beta1: Decay = 0.9
    """Decay of the first moment."""

    adam_beta2: Decay | None = None
    """Decay of the second moment; by default 0.95 for kronos, whose coordinates are selected now and then, and
    0.999 for adamw."""

    adam_epsilon: Positive = 1e-8
    """Added to the denominator of adam, adamw and rms."""

    lora_r: AtLeastOne | None = None
    """Train LoRA adapters of this rank, made by peft, with adamw; the model's own weights stay as they are."""

    lora_alpha: AtLeastOne = 32
    """With --lora-r: what an adapter adds is scaled by alpha / r."""

    lora_target_modules: list[str] = field(default_factory=list)
    """With --lora-r: name of the layers that get an adapter, or all-linear for every linear layer but the output head. Give it
    again for several. By default those that peft names for the architecture."""

    master_weights: bool = True
    """Keep, with bfloat16 or float16 weights, the exact float32 value of those that are updated."""

    gradient_checkpointing: bool = False
    """Keep only the inputs of the layers for the backward pass, which recomputes the rest: the same gradients, less
    memory, about a third more time. It uses the step gradients kept or truncated."""

    micro_batch_tokens: AtLeastOne | None = None
    """Run a question's responses in micro-batches of at most N tokens, prompts included, and add up their gradients: the
    gradient is that of one batch. A longer response is a micro-batch of its own."""

    memory_limit: Positive | None = None
    """GiB that --dry-run and the choice of step gradients plan for; by default what is free on the device."""


@dataclass(kw_only=True)
class CheckpointOptions(Config):
    """Settings of the checkpoints."""

    panel = "Checkpoints"

    save_steps: AtLeastOne = 50
    """Write a checkpoint every N steps, and at the end."""

    save_total_limit: AtLeastOne | None = None
    """Keep only the newest N checkpoints."""

    resume_from_checkpoint: str | None = None
    """A checkpoint folder, or latest to continue the run in --output-dir."""

    force: bool = False
    """Resume from an older checkpoint than the newest, and drop what the run did after it."""


@dataclass(kw_only=True)
class LoggingOptions(Config):
    """Settings of the logs."""

    panel = "Logging"

    logging_steps: AtLeastOne = 10
    """When the output is not a terminal, print a line every N steps."""

    report_to: list[str] = field(default_factory=list)
    """Also send metrics to this tracker: trackio, tensorboard, wandb or none. Give it again for several."""

    log_masks_every: ZeroOrMore = 10
    """Store every step's selected coordinates every N training steps; 0 is off."""

    log_base_kl_every: ZeroOrMore = 0
    """Measure the KL divergence from the start model every N training steps, without --beta, which measures it in each; a
    copy of the start weights is kept. 0 is off."""

    log_gradient_cosine: bool = False
    """With the masks, store the cosine between the per-step gradients before masking, and where their signs conflict
    (costs memory: one dense gradient per step)."""

    log_signs_every: ZeroOrMore = 0
    """Every N training steps, log the shares of the update that positive and negative advantages contribute; such a step
    takes two more backward passes. 0 is off."""

    log_gradients: ZeroOrMore = 0
    """Store a sketch of each batch's gradient every N steps, for `ssrctl diagnose RUN`; 0 is off."""

    log_gradients_size: Annotated[int, Ge(64)] = 65_536
    """Numbers in a stored sketch: inner products are off by sqrt(2 / size) of the product of the norms at most, in the
    mean square. A model with fewer weights is stored exactly."""

    def __post_init__(self) -> None:
        if isinstance(self.report_to, str):  # one name in a yaml file
            self.report_to = [self.report_to]
        super().__post_init__()
        self.report_to = list(dict.fromkeys(self.report_to))
        if odd := [name for name in self.report_to if name not in ("none", *TRACKERS)]:
            raise UserError(f"--report-to: '{odd[0]}' is not known", f"give {', '.join(TRACKERS)} or none")
        if "none" in self.report_to:
            if len(self.report_to) > 1:
                raise UserError(f"--report-to none excludes {self.report_to[-1]}", "leave one of them out")
            self.report_to = []


@dataclass(kw_only=True)
class ShardingOptions(ProcessOptions):
    """Settings of the division of one model over processes."""

    sharding: Literal["none", "fsdp2"] = "none"
    """none: each process has the whole model, and questions are divided. fsdp2: each has a shard of every weight, gradient
    and state, for models larger than a device; the responses of each question are divided (step gradients kept or
    truncated)."""

    sampling_weights: Literal["whole", "shards"] = "whole"
    """With fsdp2. whole: gather the whole weights once before sampling, and free them after it; shards: gather each layer
    for every token, for a model whose weights alone exceed a device. The samples are the same."""


@dataclass(kw_only=True)
class TrainConfig(
    ModelConfig,
    GradientOptions,
    DatasetConfig,
    MethodOptions,
    OptimizerOptions,
    SamplingConfig,
    EngineOptions,
    SegmentOptions,
    CriticOptions,
    CheckpointOptions,
    LoggingOptions,
    PageOptions,
    ShardingOptions,
    HubOptions,
):
    """Train with step-wise reinforcement learning and masked updates (SSR section 2.3).

    Example: ssrctl train --model Qwen/Qwen2.5-0.5B-Instruct --dataset problems.jsonl --output-dir runs/first
    """

    has_recipes = True

    output_dir: Path | None = output(None)
    """Run directory; by default a new one under runs/."""

    sample_together: Literal["step", "question"] | None = None
    """Responses that go through the model together. step: those of all questions of a process, which is fastest;
    question: those of one question, so that no response depends on the number of processes. By default step in one
    process, question in several."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.reward:
            check_name("--reward", name, REWARDS)
        if self.sample_together is None:
            self.sample_together = "question" if num_launched() > 1 or (self.num_processes or 1) > 1 else "step"
        if self.optimizer is None:
            self.optimizer = "kronos" if self.mask is None and self.lora_r is None else "adamw"
        if self.find_lr and self.push_to_hub is not None:
            raise UserError("--find-lr writes nothing that --push-to-hub could upload", "leave one of them out")
        if self.find_lr and self.resume_from_checkpoint is not None:
            raise UserError("--find-lr starts from the model's weights", "leave out --resume-from-checkpoint")
        if self.beta and self.log_base_kl_every:
            raise UserError("--log-base-kl-every has no effect with --beta: every step measures the KL", "leave it out")
        if self.force and self.resume_from_checkpoint is None:
            raise UserError("--force is for --resume-from-checkpoint", "leave it out, or name a checkpoint")
        if self.scope == "tensor" and self.step_gradient in ("chunked", "recomputed"):
            raise UserError(
                f"--step-gradient {self.step_gradient} adds up whole gradients, which --scope tensor never holds",
                "use --step-gradient auto, kept or truncated, or --scope global",
            )
        if self.importance_level == "sequence" and self.loss_type in ("dapo", "dr_grpo"):
            raise UserError(
                f"--loss-type {self.loss_type} sums over tokens, --importance-level sequence has one ratio per response: long "
                "responses would weigh more",
                "use --importance-level token, or --loss-type grpo",
            )
        if self.importance_level == "step" and self.correction_level == "token" and self.engine_correction != "none":
            raise UserError(
                "--engine-correction-level token weighs tokens, and --importance-level step has one term per step",
                "use --engine-correction-level step or sequence",
            )
        processes = max(num_launched(), self.num_processes or 1)
        if self.log_signs_every and processes > self.questions_per_step:
            raise UserError(
                f"--log-signs-every measures whole questions, and {processes} processes divide the responses of "
                f"{self.questions_per_step}",
                f"use at least {processes} --questions-per-step, or leave it out",
            )
        self._check_lora()
        self._check_optimizer()
        self._check_passes()
        if self.sharding != "none":
            self._check_sharding()
        elif self.sampling_weights != "whole":
            raise UserError(f"--sampling-weights {self.sampling_weights} is for --sharding fsdp2", "leave it out")
        if self.sampling_weights != "whole" and self.rollout_engine != "transformers":
            raise UserError(
                f"--sampling-weights {self.sampling_weights} is for --rollout-engine transformers: a server has all weights",
                "leave it out",
            )

    def _check_sharding(self) -> None:
        """Refuse what does not work on shards."""
        if num_launched() == 1 and not self.launches:
            raise UserError(
                f"--sharding {self.sharding} divides the model over processes, and there is one",
                "give --num-processes N, or start it with torchrun or accelerate launch",
            )
        whole = {
            f"--step-gradient {self.step_gradient}": self.step_gradient not in ("auto", "kept", "truncated"),
            "--micro-batch-tokens": self.micro_batch_tokens is not None,
            "--selection block": self.selection == "block",
            "--reuse-factor": self.reuse_factor is not None,
            "--optimizer adamw with --mask": self.optimizer == "adamw" and self.mask is not None,
            "--log-gradients": self.log_gradients > 0,
            "--log-gradient-cosine": self.log_gradient_cosine,
            "--log-signs-every": self.log_signs_every > 0,
            "--find-lr": self.find_lr,
            "--critic rollout with --sample-together step": (
                self.critic == "rollout" and self.sample_together == "step"
            ),
        }
        if odd := [name for name, given in whole.items() if given]:
            raise UserError(f"{', '.join(odd)} does not work with --sharding {self.sharding}", "leave one of them out")

    def _check_passes(self) -> None:
        """Refuse ways to the step gradients that exclude each other."""
        for name in ("units_at_once", "gradient_chunk_tokens"):
            if getattr(self, name) is not None and self.step_gradient not in ("auto", "recomputed"):
                raise UserError(
                    f"{flag(type(self), name)} has no meaning for --step-gradient {self.step_gradient}",
                    "use --step-gradient recomputed or auto",
                )
        if self.gradient_checkpointing and self.step_gradient not in ("auto", "kept", "truncated"):
            raise UserError(
                f"--step-gradient {self.step_gradient} keeps keys and values in a cache, which --gradient-checkpointing "
                "excludes",
                "use --step-gradient auto, kept or truncated",
            )
        if self.micro_batch_tokens is None:
            return
        if self.step_gradient not in ("auto", "truncated"):
            raise UserError(
                f"--step-gradient {self.step_gradient} runs all responses of a question together, and "
                "--micro-batch-tokens runs them apart",
                "use --step-gradient auto",
            )
        if self.scope == "tensor":
            raise UserError(
                "--scope tensor selects from each gradient as soon as it is computed, and --micro-batch-tokens adds up "
                "several",
                "use --scope global, or --gradient-checkpointing instead",
            )

    def _check_lora(self) -> None:
        """Refuse settings of LoRA without it, and those that it excludes."""
        if self.lora_r is None:
            if odd := self._given("lora_alpha", "lora_target_modules"):
                raise UserError(f"{odd[0]} is for --lora-r", "give --lora-r 16, or leave it out")
            return
        if self.optimizer == "kronos":
            raise UserError("--optimizer kronos does not work with --lora-r: adapters are trained whole", "use adamw")
        own, whole = "it is for the model's own weights, which do not change", "adapters are trained whole"
        reasons = {
            "protect": own, "mask": own, "rollout_engine": own, "sharding": "adapters are not sharded",
            "budget": whole, "max_step_budget": whole, "budget_rule": whole,
        }  # fmt: skip
        for name, reason in reasons.items():
            if odd := self._given(name):
                raise UserError(f"{odd[0]} does not work with --lora-r: {reason}", "leave one of them out")

    def _check_optimizer(self) -> None:
        """Refuse settings that the optimizer would ignore."""
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
            for name in ("log_gradient_cosine", "log_signs_every"):
                if self.scope == "tensor" and getattr(self, name):
                    raise UserError(
                        f"{flag(type(self), name)} needs whole gradients, which --scope tensor drops at once",
                        "use --scope global",
                    )
            if self.reuse_factor is not None and self.allocation != "disjoint":
                raise UserError(
                    f"--reuse-factor loosens the disjoint allocation; it has no meaning with {self.allocation}"
                )
            return
        odd = self._given(
            "update_rule", "scope", "allocation", "selection", "reuse_factor", "max_units", "log_gradient_cosine"
        )
        if odd:
            raise UserError(f"{', '.join(odd)} has no meaning for adamw", "use --optimizer kronos")

    def _given(self, *names: str) -> list[str]:
        """Return the flags of those of these settings that are not at their defaults."""
        defaults = {spec.name: default_of(spec) for spec in dataclasses.fields(self)}
        return [flag(type(self), name) for name in names if getattr(self, name) != defaults[name]]

    @property
    def gathers_whole(self) -> bool:
        """True if each process of a sharded run holds all weights while it samples."""
        return self.sampling_weights == "whole" and self.rollout_engine == "transformers"

    @property
    def correction_level(self) -> str:
        """The level of the engine's correction in force."""
        return self.engine_correction_level or ("step" if self.optimizer == "kronos" else self.importance_level)

    @property
    def resolved_learning_rate(self) -> float:
        """The learning rate in force."""
        if self.learning_rate is not None:
            return self.learning_rate
        if self.lora_r is not None:
            return 1e-3
        return {"sgd": 3e-2, "rms": 1e-5, "adam": 1e-4}[self.update_rule if self.optimizer == "kronos" else "adam"]

    @property
    def step_gradient_method(self) -> str:
        """The method in force: with scope tensor, auto takes one that needs no whole gradient."""
        if self.micro_batch_tokens is not None:
            return "accumulated"
        return "piecemeal" if self.step_gradient == "auto" and self.scope == "tensor" else self.step_gradient

    @property
    def keeps_start_weights(self) -> bool:
        """True if a copy of the weights that training starts from is kept."""
        return self.beta > 0 or self.log_base_kl_every > 0

    @property
    def betas(self) -> tuple[float, float]:
        """Decays of the two moments in force."""
        second = self.adam_beta2
        if second is None:
            second = 0.95 if self.optimizer == "kronos" else 0.999
        return self.adam_beta1, second
