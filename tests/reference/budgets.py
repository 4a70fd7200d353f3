"""Budgets by pouring: slow, in exact fractions, one round per overflow."""

from fractions import Fraction


def poured(weights, budget, cap):
    """Deal out ``budget`` by weight again and again; whoever would overflow is filled to ``cap`` and leaves."""
    budget, cap = Fraction(budget), Fraction(cap)
    level = [Fraction(0)] * len(weights)
    thirsty = {place for place, weight in enumerate(weights) if weight > 0}
    while budget > 0 and thirsty:
        total = sum(Fraction(weights[place]) for place in thirsty)
        portion = {place: budget * Fraction(weights[place]) / total for place in thirsty}
        full = {place for place in thirsty if portion[place] >= cap - level[place]}
        if not full:
            for place in thirsty:
                level[place] += portion[place]
            break
        for place in full:
            budget -= cap - level[place]
            level[place] = cap
        thirsty -= full
    return level
