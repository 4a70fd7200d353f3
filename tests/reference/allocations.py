"""Which coordinates the units of a question take, with dense boolean masks and sorted lists of every coordinate.

A mask is a dict of bool arrays by tensor name; ``units`` are (dense gradients by name, k) in step order. An
allocation returns (what each unit claimed, what each unit keeps: a mask and the gradients it is of).
"""

import numpy as np


def ranked(gradients, eligible):
    """(-|g|, tensor's place, flat index, tensor's name) of all eligible coordinates, best first."""
    return sorted(
        (-abs(float(value)), place, index, name)
        for place, name in enumerate(eligible)
        if name in gradients
        for index, value in enumerate(np.ravel(gradients[name]))
        if eligible[name].flat[index]
    )


def mask_of(found, like):
    mask = {name: np.zeros(array.shape, dtype=bool) for name, array in like.items()}
    for _, _, index, name in found:
        mask[name].flat[index] = True
    return mask


def best(gradients, k, eligible):
    return ranked(gradients, eligible)[:k]


def negated(mask):
    return {name: ~array for name, array in mask.items()}


def joined(one, other):
    return {name: one[name] | other[name] for name in one}


def disjoint(units, protected):
    claimed, sets = protected, []
    for gradients, k in units:
        sets.append(mask_of(best(gradients, k, negated(claimed)), protected))
        claimed = joined(claimed, sets[-1])
    return sets, [(mask, gradients) for mask, (gradients, _) in zip(sets, units, strict=True)]


def overlap(units, protected):
    sets = [mask_of(best(gradients, k, negated(protected)), protected) for gradients, k in units]
    return sets, [(mask, gradients) for mask, (gradients, _) in zip(sets, units, strict=True)]


def pooled(units, protected):
    """One set, of the sum of the gradients (added in float32, in step order) with the sum of the budgets."""
    total = {}
    for gradients, _ in units:
        for name, gradient in gradients.items():
            total[name] = total[name] + gradient if name in total else gradient
    mask = mask_of(best(total, sum(k for _, k in units), negated(protected)), protected)
    return [mask_of([], protected) for _ in units], [(mask, total)]


def shuffled(units, protected):
    sets, _ = disjoint(units, protected)
    return sets, [(sets[number - 1], gradients) for number, (gradients, _) in enumerate(units)]


def reusing(factor):
    """``disjoint``, but the best claimed coordinates replace the worst free ones that are ``factor`` times smaller."""

    def allocate(units, protected):
        claimed, sets = mask_of([], protected), []
        for gradients, k in units:
            chosen = best(gradients, k, negated(joined(claimed, protected)))
            reusable = {name: claimed[name] & ~protected[name] for name in protected}
            rivals, new = ranked(gradients, reusable), []
            while rivals and chosen and -rivals[0][0] >= factor * -chosen[-1][0]:
                new.append(rivals.pop(0))
                chosen.pop()
            sets.append(mask_of(chosen + new, protected))
            claimed = joined(claimed, sets[-1])
        return sets, [(mask, gradients) for mask, (gradients, _) in zip(sets, units, strict=True)]

    return allocate


def tensorwise(allocate):
    """``allocate`` for each tensor as if it were alone, with ``k * unprotected_t // unprotected`` of the budget."""

    def allocate_each(units, protected):
        free = {name: int((~mask).sum()) for name, mask in protected.items()}
        total = sum(free.values())
        sets = [{} for _ in units]
        kept = [({}, gradients) for gradients, _ in units]
        for name, mask in protected.items():
            alone = [({name: g[name]} if name in g else {}, k * free[name] // total if total else 0) for g, k in units]
            found, keeping = allocate(alone, {name: mask})
            for number in range(len(units)):
                sets[number] |= found[number]
                kept[number][0].update(keeping[number][0])
        return sets, kept

    return allocate_each


ALLOCATIONS = {"disjoint": disjoint, "overlap": overlap, "pooled": pooled, "shuffled": shuffled}
