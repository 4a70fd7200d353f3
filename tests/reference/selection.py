"""Top-k by sorting every coordinate."""


def select(gradients, k, taken):
    """The k largest |g| that are not taken, ties to the lowest (tensor, index).

    Args:
        gradients: name -> tensor.
        k: how many.
        taken: name -> set of flat indices.
    """
    ranked = []
    for place, (name, gradient) in enumerate(gradients.items()):
        for index, value in enumerate(gradient.detach().double().flatten().tolist()):
            if index not in taken.get(name, ()):
                ranked.append((-abs(value), place, index))
    ranked.sort()
    names = list(gradients)
    chosen = {name: [] for name in names}
    for _, place, index in ranked[:k]:
        chosen[names[place]].append(index)
    return {name: sorted(indices) for name, indices in chosen.items()}
