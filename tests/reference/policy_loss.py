"""The clipped surrogate of one step and its gradient, token by token."""

import math


def step_loss(logprobs, old, step_ids, step, advantages, epsilon, level):
    """(loss, gradient with respect to logprobs, terms, clipped); nested lists in and out.

    A missing advantage is None. The gradients are written out by hand:
    token: d rho_t / d logp_t = rho_t; step: rho / n for each of the step's n tokens; sequence (GSPO-token):
    the ratio of the whole response stands before each of the step's tokens.
    """
    having = [j for j, row in enumerate(step_ids) if advantages[j] is not None and any(owner == step for owner in row)]
    gradient = [[0.0] * len(row) for row in step_ids]
    if not having:
        return None, gradient, 0, 0
    loss, terms, num_clipped = 0.0, 0, 0
    for j in having:
        advantage = advantages[j]
        inside = [t for t, owner in enumerate(step_ids[j]) if owner == step]
        response = [t for t, owner in enumerate(step_ids[j]) if owner >= 0]
        if level == "token":
            ratios = {t: math.exp(logprobs[j][t] - old[j][t]) for t in inside}
        else:
            over = inside if level == "step" else response
            mean = sum(logprobs[j][t] - old[j][t] for t in over) / len(over)
            ratios = dict.fromkeys(inside, math.exp(mean))
        weight = 1.0 / len(having) / len(inside)
        clipped_here = 0
        for t in inside:
            free = ratios[t] * advantage
            bounded = min(max(ratios[t], 1 - epsilon), 1 + epsilon) * advantage
            loss -= weight * min(free, bounded)
            if bounded < free:
                clipped_here += 1
            else:
                gradient[j][t] = -weight * free
        terms += 1 if level == "step" else len(inside)
        num_clipped += min(clipped_here, 1) if level == "step" else clipped_here
    return loss, gradient, terms, num_clipped
