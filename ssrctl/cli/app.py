"""The command table: each subcommand is a config and a stage."""

from __future__ import annotations

from typing import Annotated

import typer

from ssrctl import configs
from ssrctl.cli.glue import command
from ssrctl.version import __version__

app = typer.Typer(
    name="ssrctl",
    help="Step-wise reinforcement learning with sparse, masked updates, and measurements of what they do.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ssrctl {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Step-wise reinforcement learning with sparse, masked updates, and measurements of what they do."""


def _group(name: str, help_text: str) -> typer.Typer:
    group = typer.Typer(
        name=name, help=help_text, no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]}
    )
    app.add_typer(group)
    return group


command(
    app,
    "train",
    configs.TrainConfig,
    "ssrctl.stages.train:run",
    "ssrctl train --model Qwen/Qwen2.5-0.5B-Instruct --dataset problems.jsonl --output-dir runs/first",
)
command(
    app,
    "eval",
    configs.EvalConfig,
    "ssrctl.stages.eval:run",
    "ssrctl eval --checkpoint runs/first --dataset problems.jsonl --num-samples 8 --output-dir eval/first",
)
command(
    app,
    "diagnose",
    configs.DiagnoseConfig,
    "ssrctl.stages.diagnose:run",
    "ssrctl diagnose base tuned --measures sparsity,rank",
)
command(
    app,
    "superweights",
    configs.SuperweightsConfig,
    "ssrctl.stages.superweights:run",
    "ssrctl superweights --model Qwen/Qwen2.5-0.5B-Instruct -o superweights.safetensors",
)
command(
    app,
    "profile-budget",
    configs.ProfileBudgetConfig,
    "ssrctl.stages.profile_budget:run",
    "ssrctl profile-budget --model Qwen/Qwen2.5-0.5B-Instruct --protect superweights.safetensors -o budget.json",
)
command(
    app,
    "segment",
    configs.SegmentConfig,
    "ssrctl.stages.segment:run",
    "ssrctl segment responses.jsonl -o steps.jsonl",
)
command(
    app,
    "critic",
    configs.CriticConfig,
    "ssrctl.stages.critic:run",
    "ssrctl critic steps.jsonl --critic llm --critic-model openai/gpt-oss-120b --budget-usd 5 -o scored.jsonl",
)
command(app, "env", configs.EnvConfig, "ssrctl.stages.env:run", "ssrctl env")

delta = _group("delta", "Make, apply and show sparse checkpoints: the coordinates that differ from a base model.")
command(
    delta,
    "diff",
    configs.DeltaDiffConfig,
    "ssrctl.stages.delta:run_diff",
    "ssrctl delta diff base tuned -o delta.safetensors",
)
command(
    delta,
    "apply",
    configs.DeltaApplyConfig,
    "ssrctl.stages.delta:run_apply",
    "ssrctl delta apply base runs/first -o tuned",
)
command(delta, "info", configs.DeltaInfoConfig, "ssrctl.stages.delta:run_info", "ssrctl delta info delta.safetensors")

mask = _group("mask", "Make, combine and show masks: the weights that `train --mask` trains.")
command(
    mask,
    "random",
    configs.MaskRandomConfig,
    "ssrctl.stages.mask:run_random",
    "ssrctl mask random --model base --density 0.01 -o mask.safetensors",
)
command(
    mask,
    "principal",
    configs.MaskPrincipalConfig,
    "ssrctl.stages.mask:run_principal",
    "ssrctl mask principal --model base --exclude '*embed*' -o mask.safetensors",
)
command(
    mask,
    "low-magnitude",
    configs.MaskLowMagnitudeConfig,
    "ssrctl.stages.mask:run_low_magnitude",
    "ssrctl mask low-magnitude --model base --density 0.1 -o mask.safetensors",
)
command(
    mask,
    "diff",
    configs.MaskDiffConfig,
    "ssrctl.stages.mask:run_diff",
    "ssrctl mask diff base tuned --changed-by bf16 -o mask.safetensors",
)
command(
    mask,
    "layers",
    configs.MaskLayersConfig,
    "ssrctl.stages.mask:run_layers",
    "ssrctl mask layers --model base --layers 0-3,7 -o mask.safetensors",
)
command(
    mask,
    "union",
    configs.MaskUnionConfig,
    "ssrctl.stages.mask:run_union",
    "ssrctl mask union a.safetensors b.safetensors -o either.safetensors",
)
command(
    mask,
    "intersect",
    configs.MaskIntersectConfig,
    "ssrctl.stages.mask:run_intersect",
    "ssrctl mask intersect a.safetensors b.safetensors -o both.safetensors",
)
command(
    mask,
    "minus",
    configs.MaskMinusConfig,
    "ssrctl.stages.mask:run_minus",
    "ssrctl mask minus a.safetensors b.safetensors -o rest.safetensors",
)
command(
    mask,
    "complement",
    configs.MaskComplementConfig,
    "ssrctl.stages.mask:run_complement",
    "ssrctl mask complement a.safetensors -o others.safetensors",
)
command(mask, "info", configs.MaskInfoConfig, "ssrctl.stages.mask:run_info", "ssrctl mask info a.safetensors")
