"""A critic of your own: a class with one method. In this folder:

    ssrctl train --critic own_critic:OneEquation
    ssrctl critic steps.jsonl --critic own_critic:OneEquation -o scored.jsonl

or ``pip install`` it with the entry point ``one-equation = "own_critic:OneEquation"`` in the group ``ssrctl.critics``, and
name it ``--critic one-equation``. From Python: ``ssrctl.train(TrainConfig(), critic=OneEquation())``.
"""

from ssrctl import ResponseCritic, Rollout, StepScore, check_answer, missing, scored


class OneEquation(ResponseCritic):
    """Ask of each step that it has exactly one equation, and of the answer that it is right."""

    def score(self, rollout: Rollout) -> list[StepScore]:
        """Return a score in [-100, 100] for each step and in [0, 100] for the final answer."""
        scores = []
        for index, step in enumerate(rollout.steps or []):
            text = rollout.step_text(index)
            if step.kind == "final":
                right = check_answer(text, rollout.answer).correct
                scores.append(missing("answer_timeout") if right is None else scored(100.0 * right, "final"))
            else:
                equations = text.count("=")
                scores.append(scored(100.0 if equations == 1 else -100.0, "step", f"{equations} equations"))
        return scores
