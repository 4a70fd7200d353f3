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


command(app, "train", configs.TrainConfig, "ssrctl.stages.train:run")
command(app, "eval", configs.EvalConfig, "ssrctl.stages.eval:run")
command(app, "diagnose", configs.DiagnoseConfig, "ssrctl.stages.diagnose:run")
command(app, "report", configs.ReportConfig, "ssrctl.stages.report:run")
command(app, "superweights", configs.SuperweightsConfig, "ssrctl.stages.superweights:run")
command(app, "profile-budget", configs.ProfileBudgetConfig, "ssrctl.stages.profile_budget:run")
command(app, "segment", configs.SegmentConfig, "ssrctl.stages.segment:run")
command(app, "critic", configs.CriticConfig, "ssrctl.stages.critic:run")
command(app, "serve-rollouts", configs.ServeRolloutsConfig, "ssrctl.stages.serve_rollouts:run")
command(app, "push", configs.PushConfig, "ssrctl.stages.push:run")
command(app, "recipes", configs.RecipesConfig, "ssrctl.stages.recipes:run")
command(app, "doctor", configs.DoctorConfig, "ssrctl.stages.doctor:run")
command(app, "env", configs.DoctorConfig, "ssrctl.stages.doctor:run", hidden=True)

delta = _group("delta", "Make, apply and show sparse checkpoints: the coordinates that differ from a base model.")
command(delta, "diff", configs.DeltaDiffConfig, "ssrctl.stages.delta:run_diff")
command(delta, "apply", configs.DeltaApplyConfig, "ssrctl.stages.delta:run_apply")
command(delta, "info", configs.DeltaInfoConfig, "ssrctl.stages.delta:run_info")

mask = _group("mask", "Make, combine and show masks: the weights that `train --mask` trains.")
command(mask, "random", configs.MaskRandomConfig, "ssrctl.stages.mask:run_random")
command(mask, "principal", configs.MaskPrincipalConfig, "ssrctl.stages.mask:run_principal")
command(mask, "low-magnitude", configs.MaskLowMagnitudeConfig, "ssrctl.stages.mask:run_low_magnitude")
command(mask, "diff", configs.MaskDiffConfig, "ssrctl.stages.mask:run_diff")
command(mask, "layers", configs.MaskLayersConfig, "ssrctl.stages.mask:run_layers")
command(mask, "union", configs.MaskUnionConfig, "ssrctl.stages.mask:run_union")
command(mask, "intersect", configs.MaskIntersectConfig, "ssrctl.stages.mask:run_intersect")
command(mask, "minus", configs.MaskMinusConfig, "ssrctl.stages.mask:run_minus")
command(mask, "complement", configs.MaskComplementConfig, "ssrctl.stages.mask:run_complement")
command(mask, "compare", configs.MaskCompareConfig, "ssrctl.stages.mask:run_compare")
command(mask, "info", configs.MaskInfoConfig, "ssrctl.stages.mask:run_info")
